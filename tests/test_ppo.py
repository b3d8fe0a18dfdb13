"""PPO's formulas against their definitions, written out slowly."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ppo
from dist import World
from rollout import Trajectory, pack
from update import Piece, by_dialogue

unit = st.floats(0, 1, width=32)
number = st.floats(-3, 3, width=32)
pairs = st.lists(st.tuples(number, number), min_size=1, max_size=25)  # (reward, value) of each trained token
pytestmark = pytest.mark.usefixtures("one_thread")
quick = settings(max_examples=60, deadline=None)


def tensors(columns):
    return [torch.tensor(column, dtype=torch.float64) for column in zip(*columns)]


@quick
@given(pairs, unit, unit)
def test_gae_equals_its_definition(tokens, gamma, lam):
    reward, value = tensors(tokens)
    n, after = len(value), [*value[1:].tolist(), 0.0]
    delta = [float(reward[t]) + gamma * after[t] - float(value[t]) for t in range(n)]
    expected = [sum((gamma * lam) ** (s - t) * delta[s] for s in range(t, n)) for t in range(n)]
    advantage, returns = ppo.gae(reward, value, gamma, lam)
    assert advantage.tolist() == pytest.approx(expected, abs=1e-9)
    assert returns.tolist() == pytest.approx([a + float(v) for a, v in zip(expected, value)], abs=1e-9)


@quick
@given(st.lists(pairs, min_size=1, max_size=4), unit, unit)
def test_by_turn_gae_equals_that_of_a_chain_whose_actions_are_turns(turns, gamma, lam):
    """A_t = r_k + gamma V(first of k + 1) - V_t + gamma lam A(first of k + 1), r_k the sum from t to the turn's end."""
    reward, value = tensors([pair for turn in turns for pair in turn])
    advantage, returns = ppo.gae(reward, value, gamma, lam, [len(turn) for turn in turns])
    expected, next_value, next_advantage, end = [], 0.0, 0.0, len(value)
    for turn in reversed(turns):
        begin = end - len(turn)
        own = [
            float(reward[t:end].sum()) + gamma * next_value - float(value[t]) + gamma * lam * next_advantage
            for t in range(begin, end)
        ]
        expected, next_value, next_advantage, end = own + expected, float(value[begin]), own[0], begin
    assert advantage.tolist() == pytest.approx(expected, abs=1e-9)
    assert returns.tolist() == pytest.approx([a + float(v) for a, v in zip(expected, value)], abs=1e-9)


def test_gae_of_the_example_in_its_docstring():
    advantage, returns = ppo.gae(torch.tensor([0, 0, 1.0]), torch.tensor([0.2, 0.5, 0.6]), 1.0, 1.0)
    torch.testing.assert_close(advantage, torch.tensor([0.8, 0.5, 0.4]))
    torch.testing.assert_close(returns, torch.ones(3))


@quick
@given(pairs)
def test_no_reward_is_lost_at_gamma_and_lambda_1(tokens):
    reward, value = tensors(tokens)
    advantage, returns = ppo.gae(reward, value, 1.0, 1.0)
    later = [float(reward[t:].sum()) for t in range(len(reward))]
    assert (advantage + value).tolist() == pytest.approx(later, abs=1e-9)
    assert returns.tolist() == pytest.approx(later, abs=1e-9)


@quick
@given(pairs, st.lists(st.integers(0, 4), min_size=25, max_size=25), unit, unit)
def test_gae_is_unmoved_by_what_the_user_said(tokens, interludes, gamma, lam):
    """Values of a dialogue with user turns of any length between its tokens give the same compact vector."""
    reward, value = tensors(tokens)
    ids, mask, values = [0], [0], [0.0]
    for words, v in zip(interludes, value.tolist()):
        ids, mask, values = ids + [7] * words + [8], mask + [0] * words + [1], values + [9.9] * words + [v]
    batch = pack([Trajectory((0, 0), ids, mask, [0.0] * len(ids), values)])
    compact = by_dialogue([Piece(batch)], [batch.value_T[batch.mask_T]], World())[0, 0].double()
    assert torch.equal(compact, value)
    torch.testing.assert_close(ppo.gae(reward, compact, gamma, lam), ppo.gae(reward, value, gamma, lam))


@quick
@given(st.lists(number, min_size=2, max_size=40))
def test_whitening_gives_zero_mean_and_unit_variance_and_keeps_the_order(numbers):
    x = torch.tensor(numbers, dtype=torch.float64)
    white = ppo.whiten(x)
    assert abs(float(white.mean())) < 1e-6 and torch.isfinite(white).all()
    spread = math.sqrt(sum((v - sum(numbers) / len(numbers)) ** 2 for v in numbers) / len(numbers))
    if spread > 1e-3:
        assert float(white.pow(2).mean()) == pytest.approx(1, abs=1e-4)
        assert (white[x.argsort()].diff() >= 0).all()
    else:
        assert float(white.abs().max()) <= 40**0.5


