"""Weights of an export that come from a committed checkpoint, read and written by all ranks of the run together.

Each rank takes a share of the output: so it costs any of them little, every host reads and writes at its own speed, and
what a host has just saved is often still in its memory.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from shardsmith.export.block_copy import copy_blocks
from shardsmith.export.digest_shares import add_up, encode
from shardsmith.export.live_writers import Digests, Staged, WeightsWriter
from shardsmith.export.place import create_file, deal_files
from shardsmith.export.write import refuse_damage
from shardsmith.formats.safetensors_files.writer import SafetensorsFileWriter
from shardsmith.hf.directory import DirectoryPlan
from shardsmith.manifest.checkpoints import find_damage
from shardsmith.tensors.tensors import TensorSource


class CheckpointWriter(WeightsWriter):
    """Copies from the checkpoint, cast, into the files (a ``WeightsWriter``). No communication."""

    def __init__(
        self, checkpoint: Path, sources: Mapping[str, TensorSource], rank: int, size: int, *, whole_files: bool
    ) -> None:
        """``sources`` are the checkpoint's, by model. ``whole_files``: each file is written by one rank alone."""
        self._checkpoint = checkpoint
        self._sources = sources
        self._rank = rank
        self._size = size
        self._whole_files = whole_files
        self._found: Any = None

    def make_files(self, plan: DirectoryPlan, directory: Path) -> None:
        """Make every file, unless those that write them do."""
        # In a store a file enters whole: then there is nothing to make before.
        for file in () if self._whole_files else (file for model in plan.models for file in model.weights.files):
            with SafetensorsFileWriter.create(directory, file) as writer:
                writer.sync()  # the ranks that write to it may be of other hosts

    def write(self, plan: DirectoryPlan, staged: Staged, directory: Path) -> None:  # noqa: ARG002
        """Verify this rank's share of the checkpoint's files, and write this rank's share."""
        # Each rank verifies a share: together they read every file once.
        refuse_damage(self._checkpoint, find_damage(self._checkpoint, part=self._rank, parts=self._size))
        copy = self._write_files if self._whole_files else self._write_blocks
        digests = copy(plan, directory)
        self._found = encode(plan.models, digests)

    def read_back(self) -> Any:
        """Return what ``write`` has found."""
        return self._found

    def merge(self, plan: DirectoryPlan, receipts: Sequence[Any], directory: Path) -> Digests:  # noqa: ARG002
        """Return the sum of all shares."""
        return add_up(plan, receipts)

    def _write_blocks(self, plan: DirectoryPlan, directory: Path) -> Digests:
        """An equal share of the bytes of each model."""
        digests: Digests = {}
        for model in plan.models:
            with contextlib.ExitStack() as files:
                writers = [
                    files.enter_context(SafetensorsFileWriter.open_existing(directory, file))
                    for file in model.weights.files
                ]
                source = self._sources[model.model]
                # threads=1: the process trains meanwhile, and torch's threads are the training's.
                digests[model.model] = copy_blocks(source, writers, part=self._rank, parts=self._size, threads=1)
                # Here, since each host has a cache of its own; no other rank could make these blocks durable.
                for writer in writers:
                    writer.sync()
        return digests

    def _write_files(self, plan: DirectoryPlan, directory: Path) -> Digests:
        """Some of the files, all of each."""
        digests: Digests = {model.model: {} for model in plan.models}
        for model, file in deal_files(plan, self._size)[self._rank]:
            with create_file(directory, file) as writer:
                digests[model] |= copy_blocks(self._sources[model], [writer], threads=1)
                writer.sync()
        return digests
