"""The user that docs/simulators.md shows, taken from the page itself: it is thirty lines, and it trains."""

import re

import pytest
from conftest import ROOT
from runs import metrics, tiny_runs  # noqa: F401

import train
from score import mismatches, read_log

pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_documented_user_is_thirty_lines_and_trains(tiny):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/simulators.md").read_text(encoding="utf-8"), re.S)
    assert len([line for line in code.splitlines() if line.strip()]) <= 30
    names = {}
    exec(code, names)
    config = tiny(steps=2)
    train.train(config, names["Curious"](start=config.start_emotion))
    rows = read_log(f"{config.run}/dialogues.jsonl")
    assert rows and not [wrong for row in rows for wrong in mismatches(row, "")]
    changes = {(said["content"].count("?") == 1, heard["planning"]["change"]) for row in rows
               for said, heard in zip(row["history"][1::2], row["history"][2::2])}  # fmt: skip
    assert changes <= {(True, 8.0), (False, -4.0)} and changes
    assert [row["skipped"] for row in metrics(config)] == [0.0, 0.0]
