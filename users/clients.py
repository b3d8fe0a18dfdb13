"""Language models that a simulated user asks: an OpenAI-compatible endpoint, or a local checkpoint.

A client takes a `Call` and gives its answer later: `submit` never blocks and `poll` collects what has
come, so that the policy's engine goes on while users think. Whether an answer makes sense is judged by
who asked (llm_user.py). `Record` stands between the two and writes every answer down, or plays a written
one back without a network. Retries, backoff, Retry-After and time limits are the `openai` client's.

Secrets: the key comes from the environment, and no error that leaves this file quotes a header, a key or
what a server said.
"""

import collections
import dataclasses
import hashlib
import json
import os
import queue
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from urllib.parse import urlsplit

from config import Config, InputError, add_rows, own_rows, read_rows, write_rows

REFUSED = (400, 401, 402, 403, 404, 422)  # the same request would be refused again
NO_ANSWER = (ValueError, KeyError, IndexError, TypeError, AttributeError, TimeoutError)  # or a trickle of blanks
CONNECT = 5.0  # seconds to reach a server


@dataclass(frozen=True)
class Call:
    """One question: chat messages, and which dialogue (key, its seed), turn, hop and attempt it is of."""

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
        parts = [settings, self.seed, self.turn, self.hop, self.attempt, self.system, self.user]
        text = json.dumps(parts, sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()[:32]


@dataclass(frozen=True)
class Answer:
    """What came back: text, or why nothing did (`failed`). `cut`: the text ends at its cap on tokens."""

    text: str = ""
    failed: str = ""
    cut: bool = False


@dataclass
class Usage:
    """What calls cost since `drain` was last called. Latency: seconds of each call that was answered."""

    counts: collections.Counter = field(default_factory=collections.Counter)
    latency: list[float] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, seconds: float | None = None, **counts: int) -> None:
        with self.lock:
            self.counts.update(counts)
            self.latency += [] if seconds is None else [seconds]

    def drain(self) -> tuple[collections.Counter, list[float]]:
        """Counts and latencies so far, and zero again."""
        with self.lock:
            taken = self.counts, self.latency
            self.counts, self.latency = collections.Counter(), []
        return taken


def usage_metrics(parts: list[tuple[collections.Counter, list[float]]]) -> dict[str, float]:
    """What the clients of all ranks were used for, as metrics."""
    counts = sum((counts for counts, _ in parts), collections.Counter())
    times = sorted(seconds for _, latency in parts for seconds in latency)
    names = ("retries", "parse_failures", "clamped", "tokens_in", "tokens_out")
    return {
        "simulator/llm_calls": counts["calls"],
        **{f"simulator/{name}": counts[name] for name in names},
        "simulator/latency_p50": median(times) if times else 0.0,
        "simulator/latency_p95": times[int(0.95 * (len(times) - 1))] if times else 0.0,
    }


