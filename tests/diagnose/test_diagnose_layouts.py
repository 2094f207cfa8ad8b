"""Checkpoints like BAGEL's that hold a tensor in another layout than the model, rightly or wrongly."""

from __future__ import annotations

import json
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from shardsmith import cli
from shardsmith.hf.layout_rules import ENTRY_POINTS, TRANSFORMS, LayoutRule
from tests import dcp_directories
from tests.bagel_base import PATCHES, as_conv, initial_weights, make_bagel_base

WEIGHTS = initial_weights()
LINEAR = WEIGHTS[PATCHES]
CONV = as_conv(LINEAR)
RESHAPED = CONV.reshape(LINEAR.shape)  # not permuted: the right shape


def trained(values: Tensor) -> Tensor:
    return values + 0.1 * values.std() * torch.randn(values.shape, generator=torch.Generator().manual_seed(1))


def save(directory: Path, patches: Tensor, **others: Tensor) -> Path:
    return dcp_directories.save({**WEIGHTS, PATCHES: patches, **others}, directory)


def diagnosed(checkpoint: Path, base: Path, capsys: pytest.CaptureFixture[str], *options: str) -> tuple[int, Any]:
    code = cli.main(["diagnose", "--checkpoint", str(checkpoint), "--model", str(base), "--json", *options])
    return code, json.loads(capsys.readouterr().out)


def codes(found: Any, kind: str) -> set[str]:
    return {finding["code"] for finding in found[kind]}


@pytest.mark.parametrize(("patches", "of_base"), [(LINEAR, LINEAR), (LINEAR, CONV), (CONV, LINEAR)])
def test_a_good_checkpoint_has_no_finding_in_either_layout(
    patches: Tensor, of_base: Tensor, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = make_bagel_base(tmp_path / "base", WEIGHTS | {PATCHES: of_base})
    checkpoint = save(tmp_path / "checkpoint", patches)
    code, found = diagnosed(checkpoint, base, capsys)
    assert (code, found["findings"], found["unseen"]) == (0, [], [])
    assert ("layout-converted" in codes(found, "notes")) == (patches.shape != of_base.shape)
    assert found["facts"]["values"]["main"]["tensors compared"] == len(WEIGHTS)
    (line,) = found["inapplicable"]
    assert line.startswith("logits: transformers has no class for the model_type 'bagel'")


@pytest.mark.parametrize("of_base", [LINEAR, CONV], ids=["linear", "convolution"])
@pytest.mark.parametrize("moved", [False, True], ids=["at the start", "trained"])
def test_a_reshape_without_a_permutation_is_found_by_value_under_its_own_code(
    moved: bool, of_base: Tensor, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = make_bagel_base(tmp_path / "base", WEIGHTS | {PATCHES: of_base})
    checkpoint = save(tmp_path / "checkpoint", trained(RESHAPED) if moved else RESHAPED)
    options = ("--level", "values", *(("--trained",) if moved else ()))
    code, found = diagnosed(checkpoint, base, capsys, *options)
    assert (code, codes(found, "findings")) == (1, {"patches-not-permuted"})
    assert found["findings"][0]["where"] == [PATCHES]


def test_who_asks_for_logits_that_nobody_can_work_out_is_told_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, checkpoint = make_bagel_base(tmp_path / "base"), save(tmp_path / "checkpoint", LINEAR)
    for options in (("--level", "model"), ("--reference_loss", "3")):
        code, found = diagnosed(checkpoint, base, capsys, *options)
        assert (code, found["inapplicable"], len(found["unseen"])) == (2, [], 1)


def test_rules_of_ones_own_serve_diagnose_and_verify(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = make_bagel_base(tmp_path / "base")
    turned = save(tmp_path / "turned", LINEAR, **{"llm2vae.weight": WEIGHTS["llm2vae.weight"].t().contiguous()})
    plain = save(tmp_path / "plain", LINEAR)
    rules = tmp_path / "rules.toml"
    rules.write_text('[[rule]]\npattern = "llm2vae.weight"\ntransform = "transpose"\n')
    code, found = diagnosed(turned, base, capsys, "--level", "structure")
    assert (code, codes(found, "findings")) == (1, {"shape-differs"})
    assert diagnosed(turned, base, capsys, "--rules", str(rules))[0] == 0
    assert cli.main(["verify", str(turned), str(plain)]) == 1
    for how in ((), ("--digests",)):
        assert cli.main(["verify", str(turned), str(plain), "--rules", str(rules), *how]) == 0
    assert "llm2vae.weight brought into one layout by transpose" in capsys.readouterr().out


def transposed() -> list[LayoutRule]:
    """What a package would offer."""
    return [LayoutRule("llm2vae.weight", "transpose", TRANSFORMS["transpose"])]


def test_rules_that_a_package_offers_need_not_be_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    point = EntryPoint("turned", "tests.diagnose.test_diagnose_layouts:transposed", ENTRY_POINTS)
    offered = {ENTRY_POINTS: [point]}
    monkeypatch.setattr("shardsmith.hf.layout_rules.entry_points", lambda group: offered[group])
    turned = save(tmp_path / "turned", LINEAR, **{"llm2vae.weight": WEIGHTS["llm2vae.weight"].t().contiguous()})
    assert cli.main(["verify", str(turned), str(save(tmp_path / "plain", LINEAR))]) == 0


@pytest.mark.parametrize(("patches", "code"), [(CONV, 0), (RESHAPED, 1)])
def test_verify_compares_patch_embeddings_in_one_layout(patches: Tensor, code: int, tmp_path: Path) -> None:
    checkpoint, plain = save(tmp_path / "checkpoint", patches), save(tmp_path / "plain", LINEAR)
    for how in ((), ("--digests",)):
        assert cli.main(["verify", str(checkpoint), str(plain), *how]) == code
