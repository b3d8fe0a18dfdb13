"""The model: equal to transformers, loaded strictly, its log-probs and gradients equal to brute force."""

import json

import pytest
import torch
import transformers
from conftest import hidden_states, random_ids, tiny_model, tiny_raw
from safetensors.torch import load_file, save_file

import model as model_module
from chat import banned_ids, load_tokenizer
from checkpoint import load_model, save_model
from config import InputError
from model import ValueHead, predictors, sampling_logits, token_logprobs

pytestmark = pytest.mark.usefixtures("one_thread")
CLOSE = dict(rtol=0, atol=1e-4)
FAMILIES = [(family, tied) for family in ("qwen2", "qwen3", "llama") for tied in (True, False)]


def logits(model, *documents):
    with torch.no_grad():
        return hidden_states(model, *documents) @ model.output_weight.T


def their_logits(theirs, ids):
    with torch.no_grad():
        return theirs(torch.tensor([ids])).logits[0]


def their_model(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def random_theirs(family, tied, **changes):
    """A tiny random model made by transformers, its biases and norms random too."""
    torch.manual_seed(1)
    config = transformers.AutoConfig.for_model(**tiny_raw(family, tied) | changes)
    theirs = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.dim() == 1:
                parameter += 0.3 * torch.randn_like(parameter)
    return theirs.float().eval()


# ---- transformers in, transformers out


@pytest.mark.parametrize("family,tied", FAMILIES)
def test_logits_equal_transformers(family, tied, tmp_path):
    theirs, ids = random_theirs(family, tied), random_ids(40)
    theirs.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(load_model(str(tmp_path)), ids), their_logits(theirs, ids), **CLOSE)


@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_logits_equal_transformers_with_attention_bias_and_a_wide_rope(family, tmp_path):
    changes = dict(attention_bias=True, rope_theta=1e6, rms_norm_eps=1e-3, num_key_value_heads=1, head_dim=8)
    theirs, ids = random_theirs(family, True, **changes), random_ids(40)
    theirs.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(load_model(str(tmp_path)), ids), their_logits(theirs, ids), **CLOSE)


def test_logits_of_smollm2_equal_transformers(smollm2):
    ids = load_tokenizer(str(smollm2)).encode("My oven broke the night before the market, and nobody came.")
    model = load_model(str(smollm2))
    torch.testing.assert_close(logits(model, ids), their_logits(their_model(smollm2), ids), **CLOSE)


@pytest.mark.parametrize("family,tied", FAMILIES)
def test_saved_folder_opens_in_transformers_with_equal_logits(family, tied, tmp_path, byte_tokenizer):
    model, ids = tiny_model(family, tied), random_ids(40)
    save_model(model, byte_tokenizer, tmp_path / "model")
    torch.testing.assert_close(logits(model, ids), their_logits(their_model(tmp_path / "model"), ids), **CLOSE)
    assert load_tokenizer(str(tmp_path / "model")).get_vocab() == byte_tokenizer.get_vocab()


@pytest.mark.parametrize("family,tied", FAMILIES)
def test_load_of_save_is_equal_to_the_bit(family, tied, tmp_path, byte_tokenizer):
    model = tiny_model(family, tied)
    save_model(model, byte_tokenizer, tmp_path / "model")
    again = load_model(str(tmp_path / "model"))
    assert again.config == model.config
    ours, loaded = dict(model.named_parameters()), dict(again.named_parameters())
    assert ours.keys() == loaded.keys() and all(torch.equal(ours[name], loaded[name]) for name in ours)
    assert all(p.requires_grad for p in loaded.values())


def test_saving_over_a_folder_replaces_all_of_it(tmp_path, byte_tokenizer):
    folder = tmp_path / "model"
    save_model(tiny_model(seed=1), byte_tokenizer, folder)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"x": "gone.safetensors"}}')
    save_model(tiny_model(seed=2), byte_tokenizer, folder)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert torch.equal(load_model(str(folder)).output_weight, tiny_model(seed=2).output_weight)


def test_sharded_weights_equal_a_single_file(tmp_path):
    theirs = random_theirs("qwen2", False)
    theirs.save_pretrained(tmp_path / "one")
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="200KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    one, shards = (load_model(str(tmp_path / name)).state_dict() for name in ("one", "shards"))
    assert one.keys() == shards.keys() and all(torch.equal(one[name], shards[name]) for name in one)


def test_half_precision_weights_are_loaded_in_fp32(tmp_path):
    theirs = random_theirs("llama", True).bfloat16()
    theirs.save_pretrained(tmp_path)
    model = load_model(str(tmp_path))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert torch.equal(model.output_weight, theirs.lm_head.weight.float())


