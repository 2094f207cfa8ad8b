"""Tensors that the class has no place for, a critic's for one: what the refusal advises leads to a right export."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from shardsmith.cli import main
from shardsmith.errors import MismatchError
from shardsmith.hooks import HFExport, Hooks, ShardedSave, every
from tests.families.tiny import all_families, make_tiny
from tests.hf.test_directory_check import saved

FAMILIES = {family.kind: family for family in all_families()}
HEADS = {  # prefix of the model's own names, tensors beside them
    "a value head": ("", {"v_head.weight": (1, 32), "v_head.bias": (1,)}),
    "trl's value head": ("pretrained_model.", {"v_head.summary.weight": (1, 32)}),
    "a critic of many layers": ("policy.", {f"critic.{i}.{part}.weight": (8, 8) for i in range(9) for part in "ab"}),
    "one whose name begins as the model's": ("", {"model.value.weight": (1, 32)}),
    "a tensor without a dot": ("", {"temperature": (1,)}),
}


@pytest.mark.parametrize("has_weights", [True, False])
@pytest.mark.parametrize("kind", ["LlamaForCausalLM", "Qwen2VLForConditionalGeneration", "T5ForConditionalGeneration"])
@pytest.mark.parametrize("head", HEADS)
def test_the_advice_for_tensors_without_a_place_leads_to_a_right_export(
    head: str, kind: str, has_weights: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prefix, beside = HEADS[head]
    model = make_tiny(FAMILIES[kind])
    model.save_pretrained(tmp_path / "base")
    if not has_weights:
        (tmp_path / "base" / "model.safetensors").unlink()
    state: dict[str, Tensor] = {name: value + value.abs().mean() for name, value in model.state_dict().items()}
    extra = {name: torch.randn(shape) for name, shape in beside.items()}
    saved({prefix + name: value for name, value in state.items()} | extra, tmp_path / "ck")
    given = ["--checkpoint", tmp_path / "ck", "--base-model", tmp_path / "base", "--dtype", "original"]
    command = ["to-hf", *map(str, given), "--output-dir", str(tmp_path / "out")]
    assert main(command) == 2
    said = capsys.readouterr().err
    assert "architectures" not in said
    advice = shlex.split(said[said.index("--drop") :].splitlines()[0])
    assert len(advice) == 2
    assert main([*command, *advice]) == 0
    loaded, info = type(model).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] | info["unexpected_keys"] | info["mismatched_keys"]
    assert all(torch.equal(value, state[name]) for name, value in loaded.state_dict().items())


def test_buffers_of_the_class_that_were_saved_by_mistake_are_dropped_by_one_advice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = make_tiny(FAMILIES["LlamaForCausalLM"])
    model.save_pretrained(tmp_path / "base")
    state: dict[str, Tensor] = dict(model.state_dict())
    saved(state | dict(model.named_buffers()), tmp_path / "ck")  # one of them older models had in their files
    given = ["--checkpoint", tmp_path / "ck", "--base-model", tmp_path / "base", "--dtype", "original"]
    command = ["to-hf", *map(str, given), "--output-dir", str(tmp_path / "out")]
    assert main(command) == 2
    said = capsys.readouterr().err
    assert main([*command, *shlex.split(said[said.index("--drop") :].splitlines()[0])]) == 0
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == state.keys()


def test_the_class_that_has_just_these_tensors_is_named_and_taking_it_leads_to_a_right_export(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_tiny(FAMILIES["LlamaForCausalLM"]).save_pretrained(tmp_path / "base")
    model = make_tiny(FAMILIES["LlamaForSequenceClassification"])
    state = {name: value.clone() for name, value in model.state_dict().items()}
    saved(state, tmp_path / "ck")
    (tmp_path / "base" / "model.safetensors").unlink()
    given = ["--checkpoint", tmp_path / "ck", "--base-model", tmp_path / "base", "--dtype", "original"]
    command = ["to-hf", *map(str, given), "--output-dir", str(tmp_path / "out")]
    assert main(command) == 2
    kind = type(model).__name__
    assert f"architectures: LlamaForCausalLM, and these are the tensors of {kind}" in capsys.readouterr().err
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(json.dumps(config | {"architectures": [kind]}))
    assert main(command) == 0
    loaded, info = type(model).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] | info["unexpected_keys"] | info["mismatched_keys"]
    assert all(torch.equal(value, state[name]) for name, value in loaded.state_dict().items())


@pytest.mark.parametrize("source", ["live", "checkpoint"])
def test_what_a_hook_advises_is_a_command_that_leads_to_a_right_export(
    source: Literal["live", "checkpoint"], tmp_path: Path
) -> None:
    model = make_tiny(FAMILIES["LlamaForCausalLM"])
    model.save_pretrained(tmp_path / "base")
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    model.critic = torch.nn.Linear(32, 1)
    save = ShardedSave(tmp_path / "ck", model=model, optimizer=torch.optim.SGD(model.parameters()), when=every(1))
    given: dict[str, Any] = {"source": source} | ({"checkpoints": save} if source == "checkpoint" else {})
    with pytest.raises(MismatchError) as refusal:  # noqa: PT012, at once, or once the step is saved
        export = HFExport(tmp_path / "hf", model=model, base_model=tmp_path / "base", when=every(1), **given)
        hooks = Hooks(save, export)
        hooks.step(1)
        hooks.close()
    if source == "live":
        hooks = Hooks(save)
        hooks.step(1)
        hooks.close()
    (command,) = [line for line in str(refusal.value).splitlines() if line.startswith("shardsmith ")]
    places = {"STEP": tmp_path / "ck" / "step-1", "BASE": tmp_path / "base", "DIRECTORY": tmp_path / "out"}
    assert main([*(str(places.get(word, word)) for word in shlex.split(command)[1:]), "--dtype", "original"]) == 0
    loaded, info = type(model).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] | info["unexpected_keys"] | info["mismatched_keys"]
    assert all(torch.equal(value, expected[name]) for name, value in loaded.state_dict().items())
