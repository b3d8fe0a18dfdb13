"""Writes up demo runs: learning curves of all of them as a PNG, the figures as Markdown rows, and
whole dialogues.

    python scripts/demo_report.py runs/demo_ppo_0 runs/demo_ppo_1 ... --png docs/curves.png --dialogues docs/demo.md

Dialogues are not chosen by hand: they are those of the first run's five test profiles whose gain is
nearest the median gain, the first dialogue of each, before and after. Model text is shown as a
quotation, with markup made harmless.
"""

import argparse
import html
import sys
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

sys.path.insert(0, str(Path(__file__).parent.parent))
from config import own_rows, read_json  # noqa: E402
from judges.shadow import final_emotion, formula  # noqa: E402
from score import by_profile, paired_bootstrap, read_log, summary  # noqa: E402


def curves(runs: list[Path], png: Path) -> None:
    """Final emotion and entropy of the training dialogues by step, one line a run."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    for run in runs:
        rows = own_rows(run / "metrics.jsonl")
        style = "-" if read_json(run / "config.json")["algorithm"] == "ppo" else "--"
        for axis, key in zip(axes, ("emotion/final", "policy/entropy")):
            axis.plot(
                [row["step"] for row in rows], [row[key] for row in rows], style, label=run.name
            )
    for axis, label in zip(
        axes, ("mean final emotion of the training dialogues", "entropy, nats per token")
    ):
        axis.set_xlabel("step")
        axis.set_title(label, fontsize=10)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=7)
    figure.savefig(png, dpi=110)


def figures(runs: list[Path]) -> list[str]:
    """Markdown rows: each run before and after with its interval, then all runs of an algorithm
    pooled by profile.
    """
    lines = [
        "| run | before: score / success / failure | after | gain (95 %) | by the second ear | commonest 4 words |",
        "|---|---|---|---|---|---|",
    ]
    pooled: dict[str, list[list[tuple[dict, dict]]]] = {}
    for run in runs:
        logs = [
            read_log(str(run / "eval" / when / "dialogues.jsonl")) for when in ("before", "after")
        ]
        before, after = (summary(rows) for rows in logs)
        ears = [tuple(map(by_profile, logs)), tuple(map(by_second_ear, logs))]
        pooled.setdefault(read_json(run / "config.json")["algorithm"], []).append(ears)
        shown = [
            f"{s['score']:.1f} / {s['success']} / {s['failure']} of {s['n']}"
            for s in (before, after)
        ]
        alike = " to ".join(f"{formula(rows)['formula/commonest']:.0%}" for rows in logs)
        gains = " | ".join(interval(*pair) for pair in ears)
        lines.append(f"| {run.name} | {shown[0]} | {shown[1]} | {gains} | {alike} |")
    for algorithm, found in pooled.items():
        joined = [
            [{name: sum((pair[side][name] for pair in pairs), []) for name in pairs[0][side]} for side in (0, 1)]
            for pairs in zip(*found)
        ]
        gains = " | ".join(interval(*pair) for pair in joined)
        lines.append(f"| {algorithm}, {len(found)} seeds pooled | | | {gains} | |")
    return lines


def by_second_ear(rows: list[dict]) -> dict[str, list[float]]:
    """Final emotions of a log by profile, as judges/shadow.py hears them."""
    ends: dict[str, list[float]] = {}
    for row in rows:
        ends.setdefault(row["id"], []).append(final_emotion(row))
    return ends


def interval(before: dict, after: dict) -> str:
    """A gain with its 95 % interval."""
    gain, low, high = paired_bootstrap(before, after)
    return f"{gain:+.1f} ({low:+.1f} to {high:+.1f})"


def quote(text: str) -> str:
    """Untrusted text as one quoted Markdown line."""
    harmless = html.escape(" ".join(text.split()), quote=False)
    return harmless.translate({ord(c): "\\" + c for c in "*_`[]#|~"}) or "(nothing)"


def dialogue(row: dict) -> list[str]:
    """A logged dialogue as Markdown, each user turn with the emotion it left."""
    lines = []
    for message in row["history"]:
        if message["role"] == "user":
            change = f" ({message['planning']['change']:+g})" if "planning" in message else ""
            lines.append(f"> **{message['emotion-point']:g}**{change} {quote(message['content'])}")
        else:
            cut = " [cut]" if message["stop"] == "cap" else ""
            lines.append(f"> &nbsp;&nbsp;&nbsp;&nbsp;*model:* {quote(message['content'])}{cut}")
        lines.append(">")
    return lines[:-1]


def dialogues(run: Path) -> list[str]:
    """The five test profiles nearest the median gain, first dialogue of each, before and after."""
    logs = {
        when: read_log(str(run / "eval" / when / "dialogues.jsonl")) for when in ("before", "after")
    }
    points = {when: by_profile(rows) for when, rows in logs.items()}
    gain = {
        name: np.mean(points["after"][name]) - np.mean(points["before"][name])
        for name in points["before"]
    }
    median = float(np.median(list(gain.values())))
    lines = [f"Run `{run.name}`: median gain over {len(gain)} test profiles {median:+.1f}.", ""]
    for name in sorted(gain, key=lambda name: (abs(gain[name] - median), name))[:5]:
        first = {
            when: next(row for row in rows if row["id"] == name) for when, rows in logs.items()
        }
        lines += [f"## {name}: {gain[name]:+.1f}", "", quote(first["before"]["player"]), ""]
        for when, row in first.items():
            lines += [
                f"**{when}**, final emotion {row['emo_point']:g}, ended: {row['ended']}",
                "",
                *dialogue(row),
                "",
            ]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--png", type=Path)
    parser.add_argument("--dialogues", type=Path)
    args = parser.parse_args()
    print("\n".join(figures(args.runs)))
    if args.png:
        curves(args.runs, args.png)
    if args.dialogues:
        legend = (
            "Written by `scripts/demo_report.py`; bold is the user's emotion (start 40), in brackets its change. "
            "Before: the model after its warm-up."
        )
        head = ["# Dialogues of the demo, before and after", "", legend, ""]
        args.dialogues.write_text("\n".join(head + dialogues(args.runs[0])), encoding="utf-8")


if __name__ == "__main__":
    main()
