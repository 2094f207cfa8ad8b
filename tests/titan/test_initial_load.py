"""Initial loads by TorchTitan: verified where they are right, stopped where something is wrong."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tests import dcp_directories
from tests.titan.checkpoints import tensors_of
from tests.titan.cpu import IS_0_3, checkpoint
from tests.titan.jobs import Assets, Job, error_of, log_of, run_jobs

PROVED = "elements) equal those of"
ALLOWED: Mapping[str, Any] = {"allow_missing": ["norm.*"], "allow_extra": ["head.*"]}
PROVE: Mapping[str, Any] = {"prove_load": True}


def parameters(model: nn.Module, pattern: str) -> list[torch.Tensor]:
    """This rank's part of the parameters of that name."""
    found = [p.to_local() for name, p in model.named_parameters() if re.search(pattern, name)]
    assert found
    return found


def randomize(pattern: str) -> Callable[[nn.Module], None]:
    return lambda model: [nn.init.normal_(local) for local in parameters(model, pattern)] and None


def rolled(pattern: str) -> Callable[[nn.Module], None]:
    return lambda model: [local.copy_(local.roll(1, 0)) for local in parameters(model, pattern)] and None


def ones(model: nn.Module) -> None:
    for local in parameters(model, r"norm\.weight$"):
        local.fill_(1)


def buffers(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[nn.Module], None]:
    return lambda model: [buffer.copy_(change(buffer)) for buffer in model.buffers()] and None


FAULTS: dict[str, tuple[Callable[[nn.Module], None], list[str]]] = {
    "embedding random": (randomize("^tok_embeddings"), ["tok_embeddings.weight"]),
    "head random": (randomize("^(output|lm_head)"), ["output.weight" if not IS_0_3 else "lm_head.weight"]),
    "vocabulary shifted": (rolled("^tok_embeddings"), ["tok_embeddings.weight"]),
    "query rows permuted": (rolled(r"layers\.1\..*wq"), ["layers.1.attention", "wq.weight"]),
    "norms are one": (ones, ["layers.0.attention_norm.weight", "layers.1.ffn_norm.weight", "norm.weight"]),
    "rope zero": (buffers(torch.zeros_like), ["buffer-zero", "rope.cache" if IS_0_3 else "freqs_cis"]),
    "rope of other positions": (buffers(lambda b: b.roll(1, 0)), ["buffer-differs"]),
}


