"""Steps of a run on the hosts' own disks, from where they go to an object store in the background."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from shardsmith.errors import ShardsmithError, UsageError
from shardsmith.ground.commit import place_file
from shardsmith.ground.host_folder import HostFolder
from shardsmith.ground.layout import CACHE_OF_FILE, step_name
from shardsmith.ground.ranks import Ranks
from shardsmith.ground.remote_commit import attempt_of_any
from shardsmith.ground.remote_path import RemotePath
from shardsmith.manifest.checkpoints import committed_steps, set_later_aside
from shardsmith.manifest.retention import Retention
from shardsmith.run_state.resumption import Find
from shardsmith.run_state.step_upload import files_of, upload_step

from .background import logged
from .step_folder import StepFolder, prepare

if TYPE_CHECKING:
    from .hook import Hook
    from .options import SaveWriting

log = logging.getLogger(__name__)

_MOST_WAITING = 2
"""Uploads that are not done: a save waits while there are so many, so that a slow store does not fill the disk."""
_MOST_OWED = 3
"""Steps whose upload has failed that are kept on the disk and tried again, with the one that comes next."""
Where = Literal["local", "store", "upload"]


class LocalCache:
    """The steps of one run on local disks. Make it on all ranks at the same point; communicates.

    Attributes:
        folder: Where they are, and which ranks see the same disk.
    """

    @classmethod
    def of(cls, hook: Hook, writing: SaveWriting, keep: Retention | None) -> Self | None:
        """Return the cache that the options of a hook ask for, if they do. Args and errors as in the constructor."""
        store = hook.parts.directory
        if writing.local_cache is None or not isinstance(store, RemotePath):
            return None
        return cls(hook, Path(writing.local_cache).absolute(), store, (writing.keep_local, keep), writing.timeout_secs)

    def __init__(
        self,
        hook: Hook,
        path: Path,
        store: RemotePath,
        keep: tuple[Retention | None, Retention | None],
        timeout_secs: float,
    ) -> None:
        """Find out which ranks share a disk, and remove what dead attempts left there.

        Args:
            hook: Whose steps these are.
            path: The folder on each host.
            store: Where the steps go.
            keep: What is retained in the folder, and in the store.
            timeout_secs: How long an upload may wait for a rank.

        Raises:
            RankFailedError, UsageError, WriteError: the folder cannot be used.
        """
        self._hook = hook
        self._store = store
        # one for each thread
        self._main_ranks, self._ranks = Ranks(timeout_secs), Ranks(timeout_secs)
        self.folder = HostFolder(path, self._main_ranks)
        self._main_ranks.gather("preparing the local disks", self._prepare)
        self._local_steps, self._store_steps = (StepFolder(*of) for of in zip((path, store), keep, strict=True))
        self._owed: set[int] = set()  # steps that are to be uploaded; rank 0 decides by it
        self._running: deque[Future[None]] = deque()
        self._thread = ThreadPoolExecutor(1, "shardsmith-upload")

    def _prepare(self) -> None:
        if not self.folder.is_leader:
            return
        path, mark = self.folder.path, self.folder.path / CACHE_OF_FILE
        of = mark.read_text() if mark.is_file() else "another run" if committed_steps(path) else str(self._store)
        if of != str(self._store):
            raise UsageError(
                f"local_cache={str(path)!r}: it holds steps of {of}, and this run saves to {self._store}: give each "
                "run a folder of its own, or delete this one"
            )
        prepare(path, is_leader=True)
        if not mark.is_file():
            place_file(mark, str(self._store).encode())

    def make_room(self) -> None:
        """Wait until few enough uploads are under way for another step. No communication."""
        while len(self._running) >= _MOST_WAITING:
            wait([self._running.popleft()])

    def add(self, step: int) -> None:
        """Upload a step that was committed here, when those before it are done. All ranks, in the same order."""
        self._owed.add(step)
        self._running.append(self._thread.submit(self._upload))

    def find(self) -> dict[int, list[Find]]:
        """Return the steps that can be loaded, and from where. All ranks; communicates.

        One that is on every disk in full is taken from there; else from the store, into which it is put first if the
        disks together have all of it and the store does not.
        """
        found = self._main_ranks.agree("looking for checkpoints", self._own_steps, self._choose, large=True)
        ways: dict[Where, Callable[[int], Path | None]] = {
            "local": lambda step: self.folder.path / step_name(step),
            "store": lambda step: self._store / step_name(step),
            "upload": self._uploaded,
        }
        return {step: [partial(ways[where], step) for where in places] for step, places in found}

    def resumed(self, step: int | None) -> None:
        """The run goes on from a step: what is later on the disks is set aside, and what the store lacks is uploaded.

        All ranks; communicates. What is later was not wanted, is damaged, or is not whole on the disks of this job.
        """
        later = partial(set_later_aside, self.folder.path, step or 0) if self.folder.is_leader else list
        self._main_ranks.gather("setting aside what is later", later)
        if step is not None and self._main_ranks.lead("looking at the store", lambda: self._is_owed(step)):
            self.add(step)

    def _uploaded(self, step: int) -> Path | None:
        source, target = self.folder.path / step_name(step), self._store / step_name(step)
        try:
            upload_step(source, target, self._main_ranks)
        except ShardsmithError as error:
            log.warning("%s is in parts on the disks of this job, and is passed over: %s", source, error)
            return None
        return target

    def wait(self) -> None:
        """Wait for the uploads; raise what failed in the last. All ranks; no communication."""
        if any(not future.done() for future in self._running):
            log.info("waiting until the last steps in %s are in %s", self.folder.path, self._store)
        running = [*self._running]
        self._running.clear()
        wait(running)
        if running:
            running[-1].result()

    def close(self) -> None:
        """Wait for the uploads, and end the thread; raise what failed in the last. All ranks."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()

    def _upload(self) -> None:
        """Put what is owed into the store, then let retention act. In the thread; all ranks."""
        steps: list[int] = self._ranks.lead("choosing what to upload", lambda: sorted(self._owed))
        for step in steps[:-_MOST_OWED]:  # after a long outage the disk is worth more than old steps
            log.warning("%s is given up: later steps could not be uploaded either", self.folder.path / step_name(step))
            self._owed.discard(step)
        for step in steps[-_MOST_OWED:]:
            source, target = self.folder.path / step_name(step), self._store / step_name(step)
            try:
                if upload_step(source, target, self._ranks) and self._ranks.is_leader:
                    log.info("uploaded %s to %s", source, target)
            except BaseException as error:
                later = "it is tried again after the next save" if step == steps[-1] else "the next step is tried"
                log.error("%s was not uploaded: %s\nIt is on the local disk; %s", source, error, later)
                if step == steps[-1]:
                    raise
                continue
            self._owed.discard(step)
        if self._ranks.is_leader:
            self._store_steps.remove_old(self._hook)
        self.remove_old()

    def remove_old(self) -> None:
        """Let retention act on the local disk; what is not yet uploaded stays."""
        if self.folder.is_leader:
            with logged(f"looking for old steps in {self.folder.path}"):
                self._local_steps.remove_old(self._hook, spare=frozenset(self._owed))

    def _is_owed(self, step: int) -> bool:
        local = files_of(self.folder.path / step_name(step))["attempt"]
        return bool(local) and attempt_of_any(self._store / step_name(step)) is None

    def _own_steps(self) -> dict[str, Any]:
        steps = committed_steps(self.folder.path) if self.folder.is_leader else []
        found = {str(step): files_of(self.folder.path / step_name(step)) for step in steps}
        return {"is_leader": self.folder.is_leader, "steps": found}

    def _choose(self, said: Sequence[dict[str, Any]]) -> list[tuple[int, list[Where]]]:
        """Rank 0: the steps, and from where each is loaded."""
        folders = [of_rank["steps"] for of_rank in said if of_rank["is_leader"]]
        stored = committed_steps(self._store)
        chosen: list[tuple[int, list[Where]]] = []
        for step in sorted({*stored, *(int(step) for folder in folders for step in folder)}):
            where = self._where(step, [folder.get(str(step)) for folder in folders], is_stored=step in stored)
            if where == "local" and step in stored:
                chosen.append((step, ["local", "store"]))  # should the local one be damaged
            elif where is not None:
                chosen.append((step, [where]))
        return chosen

    def _where(self, step: int, held: Sequence[dict[str, Any] | None], *, is_stored: bool) -> Where | None:
        there = [one for one in held if one is not None]
        attempts = {one["attempt"] for one in there}
        if is_stored and attempts != {attempt_of_any(self._store / step_name(step))}:
            return "store"  # those on the disks are of another run
        if len(there) == len(held) and len(attempts) == 1 and all(len(one["files"]) == one["wanted"] for one in there):
            return "local"
        if is_stored:
            return "store"
        names = {name for one in there for name in one["files"]}
        is_whole = len(attempts) == 1 and len(names) == there[0]["wanted"]
        return "upload" if is_whole else None


def find_steps(ranks: Ranks, place: Path, cache: LocalCache | None) -> dict[int, list[Find]]:
    """Return the steps at a place, each with the ways to its directory, the best first. All ranks; communicates."""
    if cache is not None:
        return cache.find()
    steps = ranks.lead("looking for checkpoints", lambda: committed_steps(place))
    return {step: [partial(Path.__truediv__, place, step_name(step))] for step in steps}


def room_in(cache: LocalCache | None) -> HostFolder | None:
    """Return the folder of a cache, if there is one, when there is room for another step. No communication."""
    if cache is None:
        return None
    cache.make_room()
    return cache.folder
