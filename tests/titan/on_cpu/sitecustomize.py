"""Python imports this at its start when its folder is on PYTHONPATH: the workers of torchrun become CPU ranks by it."""

import os

if "LOCAL_RANK" in os.environ:
    import tests.titan.cpu  # noqa: F401
