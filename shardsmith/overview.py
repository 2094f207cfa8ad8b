"""A run's folder as data: its steps as checkpoints and exports, whether they are sound, what is left over."""

from __future__ import annotations

import contextlib
import json
import math
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from shardsmith.checking.arguments import checked
from shardsmith.checking.types import AnyPath, AsAnyPath
from shardsmith.errors import CheckpointError, CheckpointNotFoundError
from shardsmith.formats.by_path import HUGGINGFACE, UNKNOWN, detect_checkpoint_format, model_names
from shardsmith.ground import layout, remote_commit
from shardsmith.ground.bounded import lines_of
from shardsmith.ground.commit import remove, sweep
from shardsmith.ground.path_advice import reading
from shardsmith.ground.remote_path import RemotePath, as_path
from shardsmith.hf.export_files import find_export_damage
from shardsmith.manifest.checkpoints import (
    committed_steps,
    find_damage,
    find_lost_manifest,
    unreadable_steps,
    why_unreadable,
)
from shardsmith.manifest.companion import companion_of, find_folder_damage, is_complete
from shardsmith.manifest.compared import ComparedBytes, file_sizes
from shardsmith.manifest.metadata import read_metadata
from shardsmith.manifest.retention_note import expected_removals, read_policy

_STEP = re.compile(r"(?P<word>step[-_]|checkpoint[-_]|global_step_?|epoch[-_])?(?P<step>[0-9]{1,18})(?:-ema)?")
"""Names of steps: ours, TorchTitan's, Trainer's, accelerate's, verl's, BAGEL's."""
_OF_TRAINERS = "trainer_state.json"
"""In a folder of Trainer that is to be resumed from, beside weights as an export has them."""
EVENTS_FILE = "events.jsonl"
"""What ``json_lines`` of the hooks writes."""
_NUMBERS = {"step": int, "seconds": float, "seconds_waited": float, "nbytes": int, "ranks": int}
_ASIDE = re.compile(r"\.(?P<target>.+)\.(?P<kind>damaged|superseded)-[0-9a-f]{16}")


@dataclass(frozen=True, slots=True)
class StepSummary:
    """One directory of a step."""

    step: int
    path: str
    """Relative to the run."""
    kind: Literal["checkpoint", "export"]
    format: str
    models: tuple[str, ...]
    """``main``, ``ema``: whose weights are in it."""
    nbytes: int
    """Bytes of all its files."""
    saved_at: float
    """Seconds since 1970."""
    world_size: int | None
    """Ranks that wrote it, where that is recorded."""
    seconds_waited: float | None
    """How long the training waited for it, where the run's ``events.jsonl`` says so."""
    pushed: bool | None
    """Of an export: True if ``events.jsonl`` says that it is on the Hub, False while it is to be; None: not known."""
    is_recorded: bool
    """Whether sizes and hashes of its files are recorded, so that damage can be found."""
    compared: int
    """Bytes of its files that were read and are as recorded; ``verified`` if they are all."""
    problems: tuple[str, ...]
    """What is wrong, one line each; empty if nothing was found."""

    @property
    def health(self) -> str:
        """What is known of its files, in two or three words."""
        if self.problems:
            return "damaged"
        if not self.is_recorded:
            return "nothing recorded to compare with"
        if self.compared:
            return "every byte verified" if self.compared == self.nbytes else "verified in part"
        return "complete"


@dataclass(frozen=True, slots=True)
class Leftover:
    """What an attempt that died, a deletion that was interrupted or a resume has left in the run."""

    path: str
    """Relative to the run."""
    kind: Literal["unfinished", "damaged", "superseded"]
    """``unfinished``: of no use. The others were set aside by a resume and are kept until somebody deletes them."""
    nbytes: int


@dataclass(frozen=True, slots=True)
class RetentionOutlook:
    """What becomes of the steps in one folder when the run saves, or exports, the next one there.

    As things are now: a metric that comes or is corrected before that, or another ``keep=``, changes it. A step that
    somebody reads goes later.
    """

    path: str
    """Of the folder, relative to the run."""
    policy: str
    """``keep=`` of the run that saved there last."""
    removes: tuple[int, ...]
    """Steps that go, ascending."""
    undecided: dict[int, str]
    """Steps of which it cannot be told yet, with what decides: such as a metric, the clock, a ``keep_if``."""


