"""Stores that only fsspec knows: the same runs, and what cannot be guaranteed there is said once."""

from __future__ import annotations

import json
import logging
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem
from torch import nn
from torch.multiprocessing import ProcessExitedException
from transformers import AutoModelForCausalLM

from shardsmith import StorageError, TargetExistsError, UsageError, use_client
from shardsmith.cli import main
from shardsmith.ground import file_system_store, object_store
from shardsmith.ground.commit import remove, sweep
from shardsmith.ground.file_system_store import FileSystemStore
from shardsmith.ground.new_file import new_file
from shardsmith.ground.remote_commit import RemoteAttempt, check_writable, committed_steps
from shardsmith.ground.remote_path import RemotePath, as_path
from shardsmith.hooks import HFExport, Hooks, ShardedSave, at, every, latest
from tests.ground.test_remote_commit import write
from tests.hooks.live_models import STEP, Case, build, change, shard
from tests.hooks.test_save import digests
from tests.hooks.training import run_training
from tests.ranks import run_on_ranks

ODD = "a run/100 %25/größe"
"""Names that a URL would have to quote; here they stand for themselves."""


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(object_store, "_clients", {})
    monkeypatch.setattr(file_system_store, "_warned", set())


def use_disk(folder: Path) -> str:
    """Let ``disk://run`` be a folder that all ranks reach, through fsspec alone."""
    use_client("disk://run", DirFileSystem(path=str(folder), fs=LocalFileSystem()))
    return "disk://run"


