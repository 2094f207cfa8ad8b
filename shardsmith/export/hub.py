"""Exports in repositories of the Hugging Face Hub: checked, then uploaded as one commit on a branch of their own."""

from __future__ import annotations

import contextlib
import logging
import random
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from shardsmith.errors import CorruptCheckpointError, ShardsmithError, StorageError, UsageError
from shardsmith.ground.commit import require_space
from shardsmith.ground.extras import missing_package
from shardsmith.ground.layout import PROVENANCE_FILE
from shardsmith.ground.leases import hold
from shardsmith.ground.local_copy import copy_file, is_weights
from shardsmith.ground.remote_export import is_claim
from shardsmith.ground.remote_path import RemotePath, as_path
from shardsmith.hf.export_files import find_export_damage, records_files
from shardsmith.manifest.metadata import read_json

log = logging.getLogger(__name__)

T = TypeVar("T")

REVISION = "step-{step}"
"""Branch that a push goes to, where none is named."""
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_BRANCH = re.compile(r"[A-Za-z0-9][\w./-]*", re.ASCII)
# With the pauses below: after half to one times 2, 6 and 18 seconds.
_ATTEMPTS = 4
_PAUSE_SECS = 2.0
_chance = random.Random()  # the training's own generator must go on as if nothing had been repeated


def push_export(directory: str | Path, repository: str, *, revision: str = REVISION, private: bool = True) -> str:
    """Upload an export to a repository of the Hub; the address of what is there now.

    Every byte is compared with what was exported before anything is sent. The files appear together, as one commit, and
    replace what the branch had. Files that the Hub has already are not sent again; where the branch holds this export,
    nothing is done. Failures that may pass are tried again, with pauses.

    Args:
        directory: A directory that ``HFExport`` or ``to-hf`` has made, here or in an object store. From a store the
            files of weights are copied to the temporary folder of this machine and sent, one after the other.
        repository: ``"org/name"``; made if missing. The token is that of ``hf auth login`` or ``HF_TOKEN``.
        revision: The branch, made if missing; ``{step}`` stands for the step that was exported.
        private: Whether a repository that is made is private.

    Raises:
        UsageError: an argument does not fit, or the directory is no export.
        CorruptCheckpointError: the export is not what was written.
        StorageError: the Hub refused it, or it or the store could not be reached; the branch is as it was.
        WriteError: the temporary folder has no room for a file of an export in a store.
    """
    directory = as_path(directory)
    if not records_files(directory):
        raise UsageError(f"{directory} is no export: it has no {PROVENANCE_FILE} that records its files")
    step = read_json(directory / PROVENANCE_FILE)["step"]
    branch = branch_of(revision, step)
    check_repository(repository)
    with hold(directory):
        if damage := find_export_damage(directory):
            lines = "\n  ".join(damage)
            raise CorruptCheckpointError(directory, f"is damaged and was not pushed\n  {lines}")
        return _Push(directory, repository, branch, step, private).run()


def check_repository(name: str) -> None:
    """Raise UsageError unless it is the name of a repository."""
    if not _NAME.fullmatch(name):
        raise UsageError(f'{name!r} is not the name of a repository of the Hub, such as "org/name"')


@contextlib.contextmanager
def without_progress_bars() -> Iterator[None]:
    """Within it the client of the Hub shows none, as the log of a training should not have them."""
    from huggingface_hub.utils.tqdm import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    before = are_progress_bars_disabled()
    if not before:
        disable_progress_bars()
    try:
        yield
    finally:
        if not before:
            enable_progress_bars()


def check_client() -> None:
    """Raise UsageError unless the client of the Hub is installed."""
    try:
        import huggingface_hub  # noqa: F401
    except ModuleNotFoundError as error:
        raise missing_package(error) from None


def branch_of(revision: str, step: int | None) -> str:
    """Return the branch that a revision stands for. Raises UsageError if it is none."""
    if "{step}" in revision and step is None:
        raise UsageError("the export knows no step; name the branch, such as main")
    branch = revision.replace("{step}", str(step))
    if not _BRANCH.fullmatch(branch):
        raise UsageError(f"{revision!r} is not the name of a branch, such as main or {REVISION}")
    return branch


