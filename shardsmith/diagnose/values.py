"""Whether a checkpoint's values are the model's, and if not, what happened to them. Streams both, block by block."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from shardsmith.compare.findings import Finding, Looked, one
from shardsmith.compare.values import (
    Distance,
    TensorComparison,
    compare_sources,
    compare_tensor,
    same_as,
    scan_source,
)
from shardsmith.diagnose.averages import look_at_average
from shardsmith.diagnose.signatures import QK_NORM, QUERY_KEY, find_reordering, is_all, unrelated
from shardsmith.diagnose.subject import Reference, Subject
from shardsmith.diagnose.swapped import describe_swapped, find_swapped, is_string_order
from shardsmith.diagnose.ties import head_of, tied_names
from shardsmith.formats.by_path import SHARDED
from shardsmith.formats.models import ModelSource
from shardsmith.hf.base_layout import patch_embeddings
from shardsmith.hf.layout_rules import order_of_patches
from shardsmith.hf.vocabulary import embedding_of
from shardsmith.manifest.checkpoints import find_damage
from shardsmith.tensors.checkpoint_keys import EMA, MAIN, find_models
from shardsmith.tensors.dtypes import dtype_name
from shardsmith.tensors.tensors import read_tensor

_LAYER = re.compile(r"^(.*?(?:^|\.)(?:layers|h|blocks|block|layer)\.[0-9]+)\.")
# Share of all matrices from which it is the whole load that failed, and no part of it.
_MOST_OF = 0.9
# Cosine of a matrix with the reference's: training leaves it above this.
_RELATED = 0.5
# Relative, of two factors that count as one, and of a factor that counts as 1.
_SAME_FACTOR = 1e-3
# Of 1 - cosine: rounding to bfloat16 stays within it.
_SAME_DIRECTION = 1e-5

Comparisons = Mapping[str, TensorComparison]


def look_at_values(subject: Subject) -> Looked:
    """Read every tensor of both and compare. Raises CheckpointError where one cannot be read."""
    # Damaged files would show as many other faults; only our own checkpoints record hashes of files.
    if subject.opened.format == SHARDED and (damage := find_damage(subject.path, manifest=subject.metadata)):
        return Looked("values", (one("damaged-values", damage, "the recorded hash of each file", "; ".join(damage)),))
    findings: list[Finding] = []
    compared: dict[str, Comparisons] = {}
    unseen: list[str] = []
    for part in (subject, *subject.modules):
        for name, (source, _) in part.models.items():
            scaled = part.quantized[name]
            found = _compare(source, part.reference, scaled)
            findings += _Sorted(name, source, part, found).findings()
            findings += _without_template(source, part.reference, scaled)
            findings += _bad_scales(part.scales[name])
            # What belongs to a model counts with it.
            model = part.model_of(name)
            compared[model] = {**compared.get(model, {}), **found}
            # Those that it has under this name in another shape, which are a finding of the structure.
            others = (source.specs.keys() & part.reference.specs.keys()) - set(scaled) - found.keys()
            if others and part.reference.source is not None:
                unseen.append(f"{len(others)} tensors of {name} have another shape in the model: no values compared")
    facts = {model: _facts(found, subject.quantized.get(model, ())) for model, found in compared.items()}
    findings += _broken_ties(subject)
    if EMA in compared:
        findings += look_at_average(subject, compared)
    reference = subject.reference
    unseen += [] if reference.source else [f"{reference.path} {reference.lacks}: no values can be compared"]
    unseen += [subject.lacks_plain(model, "their values were not compared") for model in subject.models]
    relative = {model: {name: _relative(one) for name, one in found.items()} for model, found in compared.items()}
    # For the map of the HTML page, of every tensor that was compared.
    return Looked("values", tuple(findings), facts, tuple(filter(None, unseen)), relative=relative)


@dataclass(frozen=True, slots=True)
class _Sorted:
    """The tensors of one model that are not the reference's, told apart by what happened to them."""

    model: str
    source: ModelSource
    subject: Subject
    compared: Comparisons

    @property
    def trained(self) -> bool:
        """Whether the weights need not be the reference's. An average that is not has been trained."""
        return self.subject.trained or self.subject.model_of(self.model) == EMA

    def findings(self) -> Iterator[Finding]:
        # Infinities that the reference has, too, are meant, as those of a range without limits are; NaN never is.
        rest = {name: found for name, found in self.compared.items() if not found.equal or found.extremes.has_nan}
        # ``_all`` runs up to its next finding only after this one's tensors are gone from ``rest``.
        for finding in self._all(rest):
            # Whatever one finding explains, no other needs to.
            for name in finding.where:
                rest.pop(name, None)
            yield finding

    def _all(self, rest: dict[str, TensorComparison]) -> Iterator[Finding]:
        # From what is certain to what is likely, and from the
        # particular to the general: the order decides what is said.
        yield from self._non_finite(rest)
        # Rounding first: it explains a difference wholly, and often that of every tensor.
        yield from self._rounded(rest)
        # Before the reorderings: a swapped tensor would be taken for
        # one with its rows moved, or for one that was not loaded.
        yield from self._swapped(rest)
        yield from self._patches(rest)
        yield from self._reordered(rest)
        yield from self._scaled(rest)
        yield from self._not_loaded(rest)
        yield from self._constant(rest)
        # What no other explanation took.
        yield from self._different(rest)

    def _non_finite(self, rest: Comparisons) -> Iterator[Finding]:
        names = [name for name, found in rest.items() if not found.extremes.finite]
        if names:
            yield self._one("not-finite", names, "finite numbers", "NaN or infinite values")

    def _rounded(self, rest: dict[str, TensorComparison]) -> Iterator[Finding]:
        # Only the dtype differs: no fault, and a note of its own in the structure.
        for name in [name for name, found in rest.items() if not found.equal and found.same_values]:
            del rest[name]
        groups: dict[str, list[str]] = {}
        # Tensors that are one value everywhere last, when it is known whether others were rounded.
        for name, found in sorted(rest.items(), key=lambda item: item[1].extremes.constant):
            rounding = found.distance.rounding if found.distance else None
            # What was reset to one value may happen to lie near; that counts as rounding only where others are rounded.
            if rounding and (
                not found.extremes.constant or found.left.dtype == rounding or dtype_name(rounding) in groups
            ):
                groups.setdefault(dtype_name(rounding), []).append(name)
        for dtype, names in groups.items():
            apart = max(d.largest for name in names if (d := rest[name].distance))
            yield self._one(
                "rounded-values", names, "the model's values", f"those, rounded to {dtype} (by up to {apart:.3g})"
            )

    def _swapped(self, rest: Comparisons) -> Iterator[Finding]:
        reference = self.subject.reference.source
        if reference is None:
            return
        # A tensor of one value everywhere is like many others; what was reset is found below.
        unknown = {n: c for n, c in rest.items() if not c.extremes.constant and (not self.trained or _astray(c))}
        swapped = find_swapped(self.source, reference, unknown, trained=self.trained)
        if swapped:
            code = "layers-reordered" if is_string_order(swapped, reference.specs) else "tensors-swapped"
            yield self._one(code, list(swapped), "each tensor under its own name", describe_swapped(swapped))

    def _scaled(self, rest: Comparisons) -> Iterator[Finding]:
        # Training changes the length of everything, so a factor says nothing then.
        scaled = {} if self.trained else {n: c for n, c in rest.items() if c.distance and _is_scaled(c.distance)}
        factors = {name: d.lengths for name, found in scaled.items() if (d := found.distance)}
        # Any two vectors of nearly equal elements differ by a factor: those count beside a matrix of the same one.
        known = [factors[name] for name, found in scaled.items() if len(found.left.shape) > 1]
        factors = {n: f for n, f in factors.items() if any(abs(f / other - 1) < _SAME_FACTOR for other in known)}
        if factors:
            least, most = min(factors.values()), max(factors.values())
            times = f"{least:.6g}" if most / least < 1 + _SAME_FACTOR else f"{least:.6g} to {most:.6g}"
            yield self._one("values-scaled", list(factors), "the model's values", f"those times {times}")

    def _patches(self, rest: Comparisons) -> Iterator[Finding]:
        reference = self.subject.reference.source
        names = [
            # Both in memory at once: a patch embedding is small.
            name
            for name in patch_embeddings(rest, self.subject.rules)
            if reference is not None
            and order_of_patches(read_tensor(self.source, name), read_tensor(reference, name)) == "channels first"
        ]
        if names:
            found = (
                "values nearer to them with the channels first: a convolution that was reshaped without being permuted"
            )
            yield self._one("patches-not-permuted", names, "the model's values in the model's order", found)

    def _reordered(self, rest: Comparisons) -> Iterator[Finding]:
        if self.subject.reference.source is None:
            return
        groups: dict[tuple[str, str], list[str]] = {}
        for name, found in rest.items():
            # Training changes values but not their order by much: only
            # what has nothing in common with its own is looked up.
            if not found.extremes.constant and (not self.trained or self._unrelated(found)):
                moved = find_reordering(self.source, self.subject.reference.source, found)
                if moved:
                    code = self._order_code(name, rows=moved.rows)
                    # The text names the shift of the rows, which may differ between the two embeddings.
                    groups.setdefault((code, moved.described if code == "vocabulary-shifted" else ""), []).append(name)
        for (code, text), names in groups.items():
            yield self._one(code, names, "the model's rows in the model's order", text or _ORDERS[code])

    def _order_code(self, name: str, *, rows: bool) -> str:
        specs = self.subject.reference.specs
        if QUERY_KEY.search(name):
            return "rows-permuted"
        return "vocabulary-shifted" if rows and name in (embedding_of(specs), head_of(specs)) else "values-reordered"

    def _not_loaded(self, rest: Comparisons) -> Iterator[Finding]:
        lost = [name for name, found in rest.items() if self._unrelated(found) and not found.extremes.constant]
        if not lost:
            return
        matrices = [name for name, found in self.compared.items() if len(found.left.shape) > 1]
        reset = [name for name, found in rest.items() if found.extremes.constant]
        # Matrices only: vectors of a new model, such as norms, may equal those of a trained one.
        if len(set(lost).intersection(matrices)) >= _MOST_OF * len(matrices):
            yield self._one(
                "nothing-loaded", [*lost, *(n for n in reset if n not in lost)], "the model's values", _NOTHING
            )
            return
        yield from self._lost_parts(lost, reset, matrices)

    # Whole layers first, then the two embeddings by name, then single tensors.
    def _lost_parts(self, lost: list[str], reset: list[str], matrices: list[str]) -> Iterator[Finding]:
        layers = _whole_layers(lost, matrices)
        names = [name for name in dict.fromkeys([*lost, *reset]) if _layer_of(name) in layers]
        if names:
            yield self._one(
                "layer-not-loaded", names, "the model's values", f"{_NOTHING}, in all of {', '.join(layers)}"
            )
        specs = self.subject.reference.specs
        special = {embedding_of(specs): "embedding-differs", head_of(specs): "head-differs"}
        for name in lost:
            if name in special:
                yield self._one(special[name], [name], "the model's values", _NOTHING)
        others = [name for name in lost if name not in special and name not in names]
        if others:
            yield self._one("tensor-not-loaded", others, "the model's values", _NOTHING)

    def _constant(self, rest: Comparisons) -> Iterator[Finding]:
        # Matrices of ones are no norms.
        ones = [name for name, found in rest.items() if is_all(found, 1.0) and len(found.left.shape) == 1]
        if ones:
            code = "qk-norms-dropped" if all(map(QK_NORM.search, ones)) else "norms-are-one"
            yield self._one(code, ones, "the model's values", "1 everywhere")
        zeros = [name for name, found in rest.items() if is_all(found, 0.0)]
        if zeros:
            yield self._one("all-zero-tensor", zeros, "the model's values", "0 everywhere")
        # A tensor of one element is always one value.
        constant = [name for name, found in rest.items() if name not in (*ones, *zeros) and _reset(found)]
        if constant:
            found = ", ".join(f"{rest[name].extremes.least:.6g} in {name}" for name in constant)
            yield self._one("constant-values", constant, "the model's values", found)

    def _different(self, rest: Comparisons) -> Iterator[Finding]:
        if rest:
            apart = max(d.largest for found in rest.values() if (d := found.distance))
            code = "trained-weights" if self.trained else "values-differ"
            yield self._one(code, list(rest), "the model's values", f"other values, apart by up to {apart:.3g}")

    def _unrelated(self, found: TensorComparison) -> bool:
        return unrelated(found, trained=self.trained)

    def _one(self, code: str, names: Collection[str], expected: str, found: str) -> Finding:
        return one(code, names, expected, found if self.model == MAIN else f"{found} (in {self.model})")


