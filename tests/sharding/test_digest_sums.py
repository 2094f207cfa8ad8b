"""Digests of boxes add up to those of whole tensors, whoever holds which box, and replicas that differ are named."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from shardsmith.ground.ranks import Ranks
from shardsmith.sharding.digest_sums import Digested, DigestSums, OwnDigests, RanksSums, digest_boxes, sum_digests
from shardsmith.tensors.digest import digest_box, digest_tensor
from shardsmith.tensors.tensors import Chunk, Shape
from tests.ranks import run_on_ranks
from tests.sharding.test_assignment import RANKS, cells

Values = dict[Chunk, dict[int, Tensor]]
"""By box and rank, what the rank holds there."""


def as_json(value: Any) -> Any:
    return json.loads(json.dumps(value))


def added(held: Sequence[dict[str, Digested]]) -> DigestSums:
    """What rank 0 finds, without processes."""
    owns, sums = [OwnDigests.of(mine, rank) for rank, mine in enumerate(held)], RanksSums()
    asked = as_json(sums.ask([own.hashes() for own in owns]))
    return sums.add_up(as_json([own.report(wanted) for own, wanted in zip(owns, asked, strict=True)]))


@st.composite
def tensors(draw: st.DrawFn) -> dict[str, tuple[Shape, Values]]:
    """Tensors of few shapes, cut in few ways and held by few sets of ranks, so that some of them are held alike."""
    shapes = draw(st.lists(st.lists(st.integers(1, 5), max_size=2).map(tuple), min_size=1, max_size=2))
    cuts = draw(st.lists(st.sets(st.integers(0, 4), max_size=2), min_size=2, max_size=2))
    holders = draw(st.lists(st.sets(st.integers(0, RANKS - 1), min_size=1), min_size=1, max_size=3))
    found: dict[str, tuple[Shape, Values]] = {}
    for i in range(draw(st.integers(1, 8))):
        shape = draw(st.sampled_from(shapes))
        values: Values = {}
        for box in cells(shape, cuts[: len(shape)]):
            values[box] = dict.fromkeys(sorted(draw(st.sampled_from(holders))), torch.rand(box.sizes))
            # Of a few boxes one rank holds something else.
            if draw(st.integers(0, 5)) == 0:
                values[box][draw(st.sampled_from([*values[box]]))] = torch.rand(box.sizes)
        found[f"t{i}"] = shape, values
    return found


@given(tensors(), st.sets(st.integers(0, RANKS - 1)))
def test_sums_are_the_digests_of_whole_tensors_whoever_holds_which_box(
    found: dict[str, tuple[Shape, Values]], reverse: set[int]
) -> None:
    held: list[dict[str, Digested]] = [{} for _ in range(RANKS)]
    wholes, differing = {}, set()
    for name, (shape, values) in found.items():
        wholes[name] = torch.empty(shape)
        for box, by_rank in values.items():
            wholes[name][box.slices] = by_rank[min(by_rank)]
            differing |= {name for other in by_rank.values() if not other.equal(by_rank[min(by_rank)])}
        for rank in range(RANKS):
            mine = {box: by_rank[rank] for box, by_rank in values.items() if rank in by_rank}
            # A rank may know of a tensor of which it holds nothing.
            if mine or rank % 2:
                digests = [digest_box(own, box, shape) for box, own in mine.items()]
                held[rank][name] = Digested(shape, "float32", tuple(mine), digests)
    held = [dict(reversed(mine.items())) if rank in reverse else mine for rank, mine in enumerate(held)]

    sums = added(held)

    assert sums.digests == {name: digest_tensor(whole) for name, whole in wholes.items()}
    assert sums.differing == differing
    assert sums.not_whole() == {}
    assert {spec.name: spec.shape for spec in sums.specs} == {name: shape for name, (shape, _) in found.items()}


def test_holes_overlaps_and_other_shapes_are_named() -> None:
    def part(shape: Shape, *boxes: Chunk) -> Digested:
        values = torch.ones(shape)
        return Digested(shape, "float32", boxes, [digest_box(values[box.slices], box, shape) for box in boxes])

    upper, lower, most = Chunk((0, 0), (2, 3)), Chunk((2, 0), (2, 3)), Chunk((1, 0), (3, 3))
    sums = added(
        [
            {"good": part((4, 3), upper), "hole": part((4, 3), upper), "over": part((4, 3), upper), "none": part((4,))},
            {"good": part((4, 3), lower), "over": part((4, 3), most), "shape": part((4, 3), upper, lower)},
            {"shape": part((6, 2), Chunk((0, 0), (6, 2))), "empty": part((0, 2))},
        ]
    )
    assert sums.not_whole() == {
        "hole": "6 of 12 elements are on no rank",
        "over": f"ranks hold {upper} and {most}, which overlap",
        "none": "4 of 4 elements are on no rank",
        "shape": "ranks hold tensors of shape (4, 3) and (6, 2) under this name",
    }


def test_a_name_of_one_rank_alone_does_not_have_the_others_sent_again() -> None:
    """Such as the state of each rank's loader: its name, of the same shape, must not make another list of the rest."""
    scalar = digest_boxes(torch.tensor(1.0))
    shared = {f"optimizer.{i}.step": scalar for i in range(100)}
    owns = [OwnDigests.of({**shared, f"loader.rank-{rank}.seen": scalar}, rank) for rank in range(8)]
    asked = RanksSums().ask([own.hashes() for own in owns])
    assert [len(told) for told, _ in asked] == [len(named) for _, named in asked] == [2, *[1] * 7]


