"""Steps whose weights are Hugging Face files: disks that fail, files that are damaged, arguments that do not fit."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from shardsmith.errors import IncompleteCheckpointError, MismatchError, UsageError
from shardsmith.hooks import EMA, ShardedSave, every
from shardsmith.manifest.checkpoints import committed_steps, find_damage
from tests.hooks.test_save_faults import filled, flip_a_bit, run_failing_ranks, value_of
from tests.ranks import run_on_ranks


@pytest.mark.parametrize("mode", ["async", "disabled"])
def test_an_error_on_one_rank_is_raised_on_all_and_costs_only_that_save(tmp_path: Path, mode: str) -> None:
    phases = ("collecting", "staging", "writing") if mode == "async" else ("collecting", "writing")
    run_on_ranks(run_failing_ranks, 2, tmp_path, tmp_path / "run", mode, phases, {"weights": "huggingface"})


@pytest.mark.parametrize("options", [{"staging": "overlap"}, {"max_host_memory": "512KB"}], ids=str)
def test_so_it_is_while_the_state_is_still_being_copied(tmp_path: Path, options: dict[str, str]) -> None:
    given = {**options, "weights": "huggingface"}
    run_on_ranks(run_failing_ranks, 2, tmp_path, tmp_path / "run", "async", ("writing",), given)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run directory of one process with steps 1, 2 and 3; the weights are the step."""
    for step in (1, 2, 3):
        model = filled(step)
        save = ShardedSave(
            tmp_path / "run",
            model=model,
            ema=EMA(model),
            when=every(1),
            async_mode="disabled",
            weights="huggingface",
        )
        save.save(step)
        save.close()
    return tmp_path / "run"


def from_another_step(path: Path) -> None:
    shutil.copyfile(str(path).replace("step-3", "step-1"), path)


def rename_a_tensor(path: Path) -> None:
    data = path.read_bytes()
    assert b'"weight"' in data
    path.write_bytes(data.replace(b'"weight"', b'"height"'))


DAMAGE: dict[str, tuple[str, Callable[[Path], object]]] = {
    "bit flipped": ("model.safetensors", flip_a_bit),
    "bit flipped in the average": ("ema/model.safetensors", flip_a_bit),
    "truncated": ("model.safetensors", lambda path: os.truncate(path, 100)),
    "deleted": ("ema/model.safetensors", Path.unlink),
    "of another step": ("model.safetensors", from_another_step),
    "average of another step": ("ema/model.safetensors", from_another_step),
    "other names": ("model.safetensors", rename_a_tensor),
    "a link": ("model.safetensors", lambda path: [path.rename(path.parent.parent / "w"), path.symlink_to("../w")]),
    "in the rest": ("__0_0.distcp", flip_a_bit),
    "index deleted": (".metadata", Path.unlink),
    "card changed": ("ema/README.md", flip_a_bit),
    "folder deleted": ("ema/shardsmith.json", lambda path: shutil.rmtree(path.parent)),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_step_is_set_aside_and_the_one_before_it_is_loaded(
    run: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    name, damage = DAMAGE[kind]
    damage(run / "step-3" / name)
    assert any(name.split("/")[0] in line for line in find_damage(run / "step-3"))
    model = filled(0)
    ema = EMA(model)
    save = ShardedSave(run, model=model, ema=ema, when=every(1), async_mode="disabled", weights="huggingface")
    assert save.resume() == 2
    assert value_of(model) == 2
    assert all(tensor.eq(2).all() for tensor in ema.model_state_dict().values())
    assert f"{run / 'step-3'} is damaged and was set aside" in caplog.text
    assert name in caplog.text
    save.save(3)
    assert committed_steps(run) == [1, 2, 3]
    assert find_damage(run / "step-3") == []


def test_parts_that_are_not_loaded_are_hashed(run: Path) -> None:
    flip_a_bit(run / "step-3" / "ema" / "model.safetensors")
    model = filled(0)
    save = ShardedSave(run, model=model, ema=EMA(model), when=every(1))
    assert save.resume(parts=["model"]) == 2
    assert value_of(model) == 2


def test_if_all_are_damaged_nothing_is_trained_on(run: Path) -> None:
    for step in (1, 2, 3):
        flip_a_bit(run / f"step-{step}" / "model.safetensors")
    model = filled(0)
    save = ShardedSave(run, model=model, ema=EMA(model), when=every(1))
    with pytest.raises(IncompleteCheckpointError, match="hold what was loaded from step-1, which is damaged"):
        save.resume()
    with pytest.raises(UsageError, match="loaded from step-1, which is damaged: nothing is saved"):
        save.save(4)


def test_another_model_is_refused_and_nothing_is_loaded(run: Path) -> None:
    other = filled(0).bfloat16()
    with pytest.raises(MismatchError, match="not the one that was saved"):
        ShardedSave(run, model=other, when=every(1)).resume()
    assert value_of(other) == 0
    assert committed_steps(run) == [1, 2, 3]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"base_model": "."}, 'base_model= is for weights="huggingface"'),
        ({"max_shard_size": "1GB", "names": "identity"}, "names=, max_shard_size= is for"),
        ({"weights": "huggingface", "layout": "nested"}, 'layout="nested" is about keys in DCP files'),
        ({"weights": "hugging_face"}, "huggingface"),
        ({"weights_dtype": "bf16"}, "weights_dtype= is for"),
        ({"weights": "huggingface", "weights_dtype": "fp16"}, "such as .* would not come back bit for bit; .* to-hf"),
        ({"weights": "huggingface", "base_model": "no-such-directory"}, "no-such-directory"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_arguments_that_do_not_fit_are_refused_when_it_is_made(
    tmp_path: Path, options: dict[str, str], text: str
) -> None:
    with pytest.raises(Exception, match=text) as error:
        ShardedSave(tmp_path / "run", model=filled(1), when=every(1), **options)
    assert type(error.value).__module__ == "shardsmith.errors"


def test_the_dtype_that_trains_may_be_said(tmp_path: Path) -> None:
    model = nn.Linear(3, 3, dtype=torch.bfloat16)
    options = {"weights": "huggingface", "weights_dtype": torch.bfloat16}
    save = ShardedSave(tmp_path, model=model, when=every(1), async_mode="disabled", **options)
    save.save(1)
    files = load_file(tmp_path / "step-1" / "model.safetensors")
    assert {name: value.dtype for name, value in files.items()} == dict.fromkeys(["bias", "weight"], torch.bfloat16)