_NOTHING = "values that have nothing in common with them, as if never loaded"
_ORDERS = {
    "rows-permuted": "the model's rows, permuted within each head: the layout of the other kind of RoPE",
    "values-reordered": "the model's values in another order",
}


def _compare(source: ModelSource, reference: Reference, scaled: Collection[str]) -> Comparisons:
    if reference.source is None:
        return {}
    names = [
        name
        for name, spec in source.specs.items()
        if name in reference.specs and name not in scaled and spec.shape == reference.specs[name].shape
    ]
    return compare_sources(source, reference.source, names)


def _without_template(source: ModelSource, reference: Reference, scaled: Collection[str]) -> Iterator[Finding]:
    """What the reference has nothing to compare with can still be no number."""
    # The infinities of a buffer without a counterpart may be meant; NaN never is.
    names = [
        name
        for name, spec in source.specs.items()
        if spec.dtype.is_floating_point and (reference.source is None or name not in reference.specs or name in scaled)
    ]
    extremes = scan_source(source, names)
    wrong = [name for name in names if extremes[name].has_nan]
    if wrong:
        yield one("not-finite", wrong, "finite numbers", "NaN values")


def _bad_scales(scales: ModelSource) -> Iterator[Finding]:
    """Scales of quantised weights that make no numbers of them."""
    extremes = scan_source(scales, [name for name, spec in scales.specs.items() if spec.dtype.is_floating_point])
    if wrong := [name for name, found in extremes.items() if not found.finite]:
        yield one("not-finite", wrong, "finite scales of quantized weights", "NaN or infinite values")


