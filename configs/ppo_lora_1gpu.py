"""PPO of Qwen2.5-7B-Instruct on one GPU of 80 GB: adapters of rank 32 for policy and critic on one
frozen base.

    python train.py configs/ppo_lora_1gpu.py user_url=... user_model=...

Not yet run. Planned memory (python scripts/plan.py configs/ppo_lora_1gpu.py 1x80): 51 GB, at the
highest while an evaluation has a KV cache of its own beside that of training. The learning rates
are ten times those of configs/ppo.py, since adapters start from nothing; they have not been tuned.
"""

import dataclasses

from configs.ppo import config as ppo

config = dataclasses.replace(
    ppo,
    lora_rank=32,
    lora_alpha=32.0,
    lr=1e-5,
    critic_lr=5e-5,
    slots=16,
    context_tokens=8192,
    micro_tokens=8192,
)
