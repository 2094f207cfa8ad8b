"""Uploads in parts that a killed process has left in an S3 store: no listing of objects shows them, and they cost.

The client of obstore neither lists nor aborts them, but it signs addresses with its own credentials. The query of those
requests is part of the endpoint that it is given; what it appends itself goes into a parameter that S3 ignores, as it
does all that begin with ``x-``.
"""

from __future__ import annotations

import logging
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from datetime import timedelta
from typing import Any, Literal
from urllib.parse import quote, urlencode
from urllib.request import Request, urlopen

from shardsmith.ground.object_store import reason_of
from shardsmith.ground.remote_path import RemotePath

log = logging.getLogger(__name__)

_MOST_ROUNDS = 100  # of up to a thousand uploads
_TIMEOUT_SECS = 60.0
_VALID_FOR = timedelta(minutes=5)


def abort_uploads(place: RemotePath) -> int:
    """Abort all unfinished uploads of objects below a place; how many. Never raises.

    Only S3 stores have them: Azure forgets parts after a week, and for others the bucket needs a rule.
    """
    count = 0
    try:
        if (bucket := _Bucket.of(place)) is None:
            return 0
        for _ in range(_MOST_ROUNDS):
            found = [*bucket.uploads(f"{place.key}/")]
            for key, upload in found:
                bucket.abort(key, upload)
            count += len(found)
            if not found:
                break
    except Exception as error:  # a courtesy: the objects themselves are gone
        log.info("unfinished uploads below %s were not looked for: %s", place, reason_of(error))
    if count:
        log.info("aborted %d unfinished uploads below %s", count, place)
    return count


class _Bucket:
    """A bucket, for what its client signs and does not do."""

    def __init__(self, client: Any) -> None:
        self._client = client
        self._prefix = f"{client.prefix}/" if client.prefix else ""
        signed = str(_obstore().sign(client, "GET", "x", _VALID_FOR)).partition("?")[0]
        self._address = signed.removesuffix(f"/{quote(self._prefix)}x")

    @classmethod
    def of(cls, place: RemotePath) -> _Bucket | None:
        client = place.store.client
        return cls(client) if isinstance(client, _obstore().store.S3Store) else None

    def uploads(self, prefix: str) -> Iterator[tuple[str, str]]:
        """Yield keys and ids of the first unfinished uploads of keys that begin so."""
        query = urlencode({"uploads": "", "prefix": self._prefix + prefix}, quote_via=quote, safe="")
        tree = ET.fromstring(self._ask("GET", f"{self._address}?{query}"))
        space = tree.tag.partition("}")[0] + "}" if "}" in tree.tag else ""
        for one in tree.iter(f"{space}Upload"):
            yield one.findtext(f"{space}Key", ""), one.findtext(f"{space}UploadId", "")

    def abort(self, key: str, upload: str) -> None:
        """Abort an upload. ``key`` is that of the bucket."""
        self._ask("DELETE", f"{self._address}/{quote(key)}?{urlencode({'uploadId': upload}, quote_via=quote, safe='')}")

    def _ask(self, method: Literal["GET", "DELETE"], address: str) -> bytes:
        signer = _obstore().store.S3Store(
            config={**self._client.config, "endpoint": f"{address}&x-rest=", "virtual_hosted_style_request": True},
            client_options={"allow_http": True},
            credential_provider=self._client.credential_provider,
        )
        signed = str(_obstore().sign(signer, method, "x", _VALID_FOR))
        with urlopen(Request(signed, method=method), timeout=_TIMEOUT_SECS) as answer:
            return bytes(answer.read())


def _obstore() -> Any:
    import obstore
    import obstore.store

    return obstore