def _broken_ties(subject: Subject) -> Iterator[Finding]:
    """Names that are tied and that hold different values all the same."""
    for model, ties, tensors in _stored_ties(subject):
        scaled = subject.quantized[model]
        there = {name for name in tensors.specs if name not in scaled}
        pairs = {alias: kept for alias, kept in ties.items() if alias in there and kept in there}
        # One value under both names, in one dtype or two: a load through either gives the same.
        apart = [alias for alias, kept in pairs.items() if not _repeats(tensors, alias, kept)]
        broken = [alias for alias in apart if not _untied(subject.reference, alias, pairs)]
        if broken:
            kept = ", ".join(pairs[alias] for alias in broken)
            yield one("tie-broken", broken, f"the values of {kept}, to which it is tied", f"other values, in {model}")


def _repeats(source: ModelSource, alias: str, kept: str) -> bool:
    same_shape = source.specs[alias].shape == source.specs[kept].shape
    return same_shape and compare_tensor(source, source, alias, kept).rounded_alike


def _untied(reference: Reference, alias: str, ties: Mapping[str, str]) -> bool:
    """Whether the model's own files hold different values under both names, which a load leaves apart."""
    source, pair = reference.source, {alias: ties[alias]}
    if source is None or not {alias, ties[alias]} <= source.specs.keys():
        return False
    return not dict(same_as(source, source, pair))


