"""The demo with GRPO in place of PPO: the same dialogues, one advantage a dialogue, no critic.

    python scripts/demo.py configs/demo_grpo.py
"""

import dataclasses

from configs.demo import config as demo

config = dataclasses.replace(demo, algorithm="grpo", credit="final")
