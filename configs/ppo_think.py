"""The paper's PPO with a <think> block before each reply. A malformed reply ends its dialogue with
reward 0. Hardware: as configs/ppo.py. The paper's result: Sentient score 79.2, success 42, failure
9.

    torchrun --nproc-per-node 8 train.py configs/ppo_think.py user_url=... user_model=...
"""

import dataclasses

from configs.ppo import config as ppo

config = dataclasses.replace(ppo, think=True, reply_tokens=2048)
