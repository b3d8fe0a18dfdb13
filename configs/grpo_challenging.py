"""GRPO on challenging users, who hide what they hope for and are moved only by replies that serve
it. Hardware: as configs/grpo.py; not yet run. The paper reports no figure for it.

    torchrun --nproc-per-node 8 train.py configs/grpo_challenging.py user_url=... user_model=...
"""

import dataclasses

from configs.grpo import config as grpo

config = dataclasses.replace(grpo, user_mode="challenging")
