"""What is checked of an exported directory before it is published, and what is said of it afterwards."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from torch import Tensor

from shardsmith.errors import CorruptCheckpointError
from shardsmith.export.plan import ExportPlan
from shardsmith.formats.safetensors_files.source import SafetensorsSource
from shardsmith.hf.directory import ModelPlan
from shardsmith.sharding.source_digests import digest_source
from shardsmith.tensors.checkpoint_keys import EMA, MAIN
from shardsmith.tensors.digest import Digest
from shardsmith.tensors.dtypes import dtype_name
from shardsmith.tensors.tensors import Chunk

Texts = Mapping[str, Mapping[str, str]]
"""Digests by model and tensor."""

_MASK = (1 << 64) - 1


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelCheck:
    """What is known of one model in the directory."""

    model: str
    files: list[str]
    tensors: int
    elements: int
    dtypes: dict[str, int]
    """Elements by dtype."""
    read_back: bool
    """Whether what is in the files was read again and has the digests of what was to be written."""
    compared: int
    """Tensors that have name and shape of a tensor of the base model."""
    same_dtype: int
    """Those among them that have its dtype, too."""
    allowed: list[str]
    """Tensors that differ from the base model's, or are on one side only, as was allowed."""
    rules: dict[str, str]
    """Tensor -> the layout rule that was used on it."""
    orders: dict[str, str]
    """Patch embedding -> what its values say about the order of its inputs."""
    from_main: int
    """Tensors that the average does not cover."""
    constant: list[str]
    """Tensors all of whose elements are equal: zeros, or ones, as after an initialisation."""
    not_finite: list[str]
    """Tensors whose first element is NaN or infinite: of a run that has diverged all of them."""
    same_as_main: int | None
    """Of an average: tensors with the same values as in main; None where main was not written."""
    remark: str | None
    """What is to be said about that."""
    float32_unknown: str = ""
    """As ``ModelPlan.float32_unknown``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportCheck:
    """What is known of one directory."""

    output: str
    source: str
    base: str
    template: str
    """Which file of the base model the weights were compared with, or why with none."""
    compared: str
    """With what names and shapes were compared: the class that config.json names, the base's weights, or nothing."""
    config_changes: list[str]
    """What config.json says otherwise than the base model's, so that it describes these tensors."""
    tokenizer: str
    """What is wrong between the base model's ``tokenizer.json`` and the embedding; empty if nothing is known to be."""
    copied_weights: dict[str, int]
    """Files of the base model that hold weights of other parts, and were copied -> size in bytes."""
    not_copied: dict[str, str]
    """Files of the base model that were left out for what they hold -> why."""
    old_weights: list[str]
    """Files among ``copied_weights`` that hold a part of the checkpoint's model, of which its own tensors were left out
    or are missing, as asked for."""
    models: list[ModelCheck]


def read_back(plan: ModelPlan, directory: Path, part: int, parts: int) -> dict[str, Digest]:
    """This share of the digests of what is in the files of a model. No communication."""
    digests: dict[str, Digest] = {}
    # A file at a time: mapped pages of the one before can be given back.
    for file in plan.weights.files:
        source = SafetensorsSource(directory / file.name)
        digests |= digest_source(source, {n: t.spec.dtype for n, t in file.tensors.items()}, part=part, parts=parts)
        source.close()
    return digests


def compare_read_back(directory: Path, written: Texts, found: Texts) -> None:
    """Raise CorruptCheckpointError if the files do not hold what was to be written."""
    wrong = [
        f"{model}: {name}" for model, texts in written.items() for name in texts if found[model][name] != texts[name]
    ]
    if wrong:
        lines = "\n  ".join([f"{len(wrong)} tensors are not what was written; nothing became visible", *wrong])
        raise CorruptCheckpointError(directory, lines)


def check_export(
    plan: ExportPlan, directory: Path, digests: Texts, all_digests: Sequence[Texts], plans: Sequence[ExportPlan]
) -> ExportCheck:
    """Say what is known of a directory whose weights are written.

    Args:
        plan: The plan of the directory.
        directory: Where the weights are written.
        digests: Of what was written to it.
        all_digests: Of what was written to each directory, for an average may have one of its own.
        plans: Of these directories.
    """
    main = next((texts[MAIN] for texts in all_digests if MAIN in texts), None)
    return ExportCheck(
        output=str(plan.directory.output),
        source=str(plan.checkpoint),
        base=str(plan.base),
        template=plan.template.origin,
        compared=str(plan.directory.measure),
        config_changes=list(plan.fitted.changes) if plan.fitted else [],
        tokenizer=plan.directory.measure.tokenizer,
        copied_weights=dict(plan.files.weights) if plan.files else {},
        not_copied=plan.files.not_copied if plan.files else {},
        old_weights=list(plan.old_weights),
        models=[
            _check_model(plan, model, directory, digests[model.model], main, plans) for model in plan.directory.models
        ],
    )


