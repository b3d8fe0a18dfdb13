"""Tiny runs for the tests of the training loop: a config that takes a moment a step, and what its run left behind."""

import dataclasses
import json
import os
import signal
from pathlib import Path

import pytest
import torch
from conftest import ScriptedUser, tiny_raw
from safetensors.torch import load_file

import eval as evaluation
import train
from checkpoint import checkpoints
from config import Config, check
from simulator import EmotionRules

TIMED = ("time/rollout", "time/update", "time/step", "rollout/tokens_per_s", "rollout/wait")


def lowercase(key, turn, reply):
    """A change of -5..15 that grows with the share of lowercase letters in a reply: easy to learn, never constant."""
    return 20 * sum("a" <= char <= "z" for char in reply) / max(8, len(reply)) - 5


def user(change=lowercase, start=50.0):
    return ScriptedUser(change, EmotionRules(start=start))


@pytest.fixture(autouse=True)
def restored():
    """train() installs signal handlers and sets the number of threads for its process; take both back."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(name="tiny")
def tiny_runs(tmp_path, monkeypatch):
    """tiny(run name, **changes): a Config of 4 steps of 2 x 4 dialogues; evaluation meets a ScriptedUser too."""
    (tmp_path / "shape.json").write_text(json.dumps(tiny_raw("qwen2")))
    (tmp_path / "system.txt").write_text("Be kind.")
    row = {"player": "A baker.", "scene": "My oven broke.", "main_cha": "passive", "task": "empathy"}
    rows = [{"id": f"p{i}", "first_talk": f"Hi, p{i} here.", **row} for i in range(6)]
    (tmp_path / "people.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(evaluation, "make_user", lambda config, start, mode: user(start=start))

    def make(run="run", **changes):
        values = dict(
            matmul="mkl",  # not measured anew by each process: runs are compared to the bit
            run=str(tmp_path / run), model=str(tmp_path / "shape.json"), tokenizer="bytes",
            system=str(tmp_path / "system.txt"), profiles=str(tmp_path / "people.jsonl"),
            eval_profiles=str(tmp_path / "people.jsonl"), critic="head", groups=2, group_size=4, max_turns=2,
            eval_max_turns=3, slots=6, reply_tokens=8, context_tokens=256, start_emotion=50.0, steps=4, lr=5e-3,
            warmup=3, critic_lr=1e-2, critic_warmup=0, save_every=2, threads=1,
        )  # fmt: skip
        return check(Config(**{**values, **changes}))

    return make


def go(config, someone=None):
    """train(), with torch's global RNG at 0 for a new run and at 1 for a resumed one: the checkpoint puts it back."""
    torch.manual_seed(1 if checkpoints(Path(config.run)) else 0)
    return train.train(config, someone or user())


def metrics(config):
    return [json.loads(line) for line in (Path(config.run) / "metrics.jsonl").read_text().splitlines()]


def untimed(config):
    return [{key: value for key, value in row.items() if key not in TIMED} for row in metrics(config)]


def weights(config, step):
    """The policy's tensors in a checkpoint of one process."""
    [file] = (Path(config.run) / "ckpt" / f"step_{step}").glob("*.safetensors")
    found = load_file(file)
    return {k.removeprefix("policy."): t for k, t in found.items() if k.startswith("policy.") and ":" not in k}


def assert_same_run(a, b, step, passed_over=()):
    """Two runs agree to the bit: every tensor of the checkpoint, the model, metrics but for times, dialogues."""
    first, second = (Path(config.run) / "ckpt" / f"step_{step}" for config in (a, b))
    assert sorted(os.listdir(first)) == sorted(os.listdir(second))
    for file in first.glob("*.safetensors"):
        one, other = load_file(file), load_file(second / file.name)
        assert one.keys() == other.keys()
        differ = [
            name for name, tensor in one.items() if not torch.equal(tensor, other[name]) and name not in passed_over
        ]
        assert not differ, file.name
    for name in ("model/model.safetensors", "dialogues.jsonl"):
        assert (Path(a.run) / name).read_bytes() == (Path(b.run) / name).read_bytes(), name
    assert json.dumps(untimed(a)) == json.dumps(untimed(b))


def argv(config):
    """The command line of a config."""
    return [f"{f.name}={getattr(config, f.name)}" for f in dataclasses.fields(Config)]
