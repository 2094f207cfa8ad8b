"""Open files that a process of a host lends to others of it, so that a file server sees one ``open`` for all of them.

What is lent is a copy of the descriptor, through a socket that has no name in any directory: nothing is left of it
when a process ends, however that happens. Nobody depends on it: who gets nothing opens the file by itself.
"""

from __future__ import annotations

import array
import contextlib
import errno
import logging
import os
import secrets
import socket
import struct
import sys
import threading
from collections.abc import Callable

log = logging.getLogger(__name__)

_NUMBER = struct.Struct("<q")
_MOST_SECS = 10.0
"""For an answer, of which the work is some microseconds: also of a process that has no core for a while."""


class Lender:
    """Lends descriptors of this process, in a thread of its own, until it is closed.

    Attributes:
        address: For ``borrow``, in another process of this host. Empty where the system has no such sockets.
    """

    def __init__(self, lend: Callable[[int], int | None]) -> None:
        """``lend`` gives a new descriptor by the number that a borrower sends, or None. On another thread."""
        self._lend = lend
        self.address = ""
        self._socket: socket.socket | None = None
        # Elsewhere such a socket has a name on disk, and would be left there by a process that is killed.
        if sys.platform == "linux":
            address = f"shardsmith-{secrets.token_hex(16)}"  # nobody guesses it, or has it already
            with contextlib.suppress(OSError), contextlib.ExitStack() as undo:
                listening = undo.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
                listening.bind(f"\0{address}")
                listening.listen()
                self.address, self._socket = address, listening
                undo.pop_all()
        if self._socket is not None:
            self._thread = threading.Thread(target=self._serve, args=(self._socket,), name="lent files", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Lend nothing any more. A second call does nothing."""
        listening, self._socket = self._socket, None
        if listening is not None:
            _end(listening)
            self._thread.join()
            listening.close()

    def _serve(self, listening: socket.socket) -> None:
        try:
            while True:
                with listening.accept()[0] as connection, contextlib.suppress(OSError, struct.error):
                    self._answer(connection)
        except OSError as error:
            # EINVAL: by ``close``. Otherwise there is no descriptor left for one more connection.
            if error.errno != errno.EINVAL:
                log.debug("lends no more files: %s", error)
        finally:
            # Whoever asks from now on is refused at once, instead of waiting for an answer.
            _end(listening)

    def _answer(self, connection: socket.socket) -> None:
        connection.settimeout(_MOST_SECS)
        if not _is_own(connection):
            return
        descriptor = self._lend(*_NUMBER.unpack(connection.recv(_NUMBER.size)))
        if descriptor is not None:
            try:
                socket.send_fds(connection, [b"\0"], [descriptor])
            finally:
                os.close(descriptor)


def borrow(address: str, number: int) -> int | None:
    """Return a descriptor of the file that another process of this host has open; the caller closes it.

    Args:
        address: Of its ``Lender``.
        number: Tells the lender which file is meant.

    Returns:
        None if it is not lent, or nobody answers.
    """
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(_MOST_SECS)
        connection.connect(f"\0{address}")
        if not _is_own(connection):
            return None
        connection.sendall(_NUMBER.pack(number))
        descriptors = array.array("i")
        # Not ``socket.recv_fds``: a program that is started meanwhile must not inherit it.
        _, ancillary, _, _ = connection.recvmsg(1, socket.CMSG_SPACE(descriptors.itemsize), socket.MSG_CMSG_CLOEXEC)
        for _, _, data in ancillary:
            descriptors.frombytes(data)
        return descriptors[0] if descriptors else None
    return None


def _end(listening: socket.socket) -> None:
    """Refuse connections, and wake who waits for them. Not only ``close``: a child process may have a copy."""
    with contextlib.suppress(OSError):
        listening.shutdown(socket.SHUT_RDWR)


def _is_own(connection: socket.socket) -> bool:
    """Whether the other end is a process of the same user."""
    peer = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return bool(struct.unpack("3i", peer)[1] == os.geteuid())
