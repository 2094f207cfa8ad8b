"""``InitialLoad``: the weights that a run starts from, loaded and verified before its first step."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from shardsmith.checking.arguments import checked
from shardsmith.checking.types import AnyPath, ModelConfig, Models, Seconds
from shardsmith.ground.logs import Stopwatch
from shardsmith.ground.ranks import Ranks
from shardsmith.ground.remote_path import as_path
from shardsmith.load.buffer_reference import Fresh
from shardsmith.load.load import load_initial, verify_buffers
from shardsmith.load.report import InitialLoadReport
from shardsmith.tensors.checkpoint_keys import MAIN

from .events import event_of
from .hook import Hook

log = logging.getLogger(__name__)


class InitialLoad(Hook):
    """Fill the model from a checkpoint when training begins at step 0, and verify that it equals the checkpoint.

    Complete is what has every tensor that torch's ``get_model_state_dict`` gives for the live model.

        InitialLoad("checkpoints/olmo2", model=model, repair_buffers=True)

    A run that resumes has newer weights, which are left alone: only the non-persistent buffers are verified then, as no
    checkpoint holds them. Its place among the hooks does not matter. Make it on all ranks at the same point.

    Attributes:
        report: What was verified; None before, and in a run that resumed.
    """

    loads_weights = True

    @checked
    def __init__(
        self,
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
        timeout_secs: Seconds = 1800.0,
    ) -> None:
        """Prepare the load; nothing is read yet. The arguments are those of ``shardsmith.load_initial``."""
        self.path = as_path(path)
        self.report: InitialLoadReport | None = None
        self._model = model
        self._buffers: dict[str, Any] = {
            "config": config,
            "fresh": fresh,
            "repair_buffers": repair_buffers,
            "allow_missing": tuple(allow_missing),
        }
        self._load: dict[str, Any] = {
            "poison": poison,
            "allow_extra": tuple(allow_extra),
            "allow_shape": tuple(allow_shape),
            "weights": weights,
        }
        self._ranks = Ranks(timeout_secs)

    def on_train_begin(self, step: int) -> None:
        """Load and verify at step 0; later, verify the buffers. All ranks; communicates.

        Raises:
            InitialLoadError: on all ranks, naming every tensor and buffer at fault.
            CheckpointError, RankFailedError: the checkpoint cannot be read.
        """
        watch = Stopwatch()
        try:
            repaired = self._verify(step)
        except BaseException as error:
            self.emit(event_of("verify", step, self.path, watch, self._ranks.size, error))
            raise
        self.emit(event_of("verify", step, self.path, watch, self._ranks.size))
        if step > 0 and self._ranks.is_leader:
            note = f"; repaired {', '.join(repaired)}" if repaired else ""
            log.info("resumed at step %d: %s is not loaded, non-persistent buffers are right%s", step, self.path, note)

    def _verify(self, step: int) -> Sequence[str]:
        """The buffers that were repaired in a run that resumed."""
        if step == 0:
            self.report = load_initial(self.path, model=self._model, ranks=self._ranks, **self._buffers, **self._load)
            return ()
        return verify_buffers(self._model, self.path, ranks=self._ranks, **self._buffers)
