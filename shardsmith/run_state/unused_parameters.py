"""Parameters of which an optimizer has no state, for they never had a gradient: a head without a loss, a pooler.

torch makes a state of every parameter before it loads. What a checkpoint does not have of it must not be asked for, and
is taken away again afterwards: the run goes on as if it had not stopped. The other way round, torch makes no state of a
parameter that is frozen, nor of any once there is a gradient or a state: what a checkpoint has of them is asked for.
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


@contextlib.contextmanager
def saved_states_made(model: nn.Module, optimizers: Sequence[Optimizer], saved: Collection[str]) -> Iterator[None]:
    """Within it torch makes, and restores, a state of each parameter of which a checkpoint has one.

    After an error the optimizers have the states that they had. No communication.

    Args:
        model: Whose parameters they are.
        optimizers: Those that are to be loaded into.
        saved: FQNs of the parameters of which the checkpoint has a state.
    """
    named = [(one, parameter) for one, parameter, name in _named(model, optimizers) if name in saved]
    lacking = dict.fromkeys(one for one, parameter in named if not one.state.get(parameter))
    states = {optimizer: dict(optimizer.state) for optimizer in lacking}
    held = [parameter for one in lacking for group in one.param_groups for parameter in group["params"]]
    gradients = [(parameter, parameter.grad) for parameter in held if parameter.grad is not None]
    frozen = [p for _, p in named if not p.requires_grad and (p.is_floating_point() or p.is_complex())]
    try:
        for optimizer in lacking:
            optimizer.state.clear()
        for parameter, _ in gradients:
            parameter.grad = None
        for parameter in frozen:
            parameter.requires_grad_(True)
        yield
    except BaseException:
        for optimizer, state in states.items():
            optimizer.state.clear()
            optimizer.state.update(state)
        raise
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
        for parameter, gradient in gradients:
            parameter.grad = gradient


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
