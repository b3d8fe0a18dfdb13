"""The Sentient benchmark on a model or checkpoint, and what can be done with dialogue logs afterwards.

    python eval.py run MODEL_OR_RUN [config.py] key=value ...   hold the benchmark's dialogues (out=DIR says where to)
    python eval.py score LOG... [--json]                        score, success, failure, by intention and persona
    python eval.py verify LOG...                                recompute every emotion and reward from the appraisals
    python eval.py compare LOG_A LOG_B                          paired bootstrap of the difference

The protocol is SAGE's (arXiv 2505.02847, section 2): emotion starts at 40, the model replies at most 10 times and the
last reply is not appraised; score = mean final emotion, success = at 100, failure = below 10. Logs are JSON lines in
SAGE's format, gzipped or not; SAGE's own can be scored and verified too.
"""

import dataclasses
import functools
import gzip
import json
import math
import sys
import zlib
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from chat import Chat, load_tokenizer, make_chat, system_prompt
from config import Config, InputError, help_text, load_config, read_saved, save_config
from dist import checkpoints
from engine import Engine
from llm import Endpoint, Local, Record
from model import Transformer, ValueHead, banned_ids, load_model, load_strictly, read_tensors
from offline import OfflineUser, user_hash
from rollout import EXCLUDED, Dialogue, Job, Talk, log_line, run_dialogues
from sentient import LLMUser
from simulator import INTENTIONS, PERSONA_TYPES, EmotionRules, Profile, User, band, canonical, load_profiles

EVAL_STREAM = 1 << 32  # stands where a training step's number does, and is never one
ENDINGS = ("content", "left", "goodbye", "max_turns", "context_full", "format", EXCLUDED)


def pick_device(config: Config) -> torch.device:
    """The device a config names. Raises InputError for cuda where there is none."""
    if config.device == "cuda" and not torch.cuda.is_available():
        raise InputError("option 'device' is cuda, but no GPU is to be seen; use device=cpu")
    if config.threads:
        torch.set_num_threads(config.threads)
    return torch.device("cuda" if config.device != "cpu" and torch.cuda.is_available() else "cpu")


def make_user(config: Config, start: float, mode: str) -> User:
    """The simulated user of a config: SAGE's emotion rules with this start."""
    rules = EmotionRules(start=start)
    if config.user == "offline":
        return OfflineUser(rules, mode)
    return LLMUser(make_client(config), rules, mode, config.prompts, config.one_call, config.user_retries)


def user_name(config: Config, mode: str) -> str:
    """Who the user is, for whoever reads a result: the offline user by its hash, a language model by name."""
    if config.user == "offline":
        return f"offline {user_hash()}, {mode}"
    prompts = config.prompts or "our prompts"
    return f"{config.user} {config.user_model} at temperature {config.user_temperature:g}, {prompts}, {mode}"


def make_client(config: Config) -> Endpoint | Local | Record:
    """The language model that plays the user, recorded or replayed where the config says so."""
    path = Path(config.record_file or Path(config.run) / "record.jsonl")
    settings = {"model": config.user_model, "temperature": config.user_temperature, "max_tokens": config.user_tokens}
    if config.record == "replay":
        return Record(path, settings)
    client = connect(dataclasses.replace(config, record="off", record_file=""))
    return Record(path, settings, client) if config.record == "record" else client


@functools.lru_cache(maxsize=1)
def connect(config: Config) -> Endpoint | Local:
    """The live model behind `make_client`. A run's evaluations share it: its threads, connections and weights."""
    if config.user == "llm":
        return Endpoint(
            config.user_model, config.user_url, config.user_key_env, config.user_temperature, config.user_tokens,
            config.user_concurrency, config.user_retries, config.user_try_timeout, config.user_dialogue_timeout,
            config.user_json,
        )
    chat = make_chat(load_tokenizer(config.user_model), think=False)
    model = load_model(config.user_model, config.seed).to(pick_device(config))
    banned = banned_ids(chat.tokenizer, model.config.vocab_size, (chat.end,))
    engine = Engine(model, banned, (chat.end,), config.user_concurrency, config.user_context, config.user_temperature)
    return Local(engine, chat, config.user_tokens)


