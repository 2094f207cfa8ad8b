"""What can be wrong with a model that is about to train. A fault is data; its code says what it does to the loss."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from shardsmith.compare.codes import CODES

_LAYER = re.compile(r"(?P<layer>(?:.*\.)?(?:layers|h|blocks|block|layer)\.\d+)\..+")


@dataclass(frozen=True, slots=True)
class LoadFault:
    """One tensor or buffer that is not what the source says."""

    code: str
    """One of ``EFFECTS``."""
    name: str
    problem: str
    """Expected and found."""

    def __str__(self) -> str:
        return f"{self.name}: {self.problem} [{self.code}]"


_AS_DIAGNOSED = (
    "nothing-loaded",
    "layer-not-loaded",
    "tensor-not-loaded",
    "embedding-differs",
    "head-differs",
    "tie-broken",
    "norms-are-one",
    "qk-norms-dropped",
    "constant-values",
    "values-differ",
    "not-finite",
    "shape-differs",
    "rope-differs",
    "norm-eps-differs",
    "config-differs",
    "buffer-zero",
    "buffer-not-finite",
    "buffer-differs",
)
_OF_LIVE_MODELS = {
    "replicas-differ": "the ranks train different models",
    "missing-in-source": "it starts from what the model happened to hold",
    "missing-in-model": "the model lacks a part of the source; the loss may hardly show it",
    "buffer-without-reference": "so it cannot be checked",
    "beyond-range": "finite weights are infinite in the model; make it in bfloat16 or float32",
}
EFFECTS: Mapping[str, str] = {**{code: CODES[code].effect for code in _AS_DIAGNOSED}, **_OF_LIVE_MODELS}
"""By code: what it does to the loss. The codes are headings of docs/troubleshooting.md."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Look:
    """What a part of a tensor holds. ``a + b`` is what two parts hold."""

    least: float
    """Of the finite values; 0 without any."""
    greatest: float
    not_finite: int
    poisoned: int
    """Elements that are what the poison left there."""
    numel: int

    def __add__(self, other: Look) -> Look:
        """What two parts hold together."""
        # A part without a finite value has 0 in ``least`` and ``greatest``, which must not count.
        finite = [look for look in (self, other) if look.not_finite < look.numel]
        return Look(
            least=min((look.least for look in finite), default=0.0),
            greatest=max((look.greatest for look in finite), default=0.0),
            not_finite=self.not_finite + other.not_finite,
            poisoned=self.poisoned + other.poisoned,
            numel=self.numel + other.numel,
        )


NOTHING = Look(least=0.0, greatest=0.0, not_finite=0, poisoned=0, numel=0)
"""In no part at all."""


def classify(
    looks: Mapping[str, Look],
    total: int,
    matrices: frozenset[str],
    ends: tuple[frozenset[str], frozenset[str]],
    known: Mapping[str, str],
) -> list[LoadFault]:
    """Return the faults of tensors whose values are wrong.

    Args:
        looks: By name, of every tensor at fault.
        total: How many tensors the model has.
        matrices: Names of all tensors of the model with two dimensions or more.
        ends: Names of input embeddings and of output embeddings.
        known: Codes that are known for other reasons.
    """
    # One line for all of them: hundreds of lines would hide the cause.
    if _nothing(looks, matrices):
        names = ", ".join([*looks][:3])
        return [
            LoadFault(
                "nothing-loaded", f"{len(looks)} of {total} tensors", f"differ, such as {names}; {_reason(looks)}"
            )
        ]
    layers = _whole_layers(looks, matrices)
    codes = {name: known.get(name) or _code(name, look, layers, ends) for name, look in looks.items()}
    return [LoadFault(codes[name], name, _words(codes[name], look)) for name, look in looks.items()]


def _nothing(looks: Mapping[str, Look], matrices: frozenset[str]) -> bool:
    return len(matrices) > 2 and matrices <= looks.keys()


def _reason(looks: Mapping[str, Look]) -> str:
    poisoned = sum(look.poisoned == look.numel for look in looks.values())
    if poisoned:
        return f"{poisoned} were not touched by the load"
    return "none is that of the source: another model was loaded, or none"


def _whole_layers(looks: Iterable[str], matrices: frozenset[str]) -> frozenset[str]:
    """Layers of which every matrix is at fault."""
    wrong = set(looks)
    layers: dict[str, list[str]] = {}
    for name in matrices:
        if match := _LAYER.fullmatch(name):
            layers.setdefault(match["layer"], []).append(name)
    return frozenset(layer for layer, names in layers.items() if wrong.issuperset(names))


def _code(name: str, look: Look, layers: frozenset[str], ends: tuple[frozenset[str], frozenset[str]]) -> str:
    match = _LAYER.fullmatch(name)
    if match and match["layer"] in layers:
        return "layer-not-loaded"
    # The poison of floating-point tensors is NaN: only what is not finite beyond it is a fault of its own.
    if look.not_finite > look.poisoned:
        return "not-finite"
    if name in ends[0]:
        return "embedding-differs"
    if name in ends[1]:
        return "head-differs"
    if look.poisoned:
        return "tensor-not-loaded"
    if look.least == look.greatest and look.numel > 1:
        return "norms-are-one" if look.least == 1 and "norm" in name else "constant-values"
    return "values-differ"


def _words(code: str, look: Look) -> str:
    if code == "replicas-differ":
        return "ranks that should hold the same part of it hold different values"
    if look.poisoned:
        return f"{look.poisoned} of {look.numel} elements were not touched by the load"
    if look.not_finite:
        return f"{look.not_finite} of {look.numel} elements are not finite"
    if look.least == look.greatest and look.numel > 1:
        return f"all {look.numel} elements are {look.least:g}, those of the source are others"
    return f"other values than in the source; they lie from {look.least:g} to {look.greatest:g}"
