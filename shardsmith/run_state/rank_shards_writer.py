"""Write a checkpoint as safetensors files, two a rank: no process group, no collective, no whole tensor."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor
from torch.distributed.checkpoint._nested_dict import flatten_state_dict

from shardsmith.formats.dcp.index import DcpEntry, DcpIndex, StoredChunk
from shardsmith.formats.describe import Measured, describe
from shardsmith.formats.rank_shards import HEADER_KEY, Part, file_name, pack_object
from shardsmith.formats.safetensors_files.header import PT_METADATA, build_header, place_tensors
from shardsmith.ground import layout
from shardsmith.ground.commit import AnyAttempt, attempt_directory, begin_attempt, writing
from shardsmith.ground.memory import memory_of
from shardsmith.ground.new_file import new_file
from shardsmith.ground.ranks import Ranks
from shardsmith.manifest.metadata import FileRecord
from shardsmith.run_state.contents import Contents
from shardsmith.sharding.assignment import Held, assign_boxes
from shardsmith.sharding.local_boxes import local_boxes
from shardsmith.tensors.checkpoint_keys import NOT_A_MODEL
from shardsmith.tensors.digest import digest_box
from shardsmith.tensors.dtypes import dtype_name
from shardsmith.tensors.tensors import Chunk, TensorSpec

log = logging.getLogger(__name__)

Values = dict[Held, Tensor]
"""Key and box -> values, on this rank."""


def save_rank_shards(target: Path, collect: Callable[[], Contents], ranks: Ranks) -> Path:
    """Save what ``collect`` gives on every rank. All ranks; communicates through the store. Returns when committed.

    Of replicas one rank writes. As with any save of ours, nothing is visible before all of it is on disk.

    Raises:
        RankFailedError: on all ranks, if it failed on any. Nothing was published. With one rank, the original error.
    """
    save = _Save(target, ranks)
    mine = save.deal(collect)
    try:
        save.make_directory()
        # `gather` ends when every rank has written and synced its files.
        receipts = ranks.gather(f"writing {target.name}", lambda: save.write(mine), large=True)
        ranks.lead(f"committing {target.name}", lambda: save.commit(receipts))
    except BaseException:
        save.abandon()
        raise
    log.info("saved %s", target)
    return target


class _Save:
    def __init__(self, target: Path, ranks: Ranks) -> None:
        self._target = target
        self._ranks = ranks
        self._attempt: AnyAttempt | None = None
        self._id = ""
        self._contents: Contents
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._objects: set[str] = set()

    def deal(self, collect: Callable[[], Contents]) -> Values:
        """Return what this rank is to write; every element of every tensor is written by exactly one."""
        values: Values = {}
        empty: Values = {}

        def look() -> list[Any]:
            self._contents = collect()
            tensors = dict(_flattened(self._contents.state_dict, self._objects))
            self._shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
            for key, tensor in tensors.items():
                values.update({(key, box): held for box, held in local_boxes(tensor)})
                # It has no box that a rank could hold; rank 0 writes it.
                if 0 in tensor.shape:
                    empty[key, Chunk.whole(tuple(tensor.shape))] = torch.empty(
                        tensor.shape, dtype=tensor.dtype, device="cpu"
                    )
            specs = {key: [list(tensor.shape), tensor.dtype.itemsize] for key, tensor in tensors.items()}
            return [specs, [(key, box.offsets, box.sizes) for key, box in values]]

        # Of replicas one rank writes; which one, rank 0 decides for all.
        dealt = self._ranks.agree(f"collecting {self._target.name}", look, _deal, large=True)[self._ranks.rank]
        chosen = {(key, Chunk(tuple(offsets), tuple(sizes))) for key, offsets, sizes in dealt}
        mine = {held: tensor for held, tensor in values.items() if held in chosen}
        return mine | empty if self._ranks.is_leader else mine

    def make_directory(self) -> None:
        self._id = self._ranks.lead(f"making the directory for {self._target.name}", self._make_directory)

    def write(self, mine: Values) -> dict[str, Any]:
        """Write this rank's two files; what the others need to know of it."""
        measured = Measured()
        directory = attempt_directory(self._target, self._id)
        for kind in ("weights", "state"):
            held = {h: tensor for h, tensor in mine.items() if _kind(h[0]) == kind}
            name = file_name(kind, self._ranks.rank)
            parts = [Part(key, box, self._shapes[key], key in self._objects) for key, box in held]
            measured.files[name] = _write_file(directory / name, parts, list(held.values()), measured)
        boxes = [[key, list(box.offsets), list(box.sizes)] for key, box in mine]
        dtypes = {key: dtype_name(tensor.dtype) for (key, _), tensor in mine.items()}
        shapes = {key: list(self._shapes[key]) for key in dtypes}
        return {
            **measured.to_plain(),
            "tied": self._contents.tied,
            "boxes": boxes,
            "dtypes": dtypes,
            "shapes": shapes,
        }

    def commit(self, receipts: list[dict[str, Any]]) -> None:
        assert self._attempt is not None
        directory = self._attempt.directory
        measured = Measured.merge(receipts)
        for name, content in self._contents.files.items():
            size = self._attempt.write(name, content)
            measured.files[name] = FileRecord(size=size, xxh3_128=xxhash.xxh3_128_hexdigest(content))
        metadata = describe(
            _index(directory, receipts),
            measured,
            attempt=self._id,
            step=self._contents.step,
            ema=self._contents.ema,
            tied={alias: kept for receipt in receipts for alias, kept in receipt["tied"].items()},
            world_size=self._ranks.size,
            mesh=self._contents.mesh,
        )
        sizes = {name: record.size for name, record in measured.files.items()}
        sizes[layout.METADATA_FILE] = self._attempt.write(layout.METADATA_FILE, metadata.to_json())
        self._attempt.commit(sizes)

    def abandon(self) -> None:
        if self._attempt is not None:
            self._attempt.abandon()

    def _make_directory(self) -> str:
        self._attempt = begin_attempt(self._target)
        return self._attempt.id


