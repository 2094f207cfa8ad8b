"""Headers of ``backend="per_rank"`` that do not describe their files: each is an error of ours."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from shardsmith import ShardedCheckpointManager
from shardsmith.errors import CorruptCheckpointError
from shardsmith.formats.rank_shards import HEADER_KEY, RankShards
from shardsmith.tensors.tensors import read_tensor


def change(field: int, value: Any) -> Callable[[dict[str, Any]], Any]:
    """Put another value into the description of the weight: key, offsets, sizes, shape, whether it is an object."""

    def edit(parts: dict[str, Any]) -> dict[str, Any]:
        return {
            name: [*part[:field], value, *part[field + 1 :]] if part[2] == [5, 8] else part
            for name, part in parts.items()
        }

    return edit


EDITS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "a list": lambda parts: [*parts.values()],
    "a number": len,
    "parts that are texts": lambda parts: dict.fromkeys(parts, "parts"),
    "parts that are short": lambda parts: {name: part[:4] for name, part in parts.items()},
    "a key that is a list": change(0, ["weight"]),
    "offsets that are a text": change(1, "00"),
    "offsets below zero": change(1, [-1, 0]),
    "offsets outside": change(1, [1, 0]),
    "too few offsets": change(1, [0]),
    "a shape that is smaller": change(3, [4, 8]),
    "a shape of other dimensions": change(3, [5, 8, 1]),
    "a shape of texts": change(3, ["5", "8"]),
    "a text for a bool": change(4, "false"),
    "another name": lambda parts: {f"{name}x": part for name, part in parts.items()},
}


def rewrite(path: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    with safe_open(path, "pt") as file:
        header, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    save_file(tensors, path, {**header, HEADER_KEY: json.dumps(edit(json.loads(header[HEADER_KEY])))})


@pytest.mark.parametrize("kind", EDITS)
def test_a_header_that_makes_no_sense_is_corrupt(kind: str, tmp_path: Path) -> None:
    model = nn.Linear(8, 5)
    manager = ShardedCheckpointManager(tmp_path, model=model, backend="per_rank")
    manager.save_sharded_checkpoint(step=1)
    (step,) = tmp_path.iterdir()
    rewrite(step / "weights-rank-00000.safetensors", lambda parts: parts)
    source = RankShards(step)
    assert torch.equal(read_tensor(source, "weight"), model.weight)
    source.close()
    rewrite(step / "weights-rank-00000.safetensors", EDITS[kind])
    with pytest.raises(CorruptCheckpointError, match=r"weights-rank-00000.*does not say what it holds"):
        RankShards(step)
