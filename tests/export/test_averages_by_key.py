"""--average KEY takes any dict that holds tensors under the model's names, whatever it is called."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file

from shardsmith.cli import main
from tests.families.tiny import all_families, make_tiny

FAMILIES = {family.kind: family for family in all_families()}


@pytest.mark.parametrize("kind", ["LlamaForCausalLM", "GPT2LMHeadModel"])  # without ties, and with them
def test_a_dict_of_any_name_is_exported_as_the_average(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = make_tiny(FAMILIES[kind])
    model.save_pretrained(tmp_path / "base")
    state = dict(model.state_dict())
    moved = {name: value + 1 for name, value in state.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch: that there are no ranks
        dcp.save({"model": state, "teacher": {"net": moved}}, checkpoint_id=tmp_path / "checkpoint", no_dist=True)
    given = ["--checkpoint_dir", tmp_path / "checkpoint", "--base_model_path", tmp_path / "base", "--dtype", "original"]
    command = ["to-hf", *given, "--output_dir", tmp_path / "out", "--average"]
    assert main([*map(str, command), "nobody"]) == 2
    assert "has no average 'nobody'; it holds teacher.net" in capsys.readouterr().err
    for models, beside in (((), True), (("--models", "ema"), False)):
        output = tmp_path / f"out-{beside}"
        command[command.index("--output_dir") + 1] = output
        assert main([*map(str, command), "teacher.net", *models]) == 0
        assert (output / "ema.safetensors").exists() == beside
    loaded = type(model).from_pretrained(output).state_dict()
    assert all(torch.equal(value, moved[name]) for name, value in loaded.items())


def converted(tmp_path: Path, beside: Mapping[str, Any]) -> int:
    """What to-hf ends with for a checkpoint with a model and something beside it."""
    model = make_tiny(FAMILIES["LlamaForCausalLM"])
    model.save_pretrained(tmp_path / "base")
    state = dict(model.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save({"model": state, **beside}, checkpoint_id=tmp_path / "checkpoint", no_dist=True)
    given = ["--checkpoint", tmp_path / "checkpoint", "--base-model", tmp_path / "base", "--dtype", "original"]
    return main([*map(str, ["to-hf", *given, "--output-dir", tmp_path / "out"])])


@pytest.mark.parametrize("wrapper", ["module.", "_orig_mod.", "module._orig_mod."])
@pytest.mark.parametrize("key", ["ema_model", "ema", "model_ema"])  # the first is what we call our own
@pytest.mark.parametrize("count", [{}, {"n_averaged": torch.tensor(3)}], ids=["", "counted"])
def test_an_average_in_a_wrapper_is_exported_whatever_it_is_called(
    key: str, wrapper: str, count: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    state = make_tiny(FAMILIES["LlamaForCausalLM"]).state_dict()
    moved = {name: value + 1 for name, value in state.items()}
    done = converted(tmp_path, {key: {wrapper + name: value for name, value in moved.items()} | count})
    assert done == 0
    exported = load_file(tmp_path / "out" / "ema.safetensors")
    assert exported.keys() == moved.keys()
    assert all(torch.equal(value, moved[name]) for name, value in exported.items())


def written(form: str, names: Mapping[str, torch.Tensor], folder: Path) -> Path:
    """The tensors as a checkpoint of some form, with the average's names among the model's own."""
    if form == "dcp":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dcp.save({"state_dict": dict(names)}, checkpoint_id=folder / "checkpoint", no_dist=True)
        return folder / "checkpoint"
    (folder / "checkpoint").mkdir()
    path = folder / "checkpoint" / {"bin": "pytorch_model.bin", "ckpt": "last.ckpt"}.get(form, "model.safetensors")
    if form == "safetensors":
        save_file(dict(names), path)
    else:
        torch.save(dict(names) if form == "bin" else {"state_dict": dict(names), "epoch": 3}, path)
    return path if form == "ckpt" else path.parent


@pytest.mark.parametrize("form", ["dcp", "ckpt", "bin", "safetensors"])
@pytest.mark.parametrize("key", ["ema_model", "model_ema", "ema"])
@pytest.mark.parametrize(
    ("outer", "inner"), [("net.", ""), ("net._orig_mod.", "module."), ("module.", "module._orig_mod.")]
)
def test_an_average_among_the_names_of_a_module_is_found_and_taken(
    outer: str, inner: str, key: str, form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = make_tiny(FAMILIES["Qwen2ForCausalLM"])
    model.save_pretrained(tmp_path / "base")
    state = {name: value.clone() for name, value in model.state_dict().items()}
    moved = {name: value + torch.randn_like(value) for name, value in state.items()}
    # One layer alone checkpoints its activations, in the model and not in the average.
    for name in [name for name in state if name.startswith("model.layers.0.")]:
        state[name.replace("layers.0.", "layers.0._checkpoint_wrapped_module.")] = state.pop(name)
    names = {outer + name: value for name, value in state.items()}
    names |= {f"{key}.{inner}{name}": value for name, value in moved.items()}
    checkpoint = written(form, names, tmp_path)
    given = ["--checkpoint", checkpoint, "--base-model", tmp_path / "base", "--dtype", "original"]
    command = ["to-hf", *map(str, given)]
    assert main([*command, "--output-dir", str(tmp_path / "both")]) == 0
    assert (tmp_path / "both" / "ema.safetensors").exists()
    for asked in ([], ["--average", key]):
        output = tmp_path / f"alone-{len(asked)}"
        assert main([*command, "--output-dir", str(output), "--models", "ema", *asked]) == 0
        loaded = type(model).from_pretrained(output).state_dict()
        assert all(torch.equal(value, moved[name]) for name, value in loaded.items())
        plain = type(model).from_pretrained(tmp_path / "both").state_dict()
        assert all(torch.equal(value, model.state_dict()[name]) for name, value in plain.items())
    capsys.readouterr()


def test_an_average_under_names_of_its_own_is_not_filled_up_from_the_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = make_tiny(FAMILIES["LlamaForCausalLM"]).state_dict()
    renamed = {name.replace("self_attn", "attention"): value + 1 for name, value in state.items()}
    assert converted(tmp_path, {"model_ema": renamed}) == 2
    said = capsys.readouterr().err
    assert "the average does not have the names of the model" in said
    assert "model_ema.model.layers.0.attention.q_proj.weight: in the average, not in the model" in said
    command = ["to-hf", "--checkpoint", str(tmp_path / "checkpoint"), "--base-model", str(tmp_path / "base")]
    assert main([*command, "--output-dir", str(tmp_path / "main"), "--models", "main"]) == 0  # as it advises


def test_what_is_left_out_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = make_tiny(FAMILIES["LlamaForCausalLM"]).state_dict()
    shadow = {"shadow_params": [value + 1 for value in state.values()], "decay": torch.tensor(0.9)}  # of diffusers
    done = converted(tmp_path, {"ema": shadow, "target": {name: value + 2 for name, value in state.items()}})
    said = capsys.readouterr().out
    assert done == 0
    assert "main: ema is left out: it is called an average" in said
    assert "left out: target, which holds tensors under the model's names; --average target takes it" in said


def cells(table: str) -> str:
    """The last column of a table of models with one row, whose words it has wrapped."""
    lines = [line.split("│") for line in table.splitlines() if line.startswith("│")]
    return "".join("".join(line[-2].split()) for line in lines)


@pytest.mark.parametrize("form", ["dcp", "pt", "old pt"])
@pytest.mark.parametrize(
    ("beside", "name"),
    [
        (lambda values: {"ema": {"shadow_params": values, "decay": 0.9}}, "ema"),  # of diffusers
        (lambda values: {"swa": {"swa_state": values, "n": 4}}, "swa"),
        (lambda values: {"callbacks": {"EMA": {"weights": values}}}, "callbacks.EMA"),
    ],
)
def test_an_average_without_names_is_left_out_by_name_in_any_format(
    beside: Callable[[list[torch.Tensor]], dict[str, Any]],
    name: str,
    form: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = make_tiny(FAMILIES["LlamaForCausalLM"])
    model.save_pretrained(tmp_path / "base")
    state = dict(model.state_dict())
    content = {"model": state, **beside([value + 1 for value in state.values()])}
    checkpoint = tmp_path / "checkpoint.pt"
    if form == "dcp":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dcp.save(content, checkpoint_id=checkpoint, no_dist=True)
    else:
        torch.save(content, checkpoint, _use_new_zipfile_serialization=form == "pt")
    given = ["--checkpoint", str(checkpoint), "--base-model", str(tmp_path / "base")]
    assert main(["to-hf", *given, "--output-dir", str(tmp_path / "out"), "--dtype", "original"]) == 0
    said = capsys.readouterr().out
    assert f"main: {name} is left out: it is called an average" in said
    assert "copy_to(model.parameters()) gives them names" in said
    assert main(["inspect", str(checkpoint)]) == 0
    assert "".join(f"not read, as an average without names: {name}".split()) in cells(capsys.readouterr().out)
    assert main(["verify", str(checkpoint), str(tmp_path / "base")]) == 0
    assert f"not compared: {name}: it is called an average" in capsys.readouterr().out
    assert main(["diagnose", *given, "--level", "values"]) == 0
    assert "not-compared" in capsys.readouterr().out


@pytest.mark.parametrize("with_weights", [True, False], ids=["base-weights", "config-only"])
def test_an_average_that_is_a_list_and_stands_alone_is_called_so(
    with_weights: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = make_tiny(FAMILIES["LlamaForCausalLM"])
    model.save_pretrained(tmp_path / "base")
    if not with_weights:
        (tmp_path / "base" / "model.safetensors").unlink()
    average = EMAModel(model.parameters(), decay=0.5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 1
    average.step(model.parameters())
    torch.save(average.state_dict(), tmp_path / "ema.pt")
    given = ["--checkpoint", str(tmp_path / "ema.pt"), "--base-model", str(tmp_path / "base")]
    command = ["to-hf", *given, "--output-dir", str(tmp_path / "out"), "--dtype", "original"]
    assert main(command) == 2
    assert "a list of tensors without names, as diffusers' EMAModel" in capsys.readouterr().err
    loaded = EMAModel(model.parameters())
    loaded.load_state_dict(torch.load(tmp_path / "ema.pt"))
    loaded.copy_to(model.parameters())
    torch.save(model.state_dict(), tmp_path / "ema.pt")
    assert main(command) == 0
    exported = type(model).from_pretrained(tmp_path / "out").parameters()
    assert all(torch.equal(*pair) for pair in zip(exported, average.shadow_params, strict=True))


def test_the_state_of_an_optimizer_is_called_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = make_tiny(FAMILIES["LlamaForCausalLM"])
    model.save_pretrained(tmp_path / "base")
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    given = ["--checkpoint", str(tmp_path / "optimizer.pt"), "--base-model", str(tmp_path / "base")]
    assert main(["to-hf", *given, "--output-dir", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert said.rstrip().endswith("These are states of an optimizer: give the file or folder with the model.")


def test_a_folder_of_files_names_those_with_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = make_tiny(FAMILIES["LlamaForCausalLM"])
    model.save_pretrained(tmp_path / "base")
    run = tmp_path / "run"
    run.mkdir()
    for epoch in (1, 2):
        torch.save({"epoch": epoch, "model": model.state_dict()}, run / f"epoch{epoch}.pt")
    torch.save({"cpu": torch.get_rng_state()}, run / "rng_state.pth")
    (run / "notes.pt").write_text("no file of torch")
    assert main(["detect", str(run)]) == 1
    assert f"name one: {run / 'epoch1.pt'}, {run / 'epoch2.pt'}\n" in capsys.readouterr().out
    given = ["--checkpoint", str(run / "epoch2.pt"), "--base-model", str(tmp_path / "base"), "--dtype", "original"]
    assert main(["to-hf", *given, "--output-dir", str(tmp_path / "out")]) == 0
    assert main(["verify", str(run / "epoch2.pt"), str(tmp_path / "out")]) == 0
