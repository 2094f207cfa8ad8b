"""An export in a dtype that has no room for a value says so, in every way to copy and write; torch says what has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from shardsmith.errors import RankFailedError
from shardsmith.hooks import HFExport, Hooks, ShardedSave, every
from tests.hooks.training import build
from tests.ranks import run_on_ranks

WAYS: dict[str, dict[str, Any]] = {
    "whole": {},
    "windows": {"max_host_memory": "1kB"},
    "overlap": {"staging": "overlap"},
    "files": {"write_mode": "files", "max_shard_size": "1kB"},
    "of a save": {},
}
MOST = 65504.0  # of float16


@pytest.mark.parametrize("sharding", ["fsdp2", "ddp"])
def test_values_beyond_the_range_are_refused_on_all_ranks_and_named(tmp_path: Path, sharding: str) -> None:
    run_on_ranks(run_exports, 2, tmp_path, tmp_path, sharding)
    expected = torch.load(tmp_path / "expected.pt")
    for way in WAYS:
        (weights, *rest) = [*(tmp_path / way / "step-2").glob("*.safetensors")]
        found = {name: value for file in (weights, *rest) for name, value in load_file(file).items()}
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], value) for name, value in expected.items())
        assert not (tmp_path / way / "step-1").exists()


def run_exports(directory: Path, sharding: str) -> None:
    """Once with values that float16 does not have, which no way exports; then with what it has just room for."""
    model = build(sharding)
    for way, options in WAYS.items():
        fill(model, norm=-1e6, embed=70_000.0, bias=torch.inf)
        save = ShardedSave(directory / "saves" / way, model=model, when=every(1))
        export = HFExport(directory / way, model=model, when=every(1), dtype="float16", **options)
        hooks = Hooks(save, export) if way == "of a save" else Hooks(export)
        hooks.step(1)
        with pytest.raises(RankFailedError) as error:
            export.wait()
        for line in ("norm.weight: up to 1e+06", "embed.weight: up to 70000", "Nothing was published"):
            assert line in str(error.value)
        assert "inner.0.bias" not in str(error.value)  # what is infinite is meant
        fill(model, norm=-MOST, embed=MOST + 15, bias=torch.inf)
        hooks.step(2)
        hooks.close()
    whole = {name: full(value) for name, value in model.state_dict().items()}
    torch.save(
        {
            name.removeprefix("module."): value.half() if value.is_floating_point() else value
            for name, value in whole.items()
            if not name.endswith("head.weight")
        },
        directory / "expected.pt",
    )


@torch.no_grad()
def fill(model: nn.Module, *, norm: float, embed: float, bias: float) -> None:
    inner: Any = model.module if hasattr(model, "module") else model
    for parameter, value in ((inner.norm.weight, norm), (inner.embed.weight, embed), (inner.inner[0].bias, bias)):
        parameter.fill_(value)


def full(value: Tensor) -> Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value
