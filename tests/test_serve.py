"""The endpoint: OpenAI's client gets what transformers says, and many at once get what each would get alone."""

import asyncio
import importlib
import json
import math
import os
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import openai
import pytest
import torch
import transformers
import uvicorn
from conftest import ROOT, tiny_model

import eval as evaluation
import serve
from chat import banned_ids, load_tokenizer, make_chat
from checkpoint import load_model
from config import Config
from engine import Sampling, block_sums
from score import mismatches
from simulator import Appraisal, EmotionRules, Failed, UserTurn
from ui.desk import Desk, News, ServedEngine
from users.clients import Call, Endpoint

pytestmark = pytest.mark.usefixtures("one_thread")
HELLO = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "I lost my job today."}]


@contextmanager
def served(model, tokenizer, slots=4, capacity=256, queue=64, key=""):
    """(client, desk) of a server in a thread of this process, on a free port."""
    chat = make_chat(tokenizer, think=False)
    sampling = Sampling(banned_ids(tokenizer, model.config.vocab_size, (chat.end,)), (chat.end,))
    desk = Desk(ServedEngine(model, sampling, slots, capacity), queue)
    door = serve.listen("127.0.0.1", "0")
    server = uvicorn.Server(uvicorn.Config(serve.make_app(desk, chat, "m", key), log_level="warning"))
    threads = [threading.Thread(target=server.run, args=([door],)), threading.Thread(target=desk.run)]
    [thread.start() for thread in threads]
    url = f"http://127.0.0.1:{door.getsockname()[1]}/v1"
    client = openai.OpenAI(base_url=url, api_key=key or "none", max_retries=0)
    try:
        yield client, desk
    finally:
        desk.close()
        server.should_exit = True
        [thread.join(20) for thread in threads]
        assert not any(thread.is_alive() for thread in threads)


@pytest.fixture(scope="module")
def tiny():
    """A server of a tiny random model with the byte tokenizer."""
    with served(tiny_model(), load_tokenizer("bytes")) as pair:
        yield pair


@pytest.fixture(scope="module")
def real(request):
    """A server of SmolLM2 in fp32, its tokenizer, and the same model in transformers."""
    folder = str(request.getfixturevalue("smollm2"))
    tokenizer = load_tokenizer(folder)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with served(load_model(folder), tokenizer, capacity=512) as (client, desk):
        yield client, desk, tokenizer, theirs


def ask(client, content="hi", **options):
    messages = [{"role": "user", "content": content}]
    return client.chat.completions.create(**{"model": "m", "messages": messages, "max_tokens": 20, "seed": 1} | options)


