"""Replies to be judged blind: writes batches for two judges, and joins their judgements with the replies.

    python scripts/blind.py write REPLIES.jsonl OUT [--batches 8]    OUT/a0.txt ... b7.txt
    python scripts/blind.py join REPLIES.jsonl OUT >> data/judged/en.jsonl
    python scripts/blind.py report JUDGED.jsonl...           means by source, gains over the source "before"

A line of REPLIES has id, profile, source, how, said, earlier and reply (data/judged/README.md). A batch holds people
with all their replies in random order, without source; the two judges' batches are grouped and ordered differently.
Each is given to a fresh judge with prompts/judge_en.txt, who writes a file of the same name that ends in .jsonl:
{"id", "change", "soundness", "why"} a line. `join` fails where a judgement is missing, double or out of range.
`report` reads joined replies, and pairs: rows with `source`, `profile`, and `a`, `b` true where a judge preferred the
later reply.
"""

import argparse
import json
import random
import sys
from pathlib import Path
from statistics import fmean

sys.path.insert(0, str(Path(__file__).parents[1]))
from config import InputError, read_rows, require  # noqa: E402
from judges.gauge import bootstrap, everybody, judged  # noqa: E402
from simulator import load_profiles  # noqa: E402

ROOT = Path(__file__).parents[1]


def batch(rows: list[dict], people: dict, names: list[str], order: random.Random) -> str:
    """One batch as text: each person once, then the talks with a proposed reply each."""
    parts = []
    for name in names:
        p = people[name]
        parts.append(f"=== PERSON {name}\npersona: {p.persona}\npersonality: {p.type_label}\nscene: {p.scene}\n"
                     f"hidden need: {p.intention_label}\n")
        mine = [row for row in rows if row["profile"] == name]
        for row in order.sample(mine, len(mine)):
            lines = []
            for n, text in enumerate(row["said"]):
                lines.append(f"  person: {text}")
                lines += [f"  helper: {' '.join(reply.split())}" for reply in row["earlier"][n : n + 1]]
            talk = "\n".join(lines)
            parts.append(f"--- ITEM {row['id']}\n{talk}\n  PROPOSED REPLY: «{row['reply']}»\n")
    return "\n".join(parts)


def write(rows: list[dict], out: Path, count: int) -> None:
    """Two judges' batches of about equal length."""
    people = everybody() | {p.id: p for p in load_profiles(ROOT / "data" / "en_test.jsonl")}
    out.mkdir(parents=True, exist_ok=True)
    size = {name: sum(row["profile"] == name for row in rows) for name in {row["profile"] for row in rows}}
    for judge in "ab":
        order = random.Random(f"{judge} {rows[0]['id']}")
        names: list[list[str]] = [[] for _ in range(min(count, len(size)))]
        for name in sorted(order.sample(sorted(size), len(size)), key=size.get, reverse=True):
            min(names, key=lambda group: sum(size[n] for n in group)).append(name)
        for n, group in enumerate(names):
            order.shuffle(group)
            path = out / f"{judge}{n}.txt"
            path.write_text(batch(rows, people, group, order), encoding="utf-8")
            print(path, sum(size[name] for name in group), "replies")


def join(rows: list[dict], out: Path) -> list[dict]:
    """The replies with both judges' numbers."""
    kept = {row["id"]: row for row in rows}
    for judge in "ab":
        for path in sorted(out.glob(f"{judge}*.jsonl")):
            for where, found in read_rows(path):
                row = kept.get(found["id"])
                require(row is not None and judge not in row, f"{where}: {found['id']} is unknown or judged twice")
                fine = -10 <= found["change"] <= 10 and 0 <= found["soundness"] <= 10
                require(fine, f"{where}: change must be -10..10, soundness 0..10")
                row[judge] = {key: found[key] for key in ("change", "soundness", "why")}
    for row in rows:
        require("a" in row and "b" in row, f"{out}: {row['id']} lacks a judgement")
    return rows


def report(rows: list[dict]) -> list[str]:
    """Lines: mean change and soundness by source, with the gain over "before" and its interval over people; and of
    pairs the share in which the later reply was preferred.
    """
    lines, found = [], {}
    for row in rows:
        key = row["source"], isinstance(row["a"], bool)
        found.setdefault(key, {}).setdefault(row["profile"], []).append(row)
    before = found.get(("before", False), {})
    for (source, pairs), people in sorted(found.items()):
        every = [row for some in people.values() for row in some]
        if pairs:
            mean, low, high = bootstrap({who: [(r["a"] + r["b"]) / 2 for r in some] for who, some in people.items()})
            lines.append(f"{source}: preferred in {mean:.0%} ({low:.0%} to {high:.0%}) of {2 * len(every)} judgements")
            continue
        sound = fmean((row["a"]["soundness"] + row["b"]["soundness"]) / 2 for row in every)
        text = f"{source}: {len(every)} replies, change {fmean(map(judged, every)):+.2f}, soundness {sound:.1f}"
        if source != "before" and before.keys() >= people.keys():
            gain, low, high = bootstrap({who: [fmean(map(judged, some)) - fmean(map(judged, before[who]))]
                                         for who, some in people.items()})  # fmt: skip
            text += f", gain {gain:+.2f} ({low:+.2f} to {high:+.2f})"
        lines.append(text)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=("write", "join", "report"))
    parser.add_argument("paths", type=Path, nargs="+", help="REPLIES and OUT, or files to report on")
    parser.add_argument("--batches", type=int, default=8)
    args = parser.parse_args()
    if args.command == "report":
        return print("\n".join(report([row for path in args.paths for _, row in read_rows(path)])))
    require(len(args.paths) == 2, f"scripts/blind.py {args.command} wants the replies, then one folder")
    (_, rows), out = zip(*read_rows(args.paths[0])), args.paths[1]
    if args.command == "write":
        return write(rows, out, args.batches)
    for row in join(rows, out):
        print(json.dumps(row, ensure_ascii=False))


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
