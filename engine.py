"""KV-cached batched generation: token ids in, token ids and log-probabilities out.

A dialogue owns one slot of the cache for its life. `submit` takes a whole prompt; the engine keeps
the longest prefix that the slot holds, copies what another slot holds beyond that, and prefills
only the rest. So a second user turn costs its own tokens (and the last sampled one, which has no KV
yet), a group computes its prompt once, and a thought may be cut out of the past without a call of
its own. `step` prefills all that was submitted, or decodes one token a live row.

What a decode step reads and writes are tensors with an entry a slot, so it is the same few kernels
whoever is live, and on a GPU one CUDA graph. The host waits once a step, to learn which rows ended.

Sampling noise is counter-based: one hashed uniform a token, keyed by the request's key and the
position within the turn, never by row or rank. So a dialogue gets the same noise in any batch.

Shape suffixes: S slots, C capacity, B rows of a batch; V, D, G, H, K as in model.py.
"""

import math
from dataclasses import dataclass, field
from operator import attrgetter

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from kernels import packable
from model import Transformer, ValueHead, sampling_logits
from simulator import hash_key

try:
    from flash_attn import flash_attn_with_kvcache
except ImportError:
    flash_attn_with_kvcache = None

PREFILL = 4096  # tokens of one prefill batch at most, but for a longer prompt
BLOCK = 256  # ids whose probabilities are summed before one of them is looked for
REACH = 256  # a CUDA graph's attention spans a multiple of this
Captured = tuple[torch.cuda.CUDAGraph, Tensor, Tensor]  # and where it reads slots, writes codes
by_slot = attrgetter("slot")
LIVE, EOS, LIMIT, NOT_FINITE = range(4)  # what a step says of a row


def uniforms(key: tuple[int, ...], count: int) -> Tensor:
    """`count` uniforms in (0, 1), fp64; number t is a function of (*key, t) alone."""
    bits = hash_key(*key, numpy.arange(count, dtype=numpy.uint64))
    return torch.from_numpy(((bits >> 12) + 0.5) / (1 << 52))


@dataclass(frozen=True)
class Sampling:
    """What is sampled and how; temperature 0 is greedy, with the log-probs of temperature 1."""

    banned_V: Tensor
    stop_ids: tuple[int, ...] = ()
    temperature: float = 1.0


@dataclass
class Row:
    """One turn, of at most `cap` sampled ids; `stop` says why it has ended: eos, cap or context."""

    slot: int
    prompt: list[int]
    key: tuple[int, ...]
    cap: int
    begun: int = 0  # the engine's clock at the first sampled id
    sampled: list[int] = field(default_factory=list)  # these three are filled when it ends
    logps: list[float] = field(default_factory=list)
    values: list[float] = field(default_factory=list)
    stop: str = ""


@dataclass
class Span:
    """A row's part of a prefill: ids `start` to `stop` go into `slot`, behind what it holds.

    Of that, what lies from `own` on is a copy of the same ids in the slot `donor`.
    """

    slot: int
    donor: int
    own: int
    start: int
    stop: int


class Prefill:
    """Attention context for ragged prefill: each span's new tokens see all before them.

    The cache [2, layers, slots, G, capacity, K] holds keys and values; contexts know what is valid.
    """

    def __init__(self, cache: Tensor, spans: list[Span]):
        self.cache, self.spans = cache, spans

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, begin = torch.empty_like(q), 0
        for s in self.spans:  # in order: a donor may have got its keys a moment ago
            piece, copied = slice(begin, begin + s.stop - s.start), slice(s.own, s.start)
            for cached, new in zip(self.cache[:, layer], (k, v)):
                if s.start > s.own:
                    cached[s.slot, :, copied] = cached[s.donor, :, copied]
                cached[s.slot, :, s.start : s.stop] = new[piece].transpose(0, 1)
            # is_causal aligns its triangle to the top left: that is wrong behind a filled cache.
            position = torch.arange(s.stop, device=q.device)
            mask = position[None, :] <= position[s.start :, None]  # [new, stop]
            held = self.cache[:, layer, None, s.slot, :, : s.stop]  # [2, 1, G, stop, K]
            query = q[piece].transpose(0, 1)[None]
            attended = F.scaled_dot_product_attention(query, *held, mask, enable_gqa=True)
            out[piece] = attended[0].transpose(0, 1)
            begin = piece.stop
        return out


