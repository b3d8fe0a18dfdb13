"""The demo with GRPO in place of PPO: 26 steps of 3 people x 4 dialogues, one advantage a dialogue, no critic.

    python scripts/demo.py configs/demo_grpo.py
"""

import dataclasses

from configs.demo import config as demo

config = dataclasses.replace(demo, algorithm="grpo", groups=3, group_size=4, steps=26)