def test_greedy_answers_are_those_of_transformers_streamed_or_not(real):
    client, _, tokenizer, theirs = real
    talk = list(HELLO)
    for said in (None, "They said it was my fault."):
        talk += [{"role": "user", "content": said}] if said else []
        prompt = tokenizer.apply_chat_template(talk, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        out = theirs.generate(**prompt, max_new_tokens=24, do_sample=False, pad_token_id=0)[0]
        ids = out[prompt["input_ids"].shape[1] :]
        options = {"model": "m", "messages": talk, "temperature": 0, "max_tokens": 24, "logprobs": True}
        answer = client.chat.completions.create(**options)
        text = tokenizer.decode(ids, skip_special_tokens=True).strip()
        assert answer.choices[0].message.content == text
        size = prompt["input_ids"].shape[1]
        assert answer.usage.prompt_tokens == size and answer.usage.completion_tokens == len(ids)
        assert answer.choices[0].finish_reason == ("stop" if ids[-1] == tokenizer.eos_token_id else "length")
        with torch.no_grad():
            logp = theirs(out[None]).logits[0, size - 1 : -1].float().log_softmax(-1).gather(-1, ids[:, None])[:, 0]
        told = [token.logprob for token in answer.choices[0].logprobs.content]
        assert told == pytest.approx(logp[: len(told)].tolist(), abs=2e-3) and len(ids) - len(told) in (0, 1)

        chunks = list(client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
        assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == text
        assert chunks[0].choices[0].delta.role == "assistant" and len(chunks) > 5
        parts = [part.logprob for c in chunks if c.choices for part in c.choices[0].logprobs.content]
        assert parts == pytest.approx(told, abs=1e-5)
        assert chunks[-1].usage == answer.usage and chunks[-2].choices[0].finish_reason is not None
        talk.append({"role": "assistant", "content": text})


def test_a_second_turn_costs_its_own_tokens(real):
    client, desk, *_ = real
    first = client.chat.completions.create(model="m", messages=HELLO, temperature=0, max_tokens=8)
    before = desk.engine.tokens_prefilled
    reply = {"role": "assistant", "content": first.choices[0].message.content}
    talk = [*HELLO, reply, {"role": "user", "content": "Thank you."}]
    second = client.chat.completions.create(model="m", messages=talk, temperature=0, max_tokens=8)
    assert desk.engine.tokens_prefilled - before < second.usage.prompt_tokens - first.usage.prompt_tokens + 3


def test_many_at_once_get_what_each_gets_alone(tiny):
    client, desk = tiny
    requests = [{"content": f"{n} " * (1 + n % 5), "temperature": (0, 0.7, 1, 1.5)[n % 4], "seed": n,
                 "max_tokens": 3 + n % 17} for n in range(40)]  # fmt: skip
    alone = [ask(client, **request).choices[0] for request in requests]
    together = [None] * len(requests)

    def work(n):
        together[n] = ask(client, **requests[n]).choices[0]

    threads = [threading.Thread(target=work, args=(n,)) for n in range(len(requests))]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert [(c.message.content, c.finish_reason) for c in together] == [
        (c.message.content, c.finish_reason) for c in alone]  # fmt: skip
    assert len({c.message.content for c in alone}) > 20 and not desk.active and not desk.waiting


def test_temperature_and_seed_do_what_they_say(tiny):
    client, _ = tiny
    hot = {ask(client, temperature=1.5, seed=n).choices[0].message.content for n in range(8)}
    cold = {ask(client, temperature=0, seed=n).choices[0].message.content for n in range(8)}
    unseeded = {ask(client, temperature=1.5, seed=None).choices[0].message.content for n in range(4)}
    assert len(hot) == 8 and len(cold) == 1 and len(unseeded) == 4


def test_a_stop_string_ends_the_reply_before_it(real):
    client, desk, *_ = real
    options = {"model": "m", "messages": HELLO, "temperature": 0, "max_tokens": 40}
    whole = client.chat.completions.create(**options).choices[0].message.content
    word = whole.split()[4]
    cut = whole[: whole.index(word)].strip()
    for stream in (False, True):
        answer = client.chat.completions.create(**options, stop=["never there", word], stream=stream)
        if stream:
            chunks = list(answer)
            text, reason = "".join(c.choices[0].delta.content for c in chunks), chunks[-1].choices[0].finish_reason
        else:
            text, reason = answer.choices[0].message.content, answer.choices[0].finish_reason
            assert answer.usage.completion_tokens < 15
        assert (text, reason) == (cut, "stop")
    assert client.chat.completions.create(**options).choices[0].message.content == whole, "and leaves no trace"


@pytest.mark.parametrize("change, status, param, words", [
    ({"model": "other"}, 404, "model", "'other' does not exist"),
    ({"messages": []}, 400, "messages", "at least 1"),
    ({"messages": [{"role": "robot", "content": "x"}]}, 400, "messages.0.role", "match"),
    ({"messages": [{"role": "assistant", "content": "x"}]}, 400, "messages", "nothing to reply to"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, 400, "messages",
     "'image_url' is no text"),
    ({"messages": [{"role": "user", "content": "x" * 300}]}, 400, "messages", "do not fit into a context of 256"),
    ({"max_tokens": 0}, 400, "max_tokens", "greater than or equal to 1"),
    ({"temperature": -1}, 400, "temperature", "greater than or equal to 0"),
    ({"temperature": "hot"}, 400, "temperature", "number"),
    ({"top_p": 0.9}, 400, "top_p", "0.9 is not served, only 1"),
    ({"n": 2}, 400, "n", "2 is not served"),
    ({"tools": [{"type": "function"}]}, 400, "tools", "not served"),
    ({"extra_body": {"min_p": 0.1}}, 400, "min_p", "unknown argument"),
])  # fmt: skip
@pytest.mark.parametrize("stream", [False, True])
def test_a_bad_request_gets_the_apis_error_object(tiny, change, status, param, words, stream):
    client, desk = tiny
    with pytest.raises(openai.APIStatusError) as caught:
        ask(client, **change, stream=stream)
    assert caught.value.status_code == status and caught.value.body["param"] == param
    assert caught.value.body["type"] == "invalid_request_error" and words in caught.value.body["message"]
    assert not desk.active


def test_a_body_that_is_no_json_is_refused_and_idle_arguments_are_not(tiny):
    client, _ = tiny
    answer = client._client.post("chat/completions", content=b"{", headers={"content-type": "application/json"})
    assert answer.status_code == 400 and answer.json()["error"]["type"] == "invalid_request_error"
    parts = [{"role": "user", "content": [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]}]
    assert ask(client, messages=parts, user="me", top_p=1, n=1).choices[0].message == ask(client).choices[0].message


@pytest.mark.parametrize("where, body, headers, status", [
    ("chat/completions", b"\xff", {}, 400), ("chat/completions", b"[" * 100_000, {}, 400), ("nowhere", b"{}", {}, 404),
    ("models", b"{}", {}, 405), ("chat/completions", b"x" * ((1 << 22) + 1), {}, 413),
    ("chat/completions", b'{"model": "m", "messages": [{"role": "user", "content": "\\ud83d"}]}', {}, 400),
    ("chat/completions", b'{"model": "\\ud83d", "messages": [{"role": "user", "content": "x"}]}', {}, 404),
    ("chat/completions", b'{"model": "m", "n": "\\ud83d", "messages": [{"role": "user", "content": "x"}]}', {}, 400),
    ("chat/completions", b'{"model": "m", "messages": [{"role": "user", "content": "", "tool_calls": []}]}', {}, 400),
    ("chat/completions", b"{}", {"host": "evil.example"}, 400),
])  # fmt: skip
def test_whatever_comes_the_answer_is_an_error_and_the_server_goes_on(tiny, where, body, headers, status):
    client, _ = tiny
    answer = client._client.post(where, content=body, headers={"content-type": "application/json"} | headers)
    assert answer.status_code == status
    assert "host" in headers or answer.json()["error"]["type"] == "invalid_request_error"
    assert ask(client).usage.completion_tokens
    root = str(client.base_url).removesuffix("v1/")
    assert client._client.get(root + "openapi.json").status_code == 404


def test_talks_do_not_throw_each_other_out_while_there_is_room(tiny):
    client, desk = tiny
    system, costs = "Be kind. " * 10, []
    talks = {name: [{"role": "system", "content": system}, {"role": "user", "content": name * 60}] for name in "AB"}
    for _ in range(2):
        for talk in talks.values():
            before = desk.engine.tokens_prefilled
            answer = client.chat.completions.create(model="m", messages=talk, max_tokens=4, temperature=0)
            costs.append((desk.engine.tokens_prefilled - before, answer.usage.prompt_tokens))
            reply = {"role": "assistant", "content": answer.choices[0].message.content}
            talk += [reply, {"role": "user", "content": "And then?"}]
    assert all(cost < 80 < whole - 105 for cost, whole in costs[2:]), costs


def test_a_desk_that_is_closed_says_so(tiny):
    desk = Desk(tiny[1].engine, 1)
    desk.close()
    with pytest.raises(serve.Refused) as caught:
        desk.submit(None)
    assert caught.value.status == 503


def test_without_the_key_nobody_is_answered():
    with served(tiny_model(), load_tokenizer("bytes"), key="secret") as (client, _):
        assert ask(client).usage.completion_tokens
        for key in ("wrong", "secret2", "s"):
            with pytest.raises(openai.AuthenticationError) as caught:
                ask(client.with_options(api_key=key))
            assert caught.value.code == "invalid_api_key" and "secret" not in str(caught.value)
            with pytest.raises(openai.AuthenticationError):
                client.with_options(api_key=key).models.list()
        answers = [client._client.post("chat/completions", content=b"{", headers={"authorization": header})
                   for header in ("secret", "Basic secret", "")]  # fmt: skip
        assert [answer.status_code for answer in answers] == [401, 401, 401], "before the body is read"


def endless(desk):
    """Have nothing end a reply before its cap."""
    desk.engine.stop_ids = desk.engine.stop_ids.new_tensor([-1])


def wait_for(what, seconds=20.0):
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.01)


@pytest.mark.parametrize("stream", [False, True])
def test_a_full_queue_answers_429_and_a_client_that_goes_frees_its_slot(stream):
    with served(tiny_model(), load_tokenizer("bytes"), slots=1, capacity=100_000, queue=1) as (client, desk):
        endless(desk)
        body = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 99_000, "stream": stream}
        host, port = client.base_url.host, client.base_url.port
        sockets = []
        for count in (1, 2):  # one that is answered, one that waits
            data = json.dumps(body).encode()
            head = "POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
            sockets.append(socket.create_connection((host, port)))
            sockets[-1].sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
            wait_for(lambda n=count: len(desk.active) + len(desk.waiting) == n)
        wait_for(lambda: desk.active and len(desk.waiting) == 1)
        with pytest.raises(openai.RateLimitError) as caught:
            ask(client)
        assert caught.value.type == "rate_limit_exceeded" and caught.value.response.headers["retry-after"] == "1"
        first = desk.active[0]
        sockets[0].close()
        wait_for(lambda: desk.active and desk.active[0] is not first)
        sockets[1].close()
        wait_for(lambda: not desk.active and not desk.engine.busy)
        assert ask(client, max_tokens=3).usage.completion_tokens == 3


