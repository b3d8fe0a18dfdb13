"""From dialogues to changed weights: advantages, losses, optimiser steps, for PPO and GRPO alike.

`update` is the way through this file: trajectories -> micro-batches (`Piece`) -> `prepare` (old values, advantages) ->
`learn` (one optimiser step). Where the two algorithms differ there is one visible branch. The formulas are in `ppo.py`
and `grpo.py`; here is what joins them to models, packing and dialogues.
"""

import math
from collections import Counter
from dataclasses import dataclass
from statistics import fmean

import torch
from torch import Tensor, nn

import grpo
import ppo
from config import Config
from engine import hash_key
from model import PackedAttention, Transformer, ValueHead, load_model, predictors, token_logprobs
from rollout import Batch, Dialogue, pack, split, token_rewards, trajectories
from simulator import Key


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
        head = ValueHead(policy.config.hidden_size, config.start_emotion / 100).to(device)
        if config.critic == "trunk":
            critic = load_model(config.model, config.seed).to(device)
            critic.lm_head, critic.checkpointing = None, config.checkpointing
    if config.kl_coef:
        reference = load_model(config.model, config.seed).to(device).requires_grad_(False)
    own, extra = groups(policy, config.lr, config.warmup, config.weight_decay), []
    for module in (head, critic):
        extra += groups(module, config.critic_lr, config.critic_warmup, config.weight_decay) if module else []
    sets = [own, extra] if critic else [own + extra]
    optimisers = [torch.optim.AdamW(chosen, betas=(0.9, 0.95), fused=True) for chosen in sets]
    return State(policy, critic, head, reference, optimisers)


def groups(module: nn.Module, lr: float, warmup: int, weight_decay: float) -> list[dict]:
    """AdamW's parameter groups: weight decay on matrices only. `warmup` steps scale `base_lr` up to its full value."""
    matrices = [p for p in module.parameters() if p.dim() >= 2]
    others = [p for p in module.parameters() if p.dim() < 2]
    kinds = ((matrices, weight_decay), (others, 0.0))
    shared = {"lr": lr, "base_lr": lr, "warmup": warmup}
    return [{"params": chosen, "weight_decay": decay, **shared} for chosen, decay in kinds if chosen]


def set_learning_rates(state: State, config: Config) -> None:
    """Linear warm-up times `lr_schedule`: a function of the step and the config, so nothing of it needs saving."""
    left = 1 - state.step / config.steps if config.lr_schedule == "linear" else 1.0
    for optimiser in state.optimisers:
        for group in optimiser.param_groups:
            group["lr"] = group["base_lr"] * left * min(1.0, (state.step + 1) / max(1, group["warmup"]))


