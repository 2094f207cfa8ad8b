"""``shardsmith COMMAND``: the jobs of this package on checkpoints that lie on disk.

What a command needs is imported when it runs, so that help is instant.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, NoReturn

import tyro

from shardsmith.errors import ShardsmithError

Dtype = Literal["bfloat16", "float16", "float32", "original"]


def to_hf(
    checkpoint_dir: Path,
    output_dir: Path,
    base_model_path: Path,
    models: Literal["main", "ema", "both", "all"] = "all",
    dtype: Dtype = "bfloat16",
    max_shard_size: str | None = None,
    ema_as: Literal["auto", "file", "directory"] = "auto",
    allow: tuple[str, ...] = (),
    names: str = "auto",
    trust_remote_code: bool = False,
    verify: bool = True,
    dry_run: bool = False,
    quiet: bool = False,
) -> int:
    """Make a complete Hugging Face directory from a checkpoint.

    Streams from the checkpoint's files into the final ones: no torchrun, no model, little memory. The output appears
    when all of it is on disk; the checkpoint and the base model are only read.

    Example: shardsmith to-hf --checkpoint_dir run/checkpoints/step-500 --output_dir run/hf-500 --base_model_path base

    Args:
        checkpoint_dir: DCP directory (ours, TorchTitan's, plain dcp.save), Hugging Face directory or safetensors file.
        output_dir: The directory to make. It must not exist.
        base_model_path: Local directory with config.json, tokenizer and so on.
            If it has weights too, those that are written must have the same names and shapes.
        models: What to write: "both" fails where one is missing, "all" takes what is there.
        dtype: Of all floating-point tensors; "original" keeps what the checkpoint has.
        max_shard_size: Write several files with an index if the weights are larger than this, such as 5GB.
        ema_as: Where the average goes.
            "file": ema.safetensors, which nothing loads unasked.
            "directory": model.safetensors of its own directory, OUTPUT_DIR-ema where main is written too.
            "auto": ema.safetensors beside main or where the base model has one, else a directory.
        allow: Patterns of tensor names that may differ from the base model's, such as 'lm_head.*'.
        names: Under which names to write the tensors, and cut up how.
            "auto": as in the checkpoint; if the base's weights differ, or it has none and experts are fused into one
            tensor, as "transformers".
            "identity": as in the checkpoint.
            "transformers": as save_pretrained of transformers does for this model.
            Or a name map that an installed package offers.
        trust_remote_code: Also copy the base model's Python files. They are not run.
        verify: Also compare the checkpoint's files with their recorded hashes, where it has any.
        dry_run: Say what would be done, and write nothing.
        quiet: No progress bar and no summary.
    """
    import torch

    from shardsmith import report
    from shardsmith.export import write_directories
    from shardsmith.export_plan import ExportOptions, choose_stems, plan_directory
    from shardsmith.leases import hold

    options = ExportOptions(
        dtype=None if dtype == "original" else getattr(torch, dtype),
        max_shard_size=max_shard_size,
        trust_remote_code=trust_remote_code,
        allow=allow,
        verify=verify,
        names=names,
    )
    with hold(checkpoint_dir):
        stems = choose_stems(checkpoint_dir, base_model_path, models, ema_as)
        plans = [
            plan_directory(checkpoint_dir, Path(f"{output_dir}{suffix}"), base_model_path, stem, options)
            for suffix, stem in stems
        ]
        if dry_run:
            report.print_plans(plans)
            return 0
        with report.progress_bar(plans, quiet=quiet) as progress:
            write_directories(plans, progress)
    if not quiet:
        report.print_written(plans)
    return 0


def watch(
    checkpoints: tyro.conf.Positional[Path],
    output_dir: Path,
    base_model_path: Path,
    models: Literal["main", "ema", "both", "all"] = "all",
    dtype: Dtype = "bfloat16",
    max_shard_size: str | None = None,
    ema_as: Literal["auto", "file", "directory"] = "auto",
    allow: tuple[str, ...] = (),
    names: str = "auto",
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
        dtype: As in to-hf.
        max_shard_size: As in to-hf.
        ema_as: As in to-hf.
        allow: As in to-hf.
        names: As in to-hf.
        trust_remote_code: As in to-hf.
        verify: As in to-hf.
        every: Only steps that are a multiple of this.
        keep_latest: Keep this many of the newest exports in OUTPUT_DIR and remove older ones.
        interval_secs: How long to wait before looking again.
        once: Export what is there, and end. Exits with 130 if a signal ended it before.
        quiet: Print nothing but failures.
    """
    import torch

    from shardsmith import report
    from shardsmith.export_plan import ExportOptions
    from shardsmith.watch import Watcher, WatchOptions, stopped_by_signals

    options = ExportOptions(
        dtype=None if dtype == "original" else getattr(torch, dtype),
        max_shard_size=max_shard_size,
        trust_remote_code=trust_remote_code,
        allow=allow,
        verify=verify,
        names=names,
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


def inspect(checkpoint: tyro.conf.Positional[Path], verify: bool = False, json: bool = False) -> int:
    """Show what is in a checkpoint: models, EMA, tensors, dtypes, sizes, world size, health.

    Exits with 1 if anything is wrong with it.

    Example: shardsmith inspect run/checkpoints/step-500

    Args:
        checkpoint: A file or directory of any format.
        verify: Also read every byte and compare it with the recorded hashes.
        json: Print JSON instead of tables.
    """
    from shardsmith import report
    from shardsmith.inspection import inspect_checkpoint

    inspection = inspect_checkpoint(checkpoint, verify=verify)
    report.print_inspection(inspection, as_json=json)
    return 1 if inspection.damage else 0


def detect(path: tyro.conf.Positional[Path]) -> int:
    """Say which format a file or directory has, and why.

    Example: shardsmith detect out/checkpoint-500

    Args:
        path: Any file or directory.
    """
    from shardsmith.formats import detect_checkpoint_format

    found = detect_checkpoint_format(path)
    print(f"{found.name}: {found.reason}")
    return 0


COMMANDS: dict[str, Callable[..., int]] = {"to-hf": to_hf, "watch": watch, "inspect": inspect, "detect": detect}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command: 0 done, 1 findings, 2 refused or failed (nothing half-done stays on disk)."""
    try:
        code: int = tyro.extras.subcommand_cli_from_dict(
            COMMANDS,
            prog="shardsmith",
            description="Convert, inspect and detect sharded checkpoints.",
            args=arguments,
            use_underscores=True,
        )
        return code
    except ShardsmithError as error:
        print(f"shardsmith: {type(error).__name__}\n{error}", file=sys.stderr)
        return 2
    except OSError as error:  # what nobody foresaw, such as a file that may not be read
        print(f"shardsmith: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("shardsmith: interrupted; nothing half-done stays on disk", file=sys.stderr)
        return 130


def run() -> NoReturn:
    """The console script: ``main``, then the end at once, since taking torch down takes a third of a second."""
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    run()
