"""Which store a URL means: one that obstore knows, one that only fsspec knows, or an object that the user gave."""

from __future__ import annotations

import functools
import re
import sys
from typing import Any

from shardsmith.errors import UsageError
from shardsmith.ground.extras import missing_package
from shardsmith.ground.file_system_store import Files, FileSystemStore
from shardsmith.ground.object_store import ObjectStore, given_client, keep_client

SCHEMES = ("s3", "gs", "az", "abfs", "abfss")
"""Of the URLs that obstore reads."""
_SPELLINGS = {"s3a": "s3", "s3n": "s3", "gcs": "gs", "azure": "az"}
_NO_PLACES = ("file", "local", "http", "https", "data", "dir", "reference", "generic")
"""Of what fsspec knows: this machine's files, what cannot be listed, and what only wraps others."""
_URL = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]+)://(?P<place>[^/?#]+)")


def store_at(url: str) -> ObjectStore:
    """Return the store at a scheme and a bucket or host. Nothing is asked of it."""
    given = given_client(url)
    is_of_obstore = url.partition(":")[0] in SCHEMES if given is None else not isinstance(given, Files)
    return ObjectStore(url) if is_of_obstore else FileSystemStore(url)


def why_refused(url: str) -> str | None:
    """Return why a URL, or its scheme and bucket, cannot be used here; None if it can.

    The package of its protocol is imported. Nothing is asked of the store.
    """
    scheme, _, rest = url.partition("://")
    place = rest.partition("/")[0]
    if scheme in SCHEMES or given_client(f"{scheme}://{place}") is not None:
        return None
    if scheme in _SPELLINGS:
        return f"{scheme}:// is written {_SPELLINGS[scheme]}:// here"
    return _why_unknown(scheme)


def use_client(url: str, client: Any) -> None:
    """Use a store object of obstore or a file system of fsspec, made as you like, for all URLs that begin so.

        shardsmith.use_client("s3://bucket", S3Store("bucket", credential_provider=Boto3CredentialProvider()))
        shardsmith.use_client("sftp://host", fsspec.filesystem("sftp", host="host", username="me"))

    Without it a store is made from the environment: ``AWS_ACCESS_KEY_ID``, ``AWS_ENDPOINT_URL``, ``GOOGLE_...``,
    ``AZURE_...``, or the machine's own role. Call it on every rank, before the first URL is used.

    Args:
        url: Scheme and bucket, such as ``s3://bucket``; the scheme may be one of your own.
        client: A store of ``obstore.store``, whose keys are those of the bucket; or a file system of fsspec, whose
            paths are those of such URLs, or begin with the bucket where the scheme is not its own.

    Raises:
        UsageError: the URL names more or less than a bucket, or the client is of another kind.
    """
    match = _URL.fullmatch(url.rstrip("/"))
    if match is None or "@" in match["place"] or match["scheme"] in _NO_PLACES:
        expected = "scheme and bucket are expected, such as s3://bucket, gs://bucket or az://container"
        shown = re.sub(r"//[^/@]*@", "//...@", url)
        raise UsageError(f"use_client(url={shown!r}): {expected}. Nothing was done.")
    is_file_system = _is_file_system(client)
    if not is_file_system and not isinstance(client, _obstore_stores()):
        raise UsageError(
            "use_client(client=...): a store of obstore.store, such as S3Store, or a file system of fsspec is "
            f"expected, not a {type(client).__name__}. Nothing was done."
        )
    keep_client(match[0], Files.of(client, match[0]) if is_file_system else client)


def _is_file_system(client: Any) -> bool:
    fsspec = sys.modules.get("fsspec")  # without it there can be none
    return fsspec is not None and isinstance(client, fsspec.AbstractFileSystem)


def _obstore_stores() -> Any:
    try:
        import obstore.store
    except ModuleNotFoundError as error:
        raise missing_package(error) from None
    return obstore.store.ObjectStoreMethods


@functools.cache
def _why_unknown(scheme: str) -> str | None:
    if scheme in _NO_PLACES:
        return f"{scheme}:// is not supported"
    try:
        import fsspec

        fsspec.get_filesystem_class(scheme)
    except ImportError as error:
        cause: BaseException | None = error
        while cause is not None and not getattr(cause, "name", None):
            cause = cause.__cause__ or cause.__context__
        package = getattr(cause, "name", None) or scheme
        return f"{scheme}:// needs {package}, which is not installed; run: pip install {package.partition('.')[0]}"
    except Exception:
        return f"{scheme}:// is not supported"
    return None