def make_engine(
    config: Config, model: Transformer, chat: Chat, temperature: float, dialogues: int,
    value_head: ValueHead | None = None,
) -> Engine:
    """An engine for this model with no more slots than there are dialogues."""
    banned, slots = banned_ids(chat.tokenizer, model.config.vocab_size, (chat.end,)), min(config.slots, dialogues)
    return Engine(model, banned, (chat.end,), slots, config.context_tokens, temperature, value_head)


def make_talk(config: Config, training: bool) -> Talk:
    """How dialogues are held in training, or in the benchmark."""
    return Talk(
        systems={language: system_prompt(language, config.think, config.system) for language in ("en", "zh")},
        max_turns=config.max_turns if training else config.eval_max_turns,
        reply_tokens=config.reply_tokens,
        strict_format=training,
        appraise_last=training,
    )


def evaluate(config: Config, model: Transformer, tokenizer, profiles: list[Profile], title: str) -> list[Dialogue]:
    """Hold `eval_dialogues` benchmark dialogues with each profile, under the same noise whenever it is called."""
    chat = make_chat(tokenizer, config.think)
    jobs = [Job((i, j), profile) for i, profile in enumerate(profiles) for j in range(config.eval_dialogues)]
    engine = make_engine(config, model, chat, config.eval_temperature, len(jobs))
    user = make_user(config, config.eval_start_emotion, config.eval_user_mode)
    talk, seed = make_talk(config, training=False), (config.eval_seed, EVAL_STREAM)
    with tqdm(total=len(jobs) * talk.max_turns, desc=title, unit="reply", leave=False, dynamic_ncols=True) as bar:
        return run_dialogues(jobs, engine, chat, user, talk, seed, bar.update)


