"""``shardsmith to-hf``: a complete Hugging Face directory from a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from shardsmith.commands.options import Dtype, choose_names


def to_hf(
    checkpoint_dir: Path,
    base_model_path: Path,
    output_dir: Path | None = None,
    models: Literal["main", "ema", "both", "all"] = "all",
    average: str | None = None,
    dtype: Dtype = "bfloat16",
    dtype_of: tuple[str, ...] = (),
    max_shard_size: str | None = None,
    ema_as: Literal["auto", "file", "directory"] = "auto",
    allow: tuple[str, ...] = (),
    drop: tuple[str, ...] = (),
    names: str = "auto",
    titan_model: str | None = None,
    titan_flavor: str | None = None,
    trust_remote_code: bool = False,
    verify: bool = True,
    rules: Path | None = None,
    dry_run: bool = False,
    quiet: bool = False,
    json: bool = False,
) -> int:
    """Make a complete Hugging Face directory from a checkpoint.

    Streams from the checkpoint's files into the final ones: no model, little memory. The output appears when all of it
    is on disk; the checkpoint and the base model are only read. One process uses up to 8 cores; where there are more,
    or several hosts, torchrun (torchrun --nproc_per_node=4 -m shardsmith.cli to-hf ...) divides the work among
    processes. The files are the same.

    Example: shardsmith to-hf --checkpoint_dir out/checkpoint-500 --base_model_path base

    Args:
        checkpoint_dir: Anything that "shardsmith detect" knows: a DCP directory (ours, TorchTitan's, plain dcp.save),
            a step of Trainer, accelerate, BAGEL or its sharded fork, a Hugging Face directory, a safetensors or torch
            file.
        base_model_path: Local directory with config.json, tokenizer and so on.
            If it has weights too, those that are written must have the same names and shapes.
        output_dir: The directory to make. It must not exist.
            Default: for out/checkpoint-500 it is out-hf/checkpoint-500, where no trainer looks for its own.
        models: What to write: "both" fails where one is missing, "all" takes what is there.
        average: Which average, where the checkpoint has several, such as 0.999, or the key that it lies under, such as
            model_ema; "shardsmith inspect" names them.
        dtype: Of all floating-point tensors; "original" keeps what the checkpoint has.
        dtype_of: Exceptions from that, by pattern of the written names, such as '*norm*=float32'. The first that
            matches counts.
        max_shard_size: Write several files with an index if the weights are larger than this, such as 5GB.
        ema_as: Where the average goes.
            "file": ema.safetensors, which nothing loads unasked.
            "directory": model.safetensors of its own directory, OUTPUT_DIR-ema where main is written too.
            "auto": ema.safetensors beside main or where the base model has one, else a directory.
        allow: Patterns of tensor names that may differ from the base model's, such as 'lm_head.*'.
        drop: Patterns of tensors of the checkpoint to leave out, such as those of a head trained beside the model.
        names: Under which names to write the tensors, and cut up how.
            "auto": as in the checkpoint; if the base's weights differ, or it has none and experts are fused into one
            tensor, as "transformers".
            "identity": as in the checkpoint.
            "transformers": as save_pretrained of transformers does for this model.
            Or a name map that an installed package offers.
        titan_model: For checkpoints of TorchTitan's own models: which one, such as llama3. Needs TorchTitan installed.
        titan_flavor: Its flavor, such as 8B.
        trust_remote_code: Also copy the base model's Python files. They are not run.
        verify: Compare the checkpoint's files with their recorded hashes, where it has any, and read back what was
            written before it appears.
        rules: TOML or JSON file of layout rules, for tensors that the base model has in another shape:
            [[rule]] pattern = "*.patch.weight" transform = "conv2d_to_linear" (or "flatten", "transpose", or steps).
        dry_run: Say what would be done, and write nothing.
        quiet: No progress bar and no summary.
        json: Print what was planned or checked as JSON on one line.
    """
    from shardsmith import report
    from shardsmith.dtypes import parse_dtypes
    from shardsmith.export import report as report_export
    from shardsmith.export.joint_plan import plan_together, team_of_torchrun, threads_per_process
    from shardsmith.export.layout_rules import find_rules
    from shardsmith.export.plan import ExportOptions, ExportPlan, choose_stems, plan_directory
    from shardsmith.export.write import write_directories
    from shardsmith.leases import hold

    options = ExportOptions(
        dtype=parse_dtypes(dtype, dtype_of),
        max_shard_size=max_shard_size,
        trust_remote_code=trust_remote_code,
        allow=allow,
        drop=drop,
        verify=verify,
        average=average,
        names=choose_names(names, titan_model, titan_flavor),
        rules=tuple(find_rules(rules)),
    )
    output_dir = output_dir or default_output(checkpoint_dir)

    def make_plans() -> list[ExportPlan]:
        stems = choose_stems(checkpoint_dir, base_model_path, models, ema_as)
        return [
            plan_directory(checkpoint_dir, Path(f"{output_dir}{suffix}"), base_model_path, stem, options)
            for suffix, stem in stems
        ]

    with hold(checkpoint_dir), team_of_torchrun() as team:
        plans = plan_together(team, make_plans)
        speaks = team.rank == 0 and (json or not quiet)
        if dry_run:
            if speaks:
                report_export.print_plans(plans, as_json=json)
            return 0
        with report.progress_bar(plans, quiet=quiet or json or team.size > 1) as progress:
            checks = write_directories(plans, progress, team=team, threads=threads_per_process())
    if speaks:
        report_export.print_written(plans, checks, as_json=json)
    return 0


def default_output(checkpoint: Path) -> Path:
    """Where an export goes if nobody says: beside the run's folder, under the checkpoint's name."""
    place = checkpoint.absolute()
    return place.parent.with_name(f"{place.parent.name}-hf") / place.name