class _Push:
    """One export on its way."""

    def __init__(self, directory: Path, repository: str, branch: str, step: int | None, private: bool) -> None:
        check_client()
        # Imported here: most exports are never pushed.
        from huggingface_hub import HfApi

        self._api = HfApi()
        self._directory = directory
        self._repository = repository
        self._branch = branch
        self._step = step
        self._private = private

    def run(self) -> str:
        repository = self._repository
        place = f"{self._api.endpoint}/{repository}/tree/{self._branch}"
        self._repeated(
            "making the repository",
            lambda: self._api.create_repo(repository, private=self._private, exist_ok=True),
        )
        if self._branch != "main":
            self._repeated(
                "making the branch", lambda: self._api.create_branch(repository, branch=self._branch, exist_ok=True)
            )
        if self._repeated("looking at the branch", self._is_there):
            log.info("%s is at %s already", self._directory, place)
            return place
        of_step = "an export" if self._step is None else f"step {self._step}"
        message = f"Add {of_step}, exported by Shardsmith"
        if isinstance(self._directory, RemotePath):
            self._send_from_store(self._directory, message)
            return place
        self._repeated(
            "uploading",
            lambda: self._api.upload_folder(
                repo_id=repository,
                folder_path=self._directory,
                revision=self._branch,
                commit_message=message,
                delete_patterns="*",
            ),
        )
        return place

    def _send_from_store(self, directory: RemotePath, message: str) -> None:
        """As ``upload_folder``: weights one after the other, so that the disk need hold but one of their files."""
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        target: dict[str, Any] = {"repo_id": self._repository, "revision": self._branch}
        sizes = {name: size for name, size in directory.objects_below().items() if not is_claim(name)}
        added: list[CommitOperationAdd] = []
        with tempfile.TemporaryDirectory(prefix="shardsmith-push-", ignore_cleanup_errors=True) as folder:
            for name, size in sorted(sizes.items()):
                copy = Path(folder, name)
                require_space(Path(folder), size)
                copy_file(directory / name, copy)
                one = CommitOperationAdd(path_in_repo=name, path_or_fileobj=copy)
                if is_weights(name):
                    self._repeated(
                        f"uploading {name}",
                        lambda one=one: self._api.preupload_lfs_files(additions=[one], **target),  # type: ignore[misc]
                    )
                    if one._is_uploaded:
                        copy.unlink()
                added.append(one)
            old = self._repeated("looking at the branch", lambda: self._api.list_repo_files(**target))
            gone: list[CommitOperationAdd | CommitOperationDelete] = [
                CommitOperationDelete(name) for name in old if name not in {*sizes, ".gitattributes"}
            ]
            self._repeated(
                "uploading",
                lambda: self._api.create_commit(operations=[*gone, *added], commit_message=message, **target),
            )

    def _is_there(self) -> bool:
        """Whether the branch holds this export: commits are whole, so its own record of it tells."""
        from huggingface_hub.errors import EntryNotFoundError

        # Only the record is fetched: it names every file with its hash.
        try:
            path = self._api.hf_hub_download(self._repository, PROVENANCE_FILE, revision=self._branch)
        except EntryNotFoundError:
            return False
        return Path(path).read_bytes() == (self._directory / PROVENANCE_FILE).read_bytes()

    def _repeated(self, doing: str, act: Callable[[], T]) -> T:
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                return act()
            except ShardsmithError:
                raise
            except Exception as error:
                # ``from None``: the client's own error may hold a signed address.
                if attempt == _ATTEMPTS or not _may_pass(error):
                    place = f"{self._repository} on the Hub, branch {self._branch}"
                    raise StorageError(place, f"{doing} failed: {_reason(error)}") from None
                log.info("%s of %s failed (%s); trying again", doing, self._repository, _reason(error))
            # Spread at random, so that runs which failed together do not come back together.
            time.sleep(_chance.uniform(0.5, 1.0) * _PAUSE_SECS * 3 ** (attempt - 1))
        raise AssertionError


def _status_of(error: Exception) -> int | None:
    """The status of the answer that is to blame, of an error or of what it came from."""
    seen: Any = error
    while seen is not None:
        if (response := getattr(seen, "response", None)) is not None:
            return int(response.status_code)
        seen = seen.__cause__
    return None


def _may_pass(error: Exception) -> bool:
    status = _status_of(error)
    if status is None:
        # No answer at all: the network, or the Hub itself.
        return isinstance(error, OSError | RuntimeError) or type(error).__module__.split(".")[0] in (
            "httpx",
            "requests",
        )
    # 408 and 429 ask to try again; 5xx says nothing about the request.
    return status in (408, 429) or status >= 500


def _reason(error: Exception) -> str:
    """In a few words that cannot hold a token: the client's own text has addresses that may be signed."""
    status = _status_of(error)
    if status is None:
        return type(error).__name__
    advice = {401: " (no valid token: run hf auth login, or set HF_TOKEN)", 403: " (the token may not write there)"}
    return f"status {status}{advice.get(status, '')}"
