"""A loopback chat server that plays an ideal user, or the faults of a script: what users/clients.py has to
live with."""

import json
import socket
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from users.llm_user import APPRAISAL

PROMPT = {  # short ones: a byte is a token for the tiny models
    "opening": '{scene} Keys: "thinking", "response".\n=====\nBegin.',
    "appraisal": '{scene} {intention} Keys: "change".\n=====\n{history}\n> {reply}',
    "reply": '{scene} Keys: "response".\n=====\n{history}\n> {reply} {emotion}',
    "both": '{scene} {intention} Keys: "change", "response".\n=====\n{history}\n> {reply}',
}

HEADERS = {"429": {"Retry-After": "0.3"}, "429 at once": {"Retry-After": "0"}}
SAID = {
    "blank": "  \n ", "prose": "I am moved, the more I think of it.", "250": '{"change": 250, "response": "What?"}',
    "30": '{"content": "c", "target_completion": "t", "activity": "a", "analyse": "n", "change": 30, '
    '"thinking": "h", "response": "Wow."}',
}  # fmt: skip


def ideal(system: str, user: str) -> str:
    """What a well-behaved model answers: its change follows from the prompt, so that equal calls get equal answers."""
    fields = {name: f"my {name}" for name in (*APPRAISAL, "thinking", "response") if f'"{name}"' in system}
    if "change" in fields:
        fields["change"] = sum(user.encode()) % 9 - 3  # -3..5
    if "response" in fields:
        fields["response"] = f"Well, {sum(user.encode()) % 1000}."
    return json.dumps(fields)


class Server(ThreadingHTTPServer):
    """POST /v1/chat/completions. `fault(n)` names what goes wrong with request n (from 0): "" for nothing, a status,
    or a word of `Handler.misbehave`; `delay(n)` is the time that an answer takes."""

    daemon_threads, allow_reuse_address, request_queue_size = True, True, 64

    def __init__(self, fault=lambda n: "", delay=lambda n: 0.0, say=ideal):
        super().__init__(("127.0.0.1", 0), Handler)
        self.fault, self.delay, self.say = fault, delay, say
        self.connections, self.requests, self.times, self.lock = 0, [], [], threading.Lock()
        self.closing = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"

    def get_request(self):
        self.connections += 1
        return super().get_request()

    def handle_error(self, request, address):
        """A client that has given up is nothing to report."""


class Handler(BaseHTTPRequestHandler):
    protocol_version, disable_nagle_algorithm = "HTTP/1.1", True

    def log_message(self, *values):
        pass

    def do_POST(self):
        server, body = self.server, json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            number = len(server.requests)
            server.requests.append({**body, "path": self.path, "key": self.headers.get("Authorization", "")})
            server.times.append(time.monotonic())
        if server.delay(number):
            server.closing.wait(server.delay(number))
        fault = server.fault(number)
        if fault == "400 on response_format":
            fault = "400" if "response_format" in body else ""
        if fault in ("drop", "hang", "trickle", "not json", "html", "no message"):
            return self.misbehave(fault)
        if fault[:3].isdigit() and fault not in SAID:  # a careless server quotes the key that it was sent
            error = {"error": {"message": f"no: {self.headers.get('Authorization')}"}}
            return self.reply(int(fault[:3]), json.dumps(error), **HEADERS.get(fault, {}))
        system, user = (message["content"] for message in body["messages"])
        message = {"role": "assistant", "content": SAID.get(fault) or server.say(system, user)}
        reason = "length" if fault == "cut" else "stop"
        answer = {"id": "x", "object": "chat.completion", "created": 0, "model": body["model"],
                  "choices": [{"index": 0, "message": message, "finish_reason": reason}],
                  "usage": {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}}  # fmt: skip
        self.reply(200, json.dumps(answer))

    def misbehave(self, fault: str):
        self.close_connection = True
        if fault == "drop":
            self.connection.shutdown(socket.SHUT_RDWR)
        elif fault == "hang":
            self.server.closing.wait(20)
        elif fault == "trickle":  # blank lines against idle proxies: no single read ever times out
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            for _ in range(400):
                self.wfile.write(b"\n")
                if self.server.closing.wait(0.05):
                    break
        elif fault == "no message":
            self.reply(200, '{"choices": [{"index": 0, "message": null}]}')
        else:
            self.reply(200, "<html>busy", **{"Content-Type": "text/html" if fault == "html" else "application/json"})

    def reply(self, status: int, text: str, **headers):
        data = text.encode()
        self.send_response(status)
        for name, content in {"Content-Type": "application/json", "Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, content)
        self.end_headers()
        self.wfile.write(data)


@contextmanager
def serve(*script, **changes):
    """A running Server; positional words are the faults of the first requests, one each."""
    if script:
        changes["fault"] = lambda n: script[n] if n < len(script) else ""
    server = Server(**changes)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.closing.set()
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture(name="folder")
def prompts_folder(tmp_path):
    """A folder of short prompts."""
    (tmp_path / "prompts").mkdir()
    for name, text in PROMPT.items():
        (tmp_path / "prompts" / f"{name}.txt").write_text(text)
    return tmp_path / "prompts"
