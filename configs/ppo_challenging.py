"""PPO on challenging users, who hide what they hope for and are moved only by replies that serve
it. Hardware: as configs/ppo.py; not yet run. The paper's result: Sentient score 19.8 (vanilla
users: 61.7), 25.9 on the challenging benchmark (vanilla: 47.7).

    torchrun --nproc-per-node 8 train.py configs/ppo_challenging.py user_url=... user_model=...
"""

import dataclasses

from configs.ppo import config as ppo

config = dataclasses.replace(ppo, user_mode="challenging")
