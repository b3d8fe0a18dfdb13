"""`eval.py chat`: talk with a policy as the user, or help a simulated person yourself.

Either talk becomes a log in SAGE's format, which `score`, `verify`, `page` and `gauge` read. With
`--rate` it holds your own changes of emotion, in the user's place or beside its own.
"""

import time
from dataclasses import replace
from pathlib import Path

from chat import Reply, Stream, make_chat
from config import InputError, add_rows, load_config, require
from dist import single
from rollout import Dialogue, Turn, log_line, make_engine, make_talk, next_prompt
from rundir import check_writable, find_policy
from simulator import EXCLUDED, Appraisal, EmotionRules, Failed, Profile, UserTurn, load_profiles
from users import make_user

HINT = "an empty line or Ctrl-D ends the talk"


class ContextFull(Exception):
    """A talk has no room for another reply."""


class UserFailed(Exception):
    """A simulated person could not answer; the talk ends and is saved as one that failed."""


def command_chat(argv: list[str]) -> int:
    """Hold a talk with a policy, or with `--supporter` one with a simulated person; both saved."""
    import readline  # noqa: F401 - lets `input` edit a line; imported anywhere else it may print
    flags = [arg for arg in argv if arg.startswith("--")]
    own = dict(arg.split("=", 1) for arg in argv if arg.startswith(("person=", "log=")))
    rest = [arg for arg in argv if arg not in flags and not arg.startswith(("person=", "log="))]
    odd = [flag for flag in flags if flag not in ("--supporter", "--rate")]
    require(not odd, f"eval.py chat knows --supporter and --rate, not {''.join(odd[:1])}")
    log = Path(own.get("log") or time.strftime("runs/talks/%Y-%m-%d_%H.%M.%S.jsonl"))
    require(not log.exists(), f"{log}: exists already; give another log=FILE")
    check_writable(log.parent)
    rate, supporter = "--rate" in flags, "--supporter" in flags
    policy = None if supporter else find_policy("eval.py chat", rest)
    config = load_config(rest) if supporter else policy.config
    person = find_person(config, own.get("person", ""), anybody=not (supporter or rate))
    dialogue, rated = Dialogue((0, 0), person, config.eval_seed), []
    try:
        if supporter:
            support(config, dialogue, rated if rate else None)
        else:
            speak(config, policy, dialogue, rate)
    except (EOFError, KeyboardInterrupt):
        print()
    except ContextFull:
        dialogue.ended = "context_full"
        print("\nthe talk has filled context_tokens; give more of them")
    except UserFailed as problem:
        dialogue.ended, dialogue.why = EXCLUDED, str(problem)
        print(plain(f"the user failed: {problem}"))
    if not dialogue.turns:
        print("nothing was said; nothing is saved")
        return 0
    dialogue.ended = dialogue.ended or "goodbye"
    if not supporter and not rate:
        dialogue.ended, dialogue.why = EXCLUDED, "nobody said how it felt; --rate asks"
    row = log_line(dialogue, rated=rate)
    for message, change in zip([m for m in row["history"] if "planning" in m], rated):
        message["rated"] = change
    log.parent.mkdir(parents=True, exist_ok=True)
    add_rows(log, [row])
    print(f"saved: {log}; read it with: python eval.py page {log} -o talk.html")
    return 0


def find_person(config, name: str, anybody: bool) -> Profile:
    """The person of the benchmark with this id; else the seed's, or nobody in particular."""
    if anybody and not name:
        return Profile("you", "", "", "", "", "en", "")
    people = load_profiles(config.eval_profiles)
    known = {person.id: person for person in people}
    if name and name not in known:
        some = ", ".join(list(known)[:3])
        raise InputError(
            f"{config.eval_profiles}: has nobody called {name!r}; give person=ID, such as {some}"
        )
    return known[name] if name else people[config.seed % len(people)]


def plain(text: str) -> str:
    """Text for a terminal: it is a model's, so no control character of it gets there."""
    return "".join(c if c.isprintable() or c == "\n" else " " for c in text)


def ask(prompt: str) -> str:
    """A line from the keyboard. Raises EOFError for an empty one."""
    line = input(prompt).encode(errors="ignore").decode().strip()  # no half characters
    if not line:
        raise EOFError
    return line


def ask_change(prompt: str) -> float:
    """A change of emotion from the keyboard, -10..10, asked for until it is one."""
    while True:
        try:
            change = float(ask(prompt))
        except ValueError:
            change = 99.0
        if -10 <= change <= 10:
            return change
        print("a number from -10 to 10")


