"""The sentient user that is a language model: it appraises a reply, then answers it (RLVER and SAGE, section 2).

Here live its two hops, how its prompts are read (prompts/LANGUAGE/MODE/*.txt, or a folder of one's own), and how its
answers are understood: tolerant of form, strict about the one number that becomes the reward. Who generates the text is
`clients.py`'s business, who the person is `simulator.py`'s.
"""

import json
import re
import string
import unicodedata
from dataclasses import dataclass, field
from pathlib import Path

from config import InputError
from simulator import INTENTIONS, PERSONA_TYPES, Appraisal, EmotionRules, Failed, Key, Profile, UserTurn, band
from users.clients import Answer, Call

# A user that says one of these takes its leave (rule 7), unless it tells of somebody's: "he never said goodbye".
GOODBYE = {
    "en": re.compile(
        r"(?<!\bsay )(?<!\bsaid )(?<!\bsaying )(?<!\ba )(?<!\bthe )(?<!\bmy )(?<!\bour )(?<!\blast )"
        r"\b(?:good ?bye|bye|farewell|see you (?:later|soon|around)|talk to you later)\b", re.I),
    "zh": re.compile("(?<![说没不能])再见(?![到面过她他])|拜拜|告辞|回头聊|下次再聊|下次聊"),
}  # fmt: skip
SLOTS = {  # file: slots above the line (constant over a dialogue), slots below it
    name: ({"persona", "persona_type", "traits", "scene", "intention"}, below) for name, below in {
        "opening": {"emotion", "band"}, "appraisal": {"history", "emotion", "band", "reply"},
        "reply": {"history", "emotion", "band", "reply", "change", "appraisal"},
        "both": {"history", "emotion", "band", "reply"}}.items()
}
NEEDED = {"opening": {"scene"}, "appraisal": {"scene", "intention", "history", "reply"},
          "reply": {"scene", "history", "emotion"}, "both": {"scene", "intention", "history", "reply"}}
APPRAISAL = ("content", "target_completion", "activity", "analyse", "change")
SPEECH = ("thinking", "response")
LABELS = {"change": "change|emotion change|情绪变化|变化", "response": "response|reply|回复"}
FALLS = re.compile("minus|negativ|decreas|drop|fell|fall|down|lower|los[est]|less|worse|[减降负跌扣]", re.I)
LINE = "====="


def load_prompts(folder: Path) -> dict[str, tuple[str, str]]:
    """A user's prompts by name, each (system, user). Raises InputError for a missing file, line or slot."""
    prompts = {}
    for name, allowed in SLOTS.items():
        path = folder / f"{name}.txt"
        if not path.is_file():
            raise InputError(f"{path}: no such prompt; a folder of prompts holds {', '.join(SLOTS)}.txt")
        try:
            parts = path.read_text(encoding="utf-8").split(f"\n{LINE}\n")
        except UnicodeDecodeError as error:
            raise InputError(f"{path}: not UTF-8 ({error.reason})") from None
        if len(parts) != 2:
            raise InputError(f"{path}: one line {LINE} parts the system message from the user message")
        used = set()
        for part, slots, where in zip(parts, allowed, ("above", "below")):
            try:
                fields = [item[1:] for item in string.Formatter().parse(part) if item[1] is not None]
            except ValueError as error:
                raise InputError(f"{path}: {error}; a literal brace is written twice") from None
            found = {slot + (spec and f":{spec}") + (f"!{how}" if how else "") for slot, spec, how in fields}
            for slot in sorted(found - slots):
                raise InputError(f"{path}: slot {{{slot}}} {where} {LINE}; known there are {', '.join(sorted(slots))}")
            used |= found
        for slot in sorted(NEEDED[name] - used):
            raise InputError(f"{path}: slot {{{slot}}} is missing")
        prompts[name] = (parts[0].strip(), parts[1].strip())
    return prompts


