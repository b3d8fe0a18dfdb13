"""The paper's PPO without thinking: Qwen2.5-7B-Instruct, 32 dialogues a step with 32 people, 8
turns, a critic of its own.

    torchrun --nproc-per-node 8 train.py configs/ppo.py user_url=http://HOST:8001/v1 user_model=NAME

The user is a language model behind a server of yours (docs/simulators.md); user=offline trains on
the rule-based user instead, which needs none and is no stand-in for it. Hardware: 8 GPUs of 80
GB, of which the plan fills 53 GB each (python scripts/plan.py configs/ppo.py 8x80); not yet run.
Steps: the paper's curves end at 350. The paper's result (DeepSeek-V3 as the user): Sentient score
61.7, success 24, failure 23.
"""

from config import Config

config = Config(
    model="Qwen/Qwen2.5-7B-Instruct",
    user="llm",
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
    # Our own people. RLVER's, 500 and 100, are Chinese: profiles=FILE eval_profiles=FILE takes
    # them.
    profiles="data/en_train.jsonl",
    eval_profiles="data/en_test.jsonl",
    eval_every=10,
)
