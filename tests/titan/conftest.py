"""What the tests with TorchTitan share."""

from __future__ import annotations

import pytest

from tests.titan.jobs import Assets


@pytest.fixture(scope="session")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Assets:
    """Tokenizer and data set. Read only."""
    return Assets(tmp_path_factory.mktemp("assets")).make()
