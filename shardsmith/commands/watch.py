"""``shardsmith watch``: the exports of a run, as a sidecar."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import tyro

from shardsmith.commands.options import Dtype, choose_names


def watch(
    checkpoints: tyro.conf.Positional[Path],
    output_dir: Path,
    base_model_path: Path,
    models: Literal["main", "ema", "both", "all"] = "all",
    average: str | None = None,
    dtype: Dtype = "bfloat16",
    dtype_of: tuple[str, ...] = (),
    max_shard_size: str | None = None,
    ema_as: Literal["auto", "file", "directory"] = "auto",
    allow: tuple[str, ...] = (),
    names: str = "auto",
    titan_model: str | None = None,
    titan_flavor: str | None = None,
    trust_remote_code: bool = False,
    verify: bool = True,
    every: int | None = None,
    keep_latest: int | None = None,
    interval_secs: float = 10.0,
    once: bool = False,
    quiet: bool = False,
) -> int:
    """Export each new step of a run, beside the run or on another machine.

    Makes OUTPUT_DIR/step-N of each committed step, oldest first, as to-hf does, and then waits for more. Nothing is
    exported twice: it can be stopped and started again, also after a kill. Retention spares the step that it reads.
    SIGINT or SIGTERM ends it after the export in hand, a second one at once. Exits with 1 if a step could not be
    exported.

    Example: shardsmith watch run/checkpoints --output_dir run/hf --base_model_path base

    Args:
        checkpoints: The run's folder with its step directories.
        output_dir: Where the exports go. Made if missing; not inside CHECKPOINTS.
        base_model_path: As in to-hf.
        models: As in to-hf.
        average: As in to-hf.
        dtype: As in to-hf.
        dtype_of: As in to-hf.
        max_shard_size: As in to-hf.
        ema_as: As in to-hf.
        allow: As in to-hf.
        names: As in to-hf.
        titan_model: As in to-hf.
        titan_flavor: As in to-hf.
        trust_remote_code: As in to-hf.
        verify: As in to-hf.
        every: Only steps that are a multiple of this.
        keep_latest: Keep this many of the newest exports in OUTPUT_DIR and remove older ones.
        interval_secs: How long to wait before looking again.
        once: Export what is there, and end. Exits with 130 if a signal ended it before.
        quiet: Print nothing but failures.
    """
    from shardsmith import report
    from shardsmith.dtypes import parse_dtypes
    from shardsmith.export.plan import ExportOptions
    from shardsmith.watch import Watcher, WatchOptions, stopped_by_signals

    options = ExportOptions(
        dtype=parse_dtypes(dtype, dtype_of),
        max_shard_size=max_shard_size,
        trust_remote_code=trust_remote_code,
        allow=allow,
        verify=verify,
        average=average,
        names=choose_names(names, titan_model, titan_flavor),
    )
    what = WatchOptions(export=options, models=models, ema_as=ema_as, every=every, keep_latest=keep_latest)
    with stopped_by_signals() as stop:
        watcher = Watcher(checkpoints, output_dir, base_model_path, what)
        if not once and not quiet:
            report.print_watching(checkpoints, output_dir)
        for outcome in watcher.catch_up(stop) if once else watcher.follow(stop, interval_secs):
            report.print_outcome(outcome, quiet=quiet)
    if once and stop.is_set():
        return 130
    return 1 if watcher.failed else 0
