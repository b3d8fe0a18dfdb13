"""Every option of a run in one flat dataclass, how it is filled, and how JSON is read and written.

A config file is a Python file that binds `config = Config(...)`; the command line then changes
single options as `key=value`. Whatever can be checked without a model is checked here, so that a
mistake costs a second and one clear line (InputError, exit code 2) instead of an hour.
"""

import dataclasses
import difflib
import gzip
import json
import math
import os
import runpy
import sys
import textwrap
import zlib
from dataclasses import dataclass, field
from pathlib import Path

DTYPES = ("auto", "fp32", "bf16")
MODES = ("vanilla", "challenging")
ASKED = ("llm", "local")  # users that are a language model


class InputError(Exception):
    """Something that was given is wrong. The message is one line: where, what and the remedy."""


def run_main(main) -> None:
    """End a program as `main(argv)` does; bad input is one line on stderr and exit code 2."""
    try:
        sys.exit(main(sys.argv[1:]))
    except InputError as error:
        if int(os.environ.get("LOCAL_RANK", 0)) == 0:  # once a node: its files may differ
            print(error, file=sys.stderr)
        sys.exit(2)


def require(fine, message: str) -> None:
    """Raise InputError with the message unless what was given is fine."""
    if not fine:
        raise InputError(message)


def nearest(word: str, known, otherwise: str = "", cutoff: float = 0.6) -> str:
    """A hint at the known word that is nearest; `otherwise` if none is near."""
    near = difflib.get_close_matches(word, known, 1, cutoff)
    return f"; did you mean {near[0]!r}?" if near else otherwise


def option(default, meaning: str, choices: tuple = (), low=None, high=None, above=None):
    """A dataclass field for --help and `check`: meaning, choices, low <= value <= high, > above."""
    bounds = {"low": low, "high": high, "above": above}
    return field(default=default, metadata={"meaning": meaning, "choices": choices, **bounds})


