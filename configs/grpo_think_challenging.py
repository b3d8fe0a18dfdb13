"""GRPO with a <think> block on challenging users, who hide what they hope for and are moved only by
replies that serve it. Hardware: as configs/grpo_think.py; not yet run. The paper reports no
figure for it.

    torchrun --nproc-per-node 8 train.py configs/grpo_think_challenging.py user_url=... user_model=...
"""

import dataclasses

from configs.grpo_think import config as grpo_think

config = dataclasses.replace(grpo_think, user_mode="challenging")
