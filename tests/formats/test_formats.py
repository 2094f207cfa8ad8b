from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from accelerate import PartialState
from accelerate.checkpointing import save_accelerator_state
from safetensors.torch import save_file
from torch import nn

from shardsmith.cli import main
from shardsmith.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    IncompleteCheckpointError,
    UnsupportedFormatError,
)
from shardsmith.formats.by_path import detect_checkpoint_format, model_names, open_source
from shardsmith.tensors.tensors import TensorSource, read_tensor
from tests import dcp_directories
from tests.hf.test_directory_check import llama
from tests.trained_runs import Trained

GOLDEN = Path(__file__).parents[1] / "golden" / "sharded" / "step-3"

WEIGHTS = {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor(7)}


def make_index(directory: Path, shards: dict[str, list[str]]) -> None:
    for file, names in shards.items():
        save_file({name: WEIGHTS[name] for name in names}, directory / file)
    weight_map = {name: file for file, names in shards.items() for name in names}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


SHARDS = {"model-00001-of-00002.safetensors": ["a"], "model-00002-of-00002.safetensors": ["b"]}

FORMATS: dict[str, tuple[Callable[[Path], object], str, str]] = {  # what is made in a directory -> format, reason
    "nothing": (lambda _: None, "unknown", "none of its 0 entries"),
    "other files": (lambda path: (path / "README.md").touch(), "unknown", "none of its 1 entries"),
    "dcp": (lambda path: dcp_directories.save(dict(WEIGHTS), path), "dcp", ".metadata lists 2 tensors in 1 files"),
    "shards without index": (
        lambda path: (dcp_directories.save(dict(WEIGHTS), path) / ".metadata").unlink(),
        "incomplete",
        "1 .distcp files without .metadata",
    ),
    "empty index": (
        lambda path: os.truncate(dcp_directories.save(dict(WEIGHTS), path) / ".metadata", 0),
        "incomplete",
        ".metadata: is empty: it was lost in a crash after the save",
    ),
    "index without shards": (
        lambda path: (dcp_directories.save(dict(WEIGHTS), path) / "__0_0.distcp").unlink(),
        "incomplete",
        "2 parts are not there\n  tensor 'a', chunk at (0, 0): its file __0_0.distcp is missing",
    ),
    "no index but text": (lambda path: (path / ".metadata").write_text("hello"), "unknown", "its index cannot be read"),
    "single file": (
        lambda path: save_file(WEIGHTS, path / "model.safetensors"),
        "huggingface",
        "2 tensors in model.safetensors",
    ),
    "indexed files": (
        lambda path: make_index(path, SHARDS),
        "huggingface",
        "2 tensors in model-00001-of-00002.safetensors, model-00002-of-00002.safetensors",
    ),
    "index with a file missing": (
        lambda path: (make_index(path, SHARDS), (path / "model-00001-of-00002.safetensors").unlink()),
        "incomplete",
        "1 of 2 weight files are missing",
    ),
    "average only": (
        lambda path: save_file(WEIGHTS, path / "ema.safetensors"),
        "huggingface",
        "2 tensors in ema.safetensors",
    ),
    "main and average": (
        lambda path: [save_file(WEIGHTS, path / f"{stem}.safetensors") for stem in ("model", "ema")],
        "huggingface",
        "2 tensors in model.safetensors; 2 tensors in ema.safetensors",
    ),
    "truncated file": (
        lambda path: (
            save_file(WEIGHTS, path / "model.safetensors"),
            os.truncate(path / "model.safetensors", 100),
        ),
        "incomplete",
        "model.safetensors: ",
    ),
    "torch files": (
        lambda path: torch.save(WEIGHTS, path / "pytorch_model.bin"),
        "torch",
        "2 tensors in pytorch_model.bin",
    ),
}


@pytest.mark.parametrize(("make", "name", "reason"), FORMATS.values(), ids=FORMATS)
def test_a_directory_is_recognised_by_what_is_in_it(
    make: Callable[[Path], object], name: str, reason: str, tmp_path: Path
) -> None:
    make(tmp_path)
    found = detect_checkpoint_format(tmp_path)
    assert found.name == name
    assert found.reason.startswith(reason)
    assert str(tmp_path) not in found.reason


def write_header_without_payload(path: Path) -> None:
    save_file(WEIGHTS, path)
    os.truncate(path, path.stat().st_size - 1)


FILES: dict[str, tuple[str, Callable[[Path], object], str, str]] = {
    "safetensors": ("x.safetensors", lambda path: save_file(WEIGHTS, path), "safetensors", "a header of 2 tensors"),
    "truncated safetensors": ("x.safetensors", write_header_without_payload, "incomplete", ""),
    "empty safetensors": ("x.safetensors", lambda path: path.touch(), "incomplete", ""),
    "torch zip": (
        "x.pt",
        lambda path: torch.save(WEIGHTS, path),
        "torch",
        "a .pt file of torch.save with main weights",
    ),
    "old torch pickle": (
        "x.bin",
        lambda path: torch.save(WEIGHTS, path, _use_new_zipfile_serialization=False),
        "torch",
        "a .bin file",
    ),
    "other": ("x.bin", lambda path: path.write_bytes(b"GGUF..."), "unknown", "a file that begins with b'GGUF'"),
    "empty": ("x", lambda path: path.touch(), "unknown", "a file that begins with b''"),
}