@dataclass(frozen=True)
class Config:
    # model
    model: str = option("models/smollm2-135m-instruct", "HF folder or hub name, or a shape in "
                        "configs/shapes/ (random weights)")
    tokenizer: str = option("", "its folder or hub name, or bytes; empty: the model's own")
    think: bool = option(False, "reply after a <think> block, which nobody but the log ever sees")
    system: str = option("", "system prompt file; empty: prompts/policy_{en,zh}{,_think}.txt")
    lora_rank: int = option(0, "LoRA: rank of adapters, base frozen; 0: train all weights", low=0)
    lora_alpha: float = option(32.0, "LoRA: what adapters add is scaled by alpha / rank", above=0)
    lora_targets: str = option(
        "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj", "LoRA: layers that get adapters")
    # people and user
    profiles: str = option("data/en_train.jsonl", "training profiles, at least as many as `groups`")
    eval_profiles: str = option("data/en_test.jsonl", "profiles of the benchmark")
    user: str = option("offline", "who plays the people: offline (rules), llm (OpenAI-compatible "
                       "endpoint) or local (in our own engine)", ("offline", *ASKED))
    user_mode: str = option("vanilla", "vanilla or challenging: hidden need, hard to move", MODES)
    user_model: str = option("", "llm: the name the endpoint knows; local: HF folder or hub name")
    user_url: str = option("", "llm: the endpoint's base URL, such as http://127.0.0.1:8001/v1")
    user_key_env: str = option("", "environment variable with the endpoint's key; empty: no key")
    user_temperature: float = option(1.0, "the user's sampling temperature", low=0)
    user_tokens: int = option(1024, "cap on the tokens of one answer of the user's model", low=1)
    user_context: int = option(8192, "local: cap on the tokens of a prompt and its answer", low=2)
    user_dtype: str = option("auto", "local: fp32, bf16, or auto: bf16 on GPUs", DTYPES)
    user_concurrency: int = option(32, "calls at a time per rank; local: dialogues a batch", low=1)
    user_retries: int = option(5, "further tries after a failed call or unreadable answer", low=0)
    user_timeout: float = option(60.0, "seconds for one try of a call", above=0)
    user_json: bool = option(True, "ask for JSON (response_format); dropped where that is refused")
    one_call: bool = option(False, "appraisal and answer in one call: half the latency")
    prompts: str = option("", "folder of the user's prompts; empty: prompts/LANGUAGE/MODE")
    record: str = option("off", "off, record answers, or replay them", ("off", "record", "replay"))
    record_file: str = option("", "where answers are recorded; empty: record.jsonl in the run")
    # rollout
    groups: int = option(8, "people per step, all different", low=1)
    group_size: int = option(4, "dialogues with each of them", low=1)
    max_turns: int = option(8, "replies of the policy per dialogue, all of them appraised", low=1)
    reply_tokens: int = option(1024, "cap on sampled tokens a turn, thoughts included", low=1)
    context_tokens: int = option(8192, "cap on a dialogue's tokens, prompt included", low=2)
    temperature: float = option(1.0, "sampling temperature, in training log-probs too", above=0)
    start_emotion: float = option(30.0, "emotion at the start; RLVER 30, SAGE 40", low=10, high=99)
    strict_format: bool = option(
        True, "a malformed think reply ends its dialogue with reward 0; false: it is shown as is")
    slots: int = option(32, "dialogues generated at the same time, on each rank", low=1)
    # learning
    algorithm: str = option("ppo", "ppo (a critic) or grpo (group baselines)", ("ppo", "grpo"))
    steps: int = option(350, "steps of the run, each a rollout and an update", low=1)
    lr: float = option(1e-6, "learning rate of the policy, after warm-up", above=0)
    lr_schedule: str = option("constant", "rates after warm-up: constant, or linear (to 0 behind "
                              "the last of `steps`)", ("constant", "linear"))
    warmup: int = option(20, "steps of linear warm-up of the policy's learning rate", low=0)
    critic: str = option("trunk", "ppo: trunk (its own) or head (on the policy)", ("trunk", "head"))
    critic_lr: float = option(5e-6, "learning rate of the critic (or of the value head)", above=0)
    critic_warmup: int = option(50, "steps of linear warm-up of the critic's learning rate", low=0)
    credit: str = option("final", "final (reward on the last token) or turn (each change "
                         "of emotion on its turn)", ("final", "turn"))
    learn_from: int = option(0, "dialogues trained on, a group's most varied (PODS); 0: all", low=0)
    gamma: float = option(
        1.0, "discount per turn (credit=turn); credit=final: PPO's, per token", low=0, high=1)
    lam: float = option(1.0, "GAE's lambda per trained token; credit=turn: per turn", low=0, high=1)
    scale_advantage: bool = option(True, "grpo: divide by group spread; ppo: whiten advantages")
    minibatches: int = option(1, "optimiser steps an iteration; 1: strictly on-policy", low=1)
    epochs: int = option(1, "passes over the batch per iteration", low=1)
    clip: float = option(0.2, "PPO's clip range of the ratio", above=0)
    value_clip: float = option(0.5, "clip range of the value around its old prediction", low=0)
    vf_coef: float = option(0.5, "critic=head: weight of the value loss", low=0)
    entropy_coef: float = option(0.001, "weight of the entropy bonus", low=0)
    kl_coef: float = option(0.0, "weight of KL (k2) to the initial policy; 0: none loaded", low=0)
    grad_clip: float = option(1.0, "largest gradient norm", above=0)
    # evaluation
    eval_every: int = option(0, "evaluate every so many steps; 0: never during training", low=0)
    eval_dialogues: int = option(1, "evaluation dialogues per profile", low=1)
    eval_max_turns: int = option(10, "replies a dialogue, the last not appraised (SAGE 10)", low=1)
    eval_temperature: float = option(1.0, "sampling temperature of evaluation", above=0)
    eval_start_emotion: float = option(40.0, "emotion at the start (SAGE 40)", low=10, high=99)
    eval_user_mode: str = option("vanilla", "user of the evaluation: vanilla or challenging", MODES)
    eval_seed: int = option(1000, "seed of evaluation noise")
    seeds: int = option(1, "times the benchmark is held: under eval_seed, eval_seed + 1 ...", low=1)
    # machine
    device: str = option("auto", "auto, cpu or cuda", ("auto", "cpu", "cuda"))
    precision: str = option("auto", "of forward and backward: fp32, bf16 (trained weights, "
                            "gradient sums, Adam stay fp32), or auto: bf16 on GPUs", DTYPES)
    micro_tokens: int = option(8192, "tokens per backward pass; the gradient is the same", low=1)
    checkpointing: bool = option(False, "recompute activations in the backward pass")
    shard: int = option(0, "ranks that share one copy of the weights (FSDP); 0: all", low=0)
    generation: str = option("inplace", "weights in a rollout: inplace (gathered, then freed) or "
                             "replica (a second copy of them)", ("inplace", "replica"))
    matmul: str = option("auto", "library of CPU matrix products: mkl, onednn, or auto, the faster "
                         "one by a measurement of half a second", ("auto", "mkl", "onednn"))
    threads: int = option(0, "CPU threads; 0: torch's default", low=0)
    # run
    run: str = option("", "run directory; empty: runs/<name of the config file>")
    seed: int = option(0, "seed of data order, sampling noise and new weights")
    resume: str = option("auto", "auto (newest checkpoint), none (refuse a run that exists) or a "
                         "checkpoint to go on from (later ones of its run are removed)")
    save_every: int = option(5, "steps between checkpoints; 0: only the last step is saved", low=0)
    keep: int = option(2, "newest checkpoints kept; with eval_every also the best", low=1)


