"""Initial loads of Qwen3: its norms of queries and keys, and its tied embeddings.

TorchTitan 0.2 cannot shard tied weights with FSDP2 of the torch that we test with; there the ranks are replicas (DDP).
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Qwen3Config

from shardsmith.cli import main
from tests.titan import small_models
from tests.titan.cpu import IS_0_3, checkpoint
from tests.titan.evaluation import FLOAT32
from tests.titan.hf_models import QWEN, make_model
from tests.titan.jobs import Assets, Job, error_of, log_of, run_jobs

PROVED = "elements) equal those of"
HEAD = "lm_head" if IS_0_3 else "output"
REPLICAS = (
    [] if IS_0_3 else ["--parallelism.data_parallel_replicate_degree=2", "--parallelism.data_parallel_shard_degree=1"]
)

SHORT = ["--training.steps=1", "--checkpoint.last_save_model_only"]


def lose_the_tie(model: nn.Module) -> None:
    """The head gets weights of its own, as it begins."""
    head = getattr(model, HEAD)
    head.weight = nn.Parameter(torch.randn_like(head.weight) / 16)


def forget_norms(model: nn.Module) -> None:
    """As they are in a new model."""
    for name, parameter in model.named_parameters():
        if "q_norm" in name or "k_norm" in name:
            parameter.fill_(1)


@contextlib.contextmanager
def planted(change: Callable[[nn.Module], None], asked: Callable[[str], bool] = lambda _: True) -> Iterator[None]:
    """TorchTitan's load of the tensors with such names, and then something done to the model."""
    original = checkpoint.CheckpointManager.dcp_load

    def dcp_load(self: Any, state_dict: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        original(self, {name: value for name, value in state_dict.items() if asked(name)}, *args, **kwargs)
        change(self.states["model"].model[0])

    checkpoint.CheckpointManager.dcp_load = dcp_load
    try:
        yield
    finally:
        checkpoint.CheckpointManager.dcp_load = original


def nothing(model: nn.Module) -> None:
    pass


def no_norms(name: str) -> bool:
    return "q_norm" not in name and "k_norm" not in name


def convert(root: Path) -> tuple[Path, Path]:
    """A tied model as a Hugging Face directory, and what to-dcp makes of it."""
    make_model(Qwen3Config(**QWEN, tie_word_embeddings=True), root / "hf")
    names = ["--layout", "torchtitan", "--titan_model", "qwen3", "--titan_flavor", small_models.TIED_DENSE]
    assert main(["to-dcp", "--model", str(root / "hf"), "--checkpoint", str(root / "dcp"), *names, "--quiet"]) == 0
    return root / "hf", root / "dcp"


@pytest.fixture(scope="module")
def jobs(assets: Assets, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Job]:
    """Jobs that start from a tied Qwen3, rightly or wrongly. Read only."""
    root = tmp_path_factory.mktemp("qwen3")
    hf, dcp = convert(root)

    def job(name: str, flavor: str = small_models.TIED_DENSE, start: Path = dcp, **fields: Any) -> Job:
        choice = [f"--config=qwen3_{flavor}"] if IS_0_3 else ["--model.name=qwen3", f"--model.flavor={flavor}"]
        options = [*choice, *REPLICAS, *FLOAT32, *SHORT, f"--checkpoint.initial_load_path={start}"]
        options += ["--checkpoint.initial_load_in_hf"] if start == hf else []
        return Job(run=root / name, options=options, hooks={"prove_load": True, **fields.pop("hooks", {})}, **fields)

    jobs = {
        "right": job("right"),
        "right from files": job("files", start=hf),
        "tie lost": job("tie lost", within=partial(planted, lose_the_tie)),
        "norms not asked for": job("not asked", within=partial(planted, nothing, no_norms)),
        "norms forgotten": job("forgotten", within=partial(planted, forget_norms)),
        "model without norms": job("without", small_models.WITHOUT_NORMS),
        "files with norms": job("files without", small_models.WITHOUT_NORMS, start=hf),
        "norms allowed": job("allowed", small_models.WITHOUT_NORMS, hooks={"allow_extra": ["*.[qk]_norm.weight"]}),
    }
    run_jobs(assets, 2, root, *jobs.values())
    return jobs


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("right", "25 tensors (8,390,400 elements) equal those of"),
        ("right from files", "(digests read from its files)"),
        ("norms allowed", "not in the model, as allowed: layers.0.attention.q_norm.weight"),
    ],
)
def test_a_load_that_is_right_is_proved(jobs: dict[str, Job], name: str, said: str) -> None:
    assert error_of(jobs[name]) == ""
    (line,) = [line for line in log_of(jobs[name]).splitlines() if PROVED in line]
    assert said in line
    assert "; 1 tied" in line


@pytest.mark.parametrize(
    ("name", "words", "code"),
    [
        ("tie lost", f"{HEAD}.weight: other values than in the source", "tie-broken"),
        ("norms not asked for", "layers.0.attention.q_norm.weight: 128 of 128 elements", "tensor-not-loaded"),
        ("norms forgotten", "layers.1.attention.k_norm.weight: all 128 elements are 1", "norms-are-one"),
        ("model without norms", "layers.1.attention.q_norm.weight: in the checkpoint (128,)", "qk-norms-dropped"),
        ("files with norms", "model.layers.0.self_attn.k_norm.weight: in the checkpoint (128,)", "qk-norms-dropped"),
    ],
)
def test_a_planted_fault_is_named(jobs: dict[str, Job], name: str, words: str, code: str) -> None:
    error = error_of(jobs[name])
    assert error.startswith("InitialLoadError")
    assert words in error
    assert set(re.findall(r"\[([a-z-]+)\]", error)) == {code}
    assert "loss:" not in log_of(jobs[name])
