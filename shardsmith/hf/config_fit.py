"""A config.json that describes the tensors beside it: adapted where they or the live model say how, else refused.

What a change is worth is what the class makes of it: a change is kept if fewer tensors are without their place then.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from shardsmith.hf.config_attempt import TIE, Attempt, Excused, tellable
from shardsmith.hf.config_changes import (
    AS_LIVE,
    OF_THE_LIVE_MODEL,
    as_live,
    changed_sizes,
    in_modern_spelling,
    relabelled,
    resized,
    settings_of,
    unquantized,
    untied,
    with_classes_of,
)
from shardsmith.hf.config_entries import Config, Path, dotted, entries, with_values
from shardsmith.hf.known_class import fit_of, model_class_of
from shardsmith.hf.model_class import DIFFUSERS_KEY
from shardsmith.tensors.likeness import ending_alike, patterns_for
from shardsmith.tensors.tensors import TensorSpec

_MOST_SIZES = 24
"""How many numbers are tried one by one, a model without data each."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ConfigFit:
    """A config, and how the class that it names takes certain tensors."""

    config: dict[str, Any]
    """Adapted."""
    changes: tuple[str, ...] = ()
    """What was adapted, and why, for people."""
    measured_by: str | None = None
    """The class; None if none could be made."""
    reason: str = ""
    """Why none could be made."""
    problems: tuple[str, ...] = ()
    """Where the tensors are not what the class wants. Empty without a class."""
    missing: tuple[str, ...] = ()
    """Tensors of the class that the files lack, if there is no other problem."""
    no_place: tuple[str, ...] = ()
    """Patterns of the tensors that the class has no place for, if there is no other problem."""
    changed_modules: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Modules of the class that compute with more tensors than it has: module -> these, without the module's name."""
    as_base: tuple[str, ...] = ()
    """Differences that the base model's own files have as well: no fault of the export."""
    keys: tuple[str, ...] = ()
    """The keys of the config that the problems speak against, with their values."""
    ignored: tuple[str, ...] = ()
    """Tensors that the class passes over when it loads."""
    head: frozenset[str] = frozenset()
    """Tensors of the head, if the config says their number of classes now and the base model had another one."""
    is_another_model: bool = False
    """Whether the config of the live model was taken in more than its vocabulary, its head and its ties."""

    @property
    def is_exact(self) -> bool:
        """Whether there is a class, and the tensors are what it wants."""
        return self.measured_by is not None and not self.problems


def fit_config(
    config: Config,
    specs: Mapping[str, TensorSpec],
    *,
    base: Mapping[str, TensorSpec] | None = None,
    of_base: Config | None = None,
    separate: Mapping[str, str] | None = None,
    live: Config | None = None,
    allow: Sequence[str] = (),
) -> ConfigFit:
    """Adapt a config to the tensors that will lie beside it, and compare them with the class that it names then.

    Args:
        config: Content of the base model's config.json.
        specs: The tensors as they will be written.
        base: The base model's own tensors, in its files. What its class thinks of them is no fault of the export.
        of_base: Content of the base model's config.json, where ``config`` is another one already.
        separate: Names in files that are not one tensor, although the class may tie them: alias -> kept name.
        live: Of a live model: what its config says, with every default.
        allow: Patterns of names that may be missing or extra.
    """
    config, note, head = with_classes_of(config, specs)
    if note:  # of a library whose classes are not asked
        return replace(fit_config(config, specs, allow=allow), changes=(note,), head=head)
    excused = _excused(config if of_base is None else of_base, base, specs, allow)

    def attempt(config: Config, changes: tuple[str, ...] = ()) -> Attempt:
        found = Attempt.of(config, specs, separate or {}, changes)
        return tellable(found, base or {}, is_own=live is not None and not base)

    state, said = attempt(config), live or {}
    changes = (unquantized, functools.partial(untied, live=said), resized, functools.partial(as_live, live=said))
    for change in (*changes, relabelled):
        for changed, note in change(state, excused):
            found = attempt(changed, (*state.changes, note))
            if found.count(excused) < state.count(excused):
                state = found
    if live and (settings := settings_of(state, live)):
        note = f"{dotted(settings)} {OF_THE_LIVE_MODEL}"
        found = attempt(with_values(in_modern_spelling(state), settings), (*state.changes, note))
        # A config that its owner has not kept up to date may be wrong where the tensors have been right.
        if found.count(excused) <= state.count(excused):
            state = found
    return _result(state, excused)


def _excused(
    config: Config, base: Mapping[str, TensorSpec] | None, specs: Mapping[str, TensorSpec], allow: Sequence[str]
) -> Excused:
    """What the class that the base's config names says of the base's own files; asked only where it may matter."""
    model_class, _ = model_class_of(config)
    if model_class is None or not base or fit_of(model_class, config, specs).is_exact:
        return Excused(allow=tuple(allow))
    fit = fit_of(model_class, config, base)
    return Excused(frozenset(line for _, line in fit.lines), tuple(allow))


