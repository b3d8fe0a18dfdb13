"""Replies to be judged blind: picks them, writes batches for two judges, and joins their judgements.

    python scripts/blind.py pick before=LOG.jsonl ppo_0=LOG.jsonl ... > REPLIES.jsonl
    python scripts/blind.py write REPLIES.jsonl OUT [--batches 8]    OUT/a0.txt ... b7.txt, [ab]_pairs.txt
    python scripts/blind.py join REPLIES.jsonl OUT > JUDGED.jsonl
    python scripts/blind.py report JUDGED.jsonl...           means by source, gains over the source "before"

A line of REPLIES has id, profile, source, how, said, earlier and reply (data/judged/README.md), or, where two replies
to the same words are to be compared, `before` and `after` in place of `reply`. `pick` takes both from benchmark logs:
of each person and log four replies, the same dialogues and turns in all of them, and a pair of first replies. A batch
holds people with all their replies in random order, without source; the two judges' batches are grouped and ordered
differently. Each is given to a fresh judge with prompts/judge_en.txt (pairs: prompts/pair_en.txt), who writes a file of
the same name that ends in .jsonl: {"id", "change", "soundness", "why"} or {"id", "better"} a line. `join` fails where a
judgement is missing, double or out of range; of a pair it keeps whether each judge preferred `after`. `report` sets
each file's runs against its own "before", and pools runs whose names differ in their number alone.
"""

import argparse
import itertools
import json
import random
import re
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from statistics import fmean

sys.path.insert(0, str(Path(__file__).parents[1]))
from config import read_rows, require, run_main  # noqa: E402
from judges.gauge import JUDGED, bootstrap, everybody, judged  # noqa: E402
from simulator import load_profiles  # noqa: E402

ROOT = Path(__file__).parents[1]
PLACES = ((0, 0), (1, 2), (2, 4), (0, 5))  # dialogue and turn of the four replies to each person
DIALOGUES = 3  # held with each


def pick(logs: dict[str, list[dict]]) -> list[dict]:
    """Rows to be judged, of every log the same: four replies to each person, and first replies against "before"."""
    held = {}  # log, person, dialogue: what was said, what was heard, and how many replies were appraised
    for name, dialogues in logs.items():
        for row in dialogues:
            said = [m["content"] for m in row["history"] if m["role"] == "user"]
            heard = [m["content"] for m in row["history"] if m["role"] != "user"]
            held[name, row["id"], row["key"][1]] = said, heard, sum("planning" in m for m in row["history"])
    splits = {row["profile"]: row["split"] for _, row in read_rows(JUDGED / "en.jsonl")}
    runs, rows = [name for name in logs if name != "before"], []
    people = sorted({who for _, who, _ in held})
    for name, who, dialogue in itertools.product(logs, people, range(DIALOGUES)):
        found = held.get((name, who, dialogue), ((), (), 0))
        require(found[2] > 0, f"{name}: dialogue {dialogue} with {who} is missing or holds no appraised reply")

    def add(name: str, who: str, dialogue: int, turn: int, **reply: str) -> None:
        said, heard, _ = held[name, who, dialogue]
        talk = {"said": said[: turn + 1], "earlier": heard[:turn]}
        head = {"id": "", "split": splits.get(who, "test"), "profile": who, "source": name, "how": f"{dialogue}.{turn}"}
        rows.append(head | talk | (reply or {"reply": heard[turn]}))

    for n, who in enumerate(people):
        last = [min(held[name, who, d][2] for name in logs) - 1 for d in range(DIALOGUES)]  # ended early: so in all
        for dialogue, turn in sorted({(dialogue, min(turn, last[dialogue])) for dialogue, turn in PLACES}):
            for name in logs:
                add(name, who, dialogue, turn)
        for k, name in enumerate(runs):
            dialogue = (n + k) % DIALOGUES
            before, after = (held[which, who, dialogue][1][0] for which in ("before", name))
            add(name, who, dialogue, 0, before=before, after=after)
    random.Random(" ".join(logs)).shuffle(rows)
    return [{**row, "id": f"t{n:04}"} for n, row in enumerate(rows)]


