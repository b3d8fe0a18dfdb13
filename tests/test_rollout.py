"""Dialogues, trajectories, packing: who meets whom, which ids are trained, how a dialogue ends."""

import json

import pytest
import torch
from conftest import ScriptedUser, make_engine, make_jobs, make_talk, run_dialogues, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st

import engine as engine_module
import kernels
from config import Config
from model import ValueHead
from rollout import Stage, Trajectory, log_line, pack, split, token_rewards, trajectories
from simulator import EmotionRules, Failed, UserTurn
from update import State, forward, values

pytestmark = pytest.mark.usefixtures("one_thread")
FREE = EmotionRules(clamp=100)  # a single reply can end a dialogue
MALFORMED = {  # sampled: what the user sees of it in evaluation
    "no tags": "",
    "<think>never closed": "",
    "<think>no reply</think>": "",
    "<think>a</think>b<think>c</think>": "b<think>c</think>",
    "a</think>b": "b",
}


def hold(chat, jobs, user=None, talk=None, seed=(7, 0), **engine):
    return run_dialogues(jobs, make_engine(chat, **engine), chat, user or ScriptedUser(), talk or make_talk(), seed)


def recite(monkeypatch, chat, script, **engine):
    """An engine that samples `script(group, member, turn)` and <|im_end|>; cache and log-probs are the model's own."""
    reciter = make_engine(chat, letters=None, **engine)
    sample, prefill, prefilled = reciter.sample, reciter.prefill, []

    def remember(rows):
        prefilled[:] = rows
        return prefill(rows)

    def forced(hidden, slots, positions):
        ids, held = [], {row.slot: row for row in [*reciter.live, *prefilled]}
        for slot, position in zip(slots.tolist(), positions.tolist()):
            row = held[slot]
            text = script(row.key[-4], row.key[-3], row.key[-1])
            ids.append([*chat.text(text), chat.end][position - len(row.prompt)])
        monkeypatch.setattr(engine_module, "inverse_cdf", lambda *args: torch.tensor(ids))
        return sample(hidden, slots, positions)

    monkeypatch.setattr(reciter, "sample", forced)
    monkeypatch.setattr(reciter, "prefill", remember)
    return reciter


def thinker(group, member, turn):
    return f"<think>secret {group}{member}{turn}</think>\nReply {turn}."


def asked(said):
    return f"<|im_start|>user\n{said.text}<|im_end|>\n<|im_start|>assistant\n"


def contents(dialogue):
    return [(turn.prompt_ids, turn.sampled_ids, turn.reply.text, turn.user.text) for turn in dialogue.turns]


@pytest.mark.parametrize("slots", [2, 9])
def test_dialogue_i_always_meets_user_i_whoever_ends_first(chat, monkeypatch, slots):
    last_turn = {(g, m): 4 - (2 * g + m) % 4 for g in range(3) for m in range(3)}
    user = ScriptedUser(lambda key, turn, reply: 100 if turn == last_turn[key] else 1 + key[0] + key[1] / 10, FREE,
                        delay=lambda key, turn: (5 * key[0] + 3 * key[1] + turn) % 4)
    jobs, done = make_jobs(3, 3), []
    engine = recite(monkeypatch, chat, lambda group, member, turn: f"{group}{member} {turn}", slots=slots)
    talk = make_talk(max_turns=5)
    dialogues = run_dialogues(jobs[::-1], engine, chat, user, talk, (1,), done.append)
    assert [dialogue.key for dialogue in dialogues] == [job.key for job in jobs]
    assert sum(done) == len(jobs) * talk.max_turns  # progress: replies given or no longer needed
    for job, dialogue in zip(jobs, dialogues):
        name = job.profile.id
        assert dialogue.profile == job.profile and dialogue.ended == "content"
        assert name in dialogue.opening.text
        answers = [f"{name} says {n + 1}" for n in range(last_turn[job.key])]
        assert [turn.user.text for turn in dialogue.turns] == answers
        told = [f"{job.key[0]}{job.key[1]} {n + 1}" for n in range(last_turn[job.key])]
        assert user.heard[job.key] == told == [turn.reply.text for turn in dialogue.turns]
        shown = chat.decode(dialogue.turns[-1].prompt_ids)
        assert name in shown and not any(other.profile.id in shown for other in jobs if other is not job)


