"""Users that are language models: what a server may do to us, dialogues, record and replay, training runs, Local."""

import itertools
import json
import logging
import random
import time
from pathlib import Path
from types import SimpleNamespace

import openai
import pytest
import torch
from conftest import make_engine, make_jobs, make_talk, run_dialogues, tiny_model
from runs import argv, metrics, restored, tiny_runs  # noqa: F401
from server import ideal, prompts_folder, serve  # noqa: F401

import eval as evaluation
import train
import users
from chat import load_tokenizer
from checkpoint import checkpoints, save_model
from config import Config, InputError, load_config
from rollout import USER_STREAM, log_line
from scripts.plan import ROOT
from simulator import EmotionRules, hash_key
from users.clients import Answer, Call, Endpoint, Record
from users.llm_user import LLMUser, usage_metrics

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def no_backoff(monkeypatch):
    """The openai client's tries follow each other at once, unless a server asks for more."""
    monkeypatch.setattr(openai._base_client, "INITIAL_RETRY_DELAY", 0.0)


# --- the endpoint


def endpoint(server, **changes):
    values = dict(user="llm", user_model="m", user_url=server.url, user_temperature=0.7, user_tokens=64,
                  user_concurrency=4, user_retries=3, user_timeout=0.4)  # fmt: skip
    return Endpoint(Config(**{**values, **changes}))


def call(member=0, turn=1, **changes):
    values = dict(key=(0, member), seed=7 + member, turn=turn, hop="appraisal", attempt=0, system='"change"',
                  user=f"member {member}")  # fmt: skip
    return Call(**{**values, **changes})


def ask(client, *calls):
    """Submit calls and wait for their answers, in the order of the calls."""
    for one in calls:
        client.submit(one)
    got, limit = {}, time.monotonic() + 15
    while len(got) < len(calls) and time.monotonic() < limit:
        got |= dict(client.poll(0.2))
    return [got[one] for one in calls]


@pytest.mark.parametrize("fault", ["429 at once", "500", "503", "drop", "hang"])
def test_a_passing_fault_is_tried_again_and_answered(fault):
    with serve(fault) as server:
        client = endpoint(server)
        begun = time.monotonic()
        (answer,) = ask(client, call())
        assert answer.text == ideal('"change"', "member 0") and not answer.failed and not answer.cut
        assert time.monotonic() - begun < 3 and len(server.requests) == 2
        assert (answer.retries, answer.tokens_in, answer.tokens_out) == (1, 100, 10) and answer.seconds > 0


def test_what_the_calls_of_a_rollout_cost_is_counted_and_handed_over_once(chat, folder):
    with serve("500", "blank") as server:
        dialogues, user = hold(chat, endpoint(server), folder, make_jobs(1, 1), turns=1, and_user=True)
        assert dialogues[0].completed and len(server.requests) == 4
        usage = usage_metrics([user.drain(), user.drain()])
        assert usage.pop("simulator/latency_p95") > 0 and usage.pop("simulator/latency_p50") > 0
        counts = dict(llm_calls=4, retries=1, parse_failures=1, clamped=0, tokens_in=300, tokens_out=30)
        assert usage == {f"simulator/{name}": count for name, count in counts.items()}
        assert not any(usage_metrics([user.drain()]).values())


@pytest.mark.parametrize("fault", ["blank", "not json", "html", "no message", "trickle"])
def test_an_answer_that_is_none_is_empty_in_time_and_the_user_asks_again(fault, chat, folder):
    with serve(fault) as server:
        client = endpoint(server)
        begun = time.monotonic()
        assert not ask(client, call())[0].text and time.monotonic() - begun < 2, "whatever trickles in"
        assert len(server.requests) == 1
    with serve(fault) as server:
        (dialogue,), user = hold(chat, endpoint(server), folder, make_jobs(1, 1), turns=1, and_user=True)
        assert dialogue.completed and usage_metrics([user.drain()])["simulator/parse_failures"] == 1


def test_a_server_that_hangs_for_ever_fails_the_call_in_bounded_time():
    with serve(fault=lambda n: "hang") as server:
        begun = time.monotonic()
        assert "in time" in ask(endpoint(server, user_retries=2, user_timeout=0.3), call())[0].failed
        assert 0.9 < time.monotonic() - begun < 3 and len(server.requests) == 3


