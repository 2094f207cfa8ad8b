"""Whether an average of the weights is one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from shardsmith.compare.findings import Finding, one
from shardsmith.compare.values import TensorComparison, same_as
from shardsmith.diagnose.subject import Subject
from shardsmith.tensors.checkpoint_keys import EMA, MAIN
from shardsmith.tensors.dtypes import dtype_name

# With a smaller decay a step is large enough for 16 bits to take it up.
_HIGH_DECAY = 0.99


def look_at_average(subject: Subject, compared: Mapping[str, Mapping[str, TensorComparison]]) -> Iterator[Finding]:
    """Compare the average with main and with the reference.

    Args:
        subject: The checkpoint and the model that it should hold.
        compared: By model, its tensors against the reference's.
    """
    average, _ = subject.models[EMA]
    # A name that was filled in from main is no average's own, and would look like a copy of it.
    scaled = {name for names in subject.quantized.values() for name in names}
    own = [name for name in average.specs if name not in average.filled and name not in scaled]
    narrow = [
        name for name in own if average.specs[name].dtype.is_floating_point and average.specs[name].dtype.itemsize < 4
    ]
    # An export is rounded on purpose; its average was kept in whatever the trainer has.
    if narrow and _decay(subject) >= _HIGH_DECAY and subject.opened.format != "huggingface":
        found = ", ".join(sorted({dtype_name(average.specs[name].dtype) for name in narrow}))
        yield one("ema-low-precision", narrow, "float32", found)
    if subject.trained and _updated(subject) and MAIN in subject.models:
        yield from _standing_still(subject, own, compared)


def _standing_still(
    subject: Subject, own: list[str], compared: Mapping[str, Mapping[str, TensorComparison]]
) -> Iterator[Finding]:
    """An average that is a copy: of what is trained now, or of what training began with."""
    (average, _), (main, _) = subject.models[EMA], subject.models[MAIN]
    # Only what training has moved tells: a tensor that stays, such as a frozen one, equals its average as it should.
    moved = [name for name in own if name in compared[MAIN] and not compared[MAIN][name].equal]
    if not moved:
        return
    copies = dict(same_as(average, main, {name: name for name in moved}))
    # With a decay of 0 an average is the present weights, by definition.
    if len(copies) == len(moved) and _decay(subject) > 0:
        yield one("ema-equals-main", moved, "an average over the steps", "the present weights, every bit")
        return
    unmoved = [name for name in moved if _at_base(compared[EMA][name])]
    if len(unmoved) == len(moved):
        yield one(
            "ema-never-moved", moved, "an average over the steps", "the base model's weights, while main moved on"
        )


def _at_base(found: TensorComparison) -> bool:
    """Whether it is the reference's, or that in another dtype."""
    return found.distance is None or found.distance.rounding is not None


def _decay(subject: Subject) -> float:
    facts = subject.metadata.ema if subject.metadata else None
    # A decay that nobody recorded counts as near 1, the usual one.
    decay = (facts or {}).get("decay")
    return float(decay) if isinstance(decay, int | float) else 1.0


def _updated(subject: Subject) -> bool:
    """Whether the average has been updated, as far as that is recorded."""
    facts = subject.metadata.ema if subject.metadata else None
    updates = (facts or {}).get("updates")
    return not isinstance(updates, int) or updates > 0
