"""Every option of a run, in one flat dataclass, and how it is filled; at the end, how JSON files are read and written.

A config file is a Python file that binds `config = Config(...)` (or `dataclasses.replace` of another config); the
command line then changes single options as `key=value`. All checks that need no model are made here, so that a mistake
costs a second and one clear line (InputError, exit code 2) instead of an hour.
"""

import dataclasses
import difflib
import gzip
import json
import math
import os
import runpy
import zlib
from dataclasses import dataclass, field
from pathlib import Path


class InputError(Exception):
    """Something that was given is wrong. The message is one line: where, what, remedy. Entry points exit with 2."""


def option(default, meaning: str, choices: tuple = ()):
    """A dataclass field that carries its meaning for --help and the values it may take."""
    return field(default=default, metadata={"meaning": meaning, "choices": choices})


@dataclass(frozen=True)
class Config:
    # what is trained, on whom
    run: str = option("", "run directory; empty: runs/<name of the config file>")
    model: str = option(
        "models/smollm2-135m-instruct",
        "local HF folder or hub name; or a shape file configs/shapes/*.json for random weights",
    )
    tokenizer: str = option("", "folder or hub name of the tokenizer; empty: the model's own")
    algorithm: str = option("ppo", "ppo (GAE and a critic) or grpo (group-relative advantages)", ("ppo", "grpo"))
    profiles: str = option("data/en_train.jsonl", "training profiles, JSON lines")
    eval_profiles: str = option("data/en_test.jsonl", "profiles of the benchmark and of periodic evaluation")
    user: str = option(
        "offline",
        "who the simulated user is: offline (no LLM, deterministic), llm (an OpenAI-compatible endpoint) or local "
        "(a checkpoint in our own engine)",
        ("offline", "llm", "local"),
    )
    user_mode: str = option(
        "vanilla",
        "vanilla, or challenging (hides its need and is moved only by what serves it)",
        ("vanilla", "challenging"),
    )
    think: bool = option(False, "reply after a <think> block; thoughts are removed before anybody sees the reply")
    system: str = option("", "file with the policy's system prompt; empty: prompts/policy_{en,zh}{,_think}.txt")
    seed: int = option(0, "seed of data order, sampling noise and new weights")
    # the simulated user where it is a language model
    user_model: str = option("", "user=llm: the name the endpoint knows; user=local: HF folder or hub name")
    user_url: str = option("", "user=llm: base URL of the endpoint, for example http://localhost:8000/v1")
    user_key_env: str = option("", "environment variable that holds the endpoint's key; empty: none is sent")
    user_temperature: float = option(1.0, "the user's sampling temperature")
    user_tokens: int = option(1024, "cap on the tokens of one answer of the user's model")
    user_context: int = option(8192, "user=local: cap on the tokens of a prompt and its answer")
    user_concurrency: int = option(32, "calls at the same time, of each rank; user=local: dialogues in one batch")
    user_retries: int = option(5, "further tries of a call that failed, and of an answer that could not be read")
    user_try_timeout: float = option(60.0, "seconds for one try of a call")
    user_dialogue_timeout: float = option(600.0, "seconds that one dialogue may wait for its user in all")
    user_json: bool = option(True, "ask the endpoint for JSON (response_format); dropped where it refuses")
    one_call: bool = option(False, "appraisal and answer in one call: half the latency")
    prompts: str = option("", "folder with the user's prompts; empty: prompts/{en,zh}/{vanilla,challenging}")
    record: str = option(
        "off", "off, record (write the user's answers to record_file) or replay (read them, no network)",
        ("off", "record", "replay"),
    )
    record_file: str = option("", "where answers are recorded; empty: record.jsonl in the run")
    # rollout
    groups: int = option(8, "profiles per step")
    group_size: int = option(4, "dialogues per profile")
    learn_from: int = option(
        0, "learn from that many dialogues of a group only, those whose rewards vary most (PODS); 0: from all"
    )
    max_turns: int = option(8, "replies of the policy per dialogue, all of them appraised")
    slots: int = option(32, "dialogues generated at the same time, on each rank")
    reply_tokens: int = option(1024, "cap on sampled tokens a turn, thoughts included")
    context_tokens: int = option(8192, "cap on a dialogue's tokens, prompt included")
    temperature: float = option(1.0, "sampling temperature; enters the training log-probs too")
    start_emotion: float = option(30.0, "emotion a training dialogue starts with (RLVER 30, SAGE 40)")
    # optimisation
    steps: int = option(350, "optimisation steps (rollout + update)")
    lr: float = option(1e-6, "learning rate of the policy, after warm-up")
    lr_schedule: str = option(
        "constant",
        "learning rates after warm-up: constant, or linear (to 0 behind the last of `steps`)",
        ("constant", "linear"),
    )
    warmup: int = option(20, "steps of linear warm-up of the policy's learning rate")
    critic: str = option(
        "trunk", "PPO's critic: trunk (a model of its own) or head (a value head on the policy)", ("trunk", "head")
    )
    critic_lr: float = option(5e-6, "learning rate of the critic (or of the value head)")
    critic_warmup: int = option(50, "steps of linear warm-up of the critic's learning rate")
    weight_decay: float = option(0.0, "AdamW's decoupled weight decay, on matrices only")
    grad_clip: float = option(1.0, "largest gradient norm")
    minibatches: int = option(1, "optimiser steps per iteration; 1: on-policy, old log-probs are the forward's own")
    epochs: int = option(1, "passes over the batch per iteration")
    micro_tokens: int = option(8192, "tokens per forward and backward; any value gives the same gradient")
    checkpointing: bool = option(False, "recompute activations in the backward pass")
    lora_rank: int = option(0, "train low-rank adapters of that rank on a frozen base (LoRA); 0: train all weights")
    lora_alpha: float = option(32.0, "LoRA: the adapters' output is scaled by lora_alpha / lora_rank")
    lora_targets: str = option(
        "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj", "LoRA: linear layers of a block that get adapters"
    )
    # losses
    credit: str = option(
        "final",
        "reward: final (on the last token) or turn (each change of emotion on its turn)",
        ("final", "turn"),
    )
    clip: float = option(0.2, "PPO's clip range of the ratio")
    value_clip: float = option(0.5, "clip range of the value around its old prediction")
    vf_coef: float = option(0.5, "weight of the value loss where the critic is a head on the policy")
    gamma: float = option(1.0, "discount per trained token; with credit=turn per turn")
    lam: float = option(1.0, "GAE's lambda per trained token; with credit=turn per turn")
    entropy_coef: float = option(0.001, "weight of the entropy bonus")
    kl_coef: float = option(0.0, "weight of the KL (k2) to the initial policy in the loss; 0: no reference model")
    scale_advantage: bool = option(True, "GRPO: divide by the group's standard deviation; PPO: whiten the advantages")
    # evaluation and bookkeeping
    eval_every: int = option(0, "evaluate every so many steps; 0: never during training")
    eval_dialogues: int = option(1, "evaluation dialogues per profile")
    eval_max_turns: int = option(
        10, "replies per evaluation dialogue, the last of which is not appraised (SAGE: 10, 9 scored)"
    )
    eval_temperature: float = option(1.0, "sampling temperature of evaluation")
    eval_start_emotion: float = option(40.0, "emotion an evaluation dialogue starts with (SAGE 40)")
    eval_seed: int = option(1000, "seed of evaluation noise")
    seeds: int = option(1, "times the benchmark is held, under eval_seed, eval_seed + 1, ...")
    eval_user_mode: str = option("vanilla", "user of the evaluation", ("vanilla", "challenging"))
    save_every: int = option(5, "steps between checkpoints; the last step is always saved; 0: only the last")
    keep: int = option(2, "newest checkpoints kept; with eval_every also the one that scored best")
    resume: str = option(
        "auto",
        "auto (newest checkpoint of the run), none (refuse a run that exists), or a checkpoint folder, from which the "
        "run then goes on (its own later checkpoints are removed)",
    )
    device: str = option("auto", "auto, cpu or cuda", ("auto", "cpu", "cuda"))
    precision: str = option(
        "auto",
        "what forward and backward compute in: fp32, bf16 (weights, gradients' sums and Adam stay fp32; a frozen base "
        "under LoRA is kept in bf16), or auto: bf16 on GPUs, fp32 on CPUs",
        ("auto", "fp32", "bf16"),
    )
    shard: int = option(
        0, "ranks that share one copy of the weights (FSDP); fewer than all: hybrid, each such group has a copy; 0: all"
    )
    generation: str = option(
        "inplace",
        "where rollouts on several ranks or GPUs find whole weights: inplace (shards are gathered for the rollout and "
        "freed after it) or replica (a second, whole copy, 2 bytes a parameter in bf16, updated after each step)",
        ("inplace", "replica"),
    )
    threads: int = option(0, "CPU threads; 0: torch's default")


