"""Parts in memory that the class joins to one tensor in its files, and that have different dtypes in a checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from shardsmith.cli import main
from shardsmith.compare.verification import VerifyOptions, verify
from shardsmith.diagnose import Questions, diagnose
from shardsmith.errors import UnsupportedFormatError
from tests.families.tiny import all_families, make_tiny

FAMILIES = {family.kind: family for family in all_families()}


def save(state: dict[str, Tensor], path: Path) -> Path:
    save_file({name: value.clone().contiguous() for name, value in state.items()}, path)
    return path


@pytest.mark.parametrize("kind", ["GteForMaskedLM", "JinaEmbeddingsV3ForMaskedLM"])
def test_the_parts_and_their_dtypes_are_named_and_the_cure_helps(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = make_tiny(FAMILIES[kind]).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "base")
    state = dict(model.state_dict())
    mixed = {name: value.float() if "k_proj" in name else value for name, value in state.items()}
    assert any(value.dtype == torch.float32 for value in mixed.values())
    checkpoint = save(mixed, tmp_path / "mixed.safetensors")
    with pytest.raises(UnsupportedFormatError) as refused:
        verify(checkpoint, tmp_path / "base", VerifyOptions())
    with pytest.raises(UnsupportedFormatError) as undiagnosed:
        diagnose(checkpoint, tmp_path / "base", Questions(level="values"))
    for error in (refused.value, undiagnosed.value):
        said = str(error)
        assert "different dtypes" in said
        assert "k_proj.weight float32" in said
        assert "q_proj.weight bfloat16" in said
        assert "shard by shard" not in said
    given = ["--checkpoint", checkpoint, "--base-model", tmp_path / "base", "--output-dir", tmp_path / "out"]
    assert main(["to-hf", *map(str, given)]) == 2
    assert "k_proj.weight float32" in capsys.readouterr().err
    cast = {name: value.bfloat16() if "k_proj" in name else value for name, value in mixed.items()}
    assert verify(save(cast, tmp_path / "cast.safetensors"), tmp_path / "base", VerifyOptions()).same
