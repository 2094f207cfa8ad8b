"""What people use today to turn a sharded checkpoint into weights for ``from_pretrained``, as they use it.

python -m benchmarks.offline_contenders NAME --checkpoint_dir C --output_dir O --base_model_path B
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path


def accelerate(checkpoint: Path, output: Path, base: Path) -> None:  # noqa: ARG001
    """accelerate's own merge. Leaves float32 and writes no config."""
    from accelerate.utils import merge_fsdp_weights

    merge_fsdp_weights(str(checkpoint), str(output), safe_serialization=True)


def consolidate(checkpoint: Path, output: Path, base: Path) -> None:
    """torch's own reader and its writer of Hugging Face files, which consolidates in the end."""
    import torch
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base))
    state = {name: torch.empty_like(tensor, device="cpu") for name, tensor in model.state_dict().items()}
    dcp.load({"model": state}, checkpoint_id=checkpoint)
    state = {name: tensor.bfloat16() for name, tensor in state.items()}
    writer = HuggingFaceStorageWriter(
        str(output), dict.fromkeys(state, 1), save_distributed=True, enable_consolidation=True
    )
    dcp.save(state, storage_writer=writer)


def torch_save(checkpoint: Path, output: Path, base: Path) -> None:
    """The way of flame's convert_dcp_to_hf: one torch file, a model, ``save_pretrained``."""
    import torch
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
    from transformers import AutoConfig, AutoModelForCausalLM

    with tempfile.TemporaryDirectory(dir=output.parent) as folder:
        dcp_to_torch_save(checkpoint, Path(folder) / "checkpoint.pt")
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base))
        state = torch.load(Path(folder) / "checkpoint.pt", map_location="cpu", weights_only=False)
        model.load_state_dict(state["model"])
        model.bfloat16().save_pretrained(output)


CONTENDERS: dict[str, Callable[[Path, Path, Path], None]] = {
    "accelerate": accelerate,
    "consolidate": consolidate,
    "torch-save": torch_save,
}

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("name", choices=CONTENDERS)
    for option in ("--checkpoint_dir", "--output_dir", "--base_model_path"):
        parser.add_argument(option, type=Path, required=True)
    given = parser.parse_args()
    warnings.filterwarnings("ignore")
    CONTENDERS[given.name](given.checkpoint_dir, given.output_dir, given.base_model_path)