@contextlib.contextmanager
def planted_by(change: Callable[[nn.Module], None]) -> Iterator[None]:
    """TorchTitan's load, and then something wrong with the model."""
    original = checkpoint.CheckpointManager.dcp_load

    def dcp_load(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        change(self.states["model"].model[0])

    checkpoint.CheckpointManager.dcp_load = dcp_load
    try:
        yield
    finally:
        checkpoint.CheckpointManager.dcp_load = original


def planted(name: str) -> contextlib.AbstractContextManager[None]:
    return planted_by(FAULTS[name][0])


@contextlib.contextmanager
def without_a_layer() -> Iterator[None]:
    """TorchTitan's load asks for one layer less."""
    original = checkpoint.CheckpointManager.dcp_load

    def dcp_load(self: Any, state_dict: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        kept = {name: value for name, value in state_dict.items() if not name.startswith("layers.1.")}
        original(self, kept, *args, **kwargs)

    checkpoint.CheckpointManager.dcp_load = dcp_load
    try:
        yield
    finally:
        checkpoint.CheckpointManager.dcp_load = original


@contextlib.contextmanager
def adapter_that_drops_the_last_norm() -> Iterator[None]:
    from torchtitan.models.llama3 import Llama3StateDictAdapter as Adapter

    original = Adapter.to_hf
    Adapter.to_hf = lambda self, state: original(self, {k: v for k, v in state.items() if k != "norm.weight"})
    try:
        yield
    finally:
        Adapter.to_hf = original


def with_others(weights: Mapping[str, torch.Tensor], lacking: str) -> dict[str, torch.Tensor]:
    """Weights that are not quite those of the model."""
    return {name: value for name, value in weights.items() if name != lacking} | {"head.weight": torch.ones(3)}


def starting_from(path: Path, run: Path, *options: str, **fields: Any) -> Job:
    options = ("--training.steps=1", f"--checkpoint.initial_load_path={path}", *options)
    return Job(run=run, hooks=fields.pop("hooks", PROVE), options=options, **fields)


@pytest.fixture(scope="module")
def start(assets: Assets, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs whose last steps are checkpoints to start from. Read only."""
    root = tmp_path_factory.mktemp("start")
    only = "--checkpoint.last_save_model_only"
    jobs = [
        Job(run=root / "dcp", hooks={"metadata": True}, options=[only]),
        Job(run=root / "half", hooks={"metadata": True}, options=[only, "--checkpoint.export_dtype=bfloat16"]),
        Job(run=root / "hf", options=[only, "--checkpoint.last_save_in_hf"]),
    ]
    run_jobs(assets, 2, root, *jobs)
    assert [error_of(job) for job in jobs] == ["", "", ""]
    return root


@pytest.fixture(scope="module")
def jobs(assets: Assets, start: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Job]:
    """Jobs that start from those, rightly or wrongly, all on the same two ranks. Read only."""
    root = tmp_path_factory.mktemp("jobs")
    step = Path("checkpoint", "step-4")
    weights = tensors_of(start / "dcp" / step)
    plain = dcp_directories.save(weights, root / "as files")
    nested = dcp_directories.save({"model": weights}, root / "nested files")
    in_hf = "--checkpoint.initial_load_in_hf"
    others = dcp_directories.save(with_others(weights, "norm.weight"), root / "other files")
    (others_in_hf := root / "others in hf").mkdir()
    (file,) = (start / "hf" / step).glob("*.safetensors")
    save_file(with_others(load_file(file), "model.norm.weight"), others_in_hf / "model.safetensors")
    (root / "empty folder" / "checkpoint").mkdir(parents=True)
    jobs = {
        "recorded": starting_from(start / "dcp" / step, root / "recorded"),
        "rounded": starting_from(start / "half" / step, root / "rounded"),
        "disabled": starting_from(start / "dcp" / step, root / "disabled", hooks={"prove_load": False}),
        "hf": starting_from(start / "hf" / step, root / "hf", in_hf),
        "plain": starting_from(plain, root / "plain"),
        "hf permuted": starting_from(
            start / "hf" / step, root / "hf permuted", in_hf, within=partial(planted, "query rows permuted")
        ),
        "hf with others": starting_from(others_in_hf, root / "hf with others", in_hf),
        "hf with others allowed": starting_from(others_in_hf, root / "hf with others allowed", in_hf, hooks=ALLOWED),
        "others": starting_from(others, root / "others"),
        "others allowed": starting_from(others, root / "others allowed", hooks=ALLOWED),
        "nested": starting_from(nested, root / "nested"),
        "empty folder": starting_from(start / "dcp" / step, root / "empty folder"),
        "first": Job(run=root / "outranked", options=["--training.steps=2"]),
        "outranked": starting_from(start / "dcp" / step, root / "outranked", "--training.steps=3"),
        "without a layer": starting_from(start / "dcp" / step, root / "layer", within=without_a_layer),
        "dropped": starting_from(start / "hf" / step, root / "dropped", in_hf, within=adapter_that_drops_the_last_norm),
    }
    jobs |= {name: starting_from(start / "dcp" / step, root / name, within=partial(planted, name)) for name in FAULTS}
    run_jobs(assets, 2, root, *jobs.values())
    return jobs


def test_a_load_that_is_right_is_proved_in_one_line(jobs: dict[str, Job]) -> None:
    assert {error_of(jobs[name]) for name in ("recorded", "rounded", "disabled", "hf", "plain")} == {""}
    (line,) = [line for line in log_of(jobs["recorded"]).splitlines() if PROVED in line]
    assert "step-4 (digests recorded)" in line
    assert "non-persistent buffers equal" in line
    assert "cast bfloat16 -> float32" in next(x for x in log_of(jobs["rounded"]).splitlines() if PROVED in x)
    assert PROVED not in log_of(jobs["disabled"])


def test_a_checkpoint_without_metadata_is_compared_with_its_files(jobs: dict[str, Job]) -> None:
    assert "(digests read from its files)" in log_of(jobs["plain"])


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_named(jobs: dict[str, Job], name: str) -> None:
    assert error_of(jobs[name]).startswith("InitialLoadError")
    assert all(part in error_of(jobs[name]) for part in FAULTS[name][1])
    assert "loss:" not in log_of(jobs[name])


def test_a_layer_that_was_not_loaded_is_named(jobs: dict[str, Job]) -> None:
    assert "layers.1.feed_forward.w2.weight" in error_of(jobs["without a layer"])
    assert "layers.0." not in error_of(jobs["without a layer"])


def test_a_nested_checkpoint_is_refused_with_advice(jobs: dict[str, Job]) -> None:
    assert "The keys are stored below 'model'" in error_of(jobs["nested"])


def test_an_empty_folder_does_not_turn_the_initial_load_off(jobs: dict[str, Job]) -> None:
    job = jobs["empty folder"]
    if IS_0_3:  # it falls through to the initial load
        assert error_of(job) == ""
        assert PROVED in log_of(job)
    else:
        assert "holds no checkpoint" in error_of(job)
        assert "would start from random weights" in error_of(job)


def test_a_step_that_outranks_the_initial_load_is_named(jobs: dict[str, Job]) -> None:
    assert error_of(jobs["outranked"]) == ""
    assert re.search(r"step-2 outranks .*step-4, which is not loaded", log_of(jobs["outranked"]))


def test_what_an_adapter_drops_is_named(jobs: dict[str, Job]) -> None:
    assert "norm.weight: dropped by Llama3StateDictAdapter.to_hf" in error_of(jobs["dropped"])


def test_a_load_from_files_is_proved_value_by_value(jobs: dict[str, Job]) -> None:
    (line,) = [line for line in log_of(jobs["hf"]).splitlines() if PROVED in line]
    assert "(digests read from its files)" in line
    assert "layers.1.attention" in error_of(jobs["hf permuted"])
    assert "[values-differ]" in error_of(jobs["hf permuted"])


def test_a_checkpoint_of_other_tensors_is_refused(jobs: dict[str, Job]) -> None:
    assert "norm.weight: not in the checkpoint" in error_of(jobs["others"])
    assert "model.norm.weight: not in the files" in error_of(jobs["hf with others"])


@pytest.mark.parametrize("name", ["others allowed", "hf with others allowed"])
def test_unless_that_is_allowed_and_then_it_is_said(jobs: dict[str, Job], name: str) -> None:
    assert error_of(jobs[name]) == ""
    (line,) = [line for line in log_of(jobs[name]).splitlines() if PROVED in line]
    assert "not in the checkpoint, as allowed: norm.weight" in line
    assert "not in the model, as allowed: head.weight" in line
