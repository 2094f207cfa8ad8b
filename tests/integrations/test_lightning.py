"""CheckpointHooks with Lightning's own Trainer: averages, saves, exports and resumes, on real ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from shardsmith import inspect_checkpoint
from shardsmith.errors import UsageError
from shardsmith.hooks import every, json_lines, last
from shardsmith.integrations.lightning import CheckpointHooks
from shardsmith.overview import read_events
from tests.integrations.lightning_runs import BATCHES, DECAY, run_fit, run_killed_and_resumed, run_straight_and_broken
from tests.ranks import run_on_ranks

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's advice, on workers and the like


@pytest.mark.parametrize(("strategy", "ranks"), [("auto", 1), ("ddp", 2), ("fsdp2", 2)])
def test_a_killed_run_ends_as_the_uninterrupted_one(tmp_path: Path, strategy: str, ranks: int) -> None:
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    run_on_ranks(run_straight_and_broken, ranks, tmp_path, strategy, tmp_path)
    expected, found = torch.load(straight / "end.pt"), torch.load(broken / "end.pt")
    assert torch.load(broken / "first.pt")["step"] == 2 * BATCHES
    assert (found["step"], found["epoch"], found["rate"]) == (expected["step"], expected["epoch"], expected["rate"])
    assert len(found["history"]) == BATCHES
    for model in ("main", "ema"):
        assert all(torch.equal(found[model][name], value) for name, value in expected[model].items()), model


def test_a_run_that_dies_in_an_epoch_goes_on_at_its_newest_step(tmp_path: Path) -> None:
    run_on_ranks(run_killed_and_resumed, 1, tmp_path, tmp_path)
    steps = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert steps == ["step-12", "step-3", "step-6", "step-9"]
    found = torch.load(tmp_path / "end.pt")
    assert (found["step"], len(found["history"])) == (3 * BATCHES, 3 * BATCHES - 6)
    assert inspect_checkpoint(tmp_path / "checkpoints" / f"step-{3 * BATCHES}", verify=True).damage == ()


def test_the_average_is_that_of_the_formula_and_the_export_holds_both(tmp_path: Path) -> None:
    run_on_ranks(run_fit, 2, tmp_path, "fsdp2", tmp_path, 2, "end.pt")
    found = torch.load(tmp_path / "end.pt")
    export = tmp_path / "hf" / f"step-{2 * BATCHES}"
    for file, model in (("model", "main"), ("ema", "ema")):
        assert {name: value.tolist() for name, value in load_file(export / f"{file}.safetensors").items()} == {
            f"net.{name}": value.tolist() for name, value in found[model].items()
        }
    average = found["start"]
    for weights in found["history"]:
        average = {name: DECAY * average[name] + (1 - DECAY) * value for name, value in weights.items()}
    assert all(torch.allclose(value, average[name], atol=1e-6) for name, value in found["ema"].items())


def test_steps_are_optimizer_steps(tmp_path: Path) -> None:
    run_on_ranks(run_fit, 1, tmp_path, "auto", tmp_path, 3, "end.pt", None, 2)
    assert torch.load(tmp_path / "end.pt")["step"] == 3 * BATCHES // 2
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-3", "step-6"]


def run_with_events(run: Path) -> None:
    run_fit("auto", run, 1, "end.pt", on_event=json_lines(run / "events.jsonl"))


def test_events_are_passed_on(tmp_path: Path) -> None:
    run_on_ranks(run_with_events, 1, tmp_path, tmp_path)
    kinds = [(event["kind"], event["step"]) for event in read_events(tmp_path)]
    assert sorted(kinds) == [("export", BATCHES), ("save", 3), ("save", BATCHES)]


@pytest.mark.parametrize(
    "options",
    [
        {"save": every(1), "save_options": {"async": True}},
        {"save": every(1), "ema_options": {"warmup": True}},
        {"dtype": "float32"},
        {"save_options": {"on_missing": "start"}},
        {"export": last(), "no_such": 1},
    ],
)
def test_options_are_checked_when_it_is_made(options: dict[str, object], tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        CheckpointHooks(tmp_path, **options)  # type: ignore[arg-type]


def run_with_one_write(run: Path) -> None:
    for epochs in (1, 2):
        run_fit("fsdp2", run, epochs, "end.pt", save_options={"weights": "huggingface", "latest_link": True})


def test_its_steps_can_be_hugging_face_directories(tmp_path: Path) -> None:
    run_on_ranks(run_with_one_write, 2, tmp_path, tmp_path)
    found = torch.load(tmp_path / "end.pt")
    assert (found["step"], len(found["history"])) == (2 * BATCHES, BATCHES)  # the second run went on
    for folder, model in ((".", "main"), ("ema", "ema")):
        held = load_file(tmp_path / "checkpoints/latest" / folder / "model.safetensors")
        assert held.keys() == {f"net.{name}" for name in found[model]}
        assert all(torch.equal(held[f"net.{name}"], value) for name, value in found[model].items())