def test_whitening_equal_advantages_gives_zeros():
    assert ppo.whiten(torch.full((5,), 0.7)).abs().max() < 1e-5


surrogate = st.lists(st.tuples(st.floats(-1, 1, width=32), st.floats(-1, 1, width=32), number), min_size=1, max_size=20)


@quick
@given(surrogate, st.floats(0.05, 0.5))
def test_policy_loss_equals_a_scalar_brute_force(tokens, clip):
    logp, old, advantage = tensors(tokens)
    loss = kl = clipped = 0.0
    for new, before, a in tokens:
        ratio = math.exp(new - before)
        limited = min(max(ratio, 1 - clip), 1 + clip)
        loss -= min(ratio * a, limited * a)
        kl += ratio - 1 - (new - before)
        clipped += ratio > 1 + clip or ratio < 1 - clip
    result = ppo.policy_loss(logp, old, advantage, clip)
    assert [float(x) for x in result[:2]] == pytest.approx([loss, kl], abs=1e-9)
    assert int(result[2]) == clipped


@pytest.mark.parametrize("ratio, advantage, slope", [
    (1.0, 2.0, -2.0), (1.0, -2.0, 2.0),  # on policy: the plain policy gradient
    (1.3, 2.0, 0.0), (0.7, -2.0, 0.0),  # beyond the clip in the direction the advantage wants: no gradient
    (1.3, -2.0, 2.6), (0.7, 2.0, -1.4),  # beyond it in the other: full gradient
])
def test_the_clip_stops_the_gradient_on_its_own_side_only_and_it_flows_through_logp_alone(ratio, advantage, slope):
    logp, old, weight = (torch.tensor([x], requires_grad=True) for x in (math.log(ratio), 0.0, advantage))
    loss, kl, clipped = ppo.policy_loss(logp, old.detach(), weight.detach(), 0.2)
    loss.backward()
    assert float(logp.grad) == pytest.approx(slope) and not kl.requires_grad and not clipped.requires_grad
    assert float(clipped) == (ratio != 1.0)


@quick
@given(surrogate, st.floats(0.05, 0.5))
def test_value_loss_is_the_worse_of_value_and_clipped_value(tokens, clip):
    value, old, target = tensors(tokens)
    expected = 0.0
    for new, before, goal in tokens:
        near = before + min(max(new - before, -clip), clip)
        expected += 0.5 * max((new - goal) ** 2, (near - goal) ** 2)
    assert float(ppo.value_loss(value, old, target, clip)) == pytest.approx(expected, abs=1e-9)


def test_a_value_that_moved_beyond_the_clip_towards_its_return_gets_no_gradient():
    value = torch.tensor([0.9, 0.1, 0.3], requires_grad=True)  # beyond towards; beyond away; within
    ppo.value_loss(value, torch.tensor([0.2, 0.8, 0.2]), torch.tensor([1.0, 1.0, 1.0]), 0.5).backward()
    assert value.grad.tolist() == pytest.approx([0.0, -0.9, -0.7])


def test_the_gradient_of_k2_is_the_reverse_kls_in_expectation():
    generator = torch.Generator().manual_seed(0)
    logits, reference = torch.randn(2, 5, generator=generator, dtype=torch.float64)
    theta = logits.requires_grad_()
    logp, target = theta.log_softmax(0), reference.log_softmax(0)
    [exact] = torch.autograd.grad((logp.exp() * (logp - target)).sum(), theta, retain_graph=True)
    p = logp.exp().detach()  # every token, weighed with how often it is sampled
    expected = sum(p[i] * ppo.kl_loss(logp[i : i + 1], target[i : i + 1]) for i in range(5))
    torch.testing.assert_close(torch.autograd.grad(expected, theta)[0], exact)
    assert exact.abs().max() > 0.05


def test_losses_are_sums_so_that_pieces_add_up():
    logp, old, weight, third = torch.randn(4, 10, generator=torch.Generator().manual_seed(1))
    halves = slice(0, 3), slice(3, 10)
    for loss in (lambda s: ppo.policy_loss(logp[s], old[s], weight[s], 0.2)[0], lambda s: ppo.kl_loss(logp[s], old[s]),
                 lambda s: ppo.value_loss(logp[s], old[s], third[s], 0.5)):
        torch.testing.assert_close(sum(loss(half) for half in halves), loss(slice(None)))


def test_explained_variance():
    returns = torch.tensor([0.0, 1.0, 2.0, 3.0])
    assert ppo.explained_variance(returns + 5, returns) == pytest.approx(1)  # blind to a constant error
    assert ppo.explained_variance(torch.full((4,), 1.5), returns) == pytest.approx(0)
    assert ppo.explained_variance(-returns, returns) == pytest.approx(-3)
    assert ppo.explained_variance(torch.tensor([0.0, 0.0, 3.0, 3.0]), returns) == pytest.approx(0.6)
    assert ppo.explained_variance(returns, torch.ones(4)) == 0
