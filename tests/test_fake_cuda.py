"""The CUDA path without a GPU: whole updates of a sharded model, fake tensors on "cuda", a fake group of 8 ranks.

Tensors on the CPU are real. Those on the GPU have shape, type and device, but no numbers: an update runs as it would on
a GPU, kernels apart. `Gpu` sees every operation. It raises where a tensor on the CPU meets one on the GPU, notes who
copies from one to the other or fetches a number (then the host waits for the GPU), and counts the bytes that are alive,
which are held against scripts/plan.py. Collectives move nothing: other ranks are thought to have what this one has.

All this changes torch from within, so it happens in a process of its own; its findings go into a file of FOLDER:

    PYTHONPATH=. python tests/test_fake_cuda.py FOLDER CASE ...
"""

import ctypes
import gc
import json
import os
import subprocess
import sys
import traceback
import types
import weakref
from collections import Counter
from contextlib import ExitStack, nullcontext
from dataclasses import fields, replace
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.testing._internal.distributed.fake_pg  # noqa: F401, the backend "fake"
from conftest import tiny_raw
from ranks import tiny_banned
from torch import library as extension
from torch._guards import active_fake_mode
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import checkpoint
import dist
import engine
import model
import ppo
from chat import Reply
from config import Config
from model import ModelConfig, Transformer, ValueHead
from rollout import Batch, Dialogue, Turn
from scripts.plan import ALWAYS, BACKWARD, LOSS, memory, model_shape
from simulator import UserTurn
from update import build, update

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="opens torch's libraries by the names they have there")
ROOT = Path(__file__).parent.parent
RANKS, STEPS, PIECES = 8, 2, 2
GRPO, RECOMPUTED = {"algorithm": "grpo"}, {"checkpointing": True}
SMALL = {  # two layers; STEPS optimiser steps, each on PIECES micro-batches of every rank
    "ppo_trunk": RECOMPUTED,
    "ppo_head": {"critic": "head", "generation": "replica"},
    "ppo_lora": {"lora_rank": 4},
    "grpo_kl_2x4": {**GRPO, "kl_coef": 0.1, "credit": "turn", "shard": 4},
    "grpo_kl_lora": {**GRPO, "kl_coef": 0.1, "lora_rank": 4, "generation": "replica"},
    "grpo_without_flash": GRPO,
}
LARGE = {  # three layers of Qwen2.5-1.5B; tokens of a micro-batch, options
    "ppo_recomputed": (2200, RECOMPUTED),
    "grpo": (16384, GRPO),
    "grpo_recomputed": (32768, {**GRPO, **RECOMPUTED}),
    "lora_recomputed": (32768, {**GRPO, **RECOMPUTED, "lora_rank": 32}),
}
DECODING = {"decode": ("qwen3", False), "decode_flash": ("qwen2", True), "stray": ("llama", False)}
to, policy_loss = Batch.to, ppo.policy_loss
BROKEN = {  # a tensor that does not come along to the GPU, as one of many or as an index; a loss that is looked at
    "vector": (Batch, "to", lambda batch, device: replace(to(batch, device), logp_T=batch.logp_T)),
    "index": (Batch, "to", lambda batch, device: replace(to(batch, device), trained_N=batch.trained_N)),
    "looked_at": (ppo, "policy_loss", lambda logp, *others: (bool(logp.sum() > 0), policy_loss(logp, *others))[1]),
}


