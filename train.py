"""Train a policy on how simulated people feel: roll out -> advantages -> update -> log, evaluate, save.

    python train.py configs/demo.py                    one process
    python train.py configs/demo.py lr=2e-5 seed=1     options changed on the command line
    python train.py --help                             every option

Where this departs from the textbook: (1) the batch is ragged and packed, no padding anywhere; (2) losses are sums,
divided once by the trained tokens of the whole optimiser step; (3) GAE runs over the trained tokens of a dialogue, not
over what the user said; (4) with one optimiser step an iteration the old log-probabilities are the training forward's
own, so that the ratio is 1 and clipping never acts; (5) a run resumes to the bit, since all noise is a function of
(seed, step, dialogue, turn, position).
"""

import dataclasses
import json
import math
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean, median, pstdev

import torch
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from chat import Chat, load_tokenizer, make_chat
from config import MAY_CHANGE, Config, InputError, help_text, load_config, read_saved, save_config
from dist import checkpoints, load_checkpoint, save_checkpoint
from engine import Engine, hash_key
from eval import describe, evaluate, make_engine, make_talk, make_user, pick_device, write_evaluation
from logs import without_nan
from model import save_model
from offline import user_hash
from rollout import MAX_FAILED, Dialogue, Job, Talk, log_line, run_dialogues
from sentient import LLMUser
from simulator import Profile, User, load_profiles
from update import State, build, update

ORDER_STREAM = 2  # keeps the order of profiles apart from other uses of the seed
MAX_SKIPPED = 5  # non-finite steps in a row before a run gives up
LEARNT = ("policy/loss", "policy/approx_kl", "policy/clipfrac", "policy/entropy", "policy/grad_norm")
USAGE = [f"simulator/{key}" for key in (
    "llm_calls", "tokens_in", "tokens_out", "cost", "retries", "parse_failures", "clamped", "failed")]  # fmt: skip
LEARNT_BY = {"ppo": ("value/loss", "value/explained_variance"), "grpo": ("group/zero_spread",)}


class Stop(Exception):
    """The run ends early: a signal, or something that going on would not mend. Carries the exit code."""

    def __init__(self, why: str, code: int):
        super().__init__(why)
        self.code = code


class Interrupts:
    """SIGINT and SIGTERM within a `with` block: a rollout or an evaluation is abandoned, all else is finished."""

    def __enter__(self) -> "Interrupts":
        self.abandon, self.received = False, 0
        self.before = {number: signal.signal(number, self.handle) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def handle(self, number: int, frame) -> None:
        self.received = number
        if self.abandon:
            self.check()

    def check(self) -> None:
        """Raise Stop if a signal has come."""
        if self.received:
            raise Stop(f"stopped by {signal.Signals(self.received).name}", 128 + self.received)

    @contextmanager
    def may_abandon(self):
        """Within this block a signal raises Stop at once."""
        self.check()
        self.abandon = True
        try:
            yield
        finally:
            self.abandon = False


def pick_profiles(profiles: list[Profile], config: Config, step: int) -> list[Profile]:
    """The step's profiles: consecutive pieces of one shuffle after another, a function of (seed, step)."""
    chosen = []
    for index in range(step * config.groups, (step + 1) * config.groups):
        epoch, place = divmod(index, len(profiles))
        order = sorted(range(len(profiles)), key=lambda i: hash_key(config.seed, ORDER_STREAM, epoch, i))
        chosen.append(profiles[order[place]])
    return chosen


def rollout_metrics(dialogues: list[Dialogue], seconds: float, engine_tokens: tuple[int, int]) -> dict[str, float]:
    """What is known of a step before anything is learnt from it. `engine_tokens`: sampled, prefilled."""
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
        "time/rollout": seconds,
    }
    for reason, count in Counter(dialogue.ended for dialogue in dialogues).items():
        metrics[f"rollout/stop/{reason}"] = count / len(dialogues)
    return metrics


