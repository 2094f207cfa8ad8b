"""What the options of several commands have in common."""

from __future__ import annotations

from typing import Literal

Dtype = Literal["bfloat16", "float16", "float32", "original"]
"""Of floating-point tensors; "original" keeps what is there."""
