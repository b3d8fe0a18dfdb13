"""What has never met a GPU, tried on one NVIDIA GPU in half an hour at most, without a network.

    python scripts/gpu_check.py                    every part; findings in runs/gpu_check
    python scripts/gpu_check.py graphs train       some of them
    python scripts/gpu_check.py --list             what they are called, and their time limits
    python scripts/gpu_check.py --out FOLDER       findings in FOLDER/result.json, and as a table

Each part is a process of its own with a time limit, so that a CUDA error, a hang or memory that
runs out does not spoil the next; all that it prints is in its log in FOLDER. Weights are random, in
shapes from configs/shapes, but for models/smollm2-135m-instruct in `parity` where it is there.
Exits 1 where a part failed, 2 where there is no GPU.

Rates are medians. A share of bandwidth is that of the weights, read once a step, and of keys and
values; a share of the matrix rate is that of the products that an update cannot do without, so that
recomputed activations lower it. Peaks are those of torch's allocator, without the CUDA context.
"""

import argparse
import gc
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import fmean, median
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import checkpoint  # noqa: E402
import dist  # noqa: E402
import engine as engines  # noqa: E402
import model as models  # noqa: E402
from chat import Reply  # noqa: E402
from config import Config, InputError, load_config, own_rows, run_main  # noqa: E402
from engine import Decode, Engine, Row, Sampling  # noqa: E402
from model import PackedAttention, Transformer, ValueHead, predictors, token_logprobs  # noqa: E402
from rollout import Dialogue, Turn  # noqa: E402
from scripts.plan import ALWAYS, block_parameters, memory, model_shape, peak  # noqa: E402
from simulator import Profile, UserTurn  # noqa: E402
from update import build, update  # noqa: E402

TINY, LARGE, MIDDLE = (str(ROOT / f"configs/shapes/{name}.json") for name in (
    "tiny", "qwen2.5-1.5b-instruct", "qwen2.5-0.5b-instruct"))  # fmt: skip
SMOLLM2 = ROOT / "models" / "smollm2-135m-instruct"
WHO = Profile("check", "persona", "scene", "empathy", "passive", "en", "hello")
FP32, BF16 = torch.float32, torch.bfloat16
TRAIN = """import sys, torch, train
code = train.main(sys.argv[1:])
print("peak", torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else 0)
sys.exit(code)"""  # as train.py, with the peak of its memory


@dataclass
class Check:
    """A part at work: where it computes, what it has found, and what of that is wrong."""

    device: torch.device
    small: bool
    folder: Path
    name: str
    found: dict[str, object] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    def note(self, name: str, value: object) -> None:
        """Put down and print what was found; it outlives a part that is killed."""
        self.found[name] = value
        (self.folder / f"{self.name}.json").write_text(json.dumps(self.found, indent=1))
        print(f"{name}: {text(value)}", flush=True)

    def within(self, name: str, value: float, limit: float) -> None:
        """Put down a number that must not be above a limit."""
        self.note(name, float(value))
        if not value <= limit:  # NaN neither
            self.wrong.append(f"{name} is {text(float(value))}, above {limit:g}")

    def must(self, name: str, truth: bool) -> None:
        """Put down something that must be so."""
        self.note(name, "yes" if truth else "NO")
        if not truth:
            self.wrong.append(f"not so: {name}")

    def wait(self) -> None:
        """Wait for the GPU."""
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def seconds(self, work: Callable[[], object], times: int = 10) -> float:
        """Median seconds of a call, after two that are not counted."""
        found = []
        for _ in range(times + 2):
            self.wait()
            begun = time.perf_counter()
            work()
            self.wait()
            found.append(time.perf_counter() - begun)
        return median(found[2:])

    def matrix_rate(self) -> float:
        """Floating point operations a second of a large bf16 product."""
        size = 256 if self.small else 8192
        a, b = torch.randn(2, size, size, device=self.device, dtype=BF16)
        return 2 * size**3 / self.seconds(lambda: a @ b)

    def bandwidth(self) -> float:
        """Bytes a second that a large copy reads and writes."""
        a = torch.ones(1 << (22 if self.small else 30), dtype=torch.uint8, device=self.device)
        b = torch.empty_like(a)
        return 2 * a.nbytes / self.seconds(lambda: b.copy_(a))


