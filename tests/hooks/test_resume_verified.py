"""A resume reads each file once: a flipped bit anywhere is found, and the run goes on from the step before."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import xxhash
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

from shardsmith.errors import CorruptCheckpointError, IncompleteCheckpointError
from shardsmith.formats.dcp import file_stream, single_read
from shardsmith.manifest.checkpoints import committed_steps
from shardsmith.manifest.metadata import read_metadata
from shardsmith.manifest.seal import SEAL
from tests.hooks.test_save import digests
from tests.hooks.training import run_training
from tests.ranks import run_on_ranks
from tests.unreadable import UNREADABLE


def flip(path: Path, at: float) -> None:
    data = bytearray(path.read_bytes())
    data[min(int(len(data) * at), len(data) - 1)] ^= 16
    path.write_bytes(data)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of one process with steps 5 and 10."""
    directory = tmp_path_factory.mktemp("straight")
    run_training(directory, 10, sharding="none")
    return directory


@pytest.mark.parametrize("name", ["__0_0.distcp", ".boxes", ".metadata", "metadata.json"])
@pytest.mark.parametrize("at", [0.0, 0.31, 0.77, 1.0])
def test_a_flipped_bit_is_found_and_the_run_goes_on_from_the_step_before(
    straight: Path, tmp_path: Path, name: str, at: float
) -> None:
    run = tmp_path / "run"
    shutil.copytree(straight, run)
    flip(run / "step-10" / name, at)
    if name == "metadata.json" and read_metadata_or_none(run / "step-10") == read_metadata(straight / "step-10"):
        return  # the bit stands in white space
    run_training(run, 10, sharding="none")
    assert len([*run.glob(".step-10.damaged-*")]) == 1
    assert digests(run / "step-10") == digests(straight / "step-10")


