"""Flavors of TorchTitan's models in sizes for tests. Importing this registers them.

The debugmodels with fewer layers: nearly all that a step, a save or a load of models so narrow takes, it takes once a
tensor. Llama's ``small`` is what jobs train that ask for no other model; its ``staged`` has enough layers for several
pipeline stages a rank. Qwen3's is without its tie. ``small_tied`` has it, which FSDP2 of the torch that we test with
refuses in 0.2. ``small_without_norms`` lacks the norms of queries and keys, ``small_moe`` has experts. DeepSeek's
``small`` has the router that transformers has, which the debugmodel has not; GPT-OSS and Llama 4 have a ``small``, too.
``of_another_theta`` and ``of_another_eps`` are Llama's with one setting changed; in 0.3 configs.py has them.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import torchtitan.models.deepseek_v3 as deepseek
import torchtitan.models.gpt_oss as gpt_oss
import torchtitan.models.llama3 as llama3
import torchtitan.models.qwen3 as qwen3

from tests.titan.cpu import IS_0_3

DENSE, MOE, TIED_DENSE, WITHOUT_NORMS = "small", "small_moe", "small_tied", "small_without_norms"
STAGED = "staged"
LAYERS, EXPERTS, CHOSEN, WIDTH = 2, 8, 2, 64
STAGED_LAYERS = 4
"""Of four pipeline stages some have several, some one, and the last none, unless TorchTitan is told otherwise."""
SCALE = 2.5
BALANCE = 0.02
"""How far a step moves the bias of a router. Twenty times TorchTitan's, so that a few steps tell."""


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
    for layer in config.layers:
        layer.moe.load_balance_coeff = BALANCE
    return config


def _arguments() -> Any:
    """0.2."""
    full = qwen3.qwen3_args["debugmodel_moe"]
    experts = dataclasses.replace(
        full.moe_args, num_experts=EXPERTS, top_k=CHOSEN, use_grouped_mm=False, load_balance_coeff=BALANCE
    )
    return dataclasses.replace(full, n_layers=LAYERS, moe_inter_dim=WIDTH, moe_args=experts)


def _llama_config(layers: int, attn_backend: str, **more: Any) -> Any:
    """0.3."""
    config = llama3._debugmodel(attn_backend, **more)
    config.layers = config.layers[:layers]
    return config


def _tied_config(attn_backend: str) -> Any:
    """0.3."""
    config = qwen3._debugmodel(attn_backend)
    config.layers = config.layers[:LAYERS]
    return config


def _dense_config(attn_backend: str) -> Any:
    """0.3. Tied embeddings have no initialization of their own there: without one they are what is in memory."""
    config = _tied_config(attn_backend)
    config.enable_weight_tying = False
    config.tok_embeddings.param_init = qwen3._EMBEDDING_INIT
    return config


def _config_without_norms(attn_backend: str) -> Any:
    """0.3."""
    config = _tied_config(attn_backend)
    for layer in config.layers:
        layer.attention.qk_norm = None
    return config


def _deepseek_config(attn_backend: str, moe_comm_backend: str = "standard", **more: Any) -> Any:
    """0.3. It may have layers that predict later tokens, ``num_mtp_layers``."""
    config = deepseek._debugmodel(attn_backend, moe_comm_backend, **more)
    config.layers = config.layers[:LAYERS]
    for layer in (config.layers[1], *config.mtp_layers):
        router = layer.moe.router
        router.score_func, router.route_norm, router.route_scale = "sigmoid", True, SCALE
    return config


def _deepseek_arguments() -> Any:
    """0.2."""
    full = deepseek.deepseekv3_args["debugmodel"]
    experts = dataclasses.replace(
        full.moe_args, score_func="sigmoid", route_norm=True, route_scale=SCALE, use_grouped_mm=False
    )
    return dataclasses.replace(full, n_layers=LAYERS, moe_args=experts)


def _gpt_oss_config(moe_comm_backend: str, attn_backend: str) -> Any:  # noqa: ARG001
    """0.3."""
    config = gpt_oss._debugmodel(moe_comm_backend, "flex")
    config.layers = config.layers[:LAYERS]
    for layer in config.layers:
        layer.moe.routed_experts.inner_experts.hidden_dim = WIDTH
    return config


def _gpt_oss_arguments() -> Any:
    """0.2."""
    full = gpt_oss.gptoss_configs["debugmodel"]
    experts = dataclasses.replace(full.moe_args, use_grouped_mm=False)
    return dataclasses.replace(full, n_layers=LAYERS, moe_inter_dim=WIDTH, vocab_size=2048, moe_args=experts)


if IS_0_3:
    llama3.llama3_configs[DENSE] = partial(_llama_config, LAYERS)
    llama3.llama3_configs[STAGED] = partial(_llama_config, STAGED_LAYERS)
    deepseek.deepseekv3_configs[DENSE] = _deepseek_config
    gpt_oss.gptoss_configs[DENSE] = _gpt_oss_config
else:
    import torchtitan.models.llama4 as llama4

    deepseek.deepseekv3_args[DENSE] = _deepseek_arguments()
    gpt_oss.gptoss_configs[DENSE] = _gpt_oss_arguments()
    llama4.llama4_args[DENSE] = dataclasses.replace(llama4.llama4_args["debugmodel"], n_layers=LAYERS)

if IS_0_3:
    qwen3.qwen3_configs |= {
        MOE: _config,
        DENSE: _dense_config,
        TIED_DENSE: _tied_config,
        WITHOUT_NORMS: _config_without_norms,
    }
else:
    full = dataclasses.replace(qwen3.qwen3_args["debugmodel"], n_layers=LAYERS)
    qwen3.qwen3_args |= {
        MOE: _arguments(),
        DENSE: dataclasses.replace(full, enable_weight_tying=False),
        TIED_DENSE: full,
        WITHOUT_NORMS: dataclasses.replace(full, qk_norm=False),
    }
    right = dataclasses.replace(llama3.llama3_args["debugmodel"], n_layers=LAYERS)
    llama3.llama3_args |= {
        DENSE: right,
        STAGED: dataclasses.replace(right, n_layers=STAGED_LAYERS),
        "of_another_theta": dataclasses.replace(right, rope_theta=10000.0),
        "of_another_eps": dataclasses.replace(right, norm_eps=0.1),
    }
