"""How the command line prints: consoles, sizes, progress bars."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    FileSizeColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from shardsmith.ground.progress import listening

_WIDTH_OF_FILES = 1000
"""Columns of a table that goes to a file or a pipe, at most."""


@contextlib.contextmanager
def bytes_bar(name: str, total: int, *, quiet: bool) -> Iterator[Callable[[int], None] | None]:
    """A bar over the bytes of weights; what it yields may be called from any thread. None where nobody would see it."""
    console = new_console(sys.stderr)
    if quiet or not console.is_terminal:
        yield None
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(name, total=total)
        yield lambda nbytes: bar.advance(task, nbytes)


@contextlib.contextmanager
def reading_bar(name: str, *, quiet: bool) -> Iterator[None]:
    """Show how many bytes were read, how fast and for how long; nothing where nobody would see it."""
    console = new_console(sys.stderr)
    if quiet or not console.is_terminal:
        yield
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        FileSizeColumn(),
        TransferSpeedColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(name, total=None)
        with listening(lambda nbytes: bar.advance(task, nbytes)):
            yield


def new_console(file: TextIO | None = None) -> Console:
    """Make a console that prints texts as they are: names and paths may hold what rich would take for markup.

    Where the output is no terminal, tables have the width that they need.
    """
    console = Console(file=file, soft_wrap=True, markup=False, emoji=False, highlight=False)
    # rich takes 80 columns for a file, and would break paths in two.
    if not console.is_terminal:
        console.width = _WIDTH_OF_FILES
    return console
