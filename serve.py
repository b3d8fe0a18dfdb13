"""An OpenAI-compatible endpoint over our engine: chat completions from any checkpoint.

    python serve.py MODEL_OR_RUN [port=8000] [host=127.0.0.1] [queue=256] [key=value ...]

The engine runs in a thread of its own and holds `slots` requests at a time; the others wait in a
queue, and with that full the answer is 429. A client that goes away frees its slot at once. With
RLVER_SERVE_KEY in the environment every request has to bring that key; without it only this machine
is served. What would be done otherwise than asked (tools, top_p, several choices) is refused.
"""

import asyncio
import contextlib
import hmac
import json
import os
import socket
import sys
import threading
import time
import uuid
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import torch
import uvicorn
from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field

from chat import Chat, Stream, banned_ids, make_chat
from config import InputError, help_text, require
from dist import World, compute_type, pick_device
from engine import LIVE, Engine, Row, Sampling, block_sums, common, inverse_cdf
from rundir import find_policy, use_kernels

KEY, LOOPBACK = "RLVER_SERVE_KEY", ("127.0.0.1", "localhost", "::1")
OWN = {"host": "127.0.0.1", "port": "8000", "queue": "256"}  # options beside config.py's
# Arguments of the API without effect here, and those that are served at one value alone.
IDLE = "user metadata store service_tier safety_identifier prompt_cache_key".split()
FIXED = {"n": 1, "top_p": 1, "frequency_penalty": 0, "presence_penalty": 0, "top_logprobs": 0,
         "logit_bias": {}, "tools": [], "response_format": {"type": "text"}}  # fmt: skip


class Refused(Exception):
    """An answer that is one of the API's error objects."""

    def __init__(self, message: str, param: str = "", code: str = "", status: int = 400):
        super().__init__(message)
        kind = {429: code, 500: "server_error"}.get(status, "invalid_request_error")
        fields = {"message": message, "type": kind, "param": param or None, "code": code or None}
        self.status, self.error = status, {"error": fields}

    def response(self) -> JSONResponse:
        wait = {"Retry-After": "1"} if self.status == 429 else None
        return JSONResponse(self.error, self.status, wait)


class Message(BaseModel):
    """One message; a content in parts is their texts behind each other."""

    role: str = Field(pattern="^(system|developer|user|assistant)$")
    content: str | list[dict]

    def text(self) -> str:
        parts = [{"text": self.content}] if isinstance(self.content, str) else self.content
        if odd := [part for part in parts if not isinstance(part.get("text"), str)]:
            raise Refused(f"content of type {odd[0].get('type')!r} is no text", "messages")
        return "".join(part["text"] for part in parts)


class Body(BaseModel):
    """What is asked: OpenAI's chat completion as far as it is served here."""

    model_config = ConfigDict(extra="allow")
    model: str
    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    seed: int | None = None
    stop: str | list[str] | None = None
    stream: bool | None = False
    stream_options: dict | None = None
    logprobs: bool | None = False


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

    body: Body
    prompt: list[int]
    cap: int
    stream: Stream
    loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)
    events: asyncio.Queue[News | Refused] = field(default_factory=asyncio.Queue)
    given: int = 0  # ids handed out
    gone: bool = False

    def tell(self, event: News | Refused) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
            self.loop.call_soon_threadsafe(self.events.put_nowait, event)


