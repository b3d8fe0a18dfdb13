"""An OpenAI-compatible endpoint over our engine: chat completions from any checkpoint.

    python serve.py MODEL_OR_RUN [port=8000] [host=127.0.0.1] [queue=256] [key=value ...]

The engine holds `slots` requests at a time (ui/desk.py); the others wait in a queue, and with that
full the answer is 429. A client that goes away frees its slot. With RLVER_SERVE_KEY in the
environment every request has to bring that key; without it only this machine is served. What would
be done otherwise than asked (tools, top_p, several choices) is refused.
"""

import asyncio
import hmac
import json
import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import AsyncIterator

import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware

from chat import Chat, Stream, banned_ids, make_chat
from config import InputError, help_text, require, run_main
from dist import single
from engine import Row, Sampling
from rundir import find_policy, use_kernels
from ui.desk import Desk, Job, News, Refused, ServedEngine

KEY, LOOPBACK = "RLVER_SERVE_KEY", ("127.0.0.1", "localhost", "::1")
EVENTS, MOST = "text/event-stream", 1 << 22  # bytes of a request
OWN = {"host": "127.0.0.1", "port": "8000", "queue": "256"}  # options beside config.py's
# Arguments of the API without effect here, and those that are served at one value alone.
IDLE = "user metadata store service_tier safety_identifier prompt_cache_key".split()
FIXED = {"n": 1, "top_p": 1, "frequency_penalty": 0, "presence_penalty": 0, "top_logprobs": 0,
         "logit_bias": {}, "tools": [], "response_format": {"type": "text"}}  # fmt: skip


def error(refused: Refused) -> dict:
    """The API's error object."""
    kinds = {429: refused.code, 500: "server_error", 503: "server_error"}
    kind = kinds.get(refused.status, "invalid_request_error")
    param, code = refused.param or None, refused.code or None
    return {"error": {"message": str(refused), "type": kind, "param": param, "code": code}}


def respond(request: Request | None, refused: Refused) -> JSONResponse:
    wait = {"Retry-After": "1"} if refused.status == 429 else None
    return JSONResponse(error(refused), refused.status, wait)


class Message(BaseModel):
    """One message; a content in parts is their texts behind each other."""

    model_config = ConfigDict(extra="forbid")
    role: str = Field(pattern="^(system|developer|user|assistant)$")
    content: str | list[dict]
    name: str | None = None
    type: str | None = None  # lm-eval sends it

    def text(self) -> str:
        parts = [{"text": self.content}] if isinstance(self.content, str) else self.content
        if odd := [part for part in parts if not isinstance(part.get("text"), str)]:
            raise Refused(f"content of type {odd[0].get('type')!a} is no text", "messages")
        text = "".join(part["text"] for part in parts)
        if any("\ud800" <= char <= "\udfff" for char in text):
            raise Refused("half a surrogate pair is no text", "messages")
        return text


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
            role, text = message.role.replace("developer", "system"), message.text()
            ids += chat.message(role, text) if role == "user" or text.strip() else []
    return [*ids, *chat.assistant_header, *chat.empty_block]


def read_job(body: Body, chat: Chat, name: str, capacity: int) -> Job:
    """A request to be queued. Raises Refused with what is wrong."""
    if body.model != name:
        missing = f"the model {body.model!a} does not exist; here is {name!r}"
        raise Refused(missing, "model", "model_not_found", 404)
    for key, value in (body.model_extra or {}).items():
        if key not in FIXED and key not in IDLE:
            raise Refused(f"unknown argument {key!a}", key)
        if key in FIXED and value is not None and value != FIXED[key]:
            raise Refused(f"{key}={ascii(value)[:80]} is not served, only {FIXED[key]}", key)
    prompt = read_prompt(chat, body.messages)
    if (room := capacity - len(prompt)) < 1:
        long = f"{len(prompt)} tokens and a reply do not fit into a context of {capacity}"
        raise Refused(long, "messages", "context_length_exceeded")
    stops = [body.stop] if isinstance(body.stop, str) else body.stop or []
    cap = body.max_completion_tokens or body.max_tokens or room
    heat = 1.0 if body.temperature is None else body.temperature
    stream = Stream(chat, tuple(filter(None, stops)))
    return Job(prompt, cap, heat, body.seed, bool(body.stream), stream)


async def news(job: Job, request: Request) -> AsyncIterator[News]:
    """A request's news until the last; none once its client is gone. Raises Refused."""

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        job.events.put_nowait(None)

    watching = asyncio.create_task(watch())
    try:
        while event := await job.events.get():
            if isinstance(event, Refused):
                raise event
            yield event
            if event.row:
                return
    finally:
        job.gone = True
        watching.cancel()


def choice(chat: Chat, body: Body, job: Job, event: News, content: dict) -> dict:
    """The one choice of an answer, or of a part of it; log-probabilities are at temperature 1."""
    row, told = event.row, []
    for token, logp in zip(event.ids, event.logps):
        text = "" if token == chat.end else chat.decode([token])
        about = {"token": text, "logprob": logp, "bytes": [*text.encode()], "top_logprobs": []}
        told += [about] if text else []
    reason = row and ("stop" if row.stop == "eos" or job.stream.stopped else "length")
    content |= {"content": event.text}
    content |= {"reasoning_content": event.thought} if event.thought else {}
    logprobs = {"content": told} if body.logprobs else None
    kind = "delta" if body.stream else "message"
    return {"index": 0, kind: content, "finish_reason": reason, "logprobs": logprobs}


