"""What is relied on of the installed TorchTitan. ``make canary TITAN=...`` runs this alone, with any version."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from typing import Any

import pytest
import torchtitan.models

from shardsmith.errors import UsageError
from shardsmith.integrations.torchtitan.models import _flavors, build_titan_model
from shardsmith.integrations.torchtitan.override import HAS_OVERRIDES
from shardsmith.integrations.torchtitan.upstream import CheckpointManager, differences, refuse_unknown
from shardsmith.name_maps.maps import Translation, find_name_map
from shardsmith.tensors.tensors import TensorSpec


def trainer_of() -> type[Any]:
    module = "torchtitan.trainer" if HAS_OVERRIDES else "torchtitan.train"
    found: type[Any] = importlib.import_module(module).Trainer
    return found


def test_the_manager_has_the_methods_that_are_overridden_and_called() -> None:
    assert differences(CheckpointManager) == []
    refuse_unknown()


@pytest.mark.parametrize("name", ["_find_load_step", "dcp_load", "_should_save"])
def test_a_method_that_was_renamed_is_an_error_and_no_hook_that_is_never_called(name: str) -> None:
    methods = {each: member for each, member in inspect.getmembers(CheckpointManager) if not each.startswith("__")}
    renamed = type("Renamed", (), {f"{each}_anew" if each == name else each: m for each, m in methods.items()})
    with pytest.raises(UsageError, match=f"its CheckpointManager has changed\n  there is no {name}"):
        refuse_unknown(renamed)


def test_a_parameter_that_was_renamed_is_an_error() -> None:
    class Renamed(CheckpointManager):
        def dcp_load(self, state_dict: Any, checkpoint_id: Any, hugging_face: bool = False) -> None:
            """Says otherwise where it loads from."""

    with pytest.raises(UsageError, match="dcp_load has no parameter from_hf"):
        refuse_unknown(Renamed)


def test_a_method_that_a_script_has_wrapped_is_none() -> None:
    class Wrapped(CheckpointManager):
        def dcp_load(self, *args: Any, **kwargs: Any) -> None:
            """Hands on what it is given."""
            super().dcp_load(*args, **kwargs)

    refuse_unknown(Wrapped)


def test_the_trainer_ends_its_loop_when_it_is_told_to() -> None:
    trainer = trainer_of()
    assert "self.should_continue_training()" in inspect.getsource(trainer.train)
    assert '"train_state": self' in inspect.getsource(trainer)  # how the manager knows the trainer
    assert "self.checkpointer.save(" in inspect.getsource(trainer.train)


@pytest.mark.parametrize("model", ["llama3", "qwen3", "deepseek_v3"])
def test_models_have_adapters_that_translate_both_ways(model: str) -> None:
    module = importlib.import_module(f"torchtitan.models.{model}")
    if HAS_OVERRIDES:
        adapter = module.model_registry("debugmodel").state_dict_adapter
    else:
        adapter = module.get_train_spec().state_dict_adapter
    assert [*inspect.signature(adapter.to_hf).parameters][1] == "state_dict"
    assert [*inspect.signature(adapter.from_hf).parameters][1] == "hf_state_dict"


def registered() -> list[str]:
    """Every model of TorchTitan that can be imported here, in its smallest flavor."""
    found = []
    for info in pkgutil.iter_modules(torchtitan.models.__path__):
        try:
            module = importlib.import_module(f"torchtitan.models.{info.name}")
        except ImportError:  # some need packages of their own
            continue
        if hasattr(module, "model_registry") or hasattr(module, "get_train_spec"):
            flavors = _flavors(module).split(", ")
            found += [f"{info.name}/{flavor}" for flavor in flavors if "debug" in flavor]
    return found


@pytest.mark.parametrize("title", registered())
def test_every_model_that_torchtitan_has_is_translated_whole(title: str) -> None:
    """Each weight goes somewhere, once; only buffers may have no place."""
    titan = build_titan_model(title)
    names = find_name_map(f"torchtitan:{title}", None)
    specs = {name: TensorSpec(name, tuple(t.shape), t.dtype) for name, t in titan.model.state_dict().items()}
    translation = Translation(names, specs)
    assert translation.targets
    assert translation.left_out.keys() <= {name for name, _ in titan.model.named_buffers()}
