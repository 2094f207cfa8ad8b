"""One object that saves, finds and loads: bit for bit, on other numbers of ranks, and every format."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

from examples.bagel.model import Sizes
from shardsmith import ShardedCheckpointManager
from shardsmith.cli import main
from shardsmith.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    IncompleteCheckpointError,
    MismatchError,
    RankFailedError,
    UnsupportedFormatError,
    UsageError,
)
from shardsmith.formats.by_path import detect_checkpoint_format, open_source
from shardsmith.formats.rank_shards import RankShards
from shardsmith.hooks import EMA
from shardsmith.run_state.fsdp1_hybrid import hybrid_groups_have_a_source
from shardsmith.tensors.tensors import read_tensor
from tests.bagel_base import initial_weights, make_bagel_base
from tests.legacy_layouts import STEP, WORLD
from tests.managed_runs import Run, clone, run_steps
from tests.ranks import run_on_ranks

SHARDINGS = ["fsdp1", "fsdp2"]


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, dict[str, Tensor]]]:
    """Sharding -> what four steps without a break lead to, on two ranks."""
    found = {}
    for sharding in SHARDINGS:
        directory = tmp_path_factory.mktemp(f"straight-{sharding}")
        run_on_ranks(run_steps, 2, directory, directory, sharding, 0, 4, directory / "states.pt", {})
        found[sharding] = torch.load(directory / "states.pt", weights_only=True)
    return found


def assert_equal(found: dict[str, dict[str, Tensor]], wanted: dict[str, dict[str, Tensor]], *, but: str = "") -> None:
    for part in wanted.keys() - {but}:
        assert found[part].keys() == wanted[part].keys()
        for name, tensor in wanted[part].items():
            assert torch.equal(found[part][name], tensor), f"{part}: {name}"


RESUMES = [("fsdp1", "fsdp1", "dcp"), ("hybrid", "fsdp1", "per_rank"), ("fsdp2", "fsdp2", "per_rank")]


@pytest.mark.parametrize(("before", "after", "backend"), RESUMES)
def test_a_run_resumed_on_half_the_ranks_equals_one_without_a_break(
    before: str, after: str, backend: str, straight: dict[str, Any], tmp_path: Path
) -> None:
    options = {"backend": backend}
    run_on_ranks(run_steps, 4, tmp_path, tmp_path / "run", before, 0, 2, None, options)
    run_on_ranks(run_steps, 2, tmp_path, tmp_path / "run", after, 2, 4, tmp_path / "states.pt", options)
    found = torch.load(tmp_path / "states.pt", weights_only=True)
    assert_equal(found, straight[after])


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Backend -> a checkpoint of step 2, of two ranks. Read only."""
    directory = tmp_path_factory.mktemp("saved")
    for backend in ("dcp", "per_rank"):
        run_on_ranks(run_steps, 2, directory, directory / backend, "fsdp1", 0, 2, None, {"backend": backend})
    return {backend: directory / backend / "step-2" for backend in ("dcp", "per_rank")}


def test_both_kinds_hold_the_same_and_say_the_same(saved: dict[str, Path]) -> None:
    manifests = {kind: json.loads((path / "metadata.json").read_text()) for kind, path in saved.items()}
    for kind, path in saved.items():
        assert detect_checkpoint_format(path).name == "sharded"
        assert manifests[kind]["ema"]["updates"] == 2
    for model in ("main", "ema"):
        one, other = (open_source(path, model) for path in saved.values())
        assert one.specs == other.specs
        assert all(torch.equal(read_tensor(one, name), read_tensor(other, name)) for name in one.specs)
    tensors = {kind: manifest["tensors"] for kind, manifest in manifests.items()}
    names = [name for name in tensors["dcp"] if not name.startswith("rng.")]  # Python's differ from process to process
    assert len(names) > 500
    assert all(tensors["per_rank"][name] == tensors["dcp"][name] for name in names)


def run_resharded(saved: Path, directory: Path) -> None:
    run = Run(directory, "fsdp2", seed=7)
    assert run.manager.load_sharded_checkpoint(saved).step == 2
    states = run.states()
    source = RankShards(saved)
    assert len(states["optimizer"]) > 200
    for part, prefix in (("main", ""), ("ema", "ema_model."), ("optimizer", "optimizer.")):
        assert_equal({part: states[part]}, {part: {n: read_tensor(source, prefix + n) for n in states[part]}})


