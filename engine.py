"""KV-cached batched generation: token ids in, token ids and log-probabilities out. Knows nothing of dialogues or text.

A dialogue owns one slot of the cache for its life. `submit` hands over a whole prompt; the engine keeps the longest
prefix that the slot already holds and prefills only the rest. So a second user turn costs its own tokens (and the last
sampled one, which has no KV yet), and cutting a thought out of the past needs no call of its own. `step` then either
prefills everything submitted (ragged) or decodes one token for every live row.

Sampling noise is counter-based: one hashed uniform a token, keyed by the request's key and the position within the
turn, never by row or rank. The same dialogue gets the same noise alone or in any batch.
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
    """Keys and values [layers, slots, G, capacity, K]. Which positions are valid is known to the attention contexts."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device):
        self.k = torch.zeros(shape, dtype=dtype, device=device)
        self.v = torch.zeros(shape, dtype=dtype, device=device)


class Prefill:
    """Attention context for ragged prefill: row i brings `counts[i]` new tokens behind the `starts[i]` it holds."""

    def __init__(self, cache: KVCache, slots: list[int], starts: list[int], counts: list[int]):
        self.cache, self.rows = cache, list(zip(slots, starts, counts))

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, begin = torch.empty_like(q), 0
        for slot, start, count in self.rows:
            piece, stop = slice(begin, begin + count), start + count
            keys, values = self.cache.k[layer, slot], self.cache.v[layer, slot]  # [G, capacity, K]
            keys[:, start:stop] = k[piece].transpose(0, 1)
            values[:, start:stop] = v[piece].transpose(0, 1)
            # is_causal is aligned to the top left, hence wrong behind a non-empty cache: the mask comes from lengths.
            position = torch.arange(stop, device=q.device)
            mask = position[None, :] <= position[start:, None]  # [count, stop]
            attended = F.scaled_dot_product_attention(
                q[piece].transpose(0, 1)[None], keys[None, :, :stop], values[None, :, :stop],
                attn_mask=mask, enable_gqa=True,
            )
            out[piece] = attended[0].transpose(0, 1)
            begin += count
        return out


class Decode:
    """Attention context for one new token a row; row i writes at `position[i]` of its slot and sees all up to there."""

    def __init__(self, cache: KVCache, slot_B: Tensor, position_B: Tensor):
        self.cache, self.slot, self.position = cache, slot_B, position_B
        self.reach = int(position_B.max()) + 1
        self.mask = (torch.arange(self.reach, device=slot_B.device) <= position_B[:, None])[:, None, None, :]

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = self.cache.k[layer], self.cache.v[layer]  # [slots, G, capacity, K]
        keys[self.slot, :, self.position] = k
        values[self.slot, :, self.position] = v
        groups = k.shape[1]
        query = q.unflatten(1, (groups, -1))  # [B, G, H/G, K]: cheaper than repeating keys for one-token queries
        out = F.scaled_dot_product_attention(
            query, keys[self.slot, :, : self.reach], values[self.slot, :, : self.reach], attn_mask=self.mask
        )
        return out.flatten(1, 2)


@dataclass
class Row:
    """One turn being sampled. `cap` bounds the sampled ids; `stop` is set when it ends: eos, cap or context."""

    slot: int
    prompt: list[int]
    key: tuple[int, ...]
    cap: int
    sampled: list[int] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)
    values: list[float] = field(default_factory=list)
    stop: str = ""


