"""How ``inspect`` prints the steps of a run and the tensors of a checkpoint: tables, JSON."""

from __future__ import annotations

import dataclasses
import datetime
import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from shardsmith.errors import UnsupportedFormatError
from shardsmith.ground.console import new_console
from shardsmith.ground.printable import printable
from shardsmith.ground.remote_path import as_path
from shardsmith.ground.sizes import size_text

if TYPE_CHECKING:
    from shardsmith.overview import RunOverview, StepSummary
    from shardsmith.tensor_listing import ListedTensor, Statistics

_UNITS = ((86400.0, "days"), (3600.0, "hours"), (60.0, "minutes"))


def print_overview(overview: RunOverview, *, as_json: bool) -> None:
    """A row for each step, then what is wrong, what may be deleted, and what all of it takes."""
    if as_json:
        print(json.dumps(dataclasses.asdict(overview)))
        return
    console = new_console()
    console.print(printable(overview.path))
    table = Table("step", "checkpoint", "size", "models", "ranks", "age", "waited", "exports", "size", "health")
    # ``groupby`` needs them in order, which the overview has: a row holds a step's checkpoint and its exports.
    for step, group in groupby(overview.steps, key=lambda one: one.step):
        table.add_row(str(step), *_row(list(group)))
    console.print(table)
    for problem in overview.problems:
        console.print(Text.assemble(("problem", "red"), " ", "\n".join(map(printable, problem.split("\n")))))
    for leftover in overview.leftovers:
        text = {"unfinished": "left over", "damaged": "set aside as damaged", "superseded": "set aside"}
        console.print(f"{text[leftover.kind]}: {printable(leftover.path)}, {size_text(leftover.nbytes)}")
    for line in _outlook(overview):
        console.print(line)
    if overview.leftovers:
        console.print(f"shardsmith clean {overview.path} shows what can be deleted")
    console.print(_sum(overview))


def verified_run_code(overview: RunOverview) -> int:
    """Return the exit code of a verification: 0 if every byte of every step is as recorded, 1 if there are problems.

    Raises:
        UnsupportedFormatError: nothing is known to be wrong, but not all of it could be verified.
    """
    if overview.problems or overview.verified:
        return 1 if overview.problems else 0
    steps = "\n  ".join(f"{one.path}: {one.health}" for one in overview.steps if one.compared != one.nbytes)
    raise UnsupportedFormatError(
        as_path(overview.path),
        f"is not verified as a whole, as hashes of some files are not recorded\n  {steps}\n"
        "Compare such a step with what it was made of: shardsmith verify STEP OTHER",
    )


def _outlook(overview: RunOverview) -> Iterator[str]:
    """What retention will do next, folder by folder."""
    for folder in overview.retention:
        yield f"{printable(folder.path)} keeps {printable(folder.policy)}"
        sizes: Counter[int] = Counter()
        for one in overview.steps:
            # A step may lie in several folders; only what lies in this one is removed there.
            sizes[one.step] += one.nbytes if str(Path(one.path).parent) == folder.path else 0
        listed = ", ".join(map(str, folder.removes))
        size = size_text(sum(sizes[step] for step in folder.removes))
        yield f"  the next one there removes {f'{listed}: {size}' if listed else 'nothing'}"
        # Sorted by the reason first, since ``groupby`` joins neighbours only.
        for reason, group in groupby(sorted(folder.undecided, key=folder.undecided.__getitem__), folder.undecided.get):
            yield f"  open: {', '.join(map(str, sorted(group)))} ({printable(str(reason))})"