def read_fields(text: str, fields: tuple[str, ...]) -> dict[str, str]:
    """The wanted fields of a model's answer as text: from a JSON object anywhere in it, else from labelled lines.

    A think block is cut off first. Raises ValueError where the last field that matters is not to be found.
    """
    text = text.strip()
    if not text.startswith(("{", "`")):  # else a tag in it is quoted from the talk
        text = re.sub(r"^.*?</think>|^<think>.*", "", text, flags=re.S)
    rows, at = [], 0
    while (at := text.find("{", at)) >= 0:
        try:
            row, end = json.JSONDecoder(strict=False).raw_decode(text, at)
        except (ValueError, RecursionError):
            at += 1
            continue
        wanted = any(name in row for name in LABELS)
        rows += [row] if wanted else []
        at = end if wanted else at + 1  # what is wanted may lie within another object
    found = {}
    for name in fields if rows else ():
        values = list(dict.fromkeys(str(row[name]).strip() for row in rows if row.get(name) is not None))
        if len(values) > 1 and name in LABELS:  # one of them may be quoted from the policy, who knows which
            raise ValueError(f"two objects that differ in {name!r}")
        found[name] = values[0] if values else ""
    if rows:
        return found
    for name in fields:
        label = LABELS.get(name, name.replace("_", "[_ ]"))
        values = re.findall(rf"^[\s\W]*(?:{label})[*_`\s]*[:：][*_`\s]*(.*)$", text, re.I | re.M)
        if len(set(values)) > 1 and name in LABELS:
            raise ValueError(f"two fields {name!r}")
        found[name] = values[0].strip() if values else ""
    if not any(found[name] for name in fields if name in LABELS):
        raise ValueError("neither a JSON object nor labelled lines")
    return found


def read_change(text: str) -> float:
    """The number in a change field: `+5`, `＋５`, `-5 (he was cold)`, `**+3**`. Only this field is read for it.

    Raises ValueError for no number, two different ones, one beyond -100..100, or `drops by 5`, whose sign is a word.
    """
    text = re.sub("[‐‒–—―−➖]", "-", unicodedata.normalize("NFKC", text))
    text = re.sub(r"""[*_`~$"'\\]""", "", text)  # Markdown may stand between sign and number
    text = re.sub(r"([+-])\s+(?=\d)", r"\1", text)
    outside = re.sub(r"\([^)]*\)|\[[^\]]*\]", " ", text)
    found = [re.findall(r"(?<![\w.])[+-]?\d+(?:\.\d+)?(?![\w.]*\d)", part) for part in (outside, text)]
    part, written = (outside, found[0]) if found[0] else (text, found[1])
    numbers = {float(number) for number in written}
    if len(numbers) != 1:
        raise ValueError("no number in the change" if not numbers else "two different numbers in the change")
    (number,) = numbers
    if abs(number) > 100:
        raise ValueError(f"a change of {number:g}")
    if number > 0 and "+" not in part and FALLS.search(part):
        raise ValueError("a fall in words without a minus")
    return number