def test_a_tied_checkpoint_may_carry_its_output_layer_twice(tmp_path, byte_tokenizer):
    save_model(tiny_model(), byte_tokenizer, tmp_path / "m")
    file = tmp_path / "m" / "model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, file)
    assert load_model(str(tmp_path / "m")).lm_head is None


def test_a_shape_file_gives_weights_that_are_a_function_of_the_seed(tmp_path):
    shape = tmp_path / "shape.json"
    shape.write_text(json.dumps(tiny_raw("qwen3", False)))
    first, same, other = (load_model(str(shape), seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])


# ---- loading errors


def edit_json(file, **changes):
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def edit_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def truncate(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


NORM = "model.norm.weight"
LOADING_ERRORS = {  # what is done to a good folder: what the message must say
    "no config": (lambda f: (f / "config.json").unlink(), "config.json: no such file"),
    "config is not JSON": (lambda f: (f / "config.json").write_text("{"), "not JSON"),
    "config is not an object": (lambda f: (f / "config.json").write_text("[]"), "config.json"),
    "config lacks a key": (lambda f: (f / "config.json").write_text('{"model_type": "qwen2"}'), "num_attention_heads"),
    "wrong architecture": (lambda f: edit_json(f / "config.json", model_type="gpt2"), "architecture 'gpt2'"),
    "no architecture": (lambda f: (f / "config.json").write_text("{}"), "architecture"),
    "rope scaling": (lambda f: edit_json(f / "config.json", rope_scaling={"rope_type": "llama3"}), "'llama3'"),
    "old rope scaling": (lambda f: edit_json(f / "config.json", rope_scaling={"type": "linear"}), "'linear'"),
    "new rope scaling": (lambda f: edit_json(f / "config.json", rope_parameters={"rope_type": "yarn"}), "'yarn'"),
    "sliding window": (lambda f: edit_json(f / "config.json", use_sliding_window=True), "sliding"),
    "MLP bias": (lambda f: edit_json(f / "config.json", mlp_bias=True), "MLP"),
    "other activation": (lambda f: edit_json(f / "config.json", hidden_act="gelu"), "silu"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "model.safetensors: no such file"),
    "truncated weights": (truncate, "truncated or damaged"),
    "empty weights": (lambda f: (f / "model.safetensors").write_bytes(b""), "truncated or damaged"),
    "missing tensor": (lambda f: edit_tensors(f, lambda t: t.pop(NORM)), f"missing tensors, for example {NORM}"),
    "unknown tensor": (lambda f: edit_tensors(f, lambda t: t.update(extra=torch.ones(1))), "unknown tensors"),
    "misshapen tensor": (lambda f: edit_tensors(f, lambda t: t.update({NORM: torch.ones(3)})), "has shape (3,)"),
    "missing shard": (
        lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {"a": "gone.safetensors"}}'),
        "gone.safetensors: no such file",
    ),
    "index without a map": (lambda f: (f / "model.safetensors.index.json").write_text("{}"), "index.json"),
}


@pytest.mark.parametrize("error", LOADING_ERRORS)
def test_a_bad_model_folder_is_one_clear_line(error, tmp_path, byte_tokenizer):
    folder = tmp_path / "model"
    save_model(tiny_model(), byte_tokenizer, folder)
    damage, says = LOADING_ERRORS[error]
    damage(folder)
    with pytest.raises(InputError) as caught:
        load_model(str(folder))
    message = str(caught.value)
    assert says in message and str(folder) in message and "\n" not in message


@pytest.mark.parametrize("name", ["models/none", "./none/x", "/none", "none", "none.json"])
def test_a_missing_model_is_one_clear_line(name):
    with pytest.raises(InputError, match="no such") as caught:
        load_model(name)
    assert name in str(caught.value) and "\n" not in str(caught.value)


# ---- packing, log-probs, gradients


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_packed_documents_equal_each_alone(family):
    model, documents = tiny_model(family), [random_ids(n, seed=n) for n in (17, 1, 40, 5)]
    torch.testing.assert_close(logits(model, *documents), torch.cat([logits(model, d) for d in documents]), **CLOSE)


def test_predictors_are_the_indices_before_trained_tokens():
    assert predictors(torch.tensor([0, 0, 1, 1, 0, 1])).tolist() == [1, 2, 4]
    assert predictors(torch.zeros(4)).tolist() == []


@pytest.fixture
def scored():
    """Hidden states, output weight, targets and banned ids, small enough for brute force."""
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(23, 16, generator=generator, requires_grad=True)
    weight = torch.randn(50, 16, generator=generator, requires_grad=True)
    banned = torch.zeros(50, dtype=torch.bool)
    banned[[0, 7, 48, 49]] = True
    return hidden, weight, torch.randint(8, 48, (23,), generator=generator), banned


