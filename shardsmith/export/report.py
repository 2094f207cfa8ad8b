"""How the command line shows what ``to-hf`` would write, and what it has written and checked."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence

from rich.table import Table

from shardsmith.export.check import ExportCheck, ModelCheck
from shardsmith.export.plan import ExportPlan
from shardsmith.ground.console import new_console
from shardsmith.ground.sizes import size_text
from shardsmith.tensors.dtypes import dtype_name

_SHOWN = 5
_PLAIN_WEIGHTS = ("model.", "model-", "ema.", "ema-", "pytorch_model.", "pytorch_model-", "diffusion_pytorch_model.")
"""Beginnings of names that nobody expects to be copied."""


def print_plans(plans: Sequence[ExportPlan], *, as_json: bool = False) -> None:
    """What a dry run would write."""
    if as_json:
        print(json.dumps({"dry_run": True, "directories": [_plain(plan) for plan in plans]}))
        return
    console = new_console()
    for plan in plans:
        paths = f"{plan.directory.output} from {plan.checkpoint} and {plan.base}"
        console.print(f"would write {paths}, {plan.directory.measure}")
        console.print(_template_line(plan.template.origin, bool(plan.template.specs)))
        console.print(_files_table(plan))
        for line in remarks(plan):
            console.print(line)
    console.print("dry run: nothing was written")


def print_written(plans: Sequence[ExportPlan], checks: Sequence[ExportCheck], *, as_json: bool = False) -> None:
    """What was written, and what was checked of it."""
    if as_json:
        print(json.dumps({"dry_run": False, "directories": [dataclasses.asdict(check) for check in checks]}))
        return
    console = new_console()
    for plan, check in zip(plans, checks, strict=True):
        console.print(f"wrote {check.output} from {plan.checkpoint} and {plan.base}, {check.compared}")
        console.print(_files_table(plan))
        for line in remarks(plan):
            console.print(line)
        console.print(_checks_table(check, bool(plan.template.specs)))
        for model in check.models:
            for line in _remarks(model):
                console.print(f"{model.model}: {line}")


def _plain(plan: ExportPlan) -> dict[str, object]:
    return {
        "output": str(plan.directory.output),
        "source": str(plan.checkpoint),
        "base": str(plan.base),
        "template": plan.template.origin,
        "compared": str(plan.directory.measure),
        "config_changes": list(plan.fitted.changes) if plan.fitted else [],
        "tokenizer": plan.directory.measure.tokenizer,
        "not_copied": plan.files.not_copied if plan.files else {},
        "old_weights": list(plan.old_weights),
        "bytes": plan.directory.nbytes,
        "models": [
            {
                "model": model.model,
                "files": [file.name for file in model.weights.files],
                "tensors": len(model.specs),
                "elements": sum(spec.numel for spec in model.specs),
                "bytes": model.nbytes,
                "float32_unknown": model.float32_unknown,
            }
            for model in plan.directory.models
        ],
        "copies": list(plan.directory.copies),
        "rules": dict(plan.rules),
        "orders": dict(plan.orders),
    }


def _template_line(origin: str, has_weights: bool) -> str:
    if has_weights:
        return f"names and shapes are as in {origin} of the base model"
    return f"names and shapes compared with the base model: {origin}"


def remarks(plan: ExportPlan) -> Iterator[str]:
    """Yield what is to be said of a directory beside its files, a line each."""
    for change in plan.fitted.changes if plan.fitted else ():
        yield f"config.json: {change}"
    if plan.directory.measure.tokenizer:
        yield plan.directory.measure.tokenizer
    if plan.generates_otherwise:
        yield "generation_config.json: as the live model had it at the step, and not the base model"
    # One for all of them: the list may be as long as the model.
    for ignored in (plan.fitted.ignored if plan.fitted else ())[:1]:
        count = len(plan.fitted.ignored) if plan.fitted else 0
        yield f"{count} tensors, {ignored} for one, are written, and the class passes over them when it loads"
    for name, reason in (plan.files.left_out if plan.files else {}).items():
        # Weights of the base model itself are replaced; what lies in folders or is named otherwise may be missed.
        if "/" in name or not name.startswith(_PLAIN_WEIGHTS):
            yield f"{name} of the base model is not copied: {reason}"
    yield from plan.files.unread_lines if plan.files else ()
    if plan.dropped:
        yield f"left out, as asked for: {', '.join(plan.dropped)}"
    for name, reason in plan.old_weights.items():
        yield f"{name} is the base model's own: {reason}"
    for model in plan.directory.models:
        for alias, kept in model.aliases.items():
            yield f"{model.model}: {alias} is tied to {kept}, which alone is in the file"
        if model.float32_unknown:
            yield f"{model.model}: {model.float32_unknown}"
        if model.filled:
            yield f"{model.model}: {len(model.filled)} tensors that are not averaged are from main"
        averages = plan.sources[model.model].averages
        if len(averages) > 1:
            others = ", ".join(averages[1:])
            yield f"{model.model}: of several averages, {averages[0]}; --average takes another: {others}"
        for twin in plan.sources[model.model].twins:
            yield f"left out: {twin}, which holds tensors under the model's names; --average {twin} takes it"
        left_out = getattr(plan.sources[model.model], "left_out", {})
        for name, reason in left_out.items():
            yield f"{model.model}: {name} is left out: {reason}"


def _files_table(plan: ExportPlan) -> Table:
    table = Table("file", "holds", "tensors", "size")
    for model in plan.directory.models:
        for file in model.weights.files:
            dtypes = ", ".join(sorted({dtype_name(t.spec.dtype) for t in file.tensors.values()}))
            table.add_row(file.name, f"{model.model}, {dtypes}", str(len(file.tensors)), size_text(file.size))
    table.add_row("config.json, shardsmith.json", "written", "", "")
    for name in plan.directory.copies:
        if name != "config.json":
            holds = "weights of another part, " if plan.files and name in plan.files.weights else ""
            table.add_row(name, f"{holds}from the base model", "", size_text((plan.base / name).stat().st_size))
    return table


def _checks_table(check: ExportCheck, has_template: bool) -> Table:
    table = Table("check", *(model.model for model in check.models))
    rows = {
        "values read back and compared by digest": ["equal" if m.read_back else "not done" for m in check.models],
        _template_line(check.template, has_template): [
            f"{m.compared} of {m.tensors}" if has_template else "not done" for m in check.models
        ],
        f"dtypes are as in {check.template} of the base model": [
            f"{m.same_dtype} of {m.tensors}" if has_template else "" for m in check.models
        ],
        "elements": [f"{m.elements:,}" for m in check.models],
        "tensors equal to main": ["" if m.same_as_main is None else str(m.same_as_main) for m in check.models],
        "tensors of equal elements": [str(len(m.constant)) for m in check.models],
    }
    for name in dict.fromkeys(name for m in check.models for name in (*m.rules, *m.orders)):
        rows[name] = [_layout_text(m, name) for m in check.models]
    for title, cells in rows.items():
        # Without a template there is nothing to compare dtypes with.
        if has_template or not title.startswith("dtypes"):
            table.add_row(title, *cells)
    return table


def _layout_text(model: ModelCheck, name: str) -> str:
    rule = model.rules.get(name, "no rule needed")
    order = {
        "as in the base": "order of its values as in the base",
        "undecided": "order of its values undecided: too far from the base's",
        "channels first": "order of its values allowed to be another",
    }.get(model.orders.get(name, ""), "order of its values not compared")
    return f"{rule}; {order}"


def _remarks(model: ModelCheck) -> list[str]:
    lines = [model.remark] if model.remark else []
    if model.constant:
        more = f" and {len(model.constant) - _SHOWN} more" if len(model.constant) > _SHOWN else ""
        lines.append(
            f"all elements are equal in {', '.join(model.constant[:_SHOWN])}{more}, as after an initialisation"
        )
    if model.not_finite:
        more = f" and {len(model.not_finite) - _SHOWN} more" if len(model.not_finite) > _SHOWN else ""
        names = f"{', '.join(model.not_finite[:_SHOWN])}{more}"
        lines.append(f"NaN or infinite: {names}, to begin with; take a step from before the run diverged")
    lines += [f"{name} differs from the base model, as was allowed" for name in model.allowed[:_SHOWN]]
    return lines
