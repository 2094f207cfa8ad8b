"""Load checkpoints of other projects, each weight verified, and the state beside them where that is possible."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from torch.distributed.checkpoint.stateful import Stateful
from torch.optim import Optimizer

from shardsmith.errors import CheckpointNotFoundError, UnsupportedFormatError, UsageError
from shardsmith.formats import by_path as formats
from shardsmith.ground.ranks import Ranks
from shardsmith.load.buffer_reference import Fresh
from shardsmith.load.live_weights import LiveWeights
from shardsmith.load.load import load_initial
from shardsmith.load.report import InitialLoadReport
from shardsmith.run_state.average import Average, ModuleAverage
from shardsmith.run_state.legacy import HAS_STATE, LegacyState
from shardsmith.run_state.named_optimizer import NamedOptimizer
from shardsmith.run_state.resume import Wanted
from shardsmith.tensors.checkpoint_keys import EMA, MAIN
from shardsmith.tensors.tensors import TensorSpec

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Loaded:
    """What a load has done."""

    path: Path
    format: str
    step: int | None
    """Optimizer steps done; None where the checkpoint does not say. Of BAGEL and its fork the number of the step, which
    they count from 0: n + 1 were done, and both go on with n + 1."""
    parts: tuple[str, ...]
    """Of "model", "ema", "optimizer", "scheduler", "data_status" and "rng" those that were loaded."""
    proved: int
    """Tensors that have the digests of the checkpoint, as they are in this run now."""
    data_status: Any = None
    """What this rank passed as ``data_status`` to the save; None if it was not there then."""
    reports: tuple[InitialLoadReport, ...] = ()
    """What was verified of weights that another project saved."""


class ForeignLoad:
    """What a ShardedCheckpointManager does with a checkpoint that is not ours."""

    def __init__(
        self,
        model: nn.Module,
        average: Average | None,
        optimizers: Sequence[Optimizer],
        scheduler: Stateful | None,
        ranks: Ranks,
        *,
        fresh: Fresh | None,
        allow_missing: Sequence[str],
        allow_extra: Sequence[str],
        allow_shape: Sequence[str],
        repair_buffers: bool,
    ) -> None:
        self._model = model
        self._average = average
        self._optimizers = optimizers
        self._scheduler = scheduler
        self._ranks = ranks
        self._fresh = fresh
        self._allow_missing = allow_missing
        self._allow_extra = allow_extra
        self._allow_shape = allow_shape
        self._repair_buffers = repair_buffers

    def load_whole(
        self, path: Path, format_name: str, *, with_average: bool, average_from_main: bool, main_from_average: bool
    ) -> Loaded:
        """Main weights, and an average, from files of whole weights. All ranks."""
        present = formats.model_names(path)
        main = self._choose(path, MAIN, present, main_from_average, "load_main_from_ema")
        average = None
        if with_average and average_from_main:
            average = main
            log.warning("%s: the average is taken from the %s weights, as load_ema_from_main=True says", path, main)
        elif with_average:
            average = self._choose(path, EMA, present, False, "load_ema_from_main")
        reports = self._load_weights(path, main, average)
        return Loaded(
            path=path,
            format=format_name,
            step=None,
            parts=("model", "ema") if average else ("model",),
            proved=sum(report.tensors for report in reports),
            reports=reports,
        )

    def load_sharded(self, path: Path, format_name: str, wanted: Wanted) -> Loaded:
        """Everything is looked at before anything is loaded, so that a refusal leaves the run as it was. All ranks."""
        present = formats.model_names(path)
        if wanted.ema and EMA not in present:
            raise CheckpointNotFoundError(path, "has no average; pass load_ema=False")
        state: dict[str, Any] = {}
        specs = LiveWeights(self._model).specs if wanted.optimizer else {}
        self._ranks.gather(
            f"reading {path.name}", lambda: state.update(self._legacy_state(path, format_name, wanted, specs))
        )
        reports: tuple[InitialLoadReport, ...] = ()
        if wanted.model or wanted.ema:
            main, average = (MAIN if wanted.model else None), (EMA if wanted.ema else None)
            reports = self._load_weights(path, main, average)
        # Only now, when the weights are loaded and verified.
        for optimizer in self._optimizers if wanted.optimizer else ():
            if isinstance(saved := state["optimizer"], NamedOptimizer):
                saved.restore(self._model, optimizer)
                saved.close()
            else:
                optimizer.load_state_dict(saved)
        if self._scheduler is not None and wanted.scheduler:
            self._scheduler.load_state_dict(state["scheduler"])
        return Loaded(
            path=path,
            format=format_name,
            step=state.get("step"),
            # Generators are never taken from another project; a data status only where there is one.
            parts=tuple(name for name in wanted.names if name != "rng" and (name != "data_status" or name in state)),
            proved=sum(report.tensors for report in reports),
            data_status=state.get("data_status"),
            reports=reports,
        )

    def _legacy_state(
        self, path: Path, format_name: str, wanted: Wanted, specs: Mapping[str, TensorSpec]
    ) -> dict[str, Any]:
        if format_name not in HAS_STATE:
            if wanted.optimizer or wanted.scheduler:
                raise UnsupportedFormatError(
                    path,
                    f"is a checkpoint of another project ({format_name}), of which only weights are loaded; "
                    "pass load_optimizer=False and load_scheduler=False",
                )
            return {}
        legacy = LegacyState(path, format_name, self._ranks.rank, self._ranks.size)
        found: dict[str, Any] = {"step": legacy.step}
        if wanted.optimizer:
            if len(self._optimizers) != 1:
                raise UsageError("another project's checkpoint holds one optimizer; this manager has several")
            found["optimizer"] = legacy.optimizer(self._optimizers[0], specs)
        if wanted.scheduler:
            found["scheduler"] = legacy.scheduler()
        if wanted.data_status and legacy.has_data_status:
            found["data_status"] = legacy.data_status()
        return found

    def _load_weights(self, path: Path, main: str | None, average: str | None) -> tuple[InitialLoadReport, ...]:
        """Fill and verify the model, and the average, from models of a checkpoint; None leaves one alone."""
        reports = []

        def load(module: nn.Module, weights: str) -> None:
            reports.append(
                load_initial(
                    path,
                    model=module,
                    weights=weights,
                    fresh=self._fresh,
                    allow_missing=self._allow_missing,
                    allow_extra=self._allow_extra,
                    allow_shape=self._allow_shape,
                    repair_buffers=self._repair_buffers,
                    ranks=self._ranks,
                )
            )

        if average is not None:
            # It has weights of its own, so they can be loaded apart from the model.
            if isinstance(self._average, ModuleAverage):
                load(self._average.module, average)
            elif self._average is not None and main is not None:
                load(self._model, average)  # from where the average takes its values; main comes next
                self._average.reset()
            else:
                raise UsageError("this average is held beside the model and is loaded with it: pass load_model=True")
        if main is not None:
            load(self._model, main)
        return tuple(reports)

    def _choose(self, path: Path, model: str, present: Sequence[str], may_replace: bool, option: str) -> str:
        """Which model of the files is to be loaded as this one."""
        if model in present:
            return model
        if not may_replace or not present:
            raise CheckpointNotFoundError(path, f"has no {model!r} weights; it holds {present}. Pass {option}=True")
        log.warning("%s has no %s weights: they are taken from %s, as %s=True says", path, model, present[0], option)
        return present[0]
