"""Are two checkpoints the same model? Of any formats and shardings, under whatever wrappers; nothing is written.

By value: both are streamed and compared block by block. By digest: what is recorded is not read again. By logits: what
the models answer.
"""

from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from shardsmith.checking.arguments import checked
from shardsmith.checking.types import AsAnyPath
from shardsmith.compare.alignment import aligned_source
from shardsmith.compare.class_ties import repeated_names
from shardsmith.compare.configs import filled_config, settings_apart
from shardsmith.compare.modules import is_huggingface, with_modules
from shardsmith.compare.quantized import require_plain
from shardsmith.compare.values import TensorComparison, compare_sources, same_as
from shardsmith.errors import CheckpointError, CheckpointNotFoundError
from shardsmith.formats.models import ModelSource, beside_models
from shardsmith.formats.opened import OpenedCheckpoint, open_checkpoint
from shardsmith.ground import layout
from shardsmith.hf.hf_directory import CONFIG_FILE
from shardsmith.hf.layout_rules import DECLARED, LayoutRule
from shardsmith.hf.modules import Modules
from shardsmith.manifest.metadata import read_json
from shardsmith.manifest.model_settings import settings_of_step
from shardsmith.name_maps.matching import Alignment, is_transient
from shardsmith.sharding.source_digests import digest_source
from shardsmith.tensors.digest import Digest
from shardsmith.tensors.dtypes import dtype_name

By = Literal["values", "digests"]


@dataclass(frozen=True, slots=True)
class Difference:
    """One tensor that is not the same in both."""

    name: str
    problem: Literal["only in A", "only in B", "shape", "dtype", "values"]
    left: str
    """What A has."""
    right: str
    largest: float | None
    """The largest absolute difference of two elements; None where that was not measured."""
    differing: int | None
    """Elements that differ."""
    relative: float | None = None
    """Length of the difference divided by the length of B's tensor, both taken as vectors."""
    is_rounding: bool = False
    """Whether one side is the other, rounded to fewer bits: what ``rounding`` in the options allows."""


@dataclass(frozen=True, slots=True)
class ModelVerification:
    """One model of both checkpoints."""

    model: str
    """``main`` or ``ema``."""
    compared: int
    """Tensors."""
    equal: int
    """Of those, the ones with the same bytes."""
    converted: tuple[str, ...]
    """Stored in other dtypes, the values being the same, or those of one side rounded where that was allowed."""
    tied: tuple[str, ...]
    """Only on one side, where they repeat a tensor that both have: as the class ties them, or without a class any."""
    layouts: Mapping[str, str]
    """Of two layouts, compared in one: name -> the layout rule that led there."""
    differences: tuple[Difference, ...]
    renamed: Mapping[str, str] = field(default_factory=dict)
    """Of two generations of names, where no class says which is which: A's name -> B's, of the same bytes."""
    ignored: tuple[str, ...] = ()
    """Only on one side, and not compared, since a load makes them of the config: buffers that older code has saved."""
    relative: Mapping[str, float] = field(default_factory=dict)
    """Of every tensor that was compared by value: how far apart it is, as in ``Difference``; 0 where all is equal."""


@dataclass(frozen=True, slots=True)
class Verification:
    """Result of ``verify_checkpoints``."""

    left: str
    right: str
    by: str
    models: tuple[ModelVerification, ...]
    left_out: tuple[str, ...] = ()
    """What was compared with nothing, a line each: a model that only one side has, a further average, a teacher."""
    base: str | None = None
    """Directory whose config says which names belong together; None where nothing says it."""
    settings: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    """Settings that may change what is computed, where both say them: path in config.json -> what A says, and B."""

    @property
    def same(self) -> bool:
        """Whether nothing differs: no tensor, and no setting that may change what is computed."""
        return not self.settings and not any(model.differences for model in self.models)

    @property
    def is_undecided(self) -> bool:
        """Whether all that differs are names on both sides, and nothing says which of them belong together."""
        problems = {found.problem for model in self.models for found in model.differences}
        return self.base is None and not self.settings and problems == {"only in A", "only in B"}


@dataclass(frozen=True, kw_only=True, slots=True)
class VerifyOptions:
    """Options of ``verify_checkpoints``: what counts as equal."""

    models: Sequence[str] | None = None
    """Such as ``["main"]``; None: all that both have."""
    names: str = "auto"
    """How the names of the one become those of the other, as ``aligned_source`` says."""
    rules: Sequence[LayoutRule] = DECLARED
    """What may be done to tensors that the two have in other layouts."""
    by: By = "values"
    tolerance: float = 0.0
    """Largest absolute difference of two values that is none."""
    rounding: bool = False
    """Whether the values of one may be those of the other, rounded to its dtype."""
    base_model: Path | None = None
    """Where neither is a Hugging Face directory: one of this kind of model, or its config.json alone in a directory. It
    says which names belong together."""


