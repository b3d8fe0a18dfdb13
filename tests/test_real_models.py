"""Users that are real language models: `transformers serve` with SmolLM2 on loopback, and SmolLM2 against SmolLM2.

So small a model may well give no readable appraisal. The first test holds either way; the second frames the model's own
words with a number, so that something can be learnt from.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from conftest import make_engine, make_jobs, make_talk, run_dialogues
from server import prompts_folder  # noqa: F401

import train
import users
from config import Config
from rollout import log_line
from score import mismatches, read_log
from simulator import EmotionRules
from users.clients import Answer, Endpoint, Local
from users.llm_user import HOPS, LLMUser, usage_metrics

pytestmark = pytest.mark.usefixtures("one_thread")
START = 120  # seconds that the server may take to load the model


@pytest.fixture
def transformers_serve(smollm2, tmp_path):
    """The URL of a `transformers serve` with SmolLM2-135M-Instruct."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [str(Path(sys.executable).with_name("transformers")), "serve", str(smollm2), "--host", "127.0.0.1"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with open(tmp_path / "server.log", "w") as log:
        server = subprocess.Popen([*command, "--port", str(port), "--device", "cpu"], env=environment, stdout=log,
                                  stderr=log)  # fmt: skip
    try:
        for _ in range(START):
            assert server.poll() is None, (tmp_path / "server.log").read_text()
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1)
                break
            except OSError:
                time.sleep(1)
        else:
            pytest.fail((tmp_path / "server.log").read_text())
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        server.wait(20)


def test_a_real_server_is_talked_to_whether_or_not_its_model_can_be_understood(
    transformers_serve, smollm2, chat, folder
):
    client = Endpoint(Config(
        user="llm", user_model=str(smollm2), user_url=transformers_serve, user_temperature=0.7, user_tokens=24,
        user_concurrency=2, user_retries=1, user_timeout=120.0,
    ))  # fmt: skip
    client.probe()
    user = LLMUser(client, EmotionRules(), prompts=str(folder), one_call=True, retries=1)
    talk = make_talk(max_turns=1, reply_tokens=8)
    dialogues = run_dialogues(make_jobs(1, 2), make_engine(chat, slots=2, capacity=1024), chat, user, talk, (7, 0))
    usage = usage_metrics([user.drain()])
    assert 2 <= usage["simulator/llm_calls"] <= 10 and usage["simulator/latency_p50"] > 0
    assert usage["simulator/tokens_in"] > 100 and usage["simulator/tokens_out"] > 0, "the server counts tokens"
    for dialogue in dialogues:
        row = log_line(dialogue)
        if dialogue.completed:
            assert dialogue.turns[-1].user.appraisal.change is not None
        else:
            assert "could not be understood (dialogue 0." in dialogue.why and "reward" not in row
            assert usage["simulator/parse_failures"] >= 2
        assert not mismatches(row, "")


def test_smollm2_learns_two_steps_of_grpo_from_smollm2(smollm2, folder, tmp_path, monkeypatch):
    heard, poll = [], Local.poll

    def framed(client, timeout):
        answers = poll(client, timeout)
        heard.extend((client, call, answer.text) for call, answer in answers)
        others = dict.fromkeys(HOPS["both"], "so")
        frame = lambda text: json.dumps({**others, "change": len(text) % 9 - 4, "response": text or "..."})  # noqa: E731
        return [(call, Answer(frame(answer.text), tokens_out=answer.tokens_out)) for call, answer in answers]

    monkeypatch.setattr(Local, "poll", framed)
    monkeypatch.setattr(users, "connect", users.connect.__wrapped__)
    rows = (Path(__file__).parent.parent / "data/en_train.jsonl").read_text().splitlines()[:2]
    (tmp_path / "two.jsonl").write_text("\n".join(rows))
    config = Config(
        run=str(tmp_path / "run"), model=str(smollm2), algorithm="grpo", user="local", user_model=str(smollm2),
        user_tokens=12, user_context=600, user_concurrency=4, one_call=True, prompts=str(folder), steps=2, groups=2,
        group_size=2, max_turns=2, reply_tokens=8, context_tokens=512, profiles=str(tmp_path / "two.jsonl"), warmup=0,
        save_every=0, threads=1, device="cpu",
    )  # fmt: skip
    try:
        train.train(config)
        logged = read_log(f"{config.run}/dialogues.jsonl")
        metrics = [json.loads(line) for line in Path(config.run, "metrics.jsonl").read_text().splitlines()]
    finally:
        shutil.rmtree(config.run, ignore_errors=True)  # two gigabytes
    assert len(logged) == 8 and not [wrong for row in logged for wrong in mismatches(row, "")]
    assert len({id(client) for client, _, _ in heard}) == 1
    texts = {text for _, _, text in heard}
    said = [message["content"] for row in logged for message in row["history"][2::2]]
    assert len(said) == 16 and set(said) <= texts | {"..."} and len(set(said)) > 8, "every dialogue has its own noise"
    for row in metrics:
        assert row["simulator/failed"] == 0 and row["skipped"] == 0 and row["policy/grad_norm"] > 0
        assert row["simulator/llm_calls"] >= 8 and row["simulator/tokens_out"] > 0