def test_a_broken_model_is_an_error_of_the_server_not_silence(capfd):
    model = tiny_model()
    with torch.no_grad():
        next(model.parameters()).fill_(math.nan)
    with served(model, load_tokenizer("bytes")) as (client, desk):
        for _ in range(2):
            with pytest.raises(openai.InternalServerError, match="the engine failed"):
                ask(client)
        with pytest.raises(openai.APIError, match="the engine failed"):
            list(ask(client, stream=True))
        assert not desk.active
    assert "logits are not finite" in capfd.readouterr().err


def test_a_thought_is_told_apart_from_the_reply():
    chat = make_chat(load_tokenizer("bytes"), think=True)

    class Present:
        async def receive(self):
            await asyncio.sleep(60)

    async def told(stream):
        body = serve.Body(model="m", messages=[{"role": "user", "content": "hi"}], stream=stream)
        job, ids = serve.read_job(body, chat, "m", 256), chat.text("<think>hm</think> Yes.") + [chat.end]
        row = serve.Row(0, job.prompt, (1,), 50, sampled=ids, stop="eos")
        for n in range(1, len(ids) + 1):
            job.tell(News(*job.stream.more(ids[:n], n == len(ids)), [], [], row if n == len(ids) else None))
        return [serve.choice(chat, body, job, event, {}) async for event in serve.news(job, Present())]

    parts = asyncio.run(told(True))
    assert "".join(part["delta"]["content"] for part in parts) == "Yes." and parts[-1]["finish_reason"] == "stop"
    assert "".join(part["delta"].get("reasoning_content", "") for part in parts) == "<think>hm</think>"


