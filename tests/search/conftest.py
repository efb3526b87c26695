from __future__ import annotations

import pytest

from tests.search.trained import Trained, train


@pytest.fixture(scope="session")
def trained() -> Trained:
    return train()
