"""Two "hosts" on this machine: network namespaces with an address of their own each, joined by a cable.

They share the file system, as hosts share a network one, but for a disk that each of them may have. Where namespaces
cannot be made, for want of ``ip`` or of the right to, the hosts are two addresses of the loopback interface: the same
processes and rendezvous, on one network.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path

from tests.forked import start_python
from tests.ports import free_ports

_CLONE_NEWNET, _CLONE_NEWNS = 0x40000000, 0x20000


@dataclass
class Host:
    """One of the two; the first also holds the job's store."""

    address: str
    interface: str
    namespace: str | None
    port: int
    is_first: bool
    processes: list[BaseProcess] = field(default_factory=list)
    """Of the last run, one a rank."""

    def start(
        self, first: Host, script: Path, *arguments: str, disk: tuple[Path, Path] | None = None, ranks: int = 1
    ) -> None:
        """Begin this host's half of a run with one rank on each host, or with ``ranks=2`` all of a run.

        ``disk``: a folder, and where this host alone sees it. That needs namespaces.
        """
        assert disk is None or self.namespace, "it would be mounted for all"
        # As srun starts them: torchrun ends its ranks when the other host is gone, at times before they have spoken.
        environment = {
            **os.environ,
            "WORLD_SIZE": "2",
            "LOCAL_WORLD_SIZE": str(ranks),
            "MASTER_ADDR": first.address,
            "MASTER_PORT": str(first.port),
            "GLOO_SOCKET_IFNAME": self.interface,
        }
        self.processes = [
            start_python(
                script,
                *arguments,
                env={
                    **environment,
                    "RANK": str(rank if ranks == 2 else int(not self.is_first)),
                    "LOCAL_RANK": str(rank),
                },
                before=partial(_enter, self.namespace, disk),
            )
            for rank in range(ranks)
        ]

    def listen(self) -> socket.socket:
        """Return a socket of this process, wherever that is, to which both hosts can connect by this one's address."""
        with ThreadPoolExecutor(1) as visitor:  # a thread of its own, which alone goes there
            return visitor.submit(self._listen).result()

    def _listen(self) -> socket.socket:
        if self.namespace:
            _enter(self.namespace, None)
        return socket.create_server((self.address, 0))

    def kill(self) -> None:
        """End all its processes at once, as if the power had gone."""
        for pid in [pid for process in self.processes if process.is_alive() for pid in _family(process.pid)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for process in self.processes:
            process.join(60)

    def wait(self, timeout_secs: float) -> int:
        """Wait for the end of its half; the exit status, of several ranks the first that is not 0."""
        for process in self.processes:
            process.join(timeout_secs)
            assert process.exitcode is not None, f"it has not ended within {timeout_secs} s"
        return next((process.exitcode for process in self.processes if process.exitcode), 0)

    def unplug(self) -> None:
        """Cut the cable first, so that nobody is told that connections ended. Loopback has none to cut."""
        if self.namespace:
            _ip("-n", self.namespace, "link", "set", self.interface, "down")


@contextlib.contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """The hosts; what still runs on them in the end is killed."""
    with contextlib.ExitStack() as undo:
        hosts = _namespaces(undo) or _loopback()
        try:
            yield hosts
        finally:
            for host in hosts:
                host.kill()


def _namespaces(undo: contextlib.ExitStack) -> tuple[Host, Host] | None:
    names = [f"shardsmith-{os.getpid()}-{i}" for i in (1, 2)]
    cables = [f"ss{os.getpid() % 10**7}-{i}" for i in (1, 2)]  # 15 letters at most
    try:
        for name in names:
            _ip("netns", "add", name)
            undo.callback(_ip, "netns", "del", name)
        ends = [("type", "veth", "peer"), ()]
        _ip("link", "add", cables[0], "netns", names[0], *ends[0], "name", cables[1], "netns", names[1])
        for i, (name, cable) in enumerate(zip(names, cables, strict=True), 1):
            _ip("-n", name, "address", "add", f"10.231.7.{i}/24", "dev", cable)
            for interface in ("lo", cable):
                _ip("-n", name, "link", "set", interface, "up")
    except (OSError, subprocess.CalledProcessError):
        undo.close()
        return None
    first, second = (
        Host(f"10.231.7.{i}", cable, name, 29400, i == 1)
        for i, (name, cable) in enumerate(zip(names, cables, strict=True), 1)
    )
    return first, second


def _loopback() -> tuple[Host, Host]:
    (port,) = free_ports(1)
    return Host("127.0.0.1", "lo", None, port, True), Host("127.0.0.2", "lo", None, port, False)


def _ip(*arguments: str) -> None:
    tool = shutil.which("ip", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    if tool is None:
        raise FileNotFoundError("ip")
    subprocess.run([tool, *arguments], check=True, capture_output=True)


def _enter(namespace: str | None, disk: tuple[Path, Path] | None) -> None:
    """Move this thread to a network namespace, with a disk to a mount namespace of its own, too."""
    if namespace is None:
        return
    libc = ctypes.CDLL(None, use_errno=True)
    with Path("/var/run/netns", namespace).open() as there:
        if libc.setns(there.fileno(), _CLONE_NEWNET) or (disk is not None and libc.unshare(_CLONE_NEWNS)):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), namespace)
    if disk is not None:
        subprocess.run(["mount", "--make-rslave", "/"], check=True)  # so that no other process sees the next one
        subprocess.run(["mount", "--bind", *disk], check=True)


def _family(pid: int | None) -> list[int]:
    """A process and all its descendants."""
    assert pid is not None
    children: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            children += map(int, task.read_text().split())
    return [pid, *(one for child in children for one in _family(child))]


def wait_for(path: Path, hosts: tuple[Host, Host], timeout_secs: float = 120) -> None:
    """Return when there is such a file. Fails if a host ends before."""
    deadline = time.monotonic() + timeout_secs
    while not path.exists():
        assert all(process.is_alive() for host in hosts for process in host.processes), "a host has ended"
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.02)
