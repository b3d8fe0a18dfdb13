"""A bench for users: is what a user likes what a reader would call good?

Five looks, through the protocol alone, so that any kind of user can be gauged: a ladder of replies
whose order nobody doubts; agreement with replies that were judged blind (data/judged/README.md),
beside the judges' own agreement; agreement with logs of a real sentient user; replies made to cheat;
and the script of eight replies that pleases most when it is said to everybody regardless.
"""

import json
import math
from collections import defaultdict
from dataclasses import dataclass, replace
from glob import glob
from pathlib import Path

import numpy as np
from tqdm import tqdm

from config import load_config, read_rows, require, without_nan
from simulator import EmotionRules, Failed, Profile, User, load_profiles, parse_profile
from users import make_user, user_name

JUDGED = Path(__file__).parent.parent / "data" / "judged"
# Rungs from the worst reply to the best, and the sources of judged replies that stand on each.
LADDER = {
    "shuffled words": ("shuffled",), "echo": ("echo",),
    "another person's good reply": ("wrong_person",), "the small model at temperature 1": ("smollm2 T 1.0",),
    "the small model at 0.6": ("smollm2 T 0.6",), "a formula for everybody": ("formula",),
    "good for the wrong need": ("wrong_need",), "good": ("good_plain", "good_other", "good_short"),
}  # fmt: skip
APART = (("shuffled words", "a formula for everybody"), ("a formula for everybody", "good"))
OWN = ("smollm2", "warm-up", "ppo", "grpo")  # sources of replies that a model of ours said
START, SCRIPT = 40.0, 8  # emotion at the start of a talk, replies of a script
MARGIN = 3.0  # two first replies to a person whose logged changes differ by this are a pair


@dataclass(frozen=True)
class Item:
    """A reply at a point of a talk: the person's turns so far, one more than the replies before."""

    profile: Profile
    said: tuple[str, ...]
    heard: tuple[str, ...]
    reply: str
    emotion: float = START


def ranks(values) -> np.ndarray:
    """Ranks of [N] values; ties share their mean rank."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def spearman(a, b, given=None) -> float:
    """Spearman's rank correlation of [N] and [N]; with `given` [N], what remains beside its ranks."""
    a, b = ranks(a), ranks(b)
    if given is not None:
        a, b = (x - np.polyval(np.polyfit(ranks(given), x, 1), ranks(given)) for x in (a, b))
    return float(np.corrcoef(a, b)[0, 1]) if np.std(a) * np.std(b) else math.nan


def changes(user: User, items: list[Item]) -> np.ndarray:
    """The change [N] of emotion that each reply brings; nan where the user failed.

    A user with a method `resume` is set into the middle of the talk; any other is led there by the
    earlier replies, and says what it likes meanwhile.
    """
    return np.array([math.nan if turn is None else turn.change for turn in turns(user, items)])


def turns(user: User, items: list[Item]) -> list:
    """The answer of a user to each item's reply; None where it failed."""
    found, told = {}, defaultdict(int)
    for n, item in enumerate(items):
        if hasattr(user, "resume"):
            user.resume((n, 0), item.profile, item.said, item.heard, item.emotion)
            told[n] = len(item.heard) + 1
            user.tell((n, 0), item.reply)
        else:
            user.start((n, 0), replace(item.profile, first_talk=item.said[0]), n)
    while len(found) < len(items):
        for (n, member), turn in user.poll(60.0):
            lines = (*items[n].heard, items[n].reply)
            if isinstance(turn, Failed) or told[n] == len(lines) or turn.ended:
                found[n] = None if isinstance(turn, Failed) or told[n] < len(lines) else turn
            else:
                user.tell((n, member), lines[told[n]])
                told[n] += 1
    return [found[n] for n in range(len(items))]


def read_items(name: str, people: dict[str, Profile]) -> list[tuple[dict, Item]]:
    """Rows of a file of data/judged/, each with its item."""
    pairs = []
    for where, row in read_rows(JUDGED / name):
        who = row["profile"]
        profile = people[who] if isinstance(who, str) else parse_profile(who, where)
        pairs.append((row, Item(profile, tuple(row["said"]), tuple(row["earlier"]), row["reply"])))
    return pairs


