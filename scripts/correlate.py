"""Rank correlation of the offline user's appraisal with the logged changes of an LLM user.

    python scripts/correlate.py ../shared/data/sage_logs/*.gz

Every scored reply of the logs is appraised on its own, with the dialogue up to it as context;
printed are Spearman's rank correlation over all replies and by hidden intention, and how often the
signs agree. Nothing is fitted here.
"""

import sys
from collections import defaultdict
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from config import read_rows
from simulator import parse_profile
from users.offline import appraise, user_hash


def ranks(values: list[float]) -> np.ndarray:
    """Ranks with ties sharing their mean rank."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def spearman(pairs: list[tuple[float, float]]) -> float:
    ours, logged = zip(*pairs)
    return float(np.corrcoef(ranks(ours), ranks(logged))[0, 1])


def replies(path: str):
    """(profile, user texts so far, earlier replies, reply, logged change) of every scored reply of
    a log.
    """
    for where, row in read_rows(Path(path)):
        keys = {
            "id": row["id"],
            "player": row["player"],
            "scene": row["scene"],
            "task": row["task"],
        }
        profile = parse_profile(keys | {"main_cha": row["character"], "language": "zh"}, where)
        said, heard = [], []
        for turn, after in zip(row["history"], row["history"][1:] + [{}]):
            if turn["role"] == "user":
                said.append(turn["content"])
                continue
            if "planning" in after:
                yield (
                    profile,
                    list(said),
                    list(heard),
                    turn["content"],
                    float(after["planning"]["change"]),
                )
            heard.append(turn["content"])


def main(paths: list[str]) -> None:
    pairs = defaultdict(list)
    for path in paths:
        for profile, said, heard, reply, change in replies(path):
            ours = appraise(profile, "challenging", said, heard, reply).change
            for group in ("overall", profile.intention, Path(path).name.removesuffix(".jsonl.gz")):
                pairs[group].append((ours, change))
    print(f"user {user_hash()}")
    for group, values in pairs.items():
        sign = np.mean([(a > 0) == (b > 0) for a, b in values])
        ours, logged = np.mean(values, axis=0)
        print(
            f"{group:36} n {len(values):5}  spearman {spearman(values):+.3f}  same sign {sign:.2f}  "
            f"mean {ours:+.2f} logged {logged:+.2f}"
        )


if __name__ == "__main__":
    main(sys.argv[1:])
