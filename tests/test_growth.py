"""The work of commands grows with the number of tensors and files, and not faster: calls are counted, not seconds."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from shardsmith.cli import main
from shardsmith.diagnose import structure
from shardsmith.tensors.tensors import TensorSpec
from tests import dcp_directories

SIZES = (100, 200, 400)


class Calls:
    """Counts the calls of functions of Python and of C, in all threads that are started within it."""

    def __init__(self) -> None:
        self.count = 0

    def __enter__(self) -> Calls:
        threading.setprofile(self._note)
        sys.setprofile(self._note)
        return self

    def __exit__(self, *exc: object) -> None:
        sys.setprofile(None)
        threading.setprofile(None)

    def _note(self, frame: FrameType, event: str, argument: Any) -> None:  # noqa: ARG002
        if event in ("call", "c_call"):
            self.count += 1


def checkpoint_of(place: Path, tensors: int) -> Path:
    """A model of small tensors, sharded over as many files as it has tens of tensors; and its base model beside it."""
    torch.manual_seed(0)
    state = {f"model.layers.{i // 8}.experts.{i % 8}.weight": torch.randn(10, 2).bfloat16() for i in range(tensors)}
    checkpoint = dcp_directories.save_sharded(state, place / "step-5", tensors // 10)
    (place / "base").mkdir()
    (place / "base" / "config.json").write_text(json.dumps({"model_type": "made-up", "hidden_size": 2}))
    save_file({name: torch.zeros_like(values) for name, values in state.items()}, place / "base" / "model.safetensors")
    return checkpoint


def inspect(place: Path) -> list[str]:
    return ["inspect", str(place / "step-5")]


def detect(place: Path) -> list[str]:
    return ["detect", str(place / "step-5")]


def to_hf(place: Path) -> list[str]:
    base, output = str(place / "base"), str(place / "hf")
    return ["to-hf", "--checkpoint", str(place / "step-5"), "--base-model", base, "--output-dir", output, "--quiet"]


def verify(place: Path) -> list[str]:
    return ["verify", str(place / "step-5"), str(place / "hf")]


def to_dcp(place: Path) -> list[str]:
    return ["to-dcp", "--base-model", str(place / "hf"), "--output-dir", str(place / "dcp"), "--quiet"]


COMMANDS: list[Callable[[Path], list[str]]] = [inspect, detect, to_hf, verify, to_dcp]


@pytest.fixture(scope="module")
def counts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[int]]:
    """By command, its calls for each number of tensors."""
    found: dict[str, list[int]] = {command.__name__: [] for command in COMMANDS}
    for tensors in (SIZES[0], *SIZES):  # the first one fills caches and imports
        place = tmp_path_factory.mktemp(f"tensors-{tensors}")
        checkpoint_of(place, tensors)
        for command in COMMANDS:
            with Calls() as calls:
                assert main(command(place)) == 0
            found[command.__name__].append(calls.count)
    return {name: numbers[1:] for name, numbers in found.items()}


@pytest.mark.parametrize("command", [command.__name__ for command in COMMANDS])
def test_calls_grow_with_the_number_of_tensors_and_not_faster(counts: dict[str, list[int]], command: str) -> None:
    small, middle, large = counts[command]
    # Of what grows with the square, a call for each pair of tensors: 2.07 for one of them.
    assert large - middle <= 2.04 * (middle - small), counts[command]


class Counted(dict[str, TensorSpec]):
    """Counts how often all of it is gone through, which takes no call."""

    times = 0

    def __iter__(self) -> Iterator[str]:
        self.times += 1
        return super().__iter__()


def test_diagnose_goes_through_all_names_a_few_times_however_many_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"layers.{i}.weight" for i in range(100)]
    specs = Counted({name: TensorSpec(name, (2, 2), torch.float32) for name in names})
    monkeypatch.setattr(structure, "tied_names", lambda *_: {})
    subject: Any = SimpleNamespace(reference=SimpleNamespace(config={}), quantized={"main": {}}, metadata=None)
    source: Any = SimpleNamespace(specs=specs, aliases={})
    assert [*structure._compare_names("main", source, dict(specs), subject)] == []
    assert specs.times < 10
