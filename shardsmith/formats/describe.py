"""What ``metadata.json`` says of a DCP directory, from its index and from what was measured of its contents."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Self

from shardsmith.errors import IncompleteCheckpointError
from shardsmith.formats.dcp.index import DcpIndex
from shardsmith.manifest.metadata import CheckpointMetadata, FileRecord, ModelRecord, TensorRecord, now
from shardsmith.manifest.weights import WeightsRecord
from shardsmith.tensors.checkpoint_keys import find_models
from shardsmith.tensors.digest import Digest
from shardsmith.tensors.dtypes import dtype_name


@dataclass(frozen=True, slots=True)
class Measured:
    """What one rank, or all of them, found out about the contents of a DCP directory."""

    files: dict[str, FileRecord] = field(default_factory=dict)
    """By file name."""
    digests: dict[str, Digest] = field(default_factory=dict)
    """Of the tensors, by key; of one rank only its share."""

    def add(self, key: str, share: Digest) -> None:
        """Add the share of a box to the digest of its tensor."""
        # Digests are sums over elements, so shares add up in any order, from any rank.
        self.digests[key] = self.digests.get(key, Digest()) + share

    def to_plain(self) -> dict[str, Any]:
        """As values that survive JSON."""
        return {
            "files": {name: asdict(record) for name, record in self.files.items()},
            "digests": {key: str(digest) for key, digest in self.digests.items()},
        }

    @classmethod
    def merge(cls, parts: list[dict[str, Any]]) -> Self:
        """Return those of all ranks from what ``to_plain`` gave on each."""
        merged = cls()
        for part in parts:
            merged.files.update({name: FileRecord(**record) for name, record in part["files"].items()})
            for key, text in part["digests"].items():
                merged.add(key, Digest.parse(text))
        return merged


def describe(
    index: DcpIndex,
    measured: Measured,
    *,
    attempt: str,
    step: int,
    ema: dict[str, Any] | None,
    tied: dict[str, str],
    world_size: int,
    mesh: dict[str, Any] | None,
    weights: dict[str, WeightsRecord] | None = None,
    names: dict[str, Any] | None = None,
) -> CheckpointMetadata:
    """The manifest; the fields are those of ``CheckpointMetadata``.

    Raises:
        IncompleteCheckpointError: a tensor of the index was not measured.
    """
    # A tensor without elements has a digest, too (zeros): absent means that a rank did not write its share.
    unmeasured = sorted(key for key in index.tensors if key not in measured.digests)
    if unmeasured:
        raise IncompleteCheckpointError(index.path, f"no rank wrote {', '.join(unmeasured)}")
    models = find_models(index.tensors, index.containers)
    return CheckpointMetadata(
        attempt=attempt,
        step=step,
        created_at=now(),
        models=tuple(models),
        counts={name: _count(keys, index, tied) for name, keys in models.items()},
        ema=ema,
        tied=tied,
        world_size=world_size,
        mesh=mesh,
        files=measured.files,
        tensors={
            key: TensorRecord(
                shape=entry.spec.shape, dtype=dtype_name(entry.spec.dtype), digest=str(measured.digests[key])
            )
            for key, entry in index.tensors.items()
        },
        weights=weights,
        names=names,
    )


def _count(keys: Mapping[str, str], index: DcpIndex, tied: Mapping[str, str]) -> ModelRecord:
    specs = [index.tensors[key].spec for fqn, key in keys.items() if tied.get(fqn) not in keys]
    dtypes: dict[str, int] = {}
    for spec in specs:
        dtypes[dtype_name(spec.dtype)] = dtypes.get(dtype_name(spec.dtype), 0) + spec.numel
    return ModelRecord(tensors=len(specs), elements=sum(spec.numel for spec in specs), dtypes=dtypes)
