"""The demo with GRPO in place of PPO: a step is 2 people x 16 dialogues, and the 6 with each person whose rewards vary
most are learnt from. A turn's advantage is the emotion still to come, against that of the others' same turn; no critic.

    python scripts/demo.py configs/demo_grpo.py
"""

import dataclasses

from configs.demo import config as demo

config = dataclasses.replace(
    demo, algorithm="grpo", credit="turn", groups=2, group_size=16, learn_from=6, steps=16, lr_schedule="linear"
)
