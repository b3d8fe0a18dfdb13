"""The offline user: a sentient user that needs no language model.

Hop one appraises a reply by features that can be checked by hand: its *moves* (naming feelings, advising, praising)
and its *faults*. A move earns by being grounded: in a sound, new sentence tied to this person's story. Hop two tells
the scene fact by fact, the nearest to the reply first, in a voice that fits persona and emotion. What shapes the reward
is in the tables below and in data/offline/*.toml.
"""

import functools
import hashlib
import math
import re
import tomllib
from dataclasses import dataclass, field
from types import SimpleNamespace

from simulator import Appraisal, EmotionRules, Failed, Key, Profile, UserTurn, band, cjk_share
from users.fluency import DATA, clip, naturalness, run_on, salad, sentences, stem, tokens

VERSION = "1"  # raise it with every change here or in fluency.py that moves a golden appraisal (tests/test_golden.py)
FAULTS = ("cliche", "lecture", "blame", "flattery", "markdown")
# Emotion points of one grounded move, by hidden intention; negative: the wrong need, which costs grounded or not.
WEIGHTS = {
    #             valid  refl  quest growth advice praise motiv persp agree |  clich  lect  blame  flat  markd
    "praise":    (2.4,   1.5,  0.5,  -1.0,  -2.0,   9.0, -0.5, -1.0,  1.0,    -1.5, -2.0, -5.0, -3.0, -1.5),
    "listening": (6.5,   4.0,  4.5,  -1.0,  -6.0,   0.5, -1.0, -2.0,  0.5,    -2.0, -3.0, -5.0, -2.0, -2.5),
    "empathy":   (7.5,   3.5,  1.0,  -1.0,  -3.5,   0.5, -1.2, -1.5,  0.5,    -3.0, -3.0, -5.0, -2.0, -2.5),
    "agreement": (2.4,   1.5,  0.0,  -3.0,  -3.0,   0.5, -0.5, -3.0,  9.0,    -1.5, -2.5, -7.0, -2.0, -2.0),
    "analysis":  (2.4,   1.5,  0.5,   0.5,  -0.5,  -0.5,  2.0,  9.0, -2.0,    -2.0, -2.0, -3.0, -2.0, -0.5),
    "advice":    (2.4,   1.5,  0.5,  -1.0,   9.0,   0.0,  0.5,  0.5,  0.0,    -2.0, -1.5, -4.0, -2.0, -0.5),
    "motives":   (2.4,   1.5,  0.5,  -0.5,  -2.0,  -0.5,  9.0,  1.0, -0.5,    -2.0, -2.5, -3.0, -2.0, -0.5),
    "growth":    (2.4,   1.5,  2.5,   8.0,  -2.5,   0.0,  0.0,  1.0, -2.0,    -2.0, -2.5, -3.0, -2.0, -1.5),
}
PRIMARY = 2.5  # a move of at least this weight serves the intention
PERSONA = {"negative": (0.85, 1.2), "passive": (1.0, 1.0), "avoidant": (1.0, 0.95)}  # factors on gains, on costs
# Share that an ungrounded move keeps; most points of moves beside an unserved intention; cost of not serving it.
MODES = {"vanilla": (0.25, 3.0, 1.8), "challenging": (0.05, 0.5, 2.8)}
SOFTNESS = (6.5, 12.0)  # gains, costs: points p become 10 * (1 - exp(-p / softness)), so the second adds less
COSTS = {"repetition": 5.0, "parroting": 5.0, "garbled": 8.0, "off_topic": 3.0, "cold": 2.5,
         "wrong_language": 8.0, "stuffing": 4.0, "too_short": 1.5, "too_long": 6.0, "cut": 0.3, "interrogation": 3.0, "self_talk": 3.0}  # points at full strength, for any intention