def roll_out(
    state: State, config: Config, profiles: list[Profile], engine: Engine, chat: Chat, user: User, talk: Talk
) -> tuple[list[Dialogue], dict[str, float]]:
    """The step's dialogues and their metrics; without dialogues where logits were not finite.

    Raises Stop where too many users failed twice (rule: redo once, then end the run). Metrics are of the last try.
    """
    chosen, seed, title = pick_profiles(profiles, config, state.step), (config.seed, state.step), state.step + 1
    jobs = [Job((group, member), who) for group, who in enumerate(chosen) for member in range(config.group_size)]
    for attempt in range(2):
        engine.forget()
        begun, engine.tokens_sampled, engine.tokens_prefilled = time.perf_counter(), 0, 0
        replies = len(jobs) * talk.max_turns
        with tqdm(total=replies, desc=f"rollout {title}", unit="reply", leave=False, dynamic_ncols=True) as bar:
            try:
                dialogues = run_dialogues(jobs, engine, chat, user, talk, seed, bar.update)
            except FloatingPointError as error:
                tqdm.write(f"step {title}: {error}")
                dialogues = []
        seconds, failed = time.perf_counter() - begun, [dialogue for dialogue in dialogues if not dialogue.completed]
        if len(failed) <= MAX_FAILED * len(dialogues):
            return dialogues, rollout_metrics(dialogues, seconds, (engine.tokens_sampled, engine.tokens_prefilled))
        share = f"{len(failed)} of {len(dialogues)} users failed"
        tqdm.write(f"step {title}: {share} ({failed[0].why}); {'giving up' if attempt else 'once more'}")
    raise Stop(f"{share}, twice; the first said: {failed[0].why}", 1)


def open_run(config: Config) -> Path:
    """The run directory, ready to be written. Raises InputError where it belongs to another config."""
    run = Path(config.run)
    if run.exists() and not run.is_dir():
        raise InputError(f"{run}: is not a folder; give another run=DIR")
    if (run / "config.json").is_file():
        if config.resume == "none":
            raise InputError(f"{run}: exists already; give another run=DIR, or resume=auto to go on with it")
        saved = read_saved(run / "config.json")
        for f in dataclasses.fields(Config):
            old, new = getattr(saved, f.name), getattr(config, f.name)
            if old != new and f.name not in MAY_CHANGE:
                other = f"{f.name}={old}"
                raise InputError(f"{run}: was begun with {other}, not {new}; give another run=DIR, or {other} to go on")
    elif run.exists() and any(path.name != "eval" for path in run.iterdir()):
        raise InputError(f"{run}: is not empty and not a run; give another run=DIR")
    return run


def write_environment(run: Path) -> None:
    """env.txt: what this ran on."""
    command, here = ["git", "describe", "--always", "--dirty"], Path(__file__).parent
    commit = subprocess.run(command, capture_output=True, text=True, cwd=here).stdout.strip()
    lines = [f"python {platform.python_version()}", f"torch {torch.__version__}", f"platform {platform.platform()}"]
    lines += [f"threads {torch.get_num_threads()}", f"commit {commit or 'unknown'}", f"user {user_hash()}"]
    (run / "env.txt").write_text("\n".join(lines) + "\n")


def cut_back(path: Path, step: int) -> None:
    """Drop the lines of steps after `step`, and what a crash left of a line, from a JSON-lines file.

    They will be made again. A line ends at a newline only: a sampled U+2028 may stand raw within one.
    """
    if path.is_file():
        write_lines(path, [line for line in path.read_bytes().split(b"\n")[:-1] if json.loads(line)["step"] <= step])


def write_lines(path: Path, lines: list[bytes]) -> None:
    """Replace a file, written aside first: a kill leaves the old one or the new."""
    aside = path.with_name(path.name + ".partial")
    aside.write_bytes(b"".join(line + b"\n" for line in lines))
    os.replace(aside, path)


