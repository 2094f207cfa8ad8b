"""Options of the hooks, as objects and as keywords: the same values, the same files, one way at a time."""

from __future__ import annotations

import inspect
from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import torch
from torch import nn

import shardsmith.hooks
from shardsmith.errors import UsageError
from shardsmith.hooks import (
    ExportFiles,
    ExportVerification,
    ExportWeights,
    ExportWriting,
    HFExport,
    SaveWeights,
    SaveWriting,
    ShardedSave,
    at,
)
from shardsmith.hooks.options import ExportOptions, SaveOptions, merge
from shardsmith.manifest.metadata import read_metadata

EXPORT = {"files": ExportFiles, "weights": ExportWeights, "writing": ExportWriting, "verification": ExportVerification}
MODEL = nn.Linear(2, 2)


def hints(*kinds: type) -> dict[str, Any]:
    return {name: hint for kind in kinds for name, hint in get_type_hints(kind, include_extras=True).items()}


def test_every_field_is_also_a_keyword_of_the_same_type() -> None:
    assert hints(ExportOptions) == hints(*EXPORT.values())
    assert hints(SaveOptions) == hints(SaveWriting) | hints(SaveWeights)
    assert len(hints(*EXPORT.values())) == sum(len(fields(kind)) for kind in EXPORT.values())  # no name in two of them


def test_objects_and_keywords_have_the_same_values_in_the_end() -> None:
    given: dict[str, Any] = {"on_error": "warn", "timeout_secs": 5, "adapters": "merged"}
    assert merge("HFExport", "writing", ExportWriting, None, given) == ExportWriting(on_error="warn", timeout_secs=5.0)
    assert merge("HFExport", "weights", ExportWeights, None, given) == ExportWeights(adapters="merged")
    assert merge("HFExport", "files", ExportFiles, None, given) == ExportFiles()


@pytest.mark.parametrize(
    ("argument", "name"), [(a, field.name) for a, kind in EXPORT.items() for field in fields(kind)]
)
def test_an_option_given_both_ways_is_refused_by_name(argument: str, name: str, tmp_path: Path) -> None:
    default = {field.name: field.default for field in fields(EXPORT[argument])}[name]
    given: dict[str, Any] = {argument: EXPORT[argument](), name: default}
    with pytest.raises(
        UsageError, match=f"{name}= given beside {argument}=; write {argument}={EXPORT[argument].__name__}"
    ):
        HFExport(tmp_path / "hf", model=MODEL, when=at(1), **given)
    assert not (tmp_path / "hf").exists()


def test_objects_are_checked_as_the_keywords_are() -> None:
    with pytest.raises(UsageError, match="ExportWriting: 2 arguments cannot be used") as caught:
        ExportWriting(write_mode="slice", timeout_secs=0)  # type: ignore[arg-type]
    assert 'did you mean "slices"?' in str(caught.value)
    with pytest.raises(TypeError, match="unexpected keyword argument 'write_mod'; did you mean write_mode"):
        ExportWriting(write_mod="files")  # type: ignore[call-arg]
    with pytest.raises(UsageError, match="writing='files': an ExportWriting or None is expected"):
        HFExport("hf", model=MODEL, when=at(1), writing="files")  # type: ignore[arg-type]


def test_an_export_is_the_same_whichever_way_its_options_are_given(tmp_path: Path) -> None:
    options: dict[str, Any] = {"max_shard_size": 32, "names": "identity", "ema_as": "directory", "write_mode": "files"}
    note = tmp_path / "note.txt"
    note.write_text("note")
    model = nn.Linear(4, 4)
    flat = HFExport(tmp_path / "flat", model=model, when=at(1), extra_files={"NOTE": note}, **options)
    objects = HFExport(
        tmp_path / "objects",
        model=model,
        when=at(1),
        files=ExportFiles(extra_files={"NOTE": note}),
        weights=ExportWeights(max_shard_size=32, names="identity", ema_as="directory"),
        writing=ExportWriting(write_mode="files"),
    )
    for export in (flat, objects):
        export.export(1)
        export.close()
    first, second = (
        {path.name: path.read_bytes() for path in (tmp_path / name / "step-1").iterdir() if path.suffix != ".json"}
        for name in ("flat", "objects")
    )
    assert first == second
    assert {"NOTE", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"} <= first.keys()


def test_a_save_takes_its_options_as_an_object(tmp_path: Path) -> None:
    optimizer = torch.optim.SGD(MODEL.parameters(), lr=0.1)
    writing = SaveWriting(async_mode="disabled", layout="nested")
    save = ShardedSave(tmp_path, model=MODEL, when=at(1), optimizer=optimizer, writing=writing)
    save.save(1)
    save.close()
    assert {name.partition(".")[0] for name in read_metadata(tmp_path / "step-1").tensors} >= {"model"}
    with pytest.raises(UsageError, match="layout= and timeout_secs= given beside writing="):
        ShardedSave(tmp_path, model=MODEL, when=at(1), writing=writing, layout="flat", timeout_secs=5.0)


def test_no_constructor_takes_more_than_12_arguments() -> None:
    for name in shardsmith.hooks.__all__:
        kind = getattr(shardsmith.hooks, name)
        if inspect.isclass(kind):
            assert len(inspect.signature(kind).parameters) <= 12, name
