"""The Transformer: Qwen2/2.5, Qwen3 and Llama in one class, with or without low-rank adapters.

Module names are Hugging Face's, so that checkpoint.py can load weights without a map. `forward`
takes packed token ids, their positions, and an attention context `attend(layer, q, k, v) -> out`:
`PackedAttention` below for training (documents side by side), those of engine.py for generation.

LoRA: `add_adapters` freezes the weights and puts named adapters beside them. An argument of
`forward` chooses one, so that one frozen base is the policy, the critic and the reference.

Shape suffixes: T packed tokens, N trained tokens, D width, H query heads, G key/value heads,
K head width, V vocabulary.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from config import InputError
from kernels import Packed, linear

CHUNK = 1 << 25  # logits that exist at the same time in training
BANNED = -1e30  # logit of an id that must not be sampled; minus infinity would make 0 x inf
FAMILIES = {"qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM", "llama": "LlamaForCausalLM"}
Rope = tuple[Tensor, Tensor]  # cosines and sines of the rotary embedding


@dataclass(frozen=True)
class ModelConfig:
    """What the architecture needs to know, read from a Hugging Face config.json."""

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float
    norm_eps: float
    tied: bool
    qkv_bias: bool
    output_bias: bool
    qk_norm: bool
    max_position: int
    init_std: float = 0.02

    @classmethod
    def from_hf(cls, raw: dict, where: str) -> "ModelConfig":
        """From a config.json. Raises InputError for what this model cannot compute exactly."""
        family = raw.get("model_type")
        if family not in FAMILIES:
            known = f"known are {', '.join(FAMILIES)}"
            raise InputError(f"{where}: architecture {family!r} is not supported; {known}")
        rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
        scaling = rope.get("rope_type", rope.get("type", "default"))
        if scaling != "default":
            advice = "is not supported; use a model without it"
            raise InputError(f"{where}: rope scaling {scaling!r} {advice}")
        activation = raw.get("hidden_act", "silu")
        if raw.get("use_sliding_window") or raw.get("mlp_bias") or activation != "silu":
            unable = "sliding windows, MLP biases and activations other than silu are not supported"
            raise InputError(f"{where}: {unable}")
        try:
            heads, bias = raw["num_attention_heads"], raw.get("attention_bias", False)
            return cls(
                family=family, num_layers=raw["num_hidden_layers"], vocab_size=raw["vocab_size"],
                hidden_size=raw["hidden_size"], intermediate_size=raw["intermediate_size"],
                num_heads=heads, num_kv_heads=raw.get("num_key_value_heads") or heads,
                head_dim=raw.get("head_dim") or raw["hidden_size"] // heads,
                rope_theta=float(rope.get("rope_theta") or raw.get("rope_theta") or 10000.0),
                norm_eps=raw["rms_norm_eps"], tied=raw.get("tie_word_embeddings", False),
                qkv_bias=family == "qwen2" or bias, output_bias=bias and family != "qwen2",
                qk_norm=family == "qwen3", max_position=raw["max_position_embeddings"],
                init_std=raw.get("initializer_range", 0.02),
            )  # fmt: skip
        except KeyError as error:
            problem = f"key {error} is missing; is this a model's config.json?"
            raise InputError(f"{where}: {problem}") from None


def find_folder(name: str, weights: bool = True) -> Path:
    """The local folder of a model: `name` itself, or the hub's snapshot; InputError if none."""
    if Path(name).is_dir():
        return Path(name)
    if name.count("/") != 1 or name.startswith((".", "/", "models/", "runs/")):  # no hub name
        make = "`make demo` makes models/smollm2-135m-instruct"
        give = "or give a hub name like Qwen/Qwen2.5-7B-Instruct"
        raise InputError(f"{name}: no such model folder; {make}, {give}")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    wanted = ["*.json", "merges.txt", "*.jinja"] + ["*.safetensors"] * weights
    try:
        return Path(snapshot_download(name, allow_patterns=wanted))
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        why = f"neither a folder here nor to be had from the hub ({type(error).__name__})"
        raise InputError(f"{name}: {why}") from None


