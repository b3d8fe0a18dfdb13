"""A bench for users: is what a user likes what a reader would call good?

Five looks, through the protocol alone, so that any kind of user can be gauged: a ladder of replies
whose order nobody doubts; agreement with replies that were judged blind (data/judged/README.md),
beside the judges' own agreement; agreement with logs of a real sentient user; replies made to cheat;
and the script of eight replies that pleases most when it is said to everybody regardless.
"""

import json
import math
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from config import read_rows
from simulator import Failed, Profile, User, load_profiles, parse_profile

JUDGED = Path(__file__).parent.parent / "data" / "judged"
# Rungs from the worst reply to the best, and the sources of judged replies that stand on each.
LADDER = {
    "silence": (), "shuffled words": ("shuffled",), "echo": ("echo",),
    "another person's good reply": ("wrong_person",), "the small model at temperature 1": ("smollm2 T 1.0",),
    "the small model at 0.6": ("smollm2 T 0.6",), "a formula for everybody": ("formula",),
    "good for the wrong need": ("wrong_need",), "good": ("good_plain", "good_other", "good_short"),
}  # fmt: skip
APART = (("shuffled words", "a formula for everybody"), ("a formula for everybody", "good"))
OWN = ("smollm2", "ppo", "grpo")  # sources of replies that a model of ours said
START, SCRIPT = 40.0, 8  # emotion at the start of a talk, replies of a script
MARGIN = 3.0  # two first replies to a person whose logged changes differ by this are a pair


@dataclass(frozen=True)
class Item:
    """A reply at a point of a talk: the person's turns so far, one more than the replies before."""

    profile: Profile
    said: tuple[str, ...]
    heard: tuple[str, ...]
    reply: str
    emotion: float = START


def ranks(values) -> np.ndarray:
    """Ranks of [N] values; ties share their mean rank."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def spearman(a, b, given=None) -> float:
    """Spearman's rank correlation of [N] and [N]; with `given` [N], what remains beside its ranks."""
    a, b = ranks(a), ranks(b)
    if given is not None:
        a, b = (x - np.polyval(np.polyfit(ranks(given), x, 1), ranks(given)) for x in (a, b))
    return float(np.corrcoef(a, b)[0, 1]) if np.std(a) * np.std(b) else math.nan


def changes(user: User, items: list[Item]) -> np.ndarray:
    """The change [N] of emotion that each reply brings; nan where the user failed.

    A user with a method `resume` is set into the middle of the talk; any other is led there by the
    earlier replies, and says what it likes meanwhile.
    """
    return np.array([math.nan if turn is None else turn.change for turn in turns(user, items)])


def turns(user: User, items: list[Item]) -> list:
    """The answer of a user to each item's reply; None where it failed."""
    found, told = {}, defaultdict(int)
    for n, item in enumerate(items):
        if hasattr(user, "resume"):
            user.resume((n, 0), item.profile, n, item.said, item.heard, item.emotion)
            told[n] = len(item.heard) + 1
            user.tell((n, 0), item.reply)
        else:
            user.start((n, 0), replace(item.profile, first_talk=item.said[0]), n)
    while len(found) < len(items):
        for (n, member), turn in user.poll(60.0):
            lines = (*items[n].heard, items[n].reply)
            if isinstance(turn, Failed) or told[n] == len(lines) or turn.ended:
                found[n] = None if isinstance(turn, Failed) or told[n] < len(lines) else turn
            else:
                user.tell((n, member), lines[told[n]])
                told[n] += 1
    return [found[n] for n in range(len(items))]


def read_items(name: str, people: dict[str, Profile]) -> list[tuple[dict, Item]]:
    """Rows of a file of data/judged/, each with its item."""
    pairs = []
    for where, row in read_rows(JUDGED / name):
        who = row["profile"]
        profile = people[who] if isinstance(who, str) else parse_profile(who, where)
        pairs.append((row, Item(profile, tuple(row["said"]), tuple(row["earlier"]), row["reply"])))
    return pairs


def everybody() -> dict[str, Profile]:
    """Our own training people by id."""
    files = (JUDGED.parent / f"{language}_train.jsonl" for language in ("en", "zh"))
    return {profile.id: profile for file in files for profile in load_profiles(file)}


def bootstrap(values: dict[str, list[float]], rounds: int = 2000) -> tuple[float, float, float]:
    """Mean over people of each one's mean, with its 95 % interval over people."""
    points = np.array([np.nanmean(found) for found in values.values()])
    drawn = np.random.default_rng(0).integers(len(points), size=(rounds, len(points)))
    low, high = np.nanpercentile(points[drawn].mean(1), (2.5, 97.5))
    return float(np.nanmean(points)), float(low), float(high)


def row_of(name: str, values: dict[str, list[float]], judges: list[float]) -> dict:
    """A line of a table: mean change with its interval over people, beside the judges' mean."""
    mean, low, high = bootstrap(values)
    n = sum(len(found) for found in values.values())
    return {"name": name, "n": n, "mean": mean, "low": low, "high": high,
            "judges": float(np.mean(judges)) if judges else None}  # fmt: skip


def ladder(user: User, rows: list[tuple[dict, Item]], found: np.ndarray) -> list[dict]:
    """One line a rung; `in_order` says whether no lower rung has a higher mean, `apart` ..."""
    lines = []
    for rung, sources in LADDER.items():
        mine = [n for n, (row, _) in enumerate(rows) if row["source"] in sources]
        items = [rows[n][1] for n in mine] or first_words(rows)
        values, people = (found[mine] if mine else changes(user, items)), defaultdict(list)
        for item, value in zip(items, values):
            people[item.profile.id].append(value)
        lines.append(row_of(rung, people, [judged(rows[n][0]) for n in mine]))
    return lines


def first_words(rows: list[tuple[dict, Item]]) -> list[Item]:
    """Silence in answer to each person's first words."""
    people = {item.profile.id: item for _, item in rows}
    return [replace(item, said=item.said[:1], heard=(), reply="") for item in people.values()]


def judged(row: dict) -> float:
    """What both judges gave a reply, on average."""
    return (row["a"]["change"] + row["b"]["change"]) / 2


def agreement(rows: list[tuple[dict, Item]], found: np.ndarray) -> dict:
    """With the judges over all replies and over the small model's own, and mean errors by source."""
    a, b = (np.array([row[k]["change"] for row, _ in rows]) for k in "ab")
    source = np.array([row["source"] for row, _ in rows])
    both, own = (a + b) / 2, np.array([name.startswith(OWN) for name in source])
    lines = []
    for name in sorted(set(source), key=lambda name: -both[source == name].mean()):
        mine = source == name
        values = {"": 0}
        lines.append({"name": str(name), "n": int(mine.sum()), "mean": float(np.nanmean(found[mine])),
                      "judges": float(both[mine].mean()), "judges_differ": float(a[mine].mean() - b[mine].mean())})
    return {"n": len(rows), "spearman": spearman(found, both), "judges": spearman(a, b),
            "own": spearman(found[own], both[own]), "own_judges": spearman(a[own], b[own]),
            "error": float(np.nanmean(abs(found - both))), "judges_error": float(abs(a - b).mean()),
            "sources": lines}  # fmt: skip
