"""A short supervised warm-up: a small model reads some good replies to the training people.

    python scripts/warmup.py configs/demo.py [key=value ...] OUT

Writes a Hugging Face folder that `model=OUT` starts from. The replies are data/judged/warmup_en.jsonl
(written for this), each after the person's last words alone.
What reinforcement adds is measured from the model that this gives, not from the one before it.
"""

import random
import sys
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))
from chat import Chat, banned_ids, load_tokenizer, make_chat  # noqa: E402
from checkpoint import load_model, save_model  # noqa: E402
from config import InputError, load_config, read_rows, run_main  # noqa: E402
from kernels import use  # noqa: E402
from rollout import Trajectory, make_talk, pack, split  # noqa: E402
from update import forward  # noqa: E402

JUDGED = Path(__file__).parents[1] / "data" / "judged"
STEPS, BATCH, LR = 40, 16, 1.5e-4  # optimiser steps, replies a step, peak learning rate


def examples(chat: Chat, system: str) -> list[Trajectory]:
    """One trajectory a reply, its own tokens alone trained."""
    rows = [row for _, row in read_rows(JUDGED / "warmup_en.jsonl")]
    found = []
    for n, row in enumerate(rows):
        ids = chat.opening(system, row["said"][-1])  # the person's last words alone: a third of the time
        reply = [*chat.text(row["reply"].strip()), chat.end]
        mask = [0] * len(ids) + [1] * len(reply)
        zeros = [0.0] * len(mask)
        found.append(Trajectory((n, 0), ids + reply, mask, zeros, zeros))
    return found


def main(argv: list[str]) -> None:
    if not argv or "=" in argv[-1] or argv[-1].endswith(".py"):
        raise InputError("scripts/warmup.py wants a config and options, then the folder to write")
    *options, out = argv
    if Path(out).exists():
        raise InputError(f"{out}: exists already; give another folder or remove it")
    config = replace(load_config(options), temperature=1.0, entropy_coef=0.0)
    print(use(config.matmul), flush=True)
    torch.manual_seed(config.seed)
    tokenizer = load_tokenizer(config.tokenizer or config.model)
    chat = make_chat(tokenizer, think=False)
    model = load_model(config.model, config.seed)
    banned = banned_ids(tokenizer, model.config.vocab_size, (chat.end,))
    items = examples(chat, make_talk(config, training=True).systems["en"])
    optimiser = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0)
    random.Random(config.seed).shuffle(items)
    with tqdm(total=STEPS, desc="warm-up", unit="step", dynamic_ncols=True) as bar:
        for step in range(STEPS):
            chosen = [items[n % len(items)] for n in range(step * BATCH, (step + 1) * BATCH)]
            total, loss = sum(sum(item.mask) for item in chosen), 0.0
            for part in split(chosen, config.micro_tokens):
                logp = forward(model, config, pack(part), banned)[0]
                (-logp.sum() / total).backward()
                loss -= logp.detach().sum().item() / total
            optimiser.param_groups[0]["lr"] = LR * min(1.0, (step + 1) / 5) * (1 - step / STEPS)
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
            bar.update(1)
            bar.set_postfix_str(f"loss {loss:.2f} nats a token")
    save_model(model, tokenizer, Path(out))
    print(f"{STEPS * BATCH} replies of {len(items)}: {out}")


if __name__ == "__main__":
    run_main(main)