def test_what_is_asked():
    with serve() as server:
        assert ask(endpoint(server), call(attempt=2))[0].text
        sent = server.requests[0]
        assert (sent["path"], sent["model"], sent["temperature"]) == ("/v1/chat/completions", "m", 0.7)
        assert (sent["max_tokens"], sent["seed"], sent["response_format"]) == (64, 9, {"type": "json_object"})
        assert [message["content"] for message in sent["messages"]] == ['"change"', "member 0"]


@pytest.mark.parametrize("status", ["400", "401", "402", "403", "404", "422"])
def test_a_refused_call_fails_at_once_and_the_next_is_asked_all_the_same(status):
    """One 403 may be about one dialogue's words alone; it does not condemn the endpoint."""
    with serve(status) as server:
        client = endpoint(server)
        assert status in ask(client, call())[0].failed and len(server.requests) == 1
        assert ask(client, call(1))[0].text and len(server.requests) == 2


def test_an_answer_that_was_cut_at_its_cap_is_asked_for_again(chat, folder):
    with serve("cut", "cut") as server:
        assert ask(endpoint(server), call())[0].cut
        (dialogue,), user = hold(chat, endpoint(server), folder, make_jobs(1, 1), turns=1, and_user=True)
        assert dialogue.completed and usage_metrics([user.drain()])["simulator/parse_failures"] == 1


def test_retry_after_is_honoured():
    with serve("429", "429") as server:
        assert ask(endpoint(server), call())[0].text
        assert all(b - a >= 0.3 for a, b in zip(server.times, server.times[1:])) and len(server.times) == 3


def test_the_key_is_sent_and_never_told(monkeypatch, caplog):
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("USER_KEY", "sk-very-secret")
    with serve("500", "429 at once", "drop", "hang", "401") as server:
        client = endpoint(server, user_key_env="USER_KEY", user_retries=9)
        failed = ask(client, call())[0].failed
        assert {sent["key"] for sent in server.requests} == {"Bearer sk-very-secret"} and "401" in failed
        assert "secret" not in failed + caplog.text + repr(client.__dict__)
    with serve("401") as server, pytest.raises(InputError) as error:
        endpoint(server, user_key_env="USER_KEY").probe()
    assert "secret" not in str(error.value) + caplog.text
    for name in ("", "  "):
        monkeypatch.setenv("USER_KEY", name)
        with pytest.raises(InputError, match="user_key_env.*USER_KEY"):
            endpoint(server, user_key_env="USER_KEY")


# --- asked once before anything is loaded


def test_the_probe_asks_once_and_leaves_no_trace():
    with serve() as server:
        client = endpoint(server)
        client.probe()
        assert len(server.requests) == 1 and server.requests[0]["max_tokens"] == 64 and client.json_mode


def test_a_server_that_refuses_json_mode_is_not_asked_for_it_again():
    with serve(fault=lambda n: "400 on response_format") as server:
        client = endpoint(server)
        client.probe()
        assert all(answer.text for answer in ask(client, call(), call(1)))
        assert ["response_format" in sent for sent in server.requests] == [True, False, False, False]


@pytest.mark.parametrize("fault", ["429 at once", "503", "500", "hang", "trickle"])
def test_a_server_that_is_busy_or_still_loading_is_one(fault):
    with serve(fault) as server:
        endpoint(server).probe()
        assert len(server.requests) == 1


@pytest.mark.parametrize("fault, words", [
    ("401", "401; look at the key"), ("404", "404; look at user_model and the path"),
    ("400", "400; look at user_model"),
    ("html", "is no OpenAI-compatible server"), ("drop", "nobody answers"),
    ("405", "405; look at user_model and the path"),
])  # fmt: skip
def test_a_run_whose_endpoint_is_of_no_use_ends_before_anything_is_loaded(tiny, folder, monkeypatch, fault, words):
    monkeypatch.setattr(train, "build", lambda *_: pytest.fail("weights were loaded"))
    with serve(fault=lambda n: fault) as server:
        config = llm_run(tiny, server, folder)
        begun = time.monotonic()
        with pytest.raises(InputError, match=f"user_url.*{words}"):
            train.train(config)
        assert time.monotonic() - begun < 3 and not Path(config.run).exists()


