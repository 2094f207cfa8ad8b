"""Many ranks as threads of one process, with a real store, whose operations are counted by rank."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch.distributed as dist

_here = threading.local()


class Counted:
    """A connection to a TCPStore. Counts what goes through it under the name of each operation, by key where asked."""

    def __init__(self, store: Any, counts: Counter[str]) -> None:
        self._store, self.counts = store, counts

    def __getattr__(self, name: str) -> Any:
        operation = getattr(self._store, name)

        def counted(*args: Any) -> Any:
            keys = args[0] if isinstance(args[0], list) else [args[0]]
            self.counts[name] += 1
            self.counts[f"{name}, most keys"] = max(self.counts[f"{name}, most keys"], len(keys))
            return operation(*args)

        return counted


def run_ranks_in_threads(
    body: Callable[[int], None], size: int, module: Any, monkeypatch: pytest.MonkeyPatch
) -> list[Counter[str]]:
    """Call ``body(rank)`` on each rank; what each did with the store.

    ``module`` has imported ``rank_and_size``, ``own_name`` and both kinds of connection.
    """
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    counts = [Counter[str]() for _ in range(size)]

    def connection() -> Counted:
        return Counted(dist.TCPStore("127.0.0.1", server.port, wait_for_workers=False), counts[_here.rank])

    def run(rank: int) -> None:
        _here.rank = rank
        body(rank)

    monkeypatch.setattr(module, "rank_and_size", lambda: (_here.rank, size))
    monkeypatch.setattr(module, "own_name", lambda: "shardsmith/counted")
    monkeypatch.setattr(module, "own_connection", connection)
    monkeypatch.setattr(module, "shared_connection", connection)
    monkeypatch.setattr(module, "answer_from_now_on", lambda: None)
    with ThreadPoolExecutor(size) as pool:
        for future in [pool.submit(run, rank) for rank in range(size)]:
            future.result()
    return counts
