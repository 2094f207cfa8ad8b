"""What works with which of TorchTitan's models: docs/torchtitan.md has the table, and each of its cells a test here."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from shardsmith.cli import main
from tests.titan import small_models
from tests.titan.checkpoints import digests_of, tensors_of
from tests.titan.cpu import IS_0_3
from tests.titan.evaluation import FLOAT32, evaluated, losses_of, transformers_loss
from tests.titan.hf_models import MODELS, TOLERANCES, make_model
from tests.titan.jobs import Assets, Job, error_of, log_of, run_jobs

STEPS = 2
SUFFIXES = {"main": "", "ema": "-ema"}
SMALL = f"/{small_models.DENSE}"
REPLICAS = ["--parallelism.data_parallel_replicate_degree=2", "--parallelism.data_parallel_shard_degree=1"]
LOADED = {"export_interval": 1, "export_verify": "load"}
"""Each export is loaded and asked, and so is the live model: the next step must be as if nobody had."""
BALANCED = 0.05
"""How much the bias of its routers may change the loss of a model whose files have no place for it."""


DOCS = Path(__file__).parents[2] / "docs" / "torchtitan.md"
VERSION = "0.3" if IS_0_3 else "0.2"
NAMES = {
    "llama3/debugmodel": "llama3",
    f"qwen3{SMALL}": "qwen3",
    f"qwen3/{small_models.TIED_DENSE}": "qwen3, tied",
    f"qwen3/{small_models.MOE}": "qwen3, experts",
    f"deepseek_v3{SMALL}": "deepseek_v3",
    f"gpt_oss{SMALL}": "gpt_oss",
    f"llama4{SMALL}": "llama4",
}
"""Flavor -> name in the table. What else it has is shown by the file that is named below it."""
COLUMNS = {
    "average": "average",
    "save, resume": "resume",
    "live export": "export",
    "to-hf": "to_hf",
    "start by to-dcp": "start",
    "start by `initial_load_in_hf`": "files",
    '`weights="huggingface"`': "one_write",
}
"""Column of the table -> that of the tests."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """A model of TorchTitan as the table has it."""

    title: str
    """Of the model and of its flavor."""
    options: list[str] = field(default_factory=lambda: list(FLOAT32))
    export: dict[str, Any] = field(default_factory=lambda: {"export_last": True})
    refused: dict[str, str] = field(default_factory=dict)
    """Column -> a part of the error that says why not."""
    tolerance: float = 1e-4
    """Of the start loss."""
    unlike: float = 1e-4
    """Of the loss of an export."""

    @property
    def choice(self) -> list[str]:
        name, flavor = self.title.split("/")
        return [f"--config={name}_{flavor}"] if IS_0_3 else [f"--model.name={name}", f"--model.flavor={flavor}"]


def row(title: str, **fields: Any) -> Row:
    return Row(title=title, tolerance=TOLERANCES.get(title, 1e-4), **fields)


ROWS = [
    row("llama3/debugmodel"),
    row(f"qwen3{SMALL}"),
    row(f"qwen3/{small_models.TIED_DENSE}", options=FLOAT32 if IS_0_3 else [*FLOAT32, *REPLICAS]),
    row(f"qwen3/{small_models.MOE}", unlike=BALANCED),
    row(f"deepseek_v3{SMALL}", export=LOADED),
    row(
        f"gpt_oss{SMALL}",
        options=[] if IS_0_3 else FLOAT32,
        unlike=BALANCED,
        refused={"files": "have no name in it" if IS_0_3 else "mlp.experts.gate_up_proj"},
    ),
]
if not IS_0_3:
    ROWS.append(row(f"llama4{SMALL}", unlike=BALANCED, refused={"files": "have no name in it"}))


@dataclass(frozen=True)
class Ran:
    """What was done with a model. Read only."""

    row: Row
    hf: Path
    dcp: Path
    jobs: dict[str, Job]

    def step(self, job: str, number: int = STEPS) -> Path:
        return self.jobs[job].run / "checkpoint" / f"step-{number}"

    def export(self, model: str) -> Path:
        return self.jobs["whole"].run / "hf" / f"step-{STEPS}{SUFFIXES[model]}"


def prepare(one: Row, assets: Assets, root: Path) -> Ran:
    """Write its directory and convert it, and say how TorchTitan trains it."""
    name, flavor = one.title.split("/")
    hf, dcp = root / "hf", root / "dcp"
    make_model(MODELS[one.title](), hf)
    for file in assets.hf.glob("tokenizer*"):
        shutil.copy(file, hf)
    names = ["--layout", "torchtitan", "--titan-model", name, "--titan-flavor", flavor, "--quiet"]
    assert main(["to-dcp", "--base-model", str(hf), "--output-dir", str(dcp), *names]) == 0
    hooks, base = {"ema_decay": 0.5}, {"export_base_model": str(hf)}
    export = {**hooks, **base, **one.export, "export_dtype": "float32"}
    one_write = {**hooks, **base, "engine": True, "weights": "huggingface"}
    options = [*one.choice, *one.options, f"--training.steps={STEPS}", "--checkpoint.interval=1"]

    def job(run: str, hooks: dict[str, Any], start: Path, *more: str, step: int = STEPS) -> Job:
        more = (*more, f"--checkpoint.initial_load_path={start}")
        return Job(run=root / run, hooks=hooks, options=[*options, *more], within=partial(evaluated, step))

    jobs = {
        "whole": job("whole", export, dcp),
        "one write": job("one write", one_write, dcp, step=0),
        "files": job("files", {**hooks, "engine": True}, hf, "--checkpoint.initial_load_in_hf", step=0),
        "resumed": job("resumed", hooks, dcp),
        "resumed from one write": job("resumed one", one_write, dcp),
    }
    return Ran(one, hf, dcp, jobs)


@pytest.fixture(scope="module", params=ROWS, ids=lambda one: one.title)
def ran(request: pytest.FixtureRequest, assets: Assets, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    root = tmp_path_factory.mktemp("table")
    ran = prepare(request.param, assets, root)
    first, resumed = ("whole", "one write", "files"), ("resumed", "resumed from one write")
    run_jobs(assets, 2, root, *(ran.jobs[name] for name in first))
    assert [error_of(ran.jobs[name]) for name in first[:2]] == ["", ""]
    for name, job in zip(resumed, first, strict=False):
        shutil.copytree(ran.step(job, 1), ran.step(name, 1))
    run_jobs(assets, 2, root, *(ran.jobs[name] for name in resumed))
    return ran


def test_average(ran: Ran) -> None:
    """By the formula, from the weights that were saved after each step, and that it started from."""
    start, *later = (tensors_of(place) for place in (ran.dcp, *(ran.step("whole", n) for n in (1, 2))))
    found = tensors_of(ran.step("whole"), "ema")
    averaged = {name.removeprefix("ema_model.") for name in digests_of(ran.step("whole"), "ema_model.")}
    assert {name for name in later[0] if "expert_bias" not in name} == averaged
    dtypes = {name: later[0][name].dtype for name in averaged}  # 0.2 casts the layers of GPT-OSS when it has loaded
    zero, one, two = ({n: weights[n].to(dtypes[n]).float() for n in averaged} for weights in (start, *later))
    expected = {name: zero[name].lerp(one[name], 0.5).lerp(two[name], 0.5) for name in averaged}
    torch.testing.assert_close({name: found[name] for name in averaged}, expected, rtol=1e-5, atol=1e-6)


def test_resume(ran: Ran) -> None:
    assert error_of(ran.jobs["resumed"]) == ""
    assert "Training starts at step 2" in log_of(ran.jobs["resumed"])
    assert digests_of(ran.step("resumed")) == digests_of(ran.step("whole"))


@pytest.mark.parametrize("model", SUFFIXES)
def test_export(ran: Ran, model: str) -> None:
    """``transformers_loss`` wants each tensor of the class, and no other."""
    found = transformers_loss(ran.export(model))
    assert found == pytest.approx(losses_of(ran.jobs["whole"].run)[model], abs=max(ran.row.unlike, ran.row.tolerance))


def test_to_hf(ran: Ran, tmp_path: Path) -> None:
    name, flavor = ran.row.title.split("/")
    names = ["--titan-model", name, "--titan-flavor", flavor, "--base-model", str(ran.hf), "--dtype", "float32"]
    places = ["--checkpoint", str(ran.step("whole")), "--output-dir", str(tmp_path / "out")]
    assert main(["to-hf", *places, *names, "--quiet"]) == 0
    for model, file in (("main", "model.safetensors"), ("ema", "ema.safetensors")):
        assert_same(load_file(tmp_path / "out" / file), load_file(ran.export(model) / "model.safetensors"))


def test_start(ran: Ran) -> None:
    job = ran.jobs["one write"]
    assert "elements) equal those of" in log_of(job)
    assert losses_of(job.run)["main"] == pytest.approx(transformers_loss(ran.hf), abs=ran.row.tolerance)


def test_start_from_files(ran: Ran) -> None:
    job = ran.jobs["files"]
    if words := ran.row.refused.get("files"):
        assert words in error_of(job)
        return
    assert error_of(job) == ""
    assert losses_of(job.run)["main"] == pytest.approx(transformers_loss(ran.hf), abs=ran.row.tolerance)
    assert digests_of(ran.step("files")) == digests_of(ran.step("whole"))


@pytest.mark.parametrize("model", SUFFIXES)
def test_one_write(ran: Ran, model: str) -> None:
    """The same steps, as Hugging Face directories; and it goes on from one."""
    step = ran.step("one write")
    for name in ("one write", "resumed from one write"):
        assert error_of(ran.jobs[name]) == ""
        assert digests_of(ran.step(name)) == digests_of(ran.step("whole"))
    folder = step if model == "main" else step / "ema"
    assert_same(load_file(folder / "model.safetensors"), load_file(ran.export(model) / "model.safetensors"))


def test_the_table_of_the_docs_says_so() -> None:
    lines = [line.strip("| ") for line in DOCS.read_text().splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.split("|")] for line in lines]
    start = next(i for i, row in enumerate(cells) if row[:2] == ["model", "TorchTitan"])
    assert cells[start][2:] == list(COLUMNS)
    found = {name: dict(zip(COLUMNS.values(), rest, strict=True)) for name, v, *rest in cells[start:] if v == VERSION}
    assert {NAMES[one.title] for one in ROWS} <= found.keys()
    for one in ROWS:
        for column, cell in found[NAMES[one.title]].items():
            assert cell.startswith("no" if column in one.refused else "yes"), (one.title, column)


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name, value in expected.items() if not torch.equal(found[name], value)] == []
