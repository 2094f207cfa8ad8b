"""Reads a pickle as data: no class is imported, nothing is called, no attribute is set.

Python's own unpickler runs what the bytes ask for, and even a restricted one hands real classes to the instructions
that build and alter objects. This one knows the instructions that a pickle of plain records needs, and answers "call X
with these arguments" with a ``Made`` that says so. What the records mean is for the caller to decide.
"""

from __future__ import annotations

import pickle
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from shardsmith.errors import CorruptCheckpointError, UnsafeCheckpointError


class Name(NamedTuple):
    """A global that a pickle names. Only a name: it is never looked up."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


class Made:
    """What a pickle says about one object: ``of(*args)``, then ``items`` and ``state`` put into it."""

    __slots__ = ("args", "items", "of", "state")

    def __init__(self, of: Name, args: tuple[object, ...]) -> None:
        self.of = of
        self.args = args
        is_dict = of.name == "OrderedDict" and of == ORDERED_DICT and not args
        # Any other object takes no items: a class with __setitem__ of its own could do anything with them.
        self.items: dict[str | int | Made, object] | None = {} if is_dict else None
        self.state: object = None


class Ready:
    """A key of a dict that a ``Run`` has read. As ``Made``, each is another one, whatever it says."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value


Run = Callable[[bytes, int, dict[int, object], int], tuple[list[object], int, int]]
"""Reads many records at once that begin with one class, as far as they look alike.

Takes the bytes, the position of the instruction that fetches the class, what is remembered, and the number that is next
to be remembered. Returns what the instructions leave on the stack, and position and number after them; nothing and the
same two, if it reads none. Of what they remember it puts down what others refer to, and nothing under later numbers.
"""

ORDERED_DICT = Name("collections", "OrderedDict")
"""The one kind of object into which items may be put."""


PERSISTENT = Name("", "persistent id")
"""What a persistent id is made of, where the caller expects some: its one argument is the id."""


