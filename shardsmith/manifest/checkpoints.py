"""The checkpoints of a run directory: which are there, whether they are sound, and how they go.

Only committed checkpoints of ours count: a directory named ``step-<n>`` that holds our ``metadata.json``.
"""

from __future__ import annotations

import contextlib
import logging
import os
import stat
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

import xxhash

from shardsmith.errors import CheckpointError, CheckpointNotFoundError, IncompleteCheckpointError, UsageError
from shardsmith.ground import layout, remote_commit
from shardsmith.ground.open_file import open_file
from shardsmith.ground.progress import advance
from shardsmith.ground.remote_export import is_claim
from shardsmith.ground.remote_path import RemotePath
from shardsmith.manifest.compared import ComparedBytes
from shardsmith.manifest.metadata import CheckpointMetadata, FileRecord, has_manifest, read_metadata

log = logging.getLogger(__name__)

_READ_BYTES = 1 << 20


def committed_steps(directory: Path, mark: str = layout.METADATA_FILE) -> list[int]:
    """Steps of the checkpoints in a run directory, ascending. An absent directory has none.

    Args:
        directory: The run directory.
        mark: The file that makes a ``step-<n>`` one of ours.
    """
    if isinstance(directory, RemotePath):
        return remote_commit.committed_steps(directory, mark)
    if not directory.is_dir():
        return []
    marked = (path for path in directory.iterdir() if os.path.isfile(path / mark))  # without an error if it has one
    steps = (layout.parse_step(path.name) for path in marked)
    return sorted(step for step in steps if step is not None)


def why_unreadable(directory: Path) -> str | None:
    """Return why something with the name of a directory is none that can be read; None if it is one."""
    try:
        os.scandir(directory).close()
        os.stat(f"{directory}/.")  # what may be listed may yet not be entered
    except FileNotFoundError:
        return "is a link that leads nowhere" if directory.is_symlink() else "is not there"
    except NotADirectoryError:
        return "is no directory"
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    return None


def unreadable_steps(directory: Path, newest: int = -1) -> dict[Path, str]:
    """Return what is named like a step after ``newest`` and is no directory that can be read, and why."""
    if isinstance(directory, RemotePath) or not directory.is_dir():
        return {}
    paths = {path: layout.parse_step(path.name) for path in sorted(directory.iterdir())}
    later = (path for path, step in paths.items() if step is not None and step > newest)
    return {path: reason for path in later if (reason := why_unreadable(path))}


def loadable_steps(directory: Path) -> list[int]:
    """Return the committed steps, ascending, to load one of them.

    Raises:
        IncompleteCheckpointError: there is none, but names of steps that cannot be read, as of links to a disk that is
            not there: a run that began anew beside them would be a surprise.
    """
    steps = committed_steps(directory)
    if not steps and (found := unreadable_steps(directory)):
        lines = "\n  ".join(f"{path.name} {reason}" for path, reason in found.items())
        advice = "Nothing was loaded. Make them readable, or remove or rename them to start anew."
        raise IncompleteCheckpointError(directory, f"holds no checkpoint that can be read\n  {lines}\n{advice}")
    return steps


def only_step(directory: Path, steps: Sequence[int], step: int) -> int:
    """Return a step if it is one of the committed ones. Raises CheckpointNotFoundError."""
    if step not in steps:
        there = ", ".join(map(layout.step_name, steps)) or "none"
        message = f"is not a committed checkpoint; there: {there}"
        raise CheckpointNotFoundError(directory / layout.step_name(step), message)
    return step


def refuse_within_step(directory: Path) -> None:
    """Raise UsageError if a directory for steps is itself one of a committed step, or lies in one."""
    if isinstance(directory, RemotePath):
        # A store has no directories that could be looked into: the name alone decides.
        inside = any(layout.parse_step(name) is not None for name in directory.parts)
        if inside:
            raise UsageError(f"{directory} is in the directory of one step: give the one that the steps are in")
        return
    for place in (directory.absolute(), *directory.absolute().parents):
        marks = (layout.METADATA_FILE, layout.PROVENANCE_FILE)
        if layout.parse_step(place.name) is not None and any((place / mark).is_file() for mark in marks):
            where = "is" if place == directory.absolute() else "is in"
            raise UsageError(
                f"{directory} {where} the directory of one step, {place}, which is written and deleted as a whole: "
                f"give the directory that the steps are in, {place.parent}, or one beside it"
            )