def shown(row: dict, judge: str) -> str:
    """A reply, or two in random order, after the talk so far."""
    lines = []
    for n, text in enumerate(row["said"]):
        lines.append(f"  person: {text}")
        lines += [f"  helper: {' '.join(reply.split())}" for reply in row["earlier"][n : n + 1]]
    if "after" not in row:
        return "\n".join([f"--- ITEM {row['id']}", *lines, f"  PROPOSED REPLY: «{row['reply']}»\n"])
    two = [row["before"], row["after"]] if after_is(row, judge) == "B" else [row["after"], row["before"]]
    return "\n".join([f"--- PAIR {row['id']}", *lines, f"  REPLY A: «{two[0]}»", f"  REPLY B: «{two[1]}»\n"])


def after_is(row: dict, judge: str) -> str:
    """A or B: where this judge finds the later reply."""
    return random.Random(f"{judge} {row['id']} {row['profile']}").choice("AB")


def batch(rows: list[dict], people: dict, names: list[str], judge: str, order: random.Random) -> str:
    """One batch as text: each person once, then the talks with a proposed reply, or two, each."""
    parts = []
    for name in names:
        p = people[name]
        parts.append(f"=== PERSON {name}\npersona: {p.persona}\npersonality: {p.type_label}\nscene: {p.scene}\n"
                     f"hidden need: {p.intention_label}\n")
        mine = [row for row in rows if row["profile"] == name]
        parts += [shown(row, judge) for row in order.sample(mine, len(mine))]
    return "\n".join(parts)


def write(rows: list[dict], out: Path, count: int) -> None:
    """Two judges' batches of about equal length, and one of pairs for each."""
    people = everybody() | {p.id: p for p in load_profiles(ROOT / "data" / "en_test.jsonl")}
    out.mkdir(parents=True, exist_ok=True)
    pairs, single = [row for row in rows if "after" in row], [row for row in rows if "after" not in row]
    size = Counter(row["profile"] for row in single)
    for judge in "ab":
        order = random.Random(f"{judge} {rows[0]['id']}")
        names: list[list[str]] = [[] for _ in range(min(count, len(size)))]
        for name in sorted(order.sample(sorted(size), len(size)), key=size.get, reverse=True):
            min(names, key=lambda group: sum(size[n] for n in group)).append(name)
        for n, group in enumerate(names):
            order.shuffle(group)
            path = out / f"{judge}{n}.txt"
            path.write_text(batch(single, people, group, judge, order), encoding="utf-8")
            print(path, sum(size[name] for name in group), "replies")
        if pairs:
            some = sorted({row["profile"] for row in pairs})
            path = out / f"{judge}_pairs.txt"
            path.write_text(batch(pairs, people, order.sample(some, len(some)), judge, order), encoding="utf-8")
            print(path, len(pairs), "pairs")


def join(rows: list[dict], out: Path) -> list[dict]:
    """The replies with both judges' numbers, the pairs with both judges' preference."""
    kept = {row["id"]: row for row in rows}
    for judge in "ab":
        for path in sorted(out.glob(f"{judge}*.jsonl")):
            for where, found in read_rows(path):
                row = kept.get(str(found.get("id")))
                require(row is not None and judge not in row, f"{where}: {found.get('id')} is unknown or judged twice")
                if "after" in row:
                    require(found.get("better") in ("A", "B"), f"{where}: better must be A or B")
                    row[judge] = found["better"] == after_is(row, judge)
                    continue
                given = [found.get(key) for key in ("change", "soundness")]
                fine = all(isinstance(x, int | float) and low <= x <= 10 for x, low in zip(given, (-10, 0)))
                require(fine, f"{where}: change must be -10..10, soundness 0..10")
                row[judge] = {"change": given[0], "soundness": given[1], "why": str(found.get("why", ""))}
    for row in rows:
        require("a" in row and "b" in row, f"{out}: {row['id']} lacks a judgement")
    return rows


