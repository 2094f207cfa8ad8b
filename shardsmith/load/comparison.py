"""The verification itself: names against names, digests against digests. All ranks act together, through the store."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from shardsmith.ground.distinct import agree_on_distinct
from shardsmith.ground.ranks import Ranks
from shardsmith.hf.config_changes import changed_sizes
from shardsmith.load.buffer_reference import BufferReference
from shardsmith.load.faults import NOTHING, LoadFault, Look, classify
from shardsmith.load.live_weights import LiveWeights
from shardsmith.load.source import InitialSource
from shardsmith.sharding.digest_sums import DigestSums, sum_digests
from shardsmith.sharding.shares import add_up_shares, pack_shares
from shardsmith.sharding.source_digests import digest_source
from shardsmith.tensors.digest import Digest
from shardsmith.tensors.dtypes import dtype_name
from shardsmith.tensors.fqn import matches
from shardsmith.tensors.narrowing import LostValues
from shardsmith.tensors.tensors import TensorSpec

_QK_NORM = re.compile(r"(^|[._])[qk]_(layer)?norm\b")


@dataclass(frozen=True, slots=True)
class Names:
    """Which tensors there are, in the model on all ranks and in the source."""

    dtypes: dict[str, torch.dtype]
    """Of every tensor of the model that the source has in the same shape, on any rank; the model's dtypes."""
    faults: list[LoadFault]
    missing: tuple[str, ...]
    """Allowed."""
    extra: tuple[str, ...]
    """Allowed."""
    reshaped: tuple[str, ...] = ()
    """Of another shape in the source, which is allowed."""
    resized: frozenset[tuple[int, int]] = frozenset()
    """The sizes in which these differ, in the source and in the model."""


@dataclass(frozen=True, slots=True)
class LoadComparison:
    """What comparing values has shown."""

    faults: list[LoadFault]
    """Of weights."""
    buffer_faults: list[LoadFault]
    """Of non-persistent buffers, each once."""
    buffers: tuple[str, ...]
    """All of those, on any rank."""
    repaired: tuple[str, ...]
    """Those that were, on any rank."""
    tensors: int
    elements: int
    digests: str
    cast: dict[str, int]
    tied: dict[str, str]
    untied: dict[str, str]


def specs_on_all(ranks: Ranks, live: LiveWeights) -> dict[str, TensorSpec]:
    """The tensors of the model on all ranks; these differ with pipeline stages. Raises what ``Ranks.agree`` raises."""
    found: dict[str, list[Any]] | None = agree_on_distinct(
        ranks,
        "comparing names",
        lambda: {name: [spec.shape, dtype_name(spec.dtype)] for name, spec in live.specs.items()},
        # reversed: the entry of the lowest rank is written last and stays.
        lambda parts: {name: spec for part in reversed(parts) for name, spec in part.items()} if parts[1:] else None,
    )
    if found is None:  # all ranks have the same
        return live.specs
    return {name: TensorSpec(name, tuple(shape), getattr(torch, dtype)) for name, (shape, dtype) in found.items()}


def compare_names(
    ranks: Ranks,
    live: LiveWeights,
    source: InitialSource,
    allow_missing: Sequence[str],
    allow_extra: Sequence[str],
    allow_shape: Sequence[str] = (),
) -> Names:
    """Compare names and shapes; with pipeline stages, of all ranks together. Raises what ``Ranks.agree`` raises."""
    specs = specs_on_all(ranks, live)
    faults, missing, reshaped, dtypes = [], [], [], {}
    resized: set[tuple[int, int]] = set()
    for name, spec in specs.items():
        key = source.key_of(name)
        if key is None and matches(name, allow_missing):
            missing.append(name)
        elif key is None:
            faults.append(LoadFault("missing-in-source", name, f"in the model {spec.shape}, not in the checkpoint"))
        elif source.specs[key].shape != spec.shape and matches(name, allow_shape):
            reshaped.append(name)
            resized.update(changed_sizes(source.specs[key].shape, spec.shape).items())
        elif source.specs[key].shape != spec.shape:
            shapes = f"{source.specs[key].shape} in the checkpoint, {spec.shape} in the model"
            faults.append(LoadFault("shape-differs", name, shapes))
        else:
            dtypes[name] = spec.dtype
    # Names of all ranks: with pipeline stages a tensor that this rank lacks may be used by another.
    used = {source.key_of(name) for name in specs}
    unused = {name: spec for name, spec in source.specs.items() if name not in used} | source.unused
    extra = tuple(name for name in unused if matches(name, allow_extra))
    faults += [_extra(spec, source) for name, spec in unused.items() if name not in extra]
    return Names(dtypes, faults, tuple(missing), extra, tuple(reshaped), frozenset(resized))


