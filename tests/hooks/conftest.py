from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests import forked
from tests.hooks.killed_runs import Server, serve


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    context = forked.server()
    ours, theirs = context.Pipe()
    process = context.Process(target=serve, args=(theirs,))
    process.start()
    yield Server(ours)
    ours.send(None)
    process.join()
