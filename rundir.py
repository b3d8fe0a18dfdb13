"""A run's directory, which is a contract: config.json, env.txt, metrics.jsonl, dialogues.jsonl, tb/, ckpt/, eval/.

JSON lines are the truth, TensorBoard a copy. What is here writes and reads those files, on the main rank alone, and
sees to it that a run that goes on finds them as they were at its checkpoint. Checkpoints themselves are dist.py's.
"""

import dataclasses
import errno
import fcntl
import json
import math
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import IO

import torch
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from checkpoint import checkpoints
from config import MAY_CHANGE, Config, InputError, add_rows, own_rows, read_saved, save_config, write_rows
from dist import World
from rollout import Dialogue, Talk, log_line
from users.offline import user_hash

LOCK = ".lock"


def open_run(config: Config) -> Path:
    """The run directory, ready to be written. Raises InputError where it belongs to another config."""
    run = Path(config.run)
    if run.exists() and not run.is_dir():
        raise InputError(f"{run}: is not a folder; give another run=DIR")
    check_writable(run)
    if (run / "config.json").is_file():
        if config.resume == "none":
            raise InputError(f"{run}: exists already; give another run=DIR, or resume=auto to go on with it")
        saved = read_saved(run / "config.json")
        for f in dataclasses.fields(Config):
            old, new = getattr(saved, f.name), getattr(config, f.name)
            if old != new and f.name not in MAY_CHANGE:
                other = f"{f.name}={old}"
                raise InputError(f"{run}: was begun with {other}, not {new}; give another run=DIR, or {other} to go on")
    elif run.exists() and any(path.name not in ("eval", LOCK) for path in run.iterdir()):
        raise InputError(f"{run}: is not empty and not a run; give another run=DIR")
    return run


def check_writable(folder: Path) -> None:
    """Raise InputError where a folder could not be made, or written to; nothing is left of the trial."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if there.is_dir():
        try:
            with tempfile.TemporaryFile(dir=there):
                pass
        except OSError as error:
            why = error.strerror
            raise InputError(f"{folder}: cannot be written ({why}); give another folder") from None


def lock_run(run: Path) -> IO:
    """Hold the run for this process; the system lets go of it when the file is closed or the process dies.

    Raises InputError where another process trains in it: one that was started twice, or a rank that outlived torchrun.
    """
    run.mkdir(parents=True, exist_ok=True)
    file = open(run / LOCK, "a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
            return file  # a file system without locks
        file.seek(0)
        who = file.read().strip() or "unknown"
        file.close()
        raise InputError(f"{run}: process {who} is training in it; wait or stop it, or give another run=DIR") from None
    file.truncate(0)
    file.write(f"{os.getpid()} on {platform.node()}")
    file.flush()
    return file


def write_environment(run: Path, world: World) -> None:
    """env.txt: what this ran on."""
    command, here = ["git", "describe", "--always", "--dirty"], Path(__file__).parent
    commit = subprocess.run(command, capture_output=True, text=True, cwd=here).stdout.strip()
    lines = [f"python {platform.python_version()}", f"torch {torch.__version__}", f"platform {platform.platform()}"]
    device = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "cpu"
    lines += [f"ranks {world.size}", f"device {device}", f"compute {world.dtype}"]
    lines += [f"threads {torch.get_num_threads()}", f"commit {commit or 'unknown'}", f"user {user_hash()}"]
    (run / "env.txt").write_text("\n".join(lines) + "\n")


def prepare_run(config: Config, run: Path, talk: Talk, step: int, world: World) -> None:
    """Write down what the run is, and drop whatever in its directory lies behind `step`."""
    save_config(config, run / "config.json")
    write_environment(run, world)
    systems = json.dumps(talk.systems, ensure_ascii=False, indent=1)
    (run / "system_prompts.json").write_text(systems + "\n", encoding="utf-8")
    for name in ("metrics.jsonl", "dialogues.jsonl"):
        cut_back(run / name, step)
    later = [folder for folder in checkpoints(run) if int(folder.name[5:]) > step]
    if later:  # of a branch that the user has left; resume=auto must not take it up again
        print(f"removing {', '.join(folder.name for folder in later)}: the run goes on from step {step}")
    for folder in later:
        shutil.rmtree(folder)


def cut_back(path: Path, step: int) -> None:
    """Drop from a JSON-lines file the rows of steps after `step`, which will be made again, and half a line."""
    if path.is_file():
        write_rows(path, [row for row in own_rows(path) if row["step"] <= step])


def best_step(run: Path) -> int | None:
    """The step whose evaluation had the highest score, the first of equals; None without any."""
    scored = [row for row in own_rows(run / "metrics.jsonl") if row.get("eval/score") is not None]
    return max(scored, key=lambda row: row["eval/score"])["step"] if scored else None


def log_step(
    run: Path, step: int, dialogues: list[Dialogue], metrics: dict[str, float], board: SummaryWriter
) -> None:
    """What a step was, into the run's files."""
    add_rows(run / "dialogues.jsonl", [log_line(dialogue, step=step) for dialogue in dialogues])
    add_rows(run / "metrics.jsonl", [{"step": step, **metrics}])
    write_scalars(board, metrics, step)
    if metrics["skipped"]:
        why = "numbers that are not finite, or nothing to learn from"
        tqdm.write(f"ALARM step {step}: {why}; the weights were left as they are")


def write_scalars(board: SummaryWriter, metrics: dict[str, float], step: int) -> None:
    """TensorBoard's copy of the metrics."""
    for name, amount in metrics.items():
        if math.isfinite(amount):
            board.add_scalar(name, amount, step)
