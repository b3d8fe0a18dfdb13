"""The sentient user that is a language model: it appraises a reply, then answers it (RLVER and SAGE,
section 2).

Here live its two hops, how its prompts are read (prompts/LANGUAGE/MODE/*.txt, or a folder of one's own),
and how its answers are understood: tolerant of form, strict about the one number that becomes the reward.
The policy's words stand in the prompt and may come back in any answer. So whatever is read goes through
one door (`read_answer`), which a quoted reply cannot open.
"""

import json
import re
import unicodedata
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from json_repair import repair_json

from config import InputError
from simulator import (
    INTENTIONS,
    LANGUAGES,
    PERSONA_TYPES,
    Appraisal,
    EmotionRules,
    Failed,
    Key,
    Profile,
    UserTurn,
    band,
    cjk_share,
)
from users.clients import Answer, Call

APPRAISAL = ("content", "target_completion", "activity", "analyse", "change")
SPEECH = ("thinking", "response")
HOPS = {"opening": SPEECH, "appraisal": APPRAISAL, "reply": SPEECH, "both": APPRAISAL + SPEECH}
FIXED = {"persona", "persona_type", "traits", "scene", "intention"}  # slots above the line of a prompt
NOW = {  # slots below it
    "opening": {"emotion", "band"}, "appraisal": {"history", "emotion", "band", "reply"},
    "reply": {"history", "emotion", "band", "reply", "change", "appraisal"},
    "both": {"history", "emotion", "band", "reply"},
}  # fmt: skip
NEEDED = {  # slots that a prompt cannot do without
    "opening": {"scene"}, "appraisal": {"scene", "intention", "history", "reply"},
    "reply": {"scene", "history", "emotion"}, "both": {"scene", "intention", "history", "reply"},
}  # fmt: skip
LINE = "====="
NAMES = {  # a field's name as models write it
    "content": "content|内容", "target_completion": "target[_ ]completion|目标完成度?", "activity": "activity|心理活动",
    "analyse": "analyse|分析", "change": "(?:emotion )?change|(?:情绪)?变化", "thinking": "thinking|想法",
    "response": "response|reply|回复",
}  # fmt: skip


class Prompt(NamedTuple):
    """One hop's prompt: system and user message with slots, and the fields that its answer is asked for."""

    system: str
    user: str
    fields: tuple[str, ...]


def prompt_folders(mode: str) -> dict[str, Path]:
    """Our folders of prompts by language: prompts/LANGUAGE/MODE."""
    return {lang: Path(__file__).parent.parent / "prompts" / lang / mode for lang in LANGUAGES}


def load_prompts(folder: Path) -> dict[str, Prompt]:
    """A user's prompts by hop. Raises InputError for a missing file, line, slot or field."""
    prompts = {}
    for name, fields in HOPS.items():
        path = folder / f"{name}.txt"
        if not path.is_file():
            raise InputError(f"{path}: no such prompt; a folder of prompts holds {', '.join(HOPS)}.txt")
        try:
            parts = path.read_text(encoding="utf-8").split(f"\n{LINE}\n")
        except UnicodeDecodeError as error:
            raise InputError(f"{path}: not UTF-8 ({error.reason})") from None
        if len(parts) != 2:
            raise InputError(f"{path}: one line {LINE} parts the system message from the user message")
        for part, slots, where in zip(parts, (FIXED, NOW[name]), ("above", "below")):
            try:
                part.format_map(dict.fromkeys(slots, ""))
            except KeyError as slot:
                known = ", ".join(sorted(slots))
                raise InputError(f"{path}: no slot {slot} {where} {LINE}; known there are {known}") from None
            except (ValueError, IndexError) as error:
                raise InputError(f"{path}: {error}; a literal brace is written twice") from None
        for slot in sorted(slot for slot in NEEDED[name] if f"{{{slot}}}" not in "".join(parts)):
            raise InputError(f"{path}: slot {{{slot}}} is missing")
        asked = tuple(key for key in fields if f'"{key}"' in parts[0])
        for key in {"change", "response"} & set(fields) - set(asked):
            raise InputError(f"{path}: does not ask for \"{key}\", in double quotes, above {LINE}")
        prompts[name] = Prompt(parts[0].strip(), parts[1].strip(), asked)
    return prompts