@pytest.fixture(params=["memory", "disk"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> RemotePath:
    if request.param == "memory":
        fsspec.filesystem("memory").store.clear()
    bucket = "memory://bucket" if request.param == "memory" else use_disk(tmp_path)
    path = as_path(f"{bucket}/{ODD}")
    assert isinstance(path, RemotePath)
    return path


def test_the_rule_of_commit_holds_and_its_limit_is_told_once(
    place: RemotePath, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        check_writable(place)
        first, second = (RemoteAttempt(place / "step-5") for _ in range(2))
        sizes = [write(attempt) for attempt in (first, second)]
        assert committed_steps(place, "metadata.json") == []
        first.commit(sizes[0])
        with pytest.raises(TargetExistsError):
            second.commit(sizes[1])
    told = [one.getMessage() for one in caplog.records]
    assert len(told) == 1
    assert "cannot make an object only if there is none" in told[0]
    assert committed_steps(place, "metadata.json") == [5]
    assert (place / "step-5" / "a.bin").read_bytes() == b"shard"
    second._release()
    assert [one.name for one in sweep(place)] == [second.id]
    assert remove(place / "step-5")
    assert not (place / "step-5").exists()
    assert not place.store.objects("")


def test_files_in_parts_ranges_and_what_is_not_there(place: RemotePath) -> None:
    data = os.urandom(20 << 20)
    file = new_file(place / "x", len(data))
    file.write(memoryview(data))
    file.finish()
    file.close()
    store, key = place.store, (place / "x").key
    assert isinstance(store, FileSystemStore)
    assert store.get(key) == data
    assert store.range(key, 5, 9_000_000) == data[5:9_000_000]
    assert store.head(key).size == len(data)
    assert abs(store.head(key).modified.timestamp() - (place / "x").stat().st_mtime) < 1
    given_up = new_file(place / "y")
    given_up.write(memoryview(data))
    given_up.close()
    assert store.children(place.key) == ["x"]
    assert place.is_dir()
    assert not place.is_file()
    for act in (lambda: store.get(f"{key}-"), lambda: store.head(place.key), lambda: store.range(f"{key}-", 0, 1)):
        with pytest.raises(FileNotFoundError):
            act()
    with pytest.raises(StorageError, match="gave"):
        store.range(key, len(data) - 1, len(data) + 1)
    store.delete([key, f"{key}-"])
    assert not place.is_dir()


def train(folder: Path, steps: int, options: dict[str, Any]) -> None:
    place = f"{use_disk(folder)}/{ODD}"
    run_training(place, steps, keep=latest(2), **options)  # type: ignore[arg-type]


def train_on_disk(folder: Path, steps: int) -> None:
    run_training(folder, steps)


def test_a_killed_run_ends_as_one_on_a_disk(tmp_path: Path) -> None:
    with pytest.raises(ProcessExitedException) as died:
        run_on_ranks(train, 2, tmp_path, tmp_path / "store", 20, {"kill_after": 13})
    assert died.value.exit_code == -signal.SIGKILL
    run_on_ranks(train, 2, tmp_path, tmp_path / "store", 20, {})
    run_on_ranks(train_on_disk, 2, tmp_path, tmp_path / "plain", 20)
    run = as_path(f"{use_disk(tmp_path / 'store')}/{ODD}")
    assert committed_steps(run, "metadata.json") == [15, 20]  # type: ignore[arg-type]
    assert digests(run / "step-20") == digests(tmp_path / "plain" / "step-20")
    assert {path.name for path in run.iterdir()} == {".retention.json", "step-15", "step-20"}


CASE = Case(kind="llama", sharding="fsdp2", ranks=2, dtype="float32", max_shard_size="30KB")


def export_both(root: Path) -> None:
    model = shard(build(CASE), CASE.sharding)
    options: dict[str, Any] = {"dtype": CASE.dtype, "max_shard_size": CASE.max_shard_size}
    places = (f"{use_disk(root / 'store')}/hf", root / "plain")
    hooks = Hooks(*(HFExport(place, model=model, when=at(STEP), **options) for place in places))
    change(model, hooks)
    hooks.close()


def test_an_export_is_that_of_a_disk(tmp_path: Path) -> None:
    run_on_ranks(export_both, 2, tmp_path, tmp_path)
    found, expected = (tmp_path / "store" / "run" / "hf" / f"step-{STEP}", tmp_path / "plain" / f"step-{STEP}")
    assert {path.name for path in found.iterdir()} == {path.name for path in expected.iterdir()}
    for path in expected.glob("*.safetensors"):
        assert (found / path.name).read_bytes() == path.read_bytes()
    loaded = AutoModelForCausalLM.from_pretrained(found).state_dict()
    for name, tensor in AutoModelForCausalLM.from_pretrained(expected).state_dict().items():
        assert torch.equal(loaded[name], tensor)


def test_a_step_whose_manifest_is_torn_is_passed_over(tmp_path: Path) -> None:
    run = f"{use_disk(tmp_path)}/run"

    def hooks() -> Hooks:
        model = nn.Linear(4, 4)
        return Hooks(ShardedSave(run, model=model, optimizer=torch.optim.AdamW(model.parameters()), when=every(1)))

    first = hooks()
    first.resume()
    for step in (1, 2):
        first.step(step)
    first.close()
    manifest = tmp_path / "run" / "run" / "step-2" / "metadata.json"
    manifest.write_bytes(manifest.read_bytes()[:100])  # as by a kill in a write that does not appear all at once
    second = hooks()
    assert second.resume() == 1
    second.close()


def test_commands_read_and_write_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_training_once(tmp_path)
    run = f"{use_disk(tmp_path / 'store')}/run"
    assert main(["verify", f"{run}/step-1"]) == 0
    assert main(["inspect", run, "--json"]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["steps"]
    assert main(["clean", run]) == 0


def run_training_once(tmp_path: Path) -> None:
    model = nn.Linear(4, 4)
    url = f"{use_disk(tmp_path / 'store')}/run"
    hooks = Hooks(ShardedSave(url, model=model, when=every(1)))
    hooks.step(1)
    hooks.close()


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("s3a://bucket/run", "s3a:// is written s3:// here"),
        ("gcs://bucket/run", "gcs:// is written gs:// here"),
        ("file://bucket/run", "write the path alone"),
        ("https://host/run", "https:// is not supported"),
        ("nowhere://bucket/run", "nowhere:// is not supported"),
        ("sftp://host/run", r"sftp:// needs paramiko, which is not installed; run: pip install paramiko"),
        ("sftp://me:secret@host/run", "without credentials"),
    ],
)
def test_a_protocol_that_cannot_be_used_is_refused_with_what_to_do(url: str, told: str) -> None:
    with pytest.raises(UsageError, match=told) as refused:
        ShardedSave(url, model=nn.Linear(2, 2), when=every(1))
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize("act", ["open", "pipe_file", "info", "find", "cat_file"])
def test_what_an_implementation_raises_is_an_error_of_the_store(
    act: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class PeculiarError(Exception):
        pass

    def fail(*args: object, **kwargs: object) -> None:  # noqa: ARG001
        raise PeculiarError("https://key:secret@host")

    place = as_path(f"{use_disk(tmp_path)}/run")
    assert isinstance(place, RemotePath)
    place.store.put(f"{place.key}/x", b"1")
    monkeypatch.setattr(DirFileSystem, act, fail)
    calls: dict[str, Callable[[], object]] = {
        "open": lambda: new_file(place / "y"),
        "pipe_file": lambda: place.store.put(f"{place.key}/y", b"2"),
        "info": (place / "x").is_file,
        "find": place.is_dir,
        "cat_file": (place / "x").read_bytes,
    }
    with pytest.raises(StorageError, match="PeculiarError") as failed:
        calls[act]()
    assert "secret" not in str(failed.value)
