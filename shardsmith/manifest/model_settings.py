"""``model_config.json``: what the live model said of itself when a step was saved.

So an export of the step can say what an export of the live model would, where the base model says otherwise.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from shardsmith.errors import CorruptCheckpointError
from shardsmith.ground.layout import MODEL_CONFIG_FILE
from shardsmith.manifest.fields import require_fields, typed, typed_or_none
from shardsmith.manifest.metadata import read_json

GENERATION_FILE = "generation_config.json"
_OF_NO_GENERATION = ("_from_model_config", "transformers_version")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSettings:
    """What a live model says of itself; the content of ``model_config.json`` in a checkpoint."""

    config: dict[str, Any]
    """Its config, with every default."""
    generation_config: dict[str, Any] | None
    """How it generates, as its library saves it; None for a model that does not."""
    generates_by_config: bool
    """Whether it generates as the library makes it of the config alone."""

    def to_json(self) -> bytes:
        """Return the content of the file."""
        return (json.dumps(asdict(self), indent=1) + "\n").encode()

    def generation_beside(self, base: Path | None) -> dict[str, Any] | None:
        """Return what ``generation_config.json`` must say; None if that of the base is right, or none is needed.

        Args:
            base: The base model's directory, whose files are copied.
        """
        said = self.generation_config
        if base is None or said is None:
            return said
        file = base / GENERATION_FILE
        if self.generates_by_config or (file.is_file() and _as_loaded(read_json(file)) == _as_loaded(said)):
            return None
        return said


def settings_of_step(checkpoint: Path) -> ModelSettings | None:
    """Return what the step of a run recorded; None for one without, such as an older one.

    Raises CorruptCheckpointError if the record is none.
    """
    path = checkpoint / MODEL_CONFIG_FILE
    if not path.is_file():
        return None
    content = read_json(path)
    try:
        require_fields(content, ModelSettings)
        return ModelSettings(
            config=typed(content["config"], dict),
            generation_config=typed_or_none(content["generation_config"], dict),
            generates_by_config=typed(content["generates_by_config"], bool),
        )
    except (TypeError, ValueError) as error:
        raise CorruptCheckpointError(path, f"is damaged: {error}") from error


def write_generation(content: Mapping[str, Any], directory: Path) -> None:
    """Write ``generation_config.json``, also where ``save_pretrained`` refuses odd settings. Raises OSError."""
    text = json.dumps(content, indent=2, sort_keys=True) + "\n"
    (directory / GENERATION_FILE).write_text(text, encoding="utf-8")


def without_origin(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a generation config says, without where it came from."""
    return {key: value for key, value in content.items() if key not in _OF_NO_GENERATION}


def _as_loaded(content: Mapping[str, Any]) -> dict[str, Any]:
    """What transformers makes of the file; without it, what the file says."""
    try:
        from transformers import GenerationConfig
    except ImportError:
        return without_origin(content)
    loaded: dict[str, Any] = GenerationConfig.from_dict(dict(content)).to_dict()
    return without_origin(loaded)
