"""LoRA: one frozen base is policy, critic and reference; what is saved is what others read."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from conftest import random_ids, tiny_raw
from ranks import disturb, one_update, tiny_banned
from runs import assert_same_run, go, metrics, restored, tiny_runs, user  # noqa: F401
from safetensors.torch import load_file
from test_dist import frozen_dialogues

import eval as evaluation
import rundir
import train
from chat import load_tokenizer
from checkpoint import checkpoints, load_model, save_adapter, save_model
from config import Config
from dist import World
from model import Linear, PackedAttention
from update import build, update, values

pytestmark = pytest.mark.usefixtures("one_thread")
BANNED = tiny_banned()
IDS = random_ids(40)


@pytest.fixture(params=["qwen2", "qwen3", "llama"])
def base(request, tmp_path):
    """A tiny base model as a Hugging Face folder."""
    shape = tmp_path / "shape.json"
    shape.write_text(json.dumps(tiny_raw(request.param, tied=request.param != "llama")))
    save_model(load_model(str(shape), seed=3), load_tokenizer("bytes"), tmp_path / "base")
    return str(tmp_path / "base")


def adapted(base, **options):
    """A run's config and its state, whose adapters are no longer zero."""
    settings = dict(model=base, lora_rank=4, lora_alpha=8.0, group_size=2, warmup=0, lr=1e-2, critic_lr=1e-2)
    config = Config(**{**settings, **options})
    state = build(config, World())
    disturb(state)
    return config, state


def logits(model, adapter="policy"):
    with torch.no_grad():
        position = torch.arange(len(IDS))
        attend = PackedAttention([0, len(IDS)], torch.device("cpu"))
        return model(torch.tensor(IDS), position, attend, adapter) @ model.output_weight.T


def test_a_new_adapter_changes_nothing_and_one_that_is_off_leaves_the_base_exactly(base):
    plain = logits(load_model(base))
    fresh = build(Config(model=base, lora_rank=4), World()).policy
    assert torch.equal(logits(fresh), plain) and torch.equal(logits(fresh, None), plain)
    _, state = adapted(base)
    assert torch.equal(logits(state.policy, None), plain)
    for adapter in ("policy", "critic"):
        assert (logits(state.policy, adapter) - plain).abs().max() > 1e-2
    assert not torch.equal(logits(state.policy, "policy"), logits(state.policy, "critic"))


def test_gradients_and_changes_are_in_the_adapters_alone(base):
    """Policy and critic share the base; neither moves it, nor the other's adapter."""
    config, state = adapted(base, critic="trunk")
    assert state.critic is state.policy
    before = {name: p.detach().clone() for name, p in state.policy.named_parameters()}
    _, gradients, _, _ = one_update(config, frozen_dialogues(False, 3, 2), BANNED, World())
    kinds = {name.rpartition(".lora_")[2] or name for name in gradients}
    assert kinds == {"A.policy.weight", "A.critic.weight", "B.policy.weight", "B.critic.weight",
                     "value_head.weight", "value_head.bias"}  # fmt: skip
    assert all(gradient.any() for gradient in gradients.values())
    update(state, config, frozen_dialogues(False, 3, 2), BANNED)
    for name, parameter in state.policy.named_parameters():
        assert torch.equal(parameter, before[name]) == (".lora_" not in name), name
        assert parameter.requires_grad == (".lora_" in name) and parameter.grad is None
    owned = [{id(p) for group in o.param_groups for p in group["params"]} for o in state.optimisers]
    assert not owned[0] & owned[1] and len(owned) == 2


def test_recomputed_activations_use_the_adapter_of_their_forward(base):
    """The critic's forward comes before the policy's backward ends only if nobody minds: adapters are arguments."""
    dialogues = frozen_dialogues(False, 3, 2)
    found = []
    for checkpointing in (False, True):
        config, _ = adapted(base, critic="trunk", checkpointing=checkpointing)
        found.append(one_update(config, dialogues, BANNED, World())[1])
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, atol=1e-7, rtol=1e-4)


def test_the_reference_is_the_base_and_costs_no_second_model(base):
    config, state = adapted(base, algorithm="grpo", kl_coef=0.1)
    assert state.reference is state.policy
    _, fresh = Config(model=base), build(Config(model=base, algorithm="grpo", lora_rank=4, kl_coef=0.1), World())
    assert update(fresh, config, frozen_dialogues(False, 3, 2), BANNED)["policy/kl_reference"] == 0
    assert update(state, config, frozen_dialogues(False, 3, 2), BANNED)["policy/kl_reference"] > 1e-3


