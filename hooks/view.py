"""``View``: what of a model is written, and under which names, where that is not simply its state dict."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Protocol

from torch import Tensor, nn

from shardsmith.tensors.checkpoint_keys import EMA as AVERAGE
from shardsmith.tensors.checkpoint_keys import MAIN

from .ema import EMA


class View(Protocol):
    """What of a model is written, and as what. A class that derives from it need only say what differs.

    Attributes:
        stem: Stem of the weight files' names.
        inner: The model whose config and names are to be written; None for none.
    """

    stem: str
    inner: nn.Module | None = None

    def names(self, fqns: Collection[str]) -> dict[str, str]:
        """FQN -> name in the files, or for a name map, of what is to be written."""
        ...

    def copies(self) -> Mapping[str, str]:
        """Return the names of further copies -> that of the tensor, of tensors that are written more than once."""
        return {}

    def values(self, model: str) -> Mapping[str, Tensor]:  # noqa: ARG002
        """Return by FQN what is to be written instead of the live values, of ``"main"`` or ``"ema"``."""
        return {}

    def ready(self, ema: EMA | None) -> contextlib.AbstractContextManager[None]:  # noqa: ARG002
        """Return a context within which ``values`` are there. All ranks."""
        return contextlib.nullcontext()

    def write(self, directory: Path) -> None:  # noqa: ARG002
        """Write what else belongs to it. Rank 0, in the background."""
        return  # without it, type checkers take the method for one that must be overridden


class MergedWeights(View, Protocol):
    """A view of weights with an adapter merged into them; the live weights are as before, bit for bit."""

    _values: dict[str, dict[str, Tensor]]

    def values(self, model: str) -> Mapping[str, Tensor]:
        """Return by FQN the weights that the adapter changes."""
        return self._values[model]

    @contextlib.contextmanager
    def ready(self, ema: EMA | None) -> Iterator[None]:
        """Within it ``values`` are there, a copy of what the adapter changes. All ranks; DTensors may communicate."""
        if self._values:  # two directories of one step are staged one inside the other
            yield
            return
        try:
            # Main weights first: within `swapped_in` the layers hold the average.
            self._values[MAIN] = self.merge()
            if ema is not None:
                # `merge` takes the weights as they are, so the average goes in their place.
                with ema.swapped_in():
                    self._values[AVERAGE] = self.merge()
            yield
        finally:  # also if the average could not be merged: the next export merges the weights as they are then
            self._values = {}

    def merge(self) -> dict[str, Tensor]:
        """Return copies of the merged weights by FQN; the live ones are as before. All ranks; may communicate."""
        ...