def test_ids_are_the_concatenation_of_what_was_rendered_and_sampled_and_masks_come_from_lengths(chat):
    dialogues = hold(chat, make_jobs(3, 2), slots=3)
    for dialogue in dialogues:
        tokens, mask, logps = [], [], []
        text = "<|im_start|>system\nBe kind.<|im_end|>\n" + asked(dialogue.opening)
        for turn in dialogue.turns:
            new = chat.encode_trusted(text)
            tokens, mask, logps = tokens + new, mask + [0] * len(new), logps + [0.0] * len(new)
            assert turn.prompt_ids == tokens
            tokens, mask, logps = tokens + turn.sampled_ids, mask + [1] * len(turn.sampled_ids), logps + turn.logps
            text = ("\n" if turn.stop == "eos" else "<|im_end|>\n") + asked(turn.user)
        [item] = trajectories(dialogue, think=False)
        assert (item.key, item.tokens, item.mask, item.logp) == (dialogue.key, tokens, mask, logps)
    turns = [turn for dialogue in dialogues for turn in dialogue.turns]
    assert {turn.stop for turn in turns} == {"eos", "cap"}
    assert all((turn.sampled_ids[-1] == chat.end) == (turn.stop == "eos") for turn in turns)


def test_the_sampled_end_is_trained_and_glue_and_the_users_last_words_are_not(chat):
    for dialogue in hold(chat, make_jobs(3, 2)):
        [item] = trajectories(dialogue, think=False)
        trained = [token for token, bit in zip(item.tokens, item.mask) if bit]
        assert trained == [token for turn in dialogue.turns for token in turn.sampled_ids]
        assert item.mask[-1] == 1 and dialogue.turns[-1].user.text not in chat.decode(item.tokens)
        assert chat.newline[0] not in trained and chat.start not in trained
        assert trained.count(chat.end) == sum(turn.stop == "eos" for turn in dialogue.turns) > 0


def test_think_mode_has_one_trajectory_a_turn_and_the_next_prompt_holds_no_thought(think_chat, monkeypatch):
    chat, user, talk = think_chat, ScriptedUser(), make_talk(reply_tokens=60, strict_format=True)
    for dialogue in run_dialogues(make_jobs(2, 2), recite(monkeypatch, chat, thinker, slots=2), chat, user, talk, (3,)):
        items = trajectories(dialogue, think=True)
        assert len(items) == len(dialogue.turns) == 3
        prompt = chat.opening("Be kind.", dialogue.opening.text)
        for number, (turn, item) in enumerate(zip(dialogue.turns, items), 1):
            sampled = [*chat.text(thinker(*dialogue.key, number)), chat.end]
            assert turn.prompt_ids == prompt and turn.sampled_ids == sampled
            assert item.tokens == prompt + sampled and item.mask == [0] * len(prompt) + [1] * len(sampled)
            assert item.key == dialogue.key
            prompt = prompt + chat.encode_trusted(f"\nReply {number}.<|im_end|>\n{asked(turn.user)}")
        assert user.heard[dialogue.key] == ["Reply 1.", "Reply 2.", "Reply 3."]
        assert "secret" not in chat.decode(prompt) and "secret" in dialogue.turns[0].reply.thought


def test_a_capped_think_reply_is_closed_by_glue(think_chat, monkeypatch):
    reciter = recite(monkeypatch, think_chat, lambda *key: "<think>t</think>" + "long" * 20)
    talk = make_talk(reply_tokens=24, max_turns=2)
    [dialogue] = run_dialogues(make_jobs(1, 1), reciter, think_chat, ScriptedUser(), talk, (3,))
    first, second = dialogue.turns
    assert first.stop == "cap" and first.reply.text == "longlong"
    rest = think_chat.encode_trusted(f"longlong<|im_end|>\n{asked(first.user)}")
    assert second.prompt_ids == first.prompt_ids + rest


