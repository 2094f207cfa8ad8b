"""What is said of the next removals, compared with what the next save of a real run removes."""

from __future__ import annotations

import json
import math
import os
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import nn

from shardsmith import cli
from shardsmith.ground.commit import sweep
from shardsmith.ground.layout import PROVENANCE_FILE, RETENTION_FILE
from shardsmith.hooks import (
    EMA,
    HFExport,
    Hooks,
    Recorder,
    Retention,
    ShardedSave,
    best,
    every,
    keep_if,
    latest,
    low_disk,
    multiples_of,
    newer_than,
)
from shardsmith.manifest.checkpoints import committed_steps
from shardsmith.overview import RetentionOutlook, inspect_run

HOUR = 3600.0
STEPS = range(10, 130, 10)


class EvenSteps(Retention):
    """A policy of the program's own."""

    def keep(self, steps: Sequence[int], directory: Path | None = None) -> set[int]:  # noqa: ARG002
        return {step for step in steps if step % 20 == 0}


CERTAIN = {
    "the newest": latest(3),
    "multiples": multiples_of(30),
    "both": latest(2) | multiples_of(50) | multiples_of(40),
    "one": latest(1),
    "nothing": Retention(),
    "old age": newer_than(hours=1) | latest(2),
    "what is kept while there is room": low_disk(1, "thin_out"),
    "a warning": latest(2) | low_disk("900000TB", "warn"),
}
OPEN = {
    "the best": best("loss", keep=2),
    "the best of two": best("loss") | best("accuracy", keep=2, mode="max") | latest(1),
    "a function": keep_if(lambda step: step % 40 == 0) | latest(2),
    "everything": latest(1) | multiples_of(60) | best("loss") | newer_than(hours=3) | keep_if(lambda step: step == 20),
    "too little room": latest(5) | multiples_of(30) | low_disk("900000TB", "thin_out"),
    "too little room, all kept": low_disk("900000TB", "thin_out"),
    "a class of the program": EvenSteps(),
}


def outlook(directory: Path) -> RetentionOutlook | None:
    found = inspect_run(directory).retention
    assert len(found) <= 1
    return found[0] if found else None


def steps_in(directory: Path) -> list[int]:
    steps = {int(path.name.split("-")[1]) for path in directory.glob("step-*")}
    assert steps == {*committed_steps(directory), *committed_steps(directory, PROVENANCE_FILE)}
    return sorted(steps)


def compare_with_the_next(directory: Path, save: Callable[[], None]) -> RetentionOutlook | None:
    """Save, and compare what went with what was said; nothing but the open ones may differ."""
    before = steps_in(directory)
    said = outlook(directory) if before else None
    save()
    gone = set(before) - set(steps_in(directory))
    if said is not None:
        assert set(said.removes) <= gone
        assert gone - set(said.removes) <= set(said.undecided)
        assert not set(said.removes) & set(said.undecided)
    return said


def grow_older(directory: Path) -> None:
    for step in steps_in(directory):
        path = directory / f"step-{step}"
        then = path.stat().st_mtime - HOUR
        os.utime(path, (then, then))


