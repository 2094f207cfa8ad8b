"""``shardsmith watch``: the exports of a run, as a sidecar."""

from __future__ import annotations

from pathlib import Path

import tyro

from shardsmith.commands.options import ExportArguments


def watch(
    checkpoints: tyro.conf.Positional[Path],
    output_dir: Path,
    base_model: Path,
    export: tyro.conf.OmitArgPrefixes[ExportArguments],
    every: int | None = None,
    keep_latest: int | None = None,
    interval_secs: float = 10.0,
    once: bool = False,
    quiet: bool = False,
    json: bool = False,
) -> int:
    """Export each new step of a run, while it trains.

    Runs beside the run or on another machine. Makes OUTPUT_DIR/step-N of each committed step, oldest first, as to-hf
    does, and then waits for more. No step is exported twice: it can be stopped and started again, also after a kill.
    Retention does not remove the step that it reads. SIGINT or SIGTERM ends it after the current export, a second one
    at once. Exits with 1 if a step could not be exported, and with 2 if --once finds none of Shardsmith's steps, but
    others, which it names.

    Example: shardsmith watch run/checkpoints --output-dir run/hf --base-model base

    Args:
        checkpoints: The run's folder with its step directories, or its place in an object store.
        output_dir: Directory of the exports, also in an object store. Made if missing; not inside CHECKPOINTS.
        base_model: Directory, here or in an object store, with config.json, tokenizer and so on.
            If it has weights, the written ones must have the same names and shapes.
        export: How to write the directories.
        every: Only steps that are a multiple of this.
        keep_latest: Keep this many of the newest exports in OUTPUT_DIR and remove older ones.
        interval_secs: Seconds between two looks at CHECKPOINTS.
        once: Export the steps that exist, and end. Exits with 130 if a signal ended it before.
        quiet: Print nothing but failures, and no progress bar.
        json: Print one line of JSON for each step.
    """
    from shardsmith.commands import report
    from shardsmith.ground.remote_path import as_path
    from shardsmith.watch import Watcher, WatchOptions, stopped_by_signals

    what = WatchOptions(
        export=export.options(), models=export.models, ema_as=export.ema_as, every=every, keep_latest=keep_latest
    )
    checkpoints, output_dir = as_path(checkpoints), as_path(output_dir)
    # Before the first look: a signal from here on ends it after the current export.
    with stopped_by_signals() as stop:
        watcher = Watcher(checkpoints, output_dir, base_model, what)
        if not once and not quiet and not json:
            report.print_watching(checkpoints, output_dir)
        # Both are generators: each line is printed when its export is done.
        for outcome in watcher.catch_up(stop) if once else watcher.follow(stop, interval_secs):
            report.print_outcome(outcome, quiet=quiet, as_json=json)
        if once and not quiet and not json and not watcher.has_steps:
            report.print_no_steps(checkpoints)
    # 130, as a shell reports an interrupted command: not all that exists was exported.
    if once and stop.is_set():
        return 130
    return 1 if watcher.failed else 0
