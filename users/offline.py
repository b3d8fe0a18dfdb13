"""The offline user: a sentient user that needs no language model, fitted to what judges said.

Hop one measures named features of a reply and applies the coefficients of data/offline/en_fit.json
and zh_fit.json, which scripts/calibrate.py fitted to replies judged blind (English) and to logs of a real sentient
user (Chinese); guards that are not fitted stand before it. Hop two tells the scene fact by fact, the
nearest to the reply first, in a voice that fits persona and emotion. docs/offline_user.md says what
it rewards, how well it agrees with its judges, and what it cannot see.
"""

import functools
import hashlib
import json
import math
import re
import tomllib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace

from simulator import Appraisal, EmotionRules, Failed, Key, Profile, UserTurn, band, cjk_share
from users.fluency import DATA, clip, naturalness, salad, sentences, stem, tokens

VERSION = "5"  # raise it with every change here or in fluency.py that moves a golden appraisal (tests/test_golden.py)
MODES = ("vanilla", "challenging")
LONG = {"en": (45, 400), "zh": (300, 1100)}  # tokens from which a reply is long; the length nobody reads
NEAR = 12  # content units of one sentence of the story that belong together
SAID = {"en": (5, 34), "zh": (8, 85)}  # how long a fact may be to be told: words, characters
TALK = {"en": 32, "zh": 60}  # longest turn that a feeling is added to


@functools.cache
def lexicon(language: str) -> SimpleNamespace:
    """data/offline/LANGUAGE.toml and what was fitted; `stop`: what no content unit holds."""
    raw = tomllib.loads((DATA / f"{language}.toml").read_text(encoding="utf-8"))
    fit = DATA / f"{language}_fit.json"
    sets = {name: frozenset(text.split()) for name, text in raw["people"].items()}
    kin = {word: line.split()[0] for line in raw["kin"].splitlines() for word in line.split()}
    stop = frozenset(raw["function_words"].split() if language == "en" else raw["stop_characters"])
    lex = SimpleNamespace(
        language=language, raw=raw, stop=stop, kin=kin, fit=json.loads(fit.read_text(encoding="utf-8")) if fit.exists() else None,
        generic=frozenset(), **sets)
    lex.generic = frozenset(units(raw["generic_words"], lex) if language == "en" else raw["generic_words"].split())
    lex.cheer = frozenset(units(raw["cheerful"], lex) if language == "en" else raw["cheerful"].split())
    lex.moods = [line.split() for line in raw["feelings"].splitlines()]
    lex.raw["plain_feelings"] = "|".join(rf"\b{w}\b" if language == "en" else w for w in raw["plain_feelings"].split())
    lines = (DATA / f"{language}_talk.txt").read_text(encoding="utf-8").splitlines()
    lex.talk, lex.lines = Counter(unit for line in lines for unit in set(units(line, lex))), len(lines)
    return lex


def user_hash() -> str:
    """What a reward depends on: VERSION, which says how replies are judged, and 8 hex digits over data/offline/."""
    data = b"\0".join(path.read_bytes() for path in sorted(DATA.iterdir()))
    return f"{VERSION}-{hashlib.sha256(data).hexdigest()[:8]}"


def units(text: str, lex: SimpleNamespace) -> list[str]:
    """Content units in order: English stems of what is no function word; Chinese pairs of content characters."""
    if lex.language == "en":
        return [stem(word) for word in tokens(text) if word not in lex.stop and len(word) > 2]
    pairs = re.findall(r"(?=([\u4e00-\u9fff]{2}))", text)
    return [pair for pair in pairs if lex.stop.isdisjoint(pair)]


def rare(unit: str, lex: SimpleNamespace) -> float:
    """1 for a unit that friends' talk never holds, near 0 for one that every line holds."""
    return 1 - math.log(1 + lex.talk[unit]) / math.log(1 + lex.lines)


def soft(x: float, half: float) -> float:
    """0..1: how much of something there is, where `half` is already 63 % of it."""
    return 1 - math.exp(-x / half)


def grams(items: list[str], n: int) -> list[tuple[str, ...]]:
    return list(zip(*(items[i:] for i in range(n))))


def pairs(items: list[str], reach: int) -> set[frozenset]:
    """Pairs of different units that stand within `reach` of each other."""
    return {frozenset((a, b)) for i, a in enumerate(items) for b in items[i + 1 : i + 1 + reach] if a != b}


