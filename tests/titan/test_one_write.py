"""Step folders that are Hugging Face directories: TorchTitan trains, is killed, and goes on on another number of ranks.

Real gradients are, bit for bit, the same on one rank and on two where the two see the same samples, whose gradients are
added to twice their value and divided by two; and where they are pipeline stages with one microbatch a step. So a run
that is killed and goes on on other ranks is compared with one that was never interrupted.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.multiprocessing import ProcessExitedException
from torchtitan.components import dataloader
from torchtitan.hf_datasets import text_datasets
from transformers import Qwen3Config

from shardsmith.cli import main
from shardsmith.formats.adopt import adopt
from shardsmith.manifest.metadata import read_metadata
from tests.titan.checkpoints import digests_of
from tests.titan.cpu import IS_0_3
from tests.titan.evaluation import FLOAT32, evaluated, losses_of, transformers_loss
from tests.titan.hf_models import QWEN
from tests.titan.jobs import Assets, Job, error_of, log_of, run_jobs, signalled_in
from tests.titan.small_models import DENSE, TIED_DENSE

EMA = {"ema_decay": 0.5}
ONE_WRITE = {**EMA, "engine": True, "weights": "huggingface"}
EXPORTED = {"export_interval": 4, "export_dtype": "original"}
STEPS = [
    *FLOAT32,
    "--training.steps=8",
    "--checkpoint.interval=4",
    "--lr_scheduler.total_steps=8",
    "--training.max_norm=1e9",  # else gradients are scaled by a norm, whose sum depends on the ranks
]
STAGES = ["--parallelism.pipeline_parallel_degree=2", "--parallelism.pipeline_parallel_schedule=GPipe"]
STAGES += ["--parallelism.pipeline_parallel_microbatch_size=2"]
"""Each step is one microbatch."""
TITLES = ["llama3", "qwen3", "stages"] if IS_0_3 else ["llama3", "qwen3"]
"""Qwen3's files are bfloat16 beside float32 masters; in 0.3 its embeddings are tied. Stages, which 0.2 trains with
gradients of another scale, are those of llama3."""
FOLDERS = {"main": "", "ema": "ema"}


@contextlib.contextmanager
def same_samples() -> Iterator[None]:
    """All ranks train on the same samples, and have one state of a data loader."""
    split, initialize = text_datasets.split_dataset_by_node, dataloader.ParallelAwareDataloader.__init__

    def of_all(self: Any, dataset: Any, dp_rank: int, dp_world_size: int, **options: Any) -> None:  # noqa: ARG001
        initialize(self, dataset, 0, 1, **options)

    text_datasets.split_dataset_by_node = lambda data, *_: data
    dataloader.ParallelAwareDataloader.__init__ = of_all
    try:
        yield
    finally:
        text_datasets.split_dataset_by_node, dataloader.ParallelAwareDataloader.__init__ = split, initialize


@contextlib.contextmanager
def within(*others: Callable[[], contextlib.AbstractContextManager[Any]]) -> Iterator[None]:
    with same_samples(), contextlib.ExitStack() as stack:
        for other in others:
            stack.enter_context(other())
        yield


def during(*others: Callable[[], contextlib.AbstractContextManager[Any]]) -> dict[str, Any]:
    return {"within": functools.partial(within, *others)}


@pytest.fixture(scope="module")
def runs(assets: Assets, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Job]]:
    """By model: a run without a stop, with steps of torch's writer, and one that is killed and goes on. Read only."""
    return {title: train(title, assets, tmp_path_factory.mktemp(title)) for title in TITLES}


def choose(title: str, assets: Assets, root: Path) -> tuple[list[str], dict[str, Any]]:
    """Command line and hooks of a model."""
    if title != "qwen3":
        return [], {}
    base = root / "base"
    shutil.copytree(assets.hf, base)
    Qwen3Config(**QWEN, tie_word_embeddings=IS_0_3, architectures=["Qwen3ForCausalLM"]).save_pretrained(base)
    chosen = [f"--config=qwen3_{TIED_DENSE}"] if IS_0_3 else ["--model.name=qwen3", f"--model.flavor={DENSE}"]
    return chosen, {"export_base_model": str(base)}


def train(title: str, assets: Assets, root: Path) -> dict[str, Job]:
    """All start from the weights of one step, read from its files as such or as a checkpoint."""
    model, hooks = choose(title, assets, root)
    ours = {**ONE_WRITE, **hooks}
    start = Job(
        run=root / "start", hooks=ours, options=[*model, "--training.steps=1", "--checkpoint.last_save_model_only"]
    )
    options = [*model, *STEPS, f"--checkpoint.initial_load_path={start.run / 'checkpoint' / 'step-1'}"]
    in_hf = "--checkpoint.initial_load_in_hf"
    straight = Job(run=root / "straight", hooks={**EMA, **EXPORTED, **hooks}, options=[*options, in_hf], **during())
    stages = STAGES if title == "stages" else []
    run = root / "resumed"
    ours = {**ours, "weights_dtype": "bfloat16"} if title == "qwen3" else ours
    killed = Job(
        run=run, hooks=ours, options=[*options, *stages], **during(functools.partial(signalled_in, 6, signal.SIGKILL))
    )
    run_jobs(assets, 1, root, start, straight)
    with pytest.raises(ProcessExitedException, match="SIGKILL"):
        run_jobs(assets, 2, root, killed)
    found = {"start": start, "straight": straight, "killed": copy_of(killed, root / "killed")}
    found["resumed"] = Job(run=run, hooks=ours, options=options, **during(functools.partial(evaluated, 8)))
    run_jobs(assets, 1, root, found["resumed"])
    assert {name: error_of(job) for name, job in found.items()} == dict.fromkeys(found, "")
    return found


