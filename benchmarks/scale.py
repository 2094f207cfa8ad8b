"""What ranks tell each other in saves of models too large for this machine: real functions, made-up shards.

No tensor is made: each rank's boxes are those of FSDP, and agreement, receipts and index are what a save makes of them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import tyro
from rich.console import Console
from rich.table import Table

from shardsmith.formats.dcp.rank_file import RankFileWritten, encode
from shardsmith.ground import ranks as ground_ranks
from shardsmith.ground.garbage import without_collection
from shardsmith.ground.layout import DCP_INDEX_FILE
from shardsmith.manifest.metadata import FileRecord
from shardsmith.run_state.held import Entry
from shardsmith.run_state.share import Share
from shardsmith.run_state.whole_directory import OwnFile, to_receipt
from shardsmith.tensors.digest import Digest
from shardsmith.tensors.tensors import Chunk, Shape

_COPIES = ("", "optimizer.state.", "optimizer.second.", "ema_model.")
_MAX_EXPONENT = 1.1
_PREDICTED = (1024, 4096, 16384)


def llama_405b() -> dict[str, Shape]:
    """Return the shapes of Llama 3.1 405B."""
    hidden, inner, cached, words = 16384, 53248, 1024, 128256
    shapes: dict[str, Shape] = {"tok_embeddings.weight": (words, hidden), "norm.weight": (hidden,)}
    shapes["output.weight"] = (words, hidden)
    for layer in range(126):
        own = {
            "attention.wq": (hidden, hidden),
            "attention.wk": (cached, hidden),
            "attention.wv": (cached, hidden),
            "attention.wo": (hidden, hidden),
            "feed_forward.w1": (inner, hidden),
            "feed_forward.w2": (hidden, inner),
            "feed_forward.w3": (inner, hidden),
            "attention_norm": (hidden,),
            "ffn_norm": (hidden,),
        }
        shapes |= {f"layers.{layer}.{name}.weight": shape for name, shape in own.items()}
    return shapes


def separate_experts() -> dict[str, Shape]:
    """Return the shapes of a model of 48 layers with 128 experts, each of three tensors."""
    shapes: dict[str, Shape] = {"embed.weight": (151936, 2048), "lm_head.weight": (151936, 2048)}
    for layer in range(48):
        for expert in range(128):
            for name, shape in {"gate": (768, 2048), "up": (768, 2048), "down": (2048, 768)}.items():
                shapes[f"layers.{layer}.mlp.experts.{expert}.{name}_proj.weight"] = shape
    return shapes


MODELS = {"Llama 405B": (llama_405b, (8, 32, 128)), "48 x 128 separate experts": (separate_experts, (2, 4))}
"""What makes the shapes of each, and the numbers of ranks that are measured."""


def entries_of(shapes: dict[str, Shape], rank: int, ranks: int) -> list[Entry]:
    """Return what a rank holds under FSDP: of each tensor its rows, four times over."""
    found = []
    for copy in _COPIES:
        for name, shape in shapes.items():
            rows = -(-shape[0] // ranks)
            begin, end = min(rank * rows, shape[0]), min((rank + 1) * rows, shape[0])
            box = Chunk((begin, *(0 for _ in shape[1:])), (end - begin, *shape[1:]))
            boxes = (box,) if end > begin else ()
            path = tuple(part for part in (copy.split(".", 1)[0], copy.partition(".")[2] + name) if part)
            found.append(Entry(copy + name, path, shape, torch.float32, boxes))
    return found


def boxes_in_all(shapes: dict[str, Shape], ranks: int) -> int:
    """Return how many boxes all ranks hold together, exactly."""
    return len(_COPIES) * sum(-(-shape[0] // -(-shape[0] // ranks)) for shape in shapes.values())


def measure(shapes: dict[str, Shape], ranks: int) -> dict[str, float]:
    """Let made-up ranks agree on a first save and report a later one; bytes and processor seconds."""
    held = [entries_of(shapes, rank, ranks) for rank in range(ranks)]
    shares = [Share(rank) for rank in range(ranks)]
    for share, entries in zip(shares, held, strict=True):
        share.vote(entries)
    reports = [share.report(entries, [0]) for share, entries in zip(shares, held, strict=True)]
    said = [_nbytes(report) for report in reports]
    began = time.process_time()
    with without_collection():
        dealt = shares[0].settle(reports, [])
    dealing = time.process_time() - began
    for share, entries, own in zip(shares, held, dealt, strict=True):
        share.accept(entries, own)
    receipts = [_receipt(share.own) for share in shares]
    steady = [_nbytes(receipt) for receipt in receipts]
    began = time.process_time()
    shares[0].whole.measured(receipts)
    merging = time.process_time() - began
    began = time.process_time()
    index = shares[0].whole.indexes(receipts, "0" * 16)[DCP_INDEX_FILE]
    first = time.process_time() - began
    began = time.process_time()
    shares[0].whole.indexes(receipts, "1" * 16)
    return {
        "boxes": sum(len(entry.boxes) for entries in held for entry in entries),
        "first": sum(said) + sum(map(_nbytes, dealt)),
        "steady": sum(steady),
        "largest": max(*said, *steady),
        "deal": dealing,
        "merge": merging,
        "index": len(index),
        "index_first": first,
        "index_later": time.process_time() - began,
    }


def _receipt(own: OwnFile) -> dict[str, Any]:
    """As of a rank that has written its file; digests are numbers like any other, but do not compress."""
    record = FileRecord(size=1, xxh3_128="0" * 32)
    digests = [Digest(hash((piece.key, 1)) % 2**64, hash((piece.key, 2)) % 2**64) for piece in own.pieces]
    return to_receipt(RankFileWritten(record, digests, [len(encode(0)) for _ in own.file.objects]))


def _nbytes(value: Any) -> int:
    return len(ground_ranks._Outcome("", value).encode())


def _exponent(sizes: Sequence[int], values: Sequence[float]) -> float:
    """Of the power of the number of ranks by which values grow, between the first and the last."""
    return math.log(values[-1] / values[0]) / math.log(sizes[-1] / sizes[0])


def _rows(shapes: dict[str, Shape], sizes: Sequence[int]) -> Iterator[tuple[str, dict[str, float]]]:
    found: dict[str, float] = {}
    for ranks in sizes:
        found = measure(shapes, ranks)
        yield f"{ranks}", found
    for ranks in _PREDICTED:
        factor = boxes_in_all(shapes, ranks) / found["boxes"]
        yield f"{ranks}, predicted", {key: value * (1 if key == "largest" else factor) for key, value in found.items()}


def main(models: tuple[str, ...] = tuple(MODELS), json_file: Path | None = None) -> None:
    """Print what saves of large models cost in agreements and in the index, with its growth in the number of ranks.

    What cannot be measured here is predicted from the number of boxes, which is exact, and said to be.

    Args:
        models: Which of them.
        json_file: Also write the figures there.
    """
    import json

    console, failed = Console(soft_wrap=True, width=150), []
    everything: dict[str, Any] = {}
    for name in models:
        make, sizes = MODELS[name]
        shapes = make()
        rows = dict(_rows(shapes, sizes))
        everything[name] = rows
        heads = ("ranks", "boxes", "sent before the first save", "sent in each later save", "longest message")
        rank_0 = ("rank 0: who writes what", "rank 0: sums")
        table = Table(*heads, *rank_0, "index", "making it", "patching it", title=name)
        for label, row in rows.items():
            table.add_row(
                label,
                f"{row['boxes'] / 1e6:.2f} M",
                *(f"{row[key] / 1e6:.1f} MB" for key in ("first", "steady", "largest")),
                *(f"{row[key]:.2f} s" for key in ("deal", "merge")),
                f"{row['index'] / 1e6:.0f} MB",
                *(f"{row[key]:.2f} s" for key in ("index_first", "index_later")),
            )
        console.print(table)
        for key, words in {"first": "before the first save", "steady": "in each later save"}.items():
            exponent = _exponent(sizes, [rows[str(size)][key] for size in sizes])
            console.print(f"bytes said {words} grow with ranks ** {exponent:.2f} (at most {_MAX_EXPONENT})")
            failed += [f"{name}: {words}"] if exponent > _MAX_EXPONENT else []
    if json_file is not None:
        json_file.write_text(json.dumps(everything, indent=1))
    if failed:
        raise SystemExit("too much: " + "; ".join(failed))


if __name__ == "__main__":
    tyro.cli(main)
