"""Matrix products: both libraries give the same numbers and gradients, and one of them is chosen by measurement."""

import itertools
import json

import pytest
import torch
import torch.nn.functional as F
from conftest import hidden_states, random_ids, tiny_model

import kernels
from checkpoint import load_model
from config import Config, InputError
from dist import World
from engine import Engine, Sampling
from model import add_adapters
from rundir import use_kernels

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not kernels.available(), reason="this torch has no oneDNN operators"),
]
CLOSE = dict(rtol=1e-5, atol=1e-5)
BANNED = torch.zeros(264, dtype=torch.bool)
real_probe = kernels.probe


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("rows", [1, 2, 33, 500])
@pytest.mark.parametrize("bias", [True, False])
def test_onednn_gives_the_products_and_gradients_of_f_linear(rows, bias):
    kernels.use("onednn")
    x, weight, b = random(rows, 48), random(80, 48, seed=1), random(80, seed=2) if bias else None
    slope, results = random(rows, 80, seed=3), []
    for linear in (kernels.linear, F.linear):
        leaves = [t.clone().requires_grad_() for t in (x, weight, b) if t is not None]
        out = linear(*leaves)
        results.append([out, *torch.autograd.grad(out, leaves, slope)])
    for ours, theirs in zip(*results):
        assert (ours - theirs).norm() < 1e-6 * theirs.norm()


def test_only_the_gradients_that_are_wanted_are_computed(monkeypatch):
    """Weights under LoRA are frozen: a product less in the backward pass."""
    calls, real = [], kernels.product
    monkeypatch.setattr(kernels, "product", lambda *args: calls.append(args[1].shape) or real(*args))
    kernels.use("onednn")
    x = random(5, 8).requires_grad_()
    kernels.linear(x, random(6, 8)).sum().backward()
    assert [tuple(shape) for shape in calls] == [(6, 8), (8, 6)]


@pytest.mark.parametrize("rows", [1, 32, 100])
def test_packed_layers_give_what_each_gives_alone(rows):
    x, weights = random(rows, 48), [random(n, 48, seed=n) for n in (80, 16, 16)]
    for biases in ([None] * 3, [random(n, seed=1) for n in (80, 16, 16)]):
        outs = kernels.Packed(weights, biases)(x)
        for out, weight, bias in zip(outs, weights, biases):
            torch.testing.assert_close(out, F.linear(x, weight, bias), **CLOSE)


def rows_of(model, adapter=False):
    engine = Engine(model, Sampling(BANNED, (256,)), 4, 128)
    for slot in range(4):
        engine.submit(slot, random_ids(10 + slot, seed=slot), (slot,), 20)
    rows = []
    while engine.busy:
        rows += engine.step()
        assert (model.packed_output is not None) == (kernels.chosen["generation"] == "onednn")
    engine.forget()
    assert model.packed_output is None and all(block.mlp.down_proj.packed is None for block in model.model.layers)
    return sorted((row.slot, row.sampled, row.logps) for row in rows)


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
def test_the_engine_says_the_same_with_packed_weights(family, lora):
    """An adapter lies beside a packed base, and adds as much."""
    model = tiny_model(family)
    if lora:
        add_adapters(model, ["policy"], 4, 32.0, ["q_proj", "v_proj", "up_proj", "down_proj", "o_proj"])
        for name, p in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(p, std=0.05, generator=torch.Generator().manual_seed(len(name)))
    plain = rows_of(model)
    kernels.use("onednn")
    for (slot, ids, logps), (other, expected, theirs) in zip(rows_of(model), plain):
        assert (slot, ids) == (other, expected)
        torch.testing.assert_close(torch.tensor(logps), torch.tensor(theirs), rtol=0, atol=1e-4)


def test_weights_that_change_are_packed_anew():
    kernels.use("onednn")
    model = tiny_model(seed=1)
    before = rows_of(model)
    model.load_state_dict(tiny_model(seed=2).state_dict())
    assert rows_of(model) == rows_of(tiny_model(seed=2)) != before