@pytest.mark.parametrize("url, words", [
    ("notaurl", "no http address"), ("ftp://host/v1", "no http address"), ("http://", "no http address"),
    ("http://127.0.0.1:80o1/v1", "no http address"), ("http://[::1", "no http address"),
    ("me:hush-hush@host/v1", "no http address"),
    ("http://me:hush-hush@host/v1", "user_key_env"), ("https://host/v1?api_key=hush-hush", "user_key_env"),
    ("http://127.0.0.1:9/v1", "nobody answers"),
])  # fmt: skip
def test_an_address_that_is_none_and_a_closed_port_are_a_line_within_seconds(tiny, folder, url, words):
    config = llm_run(tiny, SimpleNamespace(url=url), folder)
    begun = time.monotonic()
    with pytest.raises(InputError, match=words) as error:
        train.train(config)
    assert time.monotonic() - begun < 3 and not Path(config.run).exists()
    assert "hush" not in str(error.value) and "\n" not in str(error.value)


# --- the user


class Patient:
    """A client without a network that answers after a random number of polls, now and then only when nothing runs."""

    def __init__(self, seed=0):
        self.random, self.waiting, self.calls = random.Random(seed), [], []

    def begin(self):
        self.waiting = []

    def submit(self, call):
        self.calls.append(call)
        self.waiting.append([self.random.choice((0, 1, 3, 999)), call])

    def poll(self, timeout):
        ready = [call for wait, call in self.waiting if wait <= 0 or (timeout and wait > 99)]
        self.waiting = [[wait - 1, call] for wait, call in self.waiting if call not in ready]
        return [(call, Answer(ideal(call.system, call.user))) for call in ready]


def hold(chat, client, folder="", jobs=None, slots=4, turns=3, and_user=False, **changes):
    """Dialogues of the tiny policy with an LLMUser, and the user if it is asked for."""
    user = LLMUser(client, EmotionRules(), prompts=str(folder), **changes)
    engine, talk = make_engine(chat, slots=slots, capacity=1024), make_talk(max_turns=turns)
    dialogues = run_dialogues(jobs or make_jobs(2, 2), engine, chat, user, talk, (7, 0))
    return (dialogues, user) if and_user else dialogues


def logged(dialogues):
    """The logs, and beside them every log-probability: equal only if all batches had the same shapes."""
    lines = [json.dumps(log_line(dialogue), ensure_ascii=False) for dialogue in dialogues]
    return lines, [turn.logps for dialogue in dialogues for turn in dialogue.turns]


@pytest.mark.parametrize("one_call", [False, True])
@pytest.mark.parametrize("prompts", ["ours", "short"])
def test_emotions_follow_the_logged_changes_and_hops_come_in_order(chat, folder, one_call, prompts):
    client = Patient()
    dialogues = hold(chat, client, folder if prompts == "short" else "", one_call=one_call)
    for dialogue in dialogues:
        row, turns = log_line(dialogue), dialogue.turns
        assert evaluation.mismatches(row, "here") == [] and dialogue.ended == "max_turns" and len(turns) == 3
        asked = [call for call in client.calls if call.key == dialogue.key]
        assert [call.hop for call in asked] == (["both"] if one_call else ["appraisal", "reply"]) * 3
        assert [call.turn for call in asked[:: 2 - one_call]] == [1, 3, 5]
        assert all(dialogue.profile.scene in call.system and turns[0].reply.text in call.user for call in asked)
        appraised, last = [json.loads(ideal(call.system, call.user)) for call in asked[:: 2 - one_call]], asked[-1]
        assert [turn.user.appraisal.change for turn in turns] == [answer["change"] for answer in appraised]
        assert [turn.user.text for turn in turns] == [
            json.loads(ideal(call.system, call.user))["response"] for call in asked[1 - one_call :: 2 - one_call]]
        assert last.user.count(turns[1].user.text) == 1 and f"Partner: {turns[1].reply.text}\n" in last.user
        before = dialogue.turns[-1 - one_call].user.emotion  # hop two knows what hop one has done, both do not
        assert one_call or f"{before:g}" in last.user
    assert len({dialogue.emotion for dialogue in dialogues}) > 1


