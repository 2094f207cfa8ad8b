"""``-m shardsmith.integrations.torchtitan``: takes the place of ``-m torchtitan.train``, under torchrun too."""

from __future__ import annotations

import sys

from .help import help_text
from .override import HAS_OVERRIDES


def main() -> None:
    """Train. With ``--help``, list our options before TorchTitan's."""
    if "--help" in sys.argv[1:] or "-h" in sys.argv[1:]:
        print(help_text())
    if HAS_OVERRIDES:
        import torchtitan.train

        torchtitan.train.main()
    else:
        from .trainer_0_2 import train

        train(sys.argv[1:])


if __name__ == "__main__":
    main()
