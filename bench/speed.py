"""Tokens per second of generation and of training (forward and backward), on a real model.

    python bench/speed.py [models/smollm2-135m-instruct]

Run it alone on the machine. Generation: 64 new tokens behind a short prompt, batch 1, 8, 32.
Training: log-probabilities of half the tokens of four packed documents of 330 tokens, and their
gradient.
"""

import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from chat import banned_ids, load_tokenizer, make_chat  # noqa: E402
from checkpoint import load_model  # noqa: E402
from engine import Engine  # noqa: E402
from model import PackedAttention, predictors, token_logprobs  # noqa: E402


def generation(model, chat, batch: int, new: int = 64) -> tuple[float, float]:
    """Prefilled and decoded tokens per second."""
    prompt = chat.opening(
        "You are a caring friend.", "My dog died yesterday and the house is so quiet."
    )
    banned = banned_ids(chat.tokenizer, model.config.vocab_size, ())
    engine = Engine(
        model, banned, (), batch, len(prompt) + new, 1.0
    )  # no stop id: every row runs to the end
    for slot in range(batch):
        engine.submit(slot, prompt, (slot,), new)
    begun = time.perf_counter()
    engine.step()
    middle = time.perf_counter()
    while engine.busy:
        engine.step()
    return engine.tokens_prefilled / (middle - begun), batch * (new - 1) / (
        time.perf_counter() - middle
    )


def training(model, banned, documents: int = 4, length: int = 330) -> float:
    """Tokens per second of a forward and backward pass."""
    bounds = [length * i for i in range(documents + 1)]
    tokens = torch.randint(20, 40000, (bounds[-1],), generator=torch.Generator().manual_seed(0))
    position, mask = (
        torch.arange(length).repeat(documents),
        torch.arange(bounds[-1]) % length >= length // 2,
    )
    begun = time.perf_counter()
    where = predictors(mask)
    hidden = model(tokens, position, PackedAttention(bounds, tokens.device))[where]
    logp, entropy = token_logprobs(hidden, model.output_weight, tokens[where + 1], banned, 1.0)
    (logp.mean() + 0.001 * entropy.mean()).backward()
    return bounds[-1] / (time.perf_counter() - begun)


def main() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else "models/smollm2-135m-instruct"
    chat, model = make_chat(load_tokenizer(name), False), load_model(name)
    print(f"{name}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    for batch in (1, 8, 32):
        runs = [generation(model, chat, batch) for _ in range(3)]
        prefill, decode = (max(run[i] for run in runs) for i in (0, 1))
        print(f"batch {batch:>2}: decode {decode:6.1f} tok/s, prefill {prefill:6.1f} tok/s")
    banned = banned_ids(chat.tokenizer, model.config.vocab_size, (chat.end,))
    print(
        f"training, forward and backward: {max(training(model, banned) for _ in range(4)):6.1f} tok/s"
    )


if __name__ == "__main__":
    main()
