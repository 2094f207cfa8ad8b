"""An initial load that is proved: the model that starts training is the one in the checkpoint.

Every rank fills its own boxes of the weights from the files; nothing is gathered and no rank reads what it does not
hold. Then each digests what is in its model. The shares of all ranks are added up and must be the digests of the
source: those that its metadata.json recorded, or else those of its files, read once more by all ranks together. Buffers
that no checkpoint holds must equal those of a model that is made anew.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from torch import nn

from shardsmith.buffer_reference import BufferReference, Fresh, find_reference
from shardsmith.errors import InitialLoadError
from shardsmith.initial_report import InitialLoadReport
from shardsmith.initial_source import InitialSource, read_record
from shardsmith.live_weights import LiveWeights
from shardsmith.load_faults import EFFECTS, LoadFault
from shardsmith.load_proof import Proof, compare_names, prove_values
from shardsmith.model_keys import MAIN
from shardsmith.ranks import Ranks

log = logging.getLogger(__name__)


def load_initial(
    path: str | Path,
    *,
    model: nn.Module | Sequence[nn.Module],
    config: Any = None,
    fresh: Fresh | None = None,
    repair_buffers: bool = False,
    poison: bool = True,
    allow_missing: Sequence[str] = (),
    allow_extra: Sequence[str] = (),
    weights: str = MAIN,
    ranks: Ranks | None = None,
) -> InitialLoadReport:
    """Fill a model from a checkpoint of any format, and prove that it is that of the checkpoint.

    All ranks call it, after sharding. Communicates through the store, and over the process group under FSDP1.

    Args:
        path: A checkpoint of ours, a plain DCP directory (flat or nested), a Hugging Face directory, and so on.
        model: Sharded or not, on its device (after ``to_empty``, if it was made on meta). Or all parts of it that this
            rank has, whose tensors have different names.
        config: What the model is to be like, if not what ``path`` says: a config of transformers, its dict, or a
            directory with a config.json. Models of other kinds have none.
        fresh: For models that are not from transformers: a function that makes one, on the CPU, of which the buffers
            are looked at, or the buffers themselves by name.
        repair_buffers: Overwrite non-persistent buffers that are wrong, and say so in the report.
        poison: Overwrite all weights first, so that what the load leaves out is seen.
        allow_missing: Patterns of tensors that the checkpoint need not have. They keep their values.
            Also of non-persistent buffers for which there is no reference.
        allow_extra: Patterns of tensors of the checkpoint that the model need not have.
        weights: ``"main"`` or ``"ema"``.
        ranks: The ranks, if the caller has some already.

    Raises:
        InitialLoadError: on all ranks, naming every tensor and buffer at fault. If names or shapes do not fit, nothing
            was loaded and the model is unchanged.
        CheckpointError, RankFailedError: the checkpoint cannot be read. The model's weights cannot be used then.
    """
    ranks = ranks or Ranks()
    load = _Load(Path(path), model, weights, ranks, tuple(allow_missing), tuple(allow_extra))
    try:
        reference = load.reference(config, fresh)
        load.refuse_misfits()
        load.fill(poison)
        repaired = load.repair(reference, repair_buffers)
        return load.prove(reference, repaired, loaded=True)
    finally:
        load.source.close()


def prove_loaded(
    model: nn.Module | Sequence[nn.Module],
    path: str | Path,
    *,
    config: Any = None,
    fresh: Fresh | None = None,
    repair_buffers: bool = False,
    allow_missing: Sequence[str] = (),
    allow_extra: Sequence[str] = (),
    weights: str = MAIN,
    ranks: Ranks | None = None,
) -> InitialLoadReport:
    """Prove that a model, which somebody else has loaded, is that of a checkpoint. Changes nothing but buffers.

    All ranks call it before the first step. Arguments, communication and errors are those of ``load_initial``. Call
    ``poison_weights`` before the load, so that what it leaves out cannot be right by chance and is called by its name.
    """
    ranks = ranks or Ranks()
    load = _Load(Path(path), model, weights, ranks, tuple(allow_missing), tuple(allow_extra))
    try:
        reference = load.reference(config, fresh)
        repaired = load.repair(reference, repair_buffers)
        return load.prove(reference, repaired, loaded=False)
    finally:
        load.source.close()


def prove_buffers(
    model: nn.Module | Sequence[nn.Module],
    path: str | Path,
    *,
    config: Any = None,
    fresh: Fresh | None = None,
    repair_buffers: bool = False,
    allow_missing: Sequence[str] = (),
    ranks: Ranks | None = None,
) -> list[str]:
    """Prove that non-persistent buffers are right in a model whose weights are from elsewhere; those repaired.

    For a run that resumes: no checkpoint holds these buffers, so whatever made the model must have made them. All ranks
    call it; arguments, communication and errors are those of ``load_initial``. The checkpoint may be gone by now: then
    the live model's own config is what counts.
    """
    ranks = ranks or Ranks()
    live = LiveWeights(model)
    found: list[BufferReference] = []
    ranks.gather(
        "making the model anew",
        lambda: found.append(find_reference(live, Path(path), read_record(Path(path)), config, fresh)),
    )
    repaired = _repair(ranks, live, found[0]) if repair_buffers else []
    faults = [fault for fault in _buffer_faults(ranks, live, found[0]) if not _is_allowed(fault, allow_missing)]
    if faults:
        raise _error(Path(path), faults, "The weights were not looked at. It must not train like this.")
    return repaired


def poison_weights(model: nn.Module | Sequence[nn.Module], *, spare: Sequence[str] = ()) -> None:
    """Overwrite the weights of a model before somebody else loads them: floating point with NaN, integers with 0x5A.

    All ranks call it; communicates under FSDP1 only.

    Args:
        spare: Patterns of names to leave alone.
    """
    live = LiveWeights(model)
    live.poison(frozenset(name for name in live.specs if not _matches(name, spare)))


class _Load:
    """One load, or the proof of one, on this rank."""

    def __init__(
        self,
        path: Path,
        model: nn.Module | Sequence[nn.Module],
        weights: str,
        ranks: Ranks,
        allow_missing: tuple[str, ...],
        allow_extra: tuple[str, ...],
    ) -> None:
        self.ranks = ranks
        self.live = LiveWeights(model)
        self._allow_missing = allow_missing
        self._allow_extra = allow_extra
        self.source: InitialSource
        ranks.gather(f"opening {path}", lambda: self._open(path, weights))

    def reference(self, config: Any, fresh: Fresh | None) -> BufferReference:
        """The right non-persistent buffers and ties. Every rank makes its own."""
        found: list[BufferReference] = []
        source = self.source
        phase = "making the model anew"
        self.ranks.gather(
            phase, lambda: found.append(find_reference(self.live, source.path, source.record, config, fresh))
        )
        self.source.add_ties({**found[0].tied, **self.live.tied})
        return found[0]

    def refuse_misfits(self) -> None:
        """Raise InitialLoadError if names or shapes do not fit. Nothing was touched."""
        names = compare_names(self.ranks, self.live, self.source, self._allow_missing, self._allow_extra)
        if names.faults:
            raise _error(self.source.path, names.faults, "Nothing was loaded; the model is unchanged.")

    def fill(self, poison: bool) -> None:
        """Load this rank's boxes of everything that the source has."""
        names = [name for name in self.live.specs if self.source.key_of(name) is not None]
        if poison:
            self.live.poison(frozenset(names))
        self.ranks.gather(f"loading {self.source.path}", lambda: self._fill(names))
        self.live.store()
        self.live = LiveWeights(self.live.parts)

    def repair(self, reference: BufferReference, wanted: bool) -> list[str]:
        """Mend non-persistent buffers, if that is wanted; the names of those that were wrong on any rank."""
        return _repair(self.ranks, self.live, reference) if wanted else []

    def prove(self, reference: BufferReference, repaired: list[str], *, loaded: bool) -> InitialLoadReport:
        """Compare all that the model holds with the source and the reference.

        Raises:
            InitialLoadError: on all ranks, if anything differs.
        """
        names = compare_names(self.ranks, self.live, self.source, self._allow_missing, self._allow_extra)
        proof = prove_values(self.ranks, self.live, self.source, names.dtypes)
        buffers = _buffer_faults(self.ranks, self.live, reference)
        unproved = [fault for fault in buffers if _is_allowed(fault, self._allow_missing)]
        faults = [*names.faults, *proof.faults, *(fault for fault in buffers if fault not in unproved)]
        if faults:
            after = "It must not train like this." if loaded else "Nothing was changed. It must not train like this."
            raise _error(self.source.path, faults, after)
        report = self._report(
            reference, names.missing, names.extra, proof, repaired, [f.name for f in unproved], loaded
        )
        if self.ranks.is_leader:
            log.info("%s", report.summary)
        return report

    def _open(self, path: Path, weights: str) -> None:
        self.source = InitialSource(path, weights)

    def _fill(self, names: list[str]) -> None:
        for name in names:
            key = self.source.key_of(name)
            assert key is not None
            self.live.fill(name, self.source.tensors, key)

    def _report(
        self,
        reference: BufferReference,
        missing: tuple[str, ...],
        extra: tuple[str, ...],
        proof: Proof,
        repaired: list[str],
        unproved: list[str],
        loaded: bool,
    ) -> InitialLoadReport:
        found = self.ranks.agree("naming buffers", lambda: list(self.live.transient()), _united)
        return InitialLoadReport(
            path=self.source.path,
            source_format=self.source.format,
            tensors=proof.tensors,
            elements=proof.elements,
            digests=proof.digests,
            cast=proof.cast,
            tied=proof.tied,
            untied=proof.untied,
            buffers=tuple(name for name in found if name not in repaired and name not in unproved),
            buffers_from=reference.origin,
            repaired=tuple(repaired),
            unproved=tuple(unproved),
            missing=missing,
            extra=extra,
            loaded=loaded,
        )


