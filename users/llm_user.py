"""A user that is a language model: it appraises a reply, then answers it (RLVER, section 2).

Its prompts are files (prompts/LANGUAGE/MODE/*.txt, or a folder of one's own). Its answers are read
tolerantly as to form, strictly as to the one number that becomes the reward: the policy's words
stand in the prompt and may come back in any answer, so whatever is read goes through one door,
`read_answer`, which a quoted reply cannot open.
"""

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import NamedTuple

from json_repair import repair_json

from config import InputError
from simulator import Appraisal, EmotionRules, Failed, Key, Profile, UserTurn, band, cjk_share
from users.clients import Answer, Call

APPRAISAL = ("content", "target_completion", "activity", "analyse", "change")
SPEECH = ("thinking", "response")
HOPS = {"opening": SPEECH, "appraisal": APPRAISAL, "reply": SPEECH, "both": APPRAISAL + SPEECH}
FIXED = {"persona", "persona_type", "traits", "scene", "intention"}  # slots above a prompt's line
NOW = {"history", "emotion", "band", "reply", "change", "appraisal"}  # slots below it
NEEDED = {  # slots that a prompt cannot do without
    "opening": ("scene",), "appraisal": ("scene", "intention", "history", "reply"),
    "reply": ("scene", "history", "emotion"), "both": ("scene", "intention", "history", "reply"),
}  # fmt: skip
LINE = "====="
NAMES = {  # a field's name as models write it
    "content": "content|内容", "target_completion": "target[_ ]completion|目标完成度?",
    "activity": "activity|心理活动", "analyse": "analy[sz]e|analysis|分析", "thinking": "thinking|想法",
    "change": "(?:emotion[_ ])?change|(?:情绪)?变化", "response": "response|reply|回复",
}  # fmt: skip


class Prompt(NamedTuple):
    """One hop's prompt: system and user message with slots, and the fields that it asks for."""

    system: str
    user: str
    fields: tuple[str, ...]


def prompt_folders(mode: str, own: str = "") -> dict[str, Path]:
    """The folders of prompts by language: prompts/LANGUAGE/MODE, or one of the user's own."""
    ours = Path(__file__).parent.parent / "prompts"
    return {lang: Path(own) if own else ours / lang / mode for lang in ("en", "zh")}


def load_prompts(folder: Path) -> dict[str, Prompt]:
    """A user's prompts by hop. Raises InputError for a missing file, line, slot or field."""
    prompts = {}
    for name, fields in HOPS.items():
        path = folder / f"{name}.txt"
        if not path.is_file():
            raise InputError(f"{path}: no such prompt; such a folder holds {', '.join(HOPS)}.txt")
        try:
            parts = path.read_text(encoding="utf-8").split(f"\n{LINE}\n")
        except UnicodeDecodeError as error:
            raise InputError(f"{path}: not UTF-8 ({error.reason})") from None
        if len(parts) != 2:
            raise InputError(f"{path}: one line {LINE} parts system message and user message")
        for part, slots, where in zip(parts, (FIXED, NOW), ("above", "below")):
            try:
                part.format_map(dict.fromkeys(slots, ""))
            except KeyError as slot:
                known = f"{where} {LINE}; there are {', '.join(sorted(slots))}"
                raise InputError(f"{path}: no slot {slot} {known}") from None
            except (ValueError, IndexError) as error:
                raise InputError(f"{path}: {error}; a literal brace is written twice") from None
        for slot in NEEDED[name]:
            if f"{{{slot}}}" not in "".join(parts):
                raise InputError(f"{path}: slot {{{slot}}} is missing")
        asked = tuple(key for key in fields if f'"{key}"' in parts[0])
        for key in {"change", "response"} & set(fields) - set(asked):
            raise InputError(f'{path}: does not ask for "{key}", in double quotes, above {LINE}')
        prompts[name] = Prompt(parts[0].strip(), parts[1].strip(), asked)
    return prompts


def read_answer(text: str, fields: tuple[str, ...]) -> dict[str, str]:
    """The asked-for fields of a model's answer, from one JSON object or from labelled lines.

    The only door to reward and words. Every field must be there, once, with something in it, and
    nothing but a code fence around the object; nothing is looked for inside it. Slightly broken
    JSON is repaired where the whole text names each field once and in order, since a reply that
    is quoted without escapes might bring names of its own. Raises ValueError for anything else.
    """
    text = re.sub(r"^\s*<think>.*?(?:</think>|$)", "", text, flags=re.S)
    thought, tag, rest = text.partition("</think>")  # whose opening tag was in the prompt
    text = rest if tag and "{" not in thought and not named(thought, fields) else text
    text = re.sub(r"^\s*```\w*\s|\s*```\s*$", "", text).strip()
    if not text.startswith("{"):
        row = read_labels(text, fields)
    else:
        decoder = json.JSONDecoder(strict=False, object_pairs_hook=unique)
        try:
            row, end = decoder.raw_decode(text)
        except (json.JSONDecodeError, RecursionError):
            row, end = repair(text, fields), len(text)
        if end < len(text):
            raise ValueError("something behind the JSON object")
    found = {name: row.get(name) for name in fields}
    for name, value in found.items():
        if not isinstance(value, str | int | float) or not str(value).strip():
            raise ValueError(f"no {name}")
        str(value).encode()  # half a surrogate pair is no text: a ValueError
    return {name: str(value).strip() for name, value in found.items()}