def forward(
    state: State, config: Config, batch: Batch, banned: Tensor, model: Transformer | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Log-probability, entropy and value (None without a critic) of the batch's N trained tokens, each [N].

    The value of token t is that of the state before t: it comes from the same hidden state as t's log-probability.
    """
    policy = model or state.policy
    attend = PackedAttention(batch.cu_seqlens, batch.tokens_T.device)
    where_N = predictors(batch.mask_T)
    hidden_ND = policy(batch.tokens_T, batch.position_T, attend)[where_N]
    target_N = batch.tokens_T[where_N + 1]
    logp_N, entropy_N = token_logprobs(hidden_ND, policy.output_weight, target_N, banned, config.temperature)
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
def prepare(
    state: State, config: Config, pieces: list[Piece], rewards: dict[Key, Tensor], banned: Tensor,
    turns: dict[Key, list[int]] | None = None,
) -> dict[str, float]:
    """Fill the pieces: old values and log-probabilities, then advantages and returns. Returns the metrics of that.

    `rewards` has a vector per dialogue, over its trained tokens. Everything is joined by dialogue: the trained tokens
    of all its trajectories, in order, are one vector.
    """
    several = config.minibatches * config.epochs > 1
    for piece in pieces:
        if config.kl_coef:
            piece.reference_logp = forward(state, config, piece.batch, banned, state.reference)[0]
        if several or (config.kl_coef and config.kl == "reward"):
            piece.old_logp = forward(state, config, piece.batch, banned, state.policy)[0]
        if state.critic:
            piece.old_value = values(state, piece.batch)
        elif state.value_head:  # a baseline need only be a function of the state: the sampler's serves, and is free
            piece.old_value = piece.batch.value_T[piece.batch.mask_T]
    penalty = {}  # k1 per trained token of a dialogue, times its coefficient
    if config.kl_coef and config.kl == "reward":
        penalty = by_dialogue(pieces, [config.kl_coef * (piece.old_logp - piece.reference_logp) for piece in pieces])
    metrics = {}
    if config.algorithm == "grpo":
        spans = turns or {key: [len(reward_N)] for key, reward_N in rewards.items()}
        to_go = {}
        for key, lengths in spans.items():
            reward_N = rewards[key] - penalty[key].cpu() if penalty else rewards[key]
            to_go[key] = [float(reward_N[sum(lengths[:i]) :].sum()) for i in range(len(lengths))]
        found, metrics["group/zero_spread"] = grpo.turn_advantages(to_go, config.scale_advantage)
        scatter(pieces, {k: torch.tensor(found[k]).repeat_interleave(torch.tensor(spans[k])) for k in found}, "advantage")
        return metrics
    value = by_dialogue(pieces, [piece.old_value for piece in pieces])
    advantage, returns = {}, {}
    for key, value_N in value.items():
        reward_N = rewards[key] - penalty[key].cpu() if penalty else rewards[key]
        advantage[key], returns[key] = ppo.gae(reward_N, value_N.cpu(), config.gamma, config.lam)
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
            sums["value/loss"] += float(value_part.detach())
        if piece.reference_logp is not None:
            if config.kl == "loss":
                loss = loss + config.kl_coef * ppo.kl_loss(logp, piece.reference_logp)
            ratio = (piece.reference_logp - logp).detach()
            sums["policy/kl_reference"] += float((ratio.exp() - 1 - ratio).sum())  # k3
        (loss / total).backward()
        gap = (logp.detach() - piece.batch.logp_T[piece.batch.mask_T]).abs()
        for name, amount in (
            ("policy/loss", policy), ("policy/approx_kl", approx_kl), ("policy/clipfrac", clipped),
            ("policy/entropy", entropy.sum()), ("rollout/sampler_gap", gap.sum()),
        ):
            sums[name] += float(amount.detach())
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
    good = [dialogue for dialogue in dialogues if dialogue.completed and dialogue.turns]
    if config.learn_from:
        chosen = grpo.most_varied({dialogue.key: dialogue.reward for dialogue in good}, config.learn_from)
        good = [dialogue for dialogue in good if dialogue.key in chosen]
    if config.algorithm == "grpo":
        kept = grpo.group_advantages({dialogue.key: dialogue.reward for dialogue in good}, config.scale_advantage)[0]
        good = [dialogue for dialogue in good if dialogue.key in kept]
    if not good:
        return {"skipped": 1.0}
    rewards = {dialogue.key: torch.tensor(token_rewards(dialogue, config.credit)) for dialogue in good}
    turns = None
    if config.credit == "turn":
        turns = {dialogue.key: [len(turn.sampled_ids) for turn in dialogue.turns] for dialogue in good}
    items = {dialogue.key: trajectories(dialogue, config.think) for dialogue in good}
    # Mini-batches take whole dialogues, dealt out in a shuffled order of their own.
    order = sorted(items, key=lambda key: hash_key(config.seed, state.step, *key))
    minibatches = []
    for index in range(config.minibatches):
        chosen = sorted(order[index :: config.minibatches])
        parts = split([item for key in chosen for item in items[key]], config.micro_tokens)
        minibatches.append([Piece(pack(part).to(device)) for part in parts])
    metrics = prepare(state, config, [piece for pieces in minibatches for piece in pieces], rewards, banned, turns)
    set_learning_rates(state, config)
    steps = [learn(state, config, pieces, banned) for _ in range(config.epochs) for pieces in minibatches if pieces]
    metrics["policy/lr"] = state.optimisers[0].param_groups[0]["lr"]
    return {**metrics, **{name: fmean(step[name] for step in steps) for name in steps[0]}}