def brute_force(hidden, weight, target, banned, temperature):
    """Log-probs and entropies over the ids that are not banned, and nothing but them."""
    allowed = (~banned).nonzero().squeeze(1)
    distribution = torch.distributions.Categorical(logits=(hidden @ weight[allowed].T) / temperature)
    return distribution.log_prob(torch.searchsorted(allowed, target)), distribution.entropy()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("rows", [1, 5, 1024])
@pytest.mark.parametrize("bonus", [0.3, 0.0])
def test_log_probs_entropy_and_their_gradients_equal_brute_force(scored, temperature, rows, bonus, monkeypatch):
    """The coefficient of the entropy is 0 in some runs: then its part of the gradient is not computed."""
    monkeypatch.setattr(model_module, "CHUNK", 50 * rows)
    hidden, weight, target, banned = scored
    results = []
    for function, extra in ((brute_force, ()), (token_logprobs, (bonus != 0,))):
        logp, entropy = function(hidden, weight, target, banned, temperature, *extra)
        coefficient = torch.linspace(-1, 2, len(target))  # each token weighs differently, as in a loss
        loss = (coefficient * logp).sum() + bonus * (coefficient.flip(0) * entropy).sum()
        results.append((logp, entropy, *torch.autograd.grad(loss, (hidden, weight))))
    for ours, theirs in zip(*results):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-5)


def test_a_frozen_output_layer_gets_no_gradient_and_the_hidden_states_the_same(scored):
    hidden, weight, target, banned = scored
    both = [torch.autograd.grad(token_logprobs(hidden, w, target, banned, 0.7)[0].sum(), hidden)[0]
            for w in (weight, weight.detach())]  # fmt: skip
    assert torch.equal(*both)


def test_banned_ids_have_probability_zero(scored):
    hidden, weight, _, banned = scored
    with torch.no_grad():
        weight[7] *= 100  # the banned id would win everywhere
        assert (sampling_logits(hidden, weight, banned, 1.0).softmax(-1)[:, banned] == 0).all()
        logp, entropy = token_logprobs(hidden, weight, torch.full((23,), 7), banned, 1.0)
        assert (logp.exp() == 0).all() and torch.isfinite(entropy).all()
        every = torch.stack([token_logprobs(hidden, weight, torch.full((23,), i), banned, 1.0)[0] for i in range(50)])
    torch.testing.assert_close(every.exp().sum(0), torch.ones(23))


def test_no_trained_tokens_give_empty_log_probs_with_a_gradient(scored):
    hidden, weight, target, banned = scored
    logp, entropy = token_logprobs(hidden[:0], weight, target[:0], banned, 1.0)
    assert logp.shape == entropy.shape == (0,)
    assert torch.autograd.grad(logp.sum() + entropy.sum(), weight)[0].abs().sum() == 0


def test_ids_beyond_the_tokenizer_and_special_ids_but_the_stop_are_banned(byte_tokenizer, smollm2):
    stop, header = (byte_tokenizer.convert_tokens_to_ids(token) for token in ("<|im_end|>", "<|im_start|>"))
    banned = banned_ids(byte_tokenizer, 264, (stop,))
    assert banned.nonzero().squeeze(1).tolist() == [i for i in range(256, 264) if i != stop] and banned[header]
    tokenizer = load_tokenizer(str(smollm2))
    banned = banned_ids(tokenizer, 49152, (2,)).nonzero().squeeze(1).tolist()
    assert banned == [i for i in range(17) if i != 2]


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_activation_checkpointing_gives_equal_gradients(family):
    gradients = []
    for checkpointing in (False, True):
        model = tiny_model(family)
        model.checkpointing = checkpointing
        (hidden_states(model, random_ids(9), random_ids(14)) @ model.output_weight.T).logsumexp(-1).sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    for plain, recomputed in zip(*gradients):
        torch.testing.assert_close(plain, recomputed)


def test_activation_checkpointing_keeps_fewer_activations():
    def kept(checkpointing):
        model, sizes = tiny_model(), []
        model.checkpointing = checkpointing
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
            hidden_states(model, random_ids(64))
        return sum(sizes)

    assert kept(True) < kept(False) / 2


def test_value_head_starts_as_a_constant_and_works_in_fp32():
    head, hidden = ValueHead(8, start=0.5), torch.randn(5, 8).bfloat16()
    assert head(hidden).tolist() == [0.5] * 5
    with torch.no_grad():
        head.weight += 1.0
    torch.testing.assert_close(head(hidden), hidden.float().sum(-1) + 0.5)
