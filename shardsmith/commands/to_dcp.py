"""``shardsmith to-dcp``: a checkpoint to start from, out of a model directory."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from shardsmith.commands.options import Dtype, choose_names

if TYPE_CHECKING:
    from shardsmith.conversion.counts import Count
    from shardsmith.conversion.write_plan import WritePlan


def to_dcp(
    model: str,
    checkpoint: Path,
    trust_remote_code: bool = False,
    dtype: Dtype = "original",
    layout: Literal["flat", "nested", "torchtitan"] = "flat",
    titan_model: str | None = None,
    titan_flavor: str | None = None,
    include_future_predictor: bool = False,
    future_predictor_head_type: Literal["linear", "mlp", "gated"] = "linear",
    extra_module: tuple[str, ...] = (),
    seed: int = 0,
    dry_run: bool = False,
    quiet: bool = False,
) -> int:
    """Make a sharded checkpoint to start training from, out of a Hugging Face model.

    Streams from the model's files into DCP files that torch, TorchTitan and this package load: no model in memory.
    Under torchrun, each rank writes its part. The output appears when all of it is on disk; the model is only read.
    Its metadata.json has a digest of each tensor, the effective config, and the right values of the buffers that no
    state dict holds, by which a load is proved. Exits with 1 if a count is not what the model says it should be.

    Example: shardsmith to-dcp --model allenai/OLMo-2-0425-1B --checkpoint checkpoints/olmo2

    Args:
        model: A local directory, or the name of a model on the Hub (from the local cache, if it is there).
        checkpoint: The directory to make. It must not exist.
        trust_remote_code: Let transformers run the model's own Python files.
        dtype: Of all floating-point tensors; "original" keeps what the files have.
        layout: "flat": keys as the model has them, which TorchTitan from 0.2 on reads.
            "nested": under "model.", for older TorchTitan and flame.
            "torchtitan": flat, as TorchTitan's own model has them; --titan_model and --titan_flavor say which one.
        titan_model: Which of TorchTitan's own models is to train, such as llama3. Needs TorchTitan installed.
        titan_flavor: Its flavor, such as 8B.
        include_future_predictor: Add the head of that name, with random values.
        future_predictor_head_type: Which one.
        extra_module: Add the state dict of another module, as 'pkg.mod:factory={"json": "kwargs"}'. Runs that function.
        seed: Of the random values.
        dry_run: Say what would be done, and write nothing.
        quiet: No progress bar and no summary.
    """
    import contextlib

    from shardsmith import report
    from shardsmith.conversion.early_writing import early_writing
    from shardsmith.conversion.model_directory import find_model
    from shardsmith.dtypes import parse_dtypes

    choice = parse_dtypes(dtype)
    assert choice is None or not hasattr(choice, "items"), "one dtype for all"
    names = _names_of(layout, titan_model, titan_flavor)
    with contextlib.ExitStack() as stack:
        early = None
        if not dry_run and names is None:
            early = stack.enter_context(early_writing(find_model(model), checkpoint, choice))

        from shardsmith.conversion.write import convert
        from shardsmith.conversion.write_plan import ConversionOptions, plan_on_ranks
        from shardsmith.torchrun.group import joined_ranks

        options = ConversionOptions(
            dtype=choice,
            layout="nested" if layout == "nested" else "flat",
            names=names,
            trust_remote_code=trust_remote_code,
            future_predictor=future_predictor_head_type if include_future_predictor else None,
            extra_modules=extra_module,
            seed=seed,
        )
        ranks = stack.enter_context(joined_ranks())
        plan = plan_on_ranks(ranks, model, checkpoint, options)  # takes seconds, in which the first shards are written
        quiet = quiet or not ranks.is_leader
        if dry_run:
            plan.close()
            if not quiet:
                _report(plan, None)
            return 0
        with report.bytes_bar(checkpoint.name, plan.nbytes, quiet=quiet) as progress:
            counts = convert(plan, ranks, progress, early)
    if not quiet:
        _report(plan, counts)
    return 0 if all(count.is_right for count in counts) else 1


def _report(plan: WritePlan, counts: list[Count] | None) -> None:
    from shardsmith.conversion import report
    from shardsmith.conversion.plan import ConversionPlan

    assert isinstance(plan, ConversionPlan), "rank 0 makes the plan, and speaks"
    if counts is None:
        report.print_plan(plan)
    else:
        report.print_result(plan, counts)


def _names_of(layout: str, titan_model: str | None, titan_flavor: str | None) -> str | None:
    from shardsmith.errors import UsageError

    names = choose_names("torchtitan" if layout == "torchtitan" else "auto", titan_model, titan_flavor)
    if names == "auto":
        return None
    if layout != "torchtitan":
        raise UsageError(f"--titan_model {titan_model} goes with --layout torchtitan")
    return names
