"""The hooks of one run, made from the options and from what TorchTitan hands to its checkpoint manager."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn
from torch.distributed.checkpoint.stateful import Stateful

from shardsmith.errors import UsageError
from shardsmith.ground.ranks import Ranks, rank_and_size
from shardsmith.ground.remote_path import RemotePath, as_path
from shardsmith.hf.hf_directory import read_config
from shardsmith.hooks import (
    EMA,
    ExportFiles,
    ExportVerification,
    ExportWeights,
    ExportWriting,
    HFExport,
    Hook,
    Hooks,
    Recorder,
    every,
    json_lines,
    last,
    latest,
)
from shardsmith.hooks.save_weights import HuggingFaceWeights
from shardsmith.hooks.schedule import Schedule
from shardsmith.hooks.stages import are_stages, names_on_all
from shardsmith.name_maps.maps import NameMap
from shardsmith.sharding.step_copies import StepCopies
from shardsmith.tensors.fqn import clean_fqn

from .adapters import complete_translation
from .answers import TitanAnswers, made_up_tokens
from .assets import find_base_model
from .average import MODEL as AVERAGES
from .average import average_states
from .end_of_data import EndOfData
from .engine import Engine
from .inner import InnerNames, find_held, refuse_replaced
from .load import stored_keys
from .lora import LoraAlone, MergedLora, find_lora
from .lost_resumes import find_lost_resumes
from .names import TorchTitanNames
from .names_of_step import names_to_record
from .one_write import files_of, refuse_unfit
from .options import CheckpointHooks
from .router_bias import ROUTER_BIAS_FILE, RouterBias
from .settings import refuse_other_settings
from .united import united

log = logging.getLogger(__name__)


class Attached:
    """EMA, recorder and exporter, as far as they are wanted, and the moments at which they act.

    Attributes:
        ema, recorder, engine: None if not wanted.
        states: What is to be saved beside TorchTitan's own states, by key.
    """

    def __init__(
        self,
        options: CheckpointHooks,
        *,
        model_parts: Sequence[nn.Module],
        optimizers: Any,
        states: Mapping[str, Any],
        sd_adapter: Any,
        dump_folder: Path,
        folder: Path,
        keep_latest_k: int,
        saves: bool,
        last_dtype: str | None = None,
    ) -> None:
        """All ranks, when the model is initialized; communicates where anything is wanted.

        Args:
            options: The options that the user set.
            model_parts: The model; several parts a rank where stages interleave.
            optimizers: TorchTitan's container of optimizers.
            states: Among them ``train_state``, which knows the step.
            sd_adapter: TorchTitan's state-dict adapter; None without one.
            dump_folder: Of the run.
            folder: TorchTitan's checkpoint folder.
            keep_latest_k: Number of steps that TorchTitan keeps; 0 keeps all.
            saves: Whether TorchTitan saves checkpoints at all.
            last_dtype: Dtype of the last step where that has weights alone; None where it has all.

        Raises:
            UsageError: an option does not fit this run.
            CheckpointError, WriteError, RankFailedError: exports cannot be written, or what belongs beside their
                weights is not there.
        """
        options.check()
        wanted = {"metadata": options.metadata, "engine": options.engine}
        wanted["ema_decay"] = options.ema_decay is not None and not options.exports
        if not saves and any(wanted.values()):
            option = next(name for name, is_set in wanted.items() if is_set)
            raise UsageError(
                f"checkpoint_hooks: {option} has no effect, since TorchTitan saves no checkpoints in this run: set "
                "checkpoint.enable and leave checkpoint.load_only off, or leave the option out"
            )
        self._trainer = states["train_state"]
        if saves and (reason := find_lost_resumes(self._trainer, model_parts)) and rank_and_size()[0] == 0:
            log.warning(
                "no run can resume from the steps of this one, with or without checkpoint_hooks: %s. Its exports, and "
                'the weights of its steps, can be used (docs/torchtitan.md, "What works with which model")',
                reason,
            )
        self.ema: EMA | None = None
        self.recorder: Recorder | None = None
        self.engine: Engine | None = None
        self._export: HFExport | None = None
        refuse_unfit(united(model_parts), options, last_dtype)
        self._attach(options, united(model_parts), sd_adapter, dump_folder, folder, keep_latest_k, saves)
        self.states: dict[str, Stateful] = (
            average_states(self.ema, allow_other_decay=options.ema_allow_other_decay) if self.ema is not None else {}
        )
        attached: list[Hook | None] = [self.ema, self.recorder, self._export]
        # Python lets only the main thread handle signals.
        stops = saves and options.save_on_sigterm and threading.current_thread() is threading.main_thread()
        hooks = [hook for hook in attached if hook is not None]
        told = () if options.events is None else json_lines(dump_folder / options.events)
        self._hooks = Hooks(*hooks, stop_on=signal.SIGTERM if stops else (), on_event=told)
        self._data = EndOfData(self._trainer, options.export_last)
        # Right after the optimizers' step; the checkpoint manager is called only later.
        optimizers.register_step_post_hook(self._on_optimizer_step)

    @property
    def step_copies(self) -> StepCopies | None:
        """Where a save offers what it copies to the export of the same step; None without exports."""
        return None if self._export is None else self._export.step_copies

    def train_begin(self) -> None:
        """Training begins: whatever was to be loaded is loaded. What a former run did not do at its end is done."""
        step = self._trainer.step
        for hook in self._hooks.hooks:
            hook.on_train_begin(step)
        if step and self._data.has_no_step_left():
            self._hooks.train_end(step)
        self._data.watch()

    def step_end(self, step: int, *, is_last: bool) -> bool:
        """A step is over, and TorchTitan has saved it if it was due. Whether the run was asked to end after it."""
        self._hooks.step_end(step)
        if is_last:
            self._hooks.train_end(step)
        # At the last step TorchTitan ends by itself.
        return self._hooks.should_stop and not is_last

    def end_training(self) -> None:
        """Let TorchTitan's trainer leave its loop after this step."""
        self._trainer.should_continue_training = lambda: False

    def finish(self) -> None:
        """TorchTitan's loop is over. All ranks; communicates if it ran out of data.

        Then the step before the one that TorchTitan has canceled is the last one, and what is due at that is done.
        """
        step = self._data.last_step()
        if step is not None:
            self._hooks.train_end(step)

    def record_found(self, step: int, path: Path) -> None:
        """Give a manifest to a step that was saved without the hooks. All ranks; returns at once.

        Not to one that is a link: its files are in a place that is not this run's.
        """
        if self.recorder is not None and not path.is_symlink():
            self.recorder.saved(step, path, None, has_average=AVERAGES in stored_keys(path))

    def close(self) -> None:
        """Wait for what is under way, and raise what failed in it."""
        try:
            self._hooks.close(broken_off=True)  # what is due at the last step has been done at that
        finally:
            if self.engine is not None:
                self.engine.close()

    def _on_optimizer_step(self, *_: Any) -> None:
        """Once a step of TorchTitan's, however many microbatches it accumulates; it has counted it already."""
        self._hooks.optimizer_step(self._trainer.step)

    def _attach(
        self,
        options: CheckpointHooks,
        model: nn.Module,
        sd_adapter: Any,
        dump_folder: Path,
        folder: Path,
        keep_latest_k: int,
        saves: bool,
    ) -> None:
        if options.ema_decay is not None:
            self.ema = EMA(
                model,
                decay=options.ema_decay,
                warmup=options.ema_warmup,
                start_step=options.ema_start_step,
                every_n_steps=options.ema_every_n_steps,
                offload=options.ema_offload,
            )
        if options.records and saves:
            # The recorder removes steps in TorchTitan's place, by TorchTitan's number.
            keep = latest(keep_latest_k) if keep_latest_k else None
            weights = _weights(options, model, self.ema, sd_adapter, folder) if options.one_write else None
            recorded = None
            if weights is None:  # otherwise the files themselves have them
                recorded = names_to_record(model, sd_adapter, options, Ranks(options.timeout_secs))
            self.recorder = Recorder(
                folder, model=model, ema=self.ema, keep=keep, names=recorded, timeout_secs=options.timeout_secs
            )
            if options.engine:
                self.engine = Engine(
                    model,
                    self.ema,
                    options.timeout_secs,
                    weights=weights,
                    names=recorded,
                    prewarm=options.prewarm,
                    max_host_memory=options.max_host_memory,
                )
        if options.exports:
            ranks = Ranks(options.timeout_secs)
            base = find_base_model(options, sd_adapter)
            config = read_config(base)
            refuse_other_settings(ranks, base, model, sd_adapter, options.allow_config)
            stages = are_stages(ranks, model)
            names, facts = _names(sd_adapter, model, ranks, options, config)
            form = _form(options, model, sd_adapter, base, ranks)
            self._export = HFExport(
                _export_folder(options, dump_folder, folder),
                model=model,
                ema=self.ema,
                when=_schedule(options),
                models=options.export_models,
                dtype=options.export_dtype,
                keep=latest(options.export_keep) if options.export_keep else None,
                # A directory of an adapter has no base model in it.
                files=ExportFiles(base_model=None if isinstance(form, LoraAlone) else base, extra_facts=facts),
                weights=ExportWeights(
                    names=form if isinstance(form, LoraAlone) else names,
                    adapters=form or "adapter",
                    max_shard_size=options.export_max_shard_size,
                    ema_as=options.export_ema_as,
                    stages=stages,
                ),
                writing=ExportWriting(
                    max_host_memory=options.max_host_memory,
                    when_busy=options.export_when_busy,
                    on_error=options.export_on_error,
                    timeout_secs=options.timeout_secs,
                ),
                verification=_verification(options, model, config, is_cut=stages),
            )


