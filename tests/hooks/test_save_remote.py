"""A run that saves to an object store and goes on from it, without a folder that its ranks share."""

from __future__ import annotations

import os
import signal
import warnings
from pathlib import Path
from typing import Any

import obstore
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.multiprocessing import ProcessExitedException

from shardsmith import RankFailedError, StorageError, UsageError, WriteError
from shardsmith.ground import object_store
from shardsmith.ground.remote_path import RemotePath, as_path
from shardsmith.hooks import EMA, Hooks, ShardedSave, every, latest, multiples_of
from shardsmith.manifest.checkpoints import committed_steps
from shardsmith.manifest.metadata import read_metadata
from tests.faulty_proxy import proxied
from tests.hooks.test_save import digests
from tests.hooks.training import Tiny, build, run_resave, run_training
from tests.object_server import ObjectServer
from tests.ranks import run_on_ranks


def own_folder(root: Path) -> None:
    """Go to a folder that no other rank has."""
    folder = root / f"rank-{dist.get_rank()}-of-{dist.get_world_size()}"
    folder.mkdir(exist_ok=True)
    os.chdir(folder)


def train(server: ObjectServer, root: Path, place: str, steps: int, options: dict[str, Any]) -> None:
    server.use()
    own_folder(root)
    run_training(place, steps, **options)  # type: ignore[arg-type]
    assert not [*Path().iterdir()], "something was written to the local disk"


def resave(server: ObjectServer, place: str, target: str) -> None:
    server.use()
    run_resave(place, target)  # type: ignore[arg-type]


def committed(server: ObjectServer, place: str) -> list[int]:
    server.use()
    return committed_steps(as_path(place))


def read_digests(server: ObjectServer, step: str) -> dict[str, str]:
    server.use()
    return digests(as_path(step))


@pytest.fixture(scope="module")
def posix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two ranks to step 20 on a disk, killed after step 13 as the others."""
    root = tmp_path_factory.mktemp("posix")
    with pytest.raises(ProcessExitedException):
        run_on_ranks(run_local, 2, root, root / "run", 20, {"kill_after": 13})
    run_on_ranks(run_local, 2, root, root / "run", 20, {})
    return root / "run"


def run_local(place: Path, steps: int, options: dict[str, Any]) -> None:
    run_training(place, steps, **options)


@pytest.fixture(scope="module")
def remote(object_server: ObjectServer, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The same run in the store."""
    root, place = tmp_path_factory.mktemp("remote"), object_server.url("straight")
    with pytest.raises(ProcessExitedException) as died:
        run_on_ranks(train, 2, root, object_server, root, place, 20, {"kill_after": 13})
    assert died.value.exit_code == -signal.SIGKILL
    assert committed(object_server, place) in ([5], [5, 10])  # the save of step 10 may have been under way
    run_on_ranks(train, 2, root, object_server, root, place, 20, {})
    return place


@pytest.mark.parametrize("step", [5, 10, 15, 20])
def test_a_killed_run_ends_as_one_on_a_disk(object_server: ObjectServer, posix: Path, remote: str, step: int) -> None:
    assert read_digests(object_server, f"{remote}/step-{step}") == digests(posix / f"step-{step}")


@pytest.mark.parametrize("ranks", [1, 3])
def test_another_number_of_ranks_resumes_the_same(
    object_server: ObjectServer, posix: Path, remote: str, tmp_path: Path, ranks: int
) -> None:
    target = object_server.url(f"resaved-{ranks}")
    run_on_ranks(resave, ranks, tmp_path, object_server, remote, target)
    run_on_ranks(run_resave, ranks, tmp_path, posix, tmp_path / "local")
    assert read_digests(object_server, f"{target}/step-20") == digests(tmp_path / "local" / "step-20")


def branch_off(server: ObjectServer, place: str | Path, target: Path) -> None:
    """Begin a run on a disk with what another one has saved elsewhere."""
    server.use()
    model = build("fsdp2")
    parts: dict[str, Any] = {"model": model, "optimizer": torch.optim.AdamW(model.parameters(), lr=1e-2)}
    parts["scheduler"] = torch.optim.lr_scheduler.OneCycleLR(parts["optimizer"], max_lr=1e-2, total_steps=100)
    ema = EMA(model, decay=0.9, warmup=True)
    save = ShardedSave(target, when=every(5), ema=ema, **parts)
    hooks = Hooks(ema, save)
    assert hooks.resume(directory=place) == 20
    save.save(20)
    hooks.close()


