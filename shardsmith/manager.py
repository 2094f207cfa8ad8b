"""``ShardedCheckpointManager``: one object that saves a run, finds its checkpoints, and loads every format there is."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

from torch import nn
from torch.optim import Optimizer

from shardsmith.checking.arguments import checked
from shardsmith.checking.types import AnyPath, Decay, Place, Scheduler, Seconds, StepNumber
from shardsmith.errors import (
    CheckpointNotFoundError,
    IncompleteCheckpointError,
    UnsupportedFormatError,
    UsageError,
)
from shardsmith.formats import by_path as formats
from shardsmith.formats.detected import (
    ACCELERATE,
    BAGEL,
    BAGEL_SHARDED,
    DCP,
    HUGGINGFACE,
    INCOMPLETE,
    SAFETENSORS,
    SHARDED,
    TORCH,
    DetectedFormat,
)
from shardsmith.ground import layout
from shardsmith.ground.commit import check_writable, sweep
from shardsmith.ground.meeting import made_together, meet
from shardsmith.ground.ranks import Ranks
from shardsmith.ground.remote_path import as_path
from shardsmith.load.buffer_reference import Fresh
from shardsmith.manifest.checkpoints import find_damage, loadable_steps, refuse_within_step
from shardsmith.run_state.average import Average, ModuleAverage
from shardsmith.run_state.contents import Contents
from shardsmith.run_state.foreign import ForeignLoad, Loaded
from shardsmith.run_state.optimizers import check_optimizers
from shardsmith.run_state.rank_shards_writer import save_rank_shards
from shardsmith.run_state.resume import DATA_STATUS, Wanted, load_ours
from shardsmith.run_state.save import SaveInProgress
from shardsmith.run_state.share import Share
from shardsmith.run_state.train_state import TrainState, optimizer_list

log = logging.getLogger(__name__)

_WHOLE = (HUGGINGFACE, SAFETENSORS, TORCH, BAGEL)


class ShardedCheckpointManager:
    """Save and load model, average, optimizer, scheduler and data status of a sharded run.

        manager = ShardedCheckpointManager("run/checkpoints", model=model, ema=ema_model, ema_decay=0.9999,
                                           optimizer=optimizer, scheduler=scheduler)
        manager.save_sharded_checkpoint(step, data_status=status)
        loaded = manager.load_sharded_checkpoint()                  # the newest that is sound

    Make it on all ranks at the same point, after FSDP or ``fully_shard``. Every method is for all ranks to call, and
    communicates. No rank ever holds more than its shards.

    Attributes:
        directory: Where the step directories are.
        average: The average, or None.
    """

    @made_together
    @checked
    def __init__(
        self,
        directory: Place,
        *,
        model: nn.Module,
        optimizer: Optimizer | Iterable[Optimizer] | None = None,
        scheduler: Scheduler | None = None,
        ema: Average | nn.Module | None = None,
        ema_decay: Decay | None = None,
        ema_start_step: StepNumber = 0,
        backend: Literal["dcp", "per_rank"] = "dcp",
        fresh: Fresh | None = None,
        timeout_secs: Seconds = 1800.0,
    ) -> None:
        """Check that the directory can be written to, and remove what dead attempts left there.

        Args:
            directory: Made if missing; on a file system that all ranks share, or in an object store:
                ``s3://bucket/run``, see docs/storage.md.
            model: The model that trains, wrapped and sharded.
            optimizer: One, or all of the model's.
            scheduler: The learning rate schedule.
            ema: The EMA hook; or a second module, sharded by itself, which whoever trains updates.
            ema_decay: Of a second module. It is recorded, and a checkpoint of another decay is refused.
            ema_start_step: Of a second module: the step before which it was a copy of the weights.
            backend: "dcp" writes a directory of torch.distributed.checkpoint; "per_rank" two safetensors files a rank,
                where that cannot be used. Both come back on any number of ranks.
            fresh: As in ``load_initial``: how to find out what non-persistent buffers must be.
            timeout_secs: How long to wait for a rank before something is given up.

        Raises:
            UsageError: a second module without a decay, or the directory is in that of a step.
            RankFailedError, WriteError: the directory cannot be written to.
        """
        self.directory = as_path(directory)
        self.average = _average(ema, ema_decay, ema_start_step)
        self._model = model
        self._optimizers = optimizer_list(optimizer)
        # Before the ranks meet: the error is this rank's own, and names the optimizer that does not fit.
        check_optimizers("ShardedCheckpointManager", model, self._optimizers, scheduler)
        self._scheduler = scheduler
        self._backend = backend
        self._fresh = fresh
        self._ranks = Ranks(timeout_secs)
        # Ranks that were made with other arguments would wait for each other in the first save.
        meet(self._ranks, "making ShardedCheckpointManager", {"directory": str(directory), "backend": backend})
        # Kept from save to save: who writes what does not change as long as the state does not.
        self._share = Share(self._ranks.rank)
        self._all = self._state(Wanted())
        self._ranks.lead(f"preparing {self.directory}", self._prepare)

    @staticmethod
    def detect_checkpoint_format(path: str | Path) -> DetectedFormat:
        """Detect the format of a path. No communication. Raises CheckpointNotFoundError if nothing is there."""
        return formats.detect_checkpoint_format(path)

    @checked
    def save_sharded_checkpoint(self, step: StepNumber, *, data_status: Any = None) -> Path:
        """Save everything as ``step-<step>``; return the path when it is committed.

        Args:
            step: Number of the step.
            data_status: Where this rank's data loader is: plain values, such as numbers, lists and dicts.

        Raises:
            UsageError: ``data_status`` could not be read again without running code.
            RankFailedError: on all ranks, if saving failed on any. Nothing was published.
        """
        from shardsmith.formats.rank_shards import pack_object

        target = self.directory / layout.step_name(step)

        def collect() -> Contents:
            contents = self._all.collect(step)
            # One entry for each rank, so that all of them have keys of their own in the one checkpoint.
            contents.state_dict[DATA_STATUS] = {f"rank-{self._ranks.rank}": pack_object(data_status)}
            return contents

        # While it is copied, the average must not be updated.
        with self.average.staging() if self.average else contextlib.nullcontext():
            if self._backend == "per_rank":
                save_rank_shards(target, collect, self._ranks)
            else:
                save = SaveInProgress(target, self._ranks, self._share)
                save.begin(collect)
                save.write()
                save.commit()
        if self._ranks.is_leader:
            log.info("saved %s", target)
            if self.average is not None:
                log.info("%s holds an average: %s", target, self._facts())
        return target

    def newest_checkpoint(self) -> Path | None:
        """Return the newest of our step directories all of whose files have their recorded hashes; None without any.

        Raises:
            IncompleteCheckpointError: there are some, but none that can be read or is sound. They are left as they are.
        """
        # By rank 0: a listing on another host may be older, and then the ranks would load different steps.
        steps = self._ranks.lead("looking for checkpoints", lambda: loadable_steps(self.directory))
        damaged = []
        # The newest first, and no further than the first sound one: each look reads a whole checkpoint.
        for step in reversed(steps):
            path = self.directory / layout.step_name(step)
            if not self._is_damaged(path):
                return path
            log.warning("%s is damaged and is not taken", path)
            damaged.append(path.name)
        if damaged:
            raise IncompleteCheckpointError(self.directory, f"every checkpoint is damaged: {', '.join(damaged)}")
        return None

    @checked
    def load_sharded_checkpoint(
        self,
        path: AnyPath | None = None,
        *,
        load_model: bool = True,
        load_ema: bool = True,
        load_optimizer: bool = True,
        load_scheduler: bool = True,
        load_data_status: bool = True,
        load_rng: bool = True,
        allow_missing: Sequence[str] = (),
        allow_extra: Sequence[str] = (),
        allow_shape: Sequence[str] = (),
        repair_buffers: bool = False,
    ) -> Loaded:
        """Load a checkpoint of ours, or of another project, and verify the loaded values against it.

        What is asked for and is not there is an error. Of another project's checkpoints optimizer, scheduler and data
        status can be loaded where they say enough: an optimizer of BAGEL over as many ranks as saved it, one of its
        fork with names on any number.

        Args:
            path: Default: the newest of our own that is sound.
            load_model: And so on: what to load. What this manager has none of is never loaded.
            load_ema: Whether to load the average.
            load_optimizer: Whether to load the optimizer's state.
            load_scheduler: Whether to load the learning rate schedule.
            load_data_status: Whether to return the data loader's place.
            load_rng: Random number generators, of our own checkpoints.
            allow_missing: Patterns of tensors that another project's checkpoint need not have.
            allow_extra: Patterns of tensors that it may have and the model has not.
            allow_shape: Patterns of tensors that may have another shape there, such as "latent_pos_embed.*" for another
                resolution. They keep their values.
            repair_buffers: Overwrite non-persistent buffers that are wrong, and say so in the report.

        Raises:
            CheckpointNotFoundError: there is no such checkpoint, or it lacks a part that was asked for.
            CheckpointError: it is incomplete, damaged, unsafe, or does not fit. RankFailedError: on any rank.
        """
        chosen = as_path(path) if path is not None else self.newest_checkpoint()
        if chosen is None:
            raise CheckpointNotFoundError(self.directory, "holds no checkpoint yet")
        wanted = Wanted(
            model=load_model,
            # What this manager does not have is not asked for, so a checkpoint may lack it.
            ema=load_ema and self.average is not None,
            optimizer=load_optimizer and bool(self._optimizers),
            scheduler=load_scheduler and self._scheduler is not None,
            data_status=load_data_status,
            rng=load_rng,
        )
        found = self._detect(chosen)
        if found.name == SHARDED:
            # Ours are loaded through their index and verified by their digests.
            step, proved, status = load_ours(chosen, self._state(wanted), wanted, self._ranks)
            loaded = Loaded(
                path=chosen, format=SHARDED, step=step, parts=wanted.names, proved=proved, data_status=status
            )
        # Of other projects' only names and shapes say what is what; loaded values are compared with the files.
        elif found.name in (DCP, ACCELERATE, BAGEL, BAGEL_SHARDED):
            loaded = self._foreign(allow_missing, allow_extra, allow_shape, repair_buffers).load_sharded(
                chosen, found.name, wanted
            )
        else:
            raise UnsupportedFormatError(
                chosen, f"is no sharded checkpoint but {found.name} ({found.reason}); use load_hf_checkpoint"
            )
        return self._logged(loaded)

    @checked
    def load_hf_checkpoint(
        self,
        path: AnyPath,
        *,
        load_ema: bool = True,
        load_ema_from_main: bool = False,
        load_main_from_ema: bool = False,
        allow_missing: Sequence[str] = (),
        allow_extra: Sequence[str] = (),
        allow_shape: Sequence[str] = (),
        repair_buffers: bool = False,
    ) -> Loaded:
        """Load whole weights: safetensors or ``torch.save`` files, single or indexed, with ``ema.safetensors`` or not.

        Args:
            path: A Hugging Face directory, or a file of weights.
            load_ema: Whether to load the average.
            load_ema_from_main: Fill the average from the main weights, also where the files have an average. It is said
                in the log.
            load_main_from_ema: The other way round, as for BAGEL's release, which is an average alone.
            allow_missing: Patterns of tensors that the files need not have.
            allow_extra: Patterns of tensors that they may have and the model has not.
            allow_shape: Patterns of tensors that may have another shape there, such as "latent_pos_embed.*" for another
                resolution. They keep their values.
            repair_buffers: Overwrite non-persistent buffers that are wrong, and say so in the report.

        Raises:
            CheckpointNotFoundError: main weights or average are not there, and nothing allows to do without.
            CheckpointError: the files cannot be read or do not fit. RankFailedError: on any rank.
        """
        path = as_path(path)
        found = self._detect(path)
        if found.name not in _WHOLE:
            raise UnsupportedFormatError(
                path, f"holds no whole weights but is {found.name} ({found.reason}); use load_sharded_checkpoint"
            )
        return self._logged(
            self._foreign(allow_missing, allow_extra, allow_shape, repair_buffers).load_whole(
                path,
                found.name,
                with_average=load_ema and self.average is not None,
                average_from_main=load_ema_from_main,
                main_from_average=load_main_from_ema,
            )
        )

    def _foreign(
        self,
        allow_missing: Sequence[str],
        allow_extra: Sequence[str],
        allow_shape: Sequence[str],
        repair_buffers: bool,
    ) -> ForeignLoad:
        return ForeignLoad(
            self._model,
            self.average,
            self._optimizers,
            self._scheduler,
            self._ranks,
            fresh=self._fresh,
            allow_missing=allow_missing,
            allow_extra=allow_extra,
            allow_shape=allow_shape,
            repair_buffers=repair_buffers,
        )

    def _detect(self, path: Path) -> DetectedFormat:
        found = formats.detect_checkpoint_format(path)
        if found.name == INCOMPLETE:
            raise IncompleteCheckpointError(path, found.reason)
        return found

    def _state(self, wanted: Wanted) -> TrainState:
        return TrainState(
            self._model,
            optimizer=self._optimizers if wanted.optimizer else None,
            scheduler=self._scheduler if wanted.scheduler else None,
            ema=self.average if wanted.ema else None,
            rank=self._ranks.rank,
        )

    def _is_damaged(self, path: Path) -> bool:
        """Whether any rank finds something wrong in its share of the files."""
        rank, size = self._ranks.rank, self._ranks.size
        # Each rank reads a share of the files, so together they read every byte once.
        return self._ranks.agree(f"verifying {path.name}", lambda: bool(find_damage(path, part=rank, parts=size)), any)

    def _facts(self) -> str:
        assert self.average is not None
        return ", ".join(f"{name} {value}" for name, value in self.average.facts().items())

    def _logged(self, loaded: Loaded) -> Loaded:
        if self._ranks.is_leader:
            log.info(
                "loaded %s from %s (%s), step %s; %d tensors verified",
                ", ".join(loaded.parts),
                loaded.path,
                loaded.format,
                loaded.step,
                loaded.proved,
            )
            if "ema" in loaded.parts:
                log.info("the average: %s", self._facts())
        return loaded

    def _prepare(self) -> None:
        refuse_within_step(self.directory)
        # First the test, then the deletion: where nothing can be written, nothing is removed either.
        check_writable(self.directory)
        sweep(self.directory)


def _average(ema: Average | nn.Module | None, decay: float | None, start_step: int) -> Average | None:
    if not isinstance(ema, nn.Module):
        return ema
    if decay is None:
        raise UsageError("ema is a module, so nothing says how it is averaged: pass ema_decay, such as 0.9999")
    return ModuleAverage(ema, decay=decay, start_step=start_step)
