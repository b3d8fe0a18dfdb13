"""KV-cached batched generation: token ids in, token ids and log-probabilities out.

A dialogue owns one slot of the cache for its life. `submit` takes a whole prompt; the engine keeps
the longest prefix that the slot holds and prefills only the rest. So a second user turn costs its
own tokens (and the last sampled one, which has no KV yet), and a thought may be cut out of the past
without a call of its own. `step` prefills all that was submitted, or decodes one token a live row.

Sampling noise is counter-based: one hashed uniform a token, keyed by the request's key and the
position within the turn, never by row or rank. So a dialogue gets the same noise in any batch.
"""

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from model import Transformer, ValueHead, sampling_logits
from simulator import hash_key

PREFILL = 4096  # tokens of one prefill batch at most, but for a longer prompt


def uniform(*key: int) -> float:
    """A uniform in (0, 1), a function of the key alone."""
    return ((hash_key(*key) >> 12) + 0.5) / (1 << 52)


class KVCache:
    """Keys and values [layers, slots, G, capacity, K]. Attention contexts know what is valid."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device):
        self.k = torch.zeros(shape, dtype=dtype, device=device)
        self.v = torch.zeros(shape, dtype=dtype, device=device)


class Prefill:
    """Attention context for ragged prefill: row i puts `counts[i]` tokens behind `starts[i]`."""

    def __init__(self, cache: KVCache, slots: list[int], starts: list[int], counts: list[int]):
        self.cache, self.rows = cache, list(zip(slots, starts, counts))

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, begin = torch.empty_like(q), 0
        for slot, start, count in self.rows:
            piece, stop = slice(begin, begin + count), start + count
            keys, values = self.cache.k[layer, slot], self.cache.v[layer, slot]  # [G, capacity, K]
            keys[:, start:stop] = k[piece].transpose(0, 1)
            values[:, start:stop] = v[piece].transpose(0, 1)
            # is_causal aligns its triangle to the top left: that is wrong behind a filled cache.
            position = torch.arange(stop, device=q.device)
            mask = position[None, :] <= position[start:, None]  # [count, stop]
            qkv = q[piece].transpose(0, 1)[None], keys[None, :, :stop], values[None, :, :stop]
            attended = F.scaled_dot_product_attention(*qkv, attn_mask=mask, enable_gqa=True)
            out[piece] = attended[0].transpose(0, 1)
            begin += count
        return out


class Decode:
    """Attention context for one new token a row, at `position[i]`; it sees all up to there."""

    def __init__(self, cache: KVCache, slot_B: Tensor, position_B: Tensor):
        self.cache, self.slot, self.position = cache, slot_B, position_B
        self.reach = int(position_B.max()) + 1
        seen = torch.arange(self.reach, device=slot_B.device) <= position_B[:, None]
        self.mask = seen[:, None, None, :]  # [B, 1, 1, reach]

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = self.cache.k[layer], self.cache.v[layer]  # [slots, G, capacity, K]
        keys[self.slot, :, self.position] = k
        values[self.slot, :, self.position] = v
        query = q.unflatten(1, (k.shape[1], -1))  # [B, G, H/G, K], cheaper than repeating the keys
        keys, values = keys[self.slot, :, : self.reach], values[self.slot, :, : self.reach]
        out = F.scaled_dot_product_attention(query, keys, values, attn_mask=self.mask)
        return out.flatten(1, 2)


@dataclass
class Row:
    """One turn, of at most `cap` sampled ids; `stop` says why it has ended: eos, cap or context."""

    slot: int
    prompt: list[int]
    key: tuple[int, ...]
    cap: int
    sampled: list[int] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)
    values: list[float] = field(default_factory=list)
    stop: str = ""


class Engine:
    """Batched sampling from one model: `slots` dialogues at a time, of at most `capacity` tokens.

    temperature 0 is greedy, with the log-probabilities of temperature 1. With a `value_head` an id
    also gets the critic's value of the state before it. Call `forget` whenever the weights change.
    """

    def __init__(
        self, model: Transformer, banned_V: Tensor, stop_ids: tuple[int, ...], slots: int,
        capacity: int, temperature: float, value_head: ValueHead | None = None,
        dtype: torch.dtype | None = None,
    ):  # fmt: skip
        c, weight = model.config, model.output_weight
        self.model, self.banned, self.stop_ids = model, banned_V.to(weight.device), stop_ids
        self.capacity, self.temperature, self.value_head = capacity, temperature, value_head
        shape = (c.num_layers, slots, c.num_kv_heads, capacity, c.head_dim)
        self.cache = KVCache(shape, dtype or weight.dtype, weight.device)
        self.held: list[list[int]] = [[] for _ in range(slots)]  # ids whose KV each slot holds
        self.waiting: list[Row] = []
        self.live: list[Row] = []
        self.tokens_sampled = self.tokens_prefilled = 0

    @property
    def busy(self) -> bool:
        """Whether `step` has something to do."""
        return bool(self.waiting or self.live)

    def forget(self) -> None:
        """Drop all rows, keys and values: they belong to the weights that made them."""
        self.cache.k.zero_()  # a NaN left behind would survive its mask: 0 x NaN is NaN
        self.cache.v.zero_()
        self.held = [[] for _ in self.held]
        self.waiting, self.live = [], []

    def submit(self, slot: int, prompt: list[int], key: tuple[int, ...], cap: int) -> None:
        """Queue a turn of at most `cap` ids, fewer if the slot is full; `key` seeds its noise."""
        size, capacity = len(prompt), self.capacity
        if size >= capacity:
            raise ValueError(f"a prompt of {size} tokens leaves no room in a slot of {capacity}")
        self.waiting.append(Row(slot, prompt, key, min(cap, capacity - size)))

    @torch.no_grad()
    def step(self) -> list[Row]:
        """Prefill what waits, else decode one token a live row; returns the ended rows, by slot."""
        rows = sorted(self.waiting or self.live, key=lambda row: row.slot)
        hidden = self.prefill(rows) if self.waiting else self.decode(rows)
        if self.waiting:
            self.live, self.waiting = self.live + rows, []
        self.sample(rows, hidden)
        self.live = [row for row in self.live if not row.stop]
        return [row for row in rows if row.stop]

    def prefill(self, rows: list[Row]) -> Tensor:
        """Bring each row's slot up to its prompt; hidden states [B, D] of the last prompt ids."""
        last, batch, size = [], [], 0
        starts = {row.slot: self.keep(row) for row in rows}
        for row in rows:
            count = len(row.prompt) - starts[row.slot]
            if batch and size + count > PREFILL:
                last.append(self.prefill_batch(batch, starts))
                batch, size = [], 0
            batch.append(row)
            size += count
        last.append(self.prefill_batch(batch, starts))
        return torch.cat(last)

    def keep(self, row: Row) -> int:
        """How many ids of the prompt the slot holds; the last is redone, for its hidden state."""
        held, limit, common = self.held[row.slot], len(row.prompt) - 1, 0
        while common < min(len(held), limit) and held[common] == row.prompt[common]:
            common += 1
        self.held[row.slot] = list(row.prompt)
        return common

    def prefill_batch(self, rows: list[Row], starts: dict[int, int]) -> Tensor:
        device = self.cache.k.device
        begins = [starts[row.slot] for row in rows]
        counts = [len(row.prompt) - begin for row, begin in zip(rows, begins)]
        ids = [t for row, begin in zip(rows, begins) for t in row.prompt[begin:]]
        positions = [t for row, begin in zip(rows, begins) for t in range(begin, len(row.prompt))]
        tokens, position = (torch.tensor(part, device=device) for part in (ids, positions))
        context = Prefill(self.cache, [row.slot for row in rows], begins, counts)
        self.tokens_prefilled += len(tokens)
        last = torch.tensor(counts, device=device).cumsum(0) - 1
        return self.model(tokens, position, context)[last]

    def decode(self, rows: list[Row]) -> Tensor:
        """Give each row's last sampled id its KV; hidden states [B, D] that predict the next."""
        device = self.cache.k.device
        behind = [len(row.prompt) + len(row.sampled) - 1 for row in rows]
        position = torch.tensor(behind, device=device)
        tokens = torch.tensor([row.sampled[-1] for row in rows], device=device)
        for row in rows:
            self.held[row.slot].append(row.sampled[-1])
        slots = torch.tensor([row.slot for row in rows], device=device)
        return self.model(tokens, position, Decode(self.cache, slots, position))

    def sample(self, rows: list[Row], hidden_BD: Tensor) -> None:
        """Add a sampled id to each row, set `stop`. Raises FloatingPointError if logits are NaN."""
        weight, temperature = self.model.output_weight, self.temperature or 1.0
        logits = sampling_logits(hidden_BD, weight, self.banned, temperature)
        total = logits.logsumexp(-1)
        if not torch.isfinite(total).all():
            raise FloatingPointError("logits are not finite during sampling")
        if self.temperature == 0:
            choice = logits.argmax(-1)
        else:
            noise = [uniform(*row.key, len(row.sampled)) for row in rows]
            noise_B = torch.tensor(noise, dtype=torch.float64, device=logits.device)
            choice = inverse_cdf(logits, noise_B)
        logp = logits.gather(-1, choice[:, None]).squeeze(-1) - total
        value = self.value_head(hidden_BD) if self.value_head else torch.zeros_like(logp)
        self.tokens_sampled += len(rows)
        for row, token, *numbers in zip(rows, choice.tolist(), logp.tolist(), value.tolist()):
            row.sampled.append(token)
            row.logps.append(numbers[0])
            row.values.append(numbers[1])
            if token in self.stop_ids:
                row.stop = "eos"
            elif len(row.sampled) == row.cap:
                row.stop = "context" if len(row.prompt) + row.cap == self.capacity else "cap"


def inverse_cdf(logits_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """One id a row: the first whose cumulative probability, in fp64, exceeds the row's uniform."""
    cumulative = logits_BV.softmax(-1).double().cumsum(-1)
    target = uniform_B[:, None] * cumulative[:, -1:]
    choice = torch.searchsorted(cumulative, target, right=True).squeeze(-1)
    last = (logits_BV > -math.inf).long().cumsum(-1).argmax(-1)  # the last id that is not banned
    return torch.minimum(choice, last)