OPTIONS = {f.name: f for f in dataclasses.fields(Config)}
# --help shows first what most runs set, then sections, each named here by its first option.
FIRST = ("model", "algorithm", "think", "user", "user_url", "user_model", "profiles", "groups",
         "group_size", "steps", "lr", "run")  # fmt: skip
SECTIONS = dict(model="model", profiles="people and user", groups="rollout", algorithm="learning",
                eval_every="evaluation", device="machine", run="run")  # fmt: skip

# On resume these may differ from the saved config; anything else would change what the run means.
MAY_CHANGE = ("steps", "save_every", "keep", "eval_every", "resume", "run", "threads", "device",
              "user_url", "user_key_env", "user_concurrency", "user_retries", "user_timeout",
              "record", "record_file", "shard", "generation")  # fmt: skip


def load_config(argv: list[str]) -> Config:
    """Config from `[FILE.py] key=value ...`. Raises InputError that names a wrong key."""
    files = [arg for arg in argv if "=" not in arg]
    if len(files) > 1:
        raise InputError(f"{files[1]}: one config file is expected, and options as key=value")
    changes = dict(arg.removeprefix("--").split("=", 1) for arg in argv if "=" in arg)
    config = apply(read_config_file(files[0]) if files else Config(), changes)
    name = Path(files[0]).stem if files else "default"
    return check(dataclasses.replace(config, run=config.run or f"runs/{name}"))


def read_config_file(path: str) -> Config:
    """The `config` that a Python file binds. Raises InputError for whatever goes wrong in it."""
    require(Path(path).is_file(), f"{path}: no such config file; see configs/")
    try:
        names = runpy.run_path(path)
    except Exception as error:  # whatever the user's code may raise
        # For Config(stpes=1), Python's own message names the key between quotes.
        word = str(error).rsplit("'", 2) if isinstance(error, TypeError) else []
        hint, said = nearest_option(word[1]) if len(word) == 3 else "", " ".join(str(error).split())
        raise InputError(f"{path}: {type(error).__name__}: {said}{hint}") from None
    require(isinstance(names.get("config"), Config), f"{path}: binds no `config = Config(...)`")
    return names["config"]


def nearest_option(key: str) -> str:
    """A hint at the valid option whose name is nearest."""
    return nearest(key, OPTIONS, "; `python train.py --help` lists all options", cutoff=0.5)


TRUTH = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


def apply(config: Config, changes: dict[str, str]) -> Config:
    """The config with options replaced from their text; InputError for a wrong key or type."""
    values = {}
    for key, text in changes.items():
        if key not in OPTIONS:
            raise InputError(f"unknown option {key!r}{nearest_option(key)}")
        kind, default = OPTIONS[key].type, OPTIONS[key].default
        try:
            values[key] = TRUTH[text.lower()] if kind is bool else kind(text)
        except (ValueError, KeyError):
            what = {bool: "true or false", int: "a whole number", float: "a number"}[kind]
            raise InputError(
                f"option {key!r} is {what}, not {text!r}; write {key}={default}") from None
    return dataclasses.replace(config, **values)


def check(config: Config) -> Config:
    """Types, choices, bounds and combinations. Returns the config; raises InputError."""
    floats = {name: float(value) for name, value in vars(config).items()
              if OPTIONS[name].type is float and type(value) is int}  # fmt: skip
    config = dataclasses.replace(config, **floats)
    for name, f in OPTIONS.items():
        check_value(f, getattr(config, name))
    check_together(config)
    return config


def check_value(f: dataclasses.Field, value) -> None:
    """One option's value against its declaration."""
    name, choices = f"option {f.name!r}", f.metadata["choices"]
    low, high, above = (f.metadata[key] for key in ("low", "high", "above"))
    kinds = f"{f.type.__name__}, not {type(value).__name__} ({value!r})"
    must = f"be at least {low}" if low else "not be negative"
    require(value == value, f"{name} is a number, not {value}; its default is {f.default}")
    require(type(value) is f.type, f"{name} is of type {kinds}")
    if choices and value not in choices:
        hint = nearest(value, choices)
        raise InputError(f"{name} is one of {', '.join(choices)}, not {value!r}{hint}")
    within = high is None or low <= value <= high
    require(within, f"{name} must be within {low}..{high}, not {value}")
    require(low is None or not value < low, f"{name} must {must}, not {value}")
    require(above is None or value > above, f"{name} must be above {above}, not {value}")


