"""What a model must look like: its state dict without values, and the values of the buffers that no state dict holds.

The model is made once more from its class and config, with parameters that have no data and buffers that have: a
rotary embedding computes its ``inv_freq`` when it is made, on the CPU, at no cost. That is the measure of any other.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import sys
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode

from shardsmith.errors import StorageError, UnsupportedFormatError, WriteError
from shardsmith.ground.extras import describe_failure
from shardsmith.ground.local_copy import on_this_machine
from shardsmith.tensors.fqn import clean_fqn, non_persistent_buffers, own_class, tied_weights
from shardsmith.tensors.tensors import TensorSpec

OLD_ROTARY = r"rotary_emb\.inv_freq$"
"""Was saved by old versions of transformers, in every layer."""
_FILLING = frozenset(
    {"normal_", "uniform_", "trunc_normal_", "zero_", "zeros_", "ones_", "fill_", "constant_", "erfinv_"}
)
"""What initialises a tensor in place."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Blueprint:
    """A model without weights. Names are clean; tied parameters are under each of their names."""

    model_class: str
    config: dict[str, Any] | None
    """The effective config, with every default filled in; None where the model has none."""
    parameters: Mapping[str, TensorSpec]
    buffers: Mapping[str, TensorSpec]
    """Persistent ones: with the parameters they are the state dict."""
    transient: Mapping[str, Tensor]
    """Non-persistent buffers, as a fresh model has them, on the CPU."""
    tied: Mapping[str, str]
    """Alias -> kept name."""
    ignorable: tuple[str, ...] = field(default=())
    """Regular expressions of names that files may hold and the model does without."""

    @property
    def state_dict(self) -> dict[str, TensorSpec]:
        """Parameters and persistent buffers."""
        return {**self.parameters, **self.buffers}


@contextlib.contextmanager
def without_weights() -> Iterator[None]:
    """Within it, parameters of modules that this thread makes are on the meta device; buffers are on the CPU.

    Random numbers and their generator are left alone.
    """
    # The hook is one for all modules of the process; another thread may make a real model meanwhile.
    thread = threading.get_ident()

    def on_meta(_module: nn.Module, _name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None or parameter.is_meta or threading.get_ident() != thread:
            return None
        # The initial values are thrown away here, before the next parameter is made: memory stays at one tensor.
        return nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)

    # By torch's hook: a "meta" default device would put the buffers there, too, and their values would be lost.
    handle = register_module_parameter_registration_hook(on_meta)  # type: ignore[arg-type]  # it may return one
    try:
        # On the CPU, whatever the default device is: a buffer computed elsewhere may differ in its last bits.
        with torch.random.fork_rng(devices=[]), torch.device("cpu"), _LeftBlank():
            yield
    finally:
        handle.remove()


class _LeftBlank(TorchFunctionMode):
    """Within it nothing is done to fill tensors that have no data: it would be in vain, and not for free."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in _FILLING and args and isinstance(args[0], Tensor) and args[0].is_meta:
            return args[0]
        return func(*args, **(kwargs or {}))


def describe(model: nn.Module) -> Blueprint:
    """Return the blueprint that a model made ``without_weights`` is.

    What a checkpoint must hold is what ``get_model_state_dict`` of torch gives: names, shapes and dtypes.
    """
    transient = set(non_persistent_buffers(model))
    # Also under further names: a buffer may be shared, as one rotary embedding by all layers.
    buffers = {clean_fqn(name, model): buffer.detach() for name, buffer in model.named_buffers(remove_duplicate=False)}
    state = {name: value for name, value in _state_dict(model).items() if isinstance(value, Tensor)}
    config: Any = getattr(model, "config", None)
    return Blueprint(
        model_class=type(model).__name__,
        config=plain_config(config) if hasattr(config, "to_json_string") else None,
        parameters=_specs({name: value for name, value in state.items() if name not in buffers}),
        # Only the persistent ones are in a state dict.
        buffers=_specs({name: value for name, value in state.items() if name in buffers}),
        transient={name: buffer.cpu() for name, buffer in buffers.items() if name in transient},
        tied=tied_weights(model),
        ignorable=(OLD_ROTARY, *sorted(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())),
    )


def _state_dict(model: nn.Module) -> dict[str, Any]:
    """``get_model_state_dict``; or the model's own, where that saves names that are no attributes of it."""
    from torch.distributed.checkpoint.state_dict import get_model_state_dict

    try:
        found: dict[str, Any] = get_model_state_dict(model)
    except AttributeError:  # torch looks each name up: TorchTitan saves the parts of a fused projection apart
        return {clean_fqn(name, model): value for name, value in model.state_dict().items()}
    return found