@dataclass(frozen=True, slots=True)
class RunOverview:
    """Result of ``inspect_run``: the steps of a run."""

    path: str
    steps: tuple[StepSummary, ...]
    """Ascending; of one step, the checkpoint first."""
    leftovers: tuple[Leftover, ...]
    verified: bool
    """Whether every byte of every step was read and is as recorded."""
    free: int | None
    """Bytes that are free on the file system; None in an object store, which does not say."""
    retention: tuple[RetentionOutlook, ...]
    """Of each folder whose run has written down what it keeps. Of others nothing is known."""
    unreadable: dict[str, str]
    """Names of steps, relative to the run, that are no directories which can be read, each with the reason."""

    @property
    def problems(self) -> list[str]:
        """One line for each problem of each step, and for each that cannot be read."""
        of_steps = [f"{step.path}: {problem}" for step in self.steps for problem in step.problems]
        return [*of_steps, *(f"{path}: {reason}" for path, reason in self.unreadable.items())]

    def next_save(self, step: StepSummary) -> str:
        """Return what becomes of a step at the next save or export of its folder; "" where that is not known."""
        for folder in self.retention:
            if folder.path == str(Path(step.path).parent):
                if step.step in folder.removes:
                    return "removed"
                return f"open: {folder.undecided[step.step]}" if step.step in folder.undecided else "kept"
        return ""


def is_run(path: Path) -> bool:
    """Return whether a directory is no checkpoint itself, and has steps in it or one level below."""
    # The cheap look first: it lists names, and a format may take opening files.
    return path.is_dir() and any(step_folders(path)) and detect_checkpoint_format(path).name == UNKNOWN


@checked
def inspect_run(path: AnyPath, *, verify: bool = False) -> RunOverview:
    """Summarise every step in a run's folder, or one level below it, as in ``run/checkpoints`` and ``run/hf``.

    Args:
        path: The folder. Links in it are not followed.
        verify: Also read every byte and compare it with the recorded hashes.

    Raises:
        CheckpointNotFoundError: there are no steps.
    """
    run = as_path(path)
    events = read_events(run)
    steps = [_summary(run, step, folder, events, verify=verify) for step, folder in step_folders(run)]
    if not steps:
        raise CheckpointNotFoundError(run, "has no steps, such as step-500 or checkpoint-500, in it or one level below")
    free = None if isinstance(run, RemotePath) else shutil.disk_usage(run).free
    return RunOverview(
        path=str(run),
        steps=tuple(sorted(steps, key=lambda one: (one.step, one.kind, one.path))),
        # Only listed: nothing is deleted or changed by an inspection.
        leftovers=tuple(find_leftovers(run)),
        verified=all(0 < one.compared == one.nbytes for one in steps),
        free=free,
        retention=tuple(_outlooks(run, free)),
        unreadable={
            str(path.relative_to(run)): reason
            for parent in _parents(run)
            for path, reason in unreadable_steps(parent).items()
        },
    )


@checked
def newest_step(path: AsAnyPath, step: int | None = None) -> Path:
    """Return the checkpoint of a step in a run's folder: the newest that is complete, or the one that is asked for.

    Sizes are compared with what is recorded, contents are not. What is half-written is passed over. Exports are taken
    only where there are no checkpoints.

    Raises:
        CheckpointNotFoundError: there is no such step, or none is complete.
    """
    # False sorts before True, so the greatest key is the newest checkpoint, or without any the newest export.
    found: dict[tuple[bool, int], Path] = {}
    refused: dict[int, str] = {}
    for number, folder in step_folders(path):
        # Every step is looked at, also after a complete one: they come in any order.
        if step in (None, number):
            summary = _summary(path, number, folder, (), verify=False)
            if not summary.models or summary.problems:
                refused[number] = (*summary.problems, f"{summary.format}, which has no weights that can be read")[0]
            else:
                found[summary.kind == "checkpoint", number] = folder
    if found:
        return found[max(found)]
    asked = "" if step is None else f" {step}"
    reasons = "".join(f"\n  step {number}: {reason}" for number, reason in sorted(refused.items()))
    there = ", ".join(str(number) for number in sorted({number for number, _ in step_folders(path)})) or "none"
    raise CheckpointNotFoundError(path, f"holds no complete checkpoint of a step{asked}; steps: {there}{reasons}")