class Decode:
    """Attention context for one new token a row, at `position[i]`; it sees all up to there.

    Made for the rows in `slot_B`. Where they lie densely in the cache, the slots from the first to
    the last are read in place, and those in between to no avail; else rows are copied out first
    (always where `slots` is empty, for a graph whose rows change).
    """

    def __init__(self, cache: Tensor, slot_B: Tensor, slots: list[int]):
        self.cache, self.slot, self.read, self.place = cache, slot_B, slot_B, None
        low, high = min(slots, default=0), max(slots, default=0) + 1
        if high - low < 2 * len(slots):
            self.read = slice(low, high)
            if high - low > len(slots):
                self.place, self.count = slot_B - low, high - low
        half = cache.is_cuda and cache.dtype != torch.float32
        self.flash = flash_attn_with_kvcache if half else None

    def at(self, position_B: Tensor, reach: int) -> "Decode":
        """Go to these positions, all of them below `reach`."""
        self.position, self.reach = position_B, reach
        if self.flash:
            return self
        unseen = torch.arange(reach, device=position_B.device) > self.spread(position_B)[:, None]
        mask = torch.zeros(unseen.shape, dtype=self.cache.dtype, device=position_B.device)
        self.mask = mask.masked_fill_(unseen, -math.inf)[:, None, None, :]  # [B, 1, 1, reach]
        return self

    def spread(self, x_B: Tensor) -> Tensor:
        """Rows at their places among the slots that are read, zeros in between."""
        if self.place is None:
            return x_B
        return x_B.new_zeros(self.count, *x_B.shape[1:]).index_copy_(0, self.place, x_B)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = self.cache[:, layer]  # [slots, G, capacity, K] each
        if self.flash:
            before, slots = self.position.int(), self.slot.int()
            kv = keys.transpose(1, 2), values.transpose(1, 2), k[:, None], v[:, None]
            return self.flash(q[:, None], *kv, cache_seqlens=before, cache_batch_idx=slots)[:, 0]
        keys[self.slot, :, self.position] = k
        values[self.slot, :, self.position] = v
        query = self.spread(q.unflatten(1, (k.shape[1], -1)))  # [B, G, H/G, K]: no repeated keys
        keys, values = (x[:, :, : self.reach][self.read] for x in (keys, values))
        out = F.scaled_dot_product_attention(query, keys, values, attn_mask=self.mask).flatten(1, 2)
        return out if self.place is None else out[self.place]


