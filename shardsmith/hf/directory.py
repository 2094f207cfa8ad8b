"""A Hugging Face directory before a byte of it is written: what goes where. Live exports and ``to-hf`` share it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from shardsmith.formats.safetensors_files.plan import WeightsPlan, plan_files
from shardsmith.ground.layout import index_file_name
from shardsmith.ground.sizes import parse_size
from shardsmith.hf.model_class import Kept, ModelClass
from shardsmith.tensors.dtypes import DtypeChoice, cast_specs, dtype_name, general_dtype
from shardsmith.tensors.tensors import TensorSpec


@dataclass(frozen=True, slots=True)
class ModelPlan:
    """One model on its way into one set of files."""

    model: str
    """``main`` or ``ema``; of a module beside one of them, as ``Module.called`` has it."""
    specs: tuple[TensorSpec, ...]
    """As they will be written."""
    weights: WeightsPlan
    stem: str
    """Of the weight files' names."""
    aliases: Mapping[str, str] = field(default_factory=dict)
    """Tied names that are not written -> the name that is."""
    filled: frozenset[str] = frozenset()
    """What an average does not cover, and takes from main."""
    float32_unknown: str = ""
    """Why tensors may be rounded that the class keeps in float32; empty if that is known of all."""

    @property
    def is_module(self) -> bool:
        """Whether it is a module of sentence-transformers in a folder of its own, and not a whole model."""
        return "/" in self.stem

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors as they will be written."""
        return sum(spec.nbytes for spec in self.specs)

    @property
    def file_names(self) -> list[str]:
        """Of its weights, and of their index if there is one."""
        names = [file.name for file in self.weights.files]
        return names if self.weights.index is None else [*names, index_file_name(self.stem)]


@dataclass(frozen=True, slots=True)
class Origin:
    """Where the weights come from, for ``shardsmith.json``."""

    source: str
    """Name of the checkpoint, or of the folder of a live run's exports."""
    attempt: str | None = None
    """Of the attempt that wrote the checkpoint."""
    step: int | None = None
    ema: dict[str, Any] | None = None
    """Facts of the average."""


@dataclass(frozen=True, slots=True)
class Measure:
    """With what the tensors of a directory are compared: something that we did not make."""

    model_class: str | None = None
    """The class that config.json names, with the library that has it."""
    base: str | None = None
    """The base model's weights, by their file."""
    reason: str = ""
    """Why there is no class."""
    tokenizer: str = ""
    """What is wrong between ``tokenizer.json`` and the embedding; empty if nothing is known to be."""
    answers: str = ""
    """To what a loaded model answered as the live model; empty where none was loaded."""

    def __str__(self) -> str:
        """What an export says about it in its first line."""
        return self._tensors + (f"; loaded, it answers as the live model to {self.answers}" if self.answers else "")

    @property
    def _tensors(self) -> str:
        if self.model_class is not None:
            return f"compared with {self.model_class}, which config.json names"
        if self.base is not None:
            return f"compared with {self.base} of the base model, and with no class: {self.reason}"
        return f"not compared with any model: {self.reason or 'there is nothing to compare with'}"


@dataclass(frozen=True, slots=True)
class DirectoryPlan:
    """One directory to make."""

    output: Path
    models: tuple[ModelPlan, ...]
    origin: Origin
    config: dict[str, Any] | None
    """What config.json says but for the dtype; None makes no config.json, for what is no Hugging Face model."""
    base: Path | None = None
    """The base model's directory."""
    copies: tuple[str, ...] = ()
    """Files of the base model that belong into the new directory."""
    companions: Callable[[Path], None] | None = None
    """Writes more files into the directory that it is given; they come before the base model's."""
    measure: Measure = Measure()
    """With what the plan was compared."""
    template: Mapping[str, TensorSpec] = field(default_factory=dict)
    """The base model's own tensors, in its files; empty without."""
    allow: tuple[str, ...] = ()
    """Patterns of names that may differ from the base model's or the class's."""

    @property
    def nbytes(self) -> int:
        """Bytes of all weights."""
        return sum(model.nbytes for model in self.models)

    @property
    def not_averaged(self) -> list[str]:
        """Floating-point tensors that an average does not cover, and takes from main."""
        models = [(model.filled, spec) for model in self.models for spec in model.specs]
        return [spec.name for filled, spec in models if spec.name in filled and spec.dtype.is_floating_point]

    @property
    def dtypes(self) -> set[torch.dtype]:
        """Of the floating-point weights."""
        return {spec.dtype for model in self.models for spec in model.specs if spec.dtype.is_floating_point}


def plan_model(
    model: str,
    stored: Sequence[TensorSpec],
    *,
    stem: str,
    dtype: DtypeChoice,
    max_shard_size: str | int | None,
    aliases: Mapping[str, str],
    filled: frozenset[str] = frozenset(),
    model_class: ModelClass | None = None,
) -> ModelPlan:
    """Decide dtypes and files of one model.

    Args:
        model: ``"main"`` or ``"ema"``.
        stored: The tensors as they are, aliases included.
        stem: Of the weight files' names.
        dtype: Of floating-point tensors, by the names that they will have.
        max_shard_size: Such as "5GB", or bytes; None makes one file.
        aliases: Alias -> kept name; an alias is not written.
        filled: Names of tensors that an average takes from main.
        model_class: The class that loads the files; what it computes in float32 in any case is not rounded.

    Raises:
        UsageError: the size cannot be read, safetensors cannot hold the tensors, or a pattern of ``dtype`` is for none.
    """
    # By the names in the files, so that a pattern of a user means what is written.
    written = {spec.name: spec for spec in stored if spec.name not in aliases}
    general = general_dtype(dtype)
    kept = model_class.kept_from(general, written) if model_class is not None and general is not None else Kept()
    specs = cast_specs([*written.values()], dtype, kept.names)
    limit = parse_size(max_shard_size) if max_shard_size else None
    unknown = ""
    if model_class is not None and general is not None and kept.unknown:
        unknown = (
            f"{model_class.name} may have tensors in float32 when it is loaded in {dtype_name(general)}, and some of "
            f"them may have been rounded: {kept.unknown}"
        )
    return ModelPlan(model, specs, plan_files(specs, stem, limit), stem, dict(aliases), filled, unknown)
