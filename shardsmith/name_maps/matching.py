"""Which tensor of a checkpoint is which of a model, although wrappers, prefixes and generations have changed the names.

Wrappers come off wherever they stand. Then the renames of the model's own class are tried, which ``from_pretrained``
would apply, and only then one prefix more or less. A prefix is a guess: it is taken where it explains all names of one
side, or where all names begin with it; a guess that fits only a part of the names is never taken.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

from shardsmith.tensors.tensors import TensorSpec
from shardsmith.tensors.wrappers import DDP, WRAPPERS_IN_FILES

_TRANSIENT = re.compile(r"(^|\.)(inv_freq|original_inv_freq|masked_bias|position_ids|cos_cached|sin_cached|freqs_cis)$")
_DEEPEST = 3
_MOST_HEADS = 16
_FEW = 0.2


class Renames(Protocol):
    """What the class of a model says of names, such as ``ClassNames``."""

    def in_memory(self, names: Collection[str]) -> dict[str, str]:
        """Names in files of any generation -> what the model calls them; empty if that is not known."""
        ...


@dataclass(frozen=True, slots=True)
class Alignment:
    """The names of a checkpoint's tensors, put side by side with those of a target."""

    keys: Mapping[str, str]
    """The target's name, or for what is extra the name without wrappers and prefix -> the checkpoint's own name."""
    aliases: Mapping[str, str] = field(default_factory=dict)
    """The same of the names that were given as aliases."""
    stripped: Mapping[str, str] = field(default_factory=dict)
    """The name without wrappers and prefix, before the class's renames -> the checkpoint's own name."""
    wrappers: tuple[str, ...] = ()
    """Segments of wrappers that were left out, such as ``_orig_mod``."""
    removed: str = ""
    """Prefix that the checkpoint's names have more than the target's, such as ``policy.``."""
    added: str = ""
    """Prefix that they have less, such as ``model.``."""
    by_class: bool = False
    """Whether the renames of the model's class were needed."""
    layouts: Mapping[str, str] = field(default_factory=dict)
    """The target's name -> the layout rule by which the checkpoint's tensor gets the target's shape."""

    @property
    def is_plain(self) -> bool:
        """Whether the names are as they stand in the checkpoint."""
        return not (self.wrappers or self.removed or self.added or self.by_class)


def match_names(
    source: Mapping[str, TensorSpec],
    target: Mapping[str, TensorSpec],
    renames: Renames | None = None,
    aliases: Collection[str] = (),
) -> Alignment:
    """Find the target's name of each tensor of a source. Reads no tensor.

    What fits no name of the target keeps its own, without wrappers and prefix. So a source that lacks tensors, or has
    more, is still matched; whether it has all of them is for the caller to compare.

    Args:
        source: The tensors of a checkpoint.
        target: Those of the model, or of another checkpoint.
        renames: What the target's class says; None where no class is known.
        aliases: More names of the source, of tied tensors that it does not list. They decide nothing.
    """
    matcher = _Matcher(source, target, renames)
    chosen = matcher.best()
    names = matcher.names(chosen)
    seen = {part for name in source for part in name.split(".") if part in matcher.segments}
    kept = {part for name in names.values() for part in name.split(".")}
    return Alignment(
        {new: own for own, new in names.items()},
        matcher.aliases(aliases, chosen),
        # A target that has a segment called like one of DDP's keeps it.
        {form if chosen.by_class else chosen.placed.get(own, form): own for own, form in chosen.forms.items()},
        tuple(sorted(seen - kept)),
        chosen.removed,
        chosen.added,
        chosen.by_class,
    )


def is_transient(name: str) -> bool:
    """Whether it is called like a buffer that older code made persistent, and that newer code makes from the config."""
    return _TRANSIENT.search(name) is not None


