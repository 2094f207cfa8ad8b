"""Steps of a run on the hosts' own disks, from where they go to an object store in the background."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from shardsmith.errors import ShardsmithError, StorageError, TargetExistsError, UsageError
from shardsmith.ground.commit import place_file, withdraw_file
from shardsmith.ground.host_folder import HostFolder
from shardsmith.ground.layout import ALONE_SINCE_FILE, CACHE_OF_FILE, step_name
from shardsmith.ground.ranks import Ranks
from shardsmith.ground.remote_commit import attempt_of_any
from shardsmith.ground.remote_path import RemotePath
from shardsmith.manifest.checkpoints import committed_steps, loadable_steps, set_later_aside
from shardsmith.manifest.retention import Retention
from shardsmith.run_state.resumption import Find
from shardsmith.run_state.step_upload import files_of, upload_step

from .background import logged
from .cached_steps import Where, choose_places, find_other_run
from .step_folder import StepFolder, prepare

if TYPE_CHECKING:
    from .hook import Hook
    from .options import SaveWriting

log = logging.getLogger(__name__)

_MOST_WAITING = 2
"""Uploads that are not done: a save waits while there are so many, so that a slow store does not fill the disk."""
_MOST_OWED = 3
"""Steps whose upload has failed that are kept on the disk and tried again, with the one that comes next."""


class LocalCache:
    """The steps of one run on local disks. Make it on all ranks at the same point; communicates.

    Attributes:
        folder: Where they are, and which ranks see the same disk.
        alone_since: The step from which the run went on although the store could not be asked; None once it was, and
            had nothing later. A file in the folder says so, too, as another process may be the one to ask.
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
        self.alone_since: int | None = None
        self._owed: set[int] = set()  # steps that are to be uploaded; rank 0 decides by it
        self._running: deque[Future[None]] = deque()
        self._thread = ThreadPoolExecutor(1, "shardsmith-upload")

    def _prepare(self) -> None:
        if not self.folder.is_leader:
            return
        path, mark = self.folder.path, self.folder.path / CACHE_OF_FILE
        # Steps without that file are of a run without a cache.
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

    def find(self, *, needs_store: bool) -> dict[int, list[Find]]:
        """Return the steps that can be loaded, and from where. All ranks; communicates.

        One that is on every disk in full is taken from there; else from the store, into which it is put first if the
        disks together have all of it and the store does not. While the store cannot be asked there is one step at
        most: the newest, if it is on every disk in full.

        Args:
            needs_store: The store is needed in any case.

        Raises:
            StorageError, RankFailedError: the store cannot be asked, and the disks do not suffice.
        """
        choose = partial(choose_places, self.folder.path, self._store, needs_store=needs_store)
        phase = "looking for checkpoints"
        found, self.alone_since = self._main_ranks.agree(phase, self._own_steps, choose, large=True)
        ways: dict[Where, Callable[[int], Path | None]] = {
            "local": lambda step: self.folder.path / step_name(step),
            "store": lambda step: self._store / step_name(step),
            "upload": self._uploaded,
            # It raises: while the store is away there is nothing else to load.
            "away": lambda step: self._main_ranks.lead("looking at the store", lambda: self._raise_away(step)),
        }
        return {step: [partial(ways[where], step) for where in places] for step, places in found}

    def resumed(self, step: int | None) -> None:
        """The run goes on from a step: what is later on the disks is set aside, and what the store lacks is uploaded.

        All ranks; communicates. What is later was not wanted, is damaged, or is not whole on the disks of this job.
        """
        self._main_ranks.gather("setting aside what is later", lambda: self._tidy(step or 0))
        if step is not None and self._main_ranks.lead("looking at the store", lambda: self._is_owed(step)):
            self.add(step)

    def _tidy(self, step: int) -> None:
        if self.folder.is_leader:
            set_later_aside(self.folder.path, step)
            self._note_alone()

    def _note_alone(self) -> None:
        """Let the file in this folder say what ``alone_since`` does."""
        mark = self.folder.path / ALONE_SINCE_FILE
        if self.alone_since is None:
            withdraw_file(mark)
        elif not mark.exists():
            place_file(mark, str(self.alone_since).encode())

    def _raise_away(self, step: int) -> None:
        """The step that the disks have in full is damaged there. Rank 0."""
        raise StorageError(
            str(self._store / step_name(step)),
            f"could not be asked for, and what {self.folder.path} has of it is damaged: start the process again when "
            "the store can be reached",
            transient=True,
        )

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
            # Each upload tries again what the one before it could not put, so the last one decides.
            running[-1].result()

    def close(self) -> None:
        """Wait for the uploads, and end the thread; raise what failed in the last. All ranks."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()

    def _upload(self) -> None:
        """Put what is owed into the store, then let retention act. In the thread; all ranks."""
        # Rank 0's set decides: all ranks must upload the same steps in the same order.
        steps: list[int] = self._ranks.lead("choosing what to upload", lambda: sorted(self._owed))
        for step in steps[:-_MOST_OWED]:  # after a long outage the disk is worth more than old steps
            log.warning("%s is given up: later steps could not be uploaded either", self.folder.path / step_name(step))
            self._owed.discard(step)
        if self.alone_since is not None:
            self._ranks.lead("comparing with the store", self._refuse_other_run)
            self.alone_since = None
            self._ranks.gather("comparing with the store", self._note_alone if self.folder.is_leader else list)
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

    def _refuse_other_run(self) -> None:
        """Rank 0: raise if another run has put steps into the store meanwhile, or it is still away."""
        assert self.alone_since is not None
        own = {
            step: files_of(self.folder.path / step_name(step))["attempt"] for step in committed_steps(self.folder.path)
        }
        try:
            if (other := find_other_run(self._store, self.alone_since, own)) is not None:
                raise TargetExistsError(
                    self._store / step_name(other),
                    f"is of another run, while this one went on from step {self.alone_since} on its disks, because the "
                    "store could not be asked. Nothing more is uploaded, and what is stored stays. End this run; the "
                    "next one goes on from what is stored",
                )
        except ShardsmithError as error:
            log.error("no step in %s was uploaded: %s", self.folder.path, error)
            raise

    def remove_old(self) -> None:
        """Let retention act on the local disk; what is not yet uploaded stays."""
        if self.folder.is_leader:
            with logged(f"looking for old steps in {self.folder.path}"):
                self._local_steps.remove_old(self._hook, spare=frozenset(self._owed))

    def _is_owed(self, step: int) -> bool:
        if self.alone_since is not None:
            return True  # the upload finds out
        local = files_of(self.folder.path / step_name(step))["attempt"]
        return bool(local) and attempt_of_any(self._store / step_name(step)) is None

    def _own_steps(self) -> dict[str, Any]:
        mark = self.folder.path / ALONE_SINCE_FILE
        alone_since = int(mark.read_text()) if self.folder.is_leader and mark.is_file() else None
        # What the other ranks see on this disk, its leader says.
        steps = committed_steps(self.folder.path) if self.folder.is_leader else []
        found = {str(step): files_of(self.folder.path / step_name(step)) for step in steps}
        return {"is_leader": self.folder.is_leader, "steps": found, "alone_since": alone_since}


def find_steps(
    ranks: Ranks, place: Path, cache: LocalCache | None, *, needs_store: bool = False
) -> dict[int, list[Find]]:
    """Return the steps at a place, each with the ways to its directory, the best first. All ranks; communicates.

    Args:
        ranks: Those that ask.
        place: Where.
        cache: Of that place, if it has one.
        needs_store: The store is needed in any case, whatever the cache has.
    """
    if cache is not None:
        return cache.find(needs_store=needs_store)
    steps = ranks.lead("looking for checkpoints", lambda: loadable_steps(place))
    return {step: [partial(Path.__truediv__, place, step_name(step))] for step in steps}


def room_in(cache: LocalCache | None) -> HostFolder | None:
    """Return the folder of a cache, if there is one, when there is room for another step. No communication."""
    if cache is None:
        return None
    cache.make_room()
    return cache.folder
