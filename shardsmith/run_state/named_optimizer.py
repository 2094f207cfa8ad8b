"""An optimizer whose files have its state by the names of the parameters, as BAGEL's sharded fork saves it.

Such files are what ``get_optimizer_state_dict`` gives, saved by each rank: moments as ShardedTensors or DTensors, which
say where they lie. So they come back on any number of ranks, and under any sharding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.optim import Optimizer

from shardsmith.errors import MismatchError
from shardsmith.formats.torch_files.files import read_plain_value
from shardsmith.formats.torch_files.source import TorchSource, open_rank_states
from shardsmith.run_state.fsdp1_hybrid import hybrid_groups_have_a_source
from shardsmith.sharding.local_boxes import local_boxes
from shardsmith.tensors.tensors import TensorSpec, read_into

_ADVICE = "Nothing was loaded. Pass load_optimizer=False to do without."


class NamedOptimizer:
    """The files of all ranks. No rank reads more than it needs for its own shards."""

    def __init__(self, directory: Path, files: Sequence[str]) -> None:
        """Open them. No communication. Raises CheckpointError if they cannot be read."""
        self._path = directory
        self._source: TorchSource = open_rank_states(directory, files)
        self._groups: list[dict[str, Any]] = read_plain_value(directory / files[0], "param_groups")

    @staticmethod
    def is_one(file: Path) -> bool:
        """Whether a file has the state by names. Elsewhere it is by numbers, of which nobody knows the parameters."""
        groups = read_plain_value(file, "param_groups")
        return any(isinstance(name, str) for group in groups or () for name in group.get("params", ()))

    def check(self, parameters: Mapping[str, TensorSpec]) -> None:
        """Raise MismatchError unless the state fits parameters of these names and global shapes. No communication."""
        named = [name for group in self._groups for name in group["params"]]
        problems = [f"{name}: the model has no such parameter" for name in named if name not in parameters]
        for key, spec in self._source.specs.items():
            # state.<name>.<field>, and the name itself has dots.
            name = ".".join(key.split(".")[1:-1])
            # Counters have no dimension; moments have the shape of the parameter.
            if name in parameters and spec.shape not in ((), parameters[name].shape):
                problems.append(f"{key}: {spec.shape}, the parameter is {parameters[name].shape}")
        if problems:
            raise MismatchError(self._path, "its optimizer is not that of this model", problems, _ADVICE)

    def restore(self, model: nn.Module, optimizer: Optimizer) -> None:
        """Fill this rank's shards of the state. All ranks; communicates as torch's functions do.

        Raises:
            MismatchError: the optimizer has parameters that the files know nothing of.
        """
        with hybrid_groups_have_a_source(model):
            # torch makes the state of parameters that have none yet: so there is something to fill.
            state: dict[str, Any] = get_optimizer_state_dict(model, optimizer)
        wanted = {
            f"state.{name}.{field}": value
            for name, fields in state["state"].items()
            for field, value in fields.items()
            if isinstance(value, Tensor)
        }
        if missing := [f"{key}: not in the files" for key in wanted if key not in self._source.specs]:
            raise MismatchError(self._path, "its optimizer is not that of this model", missing, _ADVICE)
        for key, value in wanted.items():
            for box, values in local_boxes(value):
                read_into(self._source, key, box, values)
        for group in state["param_groups"]:
            group |= self._settings_of(group["params"])
        with hybrid_groups_have_a_source(model):
            set_optimizer_state_dict(model, optimizer, state)

    def close(self) -> None:
        """Close the files."""
        self._source.close()

    def _settings_of(self, parameters: Sequence[str]) -> dict[str, Any]:
        """Learning rate and so on of the group that these parameters were in."""
        found = next((group for group in self._groups if set(parameters) & set(group["params"])), {})
        return {name: value for name, value in found.items() if name != "params"}
