"""Speed beside transformers, on the same weights in one process, in turns.

    python bench/speed.py [models/smollm2-135m-instruct] [rounds=5] [matmul=auto] [precision=fp32]

Run it alone on the machine. Four jobs, each done by ours and by transformers' `generate` or forward
pass, one after the other, `rounds` times; medians are shown:

- decode: 64 tokens behind a prompt, at batch 1, 8, 32, prompts not counted
- talk: 16 dialogues of 4 turns, 32 tokens a reply, 24 a user's turn; ours keeps keys and values,
  theirs computes each prompt anew
- train: log-probabilities of half the tokens of four documents of 330 tokens, and the gradient

Beside ours stand shares of what this machine was measured to do: of the matrix rate, for products
that the job cannot do without, and of memory bandwidth, for the weights that each decode step
reads. The last line is one JSON object.
"""

import json
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))
import kernels  # noqa: E402
from chat import banned_ids, load_tokenizer, make_chat  # noqa: E402
from checkpoint import load_model  # noqa: E402
from engine import Engine, Sampling  # noqa: E402
from model import PackedAttention, predictors, token_logprobs  # noqa: E402

BATCHES, PROMPT, NEW = (1, 8, 32), 60, 64
DIALOGUES, TURNS, REPLY, HEARD = 16, 4, 32, 24
DOCUMENTS, LENGTH = 4, 330
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def random_ids(rows: int, length: int, seed: int) -> Tensor:
    """Ids [rows, length] of ordinary tokens."""
    return torch.randint(20, 40000, (rows, length), generator=torch.Generator().manual_seed(seed))


def timed(work: Callable, *args) -> float:
    """Seconds that a call takes."""
    begun = time.perf_counter()
    work(*args)
    return time.perf_counter() - begun


