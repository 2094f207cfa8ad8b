"""Weights that one checkpoint holds as quantised numbers beside their scales, and the other as plain ones."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from shardsmith.errors import UnsupportedFormatError
from shardsmith.formats.models import ModelSource
from shardsmith.tensors.dtypes import is_quantized
from shardsmith.tensors.tensors import TensorSpec

CURE = "Write plain weights of the quantized model (load it, dequantize(), save_pretrained()), and compare those"

_SCALE = re.compile(r"(^|[._])scales?(_inv)?$")
_MOST_BITS = 9
"""Of a number: eight, and what rows are padded with."""


@dataclass(frozen=True, slots=True)
class Quantized:
    """What of a model is quantised where another has plain weights."""

    weights: frozenset[str] = frozenset()
    """Names in the plain model, whose values cannot be compared as they stand."""
    beside: frozenset[str] = frozenset()
    """Tensors of the quantised one alone that belong to them: scales, and numbers under names of their own."""


def find_quantized(held: ModelSource, plain: Mapping[str, TensorSpec]) -> Quantized:
    """Find the weights of a model that are quantised and have their scales, by names and dtypes. Reads no tensor.

    8-bit numbers without scales are not among them: their values are lost, and a comparison says so.

    Args:
        held: The model, under the names of the plain one.
        plain: The tensors of the plain one.
    """
    extra = _placed(held, [name for name in held.specs if name not in plain and not name.endswith("bias")])
    lacking = {name: spec for name, spec in plain.items() if _is_weight(spec) and _is_lacking(held.specs.get(name))}
    owned: dict[str, set[str]] = {}
    by_module: dict[str, list[str]] = {}
    for name in lacking:
        by_module.setdefault(_module(name), []).append(name)
    for name, place in extra.items():
        # Of one name, as weight.SCB or gate_up_proj_scale_inv; or of the module, as scales beside qweight.
        near = by_module.get(_module(place)) or by_module.get(_module(_module(place))) or []
        named = [weight for weight in near if place.startswith(weight)]
        is_inside = _module(place) in lacking
        for weight in [max(named, key=len)] if named else [] if is_inside else by_module.get(_module(place), []):
            owned.setdefault(weight, set()).add(name)
    weights = {weight for weight, names in owned.items() if _is_scheme(weight, lacking[weight], names, held)}
    # Scales of activations and of caches lie in other modules.
    others = {name for name in extra if weights and _SCALE.search(name)}
    return Quantized(frozenset(weights), frozenset(others.union(*(owned[weight] for weight in weights))))


def require_plain(held: ModelSource, plain: Mapping[str, TensorSpec], other: Path) -> None:
    """Raise UnsupportedFormatError if a model has quantised weights where ``other``, of tensors ``plain``, has not."""
    if weights := sorted(find_quantized(held, plain).weights):
        raise UnsupportedFormatError(
            held.path,
            f"has {len(weights)} quantized weights beside their scales, such as {weights[0]}, and {other} plain ones: "
            f"the two cannot be compared as they are. {CURE}",
        )


def _is_weight(spec: TensorSpec) -> bool:
    return spec.dtype.is_floating_point and not is_quantized(spec) and len(spec.shape) > 1


def _is_lacking(spec: TensorSpec | None) -> bool:
    return spec is None or is_quantized(spec)


def _is_scheme(weight: str, plain: TensorSpec, names: Collection[str], held: ModelSource) -> bool:
    """Whether these tensors say a weight: its numbers, of a few bits each, and scales."""
    beside = [held.specs[name] for name in names]
    if not any(
        _SCALE.search(spec.name) or (spec.dtype.is_floating_point and not is_quantized(spec)) for spec in beside
    ):
        return False
    if weight in held.specs:
        return True
    # Under a name of their own they may be anything: a table, or a mask.
    packed = max((spec for spec in beside if is_quantized(spec)), key=lambda spec: spec.nbytes, default=None)
    return packed is not None and plain.numel <= 8 * packed.nbytes <= _MOST_BITS * plain.numel


def _placed(held: ModelSource, names: list[str]) -> dict[str, str]:
    """Each name -> where it would be had it moved with its module: a name that the plain model lacks is not aligned."""
    moved = {stored: name for name, stored in held.keys.items() if stored != name}
    modules = {_module(stored): _module(name) for stored, name in moved.items()} | moved
    places = {}
    for name in names:
        stored = held.keys[name]
        module = _module(stored)
        places[name] = f"{modules[module]}{stored.removeprefix(module)}" if module in modules else name
    return places


def _module(name: str) -> str:
    return name.rpartition(".")[0]