def check_together(config: Config) -> None:
    """Combinations of options, and what a user that is a language model needs."""
    size, learn_from, cuts = config.group_size, config.learn_from, config.minibatches
    tokens, cap = config.reply_tokens, config.context_tokens
    given, known = config.lora_targets, Config.lora_targets.split(",")
    if config.lora_rank and not set(given.split(",")) <= set(known):
        raise InputError(f"option 'lora_targets' is some of {', '.join(known)}, not {given!r}")
    if config.algorithm == "grpo" and size < 2:
        alone = "a group of one has no baseline; or set algorithm=ppo"
        raise InputError(f"option 'group_size' must be at least 2 for grpo: {alone}")
    if learn_from == 1 or learn_from > size:
        raise InputError(f"option 'learn_from' ({learn_from}) is 0, or at least 2 and at most "
                         f"'group_size' ({size}): one dialogue has nothing to be compared with")
    if tokens >= cap:
        raise InputError(f"option 'reply_tokens' ({tokens}) must be below 'context_tokens' ({cap})")
    if (dialogues := config.groups * (learn_from or size)) < cuts:
        raise InputError(f"option 'minibatches' ({cuts}) exceeds a step's dialogues ({dialogues})")
    if config.user not in ASKED and config.record != "off":
        raise InputError("option 'record' is for language models; user=offline needs no record")
    needed = "user_model" if config.user_url or config.user == "local" else "user_url"
    if config.user in ASKED and not getattr(config, needed) and config.record != "replay":
        want = {"local": "a model's folder or hub name",
                "llm": "user_url=http://127.0.0.1:8001/v1 user_model=NAME (docs/simulators.md); "
                       "or user=offline, the rule-based user, which needs none"}  # fmt: skip
        raise InputError(
            f"option {needed!r} is empty: user={config.user} wants {want[config.user]}")
    tokens, cap = config.user_tokens, config.user_context
    if config.user == "local" and tokens >= cap:
        raise InputError(f"option 'user_tokens' ({tokens}) must be below 'user_context' ({cap})")


def save_config(config: Config, path: Path) -> None:
    """The resolved config as JSON."""
    path.write_text(json.dumps(dataclasses.asdict(config), indent=1) + "\n")


def read_saved(path: Path) -> Config:
    """A config that `save_config` wrote. Raises InputError if damaged, or of another version."""
    saved = read_json(path)
    if unknown := saved.keys() - OPTIONS:
        what = f"option {min(unknown)!r}, which this version does not have"
        raise InputError(f"{path}: holds {what}; go on with the version that env.txt names")
    try:
        return check(Config(**saved))
    except (ValueError, TypeError) as error:
        raise InputError(f"{path}: not a saved config ({error})") from None


def help_text(command: str) -> str:
    """Every option with its meaning and default: what most runs set first, then by section."""
    lines = [f"usage: {command}", "", "Options are written key=value; defaults in brackets."]
    rest = []
    for name, f in OPTIONS.items():
        rest += [("", SECTIONS[name])] if name in SECTIONS else []
        rest += [] if name in FIRST else [(name, f)]
    for name, f in [("", "what most runs set"), *((name, OPTIONS[name]) for name in FIRST), *rest]:
        if not name:
            lines += ["", f"{f}:"]
            continue
        shown = repr(f.default) if isinstance(f.default, str) else str(f.default)
        text, indent = f"{name:<19} {f.metadata['meaning']} [{shown}]", " " * 22
        lines += textwrap.wrap(text, 100, initial_indent="  ", subsequent_indent=indent)
    return "\n".join(lines)


# ---- JSON and JSON lines: every file of either kind is read and written by these


def read_json(path: Path) -> dict:
    """A JSON object from a file. Raises InputError if it is missing or damaged."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        have = "a model folder and a checkpoint have one"
        raise InputError(f"{path}: no such file; {have}") from None
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error})") from None
    require(isinstance(raw, dict), f"{path}: not JSON (an object is expected)")
    return raw


def read_rows(path: Path, torn: bool = False) -> list[tuple[str, dict]]:
    """(where, row) of each line of a JSON-lines file, gzipped or not; `where` is FILE:LINE.

    A line ends at a newline only: U+2028 may stand raw within one. `torn`: half a line at the end,
    left by a kill within `add_rows`, is passed over. Raises InputError for what is no JSON object.
    """
    data, rows = path.read_bytes(), []
    try:
        data = gzip.decompress(data) if path.suffix == ".gz" else data
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: not gzip, or cut short ({error})") from None
    lines = data.split(b"\n")
    for number, line in enumerate(lines[:-1] if torn else lines, 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            row = json.loads(line.decode("utf-8"))
        except ValueError as error:
            kind = "not UTF-8" if isinstance(error, UnicodeDecodeError) else "not JSON"
            raise InputError(f"{where}: {kind} ({error}); one object a line is expected") from None
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