LENGTHS = {"en": (3, 15, 120, 520), "zh": (4, 24, 260, 1100)}  # shortest, good from, to, longest: words, characters
# Shared content units that ground a sentence by 63 %; new ones that add something; tokens of a sentence that counts.
GROUND, NEW, WHOLE = {"en": 1.0, "zh": 1.4}, {"en": 3, "zh": 8}, {"en": 10, "zh": 16}
NGRAM = {"en": 4, "zh": 6}  # length of the n-grams that are copied from the user
TALK = {"en": 32, "zh": 60}  # longest turn that a feeling is added to
SAID = {"en": (5, 34), "zh": (8, 85)}  # how long a fact may be to be told: words, characters


@functools.cache
def lexicon(language: str) -> SimpleNamespace:
    """data/offline/LANGUAGE.toml, compiled; `stop`: what no content unit holds (words, in Chinese characters)."""
    raw = tomllib.loads((DATA / f"{language}.toml").read_text(encoding="utf-8"))
    english, edge = language == "en", r"(?<![\w'])(?:%s)(?!\w)" if language == "en" else "(?:%s)"
    function = frozenset(raw["function_words"].split() if english else raw["function_words"])
    return SimpleNamespace(
        language=language, raw=raw, function=function, stop=function if english else frozenset(raw["stop_characters"]),
        me=set("i i'm i've i'd i'll me my mine 我".split()), you=set("you you're you've you'd you'll your yours 你 您".split()),
        generic={stem(word) if english else word for word in raw["generic_words"].split()},
        cues={name: re.compile(edge % "|".join(cue.splitlines())) for name, cue in raw["cues"].items()},
        frames=dict(zip(function, function)) | {x: kind for kind, xs in raw["frames"].items() for x in xs.split()})


def user_hash() -> str:
    """What a reward depends on: VERSION, which says how replies are judged, and 8 hex digits over data/offline/."""
    data = b"\0".join(path.read_bytes() for path in sorted(DATA.iterdir()))
    return f"{VERSION}-{hashlib.sha256(data).hexdigest()[:8]}"


def saturate(n: int) -> float:
    """One instance counts for 0.8, two for 0.96; heaped up they count for less again."""
    return clip(1 - 0.2**n - 0.25 * max(0, n - 3))


def units(text: str, lex: SimpleNamespace) -> set[str]:
    """Content units: English stems that are neither function nor generic words; Chinese pairs of content characters."""
    if lex.language == "en":
        words = {word for word in tokens(text) if word not in lex.stop and len(word) > 2}
        return {stem(word) for word in words} - lex.generic
    pairs = set(re.findall(r"(?=([\u4e00-\u9fff]{2}))", text))
    return {pair for pair in pairs if lex.stop.isdisjoint(pair)} - lex.generic


SAME = dict(zip("i you me my your mine yours i'm you're am are i've you've 我 你 您".split(),
                "@ @ @ @s @s @s @s @is @is @is @is @has @has @ @ @".split()))


def copies(items: list[str], lex: SimpleNamespace) -> list[tuple[str, ...]]:
    """N-grams with first and second person made equal: `my boss` copied as `your boss` is still a copy."""
    return list(zip(*([SAME.get(item, item) for item in items][i:] for i in range(NGRAM[lex.language]))))


@functools.lru_cache(4096)
def scene_facts(profile: Profile) -> tuple[set, re.Pattern, re.Pattern]:
    """Content units of a scene; what names the others in it (capitals, Chinese family names); that or `I`, `you`."""
    lex, scene = lexicon(profile.language), profile.scene
    if profile.language == "en":
        names = {name.lower() for name in re.findall(r"(?<=[a-z,] )[A-Z][a-z]{2,}", scene)} - lex.function
    else:
        found = [x for n in "12" for x in re.findall(f"(?=([{lex.raw['surnames']}][一-龥]{{{n}}}))", scene)]
        names = {name for name in found if found.count(name) > 3 and lex.stop.isdisjoint(name)}
    others = "|".join([lex.cues["third"].pattern, *sorted(names)])
    return units(scene, lex), re.compile(others), re.compile(r"\bi\b|\byou\b|我|你|" + others)


