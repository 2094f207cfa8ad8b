"""What the class of a transformers model says of its names: those in memory, and those of files of any generation."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shardsmith.errors import UnsupportedFormatError
from shardsmith.tensors.tensors import TensorSpec

if TYPE_CHECKING:
    from torch import nn

    from shardsmith.name_maps.transformers import TransformersNames


class ComputedTensorsError(UnsupportedFormatError):
    """A class computes tensors when it saves, so that its files cannot be made of slices of what is in memory."""


class ClassNames:
    """A class's names (``Renames``). The model is made, without data, when something is asked for the first time.

    Until then nothing is imported that takes longer than reading an index.
    """

    def __init__(self, origin: str | Path, make: Callable[[], Any]) -> None:
        """``make`` makes the model on the meta device. It may raise UnsupportedFormatError: then nothing is known."""
        self._origin = origin
        self._make = make

    @classmethod
    def of_directory(cls, base: Path) -> ClassNames:
        """Return those of the class that a directory's config.json names. Runs no code of the directory."""

        def make() -> Any:
            from shardsmith.name_maps.transformers import meta_model_of

            return meta_model_of(base)

        return cls(base, make)

    @classmethod
    def of_model(cls, live: nn.Module) -> ClassNames:
        """Return those of a live model without wrappers around it. Only reads it."""

        def make() -> Any:
            from shardsmith.name_maps.transformers import meta_twin_of

            return meta_twin_of(live)

        return cls(type(live).__name__, make)

    @property
    def is_known(self) -> bool:
        """Whether there is such a class, and a transformers that says how it names things."""
        return self._model is not None

    @functools.cached_property
    def specs(self) -> Mapping[str, TensorSpec]:
        """The tensors in memory, of tied ones the kept name; empty if there is no such class."""
        state = {} if self._model is None else self._model.state_dict()
        return {n: TensorSpec(n, tuple(t.shape), t.dtype) for n, t in state.items() if n not in self.tied}

    @functools.cached_property
    def tied(self) -> Mapping[str, str]:
        """Of the tensors in memory, alias -> the kept name."""
        from shardsmith.tensors.fqn import tied_weights

        return {} if self._model is None else tied_weights(self._model)

    def in_memory(self, names: Collection[str]) -> dict[str, str]:
        """Names in files of any generation -> what the model calls them, as ``from_pretrained`` renames them.

        What it cuts up or joins is only renamed. Empty if there is no such class, or two names would become one.
        """
        if self._model is None:
            return {}
        # These are the names in memory already: nothing is to be renamed.
        if all(name in self._state for name in names):
            return {name: name for name in names}
        renamed = _renamed(self._model, names, self._state)
        # Two names that become one cannot both be right: then nothing is known.
        return renamed if len(set(renamed.values())) == len(renamed) else {}

    def to_files(self, files: Mapping[str, TensorSpec]) -> TransformersNames:
        """The map from memory to files with such tensors. Raises UnsupportedFormatError if there is no such class."""
        from shardsmith.name_maps.transformers import TransformersNames

        if self._model is None:
            raise UnsupportedFormatError(self._origin, "transformers cannot make this model")
        return TransformersNames.of_files(self._origin, self._model, files)

    @functools.cached_property
    def _model(self) -> Any:
        try:
            import transformers.conversion_mapping  # noqa: F401  # transformers 4 has none and renames nothing by it

            return self._make()
        except (ImportError, UnsupportedFormatError):
            return None

    @functools.cached_property
    def _state(self) -> dict[str, Any]:
        return dict(self._model.state_dict())


def _renamed(model: Any, names: Collection[str], state: dict[str, Any]) -> dict[str, str]:
    """As ``from_pretrained`` goes about it; conversions remember what they have met, so they are made anew."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, dot_natural_key, rename_source_key

    renamings = [found for found in get_model_conversion_mapping(model) if isinstance(found, WeightRenaming)]
    # In the order of from_pretrained: what a conversion has met decides what it does with later names.
    ordered = sorted(names, key=dot_natural_key)
    return {name: rename_source_key(name, renamings, [], model.base_model_prefix, state)[0] for name in ordered}
