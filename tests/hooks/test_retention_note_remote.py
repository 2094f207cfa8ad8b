"""What is said of the next removals in an object store, compared with what the next save of a real run removes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import obstore
import pytest
from torch import nn

from shardsmith import cli
from shardsmith.ground import object_store
from shardsmith.ground.layout import METADATA_FILE, PROVENANCE_FILE
from shardsmith.ground.remote_path import as_path
from shardsmith.hooks import (
    HFExport,
    Hooks,
    Retention,
    ShardedSave,
    best,
    every,
    keep_if,
    latest,
    multiples_of,
    newer_than,
)
from shardsmith.manifest.checkpoints import committed_steps
from shardsmith.overview import RetentionOutlook, inspect_run
from tests.faulty_proxy import proxied
from tests.object_server import ObjectServer


class EvenSteps(Retention):
    """A policy of the program's own."""

    def keep(self, steps: Sequence[int], directory: Path | None = None) -> set[int]:  # noqa: ARG002
        return {step for step in steps if step % 20 == 0}


POLICIES = {
    "newest and multiples": latest(2) | multiples_of(30),
    "the best": best("loss", keep=2) | latest(1),
    "a function": keep_if(lambda step: step % 40 == 0) | latest(1),
    "all that is young": newer_than(hours=1),
    "a class of the program": EvenSteps(),
}


@pytest.fixture(autouse=True)
def _clients(object_server: ObjectServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(object_store, "_clients", {})
    object_server.use()


def outlook(place: str) -> RetentionOutlook | None:
    found = inspect_run(place).retention
    assert len(found) <= 1
    return found[0] if found else None


def steps_at(place: str) -> set[int]:
    path = as_path(place)
    return {*committed_steps(path, METADATA_FILE), *committed_steps(path, PROVENANCE_FILE)}


@pytest.mark.parametrize(
    ("what", "kind"),
    [*((what, "save") for what in POLICIES), ("newest and multiples", "export"), ("the best", "export")],
)
def test_what_goes_is_what_was_said(what: str, kind: str, object_server: ObjectServer) -> None:
    place, keep, model = object_server.url(f"said/{kind}/{what}"), POLICIES[what], nn.Linear(4, 4)
    hook: ShardedSave | HFExport = (
        ShardedSave(place, model=model, when=every(10), keep=keep, async_mode="disabled")
        if kind == "save"
        else HFExport(place, model=model, when=every(10), keep=keep)
    )
    hooks, removed, undecided = Hooks(hook), 0, 0
    for step in range(10, 80, 10):
        before = steps_at(place)
        said = outlook(place) if before else None
        hooks.step(step)
        if isinstance(hook, HFExport):
            hook.wait()
        gone = before - steps_at(place)
        if said is not None:
            assert said.policy == (
                "a class of the program, EvenSteps" if what == "a class of the program" else repr(keep)
            )
            assert set(said.removes) <= gone
            assert gone - set(said.removes) <= set(said.undecided)
            removed, undecided = removed + len(gone), undecided + len(said.undecided)
        hooks.metric(step, loss=(step * 7) % 11)
    hooks.close()
    assert (removed > 0) == (what != "all that is young")
    assert (undecided > 0) == (what != "newest and multiples")


def train(place: str, keep: Retention | None, until: int, **options: str) -> None:
    save = ShardedSave(place, model=nn.Linear(4, 4), when=every(10), keep=keep, **options)
    with Hooks(save) as hooks:
        for step in range(hooks.resume() + 1, until + 1):
            hooks.step(step)


def test_the_note_is_that_of_the_run_that_trains_now(
    object_server: ObjectServer, capsys: pytest.CaptureFixture[str]
) -> None:
    run = object_server.url("turns")
    place = f"{run}/checkpoints"
    train(place, latest(3), 30)
    train(place, latest(2), 30)  # it resumes, and has saved nothing yet
    assert cli.main(["inspect", run]) == 0
    printed = capsys.readouterr().out
    assert "checkpoints keeps latest(2)" in printed
    assert "the next one there removes 10, 20: " in printed
    assert cli.main(["inspect", run, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["retention"][0]["removes"] == [10, 20]
    assert cli.main(["clean", run, "--delete"]) == 0
    assert outlook(place) is not None
    train(place, None, 40)
    assert outlook(place) is None
    assert {key.split("/")[0] for key in object_server.keys("turns/checkpoints")} == {
        f"step-{n}0" for n in (1, 2, 3, 4)
    }


def test_a_run_with_disks_of_its_own_says_what_goes_here_and_there(object_server: ObjectServer, tmp_path: Path) -> None:
    place = object_server.url("cached-outlook")
    train(place, latest(3), 40, local_cache=str(tmp_path / "disk"))
    for where, policy, removes in ((place, "latest(3)", (20,)), (str(tmp_path / "disk"), "latest(2)", (30,))):
        said = outlook(where)
        assert said is not None
        assert (said.policy, said.removes) == (policy, removes)


def test_a_note_that_cannot_be_written_stops_nothing_and_is_written_later(object_server: ObjectServer) -> None:
    with proxied(object_server) as proxy:
        proxy.server.use()
        full = 2
        proxy.fault = lambda request, seen: (
            "full" if request.method == "PUT" and "retention" in request.key and seen < full else None
        )
        place = proxy.server.url("full")
        train(place, latest(1), 10)  # when it begins, and with its save
        assert committed_steps(as_path(place)) == [10]
        assert outlook(place) is None
        train(place, latest(1), 20)
        assert outlook(place) is not None
        puts = [one for one in proxy.requests if one.method == "PUT" and "retention" in one.key]
        assert len(puts) == full + 1, "once in a process, when it is there"


def test_a_note_that_cannot_be_understood_says_nothing(object_server: ObjectServer) -> None:
    place = object_server.url("strange")
    train(place, latest(2), 20)
    obstore.put(object_server.client(), "strange/.retention.json", b"\xff{")
    assert outlook(place) is None
