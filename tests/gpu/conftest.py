"""What is marked ``gpu`` needs an accelerator: elsewhere it is deselected, and pytest says how many are."""

from __future__ import annotations

import pytest

from tests.gpu.devices import is_on_accelerator


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if is_on_accelerator():
        return
    needing = [item for item in items if item.get_closest_marker("gpu")]
    if needing:
        config.hook.pytest_deselected(items=needing)
        items[:] = [item for item in items if item not in needing]
