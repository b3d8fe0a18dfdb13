"""The paper's PPO without thinking: Qwen2.5-7B-Instruct, 32 dialogues a step, 8 turns, a critic of its own.

    torchrun train.py configs/ppo.py

Hardware: meant for 8 x 80 GB; not yet run. A single process holds policy and critic in fp32 with Adam, about 240 GB,
so that today this file loads and validates, and trains where one device has that room. Steps: the paper's curves end
at 350. The paper's result (DeepSeek-V3 as the user): Sentient score 61.7, success 24, failure 23.
"""

from config import Config

config = Config(
    model="Qwen/Qwen2.5-7B-Instruct",
    algorithm="ppo",
    groups=32,
    group_size=1,
    max_turns=8,
    slots=32,
    reply_tokens=1024,
    context_tokens=15000,
    steps=350,
    checkpointing=True,
    micro_tokens=16384,
    # RLVER trains and tests on Chinese profiles of its own: profiles=FILE takes the released ones.
    profiles="data/zh_train.jsonl",
    eval_profiles="data/zh_test.jsonl",
    eval_every=10,
)
