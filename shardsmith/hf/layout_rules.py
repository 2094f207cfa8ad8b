"""Tensors that a checkpoint holds in another layout than the base model: which they are, and what is done to them.

A rule is a pattern of names and a transform with its inverse. It is used where the checkpoint's tensor and the base
model's have different shapes, in the direction that leads to the base's; a difference without a rule stays an error.
Rules are declared: ours here, more in a file or by packages in the entry-point group ``shardsmith.layout_rules``.
"""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from shardsmith.errors import UsageError
from shardsmith.name_maps.slices import Slice
from shardsmith.tensors.tensors import Shape, TensorSpec

ENTRY_POINTS = "shardsmith.layout_rules"
"""Group of functions without arguments that return a list of LayoutRule."""


class Transform(Protocol):
    """What a rule does to a tensor, in both directions."""

    def apply(self, whole: Slice, wanted: Shape) -> Slice:
        """Return the tensor in the wanted shape. Raises ValueError or IndexError if it does not lead there."""
        ...


class Conv2dToLinear:
    """(out, channels, height, width) <-> (out, height * width * channels), for patches with their channels last."""

    def apply(self, whole: Slice, wanted: Shape) -> Slice:
        if len(whole.shape) == 4 and len(wanted) == 2:
            # The vision tower's patches have the channels last: height and width come before them.
            return whole.permute(0, 2, 3, 1).reshape(*wanted)
        out, channels, height, width = wanted
        return whole.reshape(out, height, width, channels).permute(0, 3, 1, 2)


class Flatten:
    """(out, ...) <-> (out, rest), in the same order."""

    def apply(self, whole: Slice, wanted: Shape) -> Slice:
        return whole.reshape(*wanted)


class Transposed:
    """(a, b) <-> (b, a)."""

    def apply(self, whole: Slice, wanted: Shape) -> Slice:  # noqa: ARG002
        return whole.transpose(0, 1)


@dataclass(frozen=True, slots=True)
class Steps:
    """A sequence of ``permute`` and ``reshape``, and the one that undoes it."""

    forward: tuple[tuple[str, tuple[int, ...]], ...]
    inverse: tuple[tuple[str, tuple[int, ...]], ...]

    def apply(self, whole: Slice, wanted: Shape) -> Slice:
        # Which of the two leads to the wanted shape is tried out: a rule is written once for both directions.
        for steps in (self.forward, self.inverse):
            found = whole
            try:
                for operation, numbers in steps:
                    found = getattr(found, operation)(*numbers)
            # A step that does not go with this shape means the other direction.
            except (ValueError, IndexError):
                continue
            # No steps: an empty inverse would lead nowhere and be taken for a way.
            if steps and found.shape == wanted:
                return found
        raise ValueError(f"no way from {whole.shape} to {wanted}")


TRANSFORMS: dict[str, Transform] = {
    "conv2d_to_linear": Conv2dToLinear(),
    "flatten": Flatten(),
    "transpose": Transposed(),
}


@dataclass(frozen=True, slots=True)
class LayoutRule:
    """A change of layout, and the tensors that it applies to."""

    pattern: str
    """Of names, as in ``fnmatch``."""
    name: str
    """Of the transform, for people."""
    transform: Transform


DECLARED = (LayoutRule("*patch_embedding.weight", "conv2d_to_linear", TRANSFORMS["conv2d_to_linear"]),)
"""SigLIP's patch embedding, which NaViT turns from a convolution into a linear layer of the same name."""


def find_rules(file: Path | None = None) -> list[LayoutRule]:
    """Return the rules of a file, then those that installed packages offer, then ours: the first that fits is used.

    Args:
        file: TOML or JSON: a list ``rule`` of tables with a ``pattern`` and a ``transform`` of ours, or with ``steps``,
            each ``{permute = [...]}`` or ``{reshape = [...]}``, and the ``inverse`` ones.

    Raises:
        UsageError: the file cannot be read, or says something else.
    """
    own = _read_rules(file) if file is not None else []
    offered = [rule for point in entry_points(group=ENTRY_POINTS) for rule in point.load()()]
    return [*own, *offered, *DECLARED]


