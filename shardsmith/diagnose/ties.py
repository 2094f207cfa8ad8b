"""What is one tensor under two names, as far as config and names tell."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path

from shardsmith.diagnose.subject import Reference
from shardsmith.export.hf_directory import ties_word_embeddings
from shardsmith.name_maps.class_names import ClassNames
from shardsmith.tensors import TensorSpec

_HEADS = ("lm_head.weight", "embed_out.weight", "output.weight")
_EMBEDDINGS = (
    "embed_tokens.weight",
    "wte.weight",
    "embed_in.weight",
    "word_embeddings.weight",
    "tok_embeddings.weight",
    ".embeddings.weight",
)


def embedding_of(specs: Mapping[str, TensorSpec]) -> str | None:
    """The input embedding, if there is one that is called like one."""
    return next((name for name in specs if name.endswith(_EMBEDDINGS)), None)


def head_of(specs: Mapping[str, TensorSpec]) -> str | None:
    """The output embedding, if there is one that is called like one."""
    return next((name for name in specs if name.endswith(_HEADS)), None)


def tied_names(reference: Reference, specs: Mapping[str, TensorSpec]) -> dict[str, str]:
    """Names that need not be in the model's files: alias -> the name that is kept there.

    Output embedding -> input embedding, where the config ties them; and of names that the model's files lack, what the
    class ties. A config need not say so: where the files lack the output embedding and nothing contradicts, it is tied.
    """
    found = _by_config(reference, specs)
    if any(name not in reference.specs and name not in found for name in specs):
        found |= class_ties(reference.path, reference.specs, specs)
    return found


def class_ties(base: Path, listed: Mapping[str, TensorSpec], specs: Mapping[str, TensorSpec]) -> dict[str, str]:
    """What the class of a directory's config ties, of names that its files do not list: alias -> kept name."""
    from shardsmith.ties import tied_groups

    found: dict[str, str] = {}
    for group in tied_groups(_tied_in_class(base), {**specs, **listed}):
        kept = next((name for name in group if name in listed), group[0])
        found |= {name: kept for name in group if name != kept and name not in listed}
    return found


@functools.lru_cache(maxsize=4)
def _tied_in_class(base: Path) -> Mapping[str, str]:
    return ClassNames.of_directory(base).tied


def _by_config(reference: Reference, specs: Mapping[str, TensorSpec]) -> dict[str, str]:
    embedding = embedding_of(reference.specs)
    head = head_of(reference.specs) or head_of(specs)
    if embedding is None or head is None:
        return {}
    declared = ties_word_embeddings(dict(reference.config))
    silent = head not in reference.specs and "tie_word_embeddings" not in reference.config
    return {head: embedding} if declared or silent else {}
