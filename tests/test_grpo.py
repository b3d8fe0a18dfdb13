"""Group-relative advantages: statistics count dialogues, and a user that failed is nowhere in them."""

from itertools import combinations
from statistics import fmean, pvariance

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from config import Config
from grpo import group_advantages, most_varied
from rollout import Trajectory, pack, split
from update import Piece, grpo_vectors, scatter

reward = st.integers(0, 100).map(lambda percent: percent / 100)
groups = st.dictionaries(st.tuples(st.integers(0, 3), st.integers(0, 5)), reward, min_size=1)


def of_dialogues(rewards, scale):
    """group_advantages where each dialogue is one action."""
    found, flat = group_advantages({key: [value] for key, value in rewards.items()}, scale)
    return {key: value for key, (value,) in found.items()}, flat


pytestmark = pytest.mark.usefixtures("one_thread")
quick = settings(max_examples=60, deadline=None)


@quick
@given(groups)
def test_an_advantage_is_the_reward_minus_the_mean_of_its_groups_dialogues(rewards):
    advantages, _ = of_dialogues(rewards, scale=False)
    for key, value in rewards.items():
        members = [r for other, r in rewards.items() if other[0] == key[0]]
        if len(members) == 1:
            assert key not in advantages  # no baseline: dropped, not zero
        else:
            assert advantages[key] == pytest.approx(value - fmean(members))
    assert advantages.keys() <= rewards.keys()


def test_scaling_divides_by_the_groups_own_population_spread():
    rewards = {(0, 0): 0.2, (0, 1): 0.4, (1, 0): 0.0, (1, 1): 0.0, (1, 2): 0.9}
    plain, scaled = of_dialogues(rewards, scale=False)[0], of_dialogues(rewards, scale=True)[0]
    assert plain == pytest.approx({(0, 0): -0.1, (0, 1): 0.1, (1, 0): -0.3, (1, 1): -0.3, (1, 2): 0.6})
    spread = (0.1, 0.18**0.5)
    assert scaled == pytest.approx({key: value / spread[key[0]] for key, value in plain.items()}, rel=1e-4)


@quick
@given(groups, st.booleans(), st.randoms())
def test_a_groups_advantages_do_not_depend_on_other_groups_or_on_order(rewards, scale, random):
    keys = list(rewards)
    random.shuffle(keys)
    shuffled = of_dialogues({key: rewards[key] for key in keys}, scale)
    assert shuffled == of_dialogues(rewards, scale)
    for group in {key[0] for key in rewards}:
        alone = of_dialogues({key: r for key, r in rewards.items() if key[0] == group}, scale)[0]
        assert alone == {key: a for key, a in shuffled[0].items() if key[0] == group}


@quick
@given(groups, st.integers(2, 5))
def test_those_whose_rewards_vary_most_are_found_as_by_trying_all_subsets(rewards, count):
    chosen = most_varied(rewards, count)
    for group in {key[0] for key in rewards}:
        members = [key for key in rewards if key[0] == group]
        found = [key for key in members if key in chosen]
        assert len(found) == min(count, len(members))
        spread = lambda keys: pvariance([rewards[key] for key in keys])  # noqa: E731
        assert spread(found) == pytest.approx(max(map(spread, combinations(members, len(found)))))


def test_the_share_of_groups_without_spread_counts_kept_groups():
    flat, wide, single = {(0, 0): 0.5, (0, 1): 0.5}, {(1, 0): 0.5, (1, 1): 0.6}, {(2, 0): 0.5}
    assert of_dialogues(flat, True) == ({(0, 0): 0.0, (0, 1): 0.0}, 1.0)
    assert of_dialogues(flat | wide | single, True)[1] == 0.5
    assert of_dialogues(wide | single, True)[1] == 0.0
    assert of_dialogues(single, True) == ({}, 0.0)


TURNS = {(0, 0): [3, 1, 2, 2], (0, 1): [4], (1, 0): [1, 1], (1, 1): [5, 2, 1]}  # sampled tokens of each turn
REWARDS = {(0, 0): 0.9, (0, 1): 0.1, (1, 0): 0.3, (1, 1): 0.8}


