"""Our simulated people as an environment of the `verifiers` library, for its trainers and its runner.

    PYTHONPATH=.:integrations vf-eval rlver-env --model NAME --client.base-url http://127.0.0.1:8000/v1

A task is a person; a rollout is a dialogue with them, opened by the person; the reward is the final
emotion / 100, as in `train.py`. Each trace's `info["dialogue"]` is a line of our logs, which
`eval.py verify` recomputes. Which people, which user and how long: `--env.taskset.options`, words
like `train.py` takes. Any user of `train.py` will do; the offline one needs nothing.
"""

import asyncio
import itertools
import uuid
from pathlib import Path

import verifiers.v1 as vf
from openai import AsyncOpenAI
from pydantic import Field
from verifiers.v1.dialects.chat import message_to_wire

from chat import Reply
from config import Config, load_config
from rollout import Dialogue, Turn, log_line, make_talk
from simulator import Failed, Key, UserTurn, load_profiles
from users import make_user

__all__ = ["People", "SentientEnv", "OneReply"]
ROOT = Path(__file__).parent.parent


class PeopleConfig(vf.TasksetConfig):
    options: str = ""
    """Options of train.py such as `profiles=data/en_test.jsonl user=offline max_turns=8 start_emotion=40`."""

    def read(self) -> Config:
        """Our options. Relative paths of profiles are the repository's."""
        return load_config(self.options.split())


class PersonData(vf.TaskData):
    person: str = Field("", description="id of a profile")


class Person(vf.Task[PersonData]):
    @vf.reward
    async def emotion(self, trace: vf.Trace) -> float:
        """The final emotion / 100 (RLVER, section 2)."""
        return trace.info["dialogue"]["reward"]


class People(vf.Taskset[Person, PeopleConfig]):
    def load(self) -> list[Person]:
        config = self.config.read()
        systems = make_talk(config, training=True).systems
        return [Person(PersonData(name=person.id, person=person.id, system_prompt=systems[person.language]))
                for person in load_profiles(ROOT / config.profiles)]  # fmt: skip


class SentientConfig(vf.EnvConfig):
    policy: vf.AgentConfig = vf.AgentConfig(runtime=vf.SubprocessConfig())  # OneReply starts no process


class SentientEnv(vf.Env[SentientConfig]):
    """One policy that talks with one person."""

    def __init__(self, config: SentientConfig):
        super().__init__(config)
        self.options = o = config.taskset.read()
        self.people = {person.id: person for person in load_profiles(ROOT / o.profiles)}
        self.user, self.count = make_user(o, o.start_emotion, o.user_mode), itertools.count()
        self.answers, self.asking = {}, asyncio.Lock()  # one user for all rollouts, told apart by key

    async def run(self, task: Person, agents) -> None:
        person, seed = self.people[task.data.person], uuid.uuid4().int >> 65
        dialogue = Dialogue((next(self.count), 0), person, seed)
        await self.tell(self.user.start, dialogue.key, person, seed)
        dialogue.opening = heard = await self.answer(dialogue.key)
        async with agents.policy.interaction(task) as talk:
            while not dialogue.ended:
                said = await talk.turn(heard.text)
                if said.terminated:  # the runner's own limits
                    dialogue.ended = "context_full"
                    break
                dialogue.turns.append(Turn([], [], [], [], Reply([], said.last_reply), "eos"))
                await self.tell(self.user.tell, dialogue.key, said.last_reply)
                dialogue.turns[-1].user = heard = await self.answer(dialogue.key)
                last = len(dialogue.turns) == self.options.max_turns
                dialogue.ended = heard.ended or ("max_turns" if last else "")
            talk.trace.info["dialogue"] = log_line(dialogue)

    async def tell(self, method, *arguments) -> None:
        """Call a method of the user while nobody polls: users are made for one thread."""
        async with self.asking:
            method(*arguments)

    async def answer(self, key: Key) -> UserTurn:
        """What a person says next. Raises vf.TaskError where they cannot: that rollout counts nowhere.

        Whoever polls takes the answers of all; the others wait, and find theirs.
        """

        def poll() -> None:  # in a thread, and to its end even where a rollout is cancelled
            self.answers.update(self.user.poll(0.2))

        while key not in self.answers:
            async with self.asking:
                if key not in self.answers:
                    await asyncio.shield(asyncio.to_thread(poll))
        turn = self.answers.pop(key)
        if isinstance(turn, Failed):
            raise vf.TaskError(f"the user failed: {turn.why}")
        return turn


class OneReply(vf.Harness[vf.HarnessConfig]):
    """The policy's side of a turn: one chat completion, in this process."""

    APPENDS_SYSTEM_PROMPT = SUPPORTS_RESUME = True
    EXECUTES_CODE = NEEDS_CONTAINER = False

    async def launch(self, ctx, trace, runtime, endpoint, secret, mcp_urls, data) -> vf.ProgramResult:
        system, messages = self.resolve_prompt(data)
        wire = [message_to_wire(message) for message in messages]
        async with AsyncOpenAI(base_url=endpoint, api_key=secret) as client:
            opening = [{"role": "system", "content": system}] if system else []
            await client.chat.completions.create(model=ctx.model, messages=[*opening, *wire])
        return vf.ProgramResult(0, "", "")