def read_answer(text: str, fields: tuple[str, ...]) -> dict[str, str]:
    """The asked-for fields of a model's answer, from one JSON object or from labelled lines.

    The only door to reward and words. Every field must be there, once, with something in it, and what
    stands outside the object may name none of them. Slightly broken JSON is repaired where the whole
    text names each field once and in order, since a reply that is quoted without escapes might bring
    names of its own. Nothing is looked for inside an object. Raises ValueError for anything else.
    """
    if not text.startswith(("{", "`")):  # else a tag in it is quoted from the talk
        text = re.sub(r"^.*?</think>|^<think>.*", "", text, flags=re.S).strip()
    begin = text.find("{")
    if begin < 0:
        row, outside = read_labels(text, fields), ""
    else:
        try:
            row, end = json.JSONDecoder(strict=False, object_pairs_hook=unique).raw_decode(text, begin)
            outside = text[:begin] + "\n" + text[end:]
        except (json.JSONDecodeError, RecursionError):
            row, outside = repair(text[begin:], fields), text[:begin]
    if named(outside, fields):
        raise ValueError("a field outside the JSON object")
    found = {name: row.get(name) for name in fields}
    for name, value in found.items():
        if not isinstance(value, str | int | float) or not str(value).strip():
            raise ValueError(f"no {name}")
    return {name: str(value).strip() for name, value in found.items()}


def unique(pairs: list[tuple[str, object]]) -> dict:
    """A JSON object with keys in the usual form, none of them twice."""
    row = {re.sub(r"\s+", "_", key.strip().lower()): value for key, value in pairs}
    if len(row) < len(pairs):
        raise ValueError("a key twice")
    return row


def named(text: str, fields: tuple[str, ...]) -> list[str]:
    """The fields that a text names as keys (in quotes, or with a colon behind), each time, in order."""
    key = "|".join(f"(?P<{name}>{NAMES[name]})" for name in fields)
    found = re.finditer(rf"""(?<!\w)(["“]\s*)?(?:{key})(?(1)\s*["”]|["”]?\s*[:：])""", text, re.I)
    return [match.lastgroup for match in found]


def repair(text: str, fields: tuple[str, ...]) -> dict:
    """A slightly broken JSON object, where nothing in it can be taken for another answer's field."""
    if named(text, fields) != list(fields):
        raise ValueError("not JSON, and its fields are not named once each in order")
    if re.search(r"\d\s*$", text):  # -1 may have been going to be -10
        raise ValueError("not JSON, and it ends within a number")
    keys = "|".join(NAMES[name] for name in fields)
    text = re.sub(r"\s*```\s*$", "", text)
    text = re.sub(rf"""[”"]\s*[,，]\s*(?=["“]?(?:{keys})["”]?\s*[:：])""", '", ', text)  # typographic marks
    row = repair_json(text, return_objects=True)
    if not isinstance(row, dict):
        raise ValueError("not JSON")
    row = unique(list(row.items()))
    return {k: v if not isinstance(v, str) or "“" in v else re.sub(r"[\s}”]+$", "", v) for k, v in row.items()}


def read_labels(text: str, fields: tuple[str, ...]) -> dict[str, str]:
    """The fields of an answer that is nothing but labelled lines, in order, each on one line, quotes closed."""
    lines = [line for line in text.splitlines() if line.strip()]
    found: dict[str, str] = {}
    for name, line in zip(fields, lines):
        match = re.match(rf"[\s\W]*(?:{NAMES[name]})[*_`\s]*[:：][*_`\s]*(.*)$", line, re.I)
        if not match or match[1].count('"') % 2:
            break
        found[name] = match[1]
    if len(found) < len(lines) or len(found) < len(fields):
        raise ValueError("neither a JSON object nor labelled lines alone")
    return found


def read_change(text: str) -> float:
    """The number in a change field: `+5`, `＋５`, `-5 (he was cold)`, `**+3**`, `5 points`.

    Raises ValueError for no number, two different ones, one beyond -100..100, or one without a sign
    beside words that may hold it: `declines by 5`, `5 (down from 30)`.
    """
    text = re.sub("[‐‒–—―−➖]", "-", unicodedata.normalize("NFKC", text))
    text = re.sub(r"""[*_`~$"'\\]""", "", text)  # Markdown may stand between sign and number
    text = re.sub(r"([+-])\s+(?=\d)", r"\1", text)
    outside = re.sub(r"\([^)]*\)|\[[^\]]*\]", " ", text)
    number = r"(?<![\w.])[+-]?\d+(?:\.\d+)?(?![\w.]*\d)"
    found = re.findall(number, outside) or re.findall(number, text)
    values = {float(written) for written in found}
    if len(values) != 1:
        raise ValueError("two different numbers in the change" if values else "no number in the change")
    (value,) = values
    if abs(value) > 100:
        raise ValueError(f"a change of {value:g}")
    if value and not found[0].startswith(("+", "-")):
        if re.sub(number, "", re.sub(r"points?|pts?|[\s()\[\]【】.,。]|[分点點]", "", text, flags=re.I)):
            raise ValueError("a number without a sign, beside words")
    return value


