"""``CheckpointHooks``: an average, sharded saves, exports and a resume for the Trainer of Lightning.

    Trainer(..., callbacks=[CheckpointHooks("run", save=every(500) | last(), ema_decay=0.999)])

It relies on the documented events of ``Callback``, and on the state of the fit loop, as Lightning's own checkpoints do.
"""

from __future__ import annotations

import json
import logging
import signal
from collections.abc import Mapping, Sequence
from typing import Any

from shardsmith.checking.arguments import check_options, checked
from shardsmith.checking.types import Decay, Place
from shardsmith.errors import UsageError
from shardsmith.ground.extras import missing_package
from shardsmith.ground.remote_path import as_path
from shardsmith.hooks import EMA, HFExport, Hooks, Retention, Schedule, ShardedSave
from shardsmith.hooks.events import Listener

try:
    from lightning.pytorch.callbacks import Callback
except ModuleNotFoundError as error:
    raise missing_package(error) from error

__all__ = ["CheckpointHooks"]

log = logging.getLogger(__name__)


class CheckpointHooks(Callback):  # type: ignore[misc, unused-ignore]
    """Add an average, sharded checkpoints, exports and a resume to a Trainer of Lightning.

    A step is an optimizer step: ``trainer.global_step``. The newest sound checkpoint in the directory is loaded when
    ``fit`` begins: model, average, optimizers, schedulers, random numbers, and where the fit loop was. Not saved: what
    other callbacks remember, and the position within a dataloader, which Lightning cannot tell of most. One process,
    DDP, FSDP, ``ModelParallelStrategy``; not DeepSpeed.

    Attributes:
        ema: The average, once ``fit`` has begun; also after its end. None without ``ema_decay``.
        hooks: What is attached, while ``fit`` runs.
    """

    @checked
    def __init__(
        self,
        directory: Place,
        *,
        save: Schedule | None = None,
        keep: Retention | None = None,
        save_options: Mapping[str, Any] | None = None,
        ema_decay: Decay | None = None,
        ema_options: Mapping[str, Any] | None = None,
        export: Schedule | None = None,
        resume: bool = True,
        stop_on: signal.Signals | Sequence[signal.Signals] = (),
        on_event: Listener | Sequence[Listener] = (),
        **export_options: Any,
    ) -> None:
        """Check the options. Nothing else happens before ``fit``.

        Args:
            directory: Folder of the run: checkpoints go to ``checkpoints/`` in it, exports to ``hf/``. Or a place in an
                object store, such as ``s3://bucket/run``; Lightning's own folders stay on disks.
            save: At which steps to save. None saves nothing.
            keep: Which checkpoints to retain; None keeps all.
            save_options: What else ``ShardedSave`` takes: ``on_missing``, ``async_mode``, ...
            ema_decay: Of the average; None keeps none.
            ema_options: What else ``EMA`` takes: ``warmup``, ``start_step``, ``every_n_steps``, ``offload``.
            export: At which steps to export. None exports nothing.
            resume: Whether to load the newest checkpoint when ``fit`` begins.
            stop_on: Signals, such as ``signal.SIGTERM``, upon which the step is saved and ``fit`` ends; one rank that
                gets it is enough.
            on_event: As in ``Hooks``: who is told, on rank 0, of each save, export, resume and removal.
            **export_options: Other arguments of ``HFExport``: ``base_model``, ``dtype``, ``models``, ...

        Raises:
            UsageError: options that nothing takes, or that make no sense together.
        """
        super().__init__()
        check_options("CheckpointHooks", HFExport, export_options)
        check_options("CheckpointHooks", ShardedSave, save_options or {}, "save_options: ")
        check_options("CheckpointHooks", EMA, ema_options or {}, "ema_options: ")
        for given, when, name in ((export_options, export, "export"), (save_options or keep, save, "save")):
            if given and when is None:
                raise UsageError(f"there are options for {name}, but {name}= does not say when: {name}=every(500), say")
        if ema_decay is None and ema_options:
            raise UsageError("there are ema_options, but no ema_decay")
        self.ema: EMA | None = None
        self.hooks: Hooks | None = None
        self._directory = as_path(directory)
        self._save = save
        self._save_options = {"keep": keep, **(save_options or {})}
        self._ema_options = None if ema_decay is None else {"decay": ema_decay, **(ema_options or {})}
        self._export = export
        self._resume = resume
        self._stop_on = stop_on
        self._on_event = on_event
        self._export_options = export_options
        self._step = 0

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Attach to the model, which is wrapped by now, and resume. All ranks; communicates.

        Raises:
            UsageError: ``fit`` was given ``ckpt_path``, and there is a checkpoint of ours to resume from, too.
        """
        self.close()
        model = trainer.strategy.model
        self.ema = EMA(model, **self._ema_options) if self._ema_options else None
        attached = [self.ema, self._sharded_save(trainer, model), self._hf_export(model)]
        self.hooks = Hooks(
            *(hook for hook in attached if hook is not None), stop_on=self._stop_on, on_event=self._on_event
        )
        self._step = trainer.global_step
        if self._resume and self._save is not None:
            self._step = self.hooks.resume()
            # Lightning restores its loops and optimizers from ckpt_path after this event.
            if self._step and trainer.ckpt_path:
                raise UsageError(
                    f"fit(ckpt_path={trainer.ckpt_path!r}) and step {self._step} of {self._directory} are both to be "
                    "resumed: leave ckpt_path out, or pass resume=False"
                )

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Update the average, save and export if it is time. All ranks; communicates then."""
        if self.hooks is None or trainer.global_step == self._step:
            return  # gradients were only accumulated
        self._step = trainer.global_step
        self.hooks.step(self._step)
        if self.hooks.should_stop:
            trainer.should_stop = True

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Save and export the last step if that is wanted and not done; wait for what is in flight. All ranks."""
        if self.hooks is not None:
            # Taken out first: after an error in `close`, `on_exception` must not close again.
            hooks, self.hooks = self.hooks, None
            hooks.close()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Wait for what is in flight; nothing new is saved."""
        self.close()

    def close(self) -> None:
        """Wait for what is in flight and raise what failed in it."""
        if self.hooks is not None:
            hooks, self.hooks = self.hooks, None
            hooks.close(broken_off=True)

    def _sharded_save(self, trainer: Any, model: Any) -> ShardedSave | None:
        if self._save is None:
            return None
        stateful: dict[str, Any] = {"fit_loop": _FitLoop(trainer)}
        if trainer.precision_plugin.state_dict():
            stateful["precision"] = trainer.precision_plugin  # the scale of float16 gradients
        schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
        return ShardedSave(
            self._directory / "checkpoints",
            model=model,
            when=self._save,
            optimizer=trainer.optimizers,
            scheduler=_Schedulers(schedulers) if schedulers else None,
            ema=self.ema,
            **{**self._save_options, "stateful": {**stateful, **(self._save_options.get("stateful") or {})}},
        )

    def _hf_export(self, model: Any) -> HFExport | None:
        if self._export is None:
            return None
        return HFExport(self._directory / "hf", model=model, ema=self.ema, when=self._export, **self._export_options)


class _FitLoop:
    """Where the fit loop is: epochs, batches and optimizer steps done. As text, which keeps its dicts as they are."""

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer

    def state_dict(self) -> dict[str, Any]:
        state = self._trainer.fit_loop.state_dict()
        state["state_dict"].pop("combined_loader", None)  # each rank has its own, and it may be of any kind
        return {"json": json.dumps(state)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._trainer.fit_loop.load_state_dict(json.loads(state["json"]))


class _Schedulers:
    """All schedulers of a trainer as one."""

    def __init__(self, schedulers: Sequence[Any]) -> None:
        self._schedulers = {str(i): scheduler for i, scheduler in enumerate(schedulers)}

    def state_dict(self) -> dict[str, Any]:
        return {name: scheduler.state_dict() for name, scheduler in self._schedulers.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, scheduler in self._schedulers.items():
            scheduler.load_state_dict(state[name])
