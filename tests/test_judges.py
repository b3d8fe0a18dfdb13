"""What judges users: the gauge's figures by brute force and with toy users, and the second ear."""

import dataclasses
import json
import math
from itertools import product

import numpy as np
import pytest

import eval as evaluation
from judges import gauge, shadow
from judges.gauge import APART, LADDER, Item, best_script, bootstrap, out_of_order, sage_figures, spearman, turns
from simulator import Appraisal, EmotionRules, Failed, UserTurn


class Toy:
    """A user whose change is `points(said, heard, reply)`."""

    def __init__(self, points, resumes=True):
        self.points, self.rules, self.talks, self.ready = points, EmotionRules(start=40.0), {}, []
        if resumes:
            self.resume = self.begin

    def begin(self, key, profile, said, heard, emotion):
        self.talks[key] = [list(said), list(heard), emotion]

    def start(self, key, profile, seed):
        self.begin(key, profile, [profile.first_talk], [], 40.0)
        self.ready.append((key, UserTurn(profile.first_talk, 40.0)))

    def tell(self, key, reply):
        said, heard, emotion = self.talks[key]
        raw = self.points(said, heard, reply)
        if raw is None:
            return self.ready.append((key, Failed("gone")))
        heard.append(reply), said.append(f"answer {len(heard)}")
        emotion = self.talks[key][2] = self.rules.step(emotion, raw)
        change, ended = self.rules.change(raw), self.rules.ending(emotion)
        self.ready.append((key, UserTurn(said[-1], emotion, Appraisal("", "", "", "", raw), change, ended)))

    def poll(self, timeout):
        ready, self.ready = sorted(self.ready, key=lambda pair: pair[0]), []
        return ready


def people(n=3):
    return list(gauge.everybody().values())[:n]


def item(person, reply, heard=()):
    return Item(person, (person.first_talk, *(f"answer {n + 1}" for n in range(len(heard)))), tuple(heard), reply)


def test_rank_correlation_by_brute_force():
    a, b = [3, 1, 1, 5, 2.5], [2, 2, 0, 9, -4]

    def rank(values):  # the mean place among all orders of equals
        return [sum(y < x for y in values) + (sum(y == x for y in values) - 1) / 2 for x in values]

    assert spearman(a, b) == pytest.approx(np.corrcoef(rank(a), rank(b))[0, 1])
    given, (x, y) = [1, 2, 3, 4, 5], (rank(a), rank(b))
    xy, xz, yz = (np.corrcoef(p)[0, 1] for p in ((x, y), (x, given), (y, given)))
    assert spearman(a, b, given) == pytest.approx((xy - xz * yz) / math.sqrt((1 - xz**2) * (1 - yz**2)))
    assert math.isnan(spearman(a, [1] * 5))


def test_the_interval_is_over_people_each_weighing_the_same():
    mean, low, high = bootstrap({"a": [0.0] * 99, "b": [4.0]})
    assert (mean, low, high) == (2.0, 0.0, 4.0)


@pytest.mark.parametrize("resumes", [True, False])
def test_replies_are_judged_where_they_stood(resumes):
    seen = []

    def points(said, heard, reply):
        seen.append((len(said), list(heard), reply))
        return None if reply == "fail" else len(heard) + len(reply)

    a, b, _ = people()
    found = turns(Toy(points, resumes), [item(a, "x", ["p", "q"]), item(b, "yy"), item(a, "fail")])
    assert [turn and turn.change for turn in found] == [3, 2, None]
    assert (3, ["p", "q"], "x") in seen


def rungs(**changed):
    names = ["silence", *LADDER]
    lines = [{"name": name, "mean": float(n), "low": n - 0.4, "high": n + 0.4} for n, name in enumerate(names)]
    return [line | changed.get(line["name"].replace(" ", "_"), {}) for line in lines]


