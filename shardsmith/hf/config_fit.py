"""A config.json that describes the tensors beside it: adapted where they or the live model say how, else refused.

What a change is worth is what the class makes of it: a change is kept if fewer tensors are without their place then.
"""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from shardsmith.hf.config_entries import (
    OF_THE_HEAD,
    QUANTIZATION,
    Config,
    Path,
    dotted,
    entries,
    part_at,
    undated,
    with_values,
)
from shardsmith.hf.model_class import DIFFUSERS_KEY, Fit, ModelClass, find_model_class
from shardsmith.hf.ties import tied_groups
from shardsmith.tensors.dtypes import is_quantized
from shardsmith.tensors.likeness import ending_alike, patterns_for
from shardsmith.tensors.tensors import TensorSpec

TIE = "tie_word_embeddings"
_AS_LIVE = "as in the config of the live model"
_MOST_SIZES = 24
"""How many numbers are tried one by one, a model without data each."""
_LABELS = "id2label"
_NOT_OF_THE_MODEL = frozenset(
    {"dtype", "torch_dtype", "transformers_version", "_name_or_path", "use_cache", QUANTIZATION, "architectures"}
)


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
    no_place: tuple[str, ...] = ()
    """Patterns of the tensors that the class has no place for, if there is no other problem."""
    as_base: tuple[str, ...] = ()
    """Differences that the base model's own files have as well: no fault of the export."""
    keys: tuple[str, ...] = ()
    """The keys of the config that the problems speak against, with their values."""
    ignored: tuple[str, ...] = ()
    """Tensors that the class passes over when it loads."""
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
    separate: Mapping[str, str] | None = None,
    live: Config | None = None,
    allow: Sequence[str] = (),
) -> ConfigFit:
    """Adapt a config to the tensors that will lie beside it, and compare them with the class that it names then.

    Args:
        config: Content of the base model's config.json.
        specs: The tensors as they will be written.
        base: The base model's own tensors, in its files. What its class thinks of them is no fault of the export.
        separate: Names in files that are not one tensor, although the class may tie them: alias -> kept name.
        live: Of a live model: what its config says, with every default.
        allow: Patterns of names that may be missing or extra.
    """
    unsaid = _said_to_be_one(config, separate or {}, base or {}, is_own=live is not None and not base)
    state = _Attempt.of(config, specs, unsaid)
    excused = _excused(config, base, specs, allow)
    for change in (_unquantized, _untied, _resized, functools.partial(_as_live, live=live or {}), _relabelled):
        for changed, note in change(state, excused):
            attempt = _Attempt.of(changed, specs, separate or {}, (*state.changes, note))
            if attempt.count(excused) < state.count(excused):
                state = attempt
    return state.result(excused)


@dataclass(frozen=True, slots=True)
class _Excused:
    """Differences that nobody is to be told off for."""

    lines: frozenset[str] = frozenset()
    allow: tuple[str, ...] = ()

    def covers(self, name: str, line: str) -> bool:
        return line in self.lines or any(fnmatchcase(name, pattern) for pattern in self.allow)


