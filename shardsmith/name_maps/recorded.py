"""A name map as data: how a model's files were made of its tensors, as a checkpoint records it.

So a checkpoint is read back without the library that gave the names, and by its own map whatever that library does now.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shardsmith.manifest.fields import count, shape, typed
from shardsmith.name_maps.grids import Axis
from shardsmith.name_maps.slices import Joined, Slice, Target
from shardsmith.tensors.tensors import TensorSpec


class RecordedNames:
    """The ``NameMap`` of files that were written before."""

    def __init__(self, slices: Mapping[str, Target], stored: Mapping[str, TensorSpec]) -> None:
        """``slices`` as ``read_slices`` gives them; ``stored`` are the tensors of the files."""
        self._targets = {**slices, **{n: Slice.whole(spec) for n, spec in stored.items() if n not in slices}}

    def targets(self, specs: Mapping[str, TensorSpec]) -> dict[str, Target]:
        """Return the tensors of the files that are made of these tensors of the model alone."""
        return {name: target for name, target in self._targets.items() if specs.keys() >= set(target.sources)}

    def to_plain(self) -> dict[str, Any]:
        """Return all targets as JSON has them."""
        return slices_to_plain(self._targets, {})


class RunNames(RecordedNames):
    """The ``NameMap`` that a run would have written files by, which it has recorded with its checkpoints."""

    def leaves_out(self, specs: Mapping[str, TensorSpec]) -> dict[str, str]:
        """Return the tensors that no file has anything of, such as the bias of routers."""
        used = {source for target in self._targets.values() for source in target.sources}
        return {name: "the run that saved it has no name for it in Hugging Face" for name in specs if name not in used}


def slices_to_plain(targets: Mapping[str, Target], specs: Mapping[str, TensorSpec]) -> dict[str, Any]:
    """Return targets as JSON has them, without those that are the whole tensor of the same name.

    Args:
        targets: By name in the files.
        specs: The tensors of the model.
    """
    return {
        name: _target_to_plain(target)
        for name, target in targets.items()
        if name not in specs or target != Slice.whole(specs[name])
    }


def read_slices(plain: Mapping[str, Any]) -> dict[str, Target]:
    """Inverse of ``slices_to_plain``. Raises KeyError, TypeError or ValueError if it is no such record."""
    return {name: _read_target(target) for name, target in plain.items()}


def _target_to_plain(target: Target) -> dict[str, Any]:
    if isinstance(target, Joined):
        return {"dim": target.dim, "parts": [_target_to_plain(part) for part in target.parts]}
    dims = [[[axis.dim, axis.step, axis.size] for axis in axes] for axes in target.dims]
    return {"source": target.source, "start": list(target.start), "dims": dims}


def _read_target(plain: Any) -> Target:
    if "parts" in typed(plain, dict):
        return Joined(tuple(_read_slice(part) for part in typed(plain["parts"], list)), count(plain["dim"]))
    return _read_slice(plain)


def _read_slice(plain: Any) -> Slice:
    dims = tuple(tuple(_read_axis(axis) for axis in typed(axes, list)) for axes in typed(plain["dims"], list))
    return Slice.of_axes(typed(plain["source"], str), shape(plain["start"]), dims)


def _read_axis(plain: Any) -> Axis:
    dim, step, size = typed(plain, list)
    return Axis(count(dim), count(step), count(size))
