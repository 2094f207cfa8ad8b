"""Causes of a wrong start loss, planted into tiny trained models: each is found under its own code."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from shardsmith.diagnose import Diagnosis, Questions, diagnose
from shardsmith.diagnose.batches import read_batch
from shardsmith.diagnose.live_model import LiveModel
from shardsmith.diagnose.start_loss import cross_entropy, possible_causes
from tests.dcp_directories import save_sharded
from tests.diagnosed_models import FAMILIES, Specimen, config_of, make_tokenizer
from tests.planted_faults import PLANTED, Planted


def codes(diagnosis: Diagnosis) -> set[str]:
    return {finding.code for finding in diagnosis.faults}


@pytest.mark.parametrize(
    ("family", "planted"),
    [pytest.param(f, p, id=f"{f}: {p.cause}") for p in PLANTED for f in sorted(p.families)],
)
def test_a_fault_of_the_weights_is_found_under_its_own_code(
    family: str, planted: Planted, specimens: dict[str, Specimen], tmp_path: Path
) -> None:
    specimen = specimens[family]
    checkpoint = save_sharded(planted.plant(specimen.state), tmp_path / "planted", 3)
    assert codes(diagnose(checkpoint, specimen.base, Questions(level="structure"))) == set()
    found = diagnose(checkpoint, specimen.base, Questions(level="values"))
    assert codes(found) == {planted.code}
    assert planted.code in found.verdict


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_is_no_fault_and_is_told(
    family: str, dtype: torch.dtype, specimens: dict[str, Specimen], tmp_path: Path
) -> None:
    specimen = specimens[family]
    rounded = {name: tensor.to(dtype).float() for name, tensor in specimen.state.items()}
    found = diagnose(save_sharded(rounded, tmp_path / "c", 2), specimen.base, Questions(level="values"))
    assert codes(found) == set()
    assert "rounded-values" in {note.code for note in found.notes}


CONFIGS = {
    "rope-differs": {"rope_parameters": {"rope_theta": 10_000.0, "rope_type": "default"}},
    "norm-eps-differs": {"rms_norm_eps": 0.1},
    "config-differs": {"hidden_act": "tanh"},
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("code", CONFIGS)
def test_a_config_that_differs_is_found_and_its_loss_told(
    family: str, code: str, specimens: dict[str, Specimen], tmp_path: Path
) -> None:
    specimen = specimens[family]
    config_of(family, **CONFIGS[code]).save_pretrained(tmp_path / "trainer")
    found = look(specimen, tmp_path, config=tmp_path / "trainer", batch=specimen.batch)
    assert codes(found) == {code}
    assert "The weights were not looked at" in found.verdict
    facts = found.levels[0].facts
    assert facts[f"loss with the config of {tmp_path / 'trainer'}"] > facts["loss of the model"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("kind", "code"),
    [
        ("zero", "buffer-zero"),
        ("garbage", "buffer-differs"),
        ("rope_theta", "buffer-differs"),
        ("nan", "buffer-not-finite"),
    ],
)
def test_buffers_of_the_live_model_that_are_wrong_are_found(
    family: str, kind: str, code: str, specimens: dict[str, Specimen], tmp_path: Path
) -> None:
    specimen = specimens[family]
    wrong = {
        "zero": torch.zeros_like,
        "garbage": torch.rand_like,
        "nan": lambda buffer: buffer * torch.nan,
        "rope_theta": lambda buffer: 10_000.0 ** -(torch.arange(len(buffer)) / len(buffer)),
    }[kind]
    live = {f"_orig_mod.{name}": wrong(buffer) for name, buffer in specimen.buffers.items() if "original" not in name}
    save_file(live, tmp_path / "buffers.safetensors")
    assert codes(look(specimen, tmp_path, buffers=tmp_path / "buffers.safetensors")) == {code}


@pytest.mark.parametrize("family", FAMILIES)
def test_buffers_of_the_live_model_that_are_right_are_not_found(
    family: str, specimens: dict[str, Specimen], tmp_path: Path
) -> None:
    save_file({name: b.clone() for name, b in specimens[family].buffers.items()}, tmp_path / "buffers.safetensors")
    assert codes(look(specimens[family], tmp_path, buffers=tmp_path / "buffers.safetensors")) == set()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tokenizer_that_differs_is_found(family: str, specimens: dict[str, Specimen], tmp_path: Path) -> None:
    other = make_tokenizer(tmp_path / "tokenizer", shift=3)
    assert codes(look(specimens[family], tmp_path, tokenizer=other)) == {"tokenizer-differs"}
    same = make_tokenizer(tmp_path / "same")
    assert codes(look(specimens[family], tmp_path, tokenizer=same)) == set()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_reported_loss_tells_what_the_trainer_does(
    family: str, specimens: dict[str, Specimen], tmp_path: Path
) -> None:
    """Each loss is one that a trainer with this fault really has, computed here in its own way."""
    specimen = specimens[family]
    model = specimen.model()
    batch = read_batch(specimen.batch).tokens
    with torch.no_grad():
        logits = model(input_ids=batch).logits
        twice = torch.nn.functional.cross_entropy(logits[:, :-2].flatten(0, 1), batch[:, 2:].flatten())
        right = model(input_ids=batch, labels=batch).loss
        for buffer in model.buffers():
            buffer.zero_()
        zeroed = model(input_ids=batch, labels=batch).loss
        changed = specimen.model(**CONFIGS["rope-differs"])(input_ids=batch, labels=batch).loss
    losses = {
        "labels-shifted-twice": float(twice),
        "buffer-zero": float(zeroed),
        "rope-differs": float(changed),
        "nothing-loaded": math.log(logits.shape[-1]) + 0.03,
        "start-loss-unexplained": 123.0,
    }
    for code, loss in losses.items():
        found = look(specimen, tmp_path, batch=specimen.batch, reference_loss=loss)
        assert codes(found) == {code}
    assert codes(look(specimen, tmp_path, batch=specimen.batch, reference_loss=float(right))) == set()


@pytest.mark.parametrize("family", FAMILIES)
def test_packing_without_reset_is_told_from_the_loss(
    family: str, specimens: dict[str, Specimen], tmp_path: Path
) -> None:
    specimen = specimens[family]
    batch = read_batch(specimen.packed)
    with torch.no_grad():
        run_on = float(specimen.model()(input_ids=batch.tokens, labels=batch.tokens).loss)
        alone = torch.cat([specimen.model()(input_ids=part).logits for part in batch.tokens.split(12, 1)], 1)
    found = look(specimen, tmp_path, batch=specimen.packed, reference_loss=run_on)
    assert codes(found) == {"positions-not-reset"}
    right = cross_entropy(alone, batch.tokens)
    assert codes(look(specimen, tmp_path, batch=specimen.packed, reference_loss=right)) == set()


def test_an_auxiliary_loss_in_the_logged_one_is_told(specimens: dict[str, Specimen], tmp_path: Path) -> None:
    specimen = specimens["qwen3-moe"]
    batch = read_batch(specimen.batch).tokens
    with torch.no_grad():
        logged = float(specimen.model(output_router_logits=True)(input_ids=batch, labels=batch).loss)
    found = look(specimen, tmp_path, batch=specimen.batch, reference_loss=logged)
    assert codes(found) == {"auxiliary-loss-included"}


def test_without_the_trainers_batch_only_a_random_model_is_told(specimens: dict[str, Specimen], tmp_path: Path) -> None:
    specimen = specimens["olmo2"]
    causes = list(possible_causes(LiveModel.of_directory(specimen.base), read_batch(specimen.batch)))
    for cause in causes[:-1]:
        assert codes(look(specimen, tmp_path, reference_loss=cause.loss)) == set()


def look(specimen: Specimen, folder: Path, **questions: object) -> Diagnosis:
    """The model level on a good checkpoint."""
    checkpoint = folder / "good"
    if not checkpoint.exists():
        save_sharded(specimen.state, checkpoint, 2)
    return diagnose(checkpoint, specimen.base, Questions(level="model", **questions))
