"""The Sentient benchmark on a model or checkpoint, and what can be done with dialogue logs.

    python eval.py run MODEL_OR_RUN [config.py] key=value ... [out=DIR]      the benchmark
    python eval.py export CHECKPOINT OUT        a Hugging Face folder from any checkpoint of a run
    python eval.py score LOG... [--json]        score, success, failure, by intention and persona
    python eval.py verify LOG...                recompute every emotion and reward
    python eval.py compare LOG_A LOG_B          paired bootstrap of the difference

The protocol is SAGE's (arXiv 2505.02847, section 2): emotion starts at 40, the model replies at
most 10 times and the last reply is not appraised; score = mean final emotion, success = at 100,
failure = below 10. Logs are JSON lines in SAGE's format, gzipped or not; SAGE's own can be scored
and verified too.
"""

import dataclasses
import hashlib
import json
import sys
from collections import Counter
from pathlib import Path

import torch
from tqdm import tqdm

from chat import load_tokenizer, make_chat
from checkpoint import check_files, checkpoints, load_checkpoint, load_model, save_adapter, save_model
from config import (
    Config,
    InputError,
    add_rows,
    help_text,
    load_config,
    own_rows,
    read_json,
    read_saved,
    save_config,
    without_nan,
    write_rows,
)
from dist import World, half_on_gpu, pick_device
from model import Transformer, find_folder
from rollout import MAX_FAILED, Dialogue, Job, Stage, log_line, make_engine, make_talk
from rundir import check_writable
from score import by_profile, interval, mismatches, paired_bootstrap, read_log, score_line, score_text, summary
from simulator import load_profiles
from update import make_model
from users import make_user, user_name
from users.llm_user import LLMUser, prompt_folders, usage_metrics

EVAL_STREAM = 1 << 32  # stands where a training step's number does, and is never one
MEGABYTE = 1 << 20
ENDINGS = (".json", ".safetensors", ".txt")  # of the files that make a model, a checkpoint, or prompts


def evaluate(
    config: Config, model: Transformer, tokenizer, world: World, log: Path | None = None, check=None
) -> tuple[dict[tuple, dict], tuple]:
    """Hold `eval_dialogues` dialogues with each profile under each seed; at every call with the same noise.

    Returns log lines by (seed, *key), and the use of a language model as the user (`LLMUser.drain`); of
    several ranks each holds its share. With `log` every dialogue is written there as it ends, and those
    that it holds already are not held again; failed ones are. `check` as in `Stage.hold`.
    """
    chat, talk = make_chat(tokenizer, config.think), make_talk(config, training=False)
    profiles = load_profiles(config.eval_profiles)
    rows = {(row["seed"], *row["key"]): row for row in held_before(log)}
    mine = range(world.rank, len(profiles), world.size)
    numbers = [(i, j) for i in mine for j in range(config.eval_dialogues)]
    own = dataclasses.replace(config, temperature=config.eval_temperature)
    engine, spent = make_engine(own, model, chat, len(numbers), dtype=world.dtype), (Counter(), [])
    seeds = range(config.eval_seed, config.eval_seed + config.seeds)
    total = len(seeds) * len(numbers) * talk.max_turns
    with tqdm(total=total, initial=len(rows) * talk.max_turns, desc="evaluation", unit="reply",
              leave=False, dynamic_ncols=True, disable=not world.main) as bar:
        for seed in seeds:

            def keep(dialogue: Dialogue, seed: int = seed) -> None:
                row = rows[(seed, *dialogue.key)] = log_line(dialogue, seed=seed)
                if log:
                    add_rows(log, [row])

            said = {i: row["history"][0]["content"] for (s, i, _), row in rows.items() if s == seed}
            jobs = [
                Job((i, j), dataclasses.replace(profiles[i], first_talk=said.get(i, profiles[i].first_talk)))
                for i, j in numbers if (seed, i, j) not in rows
            ]  # fmt: skip
            user = make_user(config, config.eval_start_emotion, config.eval_user_mode)
            engine.forget()
            Stage(engine, chat, user, talk).hold(jobs, (seed, EVAL_STREAM), bar.update, keep, check)
        if isinstance(user, LLMUser):
            spent = user.drain()
    return rows, spent


