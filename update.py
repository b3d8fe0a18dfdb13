"""From dialogues to changed weights: advantages, losses, optimiser steps, for PPO and GRPO alike.

`update` is the way through: dialogues -> trajectories -> micro-batches (`Piece`) -> advantages ->
`learn` (one optimiser step). It has one branch: GRPO's advantages compare rewards within a group
and come first; PPO's need the critic's values, so the pieces are scored (`score`) before them.

Every rank knows all dialogues and computes on its share of their trajectories, so all decide alike
without asking, and only vectors over trained tokens are exchanged.
"""

import math
from dataclasses import dataclass
from itertools import accumulate
from statistics import fmean

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import grpo
import ppo
from checkpoint import load_model
from config import Config
from dist import World, clip_gradients, make_replica, release, shard
from model import Transformer, ValueHead, add_adapters, token_logprobs
from rollout import Batch, Dialogue, Trajectory, balance, pack, split, token_rewards, trajectories
from simulator import Key, hash_key

Vectors = dict[Key, Tensor]  # dialogue -> one number for each of its trained tokens
Spans = dict[Key, list[int]]  # dialogue -> lengths of its parts, each one action with one advantage
Metrics = dict[str, float]
Estimates = tuple[dict[str, Vectors], Metrics]  # vectors by the attribute of Piece they are for
Pieces = list["Piece"]


@dataclass
class State:
    """What training changes. Under LoRA one model serves as policy, critic and reference."""

    policy: Transformer
    critic: Transformer | None  # None with PPO: the value head reads the policy's hidden states
    value_head: ValueHead | None
    reference: Transformer | None
    optimisers: list[torch.optim.Optimizer]
    sampler: Transformer | None = None  # the policy's replica, where rollouts have one
    step: int = 0

    @property
    def modules(self) -> dict[str, nn.Module]:
        """What a checkpoint holds, by name."""
        critic = None if self.critic is self.policy else self.critic
        named = {"policy": self.policy, "critic": critic, "value_head": self.value_head}
        return {key: module for key, module in named.items() if module is not None}


def make_model(config: Config, world: World, critic=False, frozen=False) -> Transformer:
    """A model of the run, sharded over the ranks: policy, critic's trunk or frozen reference."""

    def prepare(model: Transformer) -> None:
        model.checkpointing = config.checkpointing
        if critic:
            model.lm_head = None
        if config.lora_rank:
            critics = ["critic"] if config.algorithm == "ppo" and config.critic == "trunk" else []
            targets = config.lora_targets.split(",")
            model.to(world.dtype)  # frozen: nothing is summed into it
            add_adapters(model, ["policy", *critics], config.lora_rank, config.lora_alpha, targets)
        if frozen:
            model.requires_grad_(False)
        shard(model, world)

    return load_model(config.model, config.seed, world.device, prepare)


def build(config: Config, world: World) -> State:
    """Models and optimisers at step 0. The critic starts from the policy's weights."""
    policy = make_model(config, world)
    critic = head = reference = None
    if config.algorithm == "ppo":
        expected = config.start_emotion / 100 if config.credit == "final" else 0.0
        head = ValueHead(policy.config.hidden_size, expected).to(world.device)
        if config.critic == "trunk":
            critic = policy if config.lora_rank else make_model(config, world, critic=True)
    if config.kl_coef:
        reference = policy if config.lora_rank else make_model(config, world, frozen=True)
    trained = {name: p for name, p in policy.named_parameters() if p.requires_grad}
    own = [p for name, p in trained.items() if ".critic." not in name]
    values = [p for name, p in trained.items() if ".critic." in name]  # the critic's adapter
    for module in (head, None if critic is policy else critic):
        values += module.parameters() if module else []
    chosen = groups(own, config.lr, config.warmup)
    extra = groups(values, config.critic_lr, config.critic_warmup)
    sets = [chosen, extra] if critic else [chosen + extra]
    options = {"betas": (0.9, 0.95), "weight_decay": 0.0, "fused": True}
    optimisers = [torch.optim.AdamW(each, **options) for each in sets]
    replica = world.mesh is not None and config.generation == "replica"
    sampler = make_replica(policy, config, world) if replica else None
    return State(policy, critic, head, reference, optimisers, sampler)


