"""Models of every kind, not language models alone: good weights end 0 on every level, and what is planted is found."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers as tf
from torch import Tensor

from shardsmith.cli import main
from shardsmith.compare.verification import verify
from shardsmith.diagnose import Questions, diagnose
from tests.dcp_directories import save

SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
WHISPER = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2}
WHISPER |= {"decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "num_mel_bins": 8}
WHISPER |= {"max_source_positions": 12, "max_target_positions": 10, "vocab_size": 60, "pad_token_id": 0}
WHISPER |= {"bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 3, "suppress_tokens": None}
T5 = {"d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4, "vocab_size": 12}
VISION = {**SMALL, "image_size": 8, "patch_size": 4}

KINDS: dict[str, Callable[[], tf.PreTrainedModel]] = {
    "vit": lambda: tf.ViTForImageClassification(tf.ViTConfig(**VISION, num_labels=3)),
    "t5, tiny vocabulary": lambda: tf.T5ForConditionalGeneration(tf.T5Config(**T5, decoder_start_token_id=0)),
    "whisper": lambda: tf.WhisperForConditionalGeneration(tf.WhisperConfig(**WHISPER)),
    "bert": lambda: tf.BertForMaskedLM(tf.BertConfig(**SMALL, vocab_size=40, max_position_embeddings=8)),
    "roberta, a classifier": lambda: tf.RobertaForSequenceClassification(
        tf.RobertaConfig(**SMALL, vocab_size=40, max_position_embeddings=12, num_labels=2)
    ),
    "gpt2, few positions": lambda: tf.GPT2LMHeadModel(
        tf.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=11, n_positions=6, bos_token_id=1, eos_token_id=1)
    ),
    "llava": lambda: tf.LlavaForConditionalGeneration(
        tf.LlavaConfig(
            text_config=tf.LlamaConfig(**SMALL, vocab_size=64),
            vision_config=tf.CLIPVisionConfig(**VISION),
            image_token_index=60,
        )
    ),
    "clip": lambda: tf.CLIPModel(
        tf.CLIPConfig(
            text_config={**SMALL, "vocab_size": 40, "max_position_embeddings": 9, "eos_token_id": 2},
            vision_config=VISION,
            projection_dim=8,
        )
    ),
    "qwen3-moe": lambda: tf.Qwen3MoeForCausalLM(
        tf.Qwen3MoeConfig(
            **SMALL, num_key_value_heads=2, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8, vocab_size=50
        )
    ),
    "bart": lambda: tf.BartForConditionalGeneration(
        tf.BartConfig(
            d_model=16,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=24,
            decoder_ffn_dim=24,
            vocab_size=30,
            max_position_embeddings=10,
        )
    ),
}


def make(kind: str, base: Path) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = KINDS[kind]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2)
    model.save_pretrained(base)
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("kind", KINDS)
def test_good_weights_of_every_kind_end_0_by_their_logits(kind: str, tmp_path: Path) -> None:
    state = make(kind, tmp_path / "base")
    for dtype in (torch.float32, torch.bfloat16):
        wrapped = {f"module.{n}": t.to(dtype) if t.is_floating_point() else t for n, t in state.items()}
        checkpoint = save(wrapped, tmp_path / str(dtype))
        found = diagnose(checkpoint, tmp_path / "base", Questions(level="model"))
        assert (found.faults, found.unseen, found.exit_code) == ((), (), 0)
    assert verify(tmp_path / "torch.float32", tmp_path / "base").same
    assert main(["verify", str(tmp_path / "torch.float32"), str(tmp_path / "base"), "--logits"]) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_weights_that_change_the_answer_are_found_by_the_logits(kind: str, tmp_path: Path) -> None:
    state = make(kind, tmp_path / "base")
    for name, tensor in state.items():
        if tensor.is_floating_point() and tensor.dim() == 1 and ("norm" in name.lower() or "ln_" in name):
            state[name] = tensor * 1.5
    found = diagnose(save(state, tmp_path / "c"), tmp_path / "base", Questions(level="model"))
    assert {finding.code for finding in found.faults} == {"logits-differ"}
