"""What is one tensor under two names, as far as config and names tell."""

from __future__ import annotations

from collections.abc import Mapping

from shardsmith.diagnose.subject import Reference
from shardsmith.export.hf_directory import ties_word_embeddings
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
    """Output embedding -> input embedding, where the config ties them: alias -> kept name.

    A config need not say so: where the model's files lack the output embedding and nothing contradicts, it is tied.
    """
    embedding = embedding_of(reference.specs)
    head = head_of(reference.specs) or head_of(specs)
    if embedding is None or head is None:
        return {}
    declared = ties_word_embeddings(dict(reference.config))
    silent = head not in reference.specs and "tie_word_embeddings" not in reference.config
    return {head: embedding} if declared or silent else {}