@checked
def verify(left: AsAnyPath, right: AsAnyPath, options: VerifyOptions | None = None) -> Verification:
    """Compare two checkpoints.

    Raises:
        CheckpointError: one cannot be read, or does not have a model that was asked for.
    """
    options = options or VerifyOptions()
    with_both = OpenedPair(left, right, options.names, options.rules, options.base_model)
    try:
        names = with_both.common(options.models)
        models = tuple(_verify_model(name, with_both, options) for name in names)
        base = None if with_both.base is None else str(with_both.base)
        left_out, settings = tuple(with_both.left_out(names)), with_both.settings()
        return Verification(str(left), str(right), options.by, models, left_out, base, settings)
    finally:
        with_both.close()


class OpenedPair:
    """Two checkpoints, the tensors of both under one set of names: those of Hugging Face files, if one has them."""

    def __init__(
        self,
        left: Path,
        right: Path,
        names: str = "auto",
        rules: Sequence[LayoutRule] = DECLARED,
        base_model: Path | None = None,
    ) -> None:
        """Open both. Raises CheckpointError."""
        self._base_model = base_model
        self.names = names
        self.rules = rules
        with contextlib.ExitStack() as opened:
            one = _opened(left, opened)
            other = _opened(right, opened)
            self.left, parts = _with_modules(one, other, opened)
            self.right, others = _with_modules(other, one, opened)
            opened.pop_all()
        self._owners = parts | others
        self._configs = settings_of(self.left), settings_of(self.right)

    @property
    def base(self) -> Path | None:
        """The directory whose config says what model it is; None if neither has one and none was given."""
        # B first: as usual it is the reference, under whose names A is brought.
        sides = (self.right, self.left)
        return next((side.path for side in sides if is_huggingface(side)), self._base_model)

    def common(self, wanted: Sequence[str] | None) -> list[str]:
        """Return the models to compare. Raises CheckpointNotFoundError for one that is not in both."""
        # In both, before a tensor is read: a model that was asked for and lacks must be an error, not "the same".
        for side in (self.left, self.right):
            missing = [name for name in wanted or () if name not in side.models]
            if missing:
                found = ", ".join(side.models)
                raise CheckpointNotFoundError(side.path, f"has no {' and no '.join(missing)} weights; it holds {found}")
        names = [name for name in self.left.models if name in self.right.models]
        if wanted:
            names = [name for name in names if self._owners.get(name, name) in wanted]
        if not names:
            found = f"{', '.join(self.left.models)} here, {', '.join(self.right.models)} in {self.right.path}"
            raise CheckpointNotFoundError(self.left.path, f"no model is in both: {found}")
        return names

    def left_out(self, names: Sequence[str]) -> Iterator[str]:
        """Yield what is compared with nothing when these models are compared, one line each."""
        for letter, side in (("A", self.left), ("B", self.right)):
            yield from (f"{name} of {letter}" for name in side.models if name not in names)
            yield from (f"{line} ({letter})" for line in beside_models(side.models))
        left, right = self._configs
        if (left is None) != (right is None):
            has, lacks = ("A", "B") if right is None else ("B", "A")
            yield f"the settings of {has}: {lacks} has no {CONFIG_FILE} and records no config"

    def settings(self) -> dict[str, tuple[str, str]]:
        """Return the settings in which the two differ, as ``Verification.settings`` has them."""
        left, right = self._configs
        if left is None or right is None:
            return {}
        as_loaded = is_huggingface(self.left) and is_huggingface(self.right)
        return settings_apart(left.config, right.config, as_loaded=as_loaded, are_alike=left.is_full == right.is_full)

    def sources(self, model: str) -> tuple[ModelSource, ModelSource]:
        """One model of both."""
        left, right, _ = self.aligned(model)
        return left, right

    def aligned(self, model: str) -> tuple[ModelSource, ModelSource, Alignment]:
        """One model of both, and what was done to the one to bring it beside the other.

        Raises UnsupportedFormatError where one is quantised and the other is not.
        """
        left, right = self.left.models[model], self.right.models[model]
        how = (self.base, self.names, self.rules)
        # Names become those of the side that says what model it is; where both do or neither does, those of B.
        if is_huggingface(self.right) or not is_huggingface(self.left):
            left, alignment = aligned_source(left, right.specs, *how)
        else:
            right, alignment = aligned_source(right, left.specs, *how)
        require_plain(left, right.specs, right.path)
        require_plain(right, left.specs, left.path)
        return left, right, alignment

    def close(self) -> None:
        """Close the files."""
        self.left.close()
        self.right.close()


@dataclass(frozen=True, slots=True)
class OwnSettings:
    """What a checkpoint says of its model."""

    config: Mapping[str, Any]
    """The config, and those of a sentence encoder's further modules; of a sharded step that of the live model."""
    is_full: bool
    """Whether the defaults are in it."""