def text(value: object) -> str:
    """A finding for the eye."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def ids(length: int, seed: int, vocab: int = 256) -> list[int]:
    """Random ids, of a byte tokenizer's letters unless more are wanted."""
    noise = random.Random(seed)
    return [noise.randrange(vocab) for _ in range(length)]


@torch.no_grad()
def quick_weights(model: Transformer, seed: int, only_adapters: bool = False) -> None:
    """Random weights as of checkpoint.init_weights, but drawn on the device, where it is quick."""
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        part = dist.local(parameter)
        if parameter.dim() == 2:
            part.normal_(std=model.config.init_std)
        else:
            part.fill_(0.0 if name.endswith("bias") else 1.0)


def random_model(check: Check, shape: str, dtype: torch.dtype) -> Transformer:
    """A random model for generation."""
    with patch.object(checkpoint, "init_weights", quick_weights):
        model = checkpoint.load_model(shape, 0, check.device, lambda model: model.to(dtype))
    return model.requires_grad_(False)


def make_engine(model: Transformer, slots: int, capacity: int, temperature: float = 1.0,
                graphs: bool = True) -> Engine:  # fmt: skip
    """An engine without stop ids: every row runs to its cap."""
    nothing = torch.zeros(model.config.vocab_size, dtype=torch.bool)
    engine = Engine(model, Sampling(nothing, (), temperature), slots, capacity)
    engine.graphs = engine.graphs if graphs else None
    return engine


def sample(engine: Engine, turns: list[tuple[int, list[int], int]]) -> list[Row]:
    """Rows of turns (step at which it is submitted, prompt, cap), one a slot; by slot."""
    rows, step, waiting = [], 0, dict(enumerate(turns))
    while waiting or engine.busy:
        for slot in [slot for slot, turn in waiting.items() if turn[0] <= step]:
            _, prompt, cap = waiting.pop(slot)
            engine.submit(slot, prompt, (slot,), cap)
        rows += engine.step() if engine.busy else []
        step += 1
    engine.forget()
    return sorted(rows, key=lambda row: row.slot)


def decode_rate(engine: Engine, batch: int, prompt: int, new: int) -> float:
    """Tokens a second of decode steps; the first of two times captures graphs, and warms up."""
    for _ in range(2):
        for slot in range(batch):
            engine.submit(slot, ids(prompt, slot), (slot,), new)
        engine.step()
        begun = time.perf_counter()
        while engine.busy:
            engine.step()
        seconds = time.perf_counter() - begun
        engine.forget()
    return batch * (new - 1) / seconds


def training_logps(model: Transformer, rows: list[Row]) -> list[list[float]]:
    """Log-probabilities of what rows sampled, by the training forward."""
    device = model.output_weight.device
    whole = [row.prompt + row.sampled for row in rows]
    ends = torch.tensor([0, *map(len, whole)]).cumsum(0).tolist()
    tokens = torch.tensor([token for document in whole for token in document], device=device)
    position = torch.cat([torch.arange(len(document)) for document in whole]).to(device)
    mask = sum(([False] * len(row.prompt) + [True] * len(row.sampled) for row in rows), [])
    where = predictors(torch.tensor(mask)).to(device)
    hidden = model(tokens, position, PackedAttention(ends, device))[where]
    banned = torch.zeros(model.config.vocab_size, dtype=torch.bool, device=device)
    logp, _ = token_logprobs(hidden, model.output_weight, tokens[where + 1], banned, 1.0)
    return [part.tolist() for part in logp.split([len(row.sampled) for row in rows])]


def gap(a: Tensor, b: Tensor) -> float:
    """The largest difference, each over the largest number of `b`."""
    a, b = a.detach().float().cpu(), b.detach().float().cpu()
    return float((a - b).abs().max() / b.abs().max())


# ---- the parts