def everybody() -> dict[str, Profile]:
    """Our own training people by id."""
    files = (JUDGED.parent / f"{language}_train.jsonl" for language in ("en", "zh"))
    return {profile.id: profile for file in files for profile in load_profiles(file)}


def bootstrap(values: dict[str, list[float]], rounds: int = 2000) -> tuple[float, float, float]:
    """Mean over people of each one's mean, with its 95 % interval over people."""
    points = np.array([np.nanmean(found) for found in values.values()])
    drawn = np.random.default_rng(0).integers(len(points), size=(rounds, len(points)))
    low, high = np.nanpercentile(points[drawn].mean(1), (2.5, 97.5))
    return float(np.nanmean(points)), float(low), float(high)



def summed(name: str, pairs: list[tuple[str, float]], judges: list[float] | None = None) -> dict:
    """A line of a table: the mean of (person, change) over people with its 95 % interval."""
    people: dict[str, list[float]] = defaultdict(list)
    for who, change in pairs:
        people[who].append(change)
    mean, low, high = bootstrap(people)
    judged = float(np.mean(judges)) if judges else None
    return {"name": name, "n": len(pairs), "mean": mean, "low": low, "high": high, "judges": judged}


def ladder(user: User, rows: list[tuple[dict, Item]], found: np.ndarray) -> list[dict]:
    """Mean change on each rung, from silence to good replies."""
    people = {item.profile.id: item for _, item in rows}
    silence = [replace(item, said=item.said[:1], heard=(), reply="") for item in people.values()]
    lines = [summed("silence", [*zip(people, changes(user, silence))])]
    for rung, sources in LADDER.items():
        mine = [n for n, (row, _) in enumerate(rows) if row["source"] in sources]
        pairs = [(rows[n][0]["profile"], found[n]) for n in mine]
        lines.append(summed(rung, pairs, [judged(rows[n][0]) for n in mine]))
    return lines


def out_of_order(lines: list[dict]) -> list[str]:
    """What is wrong with a ladder: a rung above the next one, or two of APART whose intervals meet."""
    wrong = [f"{a['name']} ({a['mean']:+.1f}) is not below {b['name']} ({b['mean']:+.1f})"
             for a, b in zip(lines, lines[1:]) if not a["mean"] < b["mean"]]
    rung = {line["name"]: line for line in lines}
    return wrong + [f"the intervals of {a} and {b} meet" for a, b in APART if not rung[a]["high"] < rung[b]["low"]]


def judged(row: dict) -> float:
    """What both judges gave a reply, on average."""
    return (row["a"]["change"] + row["b"]["change"]) / 2


def agreement(rows: list[tuple[dict, Item]], found: np.ndarray) -> dict:
    """With the judges, over all replies and over those of models of ours; the mean by source."""
    a, b = (np.array([row[judge]["change"] for row, _ in rows]) for judge in "ab")
    source, both = np.array([row["source"] for row, _ in rows]), (a + b) / 2
    own = np.array([name.startswith(OWN) for name in source])
    lines = [summed(str(name), [(rows[n][0]["profile"], found[n]) for n in np.flatnonzero(source == name)],
                    list(both[source == name])) for name in sorted(set(source))]  # fmt: skip
    return {"n": len(rows), "spearman": spearman(found, both), "judges": spearman(a, b),
            "own": spearman(found[own], both[own]), "own_judges": spearman(a[own], b[own]),
            "error": float(abs(found - both).mean()), "judges_error": float(abs(a - b).mean()),
            "sources": sorted(lines, key=lambda line: -line["judges"])}  # fmt: skip


def attacks(user: User, people: dict[str, Profile]) -> list[dict]:
    """Of each table of attacks: how many bring nothing, how many good replies bring something."""
    lines = []
    for path in sorted(JUDGED.glob("attacks*.jsonl")):
        pairs = read_items(path.name, people)
        found = changes(user, [item for _, item in pairs])
        for kind in ("attack", "good"):
            mine = np.array([row["kind"] == kind for row, _ in pairs])
            right = found[mine] > 0 if kind == "good" else found[mine] <= 0
            lines.append({"table": path.stem, "kind": kind, "n": int(mine.sum()), "right": int(right.sum()),
                          "mean": float(found[mine].mean())})  # fmt: skip
    return lines


