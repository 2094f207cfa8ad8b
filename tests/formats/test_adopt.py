from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from shardsmith.errors import IncompleteCheckpointError, RankFailedError, TargetExistsError, WriteError
from shardsmith.formats.adopt import adopt, disown
from shardsmith.formats.by_path import SHARDED, detect_checkpoint_format
from shardsmith.ground import commit
from shardsmith.ground.commit import place_file, remove, sweep
from shardsmith.ground.layout import METADATA_FILE
from shardsmith.ground.ranks import Ranks
from shardsmith.manifest.checkpoints import committed_steps, find_damage
from shardsmith.manifest.metadata import read_metadata
from shardsmith.tensors.digest import digest_tensor
from tests import dcp_directories
from tests.ranks import run_on_ranks

TENSORS = {
    "embed.weight": torch.arange(35, dtype=torch.float32).view(7, 5),
    "norm.steps": torch.tensor(2**40),
    "nothing": torch.empty(0, 3),
    "ema_model.embed.weight": torch.arange(35, dtype=torch.float64).view(7, 5),
}


def saved(directory: Path) -> Path:
    return dcp_directories.save({**TENSORS, "dataloader": {"position": 5}}, directory)


def test_a_directory_of_somebody_else_becomes_one_of_ours(tmp_path: Path) -> None:
    checkpoint = saved(tmp_path / "step-3")
    adopt(checkpoint, step=3, ema={"decay": 0.9}, tied={"lm_head.weight": "embed.weight"})
    metadata = read_metadata(checkpoint)
    assert {key: record.digest for key, record in metadata.tensors.items()} == {
        key: str(digest_tensor(tensor)) for key, tensor in TENSORS.items()
    }
    assert (metadata.step, metadata.models, metadata.ema, metadata.world_size) == (
        3,
        ("main", "ema"),
        {"decay": 0.9},
        1,
    )
    assert detect_checkpoint_format(checkpoint).name == SHARDED
    assert committed_steps(tmp_path) == [3]
    assert find_damage(checkpoint) == []


def test_a_directory_that_a_link_leads_to_is_recorded_and_disowned(tmp_path: Path) -> None:
    checkpoint = saved(tmp_path / "disk" / "step-3")
    (tmp_path / "step-3").symlink_to("disk/step-3")
    adopt(tmp_path / "step-3", step=3)
    assert read_metadata(checkpoint).step == 3
    assert find_damage(tmp_path / "step-3") == []
    assert disown(tmp_path / "step-3")
    assert not (checkpoint / "metadata.json").exists()


def test_what_a_kill_left_of_the_record_is_gone_with_the_next(tmp_path: Path) -> None:
    checkpoint = saved(tmp_path / "step-3")
    script = """
import os, signal, sys
from pathlib import Path
from shardsmith.formats.adopt import adopt

def kill(event, args):
    if event == "os.rename":
        os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(kill)
adopt(Path(sys.argv[1]), step=3)
"""
    before = {path.name for path in checkpoint.iterdir()}
    killed = subprocess.run([sys.executable, "-c", script, checkpoint], timeout=100, check=False)
    assert killed.returncode == -signal.SIGKILL
    (left,) = {path.name for path in checkpoint.iterdir()} - before
    assert left.startswith(".metadata.json.tmp-")
    adopt(checkpoint, step=3)
    assert {path.name for path in checkpoint.iterdir()} == {*before, "metadata.json"}


def test_what_changes_afterwards_is_found(tmp_path: Path) -> None:
    checkpoint = saved(tmp_path / "step-3")
    adopt(checkpoint, step=3)
    for name in read_metadata(checkpoint).files:
        content = (checkpoint / name).read_bytes()
        (checkpoint / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        assert [line.split(":")[0] for line in find_damage(checkpoint)] == [name]
        (checkpoint / name).write_bytes(content)


def run_adopt(directory: Path) -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    shards = {key: distribute_tensor(value, mesh, [Shard(0)]) for key, value in TENSORS.items() if value.dim()}
    dcp.save({**TENSORS, **shards}, checkpoint_id=directory)
    adopt(directory, step=3, ranks=Ranks())


def run_adopt_without_a_shard(directory: Path) -> None:
    with pytest.raises(RankFailedError, match=r"__2_0\.distcp"):  # on every rank
        adopt(directory, step=3, ranks=Ranks())


def test_ranks_divide_the_reading_and_find_the_same(tmp_path: Path) -> None:
    run_on_ranks(run_adopt, 3, tmp_path, tmp_path / "step-3")
    together = read_metadata(tmp_path / "step-3")
    disown(tmp_path / "step-3")
    adopt(tmp_path / "step-3", step=3)
    alone = read_metadata(tmp_path / "step-3")
    assert (together.files, together.tensors, together.world_size) == (alone.files, alone.tensors, 3)
    assert len(together.files) == 4

    disown(tmp_path / "step-3")
    (tmp_path / "step-3" / "__2_0.distcp").unlink()
    run_on_ranks(run_adopt_without_a_shard, 2, tmp_path, tmp_path / "step-3")
    assert not (tmp_path / "step-3" / METADATA_FILE).exists()


def test_a_recorded_directory_is_recorded_again_only_when_disowned(tmp_path: Path) -> None:
    checkpoint = saved(tmp_path / "step-3")
    adopt(checkpoint, step=3)
    with pytest.raises(TargetExistsError):
        adopt(checkpoint, step=4)
    assert disown(checkpoint)
    assert not disown(checkpoint)
    adopt(checkpoint, step=4)
    assert read_metadata(checkpoint).step == 4


def test_a_directory_that_is_not_whole_is_not_recorded(tmp_path: Path) -> None:
    checkpoint = saved(tmp_path / "step-3")
    os.truncate(checkpoint / "__0_0.distcp", 100)
    with pytest.raises(IncompleteCheckpointError, match=r"__0_0\.distcp"):
        adopt(checkpoint, step=3)
    assert not (checkpoint / METADATA_FILE).exists()


@pytest.mark.parametrize("failing", ["write_file", "sync"])
def test_a_file_that_cannot_be_placed_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    def fail(path: Path, *_: object) -> None:
        if failing == "write_file":
            path.write_bytes(b"half")
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(commit, failing, fail)
    with pytest.raises((WriteError, OSError), match="Input/output error"):
        place_file(tmp_path / "metadata.json", b"content")
    assert [path.name for path in tmp_path.iterdir()] == []


def test_a_directory_is_removed_without_its_name_being_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "step-3").mkdir()
    seen: list[str] = []
    monkeypatch.setattr(commit.shutil, "rmtree", lambda _: seen.extend(p.name for p in tmp_path.iterdir()))
    assert remove(tmp_path / "step-3", nameless=True)
    monkeypatch.undo()
    assert len(seen) == 1
    assert "step" not in seen[0]
    assert [path.name for path in sweep(tmp_path)] == seen
