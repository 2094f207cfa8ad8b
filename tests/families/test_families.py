"""A fair sample of ``make families``: text, vision, audio, encoder-decoder and multimodal classes of transformers."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.ranks import run_on_ranks

from .results import QUICK
from .round_trip import round_trip
from .sharded import assert_right, run_sharded, save_bases
from .tiny import Family, all_families

SAMPLE = (
    # decoders, with and without ties, fused experts, renamed heads, state spaces
    *("LlamaForCausalLM", "Qwen3ForCausalLM", "GPT2LMHeadModel", "GPTNeoXForCausalLM", "MixtralForCausalLM"),
    *("Qwen3MoeForCausalLM", "OlmoeForCausalLM", "GemmaForCausalLM", "Gemma3ForCausalLM", "Phi3ForCausalLM"),
    *("FalconForCausalLM", "BloomForCausalLM", "OPTForCausalLM", "MambaForCausalLM", "GptOssForCausalLM"),
    # encoders and their heads
    *("BertForMaskedLM", "RobertaForMaskedLM", "DebertaV2ForSequenceClassification", "ElectraForTokenClassification"),
    *("DistilBertForQuestionAnswering", "ModernBertForMaskedLM", "XLMRobertaModel", "AlbertForMaskedLM"),
    # encoder-decoders
    *("T5ForConditionalGeneration", "MT5ForConditionalGeneration", "BartForConditionalGeneration"),
    *(
        "MBartForConditionalGeneration",
        "MarianMTModel",
        "PegasusForConditionalGeneration",
        "M2M100ForConditionalGeneration",
    ),
    # vision
    *("ViTForImageClassification", "ConvNextForImageClassification", "SwinForImageClassification", "ResNetModel"),
    *("Dinov2Model", "SegformerForSemanticSegmentation", "YolosForObjectDetection", "BeitForImageClassification"),
    # audio
    *("WhisperForConditionalGeneration", "Wav2Vec2ForCTC", "HubertForCTC", "ASTForAudioClassification"),
    # several kinds of input
    *("CLIPModel", "SiglipModel", "BlipForQuestionAnswering", "LlavaForConditionalGeneration"),
    # tensors reordered and joined when they are saved; answers in which something is masked with an infinity
    *("Kimi_K25ForConditionalGeneration", "Step3p7ForConditionalGeneration", "MMGroundingDinoForObjectDetection"),
    *("PaliGemmaForConditionalGeneration", "Gemma3ForConditionalGeneration", "Qwen2VLForConditionalGeneration"),
    *("Qwen2_5_VLForConditionalGeneration", "Idefics3ForConditionalGeneration", "AyaVisionForConditionalGeneration"),
)
SHARDED = (
    *("GPT2LMHeadModel", "Qwen3MoeForCausalLM", "BertForMaskedLM", "T5ForConditionalGeneration"),
    *("ViTForImageClassification", "WhisperForConditionalGeneration", "Qwen2_5_VLForConditionalGeneration"),
    "MarianMTModel",  # has ties that a manifest records, and positions that save_pretrained leaves out
)
FAMILIES = {family.kind: family for family in all_families()}


@pytest.mark.parametrize("kind", SAMPLE)
def test_a_class_comes_back_from_every_way_to_export_it_and_is_found_good(kind: str, tmp_path: Path) -> None:
    result = round_trip(FAMILIES[kind], tmp_path, QUICK)
    shutil.rmtree(tmp_path)
    assert result.left_out == ""
    assert result.wrong == {}
    assert tuple(result.outcomes) == QUICK


def run_the_sample(folder: Path, families: list[Family]) -> None:
    run_sharded(folder, families)


def test_classes_that_two_ranks_hold_shards_of_come_back(tmp_path: Path) -> None:
    families = [FAMILIES[kind] for kind in SHARDED]
    save_bases(tmp_path, families)
    run_on_ranks(run_the_sample, 2, tmp_path, tmp_path, families)
    for family in families:
        assert_right(tmp_path / family.kind)