@pytest.mark.parametrize("ranks", [1, 3])
def test_files_of_two_ranks_come_back_on_other_numbers_of_ranks_and_another_sharding(
    ranks: int, saved: dict[str, Path], tmp_path: Path
) -> None:
    run_on_ranks(run_resharded, ranks, tmp_path, saved["per_rank"], tmp_path / "run")


class Odd(nn.Module):
    """Tensors that are not in memory as they are in a file, as none of another device is."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.transposed = nn.Parameter(torch.randn(300, 200).t())
        buffers = {
            "conjugated": torch.randn(40, dtype=torch.complex64).conj(),
            "negated": torch.randn(40, dtype=torch.complex64).conj().imag,
            "strided": torch.arange(4000)[::2],
            "empty": torch.empty(0, 3),
            "scalar": torch.tensor(3.5, dtype=torch.float64),
            "flags": torch.tensor([True, False, True]),
            "rounded": torch.randn(2000, 3).bfloat16().t(),
        }
        for name, tensor in buffers.items():
            self.register_buffer(name, tensor)


@pytest.mark.parametrize("backend", ["dcp", "per_rank"])
def test_tensors_of_every_form_come_back(backend: Literal["dcp", "per_rank"], tmp_path: Path) -> None:
    model = Odd()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model.transposed.sum().backward()
    optimizer.step()
    ShardedCheckpointManager(tmp_path, model=model, optimizer=optimizer, backend=backend).save_sharded_checkpoint(1)
    fresh = Odd()
    for tensor in fresh.state_dict().values():
        tensor.zero_()
    ShardedCheckpointManager(tmp_path, model=fresh, backend=backend).load_sharded_checkpoint(load_optimizer=False)
    assert_equal({"model": clone(fresh.state_dict())}, {"model": clone(model.state_dict())})
    assert main(["verify", str(tmp_path / "step-1")]) == 0


def test_files_of_single_ranks_are_two_a_rank(saved: dict[str, Path]) -> None:
    kinds = [f"{kind}-rank-0000{rank}.safetensors" for kind in ("state", "weights") for rank in range(2)]
    assert sorted(os.listdir(saved["per_rank"])) == ["metadata.json", "model_config.json", *kinds]


DAMAGE: dict[str, Callable[[Path], object]] = {
    "a file gone": lambda path: (path / "weights-rank-00001.safetensors").unlink(),
    "a file cut off": lambda path: os.truncate(path / "state-rank-00000.safetensors", 100),
    "a file of another rank": lambda path: shutil.copyfile(
        path / "weights-rank-00000.safetensors", path / "weights-rank-00001.safetensors"
    ),
    "no manifest": lambda path: (path / "metadata.json").write_text("{"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_of_single_ranks_is_never_read(
    damage: str, saved: dict[str, Path], tmp_path: Path
) -> None:
    path = shutil.copytree(saved["per_rank"], tmp_path / "step-2")
    DAMAGE[damage](path)
    with pytest.raises(CheckpointError):
        open_source(path)


def run_selective(saved: Path, directory: Path) -> None:
    run = Run(directory, "fsdp1", seed=7)
    before = run.states()
    loaded = run.manager.load_sharded_checkpoint(saved, load_model=False, load_optimizer=False, load_scheduler=False)
    assert loaded.parts == ("ema", "data_status", "rng")
    after = run.states()
    assert_equal({"main": after["main"]}, {"main": before["main"]})
    changed = [name for name, tensor in after["ema"].items() if not torch.equal(tensor, before["ema"][name])]
    assert len(changed) > 70  # the norms and biases of both begin alike
    assert run.manager.average is not None
    assert run.manager.average.updates == 2


@pytest.mark.parametrize("backend", ["dcp", "per_rank"])
def test_only_what_is_asked_for_is_loaded(backend: str, saved: dict[str, Path], tmp_path: Path) -> None:
    run_on_ranks(run_selective, 2, tmp_path, saved[backend], tmp_path / "run")


def run_other_model(saved: Path, directory: Path) -> None:
    run = Run(directory, "fsdp1", seed=7, sizes=Sizes(latent_dim=12))
    before = run.states()
    error = MismatchError if (saved / ".metadata").exists() else RankFailedError
    with pytest.raises(error, match="llm2vae"):
        run.manager.load_sharded_checkpoint(saved)
    assert_equal(run.states(), before, but="facts")


@pytest.mark.parametrize("backend", ["dcp", "per_rank"])
def test_what_does_not_fit_is_refused_and_nothing_is_loaded(
    backend: str, saved: dict[str, Path], tmp_path: Path
) -> None:
    run_on_ranks(run_other_model, 2, tmp_path, saved[backend], tmp_path / "run")


def run_newest(directory: Path) -> None:
    run = Run(directory, "fsdp2")
    for step in (1, 2, 3):
        run.train(step - 1, step)
        run.manager.save_sharded_checkpoint(step)
    dist.barrier()
    if dist.get_rank() == 0:
        shard = next((directory / "step-3").glob("__1_*.distcp"))
        shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    dist.barrier()
    assert run.manager.newest_checkpoint() == directory / "step-2"
    assert run.manager.load_sharded_checkpoint().step == 2


def test_the_newest_sound_checkpoint_is_taken(tmp_path: Path) -> None:
    run_on_ranks(run_newest, 2, tmp_path, tmp_path / "run")


def run_failing_save(directory: Path, backend: str) -> None:
    run = Run(directory, "fsdp2", backend=backend)
    status = object() if dist.get_rank() == 1 else {"fine": 1}  # only one rank cannot
    with pytest.raises(RankFailedError, match="rank 1: UsageError"):
        run.manager.save_sharded_checkpoint(1, data_status=status)
    assert os.listdir(directory) == []
    assert run.manager.save_sharded_checkpoint(1, data_status=1).name == "step-1"
    assert run.manager.load_sharded_checkpoint().data_status == 1


@pytest.mark.parametrize("backend", ["dcp", "per_rank"])
def test_what_fails_on_one_rank_fails_on_all_and_the_next_save_works(backend: str, tmp_path: Path) -> None:
    run_on_ranks(run_failing_save, 2, tmp_path, tmp_path / "run", backend)


def states_of(run: Run) -> dict[str, dict[str, Tensor]]:
    states = run.states()
    return {"model": states["main"], "ema": states["ema"]}


def run_legacy(legacy: Path, directory: Path) -> None:
    for sharding, layout, has_average in (
        ("fsdp1", "write_fork", True),
        ("fsdp1", "write_fork_without_dcp", True),
        ("fsdp1", "write_bagel", True),
        ("hybrid", "write_bagel", True),
        ("hybrid", "write_fork", True),
        ("hybrid", "write_accelerate", False),
    ):
        run = Run(directory, sharding, seed=9)
        run.scheduler = run.manager._scheduler = None
        truth = torch.load(legacy / sharding / "truth.pt", weights_only=True)
        loaded = run.manager.load_sharded_checkpoint(
            legacy / sharding / layout, load_ema=has_average, load_optimizer=has_average
        )
        found = states_of_without_scheduler(run)
        for name in ("model", "ema") if has_average else ("model",):
            assert_equal({name: found[name]}, {name: truth[name]})
        if has_average:
            assert loaded.data_status == {"t2i": {0: [dist.get_rank(), STEP, 1], 1: [dist.get_rank(), 2, 3]}}
            assert_optimizer(run, legacy / sharding)
        assert loaded.step == (STEP if "fork" in layout else None)
        assert loaded.proved == 111 * len([part for part in loaded.parts if part in ("model", "ema")])


def assert_optimizer(run: Run, folder: Path) -> None:
    """The optimizer's whole state is the one that was saved."""
    with hybrid_groups_have_a_source(run.model):
        options = StateDictOptions(full_state_dict=True, flatten_optimizer_state_dict=True)
        found = get_optimizer_state_dict(run.model, run.optimizer, options=options)
    wanted = torch.load(folder / "optimizer-truth.pt", weights_only=True)
    tensors = {name: value for name, value in wanted.items() if isinstance(value, Tensor)}
    assert len(tensors) > 300
    assert all(torch.equal(found[name], value) for name, value in tensors.items())
    settings = {name: value for name, value in wanted.items() if name.endswith(".lr")}
    assert settings
    assert all(group["lr"] == lr for group in run.optimizer.param_groups for lr in settings.values())


