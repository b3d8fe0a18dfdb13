"""The desk of serve.py: a queue before the engine's slots, and the loop that steps the engine.

Requests come from another thread, that of the HTTP server, and hear what they get through their own
event loop. Nothing here knows of HTTP.
"""

import asyncio
import contextlib
import sys
import threading
import uuid
from collections import deque
from dataclasses import dataclass, field

import torch

from chat import Stream
from engine import LIVE, Engine, Row, Sampling, block_sums, common, inverse_cdf


class Refused(Exception):
    """Why a request gets no answer, in the terms of OpenAI's API."""

    def __init__(self, message: str, param: str = "", code: str = "", status: int = 400):
        super().__init__(message)
        self.param, self.code, self.status = param, code, status


class ServedEngine(Engine):
    """An engine with a temperature a slot; log-probabilities are those of temperature 1."""

    def __init__(self, model, sampling: Sampling, slots: int, capacity: int):
        super().__init__(model, sampling, slots, capacity)
        self.heat = torch.ones_like(self.position, dtype=torch.float32)

    def choose(self, odds, sums, slot_B, position_B):
        heat = self.heat[slot_B]
        warm = odds.pow(1 / heat[:, None])
        sampled = inverse_cdf(warm, block_sums(warm), self.noise[slot_B, position_B])
        return torch.where(heat == 0, odds.argmax(-1), sampled)

    def drop(self, slot: int) -> None:
        """Forget the row of a slot; the keys and values of its prompt stay of use."""
        self.waiting = [row for row in self.waiting if row.slot != slot]
        self.live, self.context = [row for row in self.live if row.slot != slot], None


@dataclass
class News:
    """What a request has got since the last one; `row` comes with the last."""

    thought: str
    text: str
    ids: list[int]
    logps: list[float]
    row: Row | None


@dataclass
class Job:
    """A request between its handler and the engine's thread."""

    prompt: list[int]
    cap: int
    temperature: float
    seed: int | None  # None: another at each request
    live: bool  # wants news before the end
    stream: Stream
    loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)
    events: asyncio.Queue[News | Refused | None] = field(default_factory=asyncio.Queue)
    given: int = 0  # ids handed out
    gone: bool = False

    def tell(self, event: News | Refused) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
            self.loop.call_soon_threadsafe(self.events.put_nowait, event)


class Desk:
    """The queue, the slots, and the loop that steps the engine."""

    def __init__(self, engine: ServedEngine, most: int):
        self.engine, self.most, self.waiting = engine, most, deque()
        self.active: dict[int, Job] = {}  # by slot
        self.wake, self.closed = threading.Condition(), False

    def submit(self, job: Job) -> None:
        """Queue a request. Raises Refused (429) where the queue is full."""
        with self.wake:
            if self.closed:
                raise Refused("the server is closing", status=503)
            self.waiting = deque(job for job in self.waiting if not job.gone)
            free = len(self.engine.held) - len(self.active)
            if len(self.waiting) >= self.most + free:
                wait = f"{self.most} requests wait already; try again"
                raise Refused(wait, code="rate_limit_exceeded", status=429)
            self.waiting.append(job)
            self.wake.notify()

    def close(self) -> None:
        """End `run`; whoever waits is told."""
        with self.wake:
            self.closed = True
            self.wake.notify()
            for job in [*self.active.values(), *self.waiting]:
                job.tell(Refused("the server is closing", status=503))

    def run(self) -> None:
        """Step the engine until `close`.

        In the thread that has loaded the model: with two that have worked, OpenMP's teams are more
        than the cores, and barriers sleep where they would spin (a third slower on two cores).
        """
        while self.admit():
            if not self.engine.busy:
                continue  # all who waited are gone
            try:
                ended = {row.slot: row for row in self.engine.step()}
                for row in [*ended.values(), *self.engine.live]:
                    self.hand_out(row, row.slot in ended)
            except Exception as problem:  # whoever waits must hear of it, whatever it was
                why = f"{type(problem).__name__}: {problem}"
                for job in self.active.values():
                    job.tell(Refused("the engine failed; the server's log says why", status=500))
                self.active.clear()
                print(f"the engine failed: {why}", file=sys.stderr, flush=True)
                self.engine.forget()

    def admit(self) -> bool:
        """Fill free slots, or wait for something to do; False when the server closes."""
        with self.wake:
            for slot in [slot for slot, job in self.active.items() if job.gone]:
                self.engine.drop(slot)
                del self.active[slot]
            self.wake.wait_for(lambda: self.closed or self.active or self.waiting)
            free = [slot for slot in range(len(self.engine.held)) if slot not in self.active]
            while free and self.waiting:
                if (job := self.waiting.popleft()).gone:
                    continue
                slot = min(free, key=lambda slot: self.loses(slot, job.prompt))
                free.remove(slot)
                self.active[slot], self.engine.heat[slot] = job, job.temperature
                seed = uuid.uuid4().int if job.seed is None else job.seed
                self.engine.submit(slot, job.prompt, (seed,), job.cap)
            return not self.closed

    def loses(self, slot: int, prompt: list[int]) -> tuple[int, int]:
        """What a slot would lose to a prompt, and the less the more of it the slot holds already.

        What others hold of it is copied anyway; so no talk is thrown out while there is room.
        """
        shared = common(held := self.engine.held[slot], prompt, 0)
        return len(held) - shared, -shared

    def hand_out(self, row: Row, ended: bool) -> None:
        """Give a request what its row has got; the row ends here where a stop string has come."""
        job, where = self.active[row.slot], self.engine.sampled(row)
        if not (ended or job.live or job.stream.stops):
            return  # nobody looks before the end
        ids, logps = (x[where].tolist() for x in (self.engine.ids, self.engine.logp))
        new = job.stream.more(ids, ended)
        if job.stream.stopped and not ended:
            self.engine.finish(row, LIVE)
            self.engine.drop(row.slot)
        if last := ended or job.stream.stopped:
            del self.active[row.slot]
        if not job.live:
            new = (job.stream.thought, job.stream.text) if last else ("", "")
        if last or any(new):
            job.tell(News(*new, ids[job.given :], logps[job.given :], row if last else None))
            job.given = len(ids)
