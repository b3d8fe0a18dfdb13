"""The Sentient benchmark on a model or checkpoint, and what can be done with dialogue logs.

    python eval.py run MODEL_OR_RUN [config.py] key=value ... [out=DIR]      the benchmark
    python eval.py export CHECKPOINT OUT        a Hugging Face folder from any checkpoint of a run
    python eval.py score LOG... [--json]        score, success, failure, by intention and persona
    python eval.py verify LOG...                recompute every emotion and reward
    python eval.py compare LOG_A LOG_B          paired bootstrap of the difference
    python eval.py chat MODEL_OR_RUN [person=ID] [--rate]     talk with a policy as the user
    python eval.py chat --supporter [person=ID] [--rate]      help a simulated person yourself
    python eval.py page LOG_OR_RUN [SECOND] -o FILE.html      dialogues and curves for a browser
    python eval.py gauge key=value ... [logs=GLOB] [script=off] [--json]    a bench for users

The protocol is SAGE's (arXiv 2505.02847, section 2): emotion starts at 40, the model replies at
most 10 times, a tenth reply is not appraised; score = mean final emotion, success = at 100,
failure = below 10. Logs are JSON lines in SAGE's format, gzipped or not; SAGE's own can be scored
and verified too.
"""

import hashlib
import json
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

from checkpoint import check_files, save_adapter, save_model

from config import (ASKED, Config, InputError, add_rows, help_text, own_rows,  # isort: skip
                    read_json, read_saved, require, run_main, save_config, without_nan, write_rows)  # fmt: skip
from score import (by_profile, interval, mismatches, paired_bootstrap, read_log,  # isort: skip
                   score_line, score_text, summary)  # fmt: skip
from chat import load_tokenizer, make_chat
from dist import World, single
from judges.gauge import command_gauge
from judges.shadow import second_look
from model import Transformer, find_folder
from rollout import MAX_FAILED, Dialogue, Job, Stage, log_line, make_engine, make_talk
from rundir import check_writable, find_policy, restore_policy, use_kernels
from simulator import load_profiles
from ui.chat import command_chat
from ui.page import command_page
from users import make_user, user_name
from users.llm_user import LLMUser, prompt_folders, usage_metrics

EVAL_STREAM = 1 << 32  # takes the place of a training step's number, and no step reaches it
MEGABYTE = 1 << 20
ENDINGS = (".json", ".safetensors", ".txt")  # of a model's files, a checkpoint's, and prompts
Part = tuple[dict[tuple, dict], tuple]  # what one rank's `evaluate` returns


def evaluate(config: Config, model: Transformer, tokenizer, world: World,
             log: Path | None = None, check=None) -> Part:  # fmt: skip
    """Hold this rank's share: under each seed, `eval_dialogues` dialogues with each profile.

    The noise is the same at every call. Returns log lines by (seed, *key), and what the user's
    language model cost (`LLMUser.drain`). Each dialogue is written to `log` as it ends; those it
    holds already are held again only where they failed. `check` as in `Stage.hold`.
    """
    chat, talk = make_chat(tokenizer, config.think), make_talk(config, training=False)
    profiles = load_profiles(config.eval_profiles)
    rows = {(row["seed"], *row["key"]): row for row in held_before(log)}
    mine = range(world.rank, len(profiles), world.size)
    numbers = [(i, j) for i in mine for j in range(config.eval_dialogues)]
    own = replace(config, temperature=config.eval_temperature)
    engine, spent = make_engine(own, model, chat, len(numbers)), (Counter(), [])
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
            who = [replace(p, first_talk=said.get(i, p.first_talk)) for i, p in enumerate(profiles)]
            jobs = [Job((i, j), who[i]) for i, j in numbers if (seed, i, j) not in rows]
            user = make_user(config, config.eval_start_emotion, config.eval_user_mode)
            Stage(engine, chat, user, talk).hold(jobs, (seed, EVAL_STREAM), bar.update, keep, check)
            if isinstance(user, LLMUser):
                for whole, part in zip(spent, user.drain()):
                    whole += part  # a Counter and a list
    return rows, spent


def join_evaluation(config: Config, parts: list[Part]) -> tuple[list[dict], dict]:
    """All ranks' log lines in the order of seed and key, and what a user's language model cost."""
    rows = {key: row for found, _ in parts for key, row in found.items()}
    cost = usage_metrics([spent for _, spent in parts]) if config.user in ASKED else {}
    return [rows[key] for key in sorted(rows)], cost


def held_before(log: Path | None) -> list[dict]:
    """The completed dialogues in an interrupted evaluation's log; failed ones leave the file."""
    if not log or not log.is_file():
        return []
    kept = [row for row in own_rows(log) if row["status"] == "ok"]
    write_rows(log, kept)
    return kept