def run_titan(legacy: Path, directory: Path) -> None:
    run = Run(directory, "fsdp2", seed=9)
    before, truth = run.states(), torch.load(legacy / "fsdp2" / "truth.pt", weights_only=True)
    for layout in ("titan", "flame"):
        path = legacy / "fsdp2" / layout / f"step-{STEP}"
        for parameter in run.model.parameters():
            parameter.data.zero_()
        loaded = run.manager.load_sharded_checkpoint(path, load_ema=False, load_optimizer=False, load_scheduler=False)
        assert (loaded.format, loaded.proved) == ("dcp", 111)
        found = run.states()
        assert_equal({"main": found["main"], "ema": found["ema"]}, {"main": truth["model"], "ema": before["ema"]})


def test_weights_of_titan_and_flame_are_loaded_flat_and_nested(legacy: Path, tmp_path: Path) -> None:
    run_on_ranks(run_titan, 2, tmp_path, legacy, tmp_path / "run")


def states_of_without_scheduler(run: Run) -> dict[str, dict[str, Tensor]]:
    from torch.distributed.checkpoint.state_dict import get_model_state_dict

    from tests.managed_runs import WHOLE

    modules = {"model": run.model, "ema": run.average}
    return {name: clone(get_model_state_dict(module, options=WHOLE)) for name, module in modules.items()}