@dataclass(frozen=True, slots=True)
class _Attempt:
    """A config that may be the right one."""

    config: Config
    specs: Mapping[str, TensorSpec]
    separate: Mapping[str, str]
    model_class: ModelClass | None
    reason: str
    fit: Fit | None
    changes: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        config: Config,
        specs: Mapping[str, TensorSpec],
        separate: Mapping[str, str],
        changes: tuple[str, ...] = (),
    ) -> _Attempt:
        model_class, reason = model_class_of(config)
        fit = None if model_class is None else fit_of(model_class, config, specs)
        return cls(config, specs, separate, model_class, reason, fit, changes)

    def count(self, excused: _Excused) -> int:
        return len(self.problems(excused)) + self.is_plain_but_quantized

    @property
    def is_plain_but_quantized(self) -> bool:
        """Whether the config speaks of a quantisation that no tensor has."""
        is_said = any(path[-1] == QUANTIZATION for path, _ in entries(self.config))
        return is_said and not any(is_quantized(spec) for spec in self.specs.values())

    @property
    def untied(self) -> dict[str, str]:
        """What the class ties, and the files do not."""
        return {} if self.model_class is None else _tied(self.model_class, self.separate)

    def problems(self, excused: _Excused) -> list[str]:
        fit = self.fit
        if fit is None:
            return []
        packed = _packed_modules(fit, self.specs) if _is_quantized(self.config) else set()
        lines = [
            f"{alias}: differs from {kept}, and config.json says that they are tied ({TIE})"
            for alias, kept in self.untied.items()
        ]
        for name, line in fit.lines:
            is_shape = name in fit.shapes
            if name.rpartition(".")[0] in packed or (line in excused.lines):
                continue
            if not is_shape and excused.covers(name, line):
                continue
            lines.append(line)
        return lines

    def result(self, excused: _Excused) -> ConfigFit:
        problems, fit = self.problems(excused), self.fit
        extra = self._without_place(problems, excused)
        return ConfigFit(
            config=copy.deepcopy(dict(self.config)),
            changes=self.changes,
            measured_by=fit.model_class if fit else None,
            reason=self.reason,
            problems=tuple(problems),
            no_place=patterns_for(extra, self.specs.keys() - extra),
            as_base=tuple(line for _, line in fit.lines if line in excused.lines) if fit else (),
            keys=tuple(self._suspects()) if problems else (),
            ignored=fit.ignored if fit else (),
            is_another_model=any(change.endswith(_AS_LIVE) for change in self.changes),
        )

    def _without_place(self, problems: Sequence[str], excused: _Excused) -> list[str]:
        """The tensors without which nothing would be wrong, if there are such."""
        extra = set(self.fit.unexpected) & {line.split(": ", 1)[0] for line in problems} if self.fit else set()
        if len(extra) != len(problems):
            return []
        # The class may call it otherwise than the files do.
        given = sorted({own for name in extra if (own := ending_alike(name, self.specs)) is not None})
        rest = {name: spec for name, spec in self.specs.items() if name not in given}
        return [] if _Attempt.of(self.config, rest, self.separate).problems(excused) else given

    def _suspects(self) -> Iterator[str]:
        """The entries of the config that the problems speak against."""
        assert self.fit is not None
        if self.untied:
            yield f"{TIE}: true"
        for path, value, new in self._sizes():
            changed = _Attempt.of(with_values(self.config, {path: new}), self.specs, self.separate)
            if changed.fit is not None and len(changed.problems(_Excused())) < len(self.problems(_Excused())):
                yield f"{'.'.join(path)}: {value}"
        if (self.fit.missing or self.fit.unexpected) and (kind := self._kind_of_the_tensors()) is not None:
            yield f"architectures: {self.fit.class_name}, and these are the tensors of {kind}"

    def _kind_of_the_tensors(self) -> str | None:
        """The class for this config that has tensors of just these names; None if there is none."""
        config = {key: value for key, value in self.config.items() if key != "architectures"}
        other = None if DIFFUSERS_KEY in config else _Attempt.of(config, self.specs, self.separate)
        if other is None or other.fit is None or other.fit.missing or other.fit.unexpected or other.fit.error:
            return None
        return other.fit.class_name

    def _sizes(self) -> Iterator[tuple[Path, int, int]]:
        """The numbers of the config that some tensor has another one for: where, which, and the other one."""
        assert self.fit is not None
        pairs = {pair for given, wanted in self.fit.shapes.values() for pair in _differing(wanted, given).items()}
        found = [
            (path, old, new)
            for path, value in entries(self._effective())
            for old, new in sorted(pairs)
            if type(value) is int and value == old
        ]
        yield from found[:_MOST_SIZES]

    def _effective(self) -> Config:
        return self.config if self.model_class is None else self.model_class.effective_config


def model_class_of(config: Config) -> tuple[ModelClass | None, str]:
    """As ``find_model_class``, remembered."""
    return _find(json.dumps(undated(config), sort_keys=True, default=str))


