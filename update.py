"""From dialogues to changed weights: advantages, losses, optimiser steps, for PPO and GRPO alike.

`update` is the way through this file: dialogues -> trajectories -> micro-batches (`Piece`) -> advantages -> `learn`
(one optimiser step). It has one branch, on the algorithm. GRPO compares rewards within a group, which needs no model,
so its advantages come first. PPO needs the critic's values, so the pieces are scored (`score`) before its advantages.
The formulas are in `ppo.py` and `grpo.py`; here is what joins them to models, packing and dialogues.

Every rank knows all dialogues and computes on its share of their trajectories. So all of them make the same decisions
without asking, and only vectors over trained tokens (values, log-probabilities) are exchanged.
"""

import math
from collections import Counter
from dataclasses import dataclass
from statistics import fmean

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import grpo
import ppo
from checkpoint import load_model
from config import Config
from dist import World, clip_gradients, make_replica, release, shard
from model import PackedAttention, Transformer, ValueHead, add_adapters, predictors, token_logprobs
from rollout import Batch, Dialogue, Trajectory, balance, pack, split, token_rewards, trajectories
from simulator import Key, hash_key


@dataclass
class State:
    """What training changes. `critic` is a trunk of its own or None; either kind of critic ends in `value_head`.

    Under LoRA one model is policy, critic and reference, each with another adapter. `sampler` is the policy's replica
    where rollouts have one.
    """

    policy: Transformer
    critic: Transformer | None
    value_head: ValueHead | None
    reference: Transformer | None
    optimisers: list[torch.optim.Optimizer]
    sampler: Transformer | None = None
    step: int = 0

    @property
    def modules(self) -> dict[str, nn.Module]:
        """What a checkpoint holds, by name."""
        critic = None if self.critic is self.policy else self.critic
        named = {"policy": self.policy, "critic": critic, "value_head": self.value_head}
        return {key: module for key, module in named.items() if module is not None}


def make_model(config: Config, world: World, critic: bool = False, frozen: bool = False) -> Transformer:
    """A model of the run, sharded over the ranks: the policy, or the trunk of a critic, or a frozen reference."""

    def prepare(model: Transformer) -> None:
        model.checkpointing = config.checkpointing
        if critic:
            model.lm_head = None
        if config.lora_rank:
            names = ["policy", "critic"] if config.algorithm == "ppo" and config.critic == "trunk" else ["policy"]
            model.to(world.dtype)  # frozen: nothing is summed into it
            add_adapters(model, names, config.lora_rank, config.lora_alpha, config.lora_targets.split(","))
        if frozen:
            model.requires_grad_(False)
        shard(model, world)

    return load_model(config.model, config.seed, world.device, prepare)


def build(config: Config, world: World) -> State:
    """Models and optimisers at step 0. The critic starts from the policy's weights."""
    policy = make_model(config, world)
    critic = head = reference = None
    if config.algorithm == "ppo":
        head = ValueHead(policy.config.hidden_size, config.start_emotion / 100).to(world.device)
        if config.critic == "trunk":
            critic = policy if config.lora_rank else make_model(config, world, critic=True)
    if config.kl_coef:
        reference = policy if config.lora_rank else make_model(config, world, frozen=True)
    trained = {name: p for name, p in policy.named_parameters() if p.requires_grad}
    values = [p for name, p in trained.items() if ".critic." in name]  # the critic's adapter
    values += [*(head.parameters() if head else []), *(critic.parameters() if critic and critic is not policy else [])]
    own = groups([p for name, p in trained.items() if ".critic." not in name], config.lr, config.warmup)
    extra = groups(values, config.critic_lr, config.critic_warmup)
    sets = [own, extra] if critic else [own + extra]
    optimisers = [torch.optim.AdamW(chosen, betas=(0.9, 0.95), weight_decay=0.0, fused=True) for chosen in sets]
    state = State(policy, critic, head, reference, optimisers)
    if world.mesh is not None and config.generation == "replica":
        state.sampler = make_replica(policy, config, world)
    return state


