"""Writes and reads weights, never by pickle: Hugging Face folders, PEFT adapters, checkpoints.

A model is built on the meta device and prepared there (head removed, adapters added, sharded). Only
then it gets memory and values, so that no rank ever holds more than its part.

A checkpoint is a folder `ckpt/step_N` in the layout of torch.distributed.checkpoint (DCP), readable
by any number of ranks. It is written elsewhere, synced, then renamed, so a step_N is complete.
"""

import json
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException

from config import Config, InputError, read_json, sync
from dist import World, local, rows, whole
from model import FAMILIES, Linear, Transformer, find_folder

FILE_BYTES = 1 << 30  # per checkpoint file, all ranks together; each holds its part twice to write
Modules = dict[str, nn.Module]  # by what they are: policy, critic, value_head
Optimisers = list[torch.optim.Optimizer]
# DCP would warn at every save and load that it takes a missing process group for a single process.
warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")


def load_model(name: str, seed: int = 0, device: torch.device | str = "cpu",
               prepare: Callable[[Transformer], None] | None = None) -> Transformer:  # fmt: skip
    """An fp32 model from a Hugging Face folder or hub name; a random one from a *.json shape file.

    `prepare` may change it on the meta device. Raises InputError for damaged or misfit tensors.
    """
    folder = None if name.endswith(".json") else find_folder(name)
    path = folder / "config.json" if folder else Path(name)
    with torch.device("meta"):
        model = Transformer(read_json(path), str(path))
    if prepare:
        prepare(model)
    model.to_empty(device=device)
    init_weights(model, seed, only_adapters=folder is not None)
    if folder:
        load_strictly(model, open_weights(folder), str(folder))
    return model


def open_weights(folder: Path) -> dict[str, object]:
    """A folder's tensors, unread: `[a:b]` reads rows. Raises InputError for bad or absent files."""
    index = folder / "model.safetensors.index.json"
    shards = read_json(index).get("weight_map") if index.is_file() else {"": "model.safetensors"}
    if not shards:
        raise InputError(f"{index}: has no weight_map; fetch the model again")
    found = {}
    try:
        for path in sorted({folder / file for file in shards.values()}):
            file = safe_open(path, framework="pt")
            found.update({key: file.get_slice(key) for key in file.keys()})  # slices keep it open
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; weights are read from safetensors only") from None
    except SafetensorError as why:
        raise InputError(f"{path}: truncated or damaged ({why}); fetch or write it again") from None
    return found


def own_parameters(model: Transformer) -> dict[str, nn.Parameter]:
    """The parameters that a Hugging Face folder holds: all but the adapters."""
    return {name: p for name, p in model.named_parameters() if ".lora_" not in name}


@torch.no_grad()
def load_strictly(model: Transformer, found: dict[str, object], where: str) -> None:
    """Fill all but the adapters; a rank reads its rows alone. Raises InputError for any misfit."""
    expected = own_parameters(model)
    # Old rotary buffers, and the lm_head of a tied model, repeat what the model has already.
    known = {name for name in found if not name.endswith("rotary_emb.inv_freq")}
    if "lm_head.weight" not in expected:
        known.discard("lm_head.weight")
    missing, unknown = expected.keys() - known, known - expected.keys()
    for problem, names in (("missing", missing), ("unknown", unknown)):
        if names:
            example = f"{len(names)} {problem} tensors, for example {min(names)}"
            raise InputError(f"{where}: {example}; the weights do not fit config.json")
    for name, parameter in expected.items():
        shape, wanted = tuple(found[name].get_shape()), tuple(parameter.shape)
        if shape != wanted:
            problem = f"tensor {name} has shape {shape}, not {wanted}"
            raise InputError(f"{where}: {problem} as config.json says")
        local(parameter).copy_(found[name][rows(parameter)])


@torch.no_grad()
def init_weights(model: Transformer, seed: int, only_adapters: bool = False) -> None:
    """Random weights, adapters as in PEFT. They depend on the seed alone, not on the sharding."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        drawn = torch.empty(parameter.shape, device="cpu")
        if ".lora_A" in name:
            bound = parameter.shape[1] ** -0.5
            nn.init.uniform_(drawn, -bound, bound, generator=generator)
        elif ".lora_B" in name:
            nn.init.zeros_(drawn)
        elif only_adapters:
            continue
        elif parameter.dim() == 2:
            nn.init.normal_(drawn, std=model.config.init_std, generator=generator)
        else:
            nn.init.constant_(drawn, 0.0 if name.endswith("bias") else 1.0)
        local(parameter).copy_(drawn[rows(parameter)])


def whole_weights(model: Transformer) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, whole tensor), the policy's adapter merged in; every rank must go through it."""
    layers = {f"{path}.weight": layer for path, layer in model.named_modules()}
    for name, parameter in own_parameters(model).items():
        tensor, layer = whole(parameter), layers.get(name)
        if isinstance(layer, Linear) and "policy" in layer.lora_A:
            a, b = (whole(side["policy"].weight).float() for side in (layer.lora_A, layer.lora_B))
            tensor = tensor.float() + layer.scale * (b @ a)
        yield name, tensor