def vocabulary_sizes(config: Config) -> set[int]:
    """Return what a config says of the size of a vocabulary, at any depth."""
    return {value for path, value in entries(config) if "vocab" in path[-1] and type(value) is int}


def fit_of(model_class: ModelClass, config: Config, specs: Mapping[str, TensorSpec]) -> Fit:
    """As ``ModelClass.fit``, remembered: a directory that was planned is not judged twice."""
    key = (json.dumps(undated(config), sort_keys=True, default=str), tuple(sorted(specs.items())))
    if key not in _FITS:
        if len(_FITS) > 32:
            _FITS.clear()
        _FITS[key] = model_class.fit(specs)
    return _FITS[key]


_FITS: dict[Any, Fit] = {}


@functools.lru_cache(maxsize=32)
def _find(text: str) -> tuple[ModelClass | None, str]:
    return find_model_class(json.loads(text))


def _excused(
    config: Config, base: Mapping[str, TensorSpec] | None, specs: Mapping[str, TensorSpec], allow: Sequence[str]
) -> _Excused:
    """What the class that the base's config names says of the base's own files; asked only where it may matter."""
    model_class, _ = model_class_of(config)
    if model_class is None or not base or fit_of(model_class, config, specs).is_exact:
        return _Excused(allow=tuple(allow))
    fit = fit_of(model_class, config, base)
    return _Excused(frozenset(line for _, line in fit.lines), tuple(allow))


def _said_to_be_one(
    config: Config, separate: Mapping[str, str], base: Collection[str], *, is_own: bool
) -> Mapping[str, str]:
    """Of what is separate in the files: what a reader of the config could take for one tensor.

    Some classes tie whatever their config says, and take both from files that have both: T5's, for one. There a config
    that says that they are not tied is right, and so are a base with both and the live model's own config.
    """
    if not separate:
        return {}
    flags = [(path, value) for path, value in entries(config) if path[-1] == TIE]
    model_class, _ = model_class_of(with_values(config, {path: False for path, _ in [*flags, ((TIE,), None)]}))
    always = {} if model_class is None else _tied(model_class, separate)
    is_said = is_own or any(value is False for _, value in flags)
    return {a: k for a, k in separate.items() if a not in always or not (is_said or {a, k} <= set(base))}


def _tied(model_class: ModelClass, names: Mapping[str, str]) -> dict[str, str]:
    """Those of alias -> kept name that a class ties."""
    return {a: k for a, k in names.items() if tied_groups(model_class.tied, {a, k})}


def _is_quantized(config: Config) -> bool:
    return any(path[-1] == QUANTIZATION for path, _ in entries(config))


def _packed_modules(fit: Fit, specs: Mapping[str, TensorSpec]) -> set[str]:
    """Modules whose weights are in the files in the form of a quantisation, which the plain class does not know."""
    owners = {name.rpartition(".")[0] for name in (*fit.unexpected, *fit.missing)}
    return owners | {name.rpartition(".")[0] for name, spec in specs.items() if is_quantized(spec)}


def _unquantized(state: _Attempt, _: _Excused) -> Iterator[tuple[Config, str]]:
    if state.is_plain_but_quantized:
        changed = copy.deepcopy(dict(state.config))
        for path, _value in list(entries(changed)):
            if path[-1] == QUANTIZATION:
                part_at(changed, path[:-1]).pop(QUANTIZATION, None)
        yield changed, f"{QUANTIZATION} was taken out: no tensor is quantized"


def _untied(state: _Attempt, _: _Excused) -> Iterator[tuple[Config, str]]:
    if not state.untied or state.model_class is None:
        return
    said = dict(entries(state.model_class.effective_config))
    paths = [path for path, value in said.items() if path[-1] == TIE and value is True]
    alias, kept = next(iter(state.untied.items()))
    rows = state.specs[alias].shape[:1]  # of a model in parts, the part that has this vocabulary says so as well
    together = [path for path in paths if path == (TIE,) or (said.get((*path[:-1], "vocab_size")),) == rows]
    for chosen in [together, *_subsets(paths)]:
        changed = with_values(state.config, dict.fromkeys(chosen, False))
        yield changed, f"{dotted(chosen)}: false, for {alias} is not {kept}"


