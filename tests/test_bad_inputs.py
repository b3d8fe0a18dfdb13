"""A table of mistakes. Each is exactly one line on stderr that names the place and the remedy, exit code 2, and nothing
is created, changed or removed."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, ScriptedUser, tiny_raw
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import eval as evaluation
import train
from chat import load_tokenizer
from checkpoint import init_weights, save_model
from config import Config, InputError, check
from model import Transformer

ROW = {
    "id": "a",
    "player": "Ada, baker.",
    "scene": "My oven broke.",
    "main_cha": "passive",
    "task": "empathy",
    "first_talk": "Hi.",
}
TINY = dict(
    run="run", model="model", profiles="people.jsonl", eval_profiles="people.jsonl", system="system.txt", critic="head",
    groups=1, group_size=2, max_turns=1, eval_max_turns=1, reply_tokens=4, context_tokens=128, steps=1, save_every=1,
    threads=1,
)  # fmt: skip
SHARD = "run/ckpt/step_1/shard-00001-model-00001-of-00001.safetensors"
SAME = [f"{key}={value}" for key, value in TINY.items()]


def tiny_folder(name, **changes):
    """A model folder with the byte tokenizer."""
    model = Transformer({**tiny_raw("qwen2"), **changes})
    init_weights(model, 0)
    save_model(model, load_tokenizer("bytes"), Path(name))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A folder with a model, profiles, a finished run and a log: everything that the cases then spoil."""
    folder, before, threads = tmp_path_factory.mktemp("prepared"), os.getcwd(), torch.get_num_threads()
    os.chdir(folder)
    tiny_folder("model")
    tiny_folder("other", hidden_size=32)
    Path("system.txt").write_text("Be kind.")
    Path("people.jsonl").write_text(json.dumps(ROW) + "\n")
    train.train(check(Config(**TINY)), ScriptedUser())
    assert evaluation.main(["run", "model", *SAME[1:], "out=result"]) == 0
    os.chdir(before)
    torch.set_num_threads(threads)
    return folder


@pytest.fixture
def work(prepared, tmp_path, monkeypatch):
    """A copy of the prepared folder as the working directory."""
    shutil.copytree(prepared, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def cut(path, keep=0.5):
    """Truncate a file."""
    data = Path(path).read_bytes()
    Path(path).write_bytes(data[: int(len(data) * keep)])


def scramble(path):
    """Damage a file's header, its size unchanged."""
    data = Path(path).read_bytes()
    Path(path).write_bytes(data[:8] + b"?" * 64 + data[72:])


def edit_json(path, **changes):
    Path(path).write_text(json.dumps({**json.loads(Path(path).read_text()), **changes}))


def people(*rows):
    Path("people.jsonl").write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))


def strange_tokenizer():
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE({"a": 0}, [])), unk_token="a").save_pretrained(
        "strange"
    )


def nothing():
    pass


def without(key):
    return {k: v for k, v in ROW.items() if k != key}


