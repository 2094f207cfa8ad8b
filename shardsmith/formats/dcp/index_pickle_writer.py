"""Writes the index of a DCP directory (``.metadata``): the pickle of torch's own objects, without making them.

A pickle of millions of objects remembers each of them until its end, which takes 2 kB of memory for a box. Here the
instructions are written as Python's pickler writes them, byte for byte, but only names and paths are remembered. What
is the same for all tensors that are cut alike is made once.
"""

from __future__ import annotations

import itertools
import pickletools
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from shardsmith.formats.dcp.cuts import Cut, CutTensor
from shardsmith.formats.dcp.saved_index import CHECKPOINT, CHUNK, INDEX, SIZE, STORAGE_INFO
from shardsmith.formats.dcp.shard_files import Place
from shardsmith.formats.torch_files.pickle_machine import Name
from shardsmith.tensors.checkpoint_keys import KeyPath
from shardsmith.tensors.dtypes import dtype_name
from shardsmith.tensors.tensors import Chunk, Shape

_VERSION = "1.0.0"
"""Of the format, as torch numbers it (``CURRENT_DCP_VERSION``)."""
_PROTOCOL = b"\x80\x04"
_FRAME_BYTES = 1 << 16
_BATCH = 1000
"""Items of a list or dict that Python's pickler adds at once."""
_MOST_ALIKE = 1 << 20
"""Records that are kept to be used again; of some 100 bytes."""
_LEAST_FRAME_BYTES = 4
_TUPLES = (b"\x85", b"\x86", b"\x87")
_VALUES = frozenset(
    (
        *("BINGET", "LONG_BINGET", "SHORT_BINUNICODE", "BINUNICODE", "BININT1", "BININT2", "BININT", "LONG1"),
        *("NONE", "NEWFALSE", "EMPTY_TUPLE", "EMPTY_LIST", "EMPTY_DICT"),
    )
)
"""Instructions with which a value begins."""
_ADD = frozenset(("SETITEM", "SETITEMS", "APPEND", "APPENDS"))

_METADATA = Name(CHECKPOINT, "Metadata")
_TENSOR = Name(CHECKPOINT, "TensorStorageMetadata")
_BYTES = Name(CHECKPOINT, "BytesStorageMetadata")
_PROPERTIES = Name(CHECKPOINT, "TensorProperties")
_MEMORY_FORMAT = Name(CHECKPOINT, "_MEM_FORMAT_ENCODING")
_STORAGE_META = Name(CHECKPOINT, "StorageMeta")
_LAYOUT = Name("torch.serialization", "_get_layout")


def write_index(
    tensors: Mapping[str, CutTensor],
    *,
    files: Sequence[str],
    containers: Mapping[str, KeyPath],
    attempt: str,
    objects: Mapping[str, Place],
) -> Iterator[bytes]:
    """Yield the content of ``.metadata``, as torch's own writer would make it, in parts of some 64 KiB.

    Args:
        tensors: By key.
        files: Names of the files in which the boxes lie, by number.
        containers: Key -> where it lies in a nested state dict.
        attempt: Recorded as the save id.
        objects: Values that are no tensors, by key.
    """
    frames = _Frames()
    for records in _Writer(files).index(tensors, containers, attempt, objects):
        frames.add(records)
        yield from frames.taken()
    frames.end()
    yield from frames.taken()


