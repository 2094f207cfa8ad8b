"""``shardsmith COMMAND``: the jobs of this package on checkpoints that lie on disk.

What a command needs is imported when it runs, so that help is instant.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

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
            If it has weights too, those of the checkpoint must have the same names and shapes.
        models: What to write: "both" fails where one is missing, "all" takes what is there.
        dtype: Of all floating-point tensors; "original" keeps what the checkpoint has.
        max_shard_size: Write several files with an index if the weights are larger than this, such as 5GB.
        ema_as: Where the average goes.
            "file": ema.safetensors, which nothing loads unasked.
            "directory": model.safetensors of its own directory, OUTPUT_DIR-ema where main is written too.
            "auto": ema.safetensors beside main or where the base model has one, else a directory.
        allow: Patterns of tensor names that may differ from the base model's, such as 'lm_head.*'.
        trust_remote_code: Also copy the base model's Python files. They are not run.
        verify: Also compare the checkpoint's files with their recorded hashes, where it has any.
        dry_run: Say what would be done, and write nothing.
        quiet: No progress bar and no summary.
    """
    import torch

    from shardsmith import report
    from shardsmith.export import write_directories
    from shardsmith.export_plan import ExportOptions, choose_stems, plan_directory

    options = ExportOptions(
        dtype=None if dtype == "original" else getattr(torch, dtype),
        max_shard_size=max_shard_size,
        trust_remote_code=trust_remote_code,
        allow=allow,
        verify=verify,
    )
    stems = choose_stems(checkpoint_dir, base_model_path, models, ema_as)
    plans = [
        plan_directory(checkpoint_dir, Path(f"{output_dir}{suffix}"), base_model_path, names, options)
        for suffix, names in stems
    ]
    if dry_run:
        report.print_plans(plans)
        return 0
    with report.progress_bar(plans, quiet=quiet) as progress:
        write_directories(plans, progress)
    if not quiet:
        report.print_written(plans)
    return 0


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


COMMANDS: dict[str, Callable[..., int]] = {"to-hf": to_hf, "inspect": inspect, "detect": detect}


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


if __name__ == "__main__":
    sys.exit(main())
