"""The paper's GRPO with a <think> block before each reply. Hardware: as configs/grpo.py. The
paper's result: Sentient score 72.0, success 34, failure 10.

    torchrun --nproc-per-node 8 train.py configs/grpo_think.py user_url=... user_model=...
"""

import dataclasses

from configs.grpo import config as grpo

config = dataclasses.replace(grpo, think=True, reply_tokens=2048)
