"""What is one tensor under two names: as the class says; where none is known, as far as config and names tell."""

from __future__ import annotations

import re
from collections.abc import Mapping

from shardsmith.compare.class_ties import aliases_of, tied_in_class
from shardsmith.diagnose.subject import Reference
from shardsmith.hf.hf_directory import ties_word_embeddings
from shardsmith.hf.vocabulary import embedding_of
from shardsmith.tensors.tensors import TensorSpec

_HEADS = (".lm_head.weight", ".embed_out.weight", ".output.weight")
# The head of a layer, such as a multi-token predictor's, is not the output embedding.
_IN_LAYER = re.compile(r"\.[0-9]+\.")


def head_of(specs: Mapping[str, TensorSpec]) -> str | None:
    """Return the output embedding, if there is one that is called like one."""
    return next((name for name in specs if f".{name}".endswith(_HEADS) and not _IN_LAYER.search(name)), None)


def tied_names(reference: Reference, specs: Mapping[str, TensorSpec]) -> dict[str, str]:
    """Names that need not be in the model's files: alias -> the name that is kept there.

    What the class ties. It is asked only where that can matter: names alone suggest a tie, or the files lack a tensor.
    Where no class is known: output embedding -> input embedding, if the config ties them or is silent and the files
    lack the output embedding.
    """
    if reference.is_module:
        return {}
    guessed = _by_config(reference, specs)
    # The class is asked last: it may mean importing transformers.
    if not guessed and all(name in reference.specs for name in specs):
        return {}
    tied = tied_in_class(reference.path)
    return guessed if tied is None else aliases_of(tied, reference.specs, specs)


def _by_config(reference: Reference, specs: Mapping[str, TensorSpec]) -> dict[str, str]:
    embedding = embedding_of(reference.specs)
    head = head_of(reference.specs) or head_of(specs)
    if embedding is None or head is None:
        return {}
    # Of a config that says nothing, the files tell: without an output embedding in them it can only be tied.
    declared = ties_word_embeddings(dict(reference.config))
    silent = head not in reference.specs and "tie_word_embeddings" not in reference.config
    return {head: embedding} if declared or silent else {}