def read_pickle(
    data: bytes,
    path: Path,
    known: frozenset[Name],
    *,
    persistent_ids: bool = False,
    runs: Mapping[Name, Run] | None = None,
) -> object:
    """Return the object that a pickle of protocol 2 to 5 describes.

    Values are None, bool, int, float, str, tuple, list, dict (with str, int and ``Made`` keys), ``Name`` and ``Made``.
    They may be shared and may even contain themselves, so never walk them without a bound.

    Args:
        data: The bytes of the pickle.
        path: Where the bytes come from, for the errors.
        known: The globals that may be named. Compared as a whole: ``("torch", "os.system")`` is not in ``torch``.
        persistent_ids: Whether objects outside the pickle may be referred to.
        runs: By the class that they begin with, what reads many records at once. Their values are among what is
            returned. With them, errors need not be the first ones, and a sound pickle may be refused.

    Raises:
        UnsafeCheckpointError: when it names another global, or uses an instruction that exists to run code.
        CorruptCheckpointError: when it is no such pickle, is cut off, or has something behind its end.
    """
    machine = _Machine(data, path, known, persistent_ids, runs)
    # Counted before anything is made: a pickle of 1 MB can ask for a million dicts, which take 64 MB and more. The
    # bytes may also be data, so that the count is an upper bound.
    containers, others = (sum(map(data.count, codes)) for codes in (_CONTAINERS, _OTHERS))
    if containers > max(_FREE_OBJECTS, len(data) // 4) or others > max(_FREE_OBJECTS, len(data) // 2):
        count = containers + others  # each takes 64 bytes or so, and one byte of the file
        raise machine.corrupt(f"it may make {count} lists, dicts and tuples, which is more than what describes tensors")
    try:
        return machine.run()
    except (IndexError, KeyError, UnicodeDecodeError, struct.error) as error:
        raise machine.corrupt(f"it breaks off or contradicts itself ({type(error).__name__})") from error


class _Machine:
    """The state of one reading: position, stack, marks and memo, as the pickle protocol has them."""

    def __init__(
        self,
        data: bytes,
        path: Path,
        known: frozenset[Name],
        persistent_ids: bool,
        runs: Mapping[Name, Run] | None = None,
    ) -> None:
        self.data = data
        self.path = path
        self.known = known
        self.persistent_ids = persistent_ids
        self.position = 0
        self.stack: list[object] = []
        self.outer: list[list[object]] = []  # the stacks below each open mark
        self.memo: dict[int, object] = {}  # not a list: a pickle may number an entry 2**32 - 1
        self.remembered = 0  # so many numbers are taken, of which runs leave some out of the memo
        self.runs = runs or {}

    def run(self) -> object:
        # PROTO is the first instruction from protocol 2 on; protocols 0 and 1 are text and have none.
        if self.data[:1] != b"\x80" or not 2 <= self.data[1] <= 5:
            raise self.corrupt("it does not begin with a pickle protocol of 2 to 5")
        self.position = 2
        while (code := self.next_rare()) != _STOP:
            handler = _HANDLERS.get(code)
            if handler is None:
                raise self.refused(code)
            handler(self)
        # A second pickle behind the first would be read by nobody, or by another reader than this one.
        if len(self.stack) != 1 or self.outer or self.position != len(self.data):
            raise self.corrupt("something is left over behind its end")
        return self.stack[0]

    def next_rare(self) -> int:
        """Carry out the instructions that most of a pickle consists of, without a call for each; the next other one.

        Their entries in ``_INSTRUCTIONS`` say the same.
        """
        # Locals are faster than attributes, and this loop runs once for each instruction of a large index.
        data, stack, memo, position = self.data, self.stack, self.memo, self.position
        runs, remembered = self.runs, self.remembered
        try:
            while True:
                code = data[position]
                position += 1
                if code == _MEMOIZE:
                    memo[remembered] = stack[-1]
                    remembered += 1
                elif code in (_BINGET, _LONG_BINGET):
                    begin = position - 1
                    if code == _BINGET:
                        found = memo[data[position]]
                        position += 1
                    else:
                        found = memo[_UINT32(data, position)[0]]
                        position += 4
                    if type(found) is Name and (run := runs.get(found)):
                        values, end, remembered = run(data, begin, memo, remembered)
                        if values:
                            stack += values
                            position = end
                            continue
                    stack.append(found)
                elif code == _BININT1:
                    stack.append(data[position])
                    position += 1
                elif code == _TUPLE1:
                    stack[-1] = (stack[-1],)
                elif code == _TUPLE2:
                    stack[-2:] = [(stack[-2], stack[-1])]
                elif code == _EMPTY_TUPLE:
                    stack.append(())
                elif code == _EMPTY_DICT:
                    stack.append({})
                elif code == _BININT2:
                    stack.append(data[position] | data[position + 1] << 8)
                    position += 2
                elif code == _BININT:
                    stack.append(_INT32(data, position)[0])
                    position += 4
                elif code == _MARK:
                    self.outer.append(stack)
                    # The local name stays an alias of self.stack, which the handlers of rare instructions use.
                    stack = self.stack = []
                elif code in (_NEWOBJ, _REDUCE):
                    args, of = stack.pop(), stack[-1]
                    # Nothing is ever called: a class and its arguments become a record of both.
                    if type(args) is not tuple or type(of) is not Name or of.name == "getattr":
                        stack.append(args)
                        return code
                    stack[-1] = Made(of, args)
                elif code == _BUILD:
                    state, target = stack.pop(), stack[-1]
                    if type(target) is not Made or target.state is not None:
                        stack.append(state)  # as it was: the handler of this instruction says what is wrong
                        return code
                    target.state = state
                elif code == _SETITEMS:
                    # update_dict names the position in its errors.
                    self.position = position
                    self.update_dict(self.pop_mark())
                    # pop_mark has put the stack below the mark back in place.
                    stack = self.stack
                else:
                    return code
        finally:
            self.position, self.remembered = position, remembered

    def corrupt(self, reason: str) -> CorruptCheckpointError:
        return CorruptCheckpointError(self.path, f"is no readable pickle: at byte {self.position}, {reason}")

    def unsafe(self, reason: str) -> UnsafeCheckpointError:
        return UnsafeCheckpointError(
            self.path, f"{reason} (pickle, byte {self.position}). Nothing was run. Only load it if you trust its author"
        )

    def refused(self, code: int) -> Exception:
        name = _RUN_CODE.get(bytes([code]))
        if name is not None:
            return self.unsafe(f"uses the instruction {name}, which plain records do not need")
        return self.corrupt(f"the instruction {code:#04x} does not occur in plain records")

    def take(self, length: int) -> bytes:
        end = self.position + length
        if end > len(self.data):
            raise self.corrupt("it is cut off")
        chunk = self.data[self.position : end]
        self.position = end
        return chunk

    def byte(self) -> int:
        position = self.position
        self.position = position + 1
        return self.data[position]

    def number(self, length: int) -> int:
        return int.from_bytes(self.take(length), "little")

    def line(self) -> str:
        # At most 200 bytes: without a bound each of many unfinished names would be searched for in the whole file.
        end = self.data.find(b"\n", self.position, self.position + 200)
        if end < 0:
            raise self.corrupt("a name does not end")
        text = self.take(end - self.position).decode("ascii")
        self.position += 1
        return text

    def push(self, value: object) -> None:
        self.stack.append(value)

    def pop_mark(self) -> list[object]:
        items = self.stack
        self.stack = self.outer.pop()
        return items

    def name(self, module: object, name: object) -> None:
        if type(module) is not str or type(name) is not str:
            raise self.corrupt("a global is not named by two strings")
        found = Name(module, name)
        if found not in self.known:
            raise self.unsafe(f"asks for {found!s:.200}, which is not needed to describe tensors")
        self.push(found)

    def make(self) -> None:
        args, of = self.stack.pop(), self.stack.pop()
        if type(args) is not tuple or type(of) is not Name:
            raise self.corrupt("something that is not a known global is called")
        self.push(self.nested_class(of, args) or Made(of, args))

    def nested_class(self, of: Name, args: tuple[object, ...]) -> Name | None:
        """Return what protocols before 4 write for a known class inside a class: getattr(outer, "inner")."""
        if of.name != "getattr":
            return None
        # Exactly getattr with one known outer class and a text; the inner class must be known by its full name, too.
        match of, args:
            case Name(module="__builtin__" | "builtins", name="getattr"), (Name(module=module, name=outer), str(inner)):
                found = Name(module, f"{outer}.{inner}")
                return found if found in self.known else None
        return None

    def build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if type(target) is not Made or target.state is not None:
            raise self.corrupt("state is put into something that takes none")
        target.state = state

    def extend_list(self, items: list[object]) -> None:
        target = self.stack[-1]
        if type(target) is not list:
            raise self.corrupt("something is appended to what is no list")
        target.extend(items)

    def update_dict(self, items: list[object]) -> None:
        target = self.stack[-1]
        if type(target) is Made:
            target = target.items
        if type(target) is not dict or len(items) % 2:
            raise self.corrupt("an item is put into what is no dict")
        # The items are a flat list of keys and values in turn.
        for key, value in zip(*[iter(items)] * 2, strict=True):
            if type(key) not in _KEY_TYPES or (type(key) is int and abs(key) > _MAX_KEY) or key in target:
                raise self.corrupt("a key of a dict occurs twice or is neither a string, a number nor a record")
            target[key] = value

    def pop_many(self, count: int) -> list[object]:
        if len(self.stack) < count:
            raise self.corrupt("the stack is empty")
        items = self.stack[-count:]
        del self.stack[-count:]
        return items

    def frame(self) -> None:
        # A hint for buffered reading, which is not needed here; a length beyond the end means a truncated file.
        if self.number(8) > len(self.data) - self.position:
            raise self.corrupt("it is cut off")

    def open_mark(self) -> None:
        self.outer.append(self.stack)
        self.stack = []

    def persistent_id(self) -> None:
        if not self.persistent_ids:
            raise self.unsafe("refers to an object outside the file")
        self.push(Made(PERSISTENT, (self.stack.pop(),)))

    def remember(self, index: int) -> None:
        # One number may be given again, which a run cannot know; who writes so is not torch.
        if self.runs:
            raise self.corrupt("numbers are given by hand")
        self.remembered += index not in self.memo
        self.memo[index] = self.stack[-1]


_KEY_TYPES = (str, int, Made, Ready)
_MAX_KEY = 1 << 31  # larger ones may be chosen so that all have one hash, and a dict of them takes quadratic time
_CONTAINERS = (pickle.EMPTY_DICT, pickle.EMPTY_LIST)
_OTHERS = (pickle.MARK, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3)
# Small pickles have no lower bound of bytes per object: so many objects take a few MB at most.
_FREE_OBJECTS = 100_000
_STOP = pickle.STOP[0]
_MEMOIZE = pickle.MEMOIZE[0]
_BINGET = pickle.BINGET[0]
_LONG_BINGET = pickle.LONG_BINGET[0]
_BININT1 = pickle.BININT1[0]
_TUPLE1 = pickle.TUPLE1[0]
_TUPLE2 = pickle.TUPLE2[0]
_EMPTY_TUPLE = pickle.EMPTY_TUPLE[0]
_EMPTY_DICT = pickle.EMPTY_DICT[0]
_BININT = pickle.BININT[0]
_BININT2 = pickle.BININT2[0]
_MARK = pickle.MARK[0]
_NEWOBJ = pickle.NEWOBJ[0]
_REDUCE = pickle.REDUCE[0]
_BUILD = pickle.BUILD[0]
_SETITEMS = pickle.SETITEMS[0]
_UINT32 = struct.Struct("<I").unpack_from
_INT32 = struct.Struct("<i").unpack_from
_RUN_CODE = {
    pickle.PERSID: "PERSID",
    pickle.INST: "INST",
    pickle.OBJ: "OBJ",
    pickle.EXT1: "EXT1",
    pickle.EXT2: "EXT2",
    pickle.EXT4: "EXT4",
    pickle.NEWOBJ_EX: "NEWOBJ_EX",
    pickle.NEXT_BUFFER: "NEXT_BUFFER",
    pickle.READONLY_BUFFER: "READONLY_BUFFER",
}
_INSTRUCTIONS: dict[bytes, Callable[[_Machine], None]] = {
    pickle.FRAME: _Machine.frame,
    # values
    pickle.NONE: lambda m: m.push(None),
    pickle.NEWTRUE: lambda m: m.push(True),
    pickle.NEWFALSE: lambda m: m.push(False),
    pickle.BININT: lambda m: m.push(int.from_bytes(m.take(4), "little", signed=True)),
    pickle.BININT1: lambda m: m.push(m.byte()),
    pickle.BININT2: lambda m: m.push(m.number(2)),
    pickle.BINFLOAT: lambda m: m.push(*struct.unpack(">d", m.take(8))),
    pickle.LONG1: lambda m: m.push(int.from_bytes(m.take(m.byte()), "little", signed=True)),
    pickle.SHORT_BINUNICODE: lambda m: m.push(m.take(m.byte()).decode()),
    pickle.BINUNICODE: lambda m: m.push(m.take(m.number(4)).decode()),
    # containers
    pickle.MARK: _Machine.open_mark,
    pickle.EMPTY_LIST: lambda m: m.push([]),
    pickle.EMPTY_DICT: lambda m: m.push({}),
    pickle.EMPTY_TUPLE: lambda m: m.push(()),
    pickle.TUPLE: lambda m: m.push(tuple(m.pop_mark())),
    pickle.TUPLE1: lambda m: m.push(tuple(m.pop_many(1))),
    pickle.TUPLE2: lambda m: m.push(tuple(m.pop_many(2))),
    pickle.TUPLE3: lambda m: m.push(tuple(m.pop_many(3))),
    pickle.APPEND: lambda m: m.extend_list(m.pop_many(1)),
    pickle.APPENDS: lambda m: m.extend_list(m.pop_mark()),
    pickle.SETITEM: lambda m: m.update_dict(m.pop_many(2)),
    pickle.SETITEMS: lambda m: m.update_dict(m.pop_mark()),
    # records
    pickle.GLOBAL: lambda m: m.name(m.line(), m.line()),
    pickle.STACK_GLOBAL: lambda m: m.name(*m.pop_many(2)),
    pickle.REDUCE: _Machine.make,
    pickle.NEWOBJ: _Machine.make,
    pickle.BUILD: _Machine.build,
    pickle.BINPERSID: _Machine.persistent_id,
    # sharing
    pickle.MEMOIZE: lambda m: m.remember(m.remembered),
    pickle.BINPUT: lambda m: m.remember(m.byte()),
    pickle.LONG_BINPUT: lambda m: m.remember(m.number(4)),
    pickle.BINGET: lambda m: m.push(m.memo[m.byte()]),
    pickle.LONG_BINGET: lambda m: m.push(m.memo[m.number(4)]),
}
_HANDLERS = {code[0]: handler for code, handler in _INSTRUCTIONS.items()}
