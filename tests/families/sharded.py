"""A family on two ranks with FSDP2: our save and the live export, judged by the library's own files."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from pathlib import Path

import transformers
from torch.distributed.fsdp import fully_shard

from shardsmith.hooks import HFExport, Hooks, ShardedSave, every

from . import round_trip
from .tiny import Family, make_tiny


def run_sharded(folder: Path, families: Sequence[Family]) -> None:
    """On each rank: shard each model, save it and export it live in one step. Its files are in ``base``."""
    logging.disable(logging.CRITICAL)
    transformers.logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    for family in families:
        model = make_tiny(family)
        # fully_shard takes no parameter without a dimension, such as a logit_scale: each rank has it whole.
        fully_shard(model, ignored_params={p for p in model.parameters() if p.dim() == 0})
        place = folder if len(families) == 1 else folder / family.kind
        hooks = Hooks(
            ShardedSave(place / "sharded", model=model, when=every(1)),
            HFExport(place / "live-sharded", model=model, base_model=place / "base", when=every(1), dtype="original"),
        )
        hooks.step(1)
        hooks.close()


def save_bases(folder: Path, families: Sequence[Family]) -> None:
    """What the library saves of each model: the measure."""
    for family in families:
        make_tiny(family).save_pretrained(folder / family.kind / "base")


def assert_right(place: Path) -> None:
    """The live export, and what to-hf makes of the save, are the library's own files."""
    round_trip.assert_as_the_library_saves(place / "live-sharded" / "step-1", place / "base")
    round_trip.convert(place / "sharded" / "step-1", place / "base", place / "out-sharded")
    round_trip.assert_as_the_library_saves(place / "out-sharded", place / "base")
