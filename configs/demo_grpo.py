"""The demo with GRPO in place of PPO: 3 people x 10 dialogues, of which 4 each are learnt from.

One advantage a dialogue, no critic.

    python scripts/demo.py configs/demo_grpo.py
"""

import dataclasses

from configs.demo import config as demo

config = dataclasses.replace(demo, algorithm="grpo", groups=3, group_size=10, learn_from=4)
