"""The weights of a live model, or of several parts of one, box by box: to be filled, poisoned, digested and looked at.

Legend: B = shape of a box. Works under FSDP2, FSDP1, HSDP, DDP, tensor parallel and in one process.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp._flat_param import FlatParameter
from torch.distributed.tensor import DTensor

from shardsmith.errors import UsageError
from shardsmith.ground.threads import one_thread_per_operator
from shardsmith.load.faults import NOTHING, Look
from shardsmith.sharding.digest_sums import Digested, digest_boxes
from shardsmith.sharding.gathered import forget_gathered
from shardsmith.sharding.local_boxes import local_boxes
from shardsmith.tensors.fqn import clean_fqn, inside_fabric, non_persistent_buffers, tied_weights
from shardsmith.tensors.tensors import Chunk, TensorSource, TensorSpec, read_into, row_major_blocks

POISON_INTEGER = 0x5A
"""In every byte of an integer that is poisoned; floating-point numbers become NaN."""
_LOOKED_AT = 1 << 22
"""Elements at a time."""


class LiveWeights:
    """The state dict of one or several modules, this rank's part of it.

    Attributes:
        specs: All tensors by clean FQN; global shapes.
        tied: Alias -> kept FQN, of tensors that are one in the model.
        input_embeddings, output_embeddings: Names of the tensors that transformers models call so.
    """

    def __init__(self, model: nn.Module | Sequence[nn.Module]) -> None:
        """All ranks; communicates as ``model_state_dict`` does.

        Raises:
            UsageError: a tensor is on the meta device, or two parts have one under the same name.
        """
        self.parts = [inside_fabric(part) for part in ([model] if isinstance(model, nn.Module) else model)]
        self._is_fsdp1 = [any(isinstance(m, FullyShardedDataParallel) for m in part.modules()) for part in self.parts]
        self._forget_gathered()
        # After that: the state must be made of the shards, not of weights that a forward has gathered.
        self._states = [_state(part) for part in self.parts]
        self._tensors: dict[str, Tensor] = {}
        for state in self._states:
            if twice := self._tensors.keys() & state.keys():
                raise UsageError(f"two parts of the model have tensors of the same name: {', '.join(sorted(twice))}")
            self._tensors |= state
        if meta := sorted(
            name for name, tensor in self._tensors.items() if any(values.is_meta for _, values in local_boxes(tensor))
        ):
            raise UsageError(
                f"{len(meta)} tensors are on the meta device, {meta[0]} for one: call model.to_empty(device=...) first"
            )
        self.specs = {n: TensorSpec(n, tuple(t.shape), t.dtype) for n, t in self._tensors.items()}
        self._is_flat = any(isinstance(p, FlatParameter) for part in self.parts for p in part.parameters())
        self.tied = {alias: kept for part in self.parts for alias, kept in tied_weights(part).items()}
        self.input_embeddings = self._embeddings("get_input_embeddings")
        self.output_embeddings = self._embeddings("get_output_embeddings")

    def is_tied(self, one: str, other: str) -> bool:
        """Whether two names are one tensor. Within the flat parameters of FSDP1 nobody can tell: then they are."""
        return self.tied.get(one, one) == self.tied.get(other, other) or (self._is_flat and one in self.specs)

    def transient(self) -> dict[str, Tensor]:
        """Return the non-persistent buffers by clean FQN; they share memory with the model's."""
        found: dict[str, Tensor] = {}
        for part in self.parts:
            names = set(non_persistent_buffers(part))
            for name, buffer in part.named_buffers(remove_duplicate=False):
                if clean_fqn(name, part) in names:
                    found[clean_fqn(name, part)] = buffer.detach()
        return found

    def buffer_dtypes(self) -> set[torch.dtype]:
        """Return the dtypes to which FSDP1 casts buffers here, as its MixedPrecision says."""
        wraps = [m for part in self.parts for m in part.modules() if isinstance(m, FullyShardedDataParallel)]
        return {dtype for wrap in wraps if (dtype := wrap.mixed_precision.buffer_dtype) is not None}

    def widen_buffer(self, name: str, dtype: torch.dtype) -> None:
        """Give a non-persistent buffer another dtype, if it has not that already. No communication."""
        for part in self.parts:
            for path, buffer in [*part.named_buffers(remove_duplicate=False)]:
                if clean_fqn(path, part) == name and buffer.dtype != dtype:
                    module, _, attribute = path.rpartition(".")
                    part.get_submodule(module)._buffers[attribute] = buffer.to(dtype)

    def digests(self, names: Iterable[str]) -> dict[str, Digested]:
        """What this rank holds of tensors, with digests. No communication.

        With as many threads as torch would use: several tensors at a time are faster than one with several threads. On
        an accelerator in this thread, behind what its stream has still to do: another thread has a stream of its own.
        """
        here = [name for name in names if name in self.specs]
        if any(tensor.device.type != "cpu" for tensor in self._tensors.values()):
            return {name: self._digest(name) for name in here}
        threads = torch.get_num_threads()
        with one_thread_per_operator(), ThreadPoolExecutor(threads, "shardsmith-digest") as pool:
            return dict(zip(here, pool.map(self._digest, here), strict=True))

    def _digest(self, name: str) -> Digested:
        return digest_boxes(self._tensors[name])

    @torch.no_grad()
    def fill(self, name: str, source: TensorSource, key: str) -> None:
        """Read this rank's boxes of a tensor from a source, cast to the model's dtype. No communication."""
        for box, values in local_boxes(self._tensors[name]):
            read_into(source, key, box, values)

    def store(self) -> None:
        """Hand what was filled to the model, where that has given out copies. All ranks.

        Communicates under FSDP1, and where modules save other tensors than they train and their hooks communicate.
        """
        for part, state, is_fsdp1 in zip(self.parts, self._states, self._is_fsdp1, strict=True):
            # FSDP1's state dict may be copies; set_model_state_dict writes them into the flat parameters.
            if is_fsdp1:
                set_model_state_dict(part, dict(state))
            # Filled values are in the model already, except where hooks of a module save other tensors than it has.
            elif not _parameters(part) <= state.keys():
                part.load_state_dict(dict(state), strict=False)
        self._forget_gathered()

    @torch.no_grad()
    def poison(self, names: frozenset[str]) -> None:
        """Overwrite these tensors, so that one that a load leaves out is found: NaN, or 0x5A in every byte.

        No communication. Bools stay as they are, and so do all flat parameters of FSDP1 in a part of the model that has
        a tensor which is not among these.
        """
        for part, state in zip(self.parts, self._states, strict=True):
            # A flat parameter of FSDP1 holds several tensors: it is overwritten only if none of this part is spared.
            spared = {name for name in state if name not in names}
            for name, tensor in _saved_tensors(part):
                # of a name that is not saved are flat parameters, and such as are saved in parts
                if clean_fqn(name, part) in names or (clean_fqn(name, part) not in state and not spared):
                    poison_(tensor.to_local() if isinstance(tensor, DTensor) else tensor)

    def look(self, name: str) -> list[tuple[Chunk, Look]]:
        """This rank's boxes of a tensor, each with what is in it. No communication."""
        return [(box, _look(values)) for box, values in local_boxes(self._tensors[name])]

    def _embeddings(self, getter: str) -> frozenset[str]:
        wanted = set()
        for part in self.parts:
            for module in part.modules():
                get = getattr(module, getter, None)
                try:
                    found = get() if get is not None else None
                except (NotImplementedError, AttributeError):  # transformers raises for models without
                    found = None
                weight = getattr(found, "weight", None)
                if weight is not None:
                    wanted.add(id(weight))
        return frozenset(
            clean_fqn(name, part)
            for part in self.parts
            for name, parameter in part.named_parameters(remove_duplicate=False)
            if id(parameter) in wanted
        )

    def _forget_gathered(self) -> None:
        """Drop the weights that FSDP keeps gathered from a forward: they are old once the shards are filled."""
        for part in self.parts:
            forget_gathered(part)


