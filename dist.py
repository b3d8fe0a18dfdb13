"""Many processes as one: the process group, FSDP2 sharding, whole weights for a rollout, and checkpoints.

A single process on a CPU needs none of it: `World()` is one rank, nothing is sharded, and every function here does
the plain thing. Under torchrun, and on a GPU always, `shard` cuts every block with FSDP2 (bf16 compute, fp32 master
weights and gradient sums). Ranks speak of dialogues and decisions as Python objects over gloo, which waits for hours;
tensors of the model go over NCCL where there are GPUs.

A checkpoint is a folder `ckpt/step_N` of safetensors in the layout of torch.distributed.checkpoint, each rank's shard
with its offsets, so that any number of ranks can read it. It is written under another name, synced to disk, then
renamed: a folder called step_N is complete.
"""

import json
import os
import shutil
import sys
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from config import Config, InputError
from model import PackedAttention, Transformer, add_adapters
from weights import read_json, sync, whole

PATIENCE = timedelta(hours=12)  # how long a rank waits for another whose users are slow
FILE_BYTES = 1 << 30  # of one checkpoint file, over all ranks: a rank holds two copies of its part while it writes


class SaveError(Exception):
    """A checkpoint or a model could not be written; those before are untouched. The message is one line."""


# A single process is meant where there is no process group; DCP warns of it at every save and load.
warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")


@dataclass(frozen=True)
class World:
    """This process among its like. Without a mesh nothing is sharded; `dtype` is what forward computes in."""

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")
    dtype: torch.dtype = torch.float32
    mesh: DeviceMesh | None = None
    group: object = None  # gloo

    @property
    def main(self) -> bool:
        """Whether this rank writes and prints."""
        return self.rank == 0

    def gather(self, mine: object) -> list:
        """What every rank brought, in the order of ranks, on every rank; nobody goes on before all are here."""
        if self.size == 1:
            return [mine]
        everyone = [None] * self.size
        dist.all_gather_object(everyone, mine, group=self.group)
        return everyone


def pick_device(config: Config) -> torch.device:
    """The device a config names. Raises InputError for cuda where there is none."""
    if config.device == "cuda" and not torch.cuda.is_available():
        raise InputError("option 'device' is cuda, but no GPU is to be seen; use device=cpu")
    if config.threads:
        torch.set_num_threads(config.threads)
    if config.device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


def start(config: Config) -> World:
    """Join the process group that torchrun describes, if any; a GPU alone makes a group of its own.

    Raises InputError where `shard` or `precision` do not fit. All ranks must see the same file system.
    """
    device, several = pick_device(config), int(os.environ.get("WORLD_SIZE", 1)) > 1
    cuda = device.type == "cuda"
    half = config.precision == "bf16" or (cuda and config.precision == "auto")
    if not several and not cuda:
        if half:
            raise InputError("option 'precision' is bf16, which a single process on a CPU cannot; use precision=fp32")
        return World(device=device)
    if cuda:
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        alone = {} if several else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
        dist.init_process_group("nccl" if cuda else "gloo", timeout=None if cuda else PATIENCE, **alone)
    size, shard = dist.get_world_size(), config.shard or dist.get_world_size()
    if size % shard:
        raise InputError(f"option 'shard' ({shard}) must divide the number of ranks ({size})")
    if shard == size:
        mesh = init_device_mesh(device.type, (size,))
    else:
        mesh = init_device_mesh(device.type, (size // shard, shard), mesh_dim_names=("replicate", "shard"))
    group = dist.new_group(backend="gloo", timeout=PATIENCE)
    return World(dist.get_rank(), size, device, torch.bfloat16 if half else torch.float32, mesh, group)


def close() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def shard(model: Transformer, world: World) -> None:
    """Cut every block and the rest (embedding, norm, head) over the mesh. Before any forward, best on meta."""
    if world.mesh is None:
        return
    # cast_forward_inputs would make the fp32 rotary tables bf16
    policy = MixedPrecisionPolicy(param_dtype=world.dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in model.model.layers:
        fully_shard(block, mesh=world.mesh, mp_policy=policy)
    # The root stays whole between forward and backward, since log-probabilities use the output weight outside it.
    fully_shard(model, mesh=world.mesh, mp_policy=policy, reshard_after_forward=False)


@contextmanager
def gathered(model: Transformer, world: World):
    """Within this block all parameters are whole, and forward needs no other rank: for generation.

    Every rank must enter; they may leave at different times.
    """
    parts = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
    if parts:
        with torch.no_grad():  # gathers each part as it comes to it
            nothing = torch.zeros(1, dtype=torch.long, device=world.device)
            model(nothing, nothing, PackedAttention([0, 1], world.device))
    try:
        yield
    finally:
        for part in parts:
            part.set_reshard_after_forward(part is not model, recurse=False)
        release(model)


def release(model: Transformer) -> None:
    """Free what a forward pass without a backward pass left gathered."""
    for part in model.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def make_replica(model: Transformer, config: Config, world: World) -> Transformer:
    """A second, whole copy of the policy in the compute precision; `refill` gives it values.

    Its adapter stays apart: merged into bf16 weights most of it would be rounded away.
    """
    with torch.device("meta"):
        replica = Transformer(model.raw)
        if config.lora_rank:
            add_adapters(replica, ["policy"], config.lora_rank, config.lora_alpha, config.lora_targets.split(","))
    return replica.to(world.dtype).to_empty(device=world.device).requires_grad_(False)


@torch.no_grad()
def refill(replica: Transformer, model: Transformer) -> None:
    """Copy the policy's weights into its replica; all ranks together."""
    found = dict(model.named_parameters())
    for name, place in replica.named_parameters():
        place.copy_(whole(found[name]))


def clip_gradients(parameters: list[nn.Parameter], limit: float, world: World) -> float:
    """Average replicated gradients over ranks, scale all to a norm of at most `limit`; returns the norm before.

    FSDP has averaged those of sharded parameters. The norm is that of the whole gradient, whoever holds it.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    sharded = [g for g in gradients if isinstance(g, DTensor)]
    plain = [g for g in gradients if not isinstance(g, DTensor)]
    if world.size > 1:
        for g in plain:
            dist.all_reduce(g)
            g /= world.size
    norms = [whole(nn.utils.get_total_norm(part)) for part in (sharded, plain) if part]
    norm = float(torch.stack(norms).norm())
    for g in gradients:
        g.mul_(min(1.0, limit / (norm + 1e-6)))
    return norm


# ---- checkpoints


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
