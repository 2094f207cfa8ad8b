"""A command reads the manifest of a checkpoint once and detects its format once, however many models are in it."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
from safetensors.torch import save_file
from torch import nn

from shardsmith.cli import main
from shardsmith.formats import by_path
from shardsmith.hooks import EMA, FolderSave, Hooks, ShardedSave, at

_opened: list[str] = []
"""Paths of the files that were opened since the last look."""
_TO_HF = ["to-hf", "--checkpoint", "CHECKPOINT", "--base-model", "BASE", "--output-dir", "OUTPUT", "--quiet"]
_RUNS = {
    "inspect": ["inspect", "CHECKPOINT"],
    "verified": ["inspect", "CHECKPOINT", "--verify"],
    "verify": ["verify", "CHECKPOINT", "BASE"],
    "diagnose": ["diagnose", "--checkpoint", "CHECKPOINT", "--base-model", "BASE"],
    "to-hf": _TO_HF,
    "two directories": [*_TO_HF, "--ema-as", "directory"],
}


def _note(event: str, arguments: tuple[object, ...]) -> None:
    if event == "open" and isinstance(arguments[0], str | os.PathLike):
        _opened.append(os.fspath(arguments[0]))


sys.addaudithook(_note)


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint with an average, the same in a trainer's folder, and the model that they hold."""
    root = tmp_path_factory.mktemp("read_once")
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    ema = EMA(model, decay=0.5)
    with Hooks(ema, ShardedSave(root, model=model, ema=ema, when=at(1))) as hooks:
        hooks.step(1)
    for name in ("base", "folder"):
        (root / name).mkdir()
        save_file(model.state_dict(), root / name / "model.safetensors")
        (root / name / "config.json").write_text(json.dumps({"model_type": "two-layers"}))
    folder_save = FolderSave(model, ema=ema)
    folder_save.save(1, root / "folder")
    folder_save.close()
    return {"ours": root / "step-1", "trainer": root / "folder", "base": root / "base"}


@pytest.fixture
def detected(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    paths: list[Path] = []
    detect = by_path._detect
    monkeypatch.setattr(by_path, "_detect", lambda path: (paths.append(path), detect(path))[1])
    return paths


@pytest.mark.parametrize("kind", ["ours", "trainer"])
@pytest.mark.parametrize("command", _RUNS)
def test_the_manifest_is_read_once(
    places: dict[str, Path], detected: list[Path], tmp_path: Path, kind: str, command: str
) -> None:
    checkpoint = places[kind]
    words = {"CHECKPOINT": str(checkpoint), "BASE": str(places["base"]), "OUTPUT": str(tmp_path / "out")}
    _opened.clear()
    code = main([words.get(word, word) for word in _RUNS[command]])
    assert code in (0, 1, 2), "it has come to an end"
    manifest = checkpoint / ("metadata.json" if kind == "ours" else "shardsmith/metadata.json")
    locked = kind == "ours" and command in ("to-hf", "two directories")  # a lease opens the file, and reads nothing
    assert _opened.count(str(manifest)) == 1 + locked
    assert detected.count(checkpoint) == 1
