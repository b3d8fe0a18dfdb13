"""`make demo`: benchmark, warm up, benchmark, train, benchmark again, compare. Runs the commands that
you would, and shows them.

    python scripts/demo.py configs/demo.py [key=value ...]
"""

import shutil
import subprocess
import sys
import textwrap
import time
from itertools import zip_longest
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from config import load_config, read_json, run_main  # noqa: E402
from score import read_log  # noqa: E402
from simulator import load_profiles  # noqa: E402
from users import user_name  # noqa: E402


def run(*command: str) -> None:
    """Show a command and run it; stops here if it fails."""
    print(f"\n$ python {' '.join(command)}", flush=True)
    done = subprocess.run([sys.executable, *command], cwd=ROOT)
    if done.returncode:
        sys.exit(done.returncode)


def benchmark(model: str, argv: list[str], out: str) -> None:
    """The benchmark of a model, unless it lies there already."""
    if not (ROOT / out / "result.json").exists():
        run("eval.py", "run", model, *argv, f"out={out}")


def comparison(*folders: Path) -> str:
    """Both ears and the measures of formula at the start, after the warm-up and after training, and two talks
    before and after training side by side.
    """
    found = [read_json(folder / "result.json") for folder in folders]
    shown = {"score": "final emotion, by the user", "shadow": "by the second ear (never trained on)",
             "formula/commonest": "share of replies with the commonest 4 words",
             "formula/similarity": "likeness of replies to different people"}  # fmt: skip
    lines = [f"{'':<46}{'start':>8}{'warm-up':>8}{'trained':>8}"]
    for key, name in shown.items():
        if key in found[-1]:
            lines.append(f"{name:<46}" + "".join(f"{result[key]:>8.2f}" for result in found))
    logs = [{row["id"]: row for row in read_log(str(folder / "dialogues.jsonl"))} for folder in folders[-2:]]
    wide = max(80, min(160, shutil.get_terminal_size().columns)) // 2 - 2
    for who in sorted(logs[0].keys() & logs[1].keys())[:2]:
        sides = [talk(log[who], wide) for log in logs]
        lines += ["", f"{who}: before | after"]
        lines += [f"{left:<{wide}} | {right}" for left, right in zip_longest(*sides, fillvalue="")]
    return "\n".join(lines)


def talk(row: dict, wide: int, turns: int = 2) -> list[str]:
    """The beginning of a logged dialogue as lines of a column."""
    lines = []
    for message in row["history"][: 2 * turns + 1]:
        mark = f"[{message['emotion-point']:g}] " if message["role"] == "user" else "    > "
        # Model text is untrusted: no control character of it reaches the terminal.
        plain = "".join(c if c.isprintable() else " " for c in message["content"])
        lines += textwrap.wrap(mark + plain, wide, subsequent_indent="      ") or [mark]
    return lines


def main(argv: list[str]) -> None:
    begun, config = time.time(), load_config(argv)
    learnt = (
        f", {config.groups * config.learn_from} of them learnt from" if config.learn_from else ""
    )
    people = (
        len(load_profiles(ROOT / config.profiles)),
        len(load_profiles(ROOT / config.eval_profiles)),
    )
    print(f"""
model      {config.model}, {config.algorithm}, {"with" if config.think else "without"} thinking
user       {user_name(config, config.user_mode)}
training   {config.steps} steps of {config.groups * config.group_size} dialogues with {people[0]} people, \
{config.max_turns} turns of at most {config.reply_tokens} tokens, emotion starts at {config.start_emotion:g}{learnt}
benchmark  {people[1]} people never trained on x {config.eval_dialogues} dialogues, {config.eval_max_turns} replies \
({config.eval_max_turns - 1} scored), emotion starts at {config.eval_start_emotion:g}
sampling   temperature {config.temperature:g} in both; seed {config.seed}, benchmark seed {config.eval_seed}
warm-up    a few minutes of supervised learning first: what reinforcement adds is measured from there
expect     about twenty minutes on two CPU cores""")
    out = Path(config.run) / "eval"
    start, before, after = (str(out / when) for when in ("start", "before", "after"))
    warm = f"{config.run}-warm-up"  # beside the run: train.py wants its folder for itself
    benchmark(config.model, argv, start)
    if not (ROOT / warm).exists():
        run("scripts/warmup.py", *argv, "seed=0", warm)  # one start for every seed of a demo
    benchmark(warm, argv, before)
    run("train.py", *argv, f"model={warm}")
    benchmark(f"{config.run}/model", argv, after)
    run("eval.py", "compare", f"{start}/dialogues.jsonl", f"{before}/dialogues.jsonl")
    run("eval.py", "compare", f"{before}/dialogues.jsonl", f"{after}/dialogues.jsonl")
    print("\n" + comparison(*(ROOT / folder for folder in (start, before, after))))
    run("eval.py", "page", config.run, "-o", f"{config.run}/page.html")
    minutes = (time.time() - begun) / 60
    print(
        f"\n{minutes:.1f} minutes. Read the dialogues, before and after, with the curves, in a browser: "
        f"{config.run}/page.html\nTalk with it: python eval.py chat {config.run}"
    )


if __name__ == "__main__":
    run_main(main)
