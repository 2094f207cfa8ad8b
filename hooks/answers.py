"""What the live model answers to a fixed batch, to be compared with what an export of it answers."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.eval_frame import OptimizedModule
from torch.distributed.tensor import DTensor

from shardsmith.errors import UsageError
from shardsmith.export.joint_export import Check
from shardsmith.export.load_check import compare_answers, first_tensor
from shardsmith.export.probe_images import takes_images
from shardsmith.export.probe_inputs import made_up_inputs
from shardsmith.ground.layout import MAIN_WEIGHTS
from shardsmith.name_maps.transformers import meta_twin_of
from shardsmith.sharding.gathered import forget_gathered
from shardsmith.tensors.checkpoint_keys import EMA as AVERAGE
from shardsmith.tensors.fqn import unwrapped

from .ema import EMA
from .held import held_model
from .live_directory import LiveDirectory


class Answers:
    """Asks the live model, and checks a directory by that: it must load, and answer the same."""

    def __init__(
        self,
        model: nn.Module,
        ema: EMA | None,
        inputs: Mapping[str, Tensor] | None,
        ask: Callable[..., Any] | None = None,
    ) -> None:
        """Take the inputs, or make some up.

        Args:
            model: The live model.
            ema: Its average, if that is exported.
            inputs: Keyword arguments of the exported model, the same on every rank; None makes some up.
            ask: How the live model answers these; None calls it with them.

        Raises:
            UsageError: the model is none of transformers' own, or nothing can be made up for it.
        """
        held = held_model(model) if ask is None else None  # whose answer is not that of the module that holds it
        outer = model if held is None or held.inner is None else held.inner
        # Compiled, it would be compiled once more, for these inputs and for `eval`.
        self._model = outer._orig_mod if isinstance(outer, OptimizedModule) else outer
        self._ema = ema
        self._call = ask or self._model
        self._inputs = dict(inputs) if inputs is not None else _made_up(model)
        self._asked = f"the given {', '.join(inputs)}" if inputs is not None else _described(model, self._inputs)

    def check_for(self, directory: LiveDirectory) -> Check | None:
        """A check of one directory by what the weights are now. All ranks, main thread; communicates under FSDP, DDP.

        Costs one forward. None for what ``from_pretrained`` would not load: an average beside the main weights.
        """
        name = next((model for model, stem in directory.stems.items() if stem == MAIN_WEIGHTS), None)
        if name is None:
            return None
        # A directory whose own weights are the average answers as the average does.
        swapped = self._ema.swapped_in() if name == AVERAGE and self._ema is not None else contextlib.nullcontext()
        with swapped, _outputs_of_layers(self._model) as computed_in:
            answer = self._ask()
        # The comparison comes later, in the background: it takes nothing from the device.
        inputs = {key: value.cpu() for key, value in self._inputs.items()}
        expected = answer.float().cpu()
        return partial(_compare, inputs=inputs, expected=expected, computed_in=computed_in, asked=self._asked)

    def _ask(self) -> Tensor:
        device = next(self._model.parameters()).device
        inputs = {key: value.to(device) for key, value in self._inputs.items()}
        # The generator of the CPU is always saved and restored; `devices` are those beside it.
        drawn_from = {"devices": [device], "device_type": device.type} if device.type != "cpu" else {"devices": []}
        # Module by module: `model.train()` would also change what the user keeps in `eval`.
        were_training = [module for module in self._model.modules() if module.training]
        self._model.eval()
        try:
            with torch.no_grad(), torch.random.fork_rng(**drawn_from), _buffers_kept(self._model):
                answer = first_tensor(self._call(**inputs))
        finally:
            for module in were_training:
                module.training = True
            # A forward without a backward may leave parameters gathered; the next save must see the shards.
            forget_gathered(self._model)
        # Under tensor parallelism each rank may have a part of the logits.
        return answer.full_tensor() if isinstance(answer, DTensor) else answer.clone()


def _compare(
    directory: Path,
    written_in: set[torch.dtype],
    *,
    inputs: Mapping[str, Tensor],
    expected: Tensor,
    computed_in: set[torch.dtype],
    asked: str,
) -> str:
    # The tolerance follows from all dtypes that round: those of the files and those of the layers.
    compare_answers(directory, inputs, expected, written_in | computed_in)
    return asked


@contextlib.contextmanager
def _buffers_kept(model: nn.Module) -> Iterator[None]:
    """After it the buffers are as before: routers count the tokens of their experts in any forward."""
    # With the dict that holds it, so that each buffer can be put back in its place.
    buffers = [(module._buffers, name, buffer) for module in model.modules() for name, buffer in _own_buffers(module)]
    values = [buffer.detach().clone() for _, _, buffer in buffers]
    try:
        yield
    finally:
        for (place, name, buffer), value in zip(buffers, values, strict=True):
            buffer.copy_(value)
            place[name] = buffer  # a forward may have put another tensor there


def _own_buffers(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [(name, buffer) for name, buffer in module._buffers.items() if buffer is not None]


@contextlib.contextmanager
def _outputs_of_layers(model: nn.Module) -> Iterator[set[torch.dtype]]:
    """The floating-point dtypes that layers compute in within it: mixed precision does not show in their weights."""
    found: set[torch.dtype] = set()

    def note(_: nn.Module, __: object, output: object) -> None:
        if isinstance(output, Tensor) and output.is_floating_point():
            found.add(output.dtype)

    # Leaves only: they compute, and the modules above pass on what these give.
    layers = [module for module in model.modules() if next(module.children(), None) is None]
    handles = [layer.register_forward_hook(note) for layer in layers]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _transformers_model(model: nn.Module) -> Any:
    """The model without wrappers. Raises UsageError unless transformers has its class."""
    held = held_model(model)
    inner = unwrapped(model) if held is None else held.inner
    # Not imported for the question: without it the model cannot be one of its own.
    transformers = sys.modules.get("transformers")
    known = [kind for kind in type(inner).__mro__ if hasattr(transformers, kind.__name__)] if transformers else []
    if not known or not hasattr(inner, "main_input_name"):
        raise UsageError(
            f'verify="load" loads with from_pretrained, and transformers has no {type(inner).__name__}: '
            'use verify="digest", which compares every byte with what was staged'
        )
    return inner


def _made_up(model: nn.Module) -> dict[str, Tensor]:
    """A small batch that a model like the live one takes. Raises UsageError if none is known."""
    inner = _transformers_model(model)
    try:
        return made_up_inputs(meta_twin_of(inner))
    except UsageError as error:
        raise UsageError(
            f'verify="load": {error}. Pass verify_inputs={{...}}, the keyword arguments of its forward'
        ) from error


def _described(model: nn.Module, inputs: Mapping[str, Tensor]) -> str:
    """What the made-up inputs are, and what they leave out."""
    text = f"made-up {', '.join(inputs)}"
    if not takes_images(_transformers_model(model)) or "pixel_values" in inputs:
        return text
    return f"{text} alone, for how it takes an image is not known: pass verify_inputs={{...}} with one"
