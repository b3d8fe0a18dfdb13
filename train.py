"""Train a policy on how simulated people feel: roll out -> advantages -> update -> log, evaluate, save.

    python train.py configs/demo.py                        one process
    python train.py configs/demo.py lr=2e-5 seed=1         options changed on the command line
    torchrun --nproc-per-node 8 train.py configs/ppo.py    eight GPUs (docs/hardware.md: several nodes)
    python train.py --help                                 every option

Where this departs from the textbook: (1) the batch is ragged and packed, no padding anywhere; (2) losses are sums,
divided once by the trained tokens of the whole optimiser step; (3) GAE runs over the trained tokens of a dialogue, not
over what the user said; (4) with one optimiser step an iteration the old log-probabilities are the training forward's
own, so that the ratio is 1 and clipping never acts; (5) a run resumes to the bit, since all noise is a function of
(seed, step, dialogue, turn, position); (6) ranks hold different groups of dialogues, then all know all of them, and
each learns from a share of the trajectories that is equal in tokens.
"""

import dataclasses
import errno
import functools
import math
import os
import shlex
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, pstdev

import torch
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from chat import load_tokenizer, make_chat
from checkpoint import (
    SaveError,
    agree,
    check_files,
    checkpoints,
    load_checkpoint,
    newest_sound,
    prune,
    save_adapter,
    save_checkpoint,
    save_model,
)
from config import Config, InputError, help_text, load_config, own_rows, write_rows
from dist import World, close, gathered, refill, start
from eval import describe, evaluate, join_evaluation, write_evaluation
from rollout import MAX_FAILED, Dialogue, Job, Stage, make_engine, make_talk
from rundir import best_step, lock_run, log_step, open_run, prepare_run, write_scalars
from simulator import Profile, User, hash_key, load_profiles
from update import State, build, update
from users import make_user
from users.llm_user import LLMUser, usage_metrics

ORDER_STREAM = 2  # keeps the order of profiles apart from other uses of the seed
MAX_SKIPPED = 5  # non-finite steps in a row before a run gives up
LEARNT = ("policy/loss", "policy/approx_kl", "policy/clipfrac", "policy/entropy", "policy/grad_norm")
LEARNT_BY = {"ppo": ("value/loss", "value/explained_variance"), "grpo": ("group/zero_spread",)}


class Stop(Exception):
    """The run ends early: a signal, or something that going on would not mend. Carries the exit code."""

    def __init__(self, why: str, code: int):
        super().__init__(why)
        self.code = code


class Interrupts:
    """SIGINT and SIGTERM within a `with` block: remembered, and raised as Stop by the next `check`.

    A rollout and an evaluation check before each step of the engine, hence are abandoned; an update is finished.
    """

    def __enter__(self) -> "Interrupts":
        self.received = 0
        numbers = (signal.SIGINT, signal.SIGTERM)
        self.before = {number: signal.signal(number, self.handle) for number in numbers}
        return self

    def __exit__(self, *error) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def handle(self, number: int, frame) -> None:
        self.received = number

    def check(self) -> None:
        """Raise Stop if a signal has come."""
        if self.received:
            raise Stop(f"stopped by {signal.Signals(self.received).name}", 128 + self.received)


@dataclass
class Run:
    """What every part of the loop needs to know of the run. `board` is None on ranks that do not write."""

    config: Config
    folder: Path
    world: World
    interrupts: Interrupts
    board: SummaryWriter | None

    def say(self, line: str) -> None:
        """A line on the screen, above the progress bars, from the main rank."""
        if self.world.main:
            tqdm.write(line)


def together(run: Run, work: Callable[[], object]) -> list:
    """Every rank's `work()`, on every rank. A signal that any of them has received raises Stop on them all."""
    result = stop = None
    try:
        run.interrupts.check()
        result = work()
    except Stop as signalled:
        stop = (str(signalled), signalled.code)
    parts = run.world.gather((result, stop))
    for _, stop in parts:
        if stop:
            raise Stop(*stop)
    return [result for result, _ in parts]