def groups(parameters: list[nn.Parameter], lr: float, warmup: int) -> list[dict]:
    """AdamW's parameter groups. `warmup` steps scale `base_lr` up to its full value."""
    kinds: dict[bool, list[nn.Parameter]] = {}  # sharded or not: AdamW takes no mixture in one call
    for p in parameters:
        kinds.setdefault(isinstance(p, DTensor), []).append(p)
    return [{"params": kind, "lr": lr, "base_lr": lr, "warmup": warmup} for kind in kinds.values()]


def set_learning_rates(state: State, config: Config) -> None:
    """Linear warm-up times `lr_schedule`: both follow from step and config, so nothing is saved."""
    left = 1 - state.step / config.steps if config.lr_schedule == "linear" else 1.0
    for group in (group for optimiser in state.optimisers for group in optimiser.param_groups):
        group["lr"] = group["base_lr"] * left * min(1.0, (state.step + 1) / max(1, group["warmup"]))


def forward(model: Transformer, config: Config, batch: Batch, banned: Tensor,
            adapter: str | None = "policy") -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Log-probabilities and entropies [N] of the trained tokens, and their hidden states [N, D]."""
    # A token's hidden state is that of the token before it, which predicts it and has its value.
    hidden_ND = model(batch.tokens_T, batch.position_T, batch.attend, adapter)[batch.predictor_N]
    target_N = batch.tokens_T[batch.trained_N]
    how = banned, config.temperature, config.entropy_coef != 0
    return *token_logprobs(hidden_ND, model.output_weight, target_N, *how), hidden_ND


def values(state: State, batch: Batch) -> Tensor:
    """The critic's values [N], each read from the hidden state that predicts a trained token."""
    trunk, adapter = (state.critic, "critic") if state.critic else (state.policy, "policy")
    hidden_TD = trunk(batch.tokens_T, batch.position_T, batch.attend, adapter)
    return state.value_head(hidden_TD[batch.predictor_N])


@dataclass
class Piece:
    """A micro-batch and what its loss needs beside it, all [N]."""

    batch: Batch
    advantage: Tensor | None = None
    returns: Tensor | None = None
    old_value: Tensor | None = None
    old_logp: Tensor | None = None  # None where the forward pass of the loss gives the same
    reference_logp: Tensor | None = None
    weight: float = 1.0  # 0 for a dummy, so that every rank makes the same collective calls


def make_pieces(items: list[Trajectory], config: Config, world: World, banned: Tensor) -> Pieces:
    """This rank's micro-batches of trajectories shared out by length; every rank has as many."""
    cuts = [split(share, config.micro_tokens) for share in balance(items, world.size)]
    pieces = [Piece(pack(part).to(banned.device)) for part in cuts[world.rank]]
    free = int((~banned).long().argmax())  # any token with a probability
    nothing = Trajectory((-1, -1), [free, free], [0, 1], [0.0, 0.0], [0.0, 0.0])
    for _ in range(max(len(cut) for cut in cuts) - len(pieces)):
        zeros = torch.zeros(1, device=banned.device)
        pieces.append(Piece(pack([nothing]).to(banned.device), zeros, zeros, weight=0.0))
    return pieces


@torch.no_grad()
def score(state: State, config: Config, pieces: Pieces, banned: Tensor) -> None:
    """Fill in the pieces' old values and log-probabilities, before any of them is learnt from."""
    for piece in pieces:
        if config.kl_coef:
            piece.reference_logp = forward(state.reference, config, piece.batch, banned, None)[0]
        if config.minibatches * config.epochs > 1:
            piece.old_logp = forward(state.policy, config, piece.batch, banned)[0]
        if state.critic:
            piece.old_value = values(state, piece.batch)
        elif state.value_head:  # any function of the state may be a baseline: the sampler's is free
            piece.old_value = piece.batch.value_T[piece.batch.trained_N]
    if state.reference and state.reference is not state.policy:
        release(state.reference)


