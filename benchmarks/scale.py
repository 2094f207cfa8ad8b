"""What ranks tell each other in saves and exports of models too large for this machine: real functions, made-up shards.

No tensor is made: each rank's boxes are those of a real sharding, and agreement, reports and index are what a save
makes of them. A row is computed in a process of its own, so that its memory is known.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import resource
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from rich.console import Console
from rich.table import Table

from benchmarks.scale_models import (
    COPIES,
    LAYOUTS,
    Model,
    boxes_at,
    entries_at,
    lists_at,
    llama_405b,
    separate_experts,
    stacked_experts,
)
from shardsmith.export.live_share import deal_boxes
from shardsmith.formats.dcp.rank_file import MOST_BYTES, RankFileWritten
from shardsmith.formats.safetensors_files import host_files
from shardsmith.formats.safetensors_files.plan import plan_files
from shardsmith.ground import ranks as ground_ranks
from shardsmith.ground.garbage import without_collection
from shardsmith.ground.layout import BOX_INDEX_FILE, DCP_INDEX_FILE
from shardsmith.ground.sizes import parse_size
from shardsmith.ground.syncs import deal_addresses, deal_syncs, lender_of
from shardsmith.manifest.metadata import FileRecord
from shardsmith.run_state import whole_directory
from shardsmith.run_state.held import Entry
from shardsmith.run_state.share import Share
from shardsmith.run_state.whole_directory import WholeDirectory, to_receipt
from shardsmith.sharding.holding import Boxes, numbered, pack, pack_lists, unpack_flags
from shardsmith.tensors.digest import Digest
from shardsmith.tensors.tensors import TensorSpec

MODELS: dict[str, Callable[[], Model]] = {
    "Llama 3.1 405B": llama_405b,
    "48 x 128 experts, stacked": stacked_experts,
    "48 x 128 experts, separate": separate_experts,
}
RANKS = (8, 64, 512, 4096, 16384)
_MOST_RANKS = {
    ("48 x 128 experts, separate", "FSDP"): 512,
    ("48 x 128 experts, separate", "HSDP, 8 replicas"): 512,
    ("48 x 128 experts, separate", "TP 8 x FSDP"): 512,
}
"""Where more would take minutes and gigabytes here."""
_INDEX_RANKS = {
    "Llama 3.1 405B": (64, 256, 1024),
    "48 x 128 experts, stacked": (8, 64, 512),
    "48 x 128 experts, separate": (2, 8, 32),
}
INDEXES = (DCP_INDEX_FILE, BOX_INDEX_FILE)
_RANKS_OF_A_HOST = 8
# Of the power of the number of ranks: linear, and a little for text that grows with the numbers.
_MAX_EXPONENT = 1.1
_GATES = {
    "first": "before the first save",
    "later": "in each later save",
    "opens": "files opened by an export",
    "save_opens": "files opened by a save",
    "save_fsyncs": "fsyncs by a save",
}


def measure(name: str, layout: str, ranks: int) -> dict[str, float]:
    """Let made-up ranks agree on a first save and report a later one, and agree on an export; bytes and seconds."""
    torch.set_num_threads(1)
    model = MODELS[name]()
    numbers, lists, lengths = _held(model, layout, ranks)
    before = _memory()
    entries = entries_at(model, LAYOUTS[layout](0, ranks))
    found, answers = _save(entries, lists, [int(own.sum()) * len(COPIES) for own in lengths])
    found["memory"] = _memory() - before
    # Of all that a rank holds the weights come first.
    chosen = [
        unpack_flags(answer, int(own.sum()) * len(COPIES))[: int(own.sum())]
        for answer, own in zip(answers, lengths, strict=True)
    ]
    found |= {f"save_{name}": number for name, number in _in_files(model, lengths, chosen).items()}
    return {**found, **_export(model, numbers, lists, lengths)}


def _held(model: Model, layout: str, ranks: int) -> tuple[np.ndarray, list[list[Boxes]], list[np.ndarray]]:
    """Of each tensor the number of its list of boxes; by rank those lists, and of each tensor how many boxes it has."""
    # Every rank's place; the boxes of most ranks look alike and are worked out by kind.
    spots = [LAYOUTS[layout](rank, ranks) for rank in range(ranks)]
    kinds = [*dict.fromkeys(model.values())]
    expected, _ = numbered((shape, boxes_at(shape, dim, spots[0])) for shape, dim in kinds)
    number_of = dict(zip(kinds, expected, strict=True))
    numbers = np.array([number_of[tensor] for tensor in model.values()], dtype=np.int32)
    lists = [lists_at(kinds, spot, expected) for spot in spots]
    return numbers, lists, [np.array([len(boxes) for boxes in own])[numbers] for own in lists]


def _save(
    entries: list[Entry], lists: Sequence[list[Boxes]], counts: Sequence[int]
) -> tuple[dict[str, float], Sequence[str]]:
    """Figures, and what each rank is answered. ``counts``: how many boxes each rank holds."""
    first = Share(0)
    first.vote(entries)
    description, text, _ = first.report(entries, [0])
    reports = [[description, None if rank else text, pack_lists(own)] for rank, own in enumerate(lists)]
    began = time.process_time()
    with without_collection():
        answers = first.settle(reports, [])
    dealing = time.process_time() - began
    first.accept(entries, answers[0])
    pieces = [int(unpack_flags(answer, count).sum()) for answer, count in zip(answers, counts, strict=True)]
    # A box of more than an archive's size becomes several pieces, which only the file of a rank counts.
    if any(box.numel * 4 > MOST_BYTES for own in lists for boxes in own for box in boxes):  # boxes of several archives
        pieces = [len(first.whole.file(rank).pieces) for rank in range(len(lists))]
    # Receipts of one length are equal in size, so one of each is enough.
    known = {count: _receipt(count) for count in {*pieces}}
    began = time.process_time()
    first.whole.measured([known[count] for count in pieces])
    summing = time.process_time() - began
    sizes = {count: _nbytes(receipt) for count, receipt in known.items()}
    said = [*map(_nbytes, reports)]
    found = {
        "boxes": sum(counts),
        "written": sum(pieces),
        "first": sum(said) + sum(map(_nbytes, answers)),
        "later": sum(sizes[count] for count in pieces),
        "largest": max(*said, *sizes.values()),
        "deal": dealing,
        "sums": summing,
    }
    return found, answers


def _export(
    model: Model, numbers: np.ndarray, lists: Sequence[list[Boxes]], lengths: Sequence[np.ndarray]
) -> dict[str, float]:
    """An export of the weights in bfloat16, each rank writing its slices of the files."""
    shapes = {name: shape for name, (shape, _) in model.items()}
    packed = pack(numbers.tobytes())
    reports = [[packed, pack_lists(own)] for own in lists]
    began = time.process_time()
    with without_collection():
        answers = deal_boxes(shapes, dict.fromkeys(shapes, 2), reports)
    dealing = time.process_time() - began
    chosen = [unpack_flags(answer, int(own.sum())) for answer, own in zip(answers, lengths, strict=True)]
    return {
        "export_first": sum(map(_nbytes, reports)) + sum(map(_nbytes, answers)),
        "export_deal": dealing,
        **_in_files(model, lengths, chosen),
    }


def _in_files(model: Model, lengths: Sequence[np.ndarray], chosen: Sequence[np.ndarray]) -> dict[str, float]:
    """How often files of the weights in bfloat16 are opened and made durable.

    Args:
        model: What is written.
        lengths: Of each rank, how many boxes of each tensor it holds.
        chosen: Of each rank, for each of these boxes whether it writes it.
    """
    shapes = {name: shape for name, (shape, _) in model.items()}
    specs = [TensorSpec(name, shape, torch.bfloat16) for name, shape in shapes.items()]
    files = plan_files(specs, max_shard_bytes=parse_size("5GB")).files
    place = {name: i for i, file in enumerate(files) for name in file.tensors}
    where = np.array([place[name] for name in shapes])
    said = []
    for rank, (flags, counts) in enumerate(zip(chosen, lengths, strict=True)):
        mine = np.unique(np.repeat(where, counts)[flags]).tolist()
        # Rank 0 has made all files, and has them open. Each host has a cache of its own.
        said.append((str(rank // _RANKS_OF_A_HOST), mine if rank else [*range(len(files))]))
    return {
        "files": len(files),
        "opens": _opens(said, len(files)),
        "fsyncs": sum(map(len, deal_syncs(said))),
        "pairs": sum(len(mine) for _, mine in said),
    }


def _opens(said: Sequence[tuple[str, Sequence[int]]], files: int) -> int:
    """How often all ranks together open a file. ``said``: of each rank its host, and the files that it writes to."""
    # Each rank by itself.
    if len(said) * files < host_files._MANY_OPENS:
        return sum(len(mine) for _, mine in said)
    addresses = deal_addresses([(host, f"{rank}") for rank, (host, _) in enumerate(said)])
    lenders = {(file, lender_of(file, addresses[rank])) for rank, (_, mine) in enumerate(said) for file in mine}
    # Rank 0 has opened its files when it made them.
    return files + sum(lender != "0" for _, lender in lenders)


def measure_index(name: str, ranks: int, layout: str = "FSDP") -> dict[str, float]:
    """The index of a first save, as it is made if it is too large to be kept: its size, seconds and memory."""
    torch.set_num_threads(1)
    whole_directory._MOST_KEPT = 0
    whole, receipts, boxes = to_index(MODELS[name](), ranks, layout)
    before, began = _memory(), time.process_time()
    with without_collection():  # as in a save
        contents = whole.indexes(receipts, "0" * 16)
        sizes = {name: sum(map(len, parts)) for name, parts in contents.items() if not isinstance(parts, bytes)}
    seconds, memory = time.process_time() - began, max(_memory() - before, 1)
    return {"boxes": boxes, "making": seconds, "memory": memory, **sizes}


def to_index(model: Model, ranks: int, layout: str) -> tuple[WholeDirectory, list[dict[str, Any]], int]:
    """What ranks agree on before a first save and report after it; and how many boxes they hold."""
    _, lists, lengths = _held(model, layout, ranks)
    entries = entries_at(model, LAYOUTS[layout](0, ranks))
    share = Share(0)
    share.vote(entries)
    description, text, _ = share.report(entries, [0])
    share.settle([[description, None if rank else text, pack_lists(own)] for rank, own in enumerate(lists)], [])
    # An index does not depend on the digests, so they are left out.
    return share.whole, [_receipt(0)] * ranks, sum(int(own.sum()) for own in lengths) * len(COPIES)


def _receipt(pieces: int) -> dict[str, Any]:
    """As of a rank that has written its file; digests are numbers like any other, but do not compress."""
    numbers = np.random.default_rng(0).integers(0, 2**63, (pieces, 2)).tolist()
    return to_receipt(RankFileWritten(FileRecord(size=1, xxh3_128="0" * 32), [Digest(*one) for one in numbers], []))


def _nbytes(value: Any) -> int:
    # As it goes through the store.
    return len(ground_ranks._Outcome("", value).encode())


def _memory() -> int:
    """The most that this process has taken so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _apart(function: Callable[..., dict[str, float]], *args: Any) -> dict[str, float]:
    """Call it in a process of its own, forked from one that has imported this module and has no threads."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("forkserver")) as pool:
        return pool.submit(function, *args).result()


def _exponent(rows: Sequence[tuple[int, dict[str, float]]], key: str) -> float:
    """Of the power of the number of ranks by which a value grows: a straight line through the logarithms."""
    # log(value) = exponent * log(ranks) + constant.
    return float(np.polyfit([math.log(ranks) for ranks, _ in rows], [math.log(row[key]) for _, row in rows], 1)[0])


def _started(
    pool: Executor, models: Sequence[str], layouts: Sequence[str], sizes: Sequence[int]
) -> tuple[dict[tuple[str, str, int], Future[dict[str, float]]], dict[tuple[str, int], Future[dict[str, float]]]]:
    """All rows that are to be measured, by model, layout and ranks; and those of the index, by model and ranks."""
    rows, indexes = {}, {}
    for name in models:
        for layout in layouts:
            for ranks in (n for n in sizes if n <= _MOST_RANKS.get((name, layout), n)):
                rows[name, layout, ranks] = pool.submit(_apart, measure, name, layout, ranks)
        indexes |= {(name, ranks): pool.submit(_apart, measure_index, name, ranks) for ranks in _INDEX_RANKS[name]}
    return rows, indexes


def _table(name: str, found: dict[str, list[tuple[int, dict[str, float]]]]) -> Table:
    heads = ("sharding", "ranks", "boxes", "before the first save", "in each later save", "longest message")
    rank_0 = ("rank 0: who writes what", "memory", "sums", "the same of an export")
    # A save whose weights are in these files, by rank and file as well, and an export of them.
    counts = ("files", "save_pairs", "save_opens", "save_fsyncs", "opens", "fsyncs")
    titles = ("files", "save: ranks x files", "opens", "fsyncs", "export: opens", "fsyncs")
    table = Table(*heads, *rank_0, *titles, title=name)
    for layout, rows in found.items():
        for ranks, row in rows:
            table.add_row(
                layout,
                f"{ranks:,}",
                f"{row['boxes'] / 1e6:.2f} M",
                *(f"{row[key] / 1e6:.2f} MB" for key in ("first", "later", "largest")),
                f"{row['deal']:.2f} s",
                f"{row['memory'] / 1e6:.0f} MB",
                *(f"{row[key]:.2f} s" for key in ("sums", "export_deal")),
                *(f"{row[key]:,}" for key in counts),
            )
    return table


def main(
    models: tuple[str, ...] = tuple(MODELS),
    layouts: tuple[str, ...] = tuple(LAYOUTS),
    ranks: tuple[int, ...] = RANKS,
    json_file: Path | None = None,
) -> None:
    """Print what saves and exports of large models cost in agreements, with the growth in the number of ranks.

    Args:
        models: Which of them.
        layouts: How they are sharded.
        ranks: How many ranks.
        json_file: Also write the figures there.
    """
    console, failed = Console(soft_wrap=True, width=230), []
    everything: dict[str, Any] = {}
    multiprocessing.set_forkserver_preload(["benchmarks.scale"])
    # Two at a time: what is measured are bytes, and seconds of the processor that a row has for itself.
    pool = ThreadPoolExecutor(min(2, os.cpu_count() or 1))
    started, indexes = _started(pool, models, layouts, ranks)
    for name in models:
        found = {
            layout: [(n, row.result()) for (of, by, n), row in started.items() if (of, by) == (name, layout)]
            for layout in layouts
        }
        everything[name] = found
        console.print(_table(name, found))
        for layout, rows in found.items():
            for key, words in _GATES.items():
                exponent = _exponent(rows, key)
                console.print(f"{layout}: {words}, ranks ** {exponent:.2f} (at most {_MAX_EXPONENT})")
                failed += [f"{name}, {layout}: {words}"] if exponent > _MAX_EXPONENT else []
    table = Table("model", "ranks", "boxes", *INDEXES, "making both", "memory", title="index, FSDP")
    for (name, size), index in indexes.items():
        row = everything[name][f"index, {size} ranks"] = index.result()
        sizes = (f"{row[file] / 1e6:.2f} MB" for file in INDEXES)
        seconds, memory = f"{row['making']:.2f} s", f"{row['memory'] / 1e6:.0f} MB"
        table.add_row(name, f"{size:,}", f"{row['boxes'] / 1e6:.2f} M", *sizes, seconds, memory)
    pool.shutdown()
    console.print(table)
    for name in models:
        sized = [(size, index.result()) for (of, size), index in indexes.items() if of == name]
        if len(sized) > 1:
            exponent = _exponent(sized, "memory")
            console.print(f"{name}: memory of the index, ranks ** {exponent:.2f} (at most {_MAX_EXPONENT})")
            failed += [f"{name}: memory of the index"] if exponent > _MAX_EXPONENT else []
    if json_file is not None:
        json_file.write_text(json.dumps(everything, indent=1))
    if failed:
        raise SystemExit("too much: " + "; ".join(failed))


if __name__ == "__main__":
    tyro.cli(main)
