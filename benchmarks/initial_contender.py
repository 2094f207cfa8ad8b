"""The model to be converted, and what people use instead of ``to-dcp``.

python -m benchmarks.initial_contender MODEL OUTPUT
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from transformers import AutoModelForCausalLM

from benchmarks.checkpoint import config_of


def make(rank: int, folder: Path, directory: Path, parameters: int) -> dict[str, Any]:  # noqa: ARG001
    """Random weights, in files of 2 GB. The body of one rank, which has nothing to return."""
    config = config_of(parameters)
    config.dtype = torch.bfloat16
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.normal_(std=0.02)
    model.save_pretrained(directory, max_shard_size="2GB")
    return {}


def convert(directory: str, output: str) -> None:
    """The whole model in memory, then all of it through torch."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.save(get_model_state_dict(model), checkpoint_id=output)


if __name__ == "__main__":
    convert(*sys.argv[1:3])
