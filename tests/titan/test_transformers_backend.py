"""Models of transformers in TorchTitan's own backend for them: they come in and go out under their own names."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from shardsmith.cli import main
from shardsmith.ground.layout import MODEL_CONFIG_FILE
from tests.titan.backend_models import choice, make
from tests.titan.cpu import IS_0_3
from tests.titan.evaluation import FLOAT32, transformers_loss
from tests.titan.jobs import Assets, Job, error_of, log_of, run_jobs
from tests.titan.test_initial_load import planted_by

PROVED = "elements) equal those of"


def forget_rope(model: nn.Module) -> None:
    """As to_empty leaves it, where nobody computes it anew."""
    for buffer in model.buffers():
        buffer.zero_()


@pytest.fixture(scope="module")
def hf(assets: Assets, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of transformers, and beside it what to-dcp makes of it. Read only."""
    root = tmp_path_factory.mktemp("models")
    make(root / "hf")
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
        "trained": job("trained", dcp, hooks=export),
        "again": job("again", root / "trained" / "checkpoint" / "step-2", hooks={"engine": True}),
        "rope zero": job("rope", dcp, hooks={"repair_buffers": False}, within=partial(planted_by, forget_rope)),
    }
    if IS_0_3:
        jobs["resumed"] = job("trained", dcp, "--training.steps=3", hooks=export)
    run_jobs(assets, 2, root, *jobs.values())
    return jobs


def test_a_step_of_its_own_is_a_checkpoint_to_start_from(jobs: dict[str, Job]) -> None:
    assert error_of(jobs["again"]) == ""
    assert PROVED in log_of(jobs["again"])


def test_an_export_of_a_step_of_the_engine_has_the_config_of_the_base_model(
    jobs: dict[str, Job], hf: Path, tmp_path: Path
) -> None:
    step = jobs["again"].run / "checkpoint" / "step-2"
    # TorchTitan's own config of the model, with no model_type, is not recorded.
    assert not (step / MODEL_CONFIG_FILE).exists()
    command = ["to-hf", "--checkpoint", str(step), "--base-model", str(hf), "--dtype", "float32"]
    assert main([*command, "--output-dir", str(tmp_path / "out")]) == 0
    written, base = (json.loads((path / "config.json").read_text()) for path in (tmp_path / "out", hf))
    assert written == base
    assert transformers_loss(tmp_path / "out") > 0


def test_rotary_buffers_that_nobody_computed_are_named(jobs: dict[str, Job]) -> None:
    assert "rotary_emb.inv_freq: all 8 values are 0" in error_of(jobs["rope zero"])
    assert "[buffer-zero]" in error_of(jobs["rope zero"])


if IS_0_3:  # the backend of 0.2 cannot resume: it does not find the names of its optimizer's state

    def test_buffers_that_nobody_computed_are_repaired_in_a_resumed_run_too(jobs: dict[str, Job]) -> None:
        assert error_of(jobs["resumed"]) == ""
        assert "Training starts at step 3" in log_of(jobs["resumed"])
        assert "non-persistent buffers were wrong and were repaired" in log_of(jobs["resumed"])
        assert transformers_loss(jobs["resumed"].run / "hf" / "step-3") > 0
