"""Language models that a simulated user asks: an OpenAI-compatible endpoint, or a local checkpoint in our own engine.

A client takes a `Call` and gives its answer later: `submit` never blocks and `poll` collects what has come, so that the
policy's engine goes on while users think. What a call means is simulator.py's business. `Record` stands between the
two and writes every answer down, or plays a written one back without a network. Retries with backoff, Retry-After,
time limits and a circuit breaker live here; whether an answer makes sense is judged by who asked.

Secrets: the key comes from the environment, and no error that leaves this file quotes a header or a key.
"""

import collections
import email.utils
import hashlib
import json
import os
import queue
import random
import re
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from config import InputError, add_rows, own_rows, read_rows, write_rows

USELESS = (400, 401, 402, 403, 404, 422)  # the same request would fail again
FATAL = (401, 402, 403, 404)  # and so would any other
MALFORMED = (ValueError, KeyError, IndexError, TypeError, AttributeError)  # by reading an answer that is none
BREAK_AFTER, PAUSE = 8, (1.0, 60.0)  # tries in a row that failed; first and longest pause of the circuit breaker


@dataclass(frozen=True)
class Call:
    """One question: chat messages, and which dialogue (key, its seed), turn, hop and attempt it belongs to."""

    key: tuple[int, int]
    seed: int
    turn: int
    hop: str
    attempt: int
    system: str
    user: str
    fields: tuple[str, ...]  # keys of the JSON object that is wanted

    @property
    def where(self) -> str:
        return f"dialogue {self.key[0]}.{self.key[1]}, turn {self.turn}, {self.hop}"

    def address(self, settings: dict) -> str:
        """What a recorded answer is found by: a hash of model, parameters, messages, dialogue seed, turn, attempt."""
        parts = [settings, self.seed, self.turn, self.hop, self.attempt, self.system, self.user]
        return hashlib.sha256(json.dumps(parts, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:32]


@dataclass(frozen=True)
class Answer:
    """What came back: text, or why nothing did (`failed`)."""

    text: str = ""
    failed: str = ""


@dataclass
class Usage:
    """What calls cost since `drain` was last called. Latency in seconds, of single tries that were answered."""

    counts: collections.Counter = field(default_factory=collections.Counter)
    latency: list[float] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, **counts: int) -> None:
        with self.lock:
            self.counts.update(counts)

    def took(self, seconds: float) -> None:
        with self.lock:
            self.latency.append(seconds)

    def drain(self) -> tuple[collections.Counter, list[float]]:
        """Counts and latencies so far, and zero again."""
        with self.lock:
            taken, self.counts, self.latency = (self.counts, self.latency), collections.Counter(), []
        return taken


def usage_metrics(parts: list[tuple[collections.Counter, list[float]]]) -> dict[str, float]:
    """What the clients of all ranks were used for, as metrics."""
    c, times = sum((counts for counts, _ in parts), collections.Counter()), sorted(t for _, ts in parts for t in ts)
    return {
        "simulator/llm_calls": c["calls"], "simulator/retries": c["retries"],
        "simulator/parse_failures": c["parse_failures"], "simulator/clamped": c["clamped"],
        "simulator/tokens_in": c["tokens_in"], "simulator/tokens_out": c["tokens_out"],
        "simulator/latency_p50": median(times) if times else 0.0,
        "simulator/latency_p95": times[int(0.95 * (len(times) - 1))] if times else 0.0,
    }


def retry_after(text: str) -> float:
    """Seconds that a Retry-After header asks for, a number or an HTTP date; 0 if it is neither (RFC 9110, 10.2.3)."""
    if re.fullmatch(r"\d+(\.\d+)?", text):
        return float(text)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    except ValueError:
        return 0.0


