"""PPO of Qwen2.5-1.5B-Instruct on one GPU of 80 GB: all weights, a critic of its own, 32 dialogues
a step.

    python train.py configs/ppo_1b.py user_url=... user_model=...

Not yet run. Planned memory (python scripts/plan.py configs/ppo_1b.py 1x80): 68 GB. The dialogues
are shorter than in configs/ppo.py: replies of at most 512 tokens, 8192 tokens a dialogue.
"""

import dataclasses

from configs.ppo import config as ppo

config = dataclasses.replace(
    ppo,
    model="Qwen/Qwen2.5-1.5B-Instruct",
    reply_tokens=512,
    context_tokens=8192,
    micro_tokens=8192,
)