def test_it_is_a_user_for_training(tiny):
    """Whatever is served can play the simulated user: our own client understands our own server."""
    client, _ = tiny
    url = str(client.base_url).rstrip("/")
    endpoint = Endpoint(Config(user="llm", user_model="m", user_url=url, user_tokens=12, user_timeout=60.0))
    endpoint.probe()
    endpoint.submit(Call((0, 0), 1, 1, "reply", 0, "Be somebody.", "Hello?"))
    wait_for(lambda: (got := endpoint.poll(0.1)) and got[0][1].tokens_out)


@pytest.fixture(scope="module")
def process(request, tmp_path_factory):
    """(URL, model) of `python serve.py` with SmolLM2."""
    command = [sys.executable, "serve.py", str(request.getfixturevalue("smollm2")), "port=0", "slots=4", "threads=1"]
    server = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        line = next(line for line in server.stdout if " at http://" in line)
        yield line.split(" at ")[1].split(";")[0], line.split(" at ")[0]
    finally:
        server.terminate()
        assert server.wait(20) == 0


def test_lm_eval_runs_a_task_against_it(process, tmp_path):
    url, name = process
    pytest.importorskip("lm_eval")
    (tmp_path / "questions.jsonl").write_text("".join(
        json.dumps({"question": f"Say the word {word}.", "answer": word}) + "\n" for word in ("yes", "no", "blue")))
    (tmp_path / "say.yaml").write_text(f"""
task: say
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path}/questions.jsonl}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 16, temperature: 0.0, do_sample: false}}
metric_list: [{{metric: exact_match, ignore_case: true, ignore_punctuation: true}}]
""")
    arguments = f"model={name},base_url={url}/chat/completions,num_concurrent=3,max_retries=1,tokenized_requests=False"
    done = subprocess.run(
        [sys.executable, "-m", "lm_eval", "run", "--model", "local-chat-completions", "--model_args", arguments,
         "--tasks", "say", "--include_path", str(tmp_path), "--apply_chat_template", "--output_path", str(tmp_path),
         "--log_samples"], capture_output=True, text=True, cwd=tmp_path,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "OPENAI_API_KEY": "none"})  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    (samples,) = tmp_path.rglob("samples_say*.jsonl")
    rows = [json.loads(line) for line in samples.read_text().splitlines()]
    client = openai.OpenAI(base_url=url, api_key="none")
    for row in rows:
        asked = {"role": "user", "content": row["doc"]["question"]}
        answer = client.chat.completions.create(model=name, messages=[asked], temperature=0, max_tokens=16, stop=["\n"])
        assert row["resps"][0][0] == answer.choices[0].message.content
    assert len(rows) == 3


