"""Config registry of TorchTitan 0.3 for the tests: its own configs, with an attention that has a backward on CPU."""

from __future__ import annotations

import torchtitan.models.llama3.config_registry as llama3
from torchtitan.components.optimizer import default_adamw
from torchtitan.models.common.attention import FlexAttention, ScaledDotProductAttention
from torchtitan.trainer import Trainer


def llama3_debugmodel() -> Trainer.Config:
    return _on_cpu(llama3.llama3_debugmodel())


def llama3_still() -> Trainer.Config:
    """The same, but it learns nothing."""
    config = llama3_debugmodel()
    config.optimizer = default_adamw(lr=0.0)
    return config


def _on_cpu(config: Trainer.Config) -> Trainer.Config:
    for _, _, parent, attribute in list(config.model_spec.model.traverse(FlexAttention.Config)):
        setattr(parent, attribute, ScaledDotProductAttention.Config())
    config.parallelism.spmd_backend = "partial_dtensor"
    config.training.disable_cuda_graphs = True
    return config
