"""``HFExport`` to an object store, by ranks that share no folder: as on a disk, byte for byte, or not at all."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import obstore
import pytest
import torch.distributed as dist
from torch.multiprocessing import ProcessExitedException
from transformers import AutoModelForCausalLM

from shardsmith import RankFailedError
from shardsmith.export.place import begin_directory
from shardsmith.ground import object_store
from shardsmith.ground.commit import remove, sweep
from shardsmith.ground.remote_export import RemoteDirectory
from shardsmith.ground.remote_path import as_path
from shardsmith.hf.export_files import find_export_damage
from shardsmith.hooks import EMA, HFExport, Hooks, at, every, latest
from tests.faulty_proxy import Fault, Proxy, Request, proxied
from tests.hooks.live_models import STEP, Case, build, change, shard
from tests.object_server import ObjectServer
from tests.ranks import run_on_ranks

CASES = [
    Case(kind="llama", sharding="fsdp2", ranks=2, dtype="float32", max_shard_size="30KB", ema_as="directory"),
    Case(kind="mixtral", sharding="tp", ranks=2),
    Case(kind="odd", sharding="hsdp", ranks=4, dtype="original", max_shard_size="9KB"),
]


@pytest.fixture(autouse=True)
def _fresh_clients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(object_store, "_clients", {})


def own_folder(root: Path) -> None:
    folder = root / f"rank-{dist.get_rank()}"
    folder.mkdir(exist_ok=True)
    os.chdir(folder)


def run_both(server: ObjectServer, case: Case, url: str, root: Path) -> None:
    server.use()
    own_folder(root)
    model = shard(build(case), case.sharding)
    ema = EMA(model, decay=0.5)
    options: dict[str, Any] = {"dtype": case.dtype, "max_shard_size": case.max_shard_size, "ema_as": case.ema_as}
    places = (url, root / "local")
    exports = [HFExport(place, model=model, ema=ema, when=at(STEP), **options) for place in places]
    hooks = Hooks(ema, *exports)
    change(model, hooks)
    hooks.close()
    assert not [*Path().iterdir()], "something was written to the local disk"


def download(server: ObjectServer, prefix: str, folder: Path) -> Path:
    for name in server.keys(prefix):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(bytes(obstore.get(server.client(), f"{prefix}/{name}").bytes()))
    return folder


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_files_are_those_of_an_export_to_a_disk(object_server: ObjectServer, tmp_path: Path, case: Case) -> None:
    name = f"exports-{case}"
    run_on_ranks(run_both, case.ranks, tmp_path, object_server, case, object_server.url(name), tmp_path)
    found = download(object_server, name, tmp_path / "found")
    expected = tmp_path / "local"
    names = {str(path.relative_to(expected)) for path in expected.rglob("*") if path.is_file()}
    assert {str(path.relative_to(found)) for path in found.rglob("*") if path.is_file()} == names
    for one in names:
        if not one.endswith("shardsmith.json"):
            assert (found / one).read_bytes() == (expected / one).read_bytes(), one
    object_server.use()
    for directory in expected.iterdir():
        assert find_export_damage(as_path(object_server.url(f"{name}/{directory.name}"))) == []
        if case.kind != "odd":
            AutoModelForCausalLM.from_pretrained(found / directory.name)


def export_once(server: ObjectServer, url: str, step: int = STEP, **options: Any) -> None:
    """In this process, without other ranks."""
    server.use()
    model = build(CASES[0])
    options = {"when": every(1), "dtype": "original", "max_shard_size": "30KB", **options}
    hooks = Hooks(HFExport(url, model=model, **options))
    hooks.step(step)
    hooks.close()


def test_retention_and_damage(object_server: ObjectServer) -> None:
    url = object_server.url("kept")
    for step in (1, 2, 3):
        export_once(object_server, url, step, keep=latest(2))
    assert {key.split("/")[0] for key in object_server.keys("kept")} == {".retention.json", "step-2", "step-3"}
    sound = object_server.keys("kept/step-3")
    weights = next(key for key in sound if key.endswith(".safetensors"))
    data = bytearray(bytes(obstore.get(object_server.client(), f"kept/step-3/{weights}").bytes()))
    data[-1] ^= 1
    obstore.put(object_server.client(), f"kept/step-3/{weights}", bytes(data))
    assert any("other values" in line for line in find_export_damage(as_path(f"{url}/step-3")))
    export_once(object_server, url, 3)
    assert find_export_damage(as_path(f"{url}/step-3")) == []
    assert object_server.keys("kept/step-3") == sound


def test_an_export_is_loaded_before_it_exists(object_server: ObjectServer) -> None:
    export_once(object_server, object_server.url("loaded"), verify="load")
    assert "shardsmith.json" in object_server.keys(f"loaded/step-{STEP}")


def run_exports(server: ObjectServer, url: str, root: Path, steps: int) -> None:
    server.use()
    own_folder(root)
    model = shard(build(CASES[0]), "fsdp2")
    hooks = Hooks(HFExport(url, model=model, when=every(1), dtype="float32", max_shard_size="30KB"))
    for step in range(1, steps + 1):
        hooks.step(step)
    hooks.close()


def test_requests_and_bytes_of_an_export_are_what_they_must_be(object_server: ObjectServer, tmp_path: Path) -> None:
    with proxied(object_server) as proxy:
        run_on_ranks(run_exports, 2, tmp_path, proxy.server, proxy.server.url("exported"), tmp_path, 1)
        first = proxy.counted()
        proxy.requests.clear()
        proxy.sent = 0
        run_on_ranks(run_exports, 2, tmp_path, proxy.server, proxy.server.url("exported-twice"), tmp_path, 2)
    second = {kind: count - first.get(kind, 0) for kind, count in proxy.counted().items()}
    stored = object_server.keys("exported-twice")
    weights = [key for key in stored if key.endswith(".safetensors")]
    files, shards = len(stored) // 2, len(weights) // 2
    assert shards == 4
    assert second == {"PUT": files + 1, "GET": shards + 1, "HEAD": 2 * shards + 2, "LIST": 7, "POST": 1}
    put = sorted(one.key for one in proxy.requests if one.method == "PUT" and not Path(one.key).name.startswith("."))
    assert put == sorted(f"/bucket/exported-twice/{key}" for key in stored)
    read = sorted(one.key for one in proxy.requests if one.method == "GET" and one.key.endswith(".safetensors"))
    assert read == sorted(f"/bucket/exported-twice/{key}" for key in weights)
    assert proxy.sent < sum(stored[key] for key in weights) + 2**16


def run_killed(server: ObjectServer, url: str, root: Path, kill_at: int) -> None:
    """Rank 1 dies once so many objects were put; then rank 0 does."""
    own_folder(root)
    with proxied(server) as proxy:
        if dist.get_rank() == 0:
            proxy.done = lambda request: _kill(proxy, request, kill_at)
        proxy.server.use()
        model = shard(build(CASES[0]), "fsdp2")
        hooks = Hooks(HFExport(url, model=model, when=at(STEP), dtype="float32", max_shard_size="30KB"))
        hooks.step(STEP)
        hooks.close()


def _kill(proxy: Proxy, request: Request, kill_at: int) -> None:
    if request.method == "PUT" and sum(one.method == "PUT" for one in proxy.requests) >= kill_at:
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("kill_at", [3, 5, 8])  # the first two were to see whether the store can be written to
def test_what_a_killed_export_left_is_replaced(object_server: ObjectServer, tmp_path: Path, kill_at: int) -> None:
    name = f"killed-{kill_at}"
    url = object_server.url(name)
    with pytest.raises((ProcessExitedException, RuntimeError)):
        run_on_ranks(run_killed, 2, tmp_path, object_server, url, tmp_path, kill_at)
    assert any(key.endswith(".claim") for key in object_server.keys(name))
    assert not any(key.endswith("shardsmith.json") for key in object_server.keys(name))
    export_once(object_server, url)
    assert find_export_damage(as_path(f"{url}/step-{STEP}")) == []
    assert not any(key.endswith(".claim") for key in object_server.keys(name))


def run_unlucky(server: ObjectServer, url: str, root: Path, unlucky: int, fault: Fault) -> None:
    own_folder(root)
    with proxied(server) as proxy:
        proxy.server.use()
        model = shard(build(CASES[0]), "fsdp2")
        hooks = Hooks(HFExport(url, model=model, when=every(1), dtype="float32", max_shard_size="30KB"))
        if dist.get_rank() == unlucky:
            proxy.fault = lambda request, seen: fault if request.key.endswith(".safetensors") else None  # noqa: ARG005
        hooks.step(1)
        with pytest.raises(RankFailedError) as failed:
            hooks.close()
        assert server.secret_key not in str(failed.value)
        proxy.fault = lambda request, seen: "503" if seen == 0 else None  # noqa: ARG005
        again = Hooks(HFExport(url, model=model, when=every(1), dtype="float32", max_shard_size="30KB"))
        again.step(2)
        again.close()


@pytest.mark.parametrize(("unlucky", "fault"), [(0, "full"), (1, "expired")])
def test_an_upload_that_is_refused_ends_that_export(
    object_server: ObjectServer, tmp_path: Path, unlucky: int, fault: Fault
) -> None:
    name = f"unlucky-{unlucky}"
    run_on_ranks(run_unlucky, 2, tmp_path, object_server, object_server.url(name), tmp_path, unlucky, fault)
    assert {key.split("/")[0] for key in object_server.keys(name)} == {"step-2"}


def test_the_later_of_two_claims_counts(object_server: ObjectServer) -> None:
    object_server.use()
    target = as_path(object_server.url("claimed/step-1"))
    first = begin_directory(target)
    assert isinstance(first, RemoteDirectory)
    obstore.put(object_server.client(), "claimed/step-1/model.safetensors", b"of the first")
    second = begin_directory(target)
    (second.directory / "shardsmith.json").write_text("{}")
    (first.directory / "shardsmith.json").write_text("{}")
    with pytest.raises(FileExistsError):
        first.commit({"shardsmith.json": 2})
    first.abandon()
    second.commit({"shardsmith.json": 2})
    assert object_server.keys("claimed/step-1") == {"shardsmith.json": 2}
    with pytest.raises(FileExistsError):
        begin_directory(target)


def test_what_is_not_ours_is_left_alone(object_server: ObjectServer) -> None:
    object_server.use()
    obstore.put(object_server.client(), "theirs/step-1/notes.txt", b"x")
    with pytest.raises(FileExistsError):
        begin_directory(as_path(object_server.url("theirs/step-1")))
    assert sweep(as_path(object_server.url("theirs"))) == []
    assert object_server.keys("theirs") == {"step-1/notes.txt": 1}


def test_a_deletion_that_was_cut_off_is_finished(object_server: ObjectServer) -> None:
    url = object_server.url("deleted")
    export_once(object_server, url, 1)
    with proxied(object_server) as proxy:
        proxy.server.use()
        object_store._clients.clear()
        proxy.fault = lambda request, seen: "full" if request.method == "POST" and seen else None
        with pytest.raises(OSError, match="deletion failed"):
            remove(as_path(f"{url}/step-1"))
    object_store._clients.clear()
    object_server.use()
    assert any(key.endswith(".safetensors") for key in object_server.keys("deleted"))
    sweep(as_path(url))
    assert object_server.keys("deleted") == {}