def owned(text: str, me: frozenset, lex: SimpleNamespace, names: frozenset) -> list[tuple[str, str]]:
    """(content unit, whose it is: "me", "other" or "" if nobody was named in the six words before it)."""
    found = []
    for part in sentences(text):
        owner, since = "", 9
        for word in tokens(part):
            mine = word in me
            if mine or word in lex.others or word in lex.kin or word in names:
                owner, since = "me" if mine else "other", 0
            since += 1
            if word not in lex.stop and len(word) > 2:
                found.append((stem(word), owner if since <= 6 else ""))
    return found


@functools.lru_cache(4096)
def told_in(text: str, language: str) -> SimpleNamespace:
    """What a text tells: its units, which of them stand in one sentence, and whose they are."""
    lex = lexicon(language)
    parts = [units(part, lex) for part in sentences(text)]
    names = frozenset(n.lower() for n in re.findall(r"(?<=[a-z,] )[A-Z][a-z]{2,}", text)) - lex.stop
    owners: dict[str, set[str]] = {}
    for unit, owner in owned(text, lex.me, lex, names):
        owners.setdefault(unit, set()).add(owner)
    near, items = set().union(*(pairs(part, NEAR) for part in parts)), tokens(text)
    kin = {lex.kin[word] for word in items if word in lex.kin}
    return SimpleNamespace(words={unit for part in parts for unit in part}, near=near, names=names, owners=owners,
                           kin=kin, items=set(items), fours=set(grams(items, 4)))


def moods(text: str, lex: SimpleNamespace) -> set[int]:
    """Which kinds of feeling a text names: lines of the lexicon's `feelings`."""
    plain = set(tokens(text)) if lex.language == "en" else text
    return {n for n, words in enumerate(lex.moods) if any(word in plain for word in words)}


def measure(profile: Profile, said: list[str], heard: list[str], reply: str) -> dict[str, float]:
    """All named features of a reply, 0..1 each."""
    lex = lexicon(profile.language)
    items, content, parts = tokens(reply), units(reply, lex), sentences(reply)
    talk = [told_in(text, profile.language) for text in said]
    texts = [told_in(text, profile.language) for text in (profile.scene, profile.persona)] + talk
    words, said_words = (set().union(*(t.words for t in found)) for found in (texts, talk))
    mine, size, count = (set(content) & words) - lex.generic, max(1, len(items)), max(3, len(content))
    shared = set().union(*(pairs([u for u in units(part, lex) if u in mine], 4) for part in parts))
    joined = {pair for pair in shared if any(pair in t.near for t in texts)}
    kin, known_kin = {lex.kin[word] for word in items if word in lex.kin}, set().union(*(t.kin for t in texts))
    wrong_owner = 0.0
    for unit, who in owned(reply, lex.you, lex, texts[0].names):
        whose = set().union(*(t.owners.get(unit, ()) for t in texts))
        if who and whose and unit not in lex.generic and not whose & {who, ""}:
            wrong_owner += rare(unit, lex)
    threes, before = grams(items, 3), {gram for text in heard for gram in grams(tokens(text), 3)}
    fours, long = grams(items, 4), LONG[lex.language]
    every = words | set().union(*(t.items for t in texts))
    plain = reply.lower().replace("’", "'")

    def times(key: str) -> int:
        return len(re.findall(lex.raw[key], plain))

    named, theirs = moods(reply, lex), set().union(*(moods(text, lex) for text in (profile.scene, *said)))
    logps = [naturalness(part, every, lex.language, cut=False) for part in parts]
    return {
        "story": soft(math.fsum(rare(unit, lex) for unit in mine), 1.5),
        "talk": soft(math.fsum(rare(unit, lex) for unit in mine & said_words), 1.0),
        "foreign": sum(unit not in words and lex.talk[unit] < 3 for unit in content) / count,
        "joined": soft(len(joined), 2),
        "wrong_kin": soft(len(kin - known_kin), 1.0),
        "wrong_owner": soft(wrong_owner, 1.5),
        "cheer": soft(sum(unit in lex.cheer for unit in content), 1.4),
        "marks": soft(len(re.findall(r"[\n\"“”*#\[\]{}<>/|;:()]", reply)), 2),
        "you": clip(6 * sum(word in lex.you for word in items) / size),
        "loops": 1 - len(set(threes)) / max(1, len(threes)),
        "again": sum(gram in before for gram in threes) / max(1, len(threes)),
        "copied": sum(any(gram in t.fours for t in talk) for gram in fours) / max(1, len(fours)),
        "cut": float(re.search(r"[\w,]\s*$", reply) is not None), "asks": clip(len(re.findall("[?？]", reply)) / 2),
        "run_on": clip((max((len(tokens(part)) for part in parts), default=0) - 28) / 20),
        "length": clip(size / long[0]), "long": clip(size / long[0] - 1),
        "garbled": salad([x for part in logps for x in part], 1, lex.language),
        "worst": max((salad(part, 0, lex.language) for part in logps), default=0.0),
        "absolves": clip(times("absolves")), "blames": clip(times("blames")), "feelings": clip((len(named) + times("plain_feelings")) / 2),
        "heard": float(bool(named & moods(said[-1], lex))), "misheard": clip(len(named - theirs) / 2),
        "same": max((len(set(items) & old) / max(1, len(set(items) | old)) for old in map(set, map(tokens, heard))), default=0.0),
        "doubled": 1 - len(set(items)) / size,
        "self": clip((times("first_person") - times("as_a_friend")) / 2),
        "wrong_number": float(any(word in lex.numbers or word.isdigit() for word in set(items) - every)),
    }


