"""The boxes of a DCP index, read many at a time: torch writes millions of them as nearly the same bytes.

A regular expression knows all instructions that make one box, or say where one is stored. What fits is what those
instructions say; anything else is left to the machine that knows each by itself, with the same result.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from shardsmith.formats.dcp.saved_index import CHUNK, INDEX, SIZE, STORAGE_INFO, SavedBytes
from shardsmith.formats.torch_files.pickle_machine import Made, Name, Ready, Run
from shardsmith.tensors.tensors import Chunk, Shape

_GET = rb"(h.|j....)"  # what was remembered under a number
_NEW = rb"\)\x81\x94}\x94\("  # an object without arguments, and a dict for its state
_INT = rb"(?:K.|M..|J...[\x00-\x7f]|\x8a\x05....[\x00-\x7f]|\x8a\x06.....[\x00-\x7f])"
_INTS = rb"(" + _INT + rb"\x85|" + _INT * 2 + rb"\x86|" + _INT * 3 + rb"\x87)"
_SIZE = _GET + rb"(?:" + _INTS + rb"\x94|\))\x85\x94R\x94"
_SHAPE = rb"(?:" + _SIZE + rb"|" + _GET + rb")"  # made here, or before
_TEXT = rb"(?:\x8c(.)([ -~]{1,255})\x94|" + _GET + rb")"
_BOX = re.compile(_GET + _NEW + _GET + _SHAPE + _GET + _SHAPE + rb"ub", re.DOTALL)
_PLACE = _GET + _NEW + _GET + _TEXT + _GET + rb"(" + _INT + rb"|N)(?:" + _GET + _SHAPE + rb")?ub"
_BYTES = _GET + _NEW + _GET + _TEXT + (_GET + rb"(" + _INT + rb")") * 2 + rb"(?:" + _GET + rb"N)?ub"
_STORED = re.compile(_PLACE + _BYTES, re.DOTALL)

_MOST_KNOWN = 1 << 16
"""Sizes whose bytes are remembered."""

_MOST_DIMS = 3
"""Of a shape that was not made in the same record; tuples of more numbers are written in another way."""

Memo = Mapping[int, object]


class IndexRuns:
    """The shortcuts of one reading, for ``read_pickle``.

    Attributes:
        by_name: Which one begins with which class.
    """

    def __init__(self) -> None:
        self.by_name: dict[Name, Run] = {CHUNK: self._boxes, INDEX: self._stored}
        self._sizes: dict[bytes, Made] = {}
        self._box_heads: dict[tuple[bytes, ...], bool] = {}
        self._stored_heads: dict[tuple[bytes, ...], bool] = {}

    def _boxes(self, data: bytes, position: int, memo: dict[int, object], count: int) -> tuple[list[object], int, int]:
        found, last = list[object](), tuple[bytes, ...]()
        while (match := _BOX.match(data, position)) is not None:
            of, offsets, size_1, ints_1, ref_1, sizes, size_2, ints_2, ref_2 = match.groups()
            head = of, offsets, size_1, sizes, size_2
            if head != last and not self._fits(self._box_heads, head, (CHUNK, "offsets", SIZE, "sizes", SIZE), memo):
                break
            last = head
            # The object and its dict come first.
            begin, after = self._shape(size_1, ints_1, ref_1, memo, count + 2)
            extent, after = self._shape(size_2, ints_2, ref_2, memo, after)
            found.append(Chunk(begin, extent))
            position, count = match.end(), after
        return found, position, count

    def _stored(self, data: bytes, position: int, memo: dict[int, object], count: int) -> tuple[list[object], int, int]:
        found, last = list[object](), tuple[bytes, ...]()
        while (match := _STORED.match(data, position)) is not None:
            of, fqn, length_1, text_1, ref_1, index, _, offset, size, ints, ref_2, *rest = match.groups()
            info, path, length_2, text_2, ref_3, begin, begin_value, length, length_value, transforms = rest
            head = of, fqn, index, offset, size, info, path, begin, length, transforms
            if head != last and not self._fits(self._stored_heads, head, _STORED_HEAD, memo):
                break
            last = head
            name, after = self._text(length_1, text_1, ref_1, memo, count + 2)
            shape = None
            if offset is not None:
                shape, after = self._shape(size, ints, ref_2, memo, after)
            file, after = self._text(length_2, text_2, ref_3, memo, after + 2)
            found += Ready((name, shape)), SavedBytes(file, _number(begin_value), _number(length_value), ())
            position, count = match.end(), after
        return found, position, count

    @staticmethod
    def _fits(
        heads: dict[tuple[bytes, ...], bool], head: tuple[bytes, ...], expected: tuple[object, ...], memo: Memo
    ) -> bool:
        """Whether what an entry refers to are the classes and fields of such an entry."""
        fits = heads.get(head)
        if fits is None:
            # What is remembered under a number never changes, so neither does this.
            pairs = [(memo.get(_index(ref)), wanted) for ref, wanted in zip(head, expected, strict=True) if ref]
            fits = heads[head] = all(type(one) is type(wanted) and one == wanted for one, wanted in pairs)
        return fits

    def _shape(
        self, size: bytes | None, ints: bytes | None, ref: bytes, memo: dict[int, object], count: int
    ) -> tuple[Shape, int]:
        """Return a shape, and the next free number. Raises KeyError if what is referred to is none."""
        if size is None:
            return _shape_of(memo[_index(ref)]), count
        key = ints or b""
        made = self._sizes.get(key)
        if made is None:
            if len(self._sizes) >= _MOST_KNOWN:
                self._sizes.clear()
            made = self._sizes[key] = Made(SIZE, (_numbers(key),))
        # The tuple of numbers, if it is not empty, and that of arguments are remembered before it.
        last = count + 2 if ints else count + 1
        memo[last] = made
        return made.args[0], last + 1  # type: ignore[return-value]

    @staticmethod
    def _text(length: bytes | None, text: bytes, ref: bytes, memo: dict[int, object], count: int) -> tuple[str, int]:
        """Return a text, and the next free number. Raises KeyError if it is none."""
        if length is None:
            found = memo[_index(ref)]
            if type(found) is not str:
                raise KeyError(ref)
            return found, count
        if len(text) != length[0]:
            raise KeyError(text)
        memo[count] = value = text.decode("ascii")
        return value, count + 1


_STORED_HEAD = (
    *(INDEX, "fqn", "index", "offset", SIZE),
    *(STORAGE_INFO, "relative_path", "offset", "length", "transform_descriptors"),
)


def _index(ref: bytes) -> int:
    return int.from_bytes(ref[1:], "little")


def _number(value: bytes) -> int:
    # K, M and J, or \x8a and the number of bytes.
    return int.from_bytes(value[2 if value[0] == 0x8A else 1 :], "little")


def _numbers(ints: bytes) -> Shape:
    """Return the numbers of a tuple's instructions, of which the last byte makes the tuple."""
    return tuple(_number(one) for one in re.findall(_INT, ints[:-1], re.DOTALL))


def _shape_of(value: object) -> Shape:
    if type(value) is Made and value.of == SIZE and len(value.args) == 1 and type(value.args[0]) is tuple:
        numbers: Any = value.args[0]
        if len(numbers) <= _MOST_DIMS and all(type(n) is int and 0 <= n < 1 << 63 for n in numbers):
            return numbers  # type: ignore[no-any-return]
    raise KeyError(value)
