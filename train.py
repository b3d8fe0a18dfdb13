"""Train a policy on how simulated people feel: roll out, update, log, evaluate, save.

    python train.py configs/demo.py                        one process
    python train.py configs/demo.py lr=2e-5 seed=1         options changed on the command line
    torchrun --nproc-per-node 8 train.py configs/ppo.py    eight GPUs (more: docs/hardware.md)
    python train.py --help                                 every option

Where this departs from the textbook: (1) batches are ragged and packed, without padding;
(2) losses are sums, divided once by the trained tokens of the whole optimiser step; (3) GAE runs
over trained tokens, not over what the user said; (4) with one optimiser step an iteration the old
log-probabilities are the training forward's own: the ratio is 1, nothing is clipped; (5) noise is a
function of (seed, step, dialogue, turn, position), so a run resumes to the bit; (6) each rank rolls
out its own groups, sees all dialogues, and learns from an equal share of the tokens.
"""

import errno
import math
import os
import shlex
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean, pstdev

import torch
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from checkpoint import (SaveError, agree, check_files, checkpoints, load_checkpoint,  # isort: skip
                        newest_sound, prune, save_adapter, save_checkpoint, save_model)  # fmt: skip
from chat import load_tokenizer, make_chat

from config import (Config, InputError, help_text, load_config, own_rows,  # isort: skip
                    run_main, write_rows)  # fmt: skip
from dist import World, close, gathered, refill, start
from eval import describe, evaluate, join_evaluation, write_evaluation
from judges.shadow import parted
from rollout import MAX_FAILED, Dialogue, Job, Stage, make_engine, make_talk
from rundir import best_step, lock_run, log_step, open_run, prepare_run, use_kernels, write_scalars
from simulator import Profile, User, hash_key, load_profiles
from update import State, build, update
from users import make_user
from users.llm_user import LLMUser, usage_metrics

ORDER_STREAM = 2  # keeps the order of profiles apart from other uses of the seed
MAX_SKIPPED = 5  # non-finite steps in a row before a run gives up
KEYS = ("policy/loss", "policy/approx_kl", "policy/clipfrac", "policy/entropy", "policy/grad_norm")
KEYS_BY = {"ppo": ("value/loss", "value/explained_variance"), "grpo": ("group/zero_spread",)}


class Stop(Exception):
    """The run ends early: a signal came, or going on would not help. Carries the exit code."""

    def __init__(self, why: str, code: int):
        super().__init__(why)
        self.code = code


class Interrupts:
    """Remembers SIGINT and SIGTERM until the next `check`, so that an update can finish."""

    def __enter__(self) -> None:
        self.received = 0
        self.before = {n: signal.signal(n, self.handle) for n in (signal.SIGINT, signal.SIGTERM)}

    def __exit__(self, *error) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def handle(self, number: int, frame) -> None:
        self.received = number

    def check(self) -> None:
        if self.received:
            raise Stop(f"stopped by {signal.Signals(self.received).name}", 128 + self.received)


@dataclass
class Run:
    """What every part of the loop needs. `board` is None on ranks that do not write."""

    config: Config
    folder: Path
    world: World
    interrupts: Interrupts
    board: SummaryWriter | None

    def say(self, line: str) -> None:
        """Print a line above the progress bars, on the main rank only."""
        if self.world.main:
            tqdm.write(line)


def together(run: Run, state: State, work: Callable[[], object]) -> list:
    """Every rank's `work()`, on every rank, or a string that says where logits were not finite.

    All weights are whole while ranks work. A signal to any of them raises Stop on all.
    """
    part = stop = None
    if state.sampler:
        refill(state.sampler, state.policy)
    with gathered(state.sampler or state.policy, run.world):
        try:
            run.interrupts.check()
            part = work()
        except FloatingPointError as problem:
            part = str(problem)
        except Stop as signalled:
            stop = (str(signalled), signalled.code)
        parts, stops = zip(*run.world.gather((part, stop)))
    if any(stops):
        raise Stop(*next(filter(None, stops)))
    return list(parts)