def one_line(text: str) -> str:
    """Untrusted text for a prompt: it can neither begin a line of another speaker nor close the marks around it."""
    return " ".join(text.split()).replace("</", "< /")


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
    """The sentient user of RLVER and SAGE: a language model that appraises a reply (hop one) and answers it (hop two).

    `client` answers calls; `prompts` is a folder of prompts in place of prompts/LANGUAGE/MODE; `one_call` asks
    both hops at once, at half the latency. An answer that cannot be read is asked again up to `retries` times under
    another seed; then the dialogue has failed. Sources: RLVER, section 2; SAGE, section 2.
    """

    NAMES = {"en": ("Partner", "I"), "zh": ("对方", "我")}

    def __init__(self, client, rules: EmotionRules, mode: str = "vanilla", prompts: str = "", one_call: bool = False,
                 retries: int = 5):
        self.client, self.rules, self.one_call, self.retries = client, rules, one_call, retries
        ours = Path(__file__).parent.parent / "prompts"
        self.prompts = {lang: load_prompts(Path(prompts) if prompts else ours / lang / mode) for lang in self.NAMES}
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
            return self.ask(s, "opening", SPEECH)
        s.said.append(("user", profile.first_talk))
        self.ready.append((key, UserTurn(profile.first_talk, s.emotion)))

    def tell(self, key: Key, reply: str) -> None:
        s = self.sessions[key]
        s.reply, s.attempt = reply, 0
        self.ask(s, "both", APPRAISAL + SPEECH) if self.one_call else self.ask(s, "appraisal", APPRAISAL)

    def poll(self, timeout: float) -> list[tuple[Key, UserTurn | Failed]]:
        for call, answer in self.client.poll(0.0 if self.ready else timeout):
            s = self.sessions.get(call.key)
            if s and (s.seed, len(s.said), s.attempt) == (call.seed, call.turn, call.attempt):
                self.hear(s, call, answer)
        ready, self.ready = self.ready, []
        return ready

    def ask(self, s: Session, hop: str, fields: tuple[str, ...]) -> None:
        """Put one hop to the model."""
        p, names = s.profile, self.NAMES[s.profile.language]
        label = 0 if p.language == "zh" else 1
        system, user = self.prompts[p.language][hop]
        who = dict(persona=p.persona, persona_type=PERSONA_TYPES[p.persona_type][label], traits=", ".join(p.traits),
                   scene=p.scene, intention=INTENTIONS[p.intention][label])
        history = "\n".join(f"{names[speaker == 'user']}: {one_line(text)}" for speaker, text in s.said)
        now = dict(history=history, emotion=f"{s.emotion:g}", band=band(s.emotion), reply=one_line(s.reply))
        if s.appraisal:
            now |= dict(change=f"{s.change:+g}", appraisal=f"{s.appraisal.activity} {s.appraisal.analyse}")
        user = user.format_map({slot: now.get(slot, "") for slot in SLOTS[hop][1]})
        self.client.submit(Call(s.key, s.seed, len(s.said), hop, s.attempt, system.format_map(who), user, fields))

    def hear(self, s: Session, call: Call, answer: Answer) -> None:
        """An answer of the model to one hop: go on to the next, or ask again."""
        if answer.failed:
            return self.finish(s, Failed(answer.failed))
        try:
            found = read_fields(answer.text, call.fields)
            change = read_change(found["change"]) if "change" in call.fields else None
            if "response" in call.fields and not found["response"]:
                raise ValueError("nothing was said")
        except ValueError as error:
            self.client.usage.add(parse_failures=1)
            if s.attempt >= self.retries:
                return self.finish(s, Failed(f"the user's model could not be understood ({call.where}: {error})"))
            s.attempt += 1
            return self.ask(s, call.hop, call.fields)
        if change is not None:
            texts = [found[name] for name in APPRAISAL[:-1]]
            s.appraisal, s.change = Appraisal(*texts, change), self.rules.change(change)
            self.client.usage.add(clamped=int(change != s.change))
            s.emotion, s.attempt = self.rules.step(s.emotion, change), 0
            if call.hop == "appraisal":
                return self.ask(s, "reply", SPEECH)
        text = found["response"]
        ended = self.rules.ending(s.emotion) if s.appraisal else None
        if s.appraisal and not ended and GOODBYE[s.profile.language].search(text):
            ended = "goodbye"
        turn = UserTurn(text, s.emotion, s.appraisal, s.change, ended, found["thinking"])
        if s.appraisal:
            s.said.append(("partner", s.reply))
        s.said.append(("user", text))
        s.reply, s.appraisal, s.change, s.attempt = "", None, None, 0
        self.finish(s, turn)

    def finish(self, s: Session, answer: UserTurn | Failed) -> None:
        """Hand an answer over; a session that has ended is forgotten."""
        self.ready.append((s.key, answer))
        if isinstance(answer, Failed) or answer.ended:
            del self.sessions[s.key]
