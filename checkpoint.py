"""All that writes or reads weights: Hugging Face folders in and out, adapters in PEFT's format, a run's checkpoints.

safetensors only, nothing is unpickled. A model is built on the meta device, prepared there (cut, given adapters,
sharded), and only then gets memory and values, so that no rank ever holds more than its part.

A checkpoint is a folder `ckpt/step_N` in the layout of torch.distributed.checkpoint, each rank's shard with its
offsets, so that any number of ranks can read it. It is written under another name, synced to disk, then renamed: a
folder called step_N is complete.
"""

import json
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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

FILE_BYTES = 1 << 30  # of one checkpoint file, over all ranks: a rank holds two copies of its part while it writes
# A single process is meant where there is no process group; DCP warns of it at every save and load.
warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")


def load_model(
    name: str, seed: int = 0, device: torch.device | str = "cpu", prepare: Callable[[Transformer], None] | None = None
) -> Transformer:
    """A Transformer from a Hugging Face folder or hub name, or with random weights from a shape file (*.json).

    `prepare(model)` changes it while it is on the meta device; weights are in fp32 unless it says otherwise. Loading is
    strict: raises InputError for missing, unknown, misshapen or damaged tensors.
    """
    shape = Path(name) if name.endswith(".json") else None
    folder = None if shape else find_folder(name)
    path = shape or folder / "config.json"
    with torch.device("meta"):
        model = Transformer(read_json(path), str(path))
    if prepare:
        prepare(model)
    model.to_empty(device=device)
    init_weights(model, seed, only_adapters=not shape)
    if not shape:
        load_strictly(model, open_weights(folder), str(folder))
    return model


def open_weights(folder: Path) -> dict[str, object]:
    """The tensors of a folder by name, unread: `[a:b]` reads those rows, `.get_shape()` none.

    Raises InputError for a file that is missing, truncated or damaged.
    """
    index = folder / "model.safetensors.index.json"
    shards = read_json(index).get("weight_map", {}) if index.is_file() else {"": "model.safetensors"}
    if not shards:
        raise InputError(f"{index}: has no weight_map; fetch the model again")
    found = {}
    for path in sorted({folder / file for file in shards.values()}):
        try:
            file = safe_open(path, framework="pt")
        except FileNotFoundError:
            raise InputError(f"{path}: no such file; weights are read from safetensors only") from None
        except SafetensorError as error:
            raise InputError(f"{path}: truncated or damaged ({error}); fetch or write it again") from None
        found.update({key: file.get_slice(key) for key in file.keys()})  # a slice keeps its file open
    return found


def own_parameters(model: Transformer) -> dict[str, nn.Parameter]:
    """The parameters that a Hugging Face folder holds: all but the adapters."""
    return {name: p for name, p in model.named_parameters() if ".lora_" not in name}


@torch.no_grad()
def load_strictly(model: Transformer, found: dict[str, object], where: str) -> None:
    """Fill a model, adapters apart, from `open_weights`; each rank reads its rows alone.

    A tied model's lm_head and old rotary buffers are passed over. Raises InputError for any other difference.
    """
    expected = own_parameters(model)
    known = {name for name in found if not name.endswith("rotary_emb.inv_freq")}
    if "lm_head.weight" not in expected:
        known.discard("lm_head.weight")
    missing, unknown = expected.keys() - known, known - expected.keys()
    for problem, names in (("missing", missing), ("unknown", unknown)):
        if names:
            example = f"{len(names)} {problem} tensors, for example {min(names)}"
            raise InputError(f"{where}: {example}; the weights do not fit config.json")
    for name, parameter in expected.items():
        shape = tuple(found[name].get_shape())
        if shape != tuple(parameter.shape):
            wanted = tuple(parameter.shape)
            raise InputError(f"{where}: tensor {name} has shape {shape}, not {wanted} as config.json says")
        local(parameter).copy_(found[name][rows(parameter)])


@torch.no_grad()
def init_weights(model: Transformer, seed: int, only_adapters: bool = False) -> None:
    """Random weights, a function of the seed alone, however the model is sharded.

    Matrices: normal with Hugging Face's initializer_range. Adapters: A uniform in +-1/sqrt(in), B zero, as in PEFT.
    """
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
    """(Hugging Face name, whole tensor) one by one, the policy's adapter merged in; all ranks must go through it."""
    layers = {f"{path}.weight": layer for path, layer in model.named_modules() if isinstance(layer, Linear)}
    for name, parameter in own_parameters(model).items():
        tensor, layer = whole(parameter), layers.get(name)
        if layer is not None and "policy" in layer.lora_A:
            a, b = (whole(side["policy"].weight).float() for side in (layer.lora_A, layer.lora_B))
            tensor = tensor.float() + layer.scale * (b @ a)
        yield name, tensor