def _weights(
    options: CheckpointHooks, model: nn.Module, ema: EMA | None, sd_adapter: Any, folder: Path
) -> HuggingFaceWeights:
    """What writes the weights of the steps. All ranks; communicates. Raises as ``Attached``."""
    ranks = Ranks(options.timeout_secs)
    base = find_base_model(options, sd_adapter)
    config = read_config(base)
    refuse_other_settings(ranks, base, model, sd_adapter, options.allow_config)
    names, facts = _names(sd_adapter, model, ranks, options, config)
    files = files_of(options, base, names)
    return HuggingFaceWeights(model, ema, files, folder, ranks, stages=are_stages(ranks, model), facts=facts)


def _schedule(options: CheckpointHooks) -> Schedule:
    when = Schedule()
    if options.export_interval is not None:
        when |= every(options.export_interval)
    return when | last() if options.export_last else when


def _export_folder(options: CheckpointHooks, dump_folder: Path, folder: Path) -> Path:
    """Where exports go. TorchTitan takes for a checkpoint, and deletes, what is in its folder and has such a name."""
    path = as_path(options.export_folder)
    if isinstance(path, RemotePath):
        return path
    path = dump_folder / path
    # Links resolved, so that no other name of the folder gets by.
    if path.resolve().is_relative_to(folder.resolve()):
        raise UsageError(
            f"export_folder={options.export_folder}: {path} is inside TorchTitan's checkpoint folder, where it would "
            "be resumed from, or deleted; choose one beside it"
        )
    return path


