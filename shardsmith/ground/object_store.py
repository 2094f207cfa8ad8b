"""The few verbs that commit and resume need of an object store, on S3, Google Cloud Storage, Azure and others.

Every request has a time limit and is repeated a bounded number of times, with pauses that grow and vary. What failed
all the same is a ``StorageError``, which says what was asked for and what the store answered, and never with which
credentials. What is not there is a ``FileNotFoundError``, as on a file system.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from shardsmith.errors import StorageError
from shardsmith.ground.extras import missing_package

if TYPE_CHECKING:
    from obstore import WritableFile
    from obstore.store import ObjectStore as Client

T = TypeVar("T")

PART_BYTES = 8 << 20
"""Of a multipart upload, and the most that is asked for in one ranged read."""
_MOST_PARTS = 9_000  # S3 takes 10,000
_CONCURRENT_PARTS = 4
_ATTEMPTS = 3  # of ours, around those of the client: of a reply that was cut off, or could not be understood
_chance = random.Random()  # the training's own generator must go on as if nothing had been repeated
_RETRIES = {
    "max_retries": 6,
    "retry_timeout": timedelta(seconds=120),
    "backoff": {"init_backoff": timedelta(milliseconds=100), "max_backoff": timedelta(seconds=10), "base": 2},
}
_TIMES = {"connect_timeout": timedelta(seconds=10), "timeout": timedelta(seconds=120)}
_clients: dict[str, tuple[int, Any]] = {}
"""By URL: the process that made a client, 0 for one that a user gave, and the client."""
_CODE = re.compile(r"<Code>([A-Za-z0-9._-]{1,80})</Code>")
_STATUS = re.compile(r"status code: (\d{3} [A-Za-z ]{1,40})")
_CREDENTIALS = "; look at the credentials of this process, and at what they allow there"
_CURES = {"401": _CREDENTIALS, "403": _CREDENTIALS, "501": "; this store does not know such requests"}
_OF_CODES = {
    "RequestTimeTooSkewed": "; the clock of this host differs from the store's: set it",
    "ExpiredToken": "; the credentials have expired: start again with new ones, or give a client that renews them "
    "(shardsmith.use_client)",
    "NoSuchBucket": "; there is no such bucket: look at its name, the region and the endpoint",
}
"""What to do, where the code of the answer alone says it."""
_MOVED = "; it was sent on to another address: look at the region (AWS_REGION) and the endpoint"
_HOPELESS = {
    "BadScheme": "; its endpoint is an http:// address, for which AWS_ALLOW_HTTP=true must be set",
    "BareRedirect": _MOVED,
    "kind: Redirect": _MOVED,
}
"""What to do, by a word of the client about a request that would always end so."""
_CAUSES = re.compile(
    r"(Connection refused|Connection reset|connection closed|timed out|operation timed out|error sending request"
    r"|dns error|error decoding response body|error reading a body|incomplete|No such file or directory"
    r"|Permission denied|No space left)",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class StoredObject:
    """An object in a listing."""

    key: str
    size: int
    """In bytes."""
    modified: datetime


class ObjectStore:
    """A bucket or container. Thread-safe; nothing here communicates with other ranks.

    Attributes:
        url: What its keys are appended to, such as ``s3://bucket``.
    """

    def __init__(self, url: str) -> None:
        """Nothing is asked of the store. ``url``: scheme and bucket."""
        self.url = url

    def put(self, key: str, data: bytes) -> None:
        """Make or replace an object, all at once. Raises StorageError."""
        self._repeated("writing", key, lambda c: _obstore().put(c, key, data, mode="overwrite", use_multipart=False))

    def put_new(self, key: str, data: bytes) -> None:
        """Make an object, unless there is one; of several that try at the same time one succeeds.

        A reply that was lost leaves it open whether the object was made: it is read then, and is ours if it holds
        ``data``. So what is put must tell attempts apart.

        Raises:
            FileExistsError: there is one already, with other content.
            StorageError: it could not be made.
        """
        obstore = _obstore()
        try:
            with self._named("writing", key):
                obstore.put(self.client, key, data, mode="create", use_multipart=False)
        except (FileExistsError, StorageError):
            with contextlib.suppress(FileNotFoundError, StorageError):
                # The client repeats a request whose reply was lost: then the second one finds what the first has made.
                if self.get(key) == data:
                    return
            raise

    def writer(self, key: str, expected_bytes: int = 0) -> WritableFile:
        """Return a stream that uploads in parts while it is written to; the object appears when it is closed.

        ``expected_bytes`` decides the size of the parts, of which stores take a limited number.
        """
        part = max(PART_BYTES, -(-expected_bytes // _MOST_PARTS))
        client = self.client
        stream: WritableFile = _obstore().open_writer(client, key, buffer_size=part, max_concurrency=_CONCURRENT_PARTS)
        return stream

    @contextlib.contextmanager
    def writing(self, key: str) -> Iterator[None]:
        """Within it what a writer raises becomes a StorageError."""
        with self._named("writing", key):
            yield

    def get(self, key: str, most_bytes: int | None = None) -> bytes:
        """Return a whole object.

        Raises:
            ValueError: it has more than ``most_bytes``; no more than a part of it was requested.
            FileNotFoundError, StorageError: it cannot be read.
        """

        def read(client: Client) -> bytes | None:
            found = _obstore().get(client, key)
            # The answer begins with the size: the rest of a larger object is not waited for.
            return bytes(found.bytes()) if most_bytes is None or found.meta["size"] <= most_bytes else None

        data = self._repeated("reading", key, read)
        if data is None:
            raise ValueError(f"{self.url}/{key} has more than {most_bytes} bytes")
        return data

    def range(self, key: str, start: int, end: int) -> memoryview:
        """Return the bytes from ``start`` to before ``end``, which the object must have.

        Raises FileNotFoundError, StorageError.
        """

        def read(client: Client) -> memoryview:
            data = memoryview(_obstore().get_range(client, key, start=start, end=end))
            # A reply that was cut off may come as a short one.
            if len(data) != end - start:
                raise StorageError(f"{self.url}/{key}", f"gave {len(data)} bytes of {end - start}", transient=True)
            return data

        return self._repeated("reading", key, read)

    def head(self, key: str) -> StoredObject:
        """Return what a listing would say of one object. Raises FileNotFoundError, StorageError."""
        found = self._repeated("looking at", key, lambda client: _obstore().head(client, key))
        return StoredObject(key, found["size"], found["last_modified"])

    def objects(self, prefix: str) -> list[StoredObject]:
        """Return all objects whose keys begin with ``prefix`` and ``/``, in the order of their keys."""

        def collect(client: Client) -> list[StoredObject]:
            found = _obstore().list(client, prefix=prefix or None, chunk_size=1000).collect()
            return [StoredObject(one["path"], one["size"], one["last_modified"]) for one in found]

        return sorted(self._repeated("listing", prefix, collect), key=lambda one: one.key)

    def children(self, prefix: str) -> list[str]:
        """Return the names right below a prefix, of objects and of further prefixes, in their order."""

        def collect(client: Client) -> list[str]:
            found = _obstore().list_with_delimiter(client, prefix=prefix or None)
            keys = [*found["common_prefixes"], *(one["path"] for one in found["objects"])]
            return [key.rstrip("/").rpartition("/")[2] for key in keys]

        return sorted(self._repeated("listing", prefix, collect))

    def delete(self, keys: Sequence[str]) -> None:
        """Delete objects, in as few requests as the store allows; those that are gone are passed over."""
        if keys:
            with contextlib.suppress(FileNotFoundError):
                self._repeated("deleting", keys[0], lambda client: _delete(client, keys))

    @property
    def client(self) -> Any:
        """The client of this process: one that came by a fork must not be used. Raises StorageError."""
        pid, client = _clients.get(self.url, (0, None))
        if client is None or pid not in (0, os.getpid()):
            client = self._connect()
            _clients[self.url] = os.getpid(), client
        return client

    def _connect(self) -> Any:
        return _connect(self.url)

    def _repeated(self, doing: str, key: str, act: Callable[[Any], T]) -> T:
        """What ``act`` returns, which may be done any number of times."""
        for attempt in range(_ATTEMPTS):
            try:
                with self._named(doing, key):
                    return act(self.client)
            except StorageError as error:
                if not error.transient or attempt == _ATTEMPTS - 1:
                    raise
            time.sleep(_chance.uniform(0.05, 0.2) * 3**attempt)
        raise AssertionError

    @contextlib.contextmanager
    def _named(self, doing: str, key: str) -> Iterator[None]:
        """Turn what the client raises into errors without its own text, which may hold signed addresses."""
        exceptions = _obstore().exceptions
        where = f"{self.url}/{key}"
        try:
            yield
        except StorageError:
            raise
        except FileNotFoundError as error:
            if "<Code>NoSuchBucket</Code>" in str(error):
                raise StorageError(where, f"{doing} failed: {reason_of(error)}{_cure(error)}") from None
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), where) from None
        except (exceptions.AlreadyExistsError, exceptions.PreconditionError):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), where) from None
        except (exceptions.PermissionDeniedError, exceptions.UnauthenticatedError) as error:
            raise StorageError(
                where, f"{doing} was refused: {reason_of(error)}{_cure(error) or _CREDENTIALS}"
            ) from None
        except (exceptions.BaseError, OSError, ValueError) as error:
            told = f"{doing} failed: {reason_of(error)}{_cure(error)}"
            raise StorageError(where, told, transient=_is_transient(error)) from None


def _obstore() -> Any:
    try:
        import obstore
        import obstore.exceptions
        import obstore.store
    except ModuleNotFoundError as error:
        raise missing_package(error) from None
    return obstore


def keep_client(url: str, client: Any) -> None:
    """Use a client of the user's for a store from now on, also in processes that are forked."""
    _clients[url] = 0, client


