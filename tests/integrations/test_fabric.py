"""The hooks in a loop of Lightning's Fabric: what it wraps is saved and exported without its wrappers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.integrations.fabric_runs import train_straight_and_in_parts
from tests.ranks import run_on_ranks

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's advice


@pytest.mark.parametrize(("strategy", "ranks"), [("auto", 1), ("ddp", 2), ("fsdp2", 2)])
def test_a_run_in_parts_ends_as_the_uninterrupted_one(tmp_path: Path, strategy: str, ranks: int) -> None:
    run_on_ranks(train_straight_and_in_parts, ranks, tmp_path, strategy, tmp_path)
    expected, found = (torch.load(tmp_path / run / "end.pt") for run in ("straight", "parts"))
    assert found["step"] == expected["step"] == 8
    assert not torch.equal(expected["main"]["0.weight"], expected["ema"]["0.weight"])
    for model, file in (("main", "model"), ("ema", "ema")):
        assert found[model].keys() == expected[model].keys()
        assert all(torch.equal(found[model][name], value) for name, value in expected[model].items()), model
        exported = load_file(tmp_path / "parts" / "hf" / "step-8" / f"{file}.safetensors")
        assert exported.keys() == {"0.weight", "0.bias", "2.weight", "2.bias"}
        assert all(torch.equal(value, expected[model][name]) for name, value in exported.items())