def test_checkpoints_of_other_projects_are_loaded_exactly(legacy: Path, tmp_path: Path) -> None:
    run_on_ranks(run_legacy, WORLD, tmp_path, legacy, tmp_path / "run")


def run_fewer(legacy: Path, directory: Path) -> None:
    run = Run(directory, "fsdp1", seed=9)
    before = run.states()
    with pytest.raises(RankFailedError, match="its optimizer is in 4 parts that do not say where they belong"):
        run.manager.load_sharded_checkpoint(legacy / "fsdp1/write_fork_without_dcp")
    with pytest.raises(UnsupportedFormatError, match="of which only weights are loaded; pass load_optimizer=False"):
        _raised(lambda: run.manager.load_sharded_checkpoint(legacy / f"fsdp2/titan/step-{STEP}", load_ema=False))
    with pytest.raises(CheckpointNotFoundError, match="has no average; pass load_ema=False"):
        run.manager.load_sharded_checkpoint(legacy / "fsdp1/write_accelerate")
    assert_equal(run.states(), before, but="facts")
    loaded = run.manager.load_sharded_checkpoint(legacy / "fsdp1/write_fork", load_optimizer=False)
    assert loaded.parts == ("model", "ema", "scheduler", "data_status")
    truth = torch.load(legacy / "fsdp1" / "truth.pt", weights_only=True)
    assert_equal(states_of(run), truth)
    run.manager.load_sharded_checkpoint(legacy / "fsdp1/write_fork")  # whose optimizer says where its parts belong
    assert_optimizer(run, legacy / "fsdp1")
    run.manager.load_sharded_checkpoint(legacy / "hybrid/write_fork", load_scheduler=False)
    assert_optimizer(run, legacy / "hybrid")


def _raised(call: Callable[[], object]) -> None:
    """With one rank the error itself is raised, with several one that names the ranks."""
    try:
        call()
    except RankFailedError as error:
        raise UnsupportedFormatError("", str(error)) from error


def test_an_optimizer_of_other_ranks_is_refused_and_weights_alone_are_loaded(legacy: Path, tmp_path: Path) -> None:
    run_on_ranks(run_fewer, 2, tmp_path, legacy, tmp_path / "run")


def test_whole_weights_come_from_every_kind_of_file(tmp_path: Path) -> None:
    weights, average = initial_weights(), {n: t + 1 for n, t in initial_weights().items()}
    release = make_bagel_base(tmp_path / "release", average)
    torch.save(weights, make(tmp_path / "bin") / "pytorch_model.bin")
    torch.save({"model": weights}, make(tmp_path / "pt") / "model.pt")
    save_in_two(weights, make(tmp_path / "indexed"), "model", "safetensors")
    save_in_two(average, make(tmp_path / "indexed"), "ema", "safetensors")
    save_in_two(weights, make(tmp_path / "indexed bin"), "pytorch_model", "bin")
    for stem, state in (("model", weights), ("ema", average)):
        save_file({n: t.contiguous() for n, t in state.items()}, make(tmp_path / "both") / f"{stem}.safetensors")
    run = Run(tmp_path / "run", "none", seed=8)
    for name in ("bin", "pt", "indexed bin"):
        with pytest.raises(CheckpointNotFoundError, match=r"has no 'ema' weights.*Pass load_ema_from_main=True"):
            run.manager.load_hf_checkpoint(tmp_path / name)
        loaded = run.manager.load_hf_checkpoint(tmp_path / name, load_ema_from_main=True)
        assert loaded.format == "torch"
        assert_equal(states_of(run), {"model": weights, "ema": weights})
    for name in ("both", "indexed"):
        run.manager.load_hf_checkpoint(tmp_path / name)
        assert_equal(states_of(run), {"model": weights, "ema": average})
    with pytest.raises(CheckpointNotFoundError, match=r"has no 'main' weights.*Pass load_main_from_ema=True"):
        run.manager.load_hf_checkpoint(release)
    run.manager.load_hf_checkpoint(release, load_main_from_ema=True)
    rounded = {name: tensor.bfloat16().float() for name, tensor in average.items()}
    assert_equal(states_of(run), {"model": rounded, "ema": rounded})