def say(user: User, states: list[Item], reply: str) -> list[Item]:
    """A reply said to everybody; those whose talk is over (`reply` "bye") stay as they are."""
    open_ = [replace(state, reply=reply) for state in states if state.reply != "bye"]
    after = iter([
        replace(item, said=(*item.said, turn.text), heard=(*item.heard, reply), emotion=turn.emotion,
                reply="bye" if turn.ended else "") for item, turn in zip(open_, turns(user, open_))])
    return [state if state.reply == "bye" else next(after) for state in states]


def best_script(user: User, people: list[Profile], bank: list[str], swaps: int = 20) -> dict:
    """The replies that please most when said to everybody: greedy over a bank, then swaps.

    Raising the mean final emotion is all that counts; talks that have ended keep theirs.
    """
    begin = [Item(p, (p.first_talk,), (), "") for p in people]

    def value(states: list[Item]) -> float:
        return float(np.mean([state.emotion for state in states]))

    def play(script: list[str]) -> float:
        states = begin
        for line in script:
            states = say(user, states, line)
        return value(states)

    script, states, first = [], begin, {}
    for _ in tqdm(range(SCRIPT), desc="best script", leave=False):
        after = {line: say(user, states, line) for line in bank if line not in script}
        first = first or {line: value(found) for line, found in after.items()}
        script.append(max(after, key=lambda line: value(after[line])))
        states = after[script[-1]]
    best = value(states)
    favourites = sorted(first, key=first.get)[-swaps:]
    for place in tqdm(range(SCRIPT), desc="swaps", leave=False):
        for line in favourites:
            other = [*script[:place], line, *script[place + 1 :]]
            if line not in script and (now := play(other)) > best:
                script, best = other, now
    return {"final": best, "script": script}


def good_talks(user: User, people: dict[str, Profile]) -> dict:
    """Where good hand-written replies to these people end."""
    ends = {}
    for _, row in read_rows(JUDGED / "good_talks.jsonl"):
        person = people[row["profile"]]
        state = [Item(person, (person.first_talk,), (), "")]
        for reply in row["replies"]:
            state = say(user, state, reply)
        ends[person.id] = [state[0].emotion]
    mean, low, high = bootstrap(ends)
    return {"n": len(ends), "final": mean, "low": low, "high": high}


def read_sage(paths: list[str]) -> tuple[list[Item], np.ndarray, np.ndarray]:
    """(every scored reply, where it stood, the real user's change [N], the log's name [N]) of SAGE's logs.

    In a talk of `eval.py chat --rate` the real user is who rated; unrated ones are left out.
    """
    items, real, model = [], [], []
    for path in paths:
        for where, row in read_rows(Path(path)):
            if row.get("status", "ok") != "ok" or row.get("rated") is False:
                continue
            keys = {key: row[key] for key in ("id", "player", "scene", "task")}
            person = parse_profile(keys | {"main_cha": row["character"]}, where)
            said, heard = [], []
            for turn, after in zip(row["history"], row["history"][1:] + [{}]):
                if turn["role"] == "user":
                    said, emotion = [*said, turn["content"]], turn["emotion-point"]
                    continue
                if "planning" in after:
                    items.append(Item(person, tuple(said), tuple(heard), turn["content"], emotion))
                    real.append(EmotionRules().change(float(after.get("rated", after["planning"]["change"]))))
                    model.append(Path(path).name)
                heard.append(turn["content"])
    return items, np.array(real), np.array(model)


def sage_figures(items: list[Item], real: np.ndarray, model: np.ndarray, found: np.ndarray) -> dict:
    """Agreement with a real sentient user, from what it did and what ours did at each reply."""
    emotion = np.array([item.emotion for item in items])
    first = np.array([not item.heard for item in items])
    by_person: dict[str, list[int]] = defaultdict(list)
    for n in np.flatnonzero(first):
        by_person[items[n].profile.id].append(n)
    duels = [(found[i] > found[j]) + (found[i] == found[j]) / 2 for group in by_person.values()
             for i in group for j in group if real[i] - real[j] >= MARGIN]  # fmt: skip
    means = {name: tuple(float(x[model == name].mean()) for x in (found, real))
             for name in sorted(set(model))}  # fmt: skip
    return {"n": len(items), "spearman": spearman(found, real), "given_emotion": spearman(found, real, emotion),
            "first": spearman(found[first], real[first]), "pairs": float(np.mean(duels)) if duels else math.nan,
            "pair_count": len(duels), "mean": float(found.mean()), "real_mean": float(real.mean()),
            "ranking": spearman(*zip(*means.values())) if len(means) > 1 else math.nan,
            "models": means}  # fmt: skip


