"""Runs on a device: saved, resumed and exported, compared with the uninterrupted run and with torch's own copies."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch import Tensor

from shardsmith.ground.layout import step_name
from tests.gpu.devices import BOTH, is_on_accelerator, run_on_ranks
from tests.gpu.tensors import assert_same
from tests.gpu.training import EXPORTED, SAVED_EVERY, STEPS, Run, Way

EVERYWHERE = [
    Way(),
    Way(dtype=torch.bfloat16, offloaded_average=True),
    Way(scaled=True),
    Way(compiled=True),
    Way(overlapped=True),
    Way(sharding="ddp"),
    Way(sharding="fsdp2", offloaded_average=True),
    Way(sharding="fsdp2", dtype=torch.bfloat16),
    Way(sharding="fsdp1"),
]
ON_ACCELERATORS = [
    Way(sharding="ddp", backend="nccl"),
    Way(sharding="fsdp2", backend="nccl"),
    Way(sharding="fsdp2", backend=BOTH, dtype=torch.bfloat16, offloaded_average=True),
    Way(sharding="fsdp2", backend=BOTH, overlapped=True),
    Way(sharding="fsdp2-offload", backend=BOTH),
    Way(sharding="fsdp1", backend="nccl"),
    Way(sharding="fsdp1", backend=BOTH),
    Way(sharding="fsdp1-offload", backend=BOTH),
]
WAYS = [*EVERYWHERE, *(pytest.param(way, marks=pytest.mark.gpu) for way in ON_ACCELERATORS)]


@pytest.mark.skipif(is_on_accelerator(), reason="it is one of the other ways there")
def test_what_is_resumed_into_weights_that_fsdp1_has_just_pinned_is_not_dropped(tmp_path: Path) -> None:
    run_on_ranks(run_both_with_copies_as_pinned, 1, tmp_path, Way(sharding="fsdp1-offload"), tmp_path)
    whole, resumed = (read_checkpoint(tmp_path / name / "saves" / step_name(STEPS)) for name in ("whole", "resumed"))
    assert_same(resumed, whole)


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_a_resumed_run_is_the_uninterrupted_one_and_exports_are_its_weights(tmp_path: Path, way: Way) -> None:
    if way.sharding == "none":
        run_both(way, tmp_path)
    else:
        run_on_ranks(run_both, 1, tmp_path, way, tmp_path, backend=way.backend)
    whole, resumed = (read_checkpoint(tmp_path / name / "saves" / step_name(STEPS)) for name in ("whole", "resumed"))
    assert_same(resumed, whole)
    assert any(key.startswith("optimizer.") for key in whole)
    assert any(key.startswith("rng.") for key in whole)
    for step in EXPORTED:
        found = load_file(tmp_path / "whole" / "exports" / step_name(step) / "model.safetensors")
        truth = torch.load(tmp_path / f"truth-{step}.pt")
        assert_same(found, {name: truth[name] for name in found})
        assert found.keys() >= {"embed.weight", "layers.1.0.bias", "norm.weight", "seen"}
        again = load_file(tmp_path / "resumed" / "exports" / step_name(step) / "model.safetensors")
        assert_same(again, found)
        averages = [tmp_path / name / "exports" / step_name(step) / "ema.safetensors" for name in ("whole", "resumed")]
        assert_same(*map(load_file, averages))


def run_both(way: Way, directory: Path) -> None:
    for step, weights in Run(way, directory / "whole").train(STEPS).items():
        torch.save(weights, directory / f"truth-{step}.pt")
    Run(way, directory / "resumed").train(SAVED_EVERY)
    torch.randn(7, device="cpu")  # what happens between two runs must not matter
    Run(way, directory / "resumed").train(STEPS)


def run_both_with_copies_as_pinned(way: Way, directory: Path) -> None:
    """Only a machine with a GPU can pin memory; FSDP1 asks for a copy that is pinned."""
    Tensor.pin_memory = Tensor.clone  # type: ignore[method-assign]
    torch.cpu.Stream.synchronize = _nothing  # type: ignore[attr-defined]
    run_both(way, directory)


def _nothing(stream: torch.cpu.Stream) -> None:
    """A CPU has no work to wait for."""


def read_checkpoint(directory: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint, through torch's own reader."""
    reader = dcp.FileSystemReader(directory)
    stored = reader.read_metadata().state_dict_metadata
    state = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in stored.items()
        if isinstance(entry, dcp.metadata.TensorStorageMetadata)
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.load(state, storage_reader=reader, no_dist=True)
    return state