def _form(
    options: CheckpointHooks, model: nn.Module, sd_adapter: Any, base: Path, ranks: Ranks
) -> MergedLora | LoraAlone | None:
    """What is written of a model with LoRA; None for any other. Communicates."""
    adapted = names_on_all(ranks, find_lora(model))
    if not adapted and options.export_lora == "adapter":
        raise UsageError('checkpoint_hooks: export_lora="adapter" has no effect: no layer of this model has an adapter')
    if not adapted:
        return None
    if options.export_lora == "merged" or sd_adapter is None:
        return MergedLora(model)
    return LoraAlone(model, complete_translation(sd_adapter, read_config(base)), type(sd_adapter).__name__, base, ranks)


def _verification(
    options: CheckpointHooks, model: nn.Module, config: Mapping[str, Any], *, is_cut: bool
) -> ExportVerification:
    """How an export is verified. Raises UsageError where the live model cannot be asked."""
    if options.export_verify == "digest" or find_held(model) is not None:
        return ExportVerification(verify=options.export_verify)
    if is_cut:
        raise UsageError(
            'checkpoint_hooks: export_verify="load" asks the live model, and a rank has only stages of a pipeline: use '
            '"digest", and load an export with shardsmith verify'
        )
    return ExportVerification(
        verify="load", verify_inputs=made_up_tokens(config, model), verify_with=TitanAnswers(model)
    )


def _names(
    sd_adapter: Any, model: nn.Module, ranks: Ranks, options: CheckpointHooks, config: Mapping[str, Any]
) -> tuple[str | NameMap, dict[str, Callable[[], Any]]]:
    """How the weights are called in files, through TorchTitan's adapter where there is one, and what lies beside them.

    Communicates.
    """
    refuse_replaced(model)
    if sd_adapter is None:
        return InnerNames.of(model) or "auto", {}
    buffers = [clean_fqn(name, model) for name, _ in model.named_buffers()]
    names = TorchTitanNames(sd_adapter, names_on_all(ranks, buffers), config)
    bias = RouterBias(names, model, ranks)
    bias.announce(options.export_router_bias)
    return names, {ROUTER_BIAS_FILE: bias.values} if bias.lost and options.export_router_bias == "file" else {}