@contextmanager
def written_aside(folder: Path) -> Iterator[Path]:
    """An empty FOLDER.partial to write into, which takes the folder's place once it is whole and on disk.

    A kill leaves the old folder, or it as FOLDER.old beside nothing; the next call cleans up. An exception leaves the
    old one.
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


def save_model(
    model: Transformer, tokenizer, folder: Path, main: bool = True, dtype: torch.dtype = torch.float32
) -> None:
    """Write a Hugging Face folder: config.json, safetensors of at most 5 GB each, tokenizer; adapters are merged in.

    Every rank calls this, the `main` one writes. A merged model wants fp32: what an adapter adds is smaller than the
    spacing of bf16 numbers.
    """
    from huggingface_hub import save_torch_state_dict

    gathered = {}
    for name, tensor in whole_weights(model):
        if main:
            gathered[name] = tensor.to("cpu", dtype).contiguous()
    if not main:
        return
    raw = {**model.raw, "architectures": [FAMILIES[model.config.family]], "dtype": str(dtype).removeprefix("torch.")}
    raw.pop("torch_dtype", None)
    with written_aside(folder) as aside:
        (aside / "config.json").write_text(json.dumps(raw, indent=2) + "\n")
        save_torch_state_dict(gathered, aside)
        tokenizer.save_pretrained(aside)


def save_adapter(model: Transformer, config: Config, folder: Path, main: bool = True) -> None:
    """Write the policy's adapter as `peft` reads it: adapter_config.json and adapter_model.safetensors. As above."""
    gathered, targets = {}, set()
    for name, parameter in model.named_parameters():
        path, _, side = name.removesuffix(".policy.weight").rpartition(".lora_")  # side: A or B
        if side in ("A", "B"):
            gathered[f"base_model.model.{path}.lora_{side}.weight"] = whole(parameter).cpu().contiguous()
            targets.add(path.rpartition(".")[2])
    if not main:
        return
    about = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": config.model, "bias": "none",
        "r": config.lora_rank, "lora_alpha": config.lora_alpha, "lora_dropout": 0.0, "inference_mode": True,
        "target_modules": sorted(targets),
    }  # fmt: skip
    with written_aside(folder) as aside:
        (aside / "adapter_config.json").write_text(json.dumps(about, indent=1) + "\n")
        save_file(gathered, aside / "adapter_model.safetensors", metadata={"format": "pt"})


# ---- checkpoints of a run


class SaveError(Exception):
    """A checkpoint or a model could not be written; those before are untouched. The message is one line."""


def adam_state(parameter: nn.Parameter) -> dict[str, Tensor]:
    """AdamW's state of a parameter before its first step."""
    zeros = {key: torch.zeros_like(parameter, requires_grad=False) for key in ("exp_avg", "exp_avg_sq")}
    return {"step": torch.zeros((), device=parameter.device), **zeros}


