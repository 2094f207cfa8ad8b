"""Names, shapes, dtypes and counts: what an index alone tells. No tensor is read."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from shardsmith.compare.findings import Finding, Looked, one
from shardsmith.diagnose.subject import Reference, Subject
from shardsmith.diagnose.ties import tied_names
from shardsmith.errors import CheckpointError, CorruptCheckpointError, IncompleteCheckpointError, UnsafeCheckpointError
from shardsmith.formats.models import ModelSource, beside_models
from shardsmith.formats.opened import Layout
from shardsmith.name_maps.foreign import advice_for_names, rival_models
from shardsmith.name_maps.matching import Alignment, is_transient
from shardsmith.tensors.checkpoint_keys import MAIN
from shardsmith.tensors.dtypes import dtype_name
from shardsmith.tensors.tensors import TensorSpec

_HEADS = {
    "linear": frozenset({"proj.weight", "proj.bias"}),
    "mlp, version 1": frozenset({"ffn.0.weight", "ffn.0.bias", "ffn.3.weight", "ffn.3.bias"}),
    "mlp, version 2": frozenset({"gate_proj.weight", "up_proj.weight", "down_proj.weight"}),
    "gated": frozenset({"gate.weight", "gate.bias", "ffn.0.weight", "ffn.0.bias", "ffn.3.weight", "ffn.3.bias"}),
}
_HEAD_NORM = frozenset({"ln.weight", "ln.bias"})
_SIBLING = re.compile(r"(?P<word>step|checkpoint)-(?P<step>[0-9]+)")
# TorchTitan searches names for the pattern, so that hf-export-step-500 counts as step 500; Trainer wants a whole name.
_NEWER = {
    "step": re.compile(r"step-([0-9]+)"),
    "checkpoint": re.compile(r"(?:step-|^checkpoint-(?=[0-9]+$))([0-9]+)"),
}


def look_at_structure(subject: Subject, wanted: Layout | None = None) -> Looked:
    """Compare what the indexes say.

    Args:
        subject: The checkpoint and the model that it should hold.
        wanted: The layout that the trainer reads; None if that is not known.
    """
    findings: list[Finding] = []
    counted: dict[str, _Counted] = {}
    for part in (subject, *subject.modules):
        for name, (source, alignment) in part.models.items():
            # Aliases count once, as in the files.
            template = _parameters_of(part.reference, source)
            findings += _renamings(name, alignment)
            findings += _compare_names(name, source, template, part)
            counts = counted.setdefault(part.model_of(name), _Counted())
            counts.model += template.values()
            counts.checkpoint += _without_ties(source, part.reference)
    findings += _absent_modules(subject)
    if beside := list(beside_models(subject.opened.models)):
        findings.append(one("not-compared", beside, ", ".join(subject.models), "; ".join(beside)))
    findings += _layout(subject, wanted)
    findings += newer_steps(subject.path)
    facts = {name: counts.facts() for name, counts in counted.items()}
    return Looked("structure", tuple(findings), facts)


def unreadable(error: CheckpointError) -> Finding | None:
    """Return the finding that an error in opening a checkpoint amounts to; None if it is no fault of the checkpoint."""
    text = str(error)
    if isinstance(error, UnsafeCheckpointError):
        return one("unsafe-checkpoint", [str(error.path)], "names, numbers and files beside it", text)
    if isinstance(error, IncompleteCheckpointError):
        return one("incomplete-checkpoint", [str(error.path)], "every chunk of every tensor", text)
    if isinstance(error, CorruptCheckpointError):
        return one("corrupt-checkpoint", [str(error.path)], "an index that agrees with itself and with its files", text)
    return None


def newer_steps(checkpoint: Path) -> Iterator[Finding]:
    """Whether other steps lie beside an initial checkpoint and outrank it when a trainer looks for the newest."""
    place = checkpoint.resolve()
    # Only for a checkpoint to start from: a later step is meant to have others beside it.
    mine = _SIBLING.fullmatch(place.name)
    if mine is None or int(mine["step"]) != 0:
        return
    found = ((_NEWER[mine["word"]].search(path.name), path.name) for path in place.parent.iterdir() if path.is_dir())
    # By number: as text, step-500 comes after step-1000.
    higher = [name for step, name in sorted((int(match[1]), name) for match, name in found if match) if step > 0]
    if higher:
        yield one("newer-step-beside", higher, f"{place.name} is the newest step", f"{higher[-1]} is")


def head_type(names: Collection[str]) -> str | None:
    """Return the type of a future_predictor whose tensors, all without a prefix, these are."""
    rest = frozenset(names) - _HEAD_NORM
    # A subset will do for biases, which a head may be made without.
    return next((kind for kind, keys in _HEADS.items() if rest and rest <= keys and _whole(rest, keys)), None)


def _whole(found: frozenset[str], keys: frozenset[str]) -> bool:
    """Whether no weight is missing; a bias may be."""
    return {key for key in keys if key.endswith("weight")} <= found


def _parameters_of(reference: Reference, source: ModelSource) -> dict[str, TensorSpec]:
    """What the checkpoint should hold: the model's tensors, without aliases that it need not repeat."""
    ties = tied_names(reference, source.specs)
    return {name: spec for name, spec in reference.specs.items() if name not in ties}


