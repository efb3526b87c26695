"""When and where the loops are compiled, and what happens where they cannot be."""

from __future__ import annotations

import hashlib
import logging
import os
import stat
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from hagd.transcoders.sparse import cpu_library
from hagd.transcoders.sparse.cpu_library import library

ROOT = Path(__file__).resolve().parents[2]

compiler_is_there = pytest.mark.skipif(library() is None, reason="no C compiler")


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder for libraries that are compiled quickly."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(cpu_library, "_FLAGS", ("-O0", *cpu_library._FLAGS[1:]))
    return tmp_path / "hagd"


@compiler_is_there
def test_a_library_is_compiled_once_and_kept(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert library.__wrapped__() is not None
    (file,) = cache.iterdir()
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700
    monkeypatch.setattr(cpu_library, "_compiled", lambda *_: pytest.fail("compiled again"))
    assert library.__wrapped__() is not None
    assert list(cache.iterdir()) == [file]


@compiler_is_there
@pytest.mark.parametrize("left", [0, 100, 12_000])
def test_a_damaged_library_is_compiled_again(left: int, cache: Path) -> None:
    """Loaded as it is it would end the process without a message."""
    library.__wrapped__()
    (file,) = cache.iterdir()
    whole = file.read_bytes()
    cpu_library._keep(file, whole[:left])
    assert library.__wrapped__() is not None
    assert file.read_bytes()[-32:] != whole[:left][-32:] and cpu_library._is_whole(file)


@compiler_is_there
@pytest.mark.parametrize("other", ["source", "flag", "compiler", "processor"])
def test_what_is_made_of_something_else_is_another_library(
    other: str, cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    library.__wrapped__()
    if other == "source":
        changed = tmp_path / "cpu_selection.c"
        changed.write_text(f'#include "{cpu_library._SOURCES[1]}"\n')
        sources = [changed if source.name == changed.name else source for source in cpu_library._SOURCES]
        monkeypatch.setattr(cpu_library, "_SOURCES", sources)
    elif other == "flag":
        monkeypatch.setattr(cpu_library, "_FLAGS", (*cpu_library._FLAGS, "-O1"))
    elif other == "compiler":
        monkeypatch.setenv("CC", f"{os.environ.get('CC', 'cc')} -O0")
    else:
        flag, described = cpu_library._processor(["cc"])
        monkeypatch.setattr(cpu_library, "_processor", lambda _: (flag, described + b"#define __ANOTHER__ 1"))
    assert library.__wrapped__() is not None
    assert len(list(cache.iterdir())) == 2


SLOW = f"{sys.executable} -c 'import time; time.sleep(9)'"


@pytest.mark.parametrize("compiler", ["false", "no-such-compiler", SLOW, 'gcc "x'])
def test_without_a_compiler_a_log_says_so(
    compiler: str, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CC", compiler)
    monkeypatch.setattr(cpu_library, "_SECONDS", 0.2)
    with caplog.at_level(logging.WARNING):
        assert library.__wrapped__() is None
    assert "torch's operators" in caplog.text
    assert ("$CC or cc" in caplog.text and compiler.split()[0] in caplog.text) or "quotation" in caplog.text


@compiler_is_there
@pytest.mark.parametrize("what", ["a file", "no home", "others write there"])
def test_there_can_be_no_place_for_a_cache(what: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    temporary = cache.parent / "temporary"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    if what == "a file":
        cache.write_text("")
    elif what == "no home":
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    else:
        cache.mkdir()
        cache.chmod(0o777)
    assert library.__wrapped__() is not None
    assert list(temporary.iterdir()) == []
    assert not cache.is_dir() or list(cache.iterdir()) == []


def test_a_library_that_cannot_be_loaded_is_left_alone(
    cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As one whose OpenMP torch has not brought."""
    monkeypatch.setattr(cpu_library, "_processor", lambda _: ("-march=native", b""))
    monkeypatch.setattr(cpu_library, "_compiled", lambda *_: b"no library" + hashlib.sha256(b"no library").digest())
    assert library.__wrapped__() is None
    assert "cpu" in caplog.text and "$CC" not in caplog.text


def test_a_function_gets_the_threads_of_torch_and_what_is_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    passed: list[object] = []
    loops = SimpleNamespace(sums=lambda *given: passed.extend(given) or 1, fails=lambda *_: 0)
    monkeypatch.setattr(cpu_library, "library", lambda: loops)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 5)
    there = torch.zeros(3)
    cpu_library.call("sums", there, np.int64(7), 0.5)
    assert [each.value for each in passed] == [5, there.data_ptr(), 7, 0.5]
    with pytest.raises(MemoryError, match="fails"):
        cpu_library.call("fails")
    with pytest.raises(AssertionError):
        cpu_library.call("sums", torch.zeros(3, dtype=torch.float64))


@compiler_is_there
def test_threads_are_those_that_torch_has() -> None:
    """A second OpenMP would have threads of its own."""
    code = """
import torch
from hagd.transcoders.sparse.cpu_library import library
assert library() is not None
maps = open("/proc/self/maps").read().split()
print({file for file in maps if "gomp" in file or "iomp" in file or "libomp" in file})
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(".so") == 1
