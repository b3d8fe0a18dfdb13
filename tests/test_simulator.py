"""Profiles, the rules of emotion, bands: everything about people that does not depend on who plays them."""

import json
import re
from collections import Counter

import pytest
from conftest import ROOT
from hypothesis import example, given
from hypothesis import strategies as st

from config import InputError
from simulator import INTENTIONS, PERSONA_TYPES, EmotionRules, band, cjk_share, load_profiles

ROW = {"id": "a", "player": "Ada, 30, baker.", "scene": "My oven broke.", "main_cha": "passive", "task": "empathy"}
OURS = {"en_train": 48, "en_test": 24, "zh_train": 16, "zh_test": 8}


def written(tmp_path, *rows):
    """A profile file of these rows: dicts as JSON, strings as they are."""
    path = tmp_path / "people.jsonl"
    path.write_text(
        "\n".join(row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows) + "\n",
        encoding="utf-8",
    )
    return path


def load_one(tmp_path, **changes):
    return load_profiles(written(tmp_path, {**ROW, **changes}))[0]


def test_a_profile_keeps_what_its_line_says(tmp_path):
    profile = load_one(tmp_path, first_talk="Hi.", topic="work", cha_group=["gruff", "shy"], language="zh")
    assert (profile.id, profile.persona, profile.scene) == ("a", ROW["player"], ROW["scene"])
    assert (profile.intention, profile.persona_type, profile.first_talk) == ("empathy", "passive", "Hi.")
    assert (profile.topic, profile.traits, profile.language) == ("work", ("gruff", "shy"), "zh")


def test_what_is_optional_may_be_absent(tmp_path):
    profile = load_one(tmp_path)
    assert (profile.first_talk, profile.topic, profile.traits, profile.language) == (None, "", (), "en")


@pytest.mark.parametrize("canonical, labels", INTENTIONS.items(), ids=str)
def test_intentions_in_chinese_and_english(tmp_path, canonical, labels):
    assert {load_one(tmp_path, task=label).intention for label in (canonical, *labels)} == {canonical}


@pytest.mark.parametrize("canonical, labels", PERSONA_TYPES.items(), ids=str)
def test_persona_types_in_chinese_and_english(tmp_path, canonical, labels):
    assert {load_one(tmp_path, main_cha=label).persona_type for label in (canonical, *labels)} == {canonical}


@pytest.mark.parametrize(
    "scene, language",
    [
        ("我的烤箱坏了。", "zh"),
        ("My oven broke.", "en"),
        ("My WeChat name is 面包, that is all there is to say.", "en"),
    ],
)
def test_language_by_the_share_of_chinese_characters(tmp_path, scene, language):
    assert load_one(tmp_path, player=scene, scene=scene).language == language


def test_cjk_share_counts_visible_characters():
    assert cjk_share("面 包\n ab") == 0.5
    assert cjk_share("") == 0.0


@pytest.mark.parametrize(
    "row, fragments",
    [
        ("{", ["not JSON", "column"]),
        ("[1, 2]", ["list"]),
        ({k: v for k, v in ROW.items() if k != "scene"}, ["'scene'", "missing"]),
        ({**ROW, "id": "b", "scene": "  "}, ["'scene'", "something in it"]),
        ({**ROW, "id": "b", "first_talk": ""}, ["'first_talk'"]),
        ({**ROW, "id": 7}, ["'id'", "string"]),
        ({**ROW, "id": "b", "cha_group": "gruff"}, ["'cha_group'", "list of strings"]),
        ({**ROW, "id": "b", "task": "sympathy"}, ["'task'", "'sympathy'", "did you mean 'empathy'"]),
        ({**ROW, "id": "b", "main_cha": "cheerful"}, ["'main_cha'", "'cheerful'"]),
        ({**ROW, "id": "b", "language": "fr"}, ["'language'", "'fr'", "en, zh"]),
        ({**ROW, "id": "b", "sceen": "x"}, ["'sceen'", "did you mean 'scene'"]),
        (ROW, ["'a'", "line 1"]),
    ],
)
def test_a_wrong_line_is_named_with_file_line_and_key(tmp_path, row, fragments):
    path = written(tmp_path, ROW, "", row)
    with pytest.raises(InputError) as error:
        load_profiles(path)
    message = str(error.value)
    assert message.startswith(f"{path}:3: ") and "\n" not in message
    for fragment in fragments:
        assert fragment in message


def test_a_line_ends_at_a_newline_and_nowhere_else(tmp_path):
    """U+2028 and U+0085 may stand raw in a JSON string; str.splitlines would cut there."""
    path = written(tmp_path, {**ROW, "scene": "one\u2028two\u0085three"}, {**ROW, "id": "b"})
    assert [profile.scene for profile in load_profiles(path)] == ["one\u2028two\u0085three", ROW["scene"]]


def test_missing_and_empty_files_are_named(tmp_path):
    with pytest.raises(InputError, match="nobody.jsonl: no such profile file"):
        load_profiles(tmp_path / "nobody.jsonl")
    with pytest.raises(InputError, match="people.jsonl: holds no profile"):
        load_profiles(written(tmp_path, "", "  "))


def test_a_file_that_is_not_utf8_is_named(tmp_path):
    path = tmp_path / "latin.jsonl"
    path.write_bytes(json.dumps({**ROW, "player": "Zoë"}, ensure_ascii=False).encode("latin-1"))
    with pytest.raises(InputError, match="latin.jsonl"):
        load_profiles(path)