def test_packed_weights_are_never_used_for_a_gradient():
    kernels.use("onednn")
    model, ids = tiny_model(), random_ids(20)
    model.pack()
    hidden_states(model, ids).sum().backward()
    assert model.model.layers[0].mlp.down_proj.weight.grad.abs().sum() > 0


def test_smollm2_is_as_near_to_the_exact_logits_as_transformers(smollm2):
    import transformers

    theirs = transformers.AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    kernels.use("onednn")
    model, ids = load_model(str(smollm2)), random_ids(60, seed=1, vocab=40000)
    with torch.no_grad():
        found = theirs(torch.tensor([ids])).logits[0]
        ours = hidden_states(model, ids)
        model.pack()
        packed = hidden_states(model, ids)
        exact = theirs.double()(torch.tensor([ids])).logits[0]
        for hidden in (ours, packed):
            error = (hidden @ model.output_weight.T - exact).norm() / exact.norm()
            assert error < 1e-5 and error < 3 * (found - exact).norm() / exact.norm()


# ---- the choice


def test_the_probe_chooses_the_faster_library_for_each_use(monkeypatch):
    times = iter([1.0, 2.0, 3.0, 1.0, 2.0, 1.0])  # mkl, onednn at 1 row; at 32; training
    monkeypatch.setattr(kernels, "seconds", lambda *args: next(times))
    found, words = real_probe()
    assert found == {"generation": "onednn", "training": "onednn"} and "generation 1.8x, training 2.0x" in words
    times = iter([1.0, 4.0, 1.5, 1.0, 1.0, 2.0])
    assert real_probe()[0] == {"generation": "mkl", "training": "mkl"}


def test_products_that_are_not_of_fp32_are_not_chosen(monkeypatch):
    """On CPUs with AMX a library may compute fp32 products in bf16."""
    real = kernels.product
    monkeypatch.setattr(kernels, "product", lambda x, *rest: real(x.bfloat16().float(), *rest))
    times = itertools.cycle([2.0, 1.0])  # mkl, onednn
    monkeypatch.setattr(kernels, "seconds", lambda work, x: next(times))
    found, words = real_probe()
    assert set(found.values()) == {"mkl"} and "error" in words


def test_the_real_probe_names_libraries_and_figures():
    found, words = real_probe()
    assert found.keys() == kernels.chosen.keys() and set(found.values()) <= set(kernels.LIBRARIES)
    assert words.startswith("onednn against mkl: generation ")


def test_without_the_operators_mkl_is_used_whatever_is_asked(monkeypatch):
    monkeypatch.setattr(kernels, "available", lambda: False)
    for asked in ("auto", "onednn", {"generation": "onednn", "training": "mkl"}):
        assert "has no oneDNN" in kernels.use(asked)
        assert set(kernels.chosen.values()) == {"mkl"}


def test_a_run_keeps_its_kernels_unless_others_are_asked_for(tmp_path, monkeypatch):
    (tmp_path / "kernels.json").write_text(json.dumps({"generation": "onednn", "training": "mkl"}))
    line = use_kernels(Config(), tmp_path, World())
    assert kernels.chosen == {"generation": "onednn", "training": "mkl"} and "as the run was begun" in line
    assert "as the run was begun" in use_kernels(Config(), tmp_path / "older", World())
    assert set(kernels.chosen.values()) == {"mkl"}
    use_kernels(Config(matmul="mkl"), tmp_path, World())
    assert kernels.chosen == {"generation": "mkl", "training": "mkl"}
    for bad in ('{"generation": "onednn"}', '{"generation": "onednn", "training": "blas"}'):
        (tmp_path / "kernels.json").write_text(bad)
        with pytest.raises(InputError, match="kernels.json: names no libraries"):
            use_kernels(Config(), tmp_path, World())