@pytest.mark.parametrize("text", MALFORMED)
@pytest.mark.parametrize("turn", [1, 2])
def test_a_malformed_think_reply_ends_a_training_dialogue_unshown_with_reward_0(think_chat, monkeypatch, text, turn):
    reciter = recite(monkeypatch, think_chat, lambda *key: text if key[-1] == turn else thinker(*key))
    user, talk = ScriptedUser(), make_talk(reply_tokens=60, strict_format=True)
    [dialogue] = run_dialogues(make_jobs(1, 1), reciter, think_chat, user, talk, (3,))
    assert dialogue.ended == "format" and dialogue.completed and dialogue.reward == 0
    assert user.heard[dialogue.key] == ["Reply 1."][: turn - 1]
    assert dialogue.emotion == 30 + 5 * (turn - 1)  # the user's, who saw nothing of it
    trained = [sum(item.mask) for item in trajectories(dialogue, think=True)]  # all turns, the good ones too
    assert trained == [len(t.sampled_ids) for t in dialogue.turns]
    assert len(dialogue.turns) == turn and dialogue.turns[-1].reply.violation


@pytest.mark.parametrize("text, shown", [*MALFORMED.items(), ("<think>a</think>b", "b")])
def test_in_evaluation_the_user_sees_what_stands_behind_the_thought_else_nothing(think_chat, monkeypatch, text, shown):
    reciter = recite(monkeypatch, think_chat, lambda *key: text)
    user, talk = ScriptedUser(), make_talk(reply_tokens=60, max_turns=1, strict_format=False)
    [dialogue] = run_dialogues(make_jobs(1, 1), reciter, think_chat, user, talk, (3,))
    assert user.heard[dialogue.key] == [shown] and dialogue.ended == "max_turns"


class Ender(ScriptedUser):
    """Says goodbye on turn 2."""

    def tell(self, key, reply):
        super().tell(key, reply)
        if len(self.heard[key]) == 2:
            said = self.queue[-1][2]
            self.queue[-1][2] = UserTurn("Bye!", said.emotion, said.appraisal, said.change, "goodbye")


ENDINGS = {  # ending: (user, turns, emotion); format and context_full have tests of their own
    "content": (lambda: ScriptedUser(lambda key, turn, reply: 35, FREE), 2, 100),
    "left": (lambda: ScriptedUser(lambda key, turn, reply: -10.5, FREE), 2, 9),
    "goodbye": (Ender, 2, 40),
    "max_turns": (ScriptedUser, 3, 45),
    "failed": (lambda: ScriptedUser(lambda key, turn, reply: Failed("mute") if turn == 2 else 5), 2, None),
}


@pytest.mark.parametrize("ended", ENDINGS)
def test_endings_that_the_user_or_the_turn_limit_brings(chat, ended):
    user, turns, emotion = ENDINGS[ended]
    [dialogue] = hold(chat, make_jobs(1, 1), user())
    assert (dialogue.ended, len(dialogue.turns)) == (ended, turns)
    if emotion is None:
        assert not dialogue.completed and dialogue.why == "mute"
        for name in ("emotion", "reward"):
            with pytest.raises(ValueError, match="mute"):
                getattr(dialogue, name)
    else:
        assert dialogue.completed and dialogue.emotion == emotion and dialogue.reward == pytest.approx(emotion / 100)
        assert dialogue.turns[-1].user.emotion == emotion


def test_a_first_prompt_that_fills_the_context_ends_the_dialogue_without_a_turn(chat):
    [dialogue] = hold(chat, make_jobs(1, 1), capacity=60)
    assert dialogue.ended == "context_full" and dialogue.turns == [] == trajectories(dialogue, think=False)