@pytest.mark.parametrize(("file", "make", "name", "reason"), FILES.values(), ids=FILES)
def test_a_file_is_recognised_by_its_first_bytes(
    file: str, make: Callable[[Path], object], name: str, reason: str, tmp_path: Path
) -> None:
    make(tmp_path / file)
    found = detect_checkpoint_format(tmp_path / file)
    assert (found.name, found.reason[: len(reason)]) == (name, reason)


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (lambda _: None, "there is no such file or directory"),
        (os.mkfifo, "there is no such file or directory"),
        (lambda path: path.symlink_to("nowhere"), "is a link to nowhere, which does not exist"),
    ],
    ids=["nothing", "pipe", "dangling link"],
)
def test_where_there_is_no_file_or_directory_it_is_an_error(
    make: Callable[[Path], object], what: str, tmp_path: Path
) -> None:
    make(tmp_path / "x")
    for reader in (detect_checkpoint_format, model_names, open_source):
        with pytest.raises(CheckpointNotFoundError, match=what):
            reader(tmp_path / "x")


def test_a_checkpoint_of_ours_is_recognised_by_its_manifest(odd: Trained) -> None:
    found = detect_checkpoint_format(odd.checkpoint)
    assert (found.name, found.reason) == ("sharded", "metadata.json of step 3, main, ema")
    assert model_names(odd.checkpoint) == ["main", "ema"]


def test_a_run_directory_is_answered_with_its_newest_step(odd: Trained, tmp_path: Path) -> None:
    for step in (9, 10):
        shutil.copytree(odd.checkpoint, tmp_path / f"step-{step}")
    (tmp_path / "step-11").mkdir()  # not committed by us
    found = detect_checkpoint_format(tmp_path)
    newest = tmp_path / "step-10"
    assert (found.name, found.reason) == ("unknown", f"a folder of 2 checkpoints; name one of them, such as {newest}")


def test_a_step_of_another_project_is_answered_with_the_folder_that_has_its_weights(tmp_path: Path) -> None:
    step = tmp_path / "run" / "last"
    dcp_directories.save(dict(WEIGHTS), step / "model_and_optim")  # as OLMo-core does
    (step / "train").mkdir()
    torch.save({"step": 3}, step / "train" / "rank0.pt")
    (step / "config.json").write_text('{"dataset": {}}')
    with pytest.raises(CheckpointError, match=rf"name one: {step / 'model_and_optim'}\)"):
        open_source(step)
    # Folders in folders are not searched: a path may have the whole disk below it.
    assert "model_and_optim" not in detect_checkpoint_format(step.parent).reason


@pytest.mark.parametrize("name", [".step-3.tmp-0123456789abcdef", ".step-3.trash-0123456789abcdef"])
def test_a_leftover_is_incomplete_whatever_it_holds(name: str, odd: Trained, tmp_path: Path) -> None:
    shutil.copytree(odd.checkpoint, tmp_path / name)
    assert detect_checkpoint_format(tmp_path / name).name == "incomplete"
    with pytest.raises(IncompleteCheckpointError, match="its name says that it was being written or deleted"):
        open_source(tmp_path / name)


@pytest.mark.parametrize("content", ['{"format": "somebody else\'s"}', '{"checkpoint_type": "dense"}'])
def test_a_manifest_of_somebody_else_makes_it_a_plain_dcp_directory(content: str, tmp_path: Path) -> None:
    dcp_directories.save(dict(WEIGHTS), tmp_path)
    (tmp_path / "metadata.json").write_text(content)
    assert detect_checkpoint_format(tmp_path).name == "dcp"
    assert torch.equal(read_tensor(open_source(tmp_path), "a"), WEIGHTS["a"])


def test_a_manifest_that_is_broken_makes_it_incomplete(odd: Trained, tmp_path: Path) -> None:
    checkpoint = shutil.copytree(odd.checkpoint, tmp_path / "step-3")
    (checkpoint / "metadata.json").write_text("{")
    found = detect_checkpoint_format(checkpoint)
    assert (found.name, found.reason.split(":")[0]) == ("incomplete", "metadata.json")


def test_every_file_that_differs_from_the_manifest_is_named(odd: Trained, tmp_path: Path) -> None:
    checkpoint = shutil.copytree(odd.checkpoint, tmp_path / "step-3")
    (checkpoint / "__0_0.distcp").unlink()
    os.truncate(checkpoint / "__1_0.distcp", 5)
    found = detect_checkpoint_format(checkpoint)
    assert found.name == "incomplete"
    assert "__0_0.distcp: cannot be read" in found.reason
    assert "__1_0.distcp: has 5 bytes, expected" in found.reason