def append(path: Path, rows: list[dict]) -> None:
    """Add JSON lines to a file."""
    with open(path, "a", encoding="utf-8") as file:
        file.writelines(json.dumps(without_nan(row), ensure_ascii=False) + "\n" for row in rows)


def resume(config: Config, run: Path, state: State) -> bool:
    """Put the state at the checkpoint that `resume` names, if any; returns whether there was one."""
    folders = {"auto": checkpoints(run)[-1:], "none": []}.get(config.resume, [Path(config.resume)])
    for folder in folders:
        state.step = load_checkpoint(folder, state.modules, state.optimisers)
        print(f"resuming from {folder}")
    return bool(folders)


def prepare_run(config: Config, run: Path, talk: Talk, step: int) -> None:
    """Write down what the run is, and drop whatever in its directory lies behind `step`."""
    run.mkdir(parents=True, exist_ok=True)
    save_config(config, run / "config.json")
    write_environment(run)
    systems = json.dumps(talk.systems, ensure_ascii=False, indent=1)
    (run / "system_prompts.json").write_text(systems + "\n", encoding="utf-8")
    for name in ("metrics.jsonl", "dialogues.jsonl"):
        cut_back(run / name, step)
    later = [folder for folder in checkpoints(run) if int(folder.name[5:]) > step]
    if later:  # of a branch that the user has left; resume=auto must not take it up again
        print(f"removing {', '.join(folder.name for folder in later)}: the run goes on from step {step}")
    for folder in later:
        shutil.rmtree(folder)


def evaluate_step(
    config: Config, run: Path, state: State, tokenizer, tests: list[Profile], board: SummaryWriter,
    interrupts: Interrupts,
) -> None:
    """The evaluation that is due after this step, added to its metrics; none if it stands there already.

    A run that was stopped during its evaluation begins with it when it is resumed.
    """
    path, step = run / "metrics.jsonl", state.step
    lines = path.read_bytes().split(b"\n")[:-1] if path.is_file() else []
    row = json.loads(lines[-1]) if lines else {"step": 0}
    due = config.eval_every and step and step % config.eval_every == 0
    if not due or row["step"] != step or "eval/score" in row:
        return
    record = Path(config.record_file or run / "record.jsonl")  # all evaluations have the same seeds: a file for each
    record = record.with_name(f"{record.stem}.eval_{step}{record.suffix}")
    with interrupts.may_abandon():
        heard = dataclasses.replace(config, record_file=str(record))
        rows, cost = evaluate(heard, state.policy, tokenizer, tests, f"evaluation {step}")
    result = write_evaluation(run / "eval" / f"step_{step}", config, describe(config, f"{run} step {step}"), rows, cost)
    scores = {f"eval/{key}": result[key] for key in ("score", "success", "failure")}
    write_lines(path, [*lines[:-1], json.dumps(without_nan(row | scores)).encode()])
    write_scalars(board, scores, step)


def write_scalars(board: SummaryWriter, metrics: dict[str, float], step: int) -> None:
    """TensorBoard's copy of the metrics."""
    for name, amount in metrics.items():
        if math.isfinite(amount):
            board.add_scalar(name, amount, step)


def write_usage(run: Path) -> None:
    """usage.json: what the user's model cost over the whole run, evaluations apart (each has its own result.json).

    Sums over the steps; of the latencies the median p50 and the largest p95 of any step.
    """
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_bytes().split(b"\n")[:-1]]
    total = {key: sum(row[key] for row in rows) for key in USAGE}
    total["simulator/latency_p50"] = median(row["simulator/latency_p50"] for row in rows)
    total["simulator/latency_p95"] = max(row["simulator/latency_p95"] for row in rows)
    (run / "usage.json").write_text(json.dumps(total, indent=1) + "\n")
    calls, tokens_in, tokens_out, cost = (total[key] for key in USAGE[:4])
    spent = f"{calls:,} calls, {tokens_in:,} tokens in, {tokens_out:,} out, cost {cost:.2f}"
    print(f"the user's model: {spent}; more in {run / 'usage.json'}")


