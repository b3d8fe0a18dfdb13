"""Logs: scored, verified, compared; and the benchmark itself. `every_ending.jsonl` has one dialogue for each ending."""

import gzip
import json
import math
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, ScriptedUser, make_profile, tiny_raw

import config as config_module
import eval as evaluation
import train
from chat import Reply
from config import Config, InputError
from eval import main
from rollout import Dialogue, Turn, log_line
from score import by_profile, interval, mismatches, paired_bootstrap, read_log, summary
from simulator import Appraisal, EmotionRules, Failed, UserTurn

LOG = Path(__file__).parent / "every_ending.jsonl"
ENDINGS = ("content", "left", "goodbye", "max_turns", "context_full", "format", "failed")


def dialogue(index, intention, persona_type, changes, ended, start=40.0, last_unheard=False, **extra):
    """A dialogue whose user appraised each reply with one of the changes."""
    rules, emotion = EmotionRules(start=start), start
    turns = []
    for number, change in enumerate(changes, 1):
        emotion = rules.step(emotion, change)
        appraisal = Appraisal(
            "it said something", "in part", "I thought about it", "I felt it", change, {"served": 0.5}
        )
        answer = UserTurn(
            f"User line {number}, 第{number}句.",
            emotion,
            appraisal,
            rules.change(change),
            rules.ending(emotion),
            "a plan",
        )
        turns.append(Turn([1], [2, 3], [-1.0, -1.0], [0.0, 0.0], Reply([2], f"Reply {number}."), "eos", answer))
    if last_unheard:
        reply = (
            Reply([], "", "<think> and on", "thought not closed") if ended == "format" else Reply([2], "A last reply.")
        )
        turns.append(Turn([1], [2, 3, 4], [-1.0] * 3, [0.0] * 3, reply, "cap"))
    profile = make_profile(f"person-{index}", intention, persona_type, topic="ovens")
    return Dialogue((index, 0), profile, 7, UserTurn(profile.first_talk, start), turns, ended, **extra)


DIALOGUES = [
    dialogue(0, "empathy", "passive", [10, 10, 25.0, 10, 10, 10], "content"),  # 25 is more than one reply can move
    dialogue(1, "advice", "negative", [-10, -1.5, -10, -14.0], "left"),
    dialogue(2, "praise", "avoidant", [5, -5, 5], "goodbye"),
    dialogue(3, "motives", "negative", [3.5, -1.0], "max_turns", last_unheard=True),
    dialogue(4, "empathy", "negative", [10], "context_full"),
    dialogue(5, "growth", "passive", [10, 7.5], "format", last_unheard=True),
    dialogue(6, "listening", "passive", [10, 10], "failed", why="429 Too Many Requests, five times"),
]


def copy(tmp_path, change=lambda rows: None, name="copy.jsonl"):
    """The log, altered by change(rows), under another name."""
    rows = [json.loads(line) for line in LOG.read_text(encoding="utf-8").splitlines()]
    change(rows)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path = tmp_path / name
    path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    return str(path)


def test_the_log_of_every_ending_is_what_log_line_writes():
    """To make it again: python tests/test_eval.py"""
    rows = [json.loads(line) for line in LOG.read_text(encoding="utf-8").splitlines()]
    assert rows == [log_line(d, step=1) for d in DIALOGUES]
    assert tuple(row["ended"] for row in rows) == ENDINGS


# Score.