def story(profile: Profile, said: list[str], lex: SimpleNamespace) -> SimpleNamespace:
    """What a reply can be tied to: units of the scene, of all and of the last that was said, n-grams to copy."""
    scene, others, who = scene_facts(profile)
    copied = {gram for text in said for gram in copies(tokens(text), lex)}
    said, last = (units(" ".join(part), lex) for part in (said, said[-1:]))
    words = said | scene | (set(tokens(profile.scene)) if profile.language == "zh" else set())
    return SimpleNamespace(lex=lex, words=words, said=said, scene=scene - said, last=last, copied=copied, others=others, who=who)


@dataclass
class Sentence:
    """A sentence of the reply, what its cues are, and how far a move in it counts."""
    text: str  # lower-cased
    before: str  # the two sentences before it, for moves that span some
    items: list[str]
    told: SimpleNamespace  # the story it is held against
    logps: tuple | list = ()  # of its words in the speech of a good friend
    # tied to this person's story by its own words; or by a neighbour's; well-formed; how far it has the form of one
    # said before; share of its tokens copied from the user; neither said before nor copied
    ground = tied = sound = again = copied = fresh = 0.0

    def has(self, family: str, wide: bool = False) -> int:
        """How many different cues of a family it holds; wide: together with the sentences before it."""
        if (key := (family, wide)) not in self.counts:
            self.counts[key] = len({match.group() for match in self.told.lex.cues[family].finditer(self.span[wide])})
        return self.counts[key]

    def to_user(self, wide: bool = False) -> bool:
        return bool(re.search(r"\byou|你|您", self.span[wide]))

    def minds(self, family: str = "mental") -> int:
        """Words of a family whose owner, the last person named before them, is neither user nor speaker."""
        before = [self.text[: match.start()] for match in self.told.lex.cues[family].finditer(self.text)]
        return sum((self.told.who.findall(text) or ["i"])[-1] not in ("i", "you", "我", "你") for text in before)

    def __post_init__(self):
        self.counts, self.span = {}, (self.text, f"{self.before} {self.text}")
        self.asks = bool(re.search(r"[?？]|[吗呢]$", self.text))
        clauses = re.findall(r"[^\s,，?？.。][^,，?？.。]*", self.text)
        self.stock = any(self.told.lex.cues["stock_question"].fullmatch(clause) for clause in clauses)
        self.invites = self.to_user(wide=True) and (self.asks or self.has("wonder") > 0)
        self.imperative = self.told.lex.cues["imperative"].match(self.text) is not None


# How much of each move a sentence makes, 0..1, whether or not it is grounded.
DETECTORS = {
    "validation": lambda s: saturate(s.has("feeling")) * (1 - s.asks / 2) * (s.has("validate") > 0 or s.to_user() / 2)
    * (1.0 if s.to_user() else 0.25 if s.minds("feeling") else 0.5 + 0.4 * s.to_user(wide=True)),
    "reflection": lambda s: 0.0 if s.asks or s.has("lecture") or s.has("blame") or DETECTORS["advice"](s) > 0.3
    else s.to_user() * (0.5 + 0.5 * (s.has("past_act") + s.has("feeling") > 0)),
    "question": lambda s: s.asks * (0.15 if s.stock else 1.0 if s.has("open_question") else 0.6)
    * (1 - 0.6 * DETECTORS["growth"](s)) if s.asks else 0.6 * saturate(s.has("invite")),
    "growth": lambda s: saturate(s.has("growth")) * saturate(s.has("inward")) * s.invites,
    "advice": lambda s: 0.35 + 0.65 * saturate(s.has("concrete")) ** 2
    if (s.has("advice") or s.imperative) and (not s.asks or s.has("proposal")) and not s.has("invite") else 0.0,
    "praise": lambda s: saturate(s.has("praise")) * clip(0.3 + s.has("past_act", wide=True)) * s.to_user(wide=True),
    "motives": lambda s: saturate(s.has("cause")) * saturate(s.minds()),
    "perspectives": lambda s: (s.has("contrast") > 0) * (1 - s.asks / 2) * saturate(min(3, s.has("weigh", wide=True)))
    * (0.4 + 0.35 * (s.told.others.search(s.span[1]) is not None) + 0.25 * s.to_user(wide=True)),
    "agreement": lambda s: 0.0 if s.asks or s.has("blame") else saturate(s.has("agreement")),
}
MOVES = tuple(DETECTORS)


