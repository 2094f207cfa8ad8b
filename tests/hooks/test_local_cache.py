"""``ShardedSave("s3://...", local_cache=...)``: on the hosts' own disks first, then in the store; back from either."""

from __future__ import annotations

import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
import torch.distributed as dist
from torch.multiprocessing import ProcessExitedException

from shardsmith import CheckpointNotFoundError, UsageError
from shardsmith.ground import object_store
from shardsmith.ground.host_folder import HostFolder
from shardsmith.ground.ranks import Ranks
from shardsmith.ground.remote_path import as_path
from shardsmith.hooks import Hooks, ShardedSave, every, latest
from shardsmith.manifest.checkpoints import committed_steps, find_damage
from shardsmith.manifest.metadata import read_metadata
from tests.faulty_proxy import Fault, Proxy, Request, proxied
from tests.hooks.test_save import digests
from tests.hooks.training import build, run_training
from tests.object_server import ObjectServer
from tests.ranks import run_on_ranks


@pytest.fixture(autouse=True)
def _fresh_clients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(object_store, "_clients", {})


def disk_of(root: Path, hosts: int) -> Path:
    """The disk of this rank's "host": with as many hosts as ranks, each has its own."""
    return root / f"host-{dist.get_rank() % hosts}"


def train(server: ObjectServer, place: str, root: Path, hosts: int, steps: int, options: dict[str, Any]) -> None:
    server.use()
    run_training(place, steps, local_cache=disk_of(root, hosts), **options)  # type: ignore[arg-type]


def run_local(place: Path, steps: int) -> None:
    run_training(place, steps)


@pytest.fixture(scope="module")
def posix(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, str]]:
    """Digests of the steps of a run on a disk that nothing interrupts."""
    root = tmp_path_factory.mktemp("posix")
    run_on_ranks(run_local, 2, root, root / "run", 20)
    return {step: digests(root / "run" / f"step-{step}") for step in (5, 10, 15, 20)}


def stored(server: ObjectServer, place: str) -> dict[int, dict[str, str]]:
    """The sound steps in the store, with their digests."""
    server.use()
    steps = {step: as_path(f"{place}/step-{step}") for step in committed_steps(as_path(place))}
    assert not [damage for path in steps.values() for damage in find_damage(path)]
    return {step: digests(path) for step, path in steps.items()}


@pytest.mark.parametrize("hosts", [1, 2])
def test_steps_are_on_the_disks_and_in_the_store_each_by_its_own_retention(
    object_server: ObjectServer, posix: dict[int, dict[str, str]], tmp_path: Path, hosts: int
) -> None:
    place = object_server.url(f"cached-{hosts}")
    options = {"keep": latest(3), "keep_local": latest(1)}
    run_on_ranks(train, 2, tmp_path, object_server, place, tmp_path, hosts, 20, options)
    assert stored(object_server, place) == {step: posix[step] for step in (10, 15, 20)}
    attempt = read_metadata(as_path(f"{place}/step-20")).attempt
    shards = {f"__{rank}_0.distcp" for rank in (0, 1)}
    for host in range(hosts):
        disk = tmp_path / f"host-{host}"
        assert committed_steps(disk) == [20]
        assert {path.name for path in disk.iterdir()} == {"step-20", ".retention.json", "cache-of.txt"}
        own = shards if hosts == 1 else {f"__{host}_0.distcp"}
        assert {path.name for path in (disk / "step-20").iterdir()} == {*own, ".boxes", ".metadata", "metadata.json"}
        assert read_metadata(disk / "step-20").attempt == attempt
    assert {one for one in object_server.keys(f"cached-{hosts}") if one.endswith(".owner")} == set()


def test_a_disk_that_a_link_leads_to_is_as_good(
    object_server: ObjectServer, posix: dict[int, dict[str, str]], tmp_path: Path
) -> None:
    place = object_server.url("cached-linked")
    (tmp_path / "disk").mkdir()
    (tmp_path / "host-0").symlink_to("disk")
    run_on_ranks(train, 2, tmp_path, object_server, place, tmp_path, 1, 5, {})
    assert stored(object_server, place) == {5: posix[5]}
    assert {path.name for path in (tmp_path / "disk").iterdir()} >= {"step-5", "cache-of.txt"}


def test_memory_can_be_made_before_the_first_save(
    object_server: ObjectServer, posix: dict[int, dict[str, str]], tmp_path: Path
) -> None:
    place = object_server.url("cached-prewarmed")
    run_on_ranks(train, 2, tmp_path, object_server, place, tmp_path, 2, 10, {"prewarm": True})
    assert stored(object_server, place) == {step: posix[step] for step in (5, 10)}