def without_wrappers(names: Iterable[str], segments: Collection[str] = WRAPPERS_IN_FILES) -> dict[str, str]:
    """Name -> name without the segments of wrappers; all as they are where two would become one."""
    names = list(names)
    cleaned = {name: ".".join(part for part in name.split(".") if part not in segments) for name in names}
    return cleaned if len(set(cleaned.values())) == len(names) else {name: name for name in names}


@dataclass(frozen=True, slots=True)
class _Try:
    """One way to read the names of a source, and what comes of it."""

    forms: Mapping[str, str]
    """The source's own name -> the name without wrappers, and with another prefix."""
    placed: Mapping[str, str]
    """The source's own name -> the target's, where there is one."""
    missing: frozenset[str]
    """Names of the target that got nothing."""
    removed: str = ""
    added: str = ""
    by_class: bool = False

    @property
    def unplaced(self) -> int:
        """Names on both sides without a partner. Buffers that come and go between versions do not count."""
        own = sum(name not in self.placed and not is_transient(name) for name in self.forms)
        return own + sum(not is_transient(name) for name in self.missing)

    @property
    def fits(self) -> bool:
        """Whether it explains every name of one side."""
        rest = all(name in self.placed or is_transient(name) for name in self.forms)
        return bool(self.placed) and (rest or all(map(is_transient, self.missing)))


class _Matcher:
    """A source and a target, and the ways in which their names may go together."""

    def __init__(
        self, source: Mapping[str, TensorSpec], target: Mapping[str, TensorSpec], renames: Renames | None
    ) -> None:
        self._source = source
        self._target = target
        self._renames = renames
        # Both sides lose the segment of DDP, so that a model keeps one of its own: it has it on both.
        self.segments = WRAPPERS_IN_FILES | {DDP} if target else WRAPPERS_IN_FILES
        self._forms = without_wrappers(source, self.segments)
        self._places = {form: name for name, form in without_wrappers(target, self.segments).items()}
        self._memory: dict[str, str] | None = None

    def best(self) -> _Try:
        """Return the class's renames before any guess, and a guess only if it is certain."""
        # The cheapest first: without a class nothing of transformers is imported.
        plain = self._try(self._forms)
        if plain.fits or not self._target:
            return plain
        by_class = self._by_class(plain)
        if by_class.fits:
            return by_class
        guesses = [guess for guess in self._guesses() if guess.fits and self._has_shapes(guess)]
        guesses.sort(key=lambda guess: guess.by_class)  # what the target does not list is called right without renames
        # Several guesses that fit must agree on every name; otherwise none of them is certain.
        if guesses and all(guess.placed == guesses[0].placed for guess in guesses):
            return guesses[0]
        return min((plain, by_class, *self._common_prefixes()), key=lambda found: found.unplaced)

    def names(self, chosen: _Try) -> dict[str, str]:
        """The source's own name -> the target's; where it has none, the own one without what wrappers put into it."""
        plain = without_wrappers(self._source)
        if not any(DDP in name.split(".") for name in self._target):
            plain = _without_ddp(plain, inside=bool(self._target))
        # What the target does not list, such as a tied head, is called as the class calls it, if that was asked.
        called = self._renames.in_memory(chosen.forms.values()) if chosen.by_class and self._renames else {}
        names = {
            own: chosen.placed.get(own, called.get(form, plain[own] if form == self._forms[own] else form))
            for own, form in chosen.forms.items()
        }
        return names if len(set(names.values())) == len(names) else {name: name for name in names}

    def aliases(self, aliases: Collection[str], chosen: _Try) -> dict[str, str]:
        """Return the new name of each alias -> its own."""
        forms = {n: f.removeprefix(chosen.removed) for n, f in without_wrappers(aliases, self.segments).items()}
        forms = {n: f if f in self._places else chosen.added + f for n, f in forms.items()}
        found = self._try(forms)
        placed = self._by_class(found).placed if chosen.by_class else found.placed
        return {placed.get(name, form): name for name, form in forms.items()}

    def _try(self, forms: Mapping[str, str], removed: str = "", added: str = "") -> _Try:
        placed = {name: self._places[form] for name, form in forms.items() if form in self._places}
        missing = frozenset(self._target).difference(placed.values())
        return _Try(forms, placed, missing, removed, added)

    def _by_class(self, plain: _Try) -> _Try:
        """The same names, once the class has turned those of both sides into the ones in memory."""
        ours = self._renames.in_memory(plain.forms.values()) if self._renames else {}
        if not self._renames or not ours:
            return plain
        # Computed once for the target: names in memory -> the target's own.
        if self._memory is None:
            theirs = self._renames.in_memory(self._places)
            self._memory = {called: self._places[form] for form, called in theirs.items()}
        placed = {n: self._memory[ours[form]] for n, form in plain.forms.items() if ours[form] in self._memory}
        missing = frozenset(self._target).difference(placed.values())
        found = replace(plain, placed=placed, missing=missing, by_class=True)
        # Renames that bring nothing together are not reported as needed.
        return found if found.unplaced < plain.unplaced else plain

    def _guesses(self) -> Iterator[_Try]:
        """One prefix less, or one more: before all names, or where the target has no name without it."""
        for head in _heads(self._forms.values()):
            plain = self._try(_without(self._forms, head), removed=head)
            yield plain
            yield self._by_class(plain)
        for head in _heads(self._places):
            yield self._try({name: head + form for name, form in self._forms.items()}, added=head)
            # Where only a part of the names lacks the prefix, as of a model whose head lies beside it.
            some = {n: form if form in self._places else head + form for n, form in self._forms.items()}
            yield self._try(some, added=head)

    def _common_prefixes(self) -> Iterator[_Try]:
        """Without what all names begin with, and if the target has such names, too, only where nearly all then fit."""
        for head in _heads(self._forms.values()):
            if all(form.startswith(head) for form in self._forms.values()):
                shared = any(place.startswith(head) for place in self._places)
                plain = self._try(_without(self._forms, head), removed=head)
                yield from (found for found in (plain, self._by_class(plain)) if not shared or self._nearly_fits(found))

    def _nearly_fits(self, found: _Try) -> bool:
        return found.unplaced <= _FEW * (len(self._source) + len(self._target))

    def _has_shapes(self, guess: _Try) -> bool:
        """Whether most tensors have the size of those whose names they would get."""
        pairs = [(self._source[own].numel, self._target[name].numel) for own, name in guess.placed.items()]
        return sum(ours == theirs for ours, theirs in pairs) * 2 > len(pairs)