@functools.lru_cache(4096)
def skeleton(text: str, language: str) -> frozenset:
    """Three-grams of a sentence whose content words are blank: what is left of a formula that changes all its words."""
    items = [lexicon(language).frames.get(item, "_") for item in tokens(text)]
    items = [item for item, previous in zip(items, ["", *items]) if (item, previous) != ("_", "_")]
    return frozenset(zip(items, items[1:], items[2:]))


def read(reply: str, told: SimpleNamespace, earlier: list[str], lex: SimpleNamespace) -> list[Sentence]:
    """The reply's sentences, each measured for ground, soundness and freshness."""
    n_copy, parts, result, lent = NGRAM[lex.language], sentences(reply.replace("您", "你")), [], 0.0
    frames = [skeleton(part, lex.language) for text in earlier for part in sentences(text)]
    for part in parts:
        items, own, frame = tokens(part), units(part, lex), skeleton(part, lex.language)
        s = Sentence(part.lower().replace("’", "'"), " ".join(s.text for s in result[-2:]), items, told)
        s.ground = 1 - math.exp(-(len(own & told.said) + 0.6 * len(own & told.scene)) / GROUND[lex.language])
        s.logps = naturalness(part, told.words, lex.language, cut=part is parts[-1] and re.search(r"\w$", part) is not None)
        loops = clip(0.6 - len(set(items)) / len(items)) if items else 0.0
        s.sound = 1 - clip(salad(s.logps, 0, lex.language) + 4 * loops + 4 * run_on(part, lex.language))
        alike = max((2 * len(frame & old) / (len(frame) + len(old)) for old in frames if frame), default=0.0)
        s.again = clip((alike - 0.4) / 0.4) if frame else float(part in " ".join(earlier))
        frames.append(frame)  # a reply that loops repeats itself too
        known = [k for k, gram in enumerate(copies(items, lex)) if gram in told.copied]
        s.copied = len({j for k in known for j in range(k, k + n_copy)}) / max(1, len(items))
        s.fresh = (1 - clip((s.again - 0.3) / 0.35)) * (1 - clip((s.copied - 0.5) / 0.4))
        listed = sum(len(tokens(match.group())) for match in lex.cues["listing"].finditer(s.text)) / max(1, len(items))
        s.fresh *= clip(0.3 + len(items) / WHOLE[lex.language]) * (1 - clip((listed - 0.3) / 0.3))
        result.append(s)
    for s, after in zip(result, [*(s.ground for s in result[1:]), 0.0]):  # "that" and "it" borrow their ground
        s.tied = max(s.ground, 0.7 * lent, 0.5 * after)
        lent = s.tied * s.sound * s.fresh
    return result