def grpo_vectors(config: Config, rewards: Vectors, spans: Spans) -> Estimates:
    """Advantages of all dialogues whose group has more than one, and metrics."""
    to_go = {}
    for key, lengths in spans.items():
        backwards = [float(part.sum()) for part in rewards[key].split(lengths)][::-1]
        to_go[key] = list(accumulate(backwards, lambda later, now: now + config.gamma * later))[::-1]
    found, flat = grpo.group_advantages(to_go, config.scale_advantage)
    advantage = {k: torch.tensor(found[k]).repeat_interleave(torch.tensor(spans[k])) for k in found}
    return {"advantage": advantage}, {"group/zero_spread": flat}


def ppo_vectors(config: Config, rewards: Vectors, spans: Spans, value: Vectors) -> Estimates:
    """Advantages and returns of all dialogues from the critic's values, and metrics."""
    keys, advantage, returns = sorted(value), {}, {}
    for k in keys:
        turns = spans[k] if config.credit == "turn" else None
        advantage[k], returns[k] = ppo.gae(rewards[k], value[k], config.gamma, config.lam, turns)
    if config.scale_advantage:
        white = ppo.whiten(torch.cat([advantage[key] for key in keys]))
        advantage = dict(zip(keys, white.split([len(advantage[key]) for key in keys])))
    whole = [torch.cat([vectors[key] for key in keys]) for vectors in (value, returns)]
    explained = ppo.explained_variance(*whole)
    metrics = {"value/explained_variance": explained, "value/mean": float(whole[0].mean())}
    return {"advantage": advantage, "returns": returns}, metrics


def by_dialogue(pieces: Pieces, vectors: list[Tensor], world: World) -> Vectors:
    """Vectors over the trained tokens of all ranks' pieces, joined to one for each dialogue."""
    mine: dict[tuple[Key, int], list[float]] = {}
    for piece, found_N in zip(pieces, vectors):
        if piece.weight:
            b = piece.batch
            mine |= zip(zip(b.keys, b.begins), (x.tolist() for x in found_N.cpu().split(b.trained)))
    everyone = {where: part for found in world.gather(mine) for where, part in found.items()}
    joined: dict[Key, list[float]] = {}
    for (key, _), part in sorted(everyone.items()):
        joined.setdefault(key, []).extend(part)
    return {key: torch.tensor(whole) for key, whole in joined.items()}


def scatter(pieces: Pieces, vectors: Vectors, name: str) -> None:
    """The way back from `by_dialogue`: set attribute `name` of each of this rank's pieces."""
    for piece in pieces:
        if piece.weight:
            b = piece.batch
            places = zip(b.keys, b.begins, b.trained)
            parts = [vectors[key][begin : begin + n] for key, begin, n in places]
            setattr(piece, name, torch.cat(parts).to(b.tokens_T.device))


