"""``CheckpointHooks``: an average, complete exports and verified loads for the Trainer of transformers.

    Trainer(..., callbacks=[CheckpointHooks(ema_decay=0.999, export=every(500) | last())])

It relies on the documented events of ``TrainerCallback`` alone, so it works with subclasses of Trainer too.
"""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from shardsmith.checking.arguments import check_options, checked
from shardsmith.checking.types import Decay, LocalPath, Place, is_url
from shardsmith.errors import UsageError
from shardsmith.ground.extras import missing_package
from shardsmith.ground.remote_path import RemotePath, as_path
from shardsmith.hooks import EMA, FolderSave, HFExport, Hooks, Schedule
from shardsmith.hooks.events import Listener, metrics_to
from shardsmith.manifest.trainer_folders import last_checkpoint

try:
    from transformers import TrainerCallback
except ModuleNotFoundError as error:
    raise missing_package(error) from error

__all__ = ["CheckpointHooks", "last_checkpoint"]

log = logging.getLogger(__name__)


class CheckpointHooks(TrainerCallback):
    """Add an average and exports to a Trainer. Writes ``shardsmith/`` in each ``checkpoint-<n>``; only reads the rest.

    The average is updated after each optimizer step, whatever the gradient accumulation. A resumed run goes on with it
    exactly, and raises unless the weights that Trainer has loaded are those that were saved. FSDP 1 and 2, DDP, one
    process, adapters of peft; not DeepSpeed, and not ``hyperparameter_search``.

    Attributes:
        ema: The average, once training has begun; also after its end. None without ``ema_decay``.
        hooks: What is attached, once training has begun.
    """

    @checked
    def __init__(
        self,
        *,
        ema_decay: Decay | None = None,
        ema_options: Mapping[str, Any] | None = None,
        export: Schedule | None = None,
        export_dir: Place | None = None,
        resume_from: LocalPath | None = None,
        on_missing: Literal["raise", "start"] = "raise",
        prove: bool = True,
        prewarm: bool = False,
        stop_on: signal.Signals | Sequence[signal.Signals] = (),
        on_event: Listener | Sequence[Listener] = (),
        **export_options: Any,
    ) -> None:
        """Check the options. Nothing else happens before training begins.

        Args:
            ema_decay: Of the average; None keeps none.
            ema_options: What else ``EMA`` takes: ``warmup``, ``start_step``, ``every_n_steps``, ``offload``.
            export: At which steps to export; independent of any save. None exports nothing.
            export_dir: Where the exports go, each as ``step-<n>``. Default: ``<output_dir>-hf``, beside Trainer's
                folder. Never where Trainer rotates its checkpoints. Or a place in an object store, such as
                ``s3://bucket/run/hf``.
            resume_from: The folder that ``train(resume_from_checkpoint=...)`` is given, if it is not in
                ``output_dir``. Events do not tell.
            on_missing: What to do if it holds no average: ``"start"`` one from the weights, or ``"raise"``.
            prove: At a resume, compare every tensor that Trainer has loaded with what was saved.
            prewarm: Allocate the memory that the average is copied to after the first step, as ``ShardedSave`` does,
                instead of at the first save.
            stop_on: Signals, such as ``signal.SIGTERM``, upon which Trainer saves the step and ends; one rank that gets
                it is enough. What was due at the last step is not done then.
            on_event: As in ``Hooks``: who is told, on rank 0, of each save, export and removal.
            **export_options: Other arguments of ``HFExport``: ``dtype``, ``models``, ``keep``, ``ema_as``, ...

        Raises:
            UsageError: options that nothing takes, or that make no sense together.
        """
        check_options("CheckpointHooks", HFExport, export_options)
        check_options("CheckpointHooks", EMA, ema_options or {}, "ema_options: ")
        if export is None and (export_options or export_dir):
            raise UsageError("there are options for exports, but export= does not say when: export=every(500), say")
        if ema_decay is None and ema_options:
            raise UsageError("there are ema_options, but no ema_decay")
        self.ema: EMA | None = None
        self.hooks: Hooks | None = None
        self._ema_options = None if ema_decay is None else {"decay": ema_decay, **(ema_options or {})}
        self._export = export
        self._export_dir = export_dir
        self._resume_from = resume_from
        self._on_missing = on_missing
        self._verify = prove
        self._prewarm = prewarm
        self._listeners: list[Listener] = [on_event] if callable(on_event) else list(on_event)
        self._stop_on = stop_on
        self._export_options = export_options
        self._ended = False

    def swapped_in(self) -> AbstractContextManager[None]:
        """Exchange the live weights for the average: ``with callback.swapped_in(): trainer.evaluate()``. All ranks.

        Raises:
            UsageError: there is no average, or not yet.
        """
        if self.ema is None:
            raise UsageError("there is no average: pass ema_decay, and let training begin")
        swapped: AbstractContextManager[None] = self.ema.swapped_in()
        return swapped

    def log_to(self, trainer: Any) -> None:
        """Log the numbers of events as Trainer logs its own: in ``log_history``, and where ``report_to`` says.

            trainer = Trainer(..., callbacks=[hooks])
            hooks.log_to(trainer)

        Args:
            trainer: Whose training has not begun.
        """

        def log_numbers(numbers: dict[str, float], step: int) -> None:  # noqa: ARG001  Trainer knows its step
            is_due = trainer.control.should_log
            trainer.log(dict(numbers))
            trainer.control.should_log = is_due  # or Trainer would leave its own log of this step out

        self._listeners.append(metrics_to(log_numbers))

    def on_init_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Refuse a Trainer that is to write where it cannot. All ranks; no communication."""
        _refuse_remote(args)

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, processing_class: Any = None, **_: Any
    ) -> None:
        """Attach to the model, which is wrapped and loaded by now. All ranks; communicates."""
        _refuse_remote(args)  # of a Trainer that was there before this callback
        deepspeed = getattr(args, "deepspeed_plugin", None) or getattr(args, "deepspeed", None)
        if deepspeed or state.is_hyper_param_search:
            raise UsageError("CheckpointHooks works neither under DeepSpeed nor in a hyperparameter search")
        # What is left of a former training with the same callback.
        self.close()
        self.ema = EMA(model, **self._ema_options) if self._ema_options else None
        self._folder_save = FolderSave(model, ema=self.ema, prewarm=self._prewarm)
        attached = [self.ema, self._folder_save, self._make_export(args, model, processing_class)]
        hooks = [hook for hook in attached if hook is not None]
        self.hooks = Hooks(*hooks, stop_on=self._stop_on, on_event=self._listeners)
        self._ended = False
        if state.global_step > 0:
            self._load(args, state)
        self.hooks.resume()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        """Update the average, unless the gradient scaler skipped the step. All ranks; no communication."""
        if self.hooks and not getattr(optimizer, "step_was_skipped", False):
            self.hooks.optimizer_step(state.global_step + 1)  # Trainer counts it only afterwards

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Export if it is time; make way for Trainer if it is about to save. All ranks; communicates then."""
        if self.hooks:
            self.hooks.step_end(state.global_step)
            if self.hooks.should_stop:
                self._ended = control.should_save = control.should_training_stop = True
            self._look_ahead(args, state, control)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """As ``on_step_end``, for what is decided at the end of an epoch."""
        if self.hooks:
            self._look_ahead(args, state, control)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Add our directory to what Trainer has just written. All ranks; communicates."""
        if self.hooks:
            self._folder_save.save(state.global_step, _folder(args, state))
            if control.should_training_stop:
                self._folder_save.wait()  # in the end Trainer may delete folders, also this one

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Wait for the save in flight if Trainer may decide on the next one without an event. No communication."""
        if self.hooks and args.save_strategy == "best":
            self._folder_save.wait()

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Export the last step if that is wanted and not done, and wait for what is in flight. All ranks."""
        if self.hooks:
            step = state.global_step
            # Trainer has loaded other weights by now: what is exported last are those.
            if args.load_best_model_at_end and state.best_model_checkpoint is not None:
                step = self._follow_best(Path(state.best_model_checkpoint), state)
            if not self._ended:
                self.hooks.train_end(step)
            self.hooks.close()
            self.hooks = None

    def close(self) -> None:
        """Wait for what is in flight and raise what failed in it. To be called after an error in the training."""
        if self.hooks:
            hooks, self.hooks = self.hooks, None
            hooks.close(broken_off=True)

    def _make_export(self, args: Any, model: Any, processing_class: Any) -> HFExport | None:
        if self._export is None:
            return None
        directory = as_path(self._export_dir or f"{args.output_dir.rstrip(os.sep)}-hf")
        _refuse_rotated(directory, Path(args.output_dir))
        options = dict(self._export_options)
        if (files := options.get("files")) is None:
            # Trainer's own tokenizer or processor, unless the user names another.
            options.setdefault("processor", processing_class)
        elif files.processor is None:
            options["files"] = replace(files, processor=processing_class)
        return HFExport(directory, model=model, ema=self.ema, when=self._export, **options)

    def _load(self, args: Any, state: Any) -> None:
        given = self._resume_from or args.resume_from_checkpoint
        folder = Path(given) if given and Path(given).is_dir() else _folder(args, state)
        if self._folder_save.has(folder) or (self.ema is not None and self._on_missing == "raise"):
            self._folder_save.load(folder, prove=self._verify, on_missing=self._on_missing)
        else:
            log.warning("%s has no shardsmith/ directory: the average starts from the present weights", folder)

    def _look_ahead(self, args: Any, state: Any, control: Any) -> None:
        if control.should_save:
            self._folder_save.before_save(_folder(args, state))
        if self.hooks and control.should_training_stop and not self._ended:
            self._ended = True
            self.hooks.train_end(state.global_step)  # now, because Trainer may load the best model afterwards

    def _follow_best(self, folder: Path, state: Any) -> int:
        """Trainer has loaded the best model: load the average that goes with it. The step of that."""
        if self._folder_save.has(folder):
            self._folder_save.load(folder, prove=self._verify)
        else:
            log.warning("%s has no shardsmith/ directory: the average is still that of the last step", folder)
        return int(state.best_global_step)


def _folder(args: Any, state: Any) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"


def _refuse_remote(args: Any) -> None:
    """Raise UsageError if Trainer takes a URL for the name of a folder, as it does without a word."""
    if is_url(args.output_dir):
        raise UsageError(
            f"TrainingArguments(output_dir={args.output_dir!r}): Trainer writes to file systems alone, and has taken "
            'this for a folder on the local disk. Give it a path; CheckpointHooks(export_dir="s3://...") exports to '
            "an object store"
        )


def _refuse_rotated(directory: Path, output_dir: Path) -> None:
    """Raise UsageError if Trainer would delete the directory: what it rotates is all that begins like its folders."""
    if isinstance(directory, RemotePath):
        return
    place, home = directory.resolve(), output_dir.resolve()
    if place.is_relative_to(home) and any(part.startswith("checkpoint-") for part in place.relative_to(home).parts):
        raise UsageError(f"export_dir={str(directory)!r}: Trainer deletes old folders of such names in {output_dir}")
