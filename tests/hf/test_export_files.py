"""An exported directory by itself: every change of every file is found."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from shardsmith.cli import main
from shardsmith.commands.inspect import inspect
from shardsmith.hf.export_files import find_export_damage
from tests.trained_runs import Trained


@pytest.fixture(scope="module")
def export(trained: dict[tuple[str, int], Trained], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Main and average, with a tokenizer file. Read only."""
    run = trained["llama", 1]
    output = tmp_path_factory.mktemp("export") / "out"
    base = output.with_name("base")
    shutil.copytree(run.base, base)
    (base / "tokenizer_config.json").write_text("{}")
    places = ("--checkpoint-dir", run.checkpoint, "--base-model-path", base, "--output-dir", output)
    assert main(["to-hf", *map(str, places), "--quiet"]) == 0
    return output


def test_what_was_written_is_sound(export: Path) -> None:
    assert find_export_damage(export) == []
    assert inspect(export, verify=True) == 0
    assert main(["verify", str(export)]) == 0


def test_every_change_of_every_file_is_found(export: Path, tmp_path: Path) -> None:
    chance = random.Random(3)
    copy = tmp_path / export.name
    shutil.copytree(export, copy)
    for path in sorted(path for path in copy.rglob("*") if path.is_file()):
        data = path.read_bytes()
        for bit in [0, len(data) * 8 - 1, *(chance.randrange(len(data) * 8) for _ in range(30))]:
            flipped = bytearray(data)
            flipped[bit // 8] ^= 1 << bit % 8
            path.write_bytes(flipped)
            assert find_export_damage(copy), f"{path.name}: bit {bit}"
        for broken in (data[:-1], data[: len(data) // 2], b"", data + b"\0"):
            path.write_bytes(broken)
            assert find_export_damage(copy, contents=False), f"{path.name}: {len(broken)} bytes"
        path.write_bytes(data)
    assert find_export_damage(copy) == []


def test_a_file_that_is_gone_or_does_not_belong_there_is_named(export: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors", "tokenizer_config.json"):
        copy = tmp_path / name / export.name
        shutil.copytree(export, copy)
        (copy / name).unlink()
        assert any(line.startswith(name) for line in find_export_damage(copy, contents=False))
    (tmp_path / "more").mkdir()
    copy = tmp_path / "more" / export.name
    shutil.copytree(export, copy)
    (copy / "pytorch_model.bin").touch()
    assert find_export_damage(copy, contents=False) == ["'pytorch_model.bin': is not one of its files"]


def test_a_directory_of_somebody_else_has_no_damage_that_we_could_know(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert find_export_damage(tmp_path) == []


def test_one_argument_verifies_an_export_or_a_checkpoint_alone(
    export: Path, trained: dict[tuple[str, int], Trained], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for source in (export, trained["llama", 1].checkpoint):
        assert main(["verify", str(source)]) == 0
        copy = tmp_path / source.name
        shutil.copytree(source, copy)
        data = bytearray((path := max(copy.iterdir(), key=lambda path: path.stat().st_size)).read_bytes())
        data[len(data) // 2] ^= 4
        path.write_bytes(data)
        assert main(["verify", str(copy)]) == 1
        assert path.name in capsys.readouterr().out


def test_what_recorded_no_hashes_is_not_called_sound(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file({"w": torch.ones(3)}, tmp_path / "model.safetensors")
    assert main(["inspect", str(tmp_path), "--verify"]) == 2
    assert "no hashes of its files are recorded" in " ".join(capsys.readouterr().out.split())
    assert main(["verify", str(tmp_path)]) == 2
    assert "records no hashes of its files" in capsys.readouterr().err