# Products: good words count as far as they are about this person, facts as far as they are right, "not your fault" where
# a hidden intention asks for it (judges: +5.8 a reply; to everybody else +0.7, and said to everybody it is a formula).
PRODUCTS = (("story", "tone"), ("story", "need"), ("story", "foreign"), ("story", "cheer"), ("joined", "wrong_owner"),
            ("length", "joined"), ("absolves", "agreement"))


def phrases(reply: str, language: str) -> set[str]:
    """The n-grams that the fitted word list is of: one or two English words, one to three Chinese characters."""
    if language == "en":
        items = re.findall(r"[a-z]+(?:'[a-z]+)?|[?!]", reply.lower().replace("’", "'"))
        return {*items, *map(" ".join, grams(items, 2))}
    items = re.findall(r"[\u4e00-\u9fff]+|[？！?!*#]", reply)
    return {part[i : i + n] for part in items for n in (1, 2, 3) for i in range(len(part) - n + 1)}


def summed(found: set[str], words: dict[str, dict], key: str) -> float:
    """What the phrases of a reply weigh together, for everybody ("all") or for one intention."""
    return math.fsum(words[gram].get(key, 0.0) for gram in found if gram in words) / math.sqrt(max(9, len(found)))


def shares(f: dict[str, float], found: set[str], fit: dict, turn: int) -> list[tuple[float, dict]]:
    """Sets of coefficients and how much each counts: what reads as if a small model had said it is judged as such."""
    if "gate" not in fit:
        return [(1.0, fit["able" if turn else "first"])]
    z = fit["gate"]["intercept"] + summed(found, fit["gate"]["words"], "all")
    small = 1 / (1 + math.exp(-z - math.fsum(weight * f[name] for name, weight in fit["gate"]["features"].items())))
    return [(1 - small, fit["able"]), (small, fit["small"])]


def wording(found: set[str], profile: Profile, fit: dict) -> list[float]:
    """[tone, need] of phrases, each -1..1: how far they please anybody, and how far they serve this intention."""
    sums = (summed(found, fit["words"], key) / limit for key, limit in zip(("all", profile.intention), fit["limits"]))
    return [max(-1.0, min(1.0, x)) for x in sums]


def with_context(f: dict[str, float], profile: Profile, turn: int, emotion: float) -> dict[str, float]:
    """The features, with what is not of the reply, and the products; `tone` and `need` are in `f` already."""
    f = f | {"turn": min(1.0, turn / 4), "emotion": emotion / 50 - 1, "emotion2": (emotion / 50 - 1) ** 2,
             "negative": float(profile.persona_type == "negative"), "agreement": float(profile.intention == "agreement")}
    return f | {f"{a} x {b}": f[a] * f[b] for a, b in PRODUCTS}


def guards(f: dict[str, float], profile: Profile, reply: str) -> float:
    """0..1, not fitted: how far a reply is empty, noise, of another language, a loop, a copy, or far too long."""
    size, (_, longest) = len(tokens(reply)), LONG[profile.language]
    chinese = cjk_share("".join(re.findall(r"\w", reply)))
    wrong = (chinese if profile.language == "en" else 0.7 - chinese) * 2.5
    junk = len(re.findall(r"<[|/\w][^>]*>|\{\{|\\\\n|\ufffd|[^\w\s]{5,}|(.)\1{4,}", reply)) / 2
    return max(float(size == 0), clip(wrong), clip(junk), clip(size / longest - 1), clip((f["again"] - 0.5) / 0.3),
               clip((f["copied"] - 0.4) / 0.4), clip((f["loops"] - 0.2) / 0.3))


