"""``.boxes`` says what ``.metadata`` says, in bytes that do not grow with the ranks; what is wrong in it is found."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import struct
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash

from shardsmith.errors import (
    CheckpointError,
    CorruptCheckpointError,
    IncompleteCheckpointError,
    UnsafeCheckpointError,
    UnsupportedFormatError,
)
from shardsmith.formats.dcp import box_index, box_index_writer, index_pickle_writer
from shardsmith.formats.dcp.box_grid import GridBoxes
from shardsmith.formats.dcp.box_index import BoxIndex, load_index
from shardsmith.formats.dcp.box_index_writer import PREFIX, rank_file_name
from shardsmith.formats.dcp.cuts import Cuts
from shardsmith.formats.dcp.index_writer import write_indexes
from shardsmith.formats.dcp.rank_file import Piece, RankFile
from shardsmith.formats.dcp.source import DcpSource
from shardsmith.ground.layout import BOX_INDEX_FILE, DCP_INDEX_FILE, METADATA_FILE
from shardsmith.ground.mapped import MappedFile
from shardsmith.manifest.metadata import CheckpointMetadata, FileRecord, read_metadata
from shardsmith.tensors.tensors import Chunk, read_tensor
from tests.box_indexes import assert_same_boxes, content_of, forgetful
from tests.golden_checkpoint import BOXES
from tests.tensor_cases import raw_bytes

DTYPES = [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.float8_e4m3fn]
OBJECT_BYTES = 640


def cut(n: int, into: int, kind: str, chance: random.Random) -> list[int]:
    """Sizes along one dimension: as FSDP cuts, as evenly as can be, or at random."""
    if kind == "fsdp":
        part = -(-n // into)
        sizes = [min(n, (i + 1) * part) - min(n, i * part) for i in range(into)]
    elif kind == "even":
        sizes = [n // into + (i < n % into) for i in range(into)]
    else:
        ends = sorted(chance.randint(0, n) for _ in range(into - 1))
        sizes = [b - a for a, b in zip([0, *ends], [*ends, n], strict=True)]
    return sizes


def grid(shape: Sequence[int], kind: str, chance: random.Random) -> list[Chunk]:
    """Boxes of a tensor, some of them empty."""
    boxes: list[tuple[tuple[int, ...], tuple[int, ...]]] = [((), ())]
    for n in shape:
        sizes = cut(n, chance.choice([1, 1, 2, 3, 8]), kind, chance)
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        boxes = [((*a, start), (*b, size)) for a, b in boxes for start, size in zip(starts, sizes, strict=True)]
    return [Chunk(*box) for box in boxes]


def halves(shape: tuple[int, ...], chance: random.Random) -> list[Chunk]:
    """Boxes that are no grid: each is cut in two somewhere, some times over."""
    boxes = [Chunk.whole(shape)]
    for _ in range(chance.randint(2, 9)):
        box = boxes.pop(chance.randrange(len(boxes)))
        dim = chance.randrange(len(shape))
        at = chance.randint(0, box.sizes[dim])
        for start, size in ((0, at), (at, box.sizes[dim] - at)):
            offsets = [*box.offsets[:dim], box.offsets[dim] + start, *box.offsets[dim + 1 :]]
            boxes.append(Chunk(tuple(offsets), (*box.sizes[:dim], size, *box.sizes[dim + 1 :])))
    return boxes


def numel(box: Chunk) -> int:
    return box.numel


def pieces_of(seed: int) -> Iterator[Piece]:
    chance = random.Random(seed)
    yield Piece("none.w", (0, 3), torch.float32, Chunk.whole((0, 3)))
    for i in range(12):
        shape = tuple(chance.choice([1, 2, 5, 8, 64]) for _ in range(chance.randint(0, 3)))
        kind = chance.choice(["fsdp", "fsdp", "even", "random", "no grid"])
        boxes = halves(shape, chance) if kind == "no grid" and shape else grid(shape, kind, chance)
        for box in filter(numel, boxes):  # a rank writes nothing of empty ones
            yield Piece(f"layers.{i}.w", shape, DTYPES[i % len(DTYPES)], box)
            # What is cut up as another one is: the optimizer has tensors of the same boxes, perhaps of another dtype.
            yield Piece(f"state.{i}.w", shape, DTYPES[i % len(DTYPES)], box)
            yield Piece(f"other.{i}.w", shape, DTYPES[(i + 1) % len(DTYPES)], box)


def write(directory: Path, files: Sequence[RankFile], containers: dict[str, tuple[str | int, ...]]) -> Path:
    """A step without values, and with objects of a certain size."""
    directory.mkdir(parents=True)
    for file in files:
        places = file.places([OBJECT_BYTES] * len(file.objects))
        with (directory / file.name).open("wb") as out:
            out.truncate(max((place.offset + place.length for place in places), default=0))
    tensors, objects = content_of(files, [OBJECT_BYTES])
    indexes = write_indexes(
        tensors,
        files=[file.name for file in files],
        containers=containers,
        attempt="0" * 16,
        objects=objects,
        aliases={"alias.of.w": [*tensors][-1]},
    )
    for name, parts in indexes.items():
        (directory / name).write_bytes(b"".join(parts))
    write_manifest(directory)
    return directory


def write_manifest(directory: Path) -> None:
    files = {}
    for path in directory.iterdir():
        if path.name != METADATA_FILE:
            content = path.read_bytes()
            files[path.name] = FileRecord(size=len(content), xxh3_128=xxhash.xxh3_128_hexdigest(content))
    metadata = CheckpointMetadata(
        attempt="0" * 16,
        step=5,
        created_at="2026-01-02T03:04:05+00:00",
        models=(),
        counts={},
        ema=None,
        tied={},
        world_size=1,
        mesh=None,
        files=files,
        tensors={},
    )
    (directory / METADATA_FILE).write_bytes(metadata.to_json())


def rank_files(
    pieces: Sequence[Piece], ranks: int, objects: Sequence[str], owner: Callable[[int], int]
) -> list[RankFile]:
    found: list[list[Piece]] = [[] for _ in range(ranks)]
    for i, piece in enumerate(pieces):
        found[owner(i)].append(piece)
    return [RankFile(rank_file_name(rank), tuple(mine), tuple(objects[rank::ranks])) for rank, mine in enumerate(found)]


@pytest.mark.parametrize("seed", range(40))
def test_any_boxes_are_read_as_torch_s_index_has_them(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(box_index_writer, "MAX_RUNS", random.Random(seed).choice([0, 1, 3, 64]))
    monkeypatch.setattr(box_index_writer, "MAX_CUTS", random.Random(seed).choice([1, 2, 1024]))
    chance, ranks = random.Random(seed), 8
    owners = [chance.randrange(ranks) if seed % 2 else i % ranks for i in range(100_000)]
    paths: dict[str, tuple[str | int, ...]] = {
        "optimizer.lr": ("optimizer", "lr"),
        "rng.rank-3.torch": ("rng", "rank-3", "torch"),
        "rng.rank-12.torch": ("rng", "rank-12", "torch"),  # of more ranks than files
        "rng.rank-5": ("rng", "rank-5"),
        "rng.shared": ("rng", "shared"),
        "list.0.x": ("list", 0, "x"),
        "a.b.c": ("a.b", "c"),
        "step": ("step",),
    }
    files = rank_files([*pieces_of(seed)], ranks, [*paths], owners.__getitem__)
    assert_same_boxes(write(tmp_path / "step-5", files, paths))


def test_tensors_cut_up_alike_are_written_as_if_each_had_been_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pieces = [replace(piece, key=f"{seed}.{piece.key}") for seed in range(10) for piece in pieces_of(seed)]
    files, looks = rank_files(pieces, 4, [], lambda i: i % 4), Counter[str]()

    def count(owner: Any, name: str) -> None:
        real = getattr(owner, name)

        def counted(*args: Any) -> Any:
            looks[name] += 1
            return real(*args)

        monkeypatch.setattr(owner, name, counted)

    count(box_index_writer, "_layout")
    count(index_pickle_writer._Writer, "_tensor")
    count(index_pickle_writer._Writer, "_fixed_parts")
    remembered = write(tmp_path / "step-5", files, {})
    few = Counter(looks)
    looks.clear()
    monkeypatch.setattr(Cuts, "__init__", forgetful)
    for name in (BOX_INDEX_FILE, DCP_INDEX_FILE):
        forgotten = write(tmp_path / f"without {name}", files, {})
        assert (forgotten / name).read_bytes() == (remembered / name).read_bytes()
    for name, times in looks.items():
        assert few[name] < times / 2 * 0.7, name


def fsdp(ranks: int) -> list[RankFile]:
    """Tensors of which some have fewer rows than there are ranks; scalars, and what each rank has for itself."""
    shapes = {f"layers.{i}.w{n}": (n, 16) for i in range(20) for n in (4096, 1000, 7)}
    files = []
    for rank in range(ranks):
        pieces = []
        for key, (rows, width) in shapes.items():
            part = -(-rows // ranks)
            begin, end = min(rows, rank * part), min(rows, (rank + 1) * part)
            if end > begin:
                pieces.append(Piece(key, (rows, width), torch.float32, Chunk((begin, 0), (end - begin, width))))
        if rank == ranks - 1:
            pieces += [Piece(f"{key}.step", (), torch.float32, Chunk((), ())) for key in shapes]
        files.append(RankFile(rank_file_name(rank), tuple(pieces), (f"rng.rank-{rank}.state",)))
    return files


def paths_of(ranks: int) -> dict[str, tuple[str | int, ...]]:
    return {f"rng.rank-{rank}.state": ("rng", f"rank-{rank}", "state") for rank in range(ranks)}


class Reads:
    """Counts what is read of ``.boxes``."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.nbytes = self.count = 0
        read = MappedFile.bytes

        def counted(file: MappedFile, offset: int, length: int) -> bytes:
            self.nbytes, self.count = self.nbytes + length, self.count + 1
            return read(file, offset, length)

        monkeypatch.setattr(MappedFile, "bytes", counted)


