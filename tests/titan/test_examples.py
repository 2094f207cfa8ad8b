"""The example of this generation is run, as it is, under torchrun; only sizes are given to it."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from shardsmith.manifest.checkpoints import committed_steps
from tests.titan.checkpoints import steps_in
from tests.titan.cpu import IS_0_3
from tests.titan.evaluation import transformers_loss
from tests.titan.jobs import LLAMA, Assets

ROOT = Path(__file__).parent.parent.parent
EXAMPLE = ROOT / "examples" / ("torchtitan_0_3" if IS_0_3 else "torchtitan_0_2")
SIZES = ["--training.steps=4", "--training.seq_len=32", "--training.local_batch_size=2", "--checkpoint.interval=2"]


def run(assets: Assets, model: Path, directory: Path, *options: str) -> str:
    """The example's script with a small model on two CPU ranks; what it says."""
    if IS_0_3:
        data = [f"--dataloader.dataset_path={assets.data}", "--dataloader.dataset=c4_test"]
        data += ["--module=tests.titan.configs", "--config=llama3_debugmodel"]
    else:
        data = [f"--training.dataset_path={assets.data}", "--training.dataset=c4_test"]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    python = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "titan" / "on_cpu")])
    variables = {"MODEL": str(model), "FLAVOR": "debugmodel", "RUN": str(directory), "NGPU": "2"}
    found = subprocess.run(
        [EXAMPLE / "train.sh", *SIZES, *data, *options],
        env={**os.environ, "PATH": path, "PYTHONPATH": python, "OMP_NUM_THREADS": "1", **variables},
        cwd=directory.parent,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert found.returncode == 0, found.stdout[-3000:] + found.stderr[-3000:]
    return found.stdout + found.stderr


@pytest.mark.long
def test_the_example_starts_from_a_model_trains_exports_and_resumes(assets: Assets, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = tmp_path / "model"
    for path in assets.hf.iterdir():
        (model / path.name).parent.mkdir(exist_ok=True)
        (model / path.name).write_bytes(path.read_bytes())
    config = copy.deepcopy(LLAMA)
    config.num_hidden_layers = 6  # as TorchTitan's debugmodel has them, which the example's commands know
    LlamaForCausalLM(config).save_pretrained(model)

    said = run(assets, model, tmp_path / "run")
    assert "elements) equal those of" in said
    assert committed_steps(tmp_path / "run" / "checkpoint") == [2, 4]
    assert steps_in(tmp_path / "run" / "hf") == ["step-4", "step-4-ema"]
    assert transformers_loss(tmp_path / "run" / "hf" / "step-4-ema") > 0

    said = run(assets, model, tmp_path / "run", "--training.steps=6")
    assert "Training starts at step" in said
    assert 6 in committed_steps(tmp_path / "run" / "checkpoint")
