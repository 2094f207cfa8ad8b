"""Load a Hugging Face directory as whoever gets it will, in a process of its own, and see what the model answers.

A process of its own, because transformers changes settings of the whole process while it loads, and because the memory
is given back then. Run as ``python -m shardsmith.export.load_check DIRECTORY INPUTS ANSWER``.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shardsmith.errors import CorruptCheckpointError, UsageError

_OF_THE_JOB = ("RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_", "ACCELERATE_", "FSDP_")
"""Beginnings of environment variables that would make the process take itself for one of the job's ranks."""

TOLERANCES = {torch.bfloat16: 0.05, torch.float16: 0.01}
"""Most relative difference of two answers that rounding to a dtype explains; of others 0.001."""


def compare_answers(
    directory: Path, inputs: Mapping[str, Tensor], expected: Tensor, rounded_to: set[torch.dtype]
) -> None:
    """Load a directory on the CPU, in float32, and compare what the model answers with what it should.

    Args:
        directory: A Hugging Face directory.
        inputs: Keyword arguments of the model, on the CPU.
        expected: The answer of the live model, float32 on the CPU.
        rounded_to: The dtypes that weights were written in and that the live model computed in.

    Raises:
        CorruptCheckpointError: it does not load, not whole, or answers something else.
    """
    found = answer_of(directory, inputs)
    tolerance = max((TOLERANCES.get(dtype, 0.001) for dtype in rounded_to), default=0.001)
    if found.shape != expected.shape:
        shapes = f"{tuple(found.shape)}, the live model {tuple(expected.shape)}"
        raise CorruptCheckpointError(directory, f"loaded, it answers with a tensor of shape {shapes}")
    # Of the finite elements: one masked logit would make the norm infinite, and any difference nothing.
    size = expected[expected.isfinite()].norm().clamp_min(torch.finfo(torch.float32).tiny)
    difference = float(apart(found, expected).norm() / size)
    if not difference <= tolerance:  # nor is NaN
        text = f"by {difference:.3g} of their norm, where {tolerance:g} is rounding"
        raise CorruptCheckpointError(directory, f"loaded, its answers differ from the live model's {text}")


def apart(one: Tensor, other: Tensor) -> Tensor:
    """Return how far apart answers are, element by element: 0 where both are one infinity, as masked ones are."""
    # Where they are equal the difference is not worked out: infinity minus infinity is NaN.
    return torch.where(one == other, torch.zeros_like(one), one - other)


def answer_of(directory: Path, inputs: Mapping[str, Tensor]) -> Tensor:
    """What a model that is loaded from a directory answers. Raises CorruptCheckpointError if it does not load."""
    with tempfile.TemporaryDirectory(prefix="shardsmith-load-") as folder:
        given, answer = Path(folder, "inputs.pt"), Path(folder, "answer.pt")
        torch.save(dict(inputs), given)
        command = [sys.executable, "-m", "shardsmith.export.load_check", str(directory), str(given), str(answer)]
        # Else the child would join the job's process group, or take a device of its own.
        environment = {name: value for name, value in os.environ.items() if not name.startswith(_OF_THE_JOB)}
        # PYTHONSAFEPATH: the current directory must not come before the installed packages.
        environment |= {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "PYTHONSAFEPATH": "1"}
        ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if ran.returncode:
            lines = ran.stderr.strip().splitlines() or [f"exit status {ran.returncode}"]
            # The last line is the exception; what is above is its way there.
            raise CorruptCheckpointError(directory, f"from_pretrained cannot load it: {lines[-1]}")
        found: Tensor = torch.load(answer, weights_only=True)
    return found


def first_tensor(output: Any) -> Tensor:
    """The logits of a model's output, or else the first floating tensor in it. Raises UsageError if there is none."""
    found = next((value for value in _tensors([getattr(output, "logits", None), output])), None)
    if found is None:
        raise UsageError(f"the model answers with {type(output).__name__}, in which there is no tensor to compare")
    return found


def _tensors(output: Any) -> Iterator[Tensor]:
    """Those of an output, in order, at any depth: a backbone gives a tuple of feature maps."""
    if isinstance(output, Tensor) and output.is_floating_point():
        yield output
    elif isinstance(output, Mapping | list | tuple):
        for value in output.values() if isinstance(output, Mapping) else output:
            yield from _tensors(value)


def main(directory: str, inputs: str, answer: str) -> None:
    """Load, ask, and write what is answered. Raises whatever keeps the model from loading whole."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(directory, local_files_only=True)
    kind = getattr(transformers, config.architectures[0])
    # Safetensors only: the check must not pass by weights that a pickle beside them holds.
    model, info = kind.from_pretrained(
        directory, dtype=torch.float32, local_files_only=True, use_safetensors=True, output_loading_info=True
    )
    problems = [
        f"{problem}: {info[problem]}"
        for problem in ("missing_keys", "unexpected_keys", "mismatched_keys")
        if info.get(problem)
    ]
    if problems:
        raise SystemExit("; ".join(problems))
    with torch.no_grad():
        output = model.eval()(**torch.load(inputs, weights_only=True))
    # A copy: a view would save the whole storage behind it.
    torch.save(first_tensor(output).float().clone(), answer)


if __name__ == "__main__":
    main(*sys.argv[1:])
