"""`eval.py page`: dialogue logs and a run's curves as one HTML file to read, page.html filled in.

Everything is in the file: style, script, plots as SVG. Whatever a model, a person or a file name
says is escaped, and the page's policy lets no script run but its own.
"""

import base64
import hashlib
import io
import math
from collections import Counter
from pathlib import Path

import jinja2
import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure

from config import InputError, own_rows, read_json, require, without_nan
from score import bootstrap, by_profile, completed, interval, paired_bootstrap, read_log, summary
from simulator import INTENTIONS, PERSONA_TYPES, band, canonical

HERE = Path(__file__).parent
INK = "#012345"  # what plots are drawn in; the page's own colour takes its place
COLOURS = ("#4477aa", "#dd7733")  # of the first log and the second
STYLE = {"svg.fonttype": "none", "svg.hashsalt": "rlver", "text.parse_math": False, "font.size": 9,
         **dict.fromkeys(("axes.spines.top", "axes.spines.right", "legend.frameon"), False),
         **dict.fromkeys("text.color axes.edgecolor axes.labelcolor xtick.color ytick.color".split(), INK)}  # fmt: skip
CURVES = """emotion/final eval/score eval/shadow policy/entropy policy/kl_reference policy/grad_norm
value/explained_variance rollout/reply_tokens simulator/failed""".split()
Log = tuple[str, list[dict], dict]  # a file's name, its dialogues, and how they were held if known