def layout(key, turns, think):
    """The trajectories of a dialogue whose prompts have two ids a turn."""
    pieces = [([0, 0, *range(1, n + 1)], [0, 0] + [1] * n) for n in turns]
    if not think:
        pieces = [(sum((ids for ids, _ in pieces), []), sum((mask for _, mask in pieces), []))]
    begins = [sum(sum(mask) for _, mask in pieces[:i]) for i in range(len(pieces))]
    zeros = [[0.0] * len(ids) for ids, _ in pieces]
    return [Trajectory(key, *piece, zero, zero, begin) for piece, zero, begin in zip(pieces, zeros, begins)]


def advantages(config, pieces, rewards, spans):
    """All pieces' advantages as `update` makes them for GRPO, and its metrics."""
    vectors, metrics = grpo_vectors(config, rewards, spans)
    scatter(pieces, vectors["advantage"], "advantage")
    return torch.cat([piece.advantage for piece in pieces]).tolist(), metrics


@pytest.mark.parametrize("think", [False, True])
@pytest.mark.parametrize("micro_tokens", [1, 9, 1000])
@pytest.mark.parametrize("scale", [False, True])
def test_dialogues_with_unequal_turns_get_the_same_baseline_in_both_sample_layouts(think, micro_tokens, scale):
    items = [item for key, turns in TURNS.items() for item in layout(key, turns, think)]
    pieces = [Piece(pack(part)) for part in split(items, micro_tokens)]
    config = Config(algorithm="grpo", scale_advantage=scale, think=think)
    rewards = {key: torch.full((sum(turns),), REWARDS[key] / sum(turns)) for key, turns in TURNS.items()}  # by token
    found, metrics = advantages(config, pieces, rewards, {key: [sum(turns)] for key, turns in TURNS.items()})
    distance = {0: 0.4, 1: 0.25}  # of either member from its group's mean, which is the spread too
    expected = []
    for key, turns in TURNS.items():
        sign = 1 if REWARDS[key] > 0.5 else -1
        expected += [sign * (1.0 if scale else distance[key[0]])] * sum(turns)
    assert found == pytest.approx(expected, rel=1e-4)
    assert metrics["group/zero_spread"] == 0


@pytest.mark.parametrize("think", [False, True])
@pytest.mark.parametrize("micro_tokens", [1, 9, 1000])
@pytest.mark.parametrize("gamma, by_hand", [
    (1.0, {(0, 0): [0.15, 0, 0, 0], (0, 1): [-0.15], (1, 0): [-0.4, -0.45], (1, 1): [0.4, 0.45, 0]}),
    (0.5, {(0, 0): [-0.13125, 0, 0, 0], (0, 1): [0.13125], (1, 0): [-0.1375, -0.375], (1, 1): [0.1375, 0.375, 0]}),
    (0.0, {(0, 0): [-0.15, 0, 0, 0], (0, 1): [0.15], (1, 0): [0.05, -0.3], (1, 1): [-0.05, 0.3, 0]}),
])  # fmt: skip
def test_by_turn_a_token_gets_the_reward_from_its_turn_on_against_the_groups_same_turn(
    think, micro_tokens, gamma, by_hand
):
    """Group 0: changes .1 -.2 .3 .5 and .4; turns two to four stand alone and have no baseline."""
    changes = {(0, 0): [0.1, -0.2, 0.3, 0.5], (0, 1): [0.4], (1, 0): [0.2, -0.4], (1, 1): [0.1, 0.2, 0.3]}
    last = lambda n, change: [0.0] * (n - 1) + [change]  # noqa: E731
    rewards = {k: torch.tensor(sum((last(n, c) for n, c in zip(TURNS[k], changes[k])), [])) for k in TURNS}
    items = [item for key, turns in TURNS.items() for item in layout(key, turns, think)]
    pieces = [Piece(pack(part)) for part in split(items, micro_tokens)]
    config = Config(algorithm="grpo", scale_advantage=False, credit="turn", think=think, gamma=gamma)
    found, _ = advantages(config, pieces, rewards, TURNS)
    expected = [amount for key, turns in TURNS.items() for n, amount in zip(turns, by_hand[key]) for _ in range(n)]
    assert found == pytest.approx(expected)


def test_a_turn_that_no_other_member_has_reached_gets_0_and_one_alone_in_its_group_is_dropped():
    to_go = {(0, 0): [0.9, 0.5, 0.1], (0, 1): [0.1, 0.5], (1, 0): [0.3]}
    found, flat = group_advantages(to_go, scale=False)
    assert found == {(0, 0): pytest.approx([0.4, 0, 0]), (0, 1): pytest.approx([-0.4, 0])}
    assert flat == pytest.approx(1 / 3)  # the second turn's alone does not vary; the third has no group at all
