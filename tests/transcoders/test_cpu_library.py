"""When and where the loops are compiled, and what happens where they cannot be."""

from __future__ import annotations

import logging
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from hagd.transcoders.sparse import cpu_library
from hagd.transcoders.sparse.cpu_library import library

ROOT = Path(__file__).resolve().parents[2]

compiler_is_there = pytest.mark.skipif(library() is None, reason="no C compiler")


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "hagd"


@compiler_is_there
def test_a_library_is_compiled_once_and_kept(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert library.__wrapped__() is not None
    (file,) = cache.iterdir()
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700
    monkeypatch.setattr(cpu_library, "_compile", lambda *_: pytest.fail("compiled again"))
    assert library.__wrapped__() is not None
    assert list(cache.iterdir()) == [file]


@compiler_is_there
def test_another_source_is_another_library(cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    library.__wrapped__()
    changed = tmp_path / "cpu_selection.c"
    changed.write_text(f'#include "{cpu_library._SOURCES[1]}"\n')
    sources = [changed if source.name == changed.name else source for source in cpu_library._SOURCES]
    monkeypatch.setattr(cpu_library, "_SOURCES", sources)
    assert library.__wrapped__() is not None
    assert len(list(cache.iterdir())) == 2


SLOW = f"{sys.executable} -c 'import time; time.sleep(9)'"


@pytest.mark.parametrize("compiler", ["false", "no-such-compiler", SLOW])
def test_without_a_compiler_a_log_says_so(
    compiler: str, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CC", compiler)
    monkeypatch.setattr(cpu_library, "_SECONDS", 0.2)
    with caplog.at_level(logging.WARNING):
        assert library.__wrapped__() is None
    assert "torch's operators" in caplog.text and "$CC or cc" in caplog.text and compiler.split()[0] in caplog.text


@compiler_is_there
@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_folder_that_cannot_be_written_is_no_obstacle(cache: Path) -> None:
    cache.mkdir(mode=0o500)
    assert library.__wrapped__() is not None
    assert list(cache.iterdir()) == []


@compiler_is_there
@pytest.mark.parametrize("what", ["a file", "no home"])
def test_there_can_be_no_place_for_a_cache(what: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    temporary = cache.parent / "temporary"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    if what == "a file":
        cache.write_text("")
    else:
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    assert library.__wrapped__() is not None
    assert list(temporary.iterdir()) == []


def test_a_library_that_cannot_be_loaded_is_left_alone(
    cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As one whose OpenMP torch has not brought."""
    monkeypatch.setattr(cpu_library, "_processor", lambda _: ("-march=native", b""))
    monkeypatch.setattr(cpu_library, "_compile", lambda _, flags, file: file.write_text("no library"))
    assert library.__wrapped__() is None
    assert "cpu-" in caplog.text


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
