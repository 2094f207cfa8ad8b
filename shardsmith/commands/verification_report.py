"""How the command line shows whether two checkpoints are the same model."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Sequence

from rich.text import Text

from shardsmith.compare.verification import Difference, ModelVerification, Verification
from shardsmith.diagnose.logits import LogitsVerification
from shardsmith.ground.console import new_console
from shardsmith.ground.printable import printable

# Up to the first number between dots: a list of layers and the number in it.
_LAYER = re.compile(r"(.*?\b[0-9]+)\.")


def print_verification(verification: Verification, *, as_json: bool) -> None:
    """All that differs, and the verdict; or JSON on one line."""
    if as_json:
        verdict = {"same": verification.same, "undecided": verification.is_undecided}
        print(json.dumps({**dataclasses.asdict(verification), **verdict}))
        return
    console = new_console()
    console.print(f"A: {verification.left}\nB: {verification.right}")
    for model in verification.models:
        console.print(_counts(model))
        for difference in model.differences:
            console.print(_difference(difference))
        for line in (*layers_of(model), *hint_of(model)):
            console.print(line)
    for name, (left, right) in verification.settings.items():
        console.print(f"  {printable(name)}: settings (A {printable(left)}, B {printable(right)})")
    if verification.is_undecided:
        # What both have is equal; a verdict on the rest would be a guess.
        console.print(Text("not known to be the same model: each has names that the other lacks", "bold red"))
        console.print("  --base-model DIRECTORY with the model's config.json says which names belong together")
    else:
        console.print(_verdict(verification.same, _what(verification)))
        if verification.settings and not any(model.differences for model in verification.models):
            console.print("  of a model of transformers, --logits tells how far apart what they compute is")
    for line in verification.left_out:
        console.print(f"not compared: {printable(line)}")


def print_logits(found: Sequence[LogitsVerification], *, as_json: bool) -> None:
    """How far apart the answers are, and the verdict; or JSON on one line."""
    same = all(result.same for result in found)
    if as_json:
        print(json.dumps({"same": same, "logits": [dataclasses.asdict(result) for result in found]}))
        return
    console = new_console()
    for result in found:
        line = f"{result.model}, on {result.batch}: logits differ by up to {result.largest:.3g}"
        if result.losses is not None:
            line += (
                f" (KL a token up to {result.divergence:.3g}); losses {result.losses[0]:.5f} and {result.losses[1]:.5f}"
            )
        console.print(line)
    console.print(_verdict(same, "the same model, by its logits"))


def _what(verification: Verification) -> str:
    """Return what two checkpoints are, or are not."""
    by = "by their digests" if verification.by == "digests" else "in every value"
    compared = ", ".join(model.model for model in verification.models)
    which = "" if compared == "main" and not verification.left_out else f" ({compared})"
    if verification.settings and not any(model.differences for model in verification.models):
        return f"the same model: the tensors are the same, {by}{which}, and the settings above are not"
    return f"the same model, {by}{which}"


def _counts(model: ModelVerification) -> str:
    parts = [f"{model.compared} tensors compared", f"{model.equal} equal"]
    parts += [f"{len(model.converted)} equal but for their dtype"] if model.converted else []
    parts += [f"{printable(name)} brought into one layout by {rule}" for name, rule in model.layouts.items()]
    tied = printable(", ".join(model.tied))
    parts += [f"{tied} on one side only, where they repeat another tensor"] if tied else []
    parts += [f"{printable(', '.join(model.ignored))} not compared, as a load makes them anew"] if model.ignored else []
    if model.renamed:
        mine, theirs = next(iter(model.renamed.items()))
        parts.append(f"{len(model.renamed)} under other names, such as {printable(mine)} for {printable(theirs)}")
    return f"{model.model}: {', '.join(parts)}"


def _difference(found: Difference) -> str:
    """One line, the name first, so that it can be searched and copied."""
    measured = ""
    if found.largest is not None:
        measured = f", {found.differing:,} elements by up to {found.largest:.6g}, relative {found.relative:.3g}"
    return f"  {printable(found.name)}: {found.problem}{measured} (A {found.left}, B {found.right})"


def layers_of(model: ModelVerification) -> list[str]:
    """Return a line for each layer with tensors whose values differ, the layer that is furthest apart first."""
    worst: dict[str, list[float]] = {}
    for found in model.differences:
        if found.relative is not None and (match := _LAYER.match(found.name)):
            worst.setdefault(match[1], []).append(found.relative)
    ordered = sorted(worst.items(), key=lambda item: -max(item[1]))
    lines = [
        f"  {printable(layer)}: {len(all_of)} tensor{'s' * (len(all_of) > 1)}, by up to {max(all_of):.3g}"
        for layer, all_of in ordered
    ]
    return ["  by layer, relative:", *lines] if len(lines) > 1 else []


def hint_of(model: ModelVerification) -> list[str]:
    """Return what to try where every difference is the rounding of one side to fewer bits."""
    if model.differences and all(found.is_rounding for found in model.differences):
        return ["  one side is the other, rounded to fewer bits: --rounding accepts that"]
    return []


def _verdict(same: bool, text: str) -> Text:
    return Text(text, "bold green") if same else Text(f"not {text}", "bold red")
