"""What is trained beside a language model and has to be in the checkpoint that it starts from: small, and random."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from shardsmith.errors import UsageError
from shardsmith.formats.by_path import open_source
from shardsmith.tensors.dtypes import CASTABLE
from shardsmith.tensors.tensors import Chunk, TensorSpec

HeadType = Literal["linear", "mlp", "gated"]


@dataclass(frozen=True, slots=True)
class Head:
    """A module beside the model; its keys lie beside the model's, without a prefix.

    As a ``TensorSource`` it holds its tensors in memory.
    """

    name: str
    tensors: Mapping[str, Tensor]

    @property
    def path(self) -> Path:
        """It comes from no file."""
        return Path(self.name)

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        """Its tensors by key."""
        return {key: TensorSpec(key, tuple(value.shape), value.dtype) for key, value in self.tensors.items()}

    def pieces(self, name: str, box: Chunk) -> Iterator[tuple[Chunk, Tensor]]:
        """As ``TensorSource.pieces``."""
        whole = self.tensors[name]
        yield box, whole[box.within(Chunk.whole(tuple(whole.shape)))]

    def close(self) -> None:
        """There is nothing to let go of."""


def future_predictor(head_type: HeadType, hidden: int, version: int = 1) -> nn.Module:
    """Return the module that predicts a summary of the hidden states to come: layer norm, then hidden -> hidden.

    Its parameters are called ``ln.*`` and, by type: ``proj.*``; ``ffn.0.*`` and ``ffn.3.*``; or these and ``gate.*``.
    The mlp of version 2 has ``gate_proj``, ``up_proj`` and ``down_proj`` without biases, twice as wide inside.
    """
    parts: dict[str, nn.Module] = {"ln": nn.LayerNorm(hidden)}
    if head_type == "linear":
        parts["proj"] = nn.Linear(hidden, hidden)
    elif head_type == "mlp" and version == 2:
        parts |= {name: nn.Linear(hidden, 2 * hidden, bias=False) for name in ("gate_proj", "up_proj")}
        parts["down_proj"] = down = nn.Linear(2 * hidden, hidden, bias=False)
        nn.init.normal_(down.weight, std=0.03 / math.sqrt(2 * hidden))
    else:
        if head_type == "gated":
            parts["gate"] = nn.Linear(hidden, hidden)
        parts["ffn"] = nn.Sequential(nn.Linear(hidden, hidden), nn.GELU(), nn.Dropout(), nn.Linear(hidden, hidden))
    return nn.ModuleDict(parts)


def find_version(version: str) -> int:
    """Return the version of the fork's heads that is meant: "1", "2", or a checkpoint whose head shows it.

    Raises:
        UsageError: it is neither.
        CheckpointError: the checkpoint cannot be read.
    """
    if version in ("1", "2"):
        return int(version)
    if not Path(version).exists():
        raise UsageError(f"--future_predictor_version {version}: give 1, 2, or a checkpoint that has such a head")
    with contextlib.closing(open_source(Path(version))) as source:
        # What is left is the same for flat and nested keys, and for those of a wrapper.
        names = {name.rpartition("future_predictor.")[2] for name in source.specs}
    if names.isdisjoint(("ffn.0.weight", "gate_proj.weight")):
        raise UsageError(f"--future_predictor_version {version}: this checkpoint has no head of type mlp to tell it by")
    return 2 if "gate_proj.weight" in names else 1


def make_head(name: str, make: Callable[[], nn.Module], seed: int, dtype: torch.dtype | None) -> Head:
    """Make a module with random numbers of its own, of which nobody else's change.

    Args:
        name: Name of the head.
        make: Makes the module.
        seed: Seed of the random numbers, which depend on it and on the name.
        dtype: Of its floating-point tensors; None keeps theirs.
    """
    # On the CPU, so that the values are the same on every machine; the caller's own random numbers go on as before.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(_seed_of(name, seed))  # ``torch.manual_seed`` seeds accelerators, too
        state = make().state_dict()
    # Contiguous and on the CPU: the bytes are written from this memory as they lie.
    return Head(name, {key: _cast(value.detach().cpu().contiguous(), dtype) for key, value in state.items()})


def _seed_of(name: str, seed: int) -> int:
    """63 bits, so that two heads of one shape do not begin with equal numbers."""
    return int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:8], "big") >> 1


def parse_extra_module(text: str) -> tuple[str, Callable[[], nn.Module]]:
    """Name and maker of ``pkg.mod:factory`` or ``pkg.mod:factory={"json": "kwargs"}``. Imports the module.

    Raises:
        UsageError: there is no such function, or the arguments are no JSON object.
    """
    target, _, arguments = text.partition("=")
    module, _, attribute = target.strip().partition(":")
    try:
        factory: Any = getattr(importlib.import_module(module), attribute)
        keywords = json.loads(arguments) if arguments.strip() else {}
    except (ImportError, AttributeError, ValueError) as error:
        raise UsageError(
            f"--extra-module {text!r}: {type(error).__name__}: {error}. "
            'Write pkg.mod:factory=\'{"json": "kwargs"}\', of a module that Python finds'
        ) from error
    if not isinstance(keywords, dict):
        raise UsageError(f"--extra-module {text!r}: the arguments are no JSON object")
    return attribute, lambda: _made(text, factory, keywords)


def _made(text: str, factory: Any, keywords: dict[str, Any]) -> nn.Module:
    try:
        module = factory(**keywords)
    except Exception as error:  # the user's own function
        raise UsageError(f"--extra-module {text!r} failed: {type(error).__name__}: {error}") from error
    if not isinstance(module, nn.Module):
        raise UsageError(f"--extra-module {text!r} made a {type(module).__name__}, not a torch.nn.Module")
    return module


def _cast(value: Tensor, dtype: torch.dtype | None) -> Tensor:
    return value.to(dtype) if dtype is not None and value.dtype in CASTABLE else value