@pytest.mark.parametrize("hosts", [1, 2])
def test_a_killed_run_goes_on_from_a_step_that_the_store_never_got(
    object_server: ObjectServer, posix: dict[int, dict[str, str]], tmp_path: Path, hosts: int
) -> None:
    place = object_server.url(f"unplugged-{hosts}")
    with proxied(object_server) as proxy:
        proxy.fault = lambda request, seen: "full" if "/step-" in request.path and request.method == "PUT" else None  # noqa: ARG005
        with pytest.raises(ProcessExitedException) as died:
            run_on_ranks(train, 2, tmp_path, proxy.server, place, tmp_path, hosts, 20, {"kill_after": 13})
    assert died.value.exit_code == -signal.SIGKILL
    assert stored(object_server, place) == {}
    # it may have died when step 10 was committed on one host and not on the other
    newest = max(set.intersection(*({*committed_steps(tmp_path / f"host-{host}")} for host in range(hosts))))
    assert newest in (5, 10)
    run_on_ranks(train, 2, tmp_path, object_server, place, tmp_path, hosts, 20, {})
    assert stored(object_server, place) == {step: posix[step] for step in (5, 10, 15, 20) if step >= newest}


def damage_local(disk: Path) -> None:
    file = disk / "step-10" / "__0_0.distcp"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(bytes(data))


def lose_disk(disk: Path) -> None:
    shutil.rmtree(disk)


def lose_file(disk: Path) -> None:
    (disk / "step-10" / "__0_0.distcp").unlink()


@pytest.mark.parametrize("harm", [damage_local, lose_disk, lose_file])
def test_what_is_wrong_on_a_disk_comes_from_the_store(
    object_server: ObjectServer, posix: dict[int, dict[str, str]], tmp_path: Path, harm: Callable[[Path], None]
) -> None:
    place = object_server.url(f"harmed-{harm.__name__}")
    run_on_ranks(train, 2, tmp_path, object_server, place, tmp_path, 1, 10, {})
    harm(tmp_path / "host-0")
    run_on_ranks(train, 2, tmp_path, object_server, place, tmp_path, 1, 20, {})
    assert stored(object_server, place) == posix
    assert committed_steps(tmp_path / "host-0") == [15, 20]


def test_ranks_that_have_changed_hosts_resume_the_same(
    object_server: ObjectServer, posix: dict[int, dict[str, str]], tmp_path: Path
) -> None:
    place = object_server.url("moved")
    run_on_ranks(train, 2, tmp_path, object_server, place, tmp_path, 2, 10, {})
    for host in (0, 1):
        (tmp_path / f"host-{host}").rename(tmp_path / f"host-{1 - host}-swapped")
    for host in (0, 1):
        (tmp_path / f"host-{host}-swapped").rename(tmp_path / f"host-{host}")
    run_on_ranks(train, 2, tmp_path, object_server, place, tmp_path, 2, 20, {})
    assert stored(object_server, place) == posix


def once_each(fault: Fault, place: str) -> Callable[[Request, int], Fault | None]:
    """Every request about a place fails the first time, listings too."""
    met: set[tuple[str, str]] = set()

    def fail_first(request: Request, seen: int) -> Fault | None:  # noqa: ARG001
        if place not in unquote(request.path) or (request.method, request.path) in met:
            return None
        met.add((request.method, request.path))
        return fault

    return fail_first


def only_once(fault: Fault, method: str, name: str) -> Callable[[Request, int], Fault | None]:
    """One request about step 10 is refused."""
    refused: list[Request] = []

    def refuse(request: Request, seen: int) -> Fault | None:  # noqa: ARG001
        if refused or request.method != method or "/step-10/" not in request.key or not request.key.endswith(name):
            return None
        refused.append(request)
        return fault

    return refuse


def train_and_compare(
    server: ObjectServer, posix: dict[int, dict[str, str]], root: Path, name: str, arm: Callable[[Proxy], None]
) -> list[Request]:
    """Train with a store that answers badly while step 10 is uploaded; the requests. All is as if it had not."""
    place = server.url(name)
    with proxied(server) as proxy:
        arm(proxy)
        run_on_ranks(train, 2, root, proxy.server, place, root, 1, 20, {"keep_local": latest(4)})
    assert stored(server, place) == posix
    parts = [key.split("/") for key in server.keys(name)]
    names = sorted((step, rest[-1]) for step, *rest in parts)
    files = (".boxes", ".metadata", "__0_0.distcp", "__1_0.distcp", "metadata.json")
    assert names == sorted((f"step-{step}", file) for step in posix for file in files), "something is left"
    disk = root / "host-0"
    assert {step: digests(disk / f"step-{step}") for step in committed_steps(disk)} == posix
    assert not [damage for step in posix for damage in find_damage(disk / f"step-{step}")]
    return proxy.requests