def _without_ddp(forms: Mapping[str, str], *, inside: bool) -> dict[str, str]:
    """Names without the segments of DDP that all of them begin with; also inside what they have in common, if asked."""
    split = {name: form.split(".") for name, form in forms.items()}
    columns = zip(*(parts[:-1] for parts in split.values()), strict=False)
    common = [column[0] for column in itertools.takewhile(lambda column: len(set(column)) == 1, columns)]
    if not inside:
        common = list(itertools.takewhile(DDP.__eq__, common))
    kept = [part for part in common if part != DDP]
    return {name: ".".join([*kept, *parts[len(common) :]]) for name, parts in split.items()}


def _heads(names: Iterable[str]) -> list[str]:
    """What names with more segments begin with, up to a dot, the shorter ones first; no more than a few."""
    split = [name.split(".") for name in names]
    found: list[str] = []
    for depth in range(1, _DEEPEST + 1):
        # Many different beginnings are names of layers or modules, and none of them is a wrapper's.
        heads = {".".join(parts[:depth]) + "." for parts in split if len(parts) > depth}
        found += sorted(heads) if len(heads) <= _MOST_HEADS else []
    return found


def _without(forms: Mapping[str, str], head: str) -> dict[str, str]:
    """All names without a prefix; as they are where two would become one."""
    changed = {name: form.removeprefix(head) for name, form in forms.items()}
    return changed if len(set(changed.values())) == len(changed) else dict(forms)
