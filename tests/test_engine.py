"""The engine: what it samples and scores is what the training forward says, whatever the cache, batch or slot."""

import math

import numpy
import pytest
import torch
from conftest import hidden_states, random_ids, tiny_model

import engine as engine_module
from engine import Decode, Engine, Prefill, Sampling, Span, block_sums, inverse_cdf, uniforms
from model import ValueHead, predictors, token_logprobs
from simulator import hash_key

pytestmark = pytest.mark.usefixtures("one_thread")
CLOSE = dict(rtol=0, atol=1e-4)
FAMILIES = ["qwen2", "qwen3", "llama"]
BANNED = torch.zeros(264, dtype=torch.bool)
BANNED[[*range(0, 60, 3), *range(257, 264)]] = True
STOP = 256


def engine_of(model, slots=4, capacity=128, temperature=1.0, stop=(STOP,), banned=BANNED, **options):
    return Engine(model, Sampling(banned, stop, temperature), slots, capacity, **options)


def finish(engine):
    """Steps until nothing is left to do; the ended rows by slot."""
    rows = {}
    while engine.busy:
        rows |= {row.slot: row for row in engine.step()}
    return rows


def ask(engine, prompts, cap=12):
    """One turn for each {slot: prompt}; a prompt's noise is keyed by its first ids, not by its slot."""
    for slot, prompt in prompts.items():
        engine.submit(slot, prompt, (7, *prompt[:2]), cap)
    return finish(engine)


def alone(model, prompt, cap=12, **options):
    return ask(engine_of(model, slots=1, **options), {0: prompt}, cap)[0]


def assert_same(row, other):
    assert row.sampled == other.sampled and row.stop == other.stop
    torch.testing.assert_close(torch.tensor(row.logps), torch.tensor(other.logps), **CLOSE)


# ---- the cache


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_full_forward_equals_chunked_prefill_equals_decode(family):
    model, ids = tiny_model(family), random_ids(40)
    c, full = model.config, hidden_states(model, ids)

    def in_chunks(sizes, context):
        """Hidden states of `ids`, brought to slot 2 of a cache in chunks."""
        cache, parts, begin = torch.zeros(2, c.num_layers, 3, c.num_kv_heads, 50, c.head_dim), [], 0
        for size in sizes:
            tokens, position = torch.tensor(ids[begin : begin + size]), torch.arange(begin, begin + size)
            parts.append(model(tokens, position, context(cache, begin, size)))
            begin += size
        return torch.cat(parts)

    def prefill(cache, begin, size):
        return Prefill(cache, [Span(2, 2, begin, begin, begin + size)])

    def decode(cache, begin, size):
        return Decode(cache, torch.tensor([2]), [2]).at(torch.tensor([begin]), begin + 1)

    torch.testing.assert_close(in_chunks([40], prefill), full, **CLOSE)
    torch.testing.assert_close(in_chunks([7, 1, 13, 19], prefill), full, **CLOSE)
    torch.testing.assert_close(in_chunks([1] * 40, decode), full, **CLOSE)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_ragged_prefill_and_ragged_decode_equal_each_row_alone(family):
    model, documents = tiny_model(family), [random_ids(n, seed=n) for n in (25, 9, 38)]
    c, slots, begins, counts = model.config, [3, 0, 1], [10, 0, 31], [14, 8, 6]
    cache = torch.zeros(2, c.num_layers, 4, c.num_kv_heads, 50, c.head_dim)

    def pick(begins, counts):
        tokens = torch.tensor([t for ids, b, n in zip(documents, begins, counts) for t in ids[b : b + n]])
        return tokens, torch.cat([torch.arange(b, b + n) for b, n in zip(begins, counts)])

    held = [0, 2]  # the rows of which the cache holds a part already
    model(*pick([0, 0, 0], begins), Prefill(cache, [Span(slots[i], slots[i], 0, 0, begins[i]) for i in held]))
    spans = [Span(slot, slot, b, b, b + n) for slot, b, n in zip(slots, begins, counts)]
    ragged = model(*pick(begins, counts), Prefill(cache, spans))
    ends = [b + n for b, n in zip(begins, counts)]
    context = Decode(cache, torch.tensor(slots), slots).at(torch.tensor(ends), max(ends) + 1)
    step = model(*pick(ends, [1, 1, 1]), context)
    single = [hidden_states(model, ids) for ids in documents]
    torch.testing.assert_close(ragged, torch.cat([h[b:e] for h, b, e in zip(single, begins, ends)]), **CLOSE)
    torch.testing.assert_close(step, torch.stack([h[-1] for h in single]), **CLOSE)