@contextmanager
def written_aside(folder: Path) -> Iterator[Path]:
    """An empty FOLDER.partial to write into; it replaces the folder once it is whole and on disk.

    An exception leaves the old folder. If killed, either the old folder or FOLDER.old survives.
    """
    aside, old = (folder.with_name(folder.name + ending) for ending in (".partial", ".old"))
    for left in (aside, old):
        shutil.rmtree(left, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        yield aside
        for path in [*aside.rglob("*"), aside]:
            sync(path)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    if folder.exists():
        os.replace(folder, old)
    os.replace(aside, folder)
    sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def save_model(model: Transformer, tokenizer, folder: Path, main: bool = True,
               dtype: torch.dtype = torch.float32) -> None:  # fmt: skip
    """Write a Hugging Face folder, adapters merged in. Every rank calls this, `main` writes.

    A merged model wants fp32: what an adapter adds is smaller than the spacing of bf16 numbers.
    """
    from huggingface_hub import save_torch_state_dict

    gathered = {name: x.to("cpu", dtype).contiguous() for name, x in whole_weights(model) if main}
    raw = {**model.raw, "architectures": [FAMILIES[model.config.family]]}
    raw["dtype"] = str(dtype).removeprefix("torch.")
    raw.pop("torch_dtype", None)
    if main:
        with written_aside(folder) as aside:
            (aside / "config.json").write_text(json.dumps(raw, indent=2) + "\n")
            save_torch_state_dict(gathered, aside)
            tokenizer.save_pretrained(aside)


def save_adapter(model: Transformer, config: Config, folder: Path, main: bool = True) -> None:
    """Write the policy's adapter in PEFT's format. Every rank calls this, `main` writes."""
    gathered, targets = {}, set()
    for name, parameter in model.named_parameters():
        path, _, side = name.removesuffix(".policy.weight").rpartition(".")
        if side in ("lora_A", "lora_B"):
            gathered[f"base_model.model.{path}.{side}.weight"] = whole(parameter).cpu().contiguous()
            targets.add(path.rpartition(".")[2])
    about = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "bias": "none",
             "base_model_name_or_path": config.model, "r": config.lora_rank,
             "lora_alpha": config.lora_alpha, "lora_dropout": 0.0, "inference_mode": True,
             "target_modules": sorted(targets)}  # fmt: skip
    if main:
        with written_aside(folder) as aside:
            (aside / "adapter_config.json").write_text(json.dumps(about, indent=1) + "\n")
            save_file(gathered, aside / "adapter_model.safetensors", metadata={"format": "pt"})


# ---- checkpoints of a run


class SaveError(Exception):
    """A checkpoint or model could not be written; earlier ones are intact. Its text is one line."""


def adam_state(parameter: nn.Parameter) -> dict[str, Tensor]:
    """AdamW's state of a parameter before its first step."""
    zeros = {k: torch.zeros_like(parameter, requires_grad=False) for k in ("exp_avg", "exp_avg_sq")}
    return {"step": torch.zeros((), device=parameter.device), **zeros}


def checkpoint_tensors(modules: Modules, optimisers: Optimisers) -> dict[str, Tensor]:
    """Trained parameters, MODULE.NAME, and AdamW's states, MODULE.NAME:KEY; views to load into."""
    named = {f"{key}.{n}": p for key, m in modules.items() for n, p in m.named_parameters()}
    found = {name: p.detach() for name, p in named.items() if p.requires_grad}
    names = {id(p): name for name, p in named.items()}
    for optimiser in optimisers:
        for p, state in optimiser.state.items():
            found |= {f"{names[id(p)]}:{key}": value for key, value in state.items()}
    return {name: tensor.view(1) if tensor.dim() == 0 else tensor for name, tensor in found.items()}