# On resume these may differ from the saved config; anything else would silently change what the run means.
MAY_CHANGE = (
    "steps", "save_every", "keep", "eval_every", "resume", "run", "threads", "device", "user_url", "user_key_env",
    "user_concurrency", "user_retries", "user_try_timeout", "user_dialogue_timeout", "record", "record_file",
    "shard", "generation",
)


def load_config(argv: list[str]) -> Config:
    """Config from `[FILE.py] key=value ...`. Raises InputError naming the key and the nearest valid one."""
    files = [arg for arg in argv if "=" not in arg]
    if len(files) > 1:
        raise InputError(f"{files[1]}: one config file is expected, and options as key=value")
    config = read_config_file(files[0]) if files else Config()
    changes = {}
    for arg in argv:
        if "=" in arg:
            key, text = arg.split("=", 1)
            changes[key.removeprefix("--")] = text
    config = apply(config, changes)
    if not config.run:
        config = dataclasses.replace(config, run=f"runs/{Path(files[0]).stem if files else 'default'}")
    return check(config)


def read_config_file(path: str) -> Config:
    """The `config` that a Python config file binds."""
    if not Path(path).is_file():
        raise InputError(f"{path}: no such config file; see configs/")
    try:
        names = runpy.run_path(path)
    except Exception as error:  # whatever the user's code may raise; for Config(stpes=1) Python's message names the key
        word = str(error).rsplit("'", 2) if isinstance(error, TypeError) else []
        hint = nearest(word[1]) if len(word) == 3 else ""
        raise InputError(f"{path}: {type(error).__name__}: {' '.join(str(error).split())}{hint}") from None
    if not isinstance(names.get("config"), Config):
        raise InputError(f"{path}: binds no `config = Config(...)`")
    return names["config"]