def learn(state: State, config: Config, pieces: Pieces, banned: Tensor, world: World) -> Metrics:
    """One optimiser step on all ranks' pieces, skipped if a number is not finite; its metrics."""
    total = sum(world.gather(sum(len(piece.advantage) for piece in pieces if piece.weight)))
    share = world.size / total  # one denominator for all; FSDP averages gradients over ranks
    rows = []  # fetched once: each number read from a GPU waits for all it has been given to do
    for piece in pieces:
        logp, entropy, hidden = forward(state.policy, config, piece.batch, banned)
        old = logp.detach() if piece.old_logp is None else piece.old_logp
        policy, approx_kl, clipped = ppo.policy_loss(logp, old, piece.advantage, config.clip)
        amounts = {"policy/loss": policy, "policy/approx_kl": approx_kl, "policy/clipfrac": clipped}
        loss = policy - config.entropy_coef * entropy.sum()
        targets = piece.old_value, piece.returns, config.value_clip
        if state.value_head and not state.critic:
            value_part = ppo.value_loss(state.value_head(hidden), *targets)
            loss = loss + config.vf_coef * value_part
        if piece.reference_logp is not None:
            loss = loss + config.kl_coef * ppo.kl_loss(logp, piece.reference_logp)
            log_gap = (piece.reference_logp - logp).detach()  # for k3, a KL estimator
            amounts["policy/kl_reference"] = (log_gap.exp() - 1 - log_gap).sum()
        (loss * (piece.weight * share)).backward()
        if state.critic:  # last, so that only one model's activations are in memory
            value_part = ppo.value_loss(values(state, piece.batch), *targets)
            (value_part * (piece.weight * share)).backward()
        gap = (logp.detach() - piece.batch.logp_T[piece.batch.trained_N]).abs()
        amounts |= {"policy/entropy": entropy.sum(), "rollout/sampler_gap": gap.sum()}
        amounts |= {"value/loss": value_part} if state.value_head else {}
        rows.append(torch.stack([amount.detach() * piece.weight for amount in amounts.values()]))
    everyone = world.gather(torch.stack(rows).double().sum(0).tolist())
    metrics = {name: sum(column) / total for name, *column in zip(amounts, *everyone)}
    for name, optimiser in zip(("policy/grad_norm", "value/grad_norm"), state.optimisers):
        parameters = [p for group in optimiser.param_groups for p in group["params"]]
        metrics[name] = clip_gradients(parameters, config.grad_clip, world)
    finite = all(math.isfinite(amount) for amount in metrics.values())
    for optimiser in state.optimisers:
        if finite:
            optimiser.step()
        optimiser.zero_grad(set_to_none=True)
    return {**metrics, "skipped": 0.0 if finite else 1.0}


def make_minibatches(state: State, config: Config, dialogues: list[Dialogue], banned: Tensor,
                     world: World) -> list[Pieces]:  # fmt: skip
    """The pieces of each optimiser step: whole dialogues, dealt out in a shuffled order."""
    items = {dialogue.key: trajectories(dialogue, config.think) for dialogue in dialogues}
    order = sorted(items, key=lambda key: hash_key(config.seed, state.step, *key))
    dealt = [sorted(order[index :: config.minibatches]) for index in range(config.minibatches)]
    parts = [[item for key in keys for item in items[key]] for keys in dealt]
    return [make_pieces(part, config, world, banned) for part in parts if part]


def update(state: State, config: Config, dialogues: list[Dialogue], banned: Tensor,
           world: World | None = None) -> Metrics:  # fmt: skip
    """All optimiser steps of an iteration on all ranks' dialogues; returns their mean metrics."""
    world = world or World()
    good = [dialogue for dialogue in dialogues if dialogue.completed and dialogue.turns]
    if config.learn_from:
        chosen = grpo.most_varied({d.key: d.reward for d in good}, config.learn_from)
        good = [dialogue for dialogue in good if dialogue.key in chosen]
    rewards = {d.key: torch.tensor(token_rewards(d, config.credit)) for d in good}
    spans = {dialogue.key: [len(turn.sampled_ids) for turn in dialogue.turns] for dialogue in good}
    if config.credit == "final":
        spans = {key: [sum(lengths)] for key, lengths in spans.items()}
    if config.algorithm == "grpo":
        vectors, metrics = grpo_vectors(config, rewards, spans)
        good = [dialogue for dialogue in good if dialogue.key in vectors["advantage"]]
    if not good:  # nothing to learn from, or every group had a single survivor
        return {"skipped": 1.0}
    minibatches = make_minibatches(state, config, good, banned, world)
    pieces = [piece for part in minibatches for piece in part]
    score(state, config, pieces, banned)
    if config.algorithm == "ppo":
        value = by_dialogue(pieces, [piece.old_value for piece in pieces], world)
        vectors, metrics = ppo_vectors(config, rewards, spans, value)
    for name, found in vectors.items():
        scatter(pieces, found, name)
    set_learning_rates(state, config)
    steps = [learn(state, config, part, banned, world) for part in minibatches * config.epochs]
    metrics["policy/lr"] = state.optimisers[0].param_groups[0]["lr"]
    return {**metrics, **{name: fmean(step[name] for step in steps) for name in steps[0]}}
