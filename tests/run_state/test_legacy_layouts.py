"""Every layout that other projects write is recognised, read exactly, and refused when it is torn or mixed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from shardsmith.errors import CheckpointNotFoundError, CorruptCheckpointError, IncompleteCheckpointError
from shardsmith.formats.by_path import detect_checkpoint_format, model_names, open_source
from shardsmith.tensors.tensors import read_tensor
from tests.legacy_layouts import STEP

LAYOUTS = {  # folder -> format, models
    "fsdp1/write_fork": ("bagel-sharded", ["main", "ema"]),
    "fsdp1/write_fork_without_dcp": ("bagel-sharded", ["main", "ema"]),
    "fsdp1/write_bagel": ("bagel", ["main", "ema"]),
    "fsdp1/write_accelerate": ("accelerate", ["main"]),
    "hybrid/write_fork": ("bagel-sharded", ["main", "ema"]),
    "hybrid/write_fork_without_dcp": ("bagel-sharded", ["main", "ema"]),
    "hybrid/write_bagel": ("bagel", ["main", "ema"]),
    "hybrid/write_accelerate": ("accelerate", ["main"]),
    f"fsdp2/titan/step-{STEP}": ("dcp", ["main"]),
    f"fsdp2/flame/step-{STEP}": ("dcp", ["main"]),
    "fsdp2/rank_files": ("bagel-sharded", ["main"]),
}


@pytest.fixture
def copy(legacy: Path, tmp_path: Path) -> Callable[[str], Path]:
    return lambda layout: shutil.copytree(legacy / layout, tmp_path / "copy")


def truth(legacy: Path, layout: str, model: str) -> dict[str, Tensor]:
    states = torch.load(legacy / layout.split("/")[0] / "truth.pt", weights_only=True)
    return states["model" if model == "main" else "ema"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_it_is_recognised_and_read_exactly(layout: str, legacy: Path) -> None:
    name, models = LAYOUTS[layout]
    assert detect_checkpoint_format(legacy / layout).name == name
    assert model_names(legacy / layout) == models
    for model in models:
        source = open_source(legacy / layout, model)
        wanted = truth(legacy, layout, model)
        assert source.specs.keys() == wanted.keys()
        assert all(torch.equal(read_tensor(source, fqn), tensor) for fqn, tensor in wanted.items())


def test_the_average_is_not_the_main_weights(legacy: Path) -> None:
    for layout in ("fsdp1/write_fork", "fsdp1/write_fork_without_dcp", "hybrid/write_bagel"):
        name = "language_model.model.layers.0.mlp_moe_gen.up_proj.weight"
        main, average = (read_tensor(open_source(legacy / layout, model), name) for model in ("main", "ema"))
        assert not torch.equal(main, average)


REASONS = {
    "fsdp1/write_fork": "metadata.json of step 6, 4 ranks; model_sharded, ema_sharded",
    "hybrid/write_fork_without_dcp": "metadata.json of step 6, 4 ranks; model_rank*.pt, ema_rank*.pt",
    "hybrid/write_bagel": "111 tensors in model.safetensors; 111 tensors in ema.safetensors; "
    "an optimizer in 2 parts, scheduler.pt, data_status.pt",
    "fsdp1/write_accelerate": "pytorch_model_fsdp_0: .metadata lists 111 tensors in 4 files, "
    "111 of a model nested under model",
    f"fsdp2/flame/step-{STEP}": "111 of a model nested under model; beside the model optimizer, train_state",
}


@pytest.mark.parametrize("layout", REASONS)
def test_the_reason_says_what_was_found(layout: str, legacy: Path) -> None:
    assert REASONS[layout] in detect_checkpoint_format(legacy / layout).reason


def edit_manifest(path: Path, **changes: object) -> None:
    manifest = json.loads((path / "metadata.json").read_text())
    (path / "metadata.json").write_text(json.dumps(manifest | changes))


TORN: dict[str, tuple[str, Callable[[Path], object], str]] = {  # layout, what happens to it, what is said
    "no average": (
        "fsdp1/write_fork",
        lambda p: shutil.rmtree(p / "ema_sharded"),
        "ema: neither ema_sharded nor files",
    ),
    "no index": ("fsdp1/write_fork", lambda p: (p / "model_sharded" / ".metadata").unlink(), "has shards but no"),
    "a shard gone": (
        "fsdp1/write_fork",
        lambda p: (p / "ema_sharded" / "__2_0.distcp").unlink(),
        "its file __2_0.distcp is missing",
    ),
    "only the manifest": (
        "fsdp1/write_fork",
        lambda p: [shutil.rmtree(p / f"{stem}_sharded") for stem in ("model", "ema")],
        "main: neither model_sharded nor files of ranks",
    ),
    "no manifest": ("fsdp1/write_fork", lambda p: (p / "metadata.json").unlink(), "metadata.json: does not exist"),
    "no scheduler": ("fsdp1/write_fork", lambda p: (p / "scheduler.pt").unlink(), "scheduler.pt: promised and not"),
    "an optimizer gone": (
        "fsdp1/write_fork",
        lambda p: (p / "optimizer_rank00002.pt").unlink(),
        "optimizer_rank*.pt: 3 of 4 are there",
    ),
    "a rank gone": (
        "fsdp1/write_fork_without_dcp",
        lambda p: (p / "ema_rank00003.pt").unlink(),
        "ema: 3 of 4 ema_rank*.pt of ranks",
    ),
    "a rank truncated": (
        "hybrid/write_fork_without_dcp",
        lambda p: os.truncate(p / "model_rank00001.pt", 5000),
        "model_rank00001.pt: is truncated",
    ),
    "fewer ranks than there are": (
        "fsdp1/write_fork_without_dcp",
        lambda p: edit_manifest(p, world_size=2),
        "model_rank00002.pt: metadata.json says that there were 2 ranks",
    ),
    "a rank twice": (
        "fsdp1/write_fork_without_dcp",
        lambda p: shutil.copyfile(p / "model_rank00000.pt", p / "model_rank00001.pt"),
        "tensors are not all there",
    ),
    "both kinds": (
        "fsdp1/write_fork_without_dcp",
        lambda p: (p / "model_sharded").mkdir(),
        "model_sharded and model_rank00000.pt are both there: two saves are mixed",
    ),
    "an average that nobody knows": (
        "fsdp1/write_fork",
        lambda p: edit_manifest(p, has_ema=False),
        "ema_sharded: metadata.json says that there is no average",
    ),
    "optimizers of two jobs": (
        "fsdp1/write_bagel",
        lambda p: (p / "optimizer.00000-of-00004.pt").rename(p / "optimizer.00000-of-00002.pt"),
        "parts of optimizers of 2 and 4 shards are mixed",
    ),
    "a part of the optimizer gone": (
        "fsdp1/write_bagel",
        lambda p: (p / "optimizer.00001-of-00004.pt").unlink(),
        "3 of 4 parts of the optimizer are there",
    ),
    "BAGEL killed after the average": (
        "fsdp1/write_bagel",
        lambda p: (p / "model.safetensors").unlink(),
        "4 parts of an optimizer without model.safetensors",
    ),
    "accelerate's model torn": (
        "fsdp1/write_accelerate",
        lambda p: (p / "pytorch_model_fsdp_0" / ".metadata").unlink(),
        "pytorch_model_fsdp_0: 4 .distcp files without .metadata",
    ),
    "accelerate's model empty": (
        "fsdp1/write_accelerate",
        lambda p: (shutil.rmtree(p / "pytorch_model_fsdp_0"), (p / "pytorch_model_fsdp_0").mkdir()),
        "pytorch_model_fsdp_0 is no directory of torch.distributed.checkpoint",
    ),
}


@pytest.mark.parametrize("case", TORN)
def test_torn_and_mixed_ones_are_incomplete_and_never_guessed(case: str, copy: Callable[[str], Path]) -> None:
    layout, damage, says = TORN[case]
    path = copy(layout)
    damage(path)
    found = detect_checkpoint_format(path)
    assert found.name == "incomplete"
    assert says in found.reason
    for reader in (model_names, open_source):
        with pytest.raises(IncompleteCheckpointError):
            reader(path)


def test_ranks_of_two_saves_are_found_out_when_they_are_read(copy: Callable[[str], Path]) -> None:
    path = copy("hybrid/write_fork_without_dcp")
    values = bytearray((path / "model_rank00003.pt").read_bytes())
    values[len(values) // 2] ^= 1  # ranks 1 and 3 are replicas of each other
    (path / "model_rank00003.pt").write_bytes(values)
    source = open_source(path)
    with pytest.raises(
        CorruptCheckpointError, match=r"model_rank00001.pt and model_rank00003.pt hold different values"
    ):
        _ = [read_tensor(source, name) for name in source.specs]


def test_an_average_that_was_not_saved_is_not_found(legacy: Path) -> None:
    with pytest.raises(CheckpointNotFoundError, match="has no 'ema' weights; it holds main"):
        open_source(legacy / "fsdp2/rank_files", "ema")
    with pytest.raises(CheckpointNotFoundError, match="has no 'ema' weights"):
        open_source(legacy / "fsdp1/write_accelerate", "ema")


def test_a_folder_of_their_steps_is_answered_with_the_newest(legacy: Path, tmp_path: Path) -> None:
    for name in ("0000006", "0000012"):
        shutil.copytree(legacy / "fsdp1/write_bagel", tmp_path / name)
    (tmp_path / "0000020").mkdir()
    assert detect_checkpoint_format(tmp_path).reason == (
        f"a folder of 2 checkpoints; name one of them, such as {tmp_path / '0000012'}"
    )
