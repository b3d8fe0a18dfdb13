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
import platform
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, pstdev

import torch
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

import grpo
import ppo
from chat import Chat, load_tokenizer, make_chat
from config import MAY_CHANGE, Config, InputError, help_text, load_config, read_saved, save_config
from dist import checkpoints, load_checkpoint, save_checkpoint
from engine import Engine, hash_key
from eval import evaluate, make_engine, make_talk, make_user, pick_device, user_hash, write_evaluation
from model import PackedAttention, Transformer, ValueHead, load_model, predictors, save_model, token_logprobs
from rollout import Batch, Dialogue, Job, Talk, Trajectory, log_line, pack, run_dialogues, split, trajectories
from simulator import EmotionRules, Key, Profile, User, load_profiles

ORDER_STREAM = 2  # keeps the order of profiles apart from other uses of the seed
MAX_FAILED = 0.25  # share of a step's dialogues whose user may fail
MAX_SKIPPED = 5  # non-finite steps in a row before a run gives up


class Stop(Exception):
    """The run ends early: a signal, or something that going on would not mend. Carries the exit code."""

    def __init__(self, why: str, code: int):
        super().__init__(why)
        self.code = code


class Interrupts:
    """SIGINT and SIGTERM: a rollout or an evaluation is abandoned at once, anything else is finished first."""

    def __init__(self):
        self.abandon, self.received = False, 0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.handle)

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


@dataclass
class State:
    """What training changes. `critic` is a trunk of its own or None; either kind of critic ends in `value_head`."""

    policy: Transformer
    critic: Transformer | None
    value_head: ValueHead | None
    reference: Transformer | None
    optimisers: list[torch.optim.Optimizer]
    step: int = 0

    @property
    def modules(self) -> dict[str, nn.Module]:
        """What a checkpoint holds, by file name."""
        named = {"policy": self.policy, "critic": self.critic, "value_head": self.value_head}
        return {key: module for key, module in named.items() if module is not None}


def build(config: Config, device: torch.device) -> State:
    """Models and optimisers at step 0. The critic starts from the policy's weights."""
    policy = load_model(config.model, config.seed).to(device)
    policy.checkpointing = config.checkpointing
    critic = head = reference = None
    if config.algorithm == "ppo":
        head = ValueHead(policy.config.hidden_size).to(device)
        if config.critic == "trunk":
            critic = load_model(config.model, config.seed).to(device)
            critic.lm_head, critic.checkpointing = None, config.checkpointing
    if config.kl_coef:
        reference = load_model(config.model, config.seed).to(device).requires_grad_(False)
    own, extra = groups(policy, config, config.lr), []
    if head:
        extra = groups(head, config, config.critic_lr) + (groups(critic, config, config.critic_lr) if critic else [])
    sets = [own, extra] if critic else [own + extra]
    optimisers = [torch.optim.AdamW(chosen, betas=(0.9, 0.95), fused=True) for chosen in sets]
    return State(policy, critic, head, reference, optimisers)


def groups(module: nn.Module, config: Config, lr: float) -> list[dict]:
    """AdamW's parameter groups: weight decay on matrices only. `base_lr` is what warm-up scales."""
    matrices = [p for p in module.parameters() if p.dim() >= 2]
    others = [p for p in module.parameters() if p.dim() < 2]
    kinds = ((matrices, config.weight_decay), (others, 0.0))
    return [{"params": chosen, "lr": lr, "base_lr": lr, "weight_decay": decay} for chosen, decay in kinds if chosen]


def set_learning_rates(state: State, config: Config) -> None:
    """Linear warm-up, then constant: a function of the step alone, so nothing of it needs saving."""
    for optimiser in state.optimisers:
        for group in optimiser.param_groups:
            warmup = config.warmup if group["base_lr"] == config.lr else config.critic_warmup
            group["lr"] = group["base_lr"] * min(1.0, (state.step + 1) / max(1, warmup))


def pick_profiles(profiles: list[Profile], config: Config, step: int) -> list[Profile]:
    """The step's profiles: consecutive pieces of one shuffle after another, a function of (seed, step)."""
    chosen = []
    for index in range(step * config.groups, (step + 1) * config.groups):
        epoch, place = divmod(index, len(profiles))
        order = sorted(range(len(profiles)), key=lambda i: hash_key(config.seed, ORDER_STREAM, epoch, i))
        chosen.append(profiles[order[place]])
    return chosen


