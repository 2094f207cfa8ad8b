"""A sentence encoder with a trained layer after its pooling: the layer goes where its library looks for it.

The layout is that of ``SentenceTransformer.save``, with whose files exports were compared bit for bit by hand.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from shardsmith.cli import main
from shardsmith.compare.verification import verify
from shardsmith.diagnose import Questions, diagnose
from shardsmith.errors import CheckpointError, MismatchError
from shardsmith.hooks import HFExport, every
from tests.dcp_directories import save
from tests.families.tiny import all_families, make_tiny

ENCODER = next(family for family in all_families() if family.kind == "BertModel")
DENSE = "2_Dense/model.safetensors"


class Inner(nn.Module):
    """The first module, which holds the transformer."""

    def __init__(self, auto_model: nn.Module) -> None:
        super().__init__()
        self.auto_model = auto_model


class Dense(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 4)


def encoder() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(Inner(make_tiny(ENCODER)), nn.Identity(), Dense())


@pytest.fixture
def base(tmp_path: Path) -> Path:
    directory, model = tmp_path / "base", encoder()
    transformer: Any = model[0].auto_model
    transformer.save_pretrained(directory)
    folders = {"0": "", "1": "1_Pooling", "2": "2_Dense"}
    listed = [{"idx": int(name), "name": name, "path": path, "type": "..."} for name, path in folders.items()]
    (directory / "modules.json").write_text(json.dumps(listed))
    (directory / "2_Dense").mkdir()
    save_file(model[2].state_dict(), directory / DENSE)
    (directory / "2_Dense" / "config.json").write_text("{}")
    return directory


def trained(seed: int = 1) -> dict[str, Tensor]:
    parameters = dict(encoder().named_parameters())
    torch.manual_seed(seed)
    return {name: torch.randn_like(value) for name, value in parameters.items()}


def to_hf(checkpoint: Path, base: Path, output: Path, *options: str) -> int:
    paths = ["--checkpoint", str(checkpoint), "--base-model", str(base), "--output-dir", str(output)]
    return main(["to-hf", *paths, *options])


def part(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, wanted[name]) for name, value in found.items()) and found.keys() <= wanted.keys()


@pytest.mark.parametrize("head", ["", "module.", "model._orig_mod."])
def test_a_trained_module_is_written_into_its_folder(head: str, base: Path, tmp_path: Path) -> None:
    state, average = trained(), trained(2)
    models = {"model": state, "ema_model": average}
    save({key: {head + n: v for n, v in values.items()} for key, values in models.items()}, tmp_path / "ck")
    assert to_hf(tmp_path / "ck", base, tmp_path / "out", "--dtype", "original", "--ema-as", "directory") == 0
    for output, wanted in ((tmp_path / "out", state), (tmp_path / "out-ema", average)):
        assert load_file(output / DENSE).keys() == {"linear.weight", "linear.bias"}
        assert same(load_file(output / DENSE), part(wanted, "2."))
        assert same(load_file(output / "model.safetensors"), part(wanted, "0.auto_model."))
        assert (output / "2_Dense" / "config.json").read_text() == "{}"
        assert main(["verify", str(output)]) == 0
    for how in ([], ["--digests"]):
        assert main(["verify", str(tmp_path / "ck"), str(tmp_path / "out"), "--models", "main", *how]) == 0


def test_an_average_beside_the_model_has_its_own_module_beside_it(base: Path, tmp_path: Path) -> None:
    state, average = trained(), trained(2)
    save({"model": state, "ema_model": average}, tmp_path / "ck")
    assert to_hf(tmp_path / "ck", base, tmp_path / "out") == 0
    for name, values in (("model", state), ("ema", average)):
        found = load_file(tmp_path / "out" / "2_Dense" / f"{name}.safetensors")
        assert same(found, {n: value.bfloat16() for n, value in part(values, "2.").items()})
    assert main(["verify", str(tmp_path / "ck"), str(tmp_path / "out"), "--rounding"]) == 0
    (tmp_path / "out" / "2_Dense" / "ema.safetensors").write_bytes((tmp_path / "out" / DENSE).read_bytes())
    assert main(["verify", str(tmp_path / "ck"), str(tmp_path / "out"), "--rounding"]) == 1


def test_verify_compares_the_modules_of_two_directories(base: Path, tmp_path: Path, capsys: Any) -> None:
    save(trained(), tmp_path / "ck")
    assert to_hf(tmp_path / "ck", base, tmp_path / "out", "--dtype", "original") == 0
    other = shutil.copytree(tmp_path / "out", tmp_path / "other")
    assert main(["verify", str(tmp_path / "out"), str(other)]) == 0
    (other / DENSE).write_bytes((base / DENSE).read_bytes())
    capsys.readouterr()
    assert main(["verify", str(tmp_path / "out"), str(other)]) == 1
    assert "linear.weight" in capsys.readouterr().out


def test_verify_finds_a_module_that_a_directory_lists_and_does_not_have(base: Path, tmp_path: Path) -> None:
    other = shutil.copytree(base, tmp_path / "other")
    assert main(["verify", str(other), str(base)]) == 0
    (other / DENSE).unlink()
    assert main(["verify", str(other), str(base)]) == 1
    assert main(["verify", str(base), str(other)]) == 1


@pytest.mark.parametrize("head", ["", "module.", "model._orig_mod."])
def test_the_base_models_own_module_is_named_where_the_trained_one_is_dropped(
    head: str, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save({"model": {head + name: value for name, value in trained().items()}}, tmp_path / "ck")
    assert to_hf(tmp_path / "ck", base, tmp_path / "out", "--drop", "2.*", "--json") == 0
    (written,) = json.loads(capsys.readouterr().out)["directories"]
    assert written["old_weights"] == [DENSE]
    assert (tmp_path / "out" / DENSE).read_bytes() == (base / DENSE).read_bytes()


@pytest.mark.parametrize("head", ["", "module."])
def test_a_checkpoint_of_the_whole_without_a_module_is_refused_until_that_is_allowed(
    head: str, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = {head + name: value for name, value in trained().items() if not name.startswith("2.")}
    save({"model": state}, tmp_path / "ck")
    assert to_hf(tmp_path / "ck", base, tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert "2 tensors of 2_Dense are not as in the base model" in error
    assert "2.linear.weight: in the base model, not in the checkpoint" in error
    assert not (tmp_path / "out").exists()
    cure = shlex.split(error[error.index("--allow") :].splitlines()[0])
    assert to_hf(tmp_path / "ck", base, tmp_path / "out", "--dtype", "original", *cure) == 0
    assert f"{DENSE} is the base model's own" in capsys.readouterr().out.replace("\n", "")
    assert (tmp_path / "out" / DENSE).read_bytes() == (base / DENSE).read_bytes()
    assert main(["verify", str(tmp_path / "ck"), str(tmp_path / "out")]) == 1
    assert "linear.weight" in capsys.readouterr().out


@pytest.mark.parametrize("head", ["", "module.", "auto_model."])
def test_a_checkpoint_of_the_bare_transformer_keeps_the_base_models_modules(
    head: str, base: Path, tmp_path: Path
) -> None:
    state = part(trained(), "0.auto_model.")
    save({"model": {head + name: value for name, value in state.items()}}, tmp_path / "ck")
    assert to_hf(tmp_path / "ck", base, tmp_path / "out", "--dtype", "original") == 0
    assert (tmp_path / "out" / DENSE).read_bytes() == (base / DENSE).read_bytes()
    assert main(["verify", str(tmp_path / "ck"), str(tmp_path / "out")]) == 0


def test_files_are_closed_where_a_module_cannot_be_read(base: Path, tmp_path: Path) -> None:
    state = {name: value.detach() for name, value in encoder().named_parameters()}
    save(state, tmp_path / "ck")
    broken = shutil.copytree(base, tmp_path / "broken")
    (broken / DENSE).write_bytes((base / DENSE).read_bytes()[:-1])
    questions, before = Questions(level="structure"), os.listdir("/proc/self/fd")
    # While the errors hold what was open when they were raised.
    with pytest.raises(CheckpointError, match="2_Dense") as compared:
        verify(base, broken)
    assert os.listdir("/proc/self/fd") == before, compared.tb
    with pytest.raises(CheckpointError, match="2_Dense") as diagnosed:
        diagnose(tmp_path / "ck", broken, questions)
    assert os.listdir("/proc/self/fd") == before, diagnosed.tb


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda held: held.pop("linear.bias"), "missing-tensors"),
        (lambda held: held.update({"linear.more": torch.ones(3)}), "extra-tensors"),
        (lambda held: held.update({"linear.bias": torch.ones(5)}), "shape-differs"),
        (lambda held: held["linear.weight"].mul_(2), "values-scaled"),
        (lambda held: held["linear.weight"][0].fill_(torch.nan), "not-finite"),
    ],
)
def test_diagnose_finds_and_names_what_is_wrong_with_a_module_of_a_directory(
    change: Callable[[dict[str, Tensor]], Any], code: str, base: Path, tmp_path: Path
) -> None:
    other, held = shutil.copytree(base, tmp_path / "other"), load_file(base / DENSE)
    assert not diagnose(other, base, Questions(level="values")).faults
    change(held)
    save_file(held, other / DENSE)
    (finding,) = diagnose(other, base, Questions(level="values")).faults
    assert finding.code == code
    assert all(name.startswith("2.linear.") for name in finding.where)


def test_a_directory_without_a_module_of_the_base_model_is_found(base: Path, tmp_path: Path) -> None:
    lost, dropped, bare = (shutil.copytree(base, tmp_path / name) for name in ("lost", "dropped", "bare"))
    (lost / DENSE).unlink()
    for other in (dropped, bare):
        shutil.rmtree(other / "2_Dense")
    (bare / "modules.json").unlink()
    (dropped / "modules.json").write_text(json.dumps(json.loads((base / "modules.json").read_text())[:2]))
    for other in (lost, dropped):  # the second computes something else by its own list, too
        (finding,) = diagnose(other, base, Questions(level="structure")).faults
        assert (finding.code, set(finding.where)) == ("missing-tensors", {"2.linear.weight", "2.linear.bias"})
        (finding,) = diagnose(base, dropped, Questions(level="structure")).faults
        assert finding.code == "extra-tensors"
        assert main(["verify", str(other), str(base)]) == main(["verify", str(base), str(other)]) == 1
    found = diagnose(bare, base, Questions(level="values"))
    assert not found.faults
    assert {note.code: note.where for note in found.notes} == {"modules-not-there": ("2_Dense",)}


def test_the_tensors_of_modules_count_in_the_verdict(base: Path, tmp_path: Path) -> None:
    tensors = len(load_file(base / "model.safetensors")) + 2
    save({name: value.detach() for name, value in encoder().named_parameters()}, tmp_path / "ck")
    for checkpoint in (base, tmp_path / "ck"):
        found = diagnose(checkpoint, base, Questions(level="values"))
        assert f"{tensors} of {tensors} tensors are the model's, bit for bit" in found.verdict
        assert found.levels[0].facts["main"]["tensors in the model"] == tensors


def test_the_trained_module_of_an_average_is_no_fault(base: Path, tmp_path: Path) -> None:
    state = {name: value.detach() for name, value in encoder().named_parameters()}
    average = {name: value + torch.randn_like(value) / 1000 for name, value in state.items()}
    save({"model": state, "ema_model": average}, tmp_path / "step-0")
    found = diagnose(tmp_path / "step-0", base, Questions(level="values"))
    assert not found.faults
    assert "2.linear.weight" in {name for note in found.notes for name in note.where}


def test_a_module_of_another_size_is_refused(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save({**trained(), "2.linear.weight": torch.zeros(5, 8), "2.linear.bias": torch.zeros(5)}, tmp_path / "ck")
    assert to_hf(tmp_path / "ck", base, tmp_path / "out") == 2
    assert "2 tensors of 2_Dense are not as in the base model" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_live_export_of_such_a_model_says_what_writes_its_modules(base: Path, tmp_path: Path) -> None:
    with pytest.raises(MismatchError, match="2_Dense, which HFExport does not write") as error:
        HFExport(tmp_path / "hf", model=encoder(), base_model=base, when=every(1))
    assert "--drop" not in str(error.value)


class Pooling(nn.Module):
    """A module without weights, which says its settings as those of the library do."""

    config_file_name = "config.json"

    def __init__(self, mode: str) -> None:
        super().__init__()
        self.mode = mode

    def get_config_dict(self) -> dict[str, str]:
        return {"pooling_mode": self.mode}


class Encoder(nn.Sequential):
    """A whole encoder, which can save itself."""

    def save_pretrained(self, directory: str) -> None:
        raise NotImplementedError


@pytest.fixture
def pooled(base: Path) -> Path:
    """The base model of an encoder that has no weights after its transformer."""
    kinds = [("", "models.Inner"), ("1_Pooling", "models.Pooling")]
    listed = [{"idx": idx, "name": str(idx), "path": path, "type": kind} for idx, (path, kind) in enumerate(kinds)]
    (base / "modules.json").write_text(json.dumps(listed))
    shutil.rmtree(base / "2_Dense")
    (base / "1_Pooling").mkdir()
    (base / "1_Pooling" / "config.json").write_text('{"pooling_mode": "mean"}')
    return base


@pytest.mark.parametrize("mode", ["mean", "cls"])
def test_a_live_export_of_a_whole_encoder_pools_as_the_live_one(mode: str, pooled: Path, tmp_path: Path) -> None:
    whole = Encoder(encoder()[0], Pooling(mode))
    export = HFExport(tmp_path / "hf", model=nn.ModuleDict({"encoder": whole}), base_model=pooled, when=every(1))
    export.export(1)
    export.close()
    written = tmp_path / "hf" / "step-1"
    assert json.loads((written / "1_Pooling" / "config.json").read_text()) == {"pooling_mode": mode}
    assert load_file(written / "model.safetensors").keys() == load_file(pooled / "model.safetensors").keys()
    assert json.loads((pooled / "1_Pooling" / "config.json").read_text()) == {"pooling_mode": "mean"}
    assert main(["verify", str(written)]) == 0


def test_a_live_encoder_with_other_modules_than_the_base_model_is_refused(pooled: Path, tmp_path: Path) -> None:
    for modules in ([], [nn.Identity()], [Pooling("mean"), nn.Identity()]):
        with pytest.raises(MismatchError, match="1 modules of the model that trains are not as in the base model"):
            HFExport(tmp_path / "hf", model=Encoder(encoder()[0], *modules), base_model=pooled, when=every(1))
