"""PPO with a <think> block on challenging users, who hide what they hope for and are moved only by
replies that serve it. Hardware: as configs/ppo_think.py; not yet run. The paper's result:
Sentient score 66.4 (vanilla users: 79.2), 44.7 on the challenging benchmark (vanilla: 59.6).

    torchrun --nproc-per-node 8 train.py configs/ppo_think_challenging.py user_url=... user_model=...
"""

import dataclasses

from configs.ppo_think import config as ppo_think

config = dataclasses.replace(ppo_think, user_mode="challenging")
