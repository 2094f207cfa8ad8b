"""A run on two hosts that share nothing but a folder and a network: also when one of them dies while it writes."""

from __future__ import annotations

from pathlib import Path

import pytest

from shardsmith.formats.by_path import open_source
from shardsmith.ground.layout import parse_step
from shardsmith.manifest.checkpoints import find_damage
from shardsmith.tensors.tensors import read_tensor
from tests.two_hosts import Host, two_hosts, wait_for

SCRIPT = Path(__file__).with_name("two_hosts_run.py")


@pytest.mark.long
def test_a_host_that_dies_while_it_writes_leaves_nothing_torn_and_the_next_run_goes_on(tmp_path: Path) -> None:
    expected = {"steps": {8, 10}, "slices": {2, 4, 6, 8, 10}, "files": {2, 4, 6, 8, 10}}
    # the first host has rank 0 and the job's store
    for dying, kind, step, unplugged in ((1, "steps", 4, False), (0, "slices", 6, False), (1, "files", 8, True)):
        with two_hosts() as hosts:
            error = lose_a_host(tmp_path, hosts, dying, kind, step, unplugged)
        assert error.startswith("RankTimeoutError: ")
        assert f"rank {dying} did not respond" in error
        assert step not in whole_steps(tmp_path / kind)
        back_at = max(whole_steps(tmp_path / "steps"))
        for other in ("slices", "files"):  # an earlier export that was still being written, and is not come back to
            late = {step for step in expected[other] if step < back_at} - whole_steps(tmp_path / other)
            assert len(late) <= 1
            expected[other] -= late
    with two_hosts() as hosts:
        for host in hosts:
            host.start(hosts[0], SCRIPT, str(tmp_path), "10")
        assert [host.wait(120) for host in hosts] == [0, 0]
    for kind, steps in expected.items():
        assert whole_steps(tmp_path / kind) == steps
        assert {path.name for path in (tmp_path / kind).iterdir() if parse_step(path.name) is None} <= {
            ".retention.json"
        }


def lose_a_host(folder: Path, hosts: tuple[Host, Host], dying: int, kind: str, step: int, unplugged: bool) -> str:
    """Kill one where it writes its part of a step; what the other one has to say."""
    for host in hosts:
        host.start(hosts[0], SCRIPT, str(folder), "20", kind, str(step), str(dying))
    wait_for(folder / "stopped", hosts)
    if unplugged:
        hosts[dying].unplug()
    hosts[dying].kill()
    survivor = 1 - dying
    assert hosts[survivor].wait(120) != 0
    (folder / "stopped").unlink()
    error = folder / f"error-{survivor}"
    text = error.read_text()
    error.unlink()
    return text


def whole_steps(directory: Path) -> set[int]:
    """The steps that are visible. All that they hold is of that step."""
    steps = {step for path in directory.iterdir() if (step := parse_step(path.name)) is not None}
    for step in steps:
        path = directory / f"step-{step}"
        if directory.name == "steps":
            assert not find_damage(path)
        source = open_source(path)
        assert len(source.specs) == 2
        assert all((read_tensor(source, name) == step).all() for name in source.specs)
        source.close()
    return steps
