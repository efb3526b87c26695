"""Loops in C for a CPU, compiled on their first use, as Triton does it for GPUs.

torch has no operator that does as much with what it has read: the cache, not arithmetic, is what these sums wait for.
GCC compiles them, `$CC` or `cc`, in a second; without it, or where torch has brought another OpenMP than GCC's, torch's
operators run instead. A library is kept in `~/.cache/hagd` (or `$XDG_CACHE_HOME/hagd`) under a name of everything that
makes it: the sources, the flags, the compiler, and what it says of the processor.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import shlex
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger(__name__)

_SOURCES = [Path(__file__).with_name(name) for name in ("cpu_products.c", "cpu_selection.c", "cpu_top_of_rows.h")]

_FUNCTIONS = (
    "row_dots",
    "segment_sums",
    "segment_errors",
    "long_segment_sums",
    "value_sums",
    "order_pairs",
    "top_of_rows_bfloat16",
    "top_of_rows_float32",
    "top_of_segments",
    "possible_top",
)

_FLAGS = ("-O3", "-std=gnu11", "-fPIC", "-fopenmp")

_SECONDS = 120
"""For the compiler, which takes one or two."""


@cache
def library() -> ctypes.CDLL | None:
    """The compiled loops; None where they cannot be compiled, which a log says once."""
    compiler = shlex.split(os.environ.get("CC") or "cc")
    try:
        processor, described = _processor(compiler)
        made_of = [" ".join(_FLAGS).encode(), described, *(source.read_bytes() for source in _SOURCES)]
        name = hashlib.sha256(b"\0".join(made_of)).hexdigest()[:24]
        with _folder() as folder:
            file = folder / f"cpu-{name}.so"
            if not file.exists():
                _compile(compiler, [*_FLAGS, processor], file)
            loaded = ctypes.CDLL(str(file))
        for function in _FUNCTIONS:
            getattr(loaded, function).restype = ctypes.c_int64
        return loaded
    except (OSError, subprocess.SubprocessError) as error:
        log.warning("Dictionaries train with torch's operators, which takes longer: %s", _reason(error))
        return None


def call(name: str, *arguments: Tensor | float) -> None:
    """A function of the library, which there has to be, with as many threads as torch has.

    Args:
        name: of a function that takes their number first, and gives 0 where memory is missing.
        arguments: tensors, of which it gets where their numbers are, and numbers: an int64 or a float.

    Raises:
        MemoryError: it had none.
    """
    loaded = library()
    assert loaded is not None
    if not getattr(loaded, name)(*map(_passed, (torch.get_num_threads(), *arguments))):
        raise MemoryError("no memory is left for the sums of a dictionary")


def _passed(argument: Tensor | float) -> ctypes.c_void_p | ctypes.c_int64 | ctypes.c_float:
    if isinstance(argument, Tensor):
        return ctypes.c_void_p(argument.data_ptr())
    return ctypes.c_int64(argument) if isinstance(argument, int) else ctypes.c_float(argument)


def _processor(compiler: list[str]) -> tuple[str, bytes]:
    """The flag that asks for this processor's instructions, and all that the compiler then knows of it and itself."""
    for flag in ("-march=native", "-mcpu=native"):
        done = subprocess.run([*compiler, flag, "-dM", "-E", "-xc", os.devnull], capture_output=True, timeout=_SECONDS)
        if done.returncode == 0:
            return flag, done.stdout
    raise subprocess.CalledProcessError(done.returncode, done.args, stderr=done.stderr)


@contextmanager
def _folder() -> Iterator[Path]:
    """Where libraries are kept: the user's cache, or where that cannot be written a folder for the time being."""
    try:
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hagd"
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=root):
            pass
    except (OSError, RuntimeError):  # a user may have no home
        with tempfile.TemporaryDirectory(prefix="hagd-") as folder:
            yield Path(folder)
    else:
        yield root


def _compile(compiler: list[str], flags: list[str], file: Path) -> None:
    """In a folder of its own first, since other processes may do the same. No OpenMP is linked: torch has loaded one,
    whose threads wait for work on the cores that those of another would need."""
    sources = [str(source) for source in _SOURCES if source.suffix == ".c"]
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        made = Path(folder) / file.name
        options: dict[str, Any] = {"check": True, "capture_output": True, "timeout": _SECONDS, "cwd": folder}
        subprocess.run([*compiler, *flags, "-c", *sources], **options)
        objects = [str(each) for each in Path(folder).glob("*.o")]
        subprocess.run([*compiler, "-shared", *objects, "-o", str(made)], **options)
        made.replace(file)


def _reason(error: OSError | subprocess.SubprocessError) -> str:
    """What went wrong, in a line."""
    said = getattr(error, "stderr", None) or b""
    first = next(iter(said.decode(errors="replace").splitlines()), "")
    return f"{error} {first}".strip() + " (GCC is looked for as $CC or cc)"
