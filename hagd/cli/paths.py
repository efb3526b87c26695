"""Where the configuration files are."""

from __future__ import annotations

from pathlib import Path


def conf_dir() -> Path:
    """Absolute folder of the YAML configuration: the checkout's `conf/`, else the one installed with the package."""
    package = Path(__file__).resolve().parents[1]
    checkout = package.parent
    if (checkout / "pyproject.toml").is_file() and (checkout / "conf").is_dir():
        return checkout / "conf"
    return package / "conf"