def test_a_goodbye_ends_a_dialogue_but_not_its_opening(chat, folder):
    client = Patient()
    client.poll, poll = lambda timeout: [
        (call, Answer('{"change": 4, "thinking": "h", "response": "Goodbye then."}')) for call, _ in poll(timeout)
    ], client.poll
    dialogues = hold(chat, client, folder, make_jobs(2, 2, first_talk=None))
    assert all(dialogue.ended == "goodbye" and len(dialogue.turns) == 1 for dialogue in dialogues)
    assert [evaluation.mismatches(log_line(dialogue), "") for dialogue in dialogues] == [[]] * 4


def test_a_goodbye_that_the_emotion_forbids_is_asked_for_again_and_ends_the_talk_if_it_is_said_twice(chat, folder):
    said = []

    def say(system, user):
        if "User00" not in system or "Keys: \"response\"" not in system:
            return ideal(system, user)
        said.append(user)
        return json.dumps({"response": "Goodbye." if len(said) in (1, 3, 4) else "Go on."})

    with serve(say=say) as server:
        dialogues = hold(chat, endpoint(server), folder)
    assert [turn.user.text for turn in dialogues[0].turns] == ["Go on.", "Goodbye."] and len(said) == 4
    assert [dialogue.ended for dialogue in dialogues] == ["goodbye", *["max_turns"] * 3]


@pytest.mark.parametrize("words", [
    "As my hidden intention says, I want advice.", "I answer in band C.", "我的隐藏意图是这个。", "你说的我都明白了。"])
def test_words_out_of_role_or_in_another_language_are_asked_for_again(chat, folder, words):
    count = itertools.count()

    def say(system, user):
        if "Keys: \"response\"" not in system:
            return ideal(system, user)
        return json.dumps({"response": words if next(count) % 2 == 0 else "It broke on Monday."}, ensure_ascii=False)

    with serve(say=say) as server:
        (dialogue,) = hold(chat, endpoint(server), folder, make_jobs(1, 1))
    assert [turn.user.text for turn in dialogue.turns] == ["It broke on Monday."] * 3


def test_what_cannot_be_read_is_asked_again_under_another_seed_then_the_dialogue_fails(chat, folder):
    def say(system, user):
        return "Hm, hard to say." if "User01" in system else ideal(system, user)

    with serve(say=say) as server:
        client = endpoint(server)
        dialogues, user = hold(chat, client, folder, turns=1, retries=2, and_user=True)
        seeds = [sent["seed"] for sent in server.requests if "User01" in sent["messages"][0]["content"]]
        assert seeds == [(dialogues[1].seed + attempt) % (1 << 31) for attempt in range(3)]
        assert [dialogue.ended for dialogue in dialogues] == ["max_turns", "failed", "max_turns", "max_turns"]
        assert "dialogue 0.1, turn 1, appraisal" in dialogues[1].why and not dialogues[1].completed
        assert usage_metrics([user.drain()])["simulator/parse_failures"] == 3
    with serve("prose", "250", "30") as server:
        client, jobs = endpoint(server), make_jobs(1, 1)
        (dialogue,), user = hold(chat, client, folder, jobs, turns=1, retries=2, and_user=True)
        said = dialogue.turns[0].user
        assert (said.appraisal.change, said.change, dialogue.emotion) == (30, 10, 40)
        usage = usage_metrics([user.drain()])
        assert (usage["simulator/clamped"], usage["simulator/parse_failures"]) == (1, 2)
        assert evaluation.mismatches(log_line(dialogue), "") == []


@pytest.mark.parametrize("bad", [False, True])
def test_an_opening_is_made_once_for_a_group_and_again_where_its_maker_fails(chat, folder, bad):
    client = Patient()
    client.poll, poll = lambda timeout: [
        (call, Answer(failed="mute") if bad and call.key == (0, 0) else answer) for call, answer in poll(timeout)
    ], client.poll
    dialogues = hold(chat, client, folder, make_jobs(2, 3, first_talk=None), slots=6)
    made = [call.key for call in client.calls if call.hop == "opening"]
    assert sorted(made) == ([(0, 0), (0, 1), (1, 0)] if bad else [(0, 0), (1, 0)])
    for group in range(2):
        assert len({d.opening.text for d in dialogues if d.key[0] == group and d.completed}) == 1
    assert [d.why for d in dialogues if not d.completed] == ["mute"] * bad


