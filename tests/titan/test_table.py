"""What works with which of TorchTitan's models: docs/torchtitan.md has the table, and each of its cells a test here."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from shardsmith.cli import main
from tests.titan import backend_models as backend
from tests.titan import small_models
from tests.titan.checkpoints import digests_of, tensors_of
from tests.titan.cpu import IS_0_3
from tests.titan.evaluation import FLOAT32, evaluated, losses_of, transformers_loss
from tests.titan.hf_models import MODELS, PREDICTS, TOLERANCES, make_model, make_with_mtp
from tests.titan.jobs import BFLOAT16, Assets, Job, error_of, log_of, run_jobs

pytestmark = pytest.mark.long

STEPS = 2
SUFFIXES = {"main": "", "ema": "-ema"}
SMALL = f"/{small_models.DENSE}"
REPLICAS = ["--parallelism.data_parallel_replicate_degree=2", "--parallelism.data_parallel_shard_degree=1"]
RECOMPUTED = [] if IS_0_3 else ["--activation_checkpoint.mode=selective"]
"""As TorchTitan computes by default, which the configs of 0.3 say."""
LOADED = {"export_interval": 1, "export_verify": "load"}
"""Each export is loaded and asked, and so is the live model: the next step must be as if nobody had."""
BALANCED = 0.05
"""How much the bias of its routers may change the loss of a model whose files have no place for it."""


DOCS = Path(__file__).parents[2] / "docs" / "torchtitan.md"
VERSION = "0.3" if IS_0_3 else "0.2"
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

    name: str
    """In the table."""
    title: str
    """Of the model and of its flavor, as the commands take it."""
    make: Callable[[Path], None]
    """Writes a directory of it."""
    choice: Callable[[Path], list[str]]
    """How a job names it, given that directory."""
    layout: str = "torchtitan"
    """That to-dcp writes."""
    options: list[str] = field(default_factory=lambda: list(FLOAT32))
    hooks: dict[str, Any] = field(default_factory=dict)
    """Of ours, in all its runs."""
    export: dict[str, Any] = field(default_factory=lambda: {"export_last": True})
    refused: dict[str, str] = field(default_factory=dict)
    """Column -> a part of the error that says why not."""
    trained: str = "*"
    """Pattern of the names of what it learns."""
    tolerance: float = 1e-4
    """Of the start loss."""
    unlike: float = 1e-4
    """Of the loss of an export."""
    unused: str | None = None
    """How tensors of its files begin that transformers has no place for."""

    @property
    def names(self) -> list[str]:
        """Options of a command."""
        model, flavor = self.title.split("/")
        return ["--titan-model", model, "--titan-flavor", flavor]

    def loss(self, directory: Path) -> float:
        """Of transformers."""
        return transformers_loss(directory, self.unused)


def row(name: str, title: str, **fields: Any) -> Row:
    model, flavor = title.split("/")
    choice = [f"--config={model}_{flavor}"] if IS_0_3 else [f"--model.name={model}", f"--model.flavor={flavor}"]
    given = {"make": partial(made, title), "choice": lambda _: choice, "tolerance": TOLERANCES.get(title, 1e-4)}
    return Row(name=name, title=title, **{**given, **fields})


def made(title: str, directory: Path) -> None:
    make_model(MODELS[title](), directory)


ROWS = [
    row("llama3", f"llama3{SMALL}"),
    row("qwen3", f"qwen3{SMALL}"),
    row("qwen3, tied", f"qwen3/{small_models.TIED_DENSE}", options=FLOAT32 if IS_0_3 else [*FLOAT32, *REPLICAS]),
    row("qwen3, experts", f"qwen3/{small_models.MOE}", unlike=BALANCED),
    row("deepseek_v3", f"deepseek_v3{SMALL}", export=LOADED),
    row(
        "gpt_oss",
        f"gpt_oss{SMALL}",
        options=BFLOAT16 if IS_0_3 else FLOAT32,
        unlike=BALANCED,
        refused={"files": "have no name in it" if IS_0_3 else "mlp.experts.gate_up_proj"},
    ),
    row(
        "models of transformers (its backend)",
        f"{backend.NAME}/full",
        make=backend.make,
        choice=backend.choice,
        layout="nested",
        hooks={"repair_buffers": True},
        refused={}
        if IS_0_3
        else {"resume": "param_groups.tok_embeddings.weight.lr", "files": "this model has no state-dict adapter"},
    ),
]
if IS_0_3:
    ROWS += [
        row(
            "deepseek_v3 with prediction layers",
            "tests.titan.configs/deepseek_v3_small_mtp",
            make=make_with_mtp,
            choice=lambda _: ["--config=deepseek_v3_small_mtp"],
            unused=PREDICTS,
        ),
        row(
            "llama3 with LoRA",
            f"llama3{SMALL}",
            choice=lambda _: ["--config=llama3_with_lora", "--optimizer.implementation=foreach"],
            hooks={"allow_missing": ["*lora_*"]},
            trained="*lora_*",
            refused={"to_hf": "Export from the run itself", "files": "lora_a.weight", "one_write": "adapters of LoRA"},
        ),
    ]
else:
    ROWS.append(row("llama4", f"llama4{SMALL}", unlike=BALANCED, refused={"files": "have no name in it"}))


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
    hf, dcp = root / "hf", root / "dcp"
    one.make(hf)
    for file in assets.hf.glob("tokenizer*"):
        shutil.copy(file, hf)
    names = one.names if one.layout == "torchtitan" else []
    places = ["--base-model", str(hf), "--output-dir", str(dcp), "--layout", one.layout]
    assert main(["to-dcp", *places, *names, "--quiet"]) == 0
    hooks, base = {**one.hooks, "ema_decay": 0.5}, {"export_base_model": str(hf)}
    export = {**hooks, **base, **one.export, "export_dtype": "float32"}
    one_write = {**hooks, **base, "engine": True, "weights": "huggingface"}
    options = [*RECOMPUTED, *one.choice(hf), *one.options, f"--training.steps={STEPS}", "--checkpoint.interval=1"]

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
    if "one_write" in one.refused:
        jobs["started"] = job("started", hooks, dcp, step=0)
    return Ran(one, hf, dcp, jobs)


@pytest.fixture(scope="module", params=ROWS, ids=lambda one: one.name)
def ran(request: pytest.FixtureRequest, assets: Assets, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    root = tmp_path_factory.mktemp("table")
    ran = prepare(request.param, assets, root)
    first = [name for name in ran.jobs if "resumed" not in name]
    run_jobs(assets, 2, root, *(ran.jobs[name] for name in first))
    assert error_of(ran.jobs["whole"]) == ""
    pairs = [("resumed", "whole")]
    if "one_write" not in ran.row.refused:
        assert error_of(ran.jobs["one write"]) == ""
        pairs.append(("resumed from one write", "one write"))
    for name, job in pairs:
        shutil.copytree(ran.step(job, 1), ran.step(name, 1))
    run_jobs(assets, 2, root, *(ran.jobs[name] for name, _ in pairs))
    return ran


def test_average(ran: Ran) -> None:
    """By the formula, from the weights that were saved after each step, and that it started from, and from itself."""
    start, *later = (tensors_of(place) for place in (ran.dcp, *(ran.step("whole", n) for n in (1, 2))))
    before, found = (tensors_of(ran.step("whole", n), "ema") for n in (1, 2))
    averaged = {name.removeprefix("ema_model.") for name in digests_of(ran.step("whole"), "ema_model.")}
    assert {n for n in later[0] if fnmatchcase(n, ran.row.trained) and "expert_bias" not in n} == averaged
    known = averaged & start.keys()  # an adapter begins anew, and names that are nested are others
    assert known == averaged or ran.row.layout == "nested" or ran.row.trained != "*"
    dtypes = {name: later[0][name].dtype for name in averaged}  # 0.2 casts the layers of GPT-OSS when it has loaded
    one, two = ({n: weights[n].float() for n in averaged} for weights in later)
    first = {name: start[name].to(dtypes[name]).float().lerp(one[name], 0.5) for name in known}
    second = {name: before[name].lerp(two[name], 0.5) for name in averaged}
    torch.testing.assert_close({name: before[name] for name in known}, first, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close({name: found[name] for name in averaged}, second, rtol=1e-5, atol=1e-6)


def test_resume(ran: Ran) -> None:
    warned = [line for line in log_of(ran.jobs["whole"]).splitlines() if "no run can resume from the steps" in line]
    assert len(warned) == ("resume" in ran.row.refused)
    assert all("of its transformers_modeling_backend" in line for line in warned)
    if words := ran.row.refused.get("resume"):
        assert words in error_of(ran.jobs["resumed"])
        return
    assert error_of(ran.jobs["resumed"]) == ""
    assert "Training starts at step 2" in log_of(ran.jobs["resumed"])
    assert digests_of(ran.step("resumed")) == digests_of(ran.step("whole"))


@pytest.mark.parametrize("model", SUFFIXES)
def test_export(ran: Ran, model: str) -> None:
    """``loss`` wants each tensor of the class, and no other."""
    found = ran.row.loss(ran.export(model))
    assert found == pytest.approx(losses_of(ran.jobs["whole"].run)[model], abs=max(ran.row.unlike, ran.row.tolerance))


@pytest.mark.parametrize("how", ["recorded names", "flavor"])
def test_to_hf(ran: Ran, how: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ran.row.names if how == "flavor" else []
    places = ["--checkpoint", str(ran.step("whole")), "--output-dir", str(tmp_path / "out")]
    done = main(["to-hf", *places, *names, "--base-model", str(ran.hf), "--dtype", "float32", "--quiet"])
    if words := ran.row.refused.get("to_hf"):
        assert done == 2
        assert words in capsys.readouterr().err or not names
        return
    assert done == 0
    for model, file in (("main", "model.safetensors"), ("ema", "ema.safetensors")):
        assert_same(load_file(tmp_path / "out" / file), load_file(ran.export(model) / "model.safetensors"))


def test_start(ran: Ran) -> None:
    job = ran.jobs["started" if "one_write" in ran.row.refused else "one write"]
    assert error_of(job) == ""
    assert "elements) equal those of" in log_of(job)
    assert losses_of(job.run)["main"] == pytest.approx(ran.row.loss(ran.hf), abs=ran.row.tolerance)


def test_start_from_files(ran: Ran) -> None:
    job = ran.jobs["files"]
    if words := ran.row.refused.get("files"):
        assert words in error_of(job)
        return
    assert error_of(job) == ""
    assert losses_of(job.run)["main"] == pytest.approx(ran.row.loss(ran.hf), abs=ran.row.tolerance)
    assert digests_of(ran.step("files")) == digests_of(ran.step("whole"))


@pytest.mark.parametrize("model", SUFFIXES)
def test_one_write(ran: Ran, model: str) -> None:
    """The same steps, as Hugging Face directories; and it goes on from one."""
    if words := ran.row.refused.get("one_write"):
        assert words in error_of(ran.jobs["one write"])
        return
    step = ran.step("one write")
    assert digests_of(step) == digests_of(ran.step("whole"))
    if words := ran.row.refused.get("resume"):
        assert words in error_of(ran.jobs["resumed from one write"])
    else:
        assert error_of(ran.jobs["resumed from one write"]) == ""
        assert digests_of(ran.step("resumed from one write")) == digests_of(ran.step("whole"))
    folder = step if model == "main" else step / "ema"
    assert_same(load_file(folder / "model.safetensors"), load_file(ran.export(model) / "model.safetensors"))


def test_the_table_of_the_docs_says_so() -> None:
    lines = [line.strip("| ") for line in DOCS.read_text().splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.split("|")] for line in lines]
    start = next(i for i, row in enumerate(cells) if row[:2] == ["model", "TorchTitan"])
    assert cells[start][2:] == list(COLUMNS)
    rows = [row for row in cells[start:] if len(row) == len(cells[start])]
    found = {name: dict(zip(COLUMNS.values(), rest, strict=True)) for name, v, *rest in rows if v == VERSION}
    assert {one.name for one in ROWS} == found.keys()
    for one in ROWS:
        for column, cell in found[one.name].items():
            assert cell.startswith("no" if column in one.refused else "yes"), (one.name, column)


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name, value in expected.items() if not torch.equal(found[name], value)] == []