def read_log(path: str) -> list[dict]:
    """The dialogues of a log, gzipped or not. Raises InputError naming the line that is off."""
    if not Path(path).is_file():
        raise InputError(f"{path}: no such log")
    data, rows = Path(path).read_bytes(), []
    try:
        data = gzip.decompress(data) if path.endswith(".gz") else data
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: not gzip, or cut short ({error})") from None
    for number, line in enumerate(data.split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8"))
        except ValueError as error:
            raise InputError(f"{path}:{number}: not JSON ({error})") from None
        wanted = ["id", "history"]
        if isinstance(row, dict) and row.get("status", "ok") == "ok":
            wanted += ["emo_point", "emo_state"]
        for key in wanted:
            if not isinstance(row, dict) or key not in row:
                raise InputError(f"{path}:{number}: no key {key!r}; a SAGE dialogue log is expected")
        rows.append({**row, "line": number})
    if not rows:
        raise InputError(f"{path}: holds no dialogue")
    return rows


def without_nan(row: dict) -> dict:
    """The row with None for the numbers that are not finite: JSON has no word for them."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}


def completed(rows: list[dict]) -> list[dict]:
    """The dialogues that count: those whose user did not fail."""
    return [row for row in rows if row.get("status", "ok") == "ok"]


def summary(rows: list[dict]) -> dict:
    """n (completed dialogues), failed, score (mean final emotion), success and failure (counts)."""
    points = [row["emo_point"] for row in completed(rows)]
    return {
        "n": len(points),
        "failed": len(rows) - len(points),
        "score": float(np.mean(points)) if points else math.nan,
        "success": sum(point >= 100 for point in points),
        "failure": sum(point < 10 for point in points),
    }


def score_line(name: str, rows: list[dict]) -> str:
    """One row of a table: name, score, success, failure."""
    s = summary(rows)
    warning = f"   {s['failed']} of {len(rows)} dialogues FAILED and are left out" if s["failed"] else ""
    return f"{name:<44} {s['score']:>6.1f}   {s['success']:>4}   {s['failure']:>4}   of {s['n']}{warning}"


def score_text(path: str, rows: list[dict]) -> str:
    """The table of a log: all, by hidden intention, by persona type."""
    lines = [f"{path}", f"{'':<44} {'score':>6}   {'succ':>4}   {'fail':>4}", score_line("all", rows)]
    for key, table in (("task", INTENTIONS), ("character", PERSONA_TYPES)):
        groups = defaultdict(list)
        for row in rows:
            groups[canonical(row.get(key, ""), table, f"{path}:{row['line']}: key {key!r}")].append(row)
        lines += [score_line(f"  {name} ({table[name][1]})"[:44], groups[name]) for name in table if name in groups]
    return "\n".join(lines)


def mismatches(row: dict, where: str) -> list[str]:
    """What in a logged dialogue does not follow from its appraisals; empty if everything does."""
    rules, wrong, ended = EmotionRules(), [], row.get("ended")
    users = [message for message in row["history"] if message["role"] == "user"]
    if row.get("status", "ok") != "ok":
        return [] if ended == EXCLUDED else [f"{where}: status is {row['status']!r}, but it ended as {ended!r}"]
    if not users:
        return [f"{where}: status is 'ok', but the history holds no user"]
    emotion = users[0]["emotion-point"]
    for turn, message in enumerate(users[1:], 2):
        emotion = rules.step(emotion, float(message["planning"]["change"]))
        if abs(emotion - message["emotion-point"]) > 1e-6:
            found = message["emotion-point"]
            wrong.append(f"{where}: user turn {turn}: emotion is {found}, the logged changes give {emotion:g}")
            emotion = found
        if rules.ending(emotion) and turn < len(users):
            wrong.append(f"{where}: user turn {turn}: the dialogue goes on after an emotion of {emotion:g}")
    if abs(row["emo_point"] - emotion) > 1e-6:
        wrong.append(f"{where}: final emotion is {row['emo_point']}, the last turn's is {emotion:g}")
    if row["emo_state"] != f"Emotion-{band(emotion)}":
        wrong.append(f"{where}: state is {row['emo_state']}, {emotion:g} is Emotion-{band(emotion)}")
    if "ended" in row:  # an addition of ours, as is the reward
        due = rules.ending(emotion)
        if ended not in ENDINGS or ended == EXCLUDED:
            wrong.append(f"{where}: ended as {ended!r}, which is no ending of a completed dialogue")
        elif ended != due and (due or ended in ("content", "left")):
            wrong.append(f"{where}: ended as {ended!r} at an emotion of {emotion:g}")
        reward = 0.0 if ended == "format" else emotion / 100
        if abs(row["reward"] - reward) > 1e-9:
            wrong.append(f"{where}: reward is {row['reward']}, {reward:g} follows from the dialogue")
    return wrong


def paired_bootstrap(
    before: dict[str, list[float]], after: dict[str, list[float]], samples: int = 10_000, seed: int = 0
) -> tuple[float, float, float]:
    """Mean difference after - before and its 95 % interval, resampling profiles (each the mean of its dialogues).

    Raises InputError where the two share no profile.
    """
    shared = sorted(before.keys() & after.keys())
    if not shared:
        raise InputError("the two logs share no profile id; nothing can be paired")
    gain = np.array([np.mean(after[name]) - np.mean(before[name]) for name in shared])
    draws = np.random.default_rng(seed).integers(0, len(gain), (samples, len(gain)))
    low, high = np.percentile(gain[draws].mean(1), [2.5, 97.5])
    return float(gain.mean()), float(low), float(high)


def by_profile(rows: list[dict]) -> dict[str, list[float]]:
    """Final emotions of the completed dialogues by profile id."""
    points = defaultdict(list)
    for row in completed(rows):
        points[row["id"]].append(row["emo_point"])
    return dict(points)


def command_run(argv: list[str]) -> int:
    """Hold the benchmark with a model folder, a hub name or a run (the newest checkpoint of one that is not finished).

    Writes OUT/dialogues.jsonl, OUT/result.json and OUT/result.txt.
    """
    if not argv or "=" in argv[0]:
        raise InputError("eval.py run wants a model folder, a hub name or a run directory first")
    source, options = argv[0], [arg for arg in argv[1:] if not arg.startswith("out=")]
    out = next((arg[4:] for arg in argv[1:] if arg.startswith("out=")), "")
    run = Path(source) if (Path(source) / "env.txt").is_file() else None  # a model folder has none
    if run and not any(not arg.count("=") for arg in options):
        saved = dataclasses.asdict(read_saved(run / "config.json"))
        options = [f"{key}={value}" for key, value in saved.items() if value != getattr(Config(), key)] + options
    config = load_config(options)
    newest = checkpoints(run)[-1:] if run and not (run / "model").is_dir() else []
    if run and not newest and not (run / "model").is_dir():
        raise InputError(f"{run}: has neither {run / 'model'} nor a checkpoint yet; train on, or see save_every")
    name = str(newest[0] / "policy.safetensors" if newest else run / "model" if run else source)
    final = newest[0].name if newest else "final"
    folder = Path(out or (run / "eval" / final if run else Path("runs") / f"eval-{Path(source).name}"))
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        what = "holds an evaluation already" if (folder / "dialogues.jsonl").exists() else "is not an empty folder"
        raise InputError(f"{folder}: {what}; give another out=DIR or remove it")
    profiles = load_profiles(config.eval_profiles)
    device = pick_device(config)
    if not newest:
        tokenizer, model = load_tokenizer(config.tokenizer or name), load_model(name, config.seed)
    else:
        tokenizer, model = load_tokenizer(config.tokenizer or config.model), load_model(config.model, config.seed)
        load_strictly(model, read_tensors(Path(name)), name)
    dialogues = evaluate(config, model.to(device), tokenizer, profiles, "benchmark")
    write_evaluation(folder, config, name, dialogues)
    print((folder / "result.txt").read_text(), end="")
    return 0


def write_evaluation(folder: Path, config: Config, model: str, dialogues: list[Dialogue]) -> dict:
    """dialogues.jsonl, result.json and result.txt in a folder; returns the summary. The result names the settings."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [log_line(dialogue) for dialogue in dialogues]
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    (folder / "dialogues.jsonl").write_text("".join(lines), encoding="utf-8")
    settings = {
        "model": model,
        "user": user_name(config, config.eval_user_mode),
        "profiles": config.eval_profiles,
        "dialogues": len(rows),
        "max_turns": config.eval_max_turns,
        "reply_tokens": config.reply_tokens,
        "temperature": config.eval_temperature,
        "start_emotion": config.eval_start_emotion,
        "seed": config.eval_seed,
        "think": config.think,
    }
    result = summary(rows)
    (folder / "result.json").write_text(json.dumps({**without_nan(result), "settings": settings}, indent=1) + "\n")
    text = "\n".join(f"{key}: {value}" for key, value in settings.items())
    numbered = [{**row, "line": i} for i, row in enumerate(rows, 1)]
    (folder / "result.txt").write_text(f"{text}\n\n{score_text(str(folder / 'dialogues.jsonl'), numbered)}\n")
    save_config(config, folder / "config.json")
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
    interval = f"95 % interval {low:+.1f} to {high:+.1f}"
    print(f"difference {gain:+.1f} points, {interval} (paired bootstrap over {shared} profiles)")
    return 0


COMMANDS = {"run": command_run, "score": command_score, "verify": command_verify, "compare": command_compare}


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
