"""The names of TorchTitan's own models: tensor for tensor what its adapters make, there and back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from shardsmith.errors import ShardsmithError, UnsupportedFormatError, UsageError
from shardsmith.formats.models import ModelSource, TranslatedModel
from shardsmith.formats.safetensors_files.source import SafetensorsSource
from shardsmith.integrations.torchtitan.models import TitanModel, build_titan_model
from shardsmith.integrations.torchtitan.names import TorchTitanNames
from shardsmith.name_maps.maps import find_name_map
from shardsmith.name_maps.restored import RestoredModel
from shardsmith.tensors.fqn import tied_weights
from shardsmith.tensors.tensors import TensorSource, TensorSpec, read_tensor
from tests.titan.cpu import IS_0_3

TITLES = ["llama3/debugmodel", "qwen3/debugmodel", "qwen3/debugmodel_moe", "deepseek_v3/debugmodel"]
TITLES += ["deepseek_v3/deepseek_v3_debugmodel_mtp"] if IS_0_3 else []
"""The last one is no flavor: a job's config that adds layers of its own."""


def made_up(titan: TitanModel) -> dict[str, Tensor]:
    """Values for every tensor of its state dict; tied ones are equal. Experts are small here: there are many."""
    torch.manual_seed(0)
    shapes = {name: tuple(tensor.shape) for name, tensor in titan.model.state_dict().items()}
    small = {name: (n, *(size // 32 for size in rest)) for name, (n, *rest) in shapes.items() if len(rest) == 2}
    values = {name: torch.randn(shape) for name, shape in {**shapes, **small}.items()}
    return values | {alias: values[kept] for alias, kept in tied_weights(titan.model).items()}


def names_of(titan: TitanModel) -> TorchTitanNames:
    """Of a model whose experts may have any size."""
    return TorchTitanNames(titan.adapter, [name for name, _ in titan.model.named_buffers()])


def saved(tensors: dict[str, Tensor], path: Path) -> SafetensorsSource:
    save_file({name: value.clone() for name, value in tensors.items()}, path)
    return SafetensorsSource(path)


def assert_same(source: TensorSource, expected: dict[str, Tensor]) -> None:
    assert source.specs.keys() == expected.keys()
    assert all(torch.equal(read_tensor(source, name), value) for name, value in expected.items())


@pytest.fixture(scope="module", params=TITLES)
def titan(request: pytest.FixtureRequest) -> TitanModel:
    return build_titan_model(request.param)


def test_files_hold_what_the_adapter_makes(titan: TitanModel, tmp_path: Path) -> None:
    assert_files_hold_what_the_adapter_makes(titan, tmp_path)


def test_files_hold_what_an_adapter_puts_together(tmp_path: Path) -> None:
    assert_files_hold_what_the_adapter_makes(build_titan_model("flux/flux-debug"), tmp_path)


def assert_files_hold_what_the_adapter_makes(titan: TitanModel, tmp_path: Path) -> None:
    values = made_up(titan)
    model = ModelSource.whole(saved(values, tmp_path / "titan.safetensors"))
    translated = TranslatedModel(model, names_of(titan))
    expected = titan.adapter.to_hf(dict(values))
    if tied_weights(titan.model):  # the adapter leaves it out; we leave that to what knows the base model
        expected["lm_head.weight"] = values["tok_embeddings.weight"]
    assert_same(translated, expected)
    assert all("expert_bias" in name for name in translated.left_out)


def test_what_the_adapter_reads_from_files_is_what_we_read(titan: TitanModel, tmp_path: Path) -> None:
    values = made_up(titan)
    files = {name: value.clone() for name, value in titan.adapter.to_hf(dict(values)).items()}
    aliases = tied_weights(titan.model)
    specs = {n: TensorSpec(n, tuple(v.shape), v.dtype) for n, v in values.items() if n not in aliases}
    restored = RestoredModel(saved(files, tmp_path / "hf.safetensors"), names_of(titan), specs, aliases)
    expected = titan.adapter.from_hf(load_file(tmp_path / "hf.safetensors"))
    assert restored.unused == ()
    assert_same(restored, {name: value for name, value in expected.items() if name not in aliases})
    assert all(torch.equal(expected[alias], read_tensor(restored, kept)) for alias, kept in aliases.items())
    assert specs.keys() - restored.specs.keys() == restored.absent.keys()


def test_a_buffer_that_no_files_have_begins_as_in_a_new_model() -> None:
    names = find_name_map("torchtitan:qwen3/debugmodel_moe", None)
    made = names.make(names.blueprint.buffers)
    assert made.keys() == names.leaves_out(names.blueprint.state_dict).keys()
    assert all(value.device.type == "cpu" and not value.any() for value in made.values())


def test_an_adapter_that_knows_a_tie_is_not_changed_by_asking_it() -> None:
    adapter = build_titan_model("qwen3/debugmodel").adapter
    config = adapter.model_config if IS_0_3 else adapter.model_args
    before = dict(vars(adapter))
    TorchTitanNames(adapter, ()).targets({})
    assert all(vars(adapter)[name] is value for name, value in before.items())
    assert config.enable_weight_tying


def test_an_adapter_that_drops_a_weight_is_named_with_what_to_do() -> None:
    """As those of TorchTitan did for GPT-OSS and Llama 4, for which there are rules of ours now."""
    titan = build_titan_model("llama3/debugmodel")
    specs = {name: TensorSpec(name, tuple(t.shape), t.dtype) for name, t in titan.model.state_dict().items()}
    kept = titan.adapter.to_hf
    titan.adapter.to_hf = lambda state: kept({name: value for name, value in state.items() if name != "norm.weight"})
    words = "has no name for 1 weights of this model, which is a fault of the adapter"
    with pytest.raises(UnsupportedFormatError, match=words):
        TorchTitanNames(titan.adapter, ()).targets(specs)


@pytest.mark.parametrize(
    ("title", "error", "words"),
    [
        ("llama3/7B", UsageError, "no flavor '7B'; it has debugmodel"),
        ("llama9/debugmodel", UsageError, "'llama9' cannot be imported"),
        ("llama3", UsageError, "as in llama3/debugmodel"),
        ("", UsageError, "--titan-flavor"),
    ],
)
def test_what_cannot_be_translated_is_said(title: str, error: type[ShardsmithError], words: str) -> None:
    with pytest.raises(error, match=words):
        find_name_map(f"torchtitan:{title}", None).targets(
            {
                name: TensorSpec(name, tuple(value.shape), value.dtype)
                for name, value in build_titan_model(title).model.state_dict().items()
            }
        )


def test_a_tensor_of_another_model_is_called_by_its_name() -> None:
    with pytest.raises(UnsupportedFormatError, match=r"head\.weight"):
        find_name_map("torchtitan:llama3/debugmodel", None).targets(
            {"head.weight": TensorSpec("head.weight", (4,), torch.float32)}
        )