@pytest.mark.parametrize("options, words", [
    (["port=none"], "cannot listen"), (["queue=few"], "queue is 'few'"), (["prot=1"], "unknown option 'prot'"),
    (["host=0.0.0.0", "port=0"], "put a key into RLVER_SERVE_KEY"), ([], "model folder"),
])  # fmt: skip
def test_what_is_wrong_is_said_in_one_line_before_weights_are_loaded(options, words, tmp_path):
    folder = [str(tmp_path)] if options else []
    environment = {key: value for key, value in os.environ.items() if key != serve.KEY}
    command = [sys.executable, "serve.py", *folder, *options]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if not options:
        assert done.returncode == 0 and "RLVER_SERVE_KEY" in done.stdout, "help"
    else:
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and words in done.stderr


def test_the_verifiers_runner_rolls_out_with_our_people_and_the_reward_is_what_verify_finds(process, tmp_path):
    url, name = process
    pytest.importorskip("verifiers")
    command = [str(Path(sys.executable).with_name("vf-eval")), "rlver-env", "--model", name, "--client.base-url", url,
               "--no-push", "--no-rich", "-n", "2", "-r", "2", "-o", str(tmp_path), "--sampling.max-tokens", "24",
               "--env.taskset.options", "max_turns=3 start_emotion=40 profiles=data/en_test.jsonl"]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'integrations'}", "HOME": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    (store,) = tmp_path.rglob("traces.jsonl")
    traces = [trace for line in store.read_text().splitlines() for trace in json.loads(line)["traces"]]
    assert len(traces) == 4 and not any(trace.get("errors") for trace in traces)
    rows = [trace["info"]["dialogue"] for trace in traces]
    rules = EmotionRules(start=40.0)
    for trace, row in zip(traces, rows):
        assert mismatches(row, row["id"]) == [] and len(row["history"]) == 7
        emotion = rules.start
        for message in row["history"][2::2]:
            emotion = rules.step(emotion, message["planning"]["change"])
        assert trace["rewards"]["emotion"]["score"] == pytest.approx(emotion / 100)
        said = [node["message"]["content"] for node in trace["nodes"] if node["message"]["role"] == "assistant"]
        assert said == [m["content"] for m in row["history"] if m["role"] == "assistant"]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert evaluation.main(["verify", str(tmp_path / "log.jsonl")]) == 0


