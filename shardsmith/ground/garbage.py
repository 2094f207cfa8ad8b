"""Python's search for unreachable cycles of objects."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

_MANY = 10_000  # a search through fewer objects takes about a millisecond


@contextlib.contextmanager
def without_collection() -> Iterator[None]:
    """Make many objects, none of which is garbage: within it nothing is looked for that could be freed.

    Making 100,000 objects would have Python look through all that a training has several times. They count as old when
    it ends: as young ones they would be looked through as soon as one more object is made. Keep it short.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            # The second question walks through all frozen objects: some 20 ms where a program has frozen its imports.
            if gc.get_count()[0] > _MANY and gc.get_freeze_count() == 0:  # what the program has frozen stays so
                # `freeze` puts all objects aside, `unfreeze` takes them back as old ones.
                gc.freeze()
                gc.unfreeze()
            gc.enable()
