"""A family on two ranks with FSDP2: our save and the live export, judged by the library's own files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch.distributed.fsdp import fully_shard

from shardsmith.hooks import HFExport, Hooks, ShardedSave, every

from . import round_trip
from .tiny import Family, make_tiny


def run_sharded(folder: Path, families: Sequence[Family]) -> None:
    """On each rank: shard each model, save it and export it live in one step."""
    for family in families:
        model = make_tiny(family)
        fully_shard(model)
        place = folder / family.kind
        hooks = Hooks(
            ShardedSave(place / "saved", model=model, when=every(1)),
            HFExport(place / "live", model=model, base_model=place / "base", when=every(1), dtype="original"),
        )
        hooks.step(1)
        hooks.close()


def save_bases(folder: Path, families: Sequence[Family]) -> None:
    """What the library saves of each model: the measure."""
    for family in families:
        make_tiny(family).save_pretrained(folder / family.kind / "base")


def assert_right(folder: Path, family: Family) -> None:
    """The live export, and what to-hf makes of the save, are the library's own files."""
    place = folder / family.kind
    round_trip.assert_as_the_library_saves(place / "live" / "step-1", place / "base")
    round_trip.convert(place / "saved" / "step-1", place / "base", place / "out")
    round_trip.assert_as_the_library_saves(place / "out", place / "base")
