"""Values compared with type annotations: what fits, what is converted, and what is said of the rest."""

from __future__ import annotations

import difflib
import math
import operator
import os
import re
import reprlib
import signal
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import torch

_SECRET = re.compile(r"(:/+)[^/@\s]*@")
"""Of a URL, where it may hold credentials."""
MOST = (1 << 63) - 1
"""The largest number that torch, JSON readers and names of files can hold."""


class RefusedError(Exception):
    """A value cannot be used; the message says what is expected.

    Attributes:
        value: The value at fault.
        where: Its place within the argument, such as ``['data']``.
        has_cure: Whether the message says what to write instead.
    """

    def __init__(self, value: object, message: str, *, where: str = "", has_cure: bool = False) -> None:
        super().__init__(message)
        self.value = value
        self.where = where
        self.has_cure = has_cure


def convert(value: Any, hint: Any) -> Any:
    """Return the value as its annotation wants it. Raises RefusedError."""
    try:
        return _converted(value, hint)
    except RefusedError:
        raise
    # Whatever it is, a caller of a public object gets one kind of error, and knows which argument it was.
    except Exception as error:  # of the value's own methods, such as __eq__ or __iter__
        raise RefusedError(value, f"{name_of(hint)} is expected, and this raises {type(error).__name__}") from error


def _converted(value: Any, hint: Any) -> Any:
    origin = get_origin(hint)
    # A string is a forward reference that could not be evaluated: nothing is known to compare with.
    if hint is Any or hint is object or isinstance(hint, str):
        return value
    if origin is Annotated:
        base, *rules = get_args(hint)
        # The rules see the converted value, so that each may count on its type.
        converted = convert(value, base)
        for rule in rules:
            converted = rule(converted)
        return converted
    if origin in (Union, types.UnionType):
        return _one_of(value, get_args(hint))
    if origin is Literal:
        return _choice(value, get_args(hint))
    # Before the general cases: a ``str`` is an Iterable, too, and ``Path`` an object like any other.
    if hint in _SIMPLE:
        return _SIMPLE[hint](value)
    # Before Iterable, which a Mapping is as well.
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return _mapping(value, hint)
    if isinstance(origin, type) and origin is not type and issubclass(origin, Iterable):
        return _items(value, hint)
    if origin is not None:  # Callable[...]
        return _instance(value, origin)
    return _instance(value, hint)


def nearest(word: object, known: Iterable[Any]) -> str | None:
    """Return the known word that is most like this one; None if none is."""
    words = {str(one).casefold(): str(one) for one in known}
    matches = difflib.get_close_matches(str(word).casefold(), words, 1, 0.5)
    return words[matches[0]] if matches else None


def shown(value: object) -> str:
    """Return a value, short enough for a message."""
    if isinstance(value, str | int | float | bool | Path | type(None)) or type(value).__module__.startswith(
        ("shardsmith", "numpy")
    ):
        text = _SECRET.sub(r"\1...@", repr(value))
        return text if len(text) <= 80 else f"{text[:77]}..."
    if isinstance(value, torch.dtype):
        return str(value)
    if isinstance(value, torch.Tensor) and value.numel() == 1 and not value.is_meta:
        return f"tensor({value.item()})"
    if isinstance(value, list | tuple | set | frozenset) and all(isinstance(one, str | int | float) for one in value):
        return reprlib.repr(value)
    if isinstance(value, type | types.FunctionType):
        return f"the {'class' if isinstance(value, type) else 'function'} {value.__name__}"
    return _kind(value)


def _kind(value: object) -> str:
    """The type of a value, with its article."""
    name = type(value).__name__
    return f"{'an' if name[:1].lower() in 'aeiou' else 'a'} {name}"