class Gpu(TorchDispatchMode):
    """Has operations on CUDA tensors done by fake ones, and watches. `storages`: address -> bytes."""

    def __init__(self):
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.waits, self.storages, self.now, self.most = Counter(), {}, 0, 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs, aten = kwargs or {}, torch.ops.aten
        if DTensor in types:
            return NotImplemented  # it comes again, as an operation on this rank's part
        leaves = tree_leaves((args, kwargs))
        here = any(isinstance(x, FakeTensor) or (isinstance(x, torch.device) and x.type == "cuda") for x in leaves)
        if active_fake_mode() or not here:
            return op(*args, **kwargs)  # DTensor works out a shape, or all is on the CPU
        if op is aten._local_scalar_dense.default:
            self.wait()
            return torch.ones((), dtype=args[0].dtype).item()
        outside = [x for x in leaves if isinstance(x, torch.Tensor) and x.device.type == "cpu" and x.dim()]
        copy = op in (aten._to_copy.default, aten.copy_.default)
        if outside and not copy:
            raise RuntimeError(f"{op}: one tensor is on the CPU, {outside[0].dtype} {list(outside[0].shape)}")
        with self.fake:
            out = op(*args, **kwargs)
        if copy and (outside or out.device.type == "cpu"):
            self.wait()
        if copy and out.device.type == "cpu":
            return torch.ones(out.shape, dtype=out.dtype)
        for x in tree_leaves(out):
            if isinstance(x, FakeTensor):
                self.count(x.untyped_storage())
        return out

    def wait(self) -> None:
        """Note the function of ours that has the host wait."""
        frame = sys._getframe()
        while frame and Path(frame.f_code.co_filename).parent != ROOT:
            frame = frame.f_back
        self.waits[frame.f_code.co_qualname.split(".<")[0] if frame else "torch"] += 1

    def count(self, storage: torch.UntypedStorage) -> None:
        """Note the size of a storage that is new, or resized, as FSDP does to free it."""
        address, size = storage._cdata, storage.nbytes()
        if address not in self.storages:
            weakref.finalize(storage, self.gone, address)
        self.now += size - self.storages.get(address, 0)
        self.storages[address], self.most = size, max(self.most, self.now)

    def gone(self, address: int) -> None:
        self.now -= self.storages.pop(address)


class Order:
    """A stream or an event. All happens in order here, and the host can wait for neither: it would find no method."""

    device = torch.device("cuda", 0)

    def __init__(self, *args, **kwargs):
        pass

    def record(self, *args, **kwargs):
        return self

    wait = wait_event = wait_stream = record_event = record


class Flash(torch.autograd.Function):
    """flash_attn_varlen_func, in what it takes, returns and keeps."""

    @staticmethod
    def forward(ctx, q, k, v, ends_q, ends_k, longest_q, longest_k, causal):
        assert all(x.dtype == torch.bfloat16 and x.is_cuda and x.stride(-1) == 1 for x in (q, k, v)) and causal
        assert ends_q is ends_k and ends_q.dtype == torch.int32 and ends_q.is_cuda and longest_q == longest_k
        out, logsumexp = torch.empty_like(q), q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)
        ctx.save_for_backward(q, k, v, out, logsumexp)
        return out

    @staticmethod
    def backward(ctx, grad):
        return *(torch.empty_like(x) for x in ctx.saved_tensors[:3]), *[None] * 5


def pretend_cuda(gpu: Gpu) -> list:
    """Give torch what it would ask a driver for; returns what must be kept. Before the first fake tensor on CUDA."""
    stand_ins = {"Stream": Order, "Event": Order, "current_stream": Order, "stream": lambda stream: nullcontext(),
                 "is_initialized": lambda: True, "current_device": lambda: 0}  # fmt: skip
    for name, stand_in in stand_ins.items():
        setattr(torch.cuda, name, stand_in)
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device="cuda"): made on the CPU, then copied
    torch.utils.weakref = types.SimpleNamespace(getweakrefs=lambda tensor: [])  # or FakeTensorMode's stop Module.to
    FakeTensor.tolist = lambda x: x.cpu().tolist()  # one copy, as of a real tensor
    resize = torch.UntypedStorage.resize_

    def resize_(storage, size):
        resize(storage, size)
        if storage._cdata in gpu.storages:
            gpu.count(storage)

    torch.UntypedStorage.resize_ = resize_
    if torch.version.cuda:
        return []
    # A CPU build of torch has no device guard for CUDA. It has a mock to put in the place of a guard that sees no
    # device, but none in the place of nothing. So there shall be one, each of whose methods returns 0.
    pointer, method, libraries = ctypes.c_void_p, ctypes.CFUNCTYPE(ctypes.c_long), Path(torch.__file__).parent / "lib"
    no, yes = method(lambda: 0), method(lambda: 1)
    methods = (pointer * 64)(*[ctypes.cast(no, pointer).value] * 64)
    guard = pointer(ctypes.addressof(methods))
    guards = (pointer * 2).in_dll(ctypes.CDLL(libraries / "libc10.so"), "_ZN3c104impl26device_guard_impl_registryE")
    guards[1] = ctypes.addressof(guard)
    torch._C._ensureCUDADeviceGuardSet()
    # Autograd wants streams of an accelerator, which such a build has not either: isBuilt, isAvailable and
    # hasPrimaryContext, the first methods of its CUDA hooks behind two destructors, shall say yes.
    find = ctypes.CDLL(libraries / "libtorch_cpu.so")["_ZN2at6detail12getCUDAHooksEv"]
    find.restype = pointer
    hooks = pointer.from_address(find())
    answers = (pointer * 64)(*(pointer * 64).from_address(hooks.value))
    answers[2:5] = [ctypes.cast(yes, pointer).value] * 3
    hooks.value = ctypes.addressof(answers)
    assert torch.accelerator.current_accelerator().type == "cuda"
    # Without a CUDA kernel this one would be many operations, which need more memory.
    kernels = extension.Library("aten", "IMPL")
    kernels.impl("silu_backward", lambda *args: None, "CUDA")
    return [no, yes, methods, guard, answers, kernels]


