"""How hooks fit together, found out before the first step: what ``Hooks`` cannot make up for later."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from torch import nn

from shardsmith.errors import RankFailedError, RanksDisagreeError, UsageError
from shardsmith.ground.layout import parse_step, step_name
from shardsmith.ground.meeting import meet
from shardsmith.ground.ranks import Ranks, rank_and_size
from shardsmith.manifest.checkpoints import committed_steps
from shardsmith.tensors.fqn import refuse_without_values

if TYPE_CHECKING:
    from .hook import Hook

T = TypeVar("T")

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Parts:
    """What a hook works with."""

    model: nn.Module | None = None
    """The model that it reads."""
    average: Any = None
    """The average that it reads and that another hook updates."""
    directory: Path | None = None
    """Where it publishes step directories."""
    resumes: bool = False
    """Whether ``resume`` finds the run's state in that directory."""
    loads: Sequence[object] = ()
    """What ``resume`` loads into."""
    find_problems: Callable[[], list[str]] = list
    """What has become wrong with the hook itself since it was made, looked at before the first step."""
    facts: Mapping[str, str] = field(default_factory=dict)
    """Arguments that must be the same on all ranks."""


def alike(**values: object) -> dict[str, str]:
    """Arguments of a hook that must be the same on all ranks, as text."""
    return {name: str(value) for name, value in values.items()}


def is_ours(hook: Hook) -> bool:
    """Return whether a hook is of this package, and not of the user's own."""
    return type(hook).__module__.startswith("shardsmith.")


class Start:
    """The beginning of a training, where everything that can be wrong with the hooks is found.

    Attributes:
        step: The first step that was reported; None before.
    """

    def __init__(self) -> None:
        self.step: int | None = None
        self._is_checked = False
        self._has_resumed = False
        self._ranks: Ranks | None = None

    @property
    def has_begun(self) -> bool:
        """Whether ``resume`` was called, or a step reported."""
        return self._is_checked

    def resume(self, hooks: Sequence[Hook], step: int) -> None:
        """``resume`` is called. All ranks; communicates if any hook does. Raises what ``check_wiring`` raises."""
        if self.step is not None:
            raise UsageError(
                f"resume() after step {step} would go back to an earlier state: call it once, before the loop"
            )
        self._check(hooks)
        self._has_resumed = True

    def compare_options(self, options: Mapping[str, object]) -> None:
        """Raise RanksDisagreeError unless ``resume`` has the same arguments on all ranks. Communicates."""
        if self._ranks is not None:
            meet(self._ranks, "resume()", alike(**options))

    def on_all_ranks(self, what: str, act: Callable[[], T], *, by: Hook) -> T:
        """Do what a hook does at the start, and return its value on this rank; communicates if it is a user's own.

        Raises:
            What the hook raises here. What a user's hook raises on another rank alone: RankFailedError. Our hooks see
            to that themselves.
        """
        if self._ranks is None or is_ours(by):
            return act()
        done: list[T] = []
        errors: list[Exception] = []

        def attempt() -> None:
            try:
                done.append(act())
            except Exception as error:
                errors.append(error)
                raise

        try:
            self._ranks.gather(what, attempt)
        except RankFailedError:
            # The rank that failed raises its own error, with its traceback.
            if errors:
                raise errors[0] from None
            raise
        return done[0]

    def begin(self, hooks: Sequence[Hook], step: int) -> None:
        """The first step of all is reported, which is where all ranks must be. As ``resume``."""
        self._check(hooks)
        if not self._has_resumed:
            refuse_forgotten_resume(hooks, step)
        if self._ranks is not None:
            meet(self._ranks, "reporting the first step", {"step": step})
        self.step = step

    def refuse_order(self, step: int, last: int) -> None:
        """Raise UsageError: this step was reported although ``last`` is done."""
        if step == 0:
            raise UsageError("step 0 was reported, but steps count from 1: call hooks.step(step) after step += 1")
        if self.step is None:
            raise UsageError(
                f"step {step} was reported, but resume() has loaded step {last}: begin the loop there, "
                "with step = hooks.resume()"
            )
        how = "twice" if step == last else f"after step {last}"
        raise UsageError(f"step {step} was reported {how}: report each optimizer step once, in order")

    def _check(self, hooks: Sequence[Hook]) -> None:
        if not self._is_checked:
            _, size = rank_and_size()
            self._ranks = Ranks() if size > 1 and any(hook.parts.directory for hook in hooks) else None
            check_wiring(hooks, self._ranks)
            self._is_checked = True


def check_wiring(hooks: Sequence[Hook], ranks: Ranks | None) -> None:
    """Raise unless the hooks fit together, and those of all ranks. All ranks; communicates through the store.

    Raises:
        UsageError: two hooks publish into one directory, or one into the checkpoints of another; an average that is
            read is not attached, is of another model, or the model was changed under it; a model has no weights yet.
        RanksDisagreeError: ranks have other hooks, or other arguments.
    """
    problems = [*_shared_directories(hooks), *_averages(hooks), *_without_weights(hooks)]
    problems += [problem for hook in hooks for problem in hook.parts.find_problems()]
    if ranks is not None:
        facts = {"hooks": ", ".join(type(hook).__name__ for hook in hooks) or "none", "problems": problems}
        for hook in hooks:
            facts |= {f"{type(hook).__name__}: {name}": value for name, value in hook.parts.facts.items()}
        try:
            meet(ranks, "checking the hooks before the first step", facts)
        except RanksDisagreeError:
            if not problems:  # this rank is in order, and another one is not
                raise
    if problems:
        raise UsageError("\n  ".join(["the hooks do not fit together", *problems]) + "\nNo step was done.")