def _one_of(value: Any, hints: Sequence[Any]) -> Any:
    refusals = []
    for hint in sorted(hints, key=lambda hint: hint is float):  # an int stays one where both will do
        try:
            return convert(value, hint)
        except RefusedError as refused:
            refusals.append(refused)
    # A refusal that says what to write, or where it is, helps more than a list of types.
    if best := next((refused for refused in refusals if refused.has_cure or refused.where), None):
        raise best
    raise RefusedError(value, f"{' or '.join(dict.fromkeys(map(name_of, hints)))} is expected")


def _choice(value: Any, allowed: Sequence[Any]) -> Any:
    for one in allowed:
        # By type, too: True equals 1, and 1 equals 1.0.
        if type(value) is type(one) and value == one:
            return value
    words = " or ".join(f'"{one}"' if isinstance(one, str) else repr(one) for one in allowed)
    match = nearest(value, allowed) if isinstance(value, str) else None
    cure = f'; did you mean "{match}"?' if match else ""
    raise RefusedError(value, f"{words} is expected{cure}", has_cure=True)


def _int(value: Any) -> int:
    """Whole numbers of every kind. A float or tensor such as 1e3 counts as the whole number that it is."""
    # ``operator.index`` would take True for 1; a flag that lands in a number is a mistake.
    if not _is_bool(value):
        try:
            # Integers of numpy, and tensors of one integer, have ``__index__``.
            return operator.index(value)
        except (TypeError, ValueError):
            number = _float_or_none(value)
            if number is not None and number.is_integer():
                return int(number)
    raise RefusedError(value, f"a whole number is expected, and this is {_kind(value)}")


def _float(value: Any) -> float:
    number = None if _is_bool(value) else _float_or_none(value)
    # NaN compares as false with every limit, so no rule would refuse it.
    if number is None or math.isnan(number):
        raise RefusedError(value, "a number is expected")
    return number


def number_or_nan(value: Any) -> float:
    """Return a measured number: NaN is one, too. Raises RefusedError."""
    number = None if _is_bool(value) else _float_or_none(value)
    if number is None:
        raise RefusedError(value, "a number is expected")
    return number


def _float_or_none(value: Any) -> float | None:
    """The number that this is; None of strings, of several numbers, and of anything else."""
    # Arrays and tensors without dimensions are numbers; strings have no ``ndim``.
    is_number = isinstance(value, int | float) or getattr(value, "ndim", None) == 0
    try:
        return float(value) if is_number else None
    except (TypeError, ValueError, OverflowError):
        return None


def _bool(value: Any) -> bool:
    if _is_bool(value):
        return bool(value)
    raise RefusedError(value, "True or False is expected")


def _is_bool(value: Any) -> bool:
    # By name, so that numpy need not be imported; numpy 2 calls it bool.
    return isinstance(value, bool) or type(value).__name__ in ("bool_", "bool")  # numpy's


def _str(value: Any) -> str:
    if isinstance(value, str):
        return value
    raise RefusedError(value, "a string is expected")


def _none(value: Any) -> None:
    if value is not None:
        raise RefusedError(value, "None is expected")


def _path(value: Any) -> Path:
    if isinstance(value, str | os.PathLike):
        return Path(value)
    raise RefusedError(value, "a path is expected")


def _signal(value: Any) -> signal.Signals:
    # A name that a user can have meant: say how to write it.
    if isinstance(value, str) and value in signal.Signals.__members__:
        raise RefusedError(value, f"{name_of(signal.Signals)} is expected; write signal.{value}", has_cure=True)
    try:
        return signal.Signals(_int(value))
    except (ValueError, RefusedError):
        raise RefusedError(value, f"{name_of(signal.Signals)} is expected") from None


_SIMPLE: dict[Any, Callable[[Any], Any]] = {
    int: _int,
    float: _float,
    bool: _bool,
    str: _str,
    types.NoneType: _none,
    None: _none,
    Path: _path,
    signal.Signals: _signal,
}


