"""What ``make bench-scale`` measures can be measured: here of a small model."""

from __future__ import annotations

import tracemalloc

import pytest

from benchmarks import resume_digests, scale
from benchmarks.resume_index import MODELS, box_of, measure, shapes_of
from benchmarks.scale_models import LAYOUTS, Model
from shardsmith.ground.layout import DCP_INDEX_FILE
from shardsmith.run_state import whole_directory
from tests.forked import server

SMALL: Model = {"embed.weight": ((16, 8), 0), "layers.0.wo.weight": ((8, 8), 1), "norm.weight": ((8,), None)}


@pytest.mark.parametrize("name", MODELS)
def test_the_ranks_of_each_model_hold_all_of_each_tensor_together(name: str) -> None:
    make, sizes = MODELS[name]
    for shape in set(shapes_of(make()).values()):
        boxes = [box_of(shape, rank, sizes[-1]) for rank in range(sizes[-1])]
        assert sum(box.sizes[0] for box in boxes) == shape[0]


def test_a_rank_reads_less_of_the_index_by_boxes(monkeypatch: pytest.MonkeyPatch) -> None:
    forks = server()
    monkeypatch.setattr("multiprocessing.get_context", lambda _: forks)  # six processes, each for one figure
    found = {ranks: measure(shapes_of(SMALL), ranks) for ranks in (2, 8)}
    assert found[8]["count"] > found[2]["count"]
    for row in found.values():
        assert 0 < row["by .boxes"]["nbytes"] < row["by .metadata"]["nbytes"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_replicas_send_hashes_and_every_other_rank_its_digests(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(resume_digests.MODELS, "small", lambda: SMALL)
    found = {ranks: resume_digests.measure("small", layout, ranks) for ranks in (8, 16)}
    assert found[16]["hashes"] == pytest.approx(2 * found[8]["hashes"], rel=0.1)
    assert found[16]["told"] > found[8]["told"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_large_index_takes_little_memory_for_a_box(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(whole_directory, "_MOST_KEPT", 0)
    model: Model = {f"layers.{i}.{name}": tensor for i in range(50) for name, tensor in SMALL.items()}
    whole, receipts, _ = scale.to_index(dict.fromkeys(model, ((4096, 8), 0)), 128, layout)
    sizes = []
    for _ in range(2):  # the first one also fills caches of shapes
        tracemalloc.start()
        made = whole.indexes(receipts, "0" * 16)[DCP_INDEX_FILE]
        assert not isinstance(made, bytes)
        sizes.append(sum(map(len, made)))
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    boxes = 600 * (128 if layout != "HSDP, 8 replicas" else 16)
    assert sizes[0] == sizes[1] > 100 * boxes
    assert peak < 60 * boxes + 1_000_000
