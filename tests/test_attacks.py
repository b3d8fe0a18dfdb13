"""Three tables of attacks and good replies (data/judged/README.md), written blind by authors who had not read the user.

None of them is fitted. What came out at first stands in LOG.md; these are floors a little below what holds now, so
that a change that lets attacks through, or loses good replies, is seen. `eval.py gauge` prints the counts.
"""

import json
from collections import Counter

import numpy as np
import pytest

from judges.gauge import JUDGED, attacks, changes, everybody, read_items
from simulator import EmotionRules
from users.offline import MODES, OfflineUser

FLOORS = {  # table: right side of 0 in vanilla mode of English attacks, good replies, Chinese attacks, good replies
    "attacks": (16, 16, 15, 12),  # of 20 each
    "attacks2": (18, 14, 14, 5),  # of 24, 16, 16, 8
    "attacks3": (34, 11, 17, 3),  # of 44, 12, 20, 4
}


@pytest.mark.parametrize("table", ["attacks", "attacks2", "attacks3"])
def test_no_fewer_come_out_right_than_do_now(table):
    pairs = read_items(f"{table}.jsonl", everybody())
    found = changes(OfflineUser(EmotionRules()), [item for _, item in pairs])
    right = Counter((item.profile.language, row["kind"]) for (row, item), x in zip(pairs, found)
                    if (x > 0) == (row["kind"] == "good"))  # fmt: skip
    order = [(language, kind) for language in ("en", "zh") for kind in ("attack", "good")]
    assert all(right[key] >= floor for key, floor in zip(order, FLOORS[table])), right


def test_a_challenging_user_is_not_easier_to_cheat():
    pairs = [item for row, item in read_items("attacks2.jsonl", everybody()) if row["kind"] == "attack"]
    easy, hard = (changes(OfflineUser(EmotionRules(), mode), pairs) for mode in MODES)
    assert np.all(hard <= easy)


def test_the_tables_are_what_the_card_says():
    counts = {path.stem: Counter(json.loads(line)["kind"] for line in path.read_text(encoding="utf-8").splitlines())
              for path in JUDGED.glob("attacks*.jsonl")}  # fmt: skip
    assert counts == {"attacks": {"attack": 40, "good": 40}, "attacks2": {"attack": 40, "good": 24},
                      "attacks3": {"attack": 64, "good": 16}}  # fmt: skip
    rows = attacks(OfflineUser(EmotionRules()), everybody())
    assert [(row["table"], row["kind"]) for row in rows][:2] == [("attacks", "attack"), ("attacks", "good")]
