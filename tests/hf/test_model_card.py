"""The model card of an export says where its weights come from, and its instructions load them."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import transformers
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


def run_program(directory: Path) -> dict[str, Any]:
    """What the card's program makes of the weights, and ("average ...") of their average."""
    (program,) = re.findall(r"```python\n(.*?)```", (directory / "README.md").read_text(), re.DOTALL)
    main_part, *average_part = program.replace("DIRECTORY", str(directory)).split("# or, ")
    names: dict[str, Any] = {}
    exec(main_part, names)
    made = dict(names)
    exec("# " + "".join(average_part), names)
    return made | {f"average {name}": value for name, value in names.items()}


def loaded_by(directory: Path) -> dict[str, Any]:
    return {path.stem: load_file(path) for path in directory.glob("*.safetensors")}


def test_the_program_in_the_card_loads_both_models(llama: Path) -> None:
    made, files = run_program(llama), loaded_by(llama)
    for name, stem in (("model", "model"), ("average model", "ema")):
        loaded = made[name].state_dict()
        assert all(torch.equal(loaded[key], value) for key, value in files[stem].items())


def test_it_loads_what_files_name_and_divide_otherwise_than_the_model(tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_local_experts": 2}
    config = transformers.MixtralConfig(vocab_size=32, num_attention_heads=2, num_key_value_heads=1, **sizes)
    model = transformers.MixtralForCausalLM(config)
    before = {name: value.bfloat16() for name, value in model.state_dict().items()}
    with torch.no_grad():
        ema = EMA(model, decay=0.5)
        for parameter in model.parameters():
            parameter.mul_(2)
    export = HFExport(tmp_path, model=model, ema=ema, when=every(1), max_shard_size="4kB")
    export.export(7)
    export.close()
    made = run_program(tmp_path / "step-7")
    for name, factor in (("model", 2), ("average model", 1)):
        assert all(torch.equal(value, before[key] * factor) for key, value in made[name].state_dict().items())


@pytest.mark.parametrize("shard_size", [None, "40B"])
def test_a_class_of_the_users_is_not_imported_from_a_library(tmp_path: Path, shard_size: str | None) -> None:
    model = Two(TwoConfig())
    directory = export_of(tmp_path / "hf", model, max_shard_size=shard_size)
    card = (directory / "README.md").read_text()
    assert "import Two" not in card
    assert "library_name" not in card
    assert "Two, which config.json names, is not a class of transformers" in card
    made = run_program(directory)
    assert all(torch.equal(made["state_dict"][name], value.bfloat16()) for name, value in model.state_dict().items())
    assert made["average average"].keys() == model.state_dict().keys()


class TwoConfig(transformers.PreTrainedConfig):
    model_type = "two"


class Two(transformers.PreTrainedModel):
    config_class = TwoConfig

    def __init__(self, config: TwoConfig) -> None:
        super().__init__(config)
        self.first = nn.Linear(3, 4)
        self.second = nn.Linear(4, 3)
        self.post_init()


CODE = """
import transformers
from torch import nn


class OwnConfig(transformers.PreTrainedConfig):
    model_type = "own-of-a-card"


class Own(transformers.PreTrainedModel):
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        self.first = nn.Linear(3, 4)
        self.post_init()
"""


def test_remote_code_is_asked_for_by_its_auto_class(tmp_path: Path) -> None:
    base = tmp_path / "own"
    base.mkdir()
    auto_map = {"AutoConfig": "own_code.OwnConfig", "AutoModelForSequenceClassification": "own_code.Own"}
    config = {"model_type": "own-of-a-card", "architectures": ["Own"], "auto_map": auto_map}
    (base / "config.json").write_text(json.dumps(config))
    (base / "own_code.py").write_text(CODE)
    model = nn.Module()
    model.first = nn.Linear(3, 4)
    directory = export_of(tmp_path / "hf", model, base_model=base)
    assert "trust_remote_code" in (directory / "README.md").read_text()
    tensors = run_program(directory)["model"].state_dict()
    assert all(torch.equal(tensors[name], value.bfloat16()) for name, value in model.state_dict().items())


def test_a_model_of_diffusers_is_loaded_by_its_class(tmp_path: Path) -> None:
    sizes = ("encoder_block_out_channels", "decoder_block_out_channels", "num_encoder_blocks", "num_decoder_blocks")
    model = diffusers.AutoencoderTiny(**dict.fromkeys(sizes, (8,)))
    expected = {name: value.bfloat16() for name, value in model.state_dict().items()}
    loaded = run_program(export_of(tmp_path / "hf", model))["model"].state_dict()
    assert loaded.keys() == expected.keys()
    changed = {name for name in expected if not torch.equal(loaded[name], expected[name])}
    assert not changed


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
    made = run_program(directory)
    assert torch.equal(made["state_dict"]["weight"], model.weight.bfloat16())


def test_to_hf_writes_the_same_card(llama: Path, tmp_path: Path) -> None:
    arguments = ["--checkpoint", str(llama), "--base-model", str(llama), "--output-dir", str(tmp_path / "out")]
    assert main(["to-hf", *arguments, "--models", "main", "--quiet"]) == 0
    lines = (tmp_path / "out" / "README.md").read_text().splitlines()
    record = read_json(tmp_path / "out" / "shardsmith.json")["models"]["main"]["tensors"]
    assert any(digest_of_model({name: one["digest"] for name, one in record.items()}) in line for line in lines)
