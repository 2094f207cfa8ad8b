"""TorchTitan's own models by name and flavor, without data, in 0.2 and in 0.3."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from shardsmith.errors import UsageError
from shardsmith.hf.blueprint import OLD_ROTARY, Blueprint, without_weights
from shardsmith.tensors.fqn import own_class, tied_weights
from shardsmith.tensors.tensors import TensorSpec


@dataclass(frozen=True, slots=True)
class TitanModel:
    """A model on the meta device, and what TorchTitan translates its tensors with."""

    title: str
    """Such as ``llama3/debugmodel``."""
    model: nn.Module
    adapter: Any
    """A ``StateDictAdapter``."""
    config: Any
    """0.2: its arguments; 0.3: its ``Config``."""

    make: Callable[[], nn.Module]
    """Makes the model as TorchTitan does before it initialises weights."""

    def blueprint(self) -> Blueprint:
        """What its state dict holds. Its other buffers depend on the job, such as on the length of its sequences."""
        state = {name: TensorSpec(name, tuple(t.shape), t.dtype) for name, t in self.model.state_dict().items()}
        buffers = {name for name, _ in self.model.named_buffers()}
        return Blueprint(
            model_class=f"TorchTitan's {self.title}",
            config=None,
            parameters={name: spec for name, spec in state.items() if name not in buffers},
            buffers={name: spec for name, spec in state.items() if name in buffers},
            transient={},
            tied=tied_weights(self.model),
            ignorable=(OLD_ROTARY,),
        )

    def make_buffers(self) -> dict[str, Tensor]:
        """Its persistent buffers, as they are in a new model."""
        with without_weights():
            model = self.make()
        state = set(model.state_dict())
        return {name: buffer for name, buffer in model.named_buffers() if name in state}

    def heads(self) -> tuple[int | None, int | None]:
        """Of queries, and of keys and values; None where that is unknown."""
        layers = getattr(self.config, "layers", None)
        attention = getattr(layers[0], "attention", None) if layers else self.config
        heads: int | None = getattr(attention, "n_heads", None)
        return heads, getattr(attention, "n_kv_heads", None) or heads


def build_titan_model(title: str) -> TitanModel:
    """Return the model of a flavor, as TorchTitan builds it unless the job says otherwise.

    Args:
        title: ``MODEL/FLAVOR``. The model is one of TorchTitan's, as ``llama3``, or a module of yours that has what
            one of TorchTitan's has (``get_train_spec`` in 0.2, ``model_registry`` in 0.3), as ``my_package.my_model``.
            In 0.3 the flavor may also be a function of a config registry, the one that a job names with ``--config``:
            what it changes in the model, such as ``num_mtp_layers``, is in no flavor.

    Raises:
        UsageError: there is no TorchTitan, no such model or flavor, or it has no adapter.
    """
    name, _, flavor = title.partition("/")
    if not name or not flavor:
        raise UsageError(f"{title!r}: give a model of TorchTitan and its flavor, as in llama3/debugmodel")
    try:
        module = _import_model(name)
        make, config, adapter = (_find_0_2 if hasattr(module, "get_train_spec") else _find_0_3)(module, flavor)
    except KeyError:
        raise UsageError(f"TorchTitan's {name} has no flavor {flavor!r}; it has {_flavors(module)}") from None
    except ImportError as error:
        raise UsageError(f"the TorchTitan model {name!r} cannot be imported: {error}") from error
    if adapter is None:
        raise UsageError(
            f"TorchTitan has no state-dict adapter for {title}, so its names in Hugging Face are not known: write a "
            "name map (docs/extending.md) and give it as --names"
        )
    # Names and shapes are enough.
    with torch.device("meta"):
        model = make()
    return TitanModel(title, model, adapter(config, None), config, make)


def package_of(model: nn.Module) -> str | None:
    """Return the package in ``torchtitan.models`` that a model's class is from, such as ``llama3``; None if none is."""
    module = own_class(model).__module__
    return module.split(".")[2] if module.startswith("torchtitan.models.") else None


def _import_model(name: str) -> Any:
    if "." in name:
        return importlib.import_module(name)
    for package in ("torchtitan.models", "torchtitan.experiments"):
        if importlib.util.find_spec(f"{package}.{name}") is not None:
            return importlib.import_module(f"{package}.{name}")
    raise ImportError("neither torchtitan.models nor torchtitan.experiments has it")


def _find_0_3(module: Any, flavor: str) -> tuple[Callable[[], nn.Module], Any, Any]:
    try:
        spec = module.model_registry(flavor)
    except (AttributeError, KeyError):  # a job's registry alone, or no flavor
        spec = _job_config(module, flavor).model_spec
    return spec.model.build, spec.model, spec.state_dict_adapter


def _job_config(module: Any, name: str) -> Any:
    """The config that a registry makes of this name: the module itself, or that beside a model. Raises KeyError."""
    beside = f"{module.__name__}.config_registry"
    found = importlib.util.find_spec(beside) if hasattr(module, "__path__") else None
    for registry in (importlib.import_module(beside) if found else module, module):
        make = getattr(registry, name, None)
        if inspect.isfunction(make) and not inspect.signature(make).parameters:
            return make()
    raise KeyError(name)


def _find_0_2(module: Any, flavor: str) -> tuple[Callable[[], nn.Module], Any, Any]:
    from torchtitan.config import JobConfig

    spec = module.get_train_spec()
    arguments = copy.deepcopy(spec.model_args[flavor])
    arguments.update_from_config(JobConfig())  # some have fields that only this sets
    return lambda: spec.model_cls(arguments), arguments, spec.state_dict_adapter


def _flavors(module: Any) -> str:
    if hasattr(module, "model_registry"):
        known = [value for name, value in vars(module).items() if name.endswith("_configs")]
    elif hasattr(module, "get_train_spec"):
        known = [module.get_train_spec().model_args]
    else:
        return "none; name one of its functions without parameters, which make a job's config"
    return ", ".join(str(flavor) for flavors in known if isinstance(flavors, Mapping) for flavor in flavors)
