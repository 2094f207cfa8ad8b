"""``shardsmith verify``: are two checkpoints the same model?"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import tyro

from shardsmith.commands.options import NameArguments


def verify(
    a: tyro.conf.Positional[Path],
    b: tyro.conf.Positional[Path | None] = None,
    *,
    naming: tyro.conf.OmitArgPrefixes[NameArguments],
    models: tuple[Literal["main", "ema"], ...] = (),
    tolerance: float | None = None,
    rounding: bool = False,
    digests: bool = False,
    logits: bool = False,
    base_model: Path | None = None,
    trust_remote_code: bool = False,
    json: bool = False,
    html: Path | None = None,
) -> int:
    """Compare two checkpoints, or verify the files of one.

    The two may have any formats and shardings; one alone is compared with the hashes that it records.

    Only reads. Exits with 0 if they hold the same model, 1 if not, with all tensors that differ, and 2 if they
    cannot be compared. Of one alone every byte is read: 0 if no file has changed since it was written, 1 if one has,
    is missing, or does not belong there, and 2 if of some file no hash was recorded: it is named.

    Example: shardsmith verify run/checkpoints/step-500 run/hf/step-500 --rounding

    Args:
        a: A checkpoint of any format that to-hf reads.
        b: Another. Without it A is compared with the hashes that were recorded when it was written.
        models: Which of their models to compare: all that both have, unless told.
        tolerance: Largest absolute difference of two values, or logits, that is none: 0 for values, 0.001 for logits.
        rounding: Accept values that are those of the other, rounded to another dtype.
        digests: Compare digests; those that a checkpoint has recorded are believed, and nothing of it is read.
        logits: Compare what the models answer to a fixed text, instead of their values.
        naming: How tensors correspond.
        base_model: Where neither is a Hugging Face directory: one of the same kind of model. It says which names belong
            together, for which its config.json alone will do; logits are computed by its class.
        trust_remote_code: For logits, run the Python files of the Hugging Face directory.
        json: Print JSON instead of tables.
        html: Of two checkpoints compared by their values: also write a page with a map and a table of all tensors.
    """
    from shardsmith.commands import verification_report as report
    from shardsmith.compare.verification import VerifyOptions
    from shardsmith.compare.verification import verify as compare
    from shardsmith.errors import UsageError
    from shardsmith.ground import console
    from shardsmith.ground.remote_path import as_path
    from shardsmith.hf.hf_directory import protect

    a, b, base_model = as_path(a), b and as_path(b), base_model and as_path(base_model)
    html = html and as_path(html)
    if html is not None:
        if b is None or logits:
            raise UsageError("--html shows two checkpoints, compared by their values or digests")
        protect(html, a, b)
    if b is None:
        return _verify_alone(a, as_json=json)
    options = VerifyOptions(
        models=models or None,
        names=naming.name_map,
        rules=naming.layout_rules,
        by="digests" if digests else "values",
        # Logits are sums of many products, so they are never equal to the last bit.
        tolerance=tolerance if tolerance is not None else 1e-3 if logits else 0.0,
        rounding=rounding,
        base_model=base_model,
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
    if html is not None:
        from shardsmith.reports.verification import verification_page

        command = ["shardsmith", "verify", str(a), str(b), *["--rounding"] * rounding, "--html", str(html)]
        html.write_text(verification_page(verification, command), encoding="utf-8")
    report.print_verification(verification, as_json=json)
    return 0 if verification.same else 1


def _verify_alone(path: Path, *, as_json: bool) -> int:
    """Compare every byte with the recorded hashes. Raises UnsupportedFormatError if of some none is recorded."""
    from shardsmith.commands import report
    from shardsmith.ground import console
    from shardsmith.inspection import inspect_checkpoint

    with console.reading_bar(path.name, quiet=as_json):
        inspection = inspect_checkpoint(path, verify=True)
    report.print_inspection(inspection, as_json=as_json)
    return report.verified_code(inspection)
