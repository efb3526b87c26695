"""Extractions of the tiny model, and what they took from earlier ones."""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console

from hagd.config.run import ExtractConfig
from hagd.pipeline.extraction import run_extraction

QUIET = Console(quiet=True)

PARTS = ("task", "lm", "prompts", "transcoders", "means", "graph", "hierarchy", "search", "validation", "report")
BEFORE_SEARCH = {"task", "lm", "prompts", "transcoders", "means", "graph", "hierarchy"}


def extract(config: ExtractConfig, folder: Path) -> dict[str, float]:
    return run_extraction(config, folder, None, QUIET)


def reused(folder: Path) -> set[str]:
    stages = json.loads((folder / "manifest.json").read_text())["stages"]
    return {name for name, stage in stages.items() if stage["reused"]}
