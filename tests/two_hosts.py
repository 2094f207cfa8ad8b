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
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from tests.ports import free_ports

ROOT = Path(__file__).parent.parent
_CLONE_NEWNET = 0x40000000


@dataclass
class Host:
    """One of the two; the first also holds the job's store."""

    address: str
    interface: str
    namespace: str | None
    port: int
    is_first: bool
    process: subprocess.Popen[bytes] | None = field(default=None)

    def start(self, first: Host, script: Path, *arguments: str, disk: tuple[Path, Path] | None = None) -> None:
        """Begin this host's half of a run with one rank on each host.

        ``disk``: a folder, and where this host alone sees it. That needs namespaces.
        """
        inside = ["ip", "netns", "exec", self.namespace] if self.namespace else []
        if disk is not None:
            assert self.namespace, "it would be mounted for all"
            inside += ["sh", "-c", 'mount --bind "$0" "$1" && shift && exec "$@"', *map(str, disk)]
        # As srun starts them: torchrun ends its ranks when the other host is gone, at times before they have spoken.
        environment = {
            **os.environ,
            "RANK": str(int(not self.is_first)),
            "WORLD_SIZE": "2",
            "LOCAL_RANK": "0",
            "LOCAL_WORLD_SIZE": "1",
            "MASTER_ADDR": first.address,
            "MASTER_PORT": str(first.port),
            "GLOO_SOCKET_IFNAME": self.interface,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
        }
        self.process = subprocess.Popen([*inside, sys.executable, str(script), *arguments], env=environment)

    def listen(self) -> socket.socket:
        """Return a socket of this process, wherever that is, to which both hosts can connect by this one's address."""
        with ThreadPoolExecutor(1) as visitor:  # a thread of its own, which alone goes there
            return visitor.submit(self._listen).result()

    def _listen(self) -> socket.socket:
        if self.namespace:
            with Path("/var/run/netns", self.namespace).open() as there:
                if ctypes.CDLL(None, use_errno=True).setns(there.fileno(), _CLONE_NEWNET):
                    raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), self.namespace)
        return socket.create_server((self.address, 0))

    def kill(self) -> None:
        """End all its processes at once, as if the power had gone."""
        assert self.process is not None
        for pid in _family(self.process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait(60)

    def wait(self, timeout_secs: float) -> int:
        """Wait for the end of its half; the exit status."""
        assert self.process is not None
        return self.process.wait(timeout_secs)

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
                if host.process is not None:
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


def _family(pid: int) -> list[int]:
    """A process and all its descendants."""
    children: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            children += map(int, task.read_text().split())
    return [pid, *(one for child in children for one in _family(child))]


def wait_for(path: Path, hosts: tuple[Host, Host], timeout_secs: float = 120) -> None:
    """Return when there is such a file. Fails if a host ends before."""
    deadline = time.monotonic() + timeout_secs
    while not path.exists():
        assert all(host.process is not None and host.process.poll() is None for host in hosts), "a host has ended"
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.02)
