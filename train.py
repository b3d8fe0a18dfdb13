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
from pathlib import Path
from statistics import fmean, pstdev

import torch
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from chat import Chat, load_tokenizer, make_chat
from checkpoint import (
    SaveError,
    agree,
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
from engine import Engine
from eval import describe, evaluate, join_evaluation, write_evaluation
from rollout import MAX_FAILED, Dialogue, Job, Talk, make_engine, make_talk, run_dialogues
from rundir import best_step, lock_run, log_step, open_run, prepare_run, write_scalars, write_usage
from simulator import Profile, User, hash_key, load_profiles
from update import State, build, update
from users import make_user
from users.clients import usage_metrics
from users.llm_user import LLMUser

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
        self.before = {number: signal.signal(number, self.handle) for number in (signal.SIGINT, signal.SIGTERM)}
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


def together(world: World, interrupts: Interrupts, work: Callable[[], object]) -> list:
    """Every rank's `work()`, on every rank. A signal that any of them has received raises Stop on them all."""
    result = stop = None
    try:
        interrupts.check()
        result = work()
    except Stop as signalled:
        stop = (str(signalled), signalled.code)
    parts = world.gather((result, stop))
    for _, stop in parts:
        if stop:
            raise Stop(*stop)
    return [result for result, _ in parts]


def pick_profiles(profiles: list[Profile], config: Config, step: int) -> list[Profile]:
    """The step's profiles: consecutive pieces of one shuffle after another, a function of (seed, step)."""
    chosen = []
    for index in range(step * config.groups, (step + 1) * config.groups):
        epoch, place = divmod(index, len(profiles))
        order = sorted(range(len(profiles)), key=lambda i: hash_key(config.seed, ORDER_STREAM, epoch, i))
        chosen.append(profiles[order[place]])
    return chosen


def rollout_metrics(
    dialogues: list[Dialogue], seconds: float, wait: float, engine_tokens: tuple[int, int]
) -> dict[str, float]:
    """What is known of a step before anything is learnt from it. `engine_tokens`: sampled, prefilled.

    `wait`: seconds that the first rank to end its dialogues waited for the last.
    """
    good = [dialogue for dialogue in dialogues if dialogue.completed]
    turns = [turn for dialogue in dialogues for turn in dialogue.turns]
    rewards = [dialogue.reward for dialogue in good]
    metrics = {
        "reward/mean": fmean(rewards) if rewards else math.nan,
        "reward/std": pstdev(rewards) if rewards else math.nan,
        "emotion/final": fmean(dialogue.emotion for dialogue in good) if good else math.nan,
        "rollout/tokens": engine_tokens[0],
        "rollout/prefill_tokens": engine_tokens[1],
        "rollout/tokens_per_s": engine_tokens[0] / seconds,
        "rollout/turns": len(turns) / max(1, len(dialogues)),
        "rollout/reply_tokens": fmean(len(turn.sampled_ids) for turn in turns) if turns else 0.0,
        "rollout/reply_cut": fmean(turn.stop != "eos" for turn in turns) if turns else 0.0,
        "simulator/failed": len(dialogues) - len(good),
        "simulator/calls": sum(turn.user is not None for turn in turns) + sum(d.opening is not None for d in dialogues),
        "rollout/wait": wait,
        "time/rollout": seconds,
    }
    for reason, count in Counter(dialogue.ended for dialogue in dialogues).items():
        metrics[f"rollout/stop/{reason}"] = count / len(dialogues)
    return metrics


def roll_out(
    state: State, config: Config, profiles: list[Profile], engine: Engine, chat: Chat, user: User, talk: Talk,
    world: World, interrupts: Interrupts,
) -> tuple[list[Dialogue], dict[str, float]]:
    """The step's dialogues, of all ranks, and their metrics; without dialogues where logits were not finite.

    Whole groups go to one rank. Raises Stop where too many users failed twice (rule: redo once, then end the run), or a
    signal came. Metrics are of the last try.
    """
    chosen, seed, title = pick_profiles(profiles, config, state.step), (config.seed, state.step), state.step + 1
    own = [(group, who) for group, who in enumerate(chosen) if group % world.size == world.rank]
    jobs = [Job((group, member), who) for group, who in own for member in range(config.group_size)]

    def hold() -> tuple[list[Dialogue], str, int, int, float]:
        engine.forget()
        begun, engine.tokens_sampled, engine.tokens_prefilled = time.perf_counter(), 0, 0
        dialogues, error = [], ""
        with tqdm(total=len(jobs) * talk.max_turns, desc=f"rollout {title}", unit="reply", leave=False,
                  dynamic_ncols=True, disable=not world.main) as bar:
            try:
                dialogues = run_dialogues(jobs, engine, chat, user, talk, seed, bar.update, check=interrupts.check)
            except FloatingPointError as problem:
                error = str(problem)
        return dialogues, error, engine.tokens_sampled, engine.tokens_prefilled, time.perf_counter() - begun

    for attempt in range(2):
        begun = time.perf_counter()
        if state.sampler:
            refill(state.sampler, state.policy)
        with gathered(engine.model, world):
            parts = together(world, interrupts, hold)
        found, errors, sampled, prefilled, times = zip(*parts)
        error = next((problem for problem in errors if problem), "")
        if error and world.main:
            tqdm.write(f"step {title}: {error}")
        dialogues = [] if error else sorted((d for part in found for d in part), key=lambda dialogue: dialogue.key)
        seconds, wait = time.perf_counter() - begun, max(times) - min(times)
        failed = [dialogue for dialogue in dialogues if not dialogue.completed]
        if len(failed) <= MAX_FAILED * len(dialogues):
            return dialogues, rollout_metrics(dialogues, seconds, wait, (sum(sampled), sum(prefilled)))
        share = f"{len(failed)} of {len(dialogues)} users failed"
        if world.main:
            tqdm.write(f"step {title}: {share} ({failed[0].why}); {'giving up' if attempt else 'once more'}")
    raise Stop(f"{share}, twice; the first said: {failed[0].why}", 1)


def resume(config: Config, run: Path, state: State, world: World) -> Path | None:
    """Put the state at the checkpoint that `resume` names, if any; returns its folder."""
    folder = None if config.resume == "none" else Path(config.resume)
    if config.resume == "auto":
        folder = newest_sound(run, world)
    if folder:
        state.step = load_checkpoint(folder, state.modules, state.optimisers)
        if world.main:
            print(f"resuming from {folder}")
    return folder


def evaluate_step(
    config: Config, run: Path, state: State, tokenizer, tests: list[Profile], board: SummaryWriter | None, world: World,
    interrupts: Interrupts,
) -> None:
    """The evaluation that is due after this step, added to its metrics; none if it stands there already.

    A run that was stopped during its evaluation begins with it when it is resumed.
    """
    path, step = run / "metrics.jsonl", state.step
    if not config.eval_every or not step or step % config.eval_every:
        return
    rows = own_rows(path) if world.main else []
    row = rows[-1] if rows else {"step": 0}
    pending = row["step"] == step and "eval/score" not in row
    if not world.gather(pending)[0]:  # the main rank's word: a network file system may show others an older file
        return
    record = Path(config.record_file or run / "record.jsonl")  # all evaluations have the same seeds: a file for each
    record = record.with_name(f"{record.stem}.eval_{step}{record.suffix}")
    heard, sampler = dataclasses.replace(config, record_file=str(record)), state.sampler or state.policy
    if state.sampler:
        refill(state.sampler, state.policy)

    def hold() -> tuple | str:
        title = f"evaluation {step}"
        try:
            return evaluate(heard, sampler, tokenizer, tests, title, world=world, check=interrupts.check)
        except FloatingPointError as problem:
            return str(problem)

    with gathered(sampler, world):
        parts = together(world, interrupts, hold)
    error = next((part for part in parts if isinstance(part, str)), "")
    if error and world.main:
        tqdm.write(f"ALARM evaluation {step}: {error}; it has no score")
    elif world.main:
        held, cost = join_evaluation(config, parts)
        about = describe(config, f"{run} step {step}")
        result = write_evaluation(run / "eval" / f"step_{step}", config, about, held, cost)
        scores = {f"eval/{key}": result[key] for key in ("score", "success", "failure")}
        write_rows(path, [*rows[:-1], row | scores])
        write_scalars(board, scores, step)


def describe_world(config: Config, state: State, world: World) -> str:
    """One line on how the run is spread out, and what whole weights cost in memory."""
    count = sum(p.numel() for p in state.policy.parameters())
    size = count * world.dtype.itemsize / 1e9
    where = f"a replica of {size:.2f} GB" if state.sampler else f"{size:.2f} GB of gathered weights during rollouts"
    trained = sum(p.numel() for o in state.optimisers for group in o.param_groups for p in group["params"])
    return (f"{world.size} ranks, one copy of the weights on each {config.shard or world.size}, {world.dtype}; "
            f"{trained / 1e6:,.1f} M trained parameters; generation={config.generation}: {where}, on each rank")


def finish(config: Config, run: Path, state: State, tokenizer, user: User, world: World) -> None:
    """Write what a finished run leaves: the adapter of a LoRA run, what the user cost, and the model."""
    adapter, model = run / "adapter", run / "model"
    if config.lora_rank:
        rank, alpha = config.lora_rank, config.lora_alpha
        agree(world, adapter, lambda: save_adapter(state.policy, config.model, rank, alpha, adapter, world.main))
    if isinstance(user, LLMUser) and world.main:
        write_usage(run)
    dtype = torch.float32 if config.lora_rank else world.dtype
    # Last, since a folder of that name says that the run is finished.
    agree(world, model, lambda: save_model(state.policy, tokenizer, model, world.main, dtype))


def train(config: Config, user: User | None = None) -> Path:
    """The whole run; `user` replaces the configured one (tests). Returns the folder of the trained model."""
    run, world = open_run(config), start(config)
    if world.size > 1 and config.record == "record":
        raise InputError("option 'record' is record, which one process alone can do; use record=off on several ranks")
    profiles, tests = load_profiles(config.profiles), load_profiles(config.eval_profiles) if config.eval_every else []
    chat = make_chat(load_tokenizer(config.tokenizer or config.model), config.think)
    talk, state = make_talk(config, training=True), build(config, world)
    lock = lock_run(run) if world.main and run.is_dir() else None  # before anything in it is read, or renamed
    resumed, model = resume(config, run, state, world), run / "model"
    if state.step >= config.steps and model.is_dir():
        if world.main:
            more = f"steps={state.step + 100} trains on"
            print(f"{run} is finished: {state.step} steps. The model lies in {model}; {more}")
        return model
    user = user or make_user(config, config.start_emotion, config.user_mode)
    world.gather(None)  # all have looked at the run before one of them writes in it
    if world.main:
        lock = lock or lock_run(run)
        prepare_run(config, run, talk, state.step, world)
    board = SummaryWriter(run / "tb", purge_step=state.step + 1) if world.main else None
    if world.main and world.mesh is not None:
        print(describe_world(config, state, world))
    count, head = -(-config.groups // world.size) * config.group_size, None if state.critic else state.value_head
    engine = make_engine(config, state.sampler or state.policy, chat, config.temperature, count, head, world.dtype)
    here = resumed and resumed.resolve().parent == (run / "ckpt").resolve()
    saved, skipped = state.step if here else -1, 0

    def save() -> int:
        save_checkpoint(run, state.step, state.modules, state.optimisers, world)
        if world.main:
            prune(run, config.keep, best_step(run))
        return state.step

    bar = tqdm(total=config.steps, initial=state.step, desc=config.algorithm, unit="step", dynamic_ncols=True,
               disable=not world.main)
    with lock or nullcontext(), Interrupts() as interrupts, board or nullcontext(), bar:
        try:
            while True:
                evaluate_step(config, run, state, chat.tokenizer, tests, board, world, interrupts)
                if saved != state.step and world.gather(world.main and best_step(run) == state.step)[0]:
                    saved = save()
                if state.step >= config.steps:
                    break
                begun = time.perf_counter()
                dialogues, metrics = roll_out(state, config, profiles, engine, chat, user, talk, world, interrupts)
                rolled = time.perf_counter()
                if isinstance(user, LLMUser):
                    spent = world.gather(user.client.usage.drain())
                    metrics |= usage_metrics(spent, config.price_in, config.price_out)
                metrics |= update(state, config, dialogues, engine.banned, world)
                for name in (*LEARNT, *LEARNT_BY[config.algorithm], "rollout/sampler_gap"):
                    metrics.setdefault(name, math.nan)  # every line has every key, though nothing was learnt
                state.step += 1
                metrics |= {"time/update": time.perf_counter() - rolled, "time/step": time.perf_counter() - begun}
                skipped = skipped + 1 if metrics["skipped"] else 0
                log = functools.partial(log_step, run, state.step, dialogues, metrics, board, bar)
                agree(world, run, log if world.main else None)
                if state.step == config.steps or (config.save_every and state.step % config.save_every == 0):
                    saved = save()
                if skipped >= MAX_SKIPPED:
                    look = f"lower lr, or look at {run / 'metrics.jsonl'}"
                    raise Stop(f"{skipped} steps in a row could not be learnt from; {look}", 1)
        except Stop:
            if saved != state.step:
                save()
            raise
        finish(config, run, state, chat.tokenizer, user, world)
        interrupts.check()
    return model


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
