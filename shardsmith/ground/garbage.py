"""Python's search for unreachable cycles of objects."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def without_collection() -> Iterator[None]:
    """Make many objects, none of which is garbage: within it nothing is looked for that could be freed.

    Making 100,000 objects would have Python look through all that a training has several times. Keep it short.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
