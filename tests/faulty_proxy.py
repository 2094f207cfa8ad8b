"""A proxy between a client and the object server: it counts requests, and answers some of them badly."""

from __future__ import annotations

import contextlib
import http.client
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal

from tests.object_server import ObjectServer

Fault = Literal["503", "expired", "full", "drop", "lost", "cut"]
"""An error of the server; refused for old credentials, or a full quota; no answer; done, but no answer; half one."""
_ANSWERS = {"503": (503, "SlowDown"), "expired": (400, "ExpiredToken"), "full": (403, "QuotaExceeded")}


@dataclass(frozen=True, eq=False)
class Request:
    """One request, as it came."""

    method: str
    path: str
    nbytes: int
    """Of its body."""

    @property
    def key(self) -> str:
        return self.path.partition("?")[0]


@dataclass
class Proxy:
    """What the proxy has seen, and which requests it answers badly."""

    server: ObjectServer
    requests: list[Request] = field(default_factory=list)
    fault: Callable[[Request, int], Fault | None] = lambda request, seen: None  # noqa: ARG005
    """Given a request, and how many of its method and key there were before it."""
    done: Callable[[Request], None] = lambda request: None  # noqa: ARG005
    """Called when the store has done a request, before its answer goes on."""
    sent: int = 0
    """Bytes of answers to GET."""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def note(self, request: Request) -> Fault | None:
        with self.lock:
            seen = sum((one.method, one.key) == (request.method, request.key) for one in self.requests)
            self.requests.append(request)
            return self.fault(request, seen)

    def counted(self) -> dict[str, int]:
        """How many requests of each method; listings apart."""
        kinds = ["LIST" if "list-type" in one.path else one.method for one in self.requests]
        return {kind: kinds.count(kind) for kind in sorted(set(kinds))}


@contextlib.contextmanager
def proxied(server: ObjectServer, listener: socket.socket | None = None) -> Iterator[Proxy]:
    """Within it ``proxy.server`` is the server as seen through the proxy, which takes connections of ``listener``."""
    goal = server.endpoint.removeprefix("http://")

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_any(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            request = Request(self.command, self.path, len(body))
            fault = proxy.note(request)
            if fault in _ANSWERS:
                status, code = _ANSWERS[fault]
                self.answer(status, {}, f"<Error><Code>{code}</Code></Error>".encode())
                return
            if fault == "drop":
                self.hang_up()
                return
            upstream = http.client.HTTPConnection(goal, timeout=60)
            upstream.request(self.command, self.path, body, dict(self.headers.items()))
            reply = upstream.getresponse()
            data = reply.read()
            upstream.close()
            proxy.done(request)
            if fault == "lost":
                self.hang_up()
                return
            headers = {name: value for name, value in reply.getheaders() if name.lower() not in _HOP}
            proxy.sent += len(data) if self.command == "GET" else 0
            self.answer(reply.status, headers, data, cut=fault == "cut")

        do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = handle_any  # noqa: N815

        def answer(self, status: int, headers: dict[str, str], data: bytes, cut: bool = False) -> None:
            self.send_response_only(status)
            said = headers.pop("Content-Length", "0")
            length = said if self.command == "HEAD" else str(len(data))
            for name, value in {**headers, "Content-Length": length}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data[: len(data) // 2] if cut else data)
            if cut:
                self.hang_up()

        def hang_up(self) -> None:
            self.close_connection = True
            with contextlib.suppress(OSError):
                self.connection.shutdown(socket.SHUT_RDWR)

        def log_message(self, *args: object) -> None:
            pass

    listener = socket.create_server(("127.0.0.1", 0)) if listener is None else listener
    address, port = listener.getsockname()
    with ThreadingHTTPServer((address, port), Handler, bind_and_activate=False) as httpd:
        httpd.socket.close()
        httpd.socket = listener
        httpd.daemon_threads = True
        httpd.server_activate()
        proxy = Proxy(replace(server, endpoint=f"http://{address}:{port}"))
        thread = threading.Thread(target=httpd.serve_forever, daemon=True)
        thread.start()
        try:
            yield proxy
        finally:
            httpd.shutdown()
            thread.join()


_HOP = ("connection", "transfer-encoding")
