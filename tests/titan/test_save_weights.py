"""One write of TorchTitan's own models: files as its adapter makes them, read by TorchTitan's way, and resumed from."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.multiprocessing import ProcessExitedException

from shardsmith.hooks import EMA, Hooks, ShardedSave, at, every
from shardsmith.integrations.torchtitan.models import TitanModel, build_titan_model
from shardsmith.manifest.metadata import read_metadata
from shardsmith.tensors.fqn import tied_weights
from tests.ranks import run_on_ranks
from tests.titan.jobs import PRELOADED
from tests.titan.small_models import DENSE, TIED_DENSE
from tests.titan.test_names import names_of

TITLES = [f"llama3/{DENSE}", f"qwen3/{TIED_DENSE}"]
"""Permuted rows of queries and keys; tied embeddings. In 0.3 both fuse their projections."""


def on_cpu(titan: TitanModel) -> nn.Module:
    torch.manual_seed(0)
    ties = tied_weights(titan.model)
    model = titan.model.to_empty(device="cpu")
    for alias, kept in ties.items():  # to_empty makes two of them
        module, _, name = alias.rpartition(".")
        setattr(model.get_submodule(module), name, model.get_parameter(kept))
    for tensor in [*model.parameters(), *model.buffers()]:
        torch.nn.init.normal_(tensor) if tensor.is_floating_point() else None
    return model


def run_training(title: str, directory: Path, steps: int, kill_after: int | None = None) -> None:
    """Nothing of the model but its weights is needed: each step is the same however they are sharded."""
    titan = build_titan_model(title)
    model = on_cpu(titan)
    names = names_of(titan)
    if dist.is_initialized():
        fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    ema = EMA(model, decay=0.5)
    save = ShardedSave(
        directory, model=model, optimizer=optimizer, ema=ema, when=every(10), weights="huggingface", names=names
    )
    hooks = Hooks(ema, save)
    step = hooks.resume()
    while step < steps:
        for parameter in model.parameters():
            parameter.grad = parameter.detach() * (step % 5 - 2)
        optimizer.step()
        step += 1
        hooks.step(step)
        if step == kill_after:
            save.saving(10).result()
            os.kill(os.getpid(), signal.SIGKILL)
    hooks.close()


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
@pytest.mark.parametrize("title", TITLES)
def test_its_files_are_the_adapters_and_a_resume_on_other_ranks_goes_on(tmp_path: Path, title: str) -> None:
    run_training(title, tmp_path / "straight", 20)
    with pytest.raises(ProcessExitedException, match="SIGKILL"):
        run_on_ranks(run_training, 2, tmp_path, title, tmp_path / "resumed", 20, 13, preload=PRELOADED)
    assert read_metadata(tmp_path / "resumed" / "step-10").world_size == 2
    run_training(title, tmp_path / "resumed", 20)
    wanted, found = (read_metadata(tmp_path / run / "step-20").tensors for run in ("straight", "resumed"))
    assert {key: wanted[key] for key in wanted if not key.startswith("rng.")} == {
        key: found[key] for key in found if not key.startswith("rng.")
    }
    titan, live = build_titan_model(title), build_titan_model(title)
    model, twin = on_cpu(live), on_cpu(titan)
    assert ShardedSave(tmp_path / "resumed", model=model, when=at(20)).resume(parts=["model"]) == 20
    step = tmp_path / "resumed" / "step-20"
    state = model.state_dict()
    expected = titan.adapter.to_hf(dict(state))
    files = {name: value for path in step.glob("model*.safetensors") for name, value in load_file(path).items()}
    assert_equal(files, {name: expected[name] for name in files})
    assert set(expected) - set(files) <= {"lm_head.weight"}
    load_by_torchtitan(titan, twin, step)
    assert_equal(twin.state_dict(), state)


def load_by_torchtitan(titan: TitanModel, model: nn.Module, step: Path) -> None:
    """As its ``initial_load_in_hf`` does."""
    wanted = titan.adapter.to_hf(dict(model.state_dict()))
    if tied_weights(model):
        wanted.pop("lm_head.weight", None)  # the files have it once
    dcp.load(wanted, storage_reader=titan.adapter.get_hf_storage_reader(str(step)), no_dist=True)
    model.load_state_dict(titan.adapter.from_hf(wanted), strict=False)


def assert_equal(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    assert [name for name, tensor in wanted.items() if not torch.equal(found[name], tensor)] == []
