"""What the options of several commands have in common."""

from __future__ import annotations

from typing import Literal

Dtype = Literal["bfloat16", "float16", "float32", "original"]
"""Of floating-point tensors; "original" keeps what is there."""


def choose_names(names: str, titan_model: str | None, titan_flavor: str | None) -> str:
    """The name map that the options ask for: a TorchTitan model is a choice of its own.

    Raises:
        UsageError: they contradict each other.
    """
    from shardsmith.errors import UsageError

    if titan_model is None and titan_flavor is None:
        return names
    if titan_model is None or titan_flavor is None:
        raise UsageError("--titan_model and --titan_flavor go together, as in --titan_model llama3 --titan_flavor 8B")
    if names not in ("auto", "torchtitan"):
        raise UsageError(f"--names {names} and --titan_model {titan_model} are two answers to one question")
    return f"torchtitan:{titan_model}/{titan_flavor}"