class Ours:
    """The three jobs with our engine and model."""

    def __init__(self, name: str, dtype: torch.dtype):
        self.model = load_model(name, prepare=lambda model: model.to(dtype))
        chat = make_chat(load_tokenizer(name), False)
        self.banned = banned_ids(chat.tokenizer, self.model.config.vocab_size, (chat.end,))

    def decode(self, batch: int) -> float:
        """Seconds of NEW - 1 decode steps. There is no stop id: every row runs to the end."""
        engine = Engine(self.model, Sampling(self.banned), batch, PROMPT + NEW)
        for slot, prompt in enumerate(random_ids(batch, PROMPT, batch).tolist()):
            engine.submit(slot, prompt, (slot,), NEW)
        engine.step()
        begun = time.perf_counter()
        while engine.busy:
            engine.step()
        seconds = time.perf_counter() - begun
        engine.forget()
        return seconds

    def talk(self) -> float:
        """Seconds of all dialogues; weights are packed within them, as in a run's rollout."""
        size = PROMPT + TURNS * (REPLY + HEARD)
        prompts, begun = random_ids(DIALOGUES, PROMPT, 0).tolist(), time.perf_counter()
        engine = Engine(self.model, Sampling(self.banned), DIALOGUES, size)
        for turn in range(TURNS):
            for slot, prompt in enumerate(prompts):
                engine.submit(slot, prompt, (turn, slot), REPLY)
            rows = []
            while engine.busy:
                rows += engine.step()
            heard = random_ids(DIALOGUES, HEARD, turn + 1).tolist()
            prompts = [row.prompt + row.sampled + heard[row.slot]
                       for row in sorted(rows, key=lambda row: row.slot)]  # fmt: skip
        engine.forget()
        return time.perf_counter() - begun

    def train(self) -> float:
        """Seconds of a forward and backward pass."""
        tokens = random_ids(DOCUMENTS, LENGTH, 0).flatten()
        position, bounds = torch.arange(LENGTH).repeat(DOCUMENTS), range(0, len(tokens) + 1, LENGTH)
        self.model.zero_grad()
        begun, where = time.perf_counter(), predictors(position >= LENGTH // 2)
        attend = PackedAttention(list(bounds), tokens.device)
        hidden, weight = self.model(tokens, position, attend)[where], self.model.output_weight
        logp, _ = token_logprobs(hidden, weight, tokens[where + 1], self.banned, 1.0, False)
        logp.mean().neg().backward()
        return time.perf_counter() - begun


class Theirs:
    """The same with transformers."""

    def __init__(self, name: str, dtype: torch.dtype):
        self.model = transformers.AutoModelForCausalLM.from_pretrained(name, dtype=dtype)

    @torch.no_grad()
    def generate(self, prompts: Tensor, count: int) -> Tensor:
        """Prompts and `count` sampled ids [rows, length + count]."""
        how = {"do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": 1.0, "pad_token_id": 2}
        counts = {"min_new_tokens": count, "max_new_tokens": count}
        return self.model.generate(prompts, attention_mask=torch.ones_like(prompts), **how, **counts)

    def decode(self, batch: int) -> float:
        """Seconds of NEW tokens above those of the first."""
        prompts = random_ids(batch, PROMPT, batch)
        first = timed(self.generate, prompts, 1)
        return timed(self.generate, prompts, NEW) - first

    def talk(self) -> float:
        prompts, begun = random_ids(DIALOGUES, PROMPT, 0), time.perf_counter()
        for turn in range(TURNS):
            said = self.generate(prompts, REPLY)
            prompts = torch.cat([said, random_ids(DIALOGUES, HEARD, turn + 1)], dim=1)
        return time.perf_counter() - begun

    def train(self) -> float:
        ids = random_ids(DOCUMENTS, LENGTH, 0)
        labels = ids.masked_fill(torch.arange(LENGTH) < LENGTH // 2, -100)
        self.model.zero_grad()
        begun = time.perf_counter()
        self.model(input_ids=ids, labels=labels).loss.backward()
        return time.perf_counter() - begun


def machine(dtype: torch.dtype) -> dict[str, float]:
    """GFLOP/s of the faster library's products at 1024 rows, GB/s of reading, both the best of 10."""
    x, weight = torch.randn(1024, 1536).to(dtype), torch.randn(1536, 1536).to(dtype)
    products = [lambda: F.linear(x, weight)]
    products += [lambda: kernels.product(x, weight)] if kernels.available() else []
    seconds = min(timed(work) for work in products for _ in range(10))
    large = torch.ones(1 << 26)
    return {"gflops": 2 * 1024 * 1536**2 / seconds / 1e9,
            "read_gb_s": large.nbytes / min(timed(large.sum) for _ in range(10)) / 1e9}  # fmt: skip


def needed(ours: Ours) -> dict[str, tuple[float, float]]:
    """GFLOP that each job needs, and GB of weights that its decode steps read (0 for training)."""
    c, output = ours.model.config, ours.model.output_weight.numel()
    blocks = sum(p.numel() for p in ours.model.model.layers.parameters() if p.dim() == 2)
    read = (blocks + output) * ours.model.output_weight.element_size() / 1e9
    found = {f"decode {n}": (2 * (blocks + output) * n * (NEW - 1) / 1e9, read * (NEW - 1))
             for n in BATCHES}  # fmt: skip
    prompts = DIALOGUES * (PROMPT + (TURNS - 1) * (HEARD + 1))
    sampled = DIALOGUES * TURNS * REPLY
    found["talk"] = 2 * (blocks * (prompts + sampled) + output * sampled) / 1e9, read * TURNS * REPLY
    tokens, trained = DOCUMENTS * LENGTH, DOCUMENTS * (LENGTH - LENGTH // 2)
    scores = c.num_layers * c.num_heads * c.head_dim * DOCUMENTS * LENGTH**2  # causal: half of 2
    found["train"] = 6 * (blocks * tokens + output * trained + scores) / 1e9, 0.0
    return found


def main(argv: list[str]) -> None:
    options = dict(arg.split("=", 1) for arg in argv if "=" in arg)
    name = next((arg for arg in argv if "=" not in arg), "models/smollm2-135m-instruct")
    dtype, rounds = DTYPES[options.get("precision", "fp32")], int(options.get("rounds", 5))
    transformers.logging.set_verbosity_error()
    line = kernels.use(options.get("matmul", "auto"))
    ours, theirs = Ours(name, dtype), Theirs(name, dtype)
    can, must = machine(dtype), needed(ours)
    print(f"{name}, {dtype}, torch {torch.__version__}, {torch.get_num_threads()} threads\n{line}")
    print(f"measured: {can['gflops']:.0f} GFLOP/s, reads {can['read_gb_s']:.0f} GB/s\n", flush=True)
    jobs = {f"decode {n}": (n * (NEW - 1), lambda side, n=n: side.decode(n)) for n in BATCHES}
    jobs["talk"] = DIALOGUES * TURNS * REPLY, lambda side: side.talk()
    jobs["train"] = DOCUMENTS * LENGTH, lambda side: side.train()
    found = {"machine": platform.processor() or platform.machine(), "threads": torch.get_num_threads(),
             "torch": torch.__version__, "transformers": transformers.__version__,
             "kernels": kernels.chosen, "precision": str(dtype), **can, "jobs": {}}  # fmt: skip
    print("| job | ours, tok/s | transformers, tok/s | ratio | of the rate | of the bandwidth |")
    print("|---|---|---|---|---|---|")
    for job, (tokens, work) in jobs.items():
        pairs = [(work(ours), work(theirs)) for _ in range(rounds + 1)][1:]  # the first warms up
        seconds = [median(side) for side in zip(*pairs)]
        ratio, rates = median(b / a for a, b in pairs), [tokens / each for each in seconds]
        rate, bandwidth = (each / seconds[0] for each in must[job])
        shares = {"rate": rate / can["gflops"], "bandwidth": bandwidth / can["read_gb_s"]}
        row = [job, *(f"{x:.1f}" for x in rates), f"{ratio:.2f}", *(f"{x:.0%}" for x in shares.values())]
        print(f"| {' | '.join(row)} |", flush=True)
        found["jobs"][job] = {"ours": rates[0], "theirs": rates[1], "ratio": ratio, **shares}
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])
