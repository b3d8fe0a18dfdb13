"""The offline user: a sentient user that needs no language model.

It follows the two hops of the LLM user. Hop one is an appraisal from features that a reader can check by hand: which
*moves* the reply makes (naming feelings, asking, advising, praising, ...) and which *faults* it has. A move earns by
being grounded: in a well-formed, new sentence that is tied to this person's story. Hop two is an agenda: facts of the
scene are told one by one, the one nearest to the reply first, in a voice that fits persona and emotion.

`appraise` is a pure function, so logs can be scored. Word lists and sentence templates are data/offline/{en,zh}.toml;
every number that shapes the reward is in the tables below. A policy is trained against this user, so each feature is
written with the question how it could be gamed: tests/test_offline.py holds the answers.
"""

import functools
import hashlib
import math
import re
import tomllib
from dataclasses import dataclass, field
from pathlib import Path

from simulator import INTENTIONS, Appraisal, EmotionRules, Failed, Key, Profile, UserTurn, band, cjk_share

DATA = Path(__file__).parent / "data" / "offline"
FAULTS = ("cliche", "lecture", "blame", "flattery", "markdown")
# Emotion points that one grounded instance of a move earns, by hidden intention; negative: the wrong need, which costs
# whether grounded or not. The last five columns are the cost of a fault.
WEIGHTS = {
    #             valid  refl  quest growth advice praise motiv persp agree |  clich  lect  blame  flat  markd
    "praise":    (1.5,   1.5,  0.5,  -1.0,  -2.0,   9.0, -0.5, -1.0,  1.0,    -1.5, -2.0, -5.0, -3.0, -1.5),
    "listening": (4.5,   4.0,  4.0,  -1.0,  -4.0,   0.5, -1.0, -2.0,  0.5,    -2.0, -3.0, -5.0, -2.0, -2.5),
    "empathy":   (7.5,   3.5,  1.0,  -1.0,  -3.5,   0.5, -0.5, -1.5,  0.5,    -3.0, -3.0, -5.0, -2.0, -2.5),
    "agreement": (2.0,   1.5,  0.0,  -3.0,  -3.0,   0.5, -0.5, -3.0,  9.0,    -1.5, -2.5, -7.0, -2.0, -2.0),
    "analysis":  (0.5,   1.5,  0.5,   0.5,  -0.5,  -0.5,  2.0,  9.0, -2.0,    -2.0, -2.0, -3.0, -2.0, -0.5),
    "advice":    (1.0,   1.0,  0.5,  -1.0,   9.0,   0.0,  0.5,  0.5,  0.0,    -2.0, -1.5, -4.0, -2.0, -0.5),
    "motives":   (0.5,   1.5,  0.5,  -0.5,  -2.0,  -0.5,  9.0,  1.0, -0.5,    -2.0, -2.5, -3.0, -2.0, -0.5),
    "growth":    (1.0,   1.5,  2.5,   8.0,  -2.5,   0.0,  0.0,  1.0, -2.0,    -2.0, -2.5, -3.0, -2.0, -1.5),
}
PRIMARY = {"listening": ("validation", "reflection", "question"), "empathy": ("validation", "reflection"),
           "analysis": ("perspectives", "motives"), "motives": ("motives",), "growth": ("growth", "question"),
           "praise": ("praise",), "agreement": ("agreement",), "advice": ("advice",)}
# (factor on gains, factor on costs): negative personas are the hardest to please in the released logs (PAPER.md, 4).
PERSONA = {"negative": (0.85, 1.2), "passive": (1.0, 1.0), "avoidant": (1.0, 0.95)}
# floor: share of a move's worth that ungrounded warmth gets. aside: what moves beside the intention count while the
# intention is unserved. unmet: the cost of leaving the intention unserved.
MODES = {"vanilla": {"floor": 0.15, "aside": 0.7, "unmet": 3.0}, "challenging": {"floor": 0.05, "aside": 0.2, "unmet": 3.5}}
SOFTNESS = {"gain": 6.5, "loss": 9.0}  # points p become 10 * (1 - exp(-p / softness)): the second adds less
COSTS = {"repetition": 5.0, "parroting": 5.0, "garbled": 6.0, "wrong_language": 8.0, "stuffing": 4.0, "too_short": 3.0,
         "too_long": 6.0, "cut": 0.4}  # points at full strength, for any intention
