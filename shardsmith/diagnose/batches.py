"""Tokens to try a model on: the trainer's own first batch, or a fixed text."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shardsmith.diagnose.tokenizers import encode
from shardsmith.errors import CheckpointError, CorruptCheckpointError
from shardsmith.formats.safetensors_files.source import SafetensorsSource
from shardsmith.manifest.metadata import read_json
from shardsmith.tensors.tensors import read_tensor

IGNORED = -100
"""Label of a position that no loss is taken at."""
_SYNTHETIC_LENGTH = 64


@dataclass(frozen=True, slots=True)
class Batch:
    """Token ids, and what the model is to say to them. All int64 [B, T] on the CPU."""

    tokens: Tensor
    labels: Tensor
    """Unshifted: equal to the tokens, but where no loss is taken."""
    positions: Tensor | None
    """Position in its document, where the trainer gives it."""
    origin: str
    """Where it is from, for people."""
    given: bool
    """Whether it is the trainer's own."""
    mask: Tensor | None = None
    """0 where there is padding, where the trainer gives it."""
    labelled: bool = False
    """Whether the labels are the trainer's own, too."""

    def padding(self, ids: Collection[int], borders: Collection[int] = ()) -> Tensor:
        """Where there is padding, bool [B, T]: as the mask says, or else a run of such a token at an end of a row.

        Args:
            ids: Of the tokens that only fill up.
            borders: Those among them that begin or end a text as well: of a run, the one beside the text is left out.
        """
        if self.mask is not None:
            return self.mask == 0
        found = torch.zeros_like(self.tokens, dtype=torch.bool)
        for token in ids:
            run = self.tokens == token
            before, behind = run.cumprod(1).bool(), run.flip(1).cumprod(1).flip(1).bool()
            if token in borders:
                before &= before.roll(-1, 1)
                behind &= behind.roll(1, 1) & (torch.arange(run.shape[1], device="cpu") > 0)
            found |= before | behind
        return found

    def document_lengths(self) -> list[list[int]]:
        """By row, the lengths of the documents in it: one begins wherever a position is 0."""
        if self.positions is None:
            return [[self.tokens.shape[1]] for _ in self.tokens]
        lengths = []
        for positions in self.positions:
            starts = [int(start) for start in torch.nonzero(positions == 0).flatten()]
            borders = sorted({0, *starts, len(positions)})
            lengths.append([end - begin for begin, end in itertools.pairwise(borders)])
        return lengths


def read_batch(file: Path) -> Batch:
    """A safetensors file, or JSON, with ``input_ids`` [B, T] or [T], and perhaps ``labels``, ``position_ids`` and
    ``attention_mask``.

    Labels may be unshifted, as transformers takes them, or shifted by one, as TorchTitan's data loaders give them.

    Raises:
        CheckpointError: it cannot be read, or holds no such numbers.
    """
    found = _read(file)
    if "input_ids" not in found:
        raise CorruptCheckpointError(file, f"has no input_ids; it holds {', '.join(found) or 'nothing'}")
    tokens = found["input_ids"]
    labels, positions, mask = found.get("labels", tokens), found.get("position_ids"), found.get("attention_mask")
    for name, other in (("labels", labels), ("position_ids", positions), ("attention_mask", mask)):
        if other is not None and other.shape != tokens.shape:
            raise CorruptCheckpointError(file, f"{name} is {list(other.shape)}, input_ids {list(tokens.shape)}")
    # Two tokens have one prediction; shifted twice, nothing would be left of them.
    if tokens.shape[1] < 3:
        raise CorruptCheckpointError(file, f"input_ids is {list(tokens.shape)}; sequences of 3 tokens are the least")
    return Batch(
        tokens, _unshifted(tokens, labels), positions, str(file), given=True, mask=mask, labelled="labels" in found
    )


def fixed_batch(model: Path, vocabulary: int, longest: int | None, make: Callable[[int], Tensor]) -> Batch:
    """Return a text of ours in the model's tokens, or made-up ones if it has no tokenizer that can be read.

    Args:
        model: Directory of the model.
        vocabulary: Number of token ids.
        longest: How many tokens the model has positions for; None where there is no limit.
        make: Makes up so many tokens [1, length].
    """
    numbers = encode(model)
    # Ids beyond the vocabulary: the tokenizer is of another model.
    if numbers and max(numbers) < vocabulary and len(numbers) > 2:
        tokens, origin = torch.tensor([numbers[:longest]], device="cpu"), "a fixed text"
    else:
        tokens, origin = make(min(_SYNTHETIC_LENGTH, longest or _SYNTHETIC_LENGTH)), "made-up tokens"
    return Batch(tokens, tokens, None, origin, given=False)


def _read(file: Path) -> dict[str, Tensor]:
    if file.suffix not in (".safetensors", ".json"):
        raise CheckpointError(file, "is neither .safetensors nor .json: save the batch as one of them, with input_ids")
    if file.suffix == ".safetensors":
        source = SafetensorsSource(file)
        content: dict[str, Any] = {name: read_tensor(source, name) for name in source.specs}
        source.close()
    else:
        content = read_json(file)
    names = ("input_ids", "labels", "position_ids", "attention_mask")
    wanted = {name: content[name] for name in names if content.get(name) is not None}
    return {name: _rows(file, name, values) for name, values in wanted.items()}


def _rows(file: Path, name: str, values: Any) -> Tensor:
    try:
        tensor = torch.as_tensor(values)
        if tensor.is_floating_point() or tensor.dim() not in (1, 2) or tensor.numel() == 0:
            raise ValueError(f"{list(tensor.shape)} of {tensor.dtype}")
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise CorruptCheckpointError(file, f"{name} is no [batch, length] of integers: {error}") from error
    # One row is a batch, too.
    return tensor.long().reshape(-1, tensor.shape[-1])


def _unshifted(tokens: Tensor, labels: Tensor) -> Tensor:
    """Labels that say at each place which token stands there."""
    # Shifted by one, each label is the token behind; where no loss is taken, any token agrees.
    shifted = torch.where(labels[:, :-1] == IGNORED, tokens[:, 1:], labels[:, :-1])
    # Equal to the tokens, or anything but shifted: then the labels are taken as they stand.
    if torch.equal(labels, tokens) or not torch.equal(shifted, tokens[:, 1:]):
        return labels
    first = torch.full_like(labels[:, :1], IGNORED)
    return torch.cat([first, labels[:, :-1]], dim=1)


def check_batch(batch: Batch, vocabulary: int, longest: int | None, origin: Path) -> None:
    """Raises CheckpointError if the model has no row for one of the tokens, or no position."""
    highest, lowest = int(batch.tokens.max()), int(batch.tokens.min())
    if highest >= vocabulary or lowest < 0:
        raise CheckpointError(origin, f"has token ids from {lowest} to {highest}, but the model has {vocabulary}")
    # By document: each begins at position 0 again, so the sum of them may be longer.
    length = max(max(lengths) for lengths in batch.document_lengths())
    if longest is not None and length > longest:
        raise CheckpointError(origin, f"has sequences of {length} tokens, but the model has {longest} positions")
