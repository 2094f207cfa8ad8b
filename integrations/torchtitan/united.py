"""Several pipeline stages of one rank as one module, for what knows one model a rank."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn


class United(nn.Module):
    """The tensors of several parts of a model under the names that they have there. It shares the parts' modules.

    It computes nothing: the parts are trained, and this one is averaged, saved and exported.
    """

    def __init__(self, parts: Sequence[nn.Module]) -> None:
        """``parts``: stages of one model; of their modules only containers, such as ``layers``, have a common name."""
        super().__init__()
        self.__dict__["_parts"] = tuple(parts)  # not registered: their tensors are here in another way
        _unite(self, parts)

    def modules(self, *args: Any, **kwargs: Any) -> Iterator[nn.Module]:
        """Yield all modules, and the parts: FSDP2 keeps what it has gathered by the roots of these."""
        yield from super().modules(*args, **kwargs)
        yield from self.__dict__["_parts"]


def united(parts: Sequence[nn.Module]) -> nn.Module:
    """Return the parts of a model on this rank as one: the only one, or a ``United``."""
    return parts[0] if len(parts) == 1 else United(parts)


def _unite(target: nn.Module, parts: Sequence[nn.Module]) -> None:
    for part in parts:
        for name, parameter in part._parameters.items():
            target.register_parameter(name, parameter)
        for name, buffer in part._buffers.items():  # such as a rotary table, which each part has
            target.register_buffer(name, buffer, persistent=name not in part._non_persistent_buffers_set)
    names = dict.fromkeys(name for part in parts for name, child in part._modules.items() if child is not None)
    for name in names:
        found = [child for part in parts if (child := part._modules.get(name)) is not None]
        if len(found) == 1:
            target.add_module(name, found[0])
        else:
            # A container that several parts have, such as `layers`: its children are united in turn.
            target.add_module(name, container := nn.Module())
            _unite(container, found)
