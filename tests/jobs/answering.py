"""A server that answers as it was told to, and keeps what it was sent."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

MODE = "/api/authentication_mode"


class Answering(ThreadingHTTPServer):
    """On any address of this machine.

    Args:
        answers: Status and text by path; to all others: 404.
    """

    def __init__(self, answers: dict[str, tuple[int, str]]) -> None:
        super().__init__(("", 0), _Handler)
        self.answers = answers
        self.requests: list[tuple[str, dict[str, str]]] = []
        self.address = f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: Answering

    def do_GET(self) -> None:
        self.server.requests.append((self.path, dict(self.headers)))
        status, text = self.server.answers.get(self.path, (404, ""))
        self.send_response(status)
        self.end_headers()
        self.wfile.write(text.encode())

    do_POST = do_PUT = do_GET

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def answering(answers: dict[str, tuple[int, str]]) -> Iterator[Answering]:
    with Answering(answers) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def mode(name: str) -> str:
    """What Ray's dashboard says of its authentication."""
    return json.dumps({"authentication_mode": name})