def _flattened(state: dict[str, Any], objects: set[str]) -> Iterator[tuple[str, Tensor]]:
    """Every tensor by the key that it has in a DCP directory; what is no tensor is packed, and its key noted."""
    for key, value in flatten_state_dict(state)[0].items():
        if not isinstance(value, Tensor):
            objects.add(key)
            value = pack_object(value)
        yield key, value


def _deal(said: Sequence[Any]) -> list[list[Any]]:
    """For each rank the boxes that it is to write. Raises RanksDisagreeError if they do not make up whole tensors."""
    # Reversed, so that of several ranks the lowest one's word counts.
    specs = {key: spec for rank_specs, _ in reversed(said) for key, spec in rank_specs.items()}
    held = [[(key, Chunk(tuple(offsets), tuple(sizes))) for key, offsets, sizes in boxes] for _, boxes in said]
    shapes = {key: tuple(shape) for key, (shape, _) in specs.items()}
    dealt = assign_boxes(held, shapes, {key: itemsize for key, (_, itemsize) in specs.items()})
    return [[[key, list(box.offsets), list(box.sizes)] for key, box in boxes] for boxes in dealt]


def _kind(key: str) -> str:
    """Main weights and average, or what is needed to go on."""
    first = key.split(".", 1)[0]
    return "weights" if first == "ema_model" or first not in NOT_A_MODEL else "state"


def _write_file(path: Path, parts: Sequence[Part], values: Sequence[Tensor], measured: Measured) -> FileRecord:
    """Write and fsync one file. Tensors are numbered in it; its header says what they are. Raises WriteError."""
    specs = [
        TensorSpec(str(i), part.box.sizes, held.dtype) for i, (part, held) in enumerate(zip(parts, values, strict=True))
    ]
    says = {HEADER_KEY: json.dumps({str(i): part.to_plain() for i, part in enumerate(parts)})}
    header = build_header(specs, {**PT_METADATA, **says})
    placed = place_tensors(specs, len(header))
    size = max((one.end for one in placed.values()), default=len(header))
    digest = xxhash.xxh3_128(header)
    with writing(path, "write"), contextlib.closing(new_file(path, size)) as file:
        file.write(memoryview(header))
        # Front to back, as they lie in the file: an object store takes nothing else.
        for i in map(int, placed):
            # One after the other, so that the host has one of them at a time; held until its memory is written.
            held = values[i].detach().resolve_conj().resolve_neg().cpu().contiguous()
            measured.add(parts[i].key, digest_box(held, parts[i].box, parts[i].shape))
            digest.update(memory_of(held))
            file.write(memory_of(held))
        file.finish()
    return FileRecord(size=size, xxh3_128=digest.hexdigest())


def _index(directory: Path, receipts: Sequence[Mapping[str, Any]]) -> DcpIndex:
    """What the files hold together, in the words of an index."""
    tensors: dict[str, DcpEntry] = {}
    for receipt in receipts:
        for key, offsets, sizes in receipt["boxes"]:
            spec = TensorSpec(key, tuple(receipt["shapes"][key]), getattr(torch, receipt["dtypes"][key]))
            # Where a box lies within its file is not asked here.
            chunk = StoredChunk(Chunk(tuple(offsets), tuple(sizes)), directory.name, 0, 0)
            tensors[key] = DcpEntry(spec, (*(tensors[key].chunks if key in tensors else ()), chunk))
    return DcpIndex(directory, tensors, {}, {key: (key,) for key in tensors}, {})
