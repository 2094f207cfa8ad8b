"""The bias by which routers balance experts, where the files of the exported model have no place for it."""

from __future__ import annotations

import logging
from typing import Literal

from torch import Tensor, nn

from shardsmith.errors import UsageError
from shardsmith.ground.ranks import Ranks
from shardsmith.load.live_weights import model_state_dict
from shardsmith.sharding.local_boxes import local
from shardsmith.tensors.fqn import clean_fqn
from shardsmith.tensors.tensors import TensorSpec

from .names import TorchTitanNames

log = logging.getLogger(__name__)

ROUTER_BIAS_FILE = "router_bias.json"
"""Name of a bias in TorchTitan -> its values, an expert each. No loader takes it for weights."""
_NAME = "expert_bias"


class RouterBias:
    """The biases that no export of a model holds.

    Attributes:
        lost: Their names, on all ranks.
    """

    def __init__(self, names: TorchTitanNames, model: nn.Module, ranks: Ranks) -> None:
        """All ranks; communicates."""
        self._model, self._ranks = model, ranks
        self.lost: list[str] = ranks.agree(
            "looking at routers",
            lambda: self._find_lost(names),
            lambda parts: list(dict.fromkeys(name for part in parts for name in part)),
        )

    def announce(self, what_to_do: Literal["leave_out", "file", "refuse"]) -> None:
        """Say what it costs that they are not among the weights. Raises UsageError where that is refused."""
        if not self.lost:
            return
        what = (
            f"{self.lost[0]} and {len(self.lost) - 1} more choose experts in training, and the files of the exported "
            "model have no place for them: as soon as they are not zero, an export sends some tokens to other experts "
            "than the run does"
        )
        if what_to_do == "refuse":
            raise UsageError(
                f"checkpoint_hooks: {what}. Set load_balance_coeff=None, or export_router_bias to leave_out or file"
            )
        if self._ranks.is_leader:
            where = f"{ROUTER_BIAS_FILE} holds them" if what_to_do == "file" else "export_router_bias=file keeps them"
            log.warning("%s. load_balance_coeff=None avoids it; export_router_bias=refuse stops; %s", what, where)

    def values(self) -> dict[str, list[float]]:
        """Their values now, by name, of all stages. All ranks, main thread; communicates."""
        found: dict[str, list[float]] = self._ranks.agree(
            "collecting the bias of routers",
            lambda: {name: local(value).tolist() for name, value in self._buffers().items() if name in self.lost},
            # Ranks that have the same stage say the same of it.
            lambda parts: {name: values for part in parts for name, values in part.items()},
            large=True,
        )
        return found

    def _find_lost(self, names: TorchTitanNames) -> list[str]:
        # Most models have none, and need not be translated for the question.
        if not any(_NAME in name for name in self._buffers()):
            return []
        state = model_state_dict(self._model).items()
        specs = {n: TensorSpec(n, tuple(t.shape), t.dtype) for n, t in state if isinstance(t, Tensor)}
        return [name for name in names.leaves_out(specs) if _NAME in name]

    def _buffers(self) -> dict[str, Tensor]:
        return {clean_fqn(name, self._model): buffer for name, buffer in self._model.named_buffers()}
