"""A run's folder: config.json, kernels.json, env.txt, metrics.jsonl, dialogues.jsonl, tb/, eval/.

JSON lines are the truth, TensorBoard a copy. Only the main rank writes. ckpt/ is checkpoint.py's.
`find_policy` reads one: the policy that a command is given as MODEL_OR_RUN.
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

from config import (MAY_CHANGE, Config, InputError, add_rows, load_config, own_rows,  # isort: skip
                    read_json, read_saved, require, save_config, write_rows)  # fmt: skip
import kernels
from chat import load_tokenizer, make_chat
from checkpoint import checkpoints, load_checkpoint, load_model
from dist import World
from model import Transformer, find_folder
from rollout import Talk, log_line
from update import make_model
from users.offline import user_hash

LOCK = ".lock"
KERNELS = "kernels.json"


def open_run(config: Config) -> Path:
    """The run's folder, checked for writing. Raises InputError if it belongs to another config."""
    run, do = Path(config.run), "give another run=DIR"
    check_writable(run)
    if run.exists() and not run.is_dir():
        raise InputError(f"{run}: is not a folder; {do}")
    if (run / "config.json").is_file():
        if config.resume == "none":
            raise InputError(f"{run}: exists already; {do}, or resume=auto to go on with it")
        saved = read_saved(run / "config.json")
        for f in dataclasses.fields(Config):
            old, new = getattr(saved, f.name), getattr(config, f.name)
            if old != new and f.name not in MAY_CHANGE:
                was = f"{f.name}={old}"
                raise InputError(f"{run}: was begun with {was}, not {new}; {do}, or {was} to go on")
    elif run.exists() and any(path.name not in ("eval", LOCK) for path in run.iterdir()):
        raise InputError(f"{run}: is not empty and not a run; {do}")
    return run


def use_kernels(config: Config, begun: Path | None, world: World) -> str:
    """Choose matrix kernels, of the run `begun` if there is one, on all ranks; says what they are.

    Resuming to the bit needs the kernels that the run has had. Raises InputError if its file is bad.
    """
    if world.device.type == "cuda":
        return "matrix products: cuBLAS"
    given, path = config.matmul, (begun or Path()) / KERNELS
    if given == "auto" and begun:  # runs from before there was a choice have no file
        given = read_json(path) if path.is_file() else dict.fromkeys(kernels.USES, "mkl")
        if given.keys() != kernels.chosen.keys() or set(given.values()) - set(kernels.LIBRARIES):
            raise InputError(f"{path}: names no libraries for matrix products; without it: mkl")
    line = kernels.use(given) if world.main else ""
    if world.dtype == torch.bfloat16 and world.device.type == "cpu" and not kernels.half_is_fast():
        line += "\nthis CPU has no bf16 instructions: precision=bf16 is many times slower than fp32"
    line, chosen = world.gather((line, kernels.chosen))[0]  # one measurement for all
    kernels.chosen.update(chosen)
    return line


@dataclasses.dataclass(frozen=True)
class Policy:
    """What a command was given as MODEL_OR_RUN; without a `checkpoint`, `name` is a model's."""

    config: Config
    name: str
    run: Path | None = None
    checkpoint: Path | None = None

    def files(self) -> list[Path]:
        """What its weights come from. Raises InputError for a model that is not there."""
        lora = bool(self.config.lora_rank)
        bases = [self.config.model] * lora if self.checkpoint else [self.name]
        found = [Path(base) if base.endswith(".json") else find_folder(base) for base in bases]
        return [self.checkpoint, *found] if self.checkpoint else found

    def load(self, world: World) -> tuple[Transformer, object]:
        """The model on this process's device, and its tokenizer, which has to know ChatML."""
        config = self.config
        base = config.model if self.checkpoint else self.name
        tokenizer = load_tokenizer(config.tokenizer or base)
        make_chat(tokenizer, config.think)
        if self.checkpoint:
            return restore_policy(config, self.checkpoint, world), tokenizer
        to = world.dtype
        return load_model(self.name, config.seed, world.device, lambda m: m.to(to)), tokenizer


