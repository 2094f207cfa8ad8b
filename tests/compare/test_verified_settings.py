"""Equal tensors under other settings are another model, and what the library computes says which settings those are."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
import transformers
from diffusers import UNet2DModel
from torch import Tensor

from shardsmith.cli import main
from shardsmith.compare.verification import verify
from shardsmith.hooks import Hooks, ShardedSave, every
from tests.export.test_live_settings import gpt2, llama, llava, unet
from tests.export.test_modules import base, to_hf

__all__ = ["base"]
pytestmark = pytest.mark.filterwarnings("ignore")
IDS = torch.arange(1, 9)[None]
BERT = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}


def bert(**more: Any) -> Any:
    return transformers.BertForMaskedLM(transformers.BertConfig(**BERT | more))


OTHER: dict[str, tuple[Any, dict[str, Any]]] = {
    "norm": (llama, {"rms_norm_eps": 1e-1}),
    "angles": (llama, {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10_000.0}}),
    "base of the angles": (llama, {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}),
    "activation": (llama, {"hidden_act": "relu"}),
    "heads": (llama, {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8}),
    "in a part": (llava, {"rms_norm_eps": 1e-1}),
    "switch": (gpt2, {"scale_attn_by_inverse_layer_idx": True}),
    "of BERT": (bert, {"layer_norm_eps": 1e-1}),
    "a component": (unet, {"act_fn": "gelu"}),
}
SAME: dict[str, tuple[Any, dict[str, Any]]] = {
    "dropout": (llama, {"attention_dropout": 0.5}),
    "of BERT": (bert, {"classifier_dropout": 0.5, "hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.2}),
    "generation": (llama, {"use_cache": False, "eos_token_id": 5}),
    "initialisation": (gpt2, {"initializer_range": 0.5, "resid_pdrop": 0.5}),
    "names of labels": (bert, {"id2label": {0: "no", 1: "yes"}}),
    "unknown to the library": (llama, {"written_by": "somebody"}),
    "dropout of a component": (unet, {"dropout": 0.5}),
}


def saved_pair(build: Any, changes: dict[str, Any], tmp_path: Path) -> tuple[Path, Path]:
    """Two directories with the same tensors, as the library saves them."""
    model, other = build(), build(**changes)
    other.load_state_dict(model.state_dict())
    model.save_pretrained(tmp_path / "a")
    other.save_pretrained(tmp_path / "b")
    return tmp_path / "a", tmp_path / "b"


def answer(directory: Path) -> Tensor:
    config = json.loads((directory / "config.json").read_text())
    if "_class_name" in config:
        component = UNet2DModel.from_pretrained(directory).eval()
        torch.manual_seed(0)
        return component(torch.randn(1, 3, 8, 8), 3).sample
    model = getattr(transformers, config["architectures"][0]).from_pretrained(directory).eval()
    return model(input_ids=IDS).logits


@torch.no_grad()
@pytest.mark.parametrize("case", OTHER)
def test_equal_tensors_that_compute_something_else_are_not_the_same_model(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build, changes = OTHER[case]
    a, b = saved_pair(build, changes, tmp_path)
    assert not torch.allclose(answer(a), answer(b), atol=1e-6)
    found = verify(a, b)
    assert not found.same
    assert not any(model.differences for model in found.models)
    assert main(["verify", str(a), str(b), "--html", str(tmp_path / "page.html")]) == 1
    said, page = capsys.readouterr().out, (tmp_path / "page.html").read_text()
    assert "not the same model: the tensors are the same, in every value" in said
    for name, (left, right) in found.settings.items():
        assert f"  {name}: settings (A {left}, B {right})" in said
        assert f"{name}: A says {left}, B {right}" in page.replace("&#x27;", "'")
    if build is not unet:
        # By logits it is what the library answers, or each side would be asked with the config of one.
        assert main(["verify", str(a), str(b), "--logits", "--tolerance", "1e-6"]) == 1
        assert main(["verify", str(b), str(a), "--logits", "--tolerance", "1e-6"]) == 1
        assert main(["verify", str(a), str(a), "--logits", "--tolerance", "1e-6"]) == 0
        capsys.readouterr()
    assert main(["verify", str(a), str(b), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["settings"].keys() == found.settings.keys()


@torch.no_grad()
@pytest.mark.parametrize("case", SAME)
def test_settings_that_compute_the_same_are_no_difference(case: str, tmp_path: Path) -> None:
    a, b = saved_pair(*SAME[case], tmp_path)
    assert torch.equal(answer(a), answer(b))
    assert json.loads((a / "config.json").read_text()) != json.loads((b / "config.json").read_text())
    assert verify(a, b).same


def test_a_quantisation_that_one_side_alone_states_is_a_difference(tmp_path: Path) -> None:
    """The library would quantise the one when it is loaded, and takes the other as it is."""
    a, b = saved_pair(llama, {}, tmp_path)
    assert verify(a, b).same
    content = json.loads((b / "config.json").read_text())
    content["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (b / "config.json").write_text(json.dumps(content))
    assert verify(a, b).settings == {"quantization_config": ("False", "True")}


def test_notes_that_change_nothing_may_differ(tmp_path: Path) -> None:
    for name, task in (("a", "sst2"), ("b", "mrpc")):
        torch.manual_seed(0)
        notes = {"finetuning_task": task, "task_specific_params": {"a": {"task": task}}, "tokenizer_class": task}
        bert(**notes, name_or_path=task).save_pretrained(tmp_path / name)
    assert verify(tmp_path / "a", tmp_path / "b").same


def test_defaults_that_only_one_side_writes_down_are_no_difference(tmp_path: Path) -> None:
    for build in (llama, bert, unet):
        model = build()
        model.save_pretrained(tmp_path / "a")
        short = json.loads((tmp_path / "a" / "config.json").read_text())
        shutil.copytree(tmp_path / "a", tmp_path / "b", dirs_exist_ok=True)
        for name in ("rms_norm_eps", "hidden_act", "layer_norm_eps", "act_fn", "norm_eps", "rope_parameters"):
            short.pop(name, None)
        (tmp_path / "b" / "config.json").write_text(json.dumps(short))
        assert verify(tmp_path / "a", tmp_path / "b").same
        shutil.rmtree(tmp_path / "b")
        shutil.rmtree(tmp_path / "a")


def test_without_the_library_a_default_is_not_taken_for_a_difference(tmp_path: Path) -> None:
    model = llama()
    model.save_pretrained(tmp_path / "base")
    step = of_step(model, tmp_path / "run")
    short = json.loads((tmp_path / "base" / "config.json").read_text())
    for name in ("rms_norm_eps", "rope_parameters", "hidden_act"):
        short.pop(name, None)
    (tmp_path / "base" / "config.json").write_text(json.dumps(short))
    hide = (
        "import sys; sys.modules['transformers'] = None; from shardsmith.cli import main; sys.exit(main(sys.argv[1:]))"
    )

    def code() -> int:
        command = [sys.executable, "-c", hide, "verify", step, tmp_path / "base"]
        return subprocess.run(command, check=False).returncode

    assert code() == 0
    (tmp_path / "base" / "config.json").write_text(json.dumps(short | {"hidden_size": 17}))
    assert code() == 1


def of_step(model: Any, directory: Path) -> Path:
    hooks = Hooks(ShardedSave(directory, model=model, when=every(1)))
    hooks.resume()
    hooks.step(1)
    hooks.close()
    return directory / "step-1"


def test_a_step_is_compared_by_the_settings_of_its_live_model(tmp_path: Path) -> None:
    model = llama()
    model.save_pretrained(tmp_path / "base")
    step = of_step(model, tmp_path / "run")
    assert verify(step, tmp_path / "base").same
    other = llama(rms_norm_eps=1e-2)
    other.load_state_dict(model.state_dict())
    changed = of_step(other, tmp_path / "other")
    assert verify(changed, tmp_path / "base").settings == {"rms_norm_eps": ("0.01", "1e-06")}
    assert verify(step, changed).settings == {"rms_norm_eps": ("1e-06", "0.01")}
    assert main(["verify", str(changed), str(tmp_path / "base"), "--logits"]) == 1
    assert main(["verify", str(step), str(tmp_path / "base"), "--logits"]) == 0
    # The export of each is the same as the step, since it says what the live model says.
    assert to_hf(changed, tmp_path / "base", tmp_path / "out", "--dtype", "original") == 0
    assert verify(changed, tmp_path / "out").same
    assert not verify(tmp_path / "out", tmp_path / "base").same


def test_settings_that_only_one_side_has_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = llama()
    model.save_pretrained(tmp_path / "base")
    dcp.save(model.state_dict(), checkpoint_id=tmp_path / "plain")
    assert main(["verify", str(tmp_path / "plain"), str(tmp_path / "base")]) == 0
    assert "not compared: the settings of B: A has no config.json and records no config" in capsys.readouterr().out


@pytest.mark.parametrize("change", ["pooling", "activation", "modules"])
def test_the_modules_of_a_sentence_encoder_have_settings_too(change: str, base: Path, tmp_path: Path) -> None:
    (base / "1_Pooling").mkdir()
    pooling = {"word_embedding_dimension": 8, "pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}
    (base / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    (base / "2_Dense" / "config.json").write_text(json.dumps({"activation_function": "torch.nn.Identity"}))
    listed = json.loads((base / "modules.json").read_text())
    for module, kind in zip(listed, ("Transformer", "Pooling", "Dense"), strict=True):
        module["type"] = f"sentence_transformers.models.{kind}"
    (base / "modules.json").write_text(json.dumps(listed))
    other = shutil.copytree(base, tmp_path / "other")
    assert verify(base, other).same
    if change == "pooling":
        (other / "1_Pooling" / "config.json").write_text(json.dumps(pooling | {"pooling_mode_cls_token": True}))
    elif change == "activation":
        (other / "2_Dense" / "config.json").write_text(json.dumps({"activation_function": "torch.nn.Tanh"}))
    else:
        listed.append({"idx": 3, "name": "3", "path": "3_Normalize", "type": "sentence_transformers.models.Normalize"})
        (other / "modules.json").write_text(json.dumps(listed))
    found = verify(base, other)
    assert not found.same
    assert len(found.settings) == 1