@pytest.mark.parametrize("kind", UNREADABLE)
def test_what_is_no_directory_is_passed_over_and_makes_way_for_its_step(
    straight: Path, tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    put, reason = UNREADABLE[kind]
    run = tmp_path / "run"
    shutil.copytree(straight, run)
    shutil.rmtree(run / "step-10")
    put(run / "step-10")
    run_training(run, 10, sharding="none")
    assert committed_steps(run) == [5, 10]
    assert digests(run / "step-10") == digests(straight / "step-10")
    (aside,) = run.glob(".step-10.damaged-*")
    lines = [record.getMessage() for record in caplog.records if "step-10" in record.getMessage()]
    assert f"{aside} was set aside: its step is after the one resumed, and it {reason}" in lines
    shutil.rmtree(run)
    run.mkdir()
    put(run / "step-10")
    with pytest.raises(IncompleteCheckpointError, match=f"no checkpoint that can be read\n  step-10 {reason}"):
        run_training(run, 10, sharding="none")


def read_metadata_or_none(path: Path) -> object:
    try:
        return read_metadata(path)
    except Exception:
        return None


def test_every_rank_finds_it_in_every_file_and_with_another_number_of_ranks(tmp_path: Path) -> None:
    run_on_ranks(train, 2, tmp_path, tmp_path / "straight", 10)
    for ranks, name in ((2, "__0_0.distcp"), (2, "__1_0.distcp"), (3, "__1_0.distcp")):
        run = tmp_path / f"{ranks}{name}"
        shutil.copytree(tmp_path / "straight", run)
        flip(run / "step-10" / name, 0.4)
        run_on_ranks(train, ranks, tmp_path, run, 10)
        assert len([*run.glob(".step-10.damaged-*")]) == 1
        assert committed_steps(run) == [5, 10]
        if ranks == 2:
            assert digests(run / "step-10") == digests(tmp_path / "straight" / "step-10")


def train(directory: Path, steps: int) -> None:
    run_training(directory, steps)


def test_shards_are_read_once_and_by_one_rank_where_each_reads_its_own(tmp_path: Path) -> None:
    run_on_ranks(run_counted, 2, tmp_path, tmp_path / "run")


def run_counted(directory: Path) -> None:
    run_training(directory, 5)
    read: list[tuple[str, bool]] = []
    begin = file_stream.FileStream.__init__

    def counted(self: file_stream.FileStream, path: Path, *, hashed: bool, **options: Any) -> None:
        read.append((path.name, hashed))
        begin(self, path, hashed=hashed, **options)

    file_stream.FileStream.__init__ = counted  # type: ignore[method-assign]
    assert run_training(directory, 5) == 5
    own = f"__{dist.get_rank()}_0.distcp"
    assert [name for name, hashed in read if hashed] == [own]
    assert [name for name, _ in read].count(own) == 1


def test_every_file_is_dealt_to_one_rank_that_reads_as_much_of_it_as_any() -> None:
    sizes = {"a": 10, "b": 10, "c": 4, "d": 4, "e": 1}
    wanted = [{"a": 10}, {"b": 10, "c": 2}, {"c": 2, "d": 4}]
    dealt = single_read.deal_files(wanted, sizes)
    assert sorted(name for names in dealt for name in names) == sorted(sizes)
    assert [name in dealt[rank] for rank, name in enumerate("abd")] == [True] * 3
    replicas = single_read.deal_files([{"x": 7, "y": 7}] * 2, {"x": 7, "y": 7})
    assert sorted(map(len, replicas)) == [1, 1]


def test_a_checkpoint_that_torch_wrote_is_verified_and_loaded_all_the_same(straight: Path, tmp_path: Path) -> None:
    """As older versions of ours, whose shards torch wrote, left them."""
    run = tmp_path / "run"
    shutil.copytree(straight, run)
    step = run / "step-10"
    state: dict[str, object] = {}
    reader = dcp.FileSystemReader(step)
    _load_state_dict(state, storage_reader=reader, planner=_EmptyStateDictLoadPlanner(), no_dist=True)
    record = json.loads((step / "metadata.json").read_text())
    for file in (*step.glob("*.distcp"), step / ".boxes", step / ".metadata"):
        file.unlink()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.save(state, checkpoint_id=step)
    del record["self_xxh3_128"]
    record["files"] = {
        file.name: {"size": file.stat().st_size, "xxh3_128": xxhash.xxh3_128_hexdigest(file.read_bytes())}
        for file in step.iterdir()
        if file.name != "metadata.json"
    }
    (step / "metadata.json").write_text(json.dumps(record))
    run_training(run, 15, sharding="none")
    assert not [*run.glob(".step-10.damaged-*")]
    longer = tmp_path / "longer"
    shutil.copytree(straight, longer)
    run_training(longer, 15, sharding="none")
    assert digests(run / "step-15") == digests(longer / "step-15")
    flip(next(step.glob("*.distcp")), 0.5)
    shutil.rmtree(run / "step-15")
    run_training(run, 10, sharding="none")
    assert len([*run.glob(".step-10.damaged-*")]) == 1


def test_what_the_manifest_says_of_tensors_is_compared_with_what_was_loaded(straight: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(straight, run)
    path = run / "step-10" / "metadata.json"
    content = json.loads(path.read_text())
    content["tensors"]["norm.weight"]["digest"] = content["tensors"]["norm.bias"]["digest"]
    unsealed = {name: value for name, value in content.items() if name != SEAL}  # as by whoever edits the file
    path.write_text(json.dumps(unsealed))
    with pytest.raises(CorruptCheckpointError, match=r"norm\.weight"):
        run_training(run, 10, sharding="none")
    assert json.loads(path.read_text()) == unsealed


def test_the_manifest_has_a_hash_of_its_own(straight: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(straight, run)
    path = run / "step-10" / "metadata.json"
    text = path.read_text()
    assert text.count('"created_at": "20') == 1
    path.write_text(text.replace('"created_at": "20', '"created_at": "19'))  # a valid manifest in every other way
    run_training(run, 10, sharding="none")
    assert len([*run.glob(".step-10.damaged-*")]) == 1
    assert digests(run / "step-10") == digests(straight / "step-10")
