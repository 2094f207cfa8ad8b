"""Which boxes go to which file is found by looking at each box once, however many files there are."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from shardsmith.export.live_writers import SliceWriter
from shardsmith.formats.safetensors_files.plan import plan_files
from shardsmith.sharding.live_boxes import LiveBox
from shardsmith.tensors.tensors import Chunk, TensorSpec


class Counted(dict[str, Any]):
    """Counts how often one of its keys is looked for."""

    looks = 0

    def __contains__(self, key: object) -> bool:
        Counted.looks += 1
        return super().__contains__(key)


@pytest.mark.parametrize("count", [20, 80])
def test_each_box_is_looked_for_in_one_file(count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    specs = [TensorSpec(f"layers.{i}.weight", (2, 2), torch.float32) for i in range(count)]
    weights = plan_files(specs, max_shard_bytes=32)
    assert len(weights.files) == count // 2
    counted = [replace(file, tensors=Counted(file.tensors)) for file in weights.files]
    plan: Any = SimpleNamespace(models=[SimpleNamespace(model="main", weights=SimpleNamespace(files=counted))])
    values = {spec.name: torch.full((2, 2), float(i)) for i, spec in enumerate(specs)}
    boxes = [LiveBox(spec.name, spec.shape, Chunk.whole(spec.shape), values[spec.name]) for spec in reversed(specs)]
    writer = SliceWriter()
    writer.make_files(plan, tmp_path)
    monkeypatch.setattr(Counted, "looks", 0)
    writer.write(plan, {"main": boxes}, tmp_path)
    assert Counted.looks <= 2 * count
    writer.sync(writer.unsynced())
    writer.close()
    files = {name: tensor for file in weights.files for name, tensor in load_file(tmp_path / file.name).items()}
    assert all(torch.equal(files[name], tensor) for name, tensor in values.items())
