"""``diagnose`` and ``verify`` on the tensors of TorchTitan's own models, against the Hugging Face model they are."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from shardsmith.cli import main
from shardsmith.diagnose import Diagnosis, Questions, diagnose
from shardsmith.integrations.torchtitan.models import build_titan_model
from tests.dcp_directories import save_sharded
from tests.titan.test_to_hf import LLAMA, TITAN

QUERY_KEY = re.compile(r"layers\.(\d+)\..*\.w([qk])\.weight")
NAMES = "torchtitan:llama3/small"


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    """Values for every tensor of the model that TorchTitan trains."""
    torch.manual_seed(0)
    model = build_titan_model("llama3/small").model
    return {name: torch.randn(tensor.shape) for name, tensor in model.state_dict().items()}


@pytest.fixture
def base(state: dict[str, Tensor], tmp_path: Path) -> Path:
    """The same as TorchTitan's adapter makes it."""
    LLAMA.save_pretrained(tmp_path / "base")
    files = build_titan_model("llama3/small").adapter.to_hf(dict(state))
    save_file({name: tensor.contiguous() for name, tensor in files.items()}, tmp_path / "base" / "model.safetensors")
    return tmp_path / "base"


def values(checkpoint: Path, base: Path, names: str = NAMES) -> Diagnosis:
    return diagnose(checkpoint, base, Questions(level="values", names=names))


@pytest.mark.parametrize("nested", [None, "model"])
def test_a_checkpoint_of_torchtitans_own_model_is_the_model(
    nested: str | None, state: dict[str, Tensor], base: Path, tmp_path: Path
) -> None:
    checkpoint = save_sharded(state, tmp_path / "c", 2, nested=nested)
    command = ["diagnose", "--checkpoint", str(checkpoint), "--model", str(base), *TITAN]
    assert main([*command, "--level", "structure"]) == 0
    assert main([*command, "--level", "values"]) == 0
    assert main(["verify", str(checkpoint), str(base), *TITAN]) == 0


def test_rows_that_were_copied_without_the_permutation_are_found(
    state: dict[str, Tensor], base: Path, tmp_path: Path
) -> None:
    right = build_titan_model("llama3/small").adapter.to_hf(dict(state))
    plain = dict(state)
    for name in state:
        if match := QUERY_KEY.fullmatch(name):
            plain[name] = right[f"model.layers.{match[1]}.self_attn.{match[2]}_proj.weight"]
    found = values(save_sharded(plain, tmp_path / "c", 2), base)
    assert [finding.code for finding in found.faults] == ["rows-permuted"]


def test_without_the_name_map_the_report_says_which_option_is_missing(
    state: dict[str, Tensor], base: Path, tmp_path: Path
) -> None:
    checkpoint = save_sharded(state, tmp_path / "c", 2)
    found = diagnose(checkpoint, base, Questions(level="structure"))
    assert "--titan-model" in next(finding.found for finding in found.faults if finding.code == "missing-tensors")
