"""The peers' own virtual environments: `python benchmarks/peers_environment.py [NAME]` creates one, once.

Their pins (transformers below 4.58, huggingface-hub below 1) exclude those of this project, so they are never
installed beside it. `peers` has those of dictionaries and graphs, `circuit-peers` auto-circuit, which needs an older
transformer-lens.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

FOLDER = Path(__file__).resolve().parent


def peers_python(name: str = "peers") -> Path:
    """The interpreter of an environment, which is made, or made again when a requirement changed.

    Raises:
        RuntimeError: pip failed; the environment is then left without its stamp, so that the next call starts over.
    """
    environment = FOLDER / f".{name}-venv"
    python = environment / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    requirements = FOLDER / f"{name}-requirements.txt"
    alone = FOLDER / f"{name}-requirements-alone.txt"  # installed without dependencies
    stamp, wanted = environment / "installed", _fingerprint(requirements, alone)
    if stamp.is_file() and stamp.read_text() == wanted:
        return python
    print(f"{name}: installing into {environment.name}, some minutes", file=sys.stderr, flush=True)
    shutil.rmtree(environment, ignore_errors=True)
    venv.create(environment, with_pip=True)
    (environment / ".gitignore").write_text("*\n")
    _pip(python, "-r", requirements)
    _pip(python, "--no-deps", "-r", alone)
    stamp.write_text(wanted)
    return python


def _fingerprint(*files: Path) -> str:
    content = b"\0".join(file.read_bytes() for file in files)
    return hashlib.sha256(content + sys.version.encode()).hexdigest()


def _pip(python: Path, *arguments: str | Path) -> None:
    command = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *arguments]
    code = subprocess.run(command, check=False).returncode
    if code:
        raise RuntimeError(
            f"{' '.join(map(str, command))}: expected exit code 0, found {code}; see pip's message above"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="?", choices=("peers", "circuit-peers"), default="peers")
    print(peers_python(parser.parse_args().name))
