"""The people the policy talks with, as far as every kind of user shares them.

Here live the Profile (who somebody is, and what they secretly hope to get from the talk), the rules of emotion as
data (where it starts, how far one reply can move it, when the dialogue ends), the record of an appraisal, the protocol
that every user follows, and the user that is a language model. A user is any object with three methods, `start`, `tell`
and `poll`; `offline.py` holds one that needs no language model. What the policy says and how it is generated is
`rollout.py`'s business.

Sources: RLVER (arXiv 2507.03112), section 2; SAGE (arXiv 2505.02847), section 2 and its released logs.
"""

import difflib
import json
import re
import string
import unicodedata
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from config import InputError
from llm import Answer, Call

# Hidden intentions: canonical id -> (label in the released profiles, English label). The first four are "emotional",
# the others "rational" (SAGE's two groups).
INTENTIONS = {
    "praise": ("你希望对方真诚地夸奖你在事件中的具体行为", "sincere praise of what I did"),
    "listening": ("你希望对方用心倾听你的情绪宣泄", "attentive listening while I vent"),
    "empathy": ("你希望对方深刻共情你的感受，而不是简单的安慰", "deep empathy, not mere comfort"),
    "agreement": ("你认为自己在事件中没有任何责任和错误，你想要对方也认同你没有错", "agreement that I am not at fault"),
    "analysis": ("你希望对方辩证地分析事件中的问题", "dialectical analysis of the matter"),
    "advice": ("你想获得能真实帮助你解决当下困境的建议", "advice that really helps"),
    "motives": ("你想分析事件中其他人物这么做的原因", "why the others acted so"),
    "growth": ("你希望对方引导你针对事件进行自我反思，收获自我成长", "guide me to reflect and grow"),
}
PERSONA_TYPES = {
    "negative": ("负面型", "negative"),
    "passive": ("被动型", "passive"),
    "avoidant": ("回避型", "avoidant"),
}
LANGUAGES = ("en", "zh")


@dataclass(frozen=True)
class Profile:
    """One simulated person. `intention`, `persona_type` are canonical ids; `first_talk` is None if the user opens."""

    id: str
    persona: str
    scene: str
    intention: str
    persona_type: str
    language: str
    first_talk: str | None = None
    topic: str = ""
    traits: tuple[str, ...] = ()


@dataclass(frozen=True)
class EmotionRules:
    """How emotion moves: e' = clip(e + clip(change, -clamp, clamp), floor, ceiling), and where a dialogue ends.

    SAGE ends a dialogue as a success at 100 and as a failure below 10. The released training code starts at 30 and
    neither clamps nor floors; we keep its start and use SAGE's clamp and endings in training too (RLVER, section 2).
    """

    start: float = 30.0
    clamp: float = 10.0
    floor: float = 0.0
    ceiling: float = 100.0
    content: float = 100.0  # at or above: the user has what they came for
    left: float = 10.0  # below: the user gives up

    def change(self, raw: float) -> float:
        """The appraised change limited to -clamp..clamp."""
        return max(-self.clamp, min(self.clamp, raw))

    def step(self, emotion: float, change: float) -> float:
        """The emotion after an appraisal with this change."""
        return max(self.floor, min(self.ceiling, emotion + self.change(change)))

    def ending(self, emotion: float) -> str | None:
        """"content" or "left" where the emotion ends the dialogue, else None."""
        if emotion >= self.content:
            return "content"
        return "left" if emotion < self.left else None


def band(emotion: float) -> str:
    """SAGE's letter for an emotion: S (100), A (70 and up), B (40), C (10), F (below 10)."""
    return next((letter for letter, low in (("S", 100), ("A", 70), ("B", 40), ("C", 10)) if emotion >= low), "F")


@dataclass(frozen=True)
class Appraisal:
    """Hop one of the sentient user: what a reply said, whether it served the hidden intention, and what it moved.

    The text fields carry SAGE's names in a log: content, TargetCompletion, activity, analyse. `change` is the number
    before clamping. `features` holds what an offline user measured; an LLM user leaves it empty.
    """

    content: str
    target_completion: str
    activity: str
    analyse: str
    change: float
    features: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class UserTurn:
    """One answer of a user; the opening has no appraisal, no change. `ended`: "content", "left", "goodbye" or None."""

    text: str
    emotion: float
    appraisal: Appraisal | None = None
    change: float | None = None  # after clamping, as applied
    ended: str | None = None
    thinking: str = ""  # how the user planned what to say (SAGE logs it)


@dataclass(frozen=True)
class Failed:
    """A user that could not answer. The dialogue is excluded from every statistic, never given a reward."""

    why: str


Key = tuple[int, int]  # (group, member): names a dialogue for its whole life