def find_damage(
    checkpoint: Path,
    *,
    contents: bool = True,
    unread: str | tuple[str, ...] = (),
    part: int = 0,
    parts: int = 1,
    manifest: CheckpointMetadata | None = None,
    compared: ComparedBytes | None = None,
) -> list[str]:
    """Return what is wrong with the files of a committed checkpoint, one line each; empty if nothing is.

    Args:
        checkpoint: A committed ``step-<n>``.
        contents: Also read every file and compare its XXH3-128; otherwise only presence and size.
        unread: Files whose names end so, or in one of these ways, are not read all the same.
        part: Which share of the files to look at, so that ranks can divide them. No communication.
        parts: Into how many shares.
        manifest: Its metadata.json, if that was read already.
        compared: Where to count the bytes that were compared.
    """
    try:
        metadata = manifest or read_metadata(checkpoint)
    except CheckpointError as error:
        return [str(error)]
    if compared is not None:
        compared.add(checkpoint / layout.METADATA_FILE, metadata.sealed)
    if metadata.step != (named := step_in_name(checkpoint, metadata.step)):
        return [f"{layout.METADATA_FILE} is of step {metadata.step}, not of step {named}: it was copied or renamed"]
    files = metadata.files
    # Sorted, so that all ranks divide the files in the same way without a message.
    chosen = sorted(files)[part::parts]
    # Before any file is opened: a name such as ../x, or one behind a link, would be read.
    if foreign := [name for name in chosen if not _is_in(checkpoint, name)]:
        return [f"{name!r}: is not the name of a file in it" for name in foreign]
    with ThreadPoolExecutor(min(len(chosen), os.cpu_count() or 1) or 1, "shardsmith-verify") as pool:
        is_read = {name: contents and not name.endswith(unread) for name in chosen}
        problems = pool.map(
            lambda name: file_damage(checkpoint / name, files[name], contents=is_read[name], compared=compared), chosen
        )
        return [f"{name}: {problem}" for name, problem in zip(chosen, problems, strict=True) if problem]


def step_in_name(checkpoint: Path, default: int) -> int:
    """Return the step that a directory is named for, wherever it is reached from; ``default`` if its name says none."""
    named = layout.parse_step(checkpoint.resolve().name)
    return default if named is None else named


def find_foreign_files(checkpoint: Path, manifest: CheckpointMetadata) -> list[str]:
    """Return what lies in a committed checkpoint and does not belong to it, one line each."""
    known = {*manifest.files, layout.METADATA_FILE, layout.COMPANION}
    folders = sorted({str(folder) for name in known for folder in PurePosixPath(name).parents})
    found = (str(path.relative_to(checkpoint)) for folder in folders for path in (checkpoint / folder).iterdir())
    known |= {*folders}
    return [f"{name!r}: is not one of its files" for name in sorted(found) if name not in known and not is_claim(name)]


def find_lost_manifest(directory: Path) -> list[str]:
    """Return a line for each manifest of ours that is gone although a file beside it shows that it was there.

    Args:
        directory: Any directory; a trainer's folder, too, with what is left of our directory in it.
    """
    # In a store a step exists once its manifest does: without one there may be the objects of an attempt.
    if isinstance(directory, RemotePath):
        return []
    ours = directory / layout.COMPANION
    marks = ((directory, layout.BOX_INDEX_FILE), (ours, layout.BOX_INDEX_FILE), (ours, layout.FOLDER_FILE))
    lost = {place: mark for place, mark in marks if os.path.lexists(place / mark) and not has_manifest(place)}
    return [
        f"{(place / layout.METADATA_FILE).relative_to(directory)}: is missing, which Shardsmith wrote beside {mark}; "
        "without it nothing here can be verified, and no run resumes from it"
        for place, mark in lost.items()
    ]


