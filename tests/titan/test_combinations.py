"""Parallelisms together, and what else changes how a step is computed: docs/torchtitan.md has the list."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from shardsmith.cli import main
from tests.titan.checkpoints import digests_of
from tests.titan.cpu import IS_0_3
from tests.titan.evaluation import FLOAT32, evaluated, losses_of, transformers_loss
from tests.titan.jobs import Assets, Job, error_of, log_of, run_jobs
from tests.titan.small_models import DENSE, STAGED

pytestmark = pytest.mark.long

DOCS = Path(__file__).parents[2] / "docs" / "torchtitan.md"
HOOKS = {"ema_decay": 0.5, "export_last": True, "export_dtype": "float32"}
TENSOR, STAGES = "--parallelism.tensor_parallel_degree=2", "--parallelism.pipeline_parallel_degree=2"
SHARDED, REPLICATED = "--parallelism.data_parallel_shard_degree=2", "--parallelism.data_parallel_replicate_degree=2"
INTERLEAVED = "--parallelism.pipeline_parallel_schedule=Interleaved1F1B"
MICROBATCHES = "--training.local_batch_size=4"
RECOMPUTED = ["--config=llama3_recomputed"] if IS_0_3 else ["--activation_checkpoint.mode=full"]


@dataclass(frozen=True)
class Way:
    """One way to train."""

    ranks: int
    options: list[str]
    has_stages: bool = False
    flavor: str = DENSE
    elsewhere: list[str] = field(default_factory=list)
    """More options of a run on two ranks, of FSDP alone, that goes on from its step."""
    refused: str = ""
    """A part of the error of a run that cannot even begin, or where ``not_resumed``, of one that cannot go on."""
    not_resumed: bool = False


OTHER_LOADERS = ["--checkpoint.exclude_from_loading=dataloader"]
ZERO_BUBBLE = [STAGES, MICROBATCHES, "--parallelism.pipeline_parallel_schedule=InterleavedZeroBubble"]
FLOAT8_0_2 = ["--model.converters=quantize.linear.float8", "--quantize.linear.float8.emulate"]
CONTEXT = ["--parallelism.context_parallel_degree=2"]
WAYS = {
    "tensor parallel, FSDP (2 x 2)": Way(4, [TENSOR, SHARDED]),
    "HSDP (2 x 2)": Way(4, [REPLICATED, SHARDED], elsewhere=OTHER_LOADERS),
    "pipeline, tensor parallel (2 x 2)": Way(
        4, [STAGES, TENSOR, MICROBATCHES], has_stages=True, elsewhere=OTHER_LOADERS
    ),
    "interleaved pipeline, FSDP (2 x 2)": Way(
        4, [STAGES, SHARDED, INTERLEAVED, MICROBATCHES], has_stages=True, flavor=STAGED
    ),
    "torch.compile, accumulated gradients": Way(2, ["--compile.enable", "--training.global_batch_size=8"]),
    "full activation checkpointing": Way(2, RECOMPUTED),
    "context parallel": Way(2, CONTEXT, refused="does not have a sharding strategy registered"),
}
if IS_0_3:
    WAYS |= {
        "float8, emulated": Way(2, ["--config=llama3_with_float8"]),
        "pipeline with zero bubble": Way(
            2,
            ZERO_BUBBLE,
            has_stages=True,
            flavor=STAGED,
            elsewhere=OTHER_LOADERS,
            refused="optimizer.state.norm.weight",
            not_resumed=True,
        ),
    }
else:
    WAYS |= {
        "float8, emulated": Way(2, FLOAT8_0_2, refused="torchao is not installed"),
        "pipeline with zero bubble": Way(2, ZERO_BUBBLE, has_stages=True, flavor=STAGED, elsewhere=OTHER_LOADERS),
    }
WORKS = [name for name, way in WAYS.items() if not way.refused or way.not_resumed]


@dataclass(frozen=True)
class Ran:
    """What was done. Read only."""

    way: Way
    assets: Assets
    whole: Job
    resumed: Job
    elsewhere: Job

    @property
    def step(self) -> Path:
        return self.whole.run / "checkpoint" / "step-4"


@pytest.fixture(scope="module", params=WORKS)
def ran(
    request: pytest.FixtureRequest, assets: Assets, staged_assets: Assets, tmp_path_factory: pytest.TempPathFactory
) -> Ran:
    root, way = tmp_path_factory.mktemp("ways"), WAYS[request.param]
    assets = staged_assets if way.flavor == STAGED else assets
    options = [*FLOAT32, "--debug.seed=1", *way.options]
    whole = Job(run=root / "whole", hooks=HOOKS, options=options)
    if not way.has_stages:
        whole = Job(run=root / "whole", hooks=HOOKS, options=options, within=partial(evaluated, 4))
    resumed = Job(run=root / "resumed", hooks={"ema_decay": 0.5}, options=options)
    elsewhere = Job(run=root / "elsewhere", hooks={"ema_decay": 0.5}, options=[*FLOAT32, *way.elsewhere])
    run_jobs(assets, way.ranks, root, whole)
    assert error_of(whole) == ""
    for job in (resumed, elsewhere):
        shutil.copytree(whole.run / "checkpoint" / "step-2", job.run / "checkpoint" / "step-2")
    run_jobs(assets, way.ranks, root, resumed)
    run_jobs(assets, 2, root, elsewhere)
    return Ran(way, assets, whole, resumed, elsewhere)


def test_a_resumed_run_goes_on_as_the_uninterrupted_one(ran: Ran) -> None:
    if ran.way.not_resumed:
        assert ran.way.refused in error_of(ran.resumed)
        return
    assert error_of(ran.resumed) == ""
    assert "Training starts at step 3" in log_of(ran.resumed)
    assert digests_of(ran.resumed.run / "checkpoint" / "step-4") == digests_of(ran.step)


def test_a_run_whose_steps_are_not_resumed_says_so_when_it_begins(ran: Ran) -> None:
    warned = [line for line in log_of(ran.whole).splitlines() if "no run can resume from the steps" in line]
    assert len(warned) == ran.way.not_resumed
    assert all("the pipeline schedule InterleavedZeroBubble" in line for line in warned)


def test_a_run_of_two_ranks_goes_on_from_its_step(ran: Ran) -> None:
    if ran.way.not_resumed:
        assert ran.way.refused in error_of(ran.elsewhere)
        return
    assert error_of(ran.elsewhere) == ""
    assert "Training starts at step 3" in log_of(ran.elsewhere)
    assert "tensors equal those that were saved in" in log_of(ran.elsewhere)


@pytest.mark.parametrize(("model", "suffix"), [("main", ""), ("ema", "-ema")])
def test_the_export_has_the_loss_of_the_run_and_is_that_of_to_hf(
    ran: Ran, model: str, suffix: str, tmp_path: Path
) -> None:
    export = ran.whole.run / "hf" / f"step-4{suffix}"
    if not ran.way.has_stages:
        tolerance = 0.02 if ran.way is WAYS["float8, emulated"] else 1e-4  # float8 rounds
        assert transformers_loss(export) == pytest.approx(losses_of(ran.whole.run)[model], abs=tolerance)
    places = ["--checkpoint", str(ran.step), "--output-dir", str(tmp_path / "out"), "--base-model", str(ran.assets.hf)]
    assert main(["to-hf", *places, "--models", model, "--ema-as", "directory", "--dtype", "float32", "--quiet"]) == 0
    found, expected = (load_file(place / "model.safetensors") for place in (tmp_path / "out", export))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize("name", [name for name in WAYS if name not in WORKS])
def test_what_does_not_run_says_why(name: str, assets: Assets, tmp_path: Path) -> None:
    job = Job(run=tmp_path / "run", hooks=HOOKS, options=WAYS[name].options)
    run_jobs(assets, WAYS[name].ranks, tmp_path, job)
    assert WAYS[name].refused in error_of(job)


def test_the_table_of_the_docs_says_so() -> None:
    lines = [line.strip("| ") for line in DOCS.read_text().splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.split("|")] for line in lines]
    start = next(i for i, row in enumerate(cells) if row == ["way", "0.2", "0.3"])
    found = {name: (old, new)[IS_0_3] for name, old, new in cells[start + 2 :]}
    assert {name: cell.startswith("yes") for name, cell in found.items()} == {n: not w.refused for n, w in WAYS.items()}