class Endpoint:
    """An OpenAI-compatible server, asked in `user_concurrency` threads. Raises InputError for an address
    that is none, or a key that the environment lacks; local servers that want none get a placeholder."""

    def __init__(self, config: Config):
        import httpx
        import openai

        url, name = urlsplit(config.user_url), config.user_key_env
        if url.scheme not in ("http", "https") or not url.hostname:
            example = "http://127.0.0.1:8001/v1"
            raise InputError(f"option 'user_url' is no http address: {config.user_url!r}; write {example}")
        if url.username or url.password or "key=" in url.query:
            raise InputError("option 'user_url' holds a key or password, which config.json would show; "
                             "put it in the environment and name the variable: user_key_env=NAME")
        key = os.environ.get(name, "").strip() if name else "none"
        if not key:
            raise InputError(f"option 'user_key_env': the environment has no {name}; export it, or name another")
        limit = httpx.Timeout(config.user_timeout, connect=min(CONNECT, config.user_timeout))
        self.client = openai.OpenAI(
            base_url=config.user_url, api_key=key, max_retries=config.user_retries, timeout=limit
        )
        self.config, self.openai, self.httpx, self.usage = config, openai, httpx, Usage()
        self.json_mode = config.user_json
        self.todo, self.done = queue.SimpleQueue(), queue.SimpleQueue()
        for _ in range(config.user_concurrency):  # daemons: a server that hangs must not keep a run alive
            threading.Thread(target=self.work, daemon=True).start()

    def probe(self) -> None:
        """Ask once, before anything is loaded; a server that refuses JSON mode is not asked for it again.

        Raises InputError where nobody is there, or the key or the model is refused. A server that is
        busy, or still loading, is one.
        """
        call, client = Call((0, 0), 0, 0, "probe", 0, "Answer with JSON.", "{}"), self.client
        self.client, where = client.with_options(max_retries=0), f"option 'user_url': {self.config.user_url}"
        try:
            try:
                self.request(call, 1)
            except (self.openai.BadRequestError, self.openai.UnprocessableEntityError):
                if not self.json_mode:
                    raise
                self.json_mode = False
                self.request(call, 1)
        except self.openai.APIStatusError as error:
            if error.status_code in REFUSED:
                look = {401: "look at the key: user_key_env", 404: f"is user_model={self.config.user_model} there?"}
                hint = look.get(error.status_code, "look at user_model, and at the key: user_key_env")
                raise InputError(f"{where} answered {error.status_code}; {hint}") from None
        except (self.openai.APIConnectionError, self.httpx.HTTPError):
            raise InputError(f"{where}: nobody answers there; start the server, or correct it") from None
        except NO_ANSWER:
            raise InputError(f"{where}: what answers there is no OpenAI-compatible server") from None
        finally:
            self.client = client
            self.usage.drain()

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
        """The server's answer; an empty text where it gave none that is one. Never raises: this is a thread."""
        try:
            return self.request(call, self.config.user_tokens)
        except self.openai.APIStatusError as error:
            hint = "; look at the key" if error.status_code in (401, 402, 403) else ""
            return Answer(failed=f"the user's server answered {error.status_code}{hint}")
        except self.openai.APITimeoutError:
            return Answer(failed="the user's server did not answer in time")
        except self.openai.APIConnectionError as error:
            return Answer(failed=f"no answer from the user's server ({type(error).__name__})")
        except (self.httpx.HTTPError, *NO_ANSWER):
            return Answer()
        except Exception as error:  # a thread's exception would be lost, and the dialogue would hang
            return Answer(failed=f"{type(error).__name__} while asking the user's model")

    def request(self, call: Call, tokens: int) -> Answer:
        """One answer. Raises openai's and httpx's errors, and NO_ANSWER for what is none."""
        begun, body = time.monotonic(), b""
        self.usage.add(calls=1)
        create = self.client.chat.completions.with_streaming_response.create
        with create(
            model=self.config.user_model, temperature=self.config.user_temperature, max_tokens=tokens,
            messages=[{"role": "system", "content": call.system}, {"role": "user", "content": call.user}],
            seed=(call.seed + call.attempt) % (1 << 31),
            **({"response_format": {"type": "json_object"}} if self.json_mode else {}),
        ) as reply:  # fmt: skip
            self.usage.add(calls=reply.retries_taken, retries=reply.retries_taken)
            opened = time.monotonic()
            for piece in reply.iter_bytes():  # a server may send blanks while it works: no read times out
                body += piece
                if time.monotonic() - opened > self.config.user_timeout:
                    raise TimeoutError
        row = json.loads(body)
        used, choice = row.get("usage") or {}, row["choices"][0]
        tokens_in, tokens_out = (used.get(f"{kind}_tokens") or 0 for kind in ("prompt", "completion"))
        self.usage.add(time.monotonic() - begun, tokens_in=tokens_in, tokens_out=tokens_out)
        text = (choice["message"]["content"] or "").strip()
        return Answer(text, cut=choice.get("finish_reason") == "length")


