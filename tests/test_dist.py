"""Several ranks do what one process does: the same gradients, the same steps, the same dialogues, the same files."""

import dataclasses
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from conftest import (
    ROOT,
    ScriptedUser,
    hidden_states,
    make_engine,
    make_jobs,
    make_talk,
    random_ids,
    run_dialogues,
    tiny_model,
    tiny_raw,
)
from ranks import disturb, one_update, tiny_banned
from safetensors.torch import load_file

from chat import load_tokenizer, make_chat
from checkpoint import load_model, save_model
from config import Config
from dist import World
from rollout import Trajectory, balance
from simulator import EmotionRules
from update import build

pytestmark = pytest.mark.usefixtures("one_thread")
BANNED = tiny_banned()


def torchrun(ranks: int, *arguments: str) -> None:
    """Run a script on `ranks` gloo ranks. Fails with what it said."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, *arguments], cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def frozen_dialogues(think: bool, groups: int, members: int) -> list:
    """Dialogues of a random model, of one turn or three, with rewards that differ."""
    chat = make_chat(load_tokenizer("bytes"), think)
    engine = make_engine(chat, tiny_model("qwen2"), slots=4)

    def change(key, turn, reply):
        return -25 if sum(key) == 2 else 4 * key[1] + 3 * key[0] * (-1) ** key[1] + turn

    user = ScriptedUser(change, EmotionRules(clamp=30))
    return run_dialogues(make_jobs(groups, members), engine, chat, user, make_talk(reply_tokens=6), (0,))


KINDS = {"ppo_head": {"critic": "head"}, "ppo_trunk": {"critic": "trunk"}, "grpo": {"algorithm": "grpo"}}


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    """[(name, config, dialogues)]: both algorithms, both critics, think or not, LoRA or not, several optimiser steps,
    hybrid sharding, and dialogues so few that a rank has nothing to learn from."""
    folder = tmp_path_factory.mktemp("model")
    (folder / "tiny.json").write_text(json.dumps(tiny_raw("qwen2", tied=False)))
    base = folder / "base"  # a Hugging Face folder, of which each rank reads its rows
    save_model(load_model(str(folder / "tiny.json")), load_tokenizer("bytes"), base)
    dialogues = {think: frozen_dialogues(think, 3, 2) for think in (False, True)}
    few = {"ppo_head": 1, "ppo_trunk": 1, "grpo": 2}  # a rank of two, or two of four, have none
    steady = dict(model=str(base), tokenizer="bytes", group_size=2, warmup=0, critic_warmup=0, lr=1e-2,
                  critic_lr=1e-2, micro_tokens=300, entropy_coef=0.01, grad_clip=1e9)  # fmt: skip
    found = []
    for kind, options in KINDS.items():
        for think in (False, True):
            for rank in (0, 4):
                config = Config(**{**steady, **options}, think=think, lora_rank=rank)
                found.append((f"{kind}_think{think:d}_lora{rank}", config, dialogues[think]))
        found.append((f"{kind}_few", Config(**{**steady, **options}), dialogues[False][: few[kind]]))
    found.append(("clipped", Config(**{**steady, "grad_clip": 0.01}, critic="head"), dialogues[False]))
    found.append(("kl", Config(**steady, algorithm="grpo", kl_coef=0.3), dialogues[False]))
    found.append(("kl_lora", Config(**steady, algorithm="grpo", kl_coef=0.3, lora_rank=4), dialogues[False]))
    found.append(("recomputed", Config(**steady, critic="trunk", checkpointing=True), dialogues[False]))
    return found


@pytest.fixture(scope="module")
def alone(cases):
    """What one process does in each case."""
    return {name: one_update(config, dialogues, BANNED, World())[1:] for name, config, dialogues in cases}


def write_cases(folder: Path, cases) -> None:
    (folder / "cases.pkl").write_bytes(pickle.dumps((cases, BANNED)))


def relative(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.mark.parametrize("ranks, shard", [(2, 0), (4, 0), (4, 2)], ids=["2", "4", "2x2"])
def test_gradients_and_steps_of_several_ranks_are_those_of_one(cases, alone, tmp_path, ranks, shard):
    """Per tensor: gradient within 1e-5, the optimiser's update within 1e-3, in relative norm; every metric as well."""
    if ranks == 4:  # every third will do, and those with an idle rank
        cases = [case for index, case in enumerate(cases) if index % 3 == 1 or "few" in case[0]]
    write_cases(tmp_path, [(name, dataclasses.replace(config, shard=shard), d) for name, config, d in cases])
    torchrun(ranks, "tests/ranks.py", "updates", str(tmp_path))
    for name, _, _ in cases:
        gradients, changes, metrics = alone[name]
        found = load_file(tmp_path / f"{name}.safetensors")
        assert len(gradients) > 2 and set(found) == {f"grad:{n}" for n in gradients} | {f"change:{n}" for n in changes}
        for tensor, gradient in gradients.items():
            assert gradient.any(), (name, tensor)
            assert relative(found[f"grad:{tensor}"], gradient) < 1e-5, (name, tensor)
            assert relative(found[f"change:{tensor}"], changes[tensor]) < 1e-3, (name, tensor)
        assert json.loads((tmp_path / f"{name}.json").read_text()) == pytest.approx(metrics, rel=1e-4, abs=1e-6), name