def command_page(argv: list[str]) -> int:
    """Write the page of a log or run, or of two side by side; an older page is replaced."""
    at = argv.index("-o") if "-o" in argv[:-1] else 0
    paths, out = argv[:at] + argv[at + 2 :], Path(argv[at + 1] if at else "")
    wanted = "eval.py page wants LOG_OR_RUN [SECOND] -o FILE.html"
    require(len(paths) in (1, 2) and out.suffix == ".html", wanted)
    found = [logs_of(Path(path)) for path in paths]
    logs = found[0] if len(found) == 1 else [part[-1] for part in found]  # of two runs, both afters
    metrics = [own_rows(Path(path) / "metrics.jsonl") for path in paths]
    html, aside = page(logs, metrics).encode("utf-8", "replace"), out.with_name(f".{out.name}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        aside.write_bytes(html)
        aside.replace(out)
    except OSError as error:
        raise InputError(f"{out}: cannot be written ({error.strerror})") from None
    print(f"{out}: {len(html) / 1e6:.1f} MB; open it in a browser")
    return 0


def logs_of(path: Path) -> list[Log]:
    """The logs at a path: a file; an evaluation's folder; of a run, before and after if it has
    both, else its newest evaluation, else the last step's training dialogues.
    """
    files = [path / "eval" / when / "dialogues.jsonl" for when in ("before", "after")]
    if not all(file.is_file() for file in files):
        held = sorted(path.glob("eval/*/dialogues.jsonl"), key=lambda file: file.stat().st_mtime)
        files = held[-1:] or [path / "dialogues.jsonl" if path.is_dir() else path]
    logs = []
    for file in files:
        rows, name, about = read_log(str(file)), str(file), file.parent / "settings.json"
        if file.parent == path and (step := rows[-1].get("step")):
            rows, name = [row for row in rows if row.get("step") == step], f"{file}, step {step}"
        # Beside a file that was named alone it may be anybody's.
        logs.append((name, rows, read_json(about) if path.is_dir() and about.is_file() else {}))
    return logs


def page(logs: list[Log], metrics: list[list[dict]]) -> str:
    """The HTML of logs and of runs' metrics."""
    talks, people = paired(logs), [by_profile(rows) for _, rows, _ in logs]
    shared = people[0].keys() & people[-1].keys() if len(logs) == 2 else ()
    scenes = [{row["id"]: row.get("scene") for row in rows} for _, rows, _ in logs]
    script = (HERE / "page.js").read_text(encoding="utf-8")
    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return made.get_template("page.html").render(
        logs=logs, colours=COLOURS, talks=talks, shared=len(shared), run=len(metrics) == 1,
        strangers=sum(scenes[0][name] != scenes[-1][name] for name in shared),
        figures=[without_nan(summary(rows)) for _, rows, _ in logs],
        intervals=[len(own) > 1 and interval(rows) for (_, rows, _), own in zip(logs, people)],
        gain=paired_bootstrap(*people) if len(shared) > 1 else None,
        by_turn=svg(draw_turns, logs), by_group=svg(draw_groups, logs),
        curves=svg(draw_curves, metrics) if any(metrics) else "", script=Markup(script),
        digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        intentions=sorted({talk["intention"] for talk in talks} - {""}),
        outcomes=sorted({side["ended"] for talk in talks for side in talk["sides"] if side}))  # fmt: skip


def paired(logs: list[Log]) -> list[dict]:
    """Dialogues of the logs side by side: a person's first with the first, and so on."""
    talks: dict[tuple, dict] = {}
    for n, (name, rows, _) in enumerate(logs):
        count = Counter()
        for row in rows:
            try:
                count[row["id"]] += 1
                new = {"row": row, "intention": label(row, "task"), "type": label(row, "character")}
                new["sides"] = [None] * len(logs)
                talks.setdefault((row["id"], count[row["id"]]), new)["sides"][n] = side(row)
            except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
                why = f"not of SAGE's log format ({type(error).__name__}: {error})"
                raise InputError(f"{name}:{row['line']}: {why}") from None
    for talk in talks.values():
        ends = [side and side["final"] for side in talk["sides"]]
        talk["gain"] = None if None in ends or len(ends) == 1 else ends[1] - ends[0]
    return sorted(talks.values(), key=lambda talk: (talk["gain"] is not None, talk["gain"] or 0.0))


def label(row: dict, key: str) -> str:
    table = INTENTIONS if key == "task" else PERSONA_TYPES
    return canonical(row[key], table, f"dialogue {row['id']}") if row.get(key) else ""


def emotions(row: dict) -> list[float]:
    points = [m.get("emotion-point") for m in row["history"] if m["role"] == "user"]
    return [float(x) for x in points if x is not None]


def side(row: dict) -> dict:
    """A dialogue as the page shows it. The final emotion is None where the user failed."""
    final, history, ended = None, [], "failed"
    if row.get("status", "ok") == "ok":
        final = row["emo_point"] = float(row["emo_point"])
        require(math.isfinite(final), f"dialogue {row['id']}: emo_point is {final}")
        ended = {"S": "content", "F": "left"}.get(band(final), "goodbye or max_turns")
    for m in row["history"]:
        m = {"content": "", "thought": m.get("think", ""), "stop": "eos", "planning": None} | m
        if m["planning"]:  # numbers as numbers, so that nothing else can stand where one is shown
            told = {name: float(x) for name, x in m["planning"].get("features", {}).items() if x}
            change = float(m["planning"]["change"])
            m["planning"] = m["planning"] | {"change": change, "features": told}
        history.append(m)
    path, wide = emotions(row), 80 / max(1, len(emotions(row)) - 1)
    points = " ".join(f"{wide * n:.1f},{24 - 0.24 * x:.1f}" for n, x in enumerate(path))
    return {"final": final, "ended": row.get("ended") or ended, "why": row.get("why", ""),
            "points": points, "history": history}  # fmt: skip


def svg(draw, data) -> Markup:
    """A plot as inline SVG whose ink is the page's text colour."""
    with matplotlib.rc_context(STYLE):
        figure, out = Figure(layout="constrained"), io.StringIO()
        draw(figure, data)
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    text = out.getvalue().replace(INK, "currentColor").replace("<svg ", '<svg role="img" ', 1)
    return Markup(text[text.index("<svg") :])


def draw_turns(figure: Figure, logs: list[Log]) -> None:
    """Emotion by turn: thin lines are dialogues, the thick one their mean, ended ones held."""
    figure.set_size_inches(5.6, 3.2)
    axes = figure.subplots()
    for n, ((_, rows, _), colour) in enumerate(zip(logs, COLOURS), 1):
        paths = [path for path in map(emotions, completed(rows)) if path]
        for path in paths:
            axes.plot(path, color=colour, alpha=0.15, linewidth=0.8)
        held = [path + path[-1:] * (max(map(len, paths)) - len(path)) for path in paths]
        if held:
            axes.plot(np.mean(held, axis=0), color=colour, linewidth=2.5, label=f"mean of log {n}")
            axes.legend()
    axes.set(xlabel="turn", ylabel="emotion", ylim=(0, 100))


def draw_groups(figure: Figure, logs: list[Log]) -> None:
    """Mean final emotion by hidden intention and persona type, with intervals over people."""
    figure.set_size_inches(5.6, 3.2)
    axes, names = figure.subplots(), [*INTENTIONS, *PERSONA_TYPES]
    for n, ((_, rows, _), colour) in enumerate(zip(logs, COLOURS)):
        for place, name in enumerate(names):
            mine = [row for row in rows if name in (label(row, "task"), label(row, "character"))]
            ends = np.array([np.mean(found) for found in by_profile(mine).values()])
            if len(ends):
                mean, (low, high) = ends.mean(), bootstrap(ends, 2000) if len(ends) > 1 else ends[[0, 0]]
                at, reach = place + 0.22 * (2 * n - len(logs) + 1), [[mean - low], [high - mean]]
                axes.errorbar(mean, at, xerr=reach, fmt="o", color=colour, markersize=4)
    axes.set(xlabel="mean final emotion, 95 % interval over people", xlim=(0, 100))
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()


def draw_curves(figure: Figure, metrics: list[list[dict]]) -> None:
    """What runs logged by step, a panel a quantity."""
    keys = [key for key in CURVES if any(key in row for rows in metrics for row in rows)]
    figure.set_size_inches(8.6, 2 * max(1, -(-len(keys) // 3)))
    for place, key in enumerate(keys, 1):
        axes = figure.add_subplot(-(-len(keys) // 3), 3, place)
        for rows, colour in zip(metrics, COLOURS if len(metrics) > 1 else [INK]):
            known = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
            axes.plot([x for x, _ in known], [y for _, y in known], color=colour)
        axes.set_title(key, fontsize=9)
