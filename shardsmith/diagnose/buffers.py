"""Buffers that no state dict holds, such as a rotary embedding's ``inv_freq``: against those of a fresh model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from shardsmith.compare.findings import Finding, one
from shardsmith.formats.safetensors_files.source import SafetensorsSource
from shardsmith.manifest.initial import BufferRecord
from shardsmith.tensors.fqn import clean_fqn
from shardsmith.tensors.tensors import read_tensor

# Relative: the same formula on another device or in another version differs in the last bits of float32.
_TOLERANCE = 1e-5


def compare_buffers(fresh: Mapping[str, Tensor], found: Mapping[str, Tensor], origin: str) -> Iterator[Finding]:
    """Buffers of one name that differ. Those that only one side has are no matter: versions of a library differ.

    Args:
        fresh: Of a model made from the config; clean names.
        found: Buffers of the checkpoint, by clean name.
        origin: Whose the others are, for people.
    """
    wrong: dict[str, dict[str, Tensor]] = {}
    for name, other in found.items():
        if name in fresh and not _close(fresh[name], other):
            wrong.setdefault(_code(other), {})[name] = other
    for code, buffers in wrong.items():
        expected = "; ".join(f"{name} {_text(fresh[name])}" for name in buffers)
        text = "; ".join(f"{name} {_text(other)}" for name, other in buffers.items())
        yield one(code, buffers, expected, f"{text} in {origin}")


def recorded_buffers(records: Mapping[str, BufferRecord]) -> dict[str, Tensor]:
    """Return those of a checkpoint's record that have their values there."""
    tensors = {name: record.tensor() for name, record in records.items()}
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def saved_buffers(file: Path) -> dict[str, Tensor]:
    """Return all tensors of a safetensors file, under clean names.

    Raises:
        CheckpointError: it cannot be read.
    """
    source = SafetensorsSource(file)
    tensors = {clean_fqn(name): read_tensor(source, name) for name in source.specs}
    source.close()
    # The tensors that were read stay valid after this.
    return tensors


def _code(found: Tensor) -> str:
    # In this order: NaN is "any" too.
    if not bool(found.isfinite().all()):
        return "buffer-not-finite"
    return "buffer-differs" if bool(found.any()) else "buffer-zero"


def _close(fresh: Tensor, found: Tensor) -> bool:
    if fresh.shape != found.shape:
        return False
    a, b = fresh.detach().cpu().double(), found.detach().cpu().double()
    # A buffer that was cast to few bits is off by their rounding; that is the trainer's choice, and slight.
    narrow = found.is_floating_point() and found.dtype.itemsize < 4
    return torch.allclose(a, b, rtol=1e-2 if narrow else _TOLERANCE, atol=1e-8, equal_nan=True)


def _text(values: Tensor) -> str:
    # A buffer that is one value everywhere shows that better than its first four elements.
    flat = values.detach().reshape(-1)
    if len(flat) > 1 and bool((flat == flat[0]).all()):
        return f"{flat[0].item():.6g} everywhere"
    return f"[{', '.join(f'{value:.6g}' for value in flat[:4].tolist())}{', ...' if len(flat) > 4 else ''}]"
