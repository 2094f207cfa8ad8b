"""Checkpoints that to-dcp made, and what they have recorded about the model they were made of."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from shardsmith.cli import main
from shardsmith.diagnose import Questions, diagnose
from shardsmith.ground.layout import METADATA_FILE
from shardsmith.manifest.initial import BufferRecord, InitialRecord
from shardsmith.manifest.metadata import read_metadata
from tests.dcp_directories import save_sharded
from tests.diagnose.test_diagnose_planted import codes
from tests.diagnosed_models import FAMILIES, Specimen

OPTIONS = {
    "flat": [],
    "nested, bfloat16": ["--layout", "nested", "--dtype", "bfloat16"],
    "with a head": ["--include_future_predictor", "--future_predictor_head_type", "gated"],
    "nested, with a head": ["--layout", "nested", "--include_future_predictor"],
}


def convert(specimen: Specimen, folder: Path, *options: str) -> Path:
    checkpoint = folder / "step-0"
    command = ["to-dcp", "--model", str(specimen.base), "--checkpoint", str(checkpoint), "--quiet", *options]
    assert main(command) == 0
    return checkpoint


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("case", OPTIONS)
def test_what_to_dcp_makes_has_no_finding_on_any_level(
    family: str, case: str, specimens: dict[str, Specimen], tmp_path: Path
) -> None:
    specimen = specimens[family]
    checkpoint = convert(specimen, tmp_path, *OPTIONS[case])
    found = diagnose(checkpoint, specimen.base, Questions(batch=specimen.batch, tokenizer=specimen.base))
    assert (found.faults, found.unseen, found.exit_code) == ((), (), 0)
    assert ("extra-head" in {note.code for note in found.notes}) == ("head" in case)
    assert main(["verify", str(checkpoint), str(specimen.base), "--rounding"]) == (1 if "head" in case else 0)


def zero_buffers(record: InitialRecord) -> dict[str, Any]:
    zeros = {
        name: BufferRecord.of(torch.zeros(found.shape, dtype=getattr(torch, found.dtype)))
        for name, found in record.buffers.items()
    }
    return {"buffers": zeros}


def other_rope(record: InitialRecord) -> dict[str, Any]:
    assert record.config is not None
    return {"config": record.config | {"rope_parameters": {"rope_theta": 10_000.0, "rope_type": "default"}}}


def other_tokenizer(record: InitialRecord) -> dict[str, Any]:
    return {"tokenizer": dict.fromkeys(record.tokenizer, "0" * 32)}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("code", "change"),
    [("buffer-zero", zero_buffers), ("rope-differs", other_rope), ("tokenizer-differs", other_tokenizer)],
)
def test_what_was_recorded_is_compared_with_the_model(
    family: str,
    code: str,
    change: Callable[[InitialRecord], dict[str, Any]],
    specimens: dict[str, Specimen],
    tmp_path: Path,
) -> None:
    checkpoint = convert(specimens[family], tmp_path)
    metadata = read_metadata(checkpoint)
    assert metadata.initial is not None
    changed = dataclasses.replace(metadata.initial, **change(metadata.initial))
    (checkpoint / METADATA_FILE).write_bytes(dataclasses.replace(metadata, initial=changed).to_json())
    found = diagnose(checkpoint, specimens[family].base, Questions())
    assert codes(found) == {code}
    assert found.verdict.startswith("The weights are fine")
    assert "metadata.json" in found.faults[0].found


def test_a_tie_that_is_recorded_and_lost_is_found(specimens: dict[str, Specimen], tmp_path: Path) -> None:
    """metadata.json says that two names are one tensor, so that one of them is not read otherwise."""
    specimen = specimens["llama-tied"]
    metadata = read_metadata(convert(specimen, tmp_path))
    state = specimen.state | {"lm_head.weight": torch.randn(96, 64)}
    broken = save_sharded(state, tmp_path / "broken", 2)
    files = {"files": {}, "tied": {"lm_head.weight": "model.embed_tokens.weight"}}
    (broken / METADATA_FILE).write_bytes(dataclasses.replace(metadata, **files).to_json())
    assert codes(diagnose(broken, specimen.base, Questions(level="values"))) == {"tie-broken"}
