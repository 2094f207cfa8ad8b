"""``Hooks``: passes the moments of a training run on to several hooks, in order."""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from shardsmith.checking.arguments import check_value, checked
from shardsmith.checking.types import Number, StepNumber
from shardsmith.errors import RankFailedError, UsageError
from shardsmith.ground.commit import writing
from shardsmith.ground.layout import METRICS_FILE, step_name
from shardsmith.ground.logs import Stopwatch, show_progress
from shardsmith.ground.process_end import meet
from shardsmith.ground.ranks import own_name, rank_and_size
from shardsmith.ground.remote_path import as_path
from shardsmith.ground.step_agreement import StepAgreement
from shardsmith.manifest.retention import Retention
from shardsmith.sharding.step_copies import StepCopies

from .background import attempted, each_of, logged
from .events import EventQueue, Listener, event_of
from .hook import Hook
from .occasions import Occasion, OccasionWatch
from .retention import add_metrics
from .schedule import Schedule
from .stop_signals import StopSignals
from .undone import warn_of_undone
from .wiring import Start, ahead_of_all, is_ours

log = logging.getLogger(__name__)

_FAILED = "failed"
_STOP = "stop"
_RAISED = "raised"
_OCCASION = "occasion"
# At the end, for the other ranks: rank 0 may hold the job's store.
_FAREWELL_SECS = 10.0


