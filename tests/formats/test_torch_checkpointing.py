"""Checkpoints that the real library torch_checkpointing writes, read by every command."""

from __future__ import annotations

import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict
from torch.distributed.fsdp import fully_shard
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from shardsmith.cli import main
from shardsmith.errors import UnsafeCheckpointError
from shardsmith.formats.by_path import detect_checkpoint_format, open_source
from shardsmith.formats.torch_checkpointing import TORCH_CHECKPOINTING_READER
from shardsmith.load.load import load_initial
from shardsmith.tensors.tensors import read_tensor
from tests.ranks import run_on_ranks

CONFIG = LlamaConfig(
    vocab_size=64,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    tie_word_embeddings=False,
    architectures=["LlamaForCausalLM"],
)


def make() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(CONFIG)


def gather(_manager: Any, data: Any, *_: Any) -> dict[int, Any]:
    """What the library does on GPUs alone."""
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, data)
    return dict(enumerate(everyone))


def run_save(directory: Path) -> None:
    """As TorchTitan does it: a model and an optimizer that can be resharded, and more beside them."""
    from torch_checkpointing.checkpoint_manager import CheckpointManager
    from torch_checkpointing.config import SyncCheckpointSaverConfig
    from torch_checkpointing.default_resharder import DefaultResharder
    from torch_checkpointing.metadata_manager import DefaultMetadataManager
    from torch_checkpointing.schema import ItemSpec
    from torch_checkpointing.storage.filesystem import LocalFileSystemStorageConfig

    os.environ.update(RANK=str(dist.get_rank()), LOCAL_RANK=str(dist.get_rank()), WORLD_SIZE=str(dist.get_world_size()))
    DefaultMetadataManager._all_gather_pickled_data = gather
    model = fully_shard(make())
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.arange(8)[None]).logits.sum().backward()
    optimizer.step()
    specs = {name: ItemSpec(resharder=DefaultResharder()) for name in ("model", "optimizer")}
    storage = LocalFileSystemStorageConfig(use_direct_io=False)
    for name, items in (("resharded", specs), ("plain", {})):
        config = CheckpointManager.Config(items=items, save=SyncCheckpointSaverConfig(), storage_config=storage)
        manager = CheckpointManager(config)
        state = get_optimizer_state_dict(model, optimizer, options=StateDictOptions(flatten_optimizer_state_dict=True))
        items_now = {"model": model.state_dict(), "optimizer": state, "train_state": {"step": 3}}
        manager.save(str(directory / name / "step-3"), items_now)
        manager.close()
    whole = {name: value.full_tensor() for name, value in model.state_dict().items()}
    if dist.get_rank() == 0:
        torch.save(whole, directory / "truth.pt")
        LlamaForCausalLM(CONFIG).save_pretrained(directory / "base")
        GenerationConfig().save_pretrained(directory / "base")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Steps of two ranks, with metadata.pkl and without. Read only."""
    directory = tmp_path_factory.mktemp("saved")
    run_on_ranks(run_save, 2, directory, directory)
    return directory


@pytest.fixture(params=["resharded", "plain"])
def step(saved: Path, request: pytest.FixtureRequest) -> Path:
    return saved / str(request.param) / "step-3"


def truth(saved: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = torch.load(saved / "truth.pt", weights_only=True)
    return found


def test_it_is_detected_and_read_exactly(step: Path, saved: Path) -> None:
    found = detect_checkpoint_format(step)
    assert found.name == "torch-checkpointing"
    assert "model files of 2 ranks, with main weights" in found.reason
    source = open_source(step)
    assert source.specs.keys() == truth(saved).keys()
    assert all(torch.equal(read_tensor(source, name), value) for name, value in truth(saved).items())


def test_every_command_takes_it(step: Path, saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["detect", str(step)]) == 0
    assert main(["inspect", str(step)]) == 0
    output = ["--output_dir", str(tmp_path / "hf"), "--base_model_path", str(saved / "base")]
    assert main(["to-hf", "--checkpoint_dir", str(step), *output, "--dtype", "original", "--quiet"]) == 0
    written = load_file(tmp_path / "hf" / "model.safetensors")
    assert all(torch.equal(written[name], value) for name, value in truth(saved).items())
    assert main(["verify", str(step), str(tmp_path / "hf")]) == 0
    assert main(["diagnose", "--checkpoint", str(step), "--model", str(tmp_path / "hf")]) == 0
    assert "torch-checkpointing" in capsys.readouterr().out


def test_a_model_starts_from_it_and_is_verified(step: Path, saved: Path) -> None:
    model = make()
    report = load_initial(step, model=model)
    assert report.tensors == len(truth(saved))
    assert all(torch.equal(value, truth(saved)[name]) for name, value in model.state_dict().items())


def test_a_file_of_a_rank_that_is_not_there_is_named(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved / "resharded" / "step-3", tmp_path / "step")
    (tmp_path / "step" / "model_1.pt").unlink()
    found = detect_checkpoint_format(tmp_path / "step")
    assert (found.name, found.reason) == ("incomplete", "1 of 2 files of its model are not there: model_1.pt")


class Hostile:
    """Runs a command when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("exit 1",)


def test_its_pickle_runs_no_code(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved / "resharded" / "step-3", tmp_path / "step")
    (tmp_path / "step" / "metadata.pkl").write_bytes(pickle.dumps(Hostile()))
    assert detect_checkpoint_format(tmp_path / "step").name == "unknown"
    with pytest.raises(UnsafeCheckpointError):
        TORCH_CHECKPOINTING_READER.open(tmp_path / "step", "main", None)


def test_other_folders_are_none_of_these(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "model_0.pt")
    assert detect_checkpoint_format(tmp_path).name == "unknown"
