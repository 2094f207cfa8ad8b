"""Prints the table of planted causes in docs/troubleshooting.md: ``python -m tests.planted_table``."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from shardsmith.diagnose.batches import read_batch
from shardsmith.diagnose.live_model import LiveModel
from shardsmith.diagnose.start_loss import possible_causes
from tests.diagnose.test_diagnose_planted import CONFIGS
from tests.diagnosed_models import FAMILIES, Specimen, config_of, make_specimen
from tests.planted_faults import PLANTED


def losses(specimen: Specimen) -> Iterator[tuple[str, str, float]]:
    """Cause, code, loss of one family."""
    for planted in PLANTED:
        if specimen.family in planted.families:
            model = specimen.model()
            model.load_state_dict(planted.plant(specimen.state))
            yield planted.cause, planted.code, loss_of(model, specimen)
    for code, changes in CONFIGS.items():
        yield f"config: {', '.join(changes)}", code, loss_of(specimen.model(**changes), specimen)
    for batch in (specimen.batch, specimen.packed):
        for cause in possible_causes(LiveModel.of_directory(specimen.base), read_batch(batch)):
            yield f"{batch.stem}: {cause.text}", cause.code or "", cause.loss


@torch.no_grad()
def loss_of(model: nn.Module, specimen: Specimen) -> float:
    tokens = read_batch(specimen.batch).tokens
    return float(model.eval()(input_ids=tokens, labels=tokens).loss)


def main() -> None:
    rows: dict[tuple[str, str], dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for family in FAMILIES:
            config_of(family)
            (Path(folder) / family).mkdir()
            for cause, code, loss in losses(make_specimen(family, Path(folder) / family)):
                rows.setdefault((cause, code), {})[family] = loss
    for (cause, code), found in rows.items():
        cells = " | ".join(f"{found[family]:.3f}" if family in found else "" for family in FAMILIES)
        print(f"| {cause} | {cells} | `{code}` |")


if __name__ == "__main__":
    main()
