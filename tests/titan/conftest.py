"""What the tests with TorchTitan share."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.titan.jobs import Assets


@pytest.fixture(scope="session")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Assets:
    """Tokenizer and data set. Read only."""
    from tests.titan.jobs import Assets  # imports TorchTitan, which the process that only deals files out does not need

    return Assets(tmp_path_factory.mktemp("assets")).make()