def unique(pairs: list[tuple[str, object]]) -> dict:
    """An object by the names of its fields: none twice, and no other that says anything."""
    row = {}
    for key, value in pairs:
        key = key.strip("\"'“”‘’:：* \t")
        name = next((name for name in NAMES if re.fullmatch(NAMES[name], key, re.I)), None)
        if name in row or (name is None and value != ""):
            raise ValueError("a key twice, or an unknown one")
        row |= {name: value} if name else {}
    return row


def named(text: str, fields: tuple[str, ...]) -> list[str]:
    """The fields that a text names (in any quotes, or before a colon), each time, in order."""
    key = "|".join(f"(?P<{name}>{NAMES[name]})" for name in fields)
    pattern = rf"""(?<!\w)(["'“‘`]\s*)?(?:{key})(?(1)\s*["'”’`]|["'”’`*]*\s*[:：=])"""
    return [match.lastgroup for match in re.finditer(pattern, text, re.I)]


def repair(text: str, fields: tuple[str, ...]) -> dict:
    """A slightly broken JSON object, where no field in it can be another answer's."""
    if named(text, fields) != list(fields) or "\\u" in text:
        raise ValueError("not JSON, and its fields are not named once each in order")
    if re.search(r"\d\s*$", text):  # -1 may have been going to be -10
        raise ValueError("not JSON, and it ends within a number")
    keys = "|".join(NAMES[name] for name in fields)
    # a string that was closed by a typographic quotation mark or comma
    closed = re.sub(rf"""[”"]\s*[,，]\s*(?=["“]?(?:{keys})["”]?\s*[:：])""", '", ', text)
    row = repair_json(closed, return_objects=True)
    if not isinstance(row, dict):
        raise ValueError("not JSON")
    odd = {k: v for k, v in row.items() if isinstance(v, str) and "“" not in v}
    row = unique([*(row | {k: re.sub(r"[\s}”]+$", "", v) for k, v in odd.items()}).items()])
    if "change" in fields:  # as it was written: a repair may lose a sign
        key = rf"""(?<!\w)(?:{NAMES["change"]})["'”’`*]*\s*[:：=]"""  # as in `named`
        written = re.search(rf"{key}([^,，}}\n]*)", text, re.I)
        row["change"] = written[1] if written else ""
    return row


def read_labels(text: str, fields: tuple[str, ...]) -> dict[str, str]:
    """The fields of an answer of nothing but labelled lines, in order, each with closed quotes."""
    lines = [line for line in text.splitlines() if line.strip()]
    found: dict[str, str] = {}
    for name, line in zip(fields, lines):
        label = rf"[\s\W]*(?:{NAMES[name]})[*_`\s]*[:：][*_`\s]*(.*)$"
        match = re.match(label, line, re.I)
        if match and match[1].count('"') % 2 == 0:
            found[name] = match[1]
    if len(found) < max(len(lines), len(fields)):
        raise ValueError("neither a JSON object nor labelled lines alone")
    return found


def read_change(text: str) -> float:
    """The number that a change field begins with: `＋５`, `-5 (he was cold)`, `**+3**`, `5 points`.

    Raises ValueError where it begins with none, has two, one beyond -100..100, one without a sign
    beside words that may hold it (`5 (down from 30)`), or a rise in words of falling.
    """
    text = re.sub("[‐‒–—―−➖]", "-", unicodedata.normalize("NFKC", text))
    text = re.sub(r"""[*_`~$"'\\]""", "", text)  # Markdown may stand between sign and number
    outside = re.sub(r"\([^)]*\)|\[[^\]]*\]|【[^】]*】", " ", text)
    outside = outside if outside.strip() else re.sub(r"[()\[\]【】]", " ", text)
    number = r"\d+(?:\.\d+)?(?![\w.]*\d)"
    first = re.match(rf"\s*([+-]?)\s*({number})(?![a-z]*\d)", outside, re.I)
    every = {sign + digits for sign, digits in re.findall(rf"([+-]?)\s*({number})", outside)}
    if not first or every != {first[1] + first[2]} or float(first[2]) > 100:
        raise ValueError("not one number up to 100 at the beginning of the change")
    value = float(first[1] + first[2])
    words = re.sub(r"\d|points?|pts?|[\s()\[\]【】.,。+-]|[分点點]", "", text, flags=re.I)
    falls = re.search(r"lower|drop|fall|decreas|[降减減跌]", text, re.I)
    if value > 0 and (falls or (words and not first[1])):
        raise ValueError("a number whose sign may be in words")
    return value


