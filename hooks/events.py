"""What a run's hooks have done, as data: for trackers, for a file, for a callback of one's own."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Literal, Protocol

from shardsmith.checking.arguments import checked, checked_fields
from shardsmith.checking.types import LocalPath
from shardsmith.ground.logs import Stopwatch
from shardsmith.ground.printable import shown
from shardsmith.ground.remote_path import RemotePath
from shardsmith.ground.sizes import size_text

log = logging.getLogger(__name__)


@checked_fields
@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Something that has ended, well or not. Rank 0 makes it, for all ranks."""

    kind: Literal["resume", "verify", "save", "export", "push", "remove", "low_disk"]
    """``verify``: ``InitialLoad`` has loaded and verified the weights, or the buffers of a resumed run. ``push``: an
    export was sent to the Hugging Face Hub, or is there already. ``remove``: retention has deleted a checkpoint or an
    export. ``low_disk``: less is free than ``keep=low_disk(...)`` says."""
    step: int
    """The step that was saved, exported, resumed at or removed; not the one at which it was over."""
    path: str
    """Directory of the checkpoint or export; empty for a resume that found none."""
    seconds: float = 0.0
    """From its beginning to its end."""
    seconds_waited: float = 0.0
    """Of these, how long the training waited."""
    nbytes: int = 0
    """Bytes of all files in the directory; of ``low_disk``: what is free on its disk."""
    ranks: int = 1
    """How many took part."""
    error: str | None = None
    """Type and message of what it failed with. None: it succeeded."""
    phase: str | None = None
    """Of a failure on some ranks: what all ranks were doing, such as ``"collecting step-500"``."""
    ema_distance: float | None = None
    """Of a save with an average: ``EMA.distance()`` of rank 0, at that step. None: not known, or not finite."""
    time: float = field(default_factory=time.time)
    """When it was over, seconds since 1970."""
    told_at: int = 0
    """The step that the training was at when it was told: ``step``, or later for work in the background."""

    @property
    def line(self) -> str:
        """What was written, for the log."""
        if self.error is not None:
            return f"{shown(self.path)}: {self.error}"
        waited = f"of which the training waited {self.seconds_waited:.2f} s"
        return f"{shown(self.path)}: {size_text(self.nbytes)} in {self.seconds:.1f} s, {waited}"

    def metrics(self) -> dict[str, float]:
        """Return the numbers under names for a tracker, such as ``checkpoint/save/seconds_waited``."""
        name = f"checkpoint/{self.kind}"
        found: dict[str, float] = {f"{name}/step": self.step, f"{name}/failed": float(self.error is not None)}
        if self.kind == "low_disk" or (self.kind != "remove" and self.error is None):
            found |= {f"{name}/gigabytes": self.nbytes / 1e9}
        if self.kind not in ("remove", "low_disk") and self.error is None:
            found |= {f"{name}/seconds": self.seconds, f"{name}/seconds_waited": self.seconds_waited}
        if self.ema_distance is not None:
            found |= {f"{name}/ema_distance": self.ema_distance}
        return found


Listener = Callable[[Event], object]
"""Called on rank 0, on the main thread, after the step at which the event is known. What it raises is logged."""


def event_of(
    kind: Literal["resume", "verify", "save", "export", "push"],
    step: int,
    path: Path,
    watch: Stopwatch,
    ranks: int,
    error: BaseException | None = None,
    ema_distance: float | None = None,
) -> Event:
    """Measure what has ended. Reads the sizes of the directory's files, unless it failed. Raises OSError."""
    seconds, waited = watch.times()
    return Event(
        kind=kind,
        step=step,
        path=str(path),
        seconds=seconds,
        seconds_waited=waited,
        nbytes=_bytes_in(path, is_export=kind == "export") if error is None else 0,
        ranks=ranks,
        error=None if error is None else f"{type(error).__name__}: {error}",
        # Errors of `Ranks` have one.
        phase=getattr(error, "phase", None),
        ema_distance=ema_distance if ema_distance is not None and math.isfinite(ema_distance) else None,
    )


