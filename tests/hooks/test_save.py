"""Saving and resuming: the run that comes back is the run that went."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.multiprocessing import ProcessExitedException

from shardsmith.errors import RankFailedError, TargetExistsError, UsageError
from shardsmith.formats.dcp.source import DcpSource
from shardsmith.hooks import EMA, Hook, Hooks, ShardedSave, at, every, last, latest, multiples_of
from shardsmith.manifest.checkpoints import committed_steps, find_damage
from shardsmith.manifest.metadata import CheckpointMetadata, read_metadata
from shardsmith.tensors.tensors import read_tensor
from tests.hooks.training import Tiny, build, run_resave, run_training
from tests.ranks import run_on_ranks


def digests(checkpoint: Path, *, rng: bool = True) -> dict[str, str]:
    """Digest of each tensor: model, average, optimizer, step; with the generators if asked."""
    tensors = read_metadata(checkpoint).tensors
    return {key: record.digest for key, record in tensors.items() if rng or not key.startswith("rng.")}


def train_and_die(directory: Path, mode: str) -> None:
    run_training(directory, 20, async_mode=mode, kill_after=13)


def train(directory: Path, mode: str, sharding: str, steps: int) -> None:
    run_training(directory, steps, async_mode=mode, sharding=sharding)


@pytest.mark.parametrize("mode", ["async", "disabled"])
def test_a_killed_and_resumed_run_equals_an_uninterrupted_one_bit_for_bit(tmp_path: Path, mode: str) -> None:
    run_on_ranks(train, 2, tmp_path, tmp_path / "straight", mode, "fsdp2", 20)
    with pytest.raises(ProcessExitedException, match="SIGKILL"):
        run_on_ranks(train_and_die, 2, tmp_path, tmp_path / "killed", mode)
    run_on_ranks(train, 2, tmp_path, tmp_path / "killed", mode, "fsdp2", 20)
    straight, killed = tmp_path / "straight" / "step-20", tmp_path / "killed" / "step-20"
    assert digests(straight) == digests(killed)
    assert len([key for key in digests(straight) if key.startswith("optimizer.state.")]) == 3 * 7
    assert objects(straight) == objects(killed)


def objects(checkpoint: Path) -> dict[str, object]:
    """Everything in the checkpoint that is no tensor: learning rates, the schedule's counters."""
    source = DcpSource(checkpoint)
    return {key: source.read_object(key) for key in source.index.objects}


def test_what_is_loaded_on_another_number_of_ranks_has_the_same_digests(tmp_path: Path) -> None:
    run_on_ranks(train, 2, tmp_path, tmp_path / "on-2", "async", "fsdp2", 5)
    run_on_ranks(run_resave, 4, tmp_path, tmp_path / "on-2", tmp_path / "on-4")
    run_resave(tmp_path / "on-4", tmp_path / "on-1", "none")
    on_2, on_4, on_1 = (tmp_path / f"on-{n}" / "step-5" for n in (2, 4, 1))
    assert digests(on_2, rng=False) == digests(on_4, rng=False) == digests(on_1, rng=False)
    assert [read_metadata(path).world_size for path in (on_2, on_4, on_1)] == [2, 4, 1]
    assert objects(on_2) == objects(on_4) == objects(on_1)


@pytest.mark.parametrize(("sharding", "ranks"), [("fsdp1", 2), ("fsdp1", 5), ("ddp", 2), ("hsdp", 4)])
def test_every_sharding_resumes_exactly_and_can_be_read_by_fsdp2(tmp_path: Path, sharding: str, ranks: int) -> None:
    """Of five ranks with FSDP1 the last has no shard of the eleven rows of the embedding."""
    run_on_ranks(train, ranks, tmp_path, tmp_path / "straight", "async", sharding, 10)
    run_on_ranks(train, ranks, tmp_path, tmp_path / "resumed", "async", sharding, 5)
    run_on_ranks(train, ranks, tmp_path, tmp_path / "resumed", "async", sharding, 10)
    assert digests(tmp_path / "straight" / "step-10") == digests(tmp_path / "resumed" / "step-10")
    run_on_ranks(run_resave, 2, tmp_path, tmp_path / "resumed", tmp_path / "other")
    ours = digests(tmp_path / "other" / "step-10", rng=False)
    assert ours == digests(tmp_path / "resumed" / "step-10", rng=False)


def test_a_single_process_needs_no_process_group(tmp_path: Path) -> None:
    run_training(tmp_path / "straight", 10, sharding="none")
    run_training(tmp_path / "resumed", 5, sharding="none")
    run_training(tmp_path / "resumed", 10, sharding="none")
    assert digests(tmp_path / "straight" / "step-10") == digests(tmp_path / "resumed" / "step-10")