def usage(row: Row) -> dict:
    prompt, reply = len(row.prompt), len(row.sampled)
    return {"prompt_tokens": prompt, "completion_tokens": reply, "total_tokens": prompt + reply}


class Gate:
    """Looks at the key and the size of a request before its body is read."""

    def __init__(self, app, key: str):
        self.app, self.key = app, key

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers, wrong = Headers(scope=scope), None
        how, _, given = headers.get("authorization", "").partition(" ")
        size = headers.get("content-length", "0" if scope["method"] == "GET" else "")
        same = hmac.compare_digest(given.encode(), self.key.encode())
        if self.key and not (how.lower() == "bearer" and same):
            wrong = Refused("a wrong key, or none", code="invalid_api_key", status=401)
        elif not size.isdecimal() or int(size) > MOST:
            wrong = Refused(f"a body has a length, of {MOST} bytes at most", status=413)
        await (respond(None, wrong) if wrong else self.app)(scope, receive, send)


def make_app(desk: Desk, chat: Chat, name: str, key: str = "") -> FastAPI:
    """The endpoint; with a `key` nobody else is answered."""
    app = FastAPI(title="rlver", docs_url=None, redoc_url=None, openapi_url=None)
    if not key:  # or a page in a browser here could reach it under a name of its own
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=[*LOOPBACK, "[::1]"])
    app.add_middleware(Gate, key=key)
    app.add_exception_handler(Refused, respond)

    @app.exception_handler(RequestValidationError)
    def malformed(request: Request, wrong: RequestValidationError) -> JSONResponse:
        first = wrong.errors()[0]
        where = ascii(".".join(map(str, first["loc"][1:])))[1:-1]
        return respond(request, Refused(f"{where}: {first['msg']}", where))

    @app.exception_handler(HTTPException)
    def elsewhere(request: Request, wrong: HTTPException) -> JSONResponse:
        return respond(request, Refused(str(wrong.detail), status=wrong.status_code))

    @app.get("/v1/models")
    def models() -> dict:
        only = {"id": name, "object": "model", "created": 0, "owned_by": "rlver"}
        return {"object": "list", "data": [only]}

    @app.post("/v1/chat/completions")
    async def complete(body: Body, request: Request):
        job = read_job(body, chat, name, desk.engine.capacity)
        desk.submit(job)
        head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": name}
        if body.stream:
            return StreamingResponse(parts(body, job, request, head), media_type=EVENTS)
        async for event in news(job, request):
            only = choice(chat, body, job, event, {"role": "assistant"})
            whole = {"object": "chat.completion", "choices": [only], "usage": usage(event.row)}
            return head | whole
        return JSONResponse({}, 499)  # to nobody

    async def parts(body: Body, job: Job, request: Request, head: dict) -> AsyncIterator[str]:
        head, delta = head | {"object": "chat.completion.chunk"}, {"role": "assistant"}
        try:
            async for event in news(job, request):
                some = choice(chat, body, job, event, delta)
                yield f"data: {json.dumps(head | {'choices': [some]})}\n\n"
                delta = {}
                if event.row and (body.stream_options or {}).get("include_usage"):
                    cost = {"choices": [], "usage": usage(event.row)}
                    yield f"data: {json.dumps(head | cost)}\n\n"
        except Refused as refused:
            yield f"data: {json.dumps(error(refused))}\n\n"
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
    mine = [arg for arg in argv[1:] if "=" in arg and arg.partition("=")[0] in OWN]
    own, key = OWN | dict(arg.split("=", 1) for arg in mine), os.environ.get(KEY, "")
    policy = find_policy("serve.py", [arg for arg in argv if arg not in mine])
    require(own["queue"].isdecimal(), f"queue is {own['queue']!r}; give how many requests may wait")
    need = f"host={own['host']} is open to others; put a key into {KEY}, or leave host out"
    require(key or own["host"] in LOOPBACK, need)
    config, world = policy.config, single(policy.config)
    door = listen(own["host"], own["port"])
    print(use_kernels(config, policy.run, world), flush=True)
    model, tokenizer = policy.load(world)
    chat = make_chat(tokenizer, config.think)
    sampling = Sampling(banned_ids(tokenizer, model.config.vocab_size, (chat.end,)), (chat.end,))
    engine = ServedEngine(model, sampling, config.slots, config.context_tokens)
    desk = Desk(engine, int(own["queue"]))
    app, (host, port, *_) = make_app(desk, chat, argv[0], key), door.getsockname()
    host = f"[{host}]" if ":" in host else host
    most = f"{config.slots} requests at once, {own['queue']} may wait"
    print(f"{argv[0]} at http://{host}:{port}/v1; {most}", flush=True)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=5))
    http = threading.Thread(target=server.run, args=([door],))
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # like Ctrl-C
    try:
        http.start()
        desk.run()
    except KeyboardInterrupt:
        pass
    finally:
        desk.close()
        server.should_exit = True
        http.join()
    return 0


if __name__ == "__main__":
    run_main(main)
