"""The offline user says today what it said before: appraisals, emotions and words of 50 dialogues, in both languages
and both modes, kept in golden_appraisals.jsonl. Whoever changes the user on purpose raises its
VERSION and writes them anew:

    python tests/test_golden.py
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from simulator import EmotionRules, parse_profile  # noqa: E402
from users.offline import MODES, OfflineUser  # noqa: E402

GOLDEN, COUNT = HERE / "golden_appraisals.jsonl", 25  # replies in each language


def chosen() -> list[dict]:
    """The first dialogues of attacks.jsonl in each language, attacks and good replies by turns."""
    file = HERE.parent / "data" / "judged" / "attacks.jsonl"
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    found = []
    for language in ("en", "zh"):
        kinds = [[r for r in rows if r["language"] == language and r["kind"] == kind] for kind in ("attack", "good")]
        found += [row for pair in zip(*kinds) for row in pair][:COUNT]
    return found


def held(row: dict, mode: str) -> dict:
    """What the user answers to all replies of a row."""
    user, key, turns = OfflineUser(EmotionRules(start=60.0), mode), (0, 0), []
    user.start(key, parse_profile(row["profile"], row["id"]), seed=3)
    for reply in [None, *row["earlier"], row["reply"]]:
        if reply is not None:
            user.tell(key, reply)
        turns += [asdict(turn) for _, turn in user.poll(0.0)]
        if turns[-1]["ended"]:
            break
    return {"id": row["id"], "mode": mode, "turns": turns}


@pytest.mark.parametrize("mode", MODES)
def test_appraisals_and_words_are_the_golden_ones(mode):
    golden = [json.loads(line) for line in GOLDEN.read_text(encoding="utf-8").splitlines()]
    rows = chosen()
    assert len(rows) == 2 * COUNT
    assert [held(row, mode) for row in rows] == [row for row in golden if row["mode"] == mode]


if __name__ == "__main__":
    lines = [json.dumps(held(row, mode), ensure_ascii=False) for mode in MODES for row in chosen()]
    GOLDEN.write_text("\n".join(lines) + "\n", encoding="utf-8")
