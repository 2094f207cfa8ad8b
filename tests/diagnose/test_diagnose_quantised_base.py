"""A model that was quantised, and a checkpoint with plain weights: names and shapes are those of the class."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from shardsmith.diagnose import Questions, diagnose
from tests.families.tiny import all_families, make_tiny

LLAMA = next(family for family in all_families() if family.kind == "LlamaForCausalLM")


def fp8(name: str, value: Tensor) -> Mapping[str, Tensor]:
    scale = torch.ones(-(-value.shape[0] // 16), -(-value.shape[1] // 16))
    return {name: value.to(torch.float8_e4m3fn), f"{name}_scale_inv": scale}


def four_bits(name: str, value: Tensor) -> Mapping[str, Tensor]:
    return {name: torch.zeros(value.numel() // 2, 1, dtype=torch.uint8)}


def awq(name: str, value: Tensor) -> Mapping[str, Tensor]:
    packed = torch.zeros(value.shape[1], value.shape[0] // 8, dtype=torch.int32)
    return {name.removesuffix("weight") + "qweight": packed}


Scheme = Callable[[str, Tensor], Mapping[str, Tensor]]
SCHEMES: dict[str, Scheme] = {"fp8": fp8, "bitsandbytes": four_bits, "awq": awq}


@pytest.fixture(params=SCHEMES)
def base(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    model, path = make_tiny(LLAMA), tmp_path / "base"
    model.save_pretrained(path)
    quantise = SCHEMES[request.param]
    files: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        files |= quantise(name, value) if "proj" in name else {name: value}
    save_file(files, path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": request.param}}))
    return path


def found(base: Path, state: Mapping[str, Tensor]) -> tuple[set[str], int, list[str]]:
    save_file({name: value.contiguous() for name, value in state.items()}, base.parent / "trained.safetensors")
    said = diagnose(base.parent / "trained.safetensors", base, Questions(level="all"))
    return (
        {finding.code for finding in said.faults},
        said.exit_code,
        [line for look in said.levels for line in look.unseen],
    )


def test_plain_weights_are_not_accused_and_what_was_not_compared_is_said(base: Path) -> None:
    codes, status, unseen = found(base, {n: v.bfloat16() for n, v in make_tiny(LLAMA).state_dict().items()})
    assert (codes, status) == (set(), 2)
    assert len(unseen) == 2
    assert all("has quantized weights, and the checkpoint plain ones" in line for line in unseen)


def test_names_and_shapes_are_compared_with_the_class(base: Path) -> None:
    state = make_tiny(LLAMA).state_dict()
    lost = {name: value for name, value in state.items() if name != "model.layers.0.mlp.up_proj.weight"}
    assert "missing-tensors" in found(base, lost)[0]
    assert "extra-tensors" in found(base, {**state, "model.layers.7.mlp.up_proj.weight": torch.ones(2, 2)})[0]
    other = {**state, "model.layers.0.mlp.up_proj.weight": torch.ones(3, 5)}
    assert "shape-differs" in found(base, other)[0]