def test_every_disorder_of_the_ladder_is_named():
    assert out_of_order(rungs()) == []
    [wrong] = out_of_order(rungs(echo={"mean": 1.0, "low": 0, "high": 1.1}))
    assert "shuffled words" in wrong and "echo" in wrong
    for lower, upper in APART:
        [wrong] = out_of_order(rungs(**{lower.replace(" ", "_"): {"high": 99.0}}))
        assert "meet" in wrong and lower in wrong and upper in wrong


def test_the_best_script_is_found_where_greed_alone_fails(monkeypatch):
    monkeypatch.setattr(gauge, "SCRIPT", 2)
    worth = {"bait": 2.0, "a": 1.0, "b": 1.0, "c": 0.0}

    def points(said, heard, reply):
        if heard == ["bait"]:
            return -4.0 if reply == "b" else -5.0
        return 9.0 if heard == ["a"] and reply == "b" else worth[reply]

    bank, who = list(worth), people()
    every = {script: 40 + points([], [], script[0]) + points([], [script[0]], script[1])
             for script in product(bank, repeat=2) if script[0] != script[1]}  # fmt: skip
    found = best_script(Toy(points), who, bank)
    assert found == {"final": 50.0, "script": ["a", "b"]} and found["final"] == max(every.values())


def test_a_talk_that_has_ended_is_left_alone(monkeypatch):
    monkeypatch.setattr(gauge, "SCRIPT", 5)
    found = best_script(Toy(lambda said, heard, reply: -9.0), people(), [*"abcde"])
    assert found["final"] == 4.0  # 31, 22, 13, 4: left


def test_a_user_that_hears_what_the_judges_hear(monkeypatch):
    pairs = [pair for pair in gauge.read_items("en.jsonl", gauge.everybody()) if pair[0]["split"] == "validate"]
    given = {(item.said, item.heard, item.reply): gauge.judged(row) for row, item in pairs}
    toy = Toy(lambda said, heard, reply: given.get((tuple(said), tuple(heard), reply), -9.9))
    found = gauge.changes(toy, [item for _, item in pairs])
    j = gauge.agreement(pairs, found)
    assert j["spearman"] == pytest.approx(1, abs=1e-3) and j["error"] == pytest.approx(0, abs=0.05)
    assert {row["name"] for row in j["sources"]} == {row["source"] for row, _ in pairs}
    steps = gauge.ladder(toy, pairs, found)
    assert [line["name"] for line in steps] == ["silence", *LADDER] and steps[0]["mean"] == pytest.approx(-9.9)
    assert all(line["judges"] == pytest.approx(np.mean([gauge.judged(row) for row, _ in pairs
               if row["source"] in LADDER[line["name"]]])) for line in steps[1:])  # fmt: skip


@pytest.mark.parametrize("points, code", [(-1.0, 1), (None, 0)])
def test_the_command_ends_with_1_where_a_rung_is_out_of_order(points, code, monkeypatch, capsys):
    pairs = gauge.read_items("en.jsonl", gauge.everybody())
    order = {source: n for n, sources in enumerate(LADDER.values()) for source in sources}
    given = {(item.said, item.heard, item.reply): order.get(row["source"], 0) - 5.0 for row, item in pairs}
    toy = Toy(lambda said, heard, reply: points or given.get((tuple(said), tuple(heard), reply), -9.0))
    monkeypatch.setattr(gauge, "make_user", lambda *_: toy)
    assert evaluation.main(["gauge", "user=offline", "script=off", "--json"]) == code
    table = json.loads(capsys.readouterr().out)
    assert bool(table["wrong"]) == bool(code) and "script" not in table