def measure(profile: Profile, mode: str, said: list[str], earlier: list[str], reply: str) -> dict[str, float]:
    """All named features of a reply, 0..1: moves (`raw_`: grounded or not), FAULTS, COSTS, `ground` and `new`."""
    lex, f, kinds, floor = lexicon(profile.language), {}, [], MODES[mode][0]
    parts = read(reply, told := story(profile, said, lex), earlier, lex)
    for move, detector in DETECTORS.items():
        raw = [detector(s) for s in parts]
        # giving back is nothing without what is given back, so reflection has no floor and borrows no ground
        tied = [s.ground if move == "reflection" else floor + (1 - floor) * s.tied for s in parts]
        worth = sorted((r * g * s.sound * s.fresh for r, g, s in zip(raw, tied, parts)), reverse=True)
        f[move] = clip(sum(worth[:1]) + 0.2 * sum(worth[1:2]))
        f["raw_" + move] = clip(sum(raw) / max(1.2, len(parts) / 3))
        kinds.append([r >= 0.6 for r in raw])
    f |= {name: 1 - 0.45 ** (sum(s.has(name) for s in parts) / max(1, len(parts) / 4)) for name in FAULTS[:3]}
    f["flattery"] = max((DETECTORS["praise"](s) * (1 - s.tied) for s in parts), default=0.0)
    f["markdown"] = clip(len(re.findall(r"^\s*(?:[-*•#>]|\d+[.)、])\s|\*\*|```|__", reply, re.M)) / 4)
    size = max(1, sum(len(s.items) for s in parts))
    f["repetition"] = clip((sum(s.again * len(s.items) for s in parts) / size - 0.3) / 0.35)
    f["parroting"] = clip((sum(s.copied * len(s.items) for s in parts) / size - 0.5) / 0.4)
    junk = len(re.findall(r"<[|/\w][^>]*>|\{\{|\\\\n|\ufffd|[^\w\s]{5,}|(.)\1{4,}", reply)) / 3
    f["garbled"] = clip(salad([x for s in parts for x in s.logps], 1, lex.language) + junk
                        + clip(2.8 * sum((1 - s.sound) * len(s.items) for s in parts) / size - 0.2))
    chinese = cjk_share("".join(re.findall(r"\w", reply)))
    f["wrong_language"] = clip((chinese if profile.language == "en" else 0.7 - chinese) * 2.5) if parts else 0.0
    shortest, enough, fine, longest = LENGTHS[profile.language]
    crowd = max(map(sum, zip(*kinds)), default=0)  # kinds of moves in one sentence
    f["stuffing"] = clip(max((sum(map(any, kinds)) - 4.5 - size / fine) / 2, (crowd - 3.5) / 1.5))
    f["too_short"], f["too_long"] = clip((enough - size) / (enough - shortest)), clip((size - fine) / (longest - fine))
    f["cut"] = float(bool(parts) and re.search(r"\w\s*$", reply) is not None)
    f["ground"] = max((s.ground * s.sound * s.fresh for s in parts), default=0.0)
    kind = max(f["raw_" + move] for move in MOVES if move not in ("reflection", "question"))
    f["off_topic"] = clip(1 - 1.2 * max(f["ground"], 0.4 * kind))
    f["cold"] = clip(1 - 1.2 * max(kind, 0.8 * f["question"], 0.7 * f["cliche"]))
    me, you = (sum(sum(item in words for item in s.items) for s in parts) for words in (lex.me, lex.you))
    f["self_talk"] = clip((me - you - 1) / 3)
    f["interrogation"] = clip((sum(s.asks for s in parts) - 1.5) / 1.5)
    f["new"] = clip(len(units(reply, lex) - told.last) / NEW[profile.language])
    return f


def score(f: dict[str, float], profile: Profile, mode: str) -> tuple[float, float]:
    """(change of emotion, -10..10; share of the hidden intention that was served, 0..1) of a reply's features."""
    (_, warmth, unmet), (gain, cost) = MODES[mode], PERSONA[profile.persona_type]
    weights = dict(zip((*MOVES, *FAULTS), WEIGHTS[profile.intention]))
    points = {move: weights[move] * f[move] for move in MOVES if weights[move] > 0}
    leads = [move for move in points if weights[move] >= PRIMARY and move != "reflection"]
    own, other = max(f[move] for move in leads), max(f[move] for move in MOVES[3:] if move not in leads)
    points["reflection"] *= 0.2 + 0.8 * clip(own / 0.5)
    core = sum(points[move] for move in points if weights[move] >= PRIMARY)
    core *= 1 - 0.8 * clip(1.4 * (other - own))  # done in passing while the reply is about something else
    gate = f["new"] * (1 - 0.7 * f["too_short"]) * (1 - f["too_long"])
    gate *= math.prod(1 - f[name] for name in ("repetition", "parroting", "wrong_language", "stuffing"))
    gate *= 1 - clip(2 * f["garbled"])
    served = clip(core / 6) * gate
    beside = sum(points[move] for move in points if weights[move] < PRIMARY)
    earned = (core + max(min(beside, warmth), beside * served)) * gate
    spent = unmet * (1 - served) + sum(points * f[fault] for fault, points in COSTS.items())
    spent += sum(max(0.0, -weights[move]) * f["raw_" + move] for move in MOVES) - sum(weights[x] * f[x] for x in FAULTS)
    good, bad = (10 - 10 * math.exp(-points / softness) for points, softness in zip((earned, spent), SOFTNESS))
    return round(max(-10.0, min(10.0, gain * good - cost * bad)), 1), served