# (shortest, good from, good to, longest): English words, Chinese characters
LENGTHS = {"en": (3, 16, 120, 520), "zh": (4, 24, 260, 1100)}
GROUND = {"en": 1.0, "zh": 1.8}  # shared content units that make a sentence 63 % grounded
NGRAM = {"en": (4, 3), "zh": (6, 4)}  # n-gram lengths: copied from the user, repeated from an own reply
SAID = {"en": (5, 34, 45), "zh": (8, 60, 110)}  # an answer's fact from, to, whole answer to: words or characters


@dataclass(frozen=True)
class Lexicon:
    """One language's word lists, compiled."""

    language: str
    function: frozenset
    stop: frozenset  # words, in Chinese characters, that no content unit holds
    generic: frozenset
    cues: dict
    raw: dict


@functools.cache
def lexicon(language: str) -> Lexicon:
    """Read and compile data/offline/LANGUAGE.toml."""
    raw = tomllib.loads((DATA / f"{language}.toml").read_text(encoding="utf-8"))
    edge = (r"(?<![\w'])(?:", r")(?!\w)") if language == "en" else ("(?:", ")")
    cues = {name: re.compile(edge[0] + "|".join(lines.split("\n")[:-1]) + edge[1]) for name, lines in raw["cues"].items()}
    function, generic = raw["function_words"], raw["generic_words"].split()
    function = function.split() if language == "en" else [c for c in function if not c.isspace()]
    generic = {stem(word) for word in generic} if language == "en" else set(generic)
    stop = function if language == "en" else raw["stop_characters"]
    return Lexicon(language, frozenset(function), frozenset(stop), frozenset(generic), cues, raw)


def user_hash() -> str:
    """What a reward depends on: 16 hex digits over this file and its two data files."""
    parts = (Path(__file__), DATA / "en.toml", DATA / "zh.toml")
    return hashlib.sha256(b"\0".join(part.read_bytes() for part in parts)).hexdigest()[:16]


# ---- text ----------------------------------------------------------------------------------------------------------


def clip(x: float, low: float = 0.0, high: float = 1.0) -> float:
    return max(low, min(high, x))


def saturate(n: int) -> float:
    """One instance counts for 0.8, two for 0.96."""
    return 1 - 0.2**n


def stem(word: str) -> str:
    """A word without its commonest English endings, enough to match `promised` with `promise`."""
    word = word.removesuffix("'s")
    for ending in ("ings", "ing", "ied", "ies", "edly", "ed", "ly", "es", "s", "e", "y"):
        if word.endswith(ending) and len(word) - len(ending) >= 3:
            word = word[: -len(ending)]
            break
    return word[:-1] if len(word) > 3 and word[-1] == word[-2] else word


def tokens(text: str, language: str) -> list[str]:
    """Lower-cased words; in Chinese every character is one, and a run of Latin letters is one."""
    if language == "en":
        return re.findall(r"[a-z]+(?:'[a-z]+)?|\d+|[\u4e00-\u9fff]", text.lower().replace("’", "'"))
    return re.findall(r"[\u4e00-\u9fff]|[a-z]+|\d+", text.lower())


def units(text: str, lex: Lexicon) -> set[str]:
    """Content units: English stems that are neither function nor generic words; Chinese pairs of content characters."""
    if lex.language == "en":
        words = {word for word in tokens(text, "en") if word not in lex.stop and len(word) > 2}
        return {stem(word) for word in words} - lex.generic
    runs = re.findall(r"[\u4e00-\u9fff]+", text)
    pairs = {run[i : i + 2] for run in runs for i in range(len(run) - 1)}
    return {pair for pair in pairs if not lex.stop & set(pair)} - lex.generic