def rope_tables(position_T: Tensor, head_dim: int, theta: float) -> Rope:
    """cos and sin, [T, 1, K] fp32, the first half of sin negative, as `rotate` wants it."""
    # As buffers they would be cast to bf16, and lost on meta.
    even = torch.arange(0, head_dim, 2, dtype=torch.float32, device=position_T.device)
    frequency = theta ** (-even / head_dim)
    angle = position_T.float()[:, None] * frequency
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x [T, heads, K], halves paired as in Hugging Face's checkpoints."""
    wide = x.float()
    left, right = wide.chunk(2, dim=-1)
    return torch.addcmul(wide * cos, torch.cat([right, left], dim=-1), sin).to(x.dtype)


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), (x.shape[-1],), eps=self.eps).to(x.dtype) * self.weight


class Linear(nn.Linear):
    """W x + b, plus scale * B A x of a named adapter, if any (LoRA, arXiv 2106.09685, section 4.1).

    A [r, in] starts random and B [out, r] at zero, so that a new adapter changes nothing.
    """

    def __init__(self, width_in: int, width_out: int, bias: bool):
        super().__init__(width_in, width_out, bias)
        self.lora_A, self.lora_B, self.scale = nn.ModuleDict(), nn.ModuleDict(), 1.0
        self.packed: Packed | None = None  # in a rollout: this layer and those beside it

    def forward(self, x: Tensor, adapter: str | None = None) -> Tensor:
        return side_by_side(x, (self,), adapter)[0]


def side_by_side(x: Tensor, layers: tuple[Linear, ...], adapter: str | None) -> list[Tensor]:
    """The outputs of layers that read the same input, in one product where they are packed."""
    packed = None if torch.is_grad_enabled() else layers[0].packed
    outs = packed(x) if packed else [linear(x, layer.weight, layer.bias) for layer in layers]
    return [
        out + layer.scale * layer.lora_B[adapter](layer.lora_A[adapter](x))
        if adapter in layer.lora_A else out
        for layer, out in zip(layers, outs)
    ]  # fmt: skip


class Attention(nn.Module):
    def __init__(self, c: ModelConfig):
        super().__init__()
        self.head_dim = c.head_dim
        self.q_proj = Linear(c.hidden_size, c.num_heads * c.head_dim, bias=c.qkv_bias)
        self.k_proj = Linear(c.hidden_size, c.num_kv_heads * c.head_dim, bias=c.qkv_bias)
        self.v_proj = Linear(c.hidden_size, c.num_kv_heads * c.head_dim, bias=c.qkv_bias)
        self.o_proj = Linear(c.num_heads * c.head_dim, c.hidden_size, bias=c.output_bias)
        self.q_norm = RMSNorm(c.head_dim, c.norm_eps) if c.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(c.head_dim, c.norm_eps) if c.qk_norm else nn.Identity()

    def forward(self, x_TD: Tensor, rope: Rope, layer: int, attend, adapter: str | None) -> Tensor:
        projected = side_by_side(x_TD, (self.q_proj, self.k_proj, self.v_proj), adapter)
        q, k, v = (x.unflatten(-1, (-1, self.head_dim)) for x in projected)
        q, k = rotate(self.q_norm(q), *rope), rotate(self.k_norm(k), *rope)
        return self.o_proj(attend(layer, q, k, v).flatten(-2), adapter)


class MLP(nn.Module):
    def __init__(self, c: ModelConfig):
        super().__init__()
        self.gate_proj = Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.up_proj = Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.down_proj = Linear(c.intermediate_size, c.hidden_size, bias=False)

    def forward(self, x: Tensor, adapter: str | None) -> Tensor:
        gate, up = side_by_side(x, (self.gate_proj, self.up_proj), adapter)
        return self.down_proj(F.silu(gate) * up, adapter)


class Block(nn.Module):
    def __init__(self, c: ModelConfig):
        super().__init__()
        self.self_attn = Attention(c)
        self.mlp = MLP(c)
        self.input_layernorm = RMSNorm(c.hidden_size, c.norm_eps)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.norm_eps)

    def forward(self, x: Tensor, rope: Rope, layer: int, attend, adapter: str | None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rope, layer, attend, adapter)
        return x + self.mlp(self.post_attention_layernorm(x), adapter)


class Trunk(nn.Module):
    """Embedding, blocks and final norm: what policy and critic have in common."""

    def __init__(self, c: ModelConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Block(c) for _ in range(c.num_layers))
        self.norm = RMSNorm(c.hidden_size, c.norm_eps)


