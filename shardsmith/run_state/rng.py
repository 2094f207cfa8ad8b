"""The random number generators of this rank as tensors: a resumed run draws what the uninterrupted one would."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor


def rng_state() -> dict[str, Tensor]:
    """States of torch's CPU generator, the current accelerator's and Python's ``random``; int64 or uint8, on CPU."""
    version, internal, gauss = random.getstate()
    state = {
        "torch": torch.get_rng_state(),
        # The version, the 624 words of the Mersenne Twister, and the position in them.
        "python": torch.tensor([version, *internal], dtype=torch.int64, device="cpu"),
        # NaN stands for None: no second number of a pair is kept.
        "python_gauss": torch.tensor(float("nan") if gauss is None else gauss, dtype=torch.float64, device="cpu"),
    }
    if torch.accelerator.is_available():
        state["accelerator"] = _accelerator().get_rng_state()
    return state


def set_rng_state(state: dict[str, Tensor]) -> None:
    """Inverse of ``rng_state``; generators that the state does not have are left alone."""
    torch.set_rng_state(state["torch"])
    version, *internal = state["python"].tolist()
    gauss = state["python_gauss"].item()
    # Only NaN differs from itself.
    random.setstate((version, tuple(internal), None if gauss != gauss else gauss))
    if "accelerator" in state and torch.accelerator.is_available():
        _accelerator().set_rng_state(state["accelerator"])


def _accelerator() -> Any:
    return torch.get_device_module()