class Desk:
    """The queue, the slots, and the thread that steps the engine."""

    def __init__(self, engine: ServedEngine, most: int):
        self.engine, self.most, self.waiting = engine, most, deque()
        self.active: dict[int, Job] = {}  # by slot
        self.wake, self.closed = threading.Condition(), False
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    def submit(self, job: Job) -> None:
        """Queue a request. Raises Refused (429) where the queue is full."""
        with self.wake:
            if len(self.waiting) >= self.most:
                wait = f"{self.most} requests wait already; try again"
                raise Refused(wait, code="rate_limit_exceeded", status=429)
            self.waiting.append(job)
            self.wake.notify()

    def close(self) -> None:
        with self.wake:
            self.closed = True
            self.wake.notify()
        self.thread.join()

    def run(self) -> None:
        while self.admit():
            if not self.engine.busy:
                continue  # all who waited are gone
            try:
                ended = {row.slot: row for row in self.engine.step()}
                for row in [*ended.values(), *self.engine.live]:
                    self.hand_out(row, row.slot in ended)
            except Exception as problem:  # whoever waits must hear of it, whatever it was
                why = f"{type(problem).__name__}: {problem}"
                print(f"the engine failed: {why}", file=sys.stderr, flush=True)
                self.engine.forget()
                for job in self.active.values():
                    job.tell(Refused("the engine failed; the server's log says why", status=500))
                self.active.clear()

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
                # The slot that holds most of the prompt, such as the talk so far.
                slot = max(free, key=lambda slot: common(self.engine.held[slot], job.prompt, 0))
                free.remove(slot)
                asked, self.active[slot] = job.body, job
                self.engine.heat[slot] = 1.0 if asked.temperature is None else asked.temperature
                seed = uuid.uuid4().int if asked.seed is None else asked.seed
                self.engine.submit(slot, job.prompt, (seed,), job.cap)
            return not self.closed

    def hand_out(self, row: Row, ended: bool) -> None:
        """Give a request what its row has got; the row ends here where a stop string has come."""
        job, where = self.active[row.slot], self.engine.sampled(row)
        if not (ended or job.body.stream or job.stream.stops):
            return  # nobody looks before the end
        ids, logps = (x[where].tolist() for x in (self.engine.ids, self.engine.logp))
        new = job.stream.more(ids, ended)
        if job.stream.stopped and not ended:
            self.engine.finish(row, LIVE)
            self.engine.drop(row.slot)
        if last := ended or job.stream.stopped:
            del self.active[row.slot]
        if not job.body.stream:
            new = (job.stream.thought, job.stream.text) if last else ("", "")
        if last or any(new):
            job.tell(News(*new, ids[job.given :], logps[job.given :], row if last else None))
            job.given = len(ids)


def read_prompt(chat: Chat, messages: list[Message]) -> list[int]:
    """Messages as ids, as in training. Raises Refused where the last is the assistant's own."""
    if messages[-1].role == "assistant":
        raise Refused("the last message is the assistant's: nothing to reply to", "messages")
    ids: list[int] = []
    for message in messages:
        if message.role == "assistant":
            said = [*chat.text(message.text().strip()), chat.end, *chat.newline]
            ids += [*chat.assistant_header, *chat.empty_block, *said]
        else:
            ids += chat.message(message.role.replace("developer", "system"), message.text())
    return [*ids, *chat.assistant_header, *chat.empty_block]


def read_job(body: Body, chat: Chat, name: str, capacity: int) -> Job:
    """A request to be queued. Raises Refused with what is wrong."""
    if body.model != name:
        missing = f"the model {body.model!r} does not exist; here is {name!r}"
        raise Refused(missing, "model", "model_not_found", 404)
    for key, value in (body.model_extra or {}).items():
        if key not in FIXED and key not in IDLE:
            raise Refused(f"unknown argument {key!r}", key)
        if key in FIXED and value is not None and value != FIXED[key]:
            raise Refused(f"{key}={str(value)[:80]} is not served, only {FIXED[key]}", key)
    prompt = read_prompt(chat, body.messages)
    if (room := capacity - len(prompt)) < 1:
        long = f"{len(prompt)} tokens and a reply do not fit into a context of {capacity}"
        raise Refused(long, "messages", "context_length_exceeded")
    stops = [body.stop] if isinstance(body.stop, str) else body.stop or []
    cap = body.max_completion_tokens or body.max_tokens or room
    return Job(body, prompt, cap, Stream(chat, tuple(filter(None, stops))))


async def news(job: Job, request: Request) -> AsyncIterator[News]:
    """A request's news until the last; none once its client is gone. Raises Refused."""
    try:
        while not await request.is_disconnected():
            with contextlib.suppress(TimeoutError):
                event = await asyncio.wait_for(job.events.get(), 0.25)
                if isinstance(event, Refused):
                    raise event
                yield event
                if event.row:
                    return
    finally:
        job.gone = True


def choice(chat: Chat, job: Job, event: News, kind: str, content: dict) -> dict:
    """The one choice of an answer, or of a part of it; log-probabilities are at temperature 1."""
    row, told = event.row, []
    for token, logp in zip(event.ids, event.logps):
        text = "" if token == chat.end else chat.decode([token])
        about = {"token": text, "logprob": logp, "bytes": [*text.encode()], "top_logprobs": []}
        told += [about] if text else []
    reason = row and ("stop" if row.stop == "eos" or job.stream.stopped else "length")
    content |= {"content": event.text}
    content |= {"reasoning_content": event.thought} if event.thought else {}
    logprobs = {"content": told} if job.body.logprobs else None
    return {"index": 0, kind: content, "finish_reason": reason, "logprobs": logprobs}


