"""``shardsmith verify``: are two checkpoints the same model?"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import tyro

from shardsmith.commands.options import NameArguments


def verify(
    a: tyro.conf.Positional[Path],
    b: tyro.conf.Positional[Path],
    naming: tyro.conf.OmitArgPrefixes[NameArguments],
    models: tuple[Literal["main", "ema"], ...] = (),
    tolerance: float | None = None,
    rounding: bool = False,
    digests: bool = False,
    logits: bool = False,
    base_model: Path | None = None,
    trust_remote_code: bool = False,
    json: bool = False,
) -> int:
    """Compare two checkpoints of any formats and shardings.

    Only reads. Exits with 0 if they hold the same model, 1 if not, with all tensors that differ, and 2 if they
    cannot be compared.

    Example: shardsmith verify run/checkpoints/step-500 run/hf/step-500 --rounding

    Args:
        a: A checkpoint of any format that to-hf reads.
        b: Another.
        models: Which of their models to compare: all that both have, unless told.
        tolerance: Largest absolute difference of two values, or logits, that is none: 0 for values, 0.001 for logits.
        rounding: Accept values that are those of the other, rounded to another dtype.
        digests: Compare digests; those that a checkpoint has recorded are believed, and nothing of it is read.
        logits: Compare what the models answer to a fixed text, instead of their values.
        naming: How tensors correspond.
        base_model: For logits, where neither is a Hugging Face directory: one of the same kind of model.
        trust_remote_code: For logits, run the Python files of the Hugging Face directory.
        json: Print JSON instead of tables.
    """
    from shardsmith.commands import verification_report as report
    from shardsmith.compare.verification import VerifyOptions
    from shardsmith.compare.verification import verify as compare
    from shardsmith.ground import console

    options = VerifyOptions(
        models=models or None,
        names=naming.name_map,
        rules=naming.layout_rules,
        by="digests" if digests else "values",
        tolerance=tolerance if tolerance is not None else 1e-3 if logits else 0.0,
        rounding=rounding,
    )
    if logits:
        from shardsmith.diagnose.logits import verify_logits

        chosen = models or ("main",)
        with console.reading_bar("logits", quiet=json):
            found = [
                verify_logits(a, b, name, options, base_model, trust_remote_code=trust_remote_code) for name in chosen
            ]
        report.print_logits(found, as_json=json)
        return 0 if all(result.same for result in found) else 1
    with console.reading_bar("comparing", quiet=json):
        verification = compare(a, b, options)
    report.print_verification(verification, as_json=json)
    return 0 if verification.same else 1
