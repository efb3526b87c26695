from __future__ import annotations

import pytest
from torch import Tensor

from hagd.models.language_model import LanguageModel
from tests.activations.collected import LENGTH, batches, collected
from tests.builders import random_model


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return random_model(length=LENGTH)


@pytest.fixture(scope="module")
def expected(lm: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Tensor, Tensor]]:
    return batches(collected(lm, tmp_path_factory.mktemp("memory")))