def settings_of(side: OpenedCheckpoint) -> OwnSettings | None:
    """Return what a checkpoint says of its model; None if it says nothing.

    Raises CheckpointError if one of these files is no JSON.
    """
    if not is_huggingface(side):
        recorded = None if side.metadata is None else settings_of_step(side.path)
        return None if recorded is None else OwnSettings(recorded.config, is_full=True)
    modules = Modules(side.path)
    files = {folder: side.path / folder / CONFIG_FILE for folder in modules.folders.values() if folder}
    beside = {folder: read_json(file) for folder, file in files.items() if file.is_file()}
    kinds = {"modules.json": list(modules.kinds.values())} if modules.kinds else {}
    config, is_full = filled_config(side.path)
    return OwnSettings({**config, **beside, **kinds}, is_full)


def _opened(path: Path, opened: contextlib.ExitStack) -> OpenedCheckpoint:
    """A checkpoint that the stack closes."""
    checkpoint = open_checkpoint(path)
    opened.callback(checkpoint.close)
    return checkpoint


def _with_modules(
    side: OpenedCheckpoint, other: OpenedCheckpoint, opened: contextlib.ExitStack
) -> tuple[OpenedCheckpoint, dict[str, str]]:
    """Of a sentence encoder each module with weights is a model of its own, as in its Hugging Face directory.

    Also returns of which model each is a part: what the module is called -> "main" or "ema".
    """
    models, held = with_modules(side, Modules(other.path) if is_huggingface(other) else None, opened)
    beside = {one.name: one.source for one in held}
    return replace(side, models=models | beside), {one.name: one.model for one in held}


def _verify_model(model: str, pair: OpenedPair, options: VerifyOptions) -> ModelVerification:
    left, right, alignment = pair.aligned(model)
    # Without a config there is no class to say which names belong together; equal bytes do.
    renamed = same_under_other_names(left, right) if pair.base is None else {}
    right = _called(right, renamed) if renamed else right
    # Names of a tie that only one side lists are no difference.
    tied = (
        *repeated_names(left, right, pair.base, rounding=options.rounding),
        *repeated_names(right, left, pair.base, rounding=options.rounding),
    )
    apart = left.specs.keys() ^ right.specs.keys()
    ignored = tuple(sorted(name for name in apart if is_transient(name) and name not in tied))
    differences = [*_only(left, right, "only in A", tied), *_only(right, left, "only in B", tied)]
    names = [name for name in left.specs if name in right.specs]
    shapes = [name for name in names if left.specs[name].shape != right.specs[name].shape]
    differences += [Difference(name, "shape", _spec(left, name), _spec(right, name), None, None) for name in shapes]
    names = [name for name in names if name not in shapes]
    if options.by == "digests":
        found = list(_by_digest(model, pair, left, right, names))
        equal = len(names) - len(found)
        return ModelVerification(
            model, len(names), equal, (), tied, alignment.layouts, (*differences, *found), renamed, ignored
        )
    compared = compare_sources(left, right, names)
    converted = [name for name, found in compared.items() if not found.equal and _converted(found, options)]
    differences += _by_value(compared, converted, options)
    equal = sum(found.equal for found in compared.values())
    return ModelVerification(
        model,
        len(compared),
        equal,
        tuple(converted),
        tied,
        alignment.layouts,
        tuple(sorted(differences, key=_by_effect)),
        renamed,
        ignored,
        # Also of the equal ones: a page shows every tensor.
        {name: found.distance.relative if found.distance else 0.0 for name, found in compared.items()},
    )


def _by_effect(found: Difference) -> tuple[bool, float]:
    """What is missing or of another shape first, then the largest relative difference."""
    return found.relative is not None, -(found.relative or 0.0)


def same_under_other_names(left: ModelSource, right: ModelSource) -> dict[str, str]:
    """A's name -> B's of tensors with the same bytes, numbers and ends of their names; empty unless none is left over.

    Where neither side says what model it is, this tells names of two generations from two models. Reads the tensors.
    """
    mine = [name for name in left.specs if name not in right.specs and not is_transient(name)]
    theirs = {name for name in right.specs if name not in left.specs and not is_transient(name)}
    # A renaming leaves nothing over; other numbers of tensors are two models.
    if not mine or len(mine) != len(theirs):
        return {}
    found: dict[str, str] = {}
    for name in mine:
        # The likeliest first: each try reads both tensors.
        likely = sorted((n for n in theirs if _same_end(name, n)), key=lambda other: (-_common_end(name, other), other))
        pairs = (other for other in likely if list(same_as(left, right, {name: other})))
        other = next(pairs, None)
        if other is None:
            # One tensor without a twin: then these are two models, and a half renaming would hide what is missing.
            return {}
        found[name] = other
        # Two tensors of the same bytes, such as norms of ones, get one name each.
        theirs.remove(other)
    return found