def _check_model(
    plan: ExportPlan,
    model: ModelPlan,
    directory: Path,
    digests: Mapping[str, str],
    main: Mapping[str, str] | None,
    plans: Sequence[ExportPlan],
) -> ModelCheck:
    names = {spec.name for spec in model.specs}
    dtypes: dict[str, int] = {}
    for spec in model.specs:
        dtypes[dtype_name(spec.dtype)] = dtypes.get(dtype_name(spec.dtype), 0) + spec.numel
    same = None if model.model != EMA or main is None else [n for n, text in digests.items() if main.get(n) == text]
    template = plan.modules.get(model.model, plan.template.specs)
    # What the base lacks, or has in another shape, cannot have its dtype.
    alike = [s for s in model.specs if (t := template.get(s.name)) is not None and t.shape == s.shape]
    shapes = (names & template.keys()) - {spec.name for spec in alike}
    # Without a template nothing differs: ``^`` would give all names.
    differing = sorted(name for name in (names ^ template.keys()) | shapes if template)
    equal, not_finite = _told_by_the_first(model, directory, digests)
    return ModelCheck(
        model=model.model,
        files=[file.name for file in model.weights.files],
        tensors=len(names),
        elements=sum(spec.numel for spec in model.specs),
        dtypes=dtypes,
        read_back=plan.verify,
        compared=len(alike),
        same_dtype=sum(spec.dtype == template[spec.name].dtype for spec in alike),
        # Of a module nothing differs that was not allowed, by the names of the whole encoder.
        allowed=[n for n in differing if model.is_module or any(fnmatchcase(n, pattern) for pattern in plan.allow)],
        rules={name: rule for name, rule in plan.rules.items() if name in names},
        orders={name: order for name, order in plan.orders.items() if name in names},
        from_main=len(model.filled),
        constant=[name for name in equal if name not in not_finite],
        not_finite=not_finite,
        same_as_main=None if same is None else len(same),
        remark=_remark(model, same, plans),
        float32_unknown=model.float32_unknown,
    )


def _remark(model: ModelPlan, same: Sequence[str] | None, plans: Sequence[ExportPlan]) -> str | None:
    """An average all of whose tensors are those of main is one that nobody has loaded, or one that never moved."""
    averaged = [spec.name for spec in model.specs if spec.name not in model.filled]
    # Tensors from main are equal to it by definition.
    if same is None or not averaged or not set(averaged) <= set(same):
        return None
    sources = {name: source for plan in plans for name, source in plan.sources.items()}
    dtypes = {name: sources[EMA].specs[name].dtype for name in averaged}
    if any(sources[MAIN].specs[name].dtype != dtype for name, dtype in dtypes.items()):
        return "is equal to main as it was written; in the checkpoint they have different dtypes"
    # In the checkpoint's own dtypes: this tells an average that is a copy from one that is near.
    if digest_source(sources[EMA], dtypes) == digest_source(sources[MAIN], dtypes):
        return "is equal to main in the checkpoint itself: it was never updated, or main was saved in its place"
    return "is equal to main once it is rounded; in the checkpoint it is not"


def _told_by_the_first(plan: ModelPlan, directory: Path, digests: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """Tensors of which every element is the first one, told by their digests; tensors whose first one is not finite."""
    found, not_finite = [], []
    for file in plan.weights.files:
        source = SafetensorsSource(directory / file.name)
        for name, placement in file.tensors.items():
            spec = placement.spec
            # The formula below is for words of 4 bytes, or two halves.
            if spec.numel > 1 and spec.dtype.is_floating_point and spec.dtype.itemsize in (2, 4):
                ((_, first),) = source.pieces(name, Chunk((0,) * len(spec.shape), (1,) * len(spec.shape)))
                # The digest is known already: one element and a sum tell what else a second pass would.
                if str(_digest_of_constant(first, spec.numel)) == digests[name]:
                    found.append(name)
                if not math.isfinite(first.item()):
                    not_finite.append(name)
        source.close()
    return found, not_finite


def _digest_of_constant(first: Tensor, count: int) -> Digest:
    """The digest of a tensor of ``count`` elements equal to this one, of 2 or 4 bytes."""
    bits = int(first.reshape(1).view(torch.int16 if first.itemsize == 2 else torch.int32).item())
    # As the words of a digest: all ``count`` are this one.
    if first.itemsize == 4:
        word, whole, rest = bits & 0xFFFFFFFF, count, 0
    else:
        half = bits & 0xFFFF
        # Two elements make a word, the first in its low half; an odd last one is a word with zeros above it.
        word, whole, rest = half | half << 16, count // 2, half if count % 2 else 0
    total = whole * word + rest
    # sum of (i + 1) * u[i]: the words are numbered from 1, and the odd one comes last.
    weighted = word * (whole * (whole + 1) // 2) + (whole + 1) * rest
    return Digest(total & _MASK, weighted & _MASK)
