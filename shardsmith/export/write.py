"""Make Hugging Face directories from a checkpoint of any format: plan, write, read back, commit.

No model is built. Threads go through the output front to back; each reads one block from the mapped source, casts it
into its own buffer and writes that to its final place, so memory stays at some blocks. Several processes, where there
are some, take a share of the blocks each; the files are the same, byte for byte.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from shardsmith.errors import CorruptCheckpointError
from shardsmith.export.block_copy import copy_blocks
from shardsmith.export.check import ExportCheck, check_export, compare_read_back, read_back
from shardsmith.export.digest_shares import add_up, encode
from shardsmith.export.place import begin_export, create_file, deal_files, place_of_files, weight_files
from shardsmith.export.plan import ExportPlan
from shardsmith.formats.by_path import KnownCheckpoint
from shardsmith.formats.safetensors_files.writer import SafetensorsFileWriter
from shardsmith.ground.commit import Attempt, sweep
from shardsmith.ground.remote_export import ClaimedDirectory, RemoteDirectory
from shardsmith.ground.torchrun.team import Alone, Team
from shardsmith.hf.completion import complete_directory
from shardsmith.hf.directory_check import check_directory
from shardsmith.manifest.checkpoints import find_damage
from shardsmith.manifest.companion import find_folder_damage
from shardsmith.tensors.digest import Digest

Texts = dict[str, dict[str, str]]
"""Digests, or shares of them, by model and tensor, as JSON has them."""


def write_directories(
    plans: Sequence[ExportPlan],
    progress: Callable[[int], None] | None = None,
    *,
    team: Team | None = None,
    threads: int | None = None,
) -> list[ExportCheck]:
    """Write planned directories of one checkpoint and publish them when all of them are on disk.

    The first one appears last, so whoever sees it can rely on the others. The plans' sources are closed in the end.
    Call it within ``hold(checkpoint)``, and plan there too, if something might remove the checkpoint meanwhile.

    Args:
        plans: One a directory.
        progress: Called from several threads with the number of bytes of weights just written.
        team: All ranks that call it, with equal plans, to divide the work. Communicates through the store.
        threads: Of this process; None: as many as are of use.

    Returns:
        What was checked of each directory; on rank 0 only.

    Raises:
        CorruptCheckpointError: the checkpoint's bytes are not those that were saved, or what was written is not what
            was to be written.
        WriteError: writing failed. The first output does not exist, and nothing else was touched. Another one exists,
            complete, only if it was visible before one that could not be made so.
        RankFailedError: one of these, with several ranks, on all of them.
    """
    with contextlib.ExitStack() as unfinished:
        # Before the job's own: the stack ends in reverse order, so
        # the attempts are deleted first and the sources closed last.
        for plan in plans:
            unfinished.callback(plan.close)
        job = _Job(plans, progress, team or Alone(), threads, unfinished)
        job.make_files()
        written = job.write()
        read = job.read_back()
        return job.commit(written, read)


def verify_source(checkpoint: KnownCheckpoint, part: int = 0, parts: int = 1) -> None:
    """Raise CorruptCheckpointError if a file of a checkpoint with recorded hashes has changed. Others pass.

    Args:
        checkpoint: The checkpoint, whose format is known.
        part: Which share of the files to look at.
        parts: Into how many shares.
    """
    path, manifest = checkpoint.path, checkpoint.manifest
    if checkpoint.is_ours:
        refuse_damage(path, find_damage(path, part=part, parts=parts, manifest=manifest))
    elif manifest is not None:
        damage = find_folder_damage(path, weights_only=True, part=part, parts=parts, manifest=manifest)
        refuse_damage(path, damage)


def refuse_damage(checkpoint: Path, damage: Sequence[str]) -> None:
    """Raise CorruptCheckpointError if ``find_damage`` has found any."""
    if damage:
        lines = "\n  ".join(damage)
        advice = "Nothing was written. Copy these files again, or take another step."
        raise CorruptCheckpointError(checkpoint, f"is damaged\n  {lines}\n{advice}")


class _Job:
    """One call of ``write_directories`` on this rank."""

    def __init__(
        self,
        plans: Sequence[ExportPlan],
        progress: Callable[[int], None] | None,
        team: Team,
        threads: int | None,
        unfinished: contextlib.ExitStack,
    ) -> None:
        self.plans = plans
        self.team = team
        self._progress = progress
        self._threads = threads
        self._unfinished = unfinished
        self._attempts: list[Attempt | RemoteDirectory] = []
        self._directories: list[Path] = []

    def make_files(self) -> None:
        """Rank 0 makes all files, at their full size, in directories that are not visible yet."""
        attempts = self.team.lead("making the files", self._make_files)
        outputs = [plan.directory.output for plan in self.plans]
        # Only rank 0 holds the attempts; their ids tell the others where to write.
        self._directories = [place_of_files(path, id_) for path, id_ in zip(outputs, attempts, strict=True)]

    def write(self) -> list[Texts]:
        """Each rank verifies and copies its share; on rank 0, for each plan, the digests of whole tensors."""
        shares = self.team.gather("writing the weights", self._write)
        return self._merged(shares)

    def read_back(self) -> list[Texts]:
        """Each rank reads its share of the files; on rank 0 the digests of what is in them."""
        return self._merged(self.team.gather("reading back what was written", self._read_back))

    def commit(self, written: list[Texts], read: list[Texts]) -> list[ExportCheck]:
        """Rank 0 compares, completes the directories and makes them visible."""
        checks: list[ExportCheck] = []
        self.team.lead("committing", lambda: checks.extend(self._commit(written, read)))
        return checks

    def _make_files(self) -> list[str]:
        for parent in {plan.directory.output.parent for plan in self.plans}:
            # Of dead attempts: they may take up the space that is asked for next.
            sweep(parent)
        for plan in self.plans:
            # Of all directories: the files are sparse, so that what was planned before is not in use yet.
            nbytes = sum(plan.directory.nbytes for plan in self.plans)
            attempt = begin_export(plan.directory, nbytes)
            # At once, so that a failure at the next directory deletes this one, too.
            self._unfinished.push(attempt)
            self._attempts.append(attempt)
            for file in weight_files(plan.directory) if isinstance(attempt, Attempt) else ():
                # At full size before anybody writes: each rank writes to its own places in the same files.
                SafetensorsFileWriter.create(attempt.directory, file).close()
        return [attempt.id for attempt in self._attempts]

    def _write(self) -> list[dict[str, str]]:
        checkpoints = {plan.checkpoint: plan.known for plan in self.plans if plan.verify}.values()
        # Hashing and copying read the same files at the same time: what one has read, the other finds in memory.
        with ThreadPoolExecutor(1, "shardsmith-verify") as pool:
            verified = [pool.submit(verify_source, known, self.team.rank, self.team.size) for known in checkpoints]
            written = [
                encode(plan.directory.models, dict(self._copy(plan, directory)))
                for plan, directory in zip(self.plans, self._directories, strict=True)
            ]
            # After the copy: a damaged source is reported before anything becomes visible.
            for verification in verified:
                verification.result()
        return written

    def _copy(self, plan: ExportPlan, directory: Path) -> Iterator[tuple[str, Mapping[str, Digest]]]:
        """Write and fsync this rank's share of each model in turn."""
        if isinstance(directory, ClaimedDirectory):
            yield from self._put(plan, directory).items()
            return
        for model in plan.directory.models:
            with contextlib.ExitStack() as files:
                writers = [
                    files.enter_context(SafetensorsFileWriter.open_existing(directory, file))
                    for file in model.weights.files
                ]
                digests = copy_blocks(
                    plan.sources[model.model],
                    writers,
                    self._progress,
                    part=self.team.rank,
                    parts=self.team.size,
                    threads=self._threads,
                )
                # By each rank: ``fsync`` of another host would not cover its pages.
                for writer in writers:
                    writer.sync()
            yield model.model, digests

    def _put(self, plan: ExportPlan, directory: ClaimedDirectory) -> dict[str, dict[str, Digest]]:
        """Upload some of the files, all of each, by the models that they belong to."""
        digests: dict[str, dict[str, Digest]] = {model.model: {} for model in plan.directory.models}
        # An upload has no places to write to: each file is one rank's.
        for model, file in deal_files(plan.directory, self.team.size)[self.team.rank]:
            with create_file(directory, file) as writer:
                digests[model] |= copy_blocks(plan.sources[model], [writer], self._progress, threads=1)
                writer.sync()
        return digests

    def _read_back(self) -> list[dict[str, str]]:
        rank, size = self.team.rank, self.team.size
        return [
            encode(
                plan.directory.models,
                {m.model: read_back(m, directory, rank, size) for m in plan.directory.models if plan.verify},
            )
            for plan, directory in zip(self.plans, self._directories, strict=True)
        ]

    def _merged(self, shares: Sequence[list[dict[str, str]]]) -> list[Texts]:
        """For each plan the sums over all ranks."""
        return [
            _texts(add_up(plan.directory, [share[i] for share in shares]))
            for i, plan in enumerate(self.plans)
            if shares
        ]

    def _commit(self, written: list[Texts], read: list[Texts]) -> list[ExportCheck]:
        made = list(zip(self.plans, self._attempts, written, read, strict=True))
        for plan, attempt, digests, found in made:
            # All directories are compared, completed and checked before the first becomes visible.
            if plan.verify:
                compare_read_back(attempt.directory, digests, found)
        checks = [
            check_export(plan, attempt.directory, digests, written, self.plans) for plan, attempt, digests, _ in made
        ]
        sizes = [
            complete_directory(plan.directory, attempt.directory, _digests(texts)) for plan, attempt, texts, _ in made
        ]
        for plan, attempt, _, _ in made:
            check_directory(plan.directory, attempt.directory)
        # The first of them last: who sees it can rely on the others.
        for (_, attempt, _, _), files in reversed(list(zip(made, sizes, strict=True))):
            attempt.commit(files)
        return checks


def _texts(digests: Mapping[str, Mapping[str, Digest]]) -> Texts:
    return {model: {name: str(digest) for name, digest in found.items()} for model, found in digests.items()}


def _digests(texts: Texts) -> dict[str, dict[str, Digest]]:
    return {model: {name: Digest.parse(text) for name, text in found.items()} for model, found in texts.items()}
