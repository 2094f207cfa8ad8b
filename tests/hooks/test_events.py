"""What hooks tell of what they have done: every kind of event, the adapters, and what a listener may do."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils.tensorboard import SummaryWriter

from shardsmith.errors import (
    InitialLoadError,
    MismatchError,
    RankFailedError,
    TargetExistsError,
    UsageError,
    WriteError,
)
from shardsmith.hooks import (
    EMA,
    Event,
    HFExport,
    Hooks,
    InitialLoad,
    ShardedSave,
    every,
    json_lines,
    latest,
    metrics_to,
    spans,
    tensorboard,
)
from shardsmith.overview import inspect_run
from tests.export.test_to_hf_refusals import files_no_larger_than
from tests.ranks import run_on_ranks


def train(run: Path, on_event: Any, steps: int = 4, **options: Any) -> None:
    model = nn.Linear(4, 4)
    save = ShardedSave(run / "checkpoints", model=model, when=every(1), keep=latest(2), **options)
    with Hooks(save, HFExport(run / "hf", model=model, when=every(2)), on_event=on_event) as hooks:
        for step in range(hooks.resume() + 1, steps + 1):
            hooks.step(step)


def lines_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.parametrize("async_mode", ["async", "disabled"])
def test_every_resume_save_export_and_removal_is_told_once(async_mode: str, tmp_path: Path) -> None:
    events: list[Event] = []
    train(tmp_path, events.append, 3, async_mode=async_mode)
    train(tmp_path, events.append, 4, async_mode=async_mode)
    kinds = ("resume", "save", "export", "remove")
    found = {kind: [event.step for event in events if event.kind == kind] for kind in kinds}
    assert found == {"resume": [3], "save": [1, 2, 3, 4], "export": [2, 4], "remove": [1, 2]}
    for event in events:
        assert (event.error, event.ranks) == (None, 1)
        if event.kind != "remove":
            assert 0 <= event.seconds_waited <= event.seconds
            assert event.told_at >= event.step
    sizes = {Path(event.path): event.nbytes for event in events if event.kind == "save" and event.step > 2}
    assert sizes == {path: sum(file.stat().st_size for file in path.iterdir()) for path in sizes}
    assert len(sizes) == 2


def test_what_failed_is_told_with_its_error(tmp_path: Path) -> None:
    events: list[Event] = []
    save = ShardedSave(tmp_path, model=nn.Linear(4, 4), when=every(1))
    hooks = Hooks(save, on_event=events.append)
    (tmp_path / "step-1").write_text("in the way")
    with pytest.raises(TargetExistsError):
        hooks.step(1)
    hooks.close(broken_off=True)
    (event,) = events
    assert (event.kind, event.step, event.nbytes) == ("save", 1, 0)
    assert event.error is not None
    assert event.error.startswith("TargetExistsError: ")


@pytest.mark.parametrize("kind", ["save", "export"])
def test_what_fails_in_the_background_is_told_too(kind: str, tmp_path: Path) -> None:
    events: list[Event] = []
    model, when = nn.Linear(2000, 50), every(1)
    hook = (
        ShardedSave(tmp_path, model=model, when=when) if kind == "save" else HFExport(tmp_path, model=model, when=when)
    )
    hooks = Hooks(hook, on_event=events.append)
    with files_no_larger_than(50_000):
        hooks.step(1)
        with pytest.raises(WriteError):
            hooks.close()
    assert [(event.kind, event.step, event.error is None) for event in events] == [(kind, 1, False)]


def test_an_initial_load_is_told_well_or_not(tmp_path: Path) -> None:
    save_file(nn.Linear(4, 4).state_dict(), tmp_path / "model.safetensors")
    events: list[Event] = []
    with Hooks(InitialLoad(tmp_path, model=nn.Linear(4, 4)), on_event=events.append) as hooks:
        hooks.resume()
    with pytest.raises(InitialLoadError):
        Hooks(InitialLoad(tmp_path, model=nn.Linear(5, 4)), on_event=events.append).resume()
    well, failed = events
    assert (well.kind, well.step, well.path, well.error) == ("verify", 0, str(tmp_path), None)
    assert well.nbytes == (tmp_path / "model.safetensors").stat().st_size
    assert (failed.kind, (failed.error or "").split(":")[0]) == ("verify", "InitialLoadError")


def test_a_resume_that_fails_is_told_too(tmp_path: Path) -> None:
    train(tmp_path, (), 1)
    events: list[Event] = []
    save = ShardedSave(tmp_path / "checkpoints", model=nn.Linear(5, 4), when=every(1))
    hooks = Hooks(save, on_event=events.append)
    with pytest.raises(MismatchError):
        hooks.resume()
    hooks.close(broken_off=True)
    assert [(event.kind, event.path) for event in events] == [("resume", str(tmp_path / "checkpoints"))]
    assert (events[0].error or "").startswith("MismatchError: ")


def run_failing(directory: Path) -> None:
    events: list[Event] = []
    save = ShardedSave(directory, model=nn.Linear(8, 8), when=every(1))
    hooks = Hooks(save, on_event=events.append)
    if dist.get_rank() == 0:
        (directory / "step-1").write_text("in the way")
    with pytest.raises(RankFailedError):
        hooks.step(1)
    hooks.close(broken_off=True)
    assert [event.phase for event in events] == ["collecting step-1"] * (dist.get_rank() == 0)


def test_of_a_failure_on_some_ranks_the_phase_is_told(tmp_path: Path) -> None:
    run_on_ranks(run_failing, 2, tmp_path, tmp_path)


@pytest.mark.parametrize("sizes", [(1000, 1000), (3, 5)], ids=str)
def test_the_distance_of_the_average_is_that_of_the_formula(sizes: tuple[int, int], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Linear(*sizes).bfloat16()
    before = [weight.detach().double() for weight in model.parameters()]
    ema = EMA(model, decay=0.9)
    save, events = ShardedSave(tmp_path, model=model, ema=ema, when=every(1)), []
    with Hooks(ema, save, on_event=events.append) as hooks:
        for weight in model.parameters():
            weight.data.add_(torch.randn_like(weight), alpha=0.1)
        hooks.step(1)
    now = [weight.detach().double() for weight in model.parameters()]
    apart = sum((0.9 * (one - other)).square().sum() for one, other in zip(before, now, strict=True))
    expected = float((apart / sum(one.square().sum() for one in now)).sqrt())
    assert events[0].ema_distance == pytest.approx(expected, rel=0.01 if sizes[0] > 3 else 1e-4)


def run_listening(directory: Path) -> None:
    model = nn.Linear(8, 8)
    fully_shard(model)
    save = ShardedSave(directory / "checkpoints", model=model, when=every(1))
    with Hooks(save, on_event=json_lines(directory / f"events-{dist.get_rank()}.jsonl")) as hooks:
        for step in (1, 2):
            hooks.step(step)


def test_rank_0_alone_tells_for_all_ranks(tmp_path: Path) -> None:
    run_on_ranks(run_listening, 2, tmp_path, tmp_path)
    assert not (tmp_path / "events-1.jsonl").exists()
    found = lines_of(tmp_path / "events-0.jsonl")
    assert [(event["kind"], event["step"], event["ranks"]) for event in found] == [("save", 1, 2), ("save", 2, 2)]


def test_a_listener_that_raises_fails_no_step_and_keeps_nobody_else_from_hearing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    events: list[Event] = []

    def broken(_: Event) -> None:
        raise RuntimeError("no network")

    with caplog.at_level(logging.ERROR):
        train(tmp_path, [broken, events.append], 1)
    assert [event.kind for event in events] == ["save"]
    assert "on_event failed for the save of step 1" in caplog.text
    assert "no network" in caplog.text


def test_the_overview_of_a_run_shows_how_long_the_training_waited(tmp_path: Path) -> None:
    train(tmp_path, json_lines(tmp_path / "events.jsonl"), 2)
    expected = {(one["kind"], one["step"]): one["seconds_waited"] for one in lines_of(tmp_path / "events.jsonl")}
    with (tmp_path / "events.jsonl").open("a") as cut:
        cut.write('{"kind": "sa')  # a kill in the middle of a line
    kinds = {"checkpoint": "save", "export": "export"}
    steps = inspect_run(tmp_path).steps
    assert {(kinds[one.kind], one.step): one.seconds_waited for one in steps} == expected


def test_trackers_get_numbers_at_steps_that_do_not_go_back(tmp_path: Path) -> None:
    logged: list[tuple[dict[str, float], int]] = []
    train(tmp_path, metrics_to(lambda numbers, step: logged.append((numbers, step))))
    steps = [step for _, step in logged]
    assert steps == sorted(steps)
    saved = [numbers for numbers, _ in logged if "checkpoint/save/seconds" in numbers]
    assert [numbers["checkpoint/save/step"] for numbers in saved] == [1, 2, 3, 4]
    assert all(numbers["checkpoint/save/failed"] == 0 for numbers in saved)


def test_spans_lie_where_the_work_was_done_and_fail_with_it() -> None:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    made, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(made))
    record = spans(provider.get_tracer("training"))
    well = {"kind": "save", "step": 3, "path": "run/step-3", "seconds": 2.0, "seconds_waited": 0.5, "nbytes": 7}
    record(Event(**well, time=100.0))
    record(Event(kind="export", step=4, path="run/step-4", error="OSError: disk full", time=101.0))
    save, export = made.get_finished_spans()
    assert (save.name, save.start_time, save.end_time) == ("checkpoint.save", 98 * 10**9, 100 * 10**9)
    assert (save.attributes or {})["checkpoint.seconds_waited"] == 0.5
    assert save.status.is_ok
    assert (export.status.is_ok, export.status.description) == (False, "OSError: disk full")


def test_tensorboard_shows_what_was_told(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events: list[Event] = []
    with SummaryWriter(tmp_path / "tb") as writer:
        train(tmp_path, [tensorboard(writer), events.append])
    read = EventAccumulator(str(tmp_path / "tb"))
    read.Reload()
    for kind in ("save", "export"):
        expected = [event.seconds_waited for event in events if event.kind == kind]
        shown = [scalar.value for scalar in read.Scalars(f"checkpoint/{kind}/seconds_waited")]
        assert shown == pytest.approx(expected)


def test_wandb_takes_every_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    for name in ("WANDB_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path))
    run = wandb.init(mode="offline", project="test", dir=tmp_path, settings=wandb.Settings(silent=True, console="off"))
    train(tmp_path, metrics_to(run.log))
    run.log({}, step=5)  # what was logged at step 4 counts when the next one begins
    summary = dict(run.summary)
    run.finish()
    assert summary["checkpoint/save/step"] == 4
    assert summary["checkpoint/export/step"] == 4
    assert os.listdir(tmp_path / "wandb")


NO_LISTENERS: dict[str, Callable[[], object]] = {
    "text": lambda: Hooks(on_event="events.jsonl"),  # type: ignore[arg-type]
    "a number among them": lambda: Hooks(on_event=[print, 3]),  # type: ignore[list-item]
}


@pytest.mark.parametrize("what", NO_LISTENERS)
def test_what_cannot_be_called_is_refused(what: str) -> None:
    with pytest.raises(UsageError, match="on_event"):
        NO_LISTENERS[what]()


def test_on_saved_is_called_after_each_save_of_its_own_hook(tmp_path: Path) -> None:
    saved: list[tuple[int, Path, bool]] = []
    model = nn.Linear(4, 4)
    one = ShardedSave(
        tmp_path / "one",
        model=model,
        when=every(1),
        on_saved=lambda step, path: saved.append((step, path, (path / "metadata.json").exists())),
    )
    other = ShardedSave(tmp_path / "other", model=model, when=every(1))
    with Hooks(one, other) as hooks:
        for step in (1, 2):
            hooks.step(step)
    assert saved == [(step, tmp_path / "one" / f"step-{step}", True) for step in (1, 2)]


def test_what_on_saved_raises_fails_no_save_and_is_raised(tmp_path: Path) -> None:
    def broken(step: int, path: Path) -> None:  # noqa: ARG001
        raise RuntimeError("no network")

    save = ShardedSave(tmp_path, model=nn.Linear(4, 4), when=every(1), on_saved=broken)
    hooks = Hooks(save)
    hooks.step(1)
    with pytest.raises(RuntimeError, match="no network"):
        hooks.close()
    assert (tmp_path / "step-1" / "metadata.json").exists()