BYE = {
    "en": r"(?:good ?bye|bye(?:[ -]bye)?|farewell|see you (?:later|soon|around)|talk to you later)\b",
    "zh": "(?:再见|拜拜|告辞|回头聊|下次再聊|下次聊)",
}
# All that may stand beside it in a clause: "he said goodbye" and "kiss that job goodbye" take no leave.
BESIDE = {
    "en": r"(?:ok(?:ay)?|well|so|then|now|for|and|thanks?|you|all|my|friend|dear|anyway|al+ ?right|i(?:'ll|'d)?"
          r"|must|have|to|got|should|better|go|going|will|say|let|me|just|it's|time|i guess|good|night)\b",
    "zh": "[我你您咱们先就那了吧啊呀哦嗯哈好的要得走谢该此这样也还有事]",
}  # fmt: skip


def takes_leave(text: str, language: str) -> bool:
    """Whether the speaker says goodbye to the partner: in the last sentence, in a clause of that alone."""
    text = re.sub(r"[\"“「][^\"”」]*[\"”」]", "quoted", text.lower().replace("’", "'"))
    sentences = [part for part in re.split(r"[.!?…。！？~\n]+", text) if part.strip()] or [""]
    bye, beside = BYE[language], rf"(?:\s*{BESIDE[language]}\s*)*"
    clauses = re.split(r"[,;:，；：、—–]|\s-\s", sentences[-1])
    whole = rf"{beside}\b{bye}{beside}|\s*{bye}\s+and\b.*" if language == "en" else f"{beside}{bye}{beside}"
    return any(re.fullmatch(whole, clause.strip()) for clause in clauses)


LEAK = re.compile(r"hidden[ _]intention|\bband [sabcf]\b|隐藏意图|[SABCF] ?档|情绪(?:档位|数值)", re.I)


def out_of_role(text: str, profile: Profile) -> str:
    """What is wrong with the words of a person: they name what only we know, or are of another language."""
    if LEAK.search(text) or any(label in text for label in INTENTIONS[profile.intention]):
        return "names the hidden intention or a band"
    letters = "".join(char for char in text if char.isalpha())
    chinese = cjk_share(letters)
    wrong = chinese > 0.3 if profile.language == "en" else chinese < 0.5
    return "speaks another language" if len(letters) > 3 and wrong else ""


def one_line(text: str) -> str:
    """Untrusted text for a prompt: it can neither begin a line of another speaker, nor close the marks around
    it, nor, where an answer quotes it as it is, end a JSON string or begin an object."""
    text = " ".join(text.split()).replace("</", "< /")
    return text.translate(str.maketrans('"{}', "'()"))


@dataclass
class Session:
    """One dialogue of an LLMUser: what was said, and how far the answer to the last reply has come."""

    key: Key
    profile: Profile
    seed: int
    emotion: float
    said: list[tuple[str, str]] = field(default_factory=list)  # (who, text)
    reply: str = ""
    appraisal: Appraisal | None = None
    change: float | None = None
    attempt: int = 0