def test_only_the_targets_get_adapters(base):
    _, state = adapted(base, algorithm="grpo", lora_targets="q_proj,down_proj")
    layers = [(path, layer) for path, layer in state.policy.named_modules() if isinstance(layer, Linear)]
    assert {path.rpartition(".")[2] for path, layer in layers if layer.lora_A} == {"q_proj", "down_proj"}


def test_the_merged_export_equals_the_unmerged_model_here_and_in_transformers(base, tmp_path):
    _, state = adapted(base, critic="trunk")
    save_model(state.policy, load_tokenizer("bytes"), tmp_path / "merged")
    torch.testing.assert_close(logits(load_model(str(tmp_path / "merged"))), logits(state.policy), atol=1e-5, rtol=0)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(theirs(torch.tensor([IDS])).logits[0], logits(state.policy), atol=1e-4, rtol=0)


def test_peft_loads_the_adapter_with_equal_logits(base, tmp_path):
    peft = pytest.importorskip("peft")
    config, state = adapted(base, critic="trunk", lora_targets="q_proj,v_proj,o_proj,up_proj")
    save_adapter(state.policy, config, tmp_path / "adapter")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(theirs, str(tmp_path / "adapter")).eval()
    with torch.no_grad():
        found = theirs(torch.tensor([IDS])).logits[0]
    torch.testing.assert_close(found, logits(state.policy), atol=1e-4, rtol=0)
    assert (found - logits(state.policy, None)).abs().max() > 1e-2


def test_the_critics_value_comes_from_its_own_adapter(base):
    from rollout import pack, trajectories

    _, state = adapted(base, critic="trunk")
    batch = pack([item for dialogue in frozen_dialogues(False, 1, 2) for item in trajectories(dialogue, False)])
    before = values(state, batch)
    with torch.no_grad():
        for name, parameter in state.policy.named_parameters():
            if ".policy." in name:
                parameter.zero_()
    assert torch.equal(values(state, batch), before)


def test_a_run_with_adapters_resumes_to_the_bit_and_keeps_only_what_is_trained(tiny):
    options = dict(lora_rank=4, critic="trunk", eval_every=2)
    straight, halved = tiny("straight", **options), tiny("halved", **options)
    go(straight)
    go(tiny("halved", **options, steps=2))
    go(halved)
    assert_same_run(straight, halved, 4)
    [file] = (checkpoints(Path(straight.run))[-1]).glob("*.safetensors")
    kept = load_file(file)
    assert all(".lora_" in name or name.startswith("value_head") or name == "rng" for name in kept)
    assert any(".critic." in name for name in kept) and any(name.endswith(":exp_avg_sq") for name in kept)
    assert (Path(straight.run) / "adapter" / "adapter_config.json").is_file()


def test_any_checkpoint_of_a_run_with_adapters_is_exported_merged_and_as_an_adapter(tiny, tmp_path, capsys):
    config = tiny(lora_rank=4)
    model = go(config)
    step_4, out = checkpoints(Path(config.run))[-1], tmp_path / "out"
    assert evaluation.main(["export", str(step_4), str(out)]) == 0
    one, other = load_file(model / "model.safetensors"), load_file(out / "model.safetensors")
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    one, other = (load_file(f / "adapter_model.safetensors") for f in (Path(config.run) / "adapter", out / "adapter"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_the_benchmark_of_a_finished_run_keeps_base_and_adapter_apart(tiny, tmp_path, monkeypatch):
    """Merged into bf16 on a GPU most of an adapter would be rounded away."""
    config, asked = tiny(lora_rank=4, eval_max_turns=1), []
    go(config)
    real = rundir.restore_policy
    monkeypatch.setattr(rundir, "restore_policy", lambda *args: asked.append(args[1].name) or real(*args))
    assert evaluation.main(["run", config.run, f"out={tmp_path / 'out'}"]) == 0
    assert asked == ["step_4"]
    settings = json.loads((tmp_path / "out" / "result.json").read_text())["settings"]
    assert settings["model"].split(" (")[0].endswith("step_4")


def test_ppo_with_adapters_raises_a_scripted_users_emotion(tiny):
    """Policy and critic on one frozen random base (value head on the policy: also learns, at 69 of 70)."""
    config = tiny(critic="trunk", groups=3, slots=16, reply_tokens=12, steps=30, warmup=0, save_every=0, lora_rank=8,
                  lr=1e-2, critic_lr=1e-3)  # fmt: skip
    go(config)
    emotion = [row["emotion/final"] for row in metrics(config)]
    assert sum(emotion[:3]) / 3 < 48
    assert sum(emotion[-3:]) / 3 > 62
    assert train.train(config, user()) == Path(config.run) / "model"
