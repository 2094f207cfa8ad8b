"""What is asked of the class that a config.json names, and what its own loader would make of certain tensors.

The measure is the library's, not ours: ``transformers_class.py`` and ``diffusers_class.py`` ask it.
"""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from shardsmith.tensors.tensors import Shape, TensorSpec

DIFFUSERS_KEY = "_class_name"
"""In a config.json of diffusers: what ``architectures`` is in one of transformers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Fit:
    """What a class makes of certain tensors."""

    model_class: str
    """Such as ``LlamaForCausalLM of transformers 5.24.0``."""
    missing: tuple[str, ...] = ()
    """Tensors of the class that would keep random values, by its names."""
    unexpected: tuple[str, ...] = ()
    """Tensors that it has no place for."""
    ignored: tuple[str, ...] = ()
    """Tensors that it has no place for either, and that its loader passes over without a word."""
    shapes: Mapping[str, tuple[Shape, Shape]] = field(default_factory=dict)
    """Tensors of another shape, by the name in the class -> the given shape, and that of the class."""
    kinds: Mapping[str, tuple[torch.dtype, torch.dtype]] = field(default_factory=dict)
    """Whole numbers for what the class has as floating-point numbers, or the reverse: the given dtype, the class's."""
    error: str | None = None
    """What its loader raises."""

    @property
    def is_exact(self) -> bool:
        """Whether every tensor has its place, and every place its tensor."""
        return not self.count

    @property
    def count(self) -> int:
        """Number of differences."""
        found = len(self.missing) + len(self.unexpected) + len(self.shapes) + len(self.kinds)
        return found + (self.error is not None)

    @property
    def misplaced(self) -> int:
        """Number of tensors without a place, and of places without a tensor."""
        return len(self.missing) + len(self.unexpected) + len(self.ignored)

    @property
    def problems(self) -> list[str]:
        """A line for each difference."""
        lines = [f"{name}: in the model, not in the files" for name in self.missing]
        lines += [f"{name}: in the files, not in the model" for name in self.unexpected]
        lines += [f"{name}: {found} in the files, {wanted} in the model" for name, (found, wanted) in self._pairs()]
        return [*sorted(lines), *([self.error] if self.error else [])]

    @property
    def lines(self) -> list[tuple[str, str]]:
        """Name and line of each difference."""
        return [(line.split(": ", 1)[0], line) for line in self.problems]

    @property
    def class_name(self) -> str:
        """The class without library and version."""
        return self.model_class.split(" of ", 1)[0]

    def _pairs(self) -> Iterator[tuple[str, tuple[object, object]]]:
        yield from self.shapes.items()
        yield from self.kinds.items()


@dataclass(frozen=True, slots=True)
class Kept:
    """What a class has in float32 when it is loaded in a narrower dtype."""

    names: Set[str] = frozenset()
    """Of the tensors."""
    unknown: str = ""
    """Why it may be more than these; empty if these are all."""


class ModelClass(Protocol):
    """A class of models, as a config describes it."""

    name: str
    """With the library and its version."""

    @property
    def effective_config(self) -> Mapping[str, Any]:
        """The config with every default filled in."""
        ...

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        """The state dict of the class, by its names in memory; tied tensors under each of their names."""
        ...

    @property
    def tied(self) -> Mapping[str, str]:
        """Alias -> kept name in memory, for tensors that the class ties; names in files count as aliases, too."""
        ...

    @property
    def unsaved(self) -> Set[str]:
        """Tensors of the state dict that its files do not hold, for the class computes them."""
        ...

    def fit(self, specs: Mapping[str, TensorSpec]) -> Fit:
        """Return what its loader makes of a directory that holds these tensors. Raises nothing."""
        ...

    def kept_from(self, dtype: torch.dtype, specs: Mapping[str, TensorSpec]) -> Kept:
        """Return those of a directory's tensors that its loader has in float32 if it is asked for a narrower dtype.

        Biases and routers of experts, for two. Its own save writes them in float32, so rounded they are not its own.
        """
        ...


def specs_of(state: Mapping[str, Any]) -> dict[str, TensorSpec]:
    """Return the tensors of a state dict."""
    return {n: TensorSpec(n, tuple(t.shape), t.dtype) for n, t in state.items() if isinstance(t, Tensor)}


def other_kinds(
    given: Mapping[str, TensorSpec], wanted: Mapping[str, TensorSpec]
) -> dict[str, tuple[torch.dtype, torch.dtype]]:
    """Return, as ``Fit.kinds``, the tensors of which one side alone is of floating-point numbers."""
    return {
        name: (spec.dtype, wanted[name].dtype)
        for name, spec in given.items()
        if name in wanted and spec.dtype.is_floating_point != wanted[name].dtype.is_floating_point
    }


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Within it nothing is warned of, and random numbers are as they were afterwards.

    Both are of the whole process: a thread beside the training leaves them alone. Models without data draw none.
    """
    # ``warnings`` and the generator are of the whole process, so only the main thread may change them.
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
