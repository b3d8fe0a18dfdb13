"""Memory: what an update really takes on the CPU, next to what scripts/plan.py says.

    python bench/memory.py [models/smollm2-135m-instruct]

Each row is a process of its own with one thread in fp32: a rollout of a few tokens, which fills the
KV cache, then two updates (Adam's state appears at the end of the first) of two micro-batches each,
on made-up dialogues of 250 random tokens, 240 of them trained. Measured is the highest resident
memory (VmHWM) above that after the imports and an update of a tiny model, which loads the
libraries' code. Exits 1 where a row is off by more than 15 %. Linux only.

glibc's malloc keeps freed blocks for later, and raises the size from which it returns them at once
each time such a block is freed; fixed thresholds (MALLOC_*_ below) keep resident memory equal to
what is allocated.
"""

import dataclasses
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from chat import Reply  # noqa: E402
from config import Config  # noqa: E402
from dist import World  # noqa: E402
from engine import Engine, Sampling  # noqa: E402
from rollout import Dialogue, Turn  # noqa: E402
from scripts.plan import memory, model_shape, peak  # noqa: E402
from simulator import Profile, UserTurn  # noqa: E402
from update import build, update  # noqa: E402

PROMPT, REPLY = 10, 240
WHO = Profile("bench", "persona", "scene", "empathy", "passive", "en", "hello")
QUIET = {
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "OMP_NUM_THREADS": "1",
}
KINDS = {
    "GRPO": {"algorithm": "grpo"},
    "PPO, critic=head": {"critic": "head"},
    "PPO, critic=trunk": {"critic": "trunk"},
}
ROWS = [(kind, tokens, False) for kind in KINDS for tokens in (500, 1250)] + [("GRPO", 2000, True)]


def make_config(model: str, kind: str, micro_tokens: int, checkpointing: bool) -> Config:
    """Two micro-batches' worth of dialogues in one group."""
    members = 2 * micro_tokens // (PROMPT + REPLY)
    return Config(
        model=model, device="cpu", groups=1, group_size=members, slots=4, reply_tokens=REPLY, context_tokens=500,
        micro_tokens=micro_tokens, checkpointing=checkpointing, **KINDS[kind],
    )  # fmt: skip


def dialogue(member: int, vocab: int) -> Dialogue:
    """A dialogue of one turn, random ids."""
    noise = random.Random(member)
    prompt, sampled = (
        [noise.randrange(20, min(vocab, 40000)) for _ in range(count)] for count in (PROMPT, REPLY)
    )
    turn = Turn(
        prompt,
        sampled,
        [-1.0] * REPLY,
        [0.0] * REPLY,
        Reply([], ""),
        "cap",
        UserTurn("ok", 30.0 + member),
    )
    return Dialogue((0, member), WHO, 0, UserTurn("hello", 30.0), [turn], "max_turns")


def walk(config: Config) -> None:
    """A rollout of a few tokens and two updates."""
    state = build(config, World())
    vocab = state.policy.config.vocab_size
    banned = torch.zeros(vocab, dtype=torch.bool)
    dialogues = [dialogue(member, vocab) for member in range(config.group_size)]
    slots = min(config.slots, config.group_size)
    engine = Engine(state.policy, Sampling(banned), slots, config.context_tokens)
    engine.forget()  # touches the whole cache: memory that is only asked for is not resident
    for slot in range(slots):
        engine.submit(slot, dialogues[slot].turns[0].prompt_ids, (slot,), 3)
    while engine.busy:
        engine.step()
    for _ in range(2):
        if update(state, config, dialogues, banned)["skipped"]:
            raise RuntimeError("the update was skipped: nothing was measured")


def resident(field: str) -> int:
    """VmRSS (now) or VmHWM (the highest since the last reset) of this process, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}; this needs Linux")


def measure(config: Config) -> int:
    """Peak resident bytes above the process's own, in this process."""
    torch.set_num_threads(1)
    shape = str(Path(__file__).parent.parent / "configs" / "shapes" / "tiny.json")
    walk(dataclasses.replace(config, model=shape))
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
    before = resident("VmRSS")
    walk(config)
    return resident("VmHWM") - before


def main() -> int:
    if len(sys.argv) == 5:  # a row's process: model, kind, micro_tokens, checkpointing
        model, kind, tokens, checkpointing = sys.argv[1:]
        print(json.dumps(measure(make_config(model, kind, int(tokens), checkpointing == "True"))))
        return 0
    model = sys.argv[1] if len(sys.argv) > 1 else "models/smollm2-135m-instruct"
    print(f"{model}, torch {torch.__version__}, fp32, CPU\n")
    print(
        "| update | checkpointing | micro_tokens | planned GB | measured GB | measured / planned |"
    )
    print("|---|---|---|---|---|---|", flush=True)
    off = 0
    for kind, tokens, checkpointing in ROWS:
        command = [sys.executable, __file__, model, kind, str(tokens), str(checkpointing)]
        done = subprocess.run(
            command, env=os.environ | QUIET, stdout=subprocess.PIPE, text=True, check=True
        )
        planned = peak(
            memory(make_config(model, kind, tokens, checkpointing), model_shape(model), 1)
        )
        found = json.loads(done.stdout)
        sizes = f"{planned / 1e9:.2f} | {found / 1e9:.2f} | {found / planned:.2f}"
        print(f"| {kind} | {'yes' if checkpointing else 'no'} | {tokens} | {sizes} |", flush=True)
        off += abs(found / planned - 1) > 0.15
    return 1 if off else 0


if __name__ == "__main__":
    sys.exit(main())
