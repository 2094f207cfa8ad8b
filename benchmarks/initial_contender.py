"""What people use instead of ``to-dcp``: python -m benchmarks.initial_contender MODEL OUTPUT

python -m benchmarks.initial_contender --make MODEL PARAMETERS makes the model to be converted.
"""

from __future__ import annotations

import sys
import warnings

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from transformers import AutoModelForCausalLM

from benchmarks.checkpoint import config_of


def make(directory: str, parameters: int) -> None:
    """Random weights, in files of 2 GB."""
    config = config_of(parameters)
    config.dtype = torch.bfloat16
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.normal_(std=0.02)
    model.save_pretrained(directory, max_shard_size="2GB")


def convert(directory: str, output: str) -> None:
    """The whole model in memory, then all of it through torch."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.save(get_model_state_dict(model), checkpoint_id=output)


if __name__ == "__main__":
    if sys.argv[1] == "--make":
        make(sys.argv[2], int(sys.argv[3]))
    else:
        convert(*sys.argv[1:3])