class _Writer:
    """Makes the instructions. Each method returns those of a value, in whose order it must be called.

    Attributes:
        count: How many values a reader remembers by then, each under the next number.
    """

    def __init__(self, files: Sequence[str]) -> None:
        self.count = 0
        self._files = files
        # By the id of a text or path, and by the name of a class.
        self._memo: dict[object, int] = {}
        self._seen: list[object] = []  # what is known by its id must not be freed
        self._alike: dict[object, tuple[list[bytes], int]] = {}
        self._records_alike = 0
        self._refs: dict[int, bytes] = {}
        # An object of its own, since texts are known by their identity: that of torch.Size is another one in torch.
        self._module_of_dtypes = str(b"torch", "ascii")
        self._keys: dict[Cut, tuple[Sequence[int], Any]] = {}

    def index(
        self,
        tensors: Mapping[str, CutTensor],
        containers: Mapping[str, KeyPath],
        attempt: str,
        objects: Mapping[str, Place],
    ) -> Iterator[list[bytes]]:
        """Yield the instructions, in lists of records: those of a record are some hundred bytes at most."""
        yield [self._new(_METADATA) + self._state()]
        entries = itertools.chain(
            ([self._text(key), *self._once(tensor.cut, self._tensor)] for key, tensor in tensors.items()),
            ([self._text(key), *self._once(_BYTES, self._no_tensor)] for key in objects),
        )
        yield from self._dict("state_dict_metadata", entries, len(tensors) + len(objects))
        paths = ((key, containers.get(key, (key,))) for key in itertools.chain(tensors, objects))
        items = ([self._text(key) + self._path(path)] for key, path in paths)
        yield from self._dict("planner_data", items, len(tensors) + len(objects))
        yield from self._places(tensors, objects)
        meta = self._text("storage_meta") + self._new(_STORAGE_META) + self._state()
        meta += self._text("checkpoint_id") + b"N" + self._text("save_id") + self._text(attempt)
        meta += self._text("load_id") + b"N" + self._text("modules") + self._numbered(b"]") + b"ub"
        yield [meta, self._text("version") + self._text(_VERSION) + b"ub."]

    def _dict(self, name: str, items: Iterator[list[bytes]], count: int) -> Iterator[list[bytes]]:
        yield [self._text(name) + self._numbered(b"}") + (b"(" if count > 1 else b"")]
        for number, records in enumerate(items, 1):
            yield records
            if number % _BATCH == 0:
                yield [b"u("]
        yield [_end_of_dict(count)]

    def _tensor(self, cut: Cut) -> list[bytes]:
        head = self._new(_TENSOR) + self._state() + self._text("properties") + self._new(_PROPERTIES)
        head += b"(" + self._name(Name(self._module_of_dtypes, dtype_name(cut.dtype))) + self._layout() + b"\x89"
        head += self._memory_format() + b"\x89" + self._numbered(b"t") + b"b" + self._text("size")
        head += self._size(cut.shape) + self._text("chunks") + self._numbered(b"]")
        records = [head + (b"(" if len(cut.boxes) > 1 else b"")]
        for number, box in enumerate(cut.boxes):
            if number and number % _BATCH == 0:
                records.append(b"e(")
            records += self._once(box, self._chunk)
        # One item is appended by itself.
        end = b"e" if len(cut.boxes) > 1 else b"a"
        return [*records, (end if cut.boxes else b"") + b"ub"]

    def _chunk(self, box: Chunk) -> list[bytes]:
        offsets = self._new(CHUNK) + self._state() + self._text("offsets") + self._size(box.offsets)
        return [offsets + self._text("sizes") + self._size(box.sizes) + b"ub"]

    def _no_tensor(self, name: Name) -> list[bytes]:
        return [self._new(name)]

    def _places(self, tensors: Mapping[str, CutTensor], objects: Mapping[str, Place]) -> Iterator[list[bytes]]:
        """Where each box lies, and each value that is no tensor: a dict whose keys are of several tensors."""
        count = sum(len(self._kept(tensor.cut)[0]) for tensor in tensors.values()) + len(objects)
        yield [self._text("storage_data") + self._numbered(b"}") + (b"(" if count > 1 else b"")]
        numbers = {name: number for number, name in enumerate(self._files)}
        values = ((key, numbers[place.file], place) for key, place in objects.items())
        parts = itertools.chain(
            (self._places_of(key, tensor) for key, tensor in tensors.items()),
            ([self._stored(key, None, None, file, place.offset, place.length)] for key, file, place in values),
        )
        done = 0
        for records in parts:
            for i in range(_BATCH - 1 - done % _BATCH, len(records), _BATCH):
                records[i] += b"u("
            done += len(records)
            yield records
        yield [_end_of_dict(count)]

    def _places_of(self, key: str, tensor: CutTensor) -> list[bytes]:
        cut = tensor.cut
        firsts, lasts = self._kept(cut)
        files, offsets = tensor.files[lasts].tolist(), tensor.offsets[lasts].tolist()
        if not self._refs.keys() >= {*files}:
            new = zip(firsts, files, offsets, cut.lengths[lasts].tolist(), strict=True)
            return [self._stored(key, i, cut.boxes[i].offsets, *numbers) for i, *numbers in new]
        # Every name and file was met: but for the key and the offset, all is as in other tensors of the cut.
        fixed = self._once(("places", cut), self._fixed_parts)
        named, integers = self._text(key), {offset: _integer(offset) for offset in {*offsets}}
        refs = map(self._refs.__getitem__, files)
        rows = zip(fixed[::3], fixed[1::3], refs, offsets, fixed[2::3], strict=True)
        return [b"".join((head, named, middle, ref, integers[at], tail)) for head, middle, ref, at, tail in rows]

    def _kept(self, cut: Cut) -> tuple[Sequence[int], Any]:
        """Of the boxes of a tensor, those that a dict by their offsets keeps as keys, and as values: empty ones repeat.

        A dict has a key as it came first, and the value that came last.
        """
        if cut not in self._keys:
            last = {box.offsets: i for i, box in enumerate(cut.boxes)}
            if len(last) == len(cut.boxes):
                self._keys[cut] = range(len(last)), slice(None)
            else:
                first = {box.offsets: i for i, box in reversed([*enumerate(cut.boxes)])}
                self._keys[cut] = [first[offsets] for offsets in last], [*last.values()]
        return self._keys[cut]

    def _stored(self, key: str, number: int | None, offsets: Shape | None, file: int, begin: int, length: int) -> bytes:
        head = self._new(INDEX) + self._state() + self._text("fqn")
        middle = self._text(key) + self._text("index") + (b"N" if number is None else _integer(number))
        if offsets is not None:
            middle += self._text("offset") + self._size(offsets)
        middle += b"ub" + self._new(STORAGE_INFO) + self._state() + self._text("relative_path")
        where = self._text(self._files[file]) + self._text("offset") + _integer(begin)
        where += self._text("length") + _integer(length) + b"ub"
        # From the second time on.
        self._refs[file] = self._text(self._files[file]) + self._text("offset")
        return head + middle + where

    def _fixed_parts(self, named: tuple[str, Cut]) -> list[bytes]:
        """Of the records of a cut, in turn what stands between key and file, and what stands behind the offset."""
        cut, parts = named[1], []
        firsts, lasts = self._kept(cut)
        for first, length in zip(firsts, cut.lengths[lasts].tolist(), strict=True):
            # The text of the key follows, which is another one for each tensor.
            head = self._new(INDEX) + self._state() + self._text("fqn")
            middle = self._text("index") + _integer(first) + self._text("offset") + self._size(cut.boxes[first].offsets)
            middle += b"ub" + self._new(STORAGE_INFO) + self._state() + self._text("relative_path")
            parts += [head, middle, self._text("length") + _integer(length) + b"ub"]
        return parts

    def _once(self, what: Any, make: Callable[[Any], list[bytes]]) -> list[bytes]:
        """The records of something, made once for all times that it is met."""
        if what in self._alike:
            records, remembered = self._alike[what]
            self.count += remembered
            return records
        names, count = len(self._memo), self.count
        records = make(what)
        # Where a name is met first it is written, and has its number from then on: those records are not like others.
        if len(self._memo) == names:
            self._records_alike += len(records)
            if self._records_alike > _MOST_ALIKE:
                self._alike.clear()
                self._records_alike = len(records)
            self._alike[what] = records, self.count - count
        return records

    def _new(self, name: Name) -> bytes:
        """Begin an object: it has no arguments, so all there is to it follows as its state."""
        return self._name(name) + b")" + self._numbered(b"\x81")

    def _state(self) -> bytes:
        return self._numbered(b"}") + b"("

    def _name(self, name: Name) -> bytes:
        if name in self._memo:
            return _get(self._memo[name])
        return self._text(name.module) + self._text(name.name) + self._first(name, b"\x93")

    def _layout(self) -> bytes:
        if _LAYOUT in self._memo:
            return _get(self._memo["layout"])
        made = self._name(_LAYOUT) + self._text("torch.strided") + self._numbered(b"\x85")
        return made + self._first("layout", b"R")

    def _memory_format(self) -> bytes:
        if _MEMORY_FORMAT in self._memo:
            return _get(self._memo["memory format"])
        made = self._name(_MEMORY_FORMAT) + _integer(0) + self._numbered(b"\x85")
        return made + self._first("memory format", b"R")

    def _size(self, shape: Shape) -> bytes:
        size = self._name(SIZE)
        return size + self._tuple([_integer(n) for n in shape]) + self._numbered(b"\x85") + self._numbered(b"R")

    def _path(self, path: KeyPath) -> bytes:
        if id(path) in self._memo:
            return _get(self._memo[id(path)])
        made = self._tuple([_integer(step) if isinstance(step, int) else self._text(step) for step in path])
        if path:
            self._memo[id(path)] = self.count - 1
            self._seen.append(path)
        return made

    def _tuple(self, items: Sequence[bytes]) -> bytes:
        if not items:
            return b")"
        if len(items) > len(_TUPLES):
            return b"(" + b"".join(items) + self._numbered(b"t")
        return b"".join(items) + self._numbered(_TUPLES[len(items) - 1])

    def _text(self, text: str) -> bytes:
        if id(text) in self._memo:
            return _get(self._memo[id(text)])
        data = text.encode("utf-8", "surrogatepass")
        head = b"\x8c" + bytes([len(data)]) if len(data) < 256 else b"X" + len(data).to_bytes(4, "little")
        self._seen.append(text)
        return self._first(id(text), head + data)

    def _first(self, what: object, made: bytes) -> bytes:
        self._memo[what] = self.count
        return self._numbered(made)

    def _numbered(self, made: bytes) -> bytes:
        """What a reader remembers: MEMOIZE gives it the next number."""
        self.count += 1
        return made + b"\x94"