def join_evaluation(
    config: Config, parts: list[tuple[dict[tuple, dict], tuple]]
) -> tuple[list[dict], dict]:
    """All ranks' `evaluate` as log lines by seed and key, and metrics of the user's use, if any."""
    rows = {key: row for found, _ in parts for key, row in found.items()}
    cost = {} if config.user == "offline" else usage_metrics([spent for _, spent in parts])
    return [rows[key] for key in sorted(rows)], cost


def held_before(log: Path | None) -> list[dict]:
    """The completed dialogues in the log of an interrupted evaluation; the others leave the file."""
    if not log or not log.is_file():
        return []
    kept = [row for row in own_rows(log) if row["status"] == "ok"]
    write_rows(log, kept)
    return kept


def command_run(argv: list[str]) -> int:
    """Hold the benchmark with a model folder, a hub name or a run: its model, else its newest checkpoint.

    Writes dialogues.jsonl, result.json and result.txt. An interrupted one goes on where it stopped.
    """
    if not argv or "=" in argv[0]:
        raise InputError("eval.py run wants a model folder, a hub name or a run directory first")
    source, options = argv[0], [arg for arg in argv[1:] if not arg.startswith("out=")]
    out = next((arg[4:] for arg in argv[1:] if arg.startswith("out=")), "")
    run = Path(source) if (Path(source) / "env.txt").is_file() else None  # a model folder has none
    if run and not any(not arg.count("=") for arg in options):
        saved = dataclasses.asdict(read_saved(run / "config.json"))
        options = [f"{k}={v}" for k, v in saved.items() if v != getattr(Config(), k)] + options
    config = load_config(options)
    # Of a LoRA run the checkpoint even if it is finished: merged into bf16 an adapter is rounded away.
    wanted = run and (config.lora_rank or not (run / "model").is_dir())
    newest = checkpoints(run)[-1:] if wanted else []
    if run and not newest and not (run / "model").is_dir():
        raise InputError(f"{run}: has neither {run / 'model'} nor a checkpoint yet; train on")
    name = str(newest[0] if newest else run / "model" if run else source)
    where = run / "eval" / (newest[0].name if newest else "final") if run else Path("runs") / f"eval-{Path(name).name}"
    folder, device = Path(out or where), pick_device(config)
    world = World(device=device, dtype=half_on_gpu(config.precision, device))
    files = newest[0] if newest else find_folder(name) if not name.endswith(".json") else Path(name)
    settings = describe(config, f"{name} ({fingerprint(files)})", world)
    log = begin_evaluation(folder, settings)
    tokenizer = load_tokenizer(config.tokenizer or (config.model if newest else name))
    make_user(config, config.eval_start_emotion, config.eval_user_mode)  # raises before weights are loaded
    if newest:
        model = restore_policy(config, newest[0], world)
    else:
        model = load_model(name, config.seed, device, lambda model: model.to(world.dtype))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "settings.json").write_text(json.dumps(settings, indent=1) + "\n")
    try:
        part = evaluate(config, model, tokenizer, world, log)
    except KeyboardInterrupt:
        print(f"stopped; the same command goes on from {log}", file=sys.stderr)
        return 130
    rows, cost = join_evaluation(config, [part])
    failed = [row for row in rows if row["status"] != "ok"]
    if len(failed) > MAX_FAILED * len(rows):
        why = f"{len(failed)} of {len(rows)} users failed; the first: {failed[0]['why']}"
        again = f"The same command asks these again, the others are in {log}"
        print(f"no result: {why}. {again}", file=sys.stderr)
        return 1
    write_evaluation(folder, config, settings, rows, cost)
    print((folder / "result.txt").read_text(), end="")
    return 0