@pytest.mark.parametrize("model", ["main", "ema"])
def test_every_format_gives_the_same_tensors(model: str, odd: Trained, tmp_path: Path) -> None:
    wanted = odd.main if model == "main" else odd.ema
    stem = "model" if model == "main" else "ema"
    save_file(wanted, tmp_path / f"{stem}.safetensors")
    sources: list[TensorSource] = [open_source(odd.checkpoint, model), open_source(tmp_path, model)]
    if model == "main":
        sources += [open_source(tmp_path / "model.safetensors")]
        sources += [open_source(plain) for plain in odd.plain.values()]
    for source in sources:
        assert source.specs.keys() == wanted.keys()
        assert all(torch.equal(read_tensor(source, name), tensor) for name, tensor in wanted.items())


def test_weights_that_are_not_read_are_refused_with_what_they_are(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGUF...")
    with pytest.raises(UnsupportedFormatError, match=r"cannot read main weights from it: unknown \(a file that begins"):
        open_source(tmp_path / "x.gguf")
    assert model_names(tmp_path / "x.gguf") == []


@pytest.mark.parametrize("size", ["5GB", "8KB"], ids=["one file", "shards"])
@pytest.mark.parametrize("kind", ["transformers", "diffusers"])
def test_the_cure_for_weights_of_a_variant_alone_gives_what_is_read(kind: str, size: str, tmp_path: Path) -> None:
    if kind == "transformers":
        model: Any = llama()
    else:
        model = diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4)
    model.save_pretrained(place := tmp_path / "variant", variant="fp16", max_shard_size=size)
    reason = detect_checkpoint_format(place).reason
    assert reason.startswith("weights of a variant alone, such as ")
    (call,) = re.findall(r"; (from_pretrained\(.*\)) of its class", reason)
    eval(f"type(model).{call}", {"model": model, "NEW": tmp_path / "new"})
    source = open_source(tmp_path / "new")
    assert source.specs.keys() == model.state_dict().keys()
    assert all(torch.equal(read_tensor(source, name), tensor) for name, tensor in model.state_dict().items())


def test_a_model_that_is_not_there_is_not_found(tmp_path: Path) -> None:
    dcp_directories.save(dict(WEIGHTS), tmp_path)
    with pytest.raises(CheckpointNotFoundError, match="has no 'ema' weights; it holds main"):
        open_source(tmp_path, "ema")
    with pytest.raises(CheckpointNotFoundError, match="no tensor named 'c'"):
        read_tensor(open_source(tmp_path), "c")


def test_a_newer_manifest_is_not_taken_for_a_plain_dcp_directory(tmp_path: Path) -> None:
    checkpoint = shutil.copytree(GOLDEN, tmp_path / "step-3")
    manifest = json.loads((checkpoint / "metadata.json").read_text())
    (checkpoint / "metadata.json").write_text(json.dumps({**manifest, "schema_version": 9}))
    found = detect_checkpoint_format(checkpoint)
    assert found.name == "unknown"
    assert "schema version 9" in found.reason


@pytest.mark.parametrize("kind", ["safetensors", "bin", "fsdp", "fsdp bin"])
def test_the_further_models_that_accelerate_has_saved_are_named(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models = [dict(nn.Linear(4, count).state_dict()) for count in (3, 2, 1)]
    if kind.startswith("fsdp"):  # what save_fsdp_model writes needs a process group
        for i, model in enumerate(models):
            if kind == "fsdp":
                dcp_directories.save(model, tmp_path / f"pytorch_model_fsdp_{i}")
            else:
                torch.save(model, tmp_path / f"pytorch_model_fsdp{f'_{i}' * (i > 0)}.bin")
    else:
        save_accelerator_state(str(tmp_path), models, [], [], [], 0, 0, safe_serialization=kind == "safetensors")
        PartialState._reset_state()
    first, second = {
        "safetensors": ("model_1.safetensors", "model_2.safetensors"),
        "bin": ("pytorch_model_1.bin", "pytorch_model_2.bin"),
        "fsdp": ("pytorch_model_fsdp_1", "pytorch_model_fsdp_2"),
        "fsdp bin": ("pytorch_model_fsdp_1.bin", "pytorch_model_fsdp_2.bin"),
    }[kind]
    for command in ("detect", "inspect"):
        assert main([command, str(tmp_path)]) == 0
        said = " ".join(capsys.readouterr().out.split())
        assert f"not read, as other models by their names: {first}, {second}" in said


def test_rank_folders_of_megatron_are_named_with_what_converts_them(tmp_path: Path) -> None:
    for rank in ("mp_rank_00", "mp_rank_01"):
        (tmp_path / "iter_0000010" / rank).mkdir(parents=True)
        torch.save({"model": {"a": torch.ones(2)}}, tmp_path / "iter_0000010" / rank / "model_optim_rng.pt")
    found = detect_checkpoint_format(tmp_path / "iter_0000010")
    assert found.name == "unknown"
    assert "the 2 rank folders of a checkpoint of Megatron" in found.reason
    with pytest.raises(UnsupportedFormatError, match="Megatron Bridge"):
        open_source(tmp_path / "iter_0000010", "main")
