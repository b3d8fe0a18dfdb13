"""The paper's GRPO without thinking: 8 groups of 4 dialogues, no critic, 210 steps. Hardware: as
configs/ppo.py, 39 GB of each GPU planned; not yet run. The paper's result: Sentient score 68.3,
success 26, failure 10.

    torchrun --nproc-per-node 8 train.py configs/grpo.py user_url=... user_model=...
"""

import dataclasses

from configs.ppo import config as ppo

config = dataclasses.replace(ppo, algorithm="grpo", groups=8, group_size=4, steps=210)
