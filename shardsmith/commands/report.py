"""How the command line shows things: progress bars, tables, JSON."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from shardsmith.errors import UnsupportedFormatError
from shardsmith.ground.console import bytes_bar, new_console
from shardsmith.ground.printable import printable
from shardsmith.ground.remote_path import as_path
from shardsmith.ground.sizes import size_text

if TYPE_CHECKING:
    from shardsmith.export.plan import ExportPlan
    from shardsmith.inspection import Inspection
    from shardsmith.watch import Outcome


_LISTED_FILES = 8


def progress_bar(
    plans: Sequence[ExportPlan], *, quiet: bool
) -> contextlib.AbstractContextManager[Callable[[int], None] | None]:
    """As ``bytes_bar``, for exports."""
    return bytes_bar(plans[0].directory.output.name, sum(plan.directory.nbytes for plan in plans), quiet=quiet)


def print_watching(checkpoints: Path, output: Path) -> None:
    """That it goes on until it is stopped."""
    new_console().print(f"exporting from {checkpoints} to {output}; Ctrl-C ends it")


def print_no_steps(checkpoints: Path) -> None:
    """That there was nothing to export."""
    new_console().print(f"{checkpoints} has no step yet: nothing was exported")


def print_outcome(outcome: Outcome, *, quiet: bool, as_json: bool = False) -> None:
    """Print a line about the export of a step, as soon as it is known; the whole text of a failure."""
    if as_json:
        # Flushed: whoever reads the lines wants each when it happens.
        print(json.dumps(_plain_outcome(outcome)), flush=True)
    elif outcome.error is not None:
        kind = type(outcome.error).__name__
        # On stderr, also when quiet: a failure is no part of the result.
        new_console(sys.stderr).print(f"{outcome.output.name} was not exported: {kind}\n{outcome.error}")
    elif not quiet:
        text = {
            "exported": f"wrote {outcome.output}, {size_text(outcome.nbytes)} in {outcome.seconds:.1f} s",
            "elsewhere": f"{outcome.output} was written by another project",
            "gone": f"{outcome.output.name} was removed before it could be exported",
        }
        console = new_console()
        for line in (text[outcome.status], *outcome.remarks):
            console.print(line)


def _plain_outcome(outcome: Outcome) -> dict[str, object]:
    return {
        "step": outcome.step,
        "output": str(outcome.output),
        "status": outcome.status,
        "bytes": outcome.nbytes,
        "seconds": round(outcome.seconds, 3),
        "error": None if outcome.error is None else f"{type(outcome.error).__name__}: {outcome.error}",
        "remarks": list(outcome.remarks),
    }


def print_inspection(inspection: Inspection, *, as_json: bool) -> None:
    """A table, or JSON on one line."""
    if as_json:
        print(json.dumps(dataclasses.asdict(inspection)))
        return
    console = new_console()
    console.print(inspection.path)
    console.print(Text.assemble((inspection.format, "bold"), f": {inspection.reason}"))
    console.print(_facts_table(inspection))
    if inspection.models:
        console.print(_models_table(inspection))
    for line in inspection.damage:
        console.print(Text.assemble(("problem", "red"), " ", "\n".join(map(printable, line.split("\n")))))
    if not inspection.damage:
        console.print(Text("no problem found", "green"), _extent(inspection))


def _extent(inspection: Inspection) -> str:
    """How far the search for problems has gone."""
    if inspection.verified:
        return "in any byte of its files"
    if any(inspection.compared.values()):
        return f"in what was compared; {uncompared_text(inspection)}"
    more = "--verify reads every byte" if inspection.is_recorded else "no hashes of its files are recorded"
    return f"in names, sizes and indexes; {more}"


def verified_code(inspection: Inspection) -> int:
    """Return the exit code of a verification: 0 if every byte is as recorded, 1 if there is damage.

    Raises:
        UnsupportedFormatError: nothing is known to be wrong, but not all of it could be verified.
    """
    if inspection.damage or inspection.verified:
        return 1 if inspection.damage else 0
    if any(inspection.compared.values()):
        raise UnsupportedFormatError(
            as_path(inspection.path), f"is not verified as a whole: {uncompared_text(inspection)}"
        )
    raise UnsupportedFormatError(
        as_path(inspection.path),
        "was not verified, as it records no hashes of its files; Shardsmith does that in the metadata.json of a "
        f"checkpoint and the shardsmith.json of an export. Compare it with what it was made of: "
        f"shardsmith verify {inspection.path} OTHER",
    )


def uncompared_text(inspection: Inspection) -> str:
    """Say which files were not compared with anything, the first ones by name."""
    names = inspection.uncompared
    listed = ", ".join(map(printable, names[:_LISTED_FILES]))
    more = f" and {len(names) - _LISTED_FILES} more" if len(names) > _LISTED_FILES else ""
    return (
        f"not compared, as no hash of them is recorded: {listed}{more} ({len(names)} of {len(inspection.files)} files)"
    )


def _facts_table(inspection: Inspection) -> Table:
    table = Table(show_header=False, box=None)
    facts = {
        "step": inspection.step,
        "saved": inspection.created_at,
        "world size": inspection.world_size,
        "mesh": _listed(inspection.mesh),
        "EMA": _listed(inspection.ema),
        "files": f"{len(inspection.files)}, {size_text(sum(inspection.files.values()))}",
        "beside the models": ", ".join(f"{name} {size_text(size)}" for name, size in inspection.beside.items()),
        "written by": _listed(inspection.libraries),
    }
    for name, value in facts.items():
        if value not in (None, ""):
            table.add_row(name, printable(str(value)))
    return table


def _models_table(inspection: Inspection) -> Table:
    table = Table("model", "tensors", "parameters", "size", "dtypes", "notes")
    for model in inspection.models:
        notes = [f"{alias} = {kept}" for alias, kept in model.tied.items()]
        notes += [f"{model.from_main} tensors from main"] if model.from_main else []
        notes += [f"average {model.averages[0]}; also {', '.join(model.averages[1:])}"] if model.averages[1:] else []
        notes += [f"not read, as an average without names: {', '.join(model.left_out)}"] if model.left_out else []
        table.add_row(
            model.name,
            str(model.tensors),
            f"{model.parameters:,}",
            size_text(model.nbytes),
            ", ".join(model.dtypes),
            "; ".join(notes),
        )
    return table


def _listed(facts: dict[str, object] | dict[str, str] | None) -> str:
    return ", ".join(f"{name} {value}" for name, value in (facts or {}).items())