# what: preparation, options of train.py behind SAME, words of the message between bars
TRAIN = {
    "unknown key": (nothing, "stpes=3", "'stpes' | did you mean 'steps'"),
    "wrong type": (nothing, "steps=many", "'steps' | whole number | 'many'"),
    "wrong choice": (nothing, "algorithm=dpo", "'algorithm' | ppo, grpo"),
    "impossible combination": (nothing, "algorithm=grpo group_size=1", "'group_size' | at least 2"),
    "missing config file": (nothing, "configs/nothing.py", "configs/nothing.py | no such config file"),
    "missing model folder": (
        nothing,
        "run=new model=models/nothing tokenizer=bytes",
        "models/nothing | no such model folder",
    ),
    "missing model and tokenizer": (nothing, "run=new model=./nothing", "./nothing | no such model folder"),
    "missing shape file": (
        nothing,
        "run=new model=shapes/nothing.json tokenizer=bytes",
        "shapes/nothing.json | no such file",
    ),
    "truncated weights": (
        lambda: cut("model/model.safetensors"),
        "run=new",
        "model/model.safetensors | truncated or damaged",
    ),
    "empty weights": (
        lambda: cut("model/model.safetensors", 0),
        "run=new",
        "model/model.safetensors | truncated or damaged",
    ),
    "missing weights": (
        lambda: os.remove("model/model.safetensors"),
        "run=new",
        "model/model.safetensors | no such file",
    ),
    "weights of another shape": (
        lambda: shutil.copy("other/model.safetensors", "model"),
        "run=new",
        "model | shape | config.json",
    ),
    "wrong architecture": (
        lambda: edit_json("model/config.json", model_type="gpt2"),
        "run=new",
        "model/config.json | 'gpt2' | qwen2, qwen3, llama",
    ),
    "rope scaling": (
        lambda: edit_json("model/config.json", rope_scaling={"rope_type": "yarn"}),
        "run=new tokenizer=bytes",
        "model/config.json | 'yarn'",
    ),
    "config.json without a key": (
        lambda: Path("model/config.json").write_text('{"model_type": "qwen2"}'),
        "run=new",
        "model/config.json | missing",
    ),
    "config.json is not JSON": (
        lambda: cut("model/config.json"),
        "run=new tokenizer=bytes",
        "model/config.json | not JSON",
    ),
    "tokenizer without ChatML": (strange_tokenizer, "run=new tokenizer=strange", "strange | <|im_start|> | ChatML"),
    "missing prompt": (nothing, "run=new system=nothing.txt", "nothing.txt | system="),
    "missing profiles": (nothing, "run=new profiles=nobody.jsonl", "nobody.jsonl | profiles="),
    "profile line that is not JSON": (lambda: people(ROW, "{"), "run=new", "people.jsonl:2: | not JSON"),
    "profile without a field": (lambda: people(without("scene")), "run=new", "people.jsonl:1: | 'scene' | missing"),
    "profile with an empty field": (lambda: people({**ROW, "player": " "}), "run=new", "people.jsonl:1: | 'player'"),
    "profile with an unknown field": (
        lambda: people({**ROW, "tsak": "x"}),
        "run=new",
        "people.jsonl:1: | 'tsak' | 'task'",
    ),
    "unknown intention": (lambda: people({**ROW, "task": "fame"}), "run=new", "people.jsonl:1: | 'task' | 'fame'"),
    "duplicate id": (lambda: people(ROW, ROW), "run=new", "people.jsonl:2: | 'a' | line 1"),
    "empty profile file": (lambda: people(), "run=new", "people.jsonl | holds no profile"),
    "fewer profiles than a step draws": (
        nothing, "run=new groups=2", "people.jsonl: | 1 profiles | 2 different | groups=1"
    ),
    "profile file of binary": (lambda: Path("people.jsonl").write_bytes(b"\xff\xfe\x00"), "run=new", "people.jsonl"),
    "no GPU": (nothing, "run=new device=cuda", "'device' | device=cpu"),
    "run with another config": (nothing, "lr=0.5", "run: | lr= | 0.5 | another run=DIR"),
    "run that exists, resume=none": (nothing, "resume=none", "run: | exists already"),
    "folder that is no run": (lambda: os.remove("run/config.json"), "", "run: | not a run"),
    "run that is a file": (nothing, "run=people.jsonl", "people.jsonl:"),
    "damaged config of a run": (lambda: cut("run/config.json"), "", "run/config.json"),
    "missing checkpoint": (nothing, "run=new resume=run/ckpt/step_9", "run/ckpt/step_9 | no such"),
    "checkpoint of another model": (nothing, "run=new model=other resume=run/ckpt/step_1", "run/ckpt/step_1 | shape"),
    "checkpoint of another critic": (
        nothing,
        "run=new critic=trunk resume=run/ckpt/step_1",
        "run/ckpt/step_1 | critic. | another model",
    ),
    "checkpoint of a critic that is not wanted": (
        nothing,
        "run=new algorithm=grpo resume=run/ckpt/step_1",
        "run/ckpt/step_1 | value_head | another model",
    ),
    "truncated checkpoint": (lambda: cut(SHARD), "steps=2", f"{SHARD} | bytes, not | damaged"),
    "checkpoint without a file": (lambda: os.remove(SHARD), "steps=2", f"{SHARD} | is missing"),
    "damaged checkpoint, named": (lambda: cut(SHARD), "run=new resume=run/ckpt/step_1", f"{SHARD} | bytes, not"),
    "checkpoint damaged within": (lambda: scramble(SHARD), "steps=2", f"{SHARD} | damaged"),
    "checkpoint without its state": (lambda: os.remove("run/ckpt/step_1/state.json"), "steps=2", "step_1/state.json"),
    "checkpoint whose state is empty": (
        lambda: Path("run/ckpt/step_1/state.json").write_text("{}"),
        "steps=2",
        "step_1/state.json",
    ),
}
RUN = ["run", "model", *SAME[1:]]
# the same for eval.py; RUN and SAME stand for those lists
EVAL = {
    "no such command": (nothing, "socre log", "'socre' | score"),
    "run without a model": (nothing, "run", "model folder"),
    "run of a missing model": (nothing, "run models/nothing SAME tokenizer=bytes out=new", "models/nothing | no such"),
    "run with an unknown key": (nothing, "RUN out=new eval_tmeperature=1", "'eval_tmeperature' | 'eval_temperature'"),
    "run with missing profiles": (nothing, "RUN out=new eval_profiles=nobody.jsonl", "nobody.jsonl | no such profile"),
    "run with a bad profile": (lambda: people(ROW, "{"), "RUN out=new", "people.jsonl:2: | not JSON"),
    "run of a missing shape": (
        nothing, "run nothing.json SAME tokenizer=bytes out=new", "nothing.json | cannot be read"
    ),
    "run over a result": (nothing, "RUN out=result", "result | already | out=DIR"),
    "run into a model folder": (nothing, "RUN out=other", "other | out=DIR"),
    "run into a file": (nothing, "RUN out=people.jsonl", "people.jsonl"),
    "run of a run that has neither model nor checkpoint yet": (
        lambda: (shutil.rmtree("run/model"), shutil.rmtree("run/ckpt")),
        "run run eval_profiles=people.jsonl out=new",
        "run/model",
    ),
    "score of nothing": (nothing, "score", "one log or more"),
    "score of a missing log": (nothing, "score nothing.jsonl", "nothing.jsonl | no such log"),
    "score of a truncated log": (
        lambda: cut("result/dialogues.jsonl"),
        "score result/dialogues.jsonl",
        "result/dialogues.jsonl:1: | not JSON",
    ),
    "score of profiles": (nothing, "score people.jsonl", "people.jsonl:1: | 'history'"),
    "verify of what is not gzipped": (lambda: shutil.copy("people.jsonl", "log.gz"), "verify log.gz", "log.gz"),
    "compare of one log": (nothing, "compare result/dialogues.jsonl", "two logs"),
}