def appraise(profile: Profile, mode: str, user_text_so_far: list[str], earlier_replies: list[str],
             reply: str) -> Appraisal:
    """Hop one: what a reply said, whether it served the hidden intention, and by how much emotion moves (-10..10)."""
    f = measure(profile, mode, user_text_so_far, earlier_replies, reply)
    change, f["served"] = score(f, profile, mode)
    words, comma = lexicon(profile.language).raw["words"], ", " if profile.language == "en" else "、"
    moves = comma.join(words[move] for move in MOVES if f["raw_" + move] >= 0.5) or words["nothing"]
    faults = comma.join(words[name] for name in (*FAULTS, *COSTS) if f[name] >= 0.3) or words["nothing"]
    mood = words["good" if change > 1 else "bad" if change < -1 else "flat"]
    served = words["served" if f["served"] > 0.6 else "partly" if f["served"] > 0.25 else "missed"]
    activity = words["activity"].format(mood=mood, why=words["about_me" if f["ground"] > 0.5 else "about_any"])
    return Appraisal(words["content"].format(moves=moves), served, activity, words["analyse"].format(
        change=change, faults=faults), change, {name: round(float(value), 3) for name, value in f.items()})


@functools.lru_cache(4096)
def facts(profile: Profile) -> tuple[str, ...]:
    """Sentences of the scene that the user can say as they stand, in order; never those about the intention."""
    shortest, longest = SAID[profile.language]
    strip, secret = (re.compile(lexicon(profile.language).raw[key]) for key in ("markup", "secret"))
    name = re.search(r"姓名[：:]\s*([\u4e00-\u9fff]{2,4})", profile.persona)
    name = re.compile(f"{name[1]}|{name[1][-2:]}") if name and profile.language == "zh" else None
    she, result = "她" if "女" in profile.persona[:80] else "他", []
    for line in profile.scene.splitlines():
        if result and re.match(r"\s*[#*]", line) and re.search(r"反应|不同.{0,8}状态|emotion", line, re.I):
            break  # from here on the scene instructs the actor
        for sentence in sentences(strip.sub("", line).strip()):
            unclear = name and she in sentence and not name.search(sentence)
            if name:  # third person: the name, and the pronoun that opens a clause after it, become "I"
                sentence = re.sub(f"(?<=[，；]){she}(?!们)", "我", name.sub("我", sentence))
            whole = re.fullmatch(r"[^:：]+[.!?。！？]", sentence) and not secret.search(sentence)
            if whole and not unclear and shortest <= len(tokens(sentence)) <= longest:
                result.append(sentence)
    return tuple(dict.fromkeys(result))