# --- record and replay


@pytest.mark.parametrize("seed", range(4))
def test_a_replay_is_the_same_to_the_bit_however_answers_were_delayed(chat, folder, tmp_path, seed):
    path, jobs = tmp_path / "new" / "record.jsonl", make_jobs(3, 2, first_talk=None)
    recorded = logged(hold(chat, Record(path, {}, Patient(seed)), folder, jobs, slots=3))
    size = path.stat().st_size
    assert logged(hold(chat, Record(path, {}), folder, jobs, slots=3)) == recorded
    assert path.stat().st_size == size


def test_a_replay_needs_no_server_and_names_a_call_that_was_not_recorded(chat, folder, tmp_path):
    path, shaky = tmp_path / "record.jsonl", {3: "500", 5: "blank", 8: "prose"}
    with serve(fault=lambda n: shaky.get(n, ""), delay=lambda n: n * 7 % 5 / 100) as server:
        config = Config(user="llm", user_model="m", user_url=server.url, record="record", record_file=str(path),
                        run=str(tmp_path / "run"))  # fmt: skip
        recorded = logged(hold(chat, users.make_client(config), folder))
        made, replay = server.connections, Config(**{**vars(config), "record": "replay", "user_key_env": "NONE"})
        assert logged(hold(chat, users.make_client(replay), folder)) == recorded
        assert server.connections == made > 0
        with pytest.raises(InputError, match=r"record.jsonl: dialogue \d\.\d, turn 1, appraisal"):
            hold(chat, users.make_client(replay), folder, make_jobs(2, 2, scene="Another."))
        with pytest.raises(InputError, match=r"dialogue \d\.\d, turn 7, appraisal"):
            hold(chat, users.make_client(replay), folder, turns=4)
    path.write_bytes(path.read_bytes() + b'{"address": ')  # a kill in the middle of a line
    assert logged(hold(chat, Record(path, users.make_client(replay).settings), folder)) == recorded
    Record(path, {}, Patient())
    assert path.read_bytes().endswith(b"}\n")
    path.write_text("[]\n")
    for bad in (path, tmp_path / "nothing.jsonl"):
        with pytest.raises(InputError, match=bad.name):
            Record(bad, {})


# --- training runs


def shaky(server, rate=0.3, doomed=()):
    """Transient faults, all kinds in turn, for a share of the requests, and always for some dialogues' seeds."""
    kinds = ["429 at once", "500", "drop", "hang", "blank", "prose", "250", "not json", "html"]
    bad = {(seed + attempt) % (1 << 31) for seed in doomed for attempt in range(9)}

    def fault(n):
        if server.requests[n]["seed"] in bad:
            return "500"
        return kinds[hash_key(n, 5) % len(kinds)] if hash_key(n) % 100 < 100 * rate else ""

    return fault


def llm_run(tiny, server, folder, **changes):
    values = dict(algorithm="grpo", user="llm", user_model="m", user_url=server.url, prompts=str(folder), steps=2,
                  user_timeout=0.3, user_retries=5)  # fmt: skip
    return tiny(**{**values, **changes})


def test_a_run_with_a_shaky_server_completes_and_excludes_failed_dialogues(tiny, folder):
    with serve() as server:
        server.fault = shaky(server, doomed=[hash_key(0, 0, 0, 1, USER_STREAM)])  # seed, step, group, member
        config = llm_run(tiny, server, folder)
        assert train.train(config).is_dir()
    rows = evaluation.read_log(f"{config.run}/dialogues.jsonl")
    assert len(rows) == 16 and not [row for row in rows if evaluation.mismatches(row, "")]
    for step, numbers in enumerate(metrics(config), 1):
        good = [row for row in rows if row["step"] == step and row["status"] == "ok"]
        assert numbers["simulator/failed"] == 8 - len(good) <= 2
        assert numbers["reward/mean"] == pytest.approx(sum(row["reward"] for row in good) / len(good))
        assert numbers["simulator/retries"] > 0 and numbers["simulator/llm_calls"] > 8 * 4
        for row in good:  # no reward without an appraisal
            assert all("change" in said["planning"] for said in row["history"][2::2]) and len(row["history"]) == 5
    failed = [row for row in rows if row["status"] == "failed"]
    assert {"reward", "emo_point"}.isdisjoint(*failed) and (1, [0, 1]) in [(row["step"], row["key"]) for row in failed]