def restore_policy(config: Config, checkpoint: Path, world: World) -> Transformer:
    """The policy of a checkpoint on this process's device, its adapter beside it if it has one."""
    model = make_model(config, world)
    load_checkpoint(checkpoint, {"policy": model})
    return model.to(world.dtype)


def command_export(argv: list[str]) -> int:
    """A checkpoint's policy as a Hugging Face folder; of a LoRA run merged, the adapter in OUT/adapter."""
    if len(argv) != 2:
        raise InputError("eval.py export wants a checkpoint, RUN/ckpt/step_N, and the folder to write")
    checkpoint, out = (Path(arg) for arg in argv)
    check_files(checkpoint)
    config = read_saved(checkpoint.resolve().parent.parent / "config.json")
    if out.exists():
        raise InputError(f"{out}: exists already; give another folder or remove it")
    tokenizer = load_tokenizer(config.tokenizer or config.model)
    model = restore_policy(config, checkpoint, World())
    # An adapter's changes are smaller than the spacing of bf16 numbers: merged ones stay in fp32.
    kind = "float32" if config.lora_rank else read_json(checkpoint / "state.json")["dtype"]
    save_model(model, tokenizer, out, dtype=getattr(torch, kind))
    if config.lora_rank:
        save_adapter(model, config, out / "adapter")
    print(f"{checkpoint} as a Hugging Face folder in {kind}: {out}")
    return 0