def _is_in(checkpoint: Path, name: str) -> bool:
    """Whether a name from a manifest is that of something in the checkpoint, and not reached through a link."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or str(path) != name:
        return False
    return not any((checkpoint / folder).is_symlink() for folder in path.parents[:-1])


def set_aside_unfinished(directory: Path, newest: int, mark: str = layout.METADATA_FILE) -> dict[Path, str]:
    """Rename each ``step-<n>`` after ``newest`` that has lost its manifest, so that its step can be saved again.

    An ``rm -rf`` or ``cp -r`` that was interrupted leaves such a directory, a disk that is missing a link that leads
    nowhere. Only next to complete steps of ours: in a folder without any it may be somebody else's. Rank 0 calls it.

    Returns:
        Where they are now, and why each was no checkpoint.
    """
    if isinstance(directory, RemotePath):
        return {}  # there a step without a manifest is none, and nothing stands in the way of the next
    complete = committed_steps(directory, mark)
    steps = {path: layout.parse_step(path.name) for path in directory.iterdir()} if complete else {}
    moved = {}
    for path, step in sorted(steps.items()):
        if step is not None and step > newest and not os.path.isfile(path / mark):
            reason = why_unreadable(path) or f"has no {mark}"
            moved[set_aside(path)] = reason
    return moved


def set_aside_unreadable(directory: Path, newest: int) -> None:
    """Rename what ``unreadable_steps`` finds, so that these steps can be saved, and say so in the log. Rank 0."""
    for path, reason in unreadable_steps(directory, newest).items():
        log.warning("%s %s; it was set aside as %s, so that its step can be saved", path, reason, set_aside(path))


def set_aside(checkpoint: Path) -> Path:
    """Rename a damaged checkpoint so that it counts no more and its step can be saved again; the new path."""
    if isinstance(checkpoint, RemotePath):
        return remote_commit.set_aside(checkpoint, "damaged")
    # A rename and no delete: the files may be the only copy, and a person may still recover them.
    aside = layout.damaged_path(checkpoint, layout.new_attempt_id())
    checkpoint.rename(aside)
    return aside


def set_later_aside(directory: Path, step: int) -> list[str]:
    """Rename the checkpoints that are later than a step that a run goes back to; the new names. Nothing is deleted."""
    moved = []
    for later in committed_steps(directory):
        if later > step:
            path = directory / layout.step_name(later)
            if isinstance(path, RemotePath):
                aside: Path = remote_commit.set_aside(path, "superseded")
            else:
                aside = layout.superseded_path(path, layout.new_attempt_id())
                path.rename(aside)
            log.warning(
                "%s is later than step %d, from which the run goes on: it was set aside as %s", path, step, aside
            )
            moved.append(aside.name)
    return moved


def hash_file(path: Path) -> str:
    """XXH3-128 of a file's bytes, 32 hexadecimal digits. Raises OSError."""
    return _hashed(path)[0]


def _hashed(path: Path) -> tuple[str, int]:
    """The hash of a file's bytes, and how many were read."""
    digest = xxhash.xxh3_128()
    with contextlib.closing(open_file(path)) as file:
        # Lets a file in an object store be requested ahead; on a disk the system reads ahead.
        file.expect([(0, file.size)])
        buffer, read = memoryview(bytearray(_READ_BYTES)), 0
        # Read and not mapped: a page that a bad disk cannot read would end the process.
        while count := file.read_at(buffer, read):
            digest.update(buffer[:count])
            advance(count)
            read += count
    return digest.hexdigest(), read


def file_damage(
    path: Path, expected: FileRecord, *, contents: bool = True, compared: ComparedBytes | None = None
) -> str | None:
    """Return what is wrong with one file, or None; see ``find_damage``."""
    try:
        # lstat: a link in the place of a file is damage, even if it leads to the right bytes.
        status = path.lstat()
        if not stat.S_ISREG(status.st_mode):
            return f"is not a regular file ({stat.filemode(status.st_mode)})"
        # The size first: it costs no read, and finds a file that was cut.
        if status.st_size != expected.size:
            return f"has {status.st_size} bytes, expected {expected.size}"
        if contents:
            found, read = _hashed(path)
            if found != expected.xxh3_128:
                return f"has changed since it was written: XXH3-128 {found}, expected {expected.xxh3_128}"
            if compared is not None:
                compared.add(path, read)
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    except ValueError as error:  # a name with a zero byte
        return f"cannot be read: {error}"
    return None
