"""One of the directories that a step becomes: its weights by name, and the files beside them."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from torch import nn

from shardsmith.ground.commit import writing
from shardsmith.ground.layout import EMA_WEIGHTS, MAIN_WEIGHTS, PROVENANCE_FILE
from shardsmith.hf.export_files import find_export_damage
from shardsmith.hf.model_code import code_of_model
from shardsmith.manifest.checkpoints import set_aside
from shardsmith.manifest.model_settings import GENERATION_FILE, ModelSettings, write_generation
from shardsmith.tensors.checkpoint_keys import EMA as AVERAGE
from shardsmith.tensors.checkpoint_keys import MAIN

from .held import HeldView
from .view import View

if TYPE_CHECKING:
    from .options import ExportFiles

log = logging.getLogger(__name__)

_OF_TOKENIZERS = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "chat_template*", "additional_chat_templates/*"),
    *("vocab.*", "merges.txt", "*.model", "tekken.json"),
)
_OF_PROCESSORS = ("processor_config.json", "*preprocessor_config.json")
"""What loaders read beside, or instead of, the files of a newer format."""


@dataclass(frozen=True, slots=True)
class LiveDirectory:
    """One of the directories that a step becomes."""

    suffix: str
    """Suffix of the directory's name."""
    stems: dict[str, str]
    """Model ("main", "ema") -> stem of its files' names."""

    @classmethod
    def choose(
        cls,
        models: Literal["main", "ema", "both"],
        ema_as: Literal["file", "directory"],
        view: View | None = None,
        stem: str = MAIN_WEIGHTS,
    ) -> list[Self]:
        """As ``to-hf`` does: an average alone is a directory's own weights, which ``from_pretrained`` loads.

        Adapters each have a directory: peft knows one name only.

        Args:
            models: The models to write.
            ema_as: Where an average goes that is not alone.
            view: Of a model of peft, or one that is held; None for any other model.
            stem: Of main weights, as the library that loads them wants it.
        """
        stem = stem if view is None else view.stem
        if models != "both":
            return [cls("", {models: stem})]
        if ema_as == "file" and (view is None or isinstance(view, HeldView) or stem == MAIN_WEIGHTS):
            return [cls("", {MAIN: stem, AVERAGE: EMA_WEIGHTS})]
        return [cls("", {MAIN: stem}), cls("-ema", {AVERAGE: stem})]


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelFiles:
    """What lies beside the weights."""

    base: Path | None
    """The base model's directory."""
    processor: Any
    """Has ``save_pretrained``, or None."""
    extra: dict[str, Path]
    """Name in the directory -> file to copy."""
    trust_remote_code: bool
    facts: Mapping[str, Callable[[], Any]] = field(default_factory=dict)
    """Name in the directory -> function whose answer is written there as JSON."""

    @classmethod
    def of(cls, files: ExportFiles, base: Path | None) -> Self:
        """Return the files that were asked for, beside the base model that was found."""
        extra = {name: Path(path) for name, path in (files.extra_files or {}).items()}
        return cls(
            base=base,
            processor=files.processor,
            extra=extra,
            trust_remote_code=files.trust_remote_code,
            facts=dict(files.extra_facts or {}),
        )

    def ask(self) -> dict[str, str]:
        """Return the JSON text of each extra fact as it is now. All ranks, main thread; a function may communicate."""
        return {name: json.dumps(answer()) for name, answer in self.facts.items()}

    def replaced(self, name: str) -> bool:
        """Return whether a file of the base model is one of a tokenizer or processor that is given instead.

        Loaders would mix the two: an older ``special_tokens_map.json`` goes before what ``tokenizer_config.json`` says.
        """
        tokenizer = getattr(self.processor, "tokenizer", None)
        patterns: tuple[str, ...] = (
            _OF_TOKENIZERS if tokenizer is not None or hasattr(self.processor, "get_vocab") else ()
        )
        if tokenizer is not None and hasattr(self.processor, "get_attributes"):
            patterns += _OF_PROCESSORS
        return any(fnmatchcase(name, pattern) for pattern in patterns)

    def code(self, model: nn.Module | None) -> dict[str, Path]:
        """Return the Python files of a live model's own class, by name; of a base model they are among its files."""
        return code_of_model(model)[1] if self.base is None and model is not None else {}

    def write(self, model: nn.Module | None, settings: ModelSettings, directory: Path) -> None:
        """Write what does not come from the base model. Rank 0, in the background; reads no weights.

        Args:
            model: The live model; None where there is none.
            settings: What it said when the weights were copied.
            directory: Where to write.
        """
        # A base model has one of its own, which is copied with its other files.
        if (generation := settings.generation_beside(self.base)) is not None:
            with writing(directory / GENERATION_FILE, "writing how to generate"):
                write_generation(generation, directory)
        for name, path in self.code(model).items():
            with writing(directory / name, f"copying {path}"):
                (directory / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, directory / name)
        if self.processor is not None:
            self.processor.save_pretrained(directory)
        for name, path in self.extra.items():
            with writing(directory / name, f"copying {path}"):
                (directory / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, directory / name)


def is_sound(export: Path) -> bool:
    """Return whether an export is there; one that is damaged is set aside."""
    if not (export / PROVENANCE_FILE).is_file():
        return False
    # Set aside at once, so that the export can be made again under its name.
    if damage := find_export_damage(export):
        log.warning("%s is damaged and was set aside as %s\n  %s", export, set_aside(export), "\n  ".join(damage))
    return not damage
