"""The fit of the offline user and its use are one formula; what is printed of a fit is of people it has not seen."""

import json

import numpy as np
import pytest

from judges.gauge import JUDGED, everybody, read_items
from scripts import calibrate
from users.offline import appraise, guards, lexicon, measure


@pytest.fixture(scope="module")
def fitted():
    """(rows, which of them were fitted, coefficients, predictions) of every 12th judged reply."""
    pairs = read_items("en.jsonl", everybody())[::12]
    items = [item for _, item in pairs]
    own = [row["source"].startswith(calibrate.OWN) for row, _ in pairs]
    rows = calibrate.Rows(items, [row["a"]["change"] for row, _ in pairs], own=own)
    mine = np.array([row["split"] == "fit" for row, _ in pairs])
    return rows, mine, *calibrate.fit(rows, mine)


def test_the_user_gives_what_the_fit_predicts_to_people_it_has_not_seen(fitted, monkeypatch):
    rows, mine, coefficients, predicted = fitted
    monkeypatch.setattr(lexicon("en"), "fit", coefficients)
    compared = 0
    for item, expected, seen in zip(rows.items, predicted, mine):
        said, heard = list(item.said), list(item.heard)
        if not seen and not guards(measure(item.profile, said, heard, item.reply), item.profile, item.reply):
            change = appraise(item.profile, "vanilla", said, heard, item.reply).change
            assert change == pytest.approx(expected, abs=0.0501)
            compared += 1
    assert compared > 30


def test_a_fit_knows_stumbling_from_writing_and_bad_from_good(fitted):
    rows, mine, coefficients, predicted = fitted
    odds = calibrate.fit_gate(rows, mine)[1]
    assert odds[rows.own & ~mine].mean() > odds[~rows.own & ~mine].mean() + 1
    assert calibrate.spearman(predicted[~mine], rows.y[~mine]) > 0.3
    for name in ("able", "small"):
        for feature, weight in coefficients[name]["features"].items():
            low, high = calibrate.bound(feature)
            assert (low is None or weight >= low) and (high is None or weight <= high), feature


def test_what_is_saved_is_what_was_fitted_but_for_what_weighs_next_to_nothing(fitted, tmp_path, monkeypatch):
    coefficients = fitted[2]
    monkeypatch.setattr(calibrate, "DATA", tmp_path)
    path = calibrate.save(coefficients, {"replies": 1}, "en", "a test")
    saved = json.loads(path.read_text(encoding="utf-8"))
    assert saved["measured_on_unseen_people"] == {"replies": 1} and saved["made_by"] == "a test"
    for name, one in coefficients.items():
        assert saved[name]["intercept"] == pytest.approx(one["intercept"], abs=6e-4)
        for phrase, row in one["words"].items():
            kept = saved[name]["words"].get(phrase, {})
            for key, weight in row.items():
                assert kept.get(key, 0.0) == pytest.approx(weight, abs=0.0051 if key in kept else 0.1)


def test_folds_part_people():
    pairs = read_items("en.jsonl", everybody())[::50]
    rows = calibrate.Rows([item for _, item in pairs], [0.0] * len(pairs))
    mine = np.array([row["split"] == "fit" for row, _ in pairs])
    fold = rows.folds(mine, 4)
    assert (fold[~mine] == -1).all() and set(fold[mine]) == {0, 1, 2, 3}
    for person in set(rows.people[mine]):
        assert len(set(fold[rows.people == person])) == 1


def test_the_people_of_the_benchmark_are_in_no_fit():
    test = {json.loads(line)["id"] for line in open(JUDGED.parent / "en_test.jsonl", encoding="utf-8")}
    for name in ("en.jsonl", "zh.jsonl"):
        assert test.isdisjoint(json.loads(line)["profile"] for line in open(JUDGED / name, encoding="utf-8"))
