"""The demo: SmolLM2-135M-Instruct learns to talk with the offline user, by PPO, on two CPU cores."""

from config import Config

config = Config(
    critic="head",
    groups=8,
    group_size=2,
    start_emotion=50.0,
    max_turns=3,
    reply_tokens=40,
    context_tokens=512,
    slots=24,
    steps=16,
    lr=3e-5,
    warmup=2,
    critic_lr=1e-3,
    critic_warmup=0,
    micro_tokens=2000,
    eval_max_turns=5,
    eval_dialogues=3,
)
