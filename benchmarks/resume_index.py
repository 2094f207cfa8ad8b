"""What one rank reads of the index at a resume, by the number of ranks that saved: real functions, made-up shards.

No tensor is made: the files are empty but for their length, and the rank looks up all that it would load.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import tyro
import xxhash
from rich.console import Console
from rich.table import Table

from shardsmith.formats.dcp.box_index import load_index
from shardsmith.formats.dcp.cuts import cut_tensors
from shardsmith.formats.dcp.index import read_index
from shardsmith.formats.dcp.index_writer import write_indexes
from shardsmith.formats.dcp.rank_file import Piece, RankFile
from shardsmith.formats.dcp.shard_files import Place, PlannedChunk
from shardsmith.formats.dcp.source import DcpSource
from shardsmith.ground.garbage import without_collection
from shardsmith.ground.layout import BOX_INDEX_FILE, METADATA_FILE
from shardsmith.ground.mapped import MappedFile
from shardsmith.manifest.metadata import CheckpointMetadata, FileRecord
from shardsmith.tensors.tensors import Chunk, Shape, TensorSpec

from .scale_models import Model, llama_405b, separate_experts

MODELS = {"Llama 405B": (llama_405b, (8, 64)), "48 x 128 separate experts": (separate_experts, (2, 4))}
"""What makes the shapes of each, and the numbers of ranks; the weights alone, and a scalar for each."""
# From the fewest ranks to the most: what a rank reads must hardly depend on their number.
_MOST_GROWTH = 1.2


@dataclass(frozen=True, slots=True)
class Found:
    """What it took to look up all that one rank loads."""

    nbytes: int
    """Read of the index."""
    seconds: float
    """Of the processor."""
    memory: int
    """Growth of the peak, in bytes."""


def shapes_of(model: Model) -> dict[str, Shape]:
    """Return the shapes alone: FSDP does not ask which dimension tensor parallelism would cut."""
    return {name: shape for name, (shape, _) in model.items()}


def box_of(shape: Shape, rank: int, ranks: int) -> Chunk:
    """Return what FSDP gives a rank; empty where there are fewer rows."""
    # Rounded up, as FSDP2 does it: the last ranks may have fewer rows, or none.
    rows = -(-shape[0] // ranks)
    begin, end = min(rank * rows, shape[0]), min((rank + 1) * rows, shape[0])
    return Chunk((begin, *(0 for _ in shape[1:])), (end - begin, *shape[1:]))


def write(directory: Path, shapes: dict[str, Shape], ranks: int) -> dict[str, int]:
    """Write both indexes of a save of so many ranks, files of the right length and a manifest; sizes of the indexes."""
    specs: dict[str, TensorSpec] = {}
    chunks: list[PlannedChunk] = []
    places: dict[int, Place] = {}
    files = []
    for rank in range(ranks):
        boxes = ((key, shape, box_of(shape, rank, ranks)) for key, shape in shapes.items())
        pieces = [Piece(key, shape, torch.bfloat16, box) for key, shape, box in boxes if box.numel]
        # Each rank writes some of the scalars.
        scalars = list(shapes)[rank::ranks]
        pieces += [Piece(f"optimizer.state.{key}.step", (), torch.float32, Chunk((), ())) for key in scalars]
        file = RankFile(f"__{rank}_0.distcp", tuple(pieces), ())
        found = [*file.places([])]
        places |= dict(enumerate(found, len(places)))
        chunks += [PlannedChunk(piece.key, 0, piece.box, 0) for piece in pieces]
        specs |= {piece.key: TensorSpec(piece.key, piece.shape, piece.dtype) for piece in pieces}
        with (directory / file.name).open("wb") as out:
            # At its full length but without content: nothing of it is read.
            out.truncate(found[-1].offset + found[-1].length)
        files.append(file.name)
    paths = {key: ("optimizer", key.partition(".")[2]) if key.startswith("optimizer.") else (key,) for key in specs}
    tensors = cut_tensors(specs, chunks, places, files)
    made = write_indexes(tensors, files=files, containers=paths, attempt="0" * 16)
    indexes = {name: b"".join(parts) for name, parts in made.items()}
    for name, content in indexes.items():
        (directory / name).write_bytes(content)
    (directory / METADATA_FILE).write_bytes(_manifest(indexes[BOX_INDEX_FILE]))
    return {**{name: len(content) for name, content in indexes.items()}, "count": len(chunks)}


def _manifest(boxes: bytes) -> bytes:
    record = FileRecord(size=len(boxes), xxh3_128=xxhash.xxh3_128_hexdigest(boxes))
    return CheckpointMetadata(
        attempt="0" * 16,
        step=1,
        created_at="2026-01-01T00:00:00+00:00",
        models=(),
        counts={},
        ema=None,
        tied={},
        world_size=1,
        mesh=None,
        files={BOX_INDEX_FILE: record},
        tensors={},
    ).to_json()


def look_up(directory: Path, shapes: dict[str, Shape], ranks: int, *, by_boxes: bool) -> Found:
    """Find all boxes and scalars of a rank in the middle."""
    nbytes, read = 0, MappedFile.bytes

    def counted(file: MappedFile, offset: int, length: int) -> bytes:
        nonlocal nbytes
        nbytes += length
        return read(file, offset, length)

    # Counts all that is read from mapped files, whoever asks.
    MappedFile.bytes = counted  # type: ignore[method-assign]
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    assert (load_index if by_boxes else read_index)(directory)
    source = DcpSource(directory, to_load=by_boxes)
    with without_collection():
        # Without the collector of garbage, as in a resume.
        for key, shape in shapes.items():
            # A rank in the middle: neither the first nor the last entry of any list.
            box = box_of(shape, ranks // 2, ranks)
            assert sum(part.numel for _, _, part in source.stored(key, box)) == box.numel
            assert len([*source.stored(f"optimizer.state.{key}.step", Chunk((), ()))]) == 1
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    # ``ru_maxrss`` is in KiB on Linux.
    return Found(nbytes, time.process_time() - began, memory * 1024)


def _in_a_process(action: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Call it in a fresh process, so that its peak of memory is its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(action, args, options)


def measure(shapes: dict[str, Shape], ranks: int) -> dict[str, Any]:
    """Return sizes and costs for one number of ranks."""
    with tempfile.TemporaryDirectory() as scratch:
        found: dict[str, Any] = _in_a_process(write, Path(scratch), shapes, ranks)
        for name, by_boxes in (("by .metadata", False), ("by .boxes", True)):
            found[name] = asdict(_in_a_process(look_up, Path(scratch), shapes, ranks, by_boxes=by_boxes))
    return found


def _row(ranks: int, found: dict[str, Any]) -> Sequence[str]:
    ways = [found["by .metadata"], found["by .boxes"]]
    costs = [f"{w['nbytes'] / 1e6:.2f} MB, {w['seconds']:.2f} s, {w['memory'] / 1e6:.0f} MB" for w in ways]
    return f"{ranks}", f"{found['count'] / 1e6:.2f} M", *costs


def main(models: tuple[str, ...] = tuple(MODELS), json_file: Path | None = None) -> None:
    """Print what one rank reads of the index, the processor time, and the memory it takes.

    Args:
        models: Which of them.
        json_file: Also write the figures there.
    """
    console, failed, everything = Console(soft_wrap=True, width=150), [], {}
    for name in models:
        make, sizes = MODELS[name]
        shapes = shapes_of(make())
        with ThreadPoolExecutor(min(2, os.cpu_count() or 1)) as pool:  # seconds are those of one process's processor
            found = dict(zip(sizes, pool.map(partial(measure, shapes), sizes), strict=True))
        everything[name] = found
        table = Table("ranks", "boxes", "by .metadata: read, processor, memory", "by .boxes", title=name)
        for ranks, row in found.items():
            table.add_row(*_row(ranks, row))
        console.print(table)
        first, last = (found[ranks]["by .boxes"]["nbytes"] for ranks in (sizes[0], sizes[-1]))
        failed += [name] if last > _MOST_GROWTH * first else []
    if json_file is not None:
        json_file.write_text(json.dumps(everything, indent=1))
    if failed:
        raise SystemExit("what a rank reads grows with the ranks: " + "; ".join(failed))


if __name__ == "__main__":
    tyro.cli(main)
