"""A checkpoint whose directory is a Hugging Face directory: written once, loaded by everybody, resumed from exactly."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torch.multiprocessing import ProcessExitedException
from transformers import AutoModelForCausalLM

from shardsmith import (
    Questions,
    ShardedCheckpointManager,
    diagnose_checkpoint,
    inspect_checkpoint,
    load_initial,
    verify_checkpoints,
)
from shardsmith.commands.options import ExportArguments
from shardsmith.commands.to_dcp import to_dcp
from shardsmith.commands.to_hf import to_hf
from shardsmith.errors import MismatchError, TargetExistsError
from shardsmith.export.plan import ExportOptions
from shardsmith.formats.by_path import open_source
from shardsmith.formats.dcp.beside_weights import open_step
from shardsmith.formats.dcp.load import load_into
from shardsmith.formats.dcp.source import DcpSource
from shardsmith.hooks import EMA, Hooks, ShardedSave, at, every, last, latest
from shardsmith.manifest.checkpoints import find_damage, find_foreign_files
from shardsmith.manifest.metadata import read_metadata
from shardsmith.tensors.tensors import read_tensor
from shardsmith.watch import Stop, Watcher, WatchOptions
from tests.hooks.live_models import STEP, Case, build, change, keep_truth, shard
from tests.hooks.test_save_faults import flip_a_bit
from tests.ranks import run_on_ranks
from tests.trained_runs import TOKENS

CASES = [
    Case(kind="llama", sharding="none", ranks=0),
    Case(kind="odd", sharding="none", ranks=0, live_dtype=torch.bfloat16),
    Case(kind="qwen3_moe", sharding="fsdp2", ranks=2, max_shard_size="30KB"),
    Case(kind="gemma", sharding="fsdp1", ranks=2),
    Case(kind="qwen2", sharding="wrapped-fsdp2", ranks=2),
    Case(kind="olmo2", sharding="ddp", ranks=2, live_dtype=torch.bfloat16),
    Case(kind="odd", sharding="fsdp2", ranks=2),
    Case(kind="odd", sharding="tp", ranks=2),
    Case(kind="vit", sharding="tp", ranks=2, max_shard_size="20KB"),
    Case(kind="llama", sharding="hsdp", ranks=4),
]


def run_saves(cases: list[Case], directory: Path, mode: str) -> None:
    for case in cases:
        model = shard(build(case), case.sharding)
        ema = EMA(model, decay=0.5)
        save = ShardedSave(
            directory / str(case),
            model=model,
            ema=ema,
            when=at(STEP),
            weights="huggingface",
            max_shard_size=case.max_shard_size,
            async_mode=mode,
        )
        hooks = Hooks(ema, save)
        change(model, hooks)
        hooks.close()
        if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
            twin = build(case)
            change(twin, Hooks(EMA(twin, decay=0.5)))
            keep_truth(case, twin.state_dict(), directory / str(case))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("saved")
    for ranks in sorted({case.ranks for case in CASES}):
        chosen = [case for case in CASES if case.ranks == ranks]
        if ranks:
            run_on_ranks(run_saves, ranks, directory, chosen, directory, "async")
        else:
            run_saves(chosen, directory, "disabled")
    return directory


def files_of(directory: Path) -> dict[str, Tensor]:
    """All tensors of the weight files, by another library."""
    return {k: v for path in sorted(directory.glob("model*.safetensors")) for k, v in load_file(path).items()}


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert set(found) == set(wanted)
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_files_are_those_of_save_pretrained_with_the_values_that_train(saved: Path, case: Case) -> None:
    step = saved / str(case) / f"step-{STEP}"
    truth = torch.load(saved / str(case) / "truth.pt", weights_only=True)["files"]
    assert_same(files_of(step), truth["main"])
    ema = files_of(step / "ema")
    assert set(ema) == set(truth["ema"])
    assert all(torch.equal(ema[name], tensor) for name, tensor in truth["ema"].items())
    assert find_damage(step) == []
    assert find_foreign_files(step, read_metadata(step)) == []


@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_reads_as_a_checkpoint_with_the_names_in_memory(saved: Path, case: Case) -> None:
    step = saved / str(case) / f"step-{STEP}"
    truth = torch.load(saved / str(case) / "truth.pt", weights_only=True)["main"]
    source = open_source(step)
    for name, tensor in truth.items():
        if name not in source.aliases:
            assert torch.equal(read_tensor(source, name), tensor), name
    assert set(truth) == {*source.specs, *source.aliases}
    source.close()


KINDS = ["llama", "qwen2", "qwen3_moe", "odd"]
"""Untied and tied embeddings, fused experts, and a plain module."""


def run_training_of(
    kind: str,
    directory: Path,
    steps: int,
    kill_after: int | None,
    weights: str = "huggingface",
    dtype: str | None = None,
) -> None:
    """All ranks see the same tokens, so that the mean of their gradients is the gradient, bit for bit."""
    case = Case(kind=kind, sharding="fsdp2" if torch.distributed.is_initialized() else "none", ranks=0)
    model = shard(build(case), case.sharding)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    ema = EMA(model, decay=0.9)
    how = {"weights": weights, "weights_dtype": dtype}
    save = ShardedSave(directory, model=model, optimizer=optimizer, ema=ema, when=every(10) | last(), **how)
    hooks = Hooks(ema, save)
    step = hooks.resume()
    while step < steps:
        tokens = torch.randint(96, (2, 8), generator=torch.Generator().manual_seed(step))
        output = model(input_ids=tokens)
        (output if isinstance(output, Tensor) else output.logits).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        hooks.step(step)
        if step == kill_after:
            save.saving(10).result()
            os.kill(os.getpid(), signal.SIGKILL)
    hooks.close()


@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_run_that_is_resumed_on_other_ranks_equals_a_straight_one(tmp_path: Path, kind: str) -> None:
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    run_training_of(kind, straight, 20, None)
    with pytest.raises(ProcessExitedException, match="SIGKILL"):
        run_on_ranks(run_training_of, 2, tmp_path, kind, killed, 20, 13)
    assert read_metadata(killed / "step-10").world_size == 2
    run_training_of(kind, killed, 20, None)
    wanted, found = (digests(path / "step-20") for path in (straight, killed))
    assert wanted == found
    assert_same(files_of(killed / "step-20"), files_of(straight / "step-20"))
    assert_same(files_of(killed / "step-20/ema"), files_of(straight / "step-20/ema"))


def digests(checkpoint: Path) -> dict[str, str]:
    return {k: r.digest for k, r in read_metadata(checkpoint).tensors.items() if not k.startswith("rng.")}


@pytest.mark.parametrize("kind", ["llama", "qwen3_moe"])
def test_transformers_loads_each_step_and_its_average_with_the_live_logits(saved: Path, kind: str) -> None:
    (case,) = [case for case in CASES if case.kind == kind and case.ranks in (0, 2)]
    step = saved / str(case) / f"step-{STEP}"
    truth = torch.load(saved / str(case) / "truth.pt", weights_only=True)
    twin = build(case)
    for place, model in ((step, "main"), (step / "ema", "ema")):
        twin.load_state_dict(truth[model])
        loaded = AutoModelForCausalLM.from_pretrained(place, dtype="auto")
        assert torch.equal(loaded(TOKENS).logits, twin(TOKENS).logits)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3_moe"])
def test_each_step_of_a_run_answers_as_the_live_model_did(tmp_path: Path, kind: str) -> None:
    model = build(Case(kind=kind, sharding="none", ranks=0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    ema = EMA(model, decay=0.5)
    save = ShardedSave(tmp_path, model=model, optimizer=optimizer, ema=ema, when=every(1), weights="huggingface")
    live = {}
    with Hooks(ema, save) as hooks:
        for step in range(1, 6):
            model(input_ids=TOKENS, labels=TOKENS).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            hooks.step(step)
            with torch.no_grad():
                live[f"step-{step}"] = model(TOKENS).logits
                with ema.swapped_in():
                    live[f"step-{step}/ema"] = model(TOKENS).logits
    for place, logits in live.items():
        assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / place, dtype="auto")(TOKENS).logits, logits)


def test_it_is_the_base_of_a_cast_that_copies_nothing_of_the_checkpoint(saved: Path, tmp_path: Path) -> None:
    step = saved / str(CASES[0]) / f"step-{STEP}"
    cast = ExportArguments(dtype="bfloat16")
    assert to_hf(step, step, cast, tmp_path / "cast", quiet=True) == 0
    assert sorted(path.name for path in (tmp_path / "cast").iterdir()) == [
        *("README.md", "config.json", "ema.safetensors", "generation_config.json", "model.safetensors"),
        "shardsmith.json",
    ]
    assert_same(files_of(tmp_path / "cast"), {name: tensor.bfloat16() for name, tensor in files_of(step).items()})


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_the_way_back_is_the_step_that_dcp_would_have_been(tmp_path: Path) -> None:
    run_training_of("qwen3_moe", tmp_path / "one", 10, None)
    assert to_dcp(str(tmp_path / "one/step-10"), tmp_path / "plain/step-10", whole=True, quiet=True) == 0
    run_training_of("qwen3_moe", tmp_path / "dcp", 10, None, weights="dcp")
    plain, direct = (read_metadata(tmp_path / name / "step-10") for name in ("plain", "dcp"))
    assert list(plain.tensors) == list(direct.tensors)
    assert digests(tmp_path / "plain/step-10") == digests(tmp_path / "dcp/step-10")
    assert (plain.counts, plain.tied, plain.ema, plain.weights) == (direct.counts, direct.tied, direct.ema, None)
    assert find_damage(tmp_path / "plain/step-10") == []
    wanted = {key: torch.empty(record.shape) for key, record in direct.tensors.items() if "layers.0" in key}
    dcp.load(wanted, checkpoint_id=tmp_path / "plain/step-10", no_dist=True)
    source = open_step(tmp_path / "one/step-10")
    assert all(torch.equal(read_tensor(source, key), tensor) for key, tensor in wanted.items())
    objects = [DcpSource(tmp_path / name / "step-10").index.objects.keys() for name in ("plain", "dcp", "one")]
    assert objects[0] == objects[1] == objects[2]
    run_training_of("qwen3_moe", tmp_path / "plain", 20, None, weights="dcp")
    run_training_of("qwen3_moe", tmp_path / "one", 20, None)
    assert digests(tmp_path / "plain/step-20") == digests(tmp_path / "one/step-20")


def test_the_way_back_says_first_what_it_would_write(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    step, output = saved / str(CASES[0]) / f"step-{STEP}", tmp_path / "plain"
    assert to_dcp(str(step), output, whole=True, dry_run=True, json=True) == 0
    assert not output.exists()
    planned = json.loads(capsys.readouterr().out)
    assert planned["tensors"] == len(read_metadata(step).tensors)
    assert to_dcp(str(step), output, whole=True, quiet=True, json=True) == 0
    assert json.loads(capsys.readouterr().out) == {**planned, "dry_run": False}
    with pytest.raises(TargetExistsError):
        to_dcp(str(step), output, whole=True, dry_run=True)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_torch_reads_the_weights_as_a_hugging_face_directory(saved: Path) -> None:
    step = saved / str(CASES[2]) / f"step-{STEP}"
    wanted = files_of(step)
    found = {name: torch.zeros_like(tensor) for name, tensor in wanted.items()}
    dcp.load(found, storage_reader=HuggingFaceStorageReader(str(step)), no_dist=True)
    assert_same(found, wanted)


@pytest.mark.parametrize("kind", ["llama", "qwen3_moe", "odd"])
def test_it_is_where_another_run_starts(saved: Path, kind: str) -> None:
    case = next(case for case in CASES if case.kind == kind)
    step = saved / str(case) / f"step-{STEP}"
    model = build(case)
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    fresh = None if kind != "odd" else dict(model.named_buffers())
    report = load_initial(step, model=model, fresh=fresh)
    truth = torch.load(saved / str(case) / "truth.pt", weights_only=True)["main"]
    assert_same(model.state_dict(), truth)
    assert report.tensors >= len(truth) - 1
    average = load_initial(step, model=model, fresh=fresh, weights="ema")
    assert average is not None


def test_a_watcher_exports_it_as_any_other_step(saved: Path, tmp_path: Path) -> None:
    run = saved / str(CASES[0])
    watcher = Watcher(
        run, tmp_path / "hf", run / "hub", WatchOptions(export=ExportOptions(dtype=torch.bfloat16), models="main")
    )
    (outcome,) = watcher.catch_up(Stop())
    assert (outcome.status, outcome.error) == ("exported", None)
    found, stored = files_of(tmp_path / "hf" / f"step-{STEP}"), files_of(run / f"step-{STEP}")
    assert_same(found, {name: tensor.bfloat16() for name, tensor in stored.items()})


def test_a_link_leads_to_the_newest_step_all_the_time(tmp_path: Path) -> None:
    run, model = tmp_path / "run", torch.nn.Linear(2, 2)
    save = ShardedSave(run, model=model, when=every(1), keep=latest(1), async_mode="disabled", latest_link=True)
    for step in (1, 2, 3):
        save.save(step)
        assert os.readlink(run / "latest") == f"step-{step}"
        assert sorted(path.name for path in run.iterdir()) == [".retention.json", "latest", f"step-{step}"]
        assert find_damage(run / "latest") == []
    save.close()
    (run / "latest").unlink()
    (run / f".latest.tmp-{'0' * 16}").symlink_to("step-2")
    again = ShardedSave(run, model=model, when=every(1), latest_link=True)
    assert again.resume() == 3
    assert sorted(path.name for path in run.iterdir()) == [".retention.json", "latest", "step-3"]


def test_what_is_no_link_is_left_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "latest").mkdir()
    save = ShardedSave(tmp_path, model=torch.nn.Linear(2, 2), when=every(1), async_mode="disabled", latest_link=True)
    save.save(1)
    assert not (tmp_path / "latest").is_symlink()
    assert "latest: exists already" in caplog.text


class Holder(torch.nn.Module):
    """What a framework wraps around a model."""

    def __init__(self, net: torch.nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.net(input_ids).logits


def test_a_model_that_a_module_holds_is_written_under_its_own_names(tmp_path: Path) -> None:
    case = Case(kind="qwen3_moe", sharding="none", ranks=0)
    holder = Holder(build(case))
    ema = EMA(holder, decay=0.5)
    save = ShardedSave(tmp_path, model=holder, ema=ema, when=at(1), async_mode="disabled", weights="huggingface")
    save.save(1)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "step-1", dtype="auto")
    assert torch.equal(loaded(TOKENS).logits, holder(TOKENS))
    other = Holder(build(case))
    for parameter in other.parameters():
        torch.nn.init.zeros_(parameter)
    assert ShardedSave(tmp_path, model=other, ema=EMA(other, decay=0.5), when=at(1)).resume() == 1
    assert_same(other.state_dict(), holder.state_dict())


def test_a_cast_of_its_weights_that_makes_finite_values_infinite_is_refused(tmp_path: Path) -> None:
    model = build(Case(kind="qwen3_moe", sharding="none", ranks=0))
    with torch.no_grad():
        model.lm_head.weight[1, 2] = -7e4
    ShardedSave(tmp_path, model=model, when=at(1), async_mode="disabled", weights="huggingface").save(1)
    key = next(key for key in read_metadata(tmp_path / "step-1").tensors if key.endswith("lm_head.weight"))
    with pytest.raises(MismatchError) as caught:
        load_into({key: torch.zeros_like(model.lm_head.weight).half()}, tmp_path / "step-1", allow_cast=True)
    assert caught.value.problems == [f"{key}: up to 70000"]
    state = {key: torch.zeros_like(model.lm_head.weight).bfloat16()}  # as it says
    load_into(state, tmp_path / "step-1", allow_cast=True)
    assert torch.equal(state[key], model.lm_head.weight.bfloat16())


def test_the_manager_and_the_commands_take_it(tmp_path: Path) -> None:
    run_training_of("qwen3_moe", tmp_path / "run", 10, None)
    step = tmp_path / "run/step-10"
    model = build(Case(kind="qwen3_moe", sharding="none", ranks=0))
    optimizer, ema = torch.optim.AdamW(model.parameters(), lr=1e-2), EMA(model, decay=0.9)
    manager = ShardedCheckpointManager(tmp_path / "run", model=model, optimizer=optimizer, ema=ema)
    assert manager.load_sharded_checkpoint().step == 10
    manager.save_sharded_checkpoint(11)
    before, after = read_metadata(step).tensors, read_metadata(tmp_path / "run/step-11").tensors
    weights = [key for key in before if not key.startswith(("rng.", "train_state."))]
    assert {key: before[key].digest for key in weights} == {key: after[key].digest for key in weights}
    inspection = inspect_checkpoint(step, verify=True)
    assert (inspection.format, inspection.models[1].name, inspection.damage) == ("sharded", "ema", ())
    assert inspection.files["ema/model.safetensors"] == (step / "ema/model.safetensors").stat().st_size
    assert verify_checkpoints(step, tmp_path / "run/step-11").same
    assert [found.code for found in diagnose_checkpoint(step, step, Questions(level="model")).faults] == []
    assert inspect_checkpoint(step / "ema", verify=True).damage == ()
    flip_a_bit(step / "ema/model.safetensors")
    assert inspect_checkpoint(step, verify=True).damage
    assert inspect_checkpoint(step / "ema", verify=True).damage
