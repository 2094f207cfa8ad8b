"""What of the trainers' integrations takes a place in an object store does there what it does on a disk.

What cannot is refused by name before anything is written, on every rank.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from shardsmith.errors import UsageError
from shardsmith.ground import object_store
from shardsmith.ground.remote_path import as_path
from shardsmith.hooks import EMA, HFExport, Hooks, every, last, latest
from shardsmith.manifest.checkpoints import committed_steps, find_damage
from tests.hooks.test_export_remote import download
from tests.integrations.accelerate_runs import prepare
from tests.integrations.lightning_runs import BATCHES, run_fit
from tests.integrations.trainer_runs import Case, make_trainer, train
from tests.object_server import ObjectServer
from tests.ranks import run_on_ranks

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def _fresh_clients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(object_store, "_clients", {})


def files_in(folder: Path) -> dict[str, bytes]:
    """All but the record of the export, which holds times."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name != "shardsmith.json"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def run_lightning(server: ObjectServer, place: str, root: Path) -> None:
    """Three epochs on a disk at once; and in a store in two runs, the second with a cache on a disk."""
    server.use()
    for name in ("disk", "store"):
        (root / name).mkdir(exist_ok=True)
    run_fit("fsdp2", root / "disk", 3, "end.pt")
    run_fit("fsdp2", root / "store", 2, "first.pt", directory=place)
    cached = {"local_cache": root / "cache", "keep_local": latest(1)}
    run_fit("fsdp2", root / "store", 3, "end.pt", directory=place, save_options=cached)


def test_lightning_saves_exports_and_resumes_there(object_server: ObjectServer, tmp_path: Path) -> None:
    place = object_server.url("lightning")
    run_on_ranks(run_lightning, 2, tmp_path, object_server, place, tmp_path)
    expected, found = (torch.load(tmp_path / name / "end.pt") for name in ("disk", "store"))
    assert len(found["history"]) == BATCHES
    for model in ("main", "ema"):
        assert all(torch.equal(found[model][name], value) for name, value in expected[model].items()), model
    object_server.use()
    steps = committed_steps(as_path(f"{place}/checkpoints"))
    assert steps[-1] == 3 * BATCHES
    assert not find_damage(as_path(f"{place}/checkpoints/step-{steps[-1]}"))
    assert committed_steps(tmp_path / "cache") == [3 * BATCHES]
    exported = download(object_server, f"lightning/hf/step-{3 * BATCHES}", tmp_path / "found")
    assert files_in(exported) == files_in(tmp_path / "disk" / "hf" / f"step-{3 * BATCHES}")


def run_trainer(server: ObjectServer, place: str, root: Path) -> None:
    server.use()
    case = Case(arguments={"max_steps": 3})
    for name, hooks in (("disk", {}), ("store", {"export_dir": place})):
        (root / name).mkdir(exist_ok=True)
        train(replace(case, hooks=hooks), root / name, {})


def test_trainer_exports_there(object_server: ObjectServer, tmp_path: Path) -> None:
    run_on_ranks(run_trainer, 2, tmp_path, object_server, object_server.url("trainer"), tmp_path, timeout_secs=120)
    exported = download(object_server, "trainer/step-3", tmp_path / "found")
    assert files_in(exported) == files_in(tmp_path / "disk" / "out-hf" / "step-3")
    assert not (tmp_path / "store" / "out-hf").exists()


def run_trainer_in_a_store(folder: Path) -> None:
    with pytest.raises(UsageError, match="Trainer writes to file systems alone"):
        make_trainer(Case(arguments={"output_dir": "s3://bucket/run"}), folder)
    (folder / f"refused-{dist.get_rank()}").touch()


def test_trainers_own_folder_there_is_refused_when_trainer_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run_on_ranks(run_trainer_in_a_store, 2, tmp_path, tmp_path)
    assert len([*tmp_path.glob("refused-*")]) == 2


def run_accelerate(server: ObjectServer, place: str, folder: Path) -> None:
    from shardsmith.integrations.accelerate import attach

    server.use()
    accelerator, model, optimizer, loader = prepare("fsdp2")
    ema = EMA(model, decay=0.5)
    places = (place, folder / "hf")
    hooks = Hooks(ema, *(HFExport(one, model=model, ema=ema, when=every(1) | last()) for one in places))
    attached = attach(accelerator, hooks)
    hooks.resume()
    for call in (accelerator.save_state, accelerator.load_state):
        with pytest.raises(UsageError, match=r"'s3://bucket/state' is not on a file system"):
            call("s3://bucket/state")
    with accelerator.accumulate(model):
        accelerator.backward(model(**next(iter(loader))).loss)
        optimizer.step()
    hooks.step(1)
    accelerator.save_state(str(folder / "state-1"))
    hooks.close()
    attached.remove()
    accelerator.project_configuration.set_directories("s3://bucket/project")
    with pytest.raises(UsageError, match=r"project_dir: 's3://bucket/project' is not on a file system"):
        attach(accelerator, Hooks())


def test_accelerates_exports_go_there_and_its_own_folders_are_refused(
    object_server: ObjectServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run_on_ranks(run_accelerate, 2, tmp_path, object_server, object_server.url("accelerate"), tmp_path)
    exported = download(object_server, "accelerate/step-1", tmp_path / "found")
    assert files_in(exported) == files_in(tmp_path / "hf" / "step-1")
    assert (tmp_path / "state-1" / "shardsmith").is_dir()
    assert not (tmp_path / "s3:").exists()


def test_what_is_refused_is_named() -> None:
    from shardsmith.integrations.transformers import CheckpointHooks

    options: dict[str, Any] = {"resume_from": "s3://bucket/out/checkpoint-2"}
    with pytest.raises(UsageError, match="resume_from='s3://bucket/out/checkpoint-2': s3:// is not supported"):
        CheckpointHooks(**options)
