"""Hydra copies its store of structured configurations for every group that `--help` lists, plugins' ones included."""

from __future__ import annotations

from hydra.core.config_store import ConfigStore


def share_config_store() -> None:
    """Let copies of Hydra's repositories keep the one store; it copies what is loaded from it, so nobody changes it."""
    setattr(ConfigStore, "__deepcopy__", lambda store, memo: store)  # noqa: B010 - no attribute that types know