class User(Protocol):
    """What a simulated user has to be. One object serves many dialogues, told apart by key.

    A user that waits on a network does so in threads of its own: none of these calls may block, except `poll` for at
    most `timeout` seconds. A session ends with the answer whose `ended` is set, with `Failed`, or when `start` is
    called again with its key: what it had still to say is then dropped (an abandoned rollout is begun anew).
    """

    def start(self, key: Key, profile: Profile, seed: int) -> None:
        """Begin a session; the opening (`profile.first_talk` where there is one) arrives by `poll`."""

    def tell(self, key: Key, reply: str) -> None:
        """Hand over the policy's reply, thoughts removed; the answer arrives by `poll`."""

    def poll(self, timeout: float) -> list[tuple[Key, UserTurn | Failed]]:
        """Answers that are ready, waiting up to `timeout` seconds for the first."""


FIELDS = {"id": "id", "player": "persona", "scene": "scene", "main_cha": "persona_type", "task": "intention"}
OPTIONAL = ("first_talk", "topic", "cha_group", "language")


def load_profiles(path: str | Path) -> list[Profile]:
    """Read RLVER's JSON-lines profiles. Raises InputError naming file, line and key for anything that is off."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such profile file; give profiles=FILE, for example data/en_train.jsonl")
    profiles, seen = [], {}
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            row = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise InputError(f"{where}: not UTF-8 ({error.reason}); one profile a line, as JSON in UTF-8") from None
        except json.JSONDecodeError as error:
            raise InputError(f"{where}: not JSON ({error.msg}, column {error.colno}); one profile a line") from None
        if not isinstance(row, dict):
            raise InputError(f"{where}: a profile is a JSON object, this is a {type(row).__name__}")
        profile = parse_profile(row, where)
        if profile.id in seen:
            raise InputError(f"{where}: id {profile.id!r} stands on line {seen[profile.id]} already; ids are unique")
        seen[profile.id] = number
        profiles.append(profile)
    if not profiles:
        raise InputError(f"{path}: holds no profile; one JSON object a line is expected")
    return profiles


def parse_profile(row: dict, where: str) -> Profile:
    """One profile from its JSON object; `where` (file:line) begins every error."""
    known = (*FIELDS, *OPTIONAL)
    for key in row:
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"
            raise InputError(f"{where}: unknown key {key!r}; {hint}")
    for key in FIELDS:
        if key not in row:
            raise InputError(f"{where}: key {key!r} is missing")
    for key, value in row.items():
        if key == "cha_group":
            if not isinstance(value, list) or not all(isinstance(trait, str) for trait in value):
                raise InputError(f"{where}: key 'cha_group' must be a list of strings")
        elif not isinstance(value, str) or not value.strip():
            raise InputError(f"{where}: key {key!r} must be a string with something in it")
    language = row.get("language") or ("zh" if cjk_share(row["player"] + row["scene"]) > 0.3 else "en")
    if language not in LANGUAGES:
        raise InputError(f"{where}: key 'language' is {language!r}; it must be one of {', '.join(LANGUAGES)}")
    return Profile(
        id=row["id"],
        persona=row["player"],
        scene=row["scene"],
        intention=canonical(row["task"], INTENTIONS, f"{where}: key 'task'"),
        persona_type=canonical(row["main_cha"], PERSONA_TYPES, f"{where}: key 'main_cha'"),
        language=language,
        first_talk=row.get("first_talk"),
        topic=row.get("topic", ""),
        traits=tuple(row.get("cha_group", ())),
    )


def canonical(label: str, table: dict[str, tuple[str, ...]], where: str) -> str:
    """The canonical id of a label in any of its languages. Raises InputError for one that is not in the table."""
    names = {name: key for key, labels in table.items() for name in (key, *labels)}
    if label.strip() not in names:
        near = difflib.get_close_matches(label.strip(), names, 1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(table)}"
        raise InputError(f"{where} has unknown label {label!r}; {hint}")
    return names[label.strip()]


def cjk_share(text: str) -> float:
    """The share of Chinese characters among all that are not white space."""
    visible = [char for char in text if not char.isspace()]
    return sum("\u4e00" <= char <= "\u9fff" for char in visible) / max(1, len(visible))


# A user that says one of these takes its leave (rule 7).
GOODBYE = {
    "en": re.compile(r"\b(?:good ?bye|bye|farewell|see you (?:later|soon|around)|talk to you later)\b", re.I),
    "zh": re.compile("再见|拜拜|告辞|回头聊|下次再聊|下次聊"),
}
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

    `client` (llm.py) answers calls; `prompts` is a folder of prompts in place of prompts/LANGUAGE/MODE; `one_call` asks
    both hops at once, at half the latency. An answer that cannot be read is asked again up to `retries` times under
    another seed; then the dialogue has failed. Sources: RLVER, section 2; SAGE, section 2.
    """

    NAMES = {"en": ("Partner", "I"), "zh": ("对方", "我")}

    def __init__(self, client, rules: EmotionRules, mode: str = "vanilla", prompts: str = "", one_call: bool = False,
                 retries: int = 5):
        self.client, self.rules, self.one_call, self.retries = client, rules, one_call, retries
        ours = Path(__file__).parent / "prompts"
        self.prompts = {lang: load_prompts(Path(prompts) if prompts else ours / lang / mode) for lang in LANGUAGES}
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
