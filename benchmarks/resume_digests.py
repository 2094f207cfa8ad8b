"""What ranks tell each other when digests are compared after a load: real functions, made-up digests.

Each rank's boxes are those of a real sharding, and its digests are random numbers, the same on replicas. A row is
computed in a process of its own, so that its memory is known.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from rich.console import Console
from rich.table import Table

from shardsmith.ground.garbage import without_collection
from shardsmith.sharding.digest_sums import Digested, OwnDigests, RanksSums, TensorList
from shardsmith.sharding.holding import numbered
from shardsmith.tensors.digest import Digest

from .scale import _MAX_EXPONENT, _MOST_RANKS, RANKS, _apart, _exponent, _memory, _nbytes
from .scale_models import COPIES, LAYOUTS, Model, boxes_at, lists_at, llama_405b, separate_experts

MODELS = {"Llama 3.1 405B": llama_405b, "48 x 128 experts, separate": separate_experts}


def held_by_all(model: Model, layout: str, ranks: int) -> list[OwnDigests]:
    """Return what each rank has digested: of the weights, two moments and an average."""
    spots = [LAYOUTS[layout](rank, ranks) for rank in range(ranks)]
    first = OwnDigests.of(
        {
            copy + name: Digested(shape, "float32", boxes := boxes_at(shape, dim, spots[0]), [Digest()] * len(boxes))
            for copy in COPIES
            for name, (shape, dim) in model.items()
        },
        0,
    )
    names = [one.names for one in first.lists]
    kinds = [*dict.fromkeys(model.values())]
    expected, _ = numbered((shape, boxes_at(shape, dim, spots[0])) for shape, dim in kinds)
    random = np.random.default_rng(0).integers(0, 2**63, (len(model) * len(COPIES), 2), np.uint64)
    found = []
    for spot in spots:
        lists = []
        for own, boxes in zip(names, lists_at(kinds, spot, expected), strict=True):
            count = len(own.rows)
            lists.append(TensorList(own, boxes, np.broadcast_to(random[:count], (len(boxes), count, 2))))
        found.append(OwnDigests(lists))
    return found


def measure(name: str, layout: str, ranks: int) -> dict[str, float]:
    """Let made-up ranks compare their digests; bytes and seconds."""
    torch.set_num_threads(1)
    owns = held_by_all(MODELS[name](), layout, ranks)
    hashes = [own.hashes() for own in owns]
    sums = RanksSums()
    with without_collection():
        began = time.process_time()
        asked = sums.ask(hashes)
        asking = time.process_time() - began
        texts: dict[str, str] = {}
        reports, told = [], 0
        for own, wanted in zip(owns, asked, strict=True):
            digests, *rest = own.report(wanted)
            reports.append([texts.setdefault(digests, digests), *rest])  # equal ones are kept once
            told += _nbytes(reports[-1])
        before, began = _memory(), time.process_time()
        found = sums.add_up(reports)
        adding = time.process_time() - began
    assert len(found.digests) == len(MODELS[name]()) * len(COPIES)
    assert not found.differing
    assert not found.not_whole()
    return {
        "boxes": sum(len(one.boxes) * len(one.names.rows) for own in owns for one in own.lists),
        "hashes": sum(map(_nbytes, hashes)) + sum(map(_nbytes, asked)),
        "told": told,
        "asking": asking,
        "adding": adding,
        "memory": _memory() - before,
    }


def main(
    models: tuple[str, ...] = tuple(MODELS),
    layouts: tuple[str, ...] = tuple(LAYOUTS),
    ranks: tuple[int, ...] = RANKS[::2],
    json_file: Path | None = None,
) -> None:
    """Print what it costs to compare digests after a load, with the growth in the number of ranks.

    Args:
        models: Which of them.
        layouts: How they are sharded.
        ranks: How many ranks.
        json_file: Also write the figures there.
    """
    console, failed = Console(soft_wrap=True, width=150), []
    everything: dict[str, Any] = {}
    multiprocessing.set_forkserver_preload(["benchmarks.scale"])
    with ThreadPoolExecutor(min(2, os.cpu_count() or 1)) as pool:  # seconds are those of one process's processor
        for name in models:
            table = Table(
                "sharding", "ranks", "boxes", "hashes", "digests", "rank 0: asking, adding", "memory", title=name
            )
            for layout in layouts:
                # As elsewhere with replicas: more of the experts would take too long.
                sizes = [n for n in ranks if n <= _MOST_RANKS.get((name, "TP 8 x FSDP"), n)]
                rows = [*zip(sizes, pool.map(partial(_apart, measure, name, layout), sizes), strict=True)]
                everything[f"{name}, {layout}"] = rows
                for size, row in rows:
                    table.add_row(
                        layout,
                        f"{size:,}",
                        f"{row['boxes'] / 1e6:.2f} M",
                        *(f"{row[key] / 1e6:.2f} MB" for key in ("hashes", "told")),
                        f"{row['asking']:.2f} s, {row['adding']:.2f} s",
                        f"{row['memory'] / 1e6:.0f} MB",
                    )
                for key in ("hashes", "told"):
                    exponent = _exponent(rows, key)
                    console.print(f"{name}, {layout}: {key}, ranks ** {exponent:.2f} (at most {_MAX_EXPONENT})")
                    failed += [f"{name}, {layout}: {key}"] if exponent > _MAX_EXPONENT else []
            console.print(table)
    if json_file is not None:
        json_file.write_text(json.dumps(everything, indent=1))
    if failed:
        raise SystemExit("too much: " + "; ".join(failed))


if __name__ == "__main__":
    tyro.cli(main)
