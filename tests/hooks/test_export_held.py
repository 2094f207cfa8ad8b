"""A model that another module holds is exported under its own names, as ``to-hf`` and ``InitialLoad`` take them."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from shardsmith.errors import UsageError
from shardsmith.hooks import EMA, HFExport, Hooks, InitialLoad, ShardedSave, every


class Holder(nn.Module):
    """What a LightningModule, a policy or a wrapper is to a model: its one child, under some name."""

    def __init__(self, name: str, model: nn.Module, again: str = "") -> None:
        super().__init__()
        setattr(self, name, model)
        if again:
            setattr(self, again, model)
        self.register_buffer("seen", torch.zeros(1), persistent=False)

    def forward(self, **batch: torch.Tensor) -> torch.Tensor:
        """What a training step gives, not what the model answers."""
        return next(self.children())(**batch).logits.sum()


def with_wrapped_layers(wrap: Callable[[nn.Module], nn.Module]) -> Callable[[nn.Module], nn.Module]:
    def wrapped(model: nn.Module) -> nn.Module:
        layers = model.get_submodule("model.layers")
        for name, layer in layers.named_children():
            setattr(layers, name, wrap(layer))
        return model

    return wrapped


HELD: dict[str, Callable[[nn.Module], nn.Module]] = {
    "model": lambda model: Holder("model", model),
    "policy": lambda model: Holder("policy", model),
    "module": lambda model: Holder("module", model),
    "compiled and held": lambda model: Holder("model", torch.compile(model)),
    "held and compiled": lambda model: torch.compile(Holder("model", model)),
    "held twice": lambda model: Holder("algorithm", Holder("actor", model)),
    "Fabric": lambda model: Holder("_forward_module", model, "_original_module"),
    "checkpointed layers": lambda model: Holder("model", with_wrapped_layers(checkpoint_wrapper)(model)),
    "compiled layers": lambda model: Holder("model", with_wrapped_layers(torch.compile)(model)),
}


class Critic(nn.Module):
    """A model and a head of another's, which no base model has."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.policy = model
        self.value = nn.Linear(16, 1)
        self.scale = nn.Parameter(torch.ones(1))


BESIDE: dict[str, Callable[[nn.Module], nn.Module]] = {
    "beside a head": Critic,
    "beside a head, compiled": lambda model: torch.compile(Critic(model)),
    "beside a head and held": lambda model: Holder("algorithm", Critic(Holder("actor", model))),
}


def tiny(*, tied: bool) -> transformers.LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=64, num_key_value_heads=2, tie_word_embeddings=tied, **sizes)
    return transformers.LlamaForCausalLM(config)


def bare(base: Path) -> Path:
    """The base model without its weights."""
    place = base.with_name("bare")
    place.mkdir()
    shutil.copy(base / "config.json", place)
    return place


def assert_same_files(directory: Path, base: Path) -> None:
    ours, theirs = load_file(directory / "model.safetensors"), load_file(base / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("held", HELD)
def test_a_held_model_is_exported_under_its_own_names(held: str, tied: bool, tmp_path: Path) -> None:
    base = tmp_path / "base"
    tiny(tied=tied).save_pretrained(base)
    model = HELD[held](tiny(tied=tied))
    for base_model in (base, bare(base)):
        place = tmp_path / f"with-{base_model.name}"
        ema = EMA(model, decay=0.9)
        with Hooks(
            ema,
            HFExport(place, model=model, ema=ema, models="all", base_model=base_model, when=every(1), dtype="original"),
        ) as hooks:
            hooks.step(1)
        assert_same_files(place / "step-1", base)
        assert load_file(place / "step-1" / "ema.safetensors").keys() == load_file(base / "model.safetensors").keys()


@pytest.mark.parametrize("held", ["policy", "compiled and held"])
def test_a_held_model_loads_its_base_saves_and_is_exported_from_its_checkpoint(held: str, tmp_path: Path) -> None:
    base = tmp_path / "base"
    tiny(tied=True).save_pretrained(base)
    model = HELD[held](tiny(tied=True))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    saves = ShardedSave(tmp_path / "saves", model=model, when=every(1))
    export = HFExport(
        tmp_path / "hf",
        model=model,
        base_model=base,
        when=every(1),
        dtype="original",
        source="checkpoint",
        checkpoints=saves,
        verify="load",
    )
    with Hooks(InitialLoad(base, model=model, allow_missing=["seen"]), saves, export) as hooks:
        hooks.resume()
        hooks.step(1)
    assert_same_files(tmp_path / "hf" / "step-1", base)


def test_what_a_module_has_besides_is_not_left_out(tmp_path: Path) -> None:
    """Then the module is the model: its tensors are written under the names in it."""
    model = Holder("backbone", tiny(tied=False))
    model.head = nn.Linear(4, 2)
    with Hooks(HFExport(tmp_path, model=model, when=every(1), dtype="original")) as hooks:
        hooks.step(1)
    names = load_file(tmp_path / "step-1" / "model.safetensors").keys()
    assert {"head.weight", "head.bias", "backbone.lm_head.weight"} <= names


def with_adapter() -> nn.Module:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], modules_to_save=["norm"], init_lora_weights=False)
    tuned: nn.Module = get_peft_model(tiny(tied=False), config)  # type: ignore[arg-type]
    return tuned


def export_adapted(directory: Path, model: nn.Module, adapters: str) -> None:
    ema = EMA(model, decay=0.5)
    export = HFExport(
        directory, model=model, ema=ema, when=every(1), adapters=adapters, ema_as="directory", dtype="float32"
    )
    with Hooks(ema, export) as hooks, torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.25
        hooks.step(1)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")  # peft asks for it
@pytest.mark.parametrize("adapters", ["adapter", "merged"])
@pytest.mark.parametrize("how", ["model", "compiled and held", "held and compiled", "held twice", "Fabric", *BESIDE])
def test_a_model_of_peft_that_is_held_is_exported_as_it_is_alone(
    how: str, adapters: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(1)
    tuned = with_adapter()
    twin = copy.deepcopy(tuned)
    export_adapted(tmp_path / "alone", tuned, adapters)
    export_adapted(tmp_path / "held", {**HELD, **BESIDE}[how](twin), adapters)
    assert ("in no export: " in caplog.text) == (how in BESIDE)
    for step in ("step-1", "step-1-ema"):
        alone, held = ({path.name: path for path in (tmp_path / place / step).iterdir()} for place in ("alone", "held"))
        assert alone.keys() == held.keys()
        name = "adapter_model.safetensors" if adapters == "adapter" else "model.safetensors"
        expected, found = load_file(alone[name]), load_file(held[name])
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[key], found[key]) for key in expected)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")
def test_of_several_models_of_peft_none_is_chosen(tmp_path: Path) -> None:
    both = nn.ModuleDict({"policy": with_adapter(), "reference": with_adapter()})
    with pytest.raises(UsageError, match=r"several models of peft, policy, reference: pass the one to export"):
        HFExport(tmp_path, model=both, when=every(1))