class Engine:
    """Batched sampling from one model: `slots` dialogues at a time, of at most `capacity` tokens.

    With a `value_head` an id also gets the critic's value of the state before it. Call `forget`
    whenever the weights change.
    """

    def __init__(self, model: Transformer, sampling: Sampling, slots: int, capacity: int,
                 value_head: ValueHead | None = None):  # fmt: skip
        c, device = model.config, model.output_weight.device
        self.model, self.value_head, self.capacity = model, value_head, capacity
        self.banned, self.temperature = sampling.banned_V.to(device), sampling.temperature
        self.stop_ids = torch.tensor(sampling.stop_ids, dtype=torch.long, device=device)
        graphs, self.spare = device.type == "cuda" and not isinstance(model, FSDPModule), slots
        size = slots + graphs  # one more, which nobody owns, fills up a graph's batch
        shape = (2, c.num_layers, size, c.num_kv_heads, capacity, c.head_dim)
        kind = model.sharded_type or model.output_weight.dtype
        self.cache = torch.zeros(shape, dtype=kind, device=device)
        self.position = torch.zeros(size, dtype=torch.long, device=device)  # of the last sampled id
        self.limit = torch.full_like(self.position, capacity - 1)  # its last position
        self.ids = torch.zeros(size, capacity, dtype=torch.long, device=device)
        self.noise = torch.zeros(size, capacity, dtype=torch.float64, device=device)
        self.logp, self.value = torch.zeros(2, size, capacity, device=device)
        self.held: list[list[int]] = [[] for _ in range(slots)]  # ids whose KV each slot holds
        self.waiting: list[Row] = []
        self.live: list[Row] = []  # by slot
        self.context: Decode | None = None  # of the live rows
        self.graphs = Graphs() if graphs else None
        self.clock = self.tokens_sampled = self.tokens_prefilled = 0

    @property
    def busy(self) -> bool:
        """Whether `step` has something to do."""
        return bool(self.waiting or self.live)

    def forget(self) -> None:
        """Drop all rows, keys, values and packed weights: they belong to weights that are gone."""
        self.cache.zero_()  # a NaN left behind would survive its mask: 0 x NaN is NaN
        self.waiting, self.live, self.held = [], [], [[] for _ in self.held]
        self.model.pack(False)

    def submit(self, slot: int, prompt: list[int], key: tuple[int, ...], cap: int) -> None:
        """Queue a turn of at most `cap` ids, fewer if the slot is full; `key` seeds its noise."""
        if (room := self.capacity - len(prompt)) < 1:
            raise ValueError(f"{len(prompt)} tokens leave no room in a slot of {self.capacity}")
        self.waiting.append(Row(slot, prompt, key, min(cap, room)))

    @torch.no_grad()
    def step(self) -> list[Row]:
        """Prefill what waits, else decode one token a live row; returns the ended rows, by slot.

        Raises FloatingPointError if logits are not finite.
        """
        if self.model.packed_output is None and packable(self.model.output_weight):
            self.model.pack()
        if self.waiting:
            rows, self.waiting = sorted(self.waiting, key=by_slot), []
            codes = self.prefill(rows).tolist()
            self.live, self.context = sorted(self.live + rows, key=by_slot), None
        else:
            rows, codes = self.live, self.decode().tolist()  # the step's one wait for the device
        if NOT_FINITE in codes:
            raise FloatingPointError("logits are not finite during sampling")
        self.tokens_sampled += len(rows)
        ended = [self.finish(row, code) for row, code in zip(rows, codes) if code]
        if ended:
            self.live, self.context = [row for row in self.live if not row.stop], None
        return ended

    def finish(self, row: Row, code: int) -> Row:
        """Fetch what an ended row has sampled."""
        found = (x[self.sampled(row)].tolist() for x in (self.ids, self.logp, self.value))
        row.sampled, row.logps, row.values = found
        full = len(row.prompt) + row.cap == self.capacity
        row.stop = "eos" if code == EOS else "context" if full else "cap"
        self.held[row.slot] = row.prompt + row.sampled[:-1]
        return row

    def sampled(self, row: Row) -> tuple[int, slice]:
        """Where a row that waits no longer has its ids in `ids`, and the like."""
        return row.slot, slice(size := len(row.prompt), size + self.clock - row.begun + 1)

    def prefill(self, rows: list[Row]) -> Tensor:
        """Bring each row's slot up to its prompt and sample an id; the rows' codes."""
        device, last, batch, size = self.position.device, [], [], 0
        for row in rows:
            span, begin, stop = self.keep(row), len(row.prompt), len(row.prompt) + row.cap
            self.noise[row.slot, begin:stop] = uniforms(row.key, row.cap).to(device)
            self.limit[row.slot], row.begun = stop - 1, self.clock
            if batch and size + span.stop - span.start > PREFILL:
                last.append(self.prefill_batch(batch))
                batch, size = [], 0
            batch.append((row, span))
            size += span.stop - span.start
        last.append(self.prefill_batch(batch))
        where = [[row.slot for row in rows], [len(row.prompt) for row in rows]]
        return self.sample(torch.cat(last), *torch.tensor(where, device=device))

    def keep(self, row: Row) -> Span:
        """What is left to prefill; the prompt's last id in any case, for its hidden state."""
        prompt, limit = row.prompt, len(row.prompt) - 1
        donor, own = row.slot, common(self.held[row.slot], prompt, 0)
        start = min(own, limit)
        for slot, held in enumerate(self.held):
            found = min(common(held, prompt, start), limit)
            if found > start:
                donor, start = slot, found
        self.held[row.slot] = prompt
        return Span(row.slot, donor, min(own, limit), start, len(prompt))

    def prefill_batch(self, batch: list[tuple[Row, Span]]) -> Tensor:
        """Hidden states [B, D] of the last ids of prompts."""
        device, spans = self.position.device, [span for _, span in batch]
        ids = [t for row, span in batch for t in row.prompt[span.start :]]
        positions = [t for span in spans for t in range(span.start, span.stop)]
        tokens, position = torch.tensor([ids, positions], device=device)
        self.tokens_prefilled += len(ids)
        counts = torch.tensor([span.stop - span.start for span in spans], device=device)
        return self.model(tokens, position, Prefill(self.cache, spans))[counts.cumsum(0) - 1]

    def decode(self) -> Tensor:
        """Sample an id for each live row; the rows' codes."""
        self.clock += 1
        if self.context is None:
            slots = [row.slot for row in self.live]
            self.slots = torch.tensor(slots, device=self.position.device)
            self.context = Decode(self.cache, self.slots, slots)
            self.behind = max(len(row.prompt) - row.begun for row in self.live)
        if self.graphs:
            return self.graphs.step(self, self.slots, self.behind + self.clock)
        return self.advance(self.slots, self.context, self.behind + self.clock)

    def advance(self, slot_B: Tensor, context: Decode, reach: int) -> Tensor:
        """A decode step on the device alone: no number of it is needed on the host."""
        position = self.position[slot_B]
        tokens = self.ids[slot_B, position]
        hidden = self.model(tokens, position, context.at(position, reach))
        # Only the slot that nobody owns would ever go beyond the last position.
        return self.sample(hidden, slot_B, (position + 1).clamp_max(self.capacity - 1))

    def sample(self, hidden_BD: Tensor, slot_B: Tensor, position_B: Tensor) -> Tensor:
        """Sample an id a row, write it down at `position_B` of its slot; the rows' codes [B]."""
        output = self.model.packed_output or self.model.output_weight
        logits = sampling_logits(hidden_BD, output, self.banned, self.temperature or 1.0)
        odds = logits.sub_(logits.amax(-1, keepdim=True)).exp_()
        sums = block_sums(odds)
        total = sums.sum(-1)
        choice = self.choose(odds, sums, slot_B, position_B)
        logp = (odds.gather(-1, choice[:, None]).squeeze(-1) / total).log().float()
        self.ids[slot_B, position_B], self.logp[slot_B, position_B] = choice, logp
        if self.value_head:
            self.value[slot_B, position_B] = self.value_head(hidden_BD)
        self.position[slot_B] = position_B
        code = torch.where(position_B == self.limit[slot_B], LIMIT, LIVE)
        code = torch.where((choice[:, None] == self.stop_ids).any(-1), EOS, code)
        return torch.where(torch.isfinite(total), code, NOT_FINITE)

    def choose(self, odds: Tensor, sums: Tensor, slot_B: Tensor, position_B: Tensor) -> Tensor:
        """One id a row, by its odds; serve.py has a temperature for each."""
        noise = self.noise[slot_B, position_B]
        return odds.argmax(-1) if self.temperature == 0 else inverse_cdf(odds, sums, noise)