def nearest(key: str) -> str:
    """A hint at the valid option whose name is nearest."""
    near = difflib.get_close_matches(key, [f.name for f in dataclasses.fields(Config)], 1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else "; `python train.py --help` lists all options"


def apply(config: Config, changes: dict[str, str]) -> Config:
    """The config with options replaced from their command-line text."""
    types = {f.name: f.type for f in dataclasses.fields(Config)}
    values = {}
    for key, text in changes.items():
        if key not in types:
            raise InputError(f"unknown option {key!r}{nearest(key)}")
        values[key] = parse(key, text, types[key])
    return dataclasses.replace(config, **values)


def parse(key: str, text: str, kind: type):
    """One value from its text. Raises InputError for text that is not of the option's type."""
    try:
        if kind is bool:
            return {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}[text.lower()]
        return kind(text)
    except (ValueError, KeyError):
        name = {bool: "true or false", int: "a whole number", float: "a number"}[kind]
        raise InputError(f"option {key!r} is {name}, not {text!r}; write {key}={getattr(Config(), key)}") from None


def check(config: Config) -> Config:
    """Types, choices, ranges and combinations. Returns the config; raises InputError."""
    for f in dataclasses.fields(Config):
        value = getattr(config, f.name)
        if f.type is float and type(value) is int:
            value = float(value)
            config = dataclasses.replace(config, **{f.name: value})
        if value != value:
            raise InputError(f"option {f.name!r} is a number, not {value}; its default is {f.default}")
        if type(value) is not f.type:
            raise InputError(f"option {f.name!r} is of type {f.type.__name__}, not {type(value).__name__} ({value!r})")
        if f.metadata["choices"] and value not in f.metadata["choices"]:
            near = difflib.get_close_matches(value, f.metadata["choices"], 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise InputError(f"option {f.name!r} is one of {', '.join(f.metadata['choices'])}, not {value!r}{hint}")
    for key in (
        "groups", "group_size", "max_turns", "slots", "reply_tokens", "steps", "minibatches", "epochs", "micro_tokens",
        "eval_dialogues", "eval_max_turns", "seeds", "keep", "user_tokens", "user_concurrency",
    ):
        if getattr(config, key) < 1:
            raise InputError(f"option {key!r} must be at least 1, not {getattr(config, key)}")
    for key in ("lr", "critic_lr", "temperature", "eval_temperature", "grad_clip", "clip", "user_try_timeout",
                "user_dialogue_timeout"):
        if not getattr(config, key) > 0:
            raise InputError(f"option {key!r} must be above 0, not {getattr(config, key)}")
    for key in (
        "warmup", "critic_warmup", "weight_decay", "value_clip", "vf_coef", "entropy_coef", "kl_coef", "eval_every",
        "save_every", "threads", "shard", "lora_rank", "learn_from", "user_temperature", "user_retries",
    ):
        if getattr(config, key) < 0:
            raise InputError(f"option {key!r} must not be negative, not {getattr(config, key)}")
    for key in ("gamma", "lam"):
        if not 0 <= getattr(config, key) <= 1:
            raise InputError(f"option {key!r} must be within 0..1, not {getattr(config, key)}")
    for key in ("start_emotion", "eval_start_emotion"):
        if not 10 <= getattr(config, key) < 100:
            value = getattr(config, key)
            raise InputError(f"option {key!r} must be in 10..99, where a dialogue can begin, not {value}")
    targets = config.lora_targets.split(",")
    known = Config.lora_targets.split(",")
    if config.lora_rank and not set(targets) <= set(known):
        raise InputError(f"option 'lora_targets' is some of {', '.join(known)}, not {config.lora_targets!r}")
    if config.lora_rank and not config.lora_alpha > 0:
        raise InputError(f"option 'lora_alpha' must be above 0, not {config.lora_alpha}")
    if config.algorithm == "grpo" and config.group_size < 2:
        raise InputError(
            "option 'group_size' must be at least 2 for grpo: a group of one has no baseline; or set algorithm=ppo"
        )
    if config.learn_from == 1 or config.learn_from > config.group_size:
        raise InputError(
            f"option 'learn_from' ({config.learn_from}) is 0, or at least 2 and at most 'group_size' "
            f"({config.group_size}): one dialogue has nothing to be compared with"
        )
    for needed in {"llm": ("user_model", "user_url"), "local": ("user_model",)}.get(config.user, ()):
        if not getattr(config, needed) and config.record != "replay":
            raise InputError(f"option {needed!r} is empty; user={config.user} needs it, see python train.py --help")
    if config.user == "offline" and config.record != "off":
        raise InputError("option 'record' is for users that are language models; user=offline needs no record")
    if config.user == "local" and config.user_tokens >= config.user_context:
        tokens, context = config.user_tokens, config.user_context
        raise InputError(f"option 'user_tokens' ({tokens}) must be below 'user_context' ({context})")
    if config.reply_tokens >= config.context_tokens:
        raise InputError(
            f"option 'reply_tokens' ({config.reply_tokens}) must be below 'context_tokens' ({config.context_tokens})"
        )
    if (dialogues := config.groups * (config.learn_from or config.group_size)) < config.minibatches:
        raise InputError(f"option 'minibatches' ({config.minibatches}) exceeds a step's dialogues ({dialogues})")
    return config


def find_folder(name: str, weights: bool = True) -> Path:
    """The local folder of a model: `name` itself, or the hub's snapshot, with or without its weights.

    Raises InputError where there is none; the hub is not asked for what reads like a path of ours.
    """
    if Path(name).is_dir():
        return Path(name)
    if name.count("/") != 1 or name.startswith((".", "/", "models/", "runs/")):
        raise InputError(
            f"{name}: no such model folder; `make demo` makes models/smollm2-135m-instruct, "
            "or give a hub name like Qwen/Qwen2.5-7B-Instruct"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    wanted = ["*.json", "merges.txt", "*.jinja"] + ["*.safetensors"] * weights
    try:
        return Path(snapshot_download(name, allow_patterns=wanted))
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        raise InputError(f"{name}: neither a folder here nor to be had from the hub ({type(error).__name__})") from None


def save_config(config: Config, path: Path) -> None:
    """The resolved config as JSON."""
    path.write_text(json.dumps(dataclasses.asdict(config), indent=1) + "\n")


def read_saved(path: Path) -> Config:
    """A config that `save_config` wrote."""
    try:
        return check(Config(**json.loads(path.read_text())))
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{path}: not a saved config ({error})") from None


def help_text(command: str) -> str:
    """Every option with its default and meaning."""
    lines = [f"usage: {command}", "", "Options, written key=value after the config file (defaults in brackets):", ""]
    for f in dataclasses.fields(Config):
        shown = repr(f.default) if isinstance(f.default, str) else str(f.default)
        lines.append(f"  {f.name:<19} {f.metadata['meaning']} [{shown}]")
    return "\n".join(lines)


# ---- JSON and JSON lines: every file of either kind is read and written by these


def read_json(path: Path) -> dict:
    """A JSON object from a file. Raises InputError if it is missing or damaged."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(raw, dict):
            raise ValueError("an object is expected")
        return raw
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; a model folder and a checkpoint have one") from None
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error})") from None


def read_rows(path: Path, torn: bool = False) -> list[tuple[str, dict]]:
    """(where, row) of each line of a JSON-lines file, gzipped or not; `where` is FILE:LINE, to begin an error with.

    A line ends at a newline only: U+2028 may stand raw within one. `torn`: the file was written by `add_rows`, and half
    a line that a kill left at its end is passed over. Raises InputError for a line that is no JSON object.
    """
    data, rows = path.read_bytes(), []
    try:
        data = gzip.decompress(data) if path.suffix == ".gz" else data
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: not gzip, or cut short ({error})") from None
    lines = data.split(b"\n")
    for number, line in enumerate(lines[:-1] if torn else lines, 1):
        if line.strip():
            where = f"{path}:{number}"
            try:
                row = json.loads(line.decode("utf-8"))
            except UnicodeDecodeError as error:
                raise InputError(f"{where}: not UTF-8 ({error.reason}); one JSON object a line is expected") from None
            except json.JSONDecodeError as error:
                why = f"{error.msg}, column {error.colno}"
                raise InputError(f"{where}: not JSON ({why}); one object a line is expected") from None
            if not isinstance(row, dict):
                raise InputError(f"{where}: a {type(row).__name__}, where a JSON object is expected")
            rows.append((where, row))
    return rows


def own_rows(path: Path) -> list[dict]:
    """The rows of a file that `add_rows` has written, or will: none where it is not there yet."""
    return [row for _, row in read_rows(path, torn=True)] if path.is_file() else []


def add_rows(path: Path, rows: list[dict]) -> None:
    """Append JSON lines, and have them on disk: a checkpoint must not be ahead of its log."""
    with open(path, "a", encoding="utf-8") as file:
        file.writelines(json_line(row) for row in rows)
        file.flush()
        os.fsync(file.fileno())


def write_rows(path: Path, rows: list[dict]) -> None:
    """Replace a JSON-lines file; if killed, either the old file or the new one is there, whole."""
    aside = path.with_name(path.name + ".partial")
    aside.write_text("".join(json_line(row) for row in rows), encoding="utf-8")
    sync(aside)
    os.replace(aside, path)


def json_line(row: dict) -> str:
    """A row as a line; null for numbers that are not finite, for which JSON has no word."""
    return json.dumps(without_nan(row), ensure_ascii=False) + "\n"


def without_nan(row: dict) -> dict:
    """The row with None for its numbers that are not finite."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}


def sync(path: Path) -> None:
    """Make what was written to a file, or renamed within a folder, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
