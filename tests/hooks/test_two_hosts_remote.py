"""A run on two hosts that share a network and an object store, and no folder: as on one disk, also when one is left."""

from __future__ import annotations

import shutil
from pathlib import Path
from threading import Event

import pytest

from shardsmith.ground import object_store
from shardsmith.ground.remote_path import as_path
from shardsmith.hf.export_files import find_export_damage
from shardsmith.manifest.checkpoints import committed_steps
from tests.faulty_proxy import Request, proxied
from tests.hooks.test_export_remote import download
from tests.hooks.test_local_cache import stored
from tests.hooks.test_save import digests
from tests.hooks.training import run_training
from tests.object_server import ObjectServer
from tests.ranks import run_on_ranks
from tests.two_hosts import Host, two_hosts

SCRIPT = Path(__file__).with_name("two_hosts_remote_run.py")
STEPS = (5, 10, 15, 20)


def run_on_a_disk(root: Path) -> None:
    run_training(root / "steps", STEPS[-1], export_to=root / "hf")


class Disks:
    """One for each host, which both see at the same place, where hosts can differ in what they see."""

    def __init__(self, root: Path) -> None:
        self.own = [root / "disk-0", root / "disk-1"]
        self._seen = root / "disk"
        for folder in (*self.own, self._seen):
            folder.mkdir()

    def start(self, hosts: tuple[Host, Host], number: int, place: str, steps: int, ranks: int = 1) -> None:
        host, own = hosts[number], self.own[number]
        seen = self._seen if host.namespace else own
        disk = (own, seen) if host.namespace else None
        first = host if ranks == 2 else hosts[0]
        host.start(first, SCRIPT, place, str(seen), str(steps), disk=disk, ranks=ranks)


def files_in(folder: Path) -> dict[str, bytes]:
    """All but the records of exports, which hold times."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name != "shardsmith.json"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths if path.parent != folder}


@pytest.mark.long
def test_two_hosts_without_a_shared_folder_and_then_one_of_them_alone(
    object_server: ObjectServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(object_store, "_clients", {})
    place, disks = object_server.url("two-hosts"), Disks(tmp_path)
    with two_hosts() as hosts, proxied(object_server, hosts[0].listen()) as proxy:
        proxy.server.use()
        for number in (0, 1):
            disks.start(hosts, number, place, 10)
        assert [host.wait(120) for host in hosts] == [0, 0]
        for number, disk in enumerate(disks.own):
            assert committed_steps(disk) == [5, 10]
            assert [path.name for path in (disk / "step-10").glob("*.distcp")] == [f"__{number}_0.distcp"]
        proxy.requests.clear()
        disks.start(hosts, 1, place, STEPS[-1], ranks=2)
        assert hosts[1].wait(120) == 0
    read = {one.key.rpartition("/")[2] for one in proxy.requests if one.method == "GET" and "/step-10/" in one.key}
    assert {"__0_0.distcp", "__1_0.distcp"} <= read, "its disk has one half of the step that it goes on from"
    assert committed_steps(disks.own[1]) == [15, 20]
    assert {path.name for path in (disks.own[1] / "step-20").glob("*.distcp")} == {"__0_0.distcp", "__1_0.distcp"}
    run_on_ranks(run_on_a_disk, 2, tmp_path, tmp_path)
    expected = {step: digests(tmp_path / "steps" / f"step-{step}") for step in STEPS}
    assert stored(object_server, f"{place}/steps") == expected
    for step in STEPS:
        assert find_export_damage(as_path(f"{place}/hf/step-{step}")) == []
    exported = files_in(download(object_server, "two-hosts/hf", tmp_path / "found"))
    assert exported == files_in(tmp_path / "hf")
    assert {name.partition("/")[0] for name in exported} == {f"step-{step}" for step in STEPS}


@pytest.mark.long
@pytest.mark.parametrize("disk", ["kept", "lost"])
def test_a_host_that_is_killed_comes_back_with_its_disk_or_a_new_one(
    object_server: ObjectServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, disk: str
) -> None:
    monkeypatch.setattr(object_store, "_clients", {})
    place, disks, stored_10 = object_server.url(f"killed-host-{disk}"), Disks(tmp_path), Event()

    def note(request: Request) -> None:
        if request.method == "PUT" and request.key.endswith("step-10/metadata.json"):
            stored_10.set()

    with two_hosts() as hosts, proxied(object_server, hosts[0].listen()) as proxy:
        proxy.done = note
        proxy.server.use()
        for number in (0, 1):
            disks.start(hosts, number, place, STEPS[-1])
        assert stored_10.wait(120)
        hosts[1].kill()
        hosts[0].kill()  # as the job's launcher does when a rank is gone
        if disk == "lost":
            shutil.rmtree(disks.own[1])
            disks.own[1].mkdir()
        for number in (0, 1):
            disks.start(hosts, number, place, STEPS[-1] + 20)
        assert [host.wait(240) for host in hosts] == [0, 0]
    last = STEPS[-1] + 20
    run_on_ranks(run_training_of, 2, tmp_path, tmp_path / "straight", last)
    found = stored(object_server, f"{place}/steps")
    assert found == {step: digests(tmp_path / "straight" / f"step-{step}") for step in found}
    assert {*range(STEPS[-1] + 5, last + 1, 5)} <= {*found}, "all that the first run cannot have come to"
    for number, own in enumerate(disks.own):
        assert committed_steps(own) == [last - 5, last]
        assert [path.name for path in (own / f"step-{last}").glob("*.distcp")] == [f"__{number}_0.distcp"]


def run_training_of(folder: Path, steps: int) -> None:
    run_training(folder, steps)