def run(case: str, gpu: Gpu, folder: Path) -> dict:
    """What `Gpu` saw of one update."""
    tokens, options = LARGE.get(case, (60, SMALL.get(case, GRPO)))
    steps, name, layers = (1, "qwen2.5-1.5b-instruct", 3) if case in LARGE else (STEPS, "tiny", 2)
    raw = json.loads((ROOT / f"configs/shapes/{name}.json").read_text()) | {"num_hidden_layers": layers}
    (folder / "shape.json").write_text(json.dumps(raw))
    config = Config(model=str(folder / "shape.json"), micro_tokens=tokens, context_tokens=tokens, minibatches=steps,
                    group_size=RANKS * PIECES * steps, **options)  # fmt: skip
    split = (RANKS // config.shard, config.shard) if config.shard else (RANKS,)
    mesh = dist.init_device_mesh("cuda", split, mesh_dim_names=("replicate", "shard")[-len(split) :])
    world = dist.World(0, RANKS, torch.device("cuda", 0), torch.bfloat16, mesh)
    half, hello = tokens // 2, UserTurn("hello", 30.0)
    turn = Turn([7] * half, [8] * half, [-1.0] * half, [0.0] * half, Reply([], ""), "cap", UserTurn("ok", 40.0))
    dialogues = [Dialogue((0, i), None, 0, hello, [turn], "max_turns") for i in range(config.group_size)]
    patches = [(dist.World, "gather", lambda world, mine: [mine] * world.size)]
    patches += [(model, "flash_attn_varlen_func", None if case == "grpo_without_flash" else Flash.apply)]
    patches += [(checkpoint, "init_weights")] if case in LARGE else []  # numbers for nobody
    patches += [BROKEN[case]] if case in BROKEN else []
    gc.collect()
    before = gpu.now
    with ExitStack() as stack:
        for each in patches:
            stack.enter_context(patch.object(*each))
        stack.enter_context(gpu)
        state = build(config, world)
        banned = tiny_banned(state.policy.config.vocab_size).to(world.device)
        for optimiser in state.optimisers:  # as after a first step
            for p in (p for group in optimiser.param_groups for p in group["params"]):
                optimiser.state[p] = checkpoint.adam_state(p)
        if state.sampler:
            dist.refill(state.sampler, state.policy)
        with dist.gathered(state.sampler or state.policy, world):
            pass
        gpu.most, gpu.waits = gpu.now, Counter()
        metrics = update(state, config, dialogues, banned, world)
    plan = memory(config, model_shape(config.model), RANKS)
    always = sum(plan[ALWAYS].values()) - plan[ALWAYS]["KV cache"] - plan[ALWAYS]["CUDA context and allowance"]
    planned, highest = max((always + sum(plan[phase].values()), phase) for phase in (LOSS, BACKWARD))
    return {"waits": dict(gpu.waits), "skipped": metrics["skipped"], "optimisers": len(state.optimisers),
            "planned": planned, "highest": highest, "most": gpu.most - before}  # fmt: skip


def decode(case: str, gpu: Gpu, folder: Path) -> dict:
    """What `Gpu` saw of a decode step, as it is captured in a graph, after a prefill."""
    name, flash = DECODING[case]
    config = ModelConfig.from_hf(raw := tiny_raw(name), "here")
    cache = (config.num_kv_heads, config.head_dim)

    def attend(q, keys, values, k, v, cache_seqlens, cache_batch_idx):
        assert q.shape == (4, 1, config.num_heads, cache[1]) and k.shape == v.shape == (4, 1, *cache)
        assert keys.shape == values.shape == (9, 64, *cache) and keys.stride(-1) == 1
        assert cache_seqlens.dtype == cache_batch_idx.dtype == torch.int32 and cache_seqlens.is_cuda
        return torch.empty_like(q)

    with torch.device("meta"):
        parts = Transformer(raw).to(torch.bfloat16), ValueHead(raw["hidden_size"])
    gc.collect()
    with patch.object(engine, "flash_attn_with_kvcache", attend if flash else None), gpu, torch.no_grad():
        model, head = (part.to_empty(device="cuda") for part in parts)
        if case == "stray":
            head.forward = lambda hidden: hidden[:, 0].float() + torch.zeros(len(hidden))
        banned, stop = torch.zeros(raw["vocab_size"], dtype=torch.bool), (256,)
        eng = engine.Engine(model, engine.Sampling(banned, stop, 0.7), 8, 64, head)
        for slot in range(3):
            eng.submit(slot, [1, 2, 3 + slot], (slot,), 5)
        eng.step()
        captured = eng.graphs is not None and eng.graphs.captured == {}
        place, gpu.waits = torch.full((4,), eng.spare, device="cuda"), Counter()
        code = eng.advance(place, engine.Decode(eng.cache, place, []), 64)
        waits, where = dict(gpu.waits), str(code.device)
        code.tolist()
    return {"waits": waits, "device": where, "graphs": captured, "after": dict(gpu.waits)}


def main(folder: Path, *cases: str) -> None:
    """Each case's findings, or the error it raised."""
    torch.set_num_threads(1)
    gpu, found = Gpu(), {}
    kept = pretend_cuda(gpu)  # noqa: F841
    torch.distributed.init_process_group("fake", rank=0, world_size=RANKS)
    for case in cases:
        try:
            found[case] = (decode if case in DECODING else run)(case, gpu, folder)
        except Exception:
            found[case] = {"error": traceback.format_exc()}
    (folder / "found.json").write_text(json.dumps(found, indent=1))


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fake")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, str(folder), *SMALL, *LARGE, *BROKEN, *DECODING]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads((folder / "found.json").read_text())


@pytest.mark.parametrize("case", SMALL)
def test_the_host_waits_for_the_gpu_before_and_after_the_micro_batches_and_never_between(found, case):
    """Before the first come the tokens, old values and advantages; after the last, one row of metrics, and norms."""
    assert found[case].get("skipped") == 0, found[case].get("error")
    pieces, vectors = STEPS * PIECES, 2 if case.startswith("ppo") else 1  # advantages and returns, or advantages
    waits = {"make_pieces": STEPS, "Batch.to": pieces * sum(field.type is torch.Tensor for field in fields(Batch))}
    waits |= {"PackedAttention.__init__": pieces, "scatter": pieces * vectors}
    waits |= {"by_dialogue": pieces} if case.startswith("ppo") else {}
    waits |= {"learn": STEPS, "clip_gradients": STEPS * found[case]["optimisers"]}
    assert found[case]["waits"] == waits


@pytest.mark.parametrize("case", LARGE)
def test_an_update_needs_the_memory_that_is_planned(found, case):
    """Or a little less. The plan adds up what is never there at once: the critic's root, still gathered from scoring
    at the first micro-batch, and gradients of an earlier one; at the loss, gathered blocks and their gradients."""
    assert found[case].get("skipped") == 0, found[case].get("error")
    planned, most = found[case]["planned"], found[case]["most"]
    print(f"{case}: {most / 1e9:.2f} GB, planned {planned / 1e9:.2f} GB ({found[case]['highest']})")
    assert 0.85 * planned < most <= planned
    assert {found[each].get("highest") for each in LARGE} == {LOSS, BACKWARD}, "both heights are tried"


@pytest.mark.parametrize("case", ["decode", "decode_flash"])
def test_a_decode_step_is_the_gpus_alone_and_the_host_waits_behind_it(found, case):
    """From the last sampled ids to the next and the codes of their rows; then the codes are fetched."""
    assert "error" not in found[case], found[case]
    assert found[case]["device"] == "cuda:0" and found[case]["graphs"] and found[case]["waits"] == {}
    assert sum(found[case]["after"].values()) == 1


def test_what_is_looked_for_would_be_found(found):
    assert "one tensor is on the CPU" in found["stray"]["error"]
    for case in ("vector", "index"):
        assert "aten.index.Tensor: one tensor is on the CPU" in found[case]["error"]
    assert found["looked_at"]["waits"]["learn"] == STEPS + STEPS * PIECES


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]), *sys.argv[2:])
    except BaseException:
        sys.excepthook(*sys.exc_info())
        os._exit(1)
    os._exit(0)  # autograd has a thread for the device, which would not end
