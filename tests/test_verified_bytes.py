"""Of each kind of input, what is called verified was read: a change of any byte is found, and what is left is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import nn

from shardsmith.cli import main
from shardsmith.hooks import EMA, FolderSave, HFExport, Hooks, ShardedSave, every
from shardsmith.inspection import inspect_checkpoint
from shardsmith.overview import inspect_run

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # dcp.save of one process


def tiny() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))


def checkpoint(place: Path) -> Path:
    model = tiny()
    ema = EMA(model, decay=0.5)
    save = ShardedSave(place, model=model, optimizer=torch.optim.SGD(model.parameters(), 0.1), ema=ema, when=every(1))
    save.save(3)
    save.close()
    return place / "step-3"


def checkpoint_of_hugging_face_files(place: Path) -> Path:
    save = ShardedSave(place, model=tiny(), when=every(1), weights="huggingface")
    save.save(3)
    save.close()
    return place / "step-3"


def export(place: Path) -> Path:
    model = tiny()
    ema = EMA(model, decay=0.5)
    with Hooks(ema, HFExport(place, model=model, ema=ema, when=every(1), dtype="original")) as hooks:
        hooks.step(1)
    return place / "step-1"


def trainers_folder(place: Path) -> Path:
    model, folder = tiny(), place / "checkpoint-5"
    (folder / "logs").mkdir(parents=True)
    save_file(dict(model.state_dict()), folder / "model.safetensors")
    for name in ("optimizer.bin", "logs/events"):
        (folder / name).write_bytes(name.encode() * 100)
    ema = EMA(model, decay=0.5)
    save = FolderSave(model, ema=ema)
    save.save(5, folder)
    Hooks(ema, save).close()
    return folder


def plain_dcp(place: Path) -> Path:
    dcp.save(dict(tiny().state_dict()), checkpoint_id=place / "dcp", no_dist=True)
    return place / "dcp"


def single_file(place: Path) -> Path:
    save_file({"a": torch.arange(6.0)}, place / "model.safetensors")
    return place / "model.safetensors"


def base_model(place: Path) -> Path:
    (place / "config.json").write_text("{}")
    return single_file(place).parent


def torch_checkpointing(place: Path) -> Path:
    torch.save(dict(tiny().state_dict()), place / "model_0.pt")
    torch.save({}, place / "optimizer_0.pt")
    return place


RECORDED: dict[str, Callable[[Path], Path]] = {
    "checkpoint": checkpoint,
    "export": export,
    "checkpoint of Hugging Face files": checkpoint_of_hugging_face_files,
    "trainer's folder": trainers_folder,
}
UNRECORDED: dict[str, Callable[[Path], Path]] = {
    "plain dcp": plain_dcp,
    "single file": single_file,
    "base model": base_model,
    "torch_checkpointing": torch_checkpointing,
}


def files_in(path: Path) -> dict[str, int]:
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return {str(file.relative_to(path)) if path.is_dir() else path.name: file.stat().st_size for file in files}


def bytes_read() -> int:
    """As the system counts what this process has read."""
    return int(Path("/proc/self/io").read_text().split("rchar: ")[1].split()[0])


@pytest.mark.parametrize("kind", RECORDED)
def test_all_that_is_verified_was_read(kind: str, tmp_path: Path) -> None:
    path = RECORDED[kind](tmp_path)
    before = bytes_read()
    found = inspect_checkpoint(path, verify=True)
    assert bytes_read() - before >= sum(found.compared.values())
    assert found.compared == found.files == files_in(path)
    assert (found.verified, found.uncompared, found.damage) == (True, [], ())
    for name, size in found.compared.items():
        file = path / name
        content = file.read_bytes()
        for at in {0, size // 2, size - 1}:
            changed = bytearray(content)
            changed[at] ^= 4
            file.write_bytes(changed)
            broken = inspect_checkpoint(path, verify=True)
            assert broken.damage, (name, at)
            assert not broken.verified, (name, at)
        file.write_bytes(content)
    assert inspect_checkpoint(path, verify=True).verified


@pytest.mark.parametrize("kind", [*RECORDED, *UNRECORDED])
def test_nothing_is_verified_that_was_not_asked_for(kind: str, tmp_path: Path) -> None:
    found = inspect_checkpoint((RECORDED | UNRECORDED)[kind](tmp_path))
    assert (found.verified, any(found.compared.values())) == (False, False)
    assert found.is_recorded == (kind in RECORDED)


@pytest.mark.parametrize("kind", UNRECORDED)
def test_what_records_no_hash_is_not_verified(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = UNRECORDED[kind](tmp_path)
    found = inspect_checkpoint(path, verify=True)
    assert (found.verified, any(found.compared.values())) == (False, False)
    assert {*found.uncompared} == {*found.files}
    assert main(["inspect", str(path)]) == 0
    for command in (["verify", str(path)], ["inspect", str(path), "--verify"]):
        capsys.readouterr()
        assert main(command) == 2
        told = " ".join(capsys.readouterr().err.split())
        assert "was not verified, as it records no hashes of its files" in told


LOST: dict[str, tuple[Callable[[Path], Path], str]] = {
    "checkpoint": (checkpoint, "metadata.json"),
    "checkpoint of Hugging Face files": (checkpoint_of_hugging_face_files, "metadata.json"),
    "trainer's folder": (trainers_folder, "shardsmith/metadata.json"),
}


@pytest.mark.parametrize("kind", LOST)
def test_a_manifest_that_is_gone_is_damage(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make, manifest = LOST[kind]
    path = make(tmp_path / "run")
    (path / manifest).unlink()
    for place in (path, tmp_path / "run"):
        for command in (["verify", str(path)], ["inspect", str(place)], ["inspect", str(place), "--verify"]):
            assert main(command) == 1
            assert f"{manifest}: is missing" in " ".join(capsys.readouterr().out.split())


def test_an_export_without_its_record_is_not_verified(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = export(tmp_path)
    (path / "shardsmith.json").unlink()
    assert main(["inspect", str(path), "--verify"]) == main(["verify", str(path)]) == 2
    assert "shardsmith.json of an export" in " ".join(capsys.readouterr().err.split())


def test_a_file_that_nobody_recorded_is_named_and_never_verified(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = trainers_folder(tmp_path)
    (folder / "logs/later").write_text("added after the save")
    found = inspect_checkpoint(folder, verify=True)
    assert (found.verified, found.uncompared, found.damage) == (False, ["logs/later"], ())
    for command in (["verify", str(folder)], ["inspect", str(folder), "--verify"]):
        assert main(command) == 2
        told = capsys.readouterr()
        assert "any byte" not in told.out
        assert "as no hash of them is recorded: logs/later (1 of" in told.err
    assert main(["inspect", str(tmp_path), "--verify"]) == 2
    assert "checkpoint-5: verified in part" in capsys.readouterr().err
    (step,) = inspect_run(tmp_path, verify=True).steps
    assert (step.health, inspect_run(tmp_path, verify=True).verified) == ("verified in part", False)


def test_a_manifest_without_a_hash_of_itself_is_not_verified(tmp_path: Path) -> None:
    """As those of older versions are."""
    path = checkpoint(tmp_path)
    content = json.loads((path / "metadata.json").read_text())
    del content["self_xxh3_128"]
    (path / "metadata.json").write_text(json.dumps(content))
    found = inspect_checkpoint(path, verify=True)
    assert (found.verified, found.uncompared, found.damage) == (False, ["metadata.json"], ())
