"""Classes that store under a name what is not the tensor of that name in memory: rearranged, transposed, computed."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
import transformers
from safetensors.torch import load_file, save_file
from transformers import conversion_mapping as mappings
from transformers.core_model_loading import ConversionOps, PermuteForRope, WeightConverter, WeightRenaming

from shardsmith.compare.verification import VerifyOptions, verify
from shardsmith.diagnose import Questions, diagnose
from shardsmith.errors import UnsupportedFormatError
from tests.families.round_trip import assert_as_the_library_saves, convert
from tests.families.tiny import all_families, make_tiny

FAMILIES = {family.kind: family for family in all_families()}
RENAMED = WeightRenaming(r"model\.tok_embeddings\.", "model.embed_tokens.")


class Doubled(ConversionOps):
    """Stores twice the values."""

    def __init__(self, factor: float = 0.5) -> None:
        self.factor = factor

    def convert(self, input_dict: dict[str, Any], source_patterns: Any, target_patterns: Any, **kwargs: Any) -> Any:  # noqa: ARG002
        (tensor,) = input_dict.values()
        return {target_patterns[0]: (tensor[0] if isinstance(tensor, list) else tensor) * self.factor}

    @property
    def reverse_op(self) -> ConversionOps:
        return Doubled(1 / self.factor)


@pytest.fixture
def conversion(request: pytest.FixtureRequest) -> Iterator[None]:
    """Llama's classes store their embeddings under another name, and queries as the given operation makes them."""
    converter = WeightConverter("self_attn.q_proj.weight", "self_attn.q_proj.weight", operations=[request.param])
    known = mappings.get_checkpoint_conversion_mapping("llama")
    mappings.register_checkpoint_conversion_mapping("llama", [RENAMED, converter], overwrite=True)
    yield
    mappings.register_checkpoint_conversion_mapping("llama", known or [], overwrite=True)


def llama(folder: Path) -> Any:
    model = make_tiny(FAMILIES["LlamaForCausalLM"])
    model.save_pretrained(folder / "base")
    dcp_save(model, folder / "checkpoint")
    return model


def dcp_save(model: Any, path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch: that there are no ranks
        dcp.save(dict(model.state_dict()), checkpoint_id=path, no_dist=True)


@pytest.mark.parametrize("conversion", [PermuteForRope()], indirect=True)
@pytest.mark.usefixtures("conversion")
def test_what_is_rearranged_under_its_own_name_is_written_as_the_class_writes_it(tmp_path: Path) -> None:
    model = llama(tmp_path)
    name = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(load_file(tmp_path / "base" / "model.safetensors")[name], model.state_dict()[name])
    convert(tmp_path / "checkpoint", tmp_path / "base", tmp_path / "out")
    assert_as_the_library_saves(tmp_path / "out", tmp_path / "base")
    assert verify(tmp_path / "checkpoint", tmp_path / "out", VerifyOptions()).same
    assert not diagnose(tmp_path / "checkpoint", tmp_path / "base", Questions(level="all")).faults
    again = convert(tmp_path / "out", tmp_path / "base", tmp_path / "again")  # files of files: nothing is moved
    assert "not compared" not in again
    assert_as_the_library_saves(tmp_path / "again", tmp_path / "base")


@pytest.mark.parametrize("conversion", [Doubled()], indirect=True)
@pytest.mark.usefixtures("conversion")
def test_what_the_class_computes_is_refused_and_nobody_is_accused(tmp_path: Path) -> None:
    llama(tmp_path)
    with pytest.raises(UnsupportedFormatError, match="not cut out of the tensors in memory"):
        convert(tmp_path / "checkpoint", tmp_path / "base", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    for ask in (
        lambda: verify(tmp_path / "checkpoint", tmp_path / "base", VerifyOptions()),
        lambda: diagnose(tmp_path / "checkpoint", tmp_path / "base", Questions(level="all")),
    ):
        with pytest.raises(UnsupportedFormatError, match="not cut out"):
            ask()


def test_files_with_transposed_experts_are_those_of_the_model(tmp_path: Path) -> None:
    """As the first releases of Qwen3-VL's mixtures of experts store them; the class loads both."""
    made = make_tiny(FAMILIES["Qwen3VLMoeForConditionalGeneration"])
    made.save_pretrained(tmp_path / "base")
    file = tmp_path / "base" / "model.safetensors"
    turned = {n: v.mT.contiguous() if "experts." in n else v for n, v in load_file(file).items()}
    save_file(turned, file, {"format": "pt"})
    model = transformers.Qwen3VLMoeForConditionalGeneration.from_pretrained(tmp_path / "base")
    assert all(torch.equal(value, made.state_dict()[name]) for name, value in model.state_dict().items())
    dcp_save(model, tmp_path / "checkpoint")
    convert(tmp_path / "checkpoint", tmp_path / "base", tmp_path / "out")
    assert_as_the_library_saves(tmp_path / "out", tmp_path / "base")
    assert verify(tmp_path / "checkpoint", tmp_path / "base", VerifyOptions()).same
    assert not diagnose(tmp_path / "checkpoint", tmp_path / "base", Questions(level="all")).faults