def test_a_turn_needs_room_for_one_token_and_one_cut_by_the_context_is_still_shown(chat, monkeypatch):
    def talk(capacity):
        reciter = recite(monkeypatch, chat, lambda *key: "hello", capacity=capacity)
        return run_dialogues(make_jobs(1, 1), reciter, chat, ScriptedUser(), make_talk(), (3,))[0]

    whole = talk(512)
    needed = len(whole.turns[2].prompt_ids)
    for room in (0, 1, 3):
        dialogue = talk(needed + room)
        assert [turn.sampled_ids for turn in dialogue.turns[:2]] == [turn.sampled_ids for turn in whole.turns[:2]]
        assert [turn.stop for turn in dialogue.turns] == ["eos", "eos", "context"][: 2 + (room > 0)]
        assert dialogue.turns[-1].user and dialogue.emotion == 40 + 5 * (room > 0)
        assert dialogue.ended == ("max_turns" if room else "context_full")
        if room:
            assert dialogue.turns[-1].reply.text == "hello"[:room]


@pytest.mark.parametrize("ended", ["max_turns", "format"])
def test_the_reward_sits_on_the_last_sampled_token_or_each_change_on_its_turns_last(chat, ended):
    [dialogue] = hold(chat, make_jobs(1, 1), ScriptedUser(lambda key, turn, reply: (5, -9, 8)[turn - 1]))
    dialogue.ended, lengths = ended, [len(turn.sampled_ids) for turn in dialogue.turns]
    reward = 0.34 if ended == "max_turns" else 0.0
    assert dialogue.reward == reward and len(set(lengths)) > 1
    changes = [0.05, -0.09, 0.08 if reward else -0.26]  # a broken format loses all there was
    for credit, last in (("final", [0, 0, reward]), ("turn", changes)):
        expected = [x for length, amount in zip(lengths, last) for x in [0.0] * (length - 1) + [amount]]
        assert token_rewards(dialogue, credit) == pytest.approx(expected)


@pytest.mark.parametrize("appraise_last", [True, False])
def test_the_turn_limit_is_exact(chat, appraise_last):
    user = ScriptedUser()
    for dialogue in hold(chat, make_jobs(2, 2), user, make_talk(max_turns=4, appraise_last=appraise_last), slots=3):
        told = 4 if appraise_last else 3
        assert dialogue.ended == "max_turns" and len(dialogue.turns) == 4 and all(t.sampled_ids for t in dialogue.turns)
        assert len(user.heard[dialogue.key]) == told == sum(turn.user is not None for turn in dialogue.turns)
        assert dialogue.emotion == 30 + 5 * told


class Opener(ScriptedUser):
    """Makes an opening where the profile has none; fails to for the keys in `mute`."""

    def __init__(self, mute=(), **script):
        super().__init__(**script)
        self.mute, self.starts, self.seeds = mute, [], {}

    def start(self, key, profile, seed):
        super().start(key, profile, seed)
        self.starts.append((key, profile.first_talk))
        self.seeds[key] = seed
        if profile.first_talk is None:
            self.queue[-1][2] = Failed("mute") if key in self.mute else UserTurn(f"Opening by {key}.", 30)


@pytest.mark.parametrize("slots", [1, 2, 6])
def test_an_opening_is_made_once_for_the_whole_group(chat, slots):
    user = Opener(delay=lambda key, turn: 3 * (key[0] == 0))
    dialogues = hold(chat, make_jobs(2, 3, first_talk=None), user, slots=slots)
    opening = {group: f"Opening by ({group}, 0)." for group in (0, 1)}
    assert sorted(user.starts) == [(key, opening[key[0]] if key[1] else None) for key in sorted(user.profiles)]
    assert all(dialogue.opening.text == opening[dialogue.key[0]] for dialogue in dialogues)
    assert len(set(user.seeds.values())) == 6 and all(user.seeds[d.key] == d.seed for d in dialogues)


def test_a_failed_opener_hands_over_to_the_next_member(chat):
    user = Opener(mute=[(0, 0), (0, 1)])
    dialogues = hold(chat, make_jobs(1, 4, first_talk=None), user)
    made = "Opening by (0, 2)."
    assert user.starts == [((0, 0), None), ((0, 1), None), ((0, 2), None), ((0, 3), made)]
    assert [dialogue.ended for dialogue in dialogues] == ["failed", "failed", "max_turns", "max_turns"]
    assert dialogues[3].opening.text == made


