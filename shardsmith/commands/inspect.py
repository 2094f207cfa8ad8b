"""``shardsmith inspect``: what is in a checkpoint, or in the folder of a run."""

from __future__ import annotations

from pathlib import Path

import tyro


def inspect(
    checkpoint: tyro.conf.Positional[Path],
    verify: bool = False,
    step: int | None = None,
    tensors: tuple[str, ...] | None = None,
    statistics: bool = False,
    json: bool = False,
) -> int:
    """Show the content of a checkpoint, or the steps of a run.

    Of a checkpoint: its models, EMA, tensors, dtypes, sizes, world size and any damage. Of a run's folder: every step
    with its checkpoint, its exports, their sizes and health, and what may be deleted. Exits with 1 if anything is
    wrong.

    Example: shardsmith inspect run

    Example: shardsmith inspect run/checkpoints/step-500 --tensors '*.norm.weight' --statistics

    Args:
        checkpoint: A file or directory of any format, or the folder of a run.
        verify: Also read every byte and compare it with the recorded hashes.
        step: Of a run: this step's checkpoint.
        tensors: List the tensors whose names match one of these patterns, with shapes and dtypes; all without a
            pattern. Of a run: those of the newest complete checkpoint.
        statistics: With --tensors: also read them, and print minimum, maximum, mean, standard deviation and the number
            of elements that are not finite.
        json: Print JSON instead of tables.
    """
    from shardsmith.commands import report
    from shardsmith.commands.listing import print_overview, print_tensors
    from shardsmith.errors import UsageError
    from shardsmith.ground import console
    from shardsmith.inspection import inspect_checkpoint
    from shardsmith.overview import inspect_run, is_run, newest_step
    from shardsmith.tensor_listing import list_tensors

    if statistics and tensors is None:
        raise UsageError("--statistics needs --tensors")
    quiet = json or not (verify or statistics)
    with console.reading_bar(checkpoint.name, quiet=quiet):
        if is_run(checkpoint):
            if step is None and tensors is None:
                overview = inspect_run(checkpoint, verify=verify)
                print_overview(overview, as_json=json)
                return 1 if overview.problems else 0
            checkpoint = newest_step(checkpoint, step)
        elif step is not None:
            raise UsageError(f"--step needs the folder of a run; {checkpoint} is a checkpoint")
        if tensors is not None:
            print_tensors(checkpoint, list_tensors(checkpoint, tensors, statistics=statistics), as_json=json)
            return 0
        inspection = inspect_checkpoint(checkpoint, verify=verify)
    report.print_inspection(inspection, as_json=json)
    return 1 if inspection.damage else 0
