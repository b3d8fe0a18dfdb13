"""Hugging Face folders in and out: strict loading, whole or only a rank's slice; saving; adapters in PEFT's format.

safetensors only, nothing is unpickled. A model is built on the meta device, prepared there (cut, given adapters,
sharded), and only then gets memory and values, so that no rank ever holds more than its part. `rows` and `local` are
all that a sharded parameter needs here: which rows of the whole tensor are this rank's, and where they lie.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from config import InputError, find_folder
from model import FAMILIES, Linear, Transformer


def read_json(path: Path) -> dict:
    """A JSON object from a file. Raises InputError if it is missing or damaged."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(raw, dict):
            raise ValueError("an object is expected")
        return raw
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; a model folder and a checkpoint have one") from None
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error})") from None


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


def rows(parameter: Tensor) -> slice:
    """The rows of the whole tensor that this rank holds: all, or FSDP2's even cut along dimension 0."""
    if not isinstance(parameter, DTensor):
        return slice(0, parameter.shape[0])
    dim = parameter.placements.index(Shard(0))
    ranks, mine = parameter.device_mesh.size(dim), parameter.device_mesh.get_local_rank(dim)
    step = -(-parameter.shape[0] // ranks)
    begin = min(mine * step, parameter.shape[0])
    return slice(begin, min(begin + step, parameter.shape[0]))


def local(parameter: Tensor) -> Tensor:
    """Where those rows lie."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def whole(tensor: Tensor) -> Tensor:
    """The whole tensor, detached; every rank must call this together."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()


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


def sync(path: Path) -> None:
    """Make what was written to a file, or renamed within a folder, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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


def save_adapter(model: Transformer, base: str, rank: int, alpha: float, folder: Path, main: bool = True) -> None:
    """Write the policy's adapter as `peft` reads it: adapter_config.json and adapter_model.safetensors. As above."""
    gathered, targets = {}, set()
    for name, parameter in model.named_parameters():
        path, _, side = name.removesuffix(".policy.weight").rpartition(".lora_")  # side: A or B
        if side in ("A", "B"):
            gathered[f"base_model.model.{path}.lora_{side}.weight"] = whole(parameter).cpu().contiguous()
            targets.add(path.rpartition(".")[2])
    if not main:
        return
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "r": rank, "lora_alpha": alpha,
        "target_modules": sorted(targets), "lora_dropout": 0.0, "bias": "none", "inference_mode": True,
    }  # fmt: skip
    with written_aside(folder) as aside:
        (aside / "adapter_config.json").write_text(json.dumps(config, indent=1) + "\n")
        save_file(gathered, aside / "adapter_model.safetensors", metadata={"format": "pt"})