def environment(check: Check) -> None:
    """What there is, and what it was measured to do."""
    check.note("torch", torch.__version__)
    if check.cuda:
        about = torch.cuda.get_device_properties(check.device)
        check.note("device", f"{about.name}, {about.multi_processor_count} processors")
        check.note("compute capability", f"{about.major}.{about.minor}")
        check.note("memory GB", about.total_memory / 1e9)
        check.note("free memory GB", torch.cuda.mem_get_info(check.device)[0] / 1e9)
        check.note("CUDA, cuDNN", f"{torch.version.cuda}, {torch.backends.cudnn.version()}")
        check.note("NCCL", ".".join(map(str, torch.cuda.nccl.version())))
        if tool := shutil.which("nvidia-smi"):
            command = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
            said = subprocess.run(command, capture_output=True, text=True).stdout
            check.note("driver", said.strip().replace("\n", ", "))
    for file, name in ((models, "flash_attn_varlen_func"), (engines, "flash_attn_with_kvcache")):
        check.note(name, "there" if getattr(file, name) else "not there")
    check.note("bf16 products TFLOP/s", check.matrix_rate() / 1e12)
    check.note("memory bandwidth GB/s", check.bandwidth() / 1e9)


def nccl(check: Check) -> None:
    """A process group of one rank, collectives in it, and FSDP's ways of holding weights."""
    config = Config(model=TINY, tokenizer="bytes", device="cuda", algorithm="grpo",
                    generation="replica")  # fmt: skip
    world = dist.start(config)
    check.note("backend", torch.distributed.get_backend())
    check.must("the world has a mesh on cuda, in bf16",
               world.mesh.device_type == "cuda" and world.dtype == BF16)  # fmt: skip
    x = torch.arange(4.0, device=world.device)
    out, scattered = [torch.empty_like(x)], torch.empty_like(x)
    torch.distributed.all_gather(out, x)
    torch.distributed.reduce_scatter_tensor(scattered, x)
    summed = x.clone()
    torch.distributed.all_reduce(summed)
    check.must("collectives", all(torch.equal(x, y) for y in (*out, scattered, summed)))
    check.must("objects over gloo", world.gather({"a": 1}) == [{"a": 1}])
    for rank in (0, 4):
        what = f"LoRA {rank}: " if rank else ""
        state = build(replace(config, lora_rank=rank), world)
        dist.refill(state.sampler, state.policy)
        tokens, position = torch.tensor([ids(90, 0), list(range(90))], device=world.device)
        attend = PackedAttention([0, 50, 90], world.device)
        with torch.no_grad():  # first, for libraries take memory at their first call
            other = state.sampler(tokens, position, attend)
        before = torch.cuda.memory_allocated()
        with torch.no_grad(), dist.gathered(state.policy, world):
            held, hidden = torch.cuda.memory_allocated(), state.policy(tokens, position, attend)
        check.within(f"{what}hidden states, gathered against replica", gap(hidden, other), 1e-2)
        check.note(f"{what}gathered MB", (held - before) / 1e6)
        del hidden
        kept = torch.cuda.memory_allocated() - before
        check.within(f"{what}MB left behind once released", kept / 1e6, 0.5)
        dist.release(state.policy)


def parity(check: Check) -> None:
    """Numbers of the GPU against those of the CPU, and of one kernel against another's."""
    here, there = checkpoint.load_model(TINY, 1), checkpoint.load_model(TINY, 1, check.device)
    turns = [(0, ids(n, n), 40) for n in (7, 60, 33, 100)]
    rows, own = (sample(make_engine(m, 4, 256, 0.0, False), turns) for m in (here, there))
    same = [row.sampled for row in own] == [row.sampled for row in rows]
    check.must("greedy ids in fp32, without graphs, are the CPU's", same)
    logps = [torch.tensor(sum(training_logps(m, rows), [])) for m in (here, there)]
    check.within("log-probs in fp32 against the CPU", (logps[0] - logps[1]).abs().max(), 1e-3)
    tokens, ends = torch.tensor(ids(90, 0)), [0, 50, 90]
    logits = []
    for m, d in ((here, "cpu"), (there, check.device)):
        hidden = m(tokens.to(d), torch.arange(90, device=d), PackedAttention(ends, d))
        logits.append((hidden @ m.output_weight.T).detach().cpu())
    check.within("logits in fp32 against the CPU", (logits[0] - logits[1]).abs().max(), 1e-3)
    loss_gradients(check)
    real = SMOLLM2.is_dir() and not check.small
    model = checkpoint.load_model(str(SMOLLM2) if real else TINY, 1, check.device,
                                  lambda model: model.to(BF16))  # fmt: skip
    turns = [(0, ids(20 + 9 * i, i), 64) for i in range(8)]
    rows = sample(make_engine(model, 8, 256, 1.0, False), turns)
    with torch.no_grad():
        pairs = zip(sum((row.logps for row in rows), []), sum(training_logps(model, rows), []))
    gaps = [abs(a - b) for a, b in pairs]
    name = f"sampler gap in bf16, {'SmolLM2' if real else 'tiny'}"
    check.within(f"{name}, mean", fmean(gaps), 0.1)
    check.note(f"{name}, max", max(gaps))
    if check.cuda:
        attention(check)
        new_shapes(check)


