"""Checks of what a JSON file of ours says, field by field. Each raises KeyError, TypeError or ValueError."""

from __future__ import annotations

import dataclasses
import reprlib
from typing import Any

import torch

from shardsmith.tensors.digest import Digest


def require_fields(record: Any, kind: type) -> None:
    """The record is an object with the fields of a dataclass, and no others; those that are never compared are none."""
    fields = {item.name for item in dataclasses.fields(kind) if item.compare}
    if wrong := sorted(set(typed(record, dict)) ^ fields):
        raise ValueError(f"fields of {kind.__name__} are missing or unknown: {reprlib.repr(wrong)}")


def typed(value: Any, kind: type) -> Any:
    """The value, of just this type: True is no int."""
    if type(value) is not kind:
        raise TypeError(f"{reprlib.repr(value)} is not of type {kind.__name__}")
    return value


def typed_or_none(value: Any, kind: type) -> Any:
    """As ``typed``; null is None."""
    return None if value is None else typed(value, kind)


def texts(value: Any) -> dict[str, str]:
    """Return an object of strings."""
    return {name: typed(text, str) for name, text in typed(value, dict).items()}


def digest_text(value: Any) -> str:
    """Return a digest, as a ``Digest`` writes it. An XXH3-128 has the same form."""
    return str(Digest.parse(typed(value, str)))


def count(value: Any) -> int:
    """Return a number of things."""
    if type(value) is not int or not 0 <= value < 2**63:
        raise ValueError(f"{reprlib.repr(value)} is not a count")
    return value


def counts(value: Any) -> dict[str, int]:
    """Return an object of counts."""
    return {name: count(number) for name, number in typed(value, dict).items()}


def shape(value: Any) -> tuple[int, ...]:
    """Return a list of sizes."""
    return tuple(count(size) for size in typed(value, list))


def known_dtype(value: Any) -> str:
    """Return the name of a dtype of torch."""
    if type(value) is not str or not isinstance(vars(torch).get(value), torch.dtype):
        raise ValueError(f"not a dtype: {reprlib.repr(value)}")
    return value
