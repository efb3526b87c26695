from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from hagd.cli.paths import conf_dir

ROOT = Path(__file__).resolve().parents[2]


def test_the_checkouts_conf_comes_first() -> None:
    assert conf_dir() == ROOT / "conf"


def test_an_installed_package_uses_its_own_conf(tmp_path: Path) -> None:
    package = tmp_path / "hagd" / "cli"
    package.mkdir(parents=True)
    shutil.copy(ROOT / "hagd" / "cli" / "paths.py", package)
    code = f"import sys; sys.path.insert(0, {str(package)!r}); import paths; print(paths.conf_dir())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == str(tmp_path.resolve() / "hagd" / "conf")
