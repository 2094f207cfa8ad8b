"""Limits on what torch itself is let to read: no file costs much more time or memory than its size suggests.

``torch.load(weights_only=True)`` runs no code, but builds whatever a pickle describes: a dict whose keys all have one
hash takes quadratic time, a compressed member a thousand times its size. Only where tensors lie is read by torch after
this, so what a pickle may hold is little.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import zipfile
from pathlib import Path
from typing import BinaryIO

from shardsmith.errors import CorruptCheckpointError, UnsupportedFormatError
from shardsmith.ground.printable import printable

MAX_INSTRUCTIONS = 2_000_000
"""Of one file's pickles; each makes up to some 70 bytes. A tensor takes about 35."""
# Python hashes an integer modulo 2**61 - 1, so numbers of 8 bytes can collide at will.
_MAX_LARGE_NUMBERS = 2_000
_LARGE_BYTES = 8
"""Numbers of so many bytes can be chosen so that all have one hash; so many of them still take no time."""
_MAX_PICKLE_BYTES = 1 << 25
_LEGACY_PICKLES = 5
"""A file from before the zip format begins with so many: magic number, version, system, state, keys of storages."""
_PREALLOCATED = b"bytearray"  # which takes its length from a number


def require_budget(path: Path, data: bytes | None = None) -> None:
    """Return if a ``torch.save`` file is small enough in all that torch makes of it.

    Args:
        path: The file, or where ``data`` comes from.
        data: An archive in memory, instead of the file.

    Raises:
        UnsupportedFormatError: a member is compressed.
        CorruptCheckpointError: its pickles ask for too much, or it is no such file.
    """
    with path.open("rb") if data is None else io.BytesIO(data) as file:
        # torch before 1.6 wrote several pickles one behind the other, with the storages' bytes after them.
        if file.read(2) != b"PK":
            file.seek(0)
            _require_few(path, file.read(_MAX_PICKLE_BYTES), _LEGACY_PICKLES)
        else:
            _require_few(path, _state_of_zip(path, file), 1)


def _state_of_zip(path: Path, file: BinaryIO) -> bytes:
    try:
        with zipfile.ZipFile(file) as archive:
            for member in archive.infolist():
                if member.compress_type != zipfile.ZIP_STORED:
                    name = printable(member.filename)
                    raise UnsupportedFormatError(path, f"{name} is compressed, which torch.save never does")
            pickles = [member for member in archive.infolist() if member.filename.endswith("data.pkl")]
            # torch reads the data.pkl below the first root folder: of two it might read the one that was not counted.
            if len(pickles) != 1 or pickles[0].file_size > _MAX_PICKLE_BYTES:
                raise CorruptCheckpointError(path, "holds no data.pkl, several, or one that is too large")
            return archive.read(pickles[0])
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, RuntimeError) as error:
        raise CorruptCheckpointError(path, f"is truncated, or no file of torch.save: {error}") from error


def _require_few(path: Path, data: bytes, pickles: int) -> None:
    """Walk through pickles without making anything. What is malformed is left to torch to refuse."""
    # By the bytes, without decoding: a name that only looks like it is refused, too, which costs nothing.
    if _PREALLOCATED in data:
        raise UnsupportedFormatError(path, f"holds a {_PREALLOCATED.decode()}, which no tensor needs")
    position = instructions = large = stops = 0
    try:
        while stops < pickles:
            code = data[position]
            position += 1
            instructions += 1
            skip = _SKIPPED[code]
            if skip >= 0:
                position += skip
                stops += code == _STOP
            # Opcodes of protocol 0 with a line of text; GLOBAL has two of them, module and name.
            elif skip == _LINES:
                position = data.index(b"\n", position) + 1
                if code == _GLOBAL:
                    position = data.index(b"\n", position) + 1
            else:
                width = _WIDTHS[skip]
                # A length that leads beyond the end becomes an IndexError at the next instruction.
                length = int.from_bytes(data[position : position + width], "little")
                position += width + length
                large += code in _NUMBERS and length >= _LARGE_BYTES
            if instructions > MAX_INSTRUCTIONS or large > _MAX_LARGE_NUMBERS:
                found = f"{instructions} objects and {large} large numbers"
                raise CorruptCheckpointError(path, f"its pickle makes more than describes tensors: {found}")
    except (IndexError, KeyError, ValueError):
        return


_STOP, _GLOBAL = pickle.STOP[0], pickle.GLOBAL[0]
_NUMBERS = frozenset({pickle.LONG1[0], pickle.LONG4[0]})
_LINES = -1
_WIDTHS = {
    pickletools.TAKEN_FROM_ARGUMENT1: 1,
    pickletools.TAKEN_FROM_ARGUMENT4: 4,
    pickletools.TAKEN_FROM_ARGUMENT4U: 4,
    pickletools.TAKEN_FROM_ARGUMENT8U: 8,
}
_SKIPPED = {ord(op.code): op.arg.n if op.arg else 0 for op in pickletools.opcodes}
"""Instruction -> bytes of its argument; negative ones are those of ``pickletools``."""
