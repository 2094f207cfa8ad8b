"""TorchTitan's checkpoint manager with hooks, of either generation. Imports TorchTitan.

What it does itself is left to it; this says when what happens. In both generations the trainer calls ``load`` once,
``save`` after each step, and ``close``; each checkpoint is written in ``dcp_save`` and read in ``dcp_load``.
"""

from __future__ import annotations

import logging
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor
from torchtitan.components.checkpoint import CheckpointManager

from shardsmith.errors import UsageError
from shardsmith.layout import parse_step

from .attached import Attached
from .average import MODEL as AVERAGES
from .average import STATE as COUNTERS
from .load import Form, LoadWatch, is_remote, newest_complete, without_absent
from .options import CheckpointHooks

log = logging.getLogger(__name__)


class HookedManager(CheckpointManager):
    """TorchTitan's manager; until ``attach`` is called, no more than that."""

    _attached: Attached | None = None
    _watch: LoadWatch | None = None

    def attach(self, options: CheckpointHooks, config: Any, parts: dict[str, Any]) -> None:
        """Attach the hooks, when the manager is made. All ranks; communicates.

        Args:
            config: TorchTitan's, of its checkpoints.
            parts: What else the manager was made from.
        """
        dump_folder = Path(parts.get("base_folder") or ".")
        folder = dump_folder / config.folder
        if config.enable and options.prove_load:
            self._watch = LoadWatch(config, parts["model_parts"], parts["sd_adapter"], folder, options)
        if options.is_idle:
            return
        if is_remote(parts.get("base_folder") or "", config.folder):
            raise UsageError(
                f"checkpoint_hooks needs folders on a file system; {dump_folder} {config.folder} is remote"
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
            saves=config.enable and not config.load_only,
        )
        if config.enable:
            self.states.update(self._attached.states)

    def load(self, step: int = -1) -> bool:
        """As TorchTitan's; then training begins for the hooks."""
        loaded: bool = super().load(step)
        if self._watch is not None and not loaded:
            self._watch.nothing_loaded()
        if self._attached is not None:
            self._attached.train_begin()
        return loaded

    def save(self, curr_step: int, last_step: bool = False) -> Any:
        """As TorchTitan's; then the step is over for the hooks."""
        saved = super().save(curr_step, last_step)
        if self._attached is not None and curr_step > 0:  # step 0 is a checkpoint to start from, without a training
            self._attached.step_end(curr_step, is_last=last_step)
        return saved

    def close(self) -> None:
        """As TorchTitan's; then wait for the hooks' background work and raise what failed in it."""
        attached, self._attached = self._attached, None
        try:
            super().close()
        finally:
            if attached is not None:
                attached.close()

    def dcp_save(self, state_dict: dict[str, Any], checkpoint_id: str, *args: Any, **kwargs: Any) -> Any:
        """As TorchTitan's. The average goes with the weights, also where only these are saved, at the last step."""
        attached, path = self._attached, Path(checkpoint_id)
        step = parse_step(path.name)
        if attached is None or step is None or path.parent != Path(self.folder) or kwargs.get("to_hf"):
            return super().dcp_save(state_dict, checkpoint_id, *args, **kwargs)
        if attached.recorder is not None:
            attached.recorder.begin(path)
        result = super().dcp_save({**state_dict, **attached.states}, checkpoint_id, *args, **kwargs)
        if attached.recorder is not None:
            attached.recorder.saved(step, path, _end_of(result), _mesh(state_dict))
        return result

    def dcp_load(self, state_dict: dict[str, Any], checkpoint_id: str, *args: Any, **kwargs: Any) -> None:
        """As TorchTitan's, but looked at before and after."""
        path, form = Path(checkpoint_id), _form_of(kwargs)
        if self._attached is not None and AVERAGES in state_dict:
            state_dict = without_absent(state_dict, path, (AVERAGES, COUNTERS))
        watch = self._watch if _has_weights(state_dict) else None
        if watch is not None and is_remote(checkpoint_id):
            log.warning("%s is remote: what is loaded from there is not proved", checkpoint_id)
            watch = None
        if watch is not None:
            state_dict = watch.before(state_dict, path, form)
        super().dcp_load(state_dict, checkpoint_id, *args, **kwargs)
        if watch is not None:
            watch.after(path, form)

    def _find_load_step(self, folder: str = "") -> int:
        """As TorchTitan's, but of steps that are marked complete, if there are any, only such."""
        step: int = super()._find_load_step(folder)
        if self._attached is None or self._attached.recorder is None or folder not in ("", self.folder):
            return step
        return newest_complete(Path(self.folder), step)

    def _purge_stale_checkpoints(self) -> None:
        """TorchTitan's counts what is incomplete, and foreign folders; with a recorder, that one removes instead."""
        if self._attached is None or self._attached.recorder is None:
            super()._purge_stale_checkpoints()


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


def _mesh(state_dict: dict[str, Any]) -> dict[str, Any] | None:
    """Shape and dimension names of the mesh that the weights are on."""
    for value in state_dict.values():
        if isinstance(value, DTensor):
            names = value.device_mesh.mesh_dim_names
            return {"shape": list(value.device_mesh.mesh.shape), "dim_names": list(names) if names else None}
    return None
