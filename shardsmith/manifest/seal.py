"""The hash that a JSON file of ours has of itself, as its last field."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import xxhash

from shardsmith.errors import CorruptCheckpointError

SEAL = "self_xxh3_128"
"""Field with the hash of the file that it is in. What is older than it has none."""
UNSEALED = "0" * 32
"""What stands in the field when the hash is taken."""
_ENDS_AS_SEALED = re.compile(rb'": "[0-9a-f]{32}"\n}\n\Z')  # also if it is the name of the field that has changed
_END = UNSEALED.encode() + b'"\n}\n'


def sealed(unsealed: bytes) -> bytes:
    """Return the bytes of a file, with their XXH3-128 in the place of ``UNSEALED``, which is their last field."""
    return unsealed[: -len(_END)] + _seal_of(unsealed) + _END[32:]


def require_seal(path: Path, data: bytes, content: dict[str, Any]) -> bool:
    """Take the seal out; CorruptCheckpointError if a file has changed since it was sealed. Older ones have none.

    Returns:
        Whether it has one.
    """
    # A file whose end looks like a seal must have one: a damaged name of the field must not pass for an older file.
    if content.pop(SEAL, None) is None and not _ENDS_AS_SEALED.search(data):
        return False
    at = len(data) - len(_END)
    found = data[at : at + 32]
    # The bytes themselves, not the parsed JSON: whitespace or another order of keys is a change, too.
    if data[at + 32 :] != _END[32:] or found != _seal_of(data[:at] + _END):
        raise CorruptCheckpointError(path, f"has changed since it was written: it does not have its own {SEAL}")
    return True


def _seal_of(unsealed: bytes) -> bytes:
    return xxhash.xxh3_128_hexdigest(unsealed).encode()
