"""How people talk: the words of a text, and how far a sentence sounds like what a friend would say.

The offline user asks a trigram model of data/offline/LANGUAGE_talk.txt, replies that we wrote, for
garbled talk. The words of one story are blanks in it: it knows how talk runs, not what it means.
"""

import functools
import math
import re
import tomllib
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

DATA = Path(__file__).parent.parent / "data" / "offline"
# In Chinese only the order tells, not how rare a character is: bookish talk is not garbled.
AGAINST = {"en": 0.0, "zh": 1.0}  # how much of a word's unigram log-probability is taken off
EXPECTED = {"en": -5.0, "zh": 9.0}  # a word more probable than this is no better for it
OTHER = {"en": -4.0, "zh": 0.0}  # what an everyday word costs that is not of the person's story
FOREIGN = {"en": -8.0, "zh": 0.0}  # what any other word costs that is not of the story
# Mean naturalness (of what is well said, of word salad): in one sentence, in a whole reply.
NATURAL = {"en": ((-7.2, -8.4), (-6.6, -7.4)), "zh": ((-0.06, -0.78), (0.14, -0.2))}


def clip(x: float) -> float:
    return max(0.0, min(1.0, x))


def stem(word: str) -> str:
    """A word without its commonest English endings, enough to match `promised` with `promise`."""
    word = re.sub(r"(?<=\w{3})(?:ings?|ied|ies|edly|ed|ly|es|s|e|y)$", "", word.removesuffix("'s"))
    return word[:-1] if len(word) > 3 and word[-1] == word[-2] else word


def tokens(text: str, commas: bool = False) -> list[str]:
    """Lower-cased words; each Chinese character is one, and with `commas` each inner mark."""
    text = re.sub("[，、；：;:]", ",", text.lower().replace("’", "'"))
    words = r"[\u4e00-\u9fff]|[^\W\d_\u4e00-\u9fff]+(?:'[a-z]+)?|\d+"
    return re.findall(words + "|," if commas else words, text)


def sentences(text: str) -> list[str]:
    """Sentences with their closing mark; line breaks end one too."""
    return [part.strip() for part in re.findall(
        r"[^.!?。！？；\n…]*\w[^.!?。！？；\n…]*[.!?。！？；…\"”」]*", text)]  # fmt: skip


def blank(word: str) -> str:
    """What stands for a word of a story: its ending, which says much of its part of speech."""
    return "_" + (re.search(r"ing$|ed$|ly$|s$|$", word)[0] if len(word) > 3 else "")


@functools.cache
def speech(language: str) -> SimpleNamespace:
    """Trigram counts over data/offline/LANGUAGE_talk.txt, our sample of how a good friend talks."""
    lines = (DATA / f"{language}_talk.txt").read_text(encoding="utf-8").splitlines()
    parts = [tokens(part, commas=True) for line in lines for part in sentences(line)]
    known = {word for word, n in Counter(word for part in parts for word in part).items() if n > 1}
    raw = tomllib.loads((DATA / f"{language}.toml").read_text(encoding="utf-8"))
    known |= set(raw["function_words"].split() if language == "en" else raw["function_words"])
    common = {stem(word) for word in raw.get("common_words", "").split()}
    followers: dict[tuple, Counter] = {}
    for part in parts:
        items = ["<", "<", *(word if word in known else blank(word) for word in part), ">"]
        for i in range(2, len(items)):
            for n in range(3):
                *context, word = items[i - n : i + 1]
                followers.setdefault(tuple(context), Counter())[word] += 1
    return SimpleNamespace(known=known, common=common, followers=followers)


def naturalness(sentence: str, story: set[str], language: str, cut: bool) -> list[float]:
    """Log-probability of each word, and of the end unless `cut` (see AGAINST, OTHER, FOREIGN)."""
    model, result = speech(language), []
    words, extra = ["<", "<"], []
    for word in tokens(sentence, commas=True):
        # `story` holds words and stems; a word of it stands for one of any other story.
        known, mine = word in model.known, word in story or stem(word) in story
        words.append(word if known else blank(word))
        extra.append(
            0.0 if known or mine else (OTHER if stem(word) in model.common else FOREIGN)[language])
    if not cut:
        words, extra = [*words, ">"], [*extra, 0.0]
    for i, cost in enumerate(extra, 2):
        p, alone = 1e-6, 0.0  # trigrams, interpolated as by Witten and Bell (1991)
        for n in range(3):
            if seen := model.followers.get(tuple(words[i - n : i])):
                p = (seen[words[i]] + len(seen) * p) / (seen.total() + len(seen))
            alone = alone or math.log(p)
        result.append(min(EXPECTED[language], math.log(p) - AGAINST[language] * alone + cost))
    return result


def salad(logps: list[float], part: int, language: str) -> float:
    """0 for what people say, 1 for word salad; a few words prove little."""
    fine, bad = NATURAL[language][part]
    return clip((fine - (sum(logps) + 3 * fine) / (len(logps) + 3)) / (fine - bad))
