"""Whole runs on several ranks, by torchrun as a user would: the same dialogues, exact resume, other rank counts."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import transformers
from conftest import ROOT, hidden_states, random_ids
from runs import metrics, untimed
from safetensors.torch import load_file
from test_dist import torchrun

import kernels
from checkpoint import checkpoints, load_model
from config import Config, load_config
from dist import World
from rundir import use_kernels

LEARNT = ["reward/mean", "policy/loss", "policy/entropy", "policy/grad_norm", "value/loss", "value/explained_variance"]
SMALL = ["max_turns=2", "eval_every=0", "save_every=2", "steps=4", "critic=trunk", "keep=9"]


def arguments(run: Path, *options: str) -> list[str]:
    return [str(ROOT / "configs" / "tiny.py"), f"run={run}", *SMALL, *options]


def go(ranks: int, run: Path, *options: str):
    """train.py on so many ranks; returns the config."""
    torchrun(ranks, "train.py", *arguments(run, *options))
    return load_config(arguments(run, *options))


def tensors(run: Path, step: int) -> dict:
    """All tensors of a checkpoint, joined over its files: name -> {offsets: rows}."""
    found = {}
    for file in sorted((run / "ckpt" / f"step_{step}").glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            found[file.name.split("-model")[0], name] = tensor
    return found


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """Four steps on two ranks."""
    return go(2, tmp_path_factory.mktemp("two") / "run")


def test_one_rank_and_two_hold_the_same_dialogues_and_log_the_same_losses(tmp_path):
    """configs/tiny.py as it is, first two steps, within 1e-3; the first step's dialogues are the same to the letter."""
    lines = {}
    for ranks in (1, 2):
        options = ["configs/tiny.py", f"run={tmp_path / str(ranks)}", "steps=2"]
        torchrun(ranks, "train.py", *options)
        config = load_config(options)
        lines[ranks] = metrics(config), (Path(config.run) / "dialogues.jsonl").read_text().splitlines()
    for alone, together in zip(lines[1][0], lines[2][0]):
        for name in LEARNT:
            assert together[name] == pytest.approx(alone[name], rel=1e-3, abs=1e-3), name
        assert together["rollout/tokens"] == alone["rollout/tokens"]
    first = [[line for line in lines[ranks][1] if json.loads(line)["step"] == 1] for ranks in (1, 2)]
    assert len(first[0]) == 8 and first[0] == first[1]


def test_two_ranks_stopped_by_a_signal_resume_to_the_bit(straight, tmp_path):
    """SIGTERM to torchrun, as a scheduler sends it: the step under way is lost at most, nothing else changes."""
    run = tmp_path / "run"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "train.py"]
    process = subprocess.Popen([*command, *arguments(run)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
    log = run / "metrics.jsonl"
    while not log.is_file() or not log.read_text().count("\n"):
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=120)
    assert process.returncode != 0 and "stopped by SIGTERM" in said, said
    done = int(checkpoints(run)[-1].name[5:])
    assert 1 <= done < 4 and len(log.read_text().splitlines()) == done
    resumed = go(2, run)
    assert untimed(resumed) == untimed(straight)
    one, other = tensors(Path(straight.run), 4), tensors(run, 4)
    assert one.keys() == other.keys() and {name for name, _ in one} == {"shard-00001", "shard-00002"}
    assert all(torch.equal(one[name], other[name]) for name in one if name[1] != "rng")
    assert (run / "dialogues.jsonl").read_bytes() == (Path(straight.run) / "dialogues.jsonl").read_bytes()


def test_four_ranks_go_on_as_two_and_the_losses_go_on_with_them(straight, tmp_path):
    """Not to the bit, since sums are in another order, but within 1e-3; hybrid sharding on the way."""
    run = tmp_path / "run"
    go(4, run, "steps=2", "shard=2")
    assert json.loads((run / "ckpt" / "step_2" / "state.json").read_text())["ranks"] == 4
    config = go(2, run)
    for row, other in zip(metrics(config), metrics(straight)):
        for name in LEARNT:
            assert row[name] == pytest.approx(other[name], rel=1e-3, abs=1e-3), (row["step"], name)
    assert [row["step"] for row in metrics(config)] == [1, 2, 3, 4]


def test_the_model_of_a_sharded_run_loads_everywhere_and_is_the_last_checkpoints(straight, tmp_path):
    run, ids, out = Path(straight.run), random_ids(40), tmp_path / "out"
    subprocess.run([sys.executable, "eval.py", "export", str(run / "ckpt" / "step_4"), str(out)], cwd=ROOT, check=True,
                   capture_output=True)  # fmt: skip
    saved, exported = load_model(str(run / "model")), load_model(str(out))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(run / "model", dtype=torch.float32)
    with torch.no_grad():
        ours = hidden_states(saved, ids) @ saved.output_weight.T
        assert torch.equal(hidden_states(exported, ids) @ exported.output_weight.T, ours)
        torch.testing.assert_close(theirs(torch.tensor([ids])).logits[0], ours, atol=1e-4, rtol=0)


def test_a_mistake_is_one_line_whatever_the_number_of_ranks(tmp_path):
    """torchrun adds its own report below it; our line comes once, and nothing is written."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "train.py"]
    done = subprocess.run([*command, *arguments(tmp_path / "run", "shard=3")], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0
    assert done.stderr.count("option 'shard' (3) must divide the number of ranks (2)") == 1
    assert not (tmp_path / "run").exists()


def test_one_process_on_a_cpu_computes_in_bf16_as_a_gpu_does_and_resumes_to_the_bit(tmp_path):
    """By the same code: FSDP2 with one rank, whose weights, gradient sums and Adam stay fp32."""
    for name, *parts in (("straight", "steps=2"), ("halved", "steps=1", "steps=2")):
        for steps in parts:
            options = "precision=bf16", "save_every=1", "critic=head", "matmul=onednn", steps
            command = arguments(tmp_path / name, *options)
            done = subprocess.run([sys.executable, "train.py", *command], cwd=ROOT, capture_output=True, text=True)
            assert done.returncode == 0 and "torch.bfloat16" in done.stdout, done.stderr
    one, other = (tensors(tmp_path / name, 2) for name in ("straight", "halved"))
    assert one.keys() == other.keys() and {t.dtype for t in one.values() if t.is_floating_point()} == {torch.float32}
    assert all(torch.equal(one[name], other[name]) for name in one if name[1] != "rng")
    gaps = [row["rollout/sampler_gap"] for row in metrics(load_config(arguments(tmp_path / "straight")))]
    assert len(gaps) == 2 and all(1e-5 < gap < 0.02 for gap in gaps)  # fp32 would be nearer


def test_a_cpu_without_bf16_instructions_is_told_so(monkeypatch):
    world = World(dtype=torch.bfloat16)
    for fast in (True, False):
        monkeypatch.setattr(kernels, "half_is_fast", lambda fast=fast: fast)
        assert ("many times slower" in use_kernels(Config(), None, world)) != fast