class Local:
    """A checkpoint in an engine of its own, all dialogues in one batch. The same calls give the same answers.

    Each hop of a dialogue keeps a slot of its own while there are enough, so that what its prompts have
    in common (instructions, persona, scene, the talk so far) is prefilled once.
    """

    def __init__(self, engine, chat, tokens: int):
        self.engine, self.chat, self.tokens, self.usage = engine, chat, tokens, Usage()
        self.begin()

    def begin(self) -> None:
        """A new rollout: nothing is left of an abandoned one."""
        self.engine.forget()
        self.waiting, self.calls, self.ready = collections.deque(), {}, []
        self.slots: dict[tuple, int] = {}  # (dialogue, hop) -> the slot it used last
        self.oldest = list(range(len(self.engine.held)))  # slots, the one used longest ago first

    def submit(self, call: Call) -> None:
        self.waiting.append(call)

    def poll(self, timeout: float) -> list[tuple[Call, Answer]]:
        """One step of the engine; with a timeout, as many as it takes until something is done."""
        while True:
            self.admit()
            for row in self.engine.step() if self.engine.busy else []:
                call = self.calls.pop(row.slot)
                self.usage.add(tokens_out=len(row.sampled))
                self.ready.append((call, Answer(self.chat.read(row.sampled).text, cut=row.stop != "eos")))
            if self.ready or not timeout or not self.engine.busy:
                ready, self.ready = self.ready, []
                return ready

    def admit(self) -> None:
        """Give waiting calls free slots: their own, else the one used longest ago."""
        while self.waiting and len(self.calls) < len(self.oldest):
            call = self.waiting.popleft()
            who, prompt = (call.key, call.hop), self.chat.opening(call.system, call.user)
            self.usage.add(calls=1, tokens_in=len(prompt))
            if len(prompt) >= self.engine.capacity:
                why = f"a prompt of {len(prompt)} tokens is too long for user_context {self.engine.capacity}"
                self.ready.append((call, Answer(failed=why)))
                continue
            slot = self.slots.get(who)
            if slot is None or slot in self.calls:
                slot = next(slot for slot in self.oldest if slot not in self.calls)
            self.slots = {other: used for other, used in self.slots.items() if used != slot} | {who: slot}
            self.oldest = [other for other in self.oldest if other != slot] + [slot]
            hop = int.from_bytes(call.hop.encode()[:8], "big")
            self.calls[slot] = call
            self.engine.submit(slot, prompt, (call.seed, call.turn, hop, call.attempt), self.tokens)


class Record:
    """Every answer of a client written to one file (`record`), or read from it (`replay`).

    An answer is found by its call's address. The line also says at which of the rollout's engine steps,
    and in which batch, it was let in: a replay lets it in there again, so that the policy's batches have
    the same shapes and its samples are the same to the bit. The engine polls without a timeout exactly
    once a step; those polls are the clock.
    """

    def __init__(self, path: Path, settings: dict, client=None):
        self.path, self.settings, self.client = path, settings, client
        self.usage = client.usage if client else Usage()
        self.clock = self.batch = 0
        self.known: dict[str, dict] = {}
        self.due: list[tuple[int, int, int, Call, Answer]] = []  # batch, order, clock, call, answer
        if client and path.is_file():
            write_rows(path, own_rows(path))  # without half a line that a kill may have left
        if client is None:
            if not path.is_file():
                make = "make it with record=record, or give record_file=FILE"
                raise InputError(f"{path}: no such record; {make}")
            for where, row in read_rows(path, torn=True):
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
        answer = Answer(row["text"], row["failed"], row.get("cut", False))
        self.due.append((row["batch"], row["order"], row["clock"], call, answer))

    def poll(self, timeout: float) -> list[tuple[Call, Answer]]:
        self.clock += not timeout
        if not self.client:
            return self.replayed(idle=bool(timeout))
        got = self.client.poll(timeout)
        rows = []
        for order, (call, answer) in enumerate(got):
            row = {"address": call.address(self.settings), "where": call.where, "batch": self.batch,
                   "order": order, "clock": self.clock + bool(timeout), **dataclasses.asdict(answer)}
            rows.append(row)
        self.batch += bool(got)
        if rows:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            add_rows(self.path, rows)
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