def grams(items: list[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(items[i : i + n]) for i in range(len(items) - n + 1)]


def sentences(text: str) -> list[str]:
    """Sentences with their closing mark; line breaks end one too."""
    return [part.strip() for part in re.findall(r"[^.!?。！？；\n…]+[.!?。！？；…\"”」]*", text) if re.search(r"\w", part)]


def person_neutral(items: list[str]) -> list[str]:
    """Tokens with first and second person made equal, so that `my boss` copied as `your boss` is still a copy."""
    same = dict.fromkeys("i you me 我 你 您".split(), "@") | dict.fromkeys("my your mine yours".split(), "@'s")
    same |= dict.fromkeys("i'm you're am are".split(), "@is") | dict.fromkeys("i've you've".split(), "@has")
    return [same.get(item, item) for item in items]


@dataclass(frozen=True)
class Story:
    """What a reply can be tied to: units of the scene, of all the user said, and the user's words to compare with."""

    scene: frozenset
    said: frozenset
    last: frozenset
    copied: frozenset  # n-grams of what the user said
    names: frozenset


@functools.lru_cache(4096)
def scene_units(profile: Profile) -> tuple[frozenset, frozenset]:
    """Content units of a scene and the names in it: English capitals inside sentences, Chinese family name first."""
    lex = lexicon(profile.language)
    if profile.language == "en":
        names = {name.lower() for name in re.findall(r"(?<=[a-z,] )[A-Z][a-z]+", profile.scene)} - lex.function
    else:
        found = re.findall(r"(?=([赵钱孙李周吴郑王冯陈褚卫蒋沈韩杨朱秦许何吕张孔曹严华金魏陶姜谢邹苏潘葛范彭鲁韦马方袁柳唐薛雷贺罗"
                           r"郝安常于傅康伍余顾孟黄萧尹姚邵汪毛戴宋熊董梁杜阮蓝贾江郭梅林钟徐邱骆高夏蔡田胡万卢丁邓洪程陆叶白][\u4e00-\u9fff]{1,2}))",
                           profile.scene)
        found += [name[:2] for name in found]
        names = {name for name in set(found) if found.count(name) > 3 and not lex.stop & set(name)}
    return frozenset(units(profile.scene, lex)), frozenset(names)


def story(profile: Profile, said: list[str], lex: Lexicon) -> Story:
    scene, names = scene_units(profile)
    n = NGRAM[lex.language][0]
    copied = {gram for text in said for gram in grams(person_neutral(tokens(text, lex.language)), n)}
    return Story(scene, frozenset(units(" ".join(said), lex)), frozenset(units(said[-1], lex) if said else ()),
                 frozenset(copied), names)


# ---- sentences and moves -------------------------------------------------------------------------------------------


@dataclass
class Sentence:
    """A sentence of the reply, what its cues are, and how far a move in it counts."""

    text: str  # lower-cased
    before: str  # the two sentences before it, for moves that span some
    items: list[str]
    lex: Lexicon
    names: frozenset
    ground: float = 0.0  # tied to this person's story
    tied: float = 0.0  # its own ground or what its neighbours lend it
    sound: float = 1.0  # well-formed
    again: float = 0.0  # share of its masked n-grams that were said before
    copied: float = 0.0  # share of its tokens inside n-grams of the user's
    fresh: float = 1.0  # neither said before nor copied

    def has(self, family: str, wide: bool = False) -> int:
        """How many different cues of a family it holds; wide: together with the sentences before it."""
        text = f"{self.before} {self.text}" if wide else self.text
        return len({match.group() for match in self.lex.cues[family].finditer(text)})

    def to_user(self, wide: bool = False) -> bool:
        return bool(re.search(r"\byou|你|您", f"{self.before} {self.text}" if wide else self.text))

    def on_others(self, wide: bool = False) -> bool:
        text = f"{self.before} {self.text}" if wide else self.text
        return self.has("third", wide) > 0 or any(re.search(rf"(?<![a-z]){name}(?![a-z])", text) for name in self.names)

    @functools.cached_property
    def asks(self) -> bool:
        return bool(re.search(r"[?？]|[吗呢]$", self.text))


def validation(s: Sentence) -> float:
    return saturate(s.has("feeling")) * (1.0 if s.has("validate") else 0.5 * s.to_user()) * (0.5 if s.asks else 1.0)


def reflection(s: Sentence) -> float:
    if s.asks or advice(s) > 0.3 or s.has("lecture") or s.has("blame"):
        return 0.0
    return 0.3 + 0.35 * s.to_user() + 0.35 * (s.has("past_act") + s.has("feeling") > 0)


def question(s: Sentence) -> float:
    clauses = [clause.strip() for clause in re.split(r"[,，?？.。]", s.text) if clause.strip()]
    stock = any(s.lex.cues["stock_question"].fullmatch(clause) for clause in clauses)
    return s.asks * (0.15 if stock else 1.0 if s.has("open_question") else 0.6)


def growth(s: Sentence) -> float:
    invites = s.asks or s.has("wonder")
    return saturate(s.has("growth")) * saturate(s.has("inward")) if invites and s.to_user() else 0.0


def advice(s: Sentence) -> float:
    cue = s.has("advice") or (s.lex.cues["imperative"].match(s.text) is not None and not s.to_user())
    return 0.35 + 0.65 * saturate(s.has("concrete")) ** 2 if cue and (not s.asks or s.has("proposal")) else 0.0


def praise(s: Sentence) -> float:  # "You stayed until four. That took nerve." spans two sentences
    return saturate(s.has("praise")) * clip(0.3 + s.has("past_act", wide=True)) if s.to_user(wide=True) else 0.0


def motives(s: Sentence) -> float:
    return saturate(s.has("cause")) * saturate(s.has("mental")) if s.on_others() else 0.0


def perspectives(s: Sentence) -> float:
    sides = s.to_user(wide=True) and s.on_others(wide=True)
    return saturate(s.has("weigh", wide=True)) * (1.0 if sides else 0.5) if s.has("contrast") else 0.0


def agreement(s: Sentence) -> float:
    return 0.0 if s.asks or s.has("blame") else saturate(s.has("agreement"))


DETECTORS = (validation, reflection, question, growth, advice, praise, motives, perspectives, agreement)
MOVES = tuple(detector.__name__ for detector in DETECTORS)


def malformed(text: str, items: list[str], lex: Lexicon, cut: bool) -> float:
    """0 for a sentence of the language, 1 for word salad: banned neighbours, no verb, too few function words, loops."""
    if len(items) < 4:
        return 0.0
    function = sum(item in lex.function for item in items) / len(items)
    loops = sum(a == b for a, b in zip(items, items[1:])) / len(items) + clip(0.45 - len(set(items)) / len(items))
    if lex.language == "en":
        grammar, classes = lex.raw["grammar"], lex.raw["classes"]
        kinds = [next((name for name, words in classes.items() if item in words.split()), "") for item in items]
        allowed = grammar["allowed"]
        wrong = sum([a, b] in grammar["banned"] and f"{x} {y}" not in allowed
                    for a, b, x, y in zip(kinds, kinds[1:], items, items[1:]) if a and b)
        wrong += not cut and items[-1] in grammar["openers"].split()
        runs = [len(run.split()) for run in "".join(" x" if i not in lex.function else "|" for i in items).split("|")]
        odd = sum(not re.search("[aeiouy]", i) and i.isalpha() or bool(re.search(r"[^aeiouy\W\d]{6}|(.)\1\1", i)) for i in items)
        return clip(wrong / len(items) * 9 + clip((0.3 - function) * 5) + clip((max(runs) - 5) / 4) + odd / len(items) * 5
                    + loops * 5 + (0.5 if not lex.cues["verb"].search(text) else 0) + clip((len(items) - 50) / 30))
    grammar, chars = lex.raw["grammar"], "".join(items)
    clauses = [clause for clause in re.split(r"[^\u4e00-\u9fff]+", text) if clause]
    wrong = len(re.findall(grammar["banned"].strip(), text)) + sum(clause[0] in grammar["openers"] for clause in clauses)
    wrong += sum(clause[-1] in grammar["closers"] for clause in clauses[: -1 if cut else None])
    verb = lex.cues["verb"].search(chars) is not None
    return clip(wrong / len(items) * 12 + clip((0.2 - function) * 6) + loops * 4 + (not verb) * 0.5
                + clip((max(map(len, clauses), default=0) - 30) / 20))


def mask(text: str, told: Story, lex: Lexicon) -> list[str]:
    """Tokens with the story's own words made blank: a template with other nouns pasted in is still the same template."""
    known, items = told.said | told.scene, tokens(text, lex.language)
    if lex.language == "en":
        blank = ["_" if stem(item) in known else item for item in items]
    else:
        pairs = [a + b in known for a, b in zip(items, items[1:])]
        blank = ["_" if left or right else item for item, left, right in zip(items, [False, *pairs], [*pairs, False])]
    return [item for item, previous in zip(blank, ["", *blank]) if (item, previous) != ("_", "_")]


def read(reply: str, told: Story, earlier: list[str], lex: Lexicon) -> list[Sentence]:
    """The reply's sentences, each measured for ground, soundness and freshness."""
    n_copy, n_own = NGRAM[lex.language]
    before = {gram for text in earlier for part in sentences(text) for gram in grams(mask(part, told, lex), n_own)}
    parts, result = sentences(reply), []
    for i, part in enumerate(parts):
        items, own = tokens(part, lex.language), units(part, lex)
        s = Sentence(part.lower().replace("’", "'"), " ".join(s.text for s in result[-2:]), items, lex, told.names)
        shared = len(own & told.said) + 0.6 * len(own & told.scene - told.said)
        s.ground = 1 - math.exp(-shared / GROUND[lex.language])
        s.sound = 1 - malformed(s.text, items, lex, i == len(parts) - 1 and re.search(r"\w$", part) is not None)
        here = grams(mask(part, told, lex), n_own)
        s.again = sum(gram in before for gram in here) / len(here) if here else float(part in " ".join(earlier))
        known = [k for k, gram in enumerate(grams(person_neutral(items), n_copy)) if gram in told.copied]
        s.copied = len({j for k in known for j in range(k, k + n_copy)}) / max(1, len(items))
        s.fresh = (1 - clip((s.again - 0.3) / 0.35)) * (1 - clip((s.copied - 0.4) / 0.4))
        before |= set(here)  # a reply that loops repeats itself too
        result.append(s)
    return result


def measure(profile: Profile, said: list[str], earlier: list[str], reply: str, floor: float) -> dict[str, float]:
    """All named features of a reply, 0..1: moves (`raw_`: grounded or not), FAULTS, COSTS, `ground` and `new`."""
    lex = lexicon(profile.language)
    told = story(profile, said, lex)
    parts = read(reply, told, earlier, lex)
    own = [s.ground * s.sound * s.fresh for s in parts]
    for i, s in enumerate(parts):  # "that" and "it" point at the sentence before: it lends its ground, the next one less
        s.tied = max(s.ground, 0.7 * ([0.0, *own][i]), 0.5 * ([*own, 0.0][i + 1]))
    f, kinds = {}, []
    for move, detector in zip(MOVES, DETECTORS):
        raw = [detector(s) for s in parts]
        worth = sorted((r * s.sound * s.fresh * (floor + (1 - floor) * s.tied)
                        for r, s in zip(raw, parts)), reverse=True)
        if move == "reflection":  # giving back is nothing without what is given back
            worth = sorted((r * s.sound * s.fresh * s.ground for r, s in zip(raw, parts)), reverse=True)
        f[move] = clip(sum(worth[:1]) + 0.2 * sum(worth[1:2]))
        f["raw_" + move] = clip(sum(raw) / max(1.2, len(parts) / 3))
        kinds += [move] * (max(raw, default=0.0) >= 0.6)
    size = max(1, sum(len(s.items) for s in parts))
    mean = lambda name: sum(getattr(s, name) * len(s.items) for s in parts) / size  # noqa: E731
    for fault in ("cliche", "lecture", "blame"):
        f[fault] = 1 - 0.45 ** (sum(s.has(fault) for s in parts) / max(1, len(parts) / 4))
    f["flattery"] = max((praise(s) * (1 - s.tied) for s in parts), default=0.0)
    marks = re.findall(r"^\s*(?:[-*•#>]|\d+[.)、])\s|\*\*|```|__", reply, re.M)
    f["markdown"] = clip(len(marks) / 4)
    f["repetition"] = clip((mean("again") - 0.3) / 0.35)
    f["parroting"] = clip((mean("copied") - 0.4) / 0.4)
    junk = len(re.findall(r"<[|/\w][^>]*>|\{\{|\\\\n|\ufffd|[^\w\s]{5,}|(.)\1{4,}", reply)) / 3
    f["garbled"] = clip(1 - mean("sound") + junk) if parts else 0.0
    chinese = cjk_share("".join(re.findall(r"\w", reply)))
    f["wrong_language"] = clip((chinese if profile.language == "en" else 0.7 - chinese) * 2.5) if parts else 0.0
    f["stuffing"] = clip((len(kinds) - 5) / 2)
    shortest, enough, fine, longest = LENGTHS[profile.language]
    f["too_short"] = clip((enough - size) / (enough - shortest)) if parts else 1.0
    f["too_long"] = clip((size - fine) / (longest - fine))
    f["cut"] = float(bool(parts) and re.search(r"\w\s*$", reply) is not None)
    f["ground"], f["new"] = max(own, default=0.0), clip(len(units(reply, lex) - told.last) / (4 if profile.language == "en" else 8))
    return f


def soften(points: float, kind: str) -> float:
    return 10 * (1 - math.exp(-points / SOFTNESS[kind]))


def score(f: dict[str, float], profile: Profile, mode: str) -> float:
    """The change of emotion, -10..10, that features amount to."""
    rates, (gain, cost) = MODES[mode], PERSONA[profile.persona_type]
    weights = dict(zip((*MOVES, *FAULTS), WEIGHTS[profile.intention]))
    primary = PRIMARY[profile.intention]
    gate = f["new"] * (1 - 0.7 * f["too_short"]) * (1 - f["too_long"])
    for fault in ("repetition", "parroting", "garbled", "wrong_language", "stuffing"):
        gate *= 1 - f[fault]
    core = sum(weights[move] * f[move] for move in primary)
    aside = sum(max(0.0, weights[move]) * f[move] for move in MOVES if move not in primary)
    served = clip(core / 6) * gate
    earned = (core + aside * (rates["aside"] + (1 - rates["aside"]) * served)) * gate
    spent = rates["unmet"] * (1 - served)
    spent += sum(max(0.0, -weights[move]) * f["raw_" + move] for move in MOVES)
    spent += sum(-weights[fault] * f[fault] for fault in FAULTS) + sum(points * f[fault] for fault, points in COSTS.items())
    f["served"] = served
    return round(clip(gain * soften(earned, "gain") - cost * soften(spent, "loss"), -10, 10), 1)


def appraise(profile: Profile, mode: str, user_text_so_far: list[str], earlier_replies: list[str], reply: str) -> Appraisal:
    """Hop one: what a reply said, whether it served the hidden intention, and by how much emotion moves (-10..10)."""
    f = measure(profile, user_text_so_far, earlier_replies, reply, MODES[mode]["floor"])
    change = score(f, profile, mode)
    words = lexicon(profile.language).raw["words"]
    comma = ", " if profile.language == "en" else "、"
    moves = comma.join(words[move] for move in MOVES if f["raw_" + move] >= 0.5) or words["nothing"]
    faults = comma.join(words[name] for name in (*FAULTS, *COSTS) if name in words and f[name] >= 0.3) or words["nothing"]
    mood = words["good" if change > 1 else "bad" if change < -1 else "flat"]
    return Appraisal(
        content=words["content"].format(moves=moves),
        target_completion=words["served" if f["served"] > 0.6 else "partly" if f["served"] > 0.25 else "missed"],
        activity=words["activity"].format(mood=mood, why=words["about_me" if f["ground"] > 0.5 else "about_any"]),
        analyse=words["analyse"].format(change=change, faults=faults),
        change=change,
        features={name: round(value, 3) for name, value in f.items()},
    )


# ---- answers -------------------------------------------------------------------------------------------------------

META = re.compile(r"隐藏|主题|玩家|NPC|emotion|Emotion|对话风格|回复|hidden (?:theme|intention)|intention", re.I)
NEED = re.compile(r"(?:希望|渴望|想要|期待|寻求|期望|想).{0,16}(?:建议|共情|倾听|夸|认同|分析|反思|理解|肯定|帮助|指点)"
                  r"|i (?:want|wish|hope|need)\b.{0,40}(?:advice|listen|praise|understand|agree|analy|reflect|empath|side)", re.I)


@functools.lru_cache(4096)
def facts(profile: Profile) -> tuple[str, ...]:
    """Sentences of the scene that the user can say as they stand, in order; never those about the intention."""
    shortest, longest, _ = SAID[profile.language]
    name = re.search(r"姓名[：:]\s*([\u4e00-\u9fff]{2,4})", profile.persona) if profile.language == "zh" else None
    she, result = "她" if "女" in profile.persona[:80] else "他", []
    for line in profile.scene.splitlines():
        if re.match(r"\s*[#*]", line) and re.search(r"反应|不同.{0,8}状态|emotion", line, re.I) and result:
            break  # from here on the scene instructs the actor
        line = re.sub(r"^[\s#>*•\-\d.、]+|\*\*[^*]{1,40}[:：]\*\*|\*\*[^*]*\*\*[:：]|^[^，。]{1,14}[:：]|[*#`]", "", line).strip()
        for sentence in sentences(line):
            if name:
                third_person = name[1] not in sentence and name[1][1:] not in sentence
                sentence = re.sub(f"{name[1]}|{name[1][1:]}" if len(name[1]) > 2 else name[1], "我", sentence)
                sentence = re.sub(f"(?<=[，；]){she}(?!们)|(?<=^){she}(?!们)", "我", sentence)
                if third_person and she in sentence:
                    continue
            size = len(tokens(sentence, profile.language))
            whole = re.search(r"[.!?。！？]$", sentence) and not re.search(r"[:：]", sentence)
            hint = any(label in sentence for label in INTENTIONS[profile.intention])
            if whole and shortest <= size <= longest and not (hint or META.search(sentence) or NEED.search(sentence)):
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

    def pick(self, pool: list[str], slot: str) -> str:
        """One of a pool, by a hash of (profile, seed, turn, slot), unused in this dialogue while any is."""
        fresh = [text for text in pool if text not in self.used] or pool
        number = hashlib.sha256(f"{self.profile.id}|{self.seed}|{len(self.said)}|{slot}".encode()).digest()
        self.used.add(chosen := fresh[int.from_bytes(number[:8], "big") % len(fresh)])
        return chosen


class OfflineUser:
    """A deterministic sentient user (protocol: simulator.User). Answers at the next poll; `mode`: vanilla|challenging."""

    def __init__(self, rules: EmotionRules, mode: str = "vanilla"):
        if mode not in MODES:
            raise ValueError(f"mode is {mode!r}; it must be one of {', '.join(MODES)}")
        self.rules, self.mode = rules, mode
        self.sessions: dict[Key, Session] = {}
        self.ready: dict[Key, UserTurn] = {}

    def start(self, key: Key, profile: Profile, seed: int) -> None:
        s = self.sessions[key] = Session(profile, seed, self.rules.start)
        answers, told = lexicon(profile.language).raw["answers"], facts(profile)
        text = profile.first_talk
        if text is None:
            fact = s.pick(list(told[:2]) or answers["fillers"], "fact")
            text = s.pick(answers["openings"] + answers["open_" + profile.persona_type], "opening").format(fact=fact)
        s.said.append(text)
        self.ready[key] = UserTurn(text, s.emotion)

    def tell(self, key: Key, reply: str) -> None:
        s = self.sessions[key]
        appraisal = appraise(s.profile, self.mode, s.said, s.heard, reply)
        change = self.rules.change(appraisal.change)
        s.emotion = self.rules.step(s.emotion, change)
        ended = self.rules.ending(s.emotion)
        text, thinking = self.answer(s, reply, appraisal, ended)
        s.heard.append(reply)
        s.said.append(text)
        self.ready[key] = UserTurn(text, s.emotion, appraisal, change, ended, thinking)
        if ended:
            del self.sessions[key]

    def poll(self, timeout: float) -> list[tuple[Key, UserTurn | Failed]]:
        ready, self.ready = sorted(self.ready.items()), {}
        return ready

    def answer(self, s: Session, reply: str, appraisal: Appraisal, ended: str | None) -> tuple[str, str]:
        """Hop two: what to say, and one line on how it was planned."""
        lex, profile = lexicon(s.profile.language), s.profile
        answers, words, letter = lex.raw["answers"], lex.raw["words"], band(s.emotion)
        tone = "heard" if appraisal.change > 1.5 else "missed" if appraisal.change < -1.5 else ""
        plan = words["goodbye"] if ended else words["filler"]
        lead = f"{letter}_{profile.persona_type}"
        if ended:
            text = s.pick(answers["bye_" + ended], "bye")
        else:
            asked, gap = units(reply, lex), " " if profile.language == "en" else ""
            left = [fact for fact in facts(profile) if fact not in s.used]
            fact = max(left, key=lambda fact: len(units(fact, lex) & asked), default=None)  # the first of equals
            plan = words["fact"].format(n=len(facts(profile)) - len(left)) if fact else plan
            if tone and self.mode == "vanilla" and len(s.said) % 3:  # a challenging user hides what it feels
                lead = tone
            text = s.pick(answers[lead], "lead") + gap + s.pick([fact] if fact else answers["fillers"], "fact")
            if self.mode == "vanilla" and len(s.said) % 4 == 2:
                text += gap + lex.raw["hints"][profile.intention]
            elif len(tokens(text, profile.language)) < 12:
                text += gap + s.pick(answers["fillers"], "more")
        served = appraisal.features["served"]
        return text, words["thinking"].format(band=letter, persona=profile.persona_type, served=served, lead=lead, source=plan)
