"""One GRPO step of ours beside one of TRL's on the same work: seconds, tokens a second, memory.

    python -m venv .venv-bench
    .venv-bench/bin/pip install torch==2.13.0          first: a CPU build where there is no GPU
    .venv-bench/bin/pip install -r requirements-bench.txt
    .venv-bench/bin/python bench/grpo_step.py [--rounds 3] [--micro-tokens 400] [--their-batch 16]

A step: 4 samples of exactly 48 ids behind each of 4 prompts (temperature 1, no id ends a reply), a
reward (the share of the letter e), log-probabilities, loss, backward pass and one step of AdamW on
all 16; fp32 on the CPU, no gradient checkpointing, no reference model. A micro-batch is as many
tokens of ours as --micro-tokens says, as many samples of theirs as --their-batch says. Memory is
decided by that: compare 8192 tokens with 16 samples (all at once), or 400 with 4 (four of each in a
part). The defaults set our best against the plainest use of TRL.

A round is a process of ours, then one of theirs, so that neither carries the other's libraries;
each takes a step to warm up and three that are timed, from the end of one to the end of the next.
CPU seconds are those of all threads; where others use the machine they grow too, but by less than
the clock's, and the fastest step by least. Peak memory is VmHWM: the most the process ever held.
Prompt ids, sampled ids and threads must be equal on both sides, and the weights must move in every
step. Linux only.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from statistics import median

import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
MODEL = str(ROOT / "models" / "smollm2-135m-instruct")
MEMBERS, NEW, WARM_UP, TIMED = 4, 48, 1, 3
SYSTEM = "The user is upset. Write a short, empathetic reply."
TEXTS = (
    "My dog died yesterday and the house is so quiet.",
    "I trained for a year, and on the morning of the race I woke up with a fever.",
    "They gave my shift to somebody else and nobody even called me.",
    "I found the crack that three others had missed, and my foreman got the letter of thanks.",
)
SAMPLED = len(TEXTS) * MEMBERS * NEW
WATCHED = "model.layers.0.self_attn.q_proj.weight"


def share_of_e(text: str) -> float:
    """The reward of a reply, for both sides."""
    return text.lower().count("e") / max(1, len(text))


def status(path: str, field: str) -> str:
    """What stands behind the first `field:` of a file of /proc."""
    lines = Path(path).read_text().splitlines()
    return next(line.split(":", 1)[1].strip() for line in lines if line.startswith(field))


class Watch:
    """What both sides measure in the same way: each step's seconds, sampled ids and weights."""

    def __init__(self, model: torch.nn.Module, prompts: list[list[int]]):
        self.weight, self.prompts = dict(model.named_parameters())[WATCHED].detach(), prompts
        self.ends: list[tuple] = []
        self.end_step(0)  # the first begins

    def end_step(self, sampled: int) -> None:
        """A step is over, and the next one begins."""
        weights = float(self.weight.double().sum())
        self.ends.append((time.perf_counter(), time.process_time(), sampled, weights))

    def report(self) -> dict:
        """What the process has to tell. Raises RuntimeError if its work was not as agreed."""
        *clocks, sampled, weights = zip(*self.ends)
        if set(sampled[1:]) != {SAMPLED} or len(set(weights)) != len(self.ends):
            raise RuntimeError(f"not {SAMPLED} ids a step ({sampled}), or weights stood still")
        wall, cpu = ([b - a for a, b in pairwise(clock[WARM_UP:])] for clock in clocks)
        peak = int(status("/proc/self/status", "VmHWM").split()[0]) * 1024 / 1e9
        same = {"prompts": self.prompts, "threads": torch.get_num_threads()}
        return {"seconds": wall, "cpu_seconds": cpu, "peak_gb": peak, "same": same}


def roll_out(engine, chat, prompts: list[list[int]], step: int) -> list:
    """Dialogues of one reply each, whose user's last emotion is the reward."""
    from rollout import Dialogue, Turn
    from simulator import Profile, UserTurn

    who = Profile("bench", "persona", "scene", "empathy", "passive", "en", "hello")
    keys = [(group, member) for group in range(len(prompts)) for member in range(MEMBERS)]
    engine.forget()
    for slot, key in enumerate(keys):
        engine.submit(slot, prompts[key[0]], (step, *key), NEW)
    dialogues = []
    while engine.busy:
        for row in engine.step():
            reply = chat.read(row.sampled)
            heard = UserTurn("ok", 100 * share_of_e(reply.text))
            turn = Turn(row.prompt, row.sampled, row.logps, row.values, reply, row.stop, heard)
            opening = UserTurn("hello", 30.0)
            dialogues.append(Dialogue(keys[row.slot], who, 0, opening, [turn], "max_turns"))
    return sorted(dialogues, key=lambda dialogue: dialogue.key)


def ours(micro_tokens: int) -> dict:
    """Our steps, in this process."""
    import kernels
    from chat import banned_ids, load_tokenizer, make_chat
    from config import Config
    from dist import World
    from rollout import make_engine
    from update import build, update

    kernels.use("auto")
    chat = make_chat(load_tokenizer(MODEL), think=False)
    prompts = [chat.opening(SYSTEM, text) for text in TEXTS]
    chat.end = -1  # from here on no id ends a reply, and <|im_end|> is banned like other specials
    config = Config(
        model=MODEL, device="cpu", precision="fp32", algorithm="grpo", groups=len(TEXTS),
        group_size=MEMBERS, slots=len(TEXTS) * MEMBERS, reply_tokens=NEW, lr=1e-6, warmup=0,
        context_tokens=max(map(len, prompts)) + NEW, entropy_coef=0.0, micro_tokens=micro_tokens,
    )  # fmt: skip
    state = build(config, World())
    engine = make_engine(config, state.policy, chat, config.slots)
    banned = banned_ids(chat.tokenizer, state.policy.config.vocab_size, ())
    watch = Watch(state.policy, prompts)
    for step in range(WARM_UP + TIMED):
        dialogues = roll_out(engine, chat, prompts, step)
        update(state, config, dialogues, banned)
        state.step += 1
        watch.end_step(sum(len(turn.sampled_ids) for d in dialogues for turn in d.turns))
    return watch.report()


