"""Where files may be mapped: in a command, which a file that cannot be read any more ends with a message.

The kernel answers an access to a page that cannot be read by SIGBUS, after which the access cannot go on: the handler
names the file, deletes what the command has half made, and ends the process. A process that trains must not end so.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from shardsmith.ground.printable import printable

# The handler is given a siginfo_t, which has the address.
_SA_SIGINFO = 4
_ADDRESS_AT = 16  # of si_addr in siginfo_t
_Handler = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)


class _Action(ctypes.Structure):
    """struct sigaction of glibc on 64-bit Linux."""

    _fields_ = (
        ("handler", ctypes.c_void_p),
        ("mask", ctypes.c_byte * 128),
        ("flags", ctypes.c_int),
        ("restorer", ctypes.c_void_p),
    )


_allowed = False


def reads_by_maps() -> bool:
    """Return whether files that are opened now are mapped."""
    return _allowed


@contextlib.contextmanager
def reading_by_maps(clean_up: Callable[[], None]) -> Iterator[None]:
    """Map the files that are opened within; a SIGBUS prints which one cannot be read and ends the process with 2.

    Systems other than 64-bit Linux have their own way to end it.

    Args:
        clean_up: Called before the end, while other threads may still run.
    """
    global _allowed
    before, _allowed = _allowed, True
    try:
        with _handling_bus_errors(clean_up):
            yield
    finally:
        _allowed = before


@contextlib.contextmanager
def _handling_bus_errors(clean_up: Callable[[], None]) -> Iterator[None]:
    if sys.platform != "linux" or ctypes.sizeof(ctypes.c_void_p) != 8:
        yield
        return

    # Not by Python's `signal`: it runs handlers later, and meanwhile the same access would fail for ever.
    def handle(_: int, info: int, __: Any) -> None:
        address = ctypes.c_uint64.from_address(info + _ADDRESS_AT).value
        with contextlib.suppress(Exception):
            clean_up()
        cause = "cannot be read any more: it was cut off meanwhile, or its disk failed"
        # Not through `sys.stderr`, whose lock the interrupted code may hold.
        os.write(2, f"shardsmith: {_file_at(address)}: {cause}. Nothing half-done stays on disk\n".encode())
        # To return would repeat the access; `sys.exit` would run code that may read the same map.
        os._exit(2)

    libc = ctypes.CDLL(None)
    # It must live as long as it is installed: libc has only its address.
    handler = _Handler(handle)
    action, before = _Action(flags=_SA_SIGINFO), _Action()
    action.handler = ctypes.cast(handler, ctypes.c_void_p)
    libc.sigaction(int(signal.SIGBUS), ctypes.byref(action), ctypes.byref(before))
    try:
        yield
    finally:
        libc.sigaction(int(signal.SIGBUS), ctypes.byref(before), None)


def _file_at(address: int) -> str:
    """The path of the file that is mapped there."""
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/self/maps").read_text(errors="replace").splitlines():
            # begin-end, permissions, offset, device, inode, path.
            span, *_, path = line.split(maxsplit=5)
            begin, end = (int(text, 16) for text in span.split("-"))
            if begin <= address < end:
                return printable(path)
    return "a file"
