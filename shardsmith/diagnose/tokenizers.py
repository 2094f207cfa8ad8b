"""Whether two tokenizers give one text the same numbers. Reads their files; runs no code that comes with them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from shardsmith.compare.findings import Finding, one
from shardsmith.conversion.model_directory import hash_tokenizer
from shardsmith.errors import CheckpointError, CheckpointNotFoundError, UnsupportedFormatError
from shardsmith.hf.vocabulary import TOKENIZER_FILE, last_token, open_tokenizer
from shardsmith.manifest.metadata import read_json

_MODEL_FILES = (TOKENIZER_FILE, "tokenizer.model", "vocab.json", "merges.txt", "vocab.txt", "spiece.model")
# What tokenizers treat differently: digits, spaces, tabs, accents, and characters of several bytes.
_TEXT = "The capital of France is Paris. def f(x):\n\treturn x ** 2  # naïve café, 12345, 你好"
_SHOWN = 5
_SETTINGS_FILE = "tokenizer_config.json"
_SPECIAL = ("pad_token", "bos_token", "eos_token")


def compare_tokenizers(model: Path, other: Path) -> Iterator[Finding]:
    """Compare the tokenizers in two directories: ids of tokens, then what a text becomes and comes back as.

    Raises:
        CheckpointNotFoundError: one of them has no tokenizer.
        UnsupportedFormatError: one cannot be read.
    """
    mine, theirs = _files(model), _files(other)
    # The same bytes: there is no need to open them.
    if mine and mine == theirs:
        return
    # Without the one file that a library opens alone, only equal or not can be told.
    if TOKENIZER_FILE not in mine or TOKENIZER_FILE not in theirs:
        yield from compare_hashes(mine, theirs, str(other))
        return
    ours, used = _open(model), _open(other)
    wrong = _moved_tokens(ours.get_vocab(True), used.get_vocab(True))
    # Ids first: where they differ, so does every text, and the list of tokens says more.
    if wrong:
        listed = ", ".join(f"{token!r} is {a}" for token, a, _ in wrong[:_SHOWN])
        found = ", ".join(f"{token!r} is {b}" for token, _, b in wrong[:_SHOWN])
        yield one("tokenizer-differs", [str(other)], listed, f"{found}; {len(wrong)} tokens in all")
        return
    yield from _round_trip(ours, used, other)


def compare_hashes(recorded: Mapping[str, str], present: Mapping[str, str], origin: str) -> Iterator[Finding]:
    """Compare files of tokenizers, of which the content is not at hand, by their hashes."""
    names = [name for name in _MODEL_FILES if name in recorded and name in present and recorded[name] != present[name]]
    if names:
        yield one(
            "tokenizer-differs",
            names,
            ", ".join(f"{name} {recorded[name]}" for name in names),
            f"{', '.join(f'{name} {present[name]}' for name in names)} in {origin}",
        )
    # Two kinds of files and none in common: nothing was compared, which must not pass for equal.
    elif set(recorded).isdisjoint(present):
        raise CheckpointNotFoundError(origin, "has no tokenizer file of the kind that the model has")


def tokenizer_too_large(directory: Path, rows: int) -> Iterator[Finding]:
    """Whether a tokenizer has ids that the embedding has no row for."""
    _, highest = last_token(directory)
    if highest >= rows:
        yield one(
            "tokenizer-too-large", [str(directory)], f"ids below {rows}, the rows of the embedding", f"an id {highest}"
        )


def special_ids(directory: Path) -> dict[str, int]:
    """Ids of the tokens that a directory's tokenizer pads, begins and ends with, by name, as far as it says them."""
    try:
        settings = read_json(directory / _SETTINGS_FILE)
    except CheckpointError:
        return {}
    named = {name: settings.get(name) for name in _SPECIAL}
    texts = {name: value.get("content") if isinstance(value, dict) else value for name, value in named.items()}
    # True: with the tokens that were added after training.
    vocabulary = _open(directory).get_vocab(True) if (directory / TOKENIZER_FILE).is_file() else {}
    return {name: vocabulary[text] for name, text in texts.items() if isinstance(text, str) and text in vocabulary}


def compare_special_ids(model: Path, other: Path) -> Iterator[Finding]:
    """Compare what two tokenizers pad, begin and end with. Where one does not say it, nothing is compared."""
    mine, theirs = special_ids(model), special_ids(other)
    wrong = [name for name in mine if name in theirs and mine[name] != theirs[name]]
    # Which token fills up is the trainer's choice; which one ends a text is what the model has learnt.
    for code, names in (("padding-differs", {"pad_token"}), ("special-tokens-differ", {"bos_token", "eos_token"})):
        listed = [name for name in wrong if name in names]
        if listed:
            texts = (", ".join(f"{name} {ids[name]}" for name in listed) for ids in (mine, theirs))
            yield one(code, [str(other)], *texts)


def encode(directory: Path) -> list[int] | None:
    """Return a fixed text in the ids of a directory's tokenizer; None where it has none that can be read."""
    try:
        return list(_open(directory).encode(_TEXT).ids) if (directory / TOKENIZER_FILE).is_file() else None
    except UnsupportedFormatError:
        return None


def _files(directory: Path) -> dict[str, str]:
    found = {name: text for name, text in hash_tokenizer(directory).items() if name in _MODEL_FILES}
    if not found:
        raise CheckpointNotFoundError(directory, f"has no tokenizer: none of {', '.join(_MODEL_FILES)}")
    return found


def _open(directory: Path) -> Any:
    return open_tokenizer(directory / TOKENIZER_FILE)


def _moved_tokens(mine: Mapping[str, int], theirs: Mapping[str, int]) -> list[tuple[str, int, object]]:
    """Tokens with another id, in the order of the model's ids. Tokens that only training adds are none."""
    moved = [
        (token, number, theirs.get(token, "missing")) for token, number in mine.items() if theirs.get(token) != number
    ]
    return sorted(moved, key=lambda item: item[1])


def _round_trip(ours: Any, used: Any, other: Path) -> Iterator[Finding]:
    """The model must read from the training's numbers the text that was meant."""
    # What training sends is decoded as the model reads it.
    numbers, expected = used.encode(_TEXT).ids, ours.encode(_TEXT).ids
    if numbers != expected:
        meant, read = ours.decode(expected), ours.decode(numbers)
        yield one("tokenizer-differs", [str(other)], f"{meant!r} from {expected}", f"{read!r} from {numbers}")
