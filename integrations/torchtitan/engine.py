"""Saves into TorchTitan's step folders that do not go through ``torch.distributed.checkpoint``."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict_saver import AsyncSaveResponse
from torch.distributed.checkpoint.stateful import Stateful

from shardsmith.ground.commit import remove
from shardsmith.ground.ranks import Ranks
from shardsmith.ground.sizes import parse_size
from shardsmith.hooks import EMA
from shardsmith.hooks.save_weights import HuggingFaceWeights
from shardsmith.run_state.contents import Contents
from shardsmith.run_state.rehearsal import Rehearsal
from shardsmith.run_state.save import SaveInProgress
from shardsmith.run_state.share import Share
from shardsmith.run_state.train_state import mesh_of
from shardsmith.sharding.live_boxes import StagingBuffer
from shardsmith.sharding.step_copies import StepCopies
from shardsmith.tensors.device_copy import release_pinned
from shardsmith.tensors.fqn import tied_weights

from .average import MODEL as AVERAGES


class Engine:
    """Writes what TorchTitan's ``dcp_save`` is given, in its three modes, with what ``dcp.load`` reads.

    Make it on all ranks at the same point.
    """

    def __init__(
        self,
        model: nn.Module,
        ema: EMA | None,
        timeout_secs: float,
        *,
        weights: HuggingFaceWeights | None = None,
        names: dict[str, Any] | None = None,
        prewarm: bool = False,
        max_host_memory: str | None = None,
    ) -> None:
        """Nothing is written yet.

        Args:
            model: The model that trains.
            ema: Whose facts are recorded, where it is saved with the rest.
            timeout_secs: How long to wait for a rank.
            weights: Plans the Hugging Face files of the weights; None where they go to DCP files.
            names: Their names in Hugging Face files, as ``metadata.json`` has them, if they are not in such files. The
                value of rank 0 is used.
            prewarm: Make memory for copies with the first ``prewarm``.
            max_host_memory: The most that a rank's copy takes, as of ShardedSave; None without a bound.
        """
        self._weights = weights
        self._names = names
        self._tied = tied_weights(model)
        self._ema = ema
        self._ranks = Ranks(timeout_secs)
        self._share = Share(self._ranks.rank)
        self._most_bytes = None if max_host_memory is None else parse_size(max_host_memory)
        self._buffer = StagingBuffer(self._most_bytes)
        self._is_warm = not prewarm
        self._thread = ThreadPoolExecutor(1, "shardsmith-save")
        self._last: Future[None] | None = None

    @torch.no_grad()
    def save(
        self, step: int, path: Path, state: Mapping[str, Any], mode: str, step_copies: StepCopies | None = None
    ) -> Any:
        """Save a step; what is at ``path`` is replaced. All ranks; communicates. The folder appears when it is whole.

        Args:
            step: Number of the step.
            path: Its folder.
            state: Values, and things that have a state, by key.
            mode: The value of TorchTitan's ``AsyncMode``.
            step_copies: Where to offer what is copied to an export of the same step.

        Returns:
            As TorchTitan expects of each mode: None; a future; or a response with one of the copy and one of the save.

        Raises:
            RankFailedError: on all ranks, if any failed. What fails in the background is raised by the future.
        """
        if self._last is not None:
            wait([self._last])  # TorchTitan raises what failed in it
        self._ranks.lead(f"preparing {path.name}", partial(_make_way, path))
        self._is_warm = True
        job = SaveInProgress(path, self._ranks, self._share)
        buffer = None if mode == "disabled" else self._buffer
        job.begin(lambda: self._contents(step, path, state), buffer=buffer, step_copies=step_copies)
        if mode == "disabled":
            _finish(job)
            gc.collect(1)  # as TorchTitan does, which has switched Python's own collections off
            return None
        self._last = self._thread.submit(_finish, job)
        job.feed()
        if mode == "async":
            return self._last
        copied: Future[None] = Future()
        copied.set_result(None)
        return AsyncSaveResponse(copied, self._last)

    @torch.no_grad()
    def prewarm(self, step: int, path: Path, state: Callable[[], Mapping[str, Any]]) -> None:
        """Make what the first save would make, once, if that is wanted and no step was saved. All ranks; communicates.

        Args:
            step: Number of the step, of which nothing is written.
            path: Its folder.
            state: Returns what ``save`` would be given.

        Raises:
            RankFailedError: on all ranks, if a host has too little memory for the copies.
        """
        if not self._is_warm:
            self._is_warm = True
            rehearsal = Rehearsal(path, self._ranks, self._share)
            rehearsal.prepare(lambda: self._contents(step, path, state()), self._buffer)

    def close(self) -> None:
        """Wait for the save under way; what failed in it is raised by its future."""
        self._thread.shutdown()
        self._buffer = StagingBuffer(self._most_bytes)
        release_pinned()

    def _contents(self, step: int, path: Path, state: Mapping[str, Any]) -> Contents:
        values = {key: value.state_dict() if isinstance(value, Stateful) else value for key, value in state.items()}
        facts = self._ema.facts() if self._ema is not None and AVERAGES in values else None
        mesh = mesh_of(values)
        contents = Contents(
            step=step,
            state_dict=values,
            ema=facts,
            tied=self._tied,
            mesh=mesh,
            names=self._names,
            # TorchTitan's models have no config of Hugging Face. That of its backend for transformers has a class of
            # TorchTitan's own, without a model_type, which must not get into an export.
            settings=None,
        )
        return contents if self._weights is None else self._weights.added_to(contents, path)


def _finish(job: SaveInProgress) -> None:
    job.write()
    job.commit()


def _make_way(path: Path) -> None:
    """Remove a step that is saved once more: after a resume from an earlier one, or one that is torn."""
    if path.is_symlink():
        path.unlink()
    elif path.exists():
        remove(path, nameless=True)
