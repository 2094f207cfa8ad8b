"""Runs under pipeline parallelism: each rank has a stage, and what is written has all of them."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file

from shardsmith.integrations.torchtitan.models import build_titan_model
from tests.titan.checkpoints import digests_of, tensors_of
from tests.titan.evaluation import FLOAT32, transformers_loss
from tests.titan.jobs import Assets, Job, error_of, log_of, run_jobs
from tests.titan.small_models import DENSE, LAYERS, STAGED, STAGED_LAYERS

PROVE = {"prove_load": True}
EXPORT = {"ema_decay": 0.5, "export_interval": 3, "export_last": True, "export_dtype": "float32"}
PIPELINE = ["--parallelism.pipeline_parallel_degree=2", "--training.local_batch_size=4"]
SCHEDULES = {"1F1B": (DENSE, LAYERS), "Interleaved1F1B": (STAGED, STAGED_LAYERS)}
"""With one stage a rank, and with two."""


@pytest.fixture(scope="module")
def jobs(assets: Assets, staged_assets: Assets, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Job]:
    """Jobs by schedule and name, on two ranks a stage, two for interleaved stages. Read only."""
    root = tmp_path_factory.mktemp("stages")
    found: dict[tuple[str, str], Job] = {}
    for schedule, ranks, base in zip(SCHEDULES, (4, 2), (assets, staged_assets), strict=True):
        (place := root / schedule).mkdir()
        options = [*FLOAT32, *PIPELINE, f"--parallelism.pipeline_parallel_schedule={schedule}"]
        start = f"--checkpoint.initial_load_path={place / 'trained' / 'checkpoint' / 'step-4'}"
        jobs = {
            "trained": Job(run=place / "trained", hooks=EXPORT, options=options),
            "started": Job(run=place / "started", hooks=PROVE, options=[*options, start, "--training.steps=1"]),
            "resumed": Job(run=place / "resumed", hooks=EXPORT, options=options),
        }
        run_jobs(base, ranks, place, jobs["trained"])
        assert error_of(jobs["trained"]) == ""
        shutil.copytree(place / "trained" / "checkpoint" / "step-2", place / "resumed" / "checkpoint" / "step-2")
        run_jobs(base, ranks, place, jobs["started"], jobs["resumed"])
        found |= {(schedule, name): job for name, job in jobs.items()}
    return found


def tensors(schedule: str) -> int:
    """How many tensors the model has."""
    return 3 + 9 * SCHEDULES[schedule][1]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("model", "suffix"), [("main", ""), ("ema", "-ema")])
def test_an_export_has_the_weights_of_all_stages(
    jobs: dict[tuple[str, str], Job], schedule: str, model: str, suffix: str
) -> None:
    run = jobs[schedule, "trained"].run
    saved = tensors_of(run / "checkpoint" / "step-4", model)
    expected = build_titan_model(f"llama3/{SCHEDULES[schedule][0]}").adapter.to_hf(dict(saved))
    found = load_file(run / "hf" / f"step-4{suffix}" / "model.safetensors")
    assert len(found) == tensors(schedule)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert transformers_loss(run / "hf" / f"step-3{suffix}") > 0


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_step_is_recorded_with_the_average_of_all_stages(jobs: dict[tuple[str, str], Job], schedule: str) -> None:
    digests = digests_of(jobs[schedule, "trained"].run / "checkpoint" / "step-4", "ema_model.")
    assert len(digests) == tensors(schedule)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_an_initial_load_of_all_stages_is_proved(jobs: dict[tuple[str, str], Job], schedule: str) -> None:
    job = jobs[schedule, "started"]
    assert error_of(job) == ""
    assert f"{tensors(schedule)} tensors" in log_of(job)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_resumed_run_goes_on_as_the_uninterrupted_one(jobs: dict[tuple[str, str], Job], schedule: str) -> None:
    whole, resumed = jobs[schedule, "trained"], jobs[schedule, "resumed"]
    assert error_of(resumed) == ""
    assert "Training starts at step 3" in log_of(resumed)
    steps = [digests_of(job.run / "checkpoint" / "step-4") for job in (whole, resumed)]
    for prefix in ("tok_embeddings.", "layers.", "norm.", "ema_model."):
        one, other = ({n: d for n, d in step.items() if n.startswith(prefix)} for step in steps)
        assert one
        assert one == other