def usage(row: Row) -> dict:
    prompt, reply = len(row.prompt), len(row.sampled)
    return {"prompt_tokens": prompt, "completion_tokens": reply, "total_tokens": prompt + reply}


def make_app(desk: Desk, chat: Chat, name: str, key: str = "") -> FastAPI:
    """The endpoint; with a `key` nobody else is answered."""
    app = FastAPI(title="rlver", docs_url=None, redoc_url=None)
    app.add_exception_handler(Refused, lambda request, error: error.response())

    @app.exception_handler(RequestValidationError)
    def malformed(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"][1:]))
        return Refused(f"{where}: {first['msg']}", where).response()

    def allow(request: Request) -> None:
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if key and not hmac.compare_digest(given.encode(), key.encode()):
            raise Refused("a wrong key, or none", code="invalid_api_key", status=401)

    @app.get("/v1/models", dependencies=[Depends(allow)])
    def models() -> dict:
        only = {"id": name, "object": "model", "created": 0, "owned_by": "rlver"}
        return {"object": "list", "data": [only]}

    @app.post("/v1/chat/completions", dependencies=[Depends(allow)])
    async def complete(body: Body, request: Request):
        job = read_job(body, chat, name, desk.engine.capacity)
        desk.submit(job)
        head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": name}
        if body.stream:
            return StreamingResponse(parts(job, request, head), media_type="text/event-stream")
        async for event in news(job, request):
            only = choice(chat, job, event, "message", {"role": "assistant"})
            whole = {"object": "chat.completion", "choices": [only], "usage": usage(event.row)}
            return head | whole
        return JSONResponse({}, 499)  # to nobody

    async def parts(job: Job, request: Request, head: dict) -> AsyncIterator[str]:
        head, delta = head | {"object": "chat.completion.chunk"}, {"role": "assistant"}
        try:
            async for event in news(job, request):
                some = choice(chat, job, event, "delta", delta)
                yield f"data: {json.dumps(head | {'choices': [some]})}\n\n"
                delta = {}
                if event.row and (job.body.stream_options or {}).get("include_usage"):
                    cost = {"choices": [], "usage": usage(event.row)}
                    yield f"data: {json.dumps(head | cost)}\n\n"
        except Refused as refused:
            yield f"data: {json.dumps(refused.error)}\n\n"
        yield "data: [DONE]\n\n"

    return app


def listen(host: str, port: str) -> socket.socket:
    """A socket that listens. Raises InputError where that cannot be."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, int(port)), family=family)
    except (OSError, ValueError, OverflowError) as error:
        where = f"host={host} port={port}"
        raise InputError(f"{where}: cannot listen there ({error}); give others") from None


def main(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(f"{__doc__.strip()}\n\n{help_text('python serve.py MODEL_OR_RUN key=value ...')}")
        return 0
    mine = [arg for arg in argv[1:] if arg.partition("=")[0] in OWN]
    own, key = OWN | dict(arg.split("=", 1) for arg in mine), os.environ.get(KEY, "")
    policy = find_policy("serve.py", [arg for arg in argv if arg not in mine])
    require(own["queue"].isdecimal(), f"queue is {own['queue']!r}; give how many requests may wait")
    need = f"host={own['host']} is open to others; put a key into {KEY}, or leave host out"
    require(key or own["host"] in LOOPBACK, need)
    config, device = policy.config, pick_device(policy.config)
    door = listen(own["host"], own["port"])
    world = World(device=device, dtype=compute_type(config.precision, device))
    print(use_kernels(config, policy.run, world), flush=True)
    model, tokenizer = policy.load(world)
    chat = make_chat(tokenizer, config.think)
    sampling = Sampling(banned_ids(tokenizer, model.config.vocab_size, (chat.end,)), (chat.end,))
    engine = ServedEngine(model, sampling, config.slots, config.context_tokens)
    desk = Desk(engine, int(own["queue"]))
    app, (host, port, *_) = make_app(desk, chat, policy.name, key), door.getsockname()
    most = f"{config.slots} requests at once, {own['queue']} may wait"
    print(f"{policy.name} at http://{host}:{port}/v1; {most}", flush=True)
    how = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=5)
    uvicorn.Server(how).run([door])
    desk.close()
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except InputError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