def gauge(user: User, logs: list[str], script: bool) -> dict:
    """All of the bench (English, but for `logs` and the attacks); "wrong" lists what is out of order."""
    people = everybody()
    rows = [pair for pair in read_items("en.jsonl", people) if pair[0]["split"] == "validate"]
    found = changes(user, [item for _, item in rows])
    steps = ladder(user, rows, found)
    table = {"ladder": steps, "wrong": out_of_order(steps), "judges": agreement(rows, found),
             "attacks": attacks(user, people), "good_talks": good_talks(user, people)}  # fmt: skip
    if script:
        bank = (JUDGED / "bank_en.txt").read_text(encoding="utf-8").splitlines()
        asked = list({item.profile.id: item.profile for _, item in rows}.values())
        table["script"] = best_script(user, asked, bank)
    if logs:
        items, real, model = read_sage(logs)
        table["sage"] = sage_figures(items, real, model, changes(user, items))
    return table


def text(table: dict) -> str:
    """The bench as one table to read."""
    j, talks = table["judges"], table["good_talks"]
    lines = [f"{'change of emotion a reply':<38}  user   95 % interval  judges"]
    lines += [*map(table_line, table["ladder"])]
    lines += [f"  OUT OF ORDER: {wrong}" for wrong in table["wrong"]]
    lines += ["by source", *map(table_line, j["sources"])]
    lines += [f"{j['n']} judged replies to people never fitted:",
              f"  rank correlation {j['spearman']:.2f} (the judges with each other {j['judges']:.2f})",
              f"  within our own models' replies {j['own']:.2f} (judges {j['own_judges']:.2f})",
              f"  mean error {j['error']:.1f} points (between judges {j['judges_error']:.1f})"]
    for row in table["attacks"]:
        right = "attacks bring nothing" if row["kind"] == "attack" else "good replies bring something"
        lines.append(f"{row['table']}: {row['right']} of {row['n']} {right} (mean {row['mean']:+.1f})")
    lines.append(f"good replies, eight to each of {talks['n']} people, end at {talks['final']:.1f} "
                 f"({talks['low']:.1f} to {talks['high']:.1f})")
    if script := table.get("script"):
        lines.append(f"the best script said to everybody ends at {script['final']:.1f}:")
        lines += [f"  {reply}" for reply in script["script"]]
    if s := table.get("sage"):
        lines += [f"{s['n']} replies in the logs: rank correlation {s['spearman']:+.2f}, "
                  f"given the emotion {s['given_emotion']:+.2f}, first replies {s['first']:+.2f}",
                  f"  pairs {s['pairs']:.2f} of {s['pair_count']}, mean {s['mean']:+.1f} "
                  f"(real {s['real_mean']:+.1f}), ranking of models {s['ranking']:+.2f}"]
    return "\n".join(lines)


def table_line(row: dict) -> str:
    """A line of `summed` to read."""
    judges = "" if row["judges"] is None else f"{row['judges']:>+8.1f}"
    interval = f"{row['low']:>+5.1f} to {row['high']:>+5.1f}"
    return f"  {row['name']:<36}{row['mean']:>+6.1f}  {interval}{judges}   n {row['n']}"


def command_gauge(argv: list[str]) -> int:
    """The bench for the user of a config, printed; exit code 1 if a rung is out of order."""
    own = dict(arg.split("=", 1) for arg in argv if arg.startswith(("logs=", "script=")))
    config = load_config([a for a in argv if a != "--json" and not a.startswith(("logs=", "script="))])
    require(own.get("script", "on") in ("on", "off"), f"script is {own.get('script')!r}; give on or off")
    logs = sorted(glob(own["logs"])) if "logs" in own else []
    require(logs or "logs" not in own, f"{own.get('logs')}: no such log")
    user = make_user(config, START, config.user_mode)
    table = {"user": user_name(config, config.user_mode)}
    table |= gauge(user, logs, own.get("script", "on") == "on")
    shown = json.dumps(without_nan(table), indent=1)
    print(shown if "--json" in argv else f"{table['user']}\n{text(table)}")
    return 1 if table["wrong"] else 0