def _bytes_in(path: Path, *, is_export: bool) -> int:
    """Bytes of the files in a directory; 0 if there is none. Raises OSError."""
    if isinstance(path, RemotePath):  # an export has a step's name, too, but no manifest that lists its files
        with contextlib.suppress(FileNotFoundError):  # a step that is on local disks only, so far
            return sum((path.objects_below() if is_export else path.sizes()).values())
        return 0
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) if path.is_dir() else 0


class EventQueue:
    """Events from any thread, passed on by the main one. On ranks without listeners it does nothing.

    Attributes:
        listeners: Who is told.
    """

    def __init__(self, listeners: Sequence[Listener]) -> None:
        self.listeners = tuple(listeners)
        self._waiting: SimpleQueue[Event] = SimpleQueue()

    def put(self, event: Event) -> None:
        """Keep an event until ``deliver``. Any thread."""
        self._waiting.put(event)

    def deliver(self, step: int) -> None:
        """Tell all listeners of all that waits. What one raises is logged: no step fails by it."""
        # One thread reads the queue, so what is not empty now has something for `get`.
        while not self._waiting.empty():
            event = dataclasses.replace(self._waiting.get(), told_at=step)
            for listener in self.listeners:
                try:
                    listener(event)
                except Exception:
                    log.exception("on_event failed for the %s of step %d", event.kind, event.step)


@checked
def json_lines(path: LocalPath) -> Listener:
    """Append each event to a file, as JSON on a line of its own: ``on_event=json_lines("run/events.jsonl")``.

    A run that is resumed goes on in the same file. ``shardsmith inspect`` reads ``events.jsonl`` in a run's folder.

    Args:
        path: Made with its folder, if missing, at the first event.
    """
    file = Path(path)

    def append(event: Event) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps(dataclasses.asdict(event)) + "\n"
        # O_APPEND and one write: lines of several processes do not mix.
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        try:
            os.write(descriptor, line.encode())
        finally:
            os.close(descriptor)

    return append


@checked
def metrics_to(log: Callable[..., Any]) -> Listener:
    """Pass the numbers of each event to a tracker's function: ``log(numbers, step=step)``.

        on_event=metrics_to(wandb.log)            # or run.log
        on_event=metrics_to(accelerator.log)
        on_event=metrics_to(mlflow.log_metrics)

    Args:
        log: Takes a mapping of names to numbers, and the keyword ``step``: the step that the training is at when it is
            told, since trackers want steps that do not go back.
    """

    def pass_on(event: Event) -> None:
        log(event.metrics(), step=event.told_at)

    return pass_on


class ScalarWriter(Protocol):
    """What ``SummaryWriter`` of tensorboard has."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> object:
        """Add one number."""


@checked
def tensorboard(writer: ScalarWriter) -> Listener:
    """Write the numbers of each event as scalars: ``on_event=tensorboard(SummaryWriter("run/tb"))``.

    Args:
        writer: A ``torch.utils.tensorboard.SummaryWriter``, or what has its ``add_scalar``.
    """

    def write(event: Event) -> None:
        for name, value in event.metrics().items():
            writer.add_scalar(name, value, event.told_at)

    return write


class SpanMaker(Protocol):
    """What a tracer of OpenTelemetry has."""

    def start_span(self, name: str, *, start_time: int) -> Any:
        """Begin a span at a time in nanoseconds."""


@checked
def spans(tracer: SpanMaker) -> Listener:
    """Make a span of OpenTelemetry of each event: ``on_event=spans(opentelemetry.trace.get_tracer("training"))``.

    A span begins and ends when the work did, so that saves in the background lie beside the steps of the training. The
    number of seconds that the training waited is an attribute; a failure sets the status.

    Args:
        tracer: An ``opentelemetry.trace.Tracer``.
    """

    def record(event: Event) -> None:
        from opentelemetry.trace import Status, StatusCode

        # OpenTelemetry counts nanoseconds.
        span = tracer.start_span(f"checkpoint.{event.kind}", start_time=int((event.time - event.seconds) * 1e9))
        for name in ("step", "path", "seconds_waited", "nbytes", "ranks"):
            span.set_attribute(f"checkpoint.{name}", getattr(event, name))
        if event.error is not None:
            span.set_status(Status(StatusCode.ERROR, event.error))
        span.end(int(event.time * 1e9))

    return record