def refuse_forgotten_resume(hooks: Sequence[Hook], step: int) -> None:
    """Raise UsageError if step number ``step`` comes first, and there are later checkpoints that were not resumed."""
    for hook in hooks:
        directory = hook.parts.directory
        steps = committed_steps(directory) if hook.parts.resumes and directory is not None else []
        if steps and steps[-1] >= step:
            raise UsageError(
                f"step {step} is the first one of this run, but {directory} holds {step_name(steps[-1])}, "
                "and resume() was not called: this run would start anew and fail when it saves that step again. "
                "Call step = hooks.resume() before the loop, or give another directory"
            )


def ahead_of_all(found: Sequence[tuple[Hook, int | None]]) -> list[Hook]:
    """Return the hooks that have to load again, because one that came later has loaded an older step over theirs.

    Args:
        found: Hooks that resume, in order, and the step of each. The same on all ranks.

    Raises:
        UsageError: what one has loaded is of another step than the rest of the run, and no other hook loads it.
    """
    steps = {step for _, step in found if step is not None}
    if len({step for _, step in found}) < 2:
        return []
    newest = [hook for hook, step in found if step == max(steps)]
    newer = {id(thing) for hook in newest for thing in hook.parts.loads}
    apart = [(hook, step) for hook, step in found if not newer.issuperset(map(id, hook.parts.loads))]
    for hook, step in apart:
        if step is None:
            log.warning("%s holds no step: what it saves goes on as it is, from step %d", _named(hook), max(steps))
    if older := [f"{_named(hook)} is at step {step}" for hook, step in apart if step is not None]:
        places = [hook.parts.directory for hook, step in found if step is not None and hook.parts.directory is not None]
        common = set[int].intersection(*(set(committed_steps(place)) for place in places))
        go_on = f"resume(step={max(common)}) goes back to the newest step of all" if common else "No step is in all"
        raise UsageError(
            "\n  ".join(
                [
                    "the parts of this run are not of one step",
                    *(f"{_named(hook)} is at step {max(steps)}" for hook in newest),
                    *older,
                ]
            )
            + f"\nDo not train on it: start again. {go_on}. One ShardedSave of all models, "
            "model=torch.nn.ModuleDict(...) and optimizer=[...], saves them together."
        )
    # Those after which an older step was loaded.
    last = max((i for i, (_, step) in enumerate(found) if step is not None and step < max(steps)), default=0)
    return [hook for hook, step in found[:last] if step == max(steps)]


def _named(hook: Hook) -> str:
    return f"{type(hook).__name__}({str(hook.parts.directory)!r})"


def _shared_directories(hooks: Sequence[Hook]) -> list[str]:
    problems, first = [], dict[Path, str]()
    for hook in hooks:
        if hook.parts.directory is not None:
            # Links resolved: two names may lead to one folder.
            name, place = type(hook).__name__, hook.parts.directory.resolve()
            for other, other_name in first.items():
                if place == other:
                    problems.append(
                        f"{other_name} and {name} both publish step directories in {hook.parts.directory}: "
                        "give each a directory of its own"
                    )
                elif within := _step_within(place, other) or _step_within(other, place):
                    problems.append(
                        f"{other_name} and {name} would publish into each other's {within}, which is written as a "
                        f"whole and deleted as a whole: {other} and {place}; give each a directory of its own"
                    )
            first.setdefault(place, name)
    return problems


def _step_within(inner: Path, outer: Path) -> str | None:
    """The step directory of ``outer`` that ``inner`` is in; None if there is none."""
    if not inner.is_relative_to(outer) or inner == outer:
        return None
    name = inner.relative_to(outer).parts[0]
    return name if parse_step(name) is not None else None


def _without_weights(hooks: Sequence[Hook]) -> list[str]:
    """Models that were not materialized, unless a hook loads them."""
    if any(hook.loads_weights for hook in hooks):
        return []
    # Each model once, as several hooks read the same one.
    models = {id(hook.parts.model): hook.parts.model for hook in hooks if hook.parts.model is not None}
    problems = []
    for model in models.values():
        try:
            refuse_without_values(model)
        except UsageError as error:
            problems.append(str(error))
    return problems


def _averages(hooks: Sequence[Hook]) -> list[str]:
    problems = []
    for hook in hooks:
        name, average = type(hook).__name__, hook.parts.average
        if average is None:
            continue
        # One that has updates already is updated by somebody else, such as the training itself.
        if not any(average is other for other in hooks) and average.updates == 0:
            problems.append(
                f"{name} was given an EMA that is not attached: nothing would update it, and it would stay what the "
                f"weights are now. Write Hooks(ema, {name}(..., ema=ema))"
            )
        if not _is_of(average.parts.model, hook.parts.model):
            problems.append(f"{name} was given an EMA of another model: write EMA(model) with the model of {name}")
    return problems


def _is_of(averaged: nn.Module | None, model: nn.Module | None) -> bool:
    """Whether one is the other, or is wrapped in it, or is a part of it."""
    if averaged is None or model is None:
        return True
    return any(module is averaged for module in model.modules()) or any(
        module is model for module in averaged.modules()
    )