class Transformer(nn.Module):
    """A causal language model: `forward` gives hidden states, `output_weight` makes them logits."""

    def __init__(self, raw: dict, where: str = "config.json"):
        super().__init__()
        self.raw = raw  # the Hugging Face config.json, which save_model writes back
        self.config = c = ModelConfig.from_hf(raw, where)
        self.model = Trunk(c)
        self.lm_head = None if c.tied else nn.Linear(c.hidden_size, c.vocab_size, bias=False)
        self.packed_output: Packed | None = None
        self.checkpointing = False
        self.sharded_type: torch.dtype | None = None  # of forward, where FSDP casts the weights

    @property
    def output_weight(self) -> Tensor:
        """The output layer's weight [V, D]."""
        return self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    def pack(self, wanted: bool = True) -> None:
        """Lay weights out for generation, or drop that; to be done anew when they change."""
        for block in self.model.layers:
            a, m = block.self_attn, block.mlp
            for layers in ((a.q_proj, a.k_proj, a.v_proj), (a.o_proj,),
                           (m.gate_proj, m.up_proj), (m.down_proj,)):  # fmt: skip
                weights, biases = zip(*((layer.weight, layer.bias) for layer in layers))
                layers[0].packed = Packed(weights, biases) if wanted else None
        self.packed_output = Packed([self.output_weight], [None]) if wanted else None

    def forward(self, tokens_T: Tensor, position_T: Tensor, attend,
                adapter: str | None = "policy") -> Tensor:  # fmt: skip
        """Final hidden states [T, D]; `attend(layer, q_THK, k_TGK, v_TGK)` returns [T, H, K]."""
        x = self.model.embed_tokens(tokens_T)
        rope = rope_tables(position_T, self.config.head_dim, self.config.rope_theta)
        for index, block in enumerate(self.model.layers):
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, rope, index, attend, adapter, use_reentrant=False)
            else:
                x = block(x, rope, index, attend, adapter)
        return self.model.norm(x)


def add_adapters(model: Transformer, names: list[str], rank: int, alpha: float,
                 targets: list[str]) -> None:  # fmt: skip
    """Freeze the model, put fp32 adapters beside the `targets` ("q_proj", ...) of every block."""
    model.requires_grad_(False)
    for path, layer in model.model.layers.named_modules():
        if isinstance(layer, Linear) and path.rpartition(".")[2] in targets:
            layer.scale = alpha / rank
            device = layer.weight.device
            for name in names:
                layer.lora_A[name] = nn.Linear(layer.in_features, rank, bias=False, device=device)
                layer.lora_B[name] = nn.Linear(rank, layer.out_features, bias=False, device=device)


class ValueHead(nn.Module):
    """Hidden states [N, D] to values [N] in fp32. At first every value is `start`."""

    def __init__(self, width: int, start: float = 0.0):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))
        self.bias = nn.Parameter(torch.tensor(start))

    def forward(self, hidden_ND: Tensor) -> Tensor:
        return hidden_ND.float() @ self.weight + self.bias


try:  # the symbol, not the module: flash-attn-4 alone imports as flash_attn without it
    from flash_attn import flash_attn_varlen_func
except ImportError:
    flash_attn_varlen_func = None


class PackedAttention:
    """Attention context for training: documents side by side, each causal within itself.

    `cu_seqlens` are the documents' ends, [0, len_0, len_0 + len_1, ...]. flash-attn is used on CUDA
    in half precision, else a loop of scaled_dot_product_attention over the documents.
    """

    def __init__(self, cu_seqlens: list[int], device: torch.device):
        self.lengths = [end - begin for begin, end in zip(cu_seqlens[:-1], cu_seqlens[1:])]
        self.longest = max(self.lengths)
        self.cu_seqlens = torch.tensor(cu_seqlens, dtype=torch.int32, device=device)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if flash_attn_varlen_func is not None and q.is_cuda and q.dtype != torch.float32:
            ends, longest = self.cu_seqlens, self.longest
            return flash_attn_varlen_func(q, k, v, ends, ends, longest, longest, causal=True)
        # each piece [1, heads, t, K]
        split = (x.transpose(0, 1).unsqueeze(0).split(self.lengths, dim=2) for x in (q, k, v))
        attention = F.scaled_dot_product_attention
        pieces = [attention(*qkv, is_causal=True, enable_gqa=True) for qkv in zip(*split)]
        return torch.cat(pieces, dim=2)[0].transpose(0, 1)