def _mapping(value: Any, hint: Any) -> dict[Any, Any]:
    if not isinstance(value, Mapping):
        raise RefusedError(value, f"{name_of(hint)} is expected")
    key_hint, value_hint = get_args(hint) or (Any, Any)
    return {convert(key, key_hint): _within(f"[{key!r}]", one, value_hint) for key, one in value.items()}


def _items(value: Any, hint: Any) -> Any:
    item_hint = (get_args(hint) or (Any,))[0]
    if isinstance(value, str) and item_hint is str:
        # A string is an iterable of strings, and one letter an item would be no error anywhere.
        raise RefusedError(value, f"a list of strings is expected; write [{value!r}]", has_cure=True)
    # A module or tensor is iterable as well; one that was given for a list of them is a mistake.
    if isinstance(value, str | bytes | Mapping | torch.nn.Module | torch.Tensor) or not isinstance(value, Iterable):
        raise RefusedError(value, f"{name_of(hint)} is expected")
    items = [_within(f"[{i}]", one, item_hint) for i, one in enumerate(value)]
    return frozenset(items) if get_origin(hint) is frozenset else items


def _within(where: str, value: Any, hint: Any) -> Any:
    try:
        return convert(value, hint)
    except RefusedError as refused:
        # From the inside out: the place grows by one index at each level.
        where = f"{where}{refused.where}"
        raise RefusedError(refused.value, str(refused), where=where, has_cure=refused.has_cure) from None


def _instance(value: Any, hint: Any) -> Any:
    # A class has all methods of its instances, so it would pass for one below.
    if isinstance(value, type) and hint is not Callable:
        raise RefusedError(value, f"an object is expected, not a class; write {value.__name__}(...)", has_cure=True)
    # ``isinstance`` works with a few protocols only; ask for the members instead.
    if getattr(hint, "_is_protocol", False):
        return _with_members(value, hint)
    if isinstance(value, hint):
        return value
    suggestion: Callable[[Any], str | None] | None = getattr(hint, "suggestion", None)
    # A class may know what stands close to its instances, such as a number for a schedule of steps.
    if suggestion is not None and (cure := suggestion(value)) is not None:
        raise RefusedError(value, f"{name_of(hint)} is expected; write {cure}", has_cure=True)
    raise RefusedError(value, f"{name_of(hint)} is expected")


def _with_members(value: Any, protocol: type) -> Any:
    members = [name for name in {**protocol.__dict__, **protocol.__annotations__} if not name.startswith("_")]
    missing = [name for name in members if not hasattr(value, name)]
    if missing:
        expected = f"an object with {' and '.join(members)} is expected"
        is_plain = isinstance(value, str | int | float | type(None))
        lacks = "" if is_plain else f", and {_kind(value)} has no {' and no '.join(missing)}"
        raise RefusedError(value, f"{expected}{lacks}", has_cure=not is_plain)
    return value


def name_of(hint: Any) -> str:
    """Return a type in words, with its article."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return name_of(args[0])
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(map(name_of, args)))
    if origin is Literal:
        return " or ".join(f'"{value}"' if isinstance(value, str) else repr(value) for value in args)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return f"a mapping of {_plural(args[0])} to {_plural(args[1])}"
    if isinstance(origin, type) and issubclass(origin, Iterable):
        return f"a list of {_plural(args[0])}"
    return NAMES.get(hint) or _with_article(getattr(origin or hint, "__name__", str(hint)))


def _plural(hint: Any) -> str:
    plain = name_of(hint).removeprefix("an ").removeprefix("a ")
    first, rest = plain.partition(" ")[::2]
    return " ".join([f"{first}s", rest]).strip() if hint in NAMES or plain.isalpha() else plain


def _with_article(name: str) -> str:
    return f"{'an' if name[0] in 'AEIOUaeiou' else 'a'} {name}"


NAMES: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "True or False",
    str: "a string",
    Path: "a path",
    torch.nn.Module: "a model (nn.Module)",
    signal.Signals: "a signal such as signal.SIGTERM",
    types.NoneType: "None",
    None: "None",
    Any: "value",
}
