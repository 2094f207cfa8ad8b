"""``shardsmith verify``: are two checkpoints the same model?"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import tyro

from shardsmith.commands.options import choose_names


def verify(
    a: tyro.conf.Positional[Path],
    b: tyro.conf.Positional[Path],
    models: tuple[Literal["main", "ema"], ...] = (),
    tolerance: float | None = None,
    rounding: bool = False,
    digests: bool = False,
    logits: bool = False,
    model: Path | None = None,
    names: str = "auto",
    titan_model: str | None = None,
    titan_flavor: str | None = None,
    rules: Path | None = None,
    trust_remote_code: bool = False,
    json: bool = False,
) -> int:
    """Say whether two checkpoints are the same model, whatever their formats, shardings and wrappers.

    Only reads. Exits with 0 if they are, 1 if not, with all tensors that differ, and 2 if it could not look.

    Example: shardsmith verify run/checkpoints/step-500 run/hf/step-500 --rounding

    Args:
        a: A checkpoint of any format that to-hf reads.
        b: Another.
        models: Which of their models to compare: all that both have, unless told.
        tolerance: Largest absolute difference of two values, or logits, that is none: 0 for values, 0.001 for logits.
        rounding: Accept values that are those of the other, rounded to another dtype.
        digests: Compare digests; those that a checkpoint has recorded are believed, and nothing of it is read.
        logits: Compare what the models answer to a fixed text, instead of their values.
        model: For logits, where neither is a Hugging Face directory: one of the same kind of model.
        names: How the checkpoint's names become the model's: "auto", "identity", "transformers", or a name map that an
            installed package offers.
        titan_model: For checkpoints of TorchTitan's own models: which one, such as llama3. Needs TorchTitan installed.
        titan_flavor: Its flavor, such as 8B.
        rules: TOML or JSON file of layout rules, as for to-hf, for tensors of which the two have different shapes; a
            patch embedding that was turned from a convolution into a linear layer needs none.
        trust_remote_code: For logits, run the Python files of the Hugging Face directory.
        json: Print JSON instead of tables.
    """
    from shardsmith.compare import report
    from shardsmith.compare.verification import VerifyOptions
    from shardsmith.compare.verification import verify as compare
    from shardsmith.export.layout_rules import find_rules

    options = VerifyOptions(
        models=models or None,
        names=choose_names(names, titan_model, titan_flavor),
        rules=tuple(find_rules(rules)),
        by="digests" if digests else "values",
        tolerance=tolerance if tolerance is not None else 1e-3 if logits else 0.0,
        rounding=rounding,
    )
    if logits:
        from shardsmith.compare.logits import verify_logits

        chosen = models or ("main",)
        found = [verify_logits(a, b, name, options, model, trust_remote_code=trust_remote_code) for name in chosen]
        report.print_logits(found, as_json=json)
        return 0 if all(result.same for result in found) else 1
    verification = compare(a, b, options)
    report.print_verification(verification, as_json=json)
    return 0 if verification.same else 1
