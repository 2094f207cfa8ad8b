"""Weights that were tied by hand: the class has a tensor for each name, and no config says that they are one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard

from shardsmith.cli import main
from shardsmith.errors import UsageError
from shardsmith.hooks import EMA, HFExport, Hooks, ShardedSave, at
from tests.hf.test_directory_check import assert_loads, llama
from tests.ranks import run_on_ranks

pytestmark = pytest.mark.filterwarnings("ignore")
TIES = {
    "head": ("lm_head.weight", "model.embed_tokens.weight"),
    "layers": ("model.layers.1.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight"),
}


def tied_by_hand(which: str) -> Any:
    model = llama()
    alias, kept = TIES[which]
    model.get_submodule(alias.rpartition(".")[0]).weight = model.get_parameter(kept)
    with torch.no_grad():
        for parameter in model.parameters():  # norms are ones, which diagnose would take for a fault
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    return model


@torch.no_grad()
def trained(model: Any, hooks: Hooks) -> None:
    for step in (1, 2):
        for parameter in model.parameters():
            parameter.mul_(1.5)
        hooks.step(step)
    hooks.close()


def hooks_of(model: Any, base: Path | None, place: Path) -> Hooks:
    ema = EMA(model, decay=0.5)
    save = ShardedSave(place / "ck", model=model, ema=ema, when=at(2))
    common: dict[str, Any] = {"model": model, "ema": ema, "when": at(2), "dtype": "original", "base_model": base}
    exports = [HFExport(place / "live", **common)]
    exports += [HFExport(place / "ck-hf", source="checkpoint", checkpoints=save, **common)]
    return Hooks(ema, save, *exports)


def assert_both_load(directory: Path, state: dict[str, torch.Tensor], which: str) -> None:
    from transformers import LlamaForCausalLM

    assert_loads(directory, state, LlamaForCausalLM)
    average = load_file(directory / "ema.safetensors")
    alias, kept = TIES[which]
    assert torch.equal(average[alias], average[kept])
    assert not torch.equal(average[kept], state[kept])


@pytest.mark.parametrize("which", TIES)
def test_every_export_has_both_names(which: str, tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "base")
    model = tied_by_hand(which)
    trained(model, hooks_of(model, tmp_path / "base", tmp_path))
    step, out = str(tmp_path / "ck" / "step-2"), str(tmp_path / "out")
    given = ["--checkpoint", step, "--base-model", str(tmp_path / "base"), "--output-dir", out, "--dtype", "original"]
    assert main(["to-hf", *given]) == 0
    for directory in ("live/step-2", "ck-hf/step-2", "out"):
        assert_both_load(tmp_path / directory, model.state_dict(), which)
    assert main(["verify", step, out]) == 0
    assert main(["diagnose", "--checkpoint", step, "--base-model", out]) == 0


def test_without_a_class_the_base_says_which_names_there_are(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    entries = {"model_type": "of-nobody", "architectures": ["Own"]}
    (tmp_path / "base" / "config.json").write_text(json.dumps({**config, **entries}))

    class Own(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.lm_head = (held := tied_by_hand("head")).model, held.lm_head

    model = Own()
    trained(model, hooks_of(model, tmp_path / "base", tmp_path))
    step, out = str(tmp_path / "ck" / "step-2"), tmp_path / "out"
    given = ["--checkpoint", step, "--base-model", str(tmp_path / "base"), "--output-dir", str(out)]
    assert main(["to-hf", *given, "--dtype", "original"]) == 0
    for directory in ("live/step-2", "ck-hf/step-2", "out"):
        for file in ("model.safetensors", "ema.safetensors"):
            tensors = load_file(tmp_path / directory / file)
            assert tensors.keys() == llama().state_dict().keys()
            assert torch.equal(*(tensors[name] for name in TIES["head"]))
        # What the model inside says of itself is nothing of the whole.
        assert json.loads((tmp_path / directory / "config.json").read_text())["model_type"] == "of-nobody"


def run_sharded(base: Path, place: Path) -> None:
    model = tied_by_hand("head")
    for module in [*model.model.layers, model]:
        fully_shard(module)
    trained(model, hooks_of(model, base, place))
    whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if torch.distributed.get_rank() == 0:
        for directory in ("live/step-2", "ck-hf/step-2"):
            assert_both_load(place / directory, whole, "head")


def test_on_two_ranks(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "base")
    run_on_ranks(run_sharded, 2, tmp_path, tmp_path / "base", tmp_path)


def test_one_write_has_both_and_refuses_an_average_that_has_one(tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    llama().save_pretrained(tmp_path / "base")
    model = tied_by_hand("head")
    options: dict[str, Any] = {"weights": "huggingface", "base_model": tmp_path / "base", "when": at(2)}
    trained(model, Hooks(ShardedSave(tmp_path / "run", model=model, **options)))
    assert_loads(tmp_path / "run" / "step-2", model.state_dict(), LlamaForCausalLM)
    ema = EMA(model, decay=0.5)
    with pytest.raises(UsageError, match=r"both of lm_head\.weight and model\.embed_tokens\.weight"):
        Hooks(ema, ShardedSave(tmp_path / "other", model=model, ema=ema, **options))