def copy_of(job: Job, run: Path) -> Job:
    shutil.copytree(job.run, run)
    return Job(run=run, hooks=job.hooks, options=job.options, **during())


def step(job: Job, number: int) -> Path:
    return job.run / "checkpoint" / f"step-{number}"


@pytest.mark.parametrize("title", TITLES)
def test_a_run_that_is_killed_goes_on_on_other_ranks_as_if_nothing_had_been(
    runs: dict[str, dict[str, Job]], title: str
) -> None:
    straight, resumed = runs[title]["straight"], runs[title]["resumed"]
    assert "Training starts at step 5" in log_of(resumed)
    assert [read_metadata(step(resumed, n)).world_size for n in (4, 8)] == [2, 1]
    for number in (4, 8):
        assert digests_of(step(resumed, number)) == digests_of(step(straight, number))


@pytest.mark.parametrize("title", TITLES)
@pytest.mark.parametrize(("model", "folder"), FOLDERS.items())
def test_its_files_are_those_of_an_export_of_the_same_step(
    runs: dict[str, dict[str, Job]], title: str, model: str, folder: str
) -> None:
    exported = runs[title]["straight"].run / "hf"
    suffix = "" if model == "main" else "-ema"
    for number in (4, 8):  # of two ranks, of one
        found = load_file(step(runs[title]["resumed"], number) / folder / "model.safetensors")
        wanted = load_file(exported / f"step-{number}{suffix}" / "model.safetensors")
        assert found.keys() == wanted.keys()
        dtype = torch.bfloat16 if title == "qwen3" else torch.float32
        assert [name for name, value in wanted.items() if not torch.equal(found[name], value.to(dtype))] == []


@pytest.mark.parametrize("title", TITLES)
@pytest.mark.parametrize(("model", "folder"), FOLDERS.items())
def test_from_pretrained_of_a_step_has_the_loss_of_the_run(
    runs: dict[str, dict[str, Job]], title: str, model: str, folder: str
) -> None:
    job = runs[title]["resumed"]
    most = 0.05 if title == "qwen3" else 1e-4  # its files are rounded
    assert transformers_loss(step(job, 8) / folder) == pytest.approx(losses_of(job.run)[model], abs=most)


@pytest.mark.parametrize("title", TITLES)
def test_a_run_starts_from_it_as_a_checkpoint_and_as_files(runs: dict[str, dict[str, Job]], title: str) -> None:
    place = step(runs[title]["start"], 1)
    assert not any(key.startswith("optimizer.") for key in read_metadata(place).tensors)
    for name, how in (("killed", "recorded"), ("straight", "read from its files")):
        assert f"equal those of {place} (digests {how})" in log_of(runs[title][name])


def test_as_plain_dcp_torchtitan_goes_on_from_it_by_itself(
    assets: Assets, runs: dict[str, dict[str, Job]], tmp_path: Path
) -> None:
    killed, straight = (runs["llama3"][name] for name in ("killed", "straight"))
    plain = Job(run=tmp_path / "plain", options=STEPS, **during())
    plain.run.mkdir()
    (plain.run / "checkpoint").mkdir()
    way_back = ["to-dcp", "--base-model", str(step(killed, 4)), "--output-dir", str(step(plain, 4)), "--whole"]
    assert main([*way_back, "--quiet"]) == 0
    as_it_is = copy_of(Job(run=killed.run, options=STEPS), tmp_path / "as it is")
    run_jobs(assets, 1, tmp_path, plain, as_it_is)
    assert "Missing key in checkpoint state_dict" in error_of(as_it_is)  # torch's words: it says no more
    assert error_of(plain) == ""
    adopt(step(plain, 8), step=8)
    wanted = digests_of(step(straight, 8))
    assert digests_of(step(plain, 8)) == {key: one for key, one in wanted.items() if not key.startswith("ema_")}


def test_a_step_whose_weights_are_damaged_is_passed_over(
    assets: Assets, runs: dict[str, dict[str, Job]], tmp_path: Path
) -> None:
    damaged = copy_of(runs["llama3"]["resumed"], tmp_path / "damaged")
    with (step(damaged, 8) / "ema" / "model.safetensors").open("r+b") as file:
        file.seek(-1000, os.SEEK_END)
        file.write(bytes(64))
    run_jobs(assets, 1, tmp_path, damaged)
    assert error_of(damaged) == ""
    assert "step-8 is damaged and passed over" in log_of(damaged)
    assert digests_of(step(damaged, 8)) == digests_of(step(runs["llama3"]["straight"], 8))


def test_what_the_files_cannot_hold_is_refused_at_the_start(assets: Assets, tmp_path: Path) -> None:
    last = ["--checkpoint.last_save_model_only", "--checkpoint.export_dtype=bfloat16"]
    rounded = Job(run=tmp_path / "rounded", hooks=ONE_WRITE, options=last)
    jobs = {"writes the dtype that trains (float32)": rounded}
    if IS_0_3:
        options = ["--config=llama3_with_lora", "--optimizer.implementation=foreach"]
        jobs["have adapters of LoRA"] = Job(run=tmp_path / "lora", hooks=ONE_WRITE, options=options)
    run_jobs(assets, 1, tmp_path, *jobs.values())
    for words, job in jobs.items():
        assert words in error_of(job)
        assert not list(job.run.glob("checkpoint/step-*"))
