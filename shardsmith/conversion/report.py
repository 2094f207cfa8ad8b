"""How ``to-dcp`` says what it has done."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence

import torch
from rich.table import Table

from shardsmith.conversion.counts import Count
from shardsmith.conversion.plan import ConversionPlan
from shardsmith.ground.console import new_console
from shardsmith.ground.sizes import size_text


def print_plan(plan: ConversionPlan, *, as_json: bool = False) -> None:
    """Print what a dry run would write."""
    if as_json:
        print(json.dumps(_plain(plan, dry_run=True)))
        return
    console = new_console()
    console.print(f"would write {plan.output} from {plan.directory}: {size_text(plan.nbytes)}")
    _print_facts(plan)
    console.print("dry run: nothing was written")


def print_result(plan: ConversionPlan, counts: Sequence[Count], *, as_json: bool = False) -> None:
    """Print what was written beside what it should be."""
    if as_json:
        counted = [{**dataclasses.asdict(count), "is_right": count.is_right} for count in counts]
        print(json.dumps({**_plain(plan, dry_run=False), "counts": counted}))
        return
    console = new_console()
    console.print(f"wrote {plan.output} from {plan.directory}: {size_text(plan.nbytes)}")
    table = Table("", "tensors", "elements", "should be", "")
    for count in counts:
        expected = "unknown" if count.expected_elements is None else f"{count.expected_elements:,}"
        verdict = "" if count.expected_elements is None else "yes" if count.is_right else "NO"
        table.add_row(count.what, str(count.tensors), f"{count.elements:,}", expected, verdict)
    console.print(table)
    _print_facts(plan)
    if all(count.is_right for count in counts):
        known = "every count is as the model has it" if plan.model.blueprint else "every tensor of the files is in it"
        console.print(f"complete: {known}; a digest of each tensor is in metadata.json")
    else:
        console.print("NOT COMPLETE: the counts above that are not as they should be")


def _plain(plan: ConversionPlan, *, dry_run: bool) -> dict[str, object]:
    return {
        "dry_run": dry_run,
        "output": str(plan.output),
        "source": str(plan.directory),
        "bytes": plan.nbytes,
        "model_class": plan.initial.model_class,
        "tied": dict(plan.aliases),
        "note": plan.model.note,
        "heads": [head.name for head in plan.heads],
    }


def _print_facts(plan: ConversionPlan) -> None:
    console = new_console()
    initial = plan.initial
    if initial.model_class:
        console.print(f"model: {initial.model_class}, config {initial.config_xxh3_128}, names: {initial.names}")
    if plan.model.note:
        console.print(f"note: {plan.model.note}")
    for alias, kept in plan.aliases.items():
        console.print(f"{alias} is tied to {kept}: stored once, to be read under both names")
    if initial.buffers:
        names = ", ".join(initial.buffers)
        console.print(f"no state dict holds {names}: values for a check are in metadata.json")
    for head in plan.heads:
        console.print(f"{head.name}: random, seed {initial.seed}: {', '.join(head.tensors)}")
    if plan.model.ignored:
        console.print(f"left out, as the model makes them itself: {', '.join(plan.model.ignored)}")
    if initial.cast_to:
        console.print(f"floating-point tensors are cast to {initial.cast_to}{_kept(plan)}")


def _kept(plan: ConversionPlan) -> str:
    """What was not cast, as the model's class has it in float32."""
    kept = [key for key, stream in plan.streams.items() if stream.spec.dtype == torch.float32]
    if not kept or plan.initial.cast_to == "float32":
        return ""
    return f", but for {len(kept)} that the model's class keeps in float32, {kept[0]} for one"