def test_score_of_every_ending(capsys):
    """Final emotions 100, 8.5, 45, 42.5, 50, 57.5; the seventh user failed and is not there."""
    assert main(["score", str(LOG), "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    mean = (100 + 8.5 + 45 + 42.5 + 50 + 57.5) / 6
    assert row == {"file": str(LOG), "n": 6, "failed": 1, "score": pytest.approx(mean), "success": 1, "failure": 1}


def test_the_table_says_who_is_left_out_and_splits_by_intention_and_persona(capsys):
    assert main(["score", str(LOG)]) == 0
    lines = capsys.readouterr().out.splitlines()
    found = {line.split("(")[0].strip().split("  ")[0]: line for line in lines}
    assert "1 of 7 dialogues FAILED and are left out" in found["all"] and "of 6" in found["all"]
    assert "75.0" in found["empathy"] and "of 2" in found["empathy"]
    assert "33.7" in found["negative"] and "of 3" in found["negative"]  # 8.5, 42.5, 50


def test_several_logs_plain_and_gzipped(tmp_path, capsys):
    packed = copy(tmp_path, name="log.jsonl.gz")
    assert main(["score", str(LOG), packed, "--json"]) == 0
    plain, zipped = json.loads(capsys.readouterr().out)
    assert zipped["file"] == packed and {**zipped, "file": ""} == {**plain, "file": ""}
    assert main(["verify", str(LOG), packed]) == 0
    assert "0 mismatches in 14 dialogues" in capsys.readouterr().out


def test_a_log_without_a_completed_dialogue_has_no_score(tmp_path, capsys):
    path = copy(tmp_path, lambda rows: rows.__delitem__(slice(0, 6)))
    assert main(["score", path, "--json"]) == 0
    out = capsys.readouterr().out
    (row,) = json.loads(out, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    assert (row["n"], row["failed"], row["score"]) == (0, 1, None)


# What SAGE published for these logs: score, success, failure.
PUBLISHED = {
    "gpt-4.1": (68.2, 35, 13),
    "claude3.7-think": (61.3, 23, 19),
    "claude3.7": (54.8, 19, 24),
    "deepseek-v3-1227": (37.6, 5, 39),
    "openai-o4mini": (35.9, 10, 48),
    "llama3.3-70b": (33.3, 7, 47),
    "qwen2.5-72b": (19.1, 4, 70),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_released_logs_give_the_published_rows_and_no_mismatch(released_data, name):
    rows = read_log(str(released_data / "sage_logs" / f"deepseek-v3__{name}.jsonl.gz"))
    score, success, failure = PUBLISHED[name]
    found = summary(rows)
    assert found["score"] == pytest.approx(score, abs=0.1)
    assert (found["n"], found["failed"], found["success"], found["failure"]) == (100, 0, success, failure)
    assert [wrong for row in rows for wrong in mismatches(row, str(row["line"]))] == []


# Verify: one altered number is found.


def set_history(index, key, value):
    def change(row):
        row["history"][index][key] = value

    return change


def set_change(index, value):
    return lambda row: row["history"][index]["planning"].update(change=value)


def update(**values):
    return lambda row: row.update(values)


# what was altered: line of the log, the alteration, what verify must say of it
ALTERED = {
    "emotion": (1, set_history(4, "emotion-point", 61.0), ["user turn 3", "61"]),
    "first emotion": (1, set_history(0, "emotion-point", 41.0), ["user turn 2", "50"]),
    "last emotion": (3, set_history(6, "emotion-point", 46.0), ["user turn 4", "46"]),
    "change": (1, set_change(2, 9.5), ["user turn 2", "49.5"]),
    "last change": (1, set_change(12, 9.5), ["user turn 7", "99.5"]),
    "change downwards": (2, set_change(8, -5.0), ["user turn 5", "13.5"]),
    "emo_point": (3, update(emo_point=46.0), ["46"]),
    "emo_state": (4, update(emo_state="Emotion-A"), ["Emotion-A", "Emotion-B"]),
    "reward": (4, update(reward=0.43), ["reward", "0.43", "0.425"]),
    "reward of a broken format": (6, update(reward=0.575), ["reward", "0.575"]),
    "content as max_turns": (1, update(ended="max_turns"), ["'max_turns'", "100"]),
    "left as goodbye": (2, update(ended="goodbye"), ["'goodbye'", "8.5"]),
    "goodbye as content": (3, update(ended="content"), ["'content'", "45"]),
    "max_turns as left": (4, update(ended="left"), ["'left'", "42.5"]),
    "context_full as format": (5, update(ended="format"), ["reward"]),
    "format as goodbye": (6, update(ended="goodbye"), ["reward"]),
    "context_full as failed": (5, update(ended="failed"), ["'failed'"]),
    "an ending that is none": (5, update(ended="bored"), ["'bored'"]),
    "a bad dialogue declared failed": (2, update(status="failed"), ["'left'"]),
    "no history": (1, update(history=[]), []),
    "turns behind the end": (1, lambda row: row["history"].extend(row["history"][-2:]), ["goes on"]),
}


@pytest.mark.parametrize("what", ALTERED)
def test_one_altered_number_is_found_with_file_line_and_turn(tmp_path, capsys, what):
    line, change, words = ALTERED[what]
    path = copy(tmp_path, lambda rows: change(rows[line - 1]), "log.jsonl.gz" if what == "emotion" else "log.jsonl")
    assert main(["verify", str(LOG), path]) == 1
    *wrong, last = capsys.readouterr().out.splitlines()
    assert last.endswith("in 14 dialogues") and not last.startswith("0 ")
    assert all(text.startswith(f"{path}:{line}: dialogue person-{line - 1}") for text in wrong)
    assert not [word for word in words if not any(word in text for text in wrong)], wrong


def test_a_difference_within_float_noise_is_none(tmp_path):
    assert main(["verify", copy(tmp_path, lambda rows: rows[2].update(emo_point=45.0 + 1e-9))]) == 0


@pytest.mark.parametrize(
    "text, words",
    [("", ["holds no dialogue"]), ("{", [":1:", "not JSON"]), ('{"id": "a"}', [":1:", "'history'"]), ("[]", [":1:"]),
     ('{"id": "a", "history": [{"role": "user", "emotion-point": 40}], "status": "ok"}', [":1:", "'emo_point'"])],
    ids=["empty", "no JSON", "no history", "a list", "no emo_point"],
)  # fmt: skip
@pytest.mark.parametrize("command", ["score", "verify"])
def test_what_is_no_log_is_named(tmp_path, text, words, command):
    path = tmp_path / "log.jsonl"
    path.write_text(text)
    with pytest.raises(InputError) as error:
        main([command, str(path)])
    assert all(word in str(error.value) for word in [str(path), *words])


# Compare.


def points(gains):
    """Two logs' final emotions by profile, which differ by these gains."""
    before = {f"p{i}": [50.0] for i in range(len(gains))}
    return before, {name: [50.0 + gain] for name, gain in zip(before, gains)}


def test_bootstrap_of_two_profiles_is_known():
    """Gains 0 and 10: a resample's mean is 0, 5 or 10 with probability 1/4, 1/2, 1/4."""
    assert paired_bootstrap(*points([0.0, 10.0])) == (5.0, 0.0, 10.0)
    assert paired_bootstrap(*points([3.0] * 5)) == (3.0, 3.0, 3.0)


def test_bootstrap_of_many_profiles_is_the_normal_interval():
    generator = random.Random(0)
    gains = [generator.gauss(4.0, 20.0) for _ in range(400)]
    mean = sum(gains) / 400
    error = math.sqrt(sum((gain - mean) ** 2 for gain in gains)) / 400
    gain, low, high = paired_bootstrap(*points(gains))
    assert gain == pytest.approx(mean)
    assert (low, high) == (pytest.approx(mean - 1.96 * error, abs=0.15), pytest.approx(mean + 1.96 * error, abs=0.15))


def test_bootstrap_is_a_function_of_its_seed():
    generator = random.Random(0)
    both = points([generator.gauss(4.0, 20.0) for _ in range(30)])
    assert paired_bootstrap(*both, samples=200, seed=1) == paired_bootstrap(*both, samples=200, seed=1)
    assert paired_bootstrap(*both, samples=200, seed=1) != paired_bootstrap(*both, samples=200, seed=2)


def test_profiles_weigh_the_same_however_many_dialogues_they_have():
    before = {"a": [0.0, 10.0, 20.0], "b": [50.0], "only here": [99.0]}
    after = {"a": [20.0], "b": [50.0, 60.0], "only there": [1.0]}
    assert paired_bootstrap(before, after)[0] == pytest.approx((10 + 5) / 2)


def test_compare_pairs_by_profile_and_leaves_failed_dialogues_out(tmp_path, capsys):
    better = copy(
        tmp_path, lambda rows: [row.update(emo_point=row["emo_point"] + 6) for row in rows[2:6]] and rows.reverse()
    )
    assert main(["compare", str(LOG), better]) == 0
    assert "difference +4.0 points" in capsys.readouterr().out  # (0 + 0 + 4 * 6) / 6
    assert by_profile(read_log(str(LOG))).keys() == {f"person-{i}" for i in range(6)}


def test_logs_that_share_no_profile_cannot_be_paired(tmp_path):
    other = copy(tmp_path, lambda rows: [row.update(id=f"other-{row['id']}") for row in rows])
    with pytest.raises(InputError, match="share no profile"):
        main(["compare", str(LOG), other])


# The benchmark.


@pytest.fixture
def bench(tmp_path, monkeypatch, one_thread):
    """Arguments of `eval.py run` for a tiny random model and two profiles; the working directory is empty."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shape.json").write_text(json.dumps(tiny_raw("qwen2")))
    (tmp_path / "system.txt").write_text("Be kind.")
    rows = [json.loads(line) for line in (ROOT / "data/en_test.jsonl").read_text().splitlines()[:2]]
    (tmp_path / "two.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [
        "run",
        "shape.json",
        "tokenizer=bytes",
        "eval_profiles=two.jsonl",
        "system=system.txt",
        "reply_tokens=12",
        "eval_dialogues=2",
    ]


def test_run_writes_dialogues_and_the_result_with_its_settings(bench, capsys):
    assert main([*bench, "out=first", "eval_seed=5"]) == 0
    rows, result = read_log("first/dialogues.jsonl"), json.loads(Path("first/result.json").read_text())
    assert [row["key"] for row in rows] == [[0, 0], [0, 1], [1, 0], [1, 1]]
    assert {key: result[key] for key in ("n", "failed", "score", "success", "failure")} == summary(rows)
    expected = dict(context_tokens=8192, precision="float32", dialogues_per_profile=2, max_turns=10, reply_tokens=12)
    expected |= dict(temperature=1.0, start_emotion=40.0, think=False, seeds=[5])
    settings = result["settings"]
    assert {key: settings[key] for key in expected} == expected and "offline" in settings["user"]
    assert settings["model"].startswith("shape.json (") and settings["profiles"].startswith("two.jsonl (")
    assert capsys.readouterr().out.rstrip().endswith(Path("first/result.txt").read_text().rstrip())
    assert main(["verify", "first/dialogues.jsonl"]) == 0


def test_twice_the_same_run_gives_the_same_dialogues_to_the_byte(bench):
    for out, more in (("first", []), ("second", []), ("other", ["eval_seed=1"])):
        main([*bench, f"out={out}", *more])
    first, second, other = (Path(out, "dialogues.jsonl").read_bytes() for out in ("first", "second", "other"))
    assert first == second
    assert first != other, "another seed, other dialogues"


def test_the_protocol_is_sages(bench, monkeypatch):
    """Emotion starts at 40, ten replies, of which the last is generated and never appraised."""
    monkeypatch.setattr(
        evaluation, "make_user", lambda config, start, mode: ScriptedUser(lambda *_: 1.0, EmotionRules(start=start))
    )
    main([*bench, "out=first"])
    for row in read_log("first/dialogues.jsonl"):
        assert [message["role"] for message in row["history"]] == ["user", "assistant"] * 10
        assert [message["emotion-point"] for message in row["history"][::2]] == [40.0 + i for i in range(10)]
        assert (row["ended"], row["emo_point"]) == ("max_turns", 49.0)


def test_failed_users_are_left_out_and_said(bench, monkeypatch):
    scripted = ScriptedUser(lambda key, turn, reply: Failed("gone") if key == (1, 0) else 1.0, EmotionRules(start=40.0))
    monkeypatch.setattr(evaluation, "make_user", lambda config, start, mode: scripted)
    main([*bench, "out=first"])
    result = json.loads(Path("first/result.json").read_text())
    assert (result["n"], result["failed"], result["score"]) == (3, 1, 49.0)
    assert "1 of 4 dialogues FAILED" in Path("first/result.txt").read_text()


def test_nothing_is_overwritten(bench):
    main([*bench, "out=first"])
    before = {path: path.read_bytes() for path in Path(".").rglob("*") if path.is_file()}
    with pytest.raises(InputError, match="first: holds an evaluation already"):
        main([*bench, "out=first"])
    assert before == {path: path.read_bytes() for path in Path(".").rglob("*") if path.is_file()}


def test_an_interrupted_benchmark_goes_on_and_asks_no_dialogue_twice(bench, monkeypatch, capsys):
    """Ctrl-C in the second repeat, a failed user before it, and half a line at the end of the log."""
    asked = []

    def speak(stop):
        def change(key, turn, reply):
            asked.append((key, turn))
            if len(asked) == stop:
                raise KeyboardInterrupt
            return Failed("gone") if stop and len(asked) == 3 else len(reply) % 5 - 2.0

        monkeypatch.setattr(evaluation, "make_user", lambda config, start, mode: ScriptedUser(change))

    command = [*bench, "slots=1", "seeds=2", "eval_max_turns=3"]
    speak(None)
    main([*command, "out=whole"])
    assert len(asked) == 2 * 4 * 2
    asked.clear()
    speak(13)
    assert main([*command, "out=first"]) == 130
    assert "the same command goes on" in capsys.readouterr().err and not Path("first/result.json").exists()
    log = Path("first/dialogues.partial.jsonl")
    ended = [json.loads(line) for line in log.read_text().splitlines()]
    assert [(row["seed"], row["key"], row["status"]) for row in ended] == [
        (1000, [0, 0], "ok"), (1000, [0, 1], "failed"), (1000, [1, 0], "ok"), (1000, [1, 1], "ok"),
        (1001, [0, 0], "ok"), (1001, [0, 1], "ok"),
    ]
    log.write_text(log.read_text() + '{"id": "half a li')
    with pytest.raises(InputError, match=r"first: was begun with temperature 1.0, not 0.5"):
        main([*command, "out=first", "eval_temperature=0.5"])
    asked.clear()
    speak(None)
    assert main([*command, "out=first"]) == 0
    assert [key for key, turn in asked if turn == 1] == [(0, 1), (1, 0), (1, 1)]
    assert Path("first/dialogues.jsonl").read_bytes() == Path("whole/dialogues.jsonl").read_bytes()
    assert not log.exists()


def test_a_benchmark_that_goes_on_keeps_the_opening_that_its_user_made(bench, monkeypatch):
    """A first line is made once for all dialogues with a profile, before the interruption and after it."""
    people, made = Path("two.jsonl"), []
    rows = [json.loads(line) for line in people.read_text().splitlines()]
    people.write_text("".join(json.dumps({k: row[k] for k in row if k != "first_talk"}) + "\n" for row in rows))

    class Inventive(ScriptedUser):
        def start(self, key, profile, seed):
            super().start(key, profile, seed)
            if profile.first_talk is None:
                made.append(key)
                self.queue[-1][2] = UserTurn(f"Opening {len(made)}.", self.rules.start)

    def stop(key, turn, reply):
        if key == (0, 1):
            raise KeyboardInterrupt
        return 1.0

    command = [*bench, "slots=1", "eval_max_turns=2", "out=first"]
    for change, code in ((stop, 130), (lambda *_: 1.0, 0)):
        monkeypatch.setattr(evaluation, "make_user", lambda config, start, mode, change=change: Inventive(change))
        assert main(command) == code
    openings = [row["history"][0]["content"] for row in read_log("first/dialogues.jsonl")]
    assert openings == ["Opening 1.", "Opening 1.", "Opening 2.", "Opening 2."]


@pytest.mark.parametrize("what, change, option", [
    ("context_tokens", None, "context_tokens=4000"), ("reply_tokens", None, "reply_tokens=13"),
    ("profiles", lambda: edit("two.jsonl", '"scene": "', '"scene": "So. '), ""),
    ("system", lambda: edit("system.txt", "kind", "cold"), ""),
    ("model", lambda: edit("shape.json", "10000.0", "20000.0"), ""), ("user", None, "eval_user_mode=challenging"),
    ("user", lambda: edit("prompts/reply.txt", "Speak", "Talk"), ""), ("user", None, "user_url=http://127.0.0.1:2/v1"),
], ids=["context", "reply", "people", "words", "weights", "mode", "prompts", "address"])  # fmt: skip
def test_an_interrupted_benchmark_is_not_blended_with_another(bench, monkeypatch, what, change, option):
    """Whatever a result depends on, behind an unchanged path too."""
    command = [*bench, "slots=1", "eval_max_turns=2", "out=first"]
    if what == "user" and not option.startswith("eval"):
        shutil.copytree(ROOT / "prompts/en/vanilla", "prompts")
        command += ["user=llm", "user_url=http://127.0.0.1:1/v1", "user_model=m", "prompts=prompts"]

    def stop(key, turn, reply):
        if key == (0, 1):
            raise KeyboardInterrupt
        return 1.0

    monkeypatch.setattr(evaluation, "make_user", lambda config, start, mode: ScriptedUser(stop))
    assert main(command) == 130
    if change:
        change()
    with pytest.raises(InputError, match=f"first: was begun with {what} .*, not .*; give another out=DIR"):
        main([*command, option] if option else command)
    assert len(read_log("first/dialogues.partial.jsonl")) == 1, "what was held is still there"


def edit(path, old, new):
    Path(path).write_text(Path(path).read_text().replace(old, new))


def test_a_kill_while_a_benchmark_goes_on_loses_no_dialogue(bench, monkeypatch):
    """The log is written aside before it replaces the old one."""

    def stop(key, turn, reply):
        if key == (1, 0):
            raise KeyboardInterrupt
        return Failed("gone") if key == (0, 1) else 1.0

    command = [*bench, "slots=1", "eval_max_turns=2", "out=first"]
    monkeypatch.setattr(evaluation, "make_user", lambda config, start, mode: ScriptedUser(stop))
    assert main(command) == 130
    before = Path("first/dialogues.partial.jsonl").read_bytes()

    def killed(*_):
        raise SystemExit("killed")

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(config_module, "sync", killed)
        main(command)
    assert Path("first/dialogues.partial.jsonl").read_bytes() == before and before.count(b"\n") == 2


def test_score_and_interval_give_every_person_the_same_weight(tmp_path):
    """One person's three dialogues end at 0, another's one at 60: the score is 30, and lies in its interval."""
    rows = [{"id": "a", "status": "ok", "emo_point": 0.0}] * 3 + [{"id": "b", "status": "ok", "emo_point": 60.0}]
    assert summary(rows)["score"] == 30 and summary(rows)["n"] == 4
    assert interval(rows) == (0.0, 60.0)
    assert paired_bootstrap(by_profile(rows), by_profile(rows))[0] == 0


def test_repeats_have_a_seed_each_and_a_row_each(bench):
    main([*bench, "out=three", "seeds=3", "eval_seed=7"])
    main([*bench, "out=one", "eval_seed=8"])
    rows, result = read_log("three/dialogues.jsonl"), json.loads(Path("three/result.json").read_text())
    expected = [(seed, i, j) for seed in (7, 8, 9) for i in (0, 1) for j in (0, 1)]
    assert [(row["seed"], *row["key"]) for row in rows] == expected
    history = lambda rows: [row["history"] for row in rows]  # noqa: E731
    assert history(rows[4:8]) == history(read_log("one/dialogues.jsonl"))
    assert [row["seed"] for row in result["seeds"]] == [7, 8, 9]
    assert result["seeds"][1] == {"seed": 8, **summary(rows[4:8])}
    low, high = result["interval"]
    points = sorted(np.mean(values) for values in by_profile(rows).values())
    assert (low, high) == pytest.approx((points[0], points[1]))  # of two profiles each is drawn twice often enough
    text = Path("three/result.txt").read_text()
    assert all(f"  seed {seed}" in text for seed in (7, 8, 9)) and f"interval {low:.1f} to {high:.1f}" in text


def test_a_benchmark_whose_users_mostly_fail_has_no_result_and_can_go_on(bench, monkeypatch, capsys):
    def speak(change):
        monkeypatch.setattr(evaluation, "make_user", lambda config, start, mode: ScriptedUser(change))

    speak(lambda key, turn, reply: Failed("server gone") if key != (0, 0) else 1.0)
    assert main([*bench, "out=first"]) == 1
    assert "3 of 4 users failed; the first: server gone" in capsys.readouterr().err
    assert not Path("first/result.json").exists()
    speak(lambda key, turn, reply: Failed("asked twice") if key == (0, 0) else 1.0)
    assert main([*bench, "out=first"]) == 0
    assert json.loads(Path("first/result.json").read_text())["failed"] == 0


def test_the_table_by_turn(capsys):
    """Mean change and emotion of those who were still talking; the failed one is not among them."""
    main(["score", str(LOG)])
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("  turn ")]
    turns = {}
    for row in DIALOGUES:
        for number, turn in enumerate(row.turns, 1):
            if row.completed and turn.user:
                turns.setdefault(number, []).append((turn.user.appraisal.change, turn.user.emotion))
    for (_, number, change, emotion, _, n), (turn, pairs) in zip(lines, turns.items(), strict=True):
        assert (int(number), int(n)) == (turn, len(pairs))
        assert float(change) == pytest.approx(sum(pair[0] for pair in pairs) / len(pairs), abs=0.051)
        assert float(emotion) == pytest.approx(sum(pair[1] for pair in pairs) / len(pairs), abs=0.051)


def test_an_evaluation_that_was_cut_off_while_it_began_is_named(bench):
    Path("first").mkdir()
    Path("first/settings.json").write_text('{"model": "sha')
    with pytest.raises(InputError, match="first/settings.json: not JSON"):
        main([*bench, "out=first"])


def test_a_run_is_evaluated_with_its_own_settings(bench, capsys):
    """No option has to be repeated; what is given wins."""
    options = dict(
        model="shape.json", tokenizer="bytes", profiles="two.jsonl", eval_profiles="two.jsonl", critic="head"
    )
    options |= dict(system="system.txt", groups=2, group_size=1, max_turns=1, reply_tokens=12, steps=1)
    train.train(Config(run="mine", eval_dialogues=2, **options), ScriptedUser())
    assert main(["run", "mine"]) == 0
    assert main(["run", "mine", "eval_dialogues=1", "out=again"]) == 0
    result, again = (json.loads(Path(out, "result.json").read_text()) for out in ("mine/eval/final", "again"))
    assert result["settings"]["model"].startswith("mine/model (") and result["settings"]["reply_tokens"] == 12
    assert (result["n"], again["n"]) == (4, 2)


def test_a_run_without_a_model_yet_is_evaluated_at_its_newest_checkpoint(bench):
    options = dict(model="shape.json", tokenizer="bytes", profiles="two.jsonl", eval_profiles="two.jsonl", lr=0.05)
    options |= dict(system="system.txt", groups=2, group_size=1, max_turns=1, reply_tokens=12, steps=1, warmup=0)
    train.train(Config(run="mine", critic="head", **options), ScriptedUser(lambda *_: -5.0))
    main(["run", "mine", "out=finished"])
    shutil.rmtree("mine/model")
    assert main(["run", "mine"]) == 0
    main(["run", "shape.json", *[f"{key}={value}" for key, value in options.items()], "out=untrained"])
    folders = ("finished", "mine/eval/step_1", "untrained")
    first, second, other = (Path(folder, "dialogues.jsonl").read_bytes() for folder in folders)
    assert first == second != other


@pytest.mark.parametrize("arguments, words", [([], "model folder"), (["steps=3"], "model folder")])
def test_run_wants_a_model(arguments, words):
    with pytest.raises(InputError, match=words):
        main(["run", *arguments])


def test_the_commands_that_there_are():
    assert list(evaluation.COMMANDS) == [
        "run", "export", "score", "verify", "compare", "gauge", "chat", "page", "report"]  # fmt: skip


if __name__ == "__main__":
    LOG.write_text(
        "".join(json.dumps(log_line(d, step=1), ensure_ascii=False) + "\n" for d in DIALOGUES), encoding="utf-8"
    )
