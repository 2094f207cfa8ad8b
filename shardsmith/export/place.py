"""Where an export is written: a directory of this machine, or one in an object store, which files enter whole."""

from __future__ import annotations

import contextlib
from pathlib import Path

from shardsmith.formats.safetensors_files.plan import FilePlan
from shardsmith.formats.safetensors_files.upload import SafetensorsUpload
from shardsmith.formats.safetensors_files.writer import SafetensorsFileWriter
from shardsmith.ground.commit import Attempt, require_space, writing
from shardsmith.ground.layout import temporary_path
from shardsmith.ground.object_store import PART_BYTES
from shardsmith.ground.open_file import open_file
from shardsmith.ground.remote_export import ClaimedDirectory, RemoteDirectory
from shardsmith.ground.remote_path import RemotePath
from shardsmith.hf.directory import DirectoryPlan


def begin_directory(target: Path) -> Attempt | RemoteDirectory:
    """Begin to make it, on a disk or in an object store. Raises TargetExistsError, WriteError."""
    if not isinstance(target, RemotePath):
        return Attempt(target)
    with writing(target, "beginning"):
        return RemoteDirectory(target)


def place_of_files(target: Path, attempt_id: str) -> Path:
    """Return where every rank writes its files of what ``begin_directory`` has begun on rank 0."""
    if isinstance(target, RemotePath):
        return ClaimedDirectory.of(target, attempt_id)
    return temporary_path(target, attempt_id)


def begin_export(plan: DirectoryPlan, nbytes: int) -> Attempt | RemoteDirectory:
    """Begin to make a directory. For a store, its folder here holds the weight files, sparse but for their headers.

    Args:
        plan: The directory.
        nbytes: Of all that will be written on its file system.

    Raises:
        TargetExistsError, WriteError: it cannot be made.
    """
    attempt = begin_directory(plan.output)
    try:
        if isinstance(attempt, RemoteDirectory):
            for file in weight_files(plan):
                # Here they only describe the file for ``check_directory``; the ranks upload the contents.
                SafetensorsFileWriter.create(attempt.directory, file).close()
                attempt.put.add(file.name)
        else:
            require_space(attempt.directory, nbytes)
    # Also for KeyboardInterrupt: nobody else knows of this attempt yet.
    except BaseException:
        attempt.abandon()
        raise
    return attempt


def create_file(directory: Path, file: FilePlan) -> SafetensorsFileWriter | SafetensorsUpload:
    """Begin a file that one rank writes alone, in the order of its tensors. Raises TargetExistsError, WriteError."""
    if isinstance(directory, ClaimedDirectory):
        return SafetensorsUpload(directory, file)
    return SafetensorsFileWriter.create(directory, file)


def fetch_weights(plan: DirectoryPlan, attempt: RemoteDirectory) -> None:
    """Fill the sparse weight files with what is in the store, so that the directory can be loaded here.

    Raises:
        WriteError, StorageError: there is no room here, or the store cannot be read.
    """
    # Before the download: the sparse files take up hardly anything yet.
    require_space(attempt.directory, plan.nbytes)
    buffer = memoryview(bytearray(PART_BYTES))
    for file in weight_files(plan):
        with (
            writing(attempt.directory / file.name, "fetching"),
            contextlib.closing(open_file(attempt.target / file.name)) as source,
            (attempt.directory / file.name).open("r+b") as copy,
        ):
            source.expect([(0, source.size)])
            while count := source.read_at(buffer, copy.tell()):
                copy.write(buffer[:count])


def weight_files(plan: DirectoryPlan) -> list[FilePlan]:
    """Return the files of weights of a directory."""
    return [file for model in plan.models for file in model.weights.files]


def deal_files(plan: DirectoryPlan, size: int) -> list[list[tuple[str, FilePlan]]]:
    """For each rank the models and files that it writes. The same on every rank."""
    files = [(model.model, file) for model in plan.models for file in model.weights.files]
    owned: list[list[tuple[str, FilePlan]]] = [[] for _ in range(size)]
    for i, file in enumerate(files):
        # Neighbouring files go to one rank; with fewer files than ranks the owners are spread over the hosts.
        owned[i * size // len(files)].append(file)
    return owned