class Engine:
    """Batched sampling from one model. `slots` dialogues live at a time, each of at most `capacity` tokens.

    temperature 0 is greedy (log-probabilities are then those at temperature 1). With a `value_head` each sampled id
    also gets the critic's value of the state before it, from the hidden state at hand. Weights may change only between
    `forget` calls: stored keys and values belong to the weights that made them.
    """

    def __init__(
        self, model: Transformer, banned_V: Tensor, stop_ids: tuple[int, ...], slots: int, capacity: int,
        temperature: float, value_head: ValueHead | None = None, prefill_tokens: int = PREFILL,
        dtype: torch.dtype | None = None,
    ):
        c = model.config
        weight = model.output_weight
        self.model, self.banned, self.stop_ids = model, banned_V.to(weight.device), stop_ids
        self.capacity, self.temperature, self.prefill_tokens = capacity, temperature, prefill_tokens
        self.value_head = value_head
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
        """Drop all stored keys, values and rows: after every weight update."""
        self.cache.k.zero_()  # a NaN left behind would survive its mask: 0 x NaN is NaN
        self.cache.v.zero_()
        self.held = [[] for _ in self.held]
        self.waiting, self.live = [], []

    def submit(self, slot: int, prompt: list[int], key: tuple[int, ...], cap: int) -> None:
        """Queue one turn: sample up to `cap` ids behind `prompt`, less where the slot ends. `key` names its noise."""
        room = self.capacity - len(prompt)
        if room < 1:
            raise ValueError(f"a prompt of {len(prompt)} tokens leaves no room in a slot of {self.capacity}")
        self.waiting.append(Row(slot, prompt, key, min(cap, room)))

    @torch.no_grad()
    def step(self) -> list[Row]:
        """Prefill all that waits, or else decode one token a live row. Returns the rows that ended, in slot order.

        Raises FloatingPointError for logits that are not finite.
        """
        rows = sorted(self.waiting or self.live, key=lambda row: row.slot)
        hidden = self.prefill(rows) if self.waiting else self.decode(rows)
        if self.waiting:
            self.live, self.waiting = self.live + rows, []
        self.sample(rows, hidden)
        ended = [row for row in rows if row.stop]
        self.live = [row for row in self.live if not row.stop]
        return ended

    def prefill(self, rows: list[Row]) -> Tensor:
        """Bring each row's slot up to its prompt; hidden states [B, D] of the last prompt tokens."""
        last, batch, size = [], [], 0
        starts = {row.slot: self.keep(row) for row in rows}
        for row in rows:
            count = len(row.prompt) - starts[row.slot]
            if batch and size + count > self.prefill_tokens:
                last.append(self.prefill_batch(batch, starts))
                batch, size = [], 0
            batch.append(row)
            size += count
        last.append(self.prefill_batch(batch, starts))
        return torch.cat(last)

    def keep(self, row: Row) -> int:
        """How many tokens of the prompt the slot holds; at least one is left to prefill, for its hidden state."""
        held, limit, common = self.held[row.slot], len(row.prompt) - 1, 0
        while common < min(len(held), limit) and held[common] == row.prompt[common]:
            common += 1
        self.held[row.slot] = list(row.prompt)
        return common

    def prefill_batch(self, rows: list[Row], starts: dict[int, int]) -> Tensor:
        device = self.cache.k.device
        begins = [starts[row.slot] for row in rows]
        counts = [len(row.prompt) - begin for row, begin in zip(rows, begins)]
        tokens = torch.tensor([t for row, begin in zip(rows, begins) for t in row.prompt[begin:]], device=device)
        position = torch.cat(
            [torch.arange(begin, begin + count, device=device) for begin, count in zip(begins, counts)]
        )
        context = Prefill(self.cache, [row.slot for row in rows], begins, counts)
        self.tokens_prefilled += len(tokens)
        return self.model(tokens, position, context)[torch.tensor(counts, device=device).cumsum(0) - 1]

    def decode(self, rows: list[Row]) -> Tensor:
        """Give each row's last sampled id its KV; hidden states [B, D] that predict the next."""
        device = self.cache.k.device
        position = torch.tensor([len(row.prompt) + len(row.sampled) - 1 for row in rows], device=device)
        tokens = torch.tensor([row.sampled[-1] for row in rows], device=device)
        for row in rows:
            self.held[row.slot].append(row.sampled[-1])
        slots = torch.tensor([row.slot for row in rows], device=device)
        return self.model(tokens, position, Decode(self.cache, slots, position))

    def sample(self, rows: list[Row], hidden_BD: Tensor) -> None:
        """Append one sampled id and its log-probability to each row, and set `stop` where the turn ends."""
        logits = sampling_logits(hidden_BD, self.model.output_weight, self.banned, self.temperature or 1.0)
        total = logits.logsumexp(-1)
        if not torch.isfinite(total).all():
            raise FloatingPointError("logits are not finite during sampling")
        if self.temperature == 0:
            choice = logits.argmax(-1)
        else:
            noise = [uniform(*row.key, len(row.sampled)) for row in rows]
            choice = inverse_cdf(logits, torch.tensor(noise, dtype=torch.float64, device=logits.device))
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
    """One id per row: the first whose cumulative probability exceeds the row's uniform. fp64 sums: the tail counts."""
    cumulative = logits_BV.softmax(-1).double().cumsum(-1)
    target = uniform_B[:, None] * cumulative[:, -1:]
    choice = torch.searchsorted(cumulative, target, right=True).squeeze(-1)
    last = (logits_BV > -math.inf).long().cumsum(-1).argmax(-1)  # the last id that is not banned
    return torch.minimum(choice, last)
