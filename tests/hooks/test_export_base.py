"""The base model of an export may be named as on the Hub, if it lies in the local cache."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from huggingface_hub import constants
from torch import nn

from shardsmith.errors import CheckpointNotFoundError
from shardsmith.hooks import HFExport, every


def test_a_base_model_is_found_in_the_cache_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repository = tmp_path / "cache" / "models--acme--tiny"
    for name in ("snapshots/0123", "refs", "blobs"):
        (repository / name).mkdir(parents=True)
    (repository / "refs" / "main").write_text("0123")
    (repository / "blobs" / "c").write_text(json.dumps({"model_type": "odd"}))
    (repository / "snapshots" / "0123" / "config.json").symlink_to("../../blobs/c")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    export = HFExport(tmp_path / "hf", model=nn.Linear(2, 2), when=every(1), base_model="acme/tiny")
    export.export(1)
    export.close()
    written = tmp_path / "hf" / "step-1" / "config.json"
    assert not written.is_symlink()
    assert json.loads(written.read_text())["model_type"] == "odd"
    with pytest.raises(
        CheckpointNotFoundError, match="acme/none: is neither a directory nor a model in the Hugging Face"
    ):
        HFExport(tmp_path / "hf", model=nn.Linear(2, 2), when=every(1), base_model="acme/none")