def forward(state: State, config: Config, batch: Batch, banned: Tensor, model: Transformer | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Log-probability, entropy and value (None without a critic) of the batch's N trained tokens, each [N].

    The value of token t is that of the state before t: it comes from the same hidden state as t's log-probability.
    """
    policy = model or state.policy
    attend = PackedAttention(batch.cu_seqlens, batch.tokens_T.device)
    where_N = predictors(batch.mask_T)
    hidden_ND = policy(batch.tokens_T, batch.position_T, attend)[where_N]
    logp_N, entropy_N = token_logprobs(hidden_ND, policy.output_weight, batch.tokens_T[where_N + 1], banned, config.temperature)
    if model or not state.value_head:
        return logp_N, entropy_N, None
    return logp_N, entropy_N, state.value_head(hidden_ND) if not state.critic else values(state, batch)


def values(state: State, batch: Batch) -> Tensor:
    """The critic's values [N] of the batch's trained tokens, without the policy's log-probabilities."""
    trunk = state.critic or state.policy
    attend = PackedAttention(batch.cu_seqlens, batch.tokens_T.device)
    return state.value_head(trunk(batch.tokens_T, batch.position_T, attend)[predictors(batch.mask_T)])


@dataclass
class Piece:
    """A micro-batch and what the loss needs beside it, all [N]. `old_logp` is None where the forward's own serves."""

    batch: Batch
    advantage: Tensor | None = None
    returns: Tensor | None = None
    old_value: Tensor | None = None
    old_logp: Tensor | None = None
    reference_logp: Tensor | None = None


@torch.no_grad()
def prepare(state: State, config: Config, pieces: list[Piece], rewards: dict[Key, float], banned: Tensor) -> dict[str, float]:
    """Fill the pieces: old values and log-probabilities, then advantages and returns. Returns the metrics of that.

    Everything is joined by dialogue: the trained tokens of all its trajectories, in order, are one vector.
    """
    several = config.minibatches * config.epochs > 1
    for piece in pieces:
        if config.kl_coef:
            piece.reference_logp = forward(state, config, piece.batch, banned, state.reference)[0]
        if several or (config.kl_coef and config.kl == "reward"):
            piece.old_logp = forward(state, config, piece.batch, banned, state.policy)[0]
        if state.value_head:
            piece.old_value = values(state, piece.batch)
    penalty = {}  # k1 per trained token of a dialogue, times its coefficient
    if config.kl_coef and config.kl == "reward":
        penalty = by_dialogue(pieces, [config.kl_coef * (piece.old_logp - piece.reference_logp) for piece in pieces])
    metrics = {}
    if config.algorithm == "grpo":
        total = {key: reward - float(penalty[key].sum() if penalty else 0.0) for key, reward in rewards.items()}
        advantage, metrics["group/zero_spread"] = grpo.group_advantages(total, config.scale_advantage)
        for piece in pieces:
            piece.advantage = torch.cat([torch.full((n,), advantage[key]) for key, n in zip(piece.batch.keys, piece.batch.trained)]).to(banned.device)
        return metrics
    value = by_dialogue(pieces, [piece.old_value for piece in pieces])
    advantage, returns = {}, {}
    for key, value_N in value.items():
        reward_N = -penalty[key] if penalty else torch.zeros_like(value_N)
        reward_N[-1] += rewards[key]
        advantage[key], returns[key] = ppo.gae(reward_N.cpu(), value_N.cpu(), config.gamma, config.lam)
    if config.scale_advantage:
        keys = sorted(advantage)
        white = ppo.whiten(torch.cat([advantage[key] for key in keys])).split([len(advantage[key]) for key in keys])
        advantage = dict(zip(keys, white))
    scatter(pieces, advantage, "advantage")
    scatter(pieces, returns, "returns")
    everything = torch.cat([piece.old_value for piece in pieces]), torch.cat([piece.returns for piece in pieces])
    return {"value/explained_variance": ppo.explained_variance(*everything), "value/mean": float(everything[0].mean())}


def by_dialogue(pieces: list[Piece], vectors: list[Tensor]) -> dict[Key, Tensor]:
    """Vectors over the pieces' trained tokens, regrouped: key -> all trained tokens of that dialogue in order."""
    parts: dict[Key, list[Tensor]] = {}
    for piece, vector_N in zip(pieces, vectors):
        for key, part in zip(piece.batch.keys, vector_N.split(piece.batch.trained)):
            parts.setdefault(key, []).append(part)
    return {key: torch.cat(found) for key, found in parts.items()}


def scatter(pieces: list[Piece], vectors: dict[Key, Tensor], name: str) -> None:
    """The way back from `by_dialogue`: set attribute `name` of each piece."""
    used = Counter()
    for piece in pieces:
        parts = []
        for key, count in zip(piece.batch.keys, piece.batch.trained):
            parts.append(vectors[key][used[key] : used[key] + count])
            used[key] += count
        setattr(piece, name, torch.cat(parts).to(piece.batch.tokens_T.device))


def learn(state: State, config: Config, pieces: list[Piece], banned: Tensor) -> dict[str, float]:
    """One optimiser step on these pieces; sums over trained tokens divided once by their number.

    Returns metrics. Gradients that are not finite leave the weights as they are and count as "skipped".
    """
    total = sum(len(piece.advantage) for piece in pieces)
    sums: Counter = Counter()
    for piece in pieces:
        logp, entropy, value = forward(state, config, piece.batch, banned)
        old = logp.detach() if piece.old_logp is None else piece.old_logp
        policy, approx_kl, clipped = ppo.policy_loss(logp, old, piece.advantage, config.clip)
        loss = policy - config.entropy_coef * entropy.sum()
        if value is not None:
            value_part = ppo.value_loss(value, piece.old_value, piece.returns, config.value_clip)
            loss = loss + (1.0 if state.critic else config.vf_coef) * value_part
            sums["value/loss"] += float(value_part)
        if piece.reference_logp is not None:
            if config.kl == "loss":
                loss = loss + config.kl_coef * ppo.kl_loss(logp, piece.reference_logp)
            ratio = (piece.reference_logp - logp).detach()
            sums["policy/kl_reference"] += float((ratio.exp() - 1 - ratio).sum())  # k3
        (loss / total).backward()
        gap = (logp.detach() - piece.batch.logp_T[piece.batch.mask_T]).abs()
        for name, amount in (("policy/loss", policy), ("policy/approx_kl", approx_kl), ("policy/clipfrac", clipped), ("policy/entropy", entropy.sum()), ("rollout/sampler_gap", gap.sum())):
            sums[name] += float(amount)
    metrics = {name: amount / total for name, amount in sums.items()}
    finite = all(math.isfinite(amount) for amount in metrics.values())
    for name, optimiser in zip(("policy/grad_norm", "value/grad_norm"), state.optimisers):
        parameters = [p for group in optimiser.param_groups for p in group["params"]]
        metrics[name] = float(nn.utils.clip_grad_norm_(parameters, config.grad_clip))
        finite = finite and math.isfinite(metrics[name])
    for optimiser in state.optimisers:
        if finite:
            optimiser.step()
        optimiser.zero_grad(set_to_none=True)
    return {**metrics, "skipped": 0.0 if finite else 1.0}


def update(state: State, config: Config, dialogues: list[Dialogue], banned: Tensor) -> dict[str, float]:
    """All optimiser steps of one iteration on its dialogues. Returns the metrics, means over the optimiser steps."""
    device = banned.device
    rewards = {dialogue.key: dialogue.reward for dialogue in dialogues if dialogue.completed and dialogue.turns}
    if config.algorithm == "grpo":
        kept = grpo.group_advantages(rewards, config.scale_advantage)[0]
        rewards = {key: reward for key, reward in rewards.items() if key in kept}
    if not rewards:
        return {"skipped": 1.0}
    if state.value_head and state.step == 0:
        nn.init.constant_(state.value_head.bias, fmean(rewards.values()))
    items = {dialogue.key: trajectories(dialogue, config.think) for dialogue in dialogues if dialogue.key in rewards}
    # Mini-batches take whole dialogues, dealt out in a shuffled order of their own.
    order = sorted(items, key=lambda key: hash_key(config.seed, state.step, *key))
    minibatches = []
    for index in range(config.minibatches):
        chosen = sorted(order[index :: config.minibatches])
        parts = split([item for key in chosen for item in items[key]], config.micro_tokens)
        minibatches.append([Piece(pack(part).to(device)) for part in parts])
    metrics = prepare(state, config, [piece for pieces in minibatches for piece in pieces], rewards, banned)
    set_learning_rates(state, config)
    steps = [learn(state, config, pieces, banned) for _ in range(config.epochs) for pieces in minibatches if pieces]
    metrics["policy/lr"] = state.optimisers[0].param_groups[0]["lr"]
    return {**metrics, **{name: fmean(step[name] for step in steps) for name in steps[0]}}


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
        "rollout/turns": len(turns) / len(dialogues),
        "rollout/reply_tokens": fmean(len(turn.sampled_ids) for turn in turns) if turns else 0.0,
        "rollout/reply_cut": fmean(turn.stop != "eos" for turn in turns) if turns else 0.0,
        "simulator/failed": len(dialogues) - len(good),
        "simulator/calls": sum(turn.user is not None for turn in turns) + sum(d.opening is not None for d in dialogues),
        "time/rollout": seconds,
    }
    for reason, count in Counter(dialogue.ended for dialogue in dialogues).items():
        metrics[f"rollout/stop/{reason}"] = count / len(dialogues)
    return metrics