def command_run(argv: list[str]) -> int:
    """Hold the benchmark with a model folder, a hub name, or a run's model or newest checkpoint.

    Writes dialogues.jsonl, result.json and result.txt. An interrupted one goes on where it stopped.
    """
    out = next((arg[4:] for arg in argv if arg.startswith("out=")), "")
    policy = find_policy("eval.py run", [arg for arg in argv if not arg.startswith("out=")])
    config, world = policy.config, single(policy.config)
    within = f"eval/{policy.checkpoint.name if policy.checkpoint else 'final'}"
    named = f"runs/eval-{Path(policy.name).name}"
    folder = Path(out or (policy.run / within if policy.run else named))
    load_profiles(config.eval_profiles)  # whatever is wrong is said before weights are loaded
    settings = describe(config, f"{policy.name} ({fingerprint(*policy.files())})", world)
    log = begin_evaluation(folder, settings)
    print(use_kernels(config, policy.run, world), flush=True)
    make_user(config, config.eval_start_emotion, config.eval_user_mode)
    model, tokenizer = policy.load(world)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "settings.json").write_text(json.dumps(settings, indent=1) + "\n")
    try:
        rows, cost = join_evaluation(config, [evaluate(config, model, tokenizer, world, log)])
    except KeyboardInterrupt:
        print(f"stopped; the same command goes on from {log}", file=sys.stderr)
        return 130
    failed = [row for row in rows if row["status"] != "ok"]
    if len(failed) > MAX_FAILED * len(rows):
        print(f"no result: {len(failed)} of {len(rows)} users failed; the first: {failed[0]['why']}"
              f". The same command asks these again, the others are in {log}", file=sys.stderr)
        return 1
    write_evaluation(folder, config, settings, rows, cost)
    print((folder / "result.txt").read_text(), end="")
    return 0