def pick_profiles(profiles: list[Profile], config: Config, step: int) -> list[Profile]:
    """The step's people, all different: a piece of one shuffle after another, a function of (seed, step)."""
    epoch, piece = divmod(step, len(profiles) // config.groups)
    everyone = range(len(profiles))
    order = sorted(everyone, key=lambda i: hash_key(config.seed, ORDER_STREAM, epoch, i))
    return [profiles[i] for i in order[piece * config.groups : (piece + 1) * config.groups]]


@dataclass
class Rollout:
    """One rank's part of a step's rollout. `error` says where logits were not finite; then it has no dialogues."""

    dialogues: list[Dialogue]
    sampled: int  # tokens
    prefilled: int  # tokens
    seconds: float
    error: str = ""


def rollout_metrics(dialogues: list[Dialogue], parts: list[Rollout], seconds: float) -> dict[str, float]:
    """What is known of a step before anything is learnt from it; `seconds` until the last rank was done."""
    good = [dialogue for dialogue in dialogues if dialogue.completed]
    turns = [turn for dialogue in dialogues for turn in dialogue.turns]
    rewards = [dialogue.reward for dialogue in good]
    sampled, times = sum(part.sampled for part in parts), [part.seconds for part in parts]
    answers = sum(turn.user is not None for turn in turns)
    metrics = {
        "reward/mean": fmean(rewards) if rewards else math.nan,
        "reward/std": pstdev(rewards) if rewards else math.nan,
        "emotion/final": fmean(dialogue.emotion for dialogue in good) if good else math.nan,
        "rollout/tokens": sampled,
        "rollout/prefill_tokens": sum(part.prefilled for part in parts),
        "rollout/tokens_per_s": sampled / seconds,
        "rollout/turns": len(turns) / max(1, len(dialogues)),
        "rollout/reply_tokens": fmean(len(turn.sampled_ids) for turn in turns) if turns else 0.0,
        "rollout/reply_cut": fmean(turn.stop != "eos" for turn in turns) if turns else 0.0,
        "simulator/failed": len(dialogues) - len(good),
        "simulator/calls": answers + sum(d.opening is not None for d in dialogues),
        "rollout/wait": max(times) - min(times),
        "time/rollout": seconds,
    }
    for reason, count in Counter(dialogue.ended for dialogue in dialogues).items():
        metrics[f"rollout/stop/{reason}"] = count / len(dialogues)
    return metrics


def hold(run: Run, stage: Stage, jobs: list[Job], step: int) -> Rollout:
    """This rank's dialogues of a step."""
    engine = stage.engine
    engine.forget()
    begun, engine.tokens_sampled, engine.tokens_prefilled = time.perf_counter(), 0, 0
    dialogues, error, seed = [], "", (run.config.seed, step)
    total, title = len(jobs) * stage.talk.max_turns, f"rollout {step + 1}"
    with tqdm(total=total, desc=title, unit="reply", leave=False, dynamic_ncols=True,
              disable=not run.world.main) as bar:
        try:
            dialogues = stage.hold(jobs, seed, bar.update, check=run.interrupts.check)
        except FloatingPointError as problem:
            error = str(problem)
    seconds = time.perf_counter() - begun
    return Rollout(dialogues, engine.tokens_sampled, engine.tokens_prefilled, seconds, error)


def roll_out(
    run: Run, state: State, stage: Stage, profiles: list[Profile]
) -> tuple[list[Dialogue], dict[str, float]]:
    """The step's dialogues, of all ranks, and their metrics; no dialogues where logits were not finite.

    Whole groups go to one rank. A step with too many failed users is redone once; the metrics are of the last try.
    Raises Stop where that failed too, or a signal came.
    """
    config, world, step = run.config, run.world, state.step
    chosen = list(enumerate(pick_profiles(profiles, config, step)))[world.rank :: world.size]
    jobs = [Job((group, member), who) for group, who in chosen for member in range(config.group_size)]
    for attempt in range(2):
        begun = time.perf_counter()
        if state.sampler:
            refill(state.sampler, state.policy)
        with gathered(stage.engine.model, world):
            parts = together(run, lambda: hold(run, stage, jobs, step))
        error = next((part.error for part in parts if part.error), "")
        if error:
            run.say(f"step {step + 1}: {error}")
        found = [] if error else [dialogue for part in parts for dialogue in part.dialogues]
        dialogues = sorted(found, key=lambda dialogue: dialogue.key)
        seconds = time.perf_counter() - begun
        failed = [dialogue for dialogue in dialogues if not dialogue.completed]
        if len(failed) <= MAX_FAILED * len(dialogues):
            return dialogues, rollout_metrics(dialogues, parts, seconds)
        share = f"{len(failed)} of {len(dialogues)} users failed"
        what_now = "giving up" if attempt else "once more"
        run.say(f"step {step + 1}: {share} ({failed[0].why}); {what_now}")
    raise Stop(f"{share}, twice; the first said: {failed[0].why}", 1)


def resume_from(config: Config, run: Path, world: World) -> Path | None:
    """The checkpoint that `resume` names, if any."""
    if config.resume == "auto":
        return newest_sound(run, world)
    return None if config.resume == "none" else Path(config.resume)


def evaluate_step(run: Run, state: State, tokenizer) -> None:
    """The evaluation that is due after this step, added to its metrics; nothing if it has been added already.

    A run that was stopped during its evaluation begins with it when it is resumed.
    """
    config, world, step = run.config, run.world, state.step
    if not config.eval_every or not step or step % config.eval_every:
        return
    path = run.folder / "metrics.jsonl"
    rows = own_rows(path) if world.main else []
    row = rows[-1] if rows else {"step": 0}
    pending = row["step"] == step and "eval/score" not in row
    if not world.gather(pending)[0]:  # a network file system may show other ranks an older file
        return
    record = Path(config.record_file or run.folder / "record.jsonl")
    record = record.with_name(f"{record.stem}.eval_{step}{record.suffix}")  # all evaluations have the same seeds
    heard, sampler = dataclasses.replace(config, record_file=str(record)), state.sampler or state.policy
    if state.sampler:
        refill(state.sampler, state.policy)

    def held() -> tuple | str:
        try:
            return evaluate(heard, sampler, tokenizer, world, check=run.interrupts.check)
        except FloatingPointError as problem:
            return str(problem)

    with gathered(sampler, world):
        parts = together(run, held)
    error = next((part for part in parts if isinstance(part, str)), "")
    if error:
        run.say(f"ALARM evaluation {step}: {error}; it has no score")
    elif world.main:
        dialogues, cost = join_evaluation(config, parts)
        about = describe(config, f"{run.folder} step {step}", world)
        result = write_evaluation(run.folder / "eval" / f"step_{step}", config, about, dialogues, cost)
        scores = {f"eval/{key}": result[key] for key in ("score", "success", "failure")}
        write_rows(path, [*rows[:-1], row | scores])
        write_scalars(run.board, scores, step)


def describe_world(config: Config, state: State, world: World) -> str:
    """One line on how the run is spread out, and what whole weights cost in memory."""
    size = sum(p.numel() for p in state.policy.parameters()) * world.dtype.itemsize / 1e9
    kind = "a replica of" if state.sampler else "during rollouts gathered weights of"
    groups = [group for optimiser in state.optimisers for group in optimiser.param_groups]
    trained = sum(p.numel() for group in groups for p in group["params"]) / 1e6
    shard = config.shard or world.size
    return (f"{world.size} ranks, one copy of the weights on each {shard}, {world.dtype}; {trained:,.1f} M trained "
            f"parameters; generation={config.generation}: {kind} {size:.2f} GB on each rank")


def finish(run: Run, state: State, tokenizer) -> None:
    """Write what a finished run leaves: the adapter of a LoRA run, and the model."""
    config, world = run.config, run.world
    adapter, model = run.folder / "adapter", run.folder / "model"
    if config.lora_rank:
        agree(world, adapter, lambda: save_adapter(state.policy, config, adapter, world.main))
    dtype = torch.float32 if config.lora_rank else world.dtype
    # Last, since a folder of that name says that the run is finished.
    agree(world, model, lambda: save_model(state.policy, tokenizer, model, world.main, dtype))


def load_people(config: Config) -> list[Profile]:
    """The training profiles. Raises InputError where a step could not draw different ones, or a file is bad."""
    if config.eval_every:
        load_profiles(config.eval_profiles)
    profiles = load_profiles(config.profiles)
    if len(profiles) < config.groups:
        few, most = f"{config.profiles}: holds {len(profiles)} profiles", f"groups={len(profiles)}"
        draws = f"a step draws {config.groups} different ones"
        raise InputError(f"{few}, but {draws}; give more by profiles=FILE, or {most} at most")
    return profiles


def train(config: Config, user: User | None = None) -> Path:
    """The whole run; `user` replaces the configured one (tests). Returns the folder of the trained model."""
    folder, world = open_run(config), start(config)
    if world.size > 1 and config.record == "record":
        raise InputError("option 'record' is record, which one process alone can do; use record=off on several ranks")
    profiles = load_people(config)
    chat = make_chat(load_tokenizer(config.tokenizer or config.model), config.think)
    talk = make_talk(config, training=True)
    lock = lock_run(folder) if world.main and folder.is_dir() else None  # before anything in it is read, or renamed
    checkpoint, model = resume_from(config, folder, world), folder / "model"
    step = check_files(checkpoint) if checkpoint else 0
    if step >= config.steps and model.is_dir():
        if world.main:
            more = f"steps={step + 100} trains on"
            print(f"{folder} is finished: {step} steps. The model lies in {model}; {more}")
        return model
    user = user or make_user(config, config.start_emotion, config.user_mode)  # before any weights are loaded
    state = build(config, world)
    if checkpoint:
        state.step = load_checkpoint(checkpoint, state.modules, state.optimisers)
        if world.main:
            print(f"resuming from {checkpoint}")
    world.gather(None)  # all have looked at the run before one of them writes in it
    if world.main:
        lock = lock or lock_run(folder)
        prepare_run(config, folder, talk, state.step, world)
        if world.mesh is not None:
            print(describe_world(config, state, world))
    board = SummaryWriter(folder / "tb", purge_step=state.step + 1) if world.main else None
    count = -(-config.groups // world.size) * config.group_size
    head = None if state.critic else state.value_head
    engine = make_engine(config, state.sampler or state.policy, chat, count, head, world.dtype)
    here = checkpoint and checkpoint.resolve().parent == (folder / "ckpt").resolve()
    saved = state.step if here else -1
    with lock or nullcontext(), Interrupts() as interrupts, board or nullcontext():
        run = Run(config, folder, world, interrupts, board)
        learn_steps(run, state, Stage(engine, chat, user, talk), profiles, saved)
        finish(run, state, chat.tokenizer)
        interrupts.check()
    return model


def learn_steps(run: Run, state: State, stage: Stage, profiles: list[Profile], saved: int) -> None:
    """The loop: roll out, update, log, evaluate, save. `saved`: the step that is on disk already, -1 for none."""
    config, world, skipped = run.config, run.world, 0

    def save() -> int:
        save_checkpoint(run.folder, state.step, state.modules, state.optimisers, world)
        if world.main:
            prune(run.folder, config.keep, best_step(run.folder))
        return state.step

    with tqdm(total=config.steps, initial=state.step, desc=config.algorithm, unit="step", dynamic_ncols=True,
              disable=not world.main) as bar:
        try:
            while True:
                evaluate_step(run, state, stage.chat.tokenizer)
                best = world.main and best_step(run.folder) == state.step
                if saved != state.step and world.gather(best)[0]:
                    saved = save()
                if state.step >= config.steps:
                    return
                begun = time.perf_counter()
                dialogues, metrics = roll_out(run, state, stage, profiles)
                rolled = time.perf_counter()
                if isinstance(stage.user, LLMUser):
                    metrics |= usage_metrics(world.gather(stage.user.drain()))
                metrics |= update(state, config, dialogues, stage.engine.banned, world)
                for name in (*LEARNT, *LEARNT_BY[config.algorithm], "rollout/sampler_gap"):
                    metrics.setdefault(name, math.nan)  # every line has every key, though nothing was learnt
                state.step += 1
                now = time.perf_counter()
                metrics |= {"time/update": now - rolled, "time/step": now - begun}
                log = functools.partial(log_step, run.folder, state.step, dialogues, metrics, run.board)
                agree(world, run.folder, log if world.main else None)
                bar.update()
                bar.set_postfix_str(f"emotion {metrics['emotion/final']:.1f}, {metrics['time/step']:.0f} s")
                due = config.save_every and state.step % config.save_every == 0
                if state.step == config.steps or due:
                    saved = save()
                skipped = skipped + 1 if metrics["skipped"] else 0
                if skipped >= MAX_SKIPPED:
                    look = f"lower lr, or look at {run.folder / 'metrics.jsonl'}"
                    raise Stop(f"{skipped} steps in a row could not be learnt from; {look}", 1)
        except Stop:
            if saved != state.step:
                save()
            raise


def main(argv: list[str]) -> int:
    if "-h" in argv or "--help" in argv:
        print(help_text("python train.py [configs/NAME.py] key=value ..."))
        return 0
    config, main_rank = load_config(argv), int(os.environ.get("RANK", 0)) == 0
    try:
        model = train(config)
        if main_rank:
            print(f"trained model: {model}")
        return 0
    except Stop as stop:
        said, code = f"{stop}. Saved in {config.run}/ckpt; go on", stop.code
    except (SaveError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        last = checkpoints(Path(config.run))[-1:]
        good = f"the last good checkpoint is {last[0]}" if last else "there is no checkpoint yet"
        said, code = f"{error}; {good}. Make room, then go on", 1
    finally:
        close()
    if main_rank:
        # A checkpoint that was named is where the run came from, not where it is now.
        same = [arg for arg in argv if not arg.startswith("resume=") or arg == "resume=auto"]
        launcher = "torchrun ..." if int(os.environ.get("WORLD_SIZE", 1)) > 1 else "python"
        print(f"{said} with: {launcher} train.py {shlex.join(same)}", file=sys.stderr)
    return code


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except InputError as error:
        if int(os.environ.get("LOCAL_RANK", 0)) == 0:  # once a node: what is missing may be so on one of them alone
            print(error, file=sys.stderr)
        sys.exit(2)
