"""The demo with GRPO in place of PPO."""

import dataclasses

from configs.demo import config as demo

config = dataclasses.replace(demo, algorithm="grpo", groups=4, group_size=4)
