"""What a language model as the user costs: calls and tokens, counted on real dialogues with our own
prompts.

    python bench/user_cost.py LOG.jsonl[.gz] [tokenizer] [one_call]

A log's dialogues are held again, its replies told to an LLMUser whose model answers what the log
says the user thought and said. Every prompt and every answer is tokenized and counted; nothing is
generated, no server is asked. The last lines multiply that by a training run (steps x dialogues x
turns of configs/ppo.py).
"""

import json
import sys
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from chat import load_tokenizer  # noqa: E402
from config import load_config  # noqa: E402
from score import read_log  # noqa: E402
from simulator import INTENTIONS, PERSONA_TYPES, EmotionRules, Failed, Profile, canonical, cjk_share  # noqa: E402
from users.clients import Answer  # noqa: E402
from users.llm_user import LLMUser  # noqa: E402


class Script:
    """A client that answers each call with what the log holds for its dialogue, turn and hop, and
    counts tokens.
    """

    def __init__(self, rows: list[dict], count):
        self.rows, self.count, self.waiting = rows, count, []
        self.tokens = defaultdict(
            lambda: [0, 0, 0, 0]
        )  # hop -> calls, constant, changing and answered tokens

    def begin(self) -> None:
        self.waiting = []

    def submit(self, call) -> None:
        heard = [
            message for message in self.rows[call.key[0]]["history"] if message["role"] == "user"
        ]
        message = heard[(call.turn + 1) // 2]
        planning = {key: value for key, value in message["planning"].items() if key != "features"}
        said = {"thinking": message.get("thinking", ""), "response": message["content"]}
        answer = {"appraisal": planning, "reply": said, "both": planning | said}[call.hop]
        answer = json.dumps(answer, ensure_ascii=False)
        for place, amount in enumerate(
            (1, self.count(call.system), self.count(call.user), self.count(answer))
        ):
            self.tokens[call.hop][place] += amount
        self.waiting.append((call, Answer(answer)))

    def poll(self, timeout: float) -> list:
        got, self.waiting = self.waiting, []
        return got


def person(row: dict) -> Profile:
    """Who the user of a logged dialogue was."""
    return Profile(
        id=row["id"], persona=row["player"], scene=row["scene"],
        intention=canonical(row["task"], INTENTIONS, row["id"]),
        persona_type=canonical(row["character"], PERSONA_TYPES, row["id"]),
        language="zh" if cjk_share(row["player"] + row["scene"]) > 0.3 else "en",
        first_talk=row["history"][0]["content"],
    )  # fmt: skip


def main(path: str, tokenizer: str = "models/smollm2-135m-instruct", one_call: str = "") -> None:
    rows = [row for row in read_log(path) if row.get("status", "ok") == "ok"]
    encode = load_tokenizer(tokenizer).encode
    client = Script(rows, lambda text: len(encode(text)))
    user = LLMUser(client, EmotionRules(), one_call=bool(one_call), retries=0)
    turns = 0
    for index, row in enumerate(rows):
        user.start((index, 0), person(row), index)
        user.poll(0.0)
        history = row["history"]
        for reply, _ in zip(history[1::2], history[2::2]):
            user.tell((index, 0), reply["content"])
            heard = []
            while not heard:
                heard = [turn for _, turn in user.poll(0.0)]
            if isinstance(heard[0], Failed):
                sys.exit(f"{path}: dialogue {row['id']}: {heard[0].why}")
            turns += 1
            if heard[0].ended:
                break
    print(f"{path}: {len(rows)} dialogues, {turns} user turns, tokenizer {tokenizer}")
    print(f"{'hop':<12} {'calls':>6} {'constant':>9} {'changing':>9} {'answer':>7}   tokens a call")
    total = [0, 0]
    for hop, (calls, constant, changing, answered) in client.tokens.items():
        print(
            f"{hop:<12} {calls:>6} {constant / calls:>9.0f} {changing / calls:>9.0f} {answered / calls:>7.0f}"
        )
        total = [total[0] + constant + changing, total[1] + answered]
    config = load_config(["configs/ppo.py"])
    asked = config.steps * config.groups * config.group_size * config.max_turns
    calls = sum(hop[0] for hop in client.tokens.values()) / turns
    dialogues = config.groups * config.group_size
    print(
        f"a run of {config.steps} steps x {dialogues} dialogues x {config.max_turns} turns at "
        f"most: {asked * calls:,.0f} calls, {asked * total[0] / turns / 1e6:,.0f} M tokens in, "
        f"{asked * total[1] / turns / 1e6:,.0f} M out"
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
