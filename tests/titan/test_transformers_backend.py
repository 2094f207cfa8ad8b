"""Models of transformers in TorchTitan's own backend for them: they come in and go out under their own names."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
from torch import nn
from transformers import LlamaConfig

from shardsmith.cli import main
from tests.titan.cpu import IS_0_3
from tests.titan.evaluation import FLOAT32, evaluated, losses_of, transformers_loss
from tests.titan.hf_models import make_model
from tests.titan.jobs import Assets, Job, error_of, log_of, run_jobs
from tests.titan.test_initial_load import planted_by

PROVED = "elements) equal those of"
CONFIG: dict[str, Any] = {  # 0.2 knows no other sizes than those of its debugmodel
    "vocab_size": 2048,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 2,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}
BACKEND = "transformers_modeling_backend"


def choice(hf: Path) -> list[str]:
    """How a user asks for the backend."""
    if IS_0_3:
        return ["--config=transformers_backend", f"--hf_model={hf}"]
    module = f"torchtitan.experiments.{BACKEND}.job_config"
    return [f"--model.name={BACKEND}", f"--hf_transformers.model={hf}", f"--job.custom_config_module={module}"]


def forget_rope(model: nn.Module) -> None:
    """As to_empty leaves it, where nobody computes it anew."""
    for buffer in model.buffers():
        buffer.zero_()


@pytest.fixture(scope="module")
def hf(assets: Assets, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of transformers, and beside it what to-dcp makes of it. Read only."""
    root = tmp_path_factory.mktemp("models")
    make_model(LlamaConfig(**CONFIG, tie_word_embeddings=False), root / "hf")
    for file in assets.hf.glob("tokenizer*"):
        (root / "hf" / file.name).write_bytes(file.read_bytes())
    names = ["--model", str(root / "hf"), "--checkpoint", str(root / "dcp"), "--layout", "nested", "--quiet"]
    assert main(["to-dcp", *names]) == 0
    return root / "hf"


@pytest.fixture(scope="module")
def jobs(assets: Assets, hf: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Job]:
    """Jobs that start from it. Read only."""
    root = tmp_path_factory.mktemp("backend")

    def job(name: str, start: Path, *options: str, **fields: Any) -> Job:
        fields["hooks"] = {"repair_buffers": True, **fields.get("hooks", {})}
        options = (*choice(hf), *FLOAT32, "--training.steps=2", f"--checkpoint.initial_load_path={start}", *options)
        return Job(run=root / name, options=options, **fields)

    dcp = hf.parent / "dcp"
    export = {"ema_decay": 0.5, "export_last": True, "export_dtype": "float32", "export_base_model": str(hf)}
    jobs = {
        "started": job("started", dcp, within=partial(evaluated, 0)),
        "trained": job("trained", dcp, hooks=export, within=partial(evaluated, 2)),
        "again": job("again", root / "trained" / "checkpoint" / "step-2"),
        "rope zero": job("rope", dcp, hooks={"repair_buffers": False}, within=partial(planted_by, forget_rope)),
    }
    jobs["from files"] = job("files", hf, "--checkpoint.initial_load_in_hf")
    if IS_0_3:
        jobs["resumed"] = job("trained", dcp, "--training.steps=3", hooks=export)
    run_jobs(assets, 2, root, *jobs.values())
    return jobs


def test_it_starts_with_the_loss_of_the_model(jobs: dict[str, Job], hf: Path) -> None:
    job = jobs["started"]
    assert error_of(job) == ""
    assert "21 tensors (2,753,792 elements) equal those of" in log_of(job)
    assert losses_of(job.run)["main"] == pytest.approx(transformers_loss(hf), abs=1e-4)


@pytest.mark.parametrize(("model", "suffix"), [("main", ""), ("ema", "-ema")])
def test_an_export_loads_and_has_the_loss_that_torchtitan_had(jobs: dict[str, Job], model: str, suffix: str) -> None:
    job = jobs["trained"]
    assert error_of(job) == ""
    assert transformers_loss(job.run / "hf" / f"step-2{suffix}") == pytest.approx(losses_of(job.run)[model], abs=1e-4)


def test_a_step_of_its_own_is_a_checkpoint_to_start_from(jobs: dict[str, Job]) -> None:
    assert error_of(jobs["again"]) == ""
    assert PROVED in log_of(jobs["again"])


def test_a_step_is_converted_by_name(jobs: dict[str, Job], hf: Path, tmp_path: Path) -> None:
    step = jobs["trained"].run / "checkpoint" / "step-2"
    places = ["--checkpoint_dir", str(step), "--base_model_path", str(hf), "--output_dir", str(tmp_path / "out")]
    places += ["--titan_model", BACKEND, "--titan_flavor", "full"]
    assert main(["to-hf", *places, "--dtype", "original", "--quiet"]) == 0
    assert transformers_loss(tmp_path / "out") == pytest.approx(losses_of(jobs["trained"].run)["main"], abs=1e-4)


def test_rotary_buffers_that_nobody_computed_are_named(jobs: dict[str, Job]) -> None:
    assert "rotary_emb.inv_freq: all 8 values are 0" in error_of(jobs["rope zero"])
    assert "[buffer-zero]" in error_of(jobs["rope zero"])


def test_a_load_from_files_is_proved_if_there_is_an_adapter(jobs: dict[str, Job]) -> None:
    if IS_0_3:
        assert error_of(jobs["from files"]) == ""
        assert "(digests read from its files)" in log_of(jobs["from files"])
    else:
        assert "this model has no state-dict adapter" in error_of(jobs["from files"])


if IS_0_3:  # the backend of 0.2 cannot resume: it does not find the names of its optimizer's state

    def test_buffers_that_nobody_computed_are_repaired_in_a_resumed_run_too(jobs: dict[str, Job]) -> None:
        assert error_of(jobs["resumed"]) == ""
        assert "Training starts at step 3" in log_of(jobs["resumed"])
        assert "non-persistent buffers were wrong and were repaired" in log_of(jobs["resumed"])
        assert transformers_loss(jobs["resumed"].run / "hf" / "step-3") > 0
