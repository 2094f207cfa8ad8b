"""A verified initial load: the model that starts training is the one in the checkpoint.

Every rank fills its own boxes of the weights from the files; nothing is gathered and no rank reads what it does not
hold. Then each digests what is in its model. The shares of all ranks are added up and must be the digests of the
source: those that its metadata.json recorded, or else those of its files, read once more by all ranks together. Buffers
that no checkpoint holds must equal those of a model that is made anew.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from shardsmith.checking.arguments import checked
from shardsmith.checking.types import AnyPath, ModelConfig, Models
from shardsmith.errors import InitialLoadError
from shardsmith.ground.ranks import Ranks
from shardsmith.ground.remote_path import as_path
from shardsmith.load.buffer_reference import BufferReference, Fresh, find_reference
from shardsmith.load.comparison import Names, compare_names, specs_on_all, verify_values
from shardsmith.load.faults import EFFECTS, LoadFault
from shardsmith.load.live_config import LiveConfig, read_live_config
from shardsmith.load.live_weights import LiveWeights
from shardsmith.load.report import InitialLoadReport
from shardsmith.load.source import InitialSource, read_record
from shardsmith.name_maps.maps import NameMap
from shardsmith.tensors.checkpoint_keys import MAIN
from shardsmith.tensors.fqn import matches

log = logging.getLogger(__name__)

_UNCHANGED = "Nothing was loaded; the model is unchanged."
_ALLOWED_BY = {"missing-in-source": "allow_missing", "missing-in-model": "allow_extra", "shape-differs": "allow_shape"}
_FEW = 8
"""Differences that may be meant; with more it is rather another model."""


@checked
def load_initial(
    path: AnyPath,
    *,
    model: Models,
    config: ModelConfig | None = None,
    fresh: Fresh | None = None,
    repair_buffers: bool = False,
    poison: bool = True,
    allow_missing: Sequence[str] = (),
    allow_extra: Sequence[str] = (),
    allow_shape: Sequence[str] = (),
    weights: str = MAIN,
    ranks: Ranks | None = None,
) -> InitialLoadReport:
    """Fill a model from a checkpoint of any format, and verify, tensor by tensor, that it equals the checkpoint.

    All ranks call it, after sharding. Communicates through the store, and over the process group under FSDP1.

    Args:
        path: A checkpoint of ours, a plain DCP directory (flat or nested), a Hugging Face directory, and so on;
            ours and those of safetensors files also in an object store, of which each rank reads the ranges it needs.
        model: Sharded or not, on its device (after ``to_empty``, if it was made on meta). Or all parts of it that this
            rank has, whose tensors have different names.
        config: What the model is to compute with, if not what ``path`` says: a config of transformers, its dict, or a
            directory with a config.json. Models of other kinds have none.
        fresh: For models that are not from transformers: a function that makes one, on the CPU, of which the buffers
            are looked at, or the buffers themselves by name.
        repair_buffers: Overwrite non-persistent buffers that are wrong, and say so in the report.
        poison: Overwrite all weights first, so that what the load leaves out is seen.
        allow_missing: Patterns of tensors that the checkpoint need not have. They keep their values.
            Also of non-persistent buffers for which there is no reference.
        allow_extra: Patterns of tensors of the checkpoint that the model need not have.
        allow_shape: Patterns of tensors that may have another shape in the checkpoint. They keep their values.
        weights: ``"main"`` or ``"ema"``.
        ranks: The ranks, if the caller has some already.

    Raises:
        InitialLoadError: on all ranks, naming every tensor and buffer at fault. If names or shapes do not fit, nothing
            was loaded and the model is unchanged.
        CheckpointError, RankFailedError: the checkpoint cannot be read. The model's weights cannot be used then.
    """
    ranks = ranks or Ranks()
    allowed = (tuple(allow_missing), tuple(allow_extra), tuple(allow_shape))
    with _opened(as_path(path), model, weights, ranks, config, fresh) as load:
        names = compare_names(ranks, load.live, load.source, *allowed)
        if names.faults:
            raise _error(load.source.path, names.faults, f"{_UNCHANGED}{_allowing(names.faults)}")
        # Only now is the model changed: names and shapes have been compared on all ranks.
        load.fill([name for name in names.dtypes if name in load.live.specs], poison)
        return load.verify(names, repair_buffers, allowed[0], loaded=True)


@checked
def verify_loaded(
    model: Models,
    path: AnyPath,
    *,
    config: ModelConfig | None = None,
    fresh: Fresh | None = None,
    repair_buffers: bool = False,
    allow_missing: Sequence[str] = (),
    allow_extra: Sequence[str] = (),
    weights: str = MAIN,
    names: NameMap | None = None,
    ranks: Ranks | None = None,
) -> InitialLoadReport:
    """Verify a model that other code loaded against its checkpoint. Changes nothing but buffers.

    All ranks call it before the first step. Arguments, communication and errors are those of ``load_initial``. Call
    ``poison_weights`` before the load, so that what it leaves out cannot be right by chance and is called by its name.

    Args:
        model: The live model, or its pipeline stages on this rank.
        path: The checkpoint that it was loaded from.
        config: As in ``load_initial``.
        fresh: As in ``load_initial``.
        repair_buffers: As in ``load_initial``.
        allow_missing: Patterns of tensors of the model that the checkpoint need not have.
        allow_extra: Patterns of tensors of the checkpoint that the model need not have.
        weights: ``"main"``, ``"ema"`` or the name of an average.
        names: From the model to the checkpoint, where it has files of another model's names.
        ranks: The ranks that call; None for all, with the usual timeout.
    """
    ranks = ranks or Ranks()
    with _opened(as_path(path), model, weights, ranks, config, fresh, names, allow_missing) as load:
        found = compare_names(ranks, load.live, load.source, tuple(allow_missing), tuple(allow_extra))
        return load.verify(found, repair_buffers, tuple(allow_missing), loaded=False)


def verify_names(
    model: nn.Module | Sequence[nn.Module],
    path: str | Path,
    *,
    fresh: Fresh | None = None,
    names: NameMap | None = None,
    allow_missing: Sequence[str] = (),
    allow_extra: Sequence[str] = (),
    ranks: Ranks | None = None,
) -> Names:
    """Verify, before somebody else loads it, that a checkpoint has the tensors of a model and no others.

    All ranks call it. Arguments, communication and errors are those of ``verify_loaded``; nothing is changed.
    """
    ranks = ranks or Ranks()
    with _opened(as_path(path), model, MAIN, ranks, None, fresh, names, allow_missing) as load:
        found = compare_names(ranks, load.live, load.source, tuple(allow_missing), tuple(allow_extra))
        if found.faults:
            raise _error(load.source.path, found.faults, _UNCHANGED)
        return found


def verify_buffers(
    model: nn.Module | Sequence[nn.Module],
    path: str | Path,
    *,
    config: Any = None,
    fresh: Fresh | None = None,
    repair_buffers: bool = False,
    allow_missing: Sequence[str] = (),
    ranks: Ranks | None = None,
) -> list[str]:
    """Verify that non-persistent buffers are right in a model whose weights are from elsewhere; those repaired.

    For a run that resumes: no checkpoint holds these buffers, so whatever made the model must have made them. All ranks
    call it; arguments, communication and errors are those of ``load_initial``. The checkpoint may be gone by now: then
    the live model's own config is what counts.
    """
    ranks = ranks or Ranks()
    live = LiveWeights(model)

    def look() -> list[list[Any]]:
        reference = find_reference(live, as_path(path), read_record(as_path(path)), config, fresh)
        repaired = reference.repair(live) if repair_buffers else []
        return [repaired, [[fault.code, fault.name, fault.problem] for fault in reference.compare(live)]]

    repaired, found = ranks.agree(
        "comparing buffers", look, lambda parts: [_united([part[i] for part in parts]) for i in (0, 1)]
    )
    faults = [fault for fault in (LoadFault(*item) for item in found) if not _is_allowed(fault, allow_missing)]
    if faults:
        raise _error(as_path(path), faults, "The weights were not looked at. It must not train like this.")
    return list(repaired)


@checked
def poison_weights(model: Models, *, spare: Sequence[str] = ()) -> None:
    """Overwrite the weights of a model before other code loads them: floating point with NaN, integers with 0x5A.

    All ranks call it; communicates under FSDP1 only.

    Args:
        model: The live model, or its pipeline stages on this rank.
        spare: Patterns of names to leave alone.
    """
    live = LiveWeights(model)
    live.poison(frozenset(name for name in live.specs if not matches(name, spare)))


@contextlib.contextmanager
def _opened(
    path: Path,
    model: nn.Module | Sequence[nn.Module],
    weights: str,
    ranks: Ranks,
    config: Any,
    fresh: Fresh | None,
    names: NameMap | None = None,
    allow_missing: Sequence[str] = (),
) -> Iterator[_Load]:
    """Open the source and make the model anew, on every rank; the source is closed in the end."""
    live = LiveWeights(model)
    # Outside of ``open_source``, in which ranks do not communicate.
    specs = specs_on_all(ranks, live) if names is not None else {}
    with contextlib.ExitStack() as stack:
        made: list[_Load] = []

        def open_source() -> None:
            source = InitialSource(path, weights, as_files=names is not None)
            stack.callback(source.close)
            reference = find_reference(live, path, source.record, config, fresh)
            ties = {**reference.tied, **live.tied}
            if names is None:
                source.match(live, ties)
            else:
                source.translate(names, specs, ties, allow_missing)
            settings = read_live_config(live, path, source.record, config)
            made.append(_Load(ranks, live, source, reference, settings))

        # Each rank opens for itself; what fails on one is an error on all before anything else is done together.
        ranks.gather(f"opening {path}", open_source)
        yield made[0]


class _Load:
    """One load, or the verification of one, on this rank."""

    def __init__(
        self,
        ranks: Ranks,
        live: LiveWeights,
        source: InitialSource,
        reference: BufferReference,
        settings: LiveConfig,
    ) -> None:
        self.live = live
        self.source = source
        self._ranks = ranks
        self._reference = reference
        self._settings = settings

    def fill(self, names: list[str], poison: bool) -> None:
        """Load this rank's boxes of these. Communicates."""
        if poison:
            self.live.poison(frozenset(names))
        # An error of one rank is raised on all, before ``store`` communicates: no rank waits for one that has failed.
        self._ranks.gather(f"loading {self.source.path}", lambda: self._fill(names))
        self.live.store()
        # Taken anew: under FSDP1 the tensors filled were copies, and what is verified must be what trains.
        self.live = LiveWeights(self.live.parts)

    def verify(
        self, names: Names, repair_buffers: bool, allow_missing: tuple[str, ...], *, loaded: bool
    ) -> InitialLoadReport:
        """Compare all that the model holds with the source and the reference. Communicates.

        Raises:
            InitialLoadError: on all ranks, if anything differs.
        """
        repaired = self._reference.repair(self.live) if repair_buffers else []
        found = verify_values(self._ranks, self.live, self.source, names.dtypes, self._reference, repaired)
        allowed_faults = [fault.name for fault in found.buffer_faults if _is_allowed(fault, allow_missing)]
        buffers = [fault for fault in found.buffer_faults if fault.name not in allowed_faults]
        faults = [*self._settings.faults(names.resized), *names.faults, *found.faults, *buffers]
        if faults:
            raise _error(self.source.path, faults, f"{_changes(found.repaired, loaded)}It must not train like this.")
        report = InitialLoadReport(
            path=self.source.path,
            source_format=self.source.format,
            tensors=found.tensors,
            elements=found.elements,
            digests=found.digests,
            cast=found.cast,
            tied=found.tied,
            untied=found.untied,
            buffers=tuple(n for n in found.buffers if n not in found.repaired and n not in allowed_faults),
            buffers_from=self._reference.origin,
            repaired=found.repaired,
            unproved=tuple(allowed_faults),
            missing=names.missing,
            extra=names.extra,
            reshaped=names.reshaped,
            loaded=loaded,
        )
        if self._ranks.is_leader:
            log.info("%s", report.summary)
        return report

    def _fill(self, names: list[str]) -> None:
        for name in names:
            key = self.source.key_of(name)
            assert key is not None
            self.live.fill(name, self.source.tensors, key)


