"""Logs that are read line by line, whatever else is in them."""

from __future__ import annotations

from pathlib import Path

import pytest

from shardsmith.ground import object_store
from shardsmith.ground.bounded import lines_of
from shardsmith.ground.remote_path import as_path
from tests.object_server import ObjectServer

LONG = "x" * 65_536
OWN = ['{"a": 1}\n', '{"b": "\u2028"}\n', "x" * 65_535 + "\n", '{"cut']
CONTENT = "".join([OWN[0], f"{LONG}{{}}\n", OWN[1], f"{LONG}\n", OWN[2], f"{LONG * 3}\n", OWN[3]]).encode()


def test_a_line_that_is_too_long_is_passed_over_and_not_taken_for_several(tmp_path: Path) -> None:
    (tmp_path / "log").write_bytes(CONTENT)
    assert [*lines_of(tmp_path / "log")] == OWN
    (tmp_path / "log").write_text(OWN[0] + LONG)
    assert [*lines_of(tmp_path / "log")] == OWN[:1]
    assert [*lines_of(tmp_path / "none")] == []


def test_a_log_in_a_store_has_the_same_lines(object_server: ObjectServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(object_store, "_clients", {})
    object_server.use()
    log = as_path(object_server.url("logs/events.jsonl"))
    assert [*lines_of(log)] == []
    log.store.put_new(log.key, CONTENT)
    assert [*lines_of(log)] == OWN
