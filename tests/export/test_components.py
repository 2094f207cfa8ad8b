"""Components of diffusers are converted, verified and diagnosed as models of transformers are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file

from shardsmith import detect_checkpoint_format
from shardsmith.cli import main
from tests.hf.test_directory_check import saved

WRAPPED = ("", "module.", "_orig_mod.", "module._orig_mod.", "unet.")


def unet() -> Any:
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    sizes: dict[str, Any] = {"block_out_channels": (32, 32), "layers_per_block": 1, "norm_num_groups": 8}
    return diffusers.UNet2DModel(sample_size=8, in_channels=3, out_channels=3, **blocks, **sizes)


def wan() -> Any:
    sizes = {"num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 1, "ffn_dim": 32}
    return diffusers.WanTransformer3DModel(in_channels=4, out_channels=4, text_dim=16, freq_dim=16, **sizes)


@pytest.fixture(params=[unet, wan])
def component(request: pytest.FixtureRequest) -> Any:
    make: Callable[[], Any] = request.param
    torch.manual_seed(0)
    return make()


@pytest.mark.parametrize("weights", ["safetensors", "bin", "none"])
@pytest.mark.parametrize("prefix", WRAPPED)
def test_a_wrapped_component_is_converted_and_judged(
    prefix: str, weights: str, component: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, output = tmp_path / "base", tmp_path / "out"
    component.save_pretrained(base)
    (own,) = base.glob("*.safetensors")
    if weights == "bin":
        torch.save(load_file(own), own.with_suffix(".bin"))
    if weights != "safetensors":
        own.unlink()
    state = component.state_dict()
    trained = {name: value + 0.01 * torch.randn_like(value) for name, value in state.items()}
    saved({prefix + name: value for name, value in trained.items()}, tmp_path / "ck")
    pair = ["--checkpoint", str(tmp_path / "ck"), "--base-model", str(base)]
    assert main(["to-hf", *pair, "--output-dir", str(output), "--dtype", "original"]) == 0
    loaded = type(component).from_pretrained(output).state_dict()
    assert loaded.keys() == trained.keys()
    assert all(torch.equal(value, trained[name]) for name, value in loaded.items())
    assert detect_checkpoint_format(output).name == "huggingface"
    assert main(["verify", str(tmp_path / "ck"), str(output)]) == 0
    capsys.readouterr()
    for level in ("structure", "values") if weights != "none" else ("structure",):
        asked = ["diagnose", "--checkpoint", str(tmp_path / "ck"), "--model", str(base), "--level", level]
        assert main([*asked, "--trained"]) == 0, capsys.readouterr().out


def test_a_component_that_lacks_a_tensor_is_found_at_fault(component: Any, tmp_path: Path) -> None:
    component.save_pretrained(tmp_path / "base")
    state = dict(component.state_dict())
    del state[next(iter(state))]
    saved(state, tmp_path / "ck")
    asked = ["diagnose", "--checkpoint", str(tmp_path / "ck"), "--model", str(tmp_path / "base")]
    assert main([*asked, "--level", "structure"]) == 1
