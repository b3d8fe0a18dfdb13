"""What dialogue logs say, without any model: tables, recomputed emotions and rewards, bootstrap.

Logs are JSON lines in SAGE's format, gzipped or not: ours, and SAGE's own. Score = mean final
emotion, success = at 100, failure = below 10; a dialogue whose user failed counts in none of them
(arXiv 2505.02847, section 2).
"""

import math
from collections import defaultdict
from pathlib import Path

import numpy as np

from config import read_rows, require
from simulator import EXCLUDED, INTENTIONS, PERSONA_TYPES, EmotionRules, band, canonical

Points = dict[str, list[float]]  # final emotions by profile id
ENDINGS = ("content", "left", "goodbye", "max_turns", "context_full", "format", EXCLUDED)


def read_log(path: str) -> list[dict]:
    """The dialogues of a log, gzipped or not. Raises InputError that names the bad line."""
    require(Path(path).is_file(), f"{path}: no such log")
    rows = []
    for where, row in read_rows(Path(path)):
        wanted = ("id", "history", "emo_point", "emo_state")
        for key in wanted if row.get("status", "ok") == "ok" else wanted[:2]:
            require(key in row, f"{where}: no key {key!r}; a SAGE dialogue log is expected")
        rows.append({**row, "line": int(where.rpartition(":")[2])})
    require(rows, f"{path}: holds no dialogue")
    return rows


def completed(rows: list[dict]) -> list[dict]:
    """The dialogues that count: those whose user did not fail."""
    return [row for row in rows if row.get("status", "ok") == "ok"]


def summary(rows: list[dict]) -> dict:
    """n (completed), failed, score (every profile weighs the same), success, failure (counts)."""
    points = [row["emo_point"] for row in completed(rows)]
    people = [np.mean(found) for found in by_profile(rows).values()]
    return {"n": len(points), "failed": len(rows) - len(points),
            "score": float(np.mean(people)) if people else math.nan,
            "success": sum(point >= 100 for point in points),
            "failure": sum(point < 10 for point in points)}  # fmt: skip


def score_line(name: str, rows: list[dict]) -> str:
    """One row of a table: name, score, success, failure."""
    n, failed, score, success, failure = summary(rows).values()
    warning = f"   {failed} of {len(rows)} dialogues FAILED and are left out" if failed else ""
    return f"{name:<44} {score:>6.1f}   {success:>4}   {failure:>4}   of {n}{warning}"


def score_text(path: str, rows: list[dict]) -> str:
    """The tables of a log: all, by seed, by hidden intention, by persona type, and by turn."""
    lines = [path, f"{'':<44} {'score':>6}   {'succ':>4}   {'fail':>4}", score_line("all", rows)]
    if n := len(by_profile(rows)):
        low, high = interval(rows)
        lines.append(f"  95 % interval {low:.1f} to {high:.1f} (bootstrap over {n} profiles)")
    for key, table in (("seed", None), ("task", INTENTIONS), ("character", PERSONA_TYPES)):
        groups = defaultdict(list)
        for row in rows:
            name, where = row.get(key, ""), f"{path}:{row['line']}: key {key!r}"
            groups[canonical(name, table, where) if table and name else name].append(row)
        for name in table or (sorted(groups) if len(groups) > 1 else ()):
            title = f"  {name} ({table[name][1]})" if table else f"  seed {name}"
            lines += [score_line(title[:44], groups[name])] if name in groups else []
    return "\n".join([*lines, *turn_lines(rows)])


def turn_lines(rows: list[dict]) -> list[str]:
    """A table by turn of the completed dialogues: mean change, and mean emotion after it."""
    turns = defaultdict(list)
    for row in completed(rows):
        users = [message for message in row["history"] if message["role"] == "user"]
        for turn, message in enumerate(users[1:], 1):
            turns[turn].append((float(message["planning"]["change"]), message["emotion-point"]))
    means = [(turn, *np.mean(pairs, axis=0), len(pairs)) for turn, pairs in sorted(turns.items())]
    head = [f"{'':<44} {'change':>6}   {'emotion':>7}"] if means else []
    return head + [f"{f'  turn {turn}':<44} {change:>+6.1f}   {now:>7.1f}   of {n}"
                   for turn, change, now, n in means]


def mismatches(row: dict, where: str) -> list[str]:
    """What in a logged dialogue does not follow from its appraisals; empty if everything does."""
    rules, wrong, ended = EmotionRules(), [], row.get("ended")
    users = [message for message in row["history"] if message["role"] == "user"]
    if row.get("status", "ok") != "ok":
        why = f"status is {row['status']!r}, but it ended as {ended!r}"
        return [] if ended == EXCLUDED else [f"{where}: {why}"]
    if not users:
        return [f"{where}: status is 'ok', but the history holds no user"]
    emotion = users[0]["emotion-point"]
    for turn, message in enumerate(users[1:], 2):
        emotion = rules.step(emotion, float(message["planning"]["change"]))
        now = message["emotion-point"]
        if abs(emotion - now) > 1e-6:
            wrong.append(f"user turn {turn}: emotion is {now}, the logged changes give {emotion:g}")
            emotion = now
        if rules.ending(emotion) and turn < len(users):
            wrong.append(f"user turn {turn}: the dialogue goes on after an emotion of {emotion:g}")
    if abs(row["emo_point"] - emotion) > 1e-6:
        wrong.append(f"final emotion is {row['emo_point']}, the last turn's is {emotion:g}")
    if row["emo_state"] != f"Emotion-{band(emotion)}":
        wrong.append(f"state is {row['emo_state']}, {emotion:g} is Emotion-{band(emotion)}")
    if "ended" in row:  # an addition of ours, as is the reward
        due = rules.ending(emotion)
        if ended not in ENDINGS or ended == EXCLUDED:
            wrong.append(f"ended as {ended!r}, which is no ending of a completed dialogue")
        elif ended != due and (due or ended in ("content", "left")):
            wrong.append(f"ended as {ended!r} at an emotion of {emotion:g}")
        reward = 0.0 if ended == "format" else emotion / 100
        if abs(row["reward"] - reward) > 1e-9:
            wrong.append(f"reward is {row['reward']}, {reward:g} follows from the dialogue")
    return [f"{where}: {why}" for why in wrong]


def paired_bootstrap(before: Points, after: Points, samples=10_000, seed=0) -> tuple[float, ...]:
    """Mean gain over shared profiles and its 95 % interval. Raises InputError if none is shared."""
    shared = sorted(before.keys() & after.keys())
    require(shared, "the two logs share no profile id; nothing can be paired")
    gain = np.array([np.mean(after[name]) - np.mean(before[name]) for name in shared])
    return float(gain.mean()), *bootstrap(gain, samples, seed)


def bootstrap(values: np.ndarray, samples: int = 10_000, seed: int = 0) -> tuple[float, float]:
    """The 95 % percentile interval of the mean of [n] values."""
    draws = np.random.default_rng(seed).integers(0, len(values), (samples, len(values)))
    return tuple(np.percentile(values[draws].mean(1), [2.5, 97.5]).tolist())


def by_profile(rows: list[dict]) -> Points:
    """Final emotions of the completed dialogues by profile id."""
    points = defaultdict(list)
    for row in completed(rows):
        points[row["id"]].append(row["emo_point"])
    return dict(points)


def interval(rows: list[dict]) -> tuple[float, float]:
    """The 95 % interval of the score, resampling profiles: the means of their dialogues."""
    return bootstrap(np.array([np.mean(found) for _, found in sorted(by_profile(rows).items())]))