def command_export(argv: list[str]) -> int:
    """A checkpoint as a Hugging Face folder; an adapter is merged, and also in OUT/adapter."""
    require(len(argv) == 2, "eval.py export wants RUN/ckpt/step_N and the folder to write")
    checkpoint, out = (Path(arg) for arg in argv)
    check_files(checkpoint)
    config = read_saved(checkpoint.resolve().parent.parent / "config.json")
    require(not out.exists(), f"{out}: exists already; give another folder or remove it")
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
    """The log of an evaluation in progress. Raises InputError if its folder is not for this one."""
    check_writable(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        done = (folder / "result.json").exists()
        if done or not (folder / "settings.json").is_file():
            what = "holds an evaluation already" if done else "is not an empty folder"
            raise InputError(f"{folder}: {what}; give another out=DIR or remove it")
        before = read_json(folder / "settings.json")
        for key, now in settings.items():
            if before.get(key) != now:
                change = f"{key} {before.get(key)}, not {now}"
                raise InputError(f"{folder}: was begun with {change}; give another out=DIR")
    return folder / "dialogues.partial.jsonl"


def fingerprint(*paths: Path) -> str:
    """8 hex digits of files, or a folder's JSON, text and weights; of large ones both ends."""
    digest = hashlib.sha256()
    for path in paths:
        inside = sorted(file for file in path.glob("*") if file.suffix in ENDINGS)
        for file in inside if path.is_dir() else [path]:
            try:
                with open(file, "rb") as data:
                    size = data.seek(0, 2)
                    for begin in (0, max(0, size - MEGABYTE)):
                        data.seek(begin)
                        digest.update(data.read(MEGABYTE))
            except OSError as error:
                raise InputError(f"{file}: cannot be read ({error.strerror})") from None
            digest.update(f"{file.name} {size}".encode())
    return digest.hexdigest()[:8]


def describe(config: Config, model: str, world: World) -> dict:
    """What a result depends on. Paths come with fingerprints, since files may change."""
    people, systems = Path(config.eval_profiles), make_talk(config, training=False).systems
    words = hashlib.sha256(json.dumps(systems).encode()).hexdigest()[:8]
    user = user_name(config, config.eval_user_mode)
    if config.user in ASKED:
        folders = prompt_folders(config.eval_user_mode, config.prompts).values()
        local = config.user == "local" and config.record != "replay"
        where = fingerprint(find_folder(config.user_model)) if local else config.user_url
        user += f", prompts {fingerprint(*folders)}, {config.user_tokens} tokens at most, {where}"
    return {
        "model": model, "precision": str(world.dtype).removeprefix("torch."), "user": user,
        "tokenizer": config.tokenizer or "the model's own",
        "profiles": f"{people} ({fingerprint(people)})",
        "dialogues_per_profile": config.eval_dialogues, "max_turns": config.eval_max_turns,
        "reply_tokens": config.reply_tokens, "context_tokens": config.context_tokens,
        "temperature": config.eval_temperature, "start_emotion": config.eval_start_emotion,
        "seeds": list(range(config.eval_seed, config.eval_seed + config.seeds)),
        "think": config.think, "system": f"{config.system or 'our prompts'} ({words})"}  # fmt: skip


def write_evaluation(folder: Path, config: Config, settings: dict, rows: list, cost: dict) -> dict:
    """Write dialogues.jsonl, result.txt and result.json, with settings; returns the summary."""
    folder.mkdir(parents=True, exist_ok=True)
    write_rows(folder / "dialogues.jsonl", rows)
    looked = second_look(rows)  # nothing that it says is trained on
    text = "\n".join(f"{key}: {value}" for key, value in (settings | cost | looked).items())
    numbered = [{**row, "line": i} for i, row in enumerate(rows, 1)]
    table = score_text(str(folder / "dialogues.jsonl"), numbered)
    (folder / "result.txt").write_text(f"{text}\n\n{table}\n")
    save_config(config, folder / "config.json")
    result = summary(rows) | looked
    seeds = {seed: summary([r for r in rows if r["seed"] == seed]) for seed in settings["seeds"]}
    whole = {**without_nan(result), "interval": interval(rows) if result["n"] else None,
             "seeds": [{"seed": seed, **without_nan(found)} for seed, found in seeds.items()],
             "settings": settings, "cost": cost}  # fmt: skip
    (folder / "result.json").write_text(json.dumps(whole, indent=1) + "\n")
    (folder / "dialogues.partial.jsonl").unlink(missing_ok=True)
    return result


def command_score(argv: list[str]) -> int:
    """Tables of logs, or with --json a list of {file, n, failed, score, success, failure}."""
    paths = [arg for arg in argv if arg != "--json"]
    require(paths, "eval.py score wants one log or more")
    logs = {path: read_log(path) for path in paths}
    if "--json" in argv:
        found = [{"file": path, **without_nan(summary(rows))} for path, rows in logs.items()]
        print(json.dumps(found, indent=1))
    else:
        print("\n\n".join(score_text(path, rows) for path, rows in logs.items()))
    return 0


def command_verify(argv: list[str]) -> int:
    """Recompute logs from their appraisals; exit code 1 if anything does not follow."""
    require(argv, "eval.py verify wants one log or more")
    wrong, count = [], 0
    for path in argv:
        for row in read_log(path):
            count += 1
            where = f"{path}:{row['line']}: dialogue {row['id']}"
            try:
                wrong += mismatches(row, where)
            except (KeyError, TypeError, ValueError) as error:
                why = f"{type(error).__name__}: {error}"
                raise InputError(f"{where}: not of SAGE's log format ({why})") from None
    print("\n".join([*wrong, f"{len(wrong)} mismatches in {count} dialogues"]))
    return 1 if wrong else 0


def command_compare(argv: list[str]) -> int:
    """Score, success and failure of two logs and the paired bootstrap of the difference, B - A."""
    require(len(argv) == 2, "eval.py compare wants two logs, the one to compare with first")
    logs = [read_log(path) for path in argv]
    gain, low, high = paired_bootstrap(*(by_profile(rows) for rows in logs))
    print(f"{'':<44} {'score':>6}   {'succ':>4}   {'fail':>4}")
    for path, rows in zip(argv, logs):
        print(score_line(path if len(path) <= 44 else "..." + path[-41:], rows))
    shared = len(by_profile(logs[0]).keys() & by_profile(logs[1]).keys())
    print(f"difference {gain:+.1f} points, 95 % interval {low:+.1f} to {high:+.1f} ", end="")
    print(f"(paired bootstrap over {shared} profiles)")
    return 0


COMMANDS = {"run": command_run, "export": command_export, "score": command_score,
            "verify": command_verify, "compare": command_compare, "gauge": command_gauge,
            "chat": command_chat, "page": command_page, "report": command_page}  # one command, two names  # fmt: skip


def main(argv: list[str]) -> int:
    if not argv or {"-h", "--help"} & set(argv):
        usage = "python eval.py run MODEL_OR_RUN [config.py] key=value ..."
        print(f"{__doc__.strip()}\n\n{help_text(usage)}")
        return 0
    if argv[0] not in COMMANDS:
        raise InputError(f"eval.py has no command {argv[0]!r}; known are {', '.join(COMMANDS)}")
    return COMMANDS[argv[0]](argv[1:])


if __name__ == "__main__":
    run_main(main)