def model_state_dict(model: nn.Module) -> dict[str, Any]:
    """Clean FQN -> what a model saves, sharded as it is. All ranks; communicates under FSDP1.

    And where a module's own state-dict hooks do. torch's ``get_model_state_dict``, which only FSDP1 needs, refuses
    names that are no attributes of the model, such as the parts of a fused projection.
    """
    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        state: dict[str, Any] = get_model_state_dict(model)
        return state
    return {clean_fqn(name, model): value for name, value in model.state_dict().items()}


def poison_(tensor: Tensor) -> None:
    """Overwrite a local tensor with what no checkpoint holds."""
    if tensor.dtype.is_floating_point or tensor.dtype.is_complex:
        tensor.fill_(math.nan)
    elif tensor.dtype is not torch.bool:
        tensor.fill_(_poison_integer(tensor.dtype))


def is_poison(values: Tensor) -> Tensor:
    """Return where a tensor is as ``poison_`` left it; bool, shape B."""
    if values.dtype.is_floating_point or values.dtype.is_complex:
        return values.isnan()
    if values.dtype is torch.bool:
        return torch.zeros_like(values)
    return values == _poison_integer(values.dtype)


def _look(values: Tensor) -> Look:
    """In blocks: in float64, and with a mask beside it, a large tensor would not fit on the device."""
    whole = Chunk.whole(tuple(values.shape))
    blocks = row_major_blocks(tuple(values.shape), _LOOKED_AT)
    return sum((_look_at(values[box.within(whole)]) for _, box in blocks), NOTHING)


def _look_at(values: Tensor) -> Look:
    poisoned = int(is_poison(values).sum())
    numbers = torch.view_as_real(values).double() if values.is_complex() else values.double()
    finite = numbers[numbers.isfinite()]
    return Look(
        least=finite.min().item() if finite.numel() else 0.0,
        greatest=finite.max().item() if finite.numel() else 0.0,
        not_finite=numbers.numel() - finite.numel(),
        poisoned=poisoned,
        numel=values.numel(),
    )


def _poison_integer(dtype: torch.dtype) -> int:
    return int.from_bytes(bytes([POISON_INTEGER]) * dtype.itemsize, "little")


def _state(part: nn.Module) -> dict[str, Tensor]:
    return {name: value for name, value in model_state_dict(part).items() if isinstance(value, Tensor)}


def _parameters(part: nn.Module) -> set[str]:
    return {clean_fqn(name, part) for name, _ in part.named_parameters()}


def _saved_tensors(part: nn.Module) -> Iterator[tuple[str, Tensor]]:
    transient = set(non_persistent_buffers(part))
    yield from part.named_parameters()
    for name, buffer in part.named_buffers():
        if clean_fqn(name, part) not in transient:
            yield name, buffer
