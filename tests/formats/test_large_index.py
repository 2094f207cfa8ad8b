"""An index over the usual limit: read if the manifest beside it has its hash."""

from __future__ import annotations

from pathlib import Path

import pytest

from shardsmith.errors import UnsupportedFormatError
from shardsmith.formats.dcp import index
from shardsmith.ground.layout import DCP_INDEX_FILE, METADATA_FILE
from tests.hooks.training import run_training


@pytest.fixture
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A step of ours, whose index is over the limit."""
    run_training(tmp_path, 5, sharding="none")
    monkeypatch.setattr(index, "MAX_INDEX_BYTES", 1000)
    return tmp_path / "step-5"


def test_an_index_that_the_manifest_knows_may_be_larger(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (checkpoint / DCP_INDEX_FILE).stat().st_size > 1000
    found = index.read_index(checkpoint)
    monkeypatch.undo()
    assert found == index.read_index(checkpoint)


def test_one_without_a_manifest_may_not(checkpoint: Path) -> None:
    (checkpoint / METADATA_FILE).unlink()
    with pytest.raises(UnsupportedFormatError, match="an index may have up to 1000"):
        index.read_index(checkpoint)


def test_one_that_has_changed_since_may_not(checkpoint: Path) -> None:
    with (checkpoint / DCP_INDEX_FILE).open("ab") as file:
        file.write(b"more")
    with pytest.raises(UnsupportedFormatError, match="an index may have up to 1000"):
        index.read_index(checkpoint)


def test_one_over_the_highest_limit_may_not(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index, "MAX_KNOWN_INDEX_BYTES", 2000)
    with pytest.raises(UnsupportedFormatError, match="and up to 2000"):
        index.read_index(checkpoint)
