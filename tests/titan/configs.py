"""Config registry of TorchTitan 0.3 for the tests: its own configs, with an attention that has a backward on CPU."""

from __future__ import annotations

import torchtitan.experiments.transformers_modeling_backend.config_registry as transformers_models
import torchtitan.models.deepseek_v3 as deepseek_models
import torchtitan.models.deepseek_v3.config_registry as deepseek
import torchtitan.models.gpt_oss as gpt_oss_models
import torchtitan.models.gpt_oss.config_registry as gpt_oss
import torchtitan.models.llama3 as llama3_models
import torchtitan.models.llama3.config_registry as llama3
import torchtitan.models.qwen3 as qwen3_models
import torchtitan.models.qwen3.config_registry as qwen3
from torchtitan.components.lora import LoRAConverter
from torchtitan.components.optimizer import default_adamw
from torchtitan.components.quantization import Float8LinearConverter
from torchtitan.distributed.activation_checkpoint import FullAC
from torchtitan.models.common.attention import FlexAttention, ScaledDotProductAttention, VarlenAttention
from torchtitan.trainer import Trainer

from shardsmith.integrations.torchtitan import checkpoint_hooks
from tests.titan import small_models


def llama3_debugmodel() -> Trainer.Config:
    return _on_cpu(llama3.llama3_debugmodel())


def llama3_small(flavor: str = small_models.DENSE) -> Trainer.Config:
    """What jobs train that ask for no other model: nothing is computed twice, and the loss is that of two chunks."""
    config = llama3.llama3_debugmodel()
    config.model_spec = llama3_models.model_registry(flavor)
    config.activation_checkpoint = None
    config.loss.num_chunks = 2
    return _on_cpu(config)


def llama3_staged() -> Trainer.Config:
    """The same with more layers, for several pipeline stages a rank."""
    return llama3_small(small_models.STAGED)


def llama3_still() -> Trainer.Config:
    """The same, but it learns nothing."""
    config = llama3_small()
    config.optimizer = default_adamw(lr=0.0)
    return config


def llama3_small_with_hooks() -> Trainer.Config:
    config = llama3_small()
    config.checkpoint = checkpoint_hooks(config.checkpoint, metadata=True)
    return config


def llama3_with_lora(flavor: str = small_models.DENSE) -> Trainer.Config:
    """Fused queries, keys and values, and the output, with adapters."""
    config = llama3_small()
    adapters = LoRAConverter.Config(rank=4, alpha=16.0, target_modules=["wqkv", "wo", "w1"])
    config.model_spec = llama3_models.model_registry(flavor, converters=[adapters])
    return _on_cpu(config)


def llama3_staged_with_lora() -> Trainer.Config:
    return llama3_with_lora(small_models.STAGED)


def llama3_recomputed() -> Trainer.Config:
    """Each block is computed again in the backward."""
    config = llama3_small()
    config.activation_checkpoint = FullAC.Config()
    return config


def llama3_with_float8() -> Trainer.Config:
    """Layers that compute in float8, as it is emulated where there is none."""
    config = llama3_small()
    converter = Float8LinearConverter.Config(emulate=True, model_compile_enabled=False)
    config.model_spec = llama3_models.model_registry(small_models.DENSE, converters=[converter])
    return _on_cpu(config)


def llama3_with_float8_and_lora() -> Trainer.Config:
    """Adapters on layers that compute in float8, as it is emulated where there is none."""
    config = llama3_small()
    float8 = Float8LinearConverter.Config(emulate=True, model_compile_enabled=False)
    adapters = LoRAConverter.Config(rank=8, alpha=16.0, target_modules=["wq", "wkv", "wo"])
    config.model_spec = llama3_models.model_registry(small_models.DENSE, converters=[float8, adapters])
    return _on_cpu(config)


def qwen3_small() -> Trainer.Config:
    config = qwen3.qwen3_debugmodel()
    config.model_spec = qwen3_models.model_registry(small_models.DENSE)
    return _on_cpu(config)


def qwen3_small_tied() -> Trainer.Config:
    config = qwen3.qwen3_debugmodel()
    config.model_spec = qwen3_models.model_registry(small_models.TIED_DENSE)
    return _on_cpu(config)


def qwen3_small_without_norms() -> Trainer.Config:
    config = qwen3.qwen3_debugmodel()
    config.model_spec = qwen3_models.model_registry(small_models.WITHOUT_NORMS)
    return _on_cpu(config)


def transformers_backend() -> Trainer.Config:
    config = transformers_models.transformers_modeling_backend_full()
    config.training.disable_cuda_graphs = True
    return config


def qwen3_small_moe() -> Trainer.Config:
    config = qwen3.qwen3_moe_debug()
    config.model_spec = qwen3_models.model_registry(small_models.MOE)
    return _on_cpu(config)


def deepseek_v3_small() -> Trainer.Config:
    config = deepseek.deepseek_v3_debugmodel()
    config.model_spec = deepseek_models.model_registry(small_models.DENSE)
    return _on_cpu(config)


def deepseek_v3_small_mtp() -> Trainer.Config:
    """With a layer that predicts the second next token, which is in no flavor."""
    config = deepseek.deepseek_v3_debugmodel_mtp()
    config.model_spec = deepseek_models.model_registry(small_models.DENSE, num_mtp_layers=1)
    return _on_cpu(config)


def gpt_oss_small() -> Trainer.Config:
    config = gpt_oss.gpt_oss_debugmodel_flex()
    config.model_spec = gpt_oss_models.model_registry(small_models.DENSE)
    config.parallelism.spmd_backend = "partial_dtensor"
    config.training.disable_cuda_graphs = True
    return config


def llama3_of_another_theta() -> Trainer.Config:
    config = llama3_small()
    for layer in config.model_spec.model.layers:
        layer.attention.rope.theta = 10000.0
    return config


def llama3_of_another_eps() -> Trainer.Config:
    config = llama3_small()
    model = config.model_spec.model
    for norm in [model.norm, *(n for layer in model.layers for n in (layer.attention_norm, layer.ffn_norm))]:
        norm.eps = 0.1
    return config


def _on_cpu(config: Trainer.Config) -> Trainer.Config:
    for kind in (FlexAttention, VarlenAttention):
        for _, _, parent, attribute in list(config.model_spec.model.traverse(kind.Config)):
            setattr(parent, attribute, ScaledDotProductAttention.Config())
    config.parallelism.spmd_backend = "partial_dtensor"
    config.training.disable_cuda_graphs = True
    return config