def find_policy(command: str, argv: list[str]) -> Policy:
    """The policy of a model folder, a hub name, or a run's model or newest checkpoint, argv[0].

    A run's own options are the defaults of those behind it.
    """
    wanted = f"{command} wants a model folder, a hub name or a run directory first"
    require(argv and "=" not in argv[0] and not argv[0].startswith("-"), wanted)
    source, options = argv[0], argv[1:]
    run = Path(source) if (Path(source) / "env.txt").is_file() else None  # a model folder has none
    if run and all("=" in arg for arg in options):
        saved = dataclasses.asdict(read_saved(run / "config.json"))
        own = {k: v for k, v in saved.items() if v != getattr(Config(), k) and "record" not in k}
        options = [f"{key}={value}" for key, value in own.items()] + options
    config = load_config(options)
    # For a LoRA run, the checkpoint: merging the adapter into bf16 weights would round it away.
    wanted = run and (config.lora_rank or not (run / "model").is_dir())
    newest = checkpoints(run)[-1:] if wanted else []
    if run and not newest and not (run / "model").is_dir():
        raise InputError(f"{run}: has neither {run / 'model'} nor a checkpoint yet; train on")
    if newest:
        return Policy(config, str(newest[0]), run, newest[0])
    return Policy(config, str(run / "model") if run else source, run)


def restore_policy(config: Config, checkpoint: Path, world: World) -> Transformer:
    """The policy of a checkpoint on this process's device, its adapter beside it if it has one."""
    model = make_model(config, world)
    load_checkpoint(checkpoint, {"policy": model})
    return model.to(world.dtype)


def check_writable(folder: Path) -> None:
    """Raise InputError if a folder cannot be made, or written to. The trial leaves nothing."""
    try:
        there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        if there.is_dir():
            tempfile.TemporaryFile(dir=there).close()
    except OSError as error:
        why = error.strerror
        raise InputError(f"{folder}: cannot be written ({why}); give another folder") from None


def lock_run(run: Path) -> IO:
    """Lock the run until the file is closed. Raises InputError if another process trains in it."""
    run.mkdir(parents=True, exist_ok=True)
    file = open(run / LOCK, "a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
            return file  # a file system without locks
        file.close()
        who = (run / LOCK).read_text().strip() or "unknown"
        do = "wait or stop it, or give another run=DIR"
        raise InputError(f"{run}: process {who} is training in it; {do}") from None
    file.truncate(0)
    print(f"{os.getpid()} on {platform.node()}", file=file, flush=True)
    return file


def prepare_run(config: Config, run: Path, talk: Talk, step: int, world: World) -> None:
    """Write down what the run is, and drop all that its folder has of steps after `step`."""
    save_config(config, run / "config.json")
    command, here = ["git", "describe", "--always", "--dirty"], Path(__file__).parent
    commit = subprocess.run(command, capture_output=True, text=True, cwd=here).stdout.strip()
    device = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "cpu"
    about = {"python": platform.python_version(), "torch": torch.__version__,
             "platform": platform.platform(), "ranks": world.size, "device": device,
             "compute": world.dtype, "threads": torch.get_num_threads(),
             "commit": commit or "unknown", "user": user_hash()}  # fmt: skip
    (run / KERNELS).write_text(json.dumps(kernels.chosen) + "\n")
    (run / "env.txt").write_text("".join(f"{key} {found}\n" for key, found in about.items()))
    systems = json.dumps(talk.systems, ensure_ascii=False, indent=1)
    (run / "system_prompts.json").write_text(systems + "\n", encoding="utf-8")
    for name in ("metrics.jsonl", "dialogues.jsonl"):
        cut_back(run / name, step)
    if later := [folder for folder in checkpoints(run) if int(folder.name[5:]) > step]:
        print(f"removing {', '.join(f.name for f in later)}: the run goes on from step {step}")
    for folder in later:  # the user has left that branch, and resume=auto must not go back to it
        shutil.rmtree(folder)


def cut_back(path: Path, step: int) -> None:
    """Drop from a JSON-lines file what follows `step`, and the half line that a kill may leave."""
    if path.is_file():
        write_rows(path, [row for row in own_rows(path) if row["step"] <= step])


def best_step(run: Path) -> int | None:
    """The step whose evaluation had the highest score, the first of equals; None without any."""
    scored = [row for row in own_rows(run / "metrics.jsonl") if row.get("eval/score") is not None]
    return max(scored, key=lambda row: row["eval/score"])["step"] if scored else None


def log_step(run: Path, step: int, dialogues: list, metrics: dict, board: SummaryWriter) -> None:
    """Add a step's dialogues and metrics to the run's files."""
    add_rows(run / "dialogues.jsonl", [log_line(dialogue, step=step) for dialogue in dialogues])
    add_rows(run / "metrics.jsonl", [{"step": step, **metrics}])
    write_scalars(board, metrics, step)
    if metrics["skipped"]:
        why = "numbers that are not finite, or nothing to learn from"
        tqdm.write(f"ALARM step {step}: {why}; the weights were left as they are")


def write_scalars(board: SummaryWriter, metrics: dict[str, float], step: int) -> None:
    for name, amount in metrics.items():
        if math.isfinite(amount):
            board.add_scalar(name, amount, step)
