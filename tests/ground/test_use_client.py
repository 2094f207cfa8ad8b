"""Clients of one's own, and stores that cannot do what a commit needs."""

from __future__ import annotations

import re
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any, ClassVar

import obstore
import pytest

from shardsmith import StorageError, TargetExistsError, UsageError
from shardsmith.ground import object_store
from shardsmith.ground.object_store import ObjectStore
from shardsmith.ground.remote_commit import RemoteAttempt, check_writable, committed_steps
from shardsmith.ground.remote_path import RemotePath, as_path
from shardsmith.ground.stores import use_client
from tests.ground.test_remote_commit import write


def as_remote(url: str) -> RemotePath:
    path = as_path(url)
    assert isinstance(path, RemotePath)
    return path


def test_clients_of_ones_own_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(object_store, "_clients", {})
    mine = obstore.store.MemoryStore()
    use_client("s3://mine/", mine)
    ObjectStore("s3://mine").put("a", b"1")
    assert bytes(obstore.get(mine, "a").bytes()) == b"1"


class Forgetful(BaseHTTPRequestHandler):
    """An S3 server that has not heard of If-None-Match, and takes any signature."""

    kept: ClassVar[set[str]] = set()

    def do_PUT(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.kept.add(self.path)
        self.answer({"ETag": '"0"'})

    def do_GET(self) -> None:
        self.answer({"ETag": '"0"', "Last-Modified": "Sun, 29 Nov 2026 12:00:00 GMT"})

    def do_POST(self) -> None:
        """Delete all."""
        keys = re.findall(rb"<Key>(.*?)</Key>", self.rfile.read(int(self.headers["Content-Length"])))
        self.kept.clear()
        told = b"".join(b"<Deleted><Key>%s</Key></Deleted>" % key for key in keys)
        namespace = b"http://s3.amazonaws.com/doc/2006-03-01/"
        self.answer({}, b'<DeleteResult xmlns="%s">%s</DeleteResult>' % (namespace, told))

    def answer(self, headers: dict[str, str], body: bytes = b"") -> None:
        self.send_response(200)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


def test_a_store_without_conditional_writes_is_refused_before_the_first_save(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(object_store, "_clients", {})
    with ThreadingHTTPServer(("127.0.0.1", 0), Forgetful) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        options: dict[str, Any] = {
            "access_key_id": "a",
            "secret_access_key": "b",
            "region": "x",
            "client_options": {"allow_http": True},
        }
        endpoint = f"http://127.0.0.1:{server.server_address[1]}"
        use_client("s3://old", obstore.store.S3Store("old", endpoint=endpoint, **options))
        with pytest.raises(StorageError, match=r"does not know conditional writes \(If-None-Match") as caught:
            check_writable(as_remote("s3://old/run"))
        server.shutdown()
    assert not caught.value.transient
    assert not Forgetful.kept


@pytest.mark.parametrize("url", ["s3://me:secret@bucket", "s3://bucket/run", "file://bucket", "bucket"])
def test_a_client_is_for_a_whole_bucket(url: str) -> None:
    with pytest.raises(UsageError, match="scheme and bucket are expected") as caught:
        use_client(url, obstore.store.MemoryStore())
    assert "secret" not in str(caught.value)


def test_clients_of_other_libraries_are_refused_by_name() -> None:
    with pytest.raises(UsageError, match=r"a file system of fsspec is expected, not a PosixPath"):
        use_client("s3://bucket", Path())


@pytest.mark.parametrize("kind", ["memory", "local"])
def test_a_client_of_ones_own_of_any_kind_keeps_the_rule(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(object_store, "_clients", {})
    own = obstore.store.MemoryStore() if kind == "memory" else obstore.store.LocalStore(tmp_path)
    use_client("s3://own", own)
    check_writable(as_remote("s3://own/run"))
    first, second = (RemoteAttempt(as_remote("s3://own/run/step-5")) for _ in range(2))
    sizes = [write(attempt) for attempt in (first, second)]
    first.commit(sizes[0])
    with pytest.raises(TargetExistsError):
        second.commit(sizes[1])
    assert committed_steps(as_remote("s3://own/run"), "metadata.json") == [5]


def test_an_address_without_tls_says_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(object_store, "_clients", {})
    monkeypatch.delenv("AWS_ALLOW_HTTP", raising=False)  # of a server that another test has used in this process
    client = obstore.store.S3Store(
        "b", endpoint="http://127.0.0.1:9", access_key_id="a", secret_access_key="b", region="x"
    )
    use_client("s3://plain", client)
    with pytest.raises(StorageError, match="http:// address, for which AWS_ALLOW_HTTP=true must be set") as caught:
        ObjectStore("s3://plain").put("a", b"1")
    assert not caught.value.transient


class Refusing(BaseHTTPRequestHandler):
    """An S3 server that answers all requests as ``told`` says."""

    told: ClassVar[tuple[int, str, str]] = (500, "", "")
    """Status, code of the error, and where it sends the request on to."""
    count: ClassVar[int] = 0

    def refuse(self) -> None:
        type(self).count += 1
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        status, code, location = self.told
        body = f"<Error><Code>{code}</Code></Error>".encode()
        self.send_response(status)
        if location:
            self.send_header("Location", location)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_PUT = do_GET = do_POST = refuse  # noqa: N815

    def log_message(self, *args: object) -> None:
        pass


@pytest.mark.parametrize(
    ("told", "cure"),
    [
        ((403, "RequestTimeTooSkewed", ""), "the clock of this host differs from the store's"),
        ((400, "ExpiredToken", ""), "the credentials have expired"),
        ((404, "NoSuchBucket", ""), "there is no such bucket"),
        ((301, "PermanentRedirect", ""), r"look at the region \(AWS_REGION\) and the endpoint"),
        ((307, "", "/again/redirect"), r"look at the region \(AWS_REGION\) and the endpoint"),
        ((403, "AccessDenied", ""), "look at the credentials of this process"),
    ],
    ids=lambda value: str(value[1] or value[2]) if isinstance(value, tuple) else "",
)
def test_what_will_always_be_refused_is_not_repeated_and_says_what_to_look_at(
    told: tuple[int, str, str], cure: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(object_store, "_clients", {})
    monkeypatch.setattr(Refusing, "told", told)
    with ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        endpoint = f"http://127.0.0.1:{server.server_address[1]}"
        client = obstore.store.S3Store(
            "b",
            endpoint=endpoint,
            access_key_id="a",
            secret_access_key="b",
            region="x",
            client_options={"allow_http": True},
        )
        use_client("s3://b", client)
        for act in (lambda: ObjectStore("s3://b").get("redirect"), lambda: ObjectStore("s3://b").objects("redirect")):
            monkeypatch.setattr(Refusing, "count", 0)
            with pytest.raises(StorageError, match=cure) as caught:
                act()
            assert not caught.value.transient
            assert Refusing.count <= 11, "a client follows ten redirections"
        server.shutdown()
