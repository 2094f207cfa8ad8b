"""``.metadata`` is what torch's own objects are when they are pickled, byte for byte, though none of them is made."""

from __future__ import annotations

import pickle
import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from shardsmith.formats.dcp import index_pickle_writer
from shardsmith.formats.dcp.cuts import Cuts, CutTensor
from shardsmith.formats.dcp.index_pickle_writer import write_index
from shardsmith.formats.dcp.shard_files import Place
from shardsmith.tensors.checkpoint_keys import KeyPath
from shardsmith.tensors.tensors import Chunk, Shape
from tests.torch_index import torch_index

DTYPES = [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.float8_e4m3fn]
SHARED = ("a", "path", 3)
"""A path of several keys, the same object."""
NUMBERS = (0, 1, 255, 256, 65535, 65536, (1 << 31) - 1, 1 << 31, 1 << 40, 1 << 47)


def random_tensor(cuts: Cuts, files: int, chance: random.Random) -> CutTensor:
    """Boxes are made up: some are alike, and some are empty at the place of others."""
    ndim, count = chance.choice([0, 1, 2, 2, 2, 3, 4, 5]), chance.choice([1, 1, 2, 3, 8, 8, 40])
    shape = tuple(chance.choice(NUMBERS) for _ in range(ndim))
    seeds = random.Random(f"{shape} {count} {chance.randrange(2)}")
    boxes = [
        Chunk(tuple(seeds.choice(NUMBERS) for _ in shape), tuple(seeds.choice(NUMBERS) for _ in shape))
        for _ in range(count)
    ]
    numbers = np.array([cuts.number(box) for box in boxes])
    lengths = np.array([seeds.choice(NUMBERS) for _ in boxes])
    cut = cuts.cut(seeds.choice(DTYPES), shape, numbers, lengths)
    offsets = np.array([chance.choice(NUMBERS) for _ in boxes])
    return CutTensor(cut, np.array([chance.randrange(files) for _ in boxes]), offsets)


def whole(cuts: Cuts, shape: Shape, count: int) -> CutTensor:
    """A tensor of so many rows, each a box."""
    numbers = np.array([cuts.number(Chunk((i, 0), (1, shape[1]))) for i in range(count)])
    cut = cuts.cut(torch.float32, shape, numbers, np.full(count, 640))
    return CutTensor(cut, np.zeros(count, dtype=np.int64), np.arange(count) * 640)


Content = tuple[dict[str, CutTensor], dict[str, KeyPath], dict[str, Place]]
"""Tensors, paths and objects."""


def random_contents(seeds: range) -> Iterator[Content]:
    for seed in seeds:
        chance, cuts = random.Random(seed), Cuts()
        tensors = {f"layers.{i}.w": random_tensor(cuts, 3, chance) for i in range(chance.choice([1, 5, 300]))}
        keys = [f"rng.{i}.{chance.choice(['s', 'é', 'x' * 300])}" for i in range(chance.choice([0, 1, 7, 300]))]
        objects = {key: Place(f"__{len(key) % 3}_0.distcp", chance.choice(NUMBERS), 640) for key in keys}
        paths: dict[str, KeyPath] = {}
        for key in (*tensors, *objects):
            parts = key.split(".")
            paths[key] = chance.choice([SHARED, (key,), (parts[0], ".".join(parts[1:])), (*parts, "x")])
        yield tensors, paths, objects


def contents_of_whole_batches() -> Iterator[Content]:
    """Python's pickler adds 1000 items at once, and one by itself."""
    for count in (1, 2, 1000, 1001, 2000):
        cuts = Cuts()
        yield {"w": whole(cuts, (count, 4), count)}, {}, {}
        yield {f"w{i}": whole(cuts, (1, 4), 1) for i in range(count)}, {}, {}
        yield {}, {}, {f"v{i}": Place("__0_0.distcp", 64 * i, 64) for i in range(count)}
    yield {}, {}, {}


@pytest.mark.parametrize(
    "contents", [random_contents(range(20)), contents_of_whole_batches()], ids=["random", "batches"]
)
def test_the_index_is_what_torch_s_objects_are_when_pickled(contents: Iterator[Content]) -> None:
    assert_as_torch(contents)


def test_so_it_is_if_what_is_alike_is_forgotten_in_between(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_pickle_writer, "_MOST_ALIKE", 20)
    assert_as_torch(random_contents(range(8)))


def assert_as_torch(contents: Iterator[Content]) -> None:
    files = [f"__{i}_0.distcp" for i in range(3)]
    for tensors, paths, objects in contents:
        found = b"".join(write_index(tensors, files=files, containers=paths, attempt="f" * 16, objects=objects))
        assert found == torch_index(tensors, files, paths, "f" * 16, objects)


def test_a_large_index_is_made_in_parts_between_which_other_threads_run() -> None:
    cuts, count = Cuts(), 5000
    tensors = {f"layers.{i}.weight": whole(cuts, (1, 4), 1) for i in range(count)}
    parts = [*write_index(tensors, files=["__0_0.distcp"], containers={}, attempt="0" * 16, objects={})]
    assert max(map(len, parts)) < 2 * 65536 < sum(map(len, parts))
    index = pickle.loads(b"".join(parts))
    assert list(index.state_dict_metadata) == [*tensors]
