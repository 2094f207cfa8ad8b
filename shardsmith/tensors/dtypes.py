"""Which dtype each tensor has in the files: one for all that are floating-point, or one for each pattern of names."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence, Set
from fnmatch import fnmatchcase

import torch

from shardsmith.errors import UsageError
from shardsmith.tensors.tensors import TensorSpec

CASTABLE = frozenset({torch.float64, torch.float32, torch.float16, torch.bfloat16})
"""Dtypes that a choice changes. Integers, bools and float8 (quantised) stay as they are."""

_PACKED = frozenset({torch.int8, torch.uint8, torch.int16, torch.int32})
"""Of integers that hold several weights, or one each."""

DtypeChoice = torch.dtype | Mapping[str, torch.dtype | None] | None
"""One dtype; or one by pattern, of which the first that matches a name decides; None keeps what is there."""


SHORT_NAMES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "fp64": "float64"}
"""Names that configs of trainers use."""


def parse_dtypes(
    choice: str | torch.dtype | Mapping[str, str | torch.dtype], exceptions: Iterable[str] = ()
) -> DtypeChoice:
    """Return the choice that words name: ``"bfloat16"``, ``"bf16"``, ``"original"``, or a mapping of patterns to such.

    A dtype of torch may stand for its name.

    Args:
        choice: The dtype, in words or as it is.
        exceptions: More patterns, as ``"PATTERN=DTYPE"``, which come first.

    Raises:
        UsageError: torch knows no floating-point dtype of that name, or an exception cannot be read.
    """
    if isinstance(choice, Mapping):
        return {pattern: _parse(name) for pattern, name in choice.items()}
    rules: dict[str, torch.dtype | None] = {}
    for text in exceptions:
        pattern, separator, name = text.rpartition("=")
        if not separator or not pattern:
            raise UsageError(f"{text!r}: write PATTERN=DTYPE, such as '*norm*=float32'")
        rules.setdefault(pattern, _parse(name))
    return {**rules, "*": _parse(choice)} if rules else _parse(choice)


def general_dtype(choice: DtypeChoice) -> torch.dtype | None:
    """Return the dtype of what no pattern but ``"*"`` names; None where that keeps the dtype that it has."""
    return choice.get("*") if isinstance(choice, Mapping) else choice


def cast_specs(
    specs: Sequence[TensorSpec], choice: DtypeChoice, kept: Set[str] = frozenset()
) -> tuple[TensorSpec, ...]:
    """Return the tensors as they will be written.

    Args:
        specs: As they are.
        choice: The dtypes to write.
        kept: Names that keep their dtype, as scales of quantised weights do, unless a pattern names them.

    Raises:
        UsageError: a pattern decides about none of them, because nothing has such a name or another comes first.
    """
    kept = kept | _scaling(specs)
    if not isinstance(choice, Mapping):
        return tuple(spec if spec.name in kept else _cast(spec, choice) for spec in specs)
    deciding = {spec.name: _first_match(spec.name, choice) for spec in specs}
    if idle := [pattern for pattern in choice if pattern not in deciding.values() and pattern != "*"]:
        raise UsageError(
            f"dtype: {', '.join(map(repr, idle))} decides about no tensor: there is none of such a name, or a pattern "
            "before it takes them all. Correct it, put it first, or leave it out"
        )
    chosen = {
        name: choice[pattern]
        for name, pattern in deciding.items()
        if pattern is not None and not (pattern == "*" and name in kept)
    }
    return tuple(_cast(spec, chosen.get(spec.name)) for spec in specs)


def is_quantized(spec: TensorSpec) -> bool:
    """Return whether a tensor is of a dtype that only quantised weights have."""
    # Floating point of one byte is float8 (or a packed float4): nothing else has a use for it.
    if spec.dtype.is_floating_point:
        return spec.dtype.itemsize == 1
    return spec.dtype in _PACKED and len(spec.shape) > 1


def _scaling(specs: Iterable[TensorSpec]) -> set[str]:
    """What belongs to a quantised weight, such as its scales: rounded, it would change every value of the weight."""
    specs = list(specs)
    # Scales lie in the module of their weight; its bias is not scaled and may be cast.
    modules = {spec.name.rpartition(".")[0] for spec in specs if is_quantized(spec)}
    return {s.name for s in specs if s.name.rpartition(".")[0] in modules and not s.name.endswith(".bias")}


def _first_match(name: str, patterns: Iterable[str]) -> str | None:
    return next((pattern for pattern in patterns if fnmatchcase(name, pattern)), None)


def _cast(spec: TensorSpec, dtype: torch.dtype | None) -> TensorSpec:
    return TensorSpec(spec.name, spec.shape, dtype) if dtype and spec.dtype in CASTABLE else spec


def _parse(name: str | torch.dtype) -> torch.dtype | None:
    if name == "original":
        return None
    if isinstance(name, str):
        name = name.removeprefix("torch.")
    dtype = getattr(torch, SHORT_NAMES.get(name, name), None) if isinstance(name, str) else name
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        match = difflib.get_close_matches(str(name), [*map(dtype_name, CASTABLE), "original"], 1)
        cure = f'; did you mean "{match[0]}"?' if match else ""
        raise UsageError(
            f'dtype "{name}": give a floating-point dtype of torch, such as "bfloat16", or "original"{cure}'
        )
    return dtype


def dtype_name(dtype: torch.dtype) -> str:
    """Return ``bfloat16`` for ``torch.bfloat16``."""
    return str(dtype).removeprefix("torch.")
