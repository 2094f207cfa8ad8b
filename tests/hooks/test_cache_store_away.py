"""A run with a cache on local disks is started while its store is away: it goes on where that is safe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from shardsmith.ground import object_store
from shardsmith.ground.remote_path import as_path
from shardsmith.manifest.checkpoints import committed_steps
from shardsmith.manifest.metadata import read_metadata
from tests.faulty_proxy import Fault, Proxy, Request, proxied
from tests.hooks.test_local_cache import damage_local, disk_of, run_local, stored, train
from tests.hooks.test_save import digests
from tests.hooks.training import build
from tests.object_server import ObjectServer
from tests.ranks import run_on_ranks


@pytest.fixture(autouse=True)
def _fresh_clients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(object_store, "_clients", {})


@pytest.fixture(scope="module")
def posix(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, str]]:
    """Digests of the steps of a run on a disk that nothing interrupts."""
    root = tmp_path_factory.mktemp("posix")
    run_on_ranks(run_local, 2, root, root / "run", 20)
    return {step: digests(root / "run" / f"step-{step}") for step in (5, 10, 15, 20)}


def train_impatiently(server: ObjectServer, place: str, root: Path, hosts: int, steps: int) -> None:
    object_store._RETRIES["max_retries"] = 0  # of a rank's own process
    object_store._ATTEMPTS = 1
    train(server, place, root, hosts, steps, {})


def run_resume_of_one_step(server: ObjectServer, place: str, root: Path) -> None:
    from shardsmith.hooks import Hooks, ShardedSave, every

    object_store._RETRIES["max_retries"] = 0
    server.use()
    model = build("fsdp2")
    Hooks(ShardedSave(place, model=model, when=every(5), local_cache=disk_of(root, 1))).resume(step=10)


def away_until(proxy: Proxy, path: Path | None) -> None:
    """The store answers nothing but 503 until there is such a file; for ever without one."""

    def refuse(request: Request, seen: int) -> Fault | None:  # noqa: ARG001
        return None if path is not None and path.exists() else "503"

    proxy.fault = refuse


@pytest.mark.parametrize("fault", ["503", "drop"])
def test_it_goes_on_from_the_disks_and_uploads_later(
    object_server: ObjectServer, posix: dict[int, dict[str, str]], tmp_path: Path, fault: Fault
) -> None:
    place = object_server.url(f"away-{fault}")
    run_on_ranks(train, 2, tmp_path, object_server, place, tmp_path, 1, 10, {})
    with proxied(object_server) as proxy:
        back = tmp_path / "host-0" / "step-20"
        proxy.fault = lambda request, seen: None if back.exists() else fault  # noqa: ARG005
        run_on_ranks(train_impatiently, 2, tmp_path, proxy.server, place, tmp_path, 1, 20)
    assert stored(object_server, place) == posix
    assert committed_steps(tmp_path / "host-0") == [15, 20]
    assert not (tmp_path / "host-0" / "alone-since.txt").exists()


def test_a_step_that_the_store_never_got_is_uploaded_too(
    object_server: ObjectServer, posix: dict[int, dict[str, str]], tmp_path: Path
) -> None:
    place = object_server.url("away-owed")
    run_on_ranks(train, 2, tmp_path, object_server, place, tmp_path, 1, 10, {})
    object_server.use()
    step = as_path(f"{place}/step-10")
    step.store.delete([f"{step.key}/metadata.json"])  # type: ignore[attr-defined]
    with proxied(object_server) as proxy:
        away_until(proxy, tmp_path / "host-0" / "step-20")
        run_on_ranks(train_impatiently, 2, tmp_path, proxy.server, place, tmp_path, 1, 20)
    assert stored(object_server, place) == posix


def test_each_disk_with_a_part_alone_is_an_error(object_server: ObjectServer, tmp_path: Path) -> None:
    place = object_server.url("away-parts")
    run_on_ranks(train, 2, tmp_path, object_server, place, tmp_path, 2, 10, {})
    with proxied(object_server) as proxy:
        away_until(proxy, None)
        with pytest.raises(Exception, match=r"StorageError(.|\n)*do not each have all files of step-10, the newest"):
            run_on_ranks(train_impatiently, 2, tmp_path, proxy.server, place, tmp_path, 2, 20)
    assert [committed_steps(tmp_path / f"host-{host}") for host in (0, 1)] == [[5, 10]] * 2


def test_without_any_step_on_the_disks_it_does_not_begin_anew(object_server: ObjectServer, tmp_path: Path) -> None:
    place = object_server.url("away-empty")
    with proxied(object_server) as proxy:
        away_until(proxy, None)
        with pytest.raises(Exception, match=r"StorageError(.|\n)*have no step"):
            run_on_ranks(train_impatiently, 2, tmp_path, proxy.server, place, tmp_path, 1, 20)


def test_one_step_that_is_asked_for_needs_the_store(object_server: ObjectServer, tmp_path: Path) -> None:
    place = object_server.url("away-one")
    run_on_ranks(train, 2, tmp_path, object_server, place, tmp_path, 1, 10, {})
    with proxied(object_server) as proxy:
        away_until(proxy, None)
        with pytest.raises(Exception, match=r"StorageError: s3://bucket/away-one"):
            run_on_ranks(run_resume_of_one_step, 2, tmp_path, proxy.server, place, tmp_path)


def test_a_damaged_step_waits_for_the_copy_in_the_store(
    object_server: ObjectServer, posix: dict[int, dict[str, str]], tmp_path: Path
) -> None:
    place, disk = object_server.url("away-damaged"), tmp_path / "host-0"
    run_on_ranks(train, 2, tmp_path, object_server, place, tmp_path, 1, 10, {})
    damage_local(disk)
    with proxied(object_server) as proxy:
        away_until(proxy, None)
        with pytest.raises(Exception, match=r"StorageError: \S+/step-10: could not be asked for(.|\n)*is damaged"):
            run_on_ranks(train_impatiently, 2, tmp_path, proxy.server, place, tmp_path, 1, 20)
    assert committed_steps(disk) == [5, 10], "nothing is set aside, or the next start would take step 5"
    run_on_ranks(train, 2, tmp_path, object_server, place, tmp_path, 1, 20, {})
    assert stored(object_server, place) == posix


@pytest.mark.parametrize("other", ["later", "same"])
def test_disks_of_an_older_run_put_nothing_between_the_steps_of_another(
    object_server: ObjectServer, posix: dict[int, dict[str, str]], tmp_path: Path, other: str
) -> None:
    place, mine, others = object_server.url(f"away-{other}"), tmp_path / "mine", tmp_path / "others"
    run_on_ranks(train, 2, tmp_path, object_server, place, mine, 1, 10, {})
    if other == "same":  # this job's step 10 is another one than that of the store
        step = as_path(f"{place}/step-10")
        object_server.use()
        step.store.delete([f"{step.key}/metadata.json"])  # type: ignore[attr-defined]
    run_on_ranks(train, 2, tmp_path, object_server, place, others, 1, 10 if other == "same" else 15, {})
    before = stored(object_server, place)
    with proxied(object_server) as proxy:
        away_until(proxy, mine / "host-0" / "step-20")
        with pytest.raises(Exception, match="is of another run, while this one went on from step 10"):
            run_on_ranks(train_impatiently, 2, tmp_path, proxy.server, place, mine, 1, 20)
    assert stored(object_server, place) == before
    branch = read_metadata(mine / "host-0" / "step-20").attempt
    with proxied(object_server) as proxy:
        run_on_ranks(train, 2, tmp_path, proxy.server, place, mine, 1, 20, {})
    read = {int(one.key.split("/step-")[1].split("/")[0]) for one in proxy.requests if one.key.endswith(".distcp")}
    assert min(read) == max(before), "it goes on from what the store has"
    assert stored(object_server, place) == posix
    assert read_metadata(as_path(f"{place}/step-20")).attempt == read_metadata(mine / "host-0" / "step-20").attempt
    assert read_metadata(as_path(f"{place}/step-20")).attempt != branch
    assert not (mine / "host-0" / "alone-since.txt").exists()


def test_what_is_said_names_store_and_disk(
    object_server: ObjectServer, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = object_server.url("away-said")
    options: dict[str, Any] = {"sharding": "none", "local_cache": tmp_path / "disk"}
    from tests.hooks.training import run_training

    object_server.use()
    run_training(as_path(place), 5, **options)
    monkeypatch.setattr(object_store, "_clients", {})
    monkeypatch.setattr(object_store, "_ATTEMPTS", 1)
    monkeypatch.setitem(object_store._RETRIES, "max_retries", 0)
    with proxied(object_server) as proxy:
        away_until(proxy, tmp_path / "disk" / "step-10")
        proxy.server.use()
        run_training(as_path(place), 10, **options)
    said = [one.getMessage() for one in caplog.records]
    assert any(f"{place} could not be asked for its steps" in line and str(tmp_path / "disk") in line for line in said)
    assert any("cannot be reached now" in line for line in said)
    assert not any(object_server.secret_key in line for line in said)
    assert committed_steps(as_path(place)) == [5, 10]