def tree():
    """All files below the working directory with their bytes, and all folders."""
    return {str(path): path.read_bytes() if path.is_file() else None for path in Path(".").rglob("*")}


def refused(main, arguments, words, capfd):
    """Call an entry point as its last lines do, and look at what it says, returns and leaves behind."""
    before = tree()
    capfd.readouterr()
    with pytest.raises(InputError) as error:
        main(arguments)
    assert capfd.readouterr().err == "", "nothing but the message on stderr"
    message = str(error.value)
    assert message.strip() and "\n" not in message, "one line"
    assert not [word for word in words if word not in message], message
    assert tree() == before, "nothing created, changed or removed"


@pytest.mark.parametrize("what", TRAIN)
def test_train_refuses(work, capfd, one_thread, what):
    if what == "no GPU" and torch.cuda.is_available():
        pytest.skip("there is one")
    prepare, options, words = TRAIN[what]
    prepare()
    refused(train.main, [*SAME, *options.split()], words.split(" | "), capfd)


@pytest.mark.parametrize("what", EVAL)
def test_eval_refuses(work, capfd, one_thread, what):
    prepare, arguments, words = EVAL[what]
    prepare()
    arguments = [part for word in arguments.split() for part in {"RUN": RUN, "SAME": SAME[1:]}.get(word, [word])]
    refused(evaluation.main, arguments, words.split(" | "), capfd)


def test_a_missing_local_folder_is_not_looked_for_on_the_hub(work, monkeypatch, one_thread):
    """models/NAME is a path of ours, though it reads like a hub name; asking for it costs a minute of retries."""
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda name: pytest.fail(f"{name} was asked for"))
    with pytest.raises(InputError, match="models/nothing: no such model folder"):
        train.main([*SAME, "run=new", "model=models/nothing"])


@pytest.mark.parametrize(
    "program, arguments, words",
    [
        ("train.py", [*SAME, "lr=0.5"], "run: was begun with lr="),
        ("train.py", [*SAME, "stpes=3"], "unknown option 'stpes'; did you mean 'steps'?"),
        ("eval.py", ["score", "people.jsonl"], "people.jsonl:1: no key 'history'"),
    ],
    ids=["run", "key", "log"],
)
def test_the_exit_code_is_2_and_stderr_is_one_line(work, program, arguments, words):
    before = tree()
    done = subprocess.run([sys.executable, str(ROOT / program), *arguments], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(words) and done.stderr.endswith("\n") and done.stderr.count("\n") == 1
    assert tree() == before
