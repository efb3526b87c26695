from __future__ import annotations

import copy

from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf, open_dict

from hagd.cli.shared_store import share_config_store


def test_the_one_store_is_never_changed_by_what_is_loaded_from_it() -> None:
    share_config_store()
    store = ConfigStore.instance()
    assert copy.deepcopy(store) is store
    before = OmegaConf.to_container(store.load("hydra/launcher/basic.yaml").node)
    with open_dict(store.load("hydra/launcher/basic.yaml").node) as loaded:
        loaded["added"] = 1
    assert OmegaConf.to_container(store.load("hydra/launcher/basic.yaml").node) == before