def verify_values(
    ranks: Ranks,
    live: LiveWeights,
    source: InitialSource,
    dtypes: Mapping[str, torch.dtype],
    reference: BufferReference,
    repaired: Sequence[str],
) -> LoadComparison:
    """Compare what is in the model on all ranks with the digests of the source, and its buffers with the reference.

    Args:
        ranks: All ranks of the job.
        live: The live model's tensors.
        source: The tensors that the model should hold.
        dtypes: As ``Names`` has them.
        reference: The right values of non-persistent buffers.
        repaired: Buffers that were repaired on this rank.
    """
    keys = {name: key for name in dtypes if (key := source.key_of(name)) is not None}
    recorded = {name: source.recorded_digest(key, dtypes[name]) for name, key in keys.items()}
    known = {name: digest for name, digest in recorded.items() if digest is not None}
    # Cast or not recorded: these are digested from the files, in the dtype that the model has.
    unknown = {name: (keys[name], dtypes[name]) for name in dtypes if name not in known}
    labels = {name: _label(*one) for name, one in unknown.items()}
    wanted = sorted({*labels.values()})
    found: dict[str, Any] = ranks.agree(
        "digesting the source",
        lambda: {
            **_read_share(source, set(unknown.values()), ranks, wanted),
            "tied": [alias for alias, kept in source.ties.items() if live.is_tied(alias, kept)],
            "buffers": [[fault.code, fault.name, fault.problem] for fault in reference.compare(live)],
            "transient": list(live.transient()),
            "repaired": list(repaired),
        },
        lambda parts: _put_together(parts, wanted),
        large=True,
    )
    expected = {**known, **{name: Digest.parse(found["read"][label]) for name, label in labels.items()}}
    wrong: dict[str, str] = sum_digests(
        ranks, "digesting the model", lambda: live.digests(dtypes), lambda sums: _wrong(sums, expected)
    )
    pairs = {a: kept for a, kept in source.ties.items() if {a, kept} <= dtypes.keys() and not {a, kept} & wrong.keys()}
    verified = {key for name, key in keys.items() if name not in wrong}
    lost = {name: found["lost"][label] for name, label in labels.items() if label in found["lost"]}
    return LoadComparison(
        faults=[*_beyond(lost, dtypes), *(_explain(ranks, live, source, dtypes, wrong) if wrong else [])],
        buffer_faults=[LoadFault(*fault) for fault in found["buffers"]],
        buffers=tuple(found["transient"]),
        repaired=tuple(found["repaired"]),
        tensors=len(dtypes) - len(wrong),
        elements=sum(source.specs[key].numel for key in verified),
        digests=_how_known(known, unknown),
        cast=_casts(source, dtypes),
        tied={alias: kept for alias, kept in pairs.items() if alias in found["tied"]},
        untied={alias: kept for alias, kept in pairs.items() if alias not in found["tied"]},
    )


def _put_together(parts: list[dict[str, Any]], labels: Sequence[str]) -> dict[str, Any]:
    """On rank 0: what all ranks found, put together. As JSON."""
    read = add_up_shares((part["read"] for part in parts), labels)
    buffers = {fault[1]: fault for part in reversed(parts) for fault in reversed(part["buffers"])}
    return {
        "read": {label: str(digest) for label, digest in read.items()},
        "lost": {label: max(p["lost"].get(label, 0.0) for p in parts) for part in parts for label in part["lost"]},
        "tied": sorted({alias for part in parts for alias in part["tied"]}),
        "buffers": [*buffers.values()][::-1],
        "transient": list(dict.fromkeys(name for part in parts for name in part["transient"])),
        "repaired": list(dict.fromkeys(name for part in parts for name in part["repaired"])),
    }


def _how_known(known: Mapping[str, Digest], unknown: Mapping[str, Any]) -> str:
    if not unknown:
        return "recorded"
    return "recorded, and read where it was cast" if known else "read from its files"


