"""Parameters of which an optimizer has no state, for they never had a gradient: a head without a loss, a pooler.

torch makes a state of every parameter before it loads. What a checkpoint does not have of it must not be asked for, and
is taken away again afterwards: the run goes on as if it had not stopped.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from shardsmith.formats.dcp.source import DcpSource
from shardsmith.formats.rank_shards import RankShards
from shardsmith.ground import layout
from shardsmith.tensors.fqn import clean_fqn


@dataclass(frozen=True, slots=True)
class UnusedParameters:
    """The parameters of which neither the checkpoint has a state, nor the run is to have one after the load."""

    held: list[tuple[Optimizer, Tensor]] = field(default_factory=list)
    made: dict[str, Any] = field(default_factory=dict)
    """What torch has made for them, by the key below ``optimizer``."""

    @classmethod
    def taken_out(
        cls, state: dict[str, Any], checkpoint: Path, model: nn.Module, optimizers: Sequence[Optimizer]
    ) -> UnusedParameters:
        """Remove from a state that is to be filled what the checkpoint has no state of. No communication.

        Only of parameters whose options the checkpoint has, and only if it has a state of others: the optimizer is the
        one that was saved.
        """
        found = cls()
        wanted: dict[str, Any] = state.get("optimizer", {})
        if not any(key.startswith("state.") for key in wanted):
            return found
        saved = _keys(checkpoint)
        used = False
        for optimizer, parameter, name in _named(model, optimizers):
            keys = [key for key in _own_keys(optimizer, parameter, name) if key in wanted]
            if not keys or any(f"optimizer.{key}" in saved for key in keys):
                used = used or bool(keys)
            # Its options were saved, and a state was not: it had no gradient.
            elif any(f"optimizer.param_groups.{name}.{option}" in saved for option in optimizer.defaults):
                found.held.append((optimizer, parameter))
                found.made.update({key: wanted[key] for key in keys})
        if not used:
            return cls()
        for key in found.made:
            del wanted[key]
        return found

    def put_back(self, state: dict[str, Any]) -> None:
        """Give torch the keys that it asks for, when the rest is filled."""
        if self.made:
            state["optimizer"].update(self.made)

    def forget(self) -> None:
        """Take what torch made from the optimizers, when all is restored."""
        for optimizer, parameter in self.held:
            optimizer.state.pop(parameter, None)


def _named(model: nn.Module, optimizers: Sequence[Optimizer]) -> Iterator[tuple[Optimizer, Tensor, str]]:
    # By identity, since an optimizer knows no names.
    names = {id(parameter): clean_fqn(name, model) for name, parameter in model.named_parameters()}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if id(parameter) in names:
                    yield optimizer, parameter, names[id(parameter)]


def _own_keys(optimizer: Optimizer, parameter: Tensor, name: str) -> list[str]:
    return [f"state.{name}.{key}" for key in optimizer.state.get(parameter, {})]


def _keys(checkpoint: Path) -> Collection[str]:
    is_dcp = (checkpoint / layout.DCP_INDEX_FILE).exists()
    with contextlib.closing(DcpSource(checkpoint, to_load=True) if is_dcp else RankShards(checkpoint)) as source:
        if isinstance(source, DcpSource):
            return {key for key, _ in source.index.below("optimizer")}
        return source.specs.keys()