class Endpoint:
    """An OpenAI-compatible server. Calls run in `concurrency` threads; each is tried `retries` + 1 times at most.

    `try_timeout` bounds one try, `dialogue_timeout` all waiting of one dialogue for its user, in seconds. Raises
    InputError where the environment lacks the key; local servers that want none get a placeholder.
    """

    def __init__(self, model: str, url: str, key_env: str, temperature: float, tokens: int, concurrency: int = 32,
                 retries: int = 5, try_timeout: float = 60.0, dialogue_timeout: float = 600.0, json_mode: bool = True):
        import httpx
        import openai

        key = os.environ.get(key_env, "").strip() if key_env else "none"
        if not key:
            raise InputError(f"option 'user_key_env': the environment has no {key_env}; export it, or name another")
        self.openai, self.httpx, self.usage = openai, httpx, Usage()
        self.client = openai.OpenAI(base_url=url, api_key=key, max_retries=0)
        self.settings = {"model": model, "temperature": temperature, "max_tokens": tokens}
        self.retries, self.json_mode = retries, json_mode
        self.try_timeout, self.dialogue_timeout = try_timeout, dialogue_timeout
        self.todo, self.done = queue.SimpleQueue(), queue.SimpleQueue()
        for _ in range(concurrency):  # daemons: a server that hangs must not keep a stopped run alive
            threading.Thread(target=self.work, daemon=True).start()
        self.waited: dict[tuple, float] = {}  # seconds by (key, seed)
        self.lock, self.failures, self.paused_until, self.fatal = threading.Lock(), 0, 0.0, ""

    def begin(self) -> None:
        """A new rollout: what its dialogues have waited is forgotten."""
        with self.lock:
            self.waited = {}

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
        """Try until there is text, trying is useless, or time is up. Never raises: this runs in a thread."""
        begun, who, why = time.monotonic(), (call.key, call.seed), ""
        deadline = begun + self.dialogue_timeout - self.waited.get(who, 0.0)
        try:
            for attempt in range(self.retries + 1):
                if self.fatal:
                    return Answer(failed=self.fatal)
                if not self.pause(deadline):
                    break
                limit = min(self.try_timeout, max(0.01, deadline - time.monotonic()))
                text, why, wait = self.attempt(call, limit)
                if text:
                    return Answer(text)
                if wait is None:
                    return Answer(failed=why)
                # full jitter, so that those who failed together do not come back together
                wait = max(wait, random.uniform(0, min(30.0, 0.5 * 2**attempt)))
                if attempt == self.retries or time.monotonic() + wait > deadline:
                    break
                self.usage.add(retries=1)
                time.sleep(wait)
            return Answer(failed=why or f"no answer within {self.dialogue_timeout:g} s")
        except Exception as error:  # a thread's exception would be lost, and the dialogue would hang
            return Answer(failed=f"{type(error).__name__} while asking the user's model")
        finally:
            with self.lock:
                self.waited[who] = self.waited.get(who, 0.0) + time.monotonic() - begun

    def attempt(self, call: Call, limit: float) -> tuple[str, str, float | None]:
        """One try: (text, why it failed, seconds to wait before the next at least; None: do not try again)."""
        begun, json_mode = time.monotonic(), self.json_mode
        try:
            try:
                row = self.request(call, limit, json_mode)
            except (self.openai.BadRequestError, self.openai.UnprocessableEntityError):
                if not json_mode:
                    raise
                row = self.request(call, limit, False)  # perhaps a server without JSON mode
                self.json_mode = False
            used, text = row.get("usage") or {}, (row["choices"][0]["message"]["content"] or "").strip()
        except self.openai.APIStatusError as error:
            code = error.status_code
            why = f"the user's server answered {code}"
            if code in FATAL:
                self.fatal = f"{why}; look at user_url, user_model and the key in the environment"
            if code in USELESS:
                return "", self.fatal or why, None
            return self.failed(why, retry_after(error.response.headers.get("retry-after", "")))
        except (self.openai.APITimeoutError, self.httpx.TimeoutException, TimeoutError):
            return self.failed("the user's server did not answer in time")
        except (self.openai.APIConnectionError, self.httpx.HTTPError, *MALFORMED) as error:
            return self.failed(f"no proper answer from the user's server ({type(error).__name__})")
        self.usage.took(time.monotonic() - begun)
        with self.lock:
            self.failures = 0
        self.usage.add(tokens_in=used.get("prompt_tokens") or 0, tokens_out=used.get("completion_tokens") or 0)
        return text, "" if text else "the user's model said nothing", 0.0

    def request(self, call: Call, limit: float, json_mode: bool) -> dict:
        """The server's answer as a JSON object. Raises openai's and httpx's errors, TimeoutError and ValueError."""
        s, begun, body = self.settings, time.monotonic(), b""
        self.usage.add(calls=1)
        create = self.client.chat.completions.with_streaming_response.create
        with create(
            model=s["model"], temperature=s["temperature"], max_tokens=s["max_tokens"], timeout=limit,
            messages=[{"role": "system", "content": call.system}, {"role": "user", "content": call.user}],
            seed=(call.seed + call.attempt) % (1 << 31),
            **({"response_format": {"type": "json_object"}} if json_mode else {}),
        ) as reply:
            for piece in reply.iter_bytes():  # a server may send blank lines while it works: no read ever times out
                body += piece
                if time.monotonic() - begun > limit:
                    raise TimeoutError
        return json.loads(body)

    def failed(self, why: str, wait: float = 0.0) -> tuple[str, str, float]:
        """Note a failed try; after several in a row nobody asks for a while (circuit breaker)."""
        with self.lock:
            self.failures += 1
            if self.failures % BREAK_AFTER == 0:
                pause = min(PAUSE[1], PAUSE[0] * 2 ** (self.failures // BREAK_AFTER - 1))
                self.paused_until = time.monotonic() + pause
        return "", why, wait

    def pause(self, deadline: float) -> bool:
        """Wait while the circuit is open; False where the dialogue has no time left for that."""
        if max(time.monotonic(), self.paused_until) > deadline:
            return False
        time.sleep(max(0.0, self.paused_until - time.monotonic()))
        return True


class Local:
    """A checkpoint in an engine of its own, all dialogues in one batch. The same calls give the same answers.

    A dialogue keeps its slot, so that the constant head of its prompts is prefilled once.
    """

    def __init__(self, engine, chat, tokens: int):
        self.engine, self.chat, self.tokens, self.usage = engine, chat, tokens, Usage()
        self.waiting, self.calls, self.ready = collections.deque(), {}, []
        self.slots: dict[tuple, int] = {}  # the slot that a dialogue used last

    def begin(self) -> None:
        """A new rollout: nothing is left of an abandoned one."""
        self.engine.forget()
        self.waiting, self.calls, self.ready, self.slots = collections.deque(), {}, [], {}

    def submit(self, call: Call) -> None:
        self.waiting.append(call)

    def poll(self, timeout: float) -> list[tuple[Call, Answer]]:
        """One step of the engine; with a timeout, as many as it takes until something is done."""
        while True:
            self.admit()
            for row in self.engine.step() if self.engine.busy else []:
                call = self.calls.pop(row.slot)
                self.usage.add(tokens_out=len(row.sampled))
                self.ready.append((call, Answer(self.chat.read(row.sampled).text)))
            if self.ready or not timeout or not self.engine.busy:
                ready, self.ready = self.ready, []
                return ready

    def admit(self) -> None:
        """Give waiting calls the free slots, each its dialogue's own if it can be had."""
        free = [slot for slot in range(len(self.engine.held)) if slot not in self.calls]
        while self.waiting and free:
            call = self.waiting.popleft()
            slot = self.slots.get(call.key)
            slot = self.slots[call.key] = free.pop(free.index(slot) if slot in free else 0)
            prompt = self.chat.opening(call.system, call.user)
            self.usage.add(calls=1, tokens_in=len(prompt))
            if len(prompt) >= self.engine.capacity:
                why = f"a prompt of {len(prompt)} tokens is too long for user_context {self.engine.capacity}"
                self.ready.append((call, Answer(failed=why)))
                free.append(slot)
                continue
            hop = int.from_bytes(call.hop.encode()[:8], "big")
            self.calls[slot] = call
            self.engine.submit(slot, prompt, (call.seed, call.turn, hop, call.attempt), self.tokens)


class Record:
    """Every answer of a client written to one file (`record`), or read from it without any client (`replay`).

    An answer is found by its call's address. The line also says at which of the rollout's engine steps, and in which
    batch, it was let in: a replay lets it in there again, so that the policy's batches have the same shapes and its
    samples are the same to the bit. The engine polls without a timeout exactly once a step; those polls are the clock.
    """

    def __init__(self, path: Path, settings: dict, client=None):
        self.path, self.settings, self.client, self.usage = path, settings, client, client.usage if client else Usage()
        self.clock = self.batch = 0
        self.known: dict[str, dict] = {}
        self.due: list[tuple[int, int, int, Call, Answer]] = []  # batch, order, clock, call, answer
        if client and path.is_file():
            write_rows(path, own_rows(path))  # without half a line that a kill may have left
        if client is None:
            if not path.is_file():
                raise InputError(f"{path}: no such record; make it with record=record, or give record_file=FILE")
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
            raise InputError(f"{self.path}: {call.where} was not recorded with these settings; record=record asks anew")
        self.due.append((row["batch"], row["order"], row["clock"], call, Answer(row["text"], row["failed"])))

    def poll(self, timeout: float) -> list[tuple[Call, Answer]]:
        self.clock += not timeout
        if not self.client:
            return self.replayed(idle=bool(timeout))
        got = self.client.poll(timeout)
        rows = []
        for order, (call, answer) in enumerate(got):
            row = {"address": call.address(self.settings), "where": call.where, "clock": self.clock + bool(timeout),
                   "batch": self.batch, "order": order, "text": answer.text, "failed": answer.failed}
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
