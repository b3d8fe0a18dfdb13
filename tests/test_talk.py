"""`eval.py chat` through a pseudo-terminal, as somebody at a keyboard: what is shown, what is saved, what reads it."""

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, tiny_model

from chat import load_tokenizer
from checkpoint import save_model
from config import Config, InputError
from eval import main
from judges.gauge import read_sage
from score import mismatches, read_log, summary
from simulator import Failed, UserTurn
from ui import chat as ui_chat

PERSON = "en-test-praise-negative"
FIRST = "First replies matter: you rebuilt every missing bar by ear, and nobody said thank you."


def heed() -> None:
    """Ctrl-C counts, though the tests may run where it is ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Keyboard:
    """A process on a pseudo-terminal. `expect` reads on until a pattern comes."""

    def __init__(self, *command):
        self.master, slave = pty.openpty()
        environment = os.environ | {"TERM": "dumb"}
        self.process = subprocess.Popen([sys.executable, *command], cwd=ROOT, env=environment, pass_fds=(slave,),
                                        preexec_fn=lambda: (os.login_tty(slave), heed()))  # fmt: skip
        os.close(slave)
        self.seen, self.at = "", 0

    def expect(self, pattern: str, seconds: float = 60.0) -> re.Match:
        end = time.monotonic() + seconds
        while not (found := re.search(pattern, self.seen[self.at :])):
            assert time.monotonic() < end, f"no {pattern!r} in {self.seen[self.at :]!r}"
            if select.select([self.master], [], [], 0.5)[0]:
                try:
                    self.seen += os.read(self.master, 65536).decode(errors="replace").replace("\r", "")
                except OSError:  # it has ended
                    assert re.search(pattern, self.seen[self.at :]), self.seen[self.at :]
        self.at += found.end()
        return found

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def end(self) -> int:
        code = self.process.wait(20)
        os.close(self.master)
        return code


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "tiny"
    save_model(tiny_model(), load_tokenizer("bytes"), folder)
    return str(folder)


def history(log):
    (row,) = read_log(str(log))
    return row, row["history"]


def test_a_supporter_sees_emotion_move_and_the_talk_is_a_log(tmp_path):
    log = tmp_path / "talk.jsonl"
    keys = Keyboard("eval.py", "chat", "--supporter", "--rate", f"person={PERSON}", f"log={log}")
    keys.expect("Emotion 40; an empty line or Ctrl-D ends the talk")
    assert "sincere praise" not in keys.seen, "what they hope for is hidden"
    keys.expect("person> Our choir's jubilee .*\n.*you> ")
    keys.type(FIRST + "\n")
    keys.expect("-10..10> ")
    keys.type("eleven\n")
    keys.expect("a number from -10 to 10\n.*> ")
    keys.type("4.5\n")
    shown = keys.expect(r"  ([-+][\d.]+)  emotion ([\d.]+) \[#* *\]\n  .+\n  .+\nperson> .+\n.*you> ")
    keys.type("Go on, I am listening.\n")
    keys.expect("-10..10> ")
    keys.type("1\n")
    keys.expect("person> .+\n.*you> ")
    keys.type("\x04")
    keys.expect(f"saved: {re.escape(str(log))}")
    assert keys.end() == 0
    row, said = history(log)
    assert mismatches(row, "here") == [] and main(["verify", str(log)]) == 0
    assert row["ended"] == "goodbye" and row["task"] == "praise" and [m["role"] for m in said] == [
        "user", "assistant", "user", "assistant", "user"]  # fmt: skip
    assert said[1]["content"] == FIRST and [said[2]["rated"], said[4]["rated"]] == [4.5, 1.0]
    assert (f"{said[2]['planning']['change']:+.1f}", f"{said[2]['emotion-point']:g}") == shown.groups()
    items, real, _ = read_sage([str(log)])
    assert real.tolist() == [4.5, 1.0] and [item.reply for item in items] == [FIRST, "Go on, I am listening."]
    assert main(["page", str(log), "-o", str(tmp_path / "a.html")]) == 0
    assert "rated 4.5" in (tmp_path / "a.html").read_text()


def test_somebody_who_talks_with_a_policy_can_say_what_it_did_to_them(model, tmp_path, capsys):
    log = tmp_path / "talk.jsonl"
    keys = Keyboard("eval.py", "chat", model, "--rate", f"log={log}", f"person={PERSON}", "reply_tokens=8", "threads=1")
    keys.expect("You are en-test-praise-negative, who hopes for: sincere praise")
    for change in ("3", "-10", "-10", "-10", "-4"):
        keys.expect("you> ")
        keys.type(f"I say {change}.\n")
        keys.expect("policy> (.|\n)*-10..10> ")
        keys.type(f"{change}\n")
    keys.expect("At an emotion of 9 the talk is over")
    keys.expect("saved: ")
    assert keys.end() == 0
    row, said = history(log)
    assert mismatches(row, "here") == [] and row["ended"] == "left" and row["emo_point"] == 9
    assert [m["content"] for m in said if m["role"] == "user"] == [f"I say {x}." for x in (3, -10, -10, -10, -4)] + [""]
    assert [m["planning"]["change"] for m in said if "planning" in m] == [3, -10, -10, -10, -4]
    items, real, _ = read_sage([str(log)])
    assert len(items) == 5 and real[0] == 3 and items[0].emotion == 40


def test_a_talk_with_nobody_in_particular_counts_nowhere_but_can_be_read(model, tmp_path, capsys):
    log = tmp_path / "talk.jsonl"
    keys = Keyboard("eval.py", "chat", model, f"log={log}", "reply_tokens=8", "threads=1")
    for text in ("Hello.", "Is anybody there?"):
        keys.expect("you> ")
        keys.type(f"{text}\n")
    keys.expect("policy> (.|\n)*you> ")
    time.sleep(1)  # the prompt stands before the terminal is in its mode
    keys.type("\x03")
    keys.expect("saved: ")
    assert keys.end() == 0
    row, said = history(log)
    assert summary([row])["failed"] == 1 and main(["verify", str(log)]) == 0 and main(["score", str(log)]) == 0
    assert [m["content"] for m in said if m["role"] == "user"] == ["Hello.", "Is anybody there?"] and len(said) == 4
    assert main(["page", str(log), "-o", str(tmp_path / "a.html")]) == 0
    assert read_sage([str(log)])[0] == []


def test_a_later_turn_costs_its_own_tokens_and_what_is_shown_is_the_reply(byte_tokenizer):
    config = Config(reply_tokens=10, context_tokens=600)
    speaker, turns, costs = ui_chat.Speaker(config, tiny_model(), byte_tokenizer, "en"), [], []
    for said in ("Hello.", "Really?", "I see."):
        before, shown = speaker.engine.tokens_prefilled, []
        turns.append(speaker.reply(turns, said, lambda thought, text, shown=shown: shown.append(text)))
        assert "".join(shown) == turns[-1].reply.text
        costs.append(speaker.engine.tokens_prefilled - before)
    assert costs[0] > 100 > costs[1] and abs(costs[1] - costs[2]) <= 4, costs
    with pytest.raises(ui_chat.ContextFull):
        speaker.reply(turns, "x" * 600, print)


def test_no_control_character_of_a_model_reaches_the_terminal():
    assert ui_chat.plain("a\x1b[2Jb\rc\x07\u202ed\ne\x9b1m") == "a [2Jb c  d\ne 1m"


def test_a_user_that_fails_ends_the_talk_and_it_is_saved_as_failed(tmp_path, monkeypatch, capsys):
    class Broken:
        def __init__(self, *args):
            self.calls = 0

        def start(self, *args):
            pass

        def tell(self, *args):
            pass

        def poll(self, timeout):
            self.calls += 1
            return [((0, 0), UserTurn("Hi.", 40.0) if self.calls == 1 else Failed("it was struck by lightning"))]

    monkeypatch.setattr(ui_chat, "make_user", Broken)
    monkeypatch.setattr("builtins.input", lambda prompt: "There, there.")
    log = tmp_path / "talk.jsonl"
    assert main(["chat", "--supporter", f"log={log}"]) == 0
    row = json.loads(log.read_text())
    assert row["status"] == "failed" and row["why"] == "it was struck by lightning"
    assert row["history"][-1]["content"] == "There, there."


@pytest.mark.parametrize("arguments, words", [
    ("chat", "eval.py chat wants a model folder"),
    ("chat --supporter person=nobody", "has nobody called 'nobody'; give person=ID, such as en-test"),
    ("chat --suporter", "knows --supporter and --rate, not --suporter"),
    ("chat --supporter log=README.md", "README.md: exists already"),
    ("chat --supporter usr=llm", "unknown option 'usr'"),
])  # fmt: skip
def test_bad_input_is_one_line(arguments, words, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(InputError) as caught:
        main(arguments.split())
    assert words in str(caught.value) and "\n" not in str(caught.value)
