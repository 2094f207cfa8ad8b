"""A head for another number of labels than the base model's: the advice leads to an export that is right."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from shardsmith.cli import main
from shardsmith.hooks import HFExport, Hooks, at
from tests.families.tiny import all_families, make_tiny

FAMILIES = {family.kind: family for family in all_families()}
KINDS = (
    "BertForSequenceClassification",
    "ElectraForTokenClassification",
    "ViTForImageClassification",
    "ASTForAudioClassification",
    "LlamaForSequenceClassification",
)


@pytest.mark.parametrize("kind", KINDS)
def test_the_advice_for_another_number_of_labels_leads_to_a_right_export(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = make_tiny(FAMILIES[kind])
    base.save_pretrained(tmp_path / "base")
    config = copy.deepcopy(base.config)
    config.num_labels = base.config.num_labels + 5
    model = type(base)(config).to(base.dtype)
    save_file({n: t.clone() for n, t in model.state_dict().items()}, tmp_path / "trained.safetensors")
    given = ["--checkpoint_dir", tmp_path / "trained.safetensors", "--base_model_path", tmp_path / "base"]
    command = ["to-hf", *given, "--output_dir", tmp_path / "out", "--dtype", "original"]
    assert main(list(map(str, command))) == 2
    said = capsys.readouterr().err
    assert f"id2label: {config.num_labels} labels instead of {base.config.num_labels}" in said
    allowed = [word for word in said.split("--allow ", 1)[1].split() if word.startswith("'")]
    assert main([*map(str, command), "--allow", *(word.strip(".'") for word in allowed)]) == 0
    loaded, info = type(base).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] | info["unexpected_keys"] | info["mismatched_keys"]
    assert loaded.config.num_labels == config.num_labels
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in loaded.state_dict().items())


def timm_config(classes: int, classifier: object, labels: bool = False) -> dict[str, object]:
    """Return what timm 1.0.31 writes with ``save_for_hf`` for a model with so many classes, but for its images."""
    config: dict[str, object] = {"architecture": "test_resnet", "num_classes": classes, "num_features": 6}
    if labels:
        config["label_names"] = [f"kind {i}" for i in range(classes)]
        config["label_descriptions"] = {f"kind {i}": f"Kind {i}" for i in range(classes)}
    arguments = {"num_classes": classes, "in_chans": 3, "global_pool": "avg"}
    details = {"tag": "r160_in1k", "num_classes": classes, "first_conv": "conv1.0", "classifier": classifier}
    return {**config, "model_args": arguments, "pretrained_cfg": details}


def timm_model(classes: int, *heads: str) -> nn.Module:
    """A model with heads of such names, each for so many classes; as timm, it says nothing of a transformers config."""
    model = nn.Module()
    model.conv = nn.Linear(6, 6)
    for head in heads:
        *above, last = head.split(".")
        inner = model
        for name in above:
            inner.add_module(name, nn.Module())
            inner = inner.get_submodule(name)
        inner.add_module(last, nn.Linear(6, classes))
    return model


TIMM_CASES: dict[str, tuple[tuple[str, ...], object]] = {
    "one head": (("fc",), "fc"),
    "a head in a module": (("head.fc",), "head.fc"),
    "two heads": (("head", "head_dist"), ["head", "head_dist"]),
}


@pytest.mark.parametrize("with_weights", [True, False], ids=["base-weights", "config-only"])
@pytest.mark.parametrize("way", ["to-hf", "live"])
@pytest.mark.parametrize("case", TIMM_CASES)
def test_a_config_of_timm_numbers_the_classes_of_the_head(
    case: str, way: str, with_weights: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    heads, classifier = TIMM_CASES[case]
    base, out, model = tmp_path / "base", tmp_path / "out", timm_model(7, *heads)
    base.mkdir()
    (base / "config.json").write_text(json.dumps(timm_config(9, classifier, labels=True)))
    if with_weights:
        save_file(timm_model(9, *heads).state_dict(), base / "model.safetensors")
    if way == "live":
        export = HFExport(out, base_model=base, model=model, when=at(1), dtype="original")
        with Hooks(export) as hooks:
            hooks.step(1)
        out = out / "step-1"
    else:
        save_file(model.state_dict(), tmp_path / "trained.safetensors")
        given = ["--checkpoint", tmp_path / "trained.safetensors", "--base-model", base, "--output-dir", out]
        assert main(list(map(str, ["to-hf", *given, "--dtype", "original"]))) == 0
        said = "num_classes, model_args.num_classes, pretrained_cfg.num_classes: 7 instead of 9; without label_names"
        assert said in capsys.readouterr().out
    config = json.loads((out / "config.json").read_text())
    config.pop("dtype", None)
    assert config == timm_config(7, classifier)
    assert load_file(out / "model.safetensors").keys() == model.state_dict().keys()


def test_another_shape_than_that_of_more_classes_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, model = tmp_path / "base", timm_model(7, "fc")
    base.mkdir()
    (base / "config.json").write_text(json.dumps(timm_config(9, "fc")))
    other = {**timm_model(9, "fc").state_dict(), "fc.weight": torch.zeros(9, 5)}
    save_file(other, base / "model.safetensors")
    save_file(model.state_dict(), tmp_path / "trained.safetensors")
    given = ["--checkpoint", tmp_path / "trained.safetensors", "--base-model", base, "--output-dir", tmp_path / "out"]
    assert main(list(map(str, ["to-hf", *given]))) == 2
    assert "fc.weight: (7, 6) in the checkpoint, (9, 5) in the base model" in capsys.readouterr().err


def test_a_config_of_timm_in_its_older_form_is_numbered_too(tmp_path: Path) -> None:
    base, model = tmp_path / "base", timm_model(7, "fc")
    base.mkdir()
    (base / "config.json").write_text('{"architecture": "resnet18", "num_classes": 9, "classifier": "fc"}')
    save_file(model.state_dict(), tmp_path / "trained.safetensors")
    given = ["--checkpoint", tmp_path / "trained.safetensors", "--base-model", base, "--output-dir", tmp_path / "out"]
    assert main(list(map(str, ["to-hf", *given]))) == 0
    assert json.loads((tmp_path / "out/config.json").read_text())["num_classes"] == 7
