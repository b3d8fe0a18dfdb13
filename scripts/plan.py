"""The memory plan: bytes per GPU of every part of a run, from a config and a model's dimensions
alone.

    python scripts/plan.py configs/ppo.py 8x80         8 GPUs of 80 GB;  4x8x80: four nodes of that kind
    python scripts/plan.py configs/ppo.py 8x80 model=Qwen/Qwen3-8B    any option may be changed

Neither GPUs nor weights are needed: a hub name is looked up in configs/shapes/ first. What is there
always (weights, gradients, Adam, KV cache) is listed apart from what comes and goes: rollout,
evaluation, and the two heights of the update, which are the loss (all kept activations and a chunk
of logits) and the backward pass through a block. The peak is what is always there and the largest
of these. bench/memory.py holds the plan against what processes use.

Letters as in model.py: T packed tokens, D width, H query heads, G key/value heads, K head width, V
vocabulary; I is the width of the MLP. A GB is 10^9 bytes; a GPU sold with 80 has about 85, the
difference is left to fragmentation.
"""

import re
import sys
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from config import Config, InputError, load_config, read_json, run_main  # noqa: E402
from engine import PREFILL  # noqa: E402
from model import CHUNK, ModelConfig, find_folder  # noqa: E402
from simulator import load_profiles  # noqa: E402

SHAPES = ROOT / "configs" / "shapes"
LOGITS = 8  # bytes a logit while a chunk is scored: two copies in fp32; under bf16 one in it too
SAMPLING = 16  # bytes a logit while a token is drawn: the product, in fp32, in fp64 to be summed
CUDA = 2_000_000_000  # an estimate, not measured: CUDA context, cuBLAS workspaces, NCCL buffers
ALWAYS, ROLLOUT, EVALUATION = "always", "rollout", "evaluation"
LOSS, BACKWARD = "update, at the loss", "update, within a block"


def model_shape(name: str) -> ModelConfig:
    """A model's dimensions: from a shape file, a local folder, configs/shapes/, or the hub. Raises
    InputError.
    """
    known = SHAPES / f"{name.rsplit('/', 1)[-1].lower()}.json"
    if name.endswith(".json"):
        path = Path(name)
    elif not Path(name).is_dir() and known.is_file():
        path = known
    else:
        path = find_folder(name, weights=False) / "config.json"
    return ModelConfig.from_hf(read_json(path), str(path))


def linears(c: ModelConfig) -> dict[str, tuple[int, int]]:
    """The linear layers of a block: name -> (width in, width out)."""
    query, key = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    width, inner = c.hidden_size, c.intermediate_size
    attention = {
        "q_proj": (width, query),
        "k_proj": (width, key),
        "v_proj": (width, key),
        "o_proj": (query, width),
    }
    return attention | {
        "gate_proj": (width, inner),
        "up_proj": (width, inner),
        "down_proj": (inner, width),
    }


def block_parameters(c: ModelConfig) -> int:
    """Parameters of one block: matrices, biases, norms."""
    bias = (
        c.qkv_bias * (c.num_heads + 2 * c.num_kv_heads) * c.head_dim + c.output_bias * c.hidden_size
    )
    matrices = sum(into * out for into, out in linears(c).values())
    return matrices + bias + 2 * c.hidden_size + c.qk_norm * 2 * c.head_dim


def root_parameters(c: ModelConfig, output: bool = True) -> int:
    """Parameters outside the blocks: embedding, final norm, and with `output` an output layer that
    is not tied.
    """
    return c.hidden_size * (c.vocab_size * (1 + (output and not c.tied)) + 1)


def parameters(c: ModelConfig, output: bool = True) -> int:
    """All parameters of a model; a critic's trunk has no output layer."""
    return root_parameters(c, output) + c.num_layers * block_parameters(c)


def lora_parameters(config: Config, c: ModelConfig) -> int:
    """Parameters of one set of adapters: rank x (width in + width out) for each target of each
    block.
    """
    widths = linears(c)
    return (
        c.num_layers
        * config.lora_rank
        * sum(sum(widths[name]) for name in config.lora_targets.split(","))
    )