def test_a_run_on_a_disk_begins_with_a_step_of_another_in_a_store(
    object_server: ObjectServer, posix: Path, remote: str, tmp_path: Path
) -> None:
    for name, place in (("remote", remote), ("local", posix)):
        run_on_ranks(branch_off, 1, tmp_path, object_server, place, tmp_path / name)
    assert digests(tmp_path / "remote" / "step-20") == digests(tmp_path / "local" / "step-20")


def test_what_lies_in_the_store_is_a_dcp_directory_and_a_manifest(
    object_server: ObjectServer, posix: Path, remote: str, tmp_path: Path
) -> None:
    keys = object_server.keys("straight/step-20")
    object_server.use()
    attempt = read_metadata(as_path(f"{remote}/step-20")).attempt
    names = (".boxes", ".metadata", "__0_0.distcp", "__1_0.distcp")
    assert keys.keys() == {"metadata.json", *(f"{attempt}/{name}" for name in names)}
    for name in names:
        data = bytes(obstore.get(object_server.client(), f"straight/step-20/{attempt}/{name}").bytes())
        (tmp_path / name).write_bytes(data)
    found, expected = loaded_by_torch(tmp_path), loaded_by_torch(posix / "step-20")
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def loaded_by_torch(directory: Path) -> dict[str, torch.Tensor]:
    state = Tiny().state_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says that there is one process
        dcp.load(state, checkpoint_id=directory)
    return state


@pytest.mark.parametrize("fault", ["flipped", "cut off", "missing", "no manifest", "index flipped"])
def test_a_damaged_step_is_set_aside_and_the_one_before_it_taken(object_server: ObjectServer, fault: str) -> None:
    name = f"damaged-{fault.replace(' ', '-')}"
    place = object_server.url(name)
    train_here(object_server, place, 10)
    sound = read_digests(object_server, f"{place}/step-10")
    attempt = read_metadata(as_path(f"{place}/step-10")).attempt
    damage(object_server, f"{name}/step-10", attempt, fault)
    train_here(object_server, place, 10)
    assert committed(object_server, place) == [5, 10]
    assert read_digests(object_server, f"{place}/step-10") == sound
    aside = [key for key in object_server.keys(f"{name}/step-10") if key.startswith("metadata.damaged-")]
    assert aside == ([] if fault == "no manifest" else [f"metadata.damaged-{attempt}.json"])


def damage(server: ObjectServer, step: str, attempt: str, fault: str) -> None:
    client = server.client()
    file = f"{step}/{attempt}/{'.metadata' if fault == 'index flipped' else '__0_0.distcp'}"
    data = bytearray(bytes(obstore.get(client, file).bytes()))
    data[len(data) // 3] ^= 16
    if fault == "missing":
        obstore.delete(client, file)
    elif fault == "no manifest":
        obstore.delete(client, f"{step}/metadata.json")
    else:
        obstore.put(client, file, bytes(data[:-100] if fault == "cut off" else data))


def train_here(server: ObjectServer, place: str, steps: int, **options: Any) -> None:
    server.use()
    run_training(place, steps, sharding="none", **options)  # type: ignore[arg-type]


def test_retention_deletes_whole_steps(object_server: ObjectServer) -> None:
    place = object_server.url("retained")
    train_here(object_server, place, 25, keep=latest(1) | multiples_of(20))
    assert committed(object_server, place) == [20, 25]
    assert {key.split("/")[0] for key in object_server.keys("retained")} == {".retention.json", "step-20", "step-25"}


def test_wrong_credentials_are_named_on_all_ranks_and_not_shown(object_server: ObjectServer, tmp_path: Path) -> None:
    run_on_ranks(run_refused, 2, tmp_path, object_server, object_server.url("refused"))


def run_refused(server: ObjectServer, place: str) -> None:
    server.use(AWS_SECRET_ACCESS_KEY="another-secret")
    with pytest.raises((RankFailedError, WriteError)) as failed:
        run_training(place, 5)  # type: ignore[arg-type]
    assert "SignatureDoesNotMatch" in str(failed.value)
    for secret in (server.secret_key, server.access_key, "another-secret"):
        assert secret not in str(failed.value)


def test_a_store_that_cannot_be_read_is_not_taken_for_damage(object_server: ObjectServer, tmp_path: Path) -> None:
    """Otherwise a network that is down would set all steps aside."""
    name = "unreachable"
    place = object_server.url(name)
    train_here(object_server, place, 5)
    before = object_server.keys(name)
    run_on_ranks(run_unreachable, 1, tmp_path, object_server, place)
    assert object_server.keys(name) == before


def run_unreachable(server: ObjectServer, place: str) -> None:
    server.use(AWS_SECRET_ACCESS_KEY="another-secret")
    with pytest.raises((StorageError, RankFailedError, WriteError), match="SignatureDoesNotMatch"):
        run_resave(place, f"{place}-again")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "place", ["nowhere://bucket/run", "simplecache::s3://bucket/run", "file:///run", "s3://", "s3:///run"]
)
def test_what_is_no_store_of_ours_is_refused_by_name(place: str) -> None:
    with pytest.raises(UsageError, match="directory="):
        run_training(place, 1, sharding="none")  # type: ignore[arg-type]