def predictors(mask_T: Tensor) -> Tensor:
    """Indices [N] of the hidden states that predict the trained tokens: t - 1 where mask[t] is 1.

    The only place that shifts by one. Documents begin with prompt, so t - 1 is in the same one.
        tokens  P P S S P S      mask  0 0 1 1 0 1      trained t  2 3 5      predictors  1 2 4
    """
    return mask_T.nonzero().squeeze(1) - 1


class TokenLogprobs(torch.autograd.Function):
    """Log-probabilities and entropies of softmax over logits that exist a chunk at a time.

    With z the logits, p = softmax(z), y the target and H = -sum(p log p):
        d log p_y / dz = onehot(y) - p          dH / dz = -p (log p + H)
    The backward pass computes a chunk's logits again; p then turns into the gradient in place.
    """

    @staticmethod
    def forward(ctx, hidden_ND, weight_VD, target_N, banned_V, temperature, bonus):
        total_N, chosen_N, entropy_N = hidden_ND.new_empty(3, len(target_N), dtype=torch.float32)
        for s in chunks(hidden_ND, weight_VD):
            logits = sampling_logits(hidden_ND[s], weight_VD, banned_V, temperature)
            highest = logits.amax(-1, keepdim=True)
            odds = (logits - highest).exp_()
            norm = odds.sum(-1)
            total_N[s] = highest.squeeze(-1) + norm.log()
            chosen_N[s] = logits.gather(-1, target_N[s, None]).squeeze(-1)
            mean = torch.bmm(odds[:, None], logits[:, :, None]).flatten() / norm
            entropy_N[s] = total_N[s] - mean
            del logits, odds  # or they would be there while the next chunk's are made
        ctx.save_for_backward(hidden_ND, weight_VD, target_N, banned_V, total_N, entropy_N)
        ctx.temperature, ctx.bonus = temperature, bonus
        return chosen_N - total_N, entropy_N

    @staticmethod
    def backward(ctx, grad_logp_N, grad_entropy_N):
        hidden_ND, weight_VD, target_N, banned_V, total_N, entropy_N = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden_ND)
        grad_weight = torch.zeros_like(weight_VD) if ctx.needs_input_grad[1] else None
        for s in chunks(hidden_ND, weight_VD):
            logits = sampling_logits(hidden_ND[s], weight_VD, banned_V, ctx.temperature)
            logp = logits.sub_(total_N[s, None])
            scale = -grad_logp_N[s, None]
            if ctx.bonus:
                scale = (logp + entropy_N[s, None]).mul_(-grad_entropy_N[s, None]).add_(scale)
            slope = logp.exp_().mul_(scale)
            slope.scatter_add_(-1, target_N[s, None], grad_logp_N[s, None])
            slope = slope.div_(ctx.temperature).to(hidden_ND.dtype)
            grad_hidden[s] = linear(slope, weight_VD.t())
            if grad_weight is not None:
                grad_weight.addmm_(slope.t(), hidden_ND[s])
            del logits, logp, scale, slope
        return grad_hidden, grad_weight, None, None, None, None


def chunks(hidden_ND: Tensor, weight_VD: Tensor) -> list[slice]:
    """Slices of the tokens, with at most CHUNK logits in each."""
    step = max(1, CHUNK // len(weight_VD))
    return [slice(a, a + step) for a in range(0, len(hidden_ND), step)]


def token_logprobs(hidden_ND: Tensor, weight_VD: Tensor, target_N: Tensor, banned_V: Tensor,
                   temperature: float, bonus: bool = True) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Log-probabilities of the targets, and entropies, of softmax(logits / temperature); fp32 [N].

    Banned ids have probability zero, as in the sampler. Logits [N, V] never exist as a whole. The
    entropies have a gradient only with `bonus`, since it costs a pass over the vocabulary.
    """
    return TokenLogprobs.apply(hidden_ND, weight_VD, target_N, banned_V, temperature, bonus)


def sampling_logits(hidden_ND: Tensor, output: Tensor | Packed, banned_V: Tensor,
                    temperature: float) -> Tensor:  # fmt: skip
    """fp32 logits [N, V] to sample from and train on, over the temperature; banned ids: BANNED."""
    product = output(hidden_ND)[0] if isinstance(output, Packed) else linear(hidden_ND, output)
    logits = product.float().masked_fill_(banned_V, BANNED)
    return logits.div_(temperature) if temperature != 1 else logits