def test_metadata_says_what_the_checkpoint_holds(tmp_path: Path) -> None:
    run_on_ranks(train, 2, tmp_path, tmp_path / "run", "async", "fsdp2", 5)
    metadata: CheckpointMetadata = read_metadata(tmp_path / "run" / "step-5")
    model = Tiny()
    assert (metadata.step, metadata.world_size, metadata.models) == (5, 2, ("main", "ema"))
    assert metadata.ema == {"decay": 0.9, "warmup": True, "start_step": 0, "every_n_steps": 1, "updates": 5}
    assert metadata.tied == {"head.weight": "embed.weight"}
    assert metadata.mesh == {"shape": [2], "dim_names": None}
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert metadata.counts["ema"].elements == parameters
    assert metadata.counts["main"].elements == parameters + 1  # and one buffer
    assert metadata.counts["main"].dtypes == {"float32": parameters, "int64": 1}


def test_a_checkpoint_appears_whole_and_stays_whole(tmp_path: Path) -> None:
    run_training(tmp_path, 20, sharding="none", when=every(3) | at(7) | last(), keep=latest(2) | multiples_of(6))
    assert committed_steps(tmp_path) == [6, 12, 18, 20]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".retention.json",
        "step-12",
        "step-18",
        "step-20",
        "step-6",
    ]
    assert not any(find_damage(tmp_path / f"step-{step}") for step in (6, 12, 18, 20))


@pytest.mark.parametrize("layout", ["flat", "nested"])
def test_the_model_key_layout_is_the_one_asked_for(tmp_path: Path, layout: str) -> None:
    run_training(tmp_path, 5, sharding="none", layout=layout)
    run_training(tmp_path, 10, sharding="none", layout=layout)
    prefix = "model." if layout == "nested" else ""
    specs = DcpSource(tmp_path / "step-10").specs
    assert f"{prefix}inner.0.weight" in specs
    assert "ema_model.inner.0.weight" in specs


def test_saves_are_announced_to_every_hook(tmp_path: Path) -> None:
    class Listener(Hook):
        heard: list[tuple[int, str]] = []  # noqa: RUF012

        def on_saved(self, step: int, path: Path) -> None:
            assert (path / "metadata.json").is_file()
            self.heard.append((step, path.name))

    model = build("none")
    with Hooks(ShardedSave(tmp_path, model=model, when=every(2) | last()), Listener()) as hooks:
        for step in range(1, 6):
            hooks.step(step)
    assert Listener.heard == [(2, "step-2"), (4, "step-4"), (5, "step-5")]


def run_saves_of_changing_state(directory: Path, sharding: str) -> None:
    model = build(sharding)
    optimizer = torch.optim.AdamW(model.parameters())
    save = ShardedSave(directory, model=model, optimizer=optimizer, when=every(1))
    for step in range(1, 7):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(step)
                optimizer.state[parameter] = {
                    name: torch.full_like(parameter, step) for name in ("exp_avg", "exp_avg_sq")
                }
                optimizer.state[parameter]["step"] = torch.tensor(float(step))
        save.on_step_end(step)
    save.close()


@pytest.mark.parametrize("sharding", ["fsdp2", "fsdp1", "ddp"])
def test_an_async_save_holds_the_state_of_its_own_step(tmp_path: Path, sharding: str) -> None:
    run_on_ranks(run_saves_of_changing_state, 2, tmp_path, tmp_path / "run", sharding)
    for step in range(1, 7):
        source = DcpSource(tmp_path / "run" / f"step-{step}")
        names = [name for name in source.specs if name.startswith(("optimizer.state.", "embed", "inner", "norm"))]
        assert len(names) == 7 + 3 * 7
        for name in names:
            values = read_tensor(source, name)
            assert torch.equal(values, torch.full_like(values, step)), name


def test_a_save_while_the_average_is_swapped_in_is_refused_and_writes_nothing(tmp_path: Path) -> None:
    model = build("none")
    ema = EMA(model)
    save = ShardedSave(tmp_path, model=model, ema=ema, when=every(1))
    with ema.swapped_in(), pytest.raises(UsageError, match="swapped in"):
        save.save(1)
    save.save(1)
    save.close()
    assert [path.name for path in tmp_path.iterdir()] == ["step-1"]


def test_an_existing_step_is_never_written_again(tmp_path: Path) -> None:
    run_training(tmp_path, 5, sharding="none")
    before = digests(tmp_path / "step-5")
    save = ShardedSave(tmp_path, model=build("none"), when=every(5))
    with pytest.raises((TargetExistsError, RankFailedError), match="step-5"):
        save.save(5)
    save.close()
    assert digests(tmp_path / "step-5") == before


def test_names_that_a_checkpoint_uses_itself_are_refused(tmp_path: Path) -> None:
    model = nn.ModuleDict({"optimizer": nn.Linear(2, 2)})
    with pytest.raises(UsageError, match=r"optimizer\.bias, optimizer\.weight"):
        ShardedSave(tmp_path, model=model, when=every(1)).save(1)
    with pytest.raises(UsageError, match="rng"):
        ShardedSave(tmp_path, model=model, when=every(1), stateful={"rng": EMA(model)})
    ShardedSave(tmp_path, model=model, when=every(1), layout="nested", async_mode="disabled").save(1)
    assert read_metadata(tmp_path / "step-1").models == ("main",)
