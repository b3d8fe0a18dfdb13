"""Many processes as one: the process group, FSDP2 sharding, and whole weights for a rollout.

`World()`, a single process on a CPU in fp32, shards nothing, and every function does the plain
thing. Under torchrun, in bf16 and on a GPU, `shard` cuts every block with FSDP2 (bf16 compute, fp32
weights and gradient sums). Model tensors go over NCCL where there are GPUs. Dialogues and decisions
are Python objects over gloo, which waits for hours. All ranks must see the same file system.
"""

import os
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from config import Config, InputError
from model import PackedAttention, Transformer, add_adapters

PATIENCE = timedelta(hours=12)  # how long a rank waits for another whose users are slow


@dataclass(frozen=True)
class World:
    """This process among its like. Nothing is sharded without a mesh; `dtype` is the forward's."""

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
        """What every rank brought, in rank order, on every rank; each waits for all."""
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


def compute_type(precision: str, device: torch.device) -> torch.dtype:
    """What `precision` means: fp32, bf16, or auto, which is bf16 on a GPU alone."""
    half = precision == "bf16" or (precision == "auto" and device.type == "cuda")
    return torch.bfloat16 if half else torch.float32


def single(config: Config) -> World:
    """This process by itself, on the device of its config and in its precision."""
    device = pick_device(config)
    return World(device=device, dtype=compute_type(config.precision, device))


def start(config: Config) -> World:
    """Join torchrun's group; a GPU alone makes its own. Raises InputError if options do not fit."""
    device, several = pick_device(config), int(os.environ.get("WORLD_SIZE", 1)) > 1
    cuda, dtype = device.type == "cuda", compute_type(config.precision, device)
    if not several and not cuda and dtype == torch.float32:
        return World(device=device)
    if cuda:
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        alone = {} if several else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
        backend, timeout = ("nccl", None) if cuda else ("gloo", PATIENCE)
        dist.init_process_group(backend, timeout=timeout, **alone)
    size, shard = dist.get_world_size(), config.shard or dist.get_world_size()
    if size % shard:
        raise InputError(f"option 'shard' ({shard}) must divide the number of ranks ({size})")
    copies = size // shard
    shape, names = ((size,), None) if copies == 1 else ((copies, shard), ("replicate", "shard"))
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=names)
    group = dist.new_group(backend="gloo", timeout=PATIENCE)
    return World(dist.get_rank(), size, device, dtype, mesh, group)


def close() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def shard(model: Transformer, world: World) -> None:
    """Cut every block and the rest (embedding, norm, head) over the mesh, before any forward."""
    if world.mesh is None:
        return
    # With cast_forward_inputs the fp32 rotary tables would become bf16.
    mixed = MixedPrecisionPolicy(world.dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in model.model.layers:
        fully_shard(block, mesh=world.mesh, mp_policy=mixed)
    # The root stays whole until backward, since log-probs use the output weight outside forward.
    fully_shard(model, mesh=world.mesh, mp_policy=mixed, reshard_after_forward=False)
    model.sharded_type = world.dtype


@contextmanager
def gathered(model: Transformer, world: World):
    """Whole parameters for generation, where forward must not need another rank."""
    # Every rank must enter; they may leave at different times.
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
    """A second, whole copy of the policy in the compute precision; `refill` gives it values."""
    targets = config.lora_targets.split(",")
    with torch.device("meta"):
        replica = Transformer(model.raw)
        if config.lora_rank:  # kept apart: merged into bf16 weights, most would be rounded away
            add_adapters(replica, ["policy"], config.lora_rank, config.lora_alpha, targets)
    return replica.to(world.dtype).to_empty(device=world.device).requires_grad_(False)


@torch.no_grad()
def refill(replica: Transformer, model: Transformer) -> None:
    """Copy the policy's weights into its replica; all ranks together."""
    found = dict(model.named_parameters())
    for name, place in replica.named_parameters():
        place.copy_(whole(found[name]))


def clip_gradients(parameters: list[nn.Parameter], limit: float, world: World) -> float:
    """Average gradients over ranks, scale all to a norm <= `limit`; returns the norm before."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    sharded = [g for g in gradients if isinstance(g, DTensor)]
    plain = [g for g in gradients if not isinstance(g, DTensor)]
    if world.size > 1:  # FSDP has averaged the sharded ones
        for g in plain:
            dist.all_reduce(g)
            g /= world.size
    norms = [whole(nn.utils.get_total_norm(part)) for part in (sharded, plain) if part]
    norm = float(torch.stack(norms).norm())  # of the whole gradient, whoever holds it
    for g in gradients:
        g.mul_(min(1.0, limit / (norm + 1e-6)))
    return norm


def rows(parameter: Tensor) -> slice:
    """The rows of the whole tensor that this rank holds: all, or FSDP2's even cut along dim 0."""
    if not isinstance(parameter, DTensor):
        return slice(0, parameter.shape[0])
    dim = parameter.placements.index(Shard(0))
    ranks, mine = parameter.device_mesh.size(dim), parameter.device_mesh.get_local_rank(dim)
    step = -(-parameter.shape[0] // ranks)
    begin = min(mine * step, parameter.shape[0])
    return slice(begin, min(begin + step, parameter.shape[0]))


def local(parameter: Tensor) -> Tensor:
    """The tensor of those rows."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def whole(tensor: Tensor) -> Tensor:
    """The whole tensor, detached; every rank must call this together."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()