def test_a_run_whose_key_is_refused_stops_with_a_checkpoint_and_says_why(tiny, folder, capfd):
    with serve(fault=lambda n: "401" if n > 8 * 4 else "") as server:
        config = llm_run(tiny, server, folder)
        assert train.main(argv(config)) == 1
        assert len(server.requests) == 1 + 8 * 4 + 2 * 8, "probe, first step, and two tries of the second"
    assert "8 of 8 users failed, twice; the first said: the user's server answered 401" in capfd.readouterr().err
    assert [path.name for path in checkpoints(Path(config.run))] == ["step_1"]


def test_a_run_with_a_dead_server_stops_with_a_checkpoint_and_says_why(tiny, folder, capfd):
    with serve(fault=lambda n: "drop" if n > 8 * 4 else "") as server:
        config = llm_run(tiny, server, folder, user_retries=1)
        assert train.main(argv(config)) == 1
    assert "8 of 8 users failed, twice" in capfd.readouterr().err
    assert [path.name for path in checkpoints(Path(config.run))] == ["step_1"]


def test_a_benchmark_counts_what_all_its_repeats_cost(tiny, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "make_user", users.make_user)
    with serve() as server:
        config = llm_run(tiny, server, folder, seeds=2, eval_max_turns=2)
        options = [text for text in argv(config) if not text.startswith(("run=", "model="))]
        assert evaluation.main(["run", config.model, *options, f"out={tmp_path / 'out'}"]) == 0
        result = json.loads((tmp_path / "out" / "result.json").read_text())
        assert result["n"] == 12 and result["cost"]["simulator/llm_calls"] == 12 * 2 == len(server.requests) - 1


def test_an_evaluation_whose_users_mostly_fail_has_no_score(tiny, folder, monkeypatch):
    monkeypatch.setattr(evaluation, "make_user", users.make_user)
    with serve(fault=lambda n: "403" if n > 8 * 4 else "") as server:
        config = llm_run(tiny, server, folder, steps=1, eval_every=1)
        assert train.train(config).is_dir()
    assert "eval/score" not in metrics(config)[0] and not Path(config.run, "eval").exists()


def test_a_missing_key_leaves_no_run_behind(tiny, folder):
    with serve() as server, pytest.raises(InputError, match="user_key_env"):
        train.train(config := llm_run(tiny, server, folder, user_key_env="NO_SUCH_KEY"))
    assert not Path(config.run).exists()


def test_a_replayed_run_is_the_recorded_one_evaluations_included(tiny, folder, monkeypatch):
    monkeypatch.setattr(evaluation, "make_user", users.make_user)
    people, count = folder.parent / "people.jsonl", itertools.count()
    rows = [json.loads(line) for line in people.read_text().splitlines()]
    rows[::2] = [{key: row[key] for key in row if key != "first_talk"} for row in rows[::2]]
    people.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with serve(say=lambda system, user: ideal(system, f"{user}{next(count)}")) as server:  # never twice the same
        config = llm_run(tiny, server, folder, record="record", eval_every=1)
        train.train(config)
        made, before = server.connections, Path(config.run)
        replay = dict(run="again", record="replay", record_file=str(before / "record.jsonl"))
        train.train(again := llm_run(tiny, server, folder, eval_every=1, **replay))
        assert server.connections == made
    logs = [f"{place}dialogues.jsonl" for place in ("", "eval/step_1/", "eval/step_2/")]
    for name in [*logs, "model/model.safetensors"]:
        assert (before / name).read_bytes() == (Path(again.run) / name).read_bytes(), name


# --- a local checkpoint