def _is_allowed(fault: LoadFault, allow_missing: Sequence[str]) -> bool:
    return fault.code == "buffer-without-reference" and matches(fault.name, allow_missing)


def _changes(repaired: Sequence[str], loaded: bool) -> str:
    """What a verification that fails has changed in the model; of a load, of which all weights are new, no word."""
    if loaded:
        return ""
    if not repaired:
        return "Nothing was changed. "
    return f"Only {len(repaired)} buffers were changed ({repaired[0]}, ...); they equal the reference now. "


def _allowing(faults: Sequence[LoadFault]) -> str:
    """What to give where a difference of names and shapes is meant; empty if there is more, or much, at fault."""
    names: dict[str, list[str]] = {}
    for fault in faults:
        names.setdefault(_ALLOWED_BY.get(fault.code, ""), []).append(fault.name)
    if "" in names or len(faults) > _FEW:
        return ""
    given = ", ".join(f"{option}={given}" for option, given in names.items())
    kept = "" if names.keys() == {"allow_extra"} else "; the model keeps its own values there"
    return f" If that is meant, as with a new head: {given}{kept}."


def _error(path: Path, faults: Sequence[LoadFault], state: str) -> InitialLoadError:
    effects = {fault.code: EFFECTS[fault.code] for fault in faults}
    lines = [f"{code}: {effect}." for code, effect in effects.items()]
    if any(code.startswith("buffer-") and code != "buffer-without-reference" for code in effects):
        lines.append("repair_buffers=True overwrites the buffers with the reference, and says so.")
    if any(code in effects for code in ("config-differs", "rope-differs", "norm-eps-differs")):
        lines.append("config=MODEL.config lets the model's own settings count, if they are meant.")
    advice = "\n".join([state, *lines, "docs/troubleshooting.md says more under each of these names."])
    count = f"{len(faults)} fault{'s' if len(faults) > 1 else ''}"
    summary = f"the model is not the one in this checkpoint: {count}"
    return InitialLoadError(path, summary, [str(fault) for fault in faults], advice, [fault.code for fault in faults])


def _united(lists: list[list[Any]]) -> list[Any]:
    """All that any rank said, once, in order."""
    united: list[Any] = []
    for found in lists:
        united += [item for item in found if item not in united]
    return united