def find_leftovers(run: Path) -> Iterator[Leftover]:
    """Yield what may be deleted of a run without loss of a step. Reads names and sizes only.

    Raises:
        CheckpointError: the operating system cannot read the folder.
    """
    if isinstance(run, RemotePath):
        yield from _leftovers(run)
        return
    with reading(run):
        yield from _leftovers(run)


def _leftovers(run: Path) -> Iterator[Leftover]:
    for parent in _parents(run):
        if isinstance(parent, RemotePath):
            # In a store there are no names of attempts: what no manifest refers to is found by its place.
            for place, kind, nbytes in remote_commit.find_remains(parent):
                yield Leftover(str(place.relative_to(run)), kind, nbytes)
            continue
        for entry in sorted(parent.iterdir()):
            aside = _ASIDE.fullmatch(entry.name)
            # A link is nobody's leftover, whatever it is called.
            if not (aside or layout.is_leftover(entry.name)) or not _is_folder(entry):
                continue
            named = aside["kind"] if aside else "unfinished"
            yield Leftover(str(entry.relative_to(run)), named, sum(file_sizes(entry).values()))  # type: ignore[arg-type]


def remove_leftovers(run: Path, leftovers: Iterable[Leftover]) -> list[Leftover]:
    """Delete leftovers, but for those that a process which is alive still writes or deletes; what was deleted.

    Raises:
        WriteError: the file system does not let them be deleted.
    """
    gone = []
    for leftover in leftovers:
        path = run / leftover.path
        if leftover.kind == "unfinished":
            # By the rule for all attempts: one whose process is alive holds a lock and is left alone.
            sweep(_parent_of(path))
        else:
            remove(path)
        # What is there is asked of the disk: somebody may hold it, or have been faster.
        if not path.exists():
            gone.append(leftover)
    return gone


def _parent_of(unfinished: Path) -> Path:
    """The folder of the steps: in a store the files of an attempt lie below its step."""
    is_within = isinstance(unfinished, RemotePath) and _STEP.fullmatch(unfinished.name) is None
    return unfinished.parents[1 if is_within else 0]


def _summary(run: Path, step: int, folder: Path, events: Sequence[Mapping[str, Any]], *, verify: bool) -> StepSummary:
    found = detect_checkpoint_format(folder)
    is_checkpoint = (folder / layout.METADATA_FILE).is_file()  # which may be a Hugging Face directory, too
    # What a trainer resumes from is a checkpoint, even if its weights lie there as an export has them.
    is_export = not is_checkpoint and (
        (folder / layout.PROVENANCE_FILE).is_file()
        or (found.name == HUGGINGFACE and not is_complete(folder) and not (folder / _OF_TRAINERS).is_file())
    )
    # With a problem and not without: an overview must not pass over what lies under a step's name.
    problems = [f"is no checkpoint of a known format: {found.reason}"] if found.name == UNKNOWN else []
    models: tuple[str, ...] = ()
    metadata, read = None, ComparedBytes()
    try:
        models = tuple(model_names(folder))
        if is_complete(folder) or (folder / layout.METADATA_FILE).is_file():
            metadata = read_metadata(companion_of(folder) if is_complete(folder) else folder)
    except CheckpointError as error:
        problems.append(str(error).removeprefix(f"{folder}: "))
    if metadata is not None:
        look = find_folder_damage if is_complete(folder) else find_damage
        problems += look(folder, contents=verify, compared=read)
    else:
        problems += find_lost_manifest(folder)
        if is_export:
            problems += find_export_damage(folder, contents=verify, compared=read)
    sizes = file_sizes(folder)
    return StepSummary(
        step=step,
        path=str(folder.relative_to(run)),
        kind="export" if is_export else "checkpoint",
        format=found.name,
        models=models,
        nbytes=sum(sizes.values()),
        saved_at=_time_of(folder),
        world_size=metadata.world_size if metadata else None,
        seconds_waited=_waited(events, folder.name, "export" if is_export else "save"),
        pushed=_pushed(events, folder) if is_export else None,
        is_recorded=metadata is not None or (folder / layout.PROVENANCE_FILE).is_file(),
        compared=sum(read.of(folder, sizes).values()),
        problems=tuple(problems),
    )


