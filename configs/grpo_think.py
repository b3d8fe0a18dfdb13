"""The paper's GRPO with a <think> block before each reply. Hardware: as configs/grpo.py. The paper's result: Sentient
score 72.0, success 34, failure 10.

    torchrun train.py configs/grpo_think.py
"""

import dataclasses

from configs.grpo import config as grpo

config = dataclasses.replace(grpo, think=True, reply_tokens=2048)
