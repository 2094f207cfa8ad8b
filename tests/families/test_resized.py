"""A grown vocabulary: the refusal names its tensors alone, and the cure that it gives leads to a right export."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from shardsmith.errors import MismatchError
from shardsmith.export.plan import ExportOptions, choose_stems, plan_directory
from shardsmith.export.write import write_directories

from .tiny import all_families, make_tiny

pytestmark = pytest.mark.filterwarnings("ignore")
GROWN = (
    # names as in memory, of an older generation in the files, and with an alias
    *("Qwen2_5_VLForConditionalGeneration", "LlavaForConditionalGeneration", "PaliGemmaForConditionalGeneration"),
    *("Qwen3MoeForCausalLM", "T5ForConditionalGeneration"),
    "MarianMTModel",  # says the size of a shared vocabulary twice
)


@pytest.mark.parametrize("kind", GROWN)
def test_a_grown_vocabulary_is_all_that_is_named(kind: str, tmp_path: Path) -> None:
    model = make_tiny(next(family for family in all_families() if family.kind == kind))
    base, checkpoint, output = tmp_path / "base", tmp_path / "checkpoint", tmp_path / "out"
    model.save_pretrained(base)
    model.resize_token_embeddings(model.get_input_embeddings().weight.shape[0] + 5)
    dcp.save(dict(model.state_dict()), checkpoint_id=checkpoint, no_dist=True)
    ((_, stems),) = choose_stems(checkpoint, base, "main", "auto")
    with pytest.raises(MismatchError) as refused:
        plan_directory(checkpoint, output, base, stems, ExportOptions(dtype=None))
    named = [line.split(":")[0] for line in refused.value.problems]
    assert all(re.search("embed_tokens|lm_head|shared|final_logits_bias", name) for name in named), named
    write_directories([plan_directory(checkpoint, output, base, stems, ExportOptions(dtype=None, allow=tuple(named)))])
    loaded, info = type(model).from_pretrained(output, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert all(torch.equal(loaded.state_dict()[name], value) for name, value in model.state_dict().items())
    written, library = json.loads((output / "config.json").read_text()), model.config.to_dict()
    for config, expected in ((written, library), (written.get("text_config", {}), library.get("text_config", {}))):
        vocabularies = {key: value for key, value in config.items() if "vocab_size" in key}
        assert vocabularies == {key: expected[key] for key in vocabularies}
