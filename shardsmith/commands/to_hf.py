"""``shardsmith to-hf``: a complete Hugging Face directory from a checkpoint."""

from __future__ import annotations

import os
from pathlib import Path

import tyro

from shardsmith.commands.options import ExportArguments, checkpoint_of


def to_hf(
    checkpoint: Path,
    base_model: Path,
    export: tyro.conf.OmitArgPrefixes[ExportArguments],
    output_dir: Path | None = None,
    step: int | None = None,
    dry_run: bool = False,
    quiet: bool = False,
    json: bool = False,
) -> int:
    """Make a Hugging Face directory from a checkpoint.

    Streams from the checkpoint's files into the final ones: no model, little memory. The output is published when it is
    complete; the checkpoint and the base model are only read. One process uses up to 8 cores; where there are more, or
    several hosts, torchrun (torchrun --nproc_per_node=4 -m shardsmith to-hf ...) divides the work among processes. The
    files are the same.

    Example: shardsmith to-hf --checkpoint out/checkpoint-500 --base-model base

    Args:
        checkpoint: Anything that "shardsmith detect" knows: a DCP directory (ours, TorchTitan's, plain dcp.save),
            a step of Trainer, accelerate, BAGEL or its sharded fork, a Hugging Face directory, a safetensors or torch
            file. Of a run's folder, its newest complete step.
        base_model: Directory, here or in an object store, with config.json, tokenizer and so on.
            If it has weights, the written ones must have the same names and shapes.
        export: How to write the directory.
        output_dir: The directory to make, here or in an object store (s3://bucket/hf/step-500). It must not exist.
            Default: for out/checkpoint-500 it is out-hf/checkpoint-500, where no trainer looks for its own checkpoints.
        step: Of a run's folder: this step.
        dry_run: Print what would be done, and write nothing.
        quiet: No progress bar and no summary.
        json: Print the plan or the checks as JSON on one line.
    """
    from shardsmith.commands import report
    from shardsmith.export import report as report_export
    from shardsmith.export.adapter_plan import plan_export
    from shardsmith.export.joint_plan import plan_together, team_of_torchrun
    from shardsmith.export.plan import ExportPlan, choose_stems
    from shardsmith.export.write import write_directories
    from shardsmith.formats.by_path import known_checkpoint
    from shardsmith.ground.leases import hold
    from shardsmith.ground.remote_path import as_path
    from shardsmith.ground.threads import threads_per_process

    # Before any file is opened: a wrong option costs no time then.
    options = export.options()
    base_model = as_path(base_model)
    checkpoint = checkpoint_of(as_path(checkpoint), step)
    output_dir = as_path(output_dir) if output_dir else default_output(checkpoint)

    def make_plans() -> list[ExportPlan]:
        known = known_checkpoint(checkpoint)
        stems = choose_stems(known, base_model, export.models, export.ema_as, export.average)
        return [
            plan_export(known, as_path(f"{output_dir}{suffix}"), base_model, stem, options) for suffix, stem in stems
        ]

    # Held from the planning on: retention of the run must not remove what the plans refer to.
    with hold(checkpoint), team_of_torchrun() as team:
        plans = plan_together(team, make_plans)
        # One of the processes speaks, for all.
        speaks = team.rank == 0 and (json or not quiet)
        if dry_run:
            if speaks:
                report_export.print_plans(plans, as_json=json)
            return 0
        # With several processes the bar of one would show its share only.
        with report.progress_bar(plans, quiet=quiet or json or team.size > 1) as progress:
            checks = write_directories(plans, progress, team=team, threads=threads_per_process())
    if speaks:
        report_export.print_written(plans, checks, as_json=json)
    return 0


def default_output(checkpoint: Path) -> Path:
    """Return where an export goes by default: beside the run's folder, under the checkpoint's name.

    Raises:
        UsageError: the checkpoint lies right below the root of the file system, so that there is no folder of a run.
    """
    from shardsmith.errors import UsageError
    from shardsmith.ground.remote_path import RemotePath

    if isinstance(checkpoint, RemotePath):
        raise UsageError(f"{checkpoint} is in an object store; name the directory to make with --output-dir")
    # ``abspath`` and not ``resolve``: beside the folder that the user named, also where that is a link.
    place = Path(os.path.abspath(checkpoint))
    if not place.parent.name:
        raise UsageError(f"{checkpoint} lies in no folder of a run; name the directory to make with --output-dir")
    return place.parent.with_name(f"{place.parent.name}-hf") / place.name