def _result(state: Attempt, excused: Excused) -> ConfigFit:
    problems, fit = state.problems(excused), state.fit
    extra = _without_place(state, problems, excused)
    named = {line.split(": ", 1)[0] for line in problems}
    return ConfigFit(
        config=copy.deepcopy(dict(state.config)),
        changes=state.changes,
        measured_by=fit.model_class if fit else None,
        reason=state.reason,
        problems=tuple(problems),
        missing=tuple(sorted(named)) if fit and named <= set(fit.missing) else (),
        no_place=patterns_for(extra, state.specs.keys() - extra),
        changed_modules=_changed_modules(state, problems),
        as_base=tuple(line for _, line in fit.lines if line in excused.lines) if fit else (),
        keys=tuple(_suspects(state)) if problems else (),
        ignored=fit.ignored if fit else (),
        is_another_model=any(change.endswith(AS_LIVE) for change in state.changes),
    )


def _without_place(state: Attempt, problems: Sequence[str], excused: Excused) -> list[str]:
    """The tensors without which nothing would be wrong, if there are such."""
    extra = set(state.fit.unexpected) & {line.split(": ", 1)[0] for line in problems} if state.fit else set()
    if len(extra) != len(problems):
        return []
    # The class may call it otherwise than the files do.
    given = sorted({own for name in extra if (own := ending_alike(name, state.specs)) is not None})
    rest = {name: spec for name, spec in state.specs.items() if name not in given}
    return [] if Attempt.of(state.config, rest, state.separate).problems(excused) else given


def _changed_modules(state: Attempt, problems: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """The modules with a weight to which the files add tensors: low-rank adapters, or what a weight is made from."""
    if state.fit is None:
        return {}
    extra = set(state.fit.unexpected) & {line.split(": ", 1)[0] for line in problems}
    known = (state.specs.keys() - extra) | set(state.fit.missing)
    found: dict[str, list[str]] = {}
    for name in sorted(name for name in extra if name in state.specs and state.specs[name].dtype.is_floating_point):
        parts = name.split(".")
        inside = (".".join(parts[:i]) for i in range(1, len(parts)))
        if (module := next((module for module in inside if f"{module}.weight" in known), None)) is not None:
            found.setdefault(module, []).append(name.removeprefix(f"{module}."))
    return {module: tuple(names) for module, names in found.items()}


def _suspects(state: Attempt) -> Iterator[str]:
    """The entries of the config that the problems speak against."""
    assert state.fit is not None
    if state.untied:
        yield f"{TIE}: true"
        if choices := state.flags_off():
            beside = state.beside_the_tie(with_values(state.config, dict.fromkeys(choices[0], False)))
            yield from (f"{dotted([path])}: {str(value).lower()}, taken from {TIE}" for path, value in beside.items())
    for path, value, new in _sizes(state):
        changed = Attempt.of(with_values(state.config, {path: new}), state.specs, state.separate)
        if changed.fit is not None and len(changed.problems(Excused())) < len(state.problems(Excused())):
            yield f"{'.'.join(path)}: {value}"
    yield from _depths(state)
    if (state.fit.missing or state.fit.unexpected) and (kind := _kind_of_the_tensors(state)) is not None:
        yield f"architectures: {state.fit.class_name}, and these are the tensors of {kind}"


def _depths(state: Attempt) -> Iterator[str]:
    """The numbers of layers in the config with which, if the files are right, nothing would be wrong."""
    assert state.fit is not None
    held, extra = state.specs.keys(), set(state.fit.unexpected)
    known, given = _lengths((held - extra) | set(state.fit.missing)), _lengths(held)
    pairs = {(known[at], given[at]) for at in known.keys() & given.keys() if known[at] != given[at]}
    said = dict(entries(state.effective))
    for path, old in said.items():
        for new in (new for count, new in sorted(pairs) if type(old) is int and count == old):
            # What is said of each layer, such as ``layer_types``, is made anew by the class.
            each = [at for at, value in said.items() if at[:-1] == path[:-1] and _is_of_length(value, old)]
            config = with_values(state.config, {**dict.fromkeys(each, None), path: new})
            changed = Attempt.of(config, state.specs, state.separate)
            if changed.fit is not None and not changed.problems(Excused()):
                yield f"{dotted([path])}: {old}, and these are the tensors of {new}"
                stated = dict(entries(state.config))
                yield from (f"{dotted([at])}: of {old} layers" for at in each if at in stated)


def _lengths(names: Iterable[str]) -> dict[str, int]:
    """What comes before a number in names -> the largest number there, counted from 1."""
    found: dict[str, int] = {}
    for parts in (name.split(".") for name in names):
        for i in (i for i, part in enumerate(parts) if part.isdecimal()):
            at = ".".join(parts[:i])
            found[at] = max(found.get(at, 0), int(parts[i]) + 1)
    return found


def _is_of_length(value: Any, length: int) -> bool:
    return isinstance(value, list) and len(value) == length


def _kind_of_the_tensors(state: Attempt) -> str | None:
    """The class for this config that has tensors of just these names; None if there is none."""
    config = {key: value for key, value in state.config.items() if key != "architectures"}
    other = None if DIFFUSERS_KEY in config else Attempt.of(config, state.specs, state.separate)
    if other is None or other.fit is None or other.fit.missing or other.fit.unexpected or other.fit.error:
        return None
    return other.fit.class_name


def _sizes(state: Attempt) -> Iterator[tuple[Path, int, int]]:
    """The numbers of the config that some tensor has another one for: where, which, and the other one."""
    assert state.fit is not None
    pairs = {pair for given, wanted in state.fit.shapes.values() for pair in changed_sizes(wanted, given).items()}
    found = [
        (path, old, new)
        for path, value in entries(state.effective)
        for old, new in sorted(pairs)
        if type(value) is int and value == old
    ]
    yield from found[:_MOST_SIZES]
