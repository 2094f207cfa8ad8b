"""A checkpoint that holds a part of its base model is called so, and what the refusal advises works."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MixtralConfig,
    MixtralForCausalLM,
)

from shardsmith.cli import main
from tests.dcp_directories import save
from tests.trained_runs import SIZES

VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}


def to_hf(checkpoint: Path, base: Path, output: Path, *options: str) -> int:
    places = ["--checkpoint", str(checkpoint), "--base-model", str(base), "--output-dir", str(output)]
    return main(["to-hf", *places, "--dtype", "original", "--quiet", *options])


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.fixture(scope="module")
def composed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, LlavaForConditionalGeneration]:
    torch.manual_seed(0)
    vision = CLIPVisionConfig(**VISION, image_size=8, patch_size=4)
    text = LlamaConfig(**SIZES)
    model = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_index=100))
    base = tmp_path_factory.mktemp("composed") / "base"
    model.save_pretrained(base)
    return base, model


@pytest.mark.parametrize("has_weights", [True, False], ids=["base with weights", "config alone"])
@pytest.mark.parametrize("has_head", [True, False], ids=["with a head", "without"])
def test_the_text_part_of_a_composed_model_is_exported_as_the_refusal_says(
    has_weights: bool,
    has_head: bool,
    composed: tuple[Path, LlavaForConditionalGeneration],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base, model = composed
    inner = model.model.language_model
    state = dict(inner.state_dict(prefix="model." if has_head else ""))
    state |= {"lm_head.weight": model.lm_head.weight.detach()} if has_head else {}
    checkpoint = save(state, tmp_path / "text")
    if not has_weights:
        (tmp_path / "base").mkdir()
        base = Path(shutil.copy(base / "config.json", tmp_path / "base")).parent
    assert to_hf(checkpoint, base, tmp_path / "out") == 2
    told = capsys.readouterr().err
    if has_weights:
        assert "a part of the model, " in told
        assert "nothing of" in told
        assert "multi_modal_projector.*, vision_tower.*" in told
    assert f"By itself it is {'LlamaForCausalLM' if has_head else 'LlamaModel'} of" in told
    monkeypatch.chdir(tmp_path)
    command = re.search(r'python -c "(.*)"', told)
    assert command is not None
    exec(command[1])
    assert to_hf(checkpoint, tmp_path / "PART", tmp_path / "out") == 0
    kind = AutoModelForCausalLM if has_head else AutoModel
    assert_equal(kind.from_pretrained(tmp_path / "out").state_dict(), state)


def test_an_expert_that_is_missing_is_named_and_no_other_base_is_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    model = MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=4))
    model.save_pretrained(tmp_path / "base")
    files = load_file(tmp_path / "base" / "model.safetensors")
    lacking = {name: value for name, value in files.items() if ".layers.1" not in name or ".experts.2." not in name}
    assert to_hf(save(lacking, tmp_path / "lacking"), tmp_path / "base", tmp_path / "out") == 2
    told = capsys.readouterr().err
    assert "a part of the model, 38 of 41 tensors, and nothing of model.layers.1.block_sparse_moe.experts.2.w1" in told
    assert "save all its tensors, or load the checkpoint into the base model" in told
    assert "Give a base model" not in told


def test_a_head_that_is_missing_is_cured_as_the_refusal_says(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    model.save_pretrained(tmp_path / "base")
    state = {name: value for name, value in model.state_dict().items() if name != "lm_head.weight"}
    checkpoint = save(state, tmp_path / "checkpoint")
    assert to_hf(checkpoint, tmp_path / "base", tmp_path / "out") == 2
    told = capsys.readouterr().err
    assert "let config.json say tie_word_embeddings: true, and give --allow 'lm_head.weight'" in told
    assert "architectures: LlamaForCausalLM, and these are the tensors of LlamaModel; and give --allow 'lm_h" in told
    cures = {"tie_word_embeddings": True}, {"architectures": ["LlamaModel"]}
    for cure, kind in zip(cures, (AutoModelForCausalLM, AutoModel), strict=True):
        base = shutil.copytree(tmp_path / "base", tmp_path / str(*cure))
        config = json.loads((base / "config.json").read_text())
        (base / "config.json").write_text(json.dumps(config | cure))
        for weights in ("with", "without"):
            output = tmp_path / f"out-{weights}-{base.name}"
            assert to_hf(checkpoint, base, output, "--allow", "lm_head.weight") == 0
            loaded, info = kind.from_pretrained(output, output_loading_info=True)
            assert not info["missing_keys"]
            for name, value in loaded.state_dict().items():
                ours = name if kind is AutoModelForCausalLM else f"model.{name}"
                assert torch.equal(value, state[ours.replace("lm_head", "model.embed_tokens")])
            (base / "model.safetensors").unlink(missing_ok=True)