def groups(parameters: list[nn.Parameter], lr: float, warmup: int) -> list[dict]:
    """AdamW's parameter groups. `warmup` steps scale `base_lr` up to its full value.

    Sharded and replicated parameters never share a group: AdamW cannot treat them in one call.
    """
    kinds: dict[bool, list[nn.Parameter]] = {}
    for p in parameters:
        kinds.setdefault(isinstance(p, DTensor), []).append(p)
    return [{"params": chosen, "lr": lr, "base_lr": lr, "warmup": warmup} for chosen in kinds.values()]


def set_learning_rates(state: State, config: Config) -> None:
    """Linear warm-up times `lr_schedule`: a function of the step and the config, so nothing of it needs saving."""
    left = 1 - state.step / config.steps if config.lr_schedule == "linear" else 1.0
    for optimiser in state.optimisers:
        for group in optimiser.param_groups:
            group["lr"] = group["base_lr"] * left * min(1.0, (state.step + 1) / max(1, group["warmup"]))


def forward(
    model: Transformer, config: Config, batch: Batch, banned: Tensor, adapter: str | None = "policy"
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities and entropies [N] of the batch's N trained tokens, and the hidden states [N, D] they came from.

    The hidden state that predicts token t is that of the state before t, hence also where t's value is read.
    """
    where_N = predictors(batch.mask_T)
    attend = PackedAttention(batch.cu_seqlens, batch.tokens_T.device)
    hidden_ND = model(batch.tokens_T, batch.position_T, attend, adapter)[where_N]
    target_N = batch.tokens_T[where_N + 1]
    return *token_logprobs(hidden_ND, model.output_weight, target_N, banned, config.temperature), hidden_ND


def values(state: State, batch: Batch) -> Tensor:
    """The critic's values [N] of the batch's trained tokens, without the policy's log-probabilities."""
    trunk, adapter = (state.critic, "critic") if state.critic else (state.policy, "policy")
    attend = PackedAttention(batch.cu_seqlens, batch.tokens_T.device)
    return state.value_head(trunk(batch.tokens_T, batch.position_T, attend, adapter)[predictors(batch.mask_T)])


@dataclass
class Piece:
    """A micro-batch and what the loss needs beside it, all [N]. `old_logp` is None where the forward's own serves.

    A piece of weight 0 is a dummy batch, so that every rank makes the same collective calls; its gradient is zero.
    """

    batch: Batch
    advantage: Tensor | None = None
    returns: Tensor | None = None
    old_value: Tensor | None = None
    old_logp: Tensor | None = None
    reference_logp: Tensor | None = None
    weight: float = 1.0


def make_pieces(items: list[Trajectory], config: Config, world: World, banned: Tensor) -> list[Piece]:
    """This rank's micro-batches of trajectories that are shared out by length; as many as any other rank has."""
    cuts = [split(share, config.micro_tokens) for share in balance(items, world.size)]
    pieces = [Piece(pack(part).to(banned.device)) for part in cuts[world.rank]]
    free = int((~banned).long().argmax())  # any token with a probability
    nothing = Trajectory((-1, -1), [free, free], [0, 1], [0.0, 0.0], [0.0, 0.0])
    for _ in range(max(len(cut) for cut in cuts) - len(pieces)):
        zeros = torch.zeros(1, device=banned.device)
        pieces.append(Piece(pack([nothing]).to(banned.device), zeros, zeros, weight=0.0))
    return pieces


@torch.no_grad()
def score(state: State, config: Config, pieces: list[Piece], banned: Tensor) -> None:
    """Fill in what the models say of the pieces before any of them is learnt from: old values and log-probabilities."""
    for piece in pieces:
        if config.kl_coef:
            piece.reference_logp = forward(state.reference, config, piece.batch, banned, None)[0]
        if config.minibatches * config.epochs > 1:
            piece.old_logp = forward(state.policy, config, piece.batch, banned)[0]
        if state.critic:
            piece.old_value = values(state, piece.batch)
        elif state.value_head:  # a baseline need only be a function of the state: the sampler's serves, and is free
            piece.old_value = piece.batch.value_T[piece.batch.mask_T]
    if state.reference and state.reference is not state.policy:
        release(state.reference)


Vectors = dict[Key, Tensor]  # dialogue -> one number for each of its trained tokens


def grpo_vectors(config: Config, rewards: Vectors, spans: dict[Key, list[int]]) -> tuple[dict[str, Vectors], dict]:
    """Advantages of all dialogues whose group has more than one, and metrics.

    `spans`: the number of trained tokens in each part of a dialogue that is one action and gets one advantage, which is
    the reward from its beginning on against the group's.
    """
    to_go = {}
    for key, lengths in spans.items():
        begins = [sum(lengths[:i]) for i in range(len(lengths))]
        to_go[key] = [float(rewards[key][begin:].sum()) for begin in begins]
    found, flat = grpo.group_advantages(to_go, config.scale_advantage)
    advantage = {k: torch.tensor(found[k]).repeat_interleave(torch.tensor(spans[k])) for k in found}
    return {"advantage": advantage}, {"group/zero_spread": flat}


def ppo_vectors(
    config: Config, rewards: Vectors, spans: dict[Key, list[int]], value: Vectors
) -> tuple[dict[str, Vectors], dict]:
    """Advantages and returns of all dialogues from the critic's values, and metrics; `spans` as above."""
    keys, advantage, returns = sorted(value), {}, {}
    for key in keys:
        turns = spans[key] if config.credit == "turn" else None
        advantage[key], returns[key] = ppo.gae(rewards[key], value[key], config.gamma, config.lam, turns)
    if config.scale_advantage:
        white = ppo.whiten(torch.cat([advantage[key] for key in keys]))
        advantage = dict(zip(keys, white.split([len(advantage[key]) for key in keys])))
    whole = [torch.cat([vectors[key] for key in keys]) for vectors in (value, returns)]
    explained = ppo.explained_variance(*whole)
    metrics = {"value/explained_variance": explained, "value/mean": float(whole[0].mean())}
    return {"advantage": advantage, "returns": returns}, metrics


def by_dialogue(pieces: list[Piece], vectors: list[Tensor], world: World) -> dict[Key, Tensor]:
    """Vectors over the trained tokens of all ranks' pieces, regrouped: key -> those of that dialogue in order."""
    mine: dict[tuple[Key, int], list[float]] = {}
    for piece, vector_N in zip(pieces, vectors):
        if piece.weight:
            parts = vector_N.cpu().split(piece.batch.trained)
            mine |= {where: part.tolist() for where, part in zip(zip(piece.batch.keys, piece.batch.begins), parts)}
    everyone = {where: part for found in world.gather(mine) for where, part in found.items()}
    joined: dict[Key, list[float]] = {}
    for key, begin in sorted(everyone):
        joined.setdefault(key, []).extend(everyone[key, begin])
    return {key: torch.tensor(whole) for key, whole in joined.items()}


def scatter(pieces: list[Piece], vectors: dict[Key, Tensor], name: str) -> None:
    """The way back from `by_dialogue`: set attribute `name` of each of this rank's pieces."""
    for piece in pieces:
        if piece.weight:
            b = piece.batch
            parts = [vectors[key][begin : begin + n] for key, begin, n in zip(b.keys, b.begins, b.trained)]
            setattr(piece, name, torch.cat(parts).to(b.tokens_T.device))


def learn(state: State, config: Config, pieces: list[Piece], banned: Tensor, world: World) -> dict[str, float]:
    """One optimiser step on the pieces of all ranks; sums over trained tokens divided once by the number of them all.

    Returns metrics. Gradients that are not finite leave the weights as they are and count as "skipped".
    """
    total = sum(world.gather(sum(len(piece.advantage) for piece in pieces if piece.weight)))
    share = world.size / total  # FSDP averages gradients over ranks
    sums: Counter = Counter()
    for piece in pieces:
        logp, entropy, hidden = forward(state.policy, config, piece.batch, banned)
        old = logp.detach() if piece.old_logp is None else piece.old_logp
        policy, approx_kl, clipped = ppo.policy_loss(logp, old, piece.advantage, config.clip)
        loss, value_part = policy - config.entropy_coef * entropy.sum(), torch.zeros(())
        if state.value_head and not state.critic:
            value_part = ppo.value_loss(state.value_head(hidden), piece.old_value, piece.returns, config.value_clip)
            loss = loss + config.vf_coef * value_part
        if piece.reference_logp is not None:
            loss = loss + config.kl_coef * ppo.kl_loss(logp, piece.reference_logp)
            ratio = (piece.reference_logp - logp).detach()
            sums["policy/kl_reference"] += piece.weight * float((ratio.exp() - 1 - ratio).sum())  # k3
        (loss * (piece.weight * share)).backward()
        if state.critic:  # its loss shares nothing with the policy's: activations of one are gone before the other's
            value_part = ppo.value_loss(values(state, piece.batch), piece.old_value, piece.returns, config.value_clip)
            (value_part * (piece.weight * share)).backward()
        gap = (logp.detach() - piece.batch.logp_T[piece.batch.mask_T]).abs()
        for name, amount in (
            ("policy/loss", policy), ("policy/approx_kl", approx_kl), ("policy/clipfrac", clipped),
            ("policy/entropy", entropy.sum()), ("rollout/sampler_gap", gap.sum()), ("value/loss", value_part),
        ):
            sums[name] += piece.weight * float(amount.detach())
    everyone = world.gather(sums)
    metrics = {name: sum(found[name] for found in everyone) / total for name in sums}
    if not state.value_head:
        del metrics["value/loss"]
    finite = all(math.isfinite(amount) for amount in metrics.values())
    for name, optimiser in zip(("policy/grad_norm", "value/grad_norm"), state.optimisers):
        parameters = [p for group in optimiser.param_groups for p in group["params"]]
        metrics[name] = clip_gradients(parameters, config.grad_clip, world)
        finite = finite and math.isfinite(metrics[name])
    for optimiser in state.optimisers:
        if finite:
            optimiser.step()
        optimiser.zero_grad(set_to_none=True)
    return {**metrics, "skipped": 0.0 if finite else 1.0}


def make_minibatches(
    state: State, config: Config, dialogues: list[Dialogue], banned: Tensor, world: World
) -> list[list[Piece]]:
    """The pieces of each optimiser step: whole dialogues, dealt out in a shuffled order of their own."""
    items = {dialogue.key: trajectories(dialogue, config.think) for dialogue in dialogues}
    order = sorted(items, key=lambda key: hash_key(config.seed, state.step, *key))
    dealt = [sorted(order[index :: config.minibatches]) for index in range(config.minibatches)]
    return [
        make_pieces([item for key in keys for item in items[key]], config, world, banned)
        for keys in dealt if keys
    ]  # fmt: skip


def update(
    state: State, config: Config, dialogues: list[Dialogue], banned: Tensor, world: World | None = None
) -> dict[str, float]:
    """All optimiser steps of one iteration on the dialogues of all ranks, which every rank brings.

    Returns the metrics, means over the optimiser steps; only "skipped" where there was nothing to learn from.
    """
    world = world or World()
    good = [dialogue for dialogue in dialogues if dialogue.completed and dialogue.turns]
    if config.learn_from:
        chosen = grpo.most_varied({dialogue.key: dialogue.reward for dialogue in good}, config.learn_from)
        good = [dialogue for dialogue in good if dialogue.key in chosen]
    if not good:
        return {"skipped": 1.0}
    rewards = {dialogue.key: torch.tensor(token_rewards(dialogue, config.credit)) for dialogue in good}
    spans = {dialogue.key: [len(turn.sampled_ids) for turn in dialogue.turns] for dialogue in good}
    if config.credit == "final":
        spans = {key: [sum(lengths)] for key, lengths in spans.items()}
    if config.algorithm == "grpo":
        vectors, metrics = grpo_vectors(config, rewards, spans)
        good = [dialogue for dialogue in good if dialogue.key in vectors["advantage"]]
        minibatches = make_minibatches(state, config, good, banned, world)
        pieces = [piece for part in minibatches for piece in part]
        score(state, config, pieces, banned)
    else:
        minibatches = make_minibatches(state, config, good, banned, world)
        pieces = [piece for part in minibatches for piece in part]
        score(state, config, pieces, banned)
        value = by_dialogue(pieces, [piece.old_value for piece in pieces], world)
        vectors, metrics = ppo_vectors(config, rewards, spans, value)
    if not pieces:  # every group had a single survivor
        return {"skipped": 1.0}
    for name, found in vectors.items():
        scatter(pieces, found, name)
    set_learning_rates(state, config)
    steps = [learn(state, config, part, banned, world) for _ in range(config.epochs) for part in minibatches]
    metrics["policy/lr"] = state.optimisers[0].param_groups[0]["lr"]
    return {**metrics, **{name: fmean(step[name] for step in steps) for name in steps[0]}}