@pytest.mark.parametrize("speaks", [False, True])
def test_a_local_user_completes_a_rollout_and_answers_the_same_in_any_batch(tiny, chat, folder, monkeypatch, speaks):
    save_model(tiny_model(), load_tokenizer("bytes"), folder.parent / "user")
    config = tiny(user="local", user_model=str(folder.parent / "user"), user_tokens=8, user_context=400,
                  user_concurrency=3, user_retries=1, prompts=str(folder))  # fmt: skip
    client = users.make_client(config)
    calls = [call(member, user=f"{member}" * 50 * member) for member in range(4)]
    calls += [call(1, turn=3), call(4, user="x" * 400)]
    together = ask(client, *calls)
    assert "too long" in together[-1].failed and len({answer.text for answer in together[:-1]}) == 5
    for one, answer in zip(calls, together):
        client.begin()
        assert ask(client, one) == [answer]
    if speaks:
        said, poll = Answer('{"change": 4, "response": "Hm."}'), client.poll
        monkeypatch.setattr(client, "poll", lambda timeout: [(one, said) for one, _ in poll(timeout)])
    dialogues, user = hold(chat, client, folder, retries=1, turns=2, and_user=True)
    ended = [dialogue.ended for dialogue in dialogues]
    assert ended == ["max_turns" if speaks else "failed"] * 4
    usage = usage_metrics([user.drain()])
    assert usage["simulator/llm_calls"] == (16 if speaks else 8)
    assert speaks or usage["simulator/tokens_out"] > 0


def test_what_the_prompts_of_a_hop_have_in_common_is_prefilled_once(tiny, folder):
    """Two dialogues, two hops each: at their second turn only what is new is computed, whatever came between."""
    save_model(tiny_model(), load_tokenizer("bytes"), folder.parent / "user")
    config = tiny(user="local", user_model=str(folder.parent / "user"), user_tokens=4, user_context=700,
                  user_concurrency=2, prompts=str(folder))  # fmt: skip
    client, prefilled = users.make_client(config), []
    for turn in (1, 3):
        for hop in ("appraisal", "reply"):
            before = client.engine.tokens_prefilled
            both = [call(i, turn=turn, hop=hop, system=f"{hop} {i} " + "x" * 400, user="y" * turn) for i in (0, 1)]
            ask(client, *both)
            prefilled.append(client.engine.tokens_prefilled - before)
    assert min(prefilled[:2]) > 800 and max(prefilled[2:]) < 100
    assert len(client.slots) == 4


def test_a_local_user_may_compute_in_bf16(tiny, folder):
    save_model(tiny_model(), load_tokenizer("bytes"), folder.parent / "user")
    config = tiny(user="local", user_model=str(folder.parent / "user"), user_tokens=4, user_context=400,
                  user_dtype="bf16", prompts=str(folder))  # fmt: skip
    client = users.make_client(config)
    assert client.engine.cache.dtype == client.engine.model.output_weight.dtype == torch.bfloat16
    assert ask(client, call())[0].text is not None


ABLATIONS = [path.stem for path in sorted((ROOT / "configs").glob("*.py")) if path.stem.startswith(("ppo", "grpo"))]


@pytest.mark.parametrize("name", ABLATIONS)
def test_every_config_of_the_paper_runs_two_steps_with_a_tiny_model_and_a_served_user(tmp_path, folder, name):
    with serve() as server:
        options = dict(
            run=tmp_path / "run", model=ROOT / "configs/shapes/tiny.json", tokenizer="bytes", user_url=server.url,
            user_model="m", prompts=folder, groups=2, group_size=2, max_turns=2, slots=4, reply_tokens=8, steps=2,
            context_tokens=1024, micro_tokens=1024, eval_every=2, eval_max_turns=2, threads=1,
        )  # fmt: skip
        config = load_config([str(ROOT / f"configs/{name}.py"), *(f"{key}={value}" for key, value in options.items())])
        assert train.train(config).is_dir() and config.user == "llm"
    rows = metrics(config)
    assert [row["step"] for row in rows] == [1, 2] and "eval/score" in rows[1]
    assert all(row["skipped"] == 0 and row["simulator/failed"] == 0 for row in rows)