def whole() -> dict[str, Tensor]:
    torch.manual_seed(4)
    shapes: dict[str, Shape] = {
        "embed": (9, 6),
        "norm": (5,),
        "scale": (),
        "buffer": (3,),
        "late": (4,),
        "empty": (0, 3),
    }
    return {name: torch.randn(shape) for name, shape in shapes.items()} | {
        f"layers.{i}.{name}": torch.randn(6, 8) for i in range(5) for name in ("up", "down")
    }


def live(rank: int) -> dict[str, Tensor]:
    """HSDP, tensor parallel x FSDP, plain tensors, one that two ranks have, and in its place another two have none."""
    mesh = init_device_mesh("cpu", (2, 2))
    placements = {"embed": [Replicate(), Shard(0)], "norm": [Shard(0), Shard(0)], "empty": [Replicate(), Shard(0)]}
    placements |= {name: [Shard(0), Shard(name.endswith("down"))] for name in whole() if name.startswith("layers")}
    found = {name: tensor for name, tensor in whole().items() if name != "late" or rank >= 2}
    sharded = {n: distribute_tensor(found[n], mesh, place, src_data_rank=None) for n, place in placements.items()}
    return {**found, **sharded}


def run_sums() -> None:
    rank, ranks = dist.get_rank(), Ranks()
    tensors_here = live(rank)

    def differences() -> tuple[list[str], list[str]]:
        def look() -> dict[str, Digested]:
            return {name: digest_boxes(tensor) for name, tensor in tensors_here.items()}

        def compare(sums: DigestSums) -> tuple[list[str], list[str]]:
            assert sums.not_whole() == {}
            expected = {name: digest_tensor(tensor) for name, tensor in whole().items()}
            assert sums.digests.keys() == expected.keys()
            return sorted(sums.differing), [name for name in expected if sums.digests[name] != expected[name]]

        replicas, values = sum_digests(ranks, "adding up", look, compare)
        return list(replicas), list(values)

    assert differences() == ([], [])
    if rank == 3:  # its replicas are rank 1's, its shards nobody else's
        tensors_here["embed"]._local_tensor[1, 2] += 1  # type: ignore[attr-defined]
        tensors_here["buffer"][0] += 1
        tensors_here["late"][0] += 1
        tensors_here["layers.2.down"]._local_tensor[0, 0] += 1  # type: ignore[attr-defined]
    assert differences() == (["buffer", "embed", "late"], ["layers.2.down"])
    if rank == 1:  # both replicas are alike again, and not what was recorded
        tensors_here["embed"]._local_tensor[1, 2] += 1  # type: ignore[attr-defined]
    assert differences()[1] == ["embed", "layers.2.down"]
    with pytest.raises(Exception, match="rank 2: KeyError"):
        sum_digests(ranks, "failing", lambda: {}["a"] if rank == 2 else {}, lambda _: None)


def test_four_ranks_add_up_all_that_they_hold_in_any_way(tmp_path: Path) -> None:
    run_on_ranks(run_sums, 4, tmp_path)
