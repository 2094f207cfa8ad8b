"""``shardsmith inspect``: what is in a checkpoint."""

from __future__ import annotations

from pathlib import Path

import tyro


def inspect(checkpoint: tyro.conf.Positional[Path], verify: bool = False, json: bool = False) -> int:
    """Show the content of a checkpoint.

    Prints its models, EMA, tensors, dtypes, sizes, world size and any damage. Exits with 1 if anything is wrong
    with it.

    Example: shardsmith inspect run/checkpoints/step-500

    Args:
        checkpoint: A file or directory of any format.
        verify: Also read every byte and compare it with the recorded hashes.
        json: Print JSON instead of tables.
    """
    from shardsmith.commands import report
    from shardsmith.ground import console
    from shardsmith.inspection import inspect_checkpoint

    with console.reading_bar(checkpoint.name, quiet=json or not verify):
        inspection = inspect_checkpoint(checkpoint, verify=verify)
    report.print_inspection(inspection, as_json=json)
    return 1 if inspection.damage else 0
