"""Complete Hugging Face directories of TorchTitan's own models, while they train."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, GenerationConfig

from shardsmith.manifest.metadata import read_json
from shardsmith.overview import inspect_run, read_events
from tests.titan.checkpoints import steps_in
from tests.titan.evaluation import FLOAT32, evaluated, losses_of, transformers_loss
from tests.titan.jobs import Assets, Job, error_of, log_of, run_jobs

EXPORT = {
    "ema_decay": 0.5,
    "export_interval": 3,
    "export_last": True,
    "export_dtype": "float32",
    "events": "events.jsonl",
}
LOADED = {**EXPORT, "export_last": False, "export_verify": "load"}
SUFFIXES = {"main": "", "ema": "-ema"}


@pytest.fixture(scope="module")
def jobs(assets: Assets, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Job]:
    """Jobs of two ranks. Read only."""
    root = tmp_path_factory.mktemp("runs")
    last = ["--checkpoint.last_save_model_only", "--checkpoint.last_save_in_hf"]
    jobs = {
        "both": Job(run=root / "both", hooks=EXPORT, options=[*FLOAT32, *last], within=partial(evaluated, 3)),
        "no checkpoints": Job(
            run=root / "none",
            hooks={"export_interval": 2, "export_keep": 1, "export_verify": "load"},
            options=["--checkpoint.no-enable", "--training.seq_len=8"],  # shorter than what would be asked else
        ),
        "inside": Job(run=root / "inside", hooks={"export_last": True, "export_folder": "checkpoint/hf"}),
        "resumed": Job(run=root / "both", hooks=EXPORT, options=["--training.steps=6"]),
    }
    run_jobs(assets, 2, root, *jobs.values())
    assert [error_of(jobs[name]) for name in ("both", "no checkpoints")] == ["", ""]
    return jobs


@pytest.mark.parametrize(("model", "suffix"), SUFFIXES.items())
def test_the_directory_of_a_step_has_the_loss_that_torchtitan_had(
    jobs: dict[str, Job], model: str, suffix: str
) -> None:
    run = jobs["both"].run
    assert not (run / "checkpoint" / "step-3").exists()
    assert transformers_loss(run / "hf" / f"step-3{suffix}") == pytest.approx(losses_of(run)[model], abs=1e-4)
    assert losses_of(run)["main"] != pytest.approx(losses_of(run)["ema"], abs=1e-4)


def test_so_has_it_under_hsdp_and_tensor_parallelism(assets: Assets, tmp_path: Path) -> None:
    jobs = [
        Job(run=tmp_path / name, hooks=hooks, options=[*FLOAT32, option], within=partial(evaluated, 3))
        for name, hooks, option in (
            ("hsdp", EXPORT, "--parallelism.data_parallel_replicate_degree=2"),
            ("tp", LOADED, "--parallelism.tensor_parallel_degree=2"),
        )
    ]
    run_jobs(assets, 4, tmp_path, *jobs)
    for job in jobs:
        assert error_of(job) == ""
        found = {name: transformers_loss(job.run / "hf" / f"step-3{suffix}") for name, suffix in SUFFIXES.items()}
        assert found == pytest.approx(losses_of(job.run), abs=1e-4)


def test_it_is_tensor_for_tensor_what_torchtitan_writes_at_the_end(jobs: dict[str, Job]) -> None:
    run = jobs["both"].run
    (theirs,) = (run / "checkpoint" / "step-4").glob("*.safetensors")
    expected, found = load_file(theirs), load_file(run / "hf" / "step-4" / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_the_events_of_the_run_are_in_a_file_and_the_overview_reads_it(jobs: dict[str, Job]) -> None:
    run = jobs["both"].run
    told = {(event["kind"], event["step"], event["error"]) for event in read_events(run)}
    assert told >= {("export", 3, None), ("export", 4, None)}
    exports = [one for one in inspect_run(run).steps if one.kind == "export"]
    assert exports
    assert all(one.seconds_waited is not None for one in exports)


def test_it_is_complete(jobs: dict[str, Job]) -> None:
    for name in ("step-3", "step-3-ema"):
        directory = jobs["both"].run / "hf" / name
        assert {path.name for path in directory.iterdir()} == {
            "config.json",
            "generation_config.json",
            "model.safetensors",
            "README.md",
            "shardsmith.json",
            "tokenizer.json",
            "tokenizer_config.json",
        }
        assert GenerationConfig.from_pretrained(directory).max_new_tokens == 7
        assert AutoTokenizer.from_pretrained(directory)("w7 w9")["input_ids"] == [7, 9]
        origin = read_json(directory / "shardsmith.json")
        assert origin["step"] == 3
    assert json.loads((directory / "config.json").read_text())["dtype"] == "float32"


def test_exports_need_no_checkpoints(jobs: dict[str, Job]) -> None:
    run = jobs["no checkpoints"].run
    assert steps_in(run / "hf") == ["step-4"]
    assert not (run / "checkpoint").exists()


def test_a_folder_where_torchtitan_would_take_them_for_checkpoints_is_refused(jobs: dict[str, Job]) -> None:
    assert "is inside TorchTitan's checkpoint folder" in error_of(jobs["inside"])
    assert "loss:" not in log_of(jobs["inside"])


def test_a_run_that_goes_on_keeps_exporting(jobs: dict[str, Job]) -> None:
    assert error_of(jobs["resumed"]) == ""
    assert steps_in(jobs["resumed"].run / "hf") == [
        "step-3",
        "step-3-ema",
        "step-4",
        "step-4-ema",
        "step-6",
        "step-6-ema",
    ]


def test_what_is_not_there_to_make_it_complete_is_said_at_the_start(assets: Assets, tmp_path: Path) -> None:
    poor = Assets(tmp_path / "poor")
    shutil.copytree(assets.root, poor.root)
    (poor.hf / "config.json").unlink()
    job = Job(run=tmp_path / "run", hooks={"export_last": True})
    elsewhere = Job(run=tmp_path / "elsewhere", hooks={"export_last": True, "export_base_model": str(assets.hf)})
    run_jobs(poor, 2, tmp_path, job, elsewhere)
    assert "config.json not there. TorchTitan's scripts/download_hf_assets.py fetches" in error_of(job)
    assert "loss:" not in log_of(job)
    assert error_of(elsewhere) == ""
    assert steps_in(elsewhere.run / "hf") == ["step-4"]