def model_of_directory(base: Path, *, trust_remote_code: bool = False) -> Any:
    """Return the transformers model of a directory, made ``without_weights``.

    Args:
        base: The base model's directory.
        trust_remote_code: Let transformers run the directory's own Python files. Without it, no code of it is run.

    Raises:
        UnsupportedFormatError: there is no transformers 5, or it cannot make this model.
    """
    try:
        import transformers

        with on_this_machine(base) as place, without_weights():
            config = transformers.AutoConfig.from_pretrained(
                str(place), trust_remote_code=trust_remote_code, local_files_only=True
            )
            if trust_remote_code and "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {}):
                return transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=True)
            # ``_from_config`` of the class itself: the auto classes would choose another head than the config names.
            return getattr(transformers, config.architectures[0])._from_config(config)
    # An error of reading is not one of the model: it keeps its type and its advice.
    except (StorageError, WriteError):
        raise
    except Exception as error:  # whatever a config that it does not know makes it raise
        raise UnsupportedFormatError(
            base, f"transformers cannot make this model ({describe_failure(error)})"
        ) from error


def twin_of(live: Any, config: Any = None) -> Any:
    """Return a transformers model like a live one, made ``without_weights`` from its config, or from another one."""
    kind: Any = own_class(live)
    # In the dtype of the live one, so that buffers which depend on it are computed alike.
    dtype = next((p.dtype for p in live.parameters() if p.is_floating_point()), torch.get_default_dtype())
    modern = int(sys.modules["transformers"].__version__.split(".")[0]) >= 5
    # The argument has another name since transformers 5.
    options = {"dtype" if modern else "torch_dtype": dtype}
    with without_weights():
        return kind._from_config(copy.deepcopy(live.config if config is None else config), **options)


def transformers_parts(model: nn.Module, *, itself: bool = True) -> dict[str, Any]:
    """Return the outermost modules of a model that are from transformers, by clean name ("" is the model itself).

    Args:
        model: Any model.
        itself: Whether the model itself counts; else only those inside it.
    """
    modeling = sys.modules.get("transformers.modeling_utils")
    if modeling is None:
        return {}
    found: dict[str, Any] = {}
    for prefix, module in model.named_modules():
        name = clean_fqn(prefix, model)
        if not name and not itself:
            continue
        # Inside one that was found: modules come outermost first.
        inside = any(not outer or name == outer or name.startswith(f"{outer}.") for outer in found)
        if isinstance(module, modeling.PreTrainedModel) and not inside:
            found[name] = module
    return found


def plain_config(config: Any) -> dict[str, Any]:
    """Return a config of transformers, with every default filled in, as JSON can say it; infinity becomes a text.

    A config of a user's own may hold what its to_json_string cannot write, such as a dataclass; its fields are taken.
    """
    try:
        text = config.to_json_string(use_diff=False)
    except TypeError:
        text = json.dumps(config.to_dict(), default=_fields_of)
    # ``parse_constant``: JSON has no infinity, and Python writes one that other readers refuse.
    content: dict[str, Any] = json.loads(text, parse_constant=str)
    return content


def _fields_of(value: object) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return value.to_dict() if hasattr(value, "to_dict") else str(value)


def _specs(tensors: Mapping[str, Tensor]) -> dict[str, TensorSpec]:
    return {name: TensorSpec(name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
