"""What is read from a model that plays a user: the change of emotion, the words; and the prompts it is given."""

import json

import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from server import PROMPT, prompts_folder  # noqa: F401

from config import InputError
from simulator import EmotionRules
from users.llm_user import APPRAISAL, SLOTS, SPEECH, LLMUser, load_prompts, read_change, read_fields

TOLD = "Well, this is what I say."


@pytest.mark.parametrize("text, change", [
    ("5", 5), ("+5", 5), ("＋５", 5), ("－５", -5), ("−5", -5), ("–5", -5), ("—5", -5), ("‐5", -5), ("‑5", -5),
    ("- 5", -5), ("-   5", -5), ("+5 (up from 3 to 8)", 5), ("-5（他很冷淡，扣了3分）", -5), ("[+5]", 5), ("(−3)", -3),
    ("【-4】", -4), ("**+3**", 3), ("**-**3", -3), ("-**3**", -3), ("`-7`", -7), ("$-2$", -2), (r"\-6", -6),
    ('"-8"', -8), ("5.0", 5), ("-2.5", -2.5), ("0", 0), ("100", 100), ("-100", -100), ("5, yes 5", 5), ("+5分", 5),
])  # fmt: skip
def test_a_change_is_read(text, change):
    assert read_change(text) == change


@pytest.mark.parametrize("text", [
    "", "none", "+", "nan", "True", "much better", "5 or 7", "+5 to +7", "+5 -> 35", "5/10", "101", "-250", "1e2",
    "1,000", "step3", "v2.1.3", "drops by 5", "minus 5", "下降 5", "9" * 5000,
])  # fmt: skip
def test_a_change_is_refused(text):
    with pytest.raises(ValueError):
        read_change(text)


@settings(max_examples=150, deadline=None)
@given(st.integers(-100, 100), st.sampled_from("-−–—‐‑－﹣"), st.text("*_` \t", max_size=4), st.text(" *`", max_size=3),
       st.booleans(), st.text("abc 很冷(0123", max_size=9))
def test_a_change_is_never_read_with_the_wrong_sign(number, minus, before, between, wide, note):
    digits = str(abs(number)).translate({48 + i: 0xFF10 + i for i in range(10)} if wide else {})
    text = f"{before}{minus if number < 0 else '+'}{between}{digits}{before} ({note.replace('(', '')})"
    assert read_change(text) == number


ROW = '{"content": "c", "target_completion": "t", "activity": "a", "analyse": "n", "change": %s}'


@pytest.mark.parametrize("text, change", [
    (ROW % 5, 5), (ROW % '"+5"', 5), (ROW % '"＋５ (warm)"', 5), (f"Sure!\n```json\n{ROW % -4}\n```\nDone.", -4),
    (f"<think>change: 9\n{ROW % 9}</think>{ROW % 2}", 2), (f"He feels\nchange: 9\n</think>\n{ROW % 2}", 2),
    ('{"appraisal": %s}' % (ROW % 6), 6), (f"{{draft}} {ROW % 3}", 3), (f"{ROW % 3} that is {ROW % 3}", 3),
    ('{"content": "he wrote <think> and </think>", "change": -5}', -5),
    ('{"content": "he wrote <think>", "change": -5}', -5),
    ('{"content": "line\nbreak", "change": 1}', 1), ('{"content": "{\\"change\\": 9}", "change": 1}', 1),
    ("content: c\nchange: +5 (warm)", 5), ("内容：无\n变化：＋５", 5), ("**情绪变化**：-3", -3),
    ("- **Change:** -3", -3),
    ("Emotion change: 4\nemotion change: 4", 4),
])  # fmt: skip
def test_an_appraisal_is_read(text, change):
    assert read_change(read_fields(text, APPRAISAL)["change"]) == change


@pytest.mark.parametrize("text", [
    "", "I liked it, say 5.", '{"content": "5", "analyse": "+5"}', "analyse: the change is 5", ROW % "null",
    ROW % '""', ROW % '"5 or 6"', ROW % 250, ROW % "NaN", ROW % "true", ROW % "1e400", (ROW % 5)[:-1],
    "change: 5\nchange: 6", "<think>\nchange: 5",
    f"The reply says {ROW % 10}, so {ROW % -5}", '{"change": 5' + "0" * 9000,
    '{"change": ' + "[" * 200_000, '{"response": "5"}',
])  # fmt: skip
def test_an_appraisal_is_refused(text):
    with pytest.raises(ValueError):
        read_change(read_fields(text, APPRAISAL)["change"])


@pytest.mark.parametrize("text", [
    json.dumps({"thinking": "x", "response": TOLD}), f"Response: {TOLD}", f"**回复**：{TOLD}",
    f"<think>Response: no</think>\nthinking: x\nResponse: {TOLD}",
])  # fmt: skip
def test_speech_is_read(text):
    assert read_fields(text, SPEECH)["response"] == TOLD


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=60), st.integers(-100, 100), st.text("{}[]<>thinkrespo\":,\n 5", max_size=40))
def test_any_text_in_another_field_leaves_the_change_alone_and_garbage_raises_only_valueerror(text, number, garbage):
    row = json.dumps({"content": text, "analyse": garbage, "change": number}, ensure_ascii=False)
    assert read_change(read_fields(row, APPRAISAL)["change"]) == number
    try:
        read_change(read_fields(garbage, APPRAISAL)["change"])
    except ValueError:
        pass


@pytest.mark.parametrize("name, text, words", [
    ("reply", None, ["reply.txt", "no such prompt"]), ("both", "{scene} {history}", ["both.txt", "====="]),
    ("reply", "a\n=====\nb\n=====\nc", ["reply.txt", "====="]),
    ("appraisal", PROMPT["appraisal"].replace("{reply}", ""), ["appraisal.txt", "{reply}", "missing"]),
    ("opening", "{scene} {mood}\n=====\n", ["opening.txt", "{mood}", "above", "persona"]),
    ("reply", PROMPT["reply"].replace("{scene}", "{history}"), ["reply.txt", "{history}", "above"]),
    ("both", PROMPT["both"] + "}", ["both.txt", "brace"]), ("both", PROMPT["both"] + "{", ["both.txt", "brace"]),
    ("opening", '{scene} {"response": ""}\n=====\n', ["opening.txt", "response"]),
    ("reply", PROMPT["reply"].replace("{emotion}", "{emotion:d}"), ["reply.txt", "{emotion:d}"]),
    ("reply", b"\xff\n=====\n", ["reply.txt", "UTF-8"]),
], ids=str)  # fmt: skip
def test_a_bad_prompt_is_one_line_naming_file_and_slot(folder, name, text, words):
    path = folder / f"{name}.txt"
    path.unlink()
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError) as error:
        LLMUser(None, EmotionRules(), prompts=str(folder))
    assert not [word for word in words if word not in str(error.value)] and "\n" not in str(error.value)


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("mode", ["vanilla", "challenging"])
def test_our_prompts_load_and_name_the_keys_that_are_read(language, mode):
    prompts = load_prompts(ROOT / "prompts" / language / mode)
    wanted = {"opening": SPEECH, "appraisal": APPRAISAL, "reply": SPEECH, "both": APPRAISAL + SPEECH}
    for name, (system, user) in prompts.items():
        shown = system.format_map({slot: f"<{slot}>" for slot in SLOTS[name][0]})
        assert all(f'"{key}"' in shown for key in wanted[name])
        user.format_map({slot: f"<{slot}>" for slot in SLOTS[name][1]})