def block_activations(c: ModelConfig, width: int, flash: bool, lora: Config | None = None) -> int:
    """Bytes a token that autograd keeps of one block; `width` bytes a number (4: fp32, 2: bf16).

    Exact for what model.py computes: tests/test_plan.py counts. `flash`: flash-attn, whose output
    is kept once; the loop of scaled_dot_product_attention keeps a second copy for o_proj. Frozen
    layers (`lora`: the config that freezes them) keep no inputs, adapters do, and the rank-wide
    vector between A and B.
    """
    query, key = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    trained = set(lora.lora_targets.split(",") if lora else linears(c))
    normed = 0 if lora else width * c.hidden_size  # kept for the gradient of a norm's weight
    total = 0
    for readers in (
        {"q_proj", "k_proj", "v_proj"},
        {"gate_proj", "up_proj"},
    ):  # the two norms and what they feed
        total += (
            4 * c.hidden_size + 4 + normed + (width * c.hidden_size if readers & trained else 0)
        )
    if c.qk_norm:  # per head: fp32 input, 1 / root mean square, and the normed
        total += (c.num_heads + c.num_kv_heads) * ((4 + (0 if lora else width)) * c.head_dim + 4)
    total += width * (2 * query + 2 * key) + 4 * c.num_heads  # q, k, v, out, and a logsumexp a head
    total += width * query if not flash and "o_proj" in trained else 0
    total += (
        width * c.intermediate_size * (3 + ("down_proj" in trained))
    )  # gate, silu(gate), up, their product
    return total + (width * lora.lora_rank * len(trained) if lora else 0)


def cache_bytes(c: ModelConfig, slots: int, capacity: int, width: int) -> int:
    """A KV cache (engine.py): keys and values of every layer, slot and position."""
    return 2 * c.num_layers * slots * c.num_kv_heads * capacity * c.head_dim * width