def given_client(url: str) -> Any:
    """Return the client that a user gave for a store; None if there is none."""
    pid, client = _clients.get(url, (-1, None))
    return client if pid == 0 else None


def _connect(url: str) -> Client:
    store = _obstore().store
    try:
        client: Client = store.from_url(url, retry_config=_RETRIES, client_options=_client_options())
        return client
    except Exception as error:
        raise StorageError(url, f"no client can be made for it: {reason_of(error)}") from None


def _client_options() -> dict[str, Any]:
    insecure = os.environ.get("AWS_ALLOW_HTTP", os.environ.get("AZURE_ALLOW_HTTP", "")).lower() in ("1", "true")
    return {**_TIMES, **({"allow_http": True} if insecure else {})}


def _delete(client: Client, keys: Sequence[str]) -> None:
    obstore = _obstore()
    try:
        obstore.delete(client, [*keys])
    except FileNotFoundError:  # some stores stop at the first that is gone
        for key in keys:
            with contextlib.suppress(FileNotFoundError):
                obstore.delete(client, key)


def reason_of(error: Exception) -> str:
    """Return what the store said, in a few words that cannot hold a secret."""
    text = str(error)
    found = [match[1] for match in (_STATUS.search(text), _CODE.search(text), _CAUSES.search(text)) if match]
    return ", ".join(dict.fromkeys(one.strip() for one in found)) or type(error).__name__


def _is_transient(error: Exception) -> bool:
    """Whether the same request may succeed later."""
    status = _STATUS.search(str(error))
    if any(word in str(error) for word in _HOPELESS):
        return False
    # Without a status the connection failed. 408 is a timeout, 429 too many requests; 501 never succeeds later.
    return status is None or (status[1][:1] == "5" and status[1][:3] != "501") or status[1][:3] in ("408", "429")


def _cure(error: Exception) -> str:
    """What to look at, where the answer alone says it."""
    text = str(error)
    if found := [cure for word, cure in _HOPELESS.items() if word in text]:
        return found[0]
    if (code := _CODE.search(text)) and code[1] in _OF_CODES:
        return _OF_CODES[code[1]]
    status = _STATUS.search(text)
    return _CURES.get(status[1][:3], "") if status else ""