def _row(found: Sequence[StepSummary]) -> list[str | Text]:
    saves = [one for one in found if one.kind == "checkpoint"]
    exports = [one for one in found if one.kind == "export"]
    first = (saves or exports)[0]
    waits = [one.seconds_waited for one in found if one.seconds_waited is not None]
    return [
        ", ".join(_described(saves)),
        size_text(sum(one.nbytes for one in saves)) if saves else "",
        # Reversed, so that main comes before ema.
        " ".join(sorted({model for one in found for model in one.models}, reverse=True)),
        str(first.world_size or ""),
        _age(first.saved_at),
        f"{sum(waits):.2f} s" if waits else "",
        ", ".join(_described(exports)),
        size_text(sum(one.nbytes for one in exports)) if exports else "",
        _health(found),
    ]


def _described(found: Sequence[StepSummary]) -> list[str]:
    notes = {True: " (pushed)", False: " (not pushed yet)", None: ""}
    return [
        f"{printable(one.path)} ({one.format})" if one.kind == "checkpoint" else printable(one.path) + notes[one.pushed]
        for one in found
    ]


_COLOURS = {
    "damaged": "red",
    "nothing recorded to compare with": "yellow",
    "verified in part": "yellow",
    "complete": "green",
    "every byte verified": "green",
}
"""From the worst to the best: a row says the worst of its directories."""


def _health(found: Sequence[StepSummary]) -> Text:
    worst = min((one.health for one in found), key=[*_COLOURS].index)
    return Text(worst, _COLOURS[worst])


def _age(saved_at: float) -> str:
    seconds = max(0.0, datetime.datetime.now().timestamp() - saved_at)
    for unit, name in _UNITS:
        # From two units on: "1 days" would hide nearly a whole day.
        if seconds >= 2 * unit:
            return f"{seconds / unit:.0f} {name}"
    return f"{seconds:.0f} seconds"


def _sum(overview: RunOverview) -> str:
    kinds = Counter(one.kind for one in overview.steps)
    sizes = {kind: sum(one.nbytes for one in overview.steps if one.kind == kind) for kind in kinds}
    counted = [f"{kinds[kind]} {kind}{'s' * (kinds[kind] > 1)}, {size_text(sizes[kind])}" for kind in sorted(kinds)]
    left = sum(one.nbytes for one in overview.leftovers)
    counted += [f"left over, {size_text(left)}"] if left else []
    free = "" if overview.free is None else f"; {size_text(overview.free)} are free"
    return "; ".join(counted) + free


def print_tensors(checkpoint: Path, tensors: Sequence[ListedTensor], *, as_json: bool) -> None:
    """A row for each tensor."""
    if as_json:
        listed = [{**dataclasses.asdict(one), "statistics": _plain(one.statistics)} for one in tensors]
        print(json.dumps({"path": str(checkpoint), "tensors": listed}, allow_nan=False))
        return
    console = new_console()
    console.print(printable(str(checkpoint)))
    read = any(tensor.statistics for tensor in tensors)
    extra = ("minimum", "maximum", "mean", "std", "zeros", "not finite") if read else ()
    table = Table("model", "tensor", "shape", "dtype", "size", *extra)
    for tensor in tensors:
        size = size_text(tensor.nbytes) if tensor.tied_to is None else f"is {printable(tensor.tied_to)}"
        shape = "x".join(map(str, tensor.shape)) or "scalar"
        values = _values(tensor.statistics) if read else ()
        table.add_row(tensor.model, printable(tensor.name), shape, tensor.dtype, size, *values)
    console.print(table)
    nbytes = sum(tensor.nbytes for tensor in tensors)
    console.print(f"{len(tensors)} tensors, {size_text(nbytes)}")


def _plain(found: Statistics | None) -> dict[str, float | None] | None:
    """With null for what is no finite number, for which JSON has no word."""
    if found is None:
        return None
    return {name: value if math.isfinite(value) else None for name, value in dataclasses.asdict(found).items()}


def _values(found: Statistics | None) -> tuple[str | Text, ...]:
    if found is None:
        return ("",) * 6
    numbers = (f"{value:.4g}" for value in (found.minimum, found.maximum, found.mean, found.std))
    wrong = Text(str(found.not_finite), "red" if found.not_finite else "")
    return (*numbers, str(found.zeros), wrong)
