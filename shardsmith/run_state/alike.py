"""What all ranks must hold alike, compared across the ranks before it is saved or exported as one value.

A checkpoint has one value for a key, or for a part of a tensor, that several ranks hold. Whether they hold the same is
assumed by everything that saves; here it is looked at, through the job's store and by digests: no tensor is sent.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, Literal

import xxhash
from torch import Tensor
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed.tensor import DTensor

from shardsmith.errors import RankFailedError, RanksDisagreeError
from shardsmith.ground.garbage import without_collection
from shardsmith.ground.ranks import Ranks
from shardsmith.sharding.local_boxes import local_boxes
from shardsmith.tensors.digest import digest_box, digest_tensor

_Shares = dict[str, str]
"""Digest by name: of a value under a key, or of a box of a tensor."""

OPTIONS = "optimizer.param_groups"
"""Path of the options of an optimizer's groups."""
_ONE_FOR_ALL = "The options of an optimizer, such as lr, are one for all ranks: set the same on each."
_PER_RANK = (
    'State that each rank has for itself is saved apart: stateful={"data": per_rank(loader)}, from shardsmith.hooks.'
)
_REPLICAS = (
    "They were replicas, and are no more: gradients are not synchronized (DDP was forgotten, no_sync() was left on), "
    "or a rank has gone its own way. If the tensors are different on purpose, give them different names on the ranks."
)


def shared_values(state: Mapping[str, Any], keys: Collection[str]) -> dict[str, str]:
    """Return the digest of each value under some top-level keys of a state, by path. No communication.

    Sharded tensors are left out.
    """
    return {path: digest for key in keys if key in state for path, digest in _values(state[key], key)}


def signature(shares: Mapping[str, str]) -> str:
    """Return one digest for many by name."""
    # Sorted, as ranks may meet the names in another order.
    return xxhash.xxh3_128_hexdigest(repr(sorted(shares.items())).encode())


def refuse_different_values(ranks: Ranks, phase: str, shares: Mapping[str, str]) -> None:
    """Raise if ranks hold different values under one name, of those that several have. All ranks; by the store.

    Raises:
        RanksDisagreeError: on all ranks, naming every value that differs.
    """
    _refuse(ranks, phase, dict(shares), "ranks hold different values under one key; nothing was written")


def compare_replicas(
    ranks: Ranks, phase: str, tensors: Callable[[], Mapping[str, Tensor]], verb: str = "saved"
) -> None:
    """Raise if ranks that hold the same part of a tensor hold different values. All ranks; communicates by store.

    Costs a digest of everything that this rank holds as one of several.

    Args:
        ranks: The ranks that call.
        phase: The moment, for the errors.
        tensors: Returns the tensors that several ranks may hold, by name.
        verb: What has not been done then.

    Raises:
        RanksDisagreeError: on all ranks, naming every tensor and the ranks that differ.
        RankFailedError: on all ranks, if ``tensors`` raised on any.
    """
    if ranks.size > 1:
        shares: _Shares = {}

        def short() -> str:
            with without_collection():
                shares.update(_replicas(tensors()))
            return signature(shares)

        if not ranks.agree(phase, short, are_equal):
            _refuse(ranks, phase, shares, f"ranks hold different replicas of tensors; nothing was {verb}", _REPLICAS)


class ReplicaCheck:
    """Compares replicas at the first save or export, and at later ones as it is asked for."""

    def __init__(self, ranks: Ranks, when: Literal["first", "never"] | int) -> None:
        self._ranks = ranks
        self._when = when
        self._done = 0

    def look(self, phase: str, tensors: Callable[[], Mapping[str, Tensor]]) -> None:
        """A save begins. All ranks; communicates through the store if it is time."""
        if self.is_due():
            try:
                compare_replicas(self._ranks, phase, tensors)
            except RankFailedError:  # nothing was compared
                self._done -= 1
                raise

    def is_due(self) -> bool:
        """A save or an export begins: whether it is one at which replicas are compared. No communication."""
        every = self._when if isinstance(self._when, int) else 0
        is_due = self._when != "never" and (self._done == 0 or (every and self._done % every == 0))
        self._done += 1
        return bool(is_due)


def tensors_of(state: Mapping[str, Any], without: Collection[str] = (), prefix: str = "") -> dict[str, Tensor]:
    """Return the tensors of a nested state by flat name, but for those below some top-level keys."""
    found: dict[str, Tensor] = {}
    for name, value in state.items():
        if isinstance(value, Mapping) and name not in without:
            found |= tensors_of(value, prefix=f"{prefix}{name}.")
        elif isinstance(value, Tensor) and name not in without:
            found[f"{prefix}{name}"] = value
    return found


def are_equal(found: Sequence[Any]) -> bool:
    """Return whether all ranks say the same."""
    return len(set(found)) == 1


def _refuse(ranks: Ranks, phase: str, shares: _Shares, summary: str, advice: str = "") -> None:
    """Compare digests one by one."""
    if problems := ranks.agree(phase, lambda: shares, _differences, large=True):
        lines = "\n  ".join(problems)
        advice = advice or (_ONE_FOR_ALL if problems[0].startswith(OPTIONS) else _PER_RANK)
        raise RanksDisagreeError(f"{phase}: {summary}\n  {lines}\n{advice}")


def _differences(reports: Sequence[_Shares]) -> list[str]:
    held: dict[str, dict[str, list[int]]] = {}
    for rank, shares in enumerate(reports):
        for name, digest in shares.items():
            held.setdefault(name, {}).setdefault(digest, []).append(rank)
    lines: dict[str, None] = {}
    for name, by_digest in held.items():
        if len(by_digest) > 1:
            groups = " and ".join(f"rank {', '.join(map(str, ranks))}" for ranks in by_digest.values())
            # The place of a box follows after @. Of several boxes that differ the tensor is named once.
            lines[f"{name.partition('@')[0]}: {groups} hold different values"] = None
    return list(lines)


def _values(value: Any, path: str) -> Iterator[tuple[str, str]]:
    """Digest of each value in a nested state, by path. Objects without a value of their own are left out."""
    if isinstance(value, Mapping):
        for name, one in value.items():
            yield from _values(one, f"{path}.{name}")
    elif isinstance(value, list | tuple):
        for i, one in enumerate(value):
            yield from _values(one, f"{path}.{i}")
    elif isinstance(value, Tensor):
        if not isinstance(value, DTensor | ShardedTensor):
            yield path, str(digest_tensor(value.detach()))
    elif isinstance(value, str | bytes | int | float | complex | bool | type(None)):
        yield path, xxhash.xxh3_128_hexdigest(repr(value).encode())
    elif isinstance(value, set | frozenset):
        # A set has no order of its own.
        yield path, xxhash.xxh3_128_hexdigest(repr(sorted(map(repr, value))).encode())


def _replicas(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, str]]:
    for name, tensor in tensors.items():
        if _is_replicated(tensor):
            for box, values in local_boxes(tensor):
                place = f"{name}@{list(box.offsets)}{list(box.sizes)}"
                yield place, str(digest_box(values, box, tuple(tensor.shape)))


def _is_replicated(tensor: Tensor) -> bool:
    """Whether another rank holds the same part of it, as far as this rank can know."""
    if isinstance(tensor, ShardedTensor):
        return False
    if isinstance(tensor, DTensor):
        mesh = tensor.device_mesh  # its ``mesh`` is made anew at every call
        return any(p.is_replicate() and mesh.size(dim) > 1 for dim, p in enumerate(tensor.placements))
    return True
