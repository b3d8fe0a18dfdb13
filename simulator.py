"""The people the policy talks with, as far as every kind of user shares them.

A Profile says who somebody is and what they secretly hope for, EmotionRules how replies move them
and when a dialogue ends, and User what each of the users in `users/` can do.

Sources: RLVER (arXiv 2507.03112), section 2; SAGE (arXiv 2505.02847), section 2 and its logs.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from config import InputError, nearest, read_rows, require

# Id -> (label in the released profiles, English label). SAGE calls the first four emotional.
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
PERSONA_TYPES = {"negative": ("负面型", "negative"), "passive": ("被动型", "passive"),
                 "avoidant": ("回避型", "avoidant")}  # fmt: skip


@dataclass(frozen=True)
class Profile:
    """One simulated person; `intention` and `persona_type` are ids of the tables above."""

    id: str
    persona: str
    scene: str
    intention: str
    persona_type: str
    language: str
    first_talk: str | None = None  # None: the user thinks of an opening
    topic: str = ""
    traits: tuple[str, ...] = ()

    @property
    def intention_label(self) -> str:
        """The hidden intention in the person's language."""
        return INTENTIONS[self.intention][self.language == "en"]

    @property
    def type_label(self) -> str:
        """The persona type in the person's language."""
        return PERSONA_TYPES[self.persona_type][self.language == "en"]


@dataclass(frozen=True)
class EmotionRules:
    """How emotion moves: e' = clip(e + clip(change, -clamp, clamp), floor, ceiling).

    All but the start is SAGE's (RLVER, section 2), though RLVER's code neither clamps nor floors.
    """

    start: float = 30.0  # as in RLVER's code
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
    return next((letter for letter, low in zip("SABC", (100, 70, 40, 10)) if emotion >= low), "F")


@dataclass(frozen=True)
class Appraisal:
    """How a user took a reply; the texts are named as in SAGE's logs."""

    content: str  # what the reply said
    target_completion: str  # whether it served the hidden intention
    activity: str  # what it made the person feel
    analyse: str  # why it moved them
    change: float  # before clamping
    features: dict[str, float] = field(default_factory=dict)  # what an offline user measured


@dataclass(frozen=True)
class UserTurn:
    """One answer of a user. The opening has no appraisal and no change."""

    text: str
    emotion: float
    appraisal: Appraisal | None = None
    change: float | None = None  # after clamping, as applied
    ended: str | None = None  # "content", "left" or "goodbye"
    thinking: str = ""  # how the user planned what to say (SAGE logs it)


@dataclass(frozen=True)
class Failed:
    """A user could not answer: its dialogue gets no reward and enters no statistic."""

    why: str


EXCLUDED = "failed"  # how a dialogue ends whose user Failed
Key = tuple[int, int]  # (group, member): names a dialogue for its whole life
WORD = (1 << 64) - 1


def hash_key(*key: int) -> int:
    """64 well-mixed bits of a tuple of integers (splitmix64 steps); the last may be an array."""
    state = 0
    for part in key:
        state = (state ^ (part & WORD)) + 0x9E3779B97F4A7C15 & WORD
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 & WORD
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB & WORD
        state ^= state >> 31
    return state


class User(Protocol):
    """What a simulated user has to be. One object serves many dialogues, told apart by key.

    Only `poll` may block. A session ends with an answer whose `ended` is set, with `Failed`, or
    when `start` comes again with its key (a rollout begun anew): what it had yet to say is dropped.
    """

    def start(self, key: Key, profile: Profile, seed: int) -> None:
        """Begin a session; the opening (`profile.first_talk` if there is one) arrives by `poll`."""

    def tell(self, key: Key, reply: str) -> None:
        """Hand over the policy's reply, thoughts removed; the answer arrives by `poll`."""

    def poll(self, timeout: float) -> list[tuple[Key, UserTurn | Failed]]:
        """Answers that are ready, waiting up to `timeout` seconds for the first."""


FIELDS = ("id", "player", "scene", "main_cha", "task")  # every profile in a file has these keys
KNOWN = (*FIELDS, "first_talk", "topic", "cha_group", "language")


def load_profiles(path: str | Path) -> list[Profile]:
    """RLVER's JSON-lines profiles. Raises InputError naming file, line and key of what is wrong."""
    give = "give profiles=FILE, for example data/en_train.jsonl"
    require(Path(path).is_file(), f"{path}: no such profile file; {give}")
    profiles, lines = [], {}
    for where, row in read_rows(Path(path)):
        profiles.append(parse_profile(row, where))
        name, here = profiles[-1].id, where.rpartition(":")[2]
        there = f"stands on line {lines.get(name)} already; ids are unique"
        require(lines.setdefault(name, here) == here, f"{where}: id {name!r} {there}")
    require(profiles, f"{path}: holds no profile; one JSON object a line is expected")
    return profiles


def parse_profile(row: dict, where: str) -> Profile:
    """One profile from its JSON object; `where` (file:line) begins every error."""
    if odd := [key for key in row if key not in KNOWN]:
        hint = nearest(odd[0], KNOWN, f"; known are {', '.join(KNOWN)}")
        raise InputError(f"{where}: unknown key {odd[0]!r}{hint}")
    if missing := [key for key in FIELDS if key not in row]:
        raise InputError(f"{where}: key {missing[0]!r} is missing")
    for key, value in row.items():
        if key == "cha_group":
            if not isinstance(value, list) or not all(isinstance(trait, str) for trait in value):
                raise InputError(f"{where}: key 'cha_group' must be a list of strings")
        elif not isinstance(value, str) or not value.strip():
            raise InputError(f"{where}: key {key!r} must be a string with something in it")
    guess = "zh" if cjk_share(row["player"] + row["scene"]) > 0.3 else "en"
    language, traits = row.get("language", guess), tuple(row.get("cha_group", ()))
    wrong = f"{where}: key 'language' is {language!r}; it must be one of en, zh"
    require(language in ("en", "zh"), wrong)
    return Profile(
        id=row["id"], persona=row["player"], scene=row["scene"], language=language, traits=traits,
        intention=canonical(row["task"], INTENTIONS, f"{where}: key 'task'"),
        persona_type=canonical(row["main_cha"], PERSONA_TYPES, f"{where}: key 'main_cha'"),
        first_talk=row.get("first_talk"), topic=row.get("topic", ""))  # fmt: skip


def canonical(label: str, table: dict[str, tuple[str, ...]], where: str) -> str:
    """The table's id of a label in any language. Raises InputError for a label it does not have."""
    names = {name: key for key, labels in table.items() for name in (key, *labels)}
    if label.strip() not in names:
        hint = nearest(label.strip(), names, f"; known are {', '.join(table)}", cutoff=0.4)
        raise InputError(f"{where} has unknown label {label!r}{hint}")
    return names[label.strip()]


def cjk_share(text: str) -> float:
    """The share of Chinese characters among all that are not white space."""
    visible = [char for char in text if not char.isspace()]
    return sum("\u4e00" <= char <= "\u9fff" for char in visible) / max(1, len(visible))
