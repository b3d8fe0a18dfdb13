"""Checkpoints: what a run needs to go on exactly where it was, written so that a kill at any moment harms nothing.

A checkpoint is a folder `ckpt/step_N` with safetensors (weights and optimiser states by parameter name) and a small
state.json. It is written under another name, synced to disk, then renamed: a folder called step_N is complete.
"""

import json
import os
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from config import InputError
from model import load_strictly, read_json, read_tensors


def optimiser_tensors(optimiser: torch.optim.Optimizer, names: dict[int, str]) -> dict[str, Tensor]:
    """AdamW's state as tensors called <parameter name>:<exp_avg|exp_avg_sq|step>; `names`: id(parameter) -> name."""
    return {f"{names[id(p)]}:{key}": value for p, state in optimiser.state.items() for key, value in state.items()}


def fill_optimiser(
    optimiser: torch.optim.Optimizer, names: dict[int, str], tensors: dict[str, Tensor], where: str
) -> None:
    """Put back what `optimiser_tensors` took out. Raises InputError where a state is missing or misshapen."""
    for group in optimiser.param_groups:
        for parameter in group["params"]:
            prefix = names[id(parameter)] + ":"
            state = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
            if set(state) != {"exp_avg", "exp_avg_sq", "step"} or state["exp_avg"].shape != parameter.shape:
                raise InputError(
                    f"{where}: the optimiser's state of {prefix[:-1]} is missing or of another shape; "
                    "this checkpoint is of another model"
                )
            optimiser.state[parameter] = {
                key: value.to(parameter.device if value.dim() else "cpu") for key, value in state.items()
            }


def parameter_names(modules: dict[str, nn.Module]) -> dict[int, str]:
    """id(parameter) -> "<module>.<parameter name>", over all modules of a run."""
    return {id(p): f"{key}.{name}" for key, module in modules.items() for name, p in module.named_parameters()}


def save_checkpoint(
    run: Path, step: int, modules: dict[str, nn.Module], optimisers: list[torch.optim.Optimizer], keep: int
) -> Path:
    """Write ckpt/step_N; afterwards only the newest `keep` checkpoints are left. Returns the folder."""
    folder, aside = run / "ckpt" / f"step_{step}", run / "ckpt" / f"step_{step}.partial"
    for left in folder.parent.glob("*.partial"):  # by a kill
        shutil.rmtree(left)
    aside.mkdir(parents=True)
    for key, module in modules.items():
        weights = {name: p.detach().cpu().contiguous() for name, p in module.named_parameters()}
        save_file(weights, aside / f"{key}.safetensors")
    names, states = parameter_names(modules), {}
    for optimiser in optimisers:
        states |= {name: tensor.cpu() for name, tensor in optimiser_tensors(optimiser, names).items()}
    save_file({**states, "rng": torch.get_rng_state()}, aside / "optimiser.safetensors")
    (aside / "state.json").write_text(json.dumps({"step": step}) + "\n")
    for file in aside.iterdir():
        with open(file, "rb+") as handle:
            os.fsync(handle.fileno())
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(aside, folder)
    sync_folder(folder.parent)
    for old in checkpoints(run)[:-keep]:
        shutil.rmtree(old)
    return folder


def sync_folder(folder: Path) -> None:
    """Make a rename in this folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def checkpoints(run: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    folders = [folder for folder in (run / "ckpt").glob("step_*") if folder.name[5:].isdigit()]
    return sorted(folders, key=lambda folder: int(folder.name[5:]))


def load_checkpoint(folder: Path, modules: dict[str, nn.Module], optimisers: list[torch.optim.Optimizer]) -> int:
    """Fill modules and optimisers in place; returns the step. Raises InputError for a damaged or foreign checkpoint."""
    step = read_json(folder / "state.json").get("step")
    tensors = {key: read_tensors(folder / f"{key}.safetensors") for key in modules}
    states = read_tensors(folder / "optimiser.safetensors")
    if type(step) is not int:
        raise InputError(f"{folder / 'state.json'}: has no number step; no checkpoint, or a damaged one")
    if "rng" not in states:
        raise InputError(f"{folder / 'optimiser.safetensors'}: has no tensor rng; no checkpoint, or a damaged one")
    for key, module in modules.items():
        device = next(module.parameters()).device
        on_device = {name: tensor.to(device) for name, tensor in tensors[key].items()}
        load_strictly(module, on_device, str(folder / f"{key}.safetensors"), assign=False)
    torch.set_rng_state(states.pop("rng"))
    names = parameter_names(modules)
    for optimiser in optimisers if states else ():  # before the first update there is nothing to put back
        fill_optimiser(optimiser, names, states, str(folder))
    return step