def theirs(batch: int) -> dict:
    """TRL's steps, in this process: all 16 in one optimiser step, generated anew in each."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    steps, pieces, counted = WARM_UP + TIMED, len(TEXTS) * MEMBERS // batch, [0]
    talks = [[{"role": "system", "content": SYSTEM}, {"role": "user", "content": t}] for t in TEXTS]

    def reward(completions: list, completion_ids: list[list[int]], **rest) -> list[float]:
        """Rewards; this is also where the sampled ids are counted."""
        counted[0] += sum(map(len, completion_ids))
        return [share_of_e(completion[0]["content"]) for completion in completions]

    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            folder, use_cpu=True, bf16=False, model_init_kwargs={"dtype": "float32"}, seed=0,
            max_steps=steps, per_device_train_batch_size=batch, gradient_accumulation_steps=pieces,
            steps_per_generation=pieces, num_iterations=1, num_generations=MEMBERS, beta=0.0,
            max_completion_length=NEW, generation_kwargs={"min_new_tokens": NEW}, temperature=1.0,
            gradient_checkpointing=False, learning_rate=1e-6, lr_scheduler_type="constant",
            optim="adamw_torch_fused", adam_beta2=0.95, weight_decay=0.0, max_grad_norm=1.0,
            shuffle_dataset=False, report_to=[], logging_strategy="no", save_strategy="no",
            disable_tqdm=True,
        )  # fmt: skip
        data = Dataset.from_list([{"prompt": talk} for talk in talks] * steps)
        trainer = GRPOTrainer(MODEL, reward, config, train_dataset=data)
        write = trainer.processing_class.apply_chat_template
        prompts = [write(t, add_generation_prompt=True, return_dict=False) for t in talks]
        watch = Watch(trainer.model, prompts)

        class Ends(TrainerCallback):
            """Tells the watch of each optimiser step's end; generation comes before it."""

            def on_step_end(self, args, state, control, **rest) -> None:
                """Also checks how many ids the trainer has seen, prompts included."""
                step = MEMBERS * sum(map(len, prompts)) + SAMPLED
                if state.num_input_tokens_seen != state.global_step * step:
                    raise RuntimeError("TRL did not see the prompts of the chat template")
                watch.end_step(counted[0])
                counted[0] = 0

        trainer.add_callback(Ends())
        trainer.train()
    return watch.report()


def run(side: str, options: argparse.Namespace) -> dict:
    """One side's report, from a process of its own."""
    sizes = [f"--micro-tokens={options.micro_tokens}", f"--their-batch={options.their_batch}"]
    command = [sys.executable, __file__, f"--side={side}", *sizes]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{side}:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def summary(reports: list[dict]) -> dict:
    """One side's figures over all rounds."""
    wall, cpu = ([x for r in reports for x in r[name]] for name in ("seconds", "cpu_seconds"))
    figures = {"seconds": median(wall), "fastest": min(wall), "cpu_seconds": median(cpu)}
    figures |= {"tokens_per_second": SAMPLED / median(wall)}
    figures |= {"peak_gb": max(report["peak_gb"] for report in reports)}
    return figures | {"all_seconds": wall, "all_cpu_seconds": cpu}


def main() -> None:
    """All rounds, a table, and one line of JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--micro-tokens", type=int, default=400)
    parser.add_argument("--their-batch", type=int, default=16, choices=(1, 2, 4, 8, 16))
    parser.add_argument("--side", choices=("ours", "trl"), help="only this one, in this process")
    options = parser.parse_args()
    if options.side:
        mine = options.side == "ours"
        print(json.dumps(ours(options.micro_tokens) if mine else theirs(options.their_batch)))
        return
    if not find_spec("trl"):
        sys.exit("TRL is not installed here; see the first lines of this file")
    load, found = os.getloadavg()[0], {"ours": [], "trl": []}
    for _ in range(options.rounds):
        for side, reports in found.items():
            reports.append(run(side, options))
    same = found["ours"][0]["same"]
    if any(report["same"] != same for reports in found.values() for report in reports):
        sys.exit("the sides differ in prompt ids or in threads")
    facts = {side: summary(reports) for side, reports in found.items()}
    keys = ("seconds", "fastest", "cpu_seconds", "tokens_per_second", "peak_gb")
    facts["trl / ours"] = {key: facts["trl"][key] / facts["ours"][key] for key in keys}
    print("| | seconds a step | fastest | CPU seconds | sampled tokens/s | peak GB |")
    print("|---|---|---|---|---|---|")
    for name, figures in facts.items():
        print(f"| {name} | {' | '.join(f'{figures[key]:.2f}' for key in keys)} |")
    facts["versions"] = {name: version(name) for name in ("torch", "transformers", "trl")}
    facts |= {"cpu": status("/proc/cpuinfo", "model name"), "load_before": load}
    facts |= {"threads": same["threads"], "prompt_ids": [len(ids) for ids in same["prompts"]]}
    print(json.dumps(facts | vars(options)))


if __name__ == "__main__":
    main()
