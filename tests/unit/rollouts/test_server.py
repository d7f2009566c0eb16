"""Servers that are not vLLM's, or have died: refused in time, in one line."""

import json
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

from oprd.foundation.errors import UserError
from oprd.rollouts.engines import choose
from oprd.rollouts.engines.choose import ServerEngine
from oprd.rollouts.generation import Sampling


class Handler(BaseHTTPRequestHandler):
    """Answers with `answers[path]`; a path that has none is never answered."""

    def do_GET(self):
        length = int(self.headers.get("Content-Length") or 0)
        self.rfile.read(length)
        if self.path not in self.server.answers:
            self.server.closing.wait()
            return
        content = self.server.answers[self.path]
        self.send_response(200)
        self.end_headers()
        self.wfile.write(content)

    do_POST = do_GET

    def log_message(self, *_):
        pass


@pytest.fixture
def serve():
    """`serve(answers)`: the address of a server that gives them."""
    running = []

    def start(answers):
        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.answers, server.closing = answers, threading.Event()
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        running.append(server)
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in running:
        server.closing.set()
        server.shutdown()
        server.server_close()


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(choose, "ANSWER_SECONDS", 0.3)
    monkeypatch.setattr(choose, "FIRST_TOKEN_SECONDS", 0.3)
    monkeypatch.setattr(choose, "TOKENS_A_SECOND", 100)


MODELS = json.dumps({"data": [{"id": "model"}]}).encode()


def test_a_server_that_accepts_and_never_answers(tiny_model):
    with socket.create_server(("127.0.0.1", 0)) as listening:
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        with pytest.raises(UserError, match=f"{url} has not answered /v1/models for 0 s"):
            ServerEngine(url, tiny_model(), [2])


def test_a_server_that_dies_before_the_first_response(serve, tiny_model):
    engine = ServerEngine(serve({"/v1/models": MODELS}), tiny_model(), [2])
    with pytest.raises(UserError, match="has not answered /v1/completions for 0 s"):
        engine.generate([[5, 6, 7]], Sampling(4), seed=0)


def test_a_server_that_dies_later(serve, tiny_model):
    """What it is given to answer grows with the tokens that it is asked for."""
    model = tiny_model()
    ids = [5, 6, 7] * 2
    with torch.no_grad():
        told = (
            model(torch.tensor([ids])).logits[0].log_softmax(-1)[:-1].gather(1, torch.tensor(ids)[1:, None])
        )
    listed = [None, *({str(i): {"logprob": value.item()}} for i, value in zip(ids[1:], told, strict=True))]
    answers = {"/v1/models": MODELS}
    answers["/v1/completions"] = json.dumps({"choices": [{"prompt_logprobs": listed}]}).encode()
    engine = ServerEngine(serve(answers), model, [2])
    engine._check([5, 6, 7])
    del answers["/v1/completions"]
    with pytest.raises(UserError, match="has not answered /v1/completions for 1 s"):
        engine.generate([[5, 6, 7], [5, 6]], Sampling(16), seed=0)


@pytest.mark.parametrize("answer", [b"<html>", b"{}", b"[]", b"null", b'{"data": []}', b"\xff", b""])
def test_a_server_of_something_else(serve, tiny_model, answer):
    url = serve({"/v1/models": answer})
    with pytest.raises(UserError, match=f"{url}"):
        ServerEngine(url, tiny_model(), [2])


@pytest.mark.parametrize("url", ["nowhere", "http://", "ftp://x", "http://127.0.0.1:1", "http://127.0.0.1:x"])
def test_addresses_of_no_server(tiny_model, url):
    with pytest.raises(UserError, match="no vLLM server answers"):
        ServerEngine(url, tiny_model(), [2])