class Sour:
    """A user of many dialogues that are answered late and out of order: takes two replies badly, then leaves; where its
    number is odd it fails at the second."""

    def __init__(self, *args):
        self.count, self.ready = {}, []

    def start(self, key, profile, seed):
        self.count[key] = 0
        self.ready.append((key, UserTurn(f"Hello {key[0]}.", 15.0)))

    def tell(self, key, reply):
        self.count[key] += 1
        n = self.count[key]
        assert reply == f"reply to {'No 1' if n == 2 else 'Hello'} {key[0]}."
        now, felt = 15.0 - 4 * n, Appraisal("a", "b", "c", "d", -4.0)
        turn = UserTurn(f"No {n} {key[0]}.", now, felt, -4.0, "left" if now < 10 else None)
        self.ready.append((key, Failed("gone") if key[0] % 2 and n == 2 else turn))

    def poll(self, timeout):
        time.sleep(0.01)
        ready, self.ready = self.ready[::-1], []
        return ready


class Talk:
    """An interaction of the verifiers library, as far as our environment uses one."""

    def __init__(self):
        self.trace, self.heard = SimpleNamespace(info={}), []

    async def __aenter__(self):
        return self

    async def __aexit__(self, *error):
        pass

    async def turn(self, text):
        self.heard.append(text)
        return SimpleNamespace(terminated=False, last_reply=f"reply to {text}")


def test_a_person_who_has_left_is_not_talked_to_any_more_and_one_who_fails_counts_nowhere(monkeypatch):
    """Six rollouts at once with one user: each hears its own person's answers."""
    vf = pytest.importorskip("verifiers.v1")
    monkeypatch.syspath_prepend(str(ROOT / "integrations"))
    rlver_env = importlib.import_module("rlver_env")
    monkeypatch.setattr(rlver_env, "make_user", Sour)
    people = rlver_env.PeopleConfig(id="rlver-env", options="max_turns=9 profiles=data/en_test.jsonl")
    env = rlver_env.SentientEnv(rlver_env.SentientConfig(taskset=people))
    task = SimpleNamespace(data=SimpleNamespace(person="en-test-praise-negative"))
    talks = [Talk() for _ in range(6)]

    async def rollouts():
        runs = [env.run(task, SimpleNamespace(policy=SimpleNamespace(interaction=lambda task, talk=talk: talk)))
                for talk in talks]  # fmt: skip
        return await asyncio.wait_for(asyncio.gather(*runs, return_exceptions=True), 20)

    for n, (talk, end) in enumerate(zip(talks, asyncio.run(rollouts()))):
        assert talk.heard == [f"Hello {n}.", f"No 1 {n}."]
        if n % 2:
            assert isinstance(end, vf.TaskError) and "gone" in str(end) and not talk.trace.info
        else:
            row = talk.trace.info["dialogue"]
            assert end is None and row["ended"] == "left" and mismatches(row, "here") == []
            assert asyncio.run(rlver_env.Person.emotion(None, talk.trace)) == pytest.approx(0.07)


def test_each_slot_is_sampled_at_its_own_temperature_and_ties_at_0_go_to_the_first():
    model, slots = tiny_model(), 200
    engine = ServedEngine(model, Sampling(torch.zeros(264, dtype=torch.bool)), slots, 8)
    engine.noise[:slots, 3] = (torch.arange(slots) + 0.5) / slots
    odds = torch.zeros(slots, 264)
    odds[:, 5], odds[:, 9], odds[:, 70] = 1.0, 1.0, 0.25
    slot, position = torch.arange(slots), torch.full((slots,), 3)
    for heat in (0.0, 0.5, 1.0, 2.0):
        engine.heat[:] = heat
        chosen = engine.choose(odds, block_sums(odds), slot, position)
        last = 0.25 ** (1 / heat) if heat else 0.0
        expected = [1 / (2 + last), 1 / (2 + last), last / (2 + last)] if heat else [1.0, 0.0, 0.0]
        assert [(chosen == token).float().mean().item() for token in (5, 9, 70)] == pytest.approx(expected, abs=0.006)