def test_the_same_dialogue_has_the_same_ids_alone_in_any_batch_and_with_any_number_of_slots(chat):
    jobs = make_jobs(3, 2)
    together = hold(chat, jobs, slots=6, letters=None)
    for slots in (1, 2):
        slow = ScriptedUser(delay=lambda key, turn: (key[0] + 2 * key[1] + turn) % 3)
        apart = hold(chat, jobs, slow, slots=slots, letters=None)
        assert [contents(dialogue) for dialogue in apart] == [contents(dialogue) for dialogue in together]
    for job, dialogue in zip(jobs, together):
        [alone] = hold(chat, [job], slots=3, letters=None)
        assert contents(alone) == contents(dialogue) and alone.seed == dialogue.seed
        for a, b in zip(alone.turns, dialogue.turns):
            assert a.logps == pytest.approx(b.logps, abs=1e-4)
    assert contents(hold(chat, jobs[:1], seed=(7, 1), letters=None)[0]) != contents(together[0])


def test_answers_ready_together_are_admitted_in_key_order_and_every_turn_has_noise_of_its_own(chat, monkeypatch):
    class Backwards(ScriptedUser):
        def poll(self, timeout):
            return super().poll(timeout)[::-1]

    engine, submitted = make_engine(chat, slots=6), []
    submit = engine.submit
    monkeypatch.setattr(engine, "submit", lambda *args: (submitted.append(args[2]), submit(*args)))
    run_dialogues(make_jobs(3, 2), engine, chat, Backwards(), make_talk(), (5,))
    assert [noise[-4:-2] for noise in submitted[:6]] == [job.key for job in make_jobs(3, 2)]
    assert len(set(submitted)) == len(submitted) == 18  # every turn has noise of its own


def test_answers_to_an_abandoned_rollout_are_not_taken_for_answers_to_the_next(chat, monkeypatch):
    """Logits that are not finite end a rollout while users still think; training goes on with the next step."""
    user, engine, steps = ScriptedUser(delay=lambda key, turn: 6 * key[1]), make_engine(chat, slots=2), iter(range(99))
    step, talk = engine.step, make_talk()

    def fails():
        if next(steps) > 7 and any(key[1] for _, key, _ in user.queue):
            raise FloatingPointError
        return step()

    monkeypatch.setattr(engine, "step", fails)
    with pytest.raises(FloatingPointError):
        run_dialogues(make_jobs(2, 2), engine, chat, user, talk, (1,))
    monkeypatch.setattr(engine, "step", step)
    engine.forget()
    for dialogue in run_dialogues(make_jobs(2, 2), engine, chat, user, talk, (2,)):
        assert dialogue.opening.text == dialogue.profile.first_talk
        assert [turn.user.text for turn in dialogue.turns] == [f"{dialogue.profile.id} says {n}" for n in (1, 2, 3)]


@pytest.mark.parametrize("think, temperature", [(False, 1.0), (False, 0.7), (True, 1.0)])
def test_sampler_log_probs_and_values_equal_those_of_training(chat, think_chat, monkeypatch, think, temperature):
    model, head, chat = tiny_model(), ValueHead(64, 0.3), think_chat if think else chat
    torch.nn.init.normal_(head.weight, generator=torch.Generator().manual_seed(1))
    make = {"model": model, "slots": 3, "temperature": temperature, "value_head": head}
    engine = recite(monkeypatch, chat, thinker, **make) if think else make_engine(chat, **make)
    dialogues = run_dialogues(make_jobs(3, 2), engine, chat, ScriptedUser(), make_talk(reply_tokens=60), (2,))
    items = [item for dialogue in dialogues for item in trajectories(dialogue, think)]
    batch, state = pack(items), State(model, None, head, None, [])
    logp, _, hidden = forward(model, Config(temperature=temperature), batch, engine.banned)
    torch.testing.assert_close(logp, batch.logp_T[batch.mask_T], atol=1e-4, rtol=0)
    for value in (head(hidden), values(state, batch)):
        torch.testing.assert_close(value, batch.value_T[batch.mask_T], atol=1e-4, rtol=0)
    assert len(items) == (18 if think else 6) and batch.trained == [sum(item.mask) for item in items]