def memory(
    config: Config, c: ModelConfig, gpus: int, dialogues: int = 0
) -> dict[str, dict[str, int]]:
    """Bytes per GPU: phase -> part -> bytes. `dialogues`: of an evaluation during training, 0:
    there is none.

    device=cpu plans for processes on a CPU: fp32, no CUDA. A single process in fp32 gathers
    nothing, since its weights lie whole; everything else runs under FSDP, on one GPU too, where it
    makes the bf16 copy of the fp32 weights.
    """
    cpu = config.device == "cpu"
    width = 4 if config.precision == "fp32" or (cpu and config.precision == "auto") else 2
    wrapped = gpus > 1 or width == 2
    whole = width * parameters(c) * wrapped
    found = {ALWAYS: weights_always(config, c, config.shard or gpus, width)}
    whole += width * lora_parameters(config, c) * wrapped if config.lora_rank else 0
    found[ALWAYS]["replica of the policy"] = whole if config.generation == "replica" else 0
    gathered = whole if config.generation == "inplace" else 0
    for phase, count, part in (
        (ROLLOUT, config.groups, "KV cache"),
        (EVALUATION, dialogues, "its KV cache"),
    ):
        slots = min(
            config.slots, -(-count // gpus) * (config.group_size if phase == ROLLOUT else 1)
        )
        cache = cache_bytes(c, slots, config.context_tokens, width)
        layer = max(
            min(PREFILL, slots * config.context_tokens)
            * (3 * width * c.intermediate_size + 8 * c.hidden_size),
            cache // c.num_layers,  # a layer's keys and values, copied out of the cache
            SAMPLING * slots * c.vocab_size,
        )
        if count:
            found[phase] = {
                "policy, gathered": gathered,
                "prefill, a layer's decode, or sampling": layer,
            }
            found[ALWAYS if phase == ROLLOUT else phase][part] = cache
    found[ALWAYS]["CUDA context and allowance"] = 0 if cpu else CUDA
    working = working_set(config, c, width) if wrapped else unadded(config, c, width)
    for phase, parts in update_parts(config, c, width, flash=width == 2 and not cpu).items():
        found[phase] = working | parts
    return {
        phase: {part: size for part, size in parts.items() if size}
        for phase, parts in found.items()
    }


def weights_always(config: Config, c: ModelConfig, shard: int, width: int) -> dict[str, int]:
    """Weights, gradients and Adam of all models, a GPU's share of each."""
    trunk = config.algorithm == "ppo" and config.critic == "trunk"
    parts, lora = {}, config.lora_rank > 0
    if lora:
        parts["base weights, frozen"] = -(-width * parameters(c) // shard)
    adapters = lora_parameters(config, c) if lora else 0
    for name, count in (
        ("policy", parameters(c)),
        ("critic", parameters(c, output=False) if trunk else 0),
    ):
        count = -(-(adapters if lora and count else count) // shard)
        count += (
            c.hidden_size + 1 if name == "critic" and config.algorithm == "ppo" else 0
        )  # the value head, whole
        kind = f"{name}'s adapters" if lora else name
        parts |= {
            f"{kind}: weights": 4 * count,
            f"{kind}: gradients": 4 * count,
            f"{kind}: Adam": 8 * count,
        }
    if config.kl_coef and not lora:  # LoRA's reference is the base with the adapters off
        parts["reference: weights"] = -(-4 * parameters(c) // shard)
    return parts


def working_set(config: Config, c: ModelConfig, width: int) -> dict[str, int]:
    """What FSDP holds unsharded in an update: the root and about two blocks, and gradients before
    they are shared.

    A model's root stays gathered from its forward pass to its backward pass; those of critic and
    reference are so from the pass that made the old values and log-probabilities. A block's
    gradients are summed over ranks in fp32.
    """
    root, block = root_parameters(c), block_parameters(c)
    trunk = config.algorithm == "ppo" and config.critic == "trunk" and not config.lora_rank
    others = root_parameters(c, output=False) * trunk + root * (
        config.kl_coef > 0 and not config.lora_rank
    )
    trained = lora_parameters(config, c) // c.num_layers if config.lora_rank else block
    return {
        "root of the model, gathered": width * root,
        "roots of critic and reference": width * others,
        "two blocks, gathered": 2 * width * block,
        "gradients not yet sharded": (width + 4) * trained
        + (0 if config.lora_rank else width * root),
    }


def unadded(config: Config, c: ModelConfig, width: int) -> dict[str, int]:
    """Without FSDP: a tied output layer's gradient waits for the embedding's, which comes last, to
    be added to both.
    """
    return {
        "output layer's gradient": 0 if config.lora_rank else width * c.vocab_size * c.hidden_size
    }


def update_parts(
    config: Config, c: ModelConfig, width: int, flash: bool
) -> dict[str, dict[str, int]]:
    """Activations, logits and a block's gradients of the largest micro-batch. A trajectory never
    goes in two.
    """
    tokens, lora = (
        max(config.micro_tokens, config.context_tokens),
        config if config.lora_rank else None,
    )
    block = block_activations(c, width, flash, lora)
    one = width * c.hidden_size if config.checkpointing else block
    ends = tokens * (4 + 3 * width) * c.hidden_size + tokens * (
        8 * c.head_dim + 12
    )  # final norm, rotary tables, ids
    kept = {"activations, kept": tokens * c.num_layers * one + ends}
    logits = LOGITS + (2 if width == 2 else 0)
    loss = {"logits of a chunk": logits * min(CHUNK, tokens * c.vocab_size)}
    backward = {"block, recomputed": tokens * block * config.checkpointing}
    backward["gradients in flight"] = (
        tokens * 2 * width * c.intermediate_size
    )  # of silu(gate) and of up
    return {LOSS: kept | loss, BACKWARD: kept | backward}


def peak(found: dict[str, dict[str, int]]) -> int:
    """Bytes per GPU at the highest point of a step: what is always there and the largest phase."""
    return sum(found[ALWAYS].values()) + max(
        sum(parts.values()) for phase, parts in found.items() if phase != ALWAYS
    )


def largest_micro_tokens(
    config: Config, c: ModelConfig, gpus: int, room: int, dialogues: int = 0
) -> int:
    """The largest power of two for `micro_tokens` whose peak is within `room` bytes a GPU; 0: none
    is.
    """
    best = 0
    for tokens in (1 << power for power in range(8, 21)):
        if peak(memory(replace(config, micro_tokens=tokens), c, gpus, dialogues)) <= room:
            best = tokens
    return best


def read_machine(text: str) -> tuple[int, int]:
    """ "8x80" or "4x8x80" as (GPUs in all, GB of each). Raises InputError."""
    numbers = text.split("x")
    if len(numbers) not in (2, 3) or not all(
        number.isdecimal() and int(number) > 0 for number in numbers
    ):
        raise InputError(
            f"{text}: a machine is GPUs x GB, for example 8x80, or nodes x GPUs x GB, 4x8x80"
        )
    *counts, size = map(int, numbers)
    return counts[0] * counts[-1] if len(counts) == 2 else counts[0], size


def plan(config: Config, machine: str) -> str:
    """The plan of a config on a machine ("8x80") as text, GB per GPU. Raises InputError."""
    gpus, size = read_machine(machine)
    if config.shard > gpus or (config.shard and gpus % config.shard):
        raise InputError(f"option 'shard' ({config.shard}) must divide the number of GPUs ({gpus})")
    c = model_shape(config.model)
    dialogues = (
        len(load_profiles(config.eval_profiles)) * config.eval_dialogues if config.eval_every else 0
    )
    found, best = (
        memory(config, c, gpus, dialogues),
        largest_micro_tokens(config, c, gpus, size * 10**9, dialogues),
    )
    return table(config, c, found, f"{gpus} x {size} GB", size, best)


def table(config: Config, c: ModelConfig, found: dict, machine: str, size: int, best: int) -> str:
    """The text of a plan."""
    what = f"LoRA of rank {config.lora_rank}" if config.lora_rank else "all weights"
    critic = f", critic={config.critic}" if config.algorithm == "ppo" else ""
    lines = [
        f"{config.model} ({parameters(c) / 1e9:.2f} B), {config.algorithm}{critic}, {what}, on {machine}"
    ]
    highest = max(
        (phase for phase in found if phase != ALWAYS), key=lambda phase: sum(found[phase].values())
    )
    for phase, parts in found.items():
        title = f"{phase}, on top" if phase != ALWAYS else phase
        lines += ["", f"{title:<40}{sum(parts.values()) / 1e9:8.2f} GB"]
        lines += [f"  {part:<38}{count / 1e9:8.2f}" for part, count in parts.items()]
    verdict = "fits" if peak(found) <= size * 10**9 else "DOES NOT FIT"
    lines += [
        "",
        f"{'peak (' + highest + ')':<40}{peak(found) / 1e9:8.2f} GB per GPU of {size}: {verdict}",
    ]
    largest = f"largest micro_tokens that fits: {best}" if best else "no micro_tokens fits"
    lines.append(
        f"{largest} (now {config.micro_tokens}; a trajectory, up to {config.context_tokens}, is never cut)"
    )
    if config.user == "local":
        lines.append("the user's model (user=local) is not counted")
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    machines = [arg for arg in argv if re.fullmatch(r"[\dx]+", arg)]
    if len(machines) != 1:
        raise InputError(
            "scripts/plan.py wants a config and a machine: python scripts/plan.py configs/ppo.py 8x80"
        )
    options = [arg for arg in argv if arg not in machines]
    if "user=local" not in options:
        options.append("user=offline")  # a plan needs no server
    print(plan(load_config(options), machines[0]))
    return 0


if __name__ == "__main__":
    run_main(main)
