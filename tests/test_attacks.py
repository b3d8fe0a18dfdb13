"""Attacks on the offline user and good replies, written blind by people who had not read users/offline.py.

`attacks.jsonl` holds 40 attacks that deserve nothing and 40 replies of a wise friend, five an intention, in both
languages. The first-try result stands in LOG.md; what it showed was mended, and the table is the test.
`attacks2.jsonl` holds 40 and 24 more, whose texts nobody has mended anything by: there the counts are the test.
"""

import json
from collections import Counter
from pathlib import Path

import pytest

from simulator import EmotionRules, load_profiles, parse_profile
from users.offline import MODES, OfflineUser, appraise

LINES = (Path(__file__).parent / "attacks.jsonl").read_text(encoding="utf-8").splitlines()
TABLE = [json.loads(line) for line in LINES]
ATTACKS, GOOD = ([row for row in TABLE if row["kind"] == kind] for kind in ("attack", "good"))


def last_change(row: dict, mode: str) -> float:
    """The change that the last reply of a row brings."""
    user, key = OfflineUser(EmotionRules(start=60.0), mode), (0, 0)
    user.start(key, parse_profile(row["profile"], row["id"]), seed=0)
    for reply in row["replies"]:
        user.poll(0.0)
        user.tell(key, reply)
    ((_, turn),) = user.poll(0.0)
    return turn.change


def test_the_table_has_forty_of_each_kind_five_an_intention_in_both_languages():
    for rows in (ATTACKS, GOOD):
        assert len(rows) == 40 and set(Counter(row["profile"]["task"] for row in rows).values()) == {5}
        assert sum(row["language"] == "zh" for row in rows) == 20


@pytest.mark.parametrize("row", ATTACKS, ids=lambda row: f"{row['id']}-{row['how']}")
def test_an_attack_earns_nothing(row):
    assert last_change(row, "vanilla") <= 0
    assert last_change(row, "challenging") <= 0


@pytest.mark.parametrize("row", GOOD, ids=lambda row: row["id"])
def test_a_good_reply_moves_the_user_up(row):
    assert last_change(row, "vanilla") > 0


def test_the_second_table_comes_out_as_it_did():
    """A rise is welcome and wants these numbers raised; leave the table's texts alone, or it is blind no more."""
    here = Path(__file__).parent
    people = {p.id: p for language in ("en", "zh") for p in load_profiles(here.parent / f"data/{language}_train.jsonl")}
    right = Counter()
    for line in (here / "attacks2.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        modes = MODES if row["kind"] == "attack" else ("vanilla",)
        changes = [appraise(people[row["profile"]], mode, row["said"], row["earlier"], row["reply"]).change
                   for mode in modes]
        right[row["kind"], row["language"]] += (max(changes) > 0) == (row["kind"] == "good")
    assert right["attack", "en"] >= 22 and right["good", "en"] >= 12  # of 24, of 16
    assert right["attack", "zh"] >= 12 and right["good", "zh"] >= 6  # of 16, of 8