def save_checkpoint(run: Path, step: int, modules: Modules, optimisers: Optimisers,
                    world: World) -> Path:  # fmt: skip
    """Write ckpt/step_N, all ranks together. If one cannot, all raise SaveError."""
    folder, aside = (run / "ckpt" / f"step_{step}{ending}" for ending in ("", ".partial"))

    def begin() -> None:
        for left in folder.parent.glob("*.partial"):  # of a killed run
            shutil.rmtree(left)
        aside.mkdir(parents=True)

    def write() -> None:
        tensors = {**checkpoint_tensors(modules, optimisers), "rng": torch.get_rng_state()}
        sizes = accumulate(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        files = {name: 1 + size // FILE_BYTES for name, size in zip(tensors, sizes)}
        out = dcp.HuggingFaceStorageWriter(str(aside), files, save_distributed=True)
        dcp.save(tensors, storage_writer=out, process_group=world.group, no_dist=world.mesh is None)

    def finish() -> None:
        info = {"step": step, "ranks": world.size, "dtype": str(world.dtype).removeprefix("torch.")}
        info["files"] = {file.name: file.stat().st_size for file in sorted(aside.iterdir())}
        (aside / "state.json").write_text(json.dumps(info, indent=1) + "\n")
        sync(aside / "state.json")
        sync(aside)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(aside, folder)
        sync(folder.parent)

    for stage, everyone in ((begin, False), (write, True), (finish, False)):
        try:
            agree(world, folder, stage if everyone or world.main else None)
        except SaveError:
            if world.main:
                shutil.rmtree(aside, ignore_errors=True)
            raise
    return folder


def agree(world: World, what: Path, work: Callable[[], object] | None) -> None:
    """Do this rank's `work`, if any, of writing `what`. If one rank fails, all raise SaveError."""
    why = ""
    try:
        if work:
            work()
    except CheckpointException as error:
        why = next(str(cause[0]) or repr(cause[0]) for cause in error.failures.values())
    except (OSError, SafetensorError) as error:
        why = str(error) or repr(error)
    if why := next(filter(None, world.gather(why)), ""):
        raise SaveError(f"{what}: could not be written ({why.strip().splitlines()[-1]})")


def checkpoints(run: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    folders = [folder for folder in (run / "ckpt").glob("step_*") if folder.name[5:].isdigit()]
    return sorted(folders, key=lambda folder: int(folder.name[5:]))


def prune(run: Path, keep: int, best: int | None) -> None:
    """Leave only the newest `keep` checkpoints, and that of step `best`."""
    for old in checkpoints(run)[:-keep]:
        if old.name != f"step_{best}":
            half = old.replace(old.with_name(f"{old.name}.partial"))  # no step_N ever lacks a file
            shutil.rmtree(half, ignore_errors=True)


def check_files(folder: Path) -> int:
    """The step of a checkpoint. Raises InputError where a file is missing, truncated or damaged."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such checkpoint")
    path = folder / "state.json"
    state = read_json(path)
    step, files = state.get("step"), state.get("files")
    if type(step) is not int or not isinstance(files, dict):
        raise InputError(f"{path}: has no number step and files; no checkpoint, or a damaged one")
    for name, size in files.items():
        path = folder / name
        found = path.stat().st_size if path.is_file() else None
        if found != size:
            what = "is missing" if found is None else f"has {found} bytes, not {size}"
            raise InputError(f"{path}: {what}; this checkpoint is damaged")
        try:
            safe_open(path, framework="pt")
        except SafetensorError as error:
            raise InputError(f"{path}: damaged ({error})") from None
    return step


def newest_sound(run: Path, world: World) -> Path | None:
    """The newest undamaged checkpoint, None where a run has none; damaged newer ones are renamed.

    The main rank decides for all. Raises InputError if every checkpoint is damaged.
    """
    found, passed_over = None, []
    for folder in reversed(checkpoints(run)) if world.main else ():
        try:
            check_files(folder)
            found = folder
            break
        except InputError as error:
            passed_over.append((folder, str(error)))
    for folder, why in passed_over if found else ():
        aside = folder.with_name(f"{folder.name}.damaged")
        print(f"warning: {why}; it is now {aside.name}; going back to {found}", file=sys.stderr)
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(folder, aside)
    found, passed_over = world.gather((found, passed_over))[0]
    if passed_over and not found:
        advice = f"the run has no sound one, remove {run / 'ckpt'} to begin again"
        raise InputError(f"{passed_over[0][1]}; {advice}")
    return found


def load_checkpoint(folder: Path, modules: Modules, optimisers: Optimisers | None = None) -> int:
    """Fill modules and optimisers in place, however many ranks saved them; returns the step.

    Without optimisers only modules are read. Raises InputError for damaged or foreign checkpoints.
    """
    step = check_files(folder)
    reader = dcp.HuggingFaceStorageReader(str(folder))
    saved = {k: tuple(v.size) for k, v in reader.read_metadata().state_dict_metadata.items()}
    if any(name.endswith(":exp_avg") for name in saved):  # AdamW has no state before its first step
        for optimiser in optimisers or ():
            for parameter in (p for group in optimiser.param_groups for p in group["params"]):
                optimiser.state[parameter] = adam_state(parameter)
    tensors = checkpoint_tensors(modules, optimisers or [])
    other_model = "this checkpoint is of another model"
    if optimisers is not None:
        tensors["rng"] = torch.get_rng_state()
        if foreign := saved.keys() - tensors.keys():
            raise InputError(f"{folder}: holds {min(foreign)}, unknown here; {other_model}")
    for name, tensor in tensors.items():
        if (shape := saved.get(name)) != tuple(tensor.shape):
            why = f"has shape {shape}, not {tuple(tensor.shape)}" if name in saved else "is missing"
            raise InputError(f"{folder}: tensor {name} {why}; {other_model}")
    dcp.load(tensors, storage_reader=reader, no_dist=True)  # each rank reads by itself
    if optimisers is not None:
        torch.set_rng_state(tensors["rng"])
    return step