People = dict[str, list[float]]  # numbers by person


def by_person(rows: list[dict], measure: Callable[[dict], float]) -> People:
    people: People = {}
    for row in rows:
        people.setdefault(row["profile"], []).append(measure(row))
    return people


def pooled(runs: dict[str, People]) -> dict[str, People]:
    """The runs of each algorithm together, then all: the names but for their number, where there is more than one."""
    kinds: dict[str, list[People]] = {}
    for name, people in runs.items():
        kinds.setdefault(re.sub(r"_\d+$", "", name), []).append(people)
    if len(kinds) > 1:
        kinds["all"] = list(runs.values())
    return {f"{name}, {len(some)} runs": {who: [fmean(people[who]) for people in some if who in people]
                                         for who in sorted({who for people in some for who in people})}
            for name, some in kinds.items() if len(some) > 1}  # fmt: skip


def report(files: list[list[dict]]) -> list[str]:
    """Lines: mean change and soundness by source, with the gain over its file's "before" and an interval over people;
    of pairs the share in which the later reply was preferred; then both over the runs of an algorithm.
    """
    lines: list[str] = []
    gains: dict[str, People] = {}
    liked: dict[str, People] = {}
    for rows in files:
        sources: dict[str, list[dict]] = {}
        pairs: dict[str, list[dict]] = {}
        for row in rows:
            require("a" in row and "b" in row, f"{row.get('id')} is not judged")
            (pairs if isinstance(row["a"], bool) else sources).setdefault(row["source"], []).append(row)
        twice = (gains.keys() & sources.keys()) | (liked.keys() & pairs.keys())
        require(not twice, f"{', '.join(sorted(twice))}: in two files; runs of one name would be mixed")
        liked |= {name: by_person(some, lambda row: (row["a"] + row["b"]) / 2) for name, some in pairs.items()}
        before = by_person(sources.get("before", []), judged)
        for source, every in sorted(sources.items()):
            sound = fmean((row["a"]["soundness"] + row["b"]["soundness"]) / 2 for row in every)
            change = fmean(map(judged, every))
            lines.append(f"{source}: {len(every)} replies, change {change:+.2f}, soundness {sound:.1f}")
            own = by_person(every, judged)
            if source != "before" and before.keys() >= own.keys():
                gains[source] = {who: [fmean(changes) - fmean(before[who])] for who, changes in own.items()}
    for source, people in {**gains, **pooled(gains)}.items():
        gain, low, high = bootstrap(people)
        lines.append(f"{source}: gain {gain:+.2f} ({low:+.2f} to {high:+.2f})")
    for source, people in {**liked, **pooled(liked)}.items():
        share, low, high = bootstrap(people)
        lines.append(f"{source}: preferred in {share:.0%} ({low:.0%} to {high:.0%})")
    return lines


def rows_of(path: str) -> list[dict]:
    require(Path(path).is_file(), f"{path}: no such file")
    rows = [row for _, row in read_rows(Path(path))]
    require(bool(rows), f"{path} holds no line")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=("pick", "write", "join", "report"))
    parser.add_argument("paths", nargs="+", help="name=LOG ..., or REPLIES and OUT, or files to report on")
    parser.add_argument("--batches", type=int, default=8)
    args = parser.parse_args()
    if args.command == "report":
        return print("\n".join(report([rows_of(path) for path in args.paths])))
    if args.command == "pick":
        named = dict(path.partition("=")[::2] for path in args.paths)
        require("before" in named and all(named.values()), "scripts/blind.py pick wants before=LOG and name=LOG ...")
        rows = pick({name: rows_of(path) for name, path in named.items()})
    else:
        require(len(args.paths) == 2, f"scripts/blind.py {args.command} wants the replies, then one folder")
        rows, out = rows_of(args.paths[0]), Path(args.paths[1])
        if args.command == "write":
            return write(rows, out, args.batches)
        rows = join(rows, out)
    for row in rows:
        print(json.dumps(row, ensure_ascii=False))


if __name__ == "__main__":
    run_main(lambda argv: main())
