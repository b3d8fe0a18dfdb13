"""Does anybody wait for the slowest user? A scripted server on loopback takes 0.5 s a call.

    python bench/concurrency.py [dialogues] [turns] [seconds a call]

Times a rollout of a tiny random policy with an LLMUser (two hops a turn) against the longest chain
of calls of any one dialogue, which no rollout can beat, and against all calls one after the other.
"""

import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from conftest import make_engine, make_jobs, make_talk, run_dialogues  # noqa: E402
from server import PROMPT, serve  # noqa: E402

from chat import load_tokenizer, make_chat  # noqa: E402
from config import Config  # noqa: E402
from simulator import EmotionRules  # noqa: E402
from users.clients import Endpoint  # noqa: E402
from users.llm_user import LLMUser  # noqa: E402


def main(dialogues: int = 32, turns: int = 8, seconds: float = 0.5) -> None:
    torch.set_num_threads(1)
    chat = make_chat(load_tokenizer("bytes"), think=False)
    with tempfile.TemporaryDirectory() as folder, serve(delay=lambda n: seconds) as server:
        for name, text in PROMPT.items():
            Path(folder, f"{name}.txt").write_text(text)
        client = Endpoint(
            Config(user="llm", user_model="m", user_url=server.url, user_concurrency=dialogues)
        )
        user = LLMUser(client, EmotionRules(start=50), prompts=folder)
        engine = make_engine(chat, slots=dialogues, capacity=4096)
        begun = time.perf_counter()
        held = run_dialogues(
            make_jobs(dialogues, 1), engine, chat, user, make_talk(max_turns=turns), (7, 0)
        )
        wall = time.perf_counter() - begun
    calls = len(server.requests)
    chain = calls / dialogues * seconds
    ended = {dialogue.ended for dialogue in held}
    print(
        f"{dialogues} dialogues, {calls} calls of {seconds} s, endings {', '.join(sorted(ended))}"
    )
    print(
        f"rollout {wall:.1f} s; a dialogue's own calls {chain:.1f} s; ratio {wall / chain:.2f}; "
        f"one after the other {calls * seconds:.0f} s"
    )


if __name__ == "__main__":
    main(*(kind(text) for kind, text in zip((int, int, float), sys.argv[1:])))
