"""Content addresses of stage results."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any


def canonical_json(value: Any) -> str:
    """One text for one value: sorted keys, no spaces, ASCII, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def stage_key(stage: str, version: int, config: Mapping[str, Any], parents: Mapping[str, str], seed: int) -> str:
    """Address of a stage's result: everything that decides it, hashed.

    Args:
        stage: name of the stage.
        version: raised by hand whenever the stage's code gives other results.
        config: the resolved configuration that the stage reads (a plain container).
        parents: stage name → key of every result that the stage reads.
        seed: seed of the stage's random choices.

    Returns:
        16 hexadecimal digits of SHA-256.
    """
    address = {
        "stage": stage,
        "version": version,
        "config": dict(config),
        "parents": dict(parents),
        "seed": seed,
    }
    return hashlib.sha256(canonical_json(address).encode()).hexdigest()[:16]
