"""Flavors of TorchTitan's Qwen3 in sizes for tests. Importing this registers them.

``small_moe`` has experts. ``small`` is the debugmodel with fewer layers; in 0.2 also without its tie, because FSDP2 of
the torch that we test with refuses what TorchTitan 0.2.2 does with tied weights.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torchtitan.models.qwen3 as qwen3

from tests.titan.cpu import IS_0_3

DENSE, MOE = "small", "small_moe"
TIED = IS_0_3
LAYERS, EXPERTS, CHOSEN, WIDTH = 2, 8, 2, 64


def _config(attn_backend: str, moe_comm_backend: str = "standard") -> Any:
    """0.3."""
    config = qwen3._debugmodel_moe(attn_backend)
    config.layers = qwen3._build_qwen3_moe_layers(
        n_layers=LAYERS,
        dim=256,
        n_heads=16,
        n_kv_heads=8,
        head_dim=128,
        moe_hidden_dim=WIDTH,
        num_experts=EXPERTS,
        top_k=CHOSEN,
        attn_backend=attn_backend,
        moe_comm_backend=moe_comm_backend,
        rope=config.layers[0].attention.rope,
    )
    return config


def _arguments() -> Any:
    """0.2."""
    full = qwen3.qwen3_args["debugmodel_moe"]
    experts = dataclasses.replace(full.moe_args, num_experts=EXPERTS, top_k=CHOSEN, use_grouped_mm=False)
    return dataclasses.replace(full, n_layers=LAYERS, moe_inter_dim=WIDTH, moe_args=experts)


def _dense_config(attn_backend: str) -> Any:
    """0.3."""
    config = qwen3._debugmodel(attn_backend)
    config.layers = config.layers[:LAYERS]
    return config


if IS_0_3:
    qwen3.qwen3_configs |= {MOE: _config, DENSE: _dense_config}
else:
    full = qwen3.qwen3_args["debugmodel"]
    qwen3.qwen3_args |= {
        MOE: _arguments(),
        DENSE: dataclasses.replace(full, n_layers=LAYERS, enable_weight_tying=TIED),
    }
