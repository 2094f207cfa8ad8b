"""Modules that compute with more than their class has: no advice drops what was trained, and the cure leads on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from transformers import LlamaConfig, LlamaForCausalLM

from shardsmith.cli import main
from shardsmith.errors import MismatchError
from shardsmith.hooks import HFExport, Hooks, at


class LowRank(nn.Module):
    """A linear layer with a low-rank change, as people write it by hand."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear
        self.lora_a = nn.Parameter(torch.randn(2, linear.in_features))
        self.lora_b = nn.Parameter(torch.randn(linear.out_features, 2))

    def merged(self) -> nn.Linear:
        with torch.no_grad():
            self.linear.weight += self.lora_b @ self.lora_a
        return self.linear


def wrap(model: LlamaForCausalLM) -> None:
    for layer in model.model.layers:
        layer.self_attn.q_proj = LowRank(layer.self_attn.q_proj)


def merge_wrapped(model: LlamaForCausalLM) -> None:
    for layer in model.model.layers:
        layer.self_attn.q_proj = layer.self_attn.q_proj.merged()


def add_inside(model: LlamaForCausalLM) -> None:
    for layer in model.model.layers:
        layer.self_attn.q_proj.lora_a = nn.Parameter(torch.randn(2, 16))
        layer.self_attn.q_proj.lora_b = nn.Parameter(torch.randn(16, 2))


def merge_inside(model: LlamaForCausalLM) -> None:
    with torch.no_grad():
        for linear in (layer.self_attn.q_proj for layer in model.model.layers):
            linear.weight += linear.lora_b @ linear.lora_a
            del linear.lora_a, linear.lora_b


def normalize(model: LlamaForCausalLM) -> None:
    for layer in model.model.layers:
        parametrizations.weight_norm(layer.self_attn.q_proj)


def remove(model: LlamaForCausalLM) -> None:
    for layer in model.model.layers:
        parametrize.remove_parametrizations(layer.self_attn.q_proj, "weight")


def tiny() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2))


Change = Callable[[LlamaForCausalLM], None]
CASES: dict[str, tuple[Change, Change, str]] = {
    "weight_norm": (normalize, remove, "parametrizations.weight.original0, parametrizations.weight.original1"),
    "around the layer": (wrap, merge_wrapped, "linear.weight, lora_a, lora_b"),
    "inside the layer": (add_inside, merge_inside, "lora_a, lora_b"),
}


@pytest.mark.parametrize("with_weights", [True, False], ids=["base-weights", "config-only"])
@pytest.mark.parametrize("case", CASES)
def test_what_a_module_computes_with_is_not_to_be_dropped_but_merged(
    case: str, with_weights: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change, merge, held = CASES[case]
    model = tiny()
    base, trained, out = tmp_path / "base", tmp_path / "trained.pt", tmp_path / "out"
    model.save_pretrained(base)
    if not with_weights:
        (base / "model.safetensors").unlink()
    change(model)
    torch.save(model.state_dict(), trained)
    given = ["--checkpoint", trained, "--base-model", base, "--output-dir", out, "--dtype", "original"]
    command = list(map(str, ["to-hf", *given]))
    assert main(command) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert f"model.layers.0.self_attn.q_proj of the checkpoint (and 1 more like it) holds {held}, for which" in said
    assert "--drop" not in said
    assert "--allow" not in said
    assert not out.exists()
    merge(model)
    torch.save(model.state_dict(), trained)
    assert main(command) == 0
    loaded = LlamaForCausalLM.from_pretrained(out)
    tokens = torch.arange(8)[None]
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)


def test_a_live_export_says_so_too(tmp_path: Path) -> None:
    model = tiny()
    model.save_pretrained(tmp_path / "base")
    normalize(model)
    with pytest.raises(MismatchError, match="merge them into the weight") as caught:
        HFExport(tmp_path / "out", model=model, when=at(1), base_model=tmp_path / "base")
    assert "to-hf" not in str(caught.value)


def test_a_live_model_of_fewer_layers_is_exported_beside_a_base_without_weights(tmp_path: Path) -> None:
    model = tiny()
    model.save_pretrained(tmp_path / "base")
    model.model.layers = model.model.layers[:1]
    model.config.num_hidden_layers = 1
    model.config.layer_types = None
    with pytest.raises(MismatchError, match="If the difference is meant, give its directory without the files of wei"):
        HFExport(tmp_path / "out", model=model, when=at(1), base_model=tmp_path / "base")
    (tmp_path / "base" / "model.safetensors").unlink()
    export = HFExport(tmp_path / "out", model=model, when=at(1), base_model=tmp_path / "base", dtype="original")
    with Hooks(export) as hooks:
        hooks.step(1)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "out" / "step-1")
    assert loaded.config.num_hidden_layers == 1
    tokens = torch.arange(8)[None]
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)


class WithLoss(nn.Module):
    """A module of a training loop, such as one of Lightning: the model and a loss with weights of its own."""

    def __init__(self, *teacher: LlamaForCausalLM) -> None:
        super().__init__()
        self.net = tiny()
        self.loss = nn.CrossEntropyLoss(weight=torch.ones(32))
        if teacher:
            self.teacher = teacher[0]


@pytest.mark.parametrize("with_teacher", [False, True])
def test_a_live_model_with_more_beside_the_one_of_the_base_is_to_be_given_as_that_part(
    with_teacher: bool, tmp_path: Path
) -> None:
    model = WithLoss(*([tiny()] if with_teacher else []))
    model.net.save_pretrained(tmp_path / "base")
    advice = "Give HFExport the part alone: model=MODEL.net" + " or model=MODEL.teacher" * with_teacher
    with pytest.raises(MismatchError) as caught:
        HFExport(tmp_path / "out", model=model, when=at(1), base_model=tmp_path / "base")
    assert str(caught.value).endswith(advice)
    export = HFExport(tmp_path / "out", model=model.net, when=at(1), base_model=tmp_path / "base", dtype="original")
    with Hooks(export) as hooks:
        hooks.step(1)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "out" / "step-1")
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.net.state_dict().items())
