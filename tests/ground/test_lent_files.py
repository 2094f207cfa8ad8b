"""A process lends open files to others of its host; who gets nothing is told so, whatever became of the lender."""

from __future__ import annotations

import errno
import fcntl
import multiprocessing
import os
import signal
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from shardsmith.ground import lent_files
from shardsmith.ground.lent_files import Lender, borrow
from tests.ground.stopped_process import stop_process

_PROCESSES = multiprocessing.get_context("forkserver")


def run_lender(path: Path, told: Any) -> None:
    with path.open("rb") as file:
        lender = Lender(lambda number: os.dup(file.fileno()) if number == 3 else None)
        told.put(lender.address)
        signal.pause()


@pytest.fixture
def other(tmp_path: Path) -> Iterator[tuple[BaseProcess, str]]:
    """A process that lends a file under the number 3, and its address."""
    (tmp_path / "file").write_bytes(b"contents")
    told = _PROCESSES.SimpleQueue()
    process = _PROCESSES.Process(target=run_lender, args=(tmp_path / "file", told))
    process.start()
    yield process, told.get()
    process.kill()
    process.join()


def test_a_borrowed_file_can_be_used_after_its_lender_was_killed(other: tuple[BaseProcess, str]) -> None:
    process, address = other
    descriptor = borrow(address, 3)
    assert descriptor is not None
    process.kill()
    process.join()
    assert os.pread(descriptor, 8, 0) == b"contents"
    assert fcntl.fcntl(descriptor, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
    os.close(descriptor)
    assert borrow(address, 3) is None


def test_what_the_lender_does_not_lend_is_none(other: tuple[BaseProcess, str]) -> None:
    _, address = other
    assert borrow(address, 4) is None
    assert borrow("shardsmith-nobody", 3) is None
    descriptor = borrow(address, 3)  # the questions before have not ended it
    assert descriptor is not None
    os.close(descriptor)


def test_a_lender_that_does_not_answer_is_given_up(
    other: tuple[BaseProcess, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    process, address = other
    assert process.pid is not None
    stop_process(process.pid)
    monkeypatch.setattr(lent_files, "_MOST_SECS", 0.05)
    assert borrow(address, 3) is None


def test_a_closed_lender_refuses_though_a_child_process_has_its_socket() -> None:
    lender = Lender(lambda _: os.open(os.devnull, os.O_RDONLY))
    # As a worker that is forked while the file is lent.
    child = os.dup(lender._socket.fileno())  # type: ignore[union-attr]
    lender.close()
    lender.close()
    assert borrow(lender.address, 0) is None
    os.close(child)


def test_a_file_that_cannot_be_opened_is_not_lent_and_others_are() -> None:
    def lend(_: int) -> int:
        raise OSError(errno.EMFILE, "too many")

    lender = Lender(lend)
    assert borrow(lender.address, 0) is None
    lender._lend = lambda _: os.open(os.devnull, os.O_RDONLY)
    descriptor = borrow(lender.address, 0)  # one that was not opened is no reason to end
    assert descriptor is not None
    os.close(descriptor)
    lender.close()