@pytest.mark.parametrize("family", FAMILIES)
def test_second_turn_appended_equals_recomputed_and_costs_only_what_is_new(family):
    model = tiny_model(family)
    engine = engine_of(model)
    first = ask(engine, {1: random_ids(20), 2: random_ids(33, seed=1)})
    prompts = {slot: [*row.prompt, *row.sampled, *random_ids(6, seed=slot)] for slot, row in first.items()}
    before = engine.tokens_prefilled
    second = ask(engine, prompts)
    for slot, prompt in prompts.items():
        assert_same(second[slot], alone(model, prompt))
    assert engine.tokens_prefilled - before == 2 * (1 + 6)  # the last sampled id has no KV yet


def test_the_same_prompt_again_prefills_one_token_and_says_the_same():
    engine, prompt = engine_of(tiny_model()), random_ids(20)
    first = ask(engine, {0: prompt})[0]
    assert_same(ask(engine, {0: prompt})[0], first)
    assert engine.tokens_prefilled == 21


def test_slot_reuse_leaves_no_trace():
    model = tiny_model()
    engine = engine_of(model, slots=2)
    ask(engine, {0: random_ids(60, seed=1), 1: random_ids(50, seed=2)}, cap=30)
    for length in (30, 70):  # shorter and longer than what the slot held
        prompts = {0: random_ids(length, seed=3), 1: random_ids(90 - length, seed=4)}
        rows = ask(engine, prompts)
        for slot in prompts:
            assert_same(rows[slot], alone(model, prompts[slot]))


def test_a_group_computes_its_prompt_once_and_says_what_it_would_say_alone():
    """Also where groups are cut into prefill batches, share their beginning, and a slot is used again."""
    model, system = tiny_model(), random_ids(15, seed=9)
    engine = engine_of(model, slots=6, capacity=64)
    for turn, cap in ((0, 3), (1, 9)):
        prompts = [[*system, *random_ids(20, seed=10 * turn + group)] for group in range(2)]
        before = engine.tokens_prefilled
        for slot in range(6):
            engine.submit(slot, prompts[slot % 2], (turn, slot), cap)
        rows = finish(engine)
        assert engine.tokens_prefilled - before == [35 + 20 + 4, 20 + 20 + 4][turn]
        for slot, row in rows.items():
            single = engine_of(model, slots=1)
            single.submit(0, prompts[slot % 2], (turn, slot), cap)
            assert_same(row, finish(single)[0])


def test_a_prompt_is_copied_from_a_slot_that_is_itself_being_written():
    """Of rows prefilled together, 0 copies what 1 held before, and 2 what 0 has just got."""
    model, a, b = tiny_model(), random_ids(30, seed=1), random_ids(30, seed=2)
    engine = engine_of(model)
    ask(engine, {1: a}, cap=2)
    before, prompts = engine.tokens_prefilled, {0: [*a, 5], 1: b, 2: [*a, 5, 6, 7], 3: b}
    rows = ask(engine, prompts)
    assert engine.tokens_prefilled - before == 1 + 30 + 2 + 1
    for slot, prompt in prompts.items():
        assert_same(rows[slot], alone(model, prompt))


def test_nothing_is_copied_from_a_slot_that_begins_otherwise():
    """It agrees with the prompt from where this row's own slot ends, but stands behind other ids."""
    model, middle = tiny_model(), random_ids(20, seed=3)
    engine = engine_of(model)
    ask(engine, {0: [1, 2, 3], 1: [9, 2, 3, *middle]}, cap=1)
    before, prompt = engine.tokens_prefilled, [1, 2, 3, *middle, 4]
    assert_same(ask(engine, {0: prompt})[0], alone(model, prompt))
    assert engine.tokens_prefilled - before == 21


@pytest.mark.parametrize("slots", [[0, 1, 2, 3], [1, 2, 4], [0, 7], [5], [6, 2, 3]])
def test_rows_that_lie_anywhere_in_the_cache_equal_each_row_alone(slots):
    """Next to each other, with holes, and so far apart that they are copied out; over other rows' remains."""
    model = tiny_model("qwen3")
    engine = engine_of(model, slots=8)
    ask(engine, {slot: random_ids(60, seed=50 + slot) for slot in range(8)}, cap=4)
    rows = ask(engine, {slot: random_ids(12 + slot, seed=slot) for slot in slots})
    for slot in slots:
        assert_same(rows[slot], alone(model, random_ids(12 + slot, seed=slot)))