class LLMUser:
    """The sentient user of RLVER and SAGE: a language model that appraises a reply (hop one) and answers it
    (hop two).

    `client` answers calls; `prompts` is a folder of prompts in place of prompts/LANGUAGE/MODE; `one_call`
    asks both hops at once, at half the latency. An answer that cannot be read, or that no such person would
    give, is asked for again up to `retries` times under another seed; then the dialogue has failed.
    """

    SPEAKERS = {"en": ("Partner", "I"), "zh": ("对方", "我")}

    def __init__(self, client, rules: EmotionRules, mode: str = "vanilla", prompts: str = "",
                 one_call: bool = False, retries: int = 5):
        self.client, self.rules, self.one_call, self.retries = client, rules, one_call, retries
        folders = {lang: Path(prompts) for lang in LANGUAGES} if prompts else prompt_folders(mode)
        self.prompts = {lang: load_prompts(folder) for lang, folder in folders.items()}
        self.sessions: dict[Key, Session] = {}
        self.started: set[Key] = set()  # in this rollout
        self.ready: list[tuple[Key, UserTurn | Failed]] = []

    def start(self, key: Key, profile: Profile, seed: int) -> None:
        if key in self.started or not self.started:  # keys are unique within a rollout: this is a new one
            self.client.begin()
            self.sessions, self.started, self.ready = {}, set(), []
        self.started.add(key)
        s = self.sessions[key] = Session(key, profile, seed, self.rules.start)
        if profile.first_talk is None:
            return self.ask(s, "opening")
        s.said.append(("user", profile.first_talk))
        self.ready.append((key, UserTurn(profile.first_talk, s.emotion)))

    def tell(self, key: Key, reply: str) -> None:
        s = self.sessions[key]
        s.reply, s.attempt = reply, 0
        self.ask(s, "both" if self.one_call else "appraisal")

    def poll(self, timeout: float) -> list[tuple[Key, UserTurn | Failed]]:
        for call, answer in self.client.poll(0.0 if self.ready else timeout):
            s = self.sessions.get(call.key)
            if s and (s.seed, len(s.said), s.attempt) == (call.seed, call.turn, call.attempt):
                self.hear(s, call, answer)
        ready, self.ready = self.ready, []
        return ready

    def ask(self, s: Session, hop: str) -> None:
        """Put one hop to the model."""
        p, prompt, speakers = s.profile, self.prompts[s.profile.language][hop], self.SPEAKERS[s.profile.language]
        label = 0 if p.language == "zh" else 1
        who = dict(persona=p.persona, persona_type=PERSONA_TYPES[p.persona_type][label],
                   traits=", ".join(p.traits), scene=p.scene, intention=INTENTIONS[p.intention][label])
        history = "\n".join(f"{speakers[who == 'user']}: {one_line(text)}" for who, text in s.said)
        now = dict(history=history, emotion=f"{s.emotion:g}", band=band(s.emotion), reply=one_line(s.reply))
        if s.appraisal:
            felt = one_line(f"{s.appraisal.activity} {s.appraisal.analyse}")
            now |= dict(change=f"{s.change:+g}", appraisal=felt)
        system = prompt.system.format_map(who)
        user = prompt.user.format_map({slot: now.get(slot, "") for slot in NOW[hop]})
        self.client.submit(Call(s.key, s.seed, len(s.said), hop, s.attempt, system, user))

    def hear(self, s: Session, call: Call, answer: Answer) -> None:
        """An answer of the model to one hop: go on to the next, or ask again."""
        if answer.failed:
            return self.finish(s, Failed(answer.failed))
        try:
            found, change = self.understand(s, call, answer)
        except ValueError as error:
            self.client.usage.add(parse_failures=1)
            if s.attempt >= self.retries:
                why = f"the user's model could not be understood ({call.where}: {error})"
                return self.finish(s, Failed(why))
            s.attempt += 1
            return self.ask(s, call.hop)
        if change is not None:
            texts = [found.get(name, "") for name in APPRAISAL[:-1]]
            s.appraisal, s.change = Appraisal(*texts, change), self.rules.change(change)
            self.client.usage.add(clamped=int(change != s.change))
            s.emotion, s.attempt = self.rules.step(s.emotion, change), 0
            if call.hop == "appraisal":
                return self.ask(s, "reply")
        text = found["response"]
        ended = self.rules.ending(s.emotion) if s.appraisal else None
        if s.appraisal and not ended and takes_leave(text, s.profile.language):
            ended = "goodbye"
        turn = UserTurn(text, s.emotion, s.appraisal, s.change, ended, found.get("thinking", ""))
        s.said += [("partner", s.reply)] * bool(s.appraisal) + [("user", text)]
        s.reply, s.appraisal, s.change, s.attempt = "", None, None, 0
        self.finish(s, turn)

    def understand(self, s: Session, call: Call, answer: Answer) -> tuple[dict[str, str], float | None]:
        """The fields of an answer, and the change if it was asked for. Raises ValueError where it is none."""
        if answer.cut:
            raise ValueError("cut at its cap on tokens")
        fields = self.prompts[s.profile.language][call.hop].fields
        found = read_answer(answer.text, fields)
        change = read_change(found["change"]) if "change" in fields else None
        if "response" in fields:
            if wrong := out_of_role(found["response"], s.profile):
                raise ValueError(wrong)
            emotion = s.emotion if change is None else self.rules.step(s.emotion, change)
            leaves = takes_leave(found["response"], s.profile.language) and not self.rules.ending(emotion)
            if leaves and s.attempt == 0 and self.retries:
                raise ValueError("a goodbye that the emotion forbids")  # said twice, it is one
        return found, change

    def finish(self, s: Session, answer: UserTurn | Failed) -> None:
        """Hand an answer over; a session that has ended is forgotten."""
        self.ready.append((s.key, answer))
        if isinstance(answer, Failed) or answer.ended:
            del self.sessions[s.key]
