"""The demo with GRPO in place of PPO: a turn's advantage is its change of emotion, against that of
the others' same turn with the same person; no critic.

    python scripts/demo.py configs/demo_grpo.py
"""

import dataclasses

from configs.demo import config as demo

config = dataclasses.replace(demo, algorithm="grpo")
