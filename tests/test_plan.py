"""The memory plan: parameters are counted as models have them, activations as autograd keeps them, sums are sums."""

import dataclasses
import json
import re
import weakref

import pytest
import torch
from conftest import ROOT, tiny_raw
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from config import Config, InputError, load_config
from model import ModelConfig, PackedAttention, Transformer, add_adapters, predictors, token_logprobs
from scripts import plan as planner
from scripts.plan import ALWAYS, BACKWARD, EVALUATION, LOSS, ROLLOUT, memory, parameters, peak, plan

pytestmark = pytest.mark.usefixtures("one_thread")
PUBLISHED = {  # parameters, as the hub counts the tensors
    "qwen2.5-0.5b-instruct": 494_032_768,
    "qwen2.5-1.5b-instruct": 1_543_714_304,
    "qwen2.5-3b-instruct": 3_085_938_688,
    "qwen2.5-7b-instruct": 7_615_616_512,
    "qwen2.5-14b-instruct": 14_770_033_664,
    "qwen3-8b": 8_190_735_360,
    "smollm2-135m-instruct": 134_515_008,
}
KINDS = [("qwen2", True, False), ("qwen3", False, False), ("llama", True, True)]  # family, tied, attention bias


def qwen(size: str, **options) -> Config:
    """One model on one GPU or eight, as the paper's run but without evaluation."""
    ppo = load_config([str(ROOT / "configs/ppo.py"), "user=offline"])
    return dataclasses.replace(ppo, **{"model": f"Qwen/Qwen2.5-{size}-Instruct", "eval_every": 0, **options})


def raw_model(family: str, tied: bool, bias: bool, layers: int = 2) -> dict:
    return {**tiny_raw(family, tied), "num_hidden_layers": layers, "attention_bias": bias}


def peak_gb(config: Config, gpus: int, less: tuple[str, ...] = ()) -> float:
    """GB per GPU at the peak, without some of the parts that are always there."""
    found = memory(config, planner.model_shape(config.model), gpus)
    return (peak(found) - sum(found[ALWAYS][part] for part in less)) / 1e9


# ---- parameters and shapes


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_shape_file_has_the_published_number_of_parameters(name):
    raw = json.loads((planner.SHAPES / f"{name}.json").read_text())
    with torch.device("meta"):
        model = Transformer(raw)
    counted = sum(parameter.numel() for parameter in model.parameters())
    assert parameters(model.config) == counted == PUBLISHED[name]


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_and_root_are_counted_apart(kind):
    model = Transformer(raw_model(*kind))
    block = sum(parameter.numel() for parameter in model.model.layers[0].parameters())
    whole = sum(parameter.numel() for parameter in model.parameters())
    assert planner.block_parameters(model.config) == block
    assert planner.root_parameters(model.config) == whole - 2 * block
    model.lm_head = None
    assert parameters(model.config, output=False) == sum(parameter.numel() for parameter in model.parameters())


def test_a_hub_name_finds_its_shape_without_the_hub(tmp_path):
    assert planner.model_shape("Qwen/Qwen2.5-7B-Instruct").hidden_size == 3584
    assert planner.model_shape("configs/shapes/tiny.json").hidden_size == 128
    (tmp_path / "config.json").write_text(json.dumps(tiny_raw("qwen3")))
    assert planner.model_shape(str(tmp_path)).hidden_size == 64
    with pytest.raises(InputError, match="no such model folder"):
        planner.model_shape("models/nothing-of-that-name")


# ---- activations


def kept_by_autograd(raw: dict, dtype: torch.dtype, lora: Config | None) -> int:
    """Bytes of the distinct storages that a forward pass over 160 packed tokens leaves for the backward pass."""
    model = Transformer(raw)
    if lora:
        add_adapters(model, ["policy", "critic"], lora.lora_rank, 8.0, lora.lora_targets.split(","))
    model.to(dtype)
    weights, kept = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()  # held: an address is not used twice
        return tensor

    tokens, position = torch.arange(160), torch.cat([torch.arange(100), torch.arange(60)])
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden = model(tokens, position, PackedAttention([0, 100, 160], tokens.device))
    assert hidden.requires_grad
    return sum(storage.nbytes() for address, storage in kept.items() if address not in weights)