def test_cut_back_leaves_no_trace():
    """Think mode: the next prompt keeps the header, drops the thought and goes on with the reply's ids alone."""
    model = tiny_model()
    engine = engine_of(model)
    row = ask(engine, {0: random_ids(20), 1: random_ids(50, seed=1)})[0]
    thought, reply = row.sampled[:8], row.sampled[8:]
    assert len(thought) == 8 and reply
    before, prompt = engine.tokens_prefilled, [*row.prompt, *reply, *random_ids(5, seed=2)]
    assert_same(ask(engine, {0: prompt})[0], alone(model, prompt))
    assert engine.tokens_prefilled - before == len(prompt) - 20


def test_forget_drops_what_the_old_weights_made():
    engine, prompt = engine_of(tiny_model(seed=1)), random_ids(20)
    ask(engine, {0: prompt})
    engine.submit(1, prompt, (0,), 5)
    engine.model.load_state_dict(tiny_model(seed=2).state_dict())
    engine.forget()
    assert not engine.busy
    assert_same(ask(engine, {0: prompt})[0], alone(tiny_model(seed=2), prompt))


def test_what_was_not_finite_leaves_no_trace():
    """One bad step is skipped and the run goes on: the NaN it left in a slot must not spoil later batches."""
    model = tiny_model()
    engine, prompts = engine_of(model), {0: random_ids(10), 1: random_ids(30, seed=1)}
    weight = model.model.embed_tokens.weight
    before = weight.detach().clone()
    with torch.no_grad():
        weight.fill_(math.nan)
    engine.submit(0, random_ids(60), (0,), 5)
    with pytest.raises(FloatingPointError):
        engine.step()
    engine.forget()
    with torch.no_grad():
        weight.copy_(before)
    rows = ask(engine, prompts)
    for slot, prompt in prompts.items():
        assert_same(rows[slot], alone(model, prompt))


@pytest.mark.parametrize("prefill_tokens, batches", [(1, 4), (40, 3), (64, 2)])
def test_more_rows_than_one_prefill_batch_equal_each_row_alone(prefill_tokens, batches, monkeypatch):
    """Prompts of 12, 21, 30 and 39 tokens."""
    sizes, real = [], Engine.prefill_batch
    monkeypatch.setattr(engine_module, "PREFILL", prefill_tokens)
    monkeypatch.setattr(Engine, "prefill_batch", lambda self, rows: sizes.append(len(rows)) or real(self, rows))
    model = tiny_model()
    prompts = {slot: random_ids(12 + 9 * slot, seed=slot) for slot in range(4)}
    rows = ask(engine_of(model), prompts)
    assert len(sizes) == batches and sum(sizes) == 4
    for slot, prompt in prompts.items():
        assert_same(rows[slot], alone(model, prompt))


# ---- sampled = trained


@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.0])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_sampled_log_probs_and_values_equal_those_of_training(family, temperature):
    model, head = tiny_model(family), ValueHead(64, start=0.5)
    head.weight.normal_(generator=torch.Generator().manual_seed(5))
    engine = engine_of(model, temperature=temperature, value_head=head)
    rows = list(ask(engine, {slot: random_ids(10 + 7 * slot, seed=slot) for slot in range(4)}, cap=20).values())
    documents = [row.prompt + row.sampled for row in rows]
    mask = torch.tensor([int(i >= len(row.prompt)) for row, ids in zip(rows, documents) for i in range(len(ids))])
    tokens, where = torch.tensor([t for ids in documents for t in ids]), predictors(mask)
    hidden = hidden_states(model, *documents)[where]
    logp, _ = token_logprobs(hidden, model.output_weight, tokens[mask.bool()], BANNED, temperature or 1.0)
    torch.testing.assert_close(torch.tensor([x for row in rows for x in row.logps]), logp, **CLOSE)
    torch.testing.assert_close(torch.tensor([x for row in rows for x in row.values]), head(hidden), **CLOSE)


def test_banned_ids_are_never_sampled():
    model, banned = tiny_model(), torch.ones(264, dtype=torch.bool)
    banned[[5, 100, 200]] = False
    row = alone(model, random_ids(5), cap=100, stop=(), banned=banned)
    assert set(row.sampled) == {5, 100, 200}