class LayoutRules:
    """A name map that keeps the names and gives tensors the base model's layout.

    Attributes:
        used: Name -> the rule that was used, of all tensors that it was asked about.
    """

    def __init__(self, template: Mapping[str, TensorSpec], rules: Iterable[LayoutRule]) -> None:
        self._template = template
        self._rules = list(rules)
        self.used: dict[str, LayoutRule] = {}

    def targets(self, specs: Mapping[str, TensorSpec]) -> Mapping[str, Slice]:
        """As ``NameMap.targets``."""
        return {name: self._target(spec) for name, spec in specs.items()}

    def _target(self, spec: TensorSpec) -> Slice:
        whole = Slice.whole(spec)
        wanted = self._template.get(spec.name)
        # Another number of elements is no other layout, and stays an error.
        if wanted is None or wanted.shape == spec.shape or wanted.numel != spec.numel:
            return whole
        for rule in self._rules:
            if fnmatchcase(spec.name, rule.pattern):
                try:
                    found = rule.transform.apply(whole, wanted.shape)
                except (ValueError, IndexError):
                    # The next rule that fits the name may lead there.
                    continue
                if found.shape == wanted.shape:
                    self.used[spec.name] = rule
                    return found
        return whole


def order_of_patches(values: Tensor, base: Tensor, channels: int = 3) -> str:
    """Return whether a linear patch embedding has its inputs in the order of the base model's, told by their values.

    A convolution that was reshaped without being permuted has the right shape and the wrong values: the same numbers
    at other places. If the weights descend from the base's they are nearer to it in one of the two orders.

    Args:
        values: (out, height * width * channels), or a convolution's (out, channels, height, width).
        base: The same of the base model, in the same shape.
        channels: Number of channels of the images.

    Returns:
        "as in the base", "channels first", or "undecided": they do not descend from the base's, or are too far from it.
    """
    if values.shape != base.shape:
        return "undecided"
    ours, theirs = _linear(values), _linear(base)
    # Of a linear layer the side of a patch is not recorded; patches are square.
    side = math.isqrt(ours.shape[1] // channels) if ours.dim() == 2 else 0
    if not side or side * side * channels != ours.shape[1]:
        return "undecided"
    # What the values would be if the channels lay first: brought to channels last.
    as_conv = ours.view(-1, channels, side, side).permute(0, 2, 3, 1).reshape(ours.shape)
    here, there = (float((given - theirs).square().sum()) for given in (ours, as_conv))
    # Of weights that do not descend from the base's, both distances are about equal.
    if min(here, there) > 0.8 * max(here, there):
        return "undecided"
    return "as in the base" if here < there else "channels first"


def _linear(patches: Tensor) -> Tensor:
    """In float32, channels last."""
    as_linear = patches.permute(0, 2, 3, 1).reshape(len(patches), -1) if patches.dim() == 4 else patches
    return as_linear.float()


def _read_rules(file: Path) -> list[LayoutRule]:
    try:
        text = file.read_text()
        content: Any = json.loads(text) if file.suffix == ".json" else tomllib.loads(text)
        tables = content["rule"]
        return [_parse_rule(table) for table in tables]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UsageError(f"{file}: holds no layout rules: {type(error).__name__}: {error}") from error


def _parse_rule(table: Mapping[str, Any]) -> LayoutRule:
    if unknown := sorted(table.keys() - {"pattern", "transform", "steps", "inverse"}):
        raise ValueError(f"unknown: {', '.join(unknown)}")
    pattern, transform = table["pattern"], table.get("transform")
    # Exactly one of the two.
    if not isinstance(pattern, str) or (transform is None) == ("steps" not in table):
        raise ValueError("a rule has a pattern and either a transform or steps")
    if transform is not None:
        if transform not in TRANSFORMS:
            raise ValueError(f"there is no transform {transform!r}; known are {', '.join(TRANSFORMS)}")
        return LayoutRule(pattern, transform, TRANSFORMS[transform])
    steps = Steps(_parse_steps(table["steps"]), _parse_steps(table.get("inverse", [])))
    return LayoutRule(pattern, "steps", steps)


def _parse_steps(steps: Sequence[Mapping[str, Any]]) -> tuple[tuple[str, tuple[int, ...]], ...]:
    found = []
    for step in steps:
        # Each step is a table of one entry.
        ((operation, numbers),) = step.items()
        if operation not in ("permute", "reshape") or any(type(n) is not int for n in numbers):
            raise ValueError(f"{dict(step)} is neither a permute nor a reshape to whole numbers")
        found.append((operation, tuple(numbers)))
    return tuple(found)


def is_patch_rule(rule: LayoutRule) -> bool:
    """Return whether the order of what it makes can be told by values."""
    return isinstance(rule.transform, Conv2dToLinear)