BYE = {
    "en": r"(?:good[ -]?bye|bye(?:[ -]bye)?|farewell|see you (?:later|soon)|talk to you later)\b",
    "zh": "(?:再[见見]|拜拜|掰掰|告[辞辭]|回头聊|下次再聊|下次聊)",
}
BESIDE = {  # what may stand beside it in a clause: "kiss that job goodbye" takes no leave
    "en": r"(?:ok(?:ay)?|well|so|then|now|for|and|thanks?|you|all|my|friend|dear|anyway|al+ ?right"
          r"|i(?:'ll|'d)?|must|should|better|go|going|will|let|me|just|it's|this|is)\b",
    "zh": "[我你您咱们先就那了吧啊呀啦咯喽囉哦嗯哈好的要得走谢该此这样也还有事朋友]",
}  # fmt: skip
TOLD = re.compile(r"\b(?:he|she|they|said|says|told|if|every time)\b|[他她说說]|要是|如果|[?？]")


def takes_leave(text: str, language: str) -> bool:
    """Whether the speaker says goodbye: in the last sentence, in a clause of nothing else."""
    text = re.sub(r"[\"“「][^\"”」]*[\"”」]", "quoted", text.lower().replace("’", "'"))
    text = re.sub(r"[^\w\s'.!?…。！？~～,;，；、:：—–-]", "", text)  # emoji, Markdown
    found = [part for part in re.findall(r"[^.!…。！~～\n]+", text) if re.search(r"\w", part)]
    last, beside = found[-1] if found else "", rf"(?:\s*{BESIDE[language]}\s*)*"
    whole = rf"{beside}(?:{BYE[language]}{beside})+"
    whole += rf"|{BYE['en']}\s+and\b.*" if language == "en" else ""
    clauses = re.split(r"[,;，；、—–]|\s-\s", last)
    return not TOLD.search(last) and any(re.fullmatch(whole, part.strip()) for part in clauses)


def out_of_role(text: str, profile: Profile) -> str:
    """What is wrong with a person's words: they name a secret, or are of another language."""
    secret = r"hidden[ _]intention|\bband [sabcf]\b|隐藏意图|[SABCF] ?档"
    if re.search(secret, text, re.I) or profile.intention_label in text:
        return "names the hidden intention or a band"
    letters = "".join(char for char in text if char.isalpha())
    chinese = cjk_share(letters)
    wrong = chinese > 0.3 if profile.language == "en" else chinese < 0.5
    return "speaks another language" if len(letters) > 3 and wrong else ""


def one_line(text: str) -> str:
    """Untrusted text for a prompt: it cannot begin another speaker's line, close the marks around
    it, or, quoted as it is in an answer, end a JSON string or begin an object.
    """
    text = " ".join(text.split()).replace("</", "< /")
    return text.translate(str.maketrans('"{}', "'()"))


def usage_metrics(parts: list[tuple[Counter, list[float]]]) -> dict[str, float]:
    """What the language models of all ranks' users were asked (`LLMUser.drain`), as metrics."""
    counts, times = sum((c for c, _ in parts), Counter()), sorted(t for _, ts in parts for t in ts)
    names = ("llm_calls", "retries", "parse_failures", "clamped", "tokens_in", "tokens_out")
    return {
        **{f"simulator/{name}": counts[name] for name in names},
        "simulator/latency_p50": median(times) if times else 0.0,
        "simulator/latency_p95": times[int(0.95 * (len(times) - 1))] if times else 0.0,
    }