def roll_out(state: State, config: Config, profiles: list[Profile], engine: Engine, chat: Chat, user: User, talk: Talk) -> list[Dialogue]:
    """The step's dialogues. Raises Stop where too many users failed twice (rule: redo once, then end the run)."""
    chosen = pick_profiles(profiles, config, state.step)
    jobs = [Job((group, member), profile) for group, profile in enumerate(chosen) for member in range(config.group_size)]
    for attempt in range(2):
        engine.forget()
        with tqdm(total=len(jobs), desc=f"rollout {state.step + 1}", unit="dialogue", leave=False, dynamic_ncols=True) as bar:
            dialogues = run_dialogues(jobs, engine, chat, user, talk, (config.seed, state.step), lambda _: bar.update())
        failed = [dialogue for dialogue in dialogues if not dialogue.completed]
        if len(failed) <= MAX_FAILED * len(dialogues):
            return dialogues
        tqdm.write(f"step {state.step + 1}: {len(failed)} of {len(dialogues)} users failed ({failed[0].why}); {'giving up' if attempt else 'once more'}")
    raise Stop(f"{len(failed)} of {len(dialogues)} users failed, twice; the first said: {failed[0].why}", 1)


def open_run(config: Config) -> Path:
    """The run directory, ready to be written. Raises InputError where it belongs to another config."""
    run = Path(config.run)
    if (run / "config.json").is_file():
        if config.resume == "none":
            raise InputError(f"{run}: exists already; give another run=DIR, or resume=auto to go on with it")
        saved = read_saved(run / "config.json")
        for f in dataclasses.fields(Config):
            old, new = getattr(saved, f.name), getattr(config, f.name)
            if old != new and f.name not in MAY_CHANGE:
                raise InputError(f"{run}: was begun with {f.name}={old}, not {new}; give another run=DIR, or {f.name}={old} to go on")
    elif run.exists() and any(run.iterdir()):
        raise InputError(f"{run}: is not empty and not a run; give another run=DIR")
    return run