def test_log_line_has_sages_keys_and_lets_the_emotion_be_recomputed(think_chat, monkeypatch):
    reciter = recite(monkeypatch, think_chat, thinker)
    user = ScriptedUser(lambda key, turn, reply: Failed("mute") if key == (0, 1) and turn == 2 else 4 * turn)
    good, bad = run_dialogues(make_jobs(1, 2), reciter, think_chat, user, make_talk(reply_tokens=60), (3,))
    line = json.loads(json.dumps(log_line(good, step=4)))
    assert {"id", "emo_point", "emo_state", "player", "scene", "character", "topic", "task", "history"} < set(line)
    assert (line["step"], line["key"], line["status"], line["ended"]) == (4, [0, 0], "ok", "max_turns")
    assert [said["role"] for said in line["history"]] == ["user", "assistant"] * 3 + ["user"]
    users, replies = line["history"][::2], line["history"][1::2]
    emotion = users[0]["emotion-point"]
    for said in users[1:]:
        assert set(said["planning"]) == {"activity", "TargetCompletion", "content", "analyse", "change"}
        emotion = EmotionRules().step(emotion, said["planning"]["change"])
        assert emotion == said["emotion-point"]
    assert (line["emo_point"], line["emo_state"]) == (emotion, "Emotion-B") and line["reward"] == emotion / 100
    assert [said["content"] for said in replies] == ["Reply 1.", "Reply 2.", "Reply 3."]
    assert "secret" in replies[0]["thought"]
    failed = log_line(bad)
    assert failed["status"] == "failed" and failed["why"] == "mute" and not {"emo_point", "reward"} & set(failed)


@st.composite
def some_items(draw):
    items = []
    for index in range(draw(st.integers(1, 8))):
        bits = [0, *draw(st.lists(st.integers(0, 1), max_size=20)), 1]
        tokens = draw(st.lists(st.integers(0, 999), min_size=len(bits), max_size=len(bits)))
        noise = [-0.5 * token * bit for token, bit in zip(tokens, bits)]
        items.append(Trajectory((index // 2, index % 2), tokens, bits, noise, [-x for x in noise]))
    return items


@settings(max_examples=60, deadline=None)
@given(some_items(), st.integers(1, 60))
def test_packing_keeps_every_token_mask_and_order_and_splitting_keeps_to_the_budget(items, budget):
    parts = split(items, budget)
    assert [item for part in parts for item in part] == items
    assert all(len(part) == 1 or sum(len(item.tokens) for item in part) <= budget for part in parts)
    sizes = [sum(len(item.tokens) for item in part) for part in parts]
    assert all(size + len(after[0].tokens) > budget for size, after in zip(sizes, parts[1:]))  # no part ends early
    for part in parts:
        batch, bounds = pack(part), [0]
        for item in part:
            piece = slice(bounds[-1], bounds[-1] + len(item.tokens))
            bounds.append(piece.stop)
            assert batch.tokens_T[piece].tolist() == item.tokens
            assert batch.mask_T[piece].tolist() == [bool(bit) for bit in item.mask]
            assert batch.logp_T[piece].tolist() == item.logp and batch.value_T[piece].tolist() == item.value
            assert batch.position_T[piece].tolist() == list(range(len(item.tokens)))
        assert batch.cu_seqlens == bounds and len(batch.tokens_T) == bounds[-1]
        assert batch.keys == [item.key for item in part] and batch.trained == [sum(item.mask) for item in part]


def test_a_rollout_leaves_nothing_in_the_engine(chat):
    """Weights change behind it: neither keys nor packed weights, however it ends."""
    kernels.use("onednn" if kernels.available() else "mkl")
    engine = make_engine(chat)
    run_dialogues(make_jobs(1, 2), engine, chat, ScriptedUser(), make_talk(), (1,))
    assert engine.held == [[]] * len(engine.held) and not engine.cache.any() and engine.model.packed_output is None
    stage = Stage(engine, chat, ScriptedUser(), make_talk())

    def stop():
        if engine.busy:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stage.hold(make_jobs(1, 2), (1,), check=stop)
    assert not engine.busy and engine.held == [[]] * len(engine.held)