def puts_of(requests: Sequence[Request], name: str) -> list[int]:
    return [i for i, one in enumerate(requests) if one.method == "PUT" and one.key.endswith(name)]


@pytest.mark.parametrize("fault", ["503", "drop", "lost", "cut"])
def test_what_may_pass_is_repeated_within_the_upload(
    object_server: ObjectServer, posix: dict[int, dict[str, str]], tmp_path: Path, fault: Fault
) -> None:
    def arm(proxy: Proxy) -> None:
        proxy.fault = once_each(fault, f"passing-{fault}/step-10/")

    requests = train_and_compare(object_server, posix, tmp_path, f"passing-{fault}", arm)
    about = Counter((one.method, one.path) for one in requests if "/step-10/" in unquote(one.path))
    repeated = Counter(method for (method, path), count in about.items() if count > 1)
    assert any("list-type" in path for _, path in about)
    assert repeated["GET"] >= 2, "the manifest, and the listing"
    assert fault == "cut" or repeated["PUT"] == 6, "of four files, the owner and the manifest"
    assert puts_of(requests, "step-10/metadata.json")[-1] < puts_of(requests, "step-15/metadata.json")[0]


@pytest.mark.parametrize(
    ("fault", "name"), [("full", ".owner"), ("full", ".distcp"), ("expired", ".distcp"), ("expired", "metadata.json")]
)
def test_a_refused_upload_holds_nothing_up_and_the_next_one_makes_up_for_it(
    object_server: ObjectServer, posix: dict[int, dict[str, str]], tmp_path: Path, fault: Fault, name: str
) -> None:
    def arm(proxy: Proxy) -> None:
        proxy.fault = only_once(fault, "PUT", name)

    requests = train_and_compare(object_server, posix, tmp_path, f"refused-{fault}-{name.strip('.')}", arm)
    owners = [one for one in requests if one.method == "PUT" and "/step-10/" in one.key and one.key.endswith(".owner")]
    assert len(owners) == 2, "it was uploaded again from the beginning"


def test_an_answer_that_is_late_does_not_hold_the_training_up(
    object_server: ObjectServer, posix: dict[int, dict[str, str]], tmp_path: Path
) -> None:
    went_on: list[bool] = []

    def hold(request: Request) -> None:
        """Hold the answers about what is put of step 10 until the training has step 15 on the disk."""
        if request.method == "PUT" and "/step-10/" in request.key:
            went_on.append(appears(tmp_path / "host-0" / "step-15"))

    def arm(proxy: Proxy) -> None:
        proxy.done = hold

    train_and_compare(object_server, posix, tmp_path, "late", arm)
    assert went_on == [True] * 6


def appears(path: Path) -> bool:
    deadline = time.monotonic() + 60
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    return path.exists()


def run_groups(root: Path) -> None:
    ranks = Ranks()
    folder = HostFolder(root / f"host-{ranks.rank // 2}", ranks)
    assert (folder.ranks_here, folder.count) == ([[0, 1], [2]][ranks.rank // 2], 2)
    assert folder.is_leader == (ranks.rank in (0, 2))
    shared = HostFolder(root / "shared", ranks)
    assert (shared.ranks_here, shared.count) == ([0, 1, 2], 1)
    ranks.gather("looking", list)
    assert [path.name for path in (root / "shared").iterdir()] == [".probe-of-a-user"], "that of a killed run is gone"


def test_ranks_find_out_who_shares_a_disk(tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir()
    for name in (".probe-0123456789abcdef-3", ".probe-of-a-user"):
        (tmp_path / "shared" / name).touch()
    run_on_ranks(run_groups, 3, tmp_path, tmp_path)


def test_what_does_not_go_with_it_is_refused(object_server: ObjectServer, tmp_path: Path) -> None:
    object_server.use()
    model = build("none")
    with pytest.raises(UsageError, match="is for runs that save to an object store"):
        ShardedSave(tmp_path / "run", model=model, when=every(5), local_cache=tmp_path / "cache")
    with pytest.raises(UsageError, match="local_cache"):
        ShardedSave(object_server.url("x"), model=model, when=every(5), local_cache="s3://bucket/cache")
    save = ShardedSave(object_server.url("empty"), model=model, when=every(5), local_cache=tmp_path / "cache")
    with pytest.raises(UsageError, match="holds steps of s3://bucket/empty, and this run saves to s3://bucket/other"):
        ShardedSave(object_server.url("other"), model=model, when=every(5), local_cache=tmp_path / "cache")
    with pytest.raises(CheckpointNotFoundError, match="there: none"):
        Hooks(save).resume(step=5)
    from shardsmith.hooks import HFExport

    with pytest.raises(UsageError, match="on the hosts' own disks"):
        HFExport(tmp_path / "hf", model=model, when=every(5), source="checkpoint", checkpoints=save)