def checkpoint_tensors(modules: dict[str, nn.Module], optimisers: list[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """What a checkpoint holds, by name: trained parameters `MODULE.NAME`, AdamW's states `MODULE.NAME:KEY`.

    What is frozen is not in it. The tensors are views: loading into them fills modules and optimisers.
    """
    named = {f"{key}.{n}": p for key, m in modules.items() for n, p in m.named_parameters() if p.requires_grad}
    names = {id(p): name for name, p in named.items()}
    found = {name: p.detach() for name, p in named.items()}
    for optimiser in optimisers:
        for p, state in optimiser.state.items():
            found |= {f"{names[id(p)]}:{key}": value for key, value in state.items()}
    return {name: tensor.view(1) if tensor.dim() == 0 else tensor for name, tensor in found.items()}


def save_checkpoint(
    run: Path, step: int, modules: dict[str, nn.Module], optimisers: list[torch.optim.Optimizer], world: World
) -> Path:
    """Write ckpt/step_N, all ranks together. Raises SaveError, on every rank, where the disk is full or the like."""
    folder, aside = run / "ckpt" / f"step_{step}", run / "ckpt" / f"step_{step}.partial"

    def begin() -> None:
        for left in folder.parent.glob("*.partial"):  # by a kill
            shutil.rmtree(left)
        aside.mkdir(parents=True)

    def write() -> None:
        tensors = {**checkpoint_tensors(modules, optimisers), "rng": torch.get_rng_state()}
        files, size = {}, 0
        for name, tensor in tensors.items():
            size += tensor.numel() * tensor.element_size()
            files[name] = 1 + size // FILE_BYTES
        writer = dcp.HuggingFaceStorageWriter(str(aside), files, save_distributed=True)
        dcp.save(tensors, storage_writer=writer, process_group=world.group, no_dist=world.mesh is None)

    def finish() -> None:
        about = {"step": step, "ranks": world.size, "dtype": str(world.dtype).removeprefix("torch.")}
        about["files"] = {file.name: file.stat().st_size for file in sorted(aside.iterdir())}
        (aside / "state.json").write_text(json.dumps(about, indent=1) + "\n")
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
    """Do the `work` of writing `what`, where there is some; if any rank could not write, raise SaveError on all."""
    why = ""
    try:
        if work:
            work()
    except CheckpointException as error:
        why = next(str(cause[0]) or repr(cause[0]) for cause in error.failures.values())
    except (OSError, SafetensorError) as error:
        why = str(error) or repr(error)
    why = next((said for said in world.gather(why) if said), "")
    if why:
        raise SaveError(f"{what}: could not be written ({why.strip().splitlines()[-1]})")


def checkpoints(run: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    folders = [folder for folder in (run / "ckpt").glob("step_*") if folder.name[5:].isdigit()]
    return sorted(folders, key=lambda folder: int(folder.name[5:]))


def prune(run: Path, keep: int, best: int | None) -> None:
    """Leave only the newest `keep` checkpoints, and that of step `best`."""
    for old in checkpoints(run)[:-keep]:
        if old.name != f"step_{best}":
            half = old.with_name(f"{old.name}.partial")  # never a step_N that lacks a file
            os.replace(old, half)
            shutil.rmtree(half, ignore_errors=True)


def check_files(folder: Path) -> int:
    """The step of a checkpoint. Raises InputError where a file is missing, truncated or damaged."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such checkpoint")
    state = read_json(folder / "state.json")
    step, files = state.get("step"), state.get("files")
    if type(step) is not int or not isinstance(files, dict):
        raise InputError(f"{folder / 'state.json'}: has no number step and files; no checkpoint, or a damaged one")
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
    """The newest checkpoint of a run whose files are all there; each that is passed over is renamed, with a warning.

    None where there is no checkpoint at all. Raises InputError where all are damaged. The main rank decides for all.
    """
    found, passed_over = None, []
    for folder in reversed(checkpoints(run)) if world.main else ():
        try:
            check_files(folder)
            found = folder
            break
        except InputError as error:
            passed_over.append((folder, str(error)))
    if found:
        for folder, problem in passed_over:
            aside = folder.with_name(f"{folder.name}.damaged")
            print(f"warning: {problem}; it is now {aside.name}; going back to {found}", file=sys.stderr)
            shutil.rmtree(aside, ignore_errors=True)
            os.replace(folder, aside)
    found, passed_over = world.gather((found, passed_over))[0]
    if passed_over and not found:
        raise InputError(f"{passed_over[0][1]}; the run has no sound one, remove {run / 'ckpt'} to begin again")
    return found


def load_checkpoint(
    folder: Path, modules: dict[str, nn.Module], optimisers: list[torch.optim.Optimizer] | None = None
) -> int:
    """Fill modules and optimisers in place, from whatever number of ranks it was saved; returns the step.

    Without optimisers only the modules' tensors are read. Raises InputError for a damaged or foreign checkpoint.
    """
    step = check_files(folder)
    reader = dcp.HuggingFaceStorageReader(str(folder))
    saved = {name: tuple(entry.size) for name, entry in reader.read_metadata().state_dict_metadata.items()}
    rng = torch.get_rng_state()
    started = any(name.endswith(":exp_avg") for name in saved)  # before the first update AdamW has no state
    for optimiser in optimisers or ():
        for parameter in (p for group in optimiser.param_groups for p in group["params"]):
            if started:
                optimiser.state[parameter] = adam_state(parameter)
    tensors = checkpoint_tensors(modules, optimisers or [])
    if optimisers is not None:
        tensors["rng"] = rng
        foreign = saved.keys() - tensors.keys()
        if foreign:
            raise InputError(f"{folder}: holds {min(foreign)}, unknown here; this checkpoint is of another model")
    for name, tensor in tensors.items():
        if saved.get(name) != tuple(tensor.shape):
            what = f"has shape {saved[name]}, not {tuple(tensor.shape)}" if name in saved else "is missing"
            raise InputError(f"{folder}: tensor {name} {what}; this checkpoint is of another model")
    dcp.load(tensors, storage_reader=reader, no_dist=True)  # each rank reads by itself
    if optimisers is not None:
        torch.set_rng_state(rng)
    return step
