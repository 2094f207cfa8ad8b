"""A run that is killed at each request that it makes to an object store: no step is torn, no committed one lost."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Literal

import pytest
from torch.multiprocessing import ProcessExitedException

from shardsmith.ground import object_store
from shardsmith.ground.remote_path import as_path
from shardsmith.hooks import latest
from shardsmith.manifest.checkpoints import committed_steps, find_damage
from shardsmith.manifest.metadata import read_metadata
from tests.faulty_proxy import Fault, Proxy, Request, proxied
from tests.hooks.test_save import digests
from tests.hooks.training import run_training
from tests.object_server import ObjectServer
from tests.ranks import run_on_ranks

STEPS = 10
Moment = Literal["before", "after"]
"""The victim dies before the store gets the request, or after it has done it and before the answer."""


def train(server: ObjectServer, place: str, pid: Path) -> None:
    pid.write_text(str(os.getpid()))
    server.use()
    run_training(place, STEPS, sharding="none", keep=latest(1))  # type: ignore[arg-type]


def kill_at(proxy: Proxy, point: int, moment: Moment, pid: Path) -> None:
    """Let the process that ``pid`` names die at the request of this number, counted from 0."""

    def fault(request: Request, seen: int) -> Fault | None:  # noqa: ARG001
        if len(proxy.requests) - 1 == point and moment == "before":
            os.kill(int(pid.read_text()), signal.SIGKILL)
        return "drop" if len(proxy.requests) - 1 >= point and moment == "before" else None

    def done(request: Request) -> None:
        if proxy.requests.index(request) == point and moment == "after":
            os.kill(int(pid.read_text()), signal.SIGKILL)

    proxy.fault, proxy.done = fault, done


@pytest.fixture(scope="module")
def straight(object_server: ObjectServer, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, str], int]:
    """What an uninterrupted run ends with, and how many requests it makes."""
    root = tmp_path_factory.mktemp("straight")
    with proxied(object_server) as proxy:
        run_on_ranks(train, 1, root, proxy.server, object_server.url("unkilled"), root / "pid")
    object_server.use()
    return digests(as_path(object_server.url(f"unkilled/step-{STEPS}"))), len(proxy.requests)


@pytest.mark.long
@pytest.mark.parametrize("moment", ["before", "after"])
def test_no_kill_tears_a_step_or_loses_one(
    object_server: ObjectServer,
    straight: tuple[dict[str, str], int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    moment: Moment,
) -> None:
    expected, requests = straight
    for point in range({"before": 0, "after": 2}[moment], requests, 4):
        name = f"killed-{moment}-{point}"
        place = object_server.url(name)
        with proxied(object_server) as proxy:
            kill_at(proxy, point, moment, tmp_path / "pid")
            with pytest.raises(ProcessExitedException) as died:
                run_on_ranks(train, 1, tmp_path, proxy.server, place, tmp_path / "pid")
        assert died.value.exit_code == -signal.SIGKILL
        monkeypatch.setattr(object_store, "_clients", {})
        object_server.use()
        steps = committed_steps(as_path(place))
        assert [damage for step in steps for damage in find_damage(as_path(f"{place}/step-{step}"))] == []
        assert set(steps) >= committed_before(proxy, moment) - removed_before(proxy)
        run_on_ranks(train, 1, tmp_path, object_server, place, tmp_path / "pid")
        assert digests(as_path(f"{place}/step-{STEPS}")) == expected
        steps = committed_steps(as_path(place))
        left = set().union(*(files_of(place, step) for step in steps))
        assert object_server.keys(name).keys() == {*left, ".retention.json"}


def files_of(place: str, step: int) -> set[str]:
    attempt = read_metadata(as_path(f"{place}/step-{step}")).attempt
    files = {f"step-{step}/{attempt}/{file}" for file in (".boxes", ".metadata", "__0_0.distcp")}
    return {f"step-{step}/metadata.json", *files}


def committed_before(proxy: Proxy, moment: Moment) -> set[int]:
    """The steps whose manifests the store has taken."""
    done = proxy.requests[: -1 if moment == "before" else None]
    names = [one.key.split("/") for one in done if one.method == "PUT" and one.key.endswith("/metadata.json")]
    return {int(name[-2].removeprefix("step-")) for name in names}


def removed_before(proxy: Proxy) -> set[int]:
    """Steps that retention may have begun to remove: those before the newest."""
    steps = committed_before(proxy, "after")
    return steps - {max(steps)} if steps else set()
