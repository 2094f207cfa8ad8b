"""What lies beside the weights in checkpoints of BAGEL and its sharded fork: optimizer, scheduler, data status, step.

BAGEL's files of the optimizer, and those of the fork's fallback, are ``optimizer.state_dict()`` of each rank: moments
of the parts that this rank had, without a word on where these belong. They fit a run that is sharded in the same way
over as many ranks, and no other. The fork's others have the state by names (``named_optimizer.py``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from shardsmith.errors import CheckpointNotFoundError, MismatchError, UnsupportedFormatError
from shardsmith.formats.bagel import (
    DATA_STATUS_FILE,
    SCHEDULER_FILE,
    optimizer_parts,
    rank_files,
    read_fork_manifest,
)
from shardsmith.formats.detected import BAGEL, BAGEL_SHARDED
from shardsmith.formats.torch_files.files import read_torch_object
from shardsmith.run_state.named_optimizer import NamedOptimizer
from shardsmith.tensors.tensors import TensorSpec

HAS_STATE = (BAGEL, BAGEL_SHARDED)


class LegacyState:
    """What one rank needs of it. No communication; nothing is handed out before it is known to fit."""

    def __init__(self, path: Path, format_name: str, rank: int, size: int) -> None:
        self._path = path
        self._is_fork = format_name == BAGEL_SHARDED
        self._rank = rank
        self._size = size

    @property
    def step(self) -> int | None:
        """Steps that were done; None where nothing says so."""
        if self._is_fork:
            return read_fork_manifest(self._path).train_steps
        # BAGEL calls the directory of a step by its number.
        return int(self._path.name) if self._path.name.isdigit() else None

    def optimizer(self, optimizer: Optimizer, parameters: Mapping[str, TensorSpec]) -> dict[str, Any] | NamedOptimizer:
        """Return the state for this rank's optimizer, or the files that have it by names.

        Args:
            optimizer: This rank's optimizer.
            parameters: Those of the model, by clean FQN, with global shapes.

        Raises:
            UnsupportedFormatError: it was saved by another number of ranks.
            MismatchError: it does not fit this rank's parameters. Names all.
        """
        files = rank_files("optimizer", read_fork_manifest(self._path).world_size) if self._is_fork else []
        if files and (self._path / files[0]).is_file() and NamedOptimizer.is_one(self._path / files[0]):
            named = NamedOptimizer(self._path, files)
            named.check(parameters)
            return named
        state = read_torch_object(self._path / self._optimizer_file())
        if problems := _misfits(optimizer, state):
            summary = f"the optimizer's state on rank {self._rank} is not that of this model's parameters"
            advice = "It fits only a run that is sharded in the same way. Pass load_optimizer=False."
            raise MismatchError(self._path, summary, problems, advice)
        found: dict[str, Any] = state
        return found

    def scheduler(self) -> dict[str, Any]:
        """Return the state of the scheduler."""
        found: dict[str, Any] = self._read(SCHEDULER_FILE, "load_scheduler")
        return found

    @property
    def has_data_status(self) -> bool:
        """Whether anything is said of the data loaders."""
        return (self._path / DATA_STATUS_FILE).is_file()

    def data_status(self) -> Any:
        """Return where this rank's data loader was; None for a rank that the run did not have."""
        everyone: Sequence[Any] = self._read(DATA_STATUS_FILE, "load_data_status")
        return everyone[self._rank] if self._rank < len(everyone) else None

    def _read(self, name: str, option: str) -> Any:
        if not (self._path / name).is_file():
            raise CheckpointNotFoundError(self._path, f"has no {name}; pass {option}=False")
        return read_torch_object(self._path / name)

    def _optimizer_file(self) -> str:
        if self._is_fork:
            files = rank_files("optimizer", read_fork_manifest(self._path).world_size)
            fits = len(files) == self._size
        else:  # with hybrid sharding there is a part for each shard, and every replica loads the same
            files = optimizer_parts(self._path)
            fits = bool(files) and self._size % len(files) == 0
        if not files or not (self._path / files[0]).is_file():
            raise CheckpointNotFoundError(self._path, "has no optimizer; pass load_optimizer=False")
        if not fits:
            raise UnsupportedFormatError(
                self._path,
                f"its optimizer is in {len(files)} parts that do not say where they belong, and there are {self._size} "
                "ranks. Resume on as many ranks as it was saved by, or pass load_optimizer=False",
            )
        return files[self._rank % len(files)]


def _misfits(optimizer: Optimizer, state: Mapping[str, Any]) -> list[str]:
    ours = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    theirs = [number for group in state.get("param_groups", ()) for number in group["params"]]
    if len(ours) != len(theirs):
        return [f"{len(theirs)} parameters were saved, the optimizer has {len(ours)}"]
    lines = []
    for i, (parameter, number) in enumerate(zip(ours, theirs, strict=True)):
        for name, value in state["state"].get(number, {}).items():
            # Moments have the shape of their parameter; what has no dimension is a counter.
            if isinstance(value, Tensor) and value.dim() and value.shape != parameter.shape:
                lines.append(f"parameter {i}, {name}: {tuple(value.shape)}, the parameter is {tuple(parameter.shape)}")
    return lines
