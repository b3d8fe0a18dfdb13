"""The demo: a warmed-up SmolLM2-135M-Instruct learns to talk with the offline user, by PPO.

    make demo          or, the training alone: python train.py configs/demo.py model=runs/demo-warm-up

Two CPU cores, fp32. Model: SmolLM2-135M-Instruct after scripts/warmup.py. User: offline, vanilla.
Training: 16 steps of 2 people x 16 dialogues, 7 turns, replies of at most 32 tokens, emotion starts
at 50; the 4 dialogues with each person whose rewards vary most are learnt from. Benchmark: 24 people
never trained on x 3 dialogues of at most 8 replies (7 scored), emotion starts at 40. Temperature 0.7
in both; seed 0, benchmark seed 1000.
"""

from config import Config

config = Config(
    critic="head",
    credit="turn",  # each reply answers for the change of emotion it brought: half the noise of the final emotion
    gamma=0.0,  # and for that alone
    groups=2,
    group_size=16,
    learn_from=4,  # rolling out costs less than learning, and the middle teaches little
    start_emotion=50.0,
    max_turns=7,  # as many as the benchmark scores: with few, saying the same again goes unnoticed
    reply_tokens=32,  # a model of this size says more than two sentences at the cost of sense
    temperature=0.7,  # at 1 a model of this size speaks in salad
    eval_temperature=0.7,
    context_tokens=1024,
    slots=72,
    steps=16,
    lr=1e-4,
    kl_coef=0.1,  # without it, fluency goes first: the user hears words and facts, hardly grammar
    lr_schedule="linear",
    warmup=2,
    critic_lr=1e-5,
    critic_warmup=0,
    entropy_coef=0.0,
    micro_tokens=2400,
    save_every=8,
    eval_max_turns=8,
    eval_dialogues=3,
)
