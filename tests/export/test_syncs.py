"""One rank of a host makes a file durable, for all that have written to it there, when all of them have."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from shardsmith.formats.safetensors_files import host_files
from shardsmith.ground.syncs import cache_of, deal_syncs
from shardsmith.hooks import HFExport, Hooks, at
from tests.hooks.live_models import STEP, Case, build, change, shard
from tests.ranks import run_on_ranks

said = st.lists(st.tuples(st.sampled_from("ab"), st.sets(st.integers(0, 9)).map(sorted)), min_size=1, max_size=6)


@given(said)
def test_each_file_is_made_durable_once_in_each_cache_by_a_rank_that_has_it(
    said: list[tuple[str, list[int]]],
) -> None:
    dealt = deal_syncs(said)
    done = [(cache, file) for (cache, _), mine in zip(said, dealt, strict=True) for file in mine]
    assert sorted(done) == sorted({(cache, file) for cache, files in said for file in files})
    assert all(set(mine) <= set(files) for (_, files), mine in zip(said, dealt, strict=True))


def test_ranks_of_one_host_share_the_cache_of_a_directory(tmp_path: Path) -> None:
    assert cache_of(tmp_path, 0) == cache_of(tmp_path, 1)
    assert cache_of(tmp_path, 0) != cache_of(Path("/proc"), 0)


@pytest.mark.parametrize(
    ("sharding", "most_open", "many"),
    [
        pytest.param("fsdp2", 256, 1 << 30, id="each rank opens files"),
        pytest.param("fsdp2", 256, 1, id="a rank opens files for its host"),
        pytest.param("hsdp", 256, 1, id="a rank opens files for its host, replicas"),
        pytest.param("hsdp", 1, 1 << 30, id="too many to stay open"),
        pytest.param("fsdp2", 2, 1, id="too many to stay open with the one that lends"),
    ],
)
def test_each_file_of_an_export_is_made_durable_after_all_ranks_have_written_to_it(
    sharding: str, most_open: int, many: int, tmp_path: Path
) -> None:
    run_on_ranks(run_export, 4, tmp_path, sharding, most_open, many, tmp_path)


def run_export(sharding: str, most_open: int, many: int, directory: Path, lends: bool = True) -> None:
    calls: list[tuple[str, str, float]] = []

    def logged(name: str) -> None:
        call = getattr(os, name)

        def wrapper(descriptor: int, *args: Any) -> Any:
            found = call(descriptor, *args)
            calls.append((name, os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")), time.monotonic()))
            return found

        setattr(os, name, wrapper)

    def logged_open(path: Any, *args: Any, call: Any = os.open, **kwargs: Any) -> int:
        calls.append(("open", os.path.basename(os.fspath(path)), time.monotonic()))
        return call(path, *args, **kwargs)  # type: ignore[no-any-return]

    host_files._most_open, host_files._MANY_OPENS = lambda: most_open, many
    if not lends:
        host_files.HostFiles._lend = lambda *_: None  # type: ignore[assignment,method-assign,return-value]
    model = shard(build(Case(kind="odd", sharding=sharding, ranks=4)), sharding)
    export = HFExport(directory / "exports", model=model, dtype="original", when=at(STEP), max_shard_size="1KB")
    logged("pwrite")
    logged("fsync")
    os.open = logged_open  # type: ignore[assignment]
    hooks = Hooks(export)
    change(model, hooks)
    held = {name: getattr(tensor, "full_tensor", tensor.clone)() for name, tensor in model.state_dict().items()}
    hooks.close()
    assert not [path for path in open_files() if "exports" in path]
    everywhere: list[Any] = [None] * 4
    dist.all_gather_object(everywhere, calls)
    paths = [*(directory / "exports" / f"step-{STEP}").glob("*.safetensors")]
    files, stored = {path.name for path in paths}, {k: v for path in paths for k, v in load_file(path).items()}
    assert len(files) > 2
    assert all(torch.equal(stored[name], held[name]) for name in stored)
    for file in files:
        own = [[(call, at) for call, name, at in of_rank if name == file] for of_rank in everywhere]
        syncs = [at for of_rank in own for call, at in of_rank if call == "fsync"]
        written = [at for of_rank in own for call, at in of_rank if call == "pwrite"]
        assert max(syncs) > max(written)
        if most_open > len(files):
            assert len(syncs) == 1
            # Rank 0 reads headers when it completes the directory; the others open a file once.
            assert all(sum(call == "open" for call, _ in of_rank) <= 1 for of_rank in own[1:])
            # Of the others one, unless rank 0, which has made the files, lends it.
            assert many > 1 or not lends or sum(call == "open" for of_rank in own[1:] for call, _ in of_rank) <= 1


def open_files() -> list[str]:
    """Return the paths of this process's descriptors."""
    with os.scandir("/proc/self/fd") as found:
        return [os.readlink(entry.path) for entry in found if os.path.lexists(entry.path)]


def test_an_export_is_complete_if_ranks_lend_nothing(tmp_path: Path) -> None:
    run_on_ranks(run_export, 4, tmp_path, "fsdp2", 256, 1, tmp_path, False)
