"""SIGKILL a run at random moments, saves included, and see that it always goes on, to the very same
weights.

    python bench/kills.py [KILLS] [RANKS] [SEED]        (20 kills, 1 rank, seed 0)

configs/tiny.py, shortened to a fraction of a second a step and saved after each, is run once
without interruption and once killed KILLS times, every process of it at once, each time resumed by
`resume=auto`. Prints each kill, and whether the final weights, Adam's states and every log agree to
the bit. Exits 1 if anything differs.
"""

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parent.parent))
from config import own_rows  # noqa: E402

ROOT = Path(__file__).parent.parent
STEPS = 100
OPTIONS = [
    "max_turns=1",
    "reply_tokens=8",
    "save_every=1",
    "eval_every=0",
    "threads=1",
    f"steps={STEPS}",
]
PASSED_OVER = ("rng",)  # torch's own state as a process begins; nothing draws from it


def launch(run: Path, ranks: int) -> subprocess.Popen:
    """train.py, under torchrun if on several ranks."""
    torchrun = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        if ranks > 1
        else []
    )
    command = [sys.executable, *torchrun, "train.py", "configs/tiny.py", f"run={run}", *OPTIONS]
    log = open(run.with_suffix(".log"), "a")
    return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)


def steps_done(run: Path) -> int:
    """Whole lines in metrics.jsonl."""
    path = run / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def family(pid: int) -> list[int]:
    """A process and all below it: torchrun's ranks have sessions of their own, which outlive it."""
    found = subprocess.run(
        ["ps", "-e", "-o", "pid=,ppid="], capture_output=True, text=True, check=True
    ).stdout
    pairs, below = [tuple(map(int, line.split())) for line in found.splitlines()], [pid]
    for one in below:
        below += [child for child, parent in pairs if parent == one]
    return below


def alive(pid: int) -> bool:
    """Whether a process still runs; one that is dead and not waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def kill_somewhere(run: Path, ranks: int, dice: random.Random, saving: bool) -> str:
    """Start or resume the run, kill it at a random moment within its next steps; says where that
    was.

    With `saving` it is killed within 20 ms of the beginning of a save: those are short and would
    seldom be hit.
    """
    process, before = launch(run, ranks), steps_done(run)
    while steps_done(run) <= before:
        if process.poll() is not None:
            raise SystemExit(
                f"the run ended by itself with {process.returncode}; see {run.with_suffix('.log')}"
            )
        time.sleep(0.005)
    members = family(process.pid)
    time.sleep(dice.uniform(0, 0.5))
    while saving and process.poll() is None and not list(run.glob("ckpt/*.partial")):
        time.sleep(0.0005)
    time.sleep(dice.uniform(0, 0.02) if saving else 0)
    if process.poll() is not None:
        raise SystemExit("the run was over before the last kill; raise STEPS")
    for one in members:
        os.kill(one, signal.SIGKILL)
    process.wait()
    while any(alive(one) for one in members):
        time.sleep(0.005)
    partial = [path.name for path in run.glob("ckpt/*.partial")]
    newest = max(
        (int(p.name[5:]) for p in run.glob("ckpt/step_*") if p.suffix != ".partial"), default=0
    )
    where = f"while {partial[0]} was written" if partial else "between saves"
    return f"at step {steps_done(run)}, {where}; newest checkpoint {newest}"


def tensors(run: Path) -> dict[tuple[str, str], torch.Tensor]:
    """Everything in the last checkpoint, by file and name."""
    files = sorted((run / "ckpt" / f"step_{STEPS}").glob("*.safetensors"))
    found = {
        (file.name, name): tensor for file in files for name, tensor in load_file(file).items()
    }
    return {key: tensor for key, tensor in found.items() if key[1] not in PASSED_OVER}


def log_without_times(run: Path) -> list[dict]:
    rows = own_rows(run / "metrics.jsonl")
    timed = ("time/rollout", "time/update", "time/step", "rollout/tokens_per_s", "rollout/wait")
    return [{key: value for key, value in row.items() if key not in timed} for row in rows]


def main(argv: list[str]) -> int:
    kills, ranks, seed = (
        int(argv[i]) if len(argv) > i else default for i, default in enumerate((20, 1, 0))
    )
    dice = random.Random(seed)
    with tempfile.TemporaryDirectory() as scratch:
        straight, killed = Path(scratch) / "straight", Path(scratch) / "killed"
        if launch(straight, ranks).wait():
            print(straight.with_suffix(".log").read_text()[-3000:])
            return 1
        during = 0
        for number in range(1, kills + 1):
            where = kill_somewhere(killed, ranks, dice, saving=number % 2 == 0)
            during += "was written" in where
            print(f"kill {number:>2} {where}", flush=True)
        if launch(killed, ranks).wait():
            print(killed.with_suffix(".log").read_text()[-3000:])
            return 1
        one, other = tensors(straight), tensors(killed)
        differ = [key for key in one.keys() | other.keys() if key not in one or key not in other]
        differ += [
            key for key in one.keys() & other.keys() if not torch.equal(one[key], other[key])
        ]
        logs = log_without_times(straight) == log_without_times(killed)
        said = (straight / "dialogues.jsonl").read_bytes() == (
            killed / "dialogues.jsonl"
        ).read_bytes()
        print(
            f"{kills} kills on {ranks} rank(s), {during} of them during a save: {len(one)} tensors, {len(differ)} "
            f"differ; metrics {'equal' if logs else 'DIFFER'}, dialogues {'equal' if said else 'DIFFER'}"
        )
        return int(bool(differ) or not logs or not said)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
