"""Logs that are read line by line, whatever else is in them."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from obstore.store import S3Store

from shardsmith.ground import object_store
from shardsmith.ground.bounded import lines_of, read_bounded
from shardsmith.ground.remote_owner import owner_lives
from shardsmith.ground.remote_path import as_path
from shardsmith.ground.stores import use_client
from tests.object_server import ObjectServer

NO_RETRIES: Any = {"max_retries": 0, "retry_timeout": timedelta(seconds=1)}
LONG = "x" * 65_536
OWN = ['{"a": 1}\n', '{"b": "\u2028"}\n', "x" * 65_535 + "\n", '{"cut']
CONTENT = "".join([OWN[0], f"{LONG}{{}}\n", OWN[1], f"{LONG}\n", OWN[2], f"{LONG * 3}\n", OWN[3]]).encode()


def test_a_line_that_is_too_long_is_passed_over_and_not_taken_for_several(tmp_path: Path) -> None:
    (tmp_path / "log").write_bytes(CONTENT)
    assert [*lines_of(tmp_path / "log")] == OWN
    (tmp_path / "log").write_text(OWN[0] + LONG)
    assert [*lines_of(tmp_path / "log")] == OWN[:1]
    assert [*lines_of(tmp_path / "none")] == []


def test_a_log_in_a_store_has_the_same_lines(object_server: ObjectServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(object_store, "_clients", {})
    object_server.use()
    log = as_path(object_server.url("logs/events.jsonl"))
    assert [*lines_of(log)] == []
    log.store.put_new(log.key, CONTENT)
    assert [*lines_of(log)] == OWN


@pytest.fixture
def endless() -> Iterator[str]:
    """Address of a store that says of each object that it is huge, and never gets to its end."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        with contextlib.ExitStack() as kept, contextlib.suppress(OSError):
            while True:
                connection = kept.enter_context(listener.accept()[0])
                connection.recv(1 << 16)
                headers = f"Content-Length: {1 << 40}\r\nETag: one\r\nLast-Modified: Mon, 30 Nov 2026 05:00:00 GMT"
                connection.sendall(f"HTTP/1.1 200 OK\r\n{headers}\r\n\r\n".encode() + b"{" * 1000)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join()


def test_what_is_too_large_in_a_store_is_not_waited_for(endless: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever can write there could fill the memory of whoever looks."""
    monkeypatch.setattr(object_store, "_clients", {})
    options: Any = {"allow_http": True, "timeout": timedelta(seconds=2)}
    client = S3Store("bucket", endpoint=endless, skip_signature=True, client_options=options, retry_config=NO_RETRIES)
    use_client("s3://bucket", client)
    step = as_path("s3://bucket/run/step-5")
    for name in ("metadata.json", "config.json"):
        with pytest.raises(ValueError, match="has more than 1000 bytes"):
            read_bounded(step.parent / name, 1000)
    assert owner_lives(step / f".{'0' * 16}.owner") is None  # type: ignore[arg-type]
    assert (step / "a.bin").located == step / "a.bin"  # type: ignore[attr-defined]


def test_what_is_too_large_behind_fsspec_is_not_read_whole() -> None:
    path = as_path("memory://bucket/bounded/config.json")
    path.write_text("x" * 1001)
    with pytest.raises(ValueError, match="has more than 1000 bytes"):
        read_bounded(path, 1000)
    assert read_bounded(path, 1001) == b"x" * 1001
