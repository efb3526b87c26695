"""Commands where text is not UTF-8."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hagd.cli.terminal import never_fail_to_print

WRITE = """
import sys
from pathlib import Path
from hagd.cli.job import _write_error
from hagd.cli.sweep_jobs import Job, _first_line
from hagd.cli.sweep_summary import write_summary
folder = Path(sys.argv[1])
_write_error(folder, "m = 2\\u00b9\\u2074")
assert _first_line(folder / "error.txt") == "m = 2\\u00b9\\u2074"
write_summary(folder, [Job(str(folder), ("seed=1",), "failed", {}, "m = 2\\u00b9\\u2074")])
"""


def test_signs_that_a_terminal_lacks_are_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    never_fail_to_print()
    print("φ 3", flush=True)
    assert written.getvalue() == b"? 3\n"


def test_files_are_utf_8_whatever_the_locale(tmp_path: Path) -> None:
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run(
        [sys.executable, "-c", WRITE, str(tmp_path)], env={**os.environ, **ascii_only}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "m = 2¹⁴" in (tmp_path / "summary.md").read_text(encoding="utf-8")