class Hooks:
    """Several hooks as one object for the training loop.

        step = hooks.resume()
        while step < max_steps:
            ...; optimizer.step(); step += 1
            hooks.step(step)
        hooks.close()

    All ranks make it at the same point, and the same calls. As a context manager it closes at the end; after an
    exception it waits for background work but does not save a last step. What fails in the background is raised by
    ``step`` on all ranks after the same step, or by ``close``.

    Attributes:
        should_stop: A signal, or ``request_stop``, has asked for the end of the run, and what is needed to resume
            after this step is saved or being saved. It turns true on all ranks after the same step. Leave the loop,
            and close.
    """

    should_stop = False

    @checked
    def __init__(
        self,
        *hooks: Hook,
        stop_on: signal.Signals | Sequence[signal.Signals] = (),
        on_event: Listener | Sequence[Listener] = (),
    ) -> None:
        """Attach the hooks. No communication; with several ranks it starts a thread that sleeps until there is news.

        Args:
            *hooks: In the order in which their moments are called.
            stop_on: Signals that ask for the end of the run, such as ``signal.SIGTERM`` with which a scheduler
                announces that it takes the machine away. One rank that gets it is enough. What handled it before is
                called, too; ``close`` puts it back. To be made on the main thread then.
            on_event: Who is told, on rank 0, what has ended: resumes, saves, exports, removals; one or several, such as
                ``json_lines("run/events.jsonl")``, ``metrics_to(wandb.log)`` or a function that takes an ``Event``.
        """
        show_progress()
        self.hooks: tuple[Hook, ...] = ()
        self._step = 0
        self._start = Start()
        self._open = True
        self._ended = False
        self._rank, self._size = rank_and_size()
        self._own_errors: list[Exception] = []  # raised by hooks that were told of a save; not yet passed on
        self._step_copies = StepCopies()
        self._events = EventQueue([on_event] if callable(on_event) else on_event)
        self._signals = StopSignals([stop_on] if isinstance(stop_on, signal.Signals) else stop_on)
        self._agreement = StepAgreement() if stop_on or self._size == 1 else None  # else when a hook needs it
        self._occasions = OccasionWatch((), self._rank)
        for hook in hooks:
            self.add(hook)

    @property
    def steps_done(self) -> int:
        """The last step that was reported, or resumed at."""
        return self._step

    @checked
    def add(self, hook: Hook) -> None:
        """Attach one more, after the others. Raises UsageError if it is attached already, or after ``resume``."""
        if self._start.has_begun:
            raise UsageError(f"this {type(hook).__name__} comes too late: add hooks before resume() and the first step")
        if any(hook is other for other in self.hooks):
            raise UsageError(f"this {type(hook).__name__} is attached already: name each hook once")
        hook.announce_saved = self._on_saved
        hook.request_stop = self.request_stop
        hook.step_copies = self._step_copies
        if self._events.listeners and self._rank == 0:
            hook.emit = self._events.put
        if hook.background is not None or _may_stop(hook):
            self._agreement = self._agreement or StepAgreement()
        if hook.background is not None:
            # Notices are JSON: a hook is named by its place, which is the same on all ranks.
            hook.background.tell = partial(self._tell_failure, len(self.hooks))
        self.hooks = (*self.hooks, hook)
        if _occasions_of(hook):
            self._agreement = self._agreement or StepAgreement()
            # Before the new watch: each remembers what handled a signal before it.
            self._occasions.restore()
            self._occasions = OccasionWatch([one for each in self.hooks for one in _occasions_of(each)], self._rank)

    def resume(
        self,
        *,
        step: int | None = None,
        parts: Sequence[str] | None = None,
        directory: str | Path | None = None,
        on_missing: Literal["raise", "start"] | None = None,
    ) -> int:
        """Restore the newest usable state and return how many steps were done; 0 on a fresh start. Communicates.

        Call it once, before the first step.

        Args:
            step: Go on from this step, instead of the newest. Later checkpoints are set aside.
            parts: What to restore: ``"model"``, ``"ema"``, ``"optimizer"``, ``"scheduler"``, ``"rng"``, and the names
                in ``stateful``. None restores all.
            directory: Where the checkpoints are, if not where this run saves.
            on_missing: ``"start"`` lets what the checkpoint does not have begin anew, ``"raise"`` stops.

        Raises:
            UsageError: a step was reported already, or the hooks do not fit together, or none takes such arguments; or
                hooks that save have loaded different things of different steps.
            RanksDisagreeError, RankTimeoutError: other ranks have other hooks or arguments, or none.
            RankFailedError: a hook of the user's own has failed on another rank.
        """
        if not self._open:
            self._refuse_closed("resume()")
        self._start.resume(self.hooks, self._step)
        given = {"step": step, "parts": parts, "directory": directory, "on_missing": on_missing}
        options = {name: value for name, value in given.items() if value is not None}
        if options and not any(hook.parts.resumes for hook in self.hooks):
            raise UsageError(f"resume({', '.join(options)}=...) needs a hook that saves, such as ShardedSave")
        try:
            # Before any hook loads something: ranks with other arguments would load other steps.
            self._start.compare_options(given)
            found = [(hook, self._resume(hook, options)) for hook in self.hooks]
            for hook in ahead_of_all([(hook, step) for hook, step in found if hook.parts.resumes]):
                self._resume(hook, options)
            self._step = max((step for _, step in found if step is not None), default=0)
            # What loads weights comes first: an average, for one, starts from the weights as they are then.
            for hook in sorted(self.hooks, key=lambda hook: not hook.loads_weights):
                name = f"{type(hook).__name__}.on_train_begin"
                self._start.on_all_ranks(name, partial(hook.on_train_begin, self._step), by=hook)
        finally:  # what failed is told, too
            self._events.deliver(self._step)
        return self._step

    def _resume(self, hook: Hook, options: dict[str, Any]) -> int | None:
        """Only a hook with ``parts.resumes`` takes options."""
        resume: Callable[..., int | None] = hook.resume
        watch = Stopwatch()
        place = options.get("directory") or hook.parts.directory
        try:
            act = partial(resume, **options) if hook.parts.resumes else resume
            step = self._start.on_all_ranks(f"{type(hook).__name__}.resume", act, by=hook)
        except BaseException as error:
            if place is not None:
                hook.emit(event_of("resume", options.get("step") or 0, as_path(place), watch, self._size, error))
            raise
        if step is not None and place is not None and hook.is_heard:
            with logged("measuring what was resumed"):  # of this rank alone: it must not fail
                hook.emit(event_of("resume", step, as_path(place) / step_name(step), watch, self._size))
        return step

    def step(self, step: int) -> None:
        """Report that optimizer step number ``step`` (from 1) is done. Raises what failed in the background.

        A whole number of another type counts as what it is: ``np.int64(500)``, ``torch.tensor(500)`` and ``5e2`` are
        step 500.

        Raises:
            UsageError: it is no whole number.
        """
        step = _step_number("Hooks.step", step)
        self.optimizer_step(step)
        self.step_end(step)

    def optimizer_step(self, step: int) -> None:
        """The first half of ``step``, for trainers that have a moment right after ``optimizer.step()``."""
        step = self._enter("optimizer_step", step)
        for hook in self.hooks:
            hook.on_optimizer_step(step)

    def step_end(self, step: int) -> None:
        """The second half of ``step``."""
        step = self._enter("step_end", step)
        self._step = step
        if self._signals.take():
            self.request_stop()
        # What one rank has noticed is told to all, and comes back from `due` after the same step.
        for occasion in self._occasions.come():
            assert self._agreement is not None
            self._agreement.tell([_OCCASION, occasion])
        notices = self._agreement.due(step) if self._agreement is not None else []
        # Before a stop or a failure: what is due at this step is done even if the run ends here.
        self._each(lambda hook: hook.on_step_end(step))
        # Notices have gone through JSON, so an occasion is its text.
        if come := {notice[1] for notice in notices if notice[0] == _OCCASION}:
            self._each(
                lambda hook: hook.on_occasion(step),
                lambda hook: any(repr(occasion) in come for occasion in _occasions_of(hook)),
            )
        if any(notice[0] == _STOP for notice in notices) and not self.should_stop:
            self._stop(step)
        self._events.deliver(step)
        self._raise_failures([notice for notice in notices if notice[0] == _FAILED])
        self._raise_errors({notice[1]: notice[2] for notice in notices if notice[0] == _RAISED})

    def _each(self, act: Callable[[Hook], None], is_meant: Callable[[Hook], bool] = lambda _: True) -> None:
        """Let hooks act in their order; what one has copied, those after it may read instead of copying it again."""
        try:
            for hook in filter(is_meant, self.hooks):
                act(hook)
                if not is_ours(hook):  # it may have changed what was copied
                    self._step_copies.clear()
        finally:
            self._step_copies.clear()

    def _enter(self, method: str, step: int) -> int:
        """Return a step that is given to a method as a number, after the first one has begun the run."""
        step = _step_number(f"Hooks.{method}", step)
        if not self._open:
            self._refuse_closed(f"step {step}")
        if step <= self._step:
            self._start.refuse_order(step, self._step)
        if self._start.step is None:
            self._start.begin(self.hooks, step)
        return step

    def request_stop(self) -> None:
        """Ask for the end of the run, as a signal does: any rank, any thread. See ``should_stop``.

        Raises:
            UsageError: there are several ranks, and neither ``stop_on`` nor a hook that works in the background.
        """
        if self._agreement is None:
            raise UsageError("ranks that are to stop together need Hooks(stop_on=...), or a hook that saves or exports")
        self._agreement.tell([_STOP])

    @checked
    def metric(self, step: StepNumber, **values: Number) -> None:
        """Tell the metrics of a step, saved or not, for ``keep=best("eval_loss")``. Any rank; rank 0 notes them.

        It may come after later steps. A later value of a step replaces an earlier one.

        Args:
            step: The step whose weights were measured.
            values: Numbers by name; a 0-dim tensor is one.

        Raises:
            WriteError: rank 0 cannot write them beside the step directories.
        """
        for hook in self.hooks if self._rank == 0 else ():
            place = hook.parts.directory
            if place is not None and isinstance(getattr(hook, "keep", None), Retention):
                with writing(place / METRICS_FILE, "noting metrics"):
                    add_metrics(place, step, values)

    @checked
    def train_end(self, step: StepNumber) -> None:
        """The first half of ``close``, for trainers that do more after the last step: what is due at it is done."""
        self._ended = True
        if self.hooks and self._start.step is None and step == 0:
            log.warning("no step was reported, although the training ends: call hooks.step(step) after each step")
        self._each(lambda hook: hook.on_train_end(step))

    def close(self, *, broken_off: bool = False) -> None:
        """End the training: what is due at the last step is done, background work is waited for. Raises what failed.

        Args:
            broken_off: It did not get to its end: only wait for background work.
        """
        if self._open:
            if not self._ended and not broken_off:
                self.train_end(self._step)
            try:
                self._close()
            finally:
                if not broken_off and self._spans_ranks():  # rank 0 may hold the store that the others still read
                    meet(f"{own_name()}/end", _FAREWELL_SECS)
                elif not self._ended:  # only now all saves that were under way are there
                    warn_of_undone(self.hooks, self._step)
            self._raise_errors({})

    def _refuse_closed(self, what: str) -> None:
        raise UsageError(f"{what} after close(): these hooks have ended. Make new hooks, and new Hooks with them")

    def _spans_ranks(self) -> bool:
        """Return whether a hook communicates. Hooks of an average alone may be one rank's own."""
        return self._agreement is not None or any(hook.parts.directory for hook in self.hooks)

    def _close(self) -> None:
        """Close every hook, also when one of them raises; the first error is raised in the end."""
        self._open = False
        try:
            # All of them, whatever one raises: each may have a thread, handlers or memory to give back.
            each_of(hook.close for hook in self.hooks)
        finally:
            self._events.deliver(self._step)
            if self._agreement is not None:
                self._agreement.close()
            self._signals.restore()
            self._occasions.restore()

    def _stop(self, step: int) -> None:
        self.should_stop = True
        self._ended = True  # and not by coming to its end
        for hook in self.hooks:
            hook.on_stop(step)

    def _tell_failure(self, hook: int, job: int, error: str) -> None:
        assert self._agreement is not None
        self._agreement.tell([_FAILED, hook, job, self._rank, error])

    def _raise_failures(self, notices: list[Any]) -> None:
        """Let every hook named report; raise what it raises, or, if it has not failed on this rank, what it told."""
        told: dict[tuple[int, int], dict[int, str]] = {}
        for _, hook, job, rank, error in notices:
            # A job that failed on several ranks is one failure, with the error of each.
            told.setdefault((hook, job), {})[rank] = error
        each_of(partial(self._report, hook, job, failures) for (hook, job), failures in sorted(told.items()))

    def _report(self, index: int, job: int, failures: dict[int, str]) -> None:
        hook = self.hooks[index]
        failed_here = hook.background is None or hook.background.failed_here(job)
        hook.report_background()
        # A rank on which the job did well raises as well: alone it would go on.
        if not failed_here:
            raise RankFailedError(f"{type(hook).__name__} in the background", failures, self._size)

    def _on_saved(self, step: int, path: Path) -> None:
        """What a hook raises fails no save: all ranks raise it after the same step, ``close`` on this rank."""
        for hook in self.hooks:
            _, error = attempted(partial(hook.on_saved, step, path))
            if not is_ours(hook):
                self._step_copies.clear()
            if error is not None:
                what = f"{type(hook).__name__}.on_saved of step {step}"
                log.error("%s failed; the step is saved", what, exc_info=error)
                self._own_errors.append(error)
                if self._agreement is not None:
                    self._agreement.tell([_RAISED, self._rank, f"{what}: {type(error).__name__}: {error}"])

    def _raise_errors(self, everywhere: dict[int, str]) -> None:
        # The rank where it was raised has the error itself; the others have its text.
        if self._own_errors and (everywhere or not self._open):
            errors, self._own_errors = self._own_errors, []
            raise errors[0]
        if everywhere:
            raise RankFailedError("what follows a save", everywhere, self._size)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(broken_off=kind is not None)


def _step_number(owner: str, step: int) -> int:
    """The number of a step, checked. Fast for what a training loop gives."""
    if type(step) is int and 0 <= step < 10**18:
        return step
    checked_step: int = check_value(owner, "step", step, StepNumber)
    return checked_step


def _occasions_of(hook: Hook) -> frozenset[Occasion]:
    """A user's own hook may mean something else by ``when``."""
    return hook.when.occasions if isinstance(hook.when, Schedule) else frozenset()


def _may_stop(hook: Hook) -> bool:
    """Whether a ``low_disk`` of the hook's policy may ask for the end of the run."""
    keep = getattr(hook, "keep", None)
    return isinstance(keep, Retention) and any(rule.then == "stop" for rule in keep.low_disks)