def loss_gradients(check: Check) -> None:
    """`token_logprobs` and its gradient against the plain formula, over several chunks."""
    count, vocab = (50, 300) if check.small else (500, 151936)
    hidden, weight = (torch.randn(n, 128, device=check.device) / 8 for n in (count, vocab))
    target = torch.tensor(ids(count, 0, vocab - 9), device=check.device)
    banned = torch.arange(vocab, device=check.device) >= vocab - 9
    ends = torch.randn(2, count, device=check.device)

    def ours(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        return token_logprobs(x, w, target, banned, 0.8)

    def plain(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        logp = ((x @ w.T).masked_fill(banned, models.BANNED) / 0.8).log_softmax(-1)
        return logp.gather(-1, target[:, None])[:, 0], -(logp.exp() * logp).sum(-1)

    found = []
    for work in (ours, plain):
        leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
        outs = work(*leaves)
        found.append([*outs, *torch.autograd.grad(outs, leaves, list(ends))])
    names = ("log-probs", "entropies", "gradient of hidden states", "gradient of weights")
    for name, a, b in zip(names, *found):
        check.within(f"{name} against the plain formula", gap(a, b), 1e-4)
    del found, leaves, outs
    z = torch.randn(count, vocab, device=check.device)
    check.note("entropy's sum by bmm, ms",
               1e3 * check.seconds(lambda: torch.bmm(z[:, None], z[:, :, None])))  # fmt: skip
    check.note("entropy's sum by mul and sum, ms", 1e3 * check.seconds(lambda: (z * z).sum(-1)))


def attention(check: Check) -> None:
    """flash-attn, where there is one, against scaled_dot_product_attention."""
    device, lengths = check.device, (300, 7, 512, 1)
    ends = torch.tensor([0, *lengths]).cumsum(0).tolist()
    q, k, v = (torch.randn(ends[-1], heads, 128, device=device, dtype=BF16) for heads in (12, 2, 2))
    if models.flash_attn_varlen_func:
        found, end = [], torch.randn_like(q)
        for kernel in (models.flash_attn_varlen_func, None):
            with patch.object(models, "flash_attn_varlen_func", kernel):
                leaves = [x.clone().requires_grad_() for x in (q, k, v)]
                out = PackedAttention(ends, device)(0, *leaves)
                found.append([out, *torch.autograd.grad(out, leaves, end)])
        for name, a, b in zip(("out", "gradient of q", "of k", "of v"), *found):
            check.within(f"flash_attn_varlen_func: {name}", gap(a, b), 0.02)
    if engines.flash_attn_with_kvcache:
        outs, slots = [], [0, 3, 5]
        place, position = torch.tensor([slots, [9, 300, 511]], device=device)
        for flash in (True, False):
            torch.manual_seed(0)
            cache = torch.randn(2, 1, 6, 2, 640, 128, dtype=BF16, device=device)
            context = Decode(cache, place, slots).at(position, 512)
            context.flash = context.flash if flash else None
            outs.append((context(0, q[:3], k[:3], v[:3]), cache))
        check.within("flash_attn_with_kvcache: out", gap(outs[0][0], outs[1][0]), 0.02)
        check.must("flash_attn_with_kvcache: writes the same keys and values",
                   torch.equal(outs[0][1], outs[1][1]))  # fmt: skip


@torch.no_grad()
def new_shapes(check: Check) -> None:
    """What scaled_dot_product_attention costs at lengths that it has not seen yet."""
    q = torch.randn(8, 2, 6, 128, device=check.device, dtype=BF16)
    k = torch.randn(8, 2, 400, 128, device=check.device, dtype=BF16)
    mask = torch.zeros(8, 1, 1, 400, device=check.device, dtype=BF16)
    document = torch.randn(1, 12, 400, 128, device=check.device, dtype=BF16)

    def decode(n: int) -> Tensor:
        return F.scaled_dot_product_attention(q, k[:, :, :n], k[:, :, :n], mask[..., :n])

    def train(n: int) -> Tensor:
        x, kv = document[:, :, :n], k[:1, :, :n]
        return F.scaled_dot_product_attention(x, kv, kv, is_causal=True, enable_gqa=True)

    for cudnn in (True, False):
        torch.backends.cuda.enable_cudnn_sdp(cudnn)
        for work in (decode, train):
            work(200)
            times = []
            for n in (*range(301, 311), *range(301, 311)):
                check.wait()
                begun = time.perf_counter()
                work(n)
                check.wait()
                times.append(1e3 * (time.perf_counter() - begun))
            name = f"attention in {work.__name__}, cuDNN {'on' if cudnn else 'off'}, ms"
            check.note(f"{name}, new length", median(times[:10]))
            check.note(f"{name}, length seen before", median(times[10:]))
    torch.backends.cuda.enable_cudnn_sdp(True)


def graphs(check: Check) -> None:
    """Decoding by CUDA graphs against the same engine without them."""
    model = checkpoint.load_model(TINY, 1, check.device).requires_grad_(False)
    head = ValueHead(model.config.hidden_size).to(check.device).requires_grad_(False)
    head.weight.normal_()
    turns = [(17 * i % 60, ids(5 + 19 * i, i), 1 + 41 * i % 300) for i in range(13)]
    for temperature in (1.0, 0.0):
        engine = make_engine(model, 13, 600, temperature)
        if engine.graphs is None:
            raise RuntimeError("an engine has CUDA graphs on a GPU alone")
        engine.value_head, maker, found = head, engine.graphs, []
        for engine.graphs in (None, maker, maker):
            found.append(sample(engine, turns))
        check.note(f"temperature {temperature:g}: graphs captured", len(maker.captured))
        plain = found[0]
        for name, rows in zip(("captured", "replayed"), found[1:]):
            what, pairs = f"temperature {temperature:g}, {name}", list(zip(rows, plain))
            check.must(f"{what}: same ids", all(a.sampled == b.sampled for a, b in pairs))
            for each in ("logps", "values"):
                a, b = (torch.tensor(sum((getattr(row, each) for row in side), []))
                        for side in (rows, plain))  # fmt: skip
                check.within(f"{what}: {each}", (a - b).abs().max(), 1e-4)
    del engine, maker, found, model
    gc.collect()
    model = random_model(check, LARGE, BF16)
    for batch in (1, 8, 32, 128):
        gc.collect()  # an engine and its graphs refer to each other
        torch.cuda.empty_cache()
        engine = make_engine(model, batch, 1024)
        maker, engine.graphs = engine.graphs, None
        plain = decode_rate(engine, batch, 120, 64)
        torch.cuda.empty_cache()  # what stays reserved behind it is the pools'
        before = torch.cuda.memory_reserved()
        engine.graphs, begun = maker, time.perf_counter()
        fast = decode_rate(engine, batch, 120, 64)
        check.note(f"1.5B, batch {batch}: tokens/s by graphs", fast)
        check.note(f"1.5B, batch {batch}: tokens/s without", plain)
        took = time.perf_counter() - begun - 2 * batch * 63 / fast
        check.note(f"1.5B, batch {batch}: s to capture, prefills with it", took)
        torch.cuda.empty_cache()
        pools = torch.cuda.memory_reserved() - before
        check.note(f"1.5B, batch {batch}: MB of {len(maker.captured)} graphs", pools / 1e6)
        del engine, maker


def rollout(check: Check) -> None:
    """Generation beside what the GPU can do, and beside transformers."""
    shape, batches = (TINY, (1, 2)) if check.small else (LARGE, (1, 8, 32, 64))
    prompt, new = (20, 8) if check.small else (128, 128)
    model, can = random_model(check, shape, BF16), check.bandwidth()
    c = model.config
    weights = sum(p.numel() for p in model.model.layers.parameters()) + model.output_weight.numel()
    for batch, slot in (*((batch, 512) for batch in batches), (batches[-2], 8192)):
        engine = make_engine(model, batch, slot)
        rate = decode_rate(engine, batch, prompt, new)
        keys = 2 * c.num_layers * c.num_kv_heads * c.head_dim * batch * (prompt + new / 2)
        check.note(f"batch {batch}, slots of {slot}: tokens/s", rate)
        share = 2 * (weights + keys) * rate / batch / can
        check.note(f"batch {batch}, slots of {slot}: share of bandwidth", share)
        del engine
        gc.collect()
    rows, long = (2, 64) if check.small else (8, 1000)
    engine, times = make_engine(model, rows, 2048), []
    for turn in range(3):
        for slot in range(rows):
            engine.submit(slot, ids(long, 8 * turn + slot), (slot,), 1)
        begun = time.perf_counter()
        engine.step()
        times.append(time.perf_counter() - begun)
        engine.forget()
    check.note(f"prefill of {rows} prompts of {long}: tokens/s", rows * long / min(times))
    raw = model.raw
    del engine, model
    gc.collect()
    theirs(check, raw, batches, (prompt, new))


@torch.no_grad()
def theirs(check: Check, raw: dict, batches: tuple[int, ...], sizes: tuple[int, int]) -> None:
    """The same decoding by `generate` of transformers."""
    import transformers

    transformers.logging.set_verbosity_error()
    with torch.device(check.device):
        config = transformers.AutoConfig.for_model(**raw)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=BF16).eval()
    for batch in batches:
        prompts = torch.tensor([ids(sizes[0], row) for row in range(batch)], device=check.device)
        how = {"attention_mask": torch.ones_like(prompts), "do_sample": True, "top_k": 0,
               "top_p": 1.0, "temperature": 1.0, "pad_token_id": 2}  # fmt: skip
        times = []
        for n in (1, sizes[1]):
            how |= {"min_new_tokens": n, "max_new_tokens": n}
            times.append(check.seconds(partial(model.generate, prompts, **how), 1))
        rate = batch * (sizes[1] - 1) / (times[1] - times[0])
        check.note(f"batch {batch}: tokens/s of transformers", rate)


def make_dialogue(member: int, prompt: int, reply: int) -> Dialogue:
    """A dialogue of one turn of random ids."""
    words = ids(prompt + reply, member)
    turn = Turn(words[:prompt], words[prompt:], [-1.0] * reply, [0.0] * reply, Reply([], ""), "cap",
                UserTurn("ok", 30.0 + member))  # fmt: skip
    return Dialogue((0, member), WHO, 0, UserTurn("hello", 30.0), [turn], "max_turns")


def updates(check: Check) -> None:
    """Updates of four micro-batches of a 1.5B model: speed, and memory beside the plan."""
    tokens, half, slots = (256, 32, 2) if check.small else (4096, 512, 8)
    members = 4 * tokens // (2 * half)
    base = Config(model=TINY if check.small else LARGE, tokenizer="bytes", device=check.device.type,
                  groups=1, group_size=members, slots=slots, micro_tokens=tokens,
                  context_tokens=tokens, reply_tokens=half)  # fmt: skip
    world, can = dist.start(base), check.matrix_rate()
    for algorithm, critic in (("grpo", "trunk"), ("ppo", "head")):
        for recomputed in (False, True):
            for generation in ("inplace", "replica"):
                config = replace(base, algorithm=algorithm, critic=critic, generation=generation,
                                 checkpointing=recomputed)  # fmt: skip
                name = f"{algorithm}, {generation}{', checkpointing' if recomputed else ''}"
                gc.collect()
                if check.cuda:
                    torch.cuda.empty_cache()
                    torch.cuda.reset_peak_memory_stats()
                try:
                    one_update(check, config, world, (name, half, can))
                except Exception as error:  # the next may need less memory
                    traceback.print_exc()
                    check.wrong.append(f"{name}: {type(error).__name__}: {error}".splitlines()[0])


def one_update(check: Check, config: Config, world: dist.World, about: tuple) -> None:
    """A rollout of a few tokens and two updates, the second of which is timed."""
    name, half, can = about
    c, members = model_shape(config.model), config.group_size
    with patch.object(checkpoint, "init_weights", quick_weights):
        state = build(config, world)
    model, nothing = state.sampler or state.policy, torch.zeros(c.vocab_size, dtype=torch.bool)
    sampling, size = Sampling(nothing), (config.slots, config.context_tokens)
    engine = Engine(model, sampling, *size, state.value_head)
    if state.sampler:
        dist.refill(state.sampler, state.policy)
    with dist.gathered(model, world):
        sample(engine, [(0, ids(half, slot), 4) for slot in range(config.slots)])
    dialogues = [make_dialogue(member, half, half) for member in range(members)]
    for _ in range(2):
        check.wait()
        begun = time.perf_counter()
        metrics = update(state, config, dialogues, engine.banned, world)
        check.wait()
        seconds = time.perf_counter() - begun
    check.must(f"{name}: learnt from", metrics["skipped"] == 0)
    tokens = 2 * half * members
    scores = c.num_layers * c.num_heads * c.head_dim * members * (2 * half) ** 2
    output = c.vocab_size * c.hidden_size * tokens / 2  # of trained tokens alone
    needed = 6 * (c.num_layers * block_parameters(c) * tokens + output + scores)
    check.note(f"{name}: tokens/s", tokens / seconds)
    check.note(f"{name}: share of the matrix rate", needed / seconds / can)
    if check.cuda:
        against_plan(check, name, config, torch.cuda.max_memory_allocated())


def against_plan(check: Check, name: str, config: Config, used: int) -> None:
    """The peak of memory beside that of scripts/plan.py."""
    found = memory(config, model_shape(config.model), 1)
    planned = peak(found) - found[ALWAYS].get("CUDA context and allowance", 0)
    check.note(f"{name}: peak GB", used / 1e9)
    check.note(f"{name}: planned GB", planned / 1e9)
    check.within(f"{name}: peak / planned", used / planned, 1.1)


def training(check: Check) -> None:
    """train.py for some steps, and resumed, with the user of rules."""
    folder = check.folder / "train"
    shutil.rmtree(folder, ignore_errors=True)
    room = shutil.disk_usage(check.folder).free  # a checkpoint has 19 GB; two are there at a time
    shape = LARGE if room > 60e9 else MIDDLE
    small = ["configs/tiny.py", f"device={check.device.type}", "groups=2", "reply_tokens=8"]
    large = ["configs/ppo_1b.py", f"model={shape}", "tokenizer=bytes", "user=offline",
             "critic=head", "groups=8", "max_turns=3", "reply_tokens=64", "context_tokens=4096",
             "micro_tokens=8192"]  # fmt: skip
    options = [*(small if check.small else large), "eval_every=0", "save_every=0", "keep=1"]
    check.note("model", Path(TINY if check.small else shape).stem)
    for generation, stops in (("inplace", (2 if check.small else 20,)), ("replica", (2, 4))):
        run = folder / generation
        for steps in stops:
            args = [*options, f"generation={generation}", f"steps={steps}", f"run={run}"]
            begun = time.perf_counter()
            done = subprocess.run([sys.executable, "-c", TRAIN, *args], cwd=ROOT, text=True,
                                  stdout=subprocess.PIPE)  # fmt: skip
            print(done.stdout, flush=True)
            if done.returncode:
                raise RuntimeError(f"train.py {' '.join(args)}: exit code {done.returncode}")
            check.note(f"{generation}, {steps} steps: s", time.perf_counter() - begun)
            used = int(done.stdout.rsplit("peak ", 1)[1])
            if check.cuda:
                against_plan(check, f"{generation}, {steps} steps", load_config(args), used)
        rows = own_rows(run / "metrics.jsonl")
        check.must(f"{generation}: every step is there, once",
                   [row["step"] for row in rows] == list(range(1, stops[-1] + 1)))  # fmt: skip
        losses = [row[name] for row in rows for name in ("policy/loss", "value/loss", "skipped")]
        finite = all(x is not None and math.isfinite(x) for x in losses)
        check.must(f"{generation}: losses are finite", finite)
        check.within(f"{generation}: steps skipped", sum(row["skipped"] for row in rows), 0)
        gaps = [row["rollout/sampler_gap"] for row in rows]
        check.within(f"{generation}: sampler gap, largest mean", max(gaps), 0.1)
        for name in ("time/rollout", "time/update", "rollout/tokens_per_s"):
            check.note(f"{generation}: {name}, median", float(median(row[name] for row in rows)))
        shutil.copy(run / "metrics.jsonl", check.folder / f"train_{generation}.jsonl")
        shutil.rmtree(run)


PARTS = {  # name -> what it does, seconds it may take; half an hour in all
    "environment": (environment, 90), "nccl": (nccl, 90), "parity": (parity, 180),
    "graphs": (graphs, 240), "rollout": (rollout, 270), "update": (updates, 330),
    "train": (training, 600),
}  # fmt: skip


# ---- one part a process


def work(check: Check) -> int:
    """Do a part in this process."""
    PARTS[check.name][0](check)
    dist.close()
    print("; ".join(check.wrong), flush=True)
    return 1 if check.wrong else 0


def supervise(name: str, options: list[str], folder: Path, limit: float) -> dict:
    """Have a part done in a process of its own; what it found, and how it failed, if it did."""
    aside, log, begun = folder / f"{name}.json", folder / f"{name}.log", time.perf_counter()
    aside.unlink(missing_ok=True)
    command = [sys.executable, __file__, name, "--alone", "--out", str(folder), *options]
    with open(log, "w") as out:
        child = subprocess.Popen(command, stdout=out, stderr=out, start_new_session=True)
        try:
            code = child.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)  # with the processes that it has started
                child.wait()
    lines = log.read_text(errors="replace").strip().splitlines()
    last = lines[-1].strip() if lines else ""
    failed = f"not done after {limit:g} s; last: {last}" if code is None else ""
    if code:
        failed = f"exit code {code}: {last}"
    found = json.loads(aside.read_text()) if aside.is_file() else {}
    aside.unlink(missing_ok=True)
    return {"failed": failed, "seconds": time.perf_counter() - begun, "found": found}


