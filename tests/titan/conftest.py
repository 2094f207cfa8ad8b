"""What the tests with TorchTitan share."""

from __future__ import annotations

import pytest

from tests.titan.jobs import Assets
from tests.titan.small_models import STAGED


@pytest.fixture(scope="session")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Assets:
    """Tokenizer and data set. Read only."""
    return Assets(tmp_path_factory.mktemp("assets")).make()


@pytest.fixture(scope="session")
def staged_assets(tmp_path_factory: pytest.TempPathFactory) -> Assets:
    """The same for a model with layers for several pipeline stages a rank. Read only."""
    return Assets(tmp_path_factory.mktemp("staged"), STAGED).make()
