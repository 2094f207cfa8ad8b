"""Classes that tie whatever their config says, and load both tensors from files that have both: T5 with a head."""

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
from shardsmith.hooks import HFExport, Hooks, every
from tests.families.tiny import all_families, make_tiny

pytestmark = pytest.mark.filterwarnings("ignore")
FAMILIES = {family.kind: family for family in all_families()}
KINDS = ("T5ForConditionalGeneration", "MT5ForConditionalGeneration", "UMT5ForConditionalGeneration")
TIE, HEAD = "tie_word_embeddings", "lm_head.weight"


def set_tie(directory: Path, value: bool | None) -> None:
    config = json.loads((directory / "config.json").read_text())
    config.pop(TIE, None)
    (directory / "config.json").write_text(json.dumps(config | ({} if value is None else {TIE: value})))


@pytest.fixture(params=KINDS)
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """As the Hub has flan-t5, t5-v1_1 and mt5 in ``base``: with a head of its own. Trained further in ``ck``."""
    made, base = make_tiny(FAMILIES[request.param]), tmp_path / "base"
    made.save_pretrained(base)
    tensors = load_file(base / "model.safetensors")
    head = {HEAD: torch.randn_like(tensors["shared.weight"])}
    save_file(tensors | head, base / "model.safetensors", metadata={"format": "pt"})
    set_tie(base, value=False)
    loaded = type(made).from_pretrained(base)
    with torch.no_grad():
        for parameter in loaded.parameters():
            parameter.add_(0.01)
    assert not torch.equal(loaded.state_dict()[HEAD], loaded.state_dict()["shared.weight"])
    dcp.save(dict(loaded.state_dict()), checkpoint_id=tmp_path / "ck", no_dist=True)
    return loaded


def to_hf(tmp_path: Path, base: Path) -> int:
    given = ["--checkpoint", tmp_path / "ck", "--base-model", base, "--output-dir", tmp_path / "out"]
    return main(list(map(str, ["to-hf", *given, "--dtype", "original"])))


def assert_loads(directory: Path, model: Any) -> None:
    loaded, info = type(model).from_pretrained(directory, output_loading_info=True)
    assert not info["missing_keys"] | info["unexpected_keys"] | info["mismatched_keys"]
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in loaded.state_dict().items())


@pytest.mark.parametrize("says", [False, None], ids=["the config says untied", "the base has both"])
def test_a_base_with_a_head_of_its_own(says: bool | None, model: Any, tmp_path: Path) -> None:
    set_tie(tmp_path / "base", says)
    assert to_hf(tmp_path, tmp_path / "base") == 0
    assert_loads(tmp_path / "out", model)
    assert json.loads((tmp_path / "out" / "config.json").read_text()).get(TIE) is says
    assert main(["verify", str(tmp_path / "ck"), str(tmp_path / "out")]) == 0
    assert main(["diagnose", "--checkpoint", str(tmp_path / "ck"), "--base-model", str(tmp_path / "out")]) == 0


def test_the_config_alone_must_say_so_and_the_advice_leads_there(
    model: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(tmp_path / "base" / "config.json", bare)
    set_tie(bare, value=True)
    assert to_hf(tmp_path, bare) == 2
    assert f"correct {TIE} there" in capsys.readouterr().err
    set_tie(bare, value=False)
    assert to_hf(tmp_path, bare) == 0
    assert_loads(tmp_path / "out", model)


@pytest.mark.parametrize("has_base", [True, False])
def test_the_live_export(has_base: bool, model: Any, tmp_path: Path) -> None:
    base = tmp_path / "base" if has_base else None
    hooks = Hooks(HFExport(tmp_path / "live", model=model, base_model=base, when=every(1), dtype="original"))
    hooks.step(1)
    hooks.close()
    assert_loads(tmp_path / "live" / "step-1", model)
