"""A model of transformers that is composed of others, as BAGEL's is: its class cannot be made from its config alone."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedConfig, PreTrainedModel, SiglipVisionConfig
from transformers import SiglipVisionModel as Siglip

from shardsmith import ShardedCheckpointManager
from shardsmith.errors import InitialLoadError
from tests.ranks import run_on_ranks


@dataclass
class VaeParameters:
    """No JSON."""

    downsample: int = 8


class ComposedConfig(PreTrainedConfig):
    model_type = "composed"

    def __init__(self, llm_config: Any = None, vit_config: Any = None, vae_config: Any = None, **rest: Any) -> None:
        super().__init__(**rest)
        self.llm_config, self.vit_config, self.vae_config = llm_config, vit_config, vae_config


class Composed(PreTrainedModel):
    config_class = ComposedConfig

    def __init__(self, language_model: nn.Module, vit_model: nn.Module | None, config: ComposedConfig) -> None:
        super().__init__(config)
        self.language_model = language_model
        if vit_model is not None:
            self.vit_model = vit_model
        self.latent_pos_embed = nn.Embedding(config.side**2, 16)

    def _init_weights(self, *_: Any) -> None:
        """As the parts are."""


class Rotary(nn.Module):
    """With a buffer that nobody but its maker knows."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("turns", torch.arange(4.0), persistent=False)


def make(*, side: int = 4, vision: bool = True, seed: int = 0) -> Composed:
    torch.manual_seed(seed)
    llm = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    vit = SiglipVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
    )
    config = ComposedConfig(llm, vit, VaeParameters(), side=side)
    return Composed(LlamaForCausalLM(llm), Siglip(vit) if vision else None, config)


def with_a_buffer_of_its_own() -> Composed:
    model = make()
    model.rotary = Rotary()
    return model


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model's weights, and a config.json that leaves most to the defaults."""
    path = tmp_path_factory.mktemp("composed")
    state = {name: value.clone() for name, value in make(seed=1).state_dict().items()}
    save_file(state, path / "model.safetensors", {"format": "pt"})
    said = {"model_type": "composed", "llm_config": {"vocab_size": 32}, "vae_config": {"downsample": 8}}
    (path / "config.json").write_text(json.dumps(said))
    return path


WAYS: dict[str, Any] = {
    "without fresh": {},
    "a function": {"fresh": make},
    "buffers": {"fresh": dict(make().named_buffers())},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", [".", "model.safetensors"])
def test_it_is_filled_and_verified(way: str, name: str, directory: Path, tmp_path: Path) -> None:
    live = make()
    loaded = ShardedCheckpointManager(tmp_path / "run", model=live, **WAYS[way]).load_hf_checkpoint(directory / name)
    assert loaded.parts == ("model",)
    for key, value in make(seed=1).state_dict().items():
        assert torch.equal(live.state_dict()[key], value)


def test_a_wrong_buffer_in_a_part_is_found_and_repaired_where_that_is_asked_for(
    directory: Path, tmp_path: Path
) -> None:
    live = make()
    live.language_model.model.rotary_emb.inv_freq.mul_(2)
    manager = ShardedCheckpointManager(tmp_path / "run", model=live)
    with pytest.raises(InitialLoadError, match=r"inv_freq.*buffer-differs"):
        manager.load_hf_checkpoint(directory)
    loaded = manager.load_hf_checkpoint(directory, repair_buffers=True)  # as the error says
    assert loaded.reports[0].repaired == ("language_model.model.rotary_emb.inv_freq",)


def test_fresh_is_asked_for_only_what_no_part_knows(directory: Path, tmp_path: Path) -> None:
    live = with_a_buffer_of_its_own()
    with pytest.raises(InitialLoadError) as caught:
        ShardedCheckpointManager(tmp_path / "run", model=live).load_hf_checkpoint(directory)
    assert caught.value.codes == ["buffer-without-reference"]
    assert "rotary.turns: no reference for it" in str(caught.value)
    assert "Pass fresh=a function that makes one" in str(caught.value)
    for fresh in (with_a_buffer_of_its_own, dict(with_a_buffer_of_its_own().named_buffers())):
        ShardedCheckpointManager(tmp_path / "run", model=live, fresh=fresh).load_hf_checkpoint(directory)


def test_position_embeddings_of_another_resolution_stay_where_that_is_allowed(directory: Path, tmp_path: Path) -> None:
    live = make(side=2)
    before = live.latent_pos_embed.weight.detach().clone()
    manager = ShardedCheckpointManager(tmp_path / "run", model=live)
    with pytest.raises(InitialLoadError, match="shape-differs"):
        manager.load_hf_checkpoint(directory)
    loaded = manager.load_hf_checkpoint(directory, allow_shape=["latent_pos_embed.*"])
    assert torch.equal(live.latent_pos_embed.weight, before)
    assert loaded.reports[0].reshaped == ("latent_pos_embed.weight",)
    assert "left as they were, as allowed: latent_pos_embed.weight" in loaded.reports[0].summary
    assert torch.equal(live.language_model.lm_head.weight, make(seed=1).language_model.lm_head.weight)


def test_the_average_is_taken_from_main_also_where_there_is_one(tmp_path: Path) -> None:
    both = tmp_path / "both"
    both.mkdir()
    state = {name: value.clone() for name, value in make(seed=1).state_dict().items()}
    save_file(state, both / "model.safetensors")
    save_file({name: value + 1 for name, value in state.items()}, both / "ema.safetensors")
    for from_main, moved in ((True, 0), (False, 1)):
        average = make()
        manager = ShardedCheckpointManager(tmp_path / "run", model=make(), ema=average, ema_decay=0.9)
        manager.load_hf_checkpoint(both, load_ema_from_main=from_main)
        name = "language_model.lm_head.weight"
        assert torch.equal(average.state_dict()[name], state[name] + moved)


def run_cast_buffers(directory: Path, out: Path) -> None:
    """FSDP1 casts buffers itself, at the first forward or state dict."""
    precision = MixedPrecision(param_dtype=torch.bfloat16, buffer_dtype=torch.bfloat16)
    wrapped = FullyShardedDataParallel(make(vision=True), mixed_precision=precision, device_id=torch.device("cpu"))
    manager = ShardedCheckpointManager(out / "run", model=wrapped)
    manager.load_hf_checkpoint(directory)
    buffer = dict(wrapped.named_buffers())
    (name,) = (name for name in buffer if name.endswith("rotary_emb.inv_freq"))
    assert buffer[name].dtype == torch.bfloat16
    buffer[name].mul_(2)
    with pytest.raises(InitialLoadError, match="buffer-differs"):
        manager.load_hf_checkpoint(directory)
    dist.barrier()


def test_buffers_that_fsdp1_casts_are_no_fault(directory: Path, tmp_path: Path) -> None:
    run_on_ranks(run_cast_buffers, 2, tmp_path, directory, tmp_path)
