"""From dialogues to changed weights: the gradient is the same however a step is cut, and nobody who failed is in it."""

import copy
import dataclasses
import json
import random

import pytest
import torch
from conftest import ScriptedUser, hidden_states, make_engine, make_jobs, make_talk, run_dialogues, tiny_raw
from torch import nn

import ppo
import update as update_module
from chat import load_tokenizer, make_chat
from config import Config
from dist import World
from rollout import Trajectory, pack, split, token_rewards, trajectories
from simulator import EmotionRules, Failed
from update import (
    Piece,
    State,
    build,
    by_dialogue,
    forward,
    grpo_vectors,
    learn,
    ppo_vectors,
    scatter,
    score,
    set_learning_rates,
    update,
)

pytestmark = pytest.mark.usefixtures("one_thread")
KINDS = {"ppo head": {"critic": "head"}, "ppo trunk": {"critic": "trunk"}, "grpo": {"algorithm": "grpo"}}
# Learning rate 0: the optimiser step shows its gradient and leaves the weights to the next one. No gradient clip.
STILL = {"lr": 0.0, "critic_lr": 0.0, "warmup": 0, "critic_warmup": 0, "grad_clip": 1e9}
BANNED = make_engine(make_chat(load_tokenizer("bytes"), False)).banned


@pytest.fixture(scope="module")
def shape(tmp_path_factory):
    path = tmp_path_factory.mktemp("shape") / "tiny.json"
    path.write_text(json.dumps(tiny_raw("qwen2")))
    return str(path)


@pytest.fixture
def make(shape):
    """`make(kind, **options)`: a config and its state, with nothing in it zero, and a critic unlike the policy."""

    def made(kind, **options) -> tuple[Config, State]:
        config = Config(model=shape, tokenizer="bytes", **{**STILL, "group_size": 2, **KINDS[kind], **options})
        state, generator = build(config, World()), torch.Generator().manual_seed(5)
        with torch.no_grad():
            for module in (state.value_head, state.critic):
                for parameter in module.parameters() if module else []:
                    parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
        return config, state

    return made


def roll(state, think=False, change=None, groups=3, members=2, seed=0):
    """Dialogues of one turn or three with the state's policy."""
    chat = make_chat(load_tokenizer("bytes"), think)
    engine = make_engine(chat, state.policy, slots=4, value_head=None if state.critic else state.value_head)
    assert torch.equal(engine.banned, BANNED)
    change = change or (lambda key, turn, reply: 4 * key[1] + 3 * key[0] * (-1) ** key[1] + turn)
    rules = EmotionRules(clamp=30)
    user = ScriptedUser(lambda key, turn, reply: -25 if sum(key) == 2 else change(key, turn, reply), rules)
    return run_dialogues(make_jobs(groups, members), engine, chat, user, make_talk(reply_tokens=6), (seed,))


def rewards_of(dialogues):
    """The rewards of an update, and the spans that get one advantage each in GRPO: whole dialogues."""
    rewards = {dialogue.key: torch.tensor(token_rewards(dialogue, "final")) for dialogue in dialogues}
    return rewards, {key: [len(vector)] for key, vector in rewards.items()}


def prepared(state, config, pieces, dialogues):
    """Fill hand-made pieces as `update` fills its own."""
    fill(state, config, pieces, *rewards_of(dialogues))


def fill(state, config, pieces, rewards, spans):
    score(state, config, pieces, BANNED)
    if config.algorithm == "grpo":
        vectors, _ = grpo_vectors(config, rewards, spans)
    else:
        value = by_dialogue(pieces, [piece.old_value for piece in pieces], World())
        vectors, _ = ppo_vectors(config, rewards, spans, value)
    for name, found in vectors.items():
        scatter(pieces, found, name)


def gradients(state, config, step):
    """What the optimisers applied in `step()`, which takes one step with each: parameter name -> gradient."""
    names = {id(p): f"{key}.{name}" for key, module in state.modules.items() for name, p in module.named_parameters()}
    seen = {}

    def note(optimiser, args, kwargs):
        owned = [p for group in optimiser.param_groups for p in group["params"] if p.grad is not None]
        seen.update({names[id(p)]: p.grad.clone() for p in owned})

    hooks = [optimiser.register_step_pre_hook(note) for optimiser in state.optimisers]
    metrics = step()
    for hook in hooks:
        hook.remove()
    assert metrics["skipped"] == 0
    return seen


