"""What is diagnosed, opened once for all levels: a checkpoint's models under the names of a Hugging Face model."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from shardsmith.compare.alignment import aligned_source
from shardsmith.compare.modules import HeldModule, with_modules
from shardsmith.compare.quantized import CURE, find_quantized
from shardsmith.errors import CheckpointError, CheckpointNotFoundError, UnsupportedFormatError
from shardsmith.formats.by_path import model_names, open_source
from shardsmith.formats.models import ModelSource
from shardsmith.formats.opened import OpenedCheckpoint, open_checkpoint
from shardsmith.ground import layout
from shardsmith.hf.hf_directory import is_component, read_config
from shardsmith.hf.known_class import model_class_of
from shardsmith.hf.layout_rules import DECLARED, LayoutRule
from shardsmith.hf.modules import Modules
from shardsmith.manifest.metadata import CheckpointMetadata, read_json
from shardsmith.name_maps.matching import Alignment
from shardsmith.tensors.checkpoint_keys import MAIN
from shardsmith.tensors.dtypes import is_quantized
from shardsmith.tensors.tensors import TensorSpec

_STEP_NAME = re.compile(r"(?:step-|checkpoint-)([0-9]{1,18})|([0-9]{7})")
"""Of the directory of a step, as TorchTitan, Trainer and BAGEL name it."""


@dataclass(frozen=True, slots=True)
class Reference:
    """The Hugging Face model that a checkpoint is compared with."""

    path: Path
    config: Mapping[str, Any]
    source: ModelSource | None
    """Its weights, or None where the directory has a config only."""
    specs: Mapping[str, TensorSpec]
    """Its tensors as its files name them."""
    modules: Modules
    """Of a sentence encoder, those beside the transformer."""
    lacks: str = "has no weights"
    """Why there is no source, if there is none."""
    is_module: bool = False
    """Whether it is a module beside a transformer, which no class of transformers describes."""

    @classmethod
    def open(cls, path: Path) -> Reference:
        """Read config and headers.

        Raises:
            CheckpointNotFoundError: no such directory, or no config in it.
            CheckpointError: config or weights are damaged.
        """
        if not path.is_dir():
            raise CheckpointNotFoundError(path, "is no directory; give that of a Hugging Face model")
        config = read_config(path)
        modules = Modules(path)
        models = model_names(path)
        # Main before an average: training starts from the weights, unless there is an average alone.
        source = open_source(path, MAIN if MAIN in models else models[0]) if models else None
        return cls(path, config, source, source.specs if source else _specs_by_config(path), modules)

    def beside(self, models: Iterable[ModelSource]) -> Reference:
        """Return it without its values, as its class has it, where its files are quantised and the models are not.

        Training starts from plain weights there, whose names and shapes are those of the class. Raises CheckpointError.
        """
        held = [spec for model in models for spec in model.specs.values()]
        # Only where one side is quantised: both quantised compare as they are.
        if not any(map(is_quantized, self.specs.values())) or any(map(is_quantized, held)):
            return self
        specs = _specs_by_config(self.path)
        # Its values cannot be compared with plain ones, so its files are not needed any more.
        self.close()
        return replace(self, source=None, specs=specs, lacks="has quantized weights, and the checkpoint plain ones")

    def close(self) -> None:
        """Close the files."""
        if self.source is not None:
            self.source.close()


@dataclass(frozen=True, slots=True)
class Subject:
    """A checkpoint next to the model that it should hold."""

    opened: OpenedCheckpoint
    reference: Reference
    models: dict[str, tuple[ModelSource, Alignment]]
    """``main``, ``ema``: the tensors under the reference's names where they have one."""
    step: int | None
    trained: bool
    """Whether training has moved the weights, so that they need not equal the reference's."""
    rules: Sequence[LayoutRule]
    """By which tensors of another shape were brought into the reference's layout."""
    quantized: Mapping[str, frozenset[str]]
    """Model -> the reference's names of weights that are quantised here, with their scales, and plain there."""
    scales: Mapping[str, ModelSource]
    """Model -> what belongs to these weights and has no name in the reference."""
    modules: tuple[Subject, ...] = ()
    """Of a sentence encoder the modules beside the transformer, each next to that of the reference."""
    part_of: str | None = None
    """Of a module the model that it belongs to, such as ``main``."""

    @classmethod
    def open(
        cls,
        checkpoint: Path,
        reference: Reference,
        trained: bool | None = None,
        names: str = "auto",
        rules: Sequence[LayoutRule] = DECLARED,
    ) -> Subject:
        """Read the checkpoint's index; no tensor of it.

        Args:
            checkpoint: The checkpoint's directory or file.
            reference: The model that it should hold.
            trained: None: as its step, or an optimizer state in it, says.
            names: How its names become the model's, as ``aligned_source`` says.
            rules: What may be done to tensors that the model has in another shape.

        Raises:
            CheckpointError: it cannot be read, for whatever reason.
            UsageError: there is no such name map, or it does not fit.
        """
        with contextlib.ExitStack() as stack:
            opened = open_checkpoint(checkpoint)
            stack.callback(opened.close)
            reference = reference.beside(opened.models.values())
            aligned: dict[str, tuple[ModelSource, Alignment]] = {}
            quantized: dict[str, frozenset[str]] = {}
            scales: dict[str, ModelSource] = {}
            models, modules = with_modules(opened, reference.modules, stack)
            for name, found in models.items():
                source, alignment = aligned_source(found, reference.specs, reference.path, names, rules)
                held = find_quantized(source, reference.specs)
                # Scales and packed numbers belong to weights that the model has: they are not more tensors.
                aligned[name] = (source.without(held.beside) if held.beside else source, alignment)
                quantized[name] = held.weights
                scales[name] = source.without([one for one in source.specs if one not in held.beside])
            step = opened.metadata.step if opened.metadata else _step(checkpoint)
            # Without a step, an optimizer's state tells that a training has written it.
            moved = bool(step) if step is not None else opened.has_optimizer
            moved = moved if trained is None else trained
            subject = cls(opened, reference, aligned, step, moved, rules, quantized, scales)
            parts = []
            for one in modules:
                parts.append(subject._of(one))
                stack.callback(parts[-1].reference.close)
            stack.pop_all()
        return replace(subject, modules=tuple(parts))

    def _of(self, held: HeldModule) -> Subject:
        """A module as a subject of its own, under its names in the whole model."""

        def in_whole(source: ModelSource) -> ModelSource:
            return source.only({held.module.in_whole(name): name for name in source.specs})

        path, known = self.reference.path / held.module.folder, self.reference.modules.with_weights
        # The checkpoint may have a module that the reference has not.
        theirs = in_whole(open_source(path, MAIN)) if held.module.folder in {one.folder for one in known} else None
        source = in_whole(held.source)
        specs = theirs.specs if theirs else {}
        return replace(
            self,
            reference=replace(self.reference, path=path, config={}, source=theirs, specs=specs, is_module=True),
            models={held.name: (source, Alignment({one: one for one in source.specs}))},
            quantized={held.name: frozenset()},
            scales={held.name: source.only({})},
            part_of=held.model,
        )

    def model_of(self, name: str) -> str:
        """Return the model that one of ``models`` is, or is a part of."""
        return self.part_of or name

    @property
    def path(self) -> Path:
        """The checkpoint."""
        return self.opened.path

    @property
    def metadata(self) -> CheckpointMetadata | None:
        """Its metadata.json, if it is ours."""
        return self.opened.metadata

    def lacks_plain(self, model: str, what: str) -> str:
        """Return why weights of a model cannot be compared, and what follows; empty where they can."""
        names = sorted(self.quantized.get(model, ()))
        if not names:
            return ""
        weights = f"{len(names)} quantized weights beside their scales in {model}, such as {names[0]}"
        return f"{self.path} has {weights}, and {self.reference.path} plain ones: {what}. {CURE}"

    def close(self) -> None:
        """Close the files."""
        self.opened.close()
        for part in (self, *self.modules):
            part.reference.close()
            for source, _ in part.models.values():  # of a module perhaps in a file of its own
                source.close()


def _step(checkpoint: Path) -> int | None:
    """The step that an export of ours, or a directory's name, states."""
    try:
        step = read_json(checkpoint / layout.PROVENANCE_FILE).get("step")
    except CheckpointError:
        # Other projects' steps are known by the names of their directories only.
        match = _STEP_NAME.fullmatch(checkpoint.resolve().name)
        step = int(match[1] or match[2]) if match else None
    # ``type``: True is an int as well.
    return step if type(step) is int else None


def _specs_by_config(path: Path) -> Mapping[str, TensorSpec]:
    """The tensors that a model without weights would have, as its library makes it; of tied ones the kept name."""
    from shardsmith.hf.blueprint import describe, model_of_directory

    if is_component(config := read_config(path)):
        model_class, reason = model_class_of(config)
        if model_class is None:
            raise UnsupportedFormatError(path, reason)
        return {name: spec for name, spec in model_class.specs.items() if name not in model_class.tied}
    made = describe(model_of_directory(path))
    return {name: spec for name, spec in made.state_dict.items() if name not in made.tied}
