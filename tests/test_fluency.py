"""How people talk: the trigram model against brute force, and what it tells apart."""

import json
import math
import random
from pathlib import Path

import pytest

from users.fluency import AGAINST, DATA, EXPECTED, blank, naturalness, salad, sentences, speech, tokens

FILE = Path(__file__).parents[1] / "data" / "judged" / "attacks.jsonl"
ROWS = [json.loads(line) for line in FILE.read_text(encoding="utf-8").splitlines()]
GOOD = {x: [row for row in ROWS if row["kind"] == "good" and row["language"] == x] for x in ("en", "zh")}


def brute_force(words: list[str], corpus: list[list[str]], against: float) -> list[float]:
    """Witten-Bell by counting the whole corpus anew for every word; words are padded with two `<`.

    `against` times the word's unigram log-probability is taken off.
    """
    result = []
    for i in range(2, len(words)):
        p, steps = 1e-6, []
        for n in range(3):
            context = words[i - n : i]
            after = [part[j] for part in corpus for j in range(2, len(part)) if part[j - n : j] == context]
            if after:
                p = (after.count(words[i]) + len(set(after)) * p) / (len(after) + len(set(after)))
            steps.append(math.log(p))
        result.append(steps[2] - against * steps[0])
    return result


@pytest.mark.parametrize("language, sentence", [
    ("en", "You waited for her all night."), ("en", "No wonder you feel angry, and tired."),
    ("zh", "你等了她一整夜。"),
])
def test_naturalness_is_witten_and_bell_by_brute_force(language, sentence):
    model = speech(language)
    lines = (DATA / f"{language}_talk.txt").read_text(encoding="utf-8").splitlines()
    known = [["<", "<", *(w if w in model.known else blank(w) for w in tokens(part, commas=True)), ">"]
             for line in lines for part in sentences(line)]
    words = tokens(sentence, commas=True)
    assert all(word in model.known for word in words)
    counted = brute_force(["<", "<", *words, ">"], known, AGAINST[language])
    expected = [min(EXPECTED[language], x) for x in counted]
    assert naturalness(sentence, set(), language, cut=False) == pytest.approx(expected)
    assert naturalness(sentence, set(), language, cut=True) == pytest.approx(expected[:-1])


def test_a_word_of_the_story_costs_less_than_an_everyday_word_and_that_less_than_an_unknown_one():
    text = "You kept the {} for her."
    known = naturalness(text.format("harpsichord"), {"harpsichord"}, "en", cut=False)
    common = naturalness(text.format("temperature"), set(), "en", cut=False)
    unknown = naturalness(text.format("harpsichord"), set(), "en", cut=False)
    assert known[3] > unknown[3] and sum(known) > sum(common) > sum(unknown)


@pytest.mark.parametrize("language", ["en", "zh"])
def test_shuffled_good_replies_sound_less_like_talk(language):
    rng, worse = random.Random(0), 0
    for row in GOOD[language]:
        story = {*tokens(row["profile"]["scene"]), *tokens(row["profile"]["first_talk"])}
        words = tokens(row["reply"])
        shuffled = rng.sample(words, len(words))
        plain, mixed = (sum(naturalness(" ".join(x), story, language, cut=True)) for x in (words, shuffled))
        worse += mixed < plain
    assert worse >= 0.95 * len(GOOD[language])


def test_salad_needs_more_than_a_few_words():
    assert salad([-30.0], 1, "en") > salad([-5.0], 1, "en") == 0.0
    assert salad([-9.0] * 30, 1, "en") == 1.0 > salad([-8.0] * 2, 1, "en") > 0.0
    assert salad([], 1, "en") == 0.0


def test_the_talk_holds_no_line_twice():
    for language in ("en", "zh"):
        lines = (DATA / f"{language}_talk.txt").read_text(encoding="utf-8").splitlines()
        assert len(lines) == len(set(lines)) >= 700 and all(line == line.strip() != "" for line in lines)
