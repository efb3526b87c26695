"""The peers' own virtual environment: `python benchmarks/peers_environment.py` creates it, once.

Their pins (transformers below 4.58, huggingface-hub below 1) exclude those of this project, so they are never
installed beside it.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
ENVIRONMENT = FOLDER / ".peers-venv"
PYTHON = ENVIRONMENT / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
REQUIREMENTS = FOLDER / "peers-requirements.txt"
WITHOUT_DEPENDENCIES = FOLDER / "peers-requirements-alone.txt"
_STAMP = ENVIRONMENT / "installed"


def peers_python() -> Path:
    """The environment's interpreter; the environment is made, or made again when a requirement changed.

    Raises:
        RuntimeError: pip failed; the environment is then left without its stamp, so that the next call starts over.
    """
    wanted = _fingerprint()
    if _STAMP.is_file() and _STAMP.read_text() == wanted:
        return PYTHON
    print(f"peers: installing into {ENVIRONMENT.name}, 2.2 GB, some minutes", file=sys.stderr, flush=True)
    shutil.rmtree(ENVIRONMENT, ignore_errors=True)
    venv.create(ENVIRONMENT, with_pip=True)
    (ENVIRONMENT / ".gitignore").write_text("*\n")
    _pip("-r", REQUIREMENTS)
    _pip("--no-deps", "-r", WITHOUT_DEPENDENCIES)
    _STAMP.write_text(wanted)
    return PYTHON


def _fingerprint() -> str:
    content = b"\0".join(file.read_bytes() for file in (REQUIREMENTS, WITHOUT_DEPENDENCIES))
    return hashlib.sha256(content + sys.version.encode()).hexdigest()


def _pip(*arguments: str | Path) -> None:
    command = [PYTHON, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *arguments]
    code = subprocess.run(command, check=False).returncode
    if code:
        raise RuntimeError(
            f"{' '.join(map(str, command))}: expected exit code 0, found {code}; see pip's message above"
        )


if __name__ == "__main__":
    print(peers_python())