class Graphs:
    """Decode steps as CUDA graphs, one for each size of batch (powers of two) and reach.

    Rows that a batch lacks are the slot that nobody owns. flash-attn needs no reach. Weights must
    stay where they are, so those that FSDP gathers for a rollout are decoded without graphs. All
    share their memory: none is replayed before the last one's codes have been read.
    """

    def __init__(self):
        self.captured: dict[tuple[int, int], Captured] = {}
        self.pool = self.stream = None

    def step(self, engine: Engine, slot_B: Tensor, reach: int) -> Tensor:
        """`Engine.advance` by the graph that fits."""
        reach = engine.capacity if engine.context.flash else -(-reach // REACH) * REACH
        size = 1 << (len(slot_B) - 1).bit_length(), min(reach, engine.capacity)
        if size not in self.captured:
            self.captured[size] = self.capture(engine, *size)
        graph, place, code = self.captured[size]
        place.fill_(engine.spare)
        place[: len(slot_B)] = slot_B
        graph.replay()
        return code[: len(slot_B)]

    def capture(self, engine: Engine, batch: int, reach: int) -> Captured:
        """A graph, where it reads slots, and where it writes codes."""
        self.stream = self.stream or torch.cuda.Stream()
        self.pool = self.pool or torch.cuda.graph_pool_handle()
        place = torch.full((batch,), engine.spare, device=engine.position.device)
        context = Decode(engine.cache, place, [])
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):  # without a graph, so that libraries set themselves up
            engine.advance(place, context, reach)
        torch.cuda.current_stream().wait_stream(self.stream)
        graph, how = torch.cuda.CUDAGraph(), {"pool": self.pool, "stream": self.stream}
        with torch.cuda.graph(graph, capture_error_mode="thread_local", **how):  # NCCL has a thread
            code = engine.advance(place, context, reach)
        return graph, place, code


