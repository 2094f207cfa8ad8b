"""``shardsmith to-dcp``: a checkpoint to start from, out of a model directory."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from shardsmith.commands.options import Dtype, Imports, choose_names, import_modules

if TYPE_CHECKING:
    from shardsmith.conversion.counts import Count
    from shardsmith.conversion.write_plan import WritePlan


def to_dcp(
    base_model: str,
    output_dir: Path,
    trust_remote_code: bool = False,
    dtype: Dtype = "original",
    layout: Literal["flat", "nested", "torchtitan"] = "flat",
    titan_model: str | None = None,
    titan_flavor: str | None = None,
    include_future_predictor: bool = False,
    future_predictor_head_type: Literal["linear", "mlp", "gated"] = "linear",
    future_predictor_version: str = "1",
    extra_module: tuple[str, ...] = (),
    imports: Imports = (),
    seed: int = 0,
    whole: bool = False,
    dry_run: bool = False,
    quiet: bool = False,
    json: bool = False,
) -> int:
    """Make a sharded checkpoint from a Hugging Face model.

    Streams from the model's files into DCP files that torch, TorchTitan and this package load: no model in memory.
    Under torchrun, each rank writes its part. The output is published when it is complete; the model is only read. Its
    metadata.json has a digest of each tensor, the effective config, and the right values of the buffers that no state
    dict holds, by which a load is verified. Names, shapes and dtypes are counted against get_model_state_dict of the
    model; exits with 1 if a count is not what that says.

    Example: shardsmith to-dcp --base-model allenai/OLMo-2-0425-1B --output-dir checkpoints/olmo2

    Args:
        base_model: A local directory, one in an object store (s3://bucket/olmo2), or the name of a model on the Hub
            (from the local cache, if it is there).
        output_dir: The directory to make, here or in an object store. It must not exist.
        trust_remote_code: Let transformers run the model's own Python files.
        dtype: Of floating-point tensors, but of those that the model's class keeps in float32; "original" keeps what
            the files have.
        layout: "flat": keys as the model has them, which TorchTitan from 0.2 on reads.
            "nested": under "model.", for older TorchTitan and flame.
            "torchtitan": flat, as TorchTitan's own model has them; --titan-model and --titan-flavor say which one.
        titan_model: Which of TorchTitan's own models is to train, such as llama3. Needs TorchTitan installed.
        titan_flavor: Its flavor, such as 8B.
        include_future_predictor: Add the head of that name, with random values.
        future_predictor_head_type: Which one.
        future_predictor_version: Of mlp there are two: "1" has ffn.0 and ffn.3, "2" gate_proj, up_proj and down_proj.
            Or a checkpoint that has such a head.
        imports: Modules that bring model classes to transformers when they are imported, such as fla.
        extra_module: Add the state dict of another module, as 'pkg.mod:factory={"json": "kwargs"}'. Runs that function.
        seed: Of the random values.
        whole: The model is a step of ShardedSave(weights="huggingface"): write all of it, optimizer and average too, as
            the plain DCP directory that it would have been. Nothing is renamed, cast or added;
            options that would are refused.
        dry_run: Print what would be done, and write nothing.
        quiet: No progress bar and no summary.
        json: Print the plan or the counts as JSON on one line.
    """
    import contextlib

    from shardsmith.conversion.early_writing import early_writing
    from shardsmith.conversion.model_directory import find_model
    from shardsmith.errors import UsageError
    from shardsmith.ground import console
    from shardsmith.ground.remote_path import as_path
    from shardsmith.tensors.dtypes import parse_dtypes

    output_dir = as_path(output_dir)
    if whole:
        # Another kind of conversion: tensors, names and dtypes stay as the step has them.
        ignored = {
            "--trust-remote-code": trust_remote_code,
            "--dtype": dtype != "original",
            "--layout": layout != "flat",
            "--titan-model": titan_model is not None,
            "--titan-flavor": titan_flavor is not None,
            "--include-future-predictor": include_future_predictor,
            "--future-predictor-head-type": future_predictor_head_type != "linear",
            "--future-predictor-version": future_predictor_version != "1",
            "--extra-module": bool(extra_module),
            "--imports": bool(imports),
            "--seed": seed != 0,
        }
        if given := [name for name, is_given in ignored.items() if is_given]:
            raise UsageError(f"{', '.join(given)}: not with --whole, which writes the step as it is")
        return _whole(as_path(base_model), output_dir, dry_run=dry_run, quiet=quiet, as_json=json)
    import_modules(imports)
    choice = parse_dtypes(dtype)
    assert choice is None or not hasattr(choice, "items"), "one dtype for all"
    names = _names_of(layout, titan_model, titan_flavor)
    with contextlib.ExitStack() as stack:
        early = None
        # Before the imports below: a child writes while this process imports transformers, which takes about as long.
        if not dry_run and names is None:
            # A name map changes tensors, so what the child would write of the files is not what is wanted.
            early = stack.enter_context(early_writing(find_model(base_model), output_dir, choice))

        from shardsmith.conversion.write import convert
        from shardsmith.conversion.write_plan import ConversionOptions, plan_on_ranks
        from shardsmith.ground.torchrun.group import joined_ranks

        options = ConversionOptions(
            dtype=choice,
            layout="nested" if layout == "nested" else "flat",
            names=names,
            trust_remote_code=trust_remote_code,
            future_predictor=future_predictor_head_type if include_future_predictor else None,
            future_predictor_version=future_predictor_version,
            extra_modules=extra_module,
            seed=seed,
        )
        ranks = stack.enter_context(joined_ranks())
        plan = plan_on_ranks(ranks, base_model, output_dir, options)  # takes seconds, while shards are written
        # The other ranks have no plan of the whole, and say nothing.
        quiet = (quiet and not json) or not ranks.is_leader
        if dry_run:
            plan.close()
            if not quiet:
                _report(plan, None, json)
            return 0
        with console.bytes_bar(output_dir.name, plan.nbytes, quiet=quiet or json) as progress:
            counts = convert(plan, ranks, progress, early)
    if not quiet:
        _report(plan, counts, json)
    return 0 if all(count.is_right for count in counts) else 1


def _whole(checkpoint: Path, output_dir: Path, *, dry_run: bool, quiet: bool, as_json: bool) -> int:
    import json

    from shardsmith.ground.sizes import size_text
    from shardsmith.run_state.plain_dcp import write_plain_dcp

    found = write_plain_dcp(checkpoint, output_dir, dry_run=dry_run)
    if as_json:
        about = {"dry_run": dry_run, "output": str(output_dir), "source": str(checkpoint), "step": found.step}
        print(json.dumps({**about, "tensors": found.tensors, "bytes": found.nbytes}))
    elif not quiet:
        what = f"{output_dir} from {checkpoint}: {found.tensors} tensors, {size_text(found.nbytes)}"
        done = f"wrote {what}, compared with the digests that it records"
        print(f"would write {what}\ndry run: nothing was written" if dry_run else done)
    return 0


def _report(plan: WritePlan, counts: list[Count] | None, as_json: bool) -> None:
    from shardsmith.conversion import report
    from shardsmith.conversion.plan import ConversionPlan

    assert isinstance(plan, ConversionPlan), "rank 0 makes the plan, and speaks"
    if counts is None:
        report.print_plan(plan, as_json=as_json)
    else:
        report.print_result(plan, counts, as_json=as_json)


def _names_of(layout: str, titan_model: str | None, titan_flavor: str | None) -> str | None:
    from shardsmith.errors import UsageError

    names = choose_names("torchtitan" if layout == "torchtitan" else "auto", titan_model, titan_flavor)
    if names == "auto":
        return None
    if layout != "torchtitan":
        raise UsageError(f"--titan-model {titan_model} goes with --layout torchtitan")
    return names
