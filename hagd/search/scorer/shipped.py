"""Scorers that come with HAGD: `python train.py stage=gnn search.n_nodes=200`, and the same with `gnn.edges=true`."""

from __future__ import annotations

from pathlib import Path

SHIPPED = {name: Path(__file__).with_name("checkpoints") / name for name in ("edgeless", "edges")}
"""Name → folder: without and with message passing over the graph."""