@dataclass
class Session:
    """One dialogue: what was said, and how far the answer to the last reply has come."""

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
    """A user that is a language model: it appraises a reply (hop one) and answers it (hop two).

    `client` answers calls; `prompts` is a folder in place of prompts/LANGUAGE/MODE; `one_call` asks
    both hops at once, at half the latency. An answer that cannot be read, or that no such person
    would give, is asked for again up to `retries` times under another seed; then it is a failure.
    """

    SPEAKERS = {"en": ("Partner", "I"), "zh": ("对方", "我")}

    def __init__(self, client, rules: EmotionRules, mode: str = "vanilla", prompts: str = "",
                 one_call: bool = False, retries: int = 5):
        self.client, self.rules, self.one_call, self.retries = client, rules, one_call, retries
        folders = prompt_folders(mode, prompts)
        self.prompts = {language: load_prompts(folder) for language, folder in folders.items()}
        self.sessions: dict[Key, Session] = {}
        self.started: set[Key] = set()  # in this rollout
        self.ready: list[tuple[Key, UserTurn | Failed]] = []
        self.counts, self.seconds = Counter(), []  # since `drain` was last called

    def drain(self) -> tuple[Counter, list[float]]:
        """Counts, and seconds of the answered calls, since this was last called."""
        taken = self.counts, self.seconds
        self.counts, self.seconds = Counter(), []
        return taken

    def start(self, key: Key, profile: Profile, seed: int) -> None:
        if key in self.started or not self.started:  # keys are unique within a rollout: a new one
            self.client.begin()
            self.sessions, self.started, self.ready = {}, set(), []
        self.started.add(key)
        s = self.sessions[key] = Session(key, profile, seed, self.rules.start)
        if profile.first_talk is None:
            return self.ask(s, "opening")
        s.said.append(("user", profile.first_talk))
        self.ready.append((key, UserTurn(profile.first_talk, s.emotion)))

    def resume(self, key: Key, profile: Profile, said: Sequence[str], heard: Sequence[str],
               emotion: float) -> None:  # fmt: skip
        """Begin in the middle of a talk, after what was `said` and `heard`; nothing to poll."""
        self.start(key, replace(profile, first_talk=said[0]), seed=0)
        self.ready.pop()
        s = self.sessions[key]
        s.emotion = emotion
        for reply, text in zip(heard, said[1:]):
            s.said += [("partner", reply), ("user", text)]

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
        p = s.profile
        prompt, names = self.prompts[p.language][hop], self.SPEAKERS[p.language]
        fixed = dict(persona=p.persona, persona_type=p.type_label, traits=", ".join(p.traits),
                     scene=p.scene, intention=p.intention_label)
        history = "\n".join(f"{names[who == 'user']}: {one_line(text)}" for who, text in s.said)
        now = dict.fromkeys(NOW, "") | dict(history=history, reply=one_line(s.reply))
        now |= dict(emotion=f"{s.emotion:g}", band=band(s.emotion))
        if s.appraisal:
            felt = one_line(f"{s.appraisal.activity} {s.appraisal.analyse}")
            now |= dict(change=f"{s.change:+g}", appraisal=felt)
        system, user = prompt.system.format_map(fixed), prompt.user.format_map(now)
        self.client.submit(Call(s.key, s.seed, len(s.said), hop, s.attempt, system, user))

    def hear(self, s: Session, call: Call, answer: Answer) -> None:
        """An answer of the model to one hop: go on to the next, or ask again."""
        used = {name: getattr(answer, name) for name in ("tokens_in", "tokens_out", "retries")}
        self.counts.update(used, llm_calls=1 + answer.retries)
        if answer.failed:
            return self.finish(s, Failed(answer.failed))
        self.seconds += [answer.seconds] if answer.seconds else []
        try:
            found, change = self.understand(s, call, answer)
        except ValueError as error:
            self.counts["parse_failures"] += 1
            if s.attempt >= self.retries:
                why = f"the user's model could not be understood ({call.where}: {error})"
                return self.finish(s, Failed(why))
            s.attempt += 1
            return self.ask(s, call.hop)
        if change is not None:
            texts = [found.get(name, "") for name in APPRAISAL[:-1]]
            s.appraisal, s.change = Appraisal(*texts, change), self.rules.change(change)
            self.counts["clamped"] += change != s.change
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

    def understand(self, s: Session, call: Call, answer: Answer) -> tuple[dict, float | None]:
        """An answer's fields, and the change if asked for. Raises ValueError if it is of no use."""
        if answer.cut:
            raise ValueError("cut at its cap on tokens")
        language = s.profile.language
        found = read_answer(answer.text, self.prompts[language][call.hop].fields)
        change = read_change(found["change"]) if "change" in found else None
        if "response" in found:
            if wrong := out_of_role(found["response"], s.profile):
                raise ValueError(wrong)
            ended = self.rules.ending(self.rules.step(s.emotion, change or 0.0))
            first = s.attempt == 0 and self.retries > 0
            if first and not ended and takes_leave(found["response"], language):
                raise ValueError("a goodbye that the emotion forbids")  # said twice, it is one
        return found, change

    def finish(self, s: Session, answer: UserTurn | Failed) -> None:
        """Hand an answer over; a session that has ended is forgotten."""
        self.ready.append((s.key, answer))
        if isinstance(answer, Failed) or answer.ended:
            del self.sessions[s.key]
