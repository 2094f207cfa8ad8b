"""A config that may be the right one for certain tensors: what its class makes of them, and which ties it means."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from shardsmith.hf.config_entries import QUANTIZATION, Config, Path, entries, with_values
from shardsmith.hf.known_class import fit_of, model_class_of
from shardsmith.hf.model_class import Fit, ModelClass
from shardsmith.hf.ties import tied_groups
from shardsmith.tensors.dtypes import is_quantized
from shardsmith.tensors.tensors import TensorSpec

TIE = "tie_word_embeddings"
NOT_OF_THE_MODEL = frozenset(
    {"dtype", "torch_dtype", "transformers_version", "_name_or_path", "use_cache", QUANTIZATION, "architectures"}
)


@dataclass(frozen=True, slots=True)
class Excused:
    """Differences that are no fault of the export."""

    lines: frozenset[str] = frozenset()
    """Differences that the base model's own files have."""
    allow: tuple[str, ...] = ()
    """Patterns of names that may be missing or extra."""

    def covers(self, name: str, line: str) -> bool:
        """Whether a difference counts for nothing."""
        return line in self.lines or any(fnmatchcase(name, pattern) for pattern in self.allow)


@dataclass(frozen=True, slots=True)
class Attempt:
    """A config that may be the right one."""

    config: Config
    specs: Mapping[str, TensorSpec]
    separate: Mapping[str, str]
    """Names in files that are not one tensor, and that a reader of the config may take for one: alias -> kept name."""
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
    ) -> Attempt:
        """Ask the class that the config names."""
        model_class, reason = model_class_of(config)
        fit = None if model_class is None else fit_of(model_class, config, specs)
        return cls(config, specs, separate, model_class, reason, fit, changes)

    @property
    def effective(self) -> Config:
        """The config with every default filled in."""
        return self.config if self.model_class is None else self.model_class.effective_config

    def count(self, excused: Excused) -> int:
        """Number of differences between config and tensors."""
        return len(self.problems(excused)) + self.is_plain_but_quantized

    @property
    def is_plain_but_quantized(self) -> bool:
        """Whether the config speaks of a quantisation that no tensor has."""
        return _is_quantized(self.config) and not any(is_quantized(spec) for spec in self.specs.values())

    @property
    def untied(self) -> dict[str, str]:
        """What the class ties, and the files do not."""
        return {} if self.model_class is None else _tied(self.model_class, self.separate)

    def problems(self, excused: Excused) -> list[str]:
        """A line for each difference between the tensors and what the class wants."""
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

    def flags_off(self) -> list[Sequence[Path]]:
        """Return the entries that may say that what is tied is not, the likeliest choice of them first."""
        said = dict(entries(self.effective))
        paths = [path for path, value in said.items() if path[-1] == TIE and value is True]
        if not self.untied or not paths:
            return []
        rows = self.specs[next(iter(self.untied))].shape[:1]
        # of a model in parts, the part that has this vocabulary says so as well
        together = [path for path in paths if path == (TIE,) or (said.get((*path[:-1], "vocab_size")),) == rows]
        return [together, *subsets(paths)]

    def beside_the_tie(self, changed: Config) -> dict[Path, Any]:
        """Return the entries that a change of what is tied changes as well, with the values that they have here.

        T5 takes from it whether the outputs of its decoder are scaled.
        """
        others = dict(entries(Attempt.of(changed, self.specs, {}).effective))
        return {
            path: value
            for path, value in entries(self.effective)
            if not isinstance(value, Mapping) and path[-1] not in NOT_OF_THE_MODEL | {TIE}
            if others.get(path) != value
        }


def tellable(attempt: Attempt, base: Collection[str], *, is_own: bool) -> Attempt:
    """Leave out what is separate in the files and need not be said to be so.

    Some classes tie whatever their config says, and take both from files that have both: T5's, for one. There a config
    that says that they are not tied is right, and so are a base with both and the live model's own config.

    Others tie more than a head by the same entry: BERT's a bias, BART's the embeddings of encoder and decoder. Without
    it they would miss tensors; with it, they load both tensors from files that have both.

    Args:
        attempt: With all that is separate.
        base: Names in the base model's files.
        is_own: Whether the config is the live model's own.
    """
    if not attempt.separate:
        return attempt
    config, specs = attempt.config, attempt.specs
    flags = [(path, value) for path, value in entries(config) if path[-1] == TIE]
    model_class, _ = model_class_of(with_values(config, {path: False for path, _ in [*flags, ((TIE,), None)]}))
    always = {} if model_class is None else _tied(model_class, attempt.separate)
    is_said = is_own or any(value is False for _, value in flags)
    left = {a: k for a, k in attempt.separate.items() if a not in always or not (is_said or {a, k} <= set(base))}
    found = Attempt.of(config, specs, left, attempt.changes)
    return found if _can_be_untied(found) else Attempt.of(config, specs, {}, attempt.changes)


def subsets(paths: Sequence[Path]) -> list[Sequence[Path]]:
    """Each alone, then all together."""
    return [*([path] for path in paths), *([paths] if len(paths) > 1 else [])]


def _can_be_untied(attempt: Attempt) -> bool:
    """Whether some config says that what is tied is not, and takes the tensors as well as this one."""
    if attempt.fit is None or not attempt.untied:
        return True
    changed = (with_values(attempt.config, dict.fromkeys(chosen, False)) for chosen in attempt.flags_off())
    others = [Attempt.of(config, attempt.specs, attempt.separate) for config in changed]
    # Where some entries untie, the others, such as that of T5Gemma2's decoder, are looked at by nobody.
    untying = [other for other in others if len(other.untied) < len(attempt.untied)] or others
    return any(other.fit is not None and other.fit.count <= attempt.fit.count for other in untying)


def _tied(model_class: ModelClass, names: Mapping[str, str]) -> dict[str, str]:
    """Those of alias -> kept name that a class ties."""
    return {a: k for a, k in names.items() if tied_groups(model_class.tied, {a, k})}


def _is_quantized(config: Config) -> bool:
    return any(path[-1] == QUANTIZATION for path, _ in entries(config))


def _packed_modules(fit: Fit, specs: Mapping[str, TensorSpec]) -> set[str]:
    """Modules whose weights are in the files in the form of a quantisation, which the plain class does not know."""
    owners = {name.rpartition(".")[0] for name in (*fit.unexpected, *fit.missing)}
    return owners | {name.rpartition(".")[0] for name, spec in specs.items() if is_quantized(spec)}
