"""The one place that checks arguments of public objects: by their annotations, at the moment of the call.

    @checked
    def __init__(self, directory: Directory, *, when: Schedule, keep: Retention | None = None) -> None:

Every argument is compared with its annotation before the body runs; all that cannot be used are named in one error.
What has the right value in another type is converted: ``np.int64(3)``, ``torch.tensor(3)`` and ``3.0`` to ``3``.
``Annotated`` aliases below add rules to a type: ``Directory``, ``Count``, ``Decay`` and so on. The keywords of
``**options: Unpack[SomeTypedDict]`` are checked as if each were written out.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, Unpack, cast, get_args, get_origin, get_type_hints

from shardsmith.checking.converting import RefusedError, convert, nearest, shown
from shardsmith.errors import UsageError

__all__ = ["check_options", "check_value", "checked", "checked_fields"]

F = TypeVar("F", bound=Callable[..., Any])
T = TypeVar("T", bound=type)


def checked(function: F) -> F:
    """Check and convert the arguments of each call of ``function`` by its annotations, before its body runs.

    The decorated function raises UsageError, which names every argument that cannot be used, with what was given and
    what is expected; and TypeError, as Python does, for names that it does not have.
    """
    signature = inspect.signature(function)
    # A class method or plain function has no instance to name in an error.
    is_method = next(iter(signature.parameters), None) == "self"

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            bound = signature.bind(*args, **kwargs)
            # ``bind`` takes any keyword for ``**options``; which ones there are is in the TypedDict.
            _refuse_unknown(function, signature, kwargs)
        except TypeError as error:
            # Python's own message has no nearest name; ``from None``, since the cause says the same.
            raise TypeError(_explain(function, signature, kwargs, error)) from None
        bound.arguments = _converted(
            _owner(function, args if is_method else ()), signature, _hints(function), bound.arguments
        )
        return function(*bound.args, **bound.kwargs)

    return cast(F, call)


def checked_fields(cls: T) -> T:
    """Check and convert the fields of a dataclass whenever one is made: ``checked``, for its constructor."""
    cls.__init__ = checked(cls.__init__)  # type: ignore[misc]
    return cls


def check_options(owner: str, function: Callable[..., Any], options: Mapping[str, Any], name: str = "") -> None:
    """Raise UsageError unless ``function`` takes these keyword arguments with these values. Calls nothing.

    Args:
        owner: The object to name in the error.
        function: A class, or a function whose annotations say what is expected.
        options: Keyword arguments, by name.
        name: Prefix of the arguments in the error: that of the mapping in which they came.
    """
    target = function.__init__ if isinstance(function, type) else function  # type: ignore[misc]
    # ``inspect.signature`` sees through ``wraps``, and so does ``unwrap``: both are of the function that was written.
    parameters = [known for known in _keywords(inspect.unwrap(target), inspect.signature(target)) if known != "self"]
    problems = [
        f"{name}{option}: there is no such option{_did_you_mean(option, parameters)}"
        for option in options
        if option not in parameters
    ]
    hints = _hints(inspect.unwrap(target))
    known = {option: value for option, value in options.items() if option in parameters}
    problems += _check(hints, known, name)[1]
    _raise(owner, problems)


def check_value(owner: str, name: str, value: Any, hint: Any) -> Any:
    """Return one value as its annotation wants it. Raises UsageError."""
    converted, problems = _check({name: hint}, {name: value})
    _raise(owner, problems)
    return converted[name]


def _owner(function: Callable[..., Any], instance: Sequence[Any]) -> str:
    """What to call a function in an error: ``every``, ``EMA``, ``ShardedSave.save``."""
    if not instance:
        return function.__name__
    cls = type(instance[0]).__name__
    return cls if function.__name__ == "__init__" else f"{cls}.{function.__name__}"


def _converted(
    owner: str, signature: inspect.Signature, hints: Mapping[str, Any], values: Mapping[str, Any]
) -> dict[str, Any]:
    """The values, converted. Raises UsageError, naming all that cannot be used."""
    converted: dict[str, Any] = {}
    problems: list[str] = []
    for name, value in values.items():
        kind = signature.parameters[name].kind
        single: dict[str, Any] = {name: value}
        if kind is inspect.Parameter.VAR_POSITIONAL:
            single = {f"{name}[{i}]": one for i, one in enumerate(value)}
        elif kind is inspect.Parameter.VAR_KEYWORD:
            single = dict(value)
        # A keyword of ``**options`` has a hint of its own; an item of ``*args`` has that of the whole.
        found, wrong = _check({one: hints.get(one, hints.get(name, Any)) for one in single}, single)
        problems += wrong
        # A refused value is missing in ``found``; ``_raise`` below ends the call before it is used.
        converted[name] = found.get(name)
        if kind is inspect.Parameter.VAR_POSITIONAL:
            converted[name] = tuple(found.values())
        elif kind is inspect.Parameter.VAR_KEYWORD:
            converted[name] = found
    _raise(owner, problems)
    return converted


def _check(hints: Mapping[str, Any], values: Mapping[str, Any], prefix: str = "") -> tuple[dict[str, Any], list[str]]:
    """The values that can be used, converted; a line for each of the others."""
    converted, problems = {}, []
    for name, value in values.items():
        try:
            converted[name] = convert(value, hints.get(name, Any))
        except RefusedError as refused:
            # Inside a list or mapping the item at fault is shown, not all of the argument.
            at_fault = refused.value if refused.where else value
            problems.append(f"{prefix}{name}{refused.where}={shown(at_fault)}: {refused}")
    return converted, problems


def _raise(owner: str, problems: list[str]) -> None:
    if len(problems) == 1:
        raise UsageError(f"{owner}: {problems[0]}{'' if problems[0].endswith('?') else '.'} Nothing was done.")
    if problems:
        lines = "\n  ".join(problems)
        raise UsageError(f"{owner}: {len(problems)} arguments cannot be used\n  {lines}\nNothing was done.")


# Annotations are strings here, and each call of a public object would evaluate them anew.
@functools.cache
def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    """Annotations by name; those of ``**options: Unpack[...]`` each under its own name."""
    hints = get_type_hints(function, include_extras=True)
    for hint in list(hints.values()):
        if get_origin(hint) is Unpack:
            hints |= get_type_hints(get_args(hint)[0], include_extras=True)
    return hints


def _keywords(function: Callable[..., Any], signature: inspect.Signature) -> list[str]:
    """The names of all arguments; ``**options: Unpack[...]`` is replaced by those that it stands for."""
    names: list[str] = []
    for name in signature.parameters:
        hint = _hints(function).get(name)
        names += get_type_hints(get_args(hint)[0]) if get_origin(hint) is Unpack else [name]
    return names


def _refuse_unknown(function: Callable[..., Any], signature: inspect.Signature, given: Mapping[str, Any]) -> None:
    """Raise TypeError, as Python does, for what ``**options: Unpack[...]`` does not name."""
    if any(get_origin(hint) is Unpack for hint in _hints(function).values()):
        known = _keywords(function, signature)
        for name in given:
            if name not in known:
                raise TypeError(f"got an unexpected keyword argument {name!r}")


def _explain(
    function: Callable[..., Any], signature: inspect.Signature, kwargs: Mapping[str, Any], error: TypeError
) -> str:
    """Python's own words, with the nearest name for each one that is unknown."""
    known = _keywords(function, signature)
    meant = "".join(_did_you_mean(name, known) for name in kwargs if name not in known)
    return f"{function.__qualname__.removesuffix('.__init__')}: {error}{meant}"


def _did_you_mean(name: str, known: Any) -> str:
    match = nearest(name, known)
    return f"; did you mean {match}?" if match else ""
