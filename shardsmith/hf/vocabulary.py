"""Whether a tokenizer has the tokens that the embedding beside it has rows for. Reads files; runs no code of theirs."""

from __future__ import annotations

from collections.abc import Mapping
from operator import itemgetter
from pathlib import Path
from typing import Any

import xxhash

from shardsmith.errors import UnsupportedFormatError
from shardsmith.ground.bounded import read_bounded
from shardsmith.hf.config_entries import Config, entries
from shardsmith.tensors.tensors import TensorSpec

TOKENIZER_FILE = "tokenizer.json"
MOST_BYTES = 1 << 28
"""Large vocabularies take tens of MB; what is beyond this is no tokenizer, and is not read into memory."""
_UNREADABLE = "is no tokenizer that can be read"
_EMBEDDINGS = (
    "embed_tokens.weight",
    "wte.weight",
    "embed_in.weight",
    "word_embeddings.weight",
    "tok_embeddings.weight",
    ".embeddings.weight",
)


def embedding_of(specs: Mapping[str, TensorSpec]) -> str | None:
    """Return the input embedding, if there is one that is called like one."""
    return next((name for name in specs if name.endswith(_EMBEDDINGS)), None)


def vocabulary_sizes(config: Config) -> set[int]:
    """Return what a config says of the size of a vocabulary, at any depth."""
    return {value for path, value in entries(config) if "vocab" in path[-1] and type(value) is int}


def last_token(directory: Path) -> tuple[str, int]:
    """Return the token of ``tokenizer.json`` with the highest id, and that id; "" and -1 without the file.

    Raises UnsupportedFormatError if tokenizers cannot read the file, or is not installed.
    """
    file = directory / TOKENIZER_FILE
    if not file.is_file():
        return "", -1
    try:
        data = read_bounded(file, MOST_BYTES)
        key = xxhash.xxh3_128_digest(data)
        # Of a run each export has the same file, and reading it takes a moment.
        if key not in _LAST:
            _LAST.clear()
            _LAST[key] = max(open_tokenizer(file, data).get_vocab(True).items(), key=itemgetter(1), default=("", -1))
        return _LAST[key]
    except (OSError, ValueError) as error:
        raise UnsupportedFormatError(file, f"{_UNREADABLE}: {error}") from error


_LAST: dict[bytes, tuple[str, int]] = {}


def open_tokenizer(file: Path, data: bytes | None = None) -> Any:
    """Return the tokenizer in a ``tokenizer.json``, of which ``data`` is the content. Raises UnsupportedFormatError."""
    try:
        # Not by ``json``: of a text of nothing but brackets that makes gigabytes.
        from tokenizers import Tokenizer

        return Tokenizer.from_str((read_bounded(file, MOST_BYTES) if data is None else data).decode())
    except Exception as error:  # the library raises its own, and has none for a file that is none
        raise UnsupportedFormatError(file, f"{_UNREADABLE}: {error}") from error


def say_of_tokenizer(directory: Path, specs: Mapping[str, TensorSpec], before: Config, after: Config) -> str:
    """Return what is wrong between a tokenizer and the embedding beside it; empty if nothing is known to be.

    Args:
        directory: Where ``tokenizer.json`` is, if there is one.
        specs: The model's tensors, in which the embedding is looked for by its name.
        before: The base model's config.
        after: The config for these tensors.
    """
    try:
        token, highest = last_token(directory)
    except UnsupportedFormatError as error:
        return str(error)
    embedding = embedding_of(specs)
    if embedding is not None and highest >= (rows := specs[embedding].shape[0]):
        return (
            f"{TOKENIZER_FILE} has the id {highest}, of {token!r}, and {embedding} has {rows} rows: a text with such a "
            "token fails. Use the tokenizer that the run used, or resize the model's embedding to this one"
        )
    old, new = vocabulary_sizes(before), vocabulary_sizes(after)
    first, end = max(old - new, default=0), max(new - old, default=0)
    if not end > first > highest or not first:
        return ""
    # Rows may be added as padding, so this is no fault; nothing in the tensors tells.
    return (
        f"the vocabulary has grown by the rows {first} to {end - 1}, for which no {TOKENIZER_FILE} here has a token; "
        "if they are no padding, use the tokenizer that the run used"
    )