def save_in_two(weights: dict[str, Tensor], directory: Path, stem: str, suffix: str) -> None:
    """Two files and their index, as ``save_pretrained`` makes them."""
    names, places = list(weights), {}
    for part in range(2):
        file = f"{stem}-0000{part + 1}-of-00002.{suffix}"
        half = {name: weights[name].contiguous() for name in names[part::2]}
        torch.save(half, directory / file) if suffix == "bin" else save_file(half, directory / file)
        places |= dict.fromkeys(half, file)
    index = {"metadata": {}, "weight_map": places}
    (directory / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))


def make(directory: Path) -> Path:
    directory.mkdir(exist_ok=True)
    return directory


def test_that_the_average_comes_from_main_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    torch.save(initial_weights(), make(tmp_path / "pt") / "model.pt")
    Run(tmp_path / "run", "none").manager.load_hf_checkpoint(tmp_path / "pt", load_ema_from_main=True)
    assert "the average is taken from the main weights, as load_ema_from_main=True says" in caplog.text


def test_a_partial_file_cannot_be_missed(tmp_path: Path) -> None:
    weights = initial_weights()
    del weights["connector.fc2.weight"]
    torch.save(weights, make(tmp_path / "pt") / "model.pt")
    run = Run(tmp_path / "run", "none")
    before = states_of(run)
    with pytest.raises(CheckpointError, match=r"connector\.fc2\.weight"):
        run.manager.load_hf_checkpoint(tmp_path / "pt", load_ema_from_main=True)
    assert_equal({"model": states_of(run)["model"]}, {"model": before["model"]})


def test_an_ema_hook_is_saved_and_loaded_like_a_second_module(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 4)
    ema = EMA(model, decay=0.5)
    manager = ShardedCheckpointManager(tmp_path / "run", model=model, ema=ema, backend="per_rank")
    nn.init.ones_(model.weight)
    ema.update()
    wanted = {name: tensor.clone() for name, tensor in ema.model_state_dict().items()}
    manager.save_sharded_checkpoint(1)
    ema.update()
    assert manager.load_sharded_checkpoint().parts == ("model", "ema", "data_status", "rng")
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in ema.model_state_dict().items())
    torch.save({"weight": torch.zeros(4, 3), "bias": torch.ones(4)}, tmp_path / "model.pt")
    torch.save({"weight": torch.ones(4, 3), "bias": torch.zeros(4)}, tmp_path / "ema.pt")
    manager.load_hf_checkpoint(tmp_path)
    assert float(model.weight.detach().sum()) == 0
    assert float(ema.model_state_dict()["weight"].sum()) == 12


def test_what_makes_no_sense_is_refused(saved: dict[str, Path], legacy: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="pass ema_decay"):
        ShardedCheckpointManager(tmp_path, model=nn.Linear(1, 1), ema=nn.Linear(1, 1))
    run = Run(tmp_path / "run", "none", ema_decay=0.5)
    with pytest.raises(UsageError, match=r"holds an average with decay 0.9, this one has decay 0.5"):
        run.manager.load_sharded_checkpoint(saved["dcp"])
    with pytest.raises(UnsupportedFormatError, match="use load_hf_checkpoint"):
        run.manager.load_sharded_checkpoint(make_bagel_base(tmp_path / "base"))
    with pytest.raises(UnsupportedFormatError, match="use load_sharded_checkpoint"):
        run.manager.load_hf_checkpoint(saved["dcp"])
    with pytest.raises(CheckpointNotFoundError, match="holds no checkpoint yet"):
        run.manager.load_sharded_checkpoint()
    torn = shutil.copytree(legacy / "fsdp1/write_fork", tmp_path / "0000006")
    shutil.rmtree(torn / "model_sharded")
    with pytest.raises(IncompleteCheckpointError, match="neither model_sharded nor files"):
        run.manager.load_sharded_checkpoint(torn)


def test_the_static_detection_is_that_of_the_package(saved: dict[str, Path]) -> None:
    assert ShardedCheckpointManager.detect_checkpoint_format(saved["per_rank"]).name == "sharded"
