"""GRPO as pure functions: a dialogue's advantage is its reward against its group's (arXiv 2402.03300, section 4.1).

A group is the dialogues held with one profile in one step. Statistics count dialogues, whatever number of turns or
trajectories each has. The loss itself is PPO's clipped surrogate, with one denominator for the whole step.
"""

from statistics import fmean, pstdev, pvariance

from simulator import Key


def group_advantages(rewards: dict[Key, float], scale: bool) -> tuple[dict[Key, float], float]:
    """Advantage per dialogue, reward minus the group's mean, divided by the group's spread if `scale`.

    `rewards` holds completed dialogues only. A group of one survivor has no baseline and is dropped: its key is absent
    from the result. Also returns the share of kept groups without any spread, which teach nothing.
    """
    groups: dict[int, list[Key]] = {}
    for key in sorted(rewards):
        groups.setdefault(key[0], []).append(key)
    kept = [keys for keys in groups.values() if len(keys) > 1]
    advantages, flat = {}, 0
    for keys in kept:
        values = [rewards[key] for key in keys]
        mean, spread = fmean(values), pstdev(values)
        flat += spread < 1e-8
        for key, value in zip(keys, values):
            advantages[key] = (value - mean) / (spread + 1e-6 if scale else 1.0)
    return advantages, flat / max(1, len(kept))


def turn_advantages(to_go: dict[Key, list[float]], scale: bool) -> tuple[dict[Key, list[float]], float]:
    """Advantage per turn: the reward still to come from it, against that of the group's same turn.

    With one entry a dialogue this is `group_advantages`. What happened before a turn is neither blamed on it nor
    praised; a turn that no other member of the group has reached has no baseline and gets 0.
    """
    advantages: dict[Key, list[float]] = {key: [0.0] * len(values) for key, values in to_go.items()}
    flat = []
    for turn in range(max(map(len, to_go.values()))):
        found, share = group_advantages({k: values[turn] for k, values in to_go.items() if turn < len(values)}, scale)
        flat.append(share)
        for key, amount in found.items():
            advantages[key][turn] = amount
    return advantages, fmean(flat)


def most_varied(rewards: dict[Key, float], count: int) -> set[Key]:
    """The `count` dialogues of each group whose rewards vary most: some of the lowest, the others of the highest.

    Rolling out is cheaper than learning, and those between the extremes teach little (PODS, arXiv 2504.13818,
    section 3: the subset of largest variance is always such a union). A smaller group is kept whole.
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
