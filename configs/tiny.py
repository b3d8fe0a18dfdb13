"""For development: a random model of 1 M parameters on bytes, PPO, the offline user.

python train.py configs/tiny.py      two CPU cores, under a minute. It learns nothing of use: every
path is walked.
"""

from config import Config

config = Config(
    model="configs/shapes/tiny.json",
    tokenizer="bytes",
    critic="head",
    groups=4,
    group_size=2,
    max_turns=3,
    reply_tokens=24,
    context_tokens=2048,
    slots=8,
    steps=6,
    lr=1e-3,
    warmup=0,
    critic_lr=1e-3,
    critic_warmup=0,
    eval_every=6,
    eval_max_turns=3,
    save_every=3,
    matmul="mkl",  # matrices so small gain nothing, and without a measurement runs are equal
)
