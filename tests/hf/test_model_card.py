"""The model card of an export says where its weights come from, and its instructions load them."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from torch import nn

from shardsmith import inspect_checkpoint
from shardsmith.cli import main
from shardsmith.hf.model_card import digest_of_model
from shardsmith.hooks import EMA, HFExport, every
from shardsmith.manifest.metadata import read_json
from shardsmith.tensors.digest import digest_tensor
from tests.trained_runs import build, make_base


def export_of(directory: Path, model: nn.Module, **options: Any) -> Path:
    with torch.no_grad():
        ema = EMA(model, decay=0.5)
        next(model.parameters()).add_(1.0)
    export = HFExport(directory, model=model, ema=ema, when=every(1), **options)
    export.export(7)
    export.close()
    return directory / "step-7"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("card")
    return export_of(place / "hf", build("llama"), base_model=make_base("llama", place / "tiny-llama"))


def test_the_hub_reads_the_front_matter(llama: Path) -> None:
    card = ModelCard.load(llama / "README.md")
    assert (card.data.base_model, card.data.library_name, card.data.tags) == (
        "tiny-llama",
        "transformers",
        ["shardsmith"],
    )


def test_the_program_in_the_card_loads_both_models(llama: Path) -> None:
    (program,) = re.findall(r"```python\n(.*?)```", (llama / "README.md").read_text(), re.DOTALL)
    main_part, average_part = program.replace("DIRECTORY", str(llama)).split("# or, ")
    names: dict[str, Any] = {}
    exec(main_part, names)
    loaded = names["model"].state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in load_file(llama / "model.safetensors").items())
    exec("# " + average_part, names)
    averaged = names["model"].state_dict()
    assert all(torch.equal(averaged[name], value) for name, value in load_file(llama / "ema.safetensors").items())


def test_the_digests_in_the_card_are_those_of_the_files(llama: Path) -> None:
    card = (llama / "README.md").read_text()
    for stem in ("model", "ema"):
        digests = {name: digest_tensor(value) for name, value in load_file(llama / f"{stem}.safetensors").items()}
        assert digest_of_model(digests) in card


def test_the_card_is_one_of_the_files_that_are_verified(llama: Path, tmp_path: Path) -> None:
    directory = shutil.copytree(llama, tmp_path / "step-7")
    assert not inspect_checkpoint(directory, verify=True).damage
    with (directory / "README.md").open("a") as card:
        card.write("More.\n")
    assert any("README.md" in line for line in inspect_checkpoint(directory, verify=True).damage)


def test_a_card_of_the_base_model_is_kept_and_one_of_an_export_is_not(llama: Path, tmp_path: Path) -> None:
    again = export_of(tmp_path / "again", build("llama"), base_model=llama)
    assert "base_model: step-7" in (again / "README.md").read_text()
    theirs = shutil.copytree(llama, tmp_path / "theirs")
    (theirs / "shardsmith.json").unlink()
    (theirs / "README.md").write_text("the author's own")
    kept = export_of(tmp_path / "kept", build("llama"), base_model=theirs)
    assert (kept / "README.md").read_text() == "the author's own"


def test_a_model_without_a_config_says_how_its_tensors_are_read(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    directory = export_of(tmp_path / "hf", model)
    (program,) = re.findall(r"```python\n(.*?)```", (directory / "README.md").read_text(), re.DOTALL)
    names: dict[str, Any] = {}
    exec(program.replace("DIRECTORY", str(directory)).split("# or, ")[0], names)
    assert torch.equal(names["state_dict"]["weight"], model.weight.bfloat16())


def test_to_hf_writes_the_same_card(llama: Path, tmp_path: Path) -> None:
    arguments = ["--checkpoint", str(llama), "--base-model", str(llama), "--output-dir", str(tmp_path / "out")]
    assert main(["to-hf", *arguments, "--models", "main", "--quiet"]) == 0
    lines = (tmp_path / "out" / "README.md").read_text().splitlines()
    record = read_json(tmp_path / "out" / "shardsmith.json")["models"]["main"]["tensors"]
    assert any(digest_of_model({name: one["digest"] for name, one in record.items()}) in line for line in lines)