def test_agreement_with_logs_by_hand():
    a, b, _ = people()
    items = [Item(a, ("x",), (), "1"), Item(a, ("x",), (), "2"), Item(b, ("x",), (), "3"),
             Item(b, ("x", "y"), ("r",), "4", 60.0)]  # fmt: skip
    real, model = np.array([5.0, 0.0, 1.0, -5.0]), np.array([*"mnmn"])
    s = sage_figures(items, real, model, np.array([1.0, 2.0, 3.0, -3.0]))
    assert (s["pairs"], s["pair_count"], s["mean"], s["real_mean"]) == (0.0, 1, 0.75, 0.25)
    assert s["ranking"] == pytest.approx(1) and s["first"] == pytest.approx(spearman([1, 2, 3], [5, 0, 1]))


# --- the second ear

def talk(person, replies):
    history = [{"role": "user", "content": person.first_talk, "emotion-point": 40.0}]
    for n, reply in enumerate(replies):
        history += [{"role": "assistant", "content": reply},
                    {"role": "user", "content": f"answer {n}", "emotion-point": 0.0, "planning": {"change": 0}}]
    return {"id": person.id, "scene": person.scene, "player": person.persona, "history": history, "status": "ok"}


def test_the_second_ear_hears_a_log_reply_by_reply():
    a, *_ = people()
    replies, emotion = ["You found the crack.", "I am a potato.", "They owe you thanks for it."], 40.0
    said = [a.first_talk, "answer 0", "answer 1"]
    for n, reply in enumerate(replies):
        x = shadow.change(a.scene, a.persona, said[: n + 1], replies[:n], reply)
        assert -10 <= x <= 10
        emotion = max(0.0, min(100.0, emotion + x))
    assert shadow.final_emotion(talk(a, replies)) == pytest.approx(emotion)
    other = talk(a, [])
    assert shadow.final_emotion(other) == 40.0


def test_the_change_is_the_fitted_sum_by_brute_force():
    a, *_ = people()
    fit = shadow.fitted()
    named, buckets = shadow.listen(a.scene, a.persona, [a.first_talk], [], "You found it, and nobody thanked you.")
    assert all(0 <= x <= 1 for x in named) and len(named) == len(shadow.NAMES)
    z = fit["intercept"] + sum(w * x for w, x in zip(fit["named"], named))
    z += sum(fit["alone"][b] + max(named[1:3]) * fit["about"][b] for b in buckets) / math.sqrt(max(20, len(buckets)))
    found = shadow.change(a.scene, a.persona, [a.first_talk], [], "You found it, and nobody thanked you.")
    assert found == pytest.approx(20 / (1 + math.exp(-z)) - 10)


def test_measures_of_formula_by_hand():
    a, b, c = people()
    rows = [talk(a, ["so sorry to hear that", "one two"]), talk(b, ["so sorry to hear it"]), talk(c, ["nothing alike"])]
    found = shadow.formula(rows)
    assert found["formula/phrase"] == "so sorry to hear" and found["formula/commonest"] == 2 / 4
    assert found["formula/similarity"] == pytest.approx((4 / 6 + 0 + 0) / 3)


def test_a_second_look_weighs_people_the_same_and_leaves_failures_out():
    a, b, _ = people()
    rows = [talk(a, []), talk(a, []), talk(b, ["Hm."]), talk(b, ["x"]) | {"status": "failed"}]
    ends = [shadow.final_emotion(row) for row in rows[1:3]]
    assert shadow.second_look(rows)["shadow"] == pytest.approx(np.mean(ends))
    zh = dataclasses.asdict(next(p for p in gauge.everybody().values() if p.language == "zh"))
    assert shadow.second_look([rows[0] | {"scene": zh["scene"]}]) == {}


def test_a_warning_where_one_rises_and_the_other_falls():
    def row(score, ear):
        return {"eval/score": score, "eval/shadow": ear}

    assert "second ear" in shadow.parted([row(20, 20), {"step": 3}], row(30, 15))
    assert not shadow.parted([], row(30, 15)) and not shadow.parted([row(20, 20)], row(30, 25))
    assert not shadow.parted([row(20, 20)], row(10, 15))
    assert not shadow.parted([{"eval/score": 20}], {"eval/score": 30})  # no English dialogue
