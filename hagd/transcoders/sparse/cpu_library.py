"""Loops in C for a CPU, compiled on their first use, as Triton does it for GPUs.

torch has no operator that does as much with what it has read: the cache, not arithmetic, is what these sums wait for.
GCC compiles them, `$CC` or `cc`, in a second; without it, or where torch has brought another OpenMP than GCC's, torch's
operators run instead. A library is kept in `~/.cache/hagd` (or `$XDG_CACHE_HOME/hagd`), if the user alone can write
there, under a name of everything that makes it: the sources, the compiler, its flags, and what it says of the
processor. It ends with a checksum of itself; one that is damaged is compiled again.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import operator
import os
import shlex
import subprocess
import tempfile
from contextlib import suppress
from functools import cache
from pathlib import Path

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

_DTYPES = (torch.float32, torch.bfloat16, torch.int64, torch.uint8)
"""Of tensors that the loops take; each function only some of them."""


@cache
def library() -> ctypes.CDLL | None:
    """The compiled loops; None where they cannot be compiled or loaded, which a log says once."""
    try:
        compiler = shlex.split(os.environ.get("CC", "")) or ["cc"]
        processor, described = _processor(compiler)
        flags = [*_FLAGS, processor]
        made_of = [described, *(word.encode() for word in (*compiler, *flags))]
        made_of += [source.read_bytes() for source in _SOURCES]
        name = hashlib.sha256(b"\0".join(made_of)).hexdigest()[:24]
        folder = _folder()
        kept = None if folder is None else folder / f"cpu-{name}.so"
        if kept is None or not _is_whole(kept):
            content = _compiled(compiler, flags)
            if kept is None or not _keep(kept, content):
                return _ready(_loaded_from_elsewhere(content))
        try:
            return _ready(ctypes.CDLL(str(kept)))
        except OSError:  # of a file system that no code is run from
            return _ready(_loaded_from_elsewhere(kept.read_bytes()))
    except (OSError, ValueError, subprocess.SubprocessError) as error:
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
        raise MemoryError(f"no memory is left for a dictionary's {name.replace('_', ' ')}")


def _passed(argument: Tensor | float) -> ctypes.c_void_p | ctypes.c_int64 | ctypes.c_float:
    if isinstance(argument, Tensor):
        assert argument.device.type == "cpu" and argument.dtype in _DTYPES
        return ctypes.c_void_p(argument.data_ptr())
    return ctypes.c_float(argument) if isinstance(argument, float) else ctypes.c_int64(operator.index(argument))


def _ready(loaded: ctypes.CDLL) -> ctypes.CDLL:
    for function in _FUNCTIONS:
        getattr(loaded, function).restype = ctypes.c_int64
    return loaded


def _processor(compiler: list[str]) -> tuple[str, bytes]:
    """The flag that asks for this processor's instructions, and all that the compiler then knows of it and itself."""
    for flag in ("-march=native", "-mcpu=native"):
        command = [*compiler, flag, "-dM", "-E", "-xc", os.devnull]
        done = subprocess.run(command, capture_output=True, timeout=_SECONDS)
        if done.returncode == 0:
            return flag, done.stdout
    raise subprocess.CalledProcessError(done.returncode, done.args, stderr=done.stderr)


def _folder() -> Path | None:
    """Where libraries are kept, if there is such a place and nobody else writes there: what is there is run."""
    try:
        named = Path(os.environ.get("XDG_CACHE_HOME", ""))
        root = (named if named.is_absolute() else Path.home() / ".cache") / "hagd"
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = root.stat()
    except (OSError, RuntimeError):  # a user may have no home
        return None
    return root if status.st_uid == os.geteuid() and not status.st_mode & 0o022 else None


def _compiled(compiler: list[str], flags: list[str]) -> bytes:
    """A library and its checksum. No OpenMP is linked: torch has loaded one, whose threads wait for work on the cores
    that those of another would need."""
    with tempfile.TemporaryDirectory(prefix="hagd-") as folder:
        objects = []
        for source in _SOURCES:
            if source.suffix == ".c":
                objects.append(f"{folder}/{source.stem}.o")
                _run([*compiler, *flags, "-c", str(source), "-o", objects[-1]])
        _run([*compiler, "-shared", *objects, "-o", f"{folder}/cpu.so"])
        content = Path(folder, "cpu.so").read_bytes()
    return content + hashlib.sha256(content).digest()


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True, timeout=_SECONDS)


def _is_whole(file: Path) -> bool:
    """Whether a library is there and ends with its checksum."""
    try:
        content = file.read_bytes()
    except OSError:
        return False
    size = hashlib.sha256().digest_size
    return content[-size:] == hashlib.sha256(content[:-size]).digest()


def _keep(file: Path, content: bytes) -> bool:
    """Whether it is there now: under another name first, since other processes may do the same."""
    with suppress(OSError):
        written = file.with_suffix(f".{os.getpid()}")
        written.write_bytes(content)
        written.replace(file)
        return True
    return False


def _loaded_from_elsewhere(content: bytes) -> ctypes.CDLL:
    with tempfile.TemporaryDirectory(prefix="hagd-") as folder:
        file = Path(folder, "cpu.so")
        file.write_bytes(content)
        return ctypes.CDLL(str(file))


def _reason(error: OSError | ValueError | subprocess.SubprocessError) -> str:
    """What went wrong, in a line."""
    said = getattr(error, "stderr", None) or b""
    first = next(iter(said.decode(errors="replace").splitlines()), "")
    hint = (
        " (GCC is looked for as $CC or cc)" if isinstance(error, FileNotFoundError | subprocess.SubprocessError) else ""
    )
    return f"{error} {first}".strip() + hint