def _renamings(model: str, alignment: Alignment) -> Iterator[Finding]:
    if alignment.wrappers:
        yield one("wrapped-names", [model], "names as in the model", ", ".join(alignment.wrappers))
    if alignment.removed or alignment.added:
        change = f"{alignment.removed!r} in front" if alignment.removed else f"no {alignment.added!r} in front"
        yield one("names-translated", [model], "names as in the model", change)
    if alignment.by_class:
        found = "names in memory, or of another generation, which from_pretrained renames"
        yield one("names-translated", [model], "names as in the model's files", found)
    if alignment.layouts:
        rules = ", ".join(dict.fromkeys(alignment.layouts.values()))
        yield one(
            "layout-converted", alignment.layouts, "the model's shape", f"another one, which {rules} turns into it"
        )


def _compare_names(
    model: str, source: ModelSource, template: Mapping[str, TensorSpec], subject: Subject
) -> Iterator[Finding]:
    ties = tied_names(subject.reference, source.specs)
    known = {**ties, **source.aliases}
    if known:
        pairs = ", ".join(f"{alias} = {kept}" for alias, kept in known.items())
        yield one("tied-weights", known, "one tensor under two names", pairs)
    # What is tied under another name is there.
    quantized = subject.quantized[model]
    there = {*source.specs, *source.aliases, *quantized}
    missing = [name for name in template if name not in there]
    # Tied names that only the checkpoint lists are a note above, and no surplus.
    extra = [name for name in source.specs if name not in template and name not in ties]
    transient = [name for name in extra if is_transient(name)]
    if transient:
        yield one(
            "non-persistent-buffers", transient, "made from the config", "saved all the same; a load ignores them"
        )
    heads = subject.metadata.initial.heads if subject.metadata and subject.metadata.initial else {}
    for head, keys in heads.items():
        yield one("extra-head", keys, "the model alone", f"the head {head}, as metadata.json says")
    # A head that metadata.json names is known, whatever it is called.
    known_extra = {*transient, *(key for keys in heads.values() for key in keys)}
    yield from _extra({name: source.specs[name] for name in extra if name not in known_extra}, model, template)
    if missing:
        hint = _advice(extra, template)
        elements = sum(template[name].numel for name in missing)
        yield one(
            "missing-tensors",
            missing,
            f"{len(template)} tensors in {model}",
            f"{_many(missing)} not there, {elements:,} elements{hint and f'. {hint}'}",
        )
    # Scales beside whole numbers make them weights, here or, as the config says, in the model.
    named = frozenset(source.specs if "quantization_config" in subject.reference.config else quantized)
    yield from _compare_specs(source, template, named)


def _advice(extra: Collection[str], template: Collection[str]) -> str:
    """What to do about names that are none of the model's; empty if they do not say what they are."""
    whole, rest = rival_models(extra, template)
    if not whole:
        return advice_for_names(extra) or ""
    return (
        f"Each of {', '.join(whole)} holds all tensors of the model. Write one alone, and diagnose that; {whole[0]}, "
        f"with shardsmith to-hf --drop {' '.join(rest)}"
    )


def _extra(extra: Mapping[str, TensorSpec], model: str, template: Collection[str]) -> Iterator[Finding]:
    kind = head_type(extra)
    inner = extra["gate_proj.weight"].shape if "gate_proj.weight" in extra else ()
    # The only head with a gate_proj has twice as many rows as columns there.
    if kind and len(inner) == 2 and inner[0] == inner[1]:
        found = f"gate_proj {inner}: a head of type mlp, version 2, has {(2 * inner[1], inner[1])}, and no other has it"
        yield one("extra-tensors", extra, "a head that its trainer can load", found)
    elif kind:
        yield one("extra-head", extra, "the model alone", f"a future_predictor head of type {kind}")
    elif extra:
        yield one("extra-tensors", extra, f"the model's {len(template)} tensors in {model}", f"{_many(extra)} more")