def appraise(profile: Profile, mode: str, said: list[str], heard: list[str], reply: str, emotion: float = 50.0) -> Appraisal:
    """Hop one: what a reply said, whether it served the hidden intention, and by how much emotion moves (-10..10)."""
    lex = lexicon(profile.language)
    f = measure(profile, said, heard, reply) | {"tone": 0.0, "need": 0.0}
    found, intercept, added = phrases(reply, profile.language), 0.0, Counter()  # to the log-odds of a good reply
    parts = shares(f, found, lex.fit, len(heard))
    f["small"] = sum(share for share, _ in parts[1:])
    for share, fit in parts:
        tone, need = wording(found, profile, fit)
        own = with_context(f | {"tone": tone, "need": need}, profile, len(heard), emotion)
        added.update({name: share * weight * own[name] for name, weight in fit["features"].items()})
        intercept, f["tone"], f["need"] = intercept + share * fit["intercept"], f["tone"] + share * tone, f["need"] + share * need
    f = with_context(f, profile, len(heard), emotion)
    served = clip(0.5 + f["need"])
    change = 20 / (1 + math.exp(-intercept - sum(added.values()))) - 10
    if mode == "challenging" and change > 0:
        change *= served  # moved by what the intention wants alone
    guard = guards(f, profile, reply)
    change = round(min(change, change * (1 - guard) - 9 * guard), 1)
    words, comma = lex.raw["words"], ", " if profile.language == "en" else "、"
    told = Counter()  # by what there are words for; of a product, its last factor that has some
    for name, amount in added.items():
        told.update({part: amount for part in [part for part in name.split(" x ") if part in lex.raw["features"]][-1:]})
    order = sorted(told, key=told.get)
    good, bad = ([lex.raw["features"][name] for name in names if sign * told[name] > 0.3][:3] or [words["nothing"]]
                 for names, sign in ((order[::-1], 1), (order, -1)))
    mood = words["good" if change > 1 else "bad" if change < -1 else "flat"]
    activity = words["activity"].format(mood=mood, why=words["about_me" if f["story"] > 0.5 else "about_any"])
    shown = {name: round(float(value), 3) for name, value in f.items() if " x " not in name}
    return Appraisal(
        words["content"].format(moves=comma.join(good)), words["served" if served > 0.7 else "partly" if served > 0.4 else "missed"],
        activity, words["analyse"].format(change=change, faults=comma.join(bad)), change, shown | {"served": round(served, 3), "guard": round(guard, 3)})


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

    def resume(self, key: Key, profile: Profile, said: Sequence[str], heard: Sequence[str], emotion: float) -> None:
        """Begin in the middle of a talk, after what was `said` and `heard`; nothing to poll."""
        used = {fact for fact in facts(profile) if any(fact in text for text in said)}
        self.sessions[key] = Session(profile, 0, emotion, list(said), list(heard), used)

    def tell(self, key: Key, reply: str) -> None:
        s = self.sessions[key]
        appraisal = appraise(s.profile, self.mode, s.said, s.heard, reply, s.emotion)
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
            asked, gap = set(units(reply, lex)), " " * (profile.language == "en")
            left = [fact for fact in facts(profile) if fact not in s.used]
            fact = max(left, key=lambda fact: len(set(units(fact, lex)) & asked), default=None)  # the first of equals
            plan = words["fact"].format(n=len(facts(profile)) - len(left)) if fact else words["filler"]
            text = s.pick(answers[lead], "lead") + gap + s.pick([fact] if fact else answers["fillers"], "fact")
            if vanilla and len(s.said) % 4 == 2:
                text += gap + lex.raw["hints"][profile.intention]
            elif vanilla and len(tokens(text)) < TALK[lex.language]:
                text += gap + s.pick(answers["feel_" + kind], "feel")  # something for a kind reply to answer to
            elif len(tokens(text)) < 12:
                text += gap + s.pick(answers["fillers"], "more")
        return text, words["thinking"].format(**appraisal.features, band=letter, persona=kind, lead=lead, source=plan)
