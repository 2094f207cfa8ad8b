"""Ports for servers of the tests that must be told a number before they bind."""

from __future__ import annotations

import random
import socket
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

_EPHEMERAL = Path("/proc/sys/net/ipv4/ip_local_port_range")
_LOWEST = 10000


def free_ports(count: int, *hosts: str) -> list[int]:
    """Return ports that are free now, none of those that the kernel hands out by itself.

    A port from `bind(0)` is soon given to some client's connection of another process. These are taken by nobody
    but who draws the same number, so that a caller that is unlucky tries again with others.
    """
    return [port for port, _ in zip(_untaken(hosts or ("127.0.0.1",)), range(count), strict=False)]


def _untaken(hosts: tuple[str, ...]) -> Iterator[int]:
    highest = int(_EPHEMERAL.read_text().split()[0]) if _EPHEMERAL.exists() else 32768
    for port in random.SystemRandom().sample(range(_LOWEST, max(highest, _LOWEST + 10000)), k=10000):
        with suppress(OSError):
            for host in hosts:
                with socket.socket() as probe:
                    probe.bind((host, port))
            yield port
