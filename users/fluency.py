"""How people talk: the words of a text, and how far a sentence sounds like something a friend would say.

A trigram model over data/offline/LANGUAGE_talk.txt, replies that we wrote to troubles of many kinds. In it the words
that belong to one story are blanks, so that it knows how supportive talk runs and not what it was about. The offline
user asks it whether a reply is garbled. It knows nothing of meaning.
"""

import functools
import math
import re
import tomllib
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

DATA = Path(__file__).parent.parent / "data" / "offline"
# Chinese is measured against each character's own frequency: bookish talk is not garbled, only its order tells.
AGAINST = {"en": 0.0, "zh": 1.0}  # how much of a word's unigram log-probability is taken off
EXPECTED = {"en": -5.0, "zh": 9.0}  # a word more probable than this is no better for it
OTHER, FOREIGN = {"en": -4.0, "zh": 0.0}, {"en": -8.0, "zh": 0.0}  # cost of an everyday word, of any, not of the story
# Mean naturalness of the words of what is well said and of word salad: a sentence of it, all of it.
NATURAL = {"en": ((-7.4, -8.6), (-6.75, -7.6)), "zh": ((-0.06, -0.78), (0.14, -0.2))}
RUN_ON = {"en": 36, "zh": 26}  # longest run of words without a comma


def clip(x: float) -> float:
    return max(0.0, min(1.0, x))


def stem(word: str) -> str:
    """A word without its commonest English endings, enough to match `promised` with `promise`."""
    word = re.sub(r"(?<=\w{3})(?:ings?|ied|ies|edly|ed|ly|es|s|e|y)$", "", word.removesuffix("'s"))
    return word[:-1] if len(word) > 3 and word[-1] == word[-2] else word


def tokens(text: str, commas: bool = False) -> list[str]:
    """Lower-cased words; a Chinese character is a word of its own. With `commas`, so is each mark inside a sentence."""
    text = re.sub("[，、；：;:]", ",", text.lower().replace("’", "'"))
    words = r"[\u4e00-\u9fff]|[^\W\d_\u4e00-\u9fff]+(?:'[a-z]+)?|\d+"
    return re.findall(words + "|," if commas else words, text)


def sentences(text: str) -> list[str]:
    """Sentences with their closing mark; line breaks end one too."""
    return [part.strip() for part in re.findall(r"[^.!?。！？；\n…]*\w[^.!?。！？；\n…]*[.!?。！？；…\"”」]*", text)]


def blank(word: str) -> str:
    """What stands for a word of somebody's story: its ending, which says much of its part of speech."""
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
    """Log-probability of each word of a sentence (see AGAINST), and of its end unless it is cut off.

    Trigrams interpolated by Witten and Bell (1991). A word of the story (`story`: words or stems) stands for any other
    story's; a word that neither people's talk nor the story holds costs extra.
    """
    model, result = speech(language), []
    words, extra = ["<", "<"], []
    for word in tokens(sentence, commas=True):
        known, mine = word in model.known, word in story or stem(word) in story
        words.append(word if known else blank(word))
        extra.append(0.0 if known or mine else (OTHER if stem(word) in model.common else FOREIGN)[language])
    if not cut:
        words, extra = [*words, ">"], [*extra, 0.0]
    for i, cost in enumerate(extra, 2):
        p, alone = 1e-6, 0.0
        for n in range(3):
            if seen := model.followers.get(tuple(words[i - n : i])):
                p = (seen[words[i]] + len(seen) * p) / (seen.total() + len(seen))
            alone = alone or math.log(p)
        result.append(min(EXPECTED[language], math.log(p) - AGAINST[language] * alone + cost))
    return result


def run_on(sentence: str, language: str) -> float:
    """0 for a sentence that pauses in time, up to 1 for one that does not."""
    return clip(max(len(tokens(part)) for part in re.split("[,，、:：;；]", sentence)) / RUN_ON[language] - 1)


def salad(logps: list[float], part: int, language: str) -> float:
    """0 for what people say, 1 for word salad; a few words prove little."""
    fine, bad = NATURAL[language][part]
    return clip((fine - (sum(logps) + 3 * fine) / (len(logps) + 3)) / (fine - bad))