def _compare_specs(
    source: ModelSource, template: Mapping[str, TensorSpec], scaled: Collection[str]
) -> Iterator[Finding]:
    """``scaled``: those whose scales are known."""
    both = [(spec, template[name]) for name, spec in source.specs.items() if name in template]
    # Several numbers in one element, as 4-bit ones have, are in a shape of their own.
    shapes = [(a, b) for a, b in both if a.shape != b.shape and not (a.name in scaled and _is_packed(a.dtype))]
    if shapes:
        yield one(
            "shape-differs",
            [mine.name for mine, _ in shapes],
            "; ".join(f"{other.name} {list(other.shape)}" for _, other in shapes),
            "; ".join(f"{mine.name} {list(mine.shape)}" for mine, _ in shapes),
        )
    dtypes = [(mine, other) for mine, other in both if mine.dtype != other.dtype]
    # 8 bits or whole numbers for weights: quantised, and with the scales lost where there are none.
    lost = [
        mine.name
        for mine, other in dtypes
        if mine.name not in scaled and other.dtype.is_floating_point and _is_quantized(mine.dtype, other.dtype)
    ]
    for code, names in (
        ("kind-differs", lost),
        ("other-dtype", [mine.name for mine, _ in dtypes if mine.name not in lost]),
    ):
        if names:
            # Each pair of dtypes once, however many tensors have it.
            pairs = {(dtype_name(template[name].dtype), dtype_name(source.specs[name].dtype)) for name in names}
            expected, found = (", ".join(sorted({pair[i] for pair in pairs})) for i in (0, 1))
            yield one(code, names, expected, found)


def _is_packed(dtype: torch.dtype) -> bool:
    return not dtype.is_floating_point and dtype != torch.int8


def _is_quantized(mine: torch.dtype, other: torch.dtype) -> bool:
    return not mine.is_floating_point or mine.itemsize == 1 < other.itemsize


def _without_ties(source: ModelSource, reference: Reference) -> list[TensorSpec]:
    ties = tied_names(reference, source.specs)
    return [spec for name, spec in source.specs.items() if name not in ties]


@dataclass(slots=True)
class _Counted:
    """The tensors of both sides, those of modules included; what is tied counts once."""

    model: list[TensorSpec] = field(default_factory=list)
    checkpoint: list[TensorSpec] = field(default_factory=list)

    def facts(self) -> dict[str, Any]:
        # Of tensors that are only in one of them, too: the difference shows a missing layer at once.
        expected, found = (sum(spec.numel for spec in specs) for specs in (self.model, self.checkpoint))
        return {
            "tensors in the model": len(self.model),
            "tensors in the checkpoint": len(self.checkpoint),
            "parameters in the model": expected,
            "parameters in the checkpoint": found,
            "difference": found - expected,
            "difference in percent": round(100 * abs(found - expected) / expected, 4) if expected else 0.0,
            "dtypes": sorted({dtype_name(spec.dtype) for spec in self.checkpoint}),
        }


def _absent_modules(subject: Subject) -> Iterator[Finding]:
    """Modules of the reference of which a checkpoint of the bare transformer has nothing."""
    held = {name for part in subject.modules for name in part.models}
    known = subject.reference.modules.with_weights
    absent = [name for module in known for model in subject.models if (name := module.called(model)) not in held]
    if absent:
        yield one("modules-not-there", absent, "the transformer and its modules", "the transformer alone")


def _layout(subject: Subject, wanted: Layout | None) -> Iterator[Finding]:
    if subject.opened.layout is None or MAIN not in subject.models:
        return
    if wanted is not None and wanted != subject.opened.layout:
        yield one(
            "wrong-layout",
            [str(subject.path)],
            f"{wanted}: {_example(wanted)}",
            f"{subject.opened.layout}: {_example(subject.opened.layout)}",
        )
    elif subject.opened.layout == "nested":
        yield one("nested-layout", [str(subject.path)], f"{_example('flat')}, or", _example("nested"))


def _example(kind: Layout) -> str:
    return "model.<name>" if kind == "nested" else "<name>"


def _many(names: Iterable[str]) -> str:
    count = len(list(names))
    return f"{count} tensor{'' if count == 1 else 's'}"