def _stored_ties(subject: Subject) -> Iterator[tuple[str, dict[str, str], ModelSource]]:
    """Models, their ties, and a source that has all names of a tie. Only main: an average holds one of them."""
    source, _ = subject.models.get(MAIN, (None, None))
    if source is not None:
        yield MAIN, tied_names(subject.reference, source.specs), source
    # Names that the record of the step ties, read under the keys in its files.
    stored = subject.opened.dcp
    if stored is not None and subject.metadata is not None and subject.metadata.tied:
        keys = find_models(stored.specs, stored.index.containers).get(MAIN, {})
        yield MAIN, subject.metadata.tied, ModelSource(stored, keys, filled=frozenset(), aliases={})


def _facts(compared: Comparisons, scaled: Collection[str]) -> dict[str, Any]:
    equal = sum(found.equal for found in compared.values())
    rounded = sum(found.rounded_alike and not found.same_values for found in compared.values())
    apart = [found.distance.largest for found in compared.values() if found.distance]
    largest = max(apart, default=0.0)
    counts = {"tensors compared": len(compared), "equal": equal, "rounded": rounded, "largest difference": largest}
    return counts | ({"quantized, not compared": len(scaled)} if scaled else {})


def _relative(found: TensorComparison) -> float:
    return found.distance.relative if found.distance else 0.0


def _astray(found: TensorComparison) -> bool:
    """Whether it points elsewhere than training would have moved it."""
    return found.distance is not None and abs(found.distance.cosine) < _RELATED


def _is_scaled(distance: Distance) -> bool:
    return distance.cosine > 1 - _SAME_DIRECTION and abs(distance.lengths - 1) > _SAME_FACTOR


def _reset(found: TensorComparison) -> bool:
    return found.extremes.constant and found.left.numel > 1


def _layer_of(name: str) -> str | None:
    match = _LAYER.match(name)
    return match[1] if match else None


def _whole_layers(lost: Iterable[str], matrices: Iterable[str]) -> list[str]:
    """Layers of which every matrix is among the lost ones."""
    lost = set(lost)
    whole: dict[str, bool] = {}
    for name in matrices:
        layer = _layer_of(name)
        if layer is not None:
            whole[layer] = whole.get(layer, True) and name in lost
    return [layer for layer, complete in whole.items() if complete]