def _repair(ranks: Ranks, live: LiveWeights, reference: BufferReference) -> list[str]:
    """Mend what is wrong on this rank; what was wrong on any."""
    return ranks.agree("repairing buffers", lambda: reference.repair(live), _united)


def _buffer_faults(ranks: Ranks, live: LiveWeights, reference: BufferReference) -> list[LoadFault]:
    """What is wrong on any rank, each buffer once."""
    found = ranks.agree(
        "comparing buffers",
        lambda: [[fault.code, fault.name, fault.problem] for fault in reference.compare(live)],
        _united,
    )
    return [LoadFault(*fault) for fault in {fault[1]: fault for fault in reversed(found)}.values()][::-1]


def _is_allowed(fault: LoadFault, allow_missing: Sequence[str]) -> bool:
    return fault.code == "buffer-without-reference" and _matches(fault.name, allow_missing)


def _error(path: Path, faults: Sequence[LoadFault], state: str) -> InitialLoadError:
    effects = {fault.code: EFFECTS[fault.code] for fault in faults}
    lines = [f"{code}: {effect}." for code, effect in effects.items()]
    advice = "\n".join([state, *lines, "docs/troubleshooting.md says more under each of these names."])
    count = f"{len(faults)} fault{'s' if len(faults) > 1 else ''}"
    summary = f"the model is not the one in this checkpoint: {count}"
    return InitialLoadError(path, summary, [str(fault) for fault in faults], [fault.code for fault in faults], advice)


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _united(lists: list[list[Any]]) -> list[Any]:
    """All that any rank said, once, in order."""
    united: list[Any] = []
    for found in lists:
        united += [item for item in found if item not in united]
    return united