class _Frames:
    """Cuts a pickle into frames as Python's pickler does: before the first value that begins after 64 KiB of one."""

    def __init__(self) -> None:
        self._done = [_PROTOCOL]
        self._frame: list[bytes] = []
        self._size = 0

    def add(self, records: Sequence[bytes]) -> None:
        """Go on with these."""
        data, ends, begin = b"".join(records), [*itertools.accumulate(map(len, records))], 0
        while self._size + len(data) - begin >= _FRAME_BYTES:
            least = begin + max(0, _FRAME_BYTES - self._size)
            at = next(self._begins(records, ends, least), None)
            if at is None:
                break
            self._frame.append(data[begin:at])
            self.end()
            begin = at
        self._frame.append(data[begin:])
        self._size += len(data) - begin

    def end(self) -> None:
        """End a frame."""
        frame = b"".join(self._frame)
        # The last one may be so short that it is none.
        head = b"\x95" + len(frame).to_bytes(8, "little") if len(frame) >= _LEAST_FRAME_BYTES else b""
        self._done.append(head + frame)
        self._frame, self._size = [], 0

    def taken(self) -> list[bytes]:
        """Return what is done since the last call."""
        done, self._done = self._done, []
        return done

    @staticmethod
    def _begins(records: Sequence[bytes], ends: Sequence[int], least: int) -> Iterator[int]:
        """Where values begin, from ``least`` on."""
        for record, end in itertools.islice(zip(records, ends, strict=True), bisect_right(ends, least), None):
            yield from (at for begin in _begins(record) if (at := end - len(record) + begin) >= least)


def _begins(record: bytes) -> Iterator[int]:
    """Where values begin in a record."""
    last, before_last = "", ""
    for opcode, _, at in pickletools.genops(record + b"."):
        assert at is not None
        name = opcode.name
        # A mark begins a tuple, or a batch of a list or dict, which is no value of its own.
        is_batch = last in _ADD or (last == "MEMOIZE" and before_last in ("EMPTY_DICT", "EMPTY_LIST"))
        if name in _VALUES or (name == "MARK" and not is_batch):
            yield at
        last, before_last = name, last


def _end_of_dict(count: int) -> bytes:
    return (b"s" if count == 1 else b"u") if count else b""


def _get(number: int) -> bytes:
    return b"h" + bytes([number]) if number < 256 else b"j" + number.to_bytes(4, "little")


def _integer(number: int) -> bytes:
    if number < 1 << 8:
        return b"K" + bytes([number])
    if number < 1 << 16:
        return b"M" + number.to_bytes(2, "little")
    if number < 1 << 31:
        return b"J" + number.to_bytes(4, "little")
    data = number.to_bytes(number.bit_length() // 8 + 1, "little")
    return b"\x8a" + bytes([len(data)]) + data
