"""Language models that a simulated user asks: an OpenAI-compatible endpoint, or a local checkpoint.

A client takes a `Call` and gives its answer later: `submit` never blocks and `poll` collects what
has come, so that the policy's engine goes on while users think. Whether an answer makes sense is
judged by who asked. `Record` stands between the two: it writes answers down, or plays them back.
The key comes from the environment; no error of this file quotes a key, or what a server said.
"""

import collections
import dataclasses
import hashlib
import json
import os
import queue
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from config import Config, InputError, add_rows, own_rows, read_rows, write_rows

KEY, BUSY = (401, 402, 403), (408, 409, 429)  # refused because of who asks, or for now
NO_ANSWER = (ValueError, KeyError, IndexError, TypeError, AttributeError, TimeoutError)
CONNECT = 5.0  # seconds to reach a server


@dataclass(frozen=True)
class Call:
    """One question: which dialogue (key, its seed), turn, hop and attempt, and chat messages."""

    key: tuple[int, int]
    seed: int
    turn: int
    hop: str
    attempt: int
    system: str
    user: str

    @property
    def where(self) -> str:
        return f"dialogue {self.key[0]}.{self.key[1]}, turn {self.turn}, {self.hop}"

    def address(self, settings: dict) -> str:
        """What a recorded answer is found by: a hash of all that the answer depends on."""
        parts = [settings, *(v for k, v in vars(self).items() if k != "key")]
        text = json.dumps(parts, sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()[:32]


@dataclass(frozen=True)
class Answer:
    """What came back, or why nothing did (`failed`). An empty text is an answer that is none."""

    text: str = ""
    failed: str = ""
    cut: bool = False  # the text ends at its cap on tokens
    retries: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    seconds: float = 0.0


class Endpoint:
    """An OpenAI-compatible server, asked in `user_concurrency` threads.

    Retries, backoff, Retry-After and the time limit of a try are the `openai` client's. Raises
    InputError for an address that is none, and for a key that the environment lacks.
    """

    def __init__(self, config: Config):
        import httpx
        import openai

        name, limit = config.user_key_env, min(CONNECT, config.user_timeout)
        try:
            url, _ = urlsplit(config.user_url), httpx.URL(config.user_url)
        except (ValueError, httpx.InvalidURL):
            url = urlsplit("")
        if url.scheme not in ("http", "https") or not url.hostname:
            example = "http://127.0.0.1:8001/v1"
            raise InputError(f"option 'user_url' is no http address; one reads like {example}")
        if url.username or url.password or "key=" in url.query:
            raise InputError("option 'user_url' holds a secret, which config.json would show; put "
                             "it in an environment variable and name that: user_key_env=NAME")
        key = os.environ.get(name, "").strip() if name else "none"  # a local server wants none
        if not key:
            raise InputError(f"option 'user_key_env': the environment has no {name}; export it")
        limit = httpx.Timeout(config.user_timeout, connect=limit)
        self.client = openai.OpenAI(api_key=key, base_url=config.user_url, timeout=limit,
                                    max_retries=config.user_retries)  # fmt: skip
        self.config, self.openai, self.httpx = config, openai, httpx
        self.json_mode = config.user_json
        self.todo, self.done = queue.SimpleQueue(), queue.SimpleQueue()
        for _ in range(config.user_concurrency):  # daemons: no hanging server keeps a run alive
            threading.Thread(target=self.work, daemon=True).start()

    def probe(self) -> None:
        """Ask once, before any weights are loaded; learns whether the server takes JSON mode.

        Raises InputError where nobody is there, or the key or the model is refused. A server that
        is busy, or still loading, is one.
        """
        call = Call((0, 0), 0, 0, "probe", 0, "Answer with JSON.", "{}")
        client = self.client.with_options(max_retries=0)
        where = f"option 'user_url': {self.config.user_url}"
        try:
            try:
                self.request(client, call, min(64, self.config.user_tokens))
            except (self.openai.BadRequestError, self.openai.UnprocessableEntityError):
                if not self.json_mode:
                    raise
                self.json_mode = False
                self.request(client, call, min(64, self.config.user_tokens))
        except self.openai.APIStatusError as error:
            if 400 <= (code := error.status_code) < 500 and code not in BUSY:
                look = "the key (user_key_env)" if code in KEY else "user_model and the path"
                raise InputError(f"{where} answered {code}; look at {look}") from None
        except TimeoutError:
            return
        except (self.openai.APIConnectionError, self.httpx.HTTPError) as error:
            cause = error.__cause__ or error
            if isinstance(cause, self.httpx.ReadTimeout):
                return
            raise InputError(f"{where}: nobody answers there; start the server") from None
        except NO_ANSWER:
            raise InputError(f"{where} is no OpenAI-compatible server") from None

    def begin(self) -> None:
        """A new rollout: nothing to forget."""

    def submit(self, call: Call) -> None:
        self.todo.put(call)

    def work(self) -> None:
        while True:
            call = self.todo.get()
            self.done.put((call, self.answer(call)))

    def poll(self, timeout: float) -> list[tuple[Call, Answer]]:
        """What has been answered, waiting up to `timeout` seconds for the first."""
        got = []
        try:
            got.append(self.done.get(timeout=timeout) if timeout else self.done.get_nowait())
            while True:
                got.append(self.done.get_nowait())
        except queue.Empty:
            return got

    def answer(self, call: Call) -> Answer:
        """The server's answer, empty where it is none. Never raises, since this is a thread."""
        try:
            return self.request(self.client, call, self.config.user_tokens)
        except self.openai.APIStatusError as error:
            hint = "; look at the key" if error.status_code in KEY else ""
            return Answer(failed=f"the user's server answered {error.status_code}{hint}")
        except self.openai.APITimeoutError:
            return Answer(failed="the user's server did not answer in time")
        except (self.httpx.HTTPError, *NO_ANSWER):
            return Answer()
        except Exception as error:  # else the dialogue would wait for ever
            return Answer(failed=f"no answer from the user's server ({type(error).__name__})")

    def request(self, client, call: Call, tokens: int) -> Answer:
        """One answer. Raises openai's and httpx's errors, and NO_ANSWER for what is none."""
        begun, body, mode = time.monotonic(), b"", {"response_format": {"type": "json_object"}}
        with client.chat.completions.with_streaming_response.create(
            messages=[{"role": who, "content": getattr(call, who)} for who in ("system", "user")],
            model=self.config.user_model, temperature=self.config.user_temperature,
            max_tokens=tokens, seed=(call.seed + call.attempt) % (1 << 31),
            **(mode if self.json_mode else {}),
        ) as reply:  # fmt: skip
            opened = time.monotonic()
            for piece in reply.iter_bytes():  # blanks may trickle in: no read ever times out
                body += piece
                if time.monotonic() - opened > self.config.user_timeout:
                    raise TimeoutError
        row = json.loads(body)
        used, choice = row.get("usage") or {}, row["choices"][0]
        text, cut = choice["message"]["content"] or "", choice.get("finish_reason") == "length"
        tokens = [used.get(f"{kind}_tokens") or 0 for kind in ("prompt", "completion")]
        seconds = time.monotonic() - begun
        return Answer(text.strip(), "", cut, reply.retries_taken, *tokens, seconds)


class Local:
    """A checkpoint in an engine of its own, all dialogues in one batch. Equal calls, equal answers.

    Each hop of a dialogue keeps a slot of its own while there are enough, so that what its prompts
    have in common (instructions, persona, scene, the talk so far) is prefilled once.
    """

    def __init__(self, engine, chat, tokens: int, concurrency: int):
        self.engine, self.chat, self.tokens, self.limit = engine, chat, tokens, concurrency
        self.begin()

    def begin(self) -> None:
        """A new rollout: nothing is left of an abandoned one."""
        self.engine.forget()
        self.waiting, self.calls, self.ready = collections.deque(), {}, []
        self.slots = dict.fromkeys(range(len(self.engine.held)))  # slot -> whose, oldest first

    def submit(self, call: Call) -> None:
        self.waiting.append(call)

    def poll(self, timeout: float) -> list[tuple[Call, Answer]]:
        """One step of the engine; with a timeout, as many as it takes until something is done."""
        while True:
            self.admit()
            for row in self.engine.step() if self.engine.busy else []:
                call, text = self.calls.pop(row.slot), self.chat.read(row.sampled).text
                used = {"tokens_in": len(row.prompt), "tokens_out": len(row.sampled)}
                self.ready.append((call, Answer(text, cut=row.stop != "eos", **used)))
            if self.ready or not timeout or not self.engine.busy:
                ready, self.ready = self.ready, []
                return ready

    def admit(self) -> None:
        """Give waiting calls a free slot: their dialogue and hop's, else the one unused longest."""
        while self.waiting and len(self.calls) < self.limit:
            call = self.waiting.popleft()
            prompt, whose = self.chat.opening(call.system, call.user), (call.key, call.hop)
            if len(prompt) >= self.engine.capacity:
                why = f"a prompt of {len(prompt)} tokens is too long for user_context"
                self.ready.append((call, Answer(failed=f"{why} {self.engine.capacity}")))
                continue
            free = [slot for slot in self.slots if slot not in self.calls]
            slot = next((slot for slot in free if self.slots[slot] == whose), free[0])
            del self.slots[slot]
            self.slots[slot], self.calls[slot] = whose, call  # now the youngest
            hop = int.from_bytes(call.hop.encode()[:8], "big")
            self.engine.submit(slot, prompt, (call.seed, call.turn, hop, call.attempt), self.tokens)


class Record:
    """Every answer of a client written to a file (`record`), or read from it (`replay`, no client).

    An answer is found by its call's address. The line also says at which of the rollout's engine
    steps, and in which batch, it was let in: a replay lets it in there again, so that the policy's
    batches have the same shapes and its samples are the same to the bit. The engine polls without a
    timeout exactly once a step; those polls are the clock.
    """

    def __init__(self, path: Path, settings: dict, client=None):
        self.path, self.settings, self.client = path, settings, client
        self.clock = self.batch = 0
        self.known: dict[str, dict] = {}
        self.due: list[tuple[int, int, int, Call, Answer]] = []  # batch, order, clock, call, answer
        if client and path.is_file():
            write_rows(path, own_rows(path))  # without half a line that a kill may have left
        if not client and not path.is_file():
            make = "make it with record=record, or give record_file=FILE"
            raise InputError(f"{path}: no such record; {make}")
        for where, row in [] if client else read_rows(path, torn=True):
            if "address" not in row:
                raise InputError(f"{where}: not a line of a record")
            self.known[row["address"]] = row

    def begin(self) -> None:
        """A new rollout: its clock starts."""
        self.clock = self.batch = 0
        self.due = []
        if self.client:
            self.client.begin()

    def submit(self, call: Call) -> None:
        if self.client:
            return self.client.submit(call)
        row = self.known.get(call.address(self.settings))
        if row is None:
            what = f"{call.where} was not recorded with these settings"
            raise InputError(f"{self.path}: {what}; record=record asks anew")
        answer = Answer(**{f.name: row.get(f.name, f.default) for f in dataclasses.fields(Answer)})
        self.due.append((row["batch"], row["order"], row["clock"], call, answer))

    def poll(self, timeout: float) -> list[tuple[Call, Answer]]:
        self.clock += not timeout
        if not self.client:
            return self.replayed(idle=bool(timeout))
        got = self.client.poll(timeout)
        now = {"batch": self.batch, "clock": self.clock + bool(timeout)}
        self.batch += bool(got)
        if got:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            add_rows(self.path, [
                {"address": call.address(self.settings), "where": call.where, "order": order, **now,
                 **dataclasses.asdict(answer)} for order, (call, answer) in enumerate(got)
            ])  # fmt: skip
        return got

    def replayed(self, idle: bool) -> list[tuple[Call, Answer]]:
        """The next batch, if its time has come; an engine with nothing to do has reached it."""
        self.due.sort(key=lambda item: item[:2])
        if not self.due or not (idle or self.due[0][2] <= self.clock):
            return []
        batch = self.due[0][0]
        now = [(call, answer) for b, _, _, call, answer in self.due if b == batch]
        self.due = [item for item in self.due if item[0] != batch]
        return now