def pick_profiles(profiles: list[Profile], config: Config, step: int) -> list[Profile]:
    """A step's profiles, all different: each epoch is a new shuffle, cut into steps."""
    epoch, piece = divmod(step, len(profiles) // config.groups)
    order = sorted(range(len(profiles)), key=partial(hash_key, config.seed, ORDER_STREAM, epoch))
    return [profiles[i] for i in order[piece * config.groups :][: config.groups]]


@dataclass
class Rollout:
    """One rank's part of a step's rollout."""

    dialogues: list[Dialogue]
    sampled: int  # tokens
    prefilled: int  # tokens
    seconds: float
    error: str = ""  # where logits were not finite; then there are no dialogues


def rollout_metrics(dialogues: list[Dialogue], parts: list[Rollout], seconds: float) -> dict:
    """A step's metrics before the update; `seconds` lasted until the slowest rank was done."""
    good = [dialogue for dialogue in dialogues if dialogue.completed]
    turns = [turn for dialogue in dialogues for turn in dialogue.turns]
    rewards = [dialogue.reward for dialogue in good]
    sampled, times = sum(part.sampled for part in parts), [part.seconds for part in parts]
    heard = [dialogue.opening for dialogue in dialogues] + [turn.user for turn in turns]
    ended, count = Counter(dialogue.ended for dialogue in dialogues), max(1, len(dialogues))
    return {
        "reward/mean": fmean(rewards) if rewards else math.nan,
        "reward/std": pstdev(rewards) if rewards else math.nan,
        "emotion/final": fmean(dialogue.emotion for dialogue in good) if good else math.nan,
        "rollout/tokens": sampled, "rollout/prefill_tokens": sum(part.prefilled for part in parts),
        "rollout/tokens_per_s": sampled / seconds, "rollout/turns": len(turns) / count,
        "rollout/reply_tokens": fmean(len(turn.sampled_ids) for turn in turns) if turns else 0.0,
        "rollout/reply_cut": fmean(turn.stop != "eos" for turn in turns) if turns else 0.0,
        "simulator/failed": len(dialogues) - len(good),
        "simulator/calls": len(heard) - heard.count(None),
        "rollout/wait": max(times) - min(times), "time/rollout": seconds,
        **{f"rollout/stop/{reason}": n / count for reason, n in ended.items()}}  # fmt: skip


def hold(run: Run, stage: Stage, jobs: list[Job], step: int) -> Rollout:
    """Hold this rank's dialogues of a step."""
    engine, dialogues, error = stage.engine, [], ""
    begun, engine.tokens_sampled, engine.tokens_prefilled = time.perf_counter(), 0, 0
    seed, total = (run.config.seed, step), len(jobs) * stage.talk.max_turns
    with tqdm(total=total, desc=f"rollout {step + 1}", unit="reply", leave=False,
              dynamic_ncols=True, disable=not run.world.main) as bar:
        try:
            dialogues = stage.hold(jobs, seed, bar.update, check=run.interrupts.check)
        except FloatingPointError as problem:
            error = str(problem)
    seconds = time.perf_counter() - begun
    return Rollout(dialogues, engine.tokens_sampled, engine.tokens_prefilled, seconds, error)


def roll_out(run: Run, state: State, stage: Stage, profiles: list[Profile]) -> tuple[list, dict]:
    """All ranks' dialogues of a step, none where logits were not finite, and their metrics.

    A group stays on one rank. Raises Stop where too many users failed twice, or a signal came.
    """
    config, world, step = run.config, run.world, state.step
    chosen = list(enumerate(pick_profiles(profiles, config, step)))[world.rank :: world.size]
    jobs = [Job((group, i), who) for group, who in chosen for i in range(config.group_size)]
    for what_now in ("once more", "giving up"):
        begun = time.perf_counter()
        parts = together(run, state, lambda: hold(run, stage, jobs, step))
        if error := next((part.error for part in parts if part.error), ""):
            run.say(f"step {step + 1}: {error}")
        held = sorted((d for p in parts if not error for d in p.dialogues), key=lambda d: d.key)
        failed = [dialogue for dialogue in held if not dialogue.completed]
        if len(failed) <= MAX_FAILED * len(held):
            return held, rollout_metrics(held, parts, time.perf_counter() - begun)
        share = f"{len(failed)} of {len(held)} users failed"
        run.say(f"step {step + 1}: {share} ({failed[0].why}); {what_now}")
    raise Stop(f"{share}, twice; the first said: {failed[0].why}", 1)


def evaluate_step(run: Run, state: State, tokenizer) -> None:
    """Hold the evaluation that is due after this step, unless the step's metrics have it."""
    config, world, step, sampler = run.config, run.world, state.step, state.sampler or state.policy
    if not config.eval_every or not step or step % config.eval_every:
        return
    path = run.folder / "metrics.jsonl"
    *before, row = (world.main and own_rows(path)) or [{"step": 0}]
    pending = row["step"] == step and "eval/score" not in row
    if not world.gather(pending)[0]:  # a network file system may show other ranks an older file
        return
    # Evaluations have the same seeds, hence the same keys: each needs a record of its own.
    record = Path(config.record_file or run.folder / "record.jsonl")
    heard = replace(config, record_file=str(record.with_stem(f"{record.stem}.eval_{step}")))
    work = partial(evaluate, heard, sampler, tokenizer, world, check=run.interrupts.check)
    parts = together(run, state, work)
    if error := next((part for part in parts if isinstance(part, str)), ""):
        run.say(f"ALARM evaluation {step}: {error}; it has no score")
    elif world.main:
        rows, cost = join_evaluation(config, parts)
        failed = sum(row["status"] != "ok" for row in rows)
        if failed > MAX_FAILED * len(rows):
            return run.say(f"ALARM evaluation {step}: {failed} users failed; it has no score")
        about = describe(config, f"{run.folder} step {step}", world)
        result = write_evaluation(run.folder / "eval" / f"step_{step}", config, about, rows, cost)
        kept = ("score", "success", "failure", "shadow", "formula/commonest", "formula/similarity")
        scores = {f"eval/{key}": result[key] for key in kept if key in result}
        if warning := parted(before, scores):
            run.say(f"ALARM evaluation {step}: {warning}")
        write_rows(path, [*before, row | scores])
        write_scalars(run.board, scores, step)


def describe_world(config: Config, state: State, world: World) -> str:
    """One line on how the run is spread over ranks, and how much memory whole weights take."""
    size = sum(p.numel() for p in state.policy.parameters()) * world.dtype.itemsize / 1e9
    trained = sum(p.numel() for o in state.optimisers for g in o.param_groups for p in g["params"])
    return (f"{world.size} ranks, one copy of the weights on each {config.shard or world.size}, "
            f"{world.dtype}; {trained / 1e6:,.1f} M trained parameters; "
            f"generation={config.generation}: {size:.2f} GB of whole weights on each rank")


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
    """The training profiles. Raises InputError if a file is bad, or holds too few for a step."""
    if config.eval_every:
        load_profiles(config.eval_profiles)
    profiles = load_profiles(config.profiles)
    if (n := len(profiles)) < config.groups:
        few = f"{config.profiles}: holds {n} profiles, but a step draws {config.groups} different"
        raise InputError(f"{few} ones; give more by profiles=FILE, or groups={n} at most")
    return profiles


def ask_for_user(config: Config, world: World) -> User:
    """The configured user. Raises InputError on all ranks if any of them has none."""
    try:
        user, wrong = make_user(config, config.start_emotion, config.user_mode), ""
    except InputError as error:
        user, wrong = None, str(error)
    if wrong := next(filter(None, world.gather(wrong)), ""):
        raise InputError(wrong)
    return user


def train(config: Config, user: User | None = None) -> Path:
    """The whole run; tests give another `user`. Returns the folder of the trained model."""
    folder, world = open_run(config), start(config)
    run, model = Run(config, folder, world, Interrupts(), None), folder / "model"
    if world.size > 1 and config.record == "record":
        raise InputError("option 'record' is record, which one process alone can do; "
                         "use record=off on several ranks")
    profiles, talk = load_people(config), make_talk(config, training=True)
    lock = lock_run(folder) if world.main and folder.is_dir() else None  # before anything is read
    named = None if config.resume == "none" else Path(config.resume)
    checkpoint = newest_sound(folder, world) if config.resume == "auto" else named
    step = check_files(checkpoint) if checkpoint else 0
    if step >= config.steps and model.is_dir():
        more = f"steps={step + 100} trains on"
        run.say(f"{folder} is finished: {step} steps. The model lies in {model}; {more}")
        return model
    user = user or ask_for_user(config, world)  # before anything is loaded
    chat = make_chat(load_tokenizer(config.tokenizer or config.model), config.think)
    run.say(use_kernels(config, checkpoint and checkpoint.parent.parent, world))
    state = build(config, world)
    if checkpoint:
        state.step = load_checkpoint(checkpoint, state.modules, state.optimisers)
        run.say(f"resuming from {checkpoint}")
    world.gather(None)  # all have looked at the run before one of them writes in it
    if world.main:
        lock = lock or lock_run(folder)
        prepare_run(config, folder, talk, state.step, world)
        run.board = SummaryWriter(folder / "tb", purge_step=state.step + 1)
        if world.mesh is not None:
            run.say(describe_world(config, state, world))
    count = -(-config.groups // world.size) * config.group_size
    head = None if state.critic else state.value_head
    engine = make_engine(config, state.sampler or state.policy, chat, count, head)
    here = checkpoint and checkpoint.resolve().parent == (folder / "ckpt").resolve()
    saved = state.step if here else -1
    with lock or nullcontext(), run.interrupts, run.board or nullcontext():
        learn_steps(run, state, Stage(engine, chat, user, talk), profiles, saved)
        finish(run, state, chat.tokenizer)
        run.interrupts.check()
    return model


def learn_steps(run: Run, state: State, stage: Stage, profiles: list[Profile], saved: int) -> None:
    """The loop: roll out, update, log, evaluate, save. `saved`: the step on disk, -1 for none."""
    config, world, every, skipped = run.config, run.world, run.config.save_every, 0
    unlearnt = dict.fromkeys((*KEYS, *KEYS_BY[config.algorithm], "rollout/sampler_gap"), math.nan)

    def save() -> int:
        save_checkpoint(run.folder, state.step, state.modules, state.optimisers, world)
        if world.main:
            prune(run.folder, config.keep, best_step(run.folder))
        return state.step

    with tqdm(total=config.steps, initial=state.step, desc=config.algorithm, unit="step",
              dynamic_ncols=True, disable=not world.main) as bar:
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
                metrics |= unlearnt | update(state, config, dialogues, stage.engine.banned, world)
                state.step += 1
                now = time.perf_counter()
                metrics |= {"time/update": now - rolled, "time/step": now - begun}
                log = partial(log_step, run.folder, state.step, dialogues, metrics, run.board)
                agree(world, run.folder, log if world.main else None)
                bar.update()
                bar.set_postfix_str(f"emotion {metrics['emotion/final']:.1f}, {now - begun:.0f} s")
                if state.step == config.steps or (every and state.step % every == 0):
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
    run_main(main)
