"""GRPO as pure functions: a dialogue's reward against its group's (arXiv 2402.03300, section 4.1).

A group is the dialogues held with one profile in one step. Statistics count dialogues, whatever
number of turns or trajectories each has. The loss is PPO's clipped surrogate.
"""

from statistics import fmean, pstdev, pvariance

from simulator import Key


def group_advantages(
    to_go: dict[Key, list[float]], scale: bool
) -> tuple[dict[Key, list[float]], float]:
    """Advantage per action: its reward and those to come, discounted, minus its group's mean there.

    `to_go` has completed dialogues only: one number where a dialogue is one action, or one a turn.
    `scale` divides by the group's spread. Dialogues alone in their group have no baseline and are
    dropped; a turn that no other member has reached has none either and gets 0. Also returns the
    share of groups without spread, which teach nothing (by turn, the mean of that over turns).
        (0, 0): [.9, .5]  (0, 1): [.1]  (1, 0): [.3]  ->  (0, 0): [.4, 0]  (0, 1): [-.4]   unscaled
    """
    groups: dict[int, list[Key]] = {}
    for key in sorted(to_go):
        groups.setdefault(key[0], []).append(key)
    kept = [keys for keys in groups.values() if len(keys) > 1]
    advantages = {key: [0.0] * len(to_go[key]) for keys in kept for key in keys}
    flat = []  # for each action the share of groups without spread
    for action in range(max(map(len, advantages.values()), default=0)):
        spreads = []
        for keys in kept:
            reached = [key for key in keys if action < len(to_go[key])]
            values = [to_go[key][action] for key in reached]
            if len(values) > 1:
                mean, spread = fmean(values), pstdev(values)
                spreads.append(spread)
                for key, value in zip(reached, values):
                    advantages[key][action] = (value - mean) / (spread + 1e-6 if scale else 1.0)
        flat.append(sum(spread < 1e-8 for spread in spreads) / max(1, len(spreads)))
    return advantages, fmean(flat) if flat else 0.0


def most_varied(rewards: dict[Key, float], count: int) -> set[Key]:
    """The `count` dialogues of each group whose rewards vary most: some lowest and some highest.

    Rolling out is cheaper than learning, and those between the extremes teach little (PODS, arXiv
    2504.13818, section 3: the subset of largest variance is such a union). Small groups stay whole.
    """
    groups: dict[int, list[Key]] = {}
    for key in sorted(rewards, key=lambda key: (rewards[key], key)):
        groups.setdefault(key[0], []).append(key)
    chosen: set[Key] = set()
    for keys in groups.values():
        tops = range(min(count, len(keys)) + 1)
        subsets = [keys[: tops[-1] - top] + keys[len(keys) - top :] for top in tops]
        chosen.update(max(subsets, key=lambda subset: pvariance([rewards[key] for key in subset])))
    return chosen
