"""The right values of the buffers that no state dict holds, and what of a live model differs from them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from shardsmith.hf.blueprint import describe, transformers_parts, twin_of, without_weights
from shardsmith.load.faults import LoadFault
from shardsmith.load.live_config import LIVE_CONFIG, source_config
from shardsmith.load.live_weights import LiveWeights
from shardsmith.manifest.initial import InitialRecord
from shardsmith.sharding.local_boxes import local_boxes
from shardsmith.tensors.tensors import Chunk

Fresh = Callable[[], nn.Module] | Mapping[str, Tensor]
"""Makes a model of which only the buffers are looked at; or the buffers themselves, by name. An attribute ``origin`` of
a function says where they are from, for people."""

# Other devices round otherwise: a relative distance, and for tables of sines a part of the greatest value.
_RELATIVE = 1e-5
_OF_TABLES = 2e-3


@dataclass(frozen=True, slots=True)
class BufferReference:
    """Buffers as a fresh model has them.

    Attributes:
        tied: Alias -> kept name, as a fresh model has them.
    """

    buffers: Mapping[str, Tensor]
    origin: str
    """In words."""
    tied: Mapping[str, str]
    unmade: str = ""
    """Why a part of the model could not be made anew, if so."""

    def compare(self, live: LiveWeights) -> list[LoadFault]:
        """Return what is wrong with the non-persistent buffers of a model on this rank. No communication.

        FSDP1 casts buffers itself where its MixedPrecision has a buffer_dtype: then they are compared in that.
        """
        found, casts = live.transient(), live.buffer_dtypes()
        faults = [self._fault(name, buffer, casts) for name, buffer in found.items()]
        return [fault for fault in faults if fault is not None]

    def repair(self, live: LiveWeights) -> list[str]:
        """Overwrite those that are wrong and can be repaired; return their names. No communication."""
        found = live.transient()
        mendable = [fault.name for fault in self.compare(live) if fault.code != "buffer-without-reference"]
        repaired = []
        for name in mendable:
            # A wrong shape cannot be repaired in place: it stays a fault.
            if tuple(found[name].shape) == tuple(self.buffers[name].shape):
                # Before the copy: values in float32 must not be rounded to the wrong dtype that is repaired.
                # ``transient`` is asked again, since the buffer is a new tensor then.
                live.widen_buffer(name, self.buffers[name].dtype)
                for box, values in local_boxes(live.transient()[name]):
                    values.copy_(self._part(name, box))
                repaired.append(name)
        return repaired

    def _part(self, name: str, box: Chunk) -> Tensor:
        whole = self.buffers[name]
        return whole[box.within(Chunk.whole(tuple(whole.shape)))]

    def _fault(self, name: str, buffer: Tensor, casts: Collection[torch.dtype]) -> LoadFault | None:
        expected = self.buffers.get(name)
        if expected is None:
            reason = f" ({self.unmade})" if self.unmade else ""
            return LoadFault("buffer-without-reference", name, f"no reference for it in {self.origin}{reason}")
        if tuple(buffer.shape) != tuple(expected.shape):
            shapes = f"has shape {tuple(buffer.shape)}, expected {tuple(expected.shape)}"
            return LoadFault("buffer-differs", name, f"{shapes} as in {self.origin}")
        # A buffer may be a DTensor: each rank compares its own part.
        for box, values in local_boxes(buffer):
            part = self._part(name, box)
            if values.dtype in casts and part.is_floating_point():
                part = part.to(values.dtype)
            if (problem := _difference(values.cpu(), part)) is not None:
                return LoadFault(problem[0], name, f"{problem[1]}; the reference is {self.origin}")
        return None


def find_reference(
    live: LiveWeights, path: Path, record: InitialRecord | None, config: Any = None, fresh: Fresh | None = None
) -> BufferReference:
    """Return the reference for a live model. No communication.

    Args:
        live: The live model's tensors.
        path: What the weights are loaded from: its config is what the model is to be like.
        record: What its metadata.json says.
        config: Overrides that of ``path``: a config of transformers, its dict, or a directory with config.json.
        fresh: Takes the place of all the rest.

    A part of the model that cannot be made has no reference: ``unmade`` of the result says why.
    """
    if fresh is not None:
        return _of_fresh(fresh)
    made = _Made()
    for part in live.parts:
        for prefix, module in transformers_parts(part).items():
            wanted, words = source_config(module, path, record, config) if not prefix else (None, LIVE_CONFIG)
            made.add(prefix, module, wanted, f"a model made anew from {words}")
    # With a config given, recorded buffers are those of another config.
    recorded = {name: found.tensor() for name, found in record.buffers.items()} if record and config is None else {}
    known = {name: values for name, values in recorded.items() if values is not None}
    origin = f"{path.name}/metadata.json" if known and not made.buffers else made.origin
    # What was made anew comes before what was recorded.
    return BufferReference({**known, **made.buffers}, origin, made.tied, made.unmade)


class _Made:
    """The buffers of models that were made anew. One that is composed of others is made part by part."""

    def __init__(self) -> None:
        self.buffers: dict[str, Tensor] = {}
        self.tied: dict[str, str] = {}
        self.origin = "a model made anew"
        self.unmade = ""

    def add(self, prefix: str, module: Any, config: Any, origin: str) -> None:
        """Make one, or, where its class cannot be made from its config alone, those inside it."""
        try:
            blueprint = describe(twin_of(module, config))
        except Exception as error:  # whatever a class of the user's raises
            name = type(module).__name__
            self.unmade = (
                f"{name} cannot be made anew: {type(error).__name__}: {error}. Pass fresh=a function that makes one, "
                "or the buffers by name"
            )
            for inner, part in transformers_parts(module, itself=False).items():
                self.add(f"{prefix}.{inner}" if prefix else inner, part, None, f"parts made anew from {LIVE_CONFIG}")
            return
        dot = f"{prefix}." if prefix else ""
        self.origin = origin
        self.buffers |= {dot + name: values for name, values in blueprint.transient.items()}
        self.tied |= {dot + alias: dot + kept for alias, kept in blueprint.tied.items()}


def _of_fresh(fresh: Fresh) -> BufferReference:
    if isinstance(fresh, Mapping):
        return BufferReference({name: values.cpu() for name, values in fresh.items()}, "the buffers given as fresh", {})
    with without_weights():
        blueprint = describe(fresh())
    return BufferReference(blueprint.transient, getattr(fresh, "origin", "a model made by fresh()"), blueprint.tied)


def _difference(found: Tensor, expected: Tensor) -> tuple[str, str] | None:
    """Code and words, or None where they are equal but for what another device's arithmetic explains."""
    if found.dtype != expected.dtype:
        return "buffer-differs", f"is {found.dtype}, expected {expected.dtype}: it was cast together with the weights"
    if found.numel() == 0 or torch.equal(found, expected):
        return None
    if not found.dtype.is_floating_point and not found.dtype.is_complex:
        return "buffer-differs", f"{int((found != expected).sum())} of {found.numel()} values differ"
    # 8 eps: some operations in a dtype of few bits, such as bfloat16.
    precision = max(_RELATIVE, 8 * torch.finfo(found.dtype).eps)
    if found.dtype.is_complex:
        found, expected = torch.view_as_real(found), torch.view_as_real(expected)
    found, wanted = found.double(), expected.double()
    if int((~found.isfinite() & wanted.isfinite()).sum()):
        return "buffer-not-finite", f"{int((~found.isfinite()).sum())} of {found.numel()} values are not finite"
    if not found.any():
        return "buffer-zero", f"all {found.numel()} values are 0, expected up to {wanted.abs().max().item():g}"
    # tables of sines cross zero, where only an absolute distance says anything
    slack = _OF_TABLES * wanted.abs().max().item() if found.dim() > 1 else 0.0
    apart = (found - wanted).abs() > slack + precision * wanted.abs()
    if not apart.any():
        return None
    at = int(apart.reshape(-1).int().argmax())
    values = f"{found.reshape(-1)[at].item():g}, expected {wanted.reshape(-1)[at].item():g}"
    return "buffer-differs", f"{int(apart.sum())} of {found.numel()} values differ; value {at} is {values}"