def _outlooks(run: Path, free: int | None) -> Iterator[RetentionOutlook]:
    for folder in _parents(run):
        if (noted := read_policy(folder)) is not None:
            steps = committed_steps(folder, noted.marker)
            # The next step is taken to be as large as the last: some policies ask for free space.
            next_bytes = sum(file_sizes(folder / layout.step_name(steps[-1])).values()) if steps else 0
            room = None if free is None else free - next_bytes
            found = expected_removals(noted, steps, folder, room)
            yield RetentionOutlook(str(folder.relative_to(run)), noted.text, found.removed, found.undecided)


def read_events(run: Path) -> list[dict[str, Any]]:
    """Return the events in a run's ``events.jsonl``, oldest first; empty without that file.

    Each has at least ``kind``, ``step``, ``path``, ``seconds``, ``seconds_waited``, ``nbytes``, ``ranks``, ``error``.
    """
    found = []
    for line in lines_of(run / EVENTS_FILE):
        with contextlib.suppress(ValueError, KeyError, TypeError):  # a line that was cut off by a kill, or not ours
            event = json.loads(line)
            numbers = {name: kind(event[name]) for name, kind in _NUMBERS.items()}
            # Infinity and NaN, which Python's JSON takes, would break charts and sums.
            if not all(map(math.isfinite, numbers.values())):
                continue
            texts = {name: str(event[name]) for name in ("kind", "path")}
            found.append({**event, **numbers, **texts, "error": event["error"] and str(event["error"])})
    return found


def _waited(events: Sequence[Mapping[str, Any]], name: str, kind: str) -> float | None:
    """Seconds that the training waited for a step; the last of several saves counts."""
    found = [one for one in events if one["kind"] == kind and one["error"] is None and Path(one["path"]).name == name]
    return found[-1]["seconds_waited"] if found else None


def _pushed(events: Sequence[Mapping[str, Any]], export: Path) -> bool | None:
    if layout.push_mark(export).is_file():
        return False
    told = (one for one in events if one["kind"] == "push" and one["error"] is None)
    return True if any(Path(one["path"]).name == export.name for one in told) else None


def step_folders(run: Path) -> Iterator[tuple[int, Path]]:
    """Directories of steps in a folder and one level below; in any order."""
    for parent in _parents(run):
        for entry in parent.iterdir():
            match = _STEP.fullmatch(entry.name)
            if match is None or not _is_folder(entry):
                continue
            if isinstance(entry, RemotePath) and not _has_mark(entry):
                continue  # there a step exists once its last object does
            # A bare number may be the name of anything, so it must be a checkpoint, too.
            if match["word"] or detect_checkpoint_format(entry).name != UNKNOWN:  # a number may be of anything
                yield int(match["step"]), entry


def _parents(run: Path) -> list[Path]:
    """The folder and those in it that are no steps; none if it is no folder."""
    if not run.is_dir():
        return []
    below = [entry for entry in sorted(run.iterdir()) if _is_folder(entry)]
    # Not below steps: their folders are parts of them. Names with a dot are attempts and what was set aside.
    return [run, *(entry for entry in below if not _STEP.fullmatch(entry.name) and not entry.name.startswith("."))]


def _is_folder(entry: Path) -> bool:
    """Whether it is a directory, no link to one, and can be read."""
    if isinstance(entry, RemotePath):
        return entry.is_dir()
    return why_unreadable(entry) is None and not entry.is_symlink()


def _has_mark(folder: Path) -> bool:
    return (folder / layout.METADATA_FILE).is_file() or (folder / layout.PROVENANCE_FILE).is_file()


def _time_of(folder: Path) -> float:
    """When it was written, in seconds since 1970; in a store only objects have times."""
    if not isinstance(folder, RemotePath):
        return folder.stat().st_mtime
    manifest = folder / layout.METADATA_FILE
    return (manifest if manifest.is_file() else folder / layout.PROVENANCE_FILE).stat().st_mtime