def train(config: Config, user: User | None = None) -> Path:
    """The whole run; `user` replaces the configured one (tests). Returns the folder of the trained model."""
    run, device = open_run(config), pick_device(config)
    profiles, tests = load_profiles(config.profiles), load_profiles(config.eval_profiles) if config.eval_every else []
    chat = make_chat(load_tokenizer(config.tokenizer or config.model), config.think)
    talk, state = make_talk(config, training=True), build(config, device)
    resumed, model = resume(config, run, state), run / "model"
    if state.step >= config.steps and model.is_dir():
        print(f"{run} is finished: {state.step} steps. The model lies in {model}; steps={state.step + 100} trains on")
        return model
    user = user or make_user(config, config.start_emotion, config.user_mode)
    prepare_run(config, run, talk, state.step)
    count, head = config.groups * config.group_size, None if state.critic else state.value_head
    engine = make_engine(config, state.policy, chat, config.temperature, count, head)
    board = SummaryWriter(run / "tb", purge_step=state.step + 1)
    saved, skipped = state.step if resumed else -1, 0
    bar = tqdm(total=config.steps, initial=state.step, desc=config.algorithm, unit="step", dynamic_ncols=True)
    with Interrupts() as interrupts, board, bar:
        try:
            while True:
                evaluate_step(config, run, state, chat.tokenizer, tests, board, interrupts)
                if state.step >= config.steps:
                    break
                begun = time.perf_counter()
                with interrupts.may_abandon():
                    dialogues, metrics = roll_out(state, config, profiles, engine, chat, user, talk)
                rolled = time.perf_counter()
                if isinstance(user, LLMUser):
                    metrics |= user.client.usage.take(config.price_in, config.price_out)
                metrics |= update(state, config, dialogues, engine.banned)
                for name in (*LEARNT, *LEARNT_BY[config.algorithm], "rollout/sampler_gap"):
                    metrics.setdefault(name, math.nan)  # every line has every key, though nothing was learnt
                state.step += 1
                metrics |= {"time/update": time.perf_counter() - rolled, "time/step": time.perf_counter() - begun}
                skipped = skipped + 1 if metrics["skipped"] else 0
                if skipped:
                    why = "numbers that are not finite, or nothing to learn from"
                    tqdm.write(f"ALARM step {state.step}: {why}; the weights were left as they are")
                append(run / "dialogues.jsonl", [log_line(dialogue, step=state.step) for dialogue in dialogues])
                append(run / "metrics.jsonl", [{"step": state.step, **metrics}])
                write_scalars(board, metrics, state.step)
                bar.update()
                bar.set_postfix_str(f"emotion {metrics['emotion/final']:.1f}, {metrics['time/step']:.0f} s")
                if state.step == config.steps or (config.save_every and state.step % config.save_every == 0):
                    save_checkpoint(run, state.step, state.modules, state.optimisers, config.keep)
                    saved = state.step
                if skipped >= MAX_SKIPPED:
                    look = f"lower lr, or look at {run / 'metrics.jsonl'}"
                    raise Stop(f"{skipped} steps in a row could not be learnt from; {look}", 1)
                interrupts.check()
        except Stop:
            if saved != state.step:
                save_checkpoint(run, state.step, state.modules, state.optimisers, config.keep)
            raise
        save_model(state.policy, chat.tokenizer, model)
        if isinstance(user, LLMUser):
            write_usage(run)
        interrupts.check()
    return model


def main(argv: list[str]) -> int:
    if "-h" in argv or "--help" in argv:
        print(help_text("python train.py [configs/NAME.py] key=value ..."))
        return 0
    config = load_config(argv)
    try:
        print(f"trained model: {train(config)}")
        return 0
    except Stop as stop:
        print(f"{stop}. Saved in {config.run}/ckpt; go on with: python train.py {' '.join(argv)}", file=sys.stderr)
        return stop.code


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except InputError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
