"""What ``metadata.json`` records of weights that are the files of a Hugging Face directory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, Self

from shardsmith.manifest.fields import require_fields, typed


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightsRecord:
    """The files of one model in a checkpoint, and how its tensors are made of those in the files."""

    folder: str
    """Where the files are: ``""`` for the checkpoint's directory itself, or the name of a folder in it."""
    stem: str
    """Stem of the files' names, such as ``model``."""
    slices: dict[str, Any]
    """By name in the files, which elements of which tensors of the model they are, as ``name_maps.recorded`` writes it.
    A name that is not there is all of the model's tensor of the same name."""
    rest: bool = False
    """Whether a folder beside the files has what they lack to the float32 tensors that train."""

    @classmethod
    def parse(cls, record: Any) -> Self:
        """From JSON. Raises KeyError, TypeError or ValueError if it is none."""
        require_fields(record, cls)
        folder, stem = typed(record["folder"], str), typed(record["stem"], str)
        # A manifest may come from a stranger: folder and stem must not lead out of the checkpoint.
        if (folder and not _is_name(folder)) or not _is_name(stem):
            raise ValueError(f"weights are in {folder!r} as {stem!r}, which are no names of a folder and of files")
        return cls(folder=folder, stem=stem, slices=typed(record["slices"], dict), rest=typed(record["rest"], bool))


def _is_name(text: str) -> bool:
    return PurePosixPath(text).name == text and text not in ("", ".", "..")