@dataclass
class Session:
    """One dialogue: all it said and heard, and which sentences it has used up."""
    profile: Profile
    seed: int
    emotion: float
    said: list[str] = field(default_factory=list)
    heard: list[str] = field(default_factory=list)
    used: set[str] = field(default_factory=set)

    def pick(self, pool: list[str] | tuple[str, ...], slot: str) -> str:
        """One of a pool, by a hash of (profile, seed, turn, slot), unused in this dialogue while any is."""
        fresh = [text for text in pool if text not in self.used] or pool
        number = hashlib.sha256(f"{self.profile.id}|{self.seed}|{len(self.said)}|{slot}".encode()).digest()
        self.used.add(chosen := fresh[int.from_bytes(number[:8], "big") % len(fresh)])
        return chosen


class OfflineUser:
    """A deterministic sentient user (protocol: simulator.User) that answers at the next poll; mode: a key of MODES."""
    def __init__(self, rules: EmotionRules, mode: str = "vanilla"):
        if mode not in MODES:
            raise ValueError(f"mode is {mode!r}; it must be one of {', '.join(MODES)}")
        self.rules, self.mode = rules, mode
        self.sessions, self.ready = {}, {}  # by key

    def start(self, key: Key, profile: Profile, seed: int) -> None:
        s = self.sessions[key] = Session(profile, seed, self.rules.start)
        answers, text = lexicon(profile.language).raw["answers"], profile.first_talk
        if text is None:
            fact = s.pick(facts(profile)[:2] or answers["fillers"], "fact")
            text = s.pick(answers["openings"] + answers["open_" + profile.persona_type], "opening").format(fact=fact)
        s.used |= {fact for fact in facts(profile) if fact in text}  # a group's opening was made in another session
        s.said.append(text)
        self.ready[key] = UserTurn(text, s.emotion)

    def tell(self, key: Key, reply: str) -> None:
        s = self.sessions[key]
        appraisal = appraise(s.profile, self.mode, s.said, s.heard, reply)
        s.emotion = round(self.rules.step(s.emotion, change := self.rules.change(appraisal.change)), 1)
        text, thinking = self.answer(s, reply, appraisal, ended := self.rules.ending(s.emotion))
        s.heard, s.said = [*s.heard, reply], [*s.said, text]
        self.ready[key] = UserTurn(text, s.emotion, appraisal, change, ended, thinking)
        if ended:
            del self.sessions[key]

    def poll(self, timeout: float) -> list[tuple[Key, UserTurn | Failed]]:
        ready, self.ready = sorted(self.ready.items()), {}
        return ready

    def answer(self, s: Session, reply: str, appraisal: Appraisal, ended: str | None) -> tuple[str, str]:
        """Hop two: what to say, and one line on how it was planned."""
        lex, profile, letter = lexicon(s.profile.language), s.profile, band(s.emotion)
        answers, words, vanilla = lex.raw["answers"], lex.raw["words"], self.mode == "vanilla"
        lead = {"S": "A", "F": "C"}.get(letter, letter) + "_" + (kind := profile.persona_type)
        if ended:
            text, plan = s.pick(answers["bye_" + ended], "bye"), words["goodbye"]
        else:
            if vanilla and abs(appraisal.change) > 1.5 and len(s.said) % 3:  # a challenging user hides what it feels
                lead = "heard" if appraisal.change > 0 else "missed"
            asked, gap = units(reply, lex), " " * (profile.language == "en")
            left = [fact for fact in facts(profile) if fact not in s.used]
            fact = max(left, key=lambda fact: len(units(fact, lex) & asked), default=None)  # the first of equals
            plan = words["fact"].format(n=len(facts(profile)) - len(left)) if fact else words["filler"]
            text = s.pick(answers[lead], "lead") + gap + s.pick([fact] if fact else answers["fillers"], "fact")
            if vanilla and len(s.said) % 4 == 2:
                text += gap + lex.raw["hints"][profile.intention]
            elif vanilla and len(tokens(text)) < TALK[lex.language]:
                text += gap + s.pick(answers["feel_" + kind], "feel")  # something for a kind reply to answer to
            elif len(tokens(text)) < 12:
                text += gap + s.pick(answers["fillers"], "more")
        return text, words["thinking"].format(**appraisal.features, band=letter, persona=kind, lead=lead, source=plan)