def write(folder: Path, found: dict[str, dict]) -> None:
    """The findings so far: as JSON, and as a table."""
    lines = ["| part | what | found |", "|---|---|---|"]
    for name, part in found.items():
        verdict = f"FAILED: {part['failed']}" if part["failed"] else "ok"
        rows = {"**verdict**": f"{verdict} ({part['seconds']:.0f} s)", **part["found"]}
        lines += [f"| {name} | {what} | {text(value)} |".replace("\n", " ")
                  for what, value in rows.items()]  # fmt: skip
    (folder / "result.json").write_text(json.dumps(found, indent=1) + "\n")
    (folder / "table.md").write_text("\n".join(lines) + "\n")


def main(argv: list[str]) -> int:
    hide, parser = argparse.SUPPRESS, argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help="all unless named")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "gpu_check", metavar="FOLDER")
    parser.add_argument("--list", action="store_true", help="the parts and their time limits")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help=hide)
    parser.add_argument("--small", action="store_true", help=hide)  # tiny shapes, for tests
    parser.add_argument("--alone", action="store_true", help=hide)  # a part's own process
    options = parser.parse_args(argv)
    if options.list:
        for name, (does, limit) in PARTS.items():
            print(f"{name:<12} {limit:>4} s  {does.__doc__}")
        return 0
    for name in options.parts:
        if name not in PARTS:
            raise InputError(f"{name}: no such part; there are {', '.join(PARTS)}")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise InputError("scripts/gpu_check.py needs an NVIDIA GPU, and torch sees none here")
    folder = options.out.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    if options.alone:
        device = torch.device("cuda:0" if options.device == "cuda" else "cpu")
        return work(Check(device, options.small, folder, options.parts[0]))
    passed = ["--device", options.device, *["--small"] * options.small]
    found = {}
    for name in options.parts or PARTS:
        print(f"{name} ... ", end="", flush=True)
        part = found[name] = supervise(name, passed, folder, PARTS[name][1])
        print(f"FAILED: {part['failed']}" if part["failed"] else f"ok, {part['seconds']:.0f} s")
        write(folder, found)
    print(f"\n{(folder / 'table.md').read_text()}\nin {folder}")
    return 1 if any(part["failed"] for part in found.values()) else 0


if __name__ == "__main__":
    run_main(main)
