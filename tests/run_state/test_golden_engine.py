"""Files of older versions are loaded and verified; what we write today is what was written then, and torch reads it."""

from __future__ import annotations

import contextlib
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from shardsmith.formats.dcp.load import LocalLoad
from shardsmith.formats.dcp.source import DcpSource
from shardsmith.manifest.checkpoints import find_damage
from shardsmith.manifest.metadata import FileRecord, read_metadata
from tests.golden_checkpoint import BOXES, ENGINE, SHARDED, SPECS, golden_tensors, run_write
from tests.ranks import run_on_ranks
from tests.tensor_cases import raw_bytes


def empty_state() -> dict[str, Any]:
    return {key: torch.zeros(shape, dtype=dtype) for key, (shape, dtype) in SPECS.items()}


def files_of(directory: Path) -> dict[str, FileRecord]:
    return {name: record for name, record in read_metadata(directory).files.items() if name.endswith(".distcp")}


def load(state: dict[str, Any], directory: Path) -> list[str]:
    with contextlib.closing(LocalLoad(state, directory)) as one:
        one.compare()
        damage = one.fill_tensors(files_of(directory))
        if not damage:
            one.fill_objects()
        return damage


@pytest.mark.parametrize("directory", [SHARDED, ENGINE, BOXES], ids=["by torch", "by the engine", "with .boxes"])
def test_golden_files_are_loaded_and_verified_in_one_read(directory: Path) -> None:
    assert find_damage(directory) == []
    state = empty_state() | {"optimizer.lr": 0.0}
    assert load(state, directory) == []
    assert state.pop("optimizer.lr") == 0.5
    assert {key: raw_bytes(tensor) for key, tensor in state.items()} == {
        key: raw_bytes(tensor) for key, tensor in golden_tensors().items()
    }


@pytest.mark.parametrize("directory", [SHARDED, ENGINE, BOXES], ids=["by torch", "by the engine", "with .boxes"])
def test_every_flipped_byte_of_a_golden_shard_is_found_or_refused(directory: Path, tmp_path: Path) -> None:
    copy = tmp_path / "step-3"
    shutil.copytree(directory, copy)
    shard = copy / "__1_0.distcp"
    good = shard.read_bytes()
    for at in range(0, len(good), 97):
        shard.write_bytes(good[:at] + bytes([good[at] ^ 32]) + good[at + 1 :])
        assert [line.split(":")[0] for line in load(empty_state(), copy)] == ["__1_0.distcp"]


def test_torch_reads_what_the_engine_wrote() -> None:
    state = empty_state()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.load(state, checkpoint_id=ENGINE)
    assert {key: raw_bytes(tensor) for key, tensor in state.items()} == {
        key: raw_bytes(tensor) for key, tensor in golden_tensors().items()
    }


def test_the_tensors_are_written_byte_for_byte_as_they_were(tmp_path: Path) -> None:
    run_on_ranks(run_write, 2, tmp_path, tmp_path)
    one, other = (DcpSource(directory).index.tensors for directory in (BOXES, tmp_path / "step-3"))
    assert one == other
    for entry in one.values():
        for chunk in entry.chunks:
            archives = [
                (directory / chunk.file).read_bytes()[chunk.offset : chunk.offset + chunk.length]
                for directory in (BOXES, tmp_path / "step-3")
            ]
            assert archives[0] == archives[1]
