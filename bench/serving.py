"""A load test of serve.py: many clients on few slots, beside the engine alone on the same requests.

    python bench/serving.py models/smollm2-135m-instruct clients=64 slots=8 seconds=120 tokens=32

Every client asks again as soon as it is answered, each time another question, streamed or not in turn. Counted:
answers, errors, tokens a second, waiting times. The engine alone samples from the same prompts, always as many rows
as there are slots, with nobody between, once before and once after, since machines get faster and slower. Nothing
else should run.
"""

import asyncio
import subprocess
import sys
import time
from pathlib import Path
from statistics import fmean, median

import openai
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import serve  # noqa: E402
from chat import banned_ids, make_chat  # noqa: E402
from dist import single  # noqa: E402
from engine import Sampling  # noqa: E402
from rundir import find_policy, use_kernels  # noqa: E402
from ui.desk import ServedEngine  # noqa: E402


def question(client: int, turn: int) -> list[dict]:
    return [{"role": "user", "content": f"Friend {client} had a hard day, number {turn}. What would you say?"}]


async def load(url: str, name: str, clients: int, seconds: float, tokens: int) -> dict:
    """Clients that ask for so many seconds; what came of it."""
    asker = openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=600)
    end, waits, counts, errors = time.perf_counter() + seconds, [], [], []

    async def one(client: int) -> None:
        turn = 0
        while time.perf_counter() < end:
            turn, begun = turn + 1, time.perf_counter()
            options = {"model": name, "messages": question(client, turn), "max_tokens": tokens, "seed": client}
            try:
                if turn % 2:
                    usage = (await asker.chat.completions.create(**options)).usage
                else:
                    options |= {"stream": True, "stream_options": {"include_usage": True}}
                    stream = await asker.chat.completions.create(**options)
                    usage = [chunk async for chunk in stream][-1].usage
                counts.append(usage.completion_tokens)
                waits.append(time.perf_counter() - begun)
            except openai.OpenAIError as error:
                errors.append(f"{type(error).__name__}: {error}")

    begun = time.perf_counter()
    await asyncio.gather(*map(one, range(clients)))
    whole = time.perf_counter() - begun
    return {"answers": len(counts), "errors": errors, "tokens": sum(counts), "seconds": whole,
            "rate": sum(counts) / whole, "median": median(waits), "worst": max(waits)}  # fmt: skip


ALONE = 3000  # tokens


def alone(argv: list[str], slots: int, tokens: int) -> float:
    """Tokens a second of the engine with the same kind of requests, no server around it."""
    policy = find_policy("bench/serving.py", argv)
    config, world = policy.config, single(policy.config)
    print(use_kernels(config, None, world))
    model, tokenizer = policy.load(world)
    chat = make_chat(tokenizer, False)
    sampling = Sampling(banned_ids(tokenizer, model.config.vocab_size, (chat.end,)), (chat.end,))
    engine = ServedEngine(model, sampling, slots, config.context_tokens)
    free, number, done, begun = list(range(slots)), 0, 0, time.perf_counter()
    while done < ALONE:
        while free:
            messages = [serve.Message(**m) for m in question(number % 64, 1 + number // 64)]
            engine.submit(free.pop(), serve.read_prompt(chat, messages), (number,), tokens)
            number += 1
        for row in engine.step():
            done += len(row.sampled)
            free.append(row.slot)
    return done / (time.perf_counter() - begun)


def main() -> None:
    own = {"clients": "64", "slots": "8", "seconds": "120", "tokens": "32"}
    own |= dict(arg.split("=", 1) for arg in sys.argv[1:] if arg.split("=")[0] in own)
    argv = [arg for arg in sys.argv[1:] if arg.split("=")[0] not in own]
    rates = [alone(argv, int(own["slots"]), int(own["tokens"]))]
    command = [sys.executable, "serve.py", *argv, f"slots={own['slots']}", "port=0"]
    server = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        line = next(line for line in server.stdout if " at http://" in line)
        name, url = line.split(" at ")[0], line.split(" at ")[1].split(";")[0]
        numbers = int(own["clients"]), float(own["seconds"]), int(own["tokens"])
        found = asyncio.run(load(url, name, *numbers))
    finally:
        server.terminate()
        server.wait()
    rates.append(alone(argv, int(own["slots"]), int(own["tokens"])))
    print(f"{own['clients']} clients on {own['slots']} slots: {found['answers']} answers, {len(found['errors'])} lost, "
          f"{found['tokens']} tokens in {found['seconds']:.0f} s\n"
          f"{found['rate']:.1f} tokens/s served, {rates[0]:.1f} before and {rates[1]:.1f} after by the engine alone "
          f"({found['rate'] / fmean(rates):.3f} of their mean)\n"
          f"an answer waits {found['median']:.1f} s in the median, {found['worst']:.1f} s at most; "
          f"{torch.get_num_threads()} threads")  # fmt: skip
    print(*found["errors"][:5], sep="\n", end="")


if __name__ == "__main__":
    main()
