"""TorchTitan on CPU ranks. Importing this changes torch and TorchTitan in place, which is why only tests import it.

What TorchTitan asks of an accelerator, ``torch.cpu`` has to answer; what Gloo and a CPU cannot do is left out. Of what
is tested, saving, loading and the training step, nothing is replaced.
"""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import tyro
from torch.distributed.checkpoint.staging import StagingOptions
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
from torch.distributed.pipelining.schedules import PipelineScheduleMulti, PipelineScheduleSingle
from torch.nn.attention.flex_attention import create_block_mask, create_mask

_ANSWERS: dict[str, Any] = {
    "get_device_name": lambda *_: "cpu",
    "get_device_properties": lambda *_: SimpleNamespace(total_memory=1 << 34),
    "reset_peak_memory_stats": lambda *_: None,
    "empty_cache": lambda: None,
    "memory_stats": lambda *_: {},
    "current_device": lambda: 0,
}

torch._utils._get_available_device_type = lambda: "cpu"
for _name, _answer in _ANSWERS.items():
    setattr(torch.cpu, _name, _answer)
dist.set_timeout = lambda *_, **__: None  # type: ignore[attr-defined]

import torchtitan.train as train  # noqa: E402

try:
    import torchtitan.components.checkpointer as checkpoint
    import torchtitan.components.checkpointer.dcp as checkpointer
    import torchtitan.models.common.attention as attention
    import torchtitan.trainer as trainer

    IS_0_3 = True
except ImportError:
    import torchtitan.components.checkpoint as checkpoint
    import torchtitan.models.attention as attention

    checkpointer, trainer = checkpoint, train
    IS_0_3 = False

checkpointer.StagingOptions = lambda *_, **__: StagingOptions(
    use_pinned_memory=False, use_shared_memory=True, use_async_staging=True, use_non_blocking_copy=False
)
trainer.time = SimpleNamespace(**{**vars(trainer.time), "sleep": lambda _: None})  # it sleeps 2 s when all is done
tyro._docstrings.get_field_docstring = lambda *_: None  # texts of --help, searched for in the sources of all classes


def _sum_gradients(original: Any) -> Any:
    """FSDP2 averages gradients with PREMUL_SUM, which Gloo does not have."""

    @functools.wraps(original)
    def initialize(self: FSDPParamGroup, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        self.force_sum_reduction_for_comms = True

    return initialize


def _in_microbatches(original: Any) -> Any:
    """TorchTitan 0.3 hands a pipeline its microbatches, as a newer torch than the one of the tests takes them."""

    @functools.wraps(original)
    def step(
        self: Any, *args: Any, arg_mbs: Any = None, kwarg_mbs: Any = None, target_mbs: Any = None, **kwargs: Any
    ) -> Any:
        if kwarg_mbs is None:
            return original(self, *args, **kwargs)
        for stage in self._stages if hasattr(self, "_stages") else [self._stage]:
            stage.has_backward = self._has_backward
            stage.clear_runtime_states()
        return self._step_microbatches(arg_mbs, kwarg_mbs, target_mbs, **kwargs)

    return step


def _histogram(original: Any) -> Any:
    """On a CPU there is none of whole numbers, in which a router counts the tokens of its experts."""

    @functools.wraps(original)
    def histc(values: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return original(values.float(), *args, **kwargs).to(values.dtype)

    return histc


def _dense_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, block_mask: Any, scale: float | None, **options: Any
) -> Any:
    """FlexAttention has no backward on a CPU: the same with a dense mask, and its logarithmic sums."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    mask = create_mask(block_mask.mask_mod, q.shape[0], q.shape[1], q.shape[2], k.shape[2], device=q.device)
    scores = (q @ k.transpose(-1, -2)).float() * (scale if scale is not None else q.shape[-1] ** -0.5)
    scores = scores.masked_fill(~mask, float("-inf"))
    sums = scores.logsumexp(-1)
    out = (scores - sums.unsqueeze(-1)).exp().to(v.dtype) @ v
    return (out, sums) if options.get("return_lse") else (out, SimpleNamespace(lse=sums))


_flex = attention.FlexAttention if IS_0_3 else attention.FlexAttentionWrapper
_flex._compiled_flex_attn = staticmethod(_dense_attention)
attention._compiled_create_block_mask = create_block_mask
for _kind in (PipelineScheduleSingle, PipelineScheduleMulti):
    _kind.step = _in_microbatches(_kind.step)  # type: ignore[method-assign]
torch.histc = _histogram(torch.histc)
FSDPParamGroup.__init__ = _sum_gradients(FSDPParamGroup.__init__)  # type: ignore[method-assign]