def test_greedy_takes_the_likeliest_id_that_is_not_banned():
    model, prompt = tiny_model(), random_ids(20)
    row = alone(model, prompt, temperature=0.0)
    with torch.no_grad():
        logits = hidden_states(model, prompt + row.sampled) @ model.output_weight.T
    assert row.sampled == logits.masked_fill(BANNED, -math.inf)[len(prompt) - 1 : -1].argmax(-1).tolist()


def test_logits_that_are_not_finite_raise():
    model = tiny_model()
    engine = engine_of(model)
    with torch.no_grad():
        model.model.embed_tokens.weight[9] = math.nan
    engine.submit(0, [1, 2, 3], (0,), 5)
    engine.submit(1, [1, 9, 3], (1,), 5)
    with pytest.raises(FloatingPointError):
        engine.step()


# ---- noise


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_key_samples_the_same_ids_alone_in_any_batch_and_any_row_order(family):
    model = tiny_model(family)
    prompts = [random_ids(10 + 5 * i, seed=i) for i in range(4)]
    single = [alone(model, prompt) for prompt in prompts]
    assert len({tuple(row.sampled) for row in single}) == 4
    for order in ([0, 1, 2, 3], [3, 1, 0, 2], [2, 3]):
        rows = ask(engine_of(model), {slot: prompts[i] for slot, i in enumerate(order)})
        for slot, i in enumerate(order):
            assert_same(rows[slot], single[i])


def test_a_row_that_joins_late_changes_nothing_and_waits_for_nobody():
    model, first, late = tiny_model(), random_ids(10), random_ids(30, seed=1)
    engine = engine_of(model)
    engine.submit(2, first, (7, *first[:2]), 12)
    for _ in range(4):
        assert engine.step() == []
    engine.submit(0, late, (7, *late[:2]), 3)
    rows = finish(engine)
    assert list(rows) == [0, 2]
    assert_same(rows[2], alone(model, first))
    assert_same(rows[0], alone(model, late, cap=3))


def test_other_keys_sample_other_ids():
    engine, prompt = engine_of(tiny_model()), random_ids(10)
    for slot in range(4):
        engine.submit(slot, prompt, (7, slot), 12)
    assert len({tuple(row.sampled) for row in finish(engine).values()}) == 4


def test_hashed_uniforms_lie_in_the_open_interval_and_differ_by_key():
    keys = [(), (0,), (0, 0), (1,), (1, 0), (0, 1), (-1,), (1, 2, 3), (3, 2, 1), (1 << 40,)]
    keys += [(seed, step, turn, position) for seed in range(3) for step in range(3) for turn in range(3)
             for position in range(300)]  # fmt: skip
    draws = [float(uniforms(key, 1)) for key in keys if len(key) < 4]
    draws += torch.cat([uniforms(key[:-1], 300) for key in keys if len(key) == 4 and key[-1] == 0]).tolist()
    assert len(set(draws)) == len(keys) and all(0 < u < 1 for u in draws)
    counts = torch.histc(torch.tensor(draws), bins=10, min=0, max=1)
    chi_square = ((counts - len(keys) / 10) ** 2 / (len(keys) / 10)).sum()
    assert chi_square < 28  # 9 degrees of freedom: 0.1 % lie above


@pytest.mark.parametrize("bits", [0, (1 << 64) - 1])
def test_the_outermost_hashes_still_give_a_uniform_inside_the_open_interval(bits, monkeypatch):
    monkeypatch.setattr(engine_module, "hash_key", lambda *key: numpy.array([bits], dtype=numpy.uint64))
    assert 0 < uniforms((1,), 1) < 1


def test_hashing_a_row_of_positions_at_once_equals_hashing_each():
    keys = [(), (5,), (-1, 1 << 63), (7, 3, 2, 1, 9)]
    for key in keys:
        found = hash_key(*key, numpy.arange(500, dtype=numpy.uint64)).tolist()
        assert found == [hash_key(*key, t) for t in range(500)]
        assert torch.equal(uniforms(key, 9), uniforms(key, 500)[:9])


def test_hash_is_fixed_for_ever():
    """A run resumed with another version of the code must see the same noise."""
    assert [hash_key(1, 2, 3), hash_key(0)] == [0xd0734750fde362b3, 0xe220a8397b1dcdaf]


def pick(logits, noise):
    odds = (logits - logits.amax(-1, keepdim=True)).exp()
    return inverse_cdf(odds, block_sums(odds), noise)


