"""Training steps on a device, and what the thread that launches them notices."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

_ENOUGH_STEPS = 30
_MOST_STEPS = 100
# Batch and length: a step of some tens of milliseconds on an accelerator, and a short one on a CPU.
_TOKENS = (4, 2048)
_FEW_TOKENS = (1, 32)


class Stepping:
    """One model that trains on one batch again and again."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, device: str) -> None:
        self._model = model
        self._optimizer = optimizer
        # Far from the numbers of other steps.
        self._begun = 10**6
        self._on_accelerator = device != "cpu"
        shape = _TOKENS if self._on_accelerator else _FEW_TOKENS
        # 997 is prime and below every vocabulary here, so the tokens vary.
        self._tokens = torch.arange(shape[0] * shape[1], device=device).view(shape) % 997

    def run(self, count: int) -> None:
        """Make so many steps."""
        for _ in range(count):
            self._step()

    def measure(
        self, begin: Callable[[int], None] = lambda _: None, is_going_on: Callable[[int], bool] = lambda _: True
    ) -> dict[str, float]:
        """Times of a step in seconds, and what launching one takes longer than usual, while something goes on.

        It is begun again, as another step, until there are enough training steps. Python's own collector of garbage
        does not look at what was there before: its pauses, of a fifth of a second, come with and without a save.
        """
        gc.collect()
        # What is there now is not searched again; only what the steps make is.
        gc.freeze()
        steps: list[float] = []
        launches: list[float] = []
        while len(steps) < _ENOUGH_STEPS:
            self._begun += 1
            begin(self._begun)
            while True:
                began = time.perf_counter()
                launches.append(self._step())
                steps.append(time.perf_counter() - began)
                # At least one step, also where the save was faster.
                if not is_going_on(self._begun) or len(steps) >= _MOST_STEPS:
                    break
        usual = statistics.median(launches)
        late = sorted(max(0.0, launch - usual) for launch in launches)
        return {
            "median": statistics.median(steps),
            "p99": sorted(steps)[int(len(steps) * 0.99)],
            "pause": late[int(len(late) * 0.99)],
            "count": len(steps),
        }

    def _step(self) -> float:
        """How long launching it took; it has ended when this returns."""
        began = time.perf_counter()
        self._model(self._tokens).float().square().mean().backward()
        self._optimizer.step()
        self._optimizer.zero_grad()
        launched = time.perf_counter() - began
        if self._on_accelerator:
            # Else the next step would be launched while this one still runs, and take its time.
            torch.accelerator.synchronize()
        return launched