def _read_share(
    source: InitialSource, keys: set[tuple[str, torch.dtype]], ranks: Ranks, labels: Sequence[str]
) -> dict[str, Any]:
    """This rank's share of the digests of tensors in certain dtypes, and what of its blocks is beyond their range."""
    found: dict[str, Digest] = {}
    beyond: dict[str, float] = {}
    # Sorted, since a set has another order on each rank, and the shares are divided by position.
    for dtype in sorted({dtype for _, dtype in keys}, key=str):
        of_dtype = {key: dtype for key, other in sorted(keys, key=lambda pair: pair[0]) if other == dtype}
        lost = LostValues()
        shares = digest_source(source.tensors, of_dtype, part=ranks.rank, parts=ranks.size, lost=lost)
        found |= {_label(key, dtype): share for key, share in shares.items()}
        beyond |= {_label(key, dtype): most for key, most in lost.largest.items()}
    return {"read": pack_shares(found, labels), "lost": beyond}


def _beyond(lost: Mapping[str, float], dtypes: Mapping[str, torch.dtype]) -> list[LoadFault]:
    """A fault for each tensor whose values the dtype of the model cannot hold: its digest is that of infinities."""
    return [
        LoadFault(
            "beyond-range",
            name,
            f"values up to {most:.6g} in the checkpoint, and {dtype_name(dtypes[name])} in the model ends at "
            f"{torch.finfo(dtypes[name]).max:.6g}",
        )
        for name, most in lost.items()
    ]


def _label(key: str, dtype: torch.dtype) -> str:
    return f"{dtype_name(dtype)} {key}"


def _wrong(live: DigestSums, expected: Mapping[str, Digest]) -> dict[str, str]:
    """Tensors that are not as expected, each with a code."""
    # Replicas that differ are wrong even if the first one adds up: the other ranks train with other values.
    wrong = [n for n, digest in expected.items() if n in live.differing or live.digests.get(n, Digest()) != digest]
    # replicas that differ are the cause, a wrong sum is the effect
    return {name: "replicas-differ" if name in live.differing else "values-differ" for name in wrong}


def _explain(
    ranks: Ranks,
    live: LiveWeights,
    source: InitialSource,
    dtypes: Mapping[str, torch.dtype],
    wrong: Mapping[str, str],
) -> list[LoadFault]:
    """A fault for each wrong tensor, after a look at what it holds."""
    matrices = frozenset(name for name in dtypes if len(source.specs[source.key_of(name) or name].shape) > 1)
    found: list[list[str]] = ranks.agree(
        "looking at what differs",
        lambda: _looked(live, source, wrong),
        lambda parts: _faults(parts, len(dtypes), matrices, wrong),
        large=True,
    )
    return [LoadFault(*fault) for fault in found]


def _looked(live: LiveWeights, source: InitialSource, wrong: Iterable[str]) -> dict[str, Any]:
    here = [name for name in wrong if name in live.specs]
    return {
        "looks": {name: [[[*b.offsets, *b.sizes], asdict(look)] for b, look in live.look(name)] for name in here},
        "inputs": sorted(live.input_embeddings),
        "outputs": sorted(live.output_embeddings),
        "lost": [name for name in here if name in source.ties and not live.is_tied(name, source.ties[name])],
    }


def _faults(
    parts: list[dict[str, Any]], total: int, matrices: frozenset[str], wrong: Mapping[str, str]
) -> list[list[str]]:
    """On rank 0. As JSON."""
    looks = {}
    for name in wrong:
        # A box that several ranks hold counts once.
        boxes = {tuple(box): look for part in parts for box, look in part["looks"].get(name, ())}
        looks[name] = sum((Look(**look) for look in boxes.values()), NOTHING)
    ends = (
        frozenset(name for part in parts for name in part["inputs"]),
        frozenset(name for part in parts for name in part["outputs"]),
    )
    known = {name: code for name, code in wrong.items() if code == "replicas-differ"}
    known |= {name: "tie-broken" for part in parts for name in part["lost"]}
    return [[fault.code, fault.name, fault.problem] for fault in classify(looks, total, matrices, ends, known)]


def _extra(spec: TensorSpec, source: InitialSource) -> LoadFault:
    heads = source.record.heads if source.record else {}
    head = next((head for head, keys in heads.items() if spec.name in keys), None)
    of = f"of the head {head!r}: pass that part of the model, too, or allow_extra" if head else "not in the model"
    code = "qk-norms-dropped" if _QK_NORM.search(spec.name) else "missing-in-model"
    return LoadFault(code, spec.name, f"in the checkpoint {spec.shape}, {of}")


def _casts(source: InitialSource, dtypes: Mapping[str, torch.dtype]) -> dict[str, int]:
    pairs = [(source.specs[source.key_of(name) or name].dtype, dtype) for name, dtype in dtypes.items()]
    return dict(Counter(f"{dtype_name(old)} -> {dtype_name(new)}" for old, new in pairs if old != new))