# How often each intention and persona type occurs in the released profiles, test and train.
RELEASED = {
    "intention": dict(
        praise=(13, 57),
        listening=(12, 63),
        empathy=(13, 64),
        agreement=(11, 66),
        analysis=(12, 66),
        advice=(15, 58),
        motives=(11, 60),
        growth=(13, 66),
    ),
    "persona_type": dict(negative=(41, 183), passive=(34, 174), avoidant=(25, 143)),
}


@pytest.mark.parametrize("which, index, openings", [("test", 0, 100), ("train", 1, 0)])
def test_the_released_profiles_load_with_the_published_counts(released_data, which, index, openings):
    profiles = load_profiles(released_data / f"rlver_{which}_profiles.jsonl")
    for name, counts in RELEASED.items():
        assert Counter(getattr(p, name) for p in profiles) == {key: count[index] for key, count in counts.items()}
    assert sum(p.first_talk is not None for p in profiles) == openings
    assert {p.language for p in profiles} == {"zh"}
    assert all(len(p.traits) == 3 for p in profiles)


# The rules of emotion.

emotions = st.floats(0, 100)
changes = st.floats(-1e6, 1e6)


@given(emotions, changes)
def test_one_reply_moves_emotion_at_most_ten_points_and_never_out_of_range(emotion, change):
    after = EmotionRules().step(emotion, change)
    assert 0 <= after <= 100
    assert abs(after - emotion) <= 10 + 1e-9
    assert (after - emotion) * change >= 0, "never against the appraisal"


@given(st.floats(10, 90), st.floats(-10, 10))
def test_inside_the_limits_the_change_is_applied_as_it_is(emotion, change):
    assert EmotionRules().step(emotion, change) == emotion + change


@given(emotions, changes, changes)
def test_a_better_appraisal_never_gives_a_lower_emotion(emotion, a, b):
    rules = EmotionRules()
    assert rules.step(emotion, min(a, b)) <= rules.step(emotion, max(a, b))


@pytest.mark.parametrize("raw, applied", [(25, 10), (10, 10), (9.5, 9.5), (0, 0), (-10, -10), (-11, -10)])
def test_changes_are_limited_to_ten(raw, applied):
    assert EmotionRules().change(raw) == applied


@pytest.mark.parametrize(
    "emotion, letter, ended",
    [(100, "S", "content"), (99.9, "A", None), (70, "A", None), (69.9, "B", None), (40, "B", None),
     (39.9, "C", None), (10, "C", None), (9.9, "F", "left"), (0, "F", "left")],
)  # fmt: skip
def test_bands_and_endings_are_sages(emotion, letter, ended):
    assert band(emotion) == letter
    assert EmotionRules().ending(emotion) == ended


@given(emotions)
@example(99.5)
@example(9.5)
def test_a_dialogue_ends_exactly_in_the_bands_s_and_f(emotion):
    assert (EmotionRules().ending(emotion) is not None) == (band(emotion) in "SF")


# Our own profiles.


def ours(name):
    return load_profiles(ROOT / "data" / f"{name}.jsonl")


def sentences(text):
    return [part.strip() for part in re.split(r"(?<=[.!?])\s+|(?<=[。！？])|\n", text) if part.strip()]


@pytest.mark.parametrize("name, count", OURS.items())
def test_our_profiles_are_complete(name, count):
    profiles = ours(name)
    assert len(profiles) == count
    assert {p.language for p in profiles} == {name[:2]}
    pairs = Counter((p.intention, p.persona_type) for p in profiles)
    assert len(pairs) == (24 if name.startswith("en") else len(pairs)), "every combination of 8 intentions and 3 types"
    assert {intention for intention, _ in pairs} == set(INTENTIONS), "every intention in every set"
    assert max(pairs.values()) - min(pairs.values()) <= 1 or name.startswith("zh"), "balanced"
    assert all(p.traits and p.topic for p in profiles)
    assert all((p.first_talk is not None) == (name != "zh_train") for p in profiles), (
        "a fixed opening, but for the Chinese training people, who make their own"
    )


@pytest.mark.parametrize("name", OURS)
def test_our_scenes_are_neither_short_nor_long(name):
    for p in ours(name):
        length = len(p.scene.split()) if p.language == "en" else len(re.sub(r"\s", "", p.scene))
        assert 120 <= length <= 200, f"{p.id}: {length}"


@pytest.mark.parametrize("language", ["en", "zh"])
def test_nobody_is_in_both_train_and_test(language):
    train, test = ours(f"{language}_train"), ours(f"{language}_test")
    for name in ("id", "persona", "scene"):
        assert not {getattr(p, name) for p in train} & {getattr(p, name) for p in test}

    def who(profiles):  # the words before the first comma name the person
        return {re.split("[,，]", p.persona)[0].strip() for p in profiles}

    assert not who(train) & who(test)


def test_no_sentence_is_written_twice():
    where = {}
    for name in OURS:
        for p in ours(name):
            for sentence in sentences(f"{p.persona}\n{p.scene}\n{p.first_talk or ''}"):
                assert where.setdefault(sentence, p.id) is p.id, f"{p.id} and {where[sentence]}: {sentence}"


def test_a_scene_never_says_the_intention_label():
    for name in OURS:
        for p in ours(name):
            text = f"{p.persona} {p.scene} {p.first_talk}"
            assert not any(label in text for label in INTENTIONS[p.intention]), p.id
