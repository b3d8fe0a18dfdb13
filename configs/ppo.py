"""The paper's PPO without thinking: Qwen2.5-7B-Instruct, 32 dialogues a step, 8 turns, a critic of its own.

    torchrun --nproc-per-node 8 train.py configs/ppo.py user=llm user_url=... user_model=...

Hardware: 8 GPUs of 80 GB, of which the plan fills 52 GB each (python scripts/plan.py configs/ppo.py 8x80);
not yet run. Steps: the paper's curves end at 350. The paper's result (DeepSeek-V3 as the user): Sentient score 61.7,
success 24, failure 23.
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
