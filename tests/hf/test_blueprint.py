from __future__ import annotations

import threading

import pytest
import torch
from torch import nn

from shardsmith.hf.blueprint import describe, transformers_parts, twin_of, without_weights
from tests.hooks.live_models import from_transformers
from tests.tensor_cases import raw_bytes
from tests.trained_runs import Odd


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "gemma", "olmo2", "vit"])
def test_a_twin_has_the_state_dict_and_the_buffers_of_its_model(kind: str) -> None:
    live = from_transformers(kind)
    twin = twin_of(live)
    assert all(parameter.is_meta for parameter in twin.parameters())
    blueprint = describe(twin)
    state = live.state_dict()
    assert {name: spec.shape for name, spec in blueprint.state_dict.items()} == {
        n: tuple(v.shape) for n, v in state.items()
    }
    buffers = {name: buffer for name, buffer in live.named_buffers() if name not in state}
    assert blueprint.transient.keys() == buffers.keys()
    assert all(raw_bytes(blueprint.transient[name]) == raw_bytes(buffer) for name, buffer in buffers.items())
    assert set(blueprint.tied) == ({"lm_head.weight"} if kind in ("qwen2", "gemma") else set())


def test_a_model_of_any_kind_can_be_made_without_weights() -> None:
    with without_weights():
        model = Odd()
    assert model.embed.weight.is_meta
    assert not model.frozen.weight.requires_grad
    blueprint = describe(model)
    assert blueprint.buffers.keys() == {"seen", "mask", "mean", "nothing"}
    assert blueprint.transient["angles"].shape == (4,)
    assert nn.Linear(2, 2).weight.device.type == "cpu", "afterwards, nothing is changed"


def test_other_threads_and_random_numbers_are_left_alone() -> None:
    made = []
    torch.manual_seed(3)
    expected = torch.randn(4)
    torch.manual_seed(3)
    with without_weights():
        thread = threading.Thread(target=lambda: made.append(nn.Linear(2, 2)))
        thread.start()
        thread.join()
        nn.Linear(100, 100)
    assert made[0].weight.device.type == "cpu"
    assert not torch.equal(made[0].weight, torch.zeros(2, 2))
    assert thread is not None
    torch.manual_seed(3)
    assert torch.equal(torch.randn(4), expected)


def test_parts_from_transformers_are_found_inside_other_models() -> None:
    both = nn.ModuleDict({"language": from_transformers("llama"), "vision": from_transformers("vit")})
    assert list(transformers_parts(both)) == ["language", "vision"]
    assert list(transformers_parts(both["vision"])) == [""]
