"""The second ear: a user that is never trained on, fitted to the other judge by other features.

It hears letters, not words: hashed character n-grams of a reply, once by themselves and once as far
as the reply shares letters with the person's story. Where the offline user's points rise and these
do not, the policy has learnt the user, not to help. Beside it two measures of formula. English only.
"""

import functools
import json
import math
import zlib
from collections import Counter

import numpy as np

from simulator import EmotionRules, cjk_share
from users.fluency import DATA, clip, tokens

BUCKETS, SIZES = 4096, (2, 3, 4)  # of hashed n-grams; their lengths in characters
NAMES = "last said scene persona heard length cut variety".split()


def letters(text: str, sizes: tuple[int, ...]) -> set[str]:
    """Character n-grams of a text, lower-cased, its white space made single."""
    text = f" {' '.join(text.lower().split())} "
    return {text[i : i + n] for n in sizes for i in range(len(text) - n + 1)}


def listen(scene: str, persona: str, said: list[str], heard: list[str], reply: str) -> tuple[list[float], list[int]]:
    """(named features 0..1 in the order of NAMES, the buckets that the reply's n-grams fall into)."""
    fives, words = letters(reply, (5,)), reply.lower().split()
    texts = (said[-1], " ".join(said), scene, persona, " ".join(heard))
    shared = [clip(2 * len(fives & letters(text, (5,))) / max(20, len(fives))) for text in texts]
    cut = float(reply.rstrip()[-1:].isalnum())
    named = [*shared, clip(len(reply) / 250), cut, len(set(words)) / max(5, len(words))]
    return named, sorted({zlib.crc32(gram.encode()) % BUCKETS for gram in letters(reply, SIZES)})


@functools.cache
def fitted() -> dict:
    """data/offline/en_shadow.json with its tables as arrays."""
    fit = json.loads((DATA / "en_shadow.json").read_text(encoding="utf-8"))
    return fit | {key: np.array(fit[key]) for key in ("named", "alone", "about")}


def change(scene: str, persona: str, said: list[str], heard: list[str], reply: str) -> float:
    """The change of emotion, -10..10, that the second ear hears in a reply."""
    fit, (named, buckets) = fitted(), listen(scene, persona, said, heard, reply)
    about, scale = max(named[1], named[2]), 1 / math.sqrt(max(20, len(buckets)))
    z = fit["intercept"] + fit["named"] @ named
    z += scale * (fit["alone"][buckets].sum() + about * fit["about"][buckets].sum())
    return 20 / (1 + math.exp(-z)) - 10


def final_emotion(row: dict) -> float:
    """Where a logged dialogue would have ended by the second ear, from the same start."""
    rules, said, heard = EmotionRules(), [], []
    emotion = row["history"][0]["emotion-point"]
    for message in row["history"]:
        if message["role"] == "user":
            if heard and "planning" in message:
                emotion = rules.step(emotion, change(row["scene"], row["player"], said, heard[:-1], heard[-1]))
            said.append(message["content"])
        else:
            heard.append(message["content"])
    return emotion


def formula(rows: list[dict]) -> dict[str, float]:
    """Of all replies of a log: the share that holds the commonest 4-gram of words, and the mean
    similarity (Jaccard, of words) between replies at the same turn to different people.
    """
    replies = [(row["id"], n, tokens(m["content"])) for row in rows
               for n, m in enumerate(m for m in row["history"] if m["role"] != "user")]
    grams = Counter(gram for _, _, words in replies for gram in set(zip(*(words[i:] for i in range(4)))))
    common = grams.most_common(1)
    words = [(who, n, set(found)) for who, n, found in replies if found]
    alike = [len(a & b) / len(a | b) for i, (p, n, a) in enumerate(words) for q, m, b in words[i + 1 : i + 200]
             if p != q and n == m]
    return {"formula/commonest": common[0][1] / len(replies) if common else 0.0,
            "formula/phrase": " ".join(common[0][0]) if common else "",
            "formula/similarity": float(np.mean(alike)) if alike else 0.0}  # fmt: skip


def second_look(rows: list[dict]) -> dict[str, float | str]:
    """`shadow`: mean final emotion of completed English dialogues by the second ear, every profile
    weighing the same; and `formula` of their replies. Empty for other languages.
    """
    own = [row for row in rows if row.get("status", "ok") == "ok" and cjk_share(row["scene"]) < 0.3]
    ends: dict[str, list[float]] = {}
    for row in own:
        ends.setdefault(row["id"], []).append(final_emotion(row))
    shadow = {"shadow": float(np.mean([np.mean(found) for found in ends.values()]))} if ends else {}
    return shadow | (formula(own) if ends else {})


def parted(evaluations: list[dict], now: dict) -> str:
    """A warning where the user's score rose and the second ear's fell since the evaluation before."""
    before = ([row for row in evaluations if "eval/shadow" in row] or [now])[-1]
    old, new = before["eval/score"], now["eval/score"]
    heard, hears = before.get("eval/shadow", 0.0), now.get("eval/shadow", 0.0)
    if new > old and hears < heard - 1:
        return (f"the score rose from {old:.1f} to {new:.1f} and the second ear fell from "
                f"{heard:.1f} to {hears:.1f}: read dialogues before you believe it")
    return ""