def common(held: list[int], prompt: list[int], begin: int) -> int:
    """The length of two lists' common beginning, or 0 where it is not longer than `begin`."""
    if held[begin : begin + 1] != prompt[begin : begin + 1] or held[:begin] != prompt[:begin]:
        return 0
    shorter = min(len(held), len(prompt))
    return next((i for i in range(begin, shorter) if held[i] != prompt[i]), shorter)


def block_sums(odds_BV: Tensor) -> Tensor:
    """Sums over blocks of ids [B, blocks], fp64."""
    blocks = odds_BV.shape[1] // BLOCK
    whole, rest = odds_BV.tensor_split([blocks * BLOCK], dim=1)
    sums = whole.reshape(len(odds_BV), blocks, BLOCK).sum(-1, dtype=torch.float64)
    return torch.cat([sums, rest.double().sum(-1, keepdim=True)], dim=-1)


def inverse_cdf(odds_BV: Tensor, sums: Tensor, uniform_B: Tensor) -> Tensor:
    """One id a row: the first whose cumulative odds exceed the row's uniform share of them all.

    Looks for the block of ids first, by the blocks' sums, then within it; both in fp64.
    """
    cumulative = sums.cumsum(-1)
    whole = cumulative[:, -1:]
    target = torch.minimum(uniform_B[:, None] * whole, whole.nextafter(torch.zeros_like(whole)))
    block = torch.searchsorted(cumulative, target, right=True).clamp_max(sums.shape[1] - 1)
    before = F.pad(cumulative, (1, 0)).gather(-1, block)
    offset = torch.arange(BLOCK, device=block.device)
    index = block * BLOCK + offset  # [B, BLOCK]
    inside = odds_BV.gather(-1, index.clamp_max(odds_BV.shape[1] - 1))
    inside = inside.double().masked_fill(index >= odds_BV.shape[1], 0.0)
    choice = torch.searchsorted(before + inside.cumsum(-1), target, right=True)
    last = ((inside > 0) * offset).amax(-1, keepdim=True)  # sums are rounded; never a banned id
    return (block * BLOCK + torch.minimum(choice, last)).squeeze(-1)