@pytest.mark.parametrize(
    ("what", "kind"), [*((what, "save") for what in (*CERTAIN, *OPEN)), ("both", "export"), ("everything", "export")]
)
def test_what_goes_is_what_was_said(what: str, kind: str, tmp_path: Path) -> None:
    keep, model, chance = {**CERTAIN, **OPEN}[what], nn.Linear(4, 4), random.Random(what)
    ema = EMA(model, decay=0.5)
    hook: ShardedSave | HFExport = (
        ShardedSave(tmp_path, model=model, when=every(10), keep=keep, async_mode="disabled")
        if kind == "save"
        else HFExport(tmp_path, model=model, ema=ema, ema_as="directory", when=every(10), keep=keep)
    )
    hooks, said = Hooks(ema, hook), []

    def save(step: int) -> None:
        hooks.step(step)
        if isinstance(hook, HFExport):
            hook.wait()

    for step in STEPS:
        said.append(compare_with_the_next(tmp_path, lambda step=step: save(step)))  # type: ignore[misc]
        grow_older(tmp_path)
        for late in chance.sample(range(10, step + 1, 10), k=min(2, step // 10)):  # late, twice, or never
            value = chance.choice([chance.random(), math.nan, 5.0])
            hooks.metric(late, loss=value, **({"accuracy": value} if chance.random() < 0.5 else {}))
    hooks.close()
    known = [one for one in said if one is not None]
    assert len(known) == len(STEPS) - 1
    assert any(one.removes or one.undecided for one in known) or what == "what is kept while there is room"
    if what in CERTAIN and what != "old age":
        assert not any(one.undecided for one in known)
    assert known[-1].policy == ("a class of the program, EvenSteps" if what == "a class of the program" else repr(keep))


def train(directory: Path, keep: Retention | None, until: int) -> None:
    save = ShardedSave(directory, model=nn.Linear(4, 4), when=every(10), keep=keep)
    with Hooks(save) as hooks:
        for step in range(hooks.resume() + 1, until + 1):
            hooks.step(step)


def test_the_note_is_that_of_the_run_that_trains_now(tmp_path: Path) -> None:
    train(tmp_path, latest(3), 30)
    said = outlook(tmp_path)
    assert said is not None
    assert (said.policy, said.removes) == ("latest(3)", (10,))
    train(tmp_path, latest(2), 30)  # it resumes, and has saved nothing yet
    said = outlook(tmp_path)
    assert said is not None
    assert (said.policy, said.removes) == ("latest(2)", (10, 20))
    train(tmp_path, None, 40)
    assert outlook(tmp_path) is None
    assert not (tmp_path / RETENTION_FILE).exists()


def test_a_recorder_notes_its_policy_too(tmp_path: Path) -> None:
    with Hooks(Recorder(tmp_path / "missing", model=nn.Linear(4, 4), keep=latest(2))) as hooks:
        hooks.resume()
    assert not (tmp_path / "missing").exists()  # trainers take its being there for a run to go on with
    with Hooks(Recorder(tmp_path, model=nn.Linear(4, 4), keep=latest(2))) as hooks:
        hooks.resume()
    assert json.loads((tmp_path / RETENTION_FILE).read_text())["policy"] == "latest(2)"


def note(**changes: object) -> bytes:
    said = {"schema_version": 1, "policy": "x", "marker": "metadata.json", "terms": None, "conditions": []}
    return json.dumps({**said, **changes}).encode()


TERMS = {"newest": 1, "multiples": [], "bests": [], "newer_secs": 0, "low_disks": []}
NO_NOTES: dict[str, bytes | None] = {
    "cut off": note()[:30],
    "nothing": b"",
    "a later version": note(schema_version=2),
    "a list": b"[1]",
    "another marker": note(marker="../x"),
    "terms that are none": note(terms=3),
    "counts that are none": note(terms={**TERMS, "newest": -1, "multiples": ["x"]}),
    "metrics that are none": note(terms={**TERMS, "bests": ["x"]}),
    "not text": b"\xff\xfe",
    "nested": b"[" * 100_000,
    "a folder": None,
}


@pytest.mark.parametrize("what", NO_NOTES)
def test_a_note_that_cannot_be_understood_says_nothing(what: str, tmp_path: Path) -> None:
    train(tmp_path, None, 20)
    place, content = tmp_path / RETENTION_FILE, NO_NOTES[what]
    place.mkdir() if content is None else place.write_bytes(content)
    assert outlook(tmp_path) is None
    assert cli.main(["inspect", str(tmp_path)]) == 0


def test_what_a_kill_left_of_a_note_is_swept(tmp_path: Path) -> None:
    left = tmp_path / f".{RETENTION_FILE}.tmp-0123456789abcdef"
    left.write_text("{")
    sweep(tmp_path)
    assert not left.exists()


def test_table_json_and_page_show_what_goes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keep = latest(1) | best("<b>loss</b>") | multiples_of(50)
    train(tmp_path / "checkpoints", keep, 10)
    model = nn.Linear(4, 4)
    save = ShardedSave(tmp_path / "checkpoints", model=model, when=every(10), keep=keep, async_mode="disabled")
    hooks = Hooks(save)
    hooks.metric(10, **{"<b>loss</b>": torch.tensor(3.0)})
    for step in range(hooks.resume() + 1, 51):
        hooks.step(step)
    hooks.metric(20, **{"<b>loss</b>": 4.0})
    hooks.close()
    page = tmp_path / "page.html"
    assert cli.main(["inspect", str(tmp_path), "--html", str(page), "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["retention"]
    assert (found["path"], found["removes"]) == ("checkpoints", [20])
    assert list(found["undecided"]) == ["10", "30", "40"]
    assert cli.main(["inspect", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "the next one there removes 20: " in printed
    assert "open: 10, 30, 40 (best('<b>loss</b>', keep=1, mode='min'))" in printed
    text = page.read_text()
    assert "<b>loss</b>" not in text
    assert "<td>removed</td>" in text
    assert "<td>kept</td>" in text
