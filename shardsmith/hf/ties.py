"""Which names of a checkpoint are one tensor: what the class ties, or what is bit for bit a tensor that the base lists.

A checkpoint of ours says itself what is tied. A plain ``dcp.save(model.state_dict())`` holds tied weights under each of
their names.
"""

from __future__ import annotations

from collections.abc import Collection, Container, Iterable, Mapping

import torch

from shardsmith.hf.model_class import ModelClass
from shardsmith.tensors.digest import Digest, digest_tensor
from shardsmith.tensors.tensors import Chunk, TensorSource, TensorSpec, read_into, read_tensor


def find_ties(
    source: TensorSource,
    template: Mapping[str, TensorSpec],
    model_class: ModelClass | None,
    vocabulary: Collection[int] = (),
) -> dict[str, str]:
    """Names of a source that need not be in its files: alias -> the name that is kept. Both have the same values.

    Reads only tensors that may be tied.

    Args:
        source: The tensors of the model.
        template: The tensors of the base model's files, of which none is left out. Empty if it has no weights.
        model_class: Says what is tied. Without one, a head that the base does not list and that is bit for bit an
            embedding that it lists is taken as tied.
        vocabulary: The sizes that it has by the config: without a class, what has one of them in its rows may be a head
            or an embedding. Equal tensors alone say little: layers may be copies of each other.
    """
    names = _Digests(source)
    if model_class is None:
        return _twins(names, template, vocabulary)
    aliases: dict[str, str] = {}
    for group in tied_groups(model_class.tied, source.specs):
        # A name that the base's files list is never left out: a loader of theirs may ask for it.
        kept = next((name for name in group if name in template), group[0])
        unlisted = [name for name in group if name != kept and name not in template]
        # The values decide: a model may have trained the two apart.
        aliases |= {name: kept for name in unlisted if names.equal(name, kept)}
    return aliases


def own_places(
    aliases: Mapping[str, str], model_class: ModelClass | None, template: Mapping[str, TensorSpec]
) -> dict[str, str]:
    """Those of alias -> kept name, as in memory, that are two tensors for a loader, so that its files need both.

    Weights that were tied by hand: no config says so, and with one of them in the files the other one is random.

    Args:
        aliases: What is one tensor in the model that trained.
        model_class: Says what is tied, and which tensors there are; None if no class is known.
        template: As ``find_ties`` takes it. The base's files say which tensors there are, too.
    """
    if not aliases:
        return {}
    held: set[str] = set() if model_class is None else model_class.specs.keys() - model_class.unsaved
    tied: Mapping[str, str] = {} if model_class is None else model_class.tied
    apart = {a: k for a, k in aliases.items() if {a, k} <= held or {a, k} <= template.keys()}
    return {alias: kept for alias, kept in apart.items() if not tied_groups(tied, {alias, kept})}


def broken_ties(source: TensorSource, model_class: ModelClass) -> dict[str, str]:
    """Names that the class calls one tensor and that have different values: alias -> the name that the class keeps."""
    names = _Digests(source)
    groups = tied_groups(model_class.tied, source.specs)
    return {name: group[0] for group in groups for name in group[1:] if not names.equal(name, group[0])}


def tied_groups(tied: Mapping[str, str], present: Container[str]) -> list[list[str]]:
    """Return the present names of each tied tensor, where there are several; the kept one first, if it is there."""
    groups: dict[str, list[str]] = {}
    for alias in tied:
        root = alias
        # Through chains: an alias may be tied to a name that is an alias itself.
        while root in tied and tied[root] != root:
            root = tied[root]
        groups.setdefault(root, [root]).append(alias)
    found = [[name for name in dict.fromkeys(group) if name in present] for group in groups.values()]
    return [group for group in found if len(group) > 1]


def _twins(names: _Digests, template: Mapping[str, TensorSpec], vocabulary: Collection[int]) -> dict[str, str]:
    # Matrices with as many rows as the vocabulary: embeddings and heads.
    found = [n for n, spec in names.source.specs.items() if len(spec.shape) == 2 and spec.shape[0] in vocabulary]
    extra = [name for name in found if name not in template]
    listed = [name for name in found if name in template]
    pairs = ((name, names.first_equal(name, listed)) for name in extra)
    return {name: kept for name, kept in pairs if kept is not None}


class _Digests:
    """Compares tensors of a source by their values; reads each once."""

    def __init__(self, source: TensorSource) -> None:
        self.source = source
        self._known: dict[str, Digest] = {}

    def equal(self, one: str, other: str) -> bool:
        """Return whether two tensors are the same, bit for bit."""
        # The first rows differ in nearly every other pair, so whole tensors are rarely read.
        return self._begin_alike(one, other) and self._digest(one) == self._digest(other)

    def first_equal(self, name: str, others: Iterable[str]) -> str | None:
        return next((other for other in others if self.equal(name, other)), None)

    def _begin_alike(self, one: str, other: str) -> bool:
        """By shape, dtype and first row, which costs little."""
        a, b = self.source.specs[one], self.source.specs[other]
        if (a.shape, a.dtype) != (b.shape, b.dtype):
            return False
        if not a.shape or not a.numel:
            return True
        row = Chunk((0,) * len(a.shape), (1, *a.shape[1:]))
        return self._row(one, row) == self._row(other, row)

    def _row(self, name: str, row: Chunk) -> Digest:
        values = torch.empty(row.sizes, dtype=self.source.specs[name].dtype, device="cpu")
        return digest_tensor(read_into(self.source, name, row, values))

    def _digest(self, name: str) -> Digest:
        if name not in self._known:
            self._known[name] = digest_tensor(read_tensor(self.source, name))
        return self._known[name]