def test_what_a_rank_reads_does_not_grow_with_the_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {}
    for ranks in (16, 256):
        directory = write(tmp_path / f"step-{ranks}", fsdp(ranks), paths_of(ranks))
        with monkeypatch.context() as patched:
            reads = Reads(patched)
            with contextlib.closing(load_index(directory)) as index:
                for key in (f"layers.{i}.w{n}" for i in range(20) for n in (4096, 1000, 7)):
                    entry = index.tensors[key]
                    assert isinstance(entry.chunks, GridBoxes)
                    rows = -(-entry.spec.shape[0] // ranks)
                    own = Chunk((rows, 0), (min(rows, entry.spec.shape[0] - rows), 16))
                    assert [entry.chunks[i].file for i, _ in entry.chunks.meeting(own)] == ["__1_0.distcp"], key
                assert index.objects["rng.rank-1.state"].file == "__1_0.distcp"
            found[ranks] = reads.nbytes, reads.count
    assert found[256][1] == found[16][1]
    assert found[256][0] < 1.1 * found[16][0]


def parts_of(data: bytes) -> tuple[dict[str, Any], bytes]:
    """Head and body of ``.boxes``."""
    _, length, _ = PREFIX.unpack_from(data)
    return json.loads(data[PREFIX.size : PREFIX.size + length]), data[PREFIX.size + length :]


def joined(head: dict[str, Any], body: bytes) -> bytes:
    text = json.dumps(head).encode()
    return PREFIX.pack(box_index_writer.MAGIC, len(text), xxhash.xxh3_128_digest(text)) + text + body


@dataclass
class Block:
    """What is edited."""

    text: dict[str, Any]
    rows: list[list[int]]
    runs: list[list[int]]


def with_block(data: bytes, edit: Callable[[Block], object]) -> bytes:
    """The same with another block of flat keys, whose hashes are right: its texts, rows and runs are edited."""
    head, body = parts_of(data)
    at, stored, raw, _ = head["blocks"][""]
    block = body[at : at + stored] if stored == raw else zlib.decompress(body[at : at + stored])
    (length,) = struct.unpack_from("<Q", block)
    text = json.loads(block[8 : 8 + length])
    numbers = [n for (n,) in struct.iter_unpack("<q", block[8 + length :])]
    ends = 4 * len(text["names"])
    rows = [numbers[i : i + 4] for i in range(0, ends, 4)]
    runs = [numbers[i : i + 5] for i in range(ends, len(numbers), 5)]
    edit(Block(text, rows, runs))
    new = json.dumps(text).encode()
    flat = [n for row in (*rows, *runs) for n in row]
    again = struct.pack("<Q", len(new)) + new + struct.pack(f"<{len(flat)}q", *flat)
    head["blocks"][""] = [len(body), len(again), len(again), xxhash.xxh3_128_hexdigest(again)]
    return joined(head, body + again)


def with_head(data: bytes, edit: Callable[[dict[str, Any]], object]) -> bytes:
    head, body = parts_of(data)
    edit(head)
    return joined(head, body)


@pytest.fixture
def step(tmp_path: Path) -> Path:
    """A copy to damage: embed.weight, layer.weight and so on, from two ranks."""
    return Path(shutil.copytree(BOXES, tmp_path / "step-3"))


def damage(step: Path, content: bytes) -> None:
    """Replace ``.boxes``, and list it in the manifest as if it were right."""
    (step / BOX_INDEX_FILE).write_bytes(content)
    record = FileRecord(size=len(content), xxh3_128=xxhash.xxh3_128_hexdigest(content))
    metadata = read_metadata(step)
    (step / METADATA_FILE).write_bytes(replace(metadata, files={**metadata.files, BOX_INDEX_FILE: record}).to_json())


def read_all(step: Path) -> dict[str, bytes]:
    """All tensors, found as a load finds them, with the objects and paths of the index."""
    with contextlib.closing(DcpSource(step, to_load=True)) as source:
        assert isinstance(source.index, BoxIndex)
        assert dict(source.index.objects).keys() | source.specs.keys() == dict(source.index.containers).keys()
        return {name: raw_bytes(read_tensor(source, name)) for name in source.specs}


def test_every_flipped_byte_is_found_or_changes_nothing(step: Path) -> None:
    good, expected = (step / BOX_INDEX_FILE).read_bytes(), read_all(step)
    for at in range(len(good)):
        damage(step, good[:at] + bytes([good[at] ^ 1 << at % 8]) + good[at + 1 :])
        with contextlib.suppress(CheckpointError):
            assert read_all(step) == expected


@pytest.mark.parametrize("keep", [0, 7, 31, 100, -1])
def test_one_that_is_cut_off_is_refused(step: Path, keep: int) -> None:
    damage(step, (step / BOX_INDEX_FILE).read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=BOX_INDEX_FILE):
        read_all(step)


HUGE = 1 << 62
BLOCKS: dict[str, Callable[[Block], object]] = {
    "no such layout": lambda b: b.rows[0].__setitem__(1, 99),
    "no such run": lambda b: b.rows[0].__setitem__(2, len(b.runs)),
    "a negative run": lambda b: b.rows[0].__setitem__(2, -1),
    "a negative count": lambda b: b.rows[0].__setitem__(3, -1),
    "rows beyond the end": lambda b: b.rows[0].__setitem__(slice(2, 4), [HUGE, 0]),
    "too few boxes": lambda b: [run.__setitem__(0, 1) for run in b.runs],
    "too many boxes": lambda b: [run.__setitem__(0, HUGE) for run in b.runs],
    "no such file": lambda b: [run.__setitem__(1, 2) for run in b.runs],
    "a negative file": lambda b: [run.__setitem__(1, -1) for run in b.runs],
    "a step out of the files": lambda b: [run.__setitem__(2, HUGE) for run in b.runs],
    "a negative offset": lambda b: [run.__setitem__(3, -64) for run in b.runs],
    "an offset beyond the end": lambda b: [run.__setitem__(3, HUGE) for run in b.runs],
    "an offset elsewhere": lambda b: [run.__setitem__(3, 64) for run in b.runs],
    "a huge shape": lambda b: b.text["layouts"].__setitem__(0, ["float32", [HUGE], [[[1, HUGE]]]]),
    "boxes that are huge": lambda b: b.text["layouts"].__setitem__(0, ["float32", [HUGE], [[[HUGE, 1]]]]),
    "a huge list of boxes": lambda b: (
        b.text["layouts"].__setitem__(0, ["float32", [4], None]),
        b.rows[0].__setitem__(3, HUGE),
    ),
    "no boxes": lambda b: (
        b.text["layouts"].__setitem__(0, ["float32", [4], None]),
        b.rows[0].__setitem__(3, 0),
    ),
    "cuts of nothing": lambda b: b.text["layouts"].__setitem__(0, ["float32", [4], [[[0, 5], [4, 1]]]]),
    "cuts of something else": lambda b: b.text["layouts"].__setitem__(0, ["float32", [4], [[[3, 1]]]]),
    "cuts of one dimension": lambda b: b.text["layouts"].__setitem__(0, ["float32", [4, 2], [[[4, 1]]]]),
    "no dtype": lambda b: b.text["layouts"].__setitem__(0, ["Tensor", [4], [[[4, 1]]]]),
    "a thousand dimensions": lambda b: b.text["layouts"].__setitem__(0, ["float32", [1] * 1000, [[[1, 1]]] * 1000]),
    "text for a shape": lambda b: b.text["layouts"].__setitem__(0, ["float32", "44", []]),
    "a name that is a number": lambda b: b.text["names"].__setitem__(0, 5),
    "a name twice": lambda b: b.text["names"].__setitem__(0, b.text["names"][1]),
    "a name less": lambda b: b.text["names"].pop(),
    "runs that are not there": lambda b: b.text.update(runs=HUGE),
    "no such path": lambda b: b.rows[0].__setitem__(0, -9),
    "a list of a billion": lambda b: (b.text.update(paths=[["x", 10**9]]), b.rows[0].__setitem__(0, -1)),
    "an empty path": lambda b: (b.text.update(paths=[[]]), b.rows[0].__setitem__(0, -1)),
    "nested too deep": lambda b: b.text.update(layouts=json.loads("[" * 900 + "]" * 900)),
}


@pytest.mark.parametrize("edit", BLOCKS.values(), ids=BLOCKS)
def test_entries_that_make_no_sense_are_refused(step: Path, edit: Callable[..., object]) -> None:
    damage(step, with_block((step / BOX_INDEX_FILE).read_bytes(), edit))
    with pytest.raises(CheckpointError):
        read_all(step)


HEADS: dict[str, tuple[Callable[[dict[str, Any]], object], type[CheckpointError]]] = {
    "a later version": (lambda head: head.update(version=2), UnsupportedFormatError),
    "files elsewhere": (lambda head: head.update(files=["../a", "/etc/passwd"]), UnsafeCheckpointError),
    "files that are numbers": (lambda head: head.update(files=[1, 2]), CorruptCheckpointError),
    "fewer than no files": (lambda head: head.update(files=-1), CorruptCheckpointError),
    "other files": (lambda head: head.update(files=["__7_0.distcp", "__8_0.distcp"]), IncompleteCheckpointError),
    "no blocks": (lambda head: head.pop("blocks"), CorruptCheckpointError),
    "a block that is text": (lambda head: head["blocks"].update({"": "x"}), CorruptCheckpointError),
    "a block beyond the end": (lambda head: head["blocks"][""].__setitem__(0, HUGE), CheckpointError),
    "a bomb": (lambda head: head["blocks"][""].__setitem__(2, 1 << 29), CorruptCheckpointError),
    "one that is larger than it says": (lambda head: head["blocks"][""].__setitem__(2, 10), CorruptCheckpointError),
    "ranks beyond the end": (lambda head: head["ranks"].update(embed=HUGE), CheckpointError),
}


@pytest.mark.parametrize(("edit", "error"), HEADS.values(), ids=HEADS)
def test_a_head_that_makes_no_sense_is_refused(
    step: Path, edit: Callable[[dict[str, Any]], object], error: type[CheckpointError]
) -> None:
    damage(step, with_head((step / BOX_INDEX_FILE).read_bytes(), edit))
    with pytest.raises(error):
        read_all(step)


def test_a_shard_that_is_cut_off_is_incomplete_for_those_who_want_it(step: Path) -> None:
    with contextlib.closing(DcpSource(step, to_load=True)) as source:
        (step / "__1_0.distcp").unlink()
        assert read_tensor(source, "mask").shape == (2, 5)
        with pytest.raises(IncompleteCheckpointError, match=r"embed.*__1_0\.distcp is missing"):
            read_tensor(source, "embed.weight")


def test_one_of_another_size_than_the_manifest_says_is_refused(step: Path) -> None:
    with (step / BOX_INDEX_FILE).open("ab") as file:
        file.write(b"x")
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(CorruptCheckpointError, match="expected") as caught:
        load_index(step)
    assert caught.tb is not None, "what it has of the file is closed all the same"
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("name", [BOX_INDEX_FILE, METADATA_FILE])
def test_without_it_or_a_manifest_that_lists_it_the_index_of_torch_is_read(step: Path, name: str) -> None:
    (step / name).unlink()
    index = load_index(step)
    assert not isinstance(index, BoxIndex)
    assert "embed.weight" in index.tensors


def test_it_stands_alone(step: Path) -> None:
    expected = read_all(step)
    (step / DCP_INDEX_FILE).unlink()
    box_index._known_blocks.cache_clear()
    assert read_all(step) == expected
