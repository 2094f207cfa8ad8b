"""Tensors that hold what belongs to another one: looked up among all tensors of the model that have their shape."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping

import torch
from torch import Tensor

from shardsmith.compare.values import TensorComparison, compare_tensor
from shardsmith.formats.models import ModelSource
from shardsmith.tensors.tensors import Chunk, TensorSource, read_into

# 1: the list of layers; 2: the number; 3: the rest of the name.
LAYER = re.compile(r"^(.*?(?:^|\.)(?:layers|h|blocks|block|layer))\.([0-9]+)\.(.*)$")
# Elements of a row that are compared first, to find the few tensors worth reading as a whole.
_SAMPLED_ELEMENTS = 1024
# Cosine of two samples, or of two trained tensors, from which they may be one.
_ALIKE = 0.95
_MOST_CANDIDATES = 8


def find_swapped(
    left: TensorSource, reference: ModelSource, compared: Mapping[str, TensorComparison], *, trained: bool
) -> dict[str, str]:
    """Name here -> the model's name of what it holds, for those that hold another tensor of the model.

    A few elements of each are compared with those of every tensor of that shape, then all of the ones that are alike.

    Args:
        left: The tensors of the checkpoint.
        reference: The tensors of the model.
        compared: The tensors that are not the model's, to be looked up.
        trained: Training has moved the values: then a matrix counts by its direction, and a vector is not looked up.
    """
    # Only tensors of a shape that is looked for can be held by one of these.
    shapes = {found.left.shape for found in compared.values()}
    samples: dict[tuple[int, ...], dict[str, Tensor]] = {shape: {} for shape in shapes}
    for name, spec in reference.specs.items():
        if spec.shape in samples:
            samples[spec.shape][name] = _sample(reference, name)
    swapped = {}
    for name, found in compared.items():
        # A trained vector, such as a norm, is near to many others.
        if trained and len(found.left.shape) < 2:
            continue
        for other in _alike(name, _sample(left, name), samples[found.left.shape]):
            if _holds(left, reference, found, other, trained=trained):
                swapped[name] = other
                break
    return swapped


def describe_swapped(swapped: Mapping[str, str]) -> str:
    """Return which holds which, layer by layer where all of a layer has moved to the same other one."""
    pairs: dict[tuple[str, str], int] = {}
    for name, other in swapped.items():
        here, there = LAYER.match(name), LAYER.match(other)
        # The same part of the same list of layers: then the whole layers are named, once.
        moved = here and there and (here[1], here[3]) == (there[1], there[3])
        pair = (f"{here[1]}.{here[2]}", f"{there[1]}.{there[2]}") if moved and here and there else (name, other)
        pairs[pair] = pairs.get(pair, 0) + 1
    return ", ".join(f"{here} holds what belongs to {there}" for here, there in pairs)


def is_string_order(swapped: Mapping[str, str], names: Iterable[str]) -> bool:
    """Whether layers lie in the order of their numbers as text, 0, 1, 10, 11, 2, as a sorted list of names has them."""
    # Place in the stack -> number of the layer that lies there.
    moved = {(m[1], int(m[2])): int(o[2]) for m, o in _pairs(swapped) if (m[1], m[3]) == (o[1], o[3])}
    counts: dict[str, set[int]] = {}
    for match in filter(None, map(LAYER.match, names)):
        counts.setdefault(match[1], set()).add(int(match[2]))
    expected: dict[tuple[str, int], int] = {}
    for stack in {stack for stack, _ in moved}:
        # The layers as they are, beside them in the order of their names as text.
        pairs = zip(sorted(counts[stack]), sorted(counts[stack], key=str), strict=True)
        expected |= {(stack, place): number for place, number in pairs if place != number}
    # A checkpoint read with sorted names, or written with them: the one is the inverse of the other.
    back = {(stack, number): place for (stack, place), number in expected.items()}
    return bool(moved) and moved in (expected, back)


def _pairs(swapped: Mapping[str, str]) -> Iterator[tuple[re.Match[str], re.Match[str]]]:
    for name, other in swapped.items():
        here, there = LAYER.match(name), LAYER.match(other)
        if here and there:
            yield here, there


def _alike(name: str, sample: Tensor, others: Mapping[str, Tensor]) -> Collection[str]:
    """The likeliest first."""
    # Both have length 1, so the product is the cosine.
    cosines = {other: float(torch.dot(sample, values)) for other, values in others.items() if other != name}
    near = sorted((other for other, cosine in cosines.items() if cosine > _ALIKE), key=lambda other: -cosines[other])
    return near[:_MOST_CANDIDATES]


def _holds(left: TensorSource, reference: ModelSource, own: TensorComparison, other: str, *, trained: bool) -> bool:
    """Whether a tensor has the values of another one of the model, and not better ones of its own."""
    found = compare_tensor(left, reference, own.name, other)
    if found.distance is None or found.rounded_alike:
        return True
    # After training nothing is equal: it must be near to the other one and far from its own.
    return trained and found.distance.cosine > _ALIKE and own.distance is not None and own.distance.cosine < _ALIKE / 2


def _sample(source: TensorSource, name: str) -> Tensor:
    """Some elements as a vector of length 1: the beginnings of a few rows, or of the whole where it has no rows."""
    shape = source.specs[name].shape
    if not shape or 0 in shape:
        return torch.ones(1, device="cpu")
    # From three places: the first rows alone may be alike, such as those of unused tokens.
    rows = sorted({0, shape[0] // 2, shape[0] - 1}) if len(shape) > 1 else [0]
    # Of the dimensions behind the row only the last is wide: one short box to read for each row.
    inner = [min(size, _SAMPLED_ELEMENTS) if i == len(shape) - 2 else 1 for i, size in enumerate(shape[1:])]
    sizes = (1, *inner) if len(shape) > 1 else (min(shape[0], _SAMPLED_ELEMENTS),)
    boxes = [Chunk((row, *(0 for _ in shape[1:])), sizes) for row in rows]
    parts = [read_into(source, name, box, torch.empty(sizes, device="cpu")).reshape(-1) for box in boxes]
    return torch.nn.functional.normalize(torch.cat(parts).nan_to_num(0, 0, 0), dim=0)
