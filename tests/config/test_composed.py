"""What the other tests take for the composition of the command line is Hydra's own."""

from __future__ import annotations

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from tests.config.composed import CONF, container


@pytest.mark.parametrize(
    "overrides",
    [
        ("search.n_nodes=3", "search=gates", "seed=5", "seed=6"),
        ("experiment=smollm2_ioi", "recipe=tokens_5m", "transcoder.k=7"),
        ("+model.extra=1", "++seed=2", "~graph.n_max", "model=llama_mini"),
    ],
)
def test_values_are_set_after_options_wherever_they_stand(overrides: tuple[str, ...]) -> None:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        expected = OmegaConf.to_container(compose("extract", overrides=list(overrides)), resolve=True)
    assert container(*overrides) == expected