def _called(source: ModelSource, names: Mapping[str, str]) -> ModelSource:
    """A model with some of its tensors under new names: new -> its own."""
    kept = {name: name for name in source.specs if name not in names.values()}
    return ModelSource(source, {**kept, **names}, filled=source.filled, aliases=source.aliases)


def _same_end(one: str, other: str) -> bool:
    return re.findall(r"\d+", one) == re.findall(r"\d+", other) and _common_end(one, other) > 1


def _common_end(one: str, other: str) -> int:
    """How many segments two names end with alike."""
    pairs = zip(reversed(one.split(".")), reversed(other.split(".")), strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def _by_value(
    compared: Mapping[str, TensorComparison], converted: Sequence[str], options: VerifyOptions
) -> Iterator[Difference]:
    for name, found in compared.items():
        distance = found.distance
        # Negated, so that NaN counts as a difference.
        if distance is not None and name not in converted and not distance.largest <= options.tolerance:
            left, right = (_extent(spec.shape, dtype_name(spec.dtype)) for spec in (found.left, found.right))
            rounded = distance.rounding is not None
            yield Difference(
                name, "values", left, right, distance.largest, distance.differing, distance.relative, rounded
            )


def _converted(found: TensorComparison, options: VerifyOptions) -> bool:
    """Whether only the dtype differs: never a value, or by rounding alone where that is allowed."""
    distance = found.distance
    assert distance is not None
    return distance.differing == 0 or (options.rounding and distance.rounding is not None)


def _by_digest(
    model: str, pair: OpenedPair, left: ModelSource, right: ModelSource, names: list[str]
) -> Iterator[Difference]:
    """Reads only what has no recorded digest. Of tensors in two dtypes nothing can be told by digests."""
    dtypes = [name for name in names if left.specs[name].dtype != right.specs[name].dtype]
    # A digest is of the bytes in one dtype: it cannot tell a cast from another value.
    for name in dtypes:
        yield Difference(name, "dtype", _spec(left, name), _spec(right, name), None, None)
    names = [name for name in names if name not in dtypes]
    mine, theirs = digests_of(pair.left, model, left, names), digests_of(pair.right, model, right, names)
    for name in names:
        if mine[name] != theirs[name]:
            yield Difference(name, "values", f"digest {mine[name]}", f"digest {theirs[name]}", None, None)


def digests_of(opened: OpenedCheckpoint, model: str, source: ModelSource, names: list[str]) -> dict[str, Digest]:
    """Digests of some tensors: as recorded in the checkpoint, or else worked out from its files."""
    recorded = _recorded(opened, model)
    whole = opened.models[model]
    own = {name: _stored_key(whole, source, name) for name in names}
    known = {name: recorded[own[name]] for name in names if own[name] in recorded}
    rest = {name: source.specs[name].dtype for name in names if name not in known}
    return {**known, **digest_source(source, rest)} if rest else known


def _stored_key(whole: ModelSource, source: ModelSource, name: str) -> str:
    """Where a tensor is stored as it is here; "" where it was taken apart, joined or brought into another layout."""
    # A recorded digest is that of the stored tensor: here nothing was renamed or cut.
    if source is whole:
        return source.keys[name]
    stored = source.keys[name]
    as_it_is = stored in whole.specs and whole.specs[stored].shape == source.specs[name].shape
    return whole.keys[stored] if as_it_is else ""


def _recorded(opened: OpenedCheckpoint, model: str) -> dict[str, Digest]:
    """By key in the checkpoint."""
    if opened.metadata is not None:
        return {key: Digest.parse(record.digest) for key, record in opened.metadata.tensors.items()}
    # No step of ours: it may be an export, which records digests under the names of its files.
    try:
        tensors = read_json(opened.path / layout.PROVENANCE_FILE)["models"][model]["tensors"]
        return {name: Digest.parse(record["digest"]) for name, record in tensors.items()}
    except (CheckpointError, LookupError, TypeError, ValueError, AttributeError):
        return {}  # not ours, or not what we wrote: then the files are read


def _only(
    source: ModelSource, other: ModelSource, problem: Literal["only in A", "only in B"], tied: Sequence[str]
) -> Iterator[Difference]:
    for name in source.specs:
        if name not in other.specs and name not in tied and name not in other.aliases and not is_transient(name):
            here, there = _spec(source, name), "nothing"
            left, right = (here, there) if problem == "only in A" else (there, here)
            yield Difference(name, problem, left, right, None, None)


def _spec(source: ModelSource, name: str) -> str:
    spec = source.specs[name]
    return _extent(spec.shape, dtype_name(spec.dtype))


def _extent(shape: Sequence[int], dtype: str) -> str:
    return f"{list(shape)} {dtype}"