def of_update(state, config, dialogues):
    return gradients(state, config, lambda: update(state, config, dialogues, BANNED))


def distance(a, b):
    """Relative distance of two gradients, the whole of them as one vector."""
    assert a.keys() == b.keys()
    a, b = (torch.cat([grads[name].flatten() for name in sorted(grads)]).double() for grads in (a, b))
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("think", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_is_the_same_for_every_micro_batch_size_and_packing_order(make, kind, think):
    config, state = make(kind, think=think, kl_coef=0.1)
    dialogues = roll(state, think)
    assert len({len(dialogue.turns) for dialogue in dialogues}) > 1

    def packed(order, micro_tokens):
        items = [item for dialogue in order for item in trajectories(dialogue, think)]
        pieces = [Piece(pack(part)) for part in split(items, micro_tokens)]
        prepared(state, config, pieces, dialogues)
        return gradients(state, config, lambda: learn(state, config, pieces, BANNED, World()))

    whole = of_update(state, dataclasses.replace(config, micro_tokens=100000), dialogues)
    assert all(grad.any() for name, grad in whole.items())
    assert len(whole) == sum(len(list(module.parameters())) for module in state.modules.values())
    for micro_tokens in (1, 300, 700):
        found = of_update(state, dataclasses.replace(config, micro_tokens=micro_tokens), dialogues)
        assert distance(found, whole) < 1e-5
    for seed in range(3):
        order = random.Random(seed).sample(dialogues, len(dialogues))
        assert distance(packed(order, (100000, 300, 1)[seed]), whole) < 1e-5
        assert distance(of_update(state, config, order), whole) < 1e-5


def test_the_gradient_is_the_textbooks(make):
    """Policy gradient of GRPO by hand, a dialogue at a time: sum of advantage * logp over all tokens, divided once."""
    config, state = make("grpo", entropy_coef=0.0, scale_advantage=False)
    dialogues = roll(state)
    reward = {dialogue.key: dialogue.reward for dialogue in dialogues}
    total, loss = 0, 0.0
    for dialogue in dialogues:
        [item] = trajectories(dialogue, think=False)
        hidden = hidden_states(state.policy, item.tokens)
        logp = (hidden @ state.policy.output_weight.T).masked_fill(BANNED, -torch.inf).log_softmax(-1)
        g, m = dialogue.key
        advantage = reward[g, m] - (reward[g, 0] + reward[g, 1]) / 2
        for t, bit in enumerate(item.mask):
            if bit:
                loss, total = loss - advantage * logp[t - 1, item.tokens[t]], total + 1
    names = [name for name, _ in state.policy.named_parameters()]
    by_hand = torch.autograd.grad(loss / total, list(state.policy.parameters()))
    assert distance(of_update(state, config, dialogues), {f"policy.{n}": g for n, g in zip(names, by_hand)}) < 1e-4


@pytest.mark.parametrize("think", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_failed_dialogue_changes_nothing(make, kind, think):
    config, state = make(kind, think=think)
    failing = lambda key, turn, reply: Failed("mute") if key[1] == 1 and turn == 2 else 5 * key[1] + turn  # noqa: E731
    dialogues = roll(state, think, failing, members=3)
    good = [dialogue for dialogue in dialogues if dialogue.completed]
    assert 0 < len(good) < len(dialogues) and all(dialogue.turns for dialogue in dialogues)
    assert distance(of_update(state, config, dialogues), of_update(state, config, good)) < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_only_dialogues_whose_rewards_vary_most_are_learnt_from(make, kind):
    config, state = make(kind, entropy_coef=0.1)
    dialogues = roll(state, change=lambda key, turn, reply: (0, 9, -8, 1)[key[1]] + turn, members=4)
    extremes = []
    for group in range(3):
        members = sorted((d for d in dialogues if d.key[0] == group), key=lambda dialogue: dialogue.reward)
        extremes += [members[0], members[-1]]
    found = of_update(state, dataclasses.replace(config, learn_from=2), dialogues)
    assert distance(found, of_update(state, config, extremes)) < 1e-6
    assert distance(found, of_update(state, config, dialogues)) > 1e-2


def test_a_grpo_group_with_one_survivor_is_dropped_from_the_denominator_too(make):
    config, state = make("grpo", entropy_coef=0.1)
    dialogues = roll(state, change=lambda key, turn, reply: Failed("mute") if key == (0, 1) else 5 * key[1] + turn)
    rest = [dialogue for dialogue in dialogues if dialogue.key[0] != 0]
    assert [dialogue.completed for dialogue in dialogues[:2]] == [True, False]
    assert distance(of_update(state, config, dialogues), of_update(state, config, rest)) < 1e-6
    assert update(state, config, dialogues[:2], BANNED) == {"skipped": 1.0}  # nobody left to learn from


def test_a_broken_format_is_trained_with_reward_0(make):
    config, state = make("grpo", think=True)
    dialogues = roll(state, think=True)
    dialogues[0].ended = "format"
    assert dialogues[0].reward == 0 and dialogues[0].emotion > 0
    pieces = [Piece(pack(trajectories(dialogue, think=True))) for dialogue in dialogues[:2]]
    prepared(state, config, pieces, dialogues[:2])
    assert (pieces[0].advantage < -0.99).all() and (pieces[1].advantage > 0.99).all()
    assert len(pieces[0].advantage) == sum(len(turn.sampled_ids) for turn in dialogues[0].turns)


@pytest.fixture
def steps(monkeypatch):
    """The pieces and metrics of every optimiser step that `update` takes."""
    seen, real = [], update_module.learn

    def spy(state, config, pieces, banned, world):
        seen.append((pieces, real(state, config, pieces, banned, world)))
        return seen[-1][1]

    monkeypatch.setattr(update_module, "learn", spy)
    return seen


@pytest.mark.parametrize("kind", KINDS)
def test_one_optimiser_step_is_on_policy_by_construction(make, kind, steps):
    config, state = make(kind, lr=1e-2)
    dialogues = roll(state)
    with torch.no_grad():
        for parameter in state.policy.parameters():
            parameter *= 1.1  # as if the sampler were a little off
    metrics = update(state, config, dialogues, BANNED)
    assert metrics["policy/approx_kl"] == metrics["policy/clipfrac"] == 0 and len(steps) == 1
    assert metrics["rollout/sampler_gap"] > 1e-3
    assert all(piece.old_logp is None for piece in steps[0][0])


@pytest.mark.parametrize("kind", KINDS)
def test_with_two_minibatches_old_log_probs_are_recomputed_before_the_first(make, kind, steps):
    config, state = make(kind, lr=1e-2, minibatches=2, micro_tokens=400)
    dialogues, before = roll(state), copy.deepcopy(state)
    for dialogue in dialogues:
        for turn in dialogue.turns:
            turn.logps = [-9.0] * len(turn.logps)  # the sampler's are not what counts
    metrics = update(state, config, dialogues, BANNED)
    (first, on_policy), (second, off_policy) = steps
    assert on_policy["policy/approx_kl"] == pytest.approx(0, abs=1e-9) and on_policy["policy/clipfrac"] == 0
    assert off_policy["policy/approx_kl"] > 1e-4
    assert metrics["policy/approx_kl"] == pytest.approx(off_policy["policy/approx_kl"] / 2)  # the mean over steps
    for piece in first + second:
        torch.testing.assert_close(piece.old_logp, forward(before.policy, config, piece.batch, BANNED)[0].detach())
    halves = [{key for piece in pieces for key in piece.batch.keys} for pieces in (first, second)]
    assert not halves[0] & halves[1] and halves[0] | halves[1] == {dialogue.key for dialogue in dialogues}


def test_epochs_pass_over_the_same_batch_again(make, steps):
    config, state = make("ppo head", lr=1e-2, epochs=2)
    update(state, config, roll(state), BANNED)
    assert steps[0][0] is steps[1][0]
    assert steps[0][1]["policy/approx_kl"] == pytest.approx(0, abs=1e-9) and steps[1][1]["policy/approx_kl"] > 1e-4


A, B = (0, 0), (0, 1)


def hand_made():
    """Three pieces: A's first turn (2 trained tokens) and B's (1); A's second turn (1); B's second (3)."""

    def item(key, mask, value, begin=0):
        rest, size = iter(value), len(mask)
        values = [next(rest) if bit else 99.0 for bit in mask]
        return Trajectory(key, [1] * size, mask, [0.0] * size, values, begin)

    first = [item(A, [0, 0, 1, 1], [0.1, 0.2]), item(B, [0, 1], [0.5])]
    second, third = [item(A, [0, 0, 0, 1], [0.3], 2)], [item(B, [0, 1, 0, 1, 1], [0.6, 0.7, 0.8], 1)]
    return [Piece(pack(items)) for items in (first, second, third)]


def test_by_dialogue_joins_turns_in_order_and_scatter_is_the_way_back():
    pieces = hand_made()
    joined = by_dialogue(pieces, [piece.batch.value_T[piece.batch.mask_T] for piece in pieces], World())
    torch.testing.assert_close(joined, {A: torch.tensor([0.1, 0.2, 0.3]), B: torch.tensor([0.5, 0.6, 0.7, 0.8])})
    scatter(pieces, {A: torch.tensor([1.0, 2, 3]), B: torch.tensor([4.0, 5, 6, 7])}, "advantage")
    assert [piece.advantage.tolist() for piece in pieces] == [[1, 2, 4], [3], [5, 6, 7]]


@pytest.mark.parametrize("gamma, lam", [(1.0, 1.0), (0.9, 0.8)])
@pytest.mark.parametrize("whitened", [False, True])
def test_gae_runs_over_the_turns_of_a_dialogue_and_comes_back_to_the_right_tokens(gamma, lam, whitened):
    pieces, config = hand_made(), Config(gamma=gamma, lam=lam, scale_advantage=whitened)
    rewards = {A: torch.tensor([0, 0, 0.4]), B: torch.tensor([0.2, 0, 0, 0.9])}
    fill(State(None, None, nn.Identity(), None, []), config, pieces, rewards, {A: [3], B: [4]})
    a, a_returns = ppo.gae(rewards[A], torch.tensor([0.1, 0.2, 0.3]), gamma, lam)
    b, b_returns = ppo.gae(rewards[B], torch.tensor([0.5, 0.6, 0.7, 0.8]), gamma, lam)
    if whitened:  # over all trained tokens of the batch, however they are packed
        a, b = ppo.whiten(torch.cat([a, b])).split([3, 4])
    for name, u, v in (("advantage", a, b), ("returns", a_returns, b_returns)):
        expected = [torch.cat([u[:2], v[:1]]), u[2:], v[1:]]
        torch.testing.assert_close([getattr(piece, name) for piece in pieces], expected)


@pytest.mark.parametrize("credit, expected", [("final", 0.5), ("turn", 0.0)])
def test_the_value_head_begins_with_what_is_still_to_be_paid(shape, credit, expected):
    options = {**STILL, **KINDS["ppo head"], "credit": credit, "start_emotion": 50.0}
    state = build(Config(model=shape, tokenizer="bytes", **options), World())
    value = state.value_head(torch.randn(1, state.policy.config.hidden_size))
    torch.testing.assert_close(value, torch.tensor([expected]))


@pytest.mark.parametrize("credit", ["final", "turn"])
def test_ppo_learns_from_the_rewards_that_credit_says(make, steps, credit):
    config, state = make("ppo head", credit=credit, scale_advantage=False)
    dialogues = roll(state)
    update(state, config, dialogues, BANNED)
    pieces = steps[0][0]
    for dialogue, returns in zip(dialogues, by_dialogue(pieces, [piece.returns for piece in pieces], World()).values()):
        later = torch.tensor(token_rewards(dialogue, credit)).flip(0).cumsum(0).flip(0)
        torch.testing.assert_close(returns, later)
        begun = dialogue.opening.emotion / 100 if credit == "turn" else 0.0  # nobody's merit
        assert float(returns[0]) == pytest.approx(dialogue.reward - begun, abs=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_that_are_not_finite_leave_the_weights_bit_equal_and_count_as_skipped(make, kind):
    config, state = make(kind, lr=1e-2, critic_lr=1e-2)
    dialogues = roll(state)
    pieces = [Piece(pack(trajectories(dialogue, think=False))) for dialogue in dialogues]
    prepared(state, config, pieces, dialogues)
    before, good = copy.deepcopy(state), pieces[2].advantage
    pieces[2].advantage = good * float("nan")
    assert learn(state, config, pieces, BANNED, World())["skipped"] == 1
    for key, module in state.modules.items():
        for (name, p), q in zip(module.named_parameters(), before.modules[key].parameters()):
            assert torch.equal(p, q) and p.grad is None, name
    assert not any(optimiser.state for optimiser in state.optimisers)
    pieces[2].advantage = good
    assert learn(state, config, pieces, BANNED, World())["skipped"] == 0
    for key, module in state.modules.items():
        assert not any(torch.equal(p, q) for p, q in zip(module.parameters(), before.modules[key].parameters()))


@pytest.mark.parametrize("critic", ["head", "trunk"])
@pytest.mark.parametrize("lr, critic_lr", [(1e-3, 4e-3), (1e-3, 1e-3)])
def test_learning_rates_warm_up_linearly_each_over_its_own_steps(make, critic, lr, critic_lr):
    config, state = make(f"ppo {critic}", lr=lr, critic_lr=critic_lr, warmup=2, critic_warmup=4)
    policy = {id(p) for p in state.policy.parameters()}
    for state.step, shares in enumerate([(0.5, 0.25), (1, 0.5), (1, 0.75), (1, 1), (1, 1)]):
        set_learning_rates(state, config)
        for group in (group for optimiser in state.optimisers for group in optimiser.param_groups):
            own = id(group["params"][0]) in policy
            assert group["lr"] == pytest.approx(lr * shares[0] if own else critic_lr * shares[1])
    config, state = make(f"ppo {critic}", lr=lr, critic_lr=critic_lr, warmup=0, critic_warmup=0)
    set_learning_rates(state, config)
    assert {group["lr"] for optimiser in state.optimisers for group in optimiser.param_groups} == {lr, critic_lr}


def test_a_linear_schedule_goes_to_0_behind_the_last_step(make):
    config, state = make("ppo head", lr=8e-3, warmup=2, steps=4, lr_schedule="linear")
    rates = []
    for state.step in range(4):
        set_learning_rates(state, config)
        rates.append(state.optimisers[0].param_groups[0]["lr"])
    assert rates == pytest.approx([8e-3 * 0.5, 8e-3 * 0.75, 8e-3 * 0.5, 8e-3 * 0.25])


def perturbed_kl(make, kind, **options):
    """A config with a KL to a reference that the policy has left, and its dialogues."""
    config, state = make(kind, kl_coef=0.5, **options)
    with torch.no_grad():
        for index, parameter in enumerate(state.policy.parameters()):
            parameter *= 1 + 0.1 * (-1) ** index
    return config, state, roll(state)


@pytest.mark.parametrize("kind", KINDS)
def test_the_kl_loss_adds_the_gradient_of_k2_and_nothing_while_policy_and_reference_agree(make, kind):
    config, state = make(kind, kl_coef=0.5)
    free, dialogues = dataclasses.replace(config, kl_coef=0.0), roll(state)
    assert not any(p.requires_grad for p in state.reference.parameters())
    assert distance(of_update(state, config, dialogues), of_update(state, free, dialogues)) < 1e-5
    config, state, dialogues = perturbed_kl(make, kind)
    batch = pack([item for dialogue in dialogues for item in trajectories(dialogue, think=False)])
    logp, reference = (forward(model, config, batch, BANNED)[0] for model in (state.policy, state.reference))
    k2 = 0.5 * (logp - reference.detach()).pow(2).mean()
    extra = torch.autograd.grad(0.5 * k2, list(state.policy.parameters()), allow_unused=True)
    expected = of_update(state, free, dialogues)
    without = {name: grad.clone() for name, grad in expected.items()}
    for (name, _), grad in zip(state.policy.named_parameters(), extra):
        expected[f"policy.{name}"] = expected[f"policy.{name}"] + grad
    found = of_update(state, config, dialogues)
    assert distance(found, expected) < 1e-5 and distance(found, without) > 1e-3
    assert update(state, config, dialogues, BANNED)["policy/kl_reference"] > 1e-3


@pytest.mark.parametrize("think", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_gap_to_the_sampler_is_tiny_right_after_a_rollout(make, kind, think):
    config, state = make(kind, think=think)
    assert update(state, config, roll(state, think), BANNED)["rollout/sampler_gap"] < 1e-4


@pytest.mark.parametrize("kind", ["ppo head", "ppo trunk"])
def test_the_value_of_token_t_comes_from_the_hidden_state_before_it(make, kind):
    config, state = make(kind)
    [item] = trajectories(roll(state)[0], think=False)
    batch = pack([item])
    trunk = state.critic if kind == "ppo trunk" else state.policy
    hidden = hidden_states(trunk, item.tokens)
    trained = [t for t, bit in enumerate(item.mask) if bit]
    expected = torch.stack([state.value_head(hidden[t - 1]) for t in trained])
    torch.testing.assert_close(update_module.values(state, batch), expected)
    if kind == "ppo head":  # learn() has the hidden states at hand
        torch.testing.assert_close(state.value_head(forward(state.policy, config, batch, BANNED)[2]), expected)
    item.tokens[trained[-1]] ^= 1  # what is said next cannot change what was expected before
    torch.testing.assert_close(update_module.values(state, pack([item])), expected)