def begin_evaluation(folder: Path, settings: dict) -> Path:
    """Where dialogues are kept until the evaluation is done.

    Raises InputError if the folder holds anything else, or was begun with other settings.
    """
    log = folder / "dialogues.partial.jsonl"
    check_writable(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        done = (folder / "result.json").exists()
        if done or not (folder / "settings.json").is_file():
            what = "holds an evaluation already" if done else "is not an empty folder"
            raise InputError(f"{folder}: {what}; give another out=DIR or remove it")
        before = read_json(folder / "settings.json")
        for key in settings:
            if before.get(key) != settings[key]:
                was = f"{key} {before.get(key)}"
                raise InputError(f"{folder}: was begun with {was}, not {settings[key]}; give another out=DIR")
    return log


def fingerprint(*paths: Path) -> str:
    """8 hex digits of files' contents, and of a folder's JSON and weights; of large files both ends."""
    digest = hashlib.sha256()
    for path in paths:
        for file in sorted(f for f in path.glob("*") if f.suffix in ENDINGS) if path.is_dir() else [path]:
            with open(file, "rb") as data:
                size = data.seek(0, 2)
                for begin in {0, max(0, size - MEGABYTE)}:
                    data.seek(begin)
                    digest.update(data.read(MEGABYTE))
            digest.update(f"{file.name} {size}".encode())
    return digest.hexdigest()[:8]


def describe(config: Config, model: str, world: World) -> dict:
    """What a result depends on. Files are named with their contents, since a path may come to hold others."""
    people, systems = Path(config.eval_profiles), make_talk(config, training=False).systems
    words = hashlib.sha256(json.dumps(systems).encode()).hexdigest()[:8]
    user = user_name(config, config.eval_user_mode)
    if config.user != "offline":
        folders = prompt_folders(config.eval_user_mode, config.prompts).values()
        where = config.user_url or config.user_dtype
        user += f", prompts {fingerprint(*folders)}, at most {config.user_tokens} tokens, {where}"
    return {
        "model": model,
        "precision": str(world.dtype).removeprefix("torch."),
        "user": user,
        "profiles": f"{people} ({fingerprint(people)})",
        "dialogues_per_profile": config.eval_dialogues,
        "max_turns": config.eval_max_turns,
        "reply_tokens": config.reply_tokens,
        "context_tokens": config.context_tokens,
        "temperature": config.eval_temperature,
        "start_emotion": config.eval_start_emotion,
        "seeds": list(range(config.eval_seed, config.eval_seed + config.seeds)),
        "think": config.think,
        "system": f"{config.system or 'our prompts'} ({words})",
    }


def write_evaluation(
    folder: Path, config: Config, settings: dict, rows: list[dict], cost: dict
) -> dict:
    """dialogues.jsonl, result.txt and result.json, which name the settings; returns the summary."""
    folder.mkdir(parents=True, exist_ok=True)
    write_rows(folder / "dialogues.jsonl", rows)
    text = "\n".join(f"{key}: {value}" for key, value in (settings | cost).items())
    numbered = [{**row, "line": i} for i, row in enumerate(rows, 1)]
    table = score_text(str(folder / "dialogues.jsonl"), numbered)
    (folder / "result.txt").write_text(f"{text}\n\n{table}\n")
    save_config(config, folder / "config.json")
    result = summary(rows)
    by_seed = {seed: summary([row for row in rows if row["seed"] == seed]) for seed in settings["seeds"]}
    whole = {
        **without_nan(result),
        "interval": interval(rows) if result["n"] else None,
        "seeds": [{"seed": seed, **without_nan(found)} for seed, found in by_seed.items()],
        "settings": settings,
        "cost": cost,
    }
    (folder / "result.json").write_text(json.dumps(whole, indent=1) + "\n")
    (folder / "dialogues.partial.jsonl").unlink(missing_ok=True)
    return result


def command_score(argv: list[str]) -> int:
    """Tables of logs, or with --json a list of {file, n, failed, score, success, failure}."""
    paths = [arg for arg in argv if arg != "--json"]
    if not paths:
        raise InputError("eval.py score wants one log or more")
    logs = {path: read_log(path) for path in paths}
    if "--json" in argv:
        print(json.dumps([{"file": path, **without_nan(summary(rows))} for path, rows in logs.items()], indent=1))
    else:
        print("\n\n".join(score_text(path, rows) for path, rows in logs.items()))
    return 0


def command_verify(argv: list[str]) -> int:
    """Recompute logs from their appraisals; exit code 1 if anything does not follow."""
    if not argv:
        raise InputError("eval.py verify wants one log or more")
    wrong, count = [], 0
    for path in argv:
        for row in read_log(path):
            count += 1
            where = f"{path}:{row['line']}: dialogue {row['id']}"
            try:
                wrong += mismatches(row, where)
            except (KeyError, TypeError, ValueError) as error:
                raise InputError(f"{where}: not of SAGE's log format ({type(error).__name__}: {error})") from None
    print("\n".join([*wrong, f"{len(wrong)} mismatches in {count} dialogues"]))
    return 1 if wrong else 0


def command_compare(argv: list[str]) -> int:
    """Score, success and failure of two logs and the paired bootstrap of the difference, B - A."""
    if len(argv) != 2:
        raise InputError("eval.py compare wants two logs, the one to compare with first")
    logs = [read_log(path) for path in argv]
    gain, low, high = paired_bootstrap(*(by_profile(rows) for rows in logs))
    print(f"{'':<44} {'score':>6}   {'succ':>4}   {'fail':>4}")
    for path, rows in zip(argv, logs):
        print(score_line(path if len(path) <= 44 else "..." + path[-41:], rows))
    shared = len(by_profile(logs[0]).keys() & by_profile(logs[1]).keys())
    print(f"difference {gain:+.1f} points, 95 % interval {low:+.1f} to {high:+.1f} ", end="")
    print(f"(paired bootstrap over {shared} profiles)")
    return 0


COMMANDS = {
    "run": command_run, "export": command_export, "score": command_score, "verify": command_verify,
    "compare": command_compare,
}  # fmt: skip


def main(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(__doc__.strip() + "\n\n" + help_text("python eval.py run MODEL_OR_RUN [config.py] key=value ..."))
        return 0
    if argv[0] not in COMMANDS:
        raise InputError(f"eval.py has no command {argv[0]!r}; known are {', '.join(COMMANDS)}")
    return COMMANDS[argv[0]](argv[1:])


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except InputError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