def write_environment(run: Path) -> None:
    """env.txt: what this ran on."""
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=Path(__file__).parent)
    lines = [f"python {platform.python_version()}", f"torch {torch.__version__}", f"platform {platform.platform()}", f"threads {torch.get_num_threads()}"]
    lines += [f"commit {commit.stdout.strip() or 'unknown'}", f"user {user_hash()}"]
    (run / "env.txt").write_text("\n".join(lines) + "\n")


def cut_back(path: Path, step: int) -> None:
    """Drop the lines of steps after `step` from a JSON-lines file: they will be made again."""
    if path.is_file():
        kept = [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n") and json.loads(line)["step"] <= step]
        path.write_text("".join(kept), encoding="utf-8")


def append(path: Path, rows: list[dict]) -> None:
    """Add JSON lines to a file."""
    with open(path, "a", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def train(config: Config, user: User | None = None) -> Path:
    """The whole run; `user` replaces the configured one (tests). Returns the folder of the trained model."""
    run, device = open_run(config), pick_device(config)
    profiles, tests = load_profiles(config.profiles), load_profiles(config.eval_profiles) if config.eval_every else []
    chat = make_chat(load_tokenizer(config.tokenizer or config.model), config.think)
    talk, state = make_talk(config, training=True), build(config, device)
    source = checkpoints(run)[-1:] if config.resume == "auto" else [Path(config.resume)] if config.resume != "none" else []
    if source:
        state.step = load_checkpoint(source[0], state.modules, state.optimisers)
        print(f"resuming from {source[0]}")
    if state.step >= config.steps and (run / "model").is_dir():
        print(f"{run} is finished: {state.step} steps. The model lies in {run / 'model'}; steps={state.step + 100} trains on")
        return run / "model"
    run.mkdir(parents=True, exist_ok=True)
    save_config(config, run / "config.json")
    write_environment(run)
    (run / "system_prompts.json").write_text(json.dumps(talk.systems, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    for name in ("metrics.jsonl", "dialogues.jsonl"):
        cut_back(run / name, state.step)
    engine = make_engine(config, state.policy, chat, config.temperature, config.groups * config.group_size)
    user = user or make_user(config, config.start_emotion, config.user_mode)
    board = SummaryWriter(run / "tb", purge_step=state.step + 1)
    interrupts, saved, skipped = Interrupts(), state.step if source else -1, 0
    bar = tqdm(total=config.steps, initial=state.step, desc=config.algorithm, unit="step", dynamic_ncols=True)
    try:
        while state.step < config.steps:
            begun = time.perf_counter()
            try:
                with interrupts.may_abandon():
                    engine.tokens_sampled = engine.tokens_prefilled = 0
                    dialogues = roll_out(state, config, profiles, engine, chat, user, talk)
                rolled = time.perf_counter()
                metrics = rollout_metrics(dialogues, rolled - begun, (engine.tokens_sampled, engine.tokens_prefilled))
                metrics |= update(state, config, dialogues, engine.banned)
            except FloatingPointError as error:
                dialogues, rolled, metrics = [], time.perf_counter(), {"skipped": 1.0}
                tqdm.write(f"step {state.step + 1}: {error}")
            state.step += 1
            metrics |= {"time/update": time.perf_counter() - rolled, "time/step": time.perf_counter() - begun}
            skipped = skipped + 1 if metrics["skipped"] else 0
            if skipped:
                tqdm.write(f"ALARM step {state.step}: numbers that are not finite, or nothing to learn from; the weights were left as they are")
            append(run / "dialogues.jsonl", [log_line(dialogue, step=state.step) for dialogue in dialogues])
            if config.eval_every and state.step % config.eval_every == 0:
                with interrupts.may_abandon():
                    held = evaluate(config, state.policy, chat.tokenizer, tests, f"evaluation {state.step}")
                result = write_evaluation(run / "eval" / f"step_{state.step}", config, f"{run} step {state.step}", held)
                metrics |= {f"eval/{key}": result[key] for key in ("score", "success", "failure")}
            append(run / "metrics.jsonl", [{"step": state.step, **metrics}])
            for name, amount in metrics.items():
                board.add_scalar(name, amount, state.step)
            bar.update()
            bar.set_postfix_str(f"emotion {metrics.get('emotion/final', math.nan):.1f}, {metrics['time/step']:.0f} s")
            if state.step == config.steps or (config.save_every and state.step % config.save_every == 0):
                save_checkpoint(run, state.step, state.modules, state.optimisers, config.keep)
                saved = state.step
            if skipped >= MAX_SKIPPED:
                raise Stop(f"{skipped} steps in a row could not be learnt from; lower lr, or look at {run / 'metrics.jsonl'}", 1)
            interrupts.check()
    except Stop:
        if saved != state.step:
            save_checkpoint(run, state.step, state.modules, state.optimisers, config.keep)
        raise
    finally:
        bar.close()
        board.close()
    save_model(state.policy, chat.tokenizer, run / "model")
    return run / "model"


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
