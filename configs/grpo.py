"""The paper's GRPO without thinking: 8 groups of 4 dialogues, no critic, 210 steps. Hardware: as configs/ppo.py, half
the memory. The paper's result: Sentient score 68.3, success 26, failure 10.

    torchrun train.py configs/grpo.py
"""

import dataclasses

from configs.ppo import config as ppo

config = dataclasses.replace(ppo, algorithm="grpo", groups=8, group_size=4, steps=210)