def test_a_url_with_credentials_is_refused_without_showing_them() -> None:
    with pytest.raises(UsageError) as refused:
        run_training("s3://me:secret@bucket/run", 1, sharding="none")  # type: ignore[arg-type]
    assert "without credentials" in str(refused.value)
    assert "secret" not in str(refused.value)


def test_what_asks_the_system_for_a_remote_path_fails() -> None:
    path = as_path("s3://bucket/run") / "step-5"
    assert isinstance(path, RemotePath)
    assert str(path) == "s3://bucket/run/step-5"
    for act in (lambda: os.mkdir(path), lambda: path.open("wb"), lambda: path.mkdir(), lambda: path.write_bytes(b"")):
        with pytest.raises(TypeError, match="object store"):
            act()


def test_requests_and_bytes_of_a_save_and_a_resume_are_what_they_must_be(
    object_server: ObjectServer, tmp_path: Path
) -> None:
    with proxied(object_server) as proxy:
        run_on_ranks(run_saves, 2, tmp_path, proxy.server, proxy.server.url("counted"), 5)
        first = proxy.counted()
        proxy.requests.clear()
        run_on_ranks(run_saves, 2, tmp_path, proxy.server, proxy.server.url("counted-twice"), 10)
        second = {kind: count - first.get(kind, 0) for kind, count in proxy.counted().items()}
        assert second == {"PUT": 6, "HEAD": 1, "LIST": 4, "POST": 1, "GET": 1}
        proxy.requests.clear()
        proxy.sent = 0
        run_on_ranks(run_resumes, 2, tmp_path, proxy.server, proxy.server.url("counted-twice"))
        files = [one for one in proxy.requests if one.method == "GET" and one.key.endswith(".distcp")]
        stored = object_server.keys("counted-twice/step-10")
        shards = sum(size for name, size in stored.items() if name.endswith(".distcp"))
        assert len(files) <= 8, "each rank reads its own file once, and what is no tensor of either in one range"
        assert proxy.sent < 3 * shards + 12 * stored["metadata.json"] + 12 * 2**16


def run_saves(server: ObjectServer, place: str, steps: int) -> None:
    server.use()
    run_training(place, steps)  # type: ignore[arg-type]


def run_resumes(server: ObjectServer, place: str) -> None:
    server.use()
    assert run_training(place, 10) == 10  # type: ignore[arg-type]


def test_a_save_that_fails_is_one_error_and_the_next_one_works(object_server: ObjectServer, tmp_path: Path) -> None:
    """The store answers nothing but errors while step 5 is written."""
    with proxied(object_server) as proxy:
        proxy.fault = lambda request, seen: "503" if "step-5/" in request.key and "distcp" in request.key else None  # noqa: ARG005
        run_on_ranks(run_failing, 2, tmp_path, proxy.server, proxy.server.url("failing"))
    assert committed(object_server, object_server.url("failing")) == [10]
    assert {key.split("/")[0] for key in object_server.keys("failing")} == {"step-10"}


def run_failing(server: ObjectServer, place: str) -> None:
    server.use()
    object_store._RETRIES["max_retries"] = 1
    model = build("fsdp2")
    hooks = Hooks(ShardedSave(place, model=model, when=every(5), async_mode="disabled"))
    for step in range(1, 5):
        hooks.step(step)
    with pytest.raises(RankFailedError, match=r"writing step-5 failed on 2 of 2 ranks(.|\n)*503"):
        hooks.step(5)
    for step in range(6, 11):
        hooks.step(step)
    hooks.close()