@pytest.mark.parametrize("targets", ["", Config.lora_targets, "q_proj,v_proj", "o_proj,down_proj"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_a_block_keeps_the_activations_that_autograd_saves(kind, dtype, targets):
    lora = Config(lora_rank=4, lora_targets=targets) if targets else None
    two, three = (kept_by_autograd(raw_model(*kind, layers), dtype, lora) for layers in (2, 3))
    c = ModelConfig.from_hf(raw_model(*kind), "here")
    assert 160 * planner.block_activations(c, dtype.itemsize, False, lora) == three - two


class Live(TorchDispatchMode):
    """Counts the bytes of all tensors that are alive, and the most there were."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.now = self.most = 0
        self.known = {p.untyped_storage()._cdata for p in model.parameters()}
        self.known |= {p.grad.untyped_storage()._cdata for p in model.parameters()}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else None
            if storage is not None and storage._cdata not in self.known:
                self.known.add(storage._cdata)
                self.now += storage.nbytes()
                weakref.finalize(storage, self.gone, storage._cdata, storage.nbytes())
        self.most = max(self.most, self.now)
        return out

    def gone(self, address: int, size: int) -> None:
        self.known.remove(address)
        self.now -= size


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "vocab,inner,checkpointing,highest",
    [(9000, 256, False, LOSS), (9000, 256, True, LOSS), (20, 1024, False, BACKWARD), (20, 1024, True, BACKWARD)],
)
def test_forward_and_backward_hold_as_much_as_planned(vocab, inner, checkpointing, highest, dtype):
    raw = raw_model("qwen2", True, False) | {"vocab_size": vocab, "intermediate_size": inner}
    config = Config(algorithm="grpo", micro_tokens=1600, context_tokens=1100, checkpointing=checkpointing)
    model, tokens = Transformer(raw).to(dtype), torch.arange(1600) % 20
    model.checkpointing = checkpointing
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    position, mask = tokens.new_tensor(range(1600)) % 400, torch.arange(1600) % 400 > 3
    banned = torch.zeros(vocab, dtype=torch.bool)
    with Live(model) as live:
        where = predictors(mask)
        hidden = model(tokens, position, PackedAttention([0, 400, 800, 1200, 1600], tokens.device))[where]
        logp, entropy = token_logprobs(hidden, model.output_weight, tokens[where + 1], banned, 1.0)
        del hidden
        (logp.sum() + entropy.sum()).backward()
    planned = planner.update_parts(config, model.config, dtype.itemsize, flash=False)
    assert max(planned, key=lambda phase: sum(planned[phase].values())) == highest
    assert live.most == pytest.approx(sum(planned[highest].values()), rel=0.05)


# ---- sums


def test_sixteen_bytes_a_parameter_are_shared_by_the_ranks():
    def share(gpus, **options):
        config = qwen("7B", algorithm="grpo", **options)
        return sum(n for part, n in memory(config, c, gpus)[ALWAYS].items() if part.startswith("policy: "))

    c = planner.model_shape("Qwen/Qwen2.5-7B-Instruct")
    assert share(1) == 16 * parameters(c)
    assert share(8) == pytest.approx(2 * parameters(c), rel=1e-6)
    assert share(8, shard=4) == pytest.approx(4 * parameters(c), rel=1e-6)


def test_the_parts_add_up_to_the_phases_and_the_peak():
    for config in (qwen("7B", eval_every=1), qwen("1.5B", lora_rank=8, generation="replica", kl_coef=0.1)):
        text = plan(config, "8x80")
        sums, parts = {}, {}
        for line in text.splitlines():
            if found := re.match(r"(\w.*?)(?:, on top)?\s+(\d+\.\d\d) GB", line):
                title = found[1]
                sums[title], parts[title] = float(found[2]), []
            elif found := re.match(r"  (.+?)\s+(\d+\.\d\d)$", line):
                parts[title].append(float(found[2]))
        [(top, highest)] = [(title, n) for title, n in sums.items() if title.startswith("peak")]
        del sums[top]
        assert set(sums) == set(memory(config, planner.model_shape(config.model), 8, 1 if config.eval_every else 0))
        for title, whole in sums.items():
            assert sum(parts[title]) == pytest.approx(whole, abs=0.006 * (1 + len(parts[title])))
        assert highest == pytest.approx(sums.pop("always") + max(sums.values()), abs=0.02)


def test_every_option_that_costs_memory_costs_what_it_says():
    c = planner.model_shape("Qwen/Qwen2.5-7B-Instruct")
    plain = memory(qwen("7B"), c, 8)
    two_bytes = 2 * parameters(c)
    assert plain[ROLLOUT]["policy, gathered"] == two_bytes
    replica = memory(qwen("7B", generation="replica"), c, 8)
    assert replica[ALWAYS]["replica of the policy"] == two_bytes and "policy, gathered" not in replica[ROLLOUT]
    reference = memory(qwen("7B", kl_coef=0.1), c, 8)
    assert reference[ALWAYS]["reference: weights"] == pytest.approx(parameters(c) / 2, rel=1e-6)
    head = memory(qwen("7B", critic="head"), c, 8)
    assert head[ALWAYS]["critic: Adam"] == 8 * 3585
    # 32 dialogues on 8 GPUs: four slots each, at 56 KiB a token
    assert plain[ALWAYS]["KV cache"] == 4 * 15000 * 56 * 1024
    assert EVALUATION not in plain
    assert memory(qwen("7B"), c, 8, dialogues=20)[EVALUATION]["its KV cache"] == 3 * 15000 * 56 * 1024
    groups = memory(qwen("7B", algorithm="grpo", groups=8, group_size=4), c, 8, dialogues=20)
    assert groups[ALWAYS]["KV cache"] == plain[ALWAYS]["KV cache"]
    assert groups[EVALUATION]["its KV cache"] == 3 * 15000 * 56 * 1024
    block, root = planner.block_parameters(c), 2 * 152064 * 3584 + 3584
    assert plain[LOSS]["two blocks, gathered"] == 4 * block and plain[LOSS]["root of the model, gathered"] == 2 * root
    assert plain[LOSS]["gradients not yet sharded"] == 2 * root + (2 + 4) * block
    lora = memory(qwen("7B", lora_rank=8, kl_coef=0.1), c, 1)[ALWAYS]
    assert lora["base weights, frozen"] == two_bytes and "reference: weights" not in lora
    widths = 2 * (3584 + 3584) + 2 * (3584 + 512) + 3 * (3584 + 18944)
    assert planner.lora_parameters(qwen("7B", lora_rank=8), c) == 28 * 8 * widths
    assert lora["policy's adapters: Adam"] == 8 * 28 * 8 * widths
    rank = qwen("7B", lora_rank=8)
    assert memory(rank, c, 1)[ROLLOUT]["policy, gathered"] == two_bytes + 2 * 28 * 8 * widths
    replica = memory(dataclasses.replace(rank, generation="replica"), c, 1)
    assert replica[ALWAYS]["replica of the policy"] == two_bytes + 2 * 28 * 8 * widths
    assert "policy, gathered" not in replica[ROLLOUT]


def test_a_process_on_the_cpu_gathers_nothing_and_computes_in_fp32():
    c = planner.model_shape("configs/shapes/tiny.json")
    config = Config(model="configs/shapes/tiny.json", device="cpu", algorithm="grpo", slots=2, context_tokens=1024 + 1)
    found = memory(config, c, 1)
    assert not any("gathered" in part or "CUDA" in part for parts in found.values() for part in parts)
    assert found[ALWAYS]["KV cache"] == 2 * 4 * 2 * 2 * 1025 * 32 * 4
    assert found[LOSS]["output layer's gradient"] == 4 * 264 * 128
    assert "two blocks, gathered" in memory(config, c, 2)[LOSS]
    for change in ({"device": "auto"}, {"precision": "bf16"}):
        half = memory(dataclasses.replace(config, **change), c, 1)
        assert half[ALWAYS]["KV cache"] == found[ALWAYS]["KV cache"] / 2 and "two blocks, gathered" in half[LOSS]


# ---- what is known of real machines


def test_known_orders_of_magnitude():
    own = ("KV cache", "CUDA context and allowance")
    assert peak_gb(qwen("7B"), 8, own) == pytest.approx(42, rel=0.1)
    assert peak_gb(qwen("7B", generation="replica"), 8, own) == pytest.approx(57, rel=0.1)
    assert peak_gb(qwen("1.5B", context_tokens=8192, micro_tokens=8192), 1, own) == pytest.approx(56, rel=0.1)
    three = qwen("3B", algorithm="grpo", context_tokens=8192, micro_tokens=8192)
    assert peak_gb(three, 1, own[1:]) == pytest.approx(62, rel=0.1)
    assert peak_gb(qwen("7B", critic="head"), 1) > 120
    assert peak_gb(qwen("7B", lora_rank=32), 1) < 80


@pytest.mark.parametrize(
    "name,machine",
    [("ppo", "8x80"), ("ppo_think", "8x80"), ("grpo", "8x80"), ("grpo_think", "8x80"), ("ppo_1b", "1x80"),
     ("ppo_lora_1gpu", "1x80")],
)  # fmt: skip
def test_our_configs_fit_the_machines_they_name(name, machine):
    text = plan(load_config([str(ROOT / f"configs/{name}.py"), "user=offline"]), machine)
    assert text.splitlines()[-2].endswith(": fits"), text


def test_the_largest_micro_batch_fits_and_twice_as_much_does_not():
    config, c, room = qwen("7B"), planner.model_shape("Qwen/Qwen2.5-7B-Instruct"), 80 * 10**9
    best = planner.largest_micro_tokens(config, c, 8, room)
    assert best > config.context_tokens
    at = [peak(memory(dataclasses.replace(config, micro_tokens=tokens), c, 8)) for tokens in (best, 2 * best)]
    assert at[0] <= room < at[1]
    assert f"largest micro_tokens that fits: {best}" in plan(config, "8x80")
    text = plan(config, "1x80")
    assert "DOES NOT FIT" in text and "no micro_tokens fits" in text


def test_a_trajectory_longer_than_a_micro_batch_sets_its_memory():
    c = planner.model_shape("Qwen/Qwen2.5-7B-Instruct")
    small, same, large = (peak(memory(qwen("7B", micro_tokens=n), c, 8)) for n in (1024, 15000, 60000))
    assert small == same < large


def test_machines_are_read():
    assert planner.read_machine("8x80") == (8, 80)
    assert planner.read_machine("4x8x141") == (32, 141)


@pytest.mark.parametrize("text", ["8", "0x80", "8x0", "axb", "", "8x", "-8x80", "1x2x3x4", "8x80GB"])
def test_a_machine_that_is_none_is_named(text):
    with pytest.raises(InputError, match=r"\A[^\n]*a machine is GPUs x GB[^\n]*8x80[^\n]*\Z"):
        plan(Config(), text)


def test_shards_divide_the_machine():
    for shard in (3, 16):
        with pytest.raises(InputError, match=r"\Aoption 'shard'[^\n]*\Z"):
            plan(qwen("7B", shard=shard), "8x80")


def test_log_probs_over_a_large_vocabulary_need_less_than_a_gigabyte_of_their_own():
    """4,096 trained tokens, 152k ids: beside weights, activations and their gradients there are a chunk's logits."""
    vocab, tokens, width = 151_936, 4096, 16
    model = torch.nn.Linear(width, vocab, bias=False)
    model.weight.grad = torch.zeros_like(model.weight)
    hidden = torch.randn(tokens, width, requires_grad=True)
    target, banned = torch.arange(tokens), torch.zeros(vocab, dtype=torch.bool)
    with Live(model) as live:
        logp, entropy = token_logprobs(hidden, model.weight, target, banned, 0.7)
        (logp.sum() + 0.01 * entropy.sum()).backward()
    assert live.most < 0.3e9 < 4 * tokens * vocab
