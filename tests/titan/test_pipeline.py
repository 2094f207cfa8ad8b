"""Runs under pipeline parallelism: each rank has a stage, and what is written has all of them."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from shardsmith.integrations.torchtitan.models import build_titan_model
from tests.titan.checkpoints import digests_of, tensors_of
from tests.titan.evaluation import FLOAT32, transformers_loss
from tests.titan.jobs import Assets, Job, error_of, log_of, run_jobs

EXPORT = {"ema_decay": 0.5, "export_interval": 3, "export_last": True, "export_dtype": "float32"}
PIPELINE = ["--parallelism.pipeline_parallel_degree=2", "--training.local_batch_size=4"]
ONE_STAGE_A_RANK = "--parallelism.pipeline_parallel_schedule=1F1B"


@pytest.fixture(scope="module")
def jobs(assets: Assets, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Job]:
    """Jobs of two stages, sharded over two ranks each. Read only."""
    root = tmp_path_factory.mktemp("stages")
    options = [*FLOAT32, *PIPELINE, ONE_STAGE_A_RANK]
    start = f"--checkpoint.initial_load_path={root / 'trained' / 'checkpoint' / 'step-4'}"
    jobs = {
        "trained": Job(run=root / "trained", hooks=EXPORT, options=options),
        "started": Job(
            run=root / "started", hooks={"prove_load": True}, options=[*options, start, "--training.steps=1"]
        ),
        "several stages": Job(
            run=root / "several",
            hooks=EXPORT,
            options=[*PIPELINE, "--parallelism.pipeline_parallel_schedule=Interleaved1F1B"],
        ),
    }
    run_jobs(assets, 4, root, *jobs.values())
    assert error_of(jobs["trained"]) == ""
    return jobs


@pytest.mark.parametrize(("model", "suffix"), [("main", ""), ("ema", "-ema")])
def test_an_export_has_the_weights_of_all_stages(jobs: dict[str, Job], model: str, suffix: str) -> None:
    run = jobs["trained"].run
    saved = tensors_of(run / "checkpoint" / "step-4", model)
    expected = build_titan_model("llama3/debugmodel").adapter.to_hf(dict(saved))
    found = load_file(run / "hf" / f"step-4{suffix}" / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert transformers_loss(run / "hf" / f"step-3{suffix}") > 0


def test_a_step_is_recorded_with_the_average_of_all_stages(jobs: dict[str, Job]) -> None:
    digests = digests_of(jobs["trained"].run / "checkpoint" / "step-4", "ema_model.")
    assert {"ema_model.tok_embeddings.weight", "ema_model.norm.weight"} <= digests.keys()


def test_an_initial_load_of_all_stages_is_proved(jobs: dict[str, Job]) -> None:
    assert error_of(jobs["started"]) == ""
    assert "57 tensors" in log_of(jobs["started"])


def test_several_stages_a_rank_are_refused_at_the_start(jobs: dict[str, Job]) -> None:
    assert "choose a schedule with one stage a rank" in error_of(jobs["several stages"])
    assert "loss:" not in log_of(jobs["several stages"])