def _resized(state: _Attempt, excused: _Excused) -> Iterator[tuple[Config, str]]:
    """A vocabulary that has another size in all tensors that have its size."""
    if state.fit is None or state.model_class is None or not state.problems(excused):
        return
    sizes = {pair for given, wanted in state.fit.shapes.values() for pair in _differing(wanted, given).items()}
    for old, new in sorted(sizes):
        said = entries(state.model_class.effective_config)
        paths = [path for path, value in said if "vocab" in path[-1] and value == old and value is not True]
        for chosen in map(functools.partial(_with_its_twins, state, excused, new, paths), _subsets(paths)):
            yield with_values(state.config, dict.fromkeys(chosen, new)), f"{dotted(chosen)}: {new} instead of {old}"


def _with_its_twins(
    state: _Attempt, excused: _Excused, new: int, paths: Sequence[Path], chosen: Sequence[Path]
) -> Sequence[Path]:
    """Return what lies beside the chosen entries as well, if the tensors allow it: a shared decoder's vocabulary."""

    def count(changed: Sequence[Path]) -> int:
        return _Attempt.of(with_values(state.config, dict.fromkeys(changed, new)), state.specs, state.separate).count(
            excused
        )

    together = [path for path in paths if any(path[:-1] == one[:-1] for one in chosen)]
    return together if len(together) > len(chosen) and count(together) <= count(chosen) else chosen


def _as_live(state: _Attempt, excused: _Excused, live: Config) -> Iterator[tuple[Config, str]]:
    """What the config of the live model says otherwise: of the head first, then everything about the model."""
    if not live or state.model_class is None or not state.problems(excused):
        return
    kind = live.get("architectures")
    if kind and kind != state.config.get("architectures"):
        state = _Attempt.of({**state.config, "architectures": kind}, state.specs, state.separate)
        yield state.config, f"architectures: {kind[0]}, as the live model"
    said = dict(entries(live))
    differing = {
        path: said[path]
        for path, value in entries(state._effective())
        if path in said and said[path] != value and path[-1] not in _NOT_OF_THE_MODEL
    }
    of_head = {path: value for path, value in differing.items() if path[-1] in OF_THE_HEAD or "vocab" in path[-1]}
    for chosen, source in ((of_head, "as the live model"), (differing, _AS_LIVE)):
        if chosen:
            yield with_values(state.config, chosen), f"{dotted(chosen)} {source}"


def _relabelled(state: _Attempt, excused: _Excused) -> Iterator[tuple[Config, str]]:
    """A head for another number of labels, whose names nobody knows: they are numbered, as transformers does it."""
    if state.fit is None or state.model_class is None or not state.problems(excused):
        return
    sizes = {pair for given, wanted in state.fit.shapes.values() for pair in _differing(wanted, given).items()}
    labels = {path[:-1]: value for path, value in entries(state.model_class.effective_config) if path[-1] == _LABELS}
    for place, known in labels.items():
        for new in sorted(new for old, new in sizes if old == len(known or ())):
            numbered = {str(i): f"LABEL_{i}" for i in range(new)}
            values: dict[Path, Any] = {
                (*place, _LABELS): numbered,
                (*place, "label2id"): {name: int(i) for i, name in numbered.items()},
            }
            if "num_labels" in part_at(copy.deepcopy(dict(state.config)), place):
                values[*place, "num_labels"] = new
            yield (
                with_values(state.config, values),
                f"{'.'.join((*place, _LABELS))}: {new} labels instead of {len(known)}",
            )


def _subsets(paths: Sequence[Path]) -> list[Sequence[Path]]:
    """Each alone, then all together."""
    return [*([path] for path in paths), *([paths] if len(paths) > 1 else [])]


def _differing(one: Sequence[int], other: Sequence[int]) -> dict[int, int]:
    """Size in the first -> size in the second, where two shapes differ."""
    return {a: b for a, b in zip(one, other, strict=False) if a != b} if len(one) == len(other) else {}
