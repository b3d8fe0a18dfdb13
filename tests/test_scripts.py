"""Around a demo: batches for blind judges and their joining, the table and talks at its end, the warm-up's texts."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from config import InputError, read_rows
from judges.gauge import JUDGED, everybody
from scripts import blind, demo

PEOPLE = [person.id for person in everybody().values() if person.language == "en"][:6]


def replies(count=30):
    return [{"id": f"t{n:02}", "profile": PEOPLE[n % 6], "source": f"secret {n % 3}", "how": "",
             "said": ["Hello.", "So."], "earlier": ["Yes?"], "reply": f"reply number {n}"} for n in range(count)]


def test_each_judge_gets_every_reply_once_in_its_own_order_without_a_source(tmp_path, capsys):
    blind.write(replies(), tmp_path, 3)
    orders = {}
    for judge in "ab":
        texts = [path.read_text() for path in sorted(tmp_path.glob(f"{judge}*.txt"))]
        orders[judge] = re.findall(r"--- ITEM (\S+)", "".join(texts))
        assert len(texts) == 3 and sorted(orders[judge]) == [row["id"] for row in replies()]
        assert "secret" not in "".join(texts)
        for name in PEOPLE:  # a person's replies lie in one batch
            assert sum(f"=== PERSON {name}\n" in text for text in texts) == 1
    assert orders["a"] != orders["b"]


def judge(folder, found):
    for name in "ab":
        (folder / f"{name}0.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found[name]))


def judgement(key, **changed):
    return {"id": key, "change": -3, "soundness": 4, "why": "thin", **changed}


def test_judgements_join_their_replies(tmp_path):
    rows = replies(2)
    judge(tmp_path, {"a": [judgement("t00"), judgement("t01", change=5)], "b": [judgement("t01"), judgement("t00")]})
    joined = blind.join(rows, tmp_path)
    assert [row["a"]["change"] for row in joined] == [-3, 5] and joined[1]["b"]["why"] == "thin"


@pytest.mark.parametrize("b, said", [
    ([judgement("t00")], "t01 lacks a judgement"),
    ([judgement("t00"), judgement("t00"), judgement("t01")], "judged twice"),
    ([judgement("t00"), judgement("t99")], "unknown"),
    ([judgement("t00", change=11), judgement("t01")], "-10..10"),
    ([judgement("t00", change="3"), judgement("t01")], "-10..10"),
    ([{"id": "t00", "better": "A"}, judgement("t01")], "-10..10"),
    ([{"change": 3}, judgement("t01")], "None is unknown"),
])  # fmt: skip
def test_judgements_that_do_not_fit_are_refused(tmp_path, b, said):
    judge(tmp_path, {"a": [judgement("t00"), judgement("t01")], "b": b})
    with pytest.raises(InputError, match=said):
        blind.join(replies(2), tmp_path)


def test_blind_batches_from_the_command_line(tmp_path):
    path = tmp_path / "replies.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in replies(2)))
    command = [sys.executable, str(ROOT / "scripts" / "blind.py")]
    done = subprocess.run([*command, "write", path, tmp_path / "out"], capture_output=True, text=True)
    assert done.returncode == 0 and (tmp_path / "out" / "a0.txt").exists()
    done = subprocess.run([*command, "join", path, tmp_path / "out"], capture_output=True, text=True)
    assert done.returncode == 2 and "t00 lacks a judgement" in done.stderr and not done.stdout


def test_a_report_pairs_people_and_counts_preferences():
    def row(source, who, change):
        judgement = {"change": change, "soundness": 5, "why": ""}
        return {"source": source, "profile": who, "a": judgement, "b": {**judgement, "change": change + 1}}

    rows = [row("before", "p", -4), row("before", "q", -2)]
    rows += [row("ppo", "p", -1), row("ppo", "p", 1), row("ppo", "q", -2)]
    rows += [{"source": "ppo", "profile": who, "a": a, "b": True} for who, a in (("p", True), ("q", False))]
    before, after, gain, pairs = blind.report([rows])
    assert before == "before: 2 replies, change -2.50, soundness 5.0"
    assert after == "ppo: 3 replies, change -0.17, soundness 5.0"
    assert gain == "ppo: gain +2.00 (+0.00 to +4.00)"  # (4 + 0) / 2
    assert pairs == "ppo: preferred in 75% (50% to 100%)"


def test_runs_that_differ_in_their_number_alone_are_pooled_each_against_its_own_before():
    def rows(name, before, after):
        """Person p changes so much, q gains nothing."""
        changes = (("before", "p", before), (name, "p", after), ("before", "q", -5), (name, "q", -5))
        return [{"source": source, "profile": who, "a": judgement("", change=x), "b": judgement("", change=x)}
                for source, who, x in changes]  # fmt: skip

    files = [rows("ppo_0", -4, 2), rows("ppo_1", -6, -4), rows("grpo_0", -5, -5)]
    assert [line for line in blind.report(files) if "gain" in line] == [
        "ppo_0: gain +3.00 (+0.00 to +6.00)", "ppo_1: gain +1.00 (+0.00 to +2.00)",
        "grpo_0: gain +0.00 (+0.00 to +0.00)", "ppo, 2 runs: gain +2.00 (+0.00 to +4.00)",
        "all, 3 runs: gain +1.33 (+0.00 to +2.67)",
    ]  # fmt: skip
    with pytest.raises(InputError, match="ppo_0: in two files"):
        blind.report([*files, files[0]])


def benchmark_log(people, words, turns):
    """Three dialogues with each person, of as many appraised replies as `turns` says of each."""
    def history(who, dialogue):
        yield {"role": "user", "content": f"I am {who}.", "emotion-point": 40.0}
        for turn in range(turns[dialogue]):
            yield {"role": "assistant", "content": f"{words} {dialogue}.{turn}"}
            yield {"role": "user", "content": "Oh.", "emotion-point": 40.0, "planning": {}}
        yield {"role": "assistant", "content": "never appraised"}

    return [{"id": who, "key": [0, d], "history": list(history(who, d))} for who in people for d in range(3)]


def test_the_same_dialogues_and_turns_are_picked_of_every_log_and_pairs_beside_them(tmp_path):
    test_people = [row["id"] for _, row in read_rows(ROOT / "data" / "en_test.jsonl")][:2]
    spoken = {"before": ("old", (7, 7, 7)), "ppo_0": ("new", (7, 2, 7))}
    logs = {name: benchmark_log(test_people, *how) for name, how in spoken.items()}
    rows = blind.pick(logs)
    assert rows == blind.pick(logs)
    assert len({row["id"] for row in rows}) == len(rows) == 2 * (2 * 4 + 1)
    for who in test_people:
        mine = [row for row in rows if row["profile"] == who and "reply" in row]
        places = {name: sorted(row["how"] for row in mine if row["source"] == name) for name in logs}
        assert places["before"] == places["ppo_0"] == ["0.0", "0.5", "1.1", "2.4"]  # dialogue 1 ended early in one log
    assert all(row["reply"].split()[1] == row["how"] for row in rows if "reply" in row)
    blind.write(rows, tmp_path, 1)
    for judge in "ab":  # who prefers the later reply, wherever it stands
        text = (tmp_path / f"{judge}_pairs.txt").read_text()
        found = re.findall(r"--- PAIR (\S+)\n.*\n  REPLY A: «(\w+)", text)
        assert len(found) == 2
        better = [{"id": key, "better": "A" if first == "new" else "B"} for key, first in found]
        (tmp_path / f"{judge}_pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in better))
        each = [judgement(row["id"]) for row in rows if "reply" in row]
        (tmp_path / f"{judge}0.jsonl").write_text("".join(json.dumps(row) + "\n" for row in each))
    assert [row["a"] and row["b"] for row in blind.join(rows, tmp_path) if "after" in row] == [True, True]


# --- the demo's end

def evaluated(folder: Path, score: float, reply: str) -> Path:
    folder.mkdir()
    figures = {"score": score, "shadow": score - 1, "formula/commonest": 0.1, "formula/similarity": 0.2}
    (folder / "result.json").write_text(json.dumps(figures))
    history = [{"role": "user", "content": "Hello.", "emotion-point": 40.0},
               {"role": "assistant", "content": reply},
               {"role": "user", "content": "Oh.", "emotion-point": score, "planning": {"change": score - 40}}]
    row = dict(id="somebody", status="ok", emo_point=score, emo_state="C", history=history, task="", player="",
               scene="")
    (folder / "dialogues.jsonl").write_text(json.dumps(row) + "\n")
    return folder


def test_the_demo_ends_with_both_ears_formula_and_two_talks_side_by_side(tmp_path):
    found = ("start", 8.0, "raw"), ("before", 21.0, "I hear you."), ("after", 35.0, "You\x1b[31m did right.")
    folders = [evaluated(tmp_path / name, score, reply) for name, score, reply in found]
    text = demo.comparison(*folders)
    lines = text.splitlines()
    assert re.search(r"by the user\s+8.00\s+21.00\s+35.00", lines[1])
    assert re.search(r"second ear.*\s7.00\s+20.00\s+34.00", lines[2])
    assert "0.10" in lines[3] and "0.20" in lines[4]
    assert re.search(r"> I hear you\.\s+\|\s+> You \[31m did right", text)  # no control character
    assert "\x1b" not in text and "raw" not in text


def test_a_demo_warms_up_what_it_was_given_and_trains_from_there(tmp_path, monkeypatch, capsys):
    ran = []

    def record(*command):
        ran.append(command)
        if command[0] == "eval.py" and command[1] == "run":
            evaluated_at = tmp_path / command[-1].removeprefix("out=")
            evaluated_at.parent.mkdir(parents=True, exist_ok=True)
            evaluated(evaluated_at, 8.0, "I hear you.")

    monkeypatch.setattr(demo, "run", record)
    monkeypatch.setattr(demo, "ROOT", tmp_path)
    monkeypatch.setattr(demo, "load_profiles", lambda path: [])
    demo.main(["model=mine", "run=out", "seed=2"])
    own = ("model=mine", "run=out", "seed=2")
    assert ran[:5] == [
        ("eval.py", "run", "mine", *own, "out=out/eval/start"),
        ("scripts/warmup.py", *own, "seed=0", "out-warm-up"),
        ("eval.py", "run", "out-warm-up", *own, "out=out/eval/before"),
        ("train.py", *own, "model=out-warm-up"),
        ("eval.py", "run", "out/model", *own, "out=out/eval/after"),
    ]
    assert "second ear" in capsys.readouterr().out


def test_the_warm_up_learns_from_training_people_alone():
    rows = [row for _, row in read_rows(JUDGED / "warmup_en.jsonl")]
    assert {row["profile"] for row in rows} <= set(everybody())
    replies = [row["reply"] for row in rows]
    assert len(rows) > 1000 and all(reply.strip()[-1] in ".?!…" for reply in replies)
    assert len(set(replies)) > 0.98 * len(rows)
