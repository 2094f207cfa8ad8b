"""TorchTitan's checkpoint manager with hooks, of either generation. Imports TorchTitan.

What it does itself is left to it; this says when what happens. In both generations the trainer calls ``load`` once,
``save`` after each step, and ``close``; each checkpoint is written in ``dcp_save`` and read in ``dcp_load``.
"""

from __future__ import annotations

import contextlib
import logging
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from shardsmith.errors import UsageError
from shardsmith.ground.layout import parse_step
from shardsmith.ground.ranks import Ranks
from shardsmith.manifest.checkpoints import set_aside_unreadable
from shardsmith.run_state.rehearsal import refuse_without_copies
from shardsmith.run_state.train_state import mesh_of

from . import one_write
from .attached import Attached
from .average import MODEL as AVERAGES
from .average import STATE as COUNTERS
from .load import Form, LoadWatch, is_remote, without_absent
from .options import CheckpointHooks
from .steps import DamagedStepError, find_newest_whole, live_state
from .upstream import CheckpointManager, refuse_unknown

log = logging.getLogger(__name__)

_AVERAGES_OF_TORCHTITAN = {"ema", "ema_optimizer"}
"""Keys under which newer versions have an average of their own."""


class HookedManager(CheckpointManager):
    """TorchTitan's manager; until ``attach`` is called, no more than that."""

    _attached: Attached | None = None
    _watch: LoadWatch | None = None
    _load_ranks: Ranks | None = None
    _passed: frozenset[int] = frozenset()  # steps that turned out to be damaged
    _unrecorded: int | None = None  # the step that was found and has no manifest
    _stopping = False
    _other_decay = False  # the average may go on with a decay that is not the saved one

    def attach(self, options: CheckpointHooks, config: Any, parts: dict[str, Any]) -> None:
        """Attach the hooks, when the manager is made. All ranks; communicates.

        Args:
            options: The options that the user set.
            config: TorchTitan's, of its checkpoints.
            parts: What else the manager was made from.
        """
        refuse_unknown()
        self._other_decay = options.ema_allow_other_decay
        dump_folder = Path(parts.get("base_folder") or ".")
        folder = dump_folder / config.folder
        enabled = getattr(
            config, "enable", True
        )  # newer versions have no such setting: a run without one has no manager
        if enabled and not is_remote(parts.get("base_folder") or "", config.folder):
            self._load_ranks = Ranks(options.timeout_secs)
        if enabled and options.prove_load:
            self._watch = LoadWatch(config, parts["model_parts"], parts["sd_adapter"], folder, options)
        if options.is_idle:
            return
        if is_remote(parts.get("base_folder") or "", config.folder):
            raise UsageError(
                f"checkpoint_hooks needs TorchTitan's own folders on a file system, and {dump_folder} {config.folder} "
                "is remote: give a local dump_folder. Exports alone can go to an object store: export_folder"
            )
        refuse_without_copies(
            "checkpoint_hooks", prewarm=options.prewarm, has_copies=config.async_mode.lower() != "disabled"
        )
        self._attached = Attached(
            options,
            model_parts=parts["model_parts"],
            optimizers=parts["optimizers"],
            states=parts["states"],
            sd_adapter=parts["sd_adapter"],
            dump_folder=dump_folder,
            folder=folder,
            keep_latest_k=config.keep_latest_k,
            saves=enabled and not config.load_only,
            last_dtype=config.export_dtype if config.last_save_model_only and not config.last_save_in_hf else None,
        )
        if options.ema_decay is not None and (
            other := sorted(_AVERAGES_OF_TORCHTITAN & getattr(self, "states", {}).keys())
        ):
            log.warning("TorchTitan keeps an average itself (%s): this run has two, and saves both", ", ".join(other))
        if enabled:
            self.states.update(self._attached.states)

    def load(self, step: int = -1) -> bool:
        """As TorchTitan's; a step that is damaged is passed over. Then training begins for the hooks."""
        loaded = self._load_whole(step)
        if self._watch is not None and not loaded:
            self._watch.nothing_loaded()
        # What cannot be read at the name of a later step would stop the save of that step.
        if self._load_ranks is not None and not self.load_only:
            folder, begun = Path(self.folder), self.states["train_state"].step
            self._load_ranks.lead("making way for saves", lambda: set_aside_unreadable(folder, begun))
        if self._attached is not None:
            self._attached.train_begin()
            if loaded and self._unrecorded is not None:
                self._attached.record_found(self._unrecorded, Path(self._create_checkpoint_id(self._unrecorded)))
        return loaded

    def _load_whole(self, step: int) -> bool:
        # Each turn `_find_load_step` leaves out one step more.
        while True:
            try:
                return bool(super().load(step))
            except DamagedStepError as error:
                damaged = parse_step(error.path.name)
                # For a step that was asked for by its number there is no other one to take.
                if step != -1 or damaged is None:
                    raise
                log.warning("%s is damaged and passed over: %s", error.path, " ".join(str(error).split())[:500])
                self._passed |= {damaged}

    def save(self, curr_step: int, last_step: bool = False) -> Any:
        """As TorchTitan's; then the step is over for the hooks. A run that is asked to end saves it and ends."""
        saved = super().save(curr_step, last_step)
        if self._attached is None or curr_step < 1:  # step 0 is a checkpoint to start from, without a training
            return saved
        if (engine := self._attached.engine) is not None:
            path, states = Path(self._create_checkpoint_id(curr_step)), self._attached.states
            engine.prewarm(curr_step, path, lambda: {**self._flattened_model_states_sd(), **states})
        if self._attached.step_end(curr_step, is_last=last_step):
            self._stop(curr_step, is_saved=self._should_save(curr_step, last_step))
        return saved

    def _stop(self, step: int, *, is_saved: bool) -> None:
        """Save the step that all ranks are at, by TorchTitan's own save, and let its trainer end the training."""
        assert self._attached is not None
        log.warning("the run was asked to end: it ends after step %d", step)
        if not is_saved and not self.load_only:
            # From here on `_should_save` says yes.
            self._stopping = True
            super().save(step)
            wait = getattr(self, "maybe_wait_for_saving", None) or self._async_wait  # 0.3, 0.2: closing waits for none
            wait()
        self._attached.end_training()

    def _should_save(self, curr_step: int, last_step: bool = False) -> bool:
        """As TorchTitan's, and at the end of a run that was asked to end."""
        return self._stopping or bool(super()._should_save(curr_step, last_step))

    def close(self) -> None:
        """As TorchTitan's; then wait for the hooks' background work and raise what failed in it.

        Before that, what is due at the last step is done if the data ended the run.
        """
        attached, self._attached = self._attached, None
        with contextlib.ExitStack() as closing:  # all of it, whatever a part of it raises
            if attached is not None:
                closing.callback(attached.close)
            closing.callback(super().close)
            if attached is not None:
                attached.finish()

    def dcp_save(self, state_dict: dict[str, Any], checkpoint_id: str, *args: Any, **kwargs: Any) -> Any:
        """As TorchTitan's, or with our writer. The average goes with the weights, also where they are saved alone."""
        attached, path = self._attached, Path(checkpoint_id)
        step = parse_step(path.name)
        # Only steps in this run's own folder are recorded; exports and other folders are left to TorchTitan.
        if attached is None or step is None or path.parent != Path(self.folder) or kwargs.get("to_hf"):
            return super().dcp_save(state_dict, checkpoint_id, *args, **kwargs)
        # Before anything is written: an old manifest of this step goes.
        if attached.recorder is not None:
            attached.recorder.begin(path)
        state, engine = {**state_dict, **attached.states}, attached.engine
        # Some versions give the mode by name, others by position.
        if engine is not None:
            mode = (kwargs["async_mode"] if "async_mode" in kwargs else args[0]).value
            # After the save of step 0, and after that of a run that was asked to end, no export comes to read them.
            is_shared = step > 0 and not self._stopping
            result = engine.save(step, path, state, mode, attached.step_copies if is_shared else None)
        else:
            result = super().dcp_save(state, checkpoint_id, *args, **kwargs)
        if attached.recorder is not None:
            has_manifest = engine is not None
            attached.recorder.saved(step, path, _end_of(result), mesh_of(state_dict), has_manifest=has_manifest)
        return result

    def dcp_load(self, state_dict: dict[str, Any], checkpoint_id: str, *args: Any, **kwargs: Any) -> None:
        """As TorchTitan's, but looked at before and after."""
        path, form = Path(checkpoint_id), _form_of(kwargs)
        if self._attached is not None and AVERAGES in state_dict:
            state_dict = without_absent(state_dict, path, (AVERAGES, COUNTERS))
        watch = self._watch if _has_weights(state_dict) else None
        if watch is not None and is_remote(checkpoint_id):
            log.warning("%s is remote: loads from there are not verified", checkpoint_id)
            watch = None
        if watch is None:
            self._read(state_dict, path, form, *args, **kwargs)
            return
        state_dict = watch.before(state_dict, path, form)
        keys = [key for key in state_dict if key != COUNTERS or not self._other_decay]  # which are ours by now
        try:
            self._read(state_dict, path, form, *args, **kwargs)
        # torch's CheckpointException is no Exception.
        except (Exception, CheckpointException) as error:
            # Damage explains the error, and then an earlier step is taken; all else is for the user to see.
            if watch.resumes(path) and (damage := watch.find_damage(path)):
                raise DamagedStepError(path, damage) from error
            raise
        watch.after(path, form, lambda: live_state(self, keys))

    def _read(self, state_dict: dict[str, Any], checkpoint: Path, form: Form, *args: Any, **kwargs: Any) -> None:
        """As TorchTitan's ``dcp_load``; from weights of Hugging Face files beside the rest, too."""
        if form is Form.DCP and one_write.is_one_write(checkpoint):
            one_write.load(state_dict, checkpoint, self.states)
        else:
            super().dcp_load(state_dict, str(checkpoint), *args, **kwargs)

    def _find_load_step(self, folder: str = "", max_step: int | None = None) -> int:
        """As TorchTitan's, but of the steps that are whole. All ranks; communicates."""
        limit = {} if max_step is None else {"max_step": max_step}  # which newer versions have
        if self._load_ranks is None or folder not in ("", self.folder):
            return int(super()._find_load_step(folder, **limit))
        found = find_newest_whole(Path(self.folder), self._load_ranks, set(self._passed), max_step)
        if found.step is None:  # there may be one that TorchTitan has exported, which it takes for a step
            return int(super()._find_load_step(folder, **limit))
        self._unrecorded = None if found.recorded else found.step
        return found.step

    def _purge_stale_checkpoints(self, *args: Any, **kwargs: Any) -> None:
        """TorchTitan's counts what is incomplete, and foreign folders; with a recorder, that one removes instead."""
        if self._attached is None or self._attached.recorder is None:
            super()._purge_stale_checkpoints(*args, **kwargs)


def _form_of(options: dict[str, Any]) -> Form:
    """What TorchTitan is told to load, in our words."""
    if not options.get("from_hf"):
        return Form.DCP
    return Form.QUANTIZED if options.get("from_quantized") else Form.HF


def _has_weights(state_dict: dict[str, Any]) -> bool:
    """Whether the model is in it; torchft loads its data loaders alone."""
    return any(isinstance(value, Tensor) for value in state_dict.values())


def _end_of(result: Any) -> Future[Any] | None:
    """The end of a save, from what torch's functions return; None if it has ended already."""
    result = getattr(result, "upload_completion", result)
    return result if isinstance(result, Future) else None