def test_inverse_cdf_reproduces_a_distribution():
    logits = torch.tensor([-math.inf, 1.0, 0.0, -math.inf, 2.0, -3.0, 0.5, 0.5, -1.0, -math.inf])
    draws = 20_000
    choice = pick(logits.expand(draws, -1), uniforms((1,), draws))
    counts, expected = torch.bincount(choice, minlength=10), logits.softmax(-1) * draws
    allowed = expected > 0
    assert counts[~allowed].sum() == 0
    chi_square = ((counts - expected)[allowed] ** 2 / expected[allowed]).sum()
    assert chi_square < 22.5  # 6 degrees of freedom: 0.1 % lie above


def test_inverse_cdf_never_gives_a_banned_id_at_the_ends():
    logits = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    logits[[0, 1, 2, 500, 997, 998, 999]] = -math.inf
    ends = torch.tensor([0.0, 2**-54, 0.5 / (1 << 53), 1 - 2**-53, 1.0], dtype=torch.float64)
    assert pick(logits.expand(5, -1), ends).tolist() == [3, 3, 3, 996, 996]
    many = 8 * torch.randn(2000, 300, generator=torch.Generator().manual_seed(1))
    many[:, 200:] = -1e30  # a block's sum and the sum id by id differ in the last bit
    assert 190 < pick(many, torch.full((2000,), 1 - 2**-53, dtype=torch.float64)).max() < 200


@pytest.mark.parametrize("vocab", [10, 256, 264, 512, 1000, 49152])
def test_inverse_cdf_by_blocks_equals_one_cumulative_sum(vocab):
    generator = torch.Generator().manual_seed(vocab)
    logits = torch.randn(40, vocab, generator=generator) * 3
    logits.masked_fill_(torch.rand(40, vocab, generator=generator) < 0.3, -1e30)
    logits[3, : vocab // 2], logits[4, vocab // 2 :] = -1e30, -1e30
    noise = torch.rand(40, dtype=torch.float64, generator=generator)
    cumulative = (logits.double() - logits.double().amax(-1, keepdim=True)).exp().cumsum(-1)
    plain = torch.searchsorted(cumulative, noise[:, None] * cumulative[:, -1:], right=True)
    assert pick(logits, noise).tolist() == plain.squeeze(1).tolist()


def test_inverse_cdf_resolves_a_tail_that_fp32_sums_would_lose():
    logits = torch.tensor([22.0] + [0.0] * 999)  # the tail: 999 ids of 3e-10 each, below fp32's step near 1
    probability = logits.double().softmax(-1)
    middle = probability.cumsum(-1) - probability / 2  # the uniform in the middle of each id's share
    ids = torch.tensor([1, 2, 500, 501, 999])
    assert pick(logits.expand(5, -1), middle[ids]).tolist() == ids.tolist()


# ---- endings


def test_turns_end_by_eos_cap_or_context_with_exact_counts():
    model, prompt = tiny_model(), random_ids(20)
    free = alone(model, prompt, cap=10, temperature=0.0, stop=())
    assert (len(free.sampled), free.stop) == (10, "cap")
    stop = free.sampled[3]
    until = free.sampled.index(stop) + 1
    eos = alone(model, prompt, cap=10, temperature=0.0, stop=(5, stop))
    assert (eos.sampled, eos.stop) == (free.sampled[:until], "eos")
    last = alone(model, prompt, cap=until, temperature=0.0, stop=(stop,))
    assert (last.sampled, last.stop) == (free.sampled[:until], "eos")
    context = alone(model, prompt, cap=10, temperature=0.0, stop=(), capacity=27)
    assert (context.sampled, context.stop) == (free.sampled[:7], "context")
    one = alone(model, prompt, cap=1, temperature=0.0, stop=(), capacity=21)
    assert (one.sampled, one.stop) == (free.sampled[:1], "context")
    assert len(eos.logps) == len(eos.values) == len(eos.sampled)


def test_rows_end_each_in_its_own_time_in_slot_order():
    engine = engine_of(tiny_model(), stop=())
    for slot, cap in ((3, 2), (1, 2), (0, 4), (2, 1)):
        engine.submit(slot, random_ids(5, seed=slot), (slot,), cap)
    ended = []
    while engine.busy:
        ended.append([row.slot for row in engine.step()])
    assert ended == [[2], [1, 3], [], [0]]
    assert engine.tokens_sampled == 9


def test_a_prompt_without_room_is_refused():
    engine = engine_of(tiny_model(), capacity=20)
    for length in (20, 21):
        with pytest.raises(ValueError, match="no room"):
            engine.submit(0, random_ids(length), (0,), 5)
    assert not engine.busy
    assert len(ask(engine, {0: random_ids(19)})[0].sampled) == 1
