"""TorchTitan's backend for models of transformers, on CPU ranks. Importing this changes it in place.

0.3: attention is that of torch with a dense mask, where FlexAttention has no backward on a CPU; and parameters are
sharded over their only mesh dimension by name of no other, because fully_shard of torch 2.13 does not know types of
spmd_types. 0.2: it was written for transformers 4, of which it needs an attribute and the signature of a method.
"""

from __future__ import annotations

from typing import Any

import transformers

from tests.titan.cpu import IS_0_3

if IS_0_3:
    import torchtitan.experiments.transformers_modeling_backend.model as backend
    import torchtitan.experiments.transformers_modeling_backend.parallelize as parallelize
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    def _attention(module: Any, query: Any, key: Any, value: Any, mask: Any, **options: Any) -> Any:
        return sdpa_attention_forward(module, query, key, value, mask, scaling=options.get("scaling"))

    _resolve = parallelize.resolve_fsdp_mesh
    backend._uses_dsa = lambda _: True  # it makes dense masks for such models
    backend.flex_attention_forward = _attention
    parallelize.resolve_fsdp_mesh = lambda dims: (_resolve(dims)[0], None)
else:
    from torchtitan.experiments.transformers_modeling_backend import HFTransformerModel

    _patch = HFTransformerModel._patch_hf_llama_like

    def _patch_for_5(self: Any, *args: Any, **kwargs: Any) -> None:
        _patch(self, *args, **kwargs)
        initialize = transformers.PreTrainedModel._initialize_weights
        transformers.PreTrainedModel._initialize_weights = lambda self, module, *_: initialize(self, module)

    transformers.PretrainedConfig.pruned_heads = {}
    HFTransformerModel._patch_hf_llama_like = _patch_for_5
