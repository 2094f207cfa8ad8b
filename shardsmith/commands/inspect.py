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
    html: Path | None = None,
) -> int:
    """Show the content of a checkpoint, or the steps of a run.

    Of a checkpoint: its models, EMA, tensors, dtypes, sizes, world size and any damage. Of a run's folder: every step
    with its checkpoint, its exports, their sizes and health, and what may be deleted. Exits with 1 if anything is
    wrong, and with --verify with 2 if of some file no hash was recorded.

    Example: shardsmith inspect run

    Example: shardsmith inspect run/checkpoints/step-500 --tensors '*.norm.weight' --statistics

    Args:
        checkpoint: A file or directory of any format, or the folder of a run.
        verify: Also read every byte and compare it with the recorded hashes. Not with --tensors.
        step: Of a run: this step's checkpoint.
        tensors: List the tensors whose names match one of these patterns, with shapes and dtypes; all without a
            pattern. Of a run: those of the newest complete checkpoint.
        statistics: With --tensors: also read them, and print minimum, maximum, mean, standard deviation and the number
            of elements that are not finite.
        json: Print JSON instead of tables.
        html: Also write a page: of a checkpoint with maps and a table of all tensors, of a run with charts of sizes and
            times; the times come from its events.jsonl.
    """
    from shardsmith.commands import report
    from shardsmith.commands.listing import print_overview, print_tensors, verified_run_code
    from shardsmith.errors import UsageError
    from shardsmith.ground import console
    from shardsmith.ground.remote_path import as_path
    from shardsmith.hf.hf_directory import protect
    from shardsmith.inspection import inspect_checkpoint
    from shardsmith.overview import EVENTS_FILE, inspect_run, is_run, newest_step, read_events, step_folders
    from shardsmith.reports.checkpoint import checkpoint_page
    from shardsmith.reports.run import run_page
    from shardsmith.tensor_listing import list_tensors

    checkpoint = as_path(checkpoint)
    html = html and as_path(html)
    if statistics and tensors is None and html is None:
        raise UsageError("--statistics needs --tensors or --html")
    if verify and tensors is not None:
        raise UsageError("--verify does not go with --tensors, which only lists: give one, then the other")
    of_run = is_run(checkpoint)
    if html is not None:
        # Of a run whatever step is shown: no file of any may be overwritten by the page.
        steps = [folder for _, folder in step_folders(checkpoint)]
        protect(html, *([*steps, checkpoint / EVENTS_FILE] if of_run else [checkpoint]))
    # Shown in the page: the command that makes it again.
    command = ["shardsmith", "inspect", str(checkpoint), *["--verify"] * verify, *["--statistics"] * statistics]
    command += ["--html", str(html)]
    # Without these options only indexes are read, which takes no bar.
    quiet = json or not (verify or statistics)
    with console.reading_bar(checkpoint.name, quiet=quiet):
        if of_run:
            if step is None and tensors is None:
                overview = inspect_run(checkpoint, verify=verify)
                if html is not None:
                    html.write_text(run_page(overview, read_events(checkpoint), command), encoding="utf-8")
                print_overview(overview, as_json=json)
                return verified_run_code(overview) if verify else int(bool(overview.problems))
            checkpoint = newest_step(checkpoint, step)
        elif step is not None:
            raise UsageError(f"--step needs the folder of a run; {checkpoint} is a checkpoint")
        if tensors is not None:
            listed = list_tensors(checkpoint, tensors, statistics=statistics)
            if html is not None:
                html.write_text(checkpoint_page(inspect_checkpoint(checkpoint), listed, command), encoding="utf-8")
            print_tensors(checkpoint, listed, as_json=json)
            return 0
        inspection = inspect_checkpoint(checkpoint, verify=verify)
        if html is not None:
            # What is no checkpoint has no tensors to list; the page then says why.
            listed = list_tensors(checkpoint, statistics=statistics) if inspection.models else []
            html.write_text(checkpoint_page(inspection, listed, command), encoding="utf-8")
    report.print_inspection(inspection, as_json=json)
    return report.verified_code(inspection) if verify else int(bool(inspection.damage))