class Speaker:
    """A policy that talks with one person, keys and values kept from turn to turn."""

    def __init__(self, config, model, tokenizer, language: str):
        self.chat = make_chat(tokenizer, config.think)
        self.system = make_talk(config, training=False).systems[language]
        own = replace(config, temperature=config.eval_temperature)
        self.engine = make_engine(own, model, self.chat, 1)
        self.cap, self.seed = config.reply_tokens, config.eval_seed

    def reply(self, turns: list[Turn], said: str, show) -> Turn:
        """The policy's turn behind these; `show(thought, text)` gets what there is more of both.

        Raises ContextFull where the talk has filled the context.
        """
        engine, chat = self.engine, self.chat
        begin = chat.opening(self.system, said)
        prompt = next_prompt(chat, turns[-1], said) if turns else begin
        if len(prompt) >= engine.capacity:
            raise ContextFull
        engine.submit(0, prompt, (self.seed, len(turns)), self.cap)
        stream = Stream(chat)
        while not (ended := engine.step()):
            show(*stream.more(engine.ids[engine.sampled(engine.live[0])].tolist(), False))
        (row,) = ended
        show(*stream.more(row.sampled, True))
        reply = chat.read(row.sampled)
        return Turn(row.prompt, row.sampled, row.logps, row.values, reply, row.stop)


def show(thought: str, text: str) -> None:
    print(plain(thought + text), end="", flush=True)


def speak(config, policy, dialogue: Dialogue, rate: bool) -> None:
    """You are the user. With `rate` you say after each reply what it did to you."""
    model, tokenizer = policy.load(single(config))
    person, rules = dialogue.profile, EmotionRules(start=config.eval_start_emotion)
    speaker, emotion = Speaker(config, model, tokenizer, person.language), rules.start
    print(f"{policy.name}; {HINT}.")
    if person.persona:
        print(
            f"You are {plain(person.id)}, who hopes for: {person.intention_label}\n\n"
            f"{plain(person.persona)}\n\n{plain(person.scene)}\n"
        )
        print(f"They began: {plain(person.first_talk)}\n" if person.first_talk else "")
    while True:
        said = ask("you> ")
        if dialogue.turns and dialogue.turns[-1].user:
            dialogue.turns[-1].user = replace(dialogue.turns[-1].user, text=said)
        elif not dialogue.turns:
            dialogue.opening = UserTurn(said, emotion)
        else:
            dialogue.turns[-1].user = UserTurn(said, emotion)
        print("policy> ", end="", flush=True)
        turn = speaker.reply(dialogue.turns, said, show)
        print("" if turn.stop == "eos" else " [cut]")
        dialogue.turns.append(turn)
        if rate:
            change = ask_change("your change, -10..10> ")
            emotion = rules.step(emotion, change)
            felt = Appraisal("", "", "", "rated by the person who talked", change)
            turn.user = UserTurn("", emotion, felt, change, rules.ending(emotion))
            if turn.user.ended:
                dialogue.ended = turn.user.ended
                return print(f"At an emotion of {emotion:g} the talk is over.")


def answer(user) -> UserTurn:
    """What the simulated person says next. Raises UserFailed if nothing."""
    while not (found := user.poll(1.0)):
        pass
    ((_, turn),) = found
    if isinstance(turn, Failed):
        raise UserFailed(turn.why)
    return turn


def support(config, dialogue: Dialogue, rated: list | None) -> None:
    """You are a simulated person's supporter; your ratings go into `rated` if it is a list."""
    user, key = make_user(config, config.eval_start_emotion, config.eval_user_mode), dialogue.key
    user.start(key, dialogue.profile, dialogue.seed)
    dialogue.opening = heard = answer(user)
    print(
        f"{plain(dialogue.profile.persona)}\n\nEmotion {heard.emotion:g}; {HINT}.\n\n"
        f"person> {plain(heard.text)}"
    )
    while True:
        said = ask("you> ")
        if rated is not None:
            rated.append(ask_change("how much does that move them, -10..10> "))
        dialogue.turns.append(Turn([], [], [], [], Reply([], said), "eos"))
        user.tell(key, said)
        dialogue.turns[-1].user = heard = answer(user)
        felt, bar = heard.appraisal, "#" * round(heard.emotion / 5)
        print(f"  {heard.change:+.1f}  emotion {heard.emotion:g} [{bar:<20}]")
        print(f"  {plain(felt.activity)}\n  {plain(felt.analyse)}\nperson> {plain(heard.text)}")
        if heard.ended or len(dialogue.turns) == config.eval_max_turns:
            dialogue.ended = heard.ended or "max_turns"
            return print(
                f"The talk is over ({dialogue.ended}). "
                f"They hoped for: {dialogue.profile.intention_label}."
            )