def test_in_bf16_gradients_are_near_those_of_fp32_and_masters_stay_fp32(cases, alone, tmp_path):
    """All weights, and fp32 adapters on a frozen bf16 base; the whole gradient as one vector."""
    chosen = [case for case in cases if case[0] in ("ppo_trunk_think0_lora0", "ppo_head_think1_lora4", "kl_lora")]
    assert len(chosen) == 3
    half = [(name, dataclasses.replace(config, precision="bf16"), dialogues) for name, config, dialogues in chosen]
    write_cases(tmp_path, half)
    torchrun(2, "tests/ranks.py", "updates", str(tmp_path))
    for name, _, _ in half:
        found, (gradients, _, metrics) = load_file(tmp_path / f"{name}.safetensors"), alone[name]
        assert all(tensor.dtype == torch.float32 for tensor in found.values())
        joined = [torch.cat([grads[n].flatten() for n in sorted(gradients)])
                  for grads in ({n: found[f"grad:{n}"] for n in gradients}, gradients)]  # fmt: skip
        assert 1e-6 < relative(*joined) < 0.1, name
        logged = json.loads((tmp_path / f"{name}.json").read_text())
        assert logged["policy/entropy"] == pytest.approx(metrics["policy/entropy"], rel=1e-2)


def test_ranks_may_decode_different_numbers_of_steps_and_then_train(cases, tmp_path):
    """No collective happens within a rollout, or the rank that samples longer would hang. With adapters."""
    write_cases(tmp_path, [case for case in cases if case[0] == "ppo_trunk_think0_lora4"])
    torchrun(2, "tests/ranks.py", "generation", str(tmp_path))
    short, long = (json.loads((tmp_path / f"sampled_{rank}.json").read_text()) for rank in (0, 1))
    assert [len(row) for row in short] == [4] * 4 and [len(row) for row in long] == [11] * 4
    assert short[:2] != short[2:], "the second rollout met other weights"


def test_a_sharded_model_is_saved_as_transformers_reads_it(cases, tmp_path):
    chosen = [case for case in cases if case[0] in ("grpo_think0_lora0", "grpo_think0_lora4")]
    write_cases(tmp_path, chosen)
    torchrun(2, "tests/ranks.py", "save", str(tmp_path))
    ids = random_ids(40)
    for name, config, _ in chosen:
        state = build(config, World())
        disturb(state)
        with torch.no_grad():
            ours = hidden_states(state.policy, ids) @ state.policy.output_weight.T
            again = load_model(str(tmp_path / name))
            torch.testing.assert_close(hidden_states(again, ids) @ again.output_weight.T, ours, atol=1e-5, rtol=0)
            theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32)
            torch.testing.assert_close(theirs(torch.tensor([ids])).logits[0], ours, atol=1e-4, rtol=0)


def test_trajectories_are_spread_evenly_by_tokens_and_none_is_lost():
    sizes = [50, 3, 20, 20, 7, 60, 1, 30]
    items = [Trajectory((i, 0), [0] * n, [1] * n, [0.0] * n, [0.0] * n) for i, n in enumerate(sizes)]
    for ranks in (1, 2, 3, 12):
        shares = balance(items, ranks)
        assert sorted(item.key for share in shares for item in share) == [item.key for item in items]
        assert all(share == sorted(share, key=lambda item: item.key) for share in shares)
        loads = [sum(len(item.tokens) for item in share) for share in shares]
        assert max(loads) - min(loads) <= max(sizes)
    assert [sum(len(item.tokens) for item in share) for share in balance(items, 2)] == [100, 91]
    assert balance(items, 1) == [items]
    assert balance([], 2) == [[], []]
