"""The wheel has every package and the configuration, and works outside the checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def test_pyproject_names_every_package() -> None:
    named = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    found = {".".join(file.parent.relative_to(ROOT).parts) for file in (ROOT / "hagd").rglob("*.py")}
    assert named == found | {"hagd.conf"}


def copy_of_source(folder: Path) -> Path:
    """What a build reads; building in the checkout would leave a `build/` whose old files enter the next wheel."""
    for name in ("hagd", "conf"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ROOT.glob("*"):
        if file.is_file():
            shutil.copy(file, folder)
    return folder


@pytest.mark.slow
def test_wheel_works_in_an_empty_folder(tmp_path: Path) -> None:
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    source = copy_of_source(tmp_path / "source")
    subprocess.run([*pip, "wheel", "--no-deps", "-q", "-w", str(tmp_path / "dist"), str(source)], check=True)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    packed = set(zipfile.ZipFile(wheel).namelist())
    code = {str(file.relative_to(source)) for file in (source / "hagd").rglob("*") if file.is_file()}
    configs = {f"hagd/{file.relative_to(source)}" for file in (source / "conf").rglob("*.yaml")}
    assert configs and sorted((code | configs) - packed) == []

    site, empty = tmp_path / "site", tmp_path / "empty"
    empty.mkdir()
    subprocess.run([*pip, "install", "--no-deps", "-q", "--target", str(site), str(wheel)], check=True)
    done = subprocess.run(
        [sys.executable, "-m", "hagd.cli.extract", "--cfg", "job"],
        cwd=empty,
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "transcoder:" in done.stdout and "seed:" in done.stdout
    assert list(empty.iterdir()) == []
