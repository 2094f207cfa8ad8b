"""Classes that tie whatever their config says, or more than a head by it, and load both from files that have both."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file

from shardsmith.cli import main
from shardsmith.export.load_check import first_tensor
from shardsmith.export.probe_inputs import made_up_inputs
from tests.families.tiny import all_families, make_tiny
from tests.hf.test_directory_check import export_live

pytestmark = pytest.mark.filterwarnings("ignore")
FAMILIES = {family.kind: family for family in all_families()}
KINDS = ("T5ForConditionalGeneration", "MT5ForConditionalGeneration", "UMT5ForConditionalGeneration")
TIE, SCALE, HEAD = "tie_word_embeddings", "scale_decoder_outputs", "lm_head.weight"


def set_entries(directory: Path, values: dict[str, bool | None]) -> None:
    """None takes an entry out."""
    config = json.loads((directory / "config.json").read_text()) | values
    left = {key: value for key, value in config.items() if key not in values or value is not None}
    (directory / "config.json").write_text(json.dumps(left))


@pytest.fixture(params=KINDS)
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """As the Hub has flan-t5, t5-v1_1 and mt5 in ``base``: with a head of its own. Trained further in ``ck``."""
    made, base = make_tiny(FAMILIES[request.param]), tmp_path / "base"
    made.save_pretrained(base)
    tensors = load_file(base / "model.safetensors")
    head = {HEAD: torch.randn_like(tensors["shared.weight"])}
    save_file(tensors | head, base / "model.safetensors", metadata={"format": "pt"})
    set_entries(base, {TIE: False, SCALE: None})
    loaded = type(made).from_pretrained(base)
    with torch.no_grad():
        for parameter in loaded.parameters():
            parameter.add_(0.01)
    assert not torch.equal(loaded.state_dict()[HEAD], loaded.state_dict()["shared.weight"])
    dcp.save(dict(loaded.state_dict()), checkpoint_id=tmp_path / "ck", no_dist=True)
    return loaded


def to_hf(tmp_path: Path, base: Path, output: str = "out", *options: str) -> int:
    given = ["--checkpoint", tmp_path / "ck", "--base-model", base, "--output-dir", tmp_path / output]
    return main([*map(str, ["to-hf", *given, "--dtype", "original"]), *options])


def assert_loads(directory: Path, model: Any) -> None:
    """As the model: every tensor, and what it computes."""
    loaded, info = type(model).from_pretrained(directory, output_loading_info=True)
    assert not info["missing_keys"] | info["unexpected_keys"] | info["mismatched_keys"]
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in loaded.state_dict().items())
    inputs = made_up_inputs(model)
    with torch.no_grad():
        found, expected = (first_tensor(one.eval()(**inputs)) for one in (loaded, model))
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("says", [False, None], ids=["the config says untied", "the base has both"])
def test_a_base_with_a_head_of_its_own(says: bool | None, model: Any, tmp_path: Path) -> None:
    set_entries(tmp_path / "base", {TIE: says})
    model.config.scale_decoder_outputs = says is not False
    assert to_hf(tmp_path, tmp_path / "base") == 0
    assert_loads(tmp_path / "out", model)
    assert json.loads((tmp_path / "out" / "config.json").read_text()).get(TIE) is says
    assert main(["verify", str(tmp_path / "ck"), str(tmp_path / "out")]) == 0
    assert main(["diagnose", "--checkpoint", str(tmp_path / "ck"), "--base-model", str(tmp_path / "out")]) == 0


@pytest.mark.parametrize("scaled", [True, False])
def test_the_config_alone_must_say_what_the_class_takes_from_the_tie(
    scaled: bool, model: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """T5 takes from it whether the outputs of its decoder are scaled, unless the config says that as well."""
    model.config.scale_decoder_outputs = scaled
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(tmp_path / "base" / "config.json", bare)
    set_entries(bare, {TIE: True, SCALE: None})
    takes_it = hasattr(type(model).config_class(), SCALE)
    assert to_hf(tmp_path, bare) == (2 if takes_it else 0)
    if takes_it:
        assert f"correct {TIE}, {SCALE} there" in capsys.readouterr().err
        set_entries(bare, {TIE: False, SCALE: True} if scaled else {TIE: False})
        assert to_hf(tmp_path, bare) == 0
    assert_loads(tmp_path / "out", model)
    assert json.loads((tmp_path / "out" / "config.json").read_text())[TIE] is False
    set_entries(bare, {TIE: True, SCALE: scaled})  # as transformers 5 saves it
    assert to_hf(tmp_path, bare, "again") == 0
    assert_loads(tmp_path / "again", model)


@pytest.mark.parametrize("has_base", [True, False])
def test_the_live_export(has_base: bool, model: Any, tmp_path: Path) -> None:
    assert_loads(export_live(model, tmp_path / "base" if has_base else None, tmp_path / "live"), model)


@pytest.mark.parametrize(
    "kind", ["BertForMaskedLM", "BartForConditionalGeneration", "SwitchTransformersForConditionalGeneration"]
)
def test_a_class_that_ties_more_than_the_head_keeps_the_tie_and_takes_both(kind: str, tmp_path: Path) -> None:
    """BERT ties a bias by the same entry, BART the embeddings of encoder and decoder: untied, they would be missing."""
    model = make_tiny(FAMILIES[kind])
    model.save_pretrained(tmp_path / "tied")
    head = model.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight.detach() + 0.1 * torch.randn_like(head.weight))
    model.save_pretrained(tmp_path / "base")
    (tmp_path / "bare").mkdir()
    shutil.copy(tmp_path / "base" / "config.json", tmp_path / "bare")
    dcp.save(dict(model.state_dict()), checkpoint_id=tmp_path / "ck", no_dist=True)
    for base in ("base", "bare"):
        assert to_hf(tmp_path, tmp_path / base, f"from-{base}") == 0
        assert_loads(tmp_path / f"from-{base}", model)
    for base in ("base", "tied", None):
        directory = export_live(model, tmp_path / base if base else None, tmp_path / f"live-{base}")
        assert_loads(directory, model)


def test_a_head_that_cannot_be_said_to_be_untied_is_written_beside_the_tie(tmp_path: Path) -> None:
    # T5Gemma2 ties decoder and encoder by the same entry as the head; that of its decoder is looked at by nobody.
    model = make_tiny(FAMILIES["T5Gemma2ForConditionalGeneration"])
    model.save_pretrained(tmp_path / "base")
    state = dict(model.state_dict())
    state["lm_head.out_proj.weight"] = torch.randn_like(state["lm_head.out_proj.weight"])
    dcp.save(state, checkpoint_id=tmp_path / "ck", no_dist=True)
    assert to_hf(tmp_path, tmp_path / "base", "out", "--allow", "lm_head.out_proj.weight") == 0
    (tmp_path / "base" / "model.safetensors").unlink()
    assert to_hf(tmp_path, tmp_path / "base", "by-config") == 0
    for output in ("out", "by-config"):
        loaded, info = type(model).from_pretrained(tmp_path / output, output_loading_info=True)
        assert not info["missing_keys"] | info["unexpected_keys"] | info["mismatched_keys"]
        assert all(torch.equal(value, state[name]) for name, value in loaded.state_dict().items())
