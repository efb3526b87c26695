from __future__ import annotations

from pathlib import Path

import pytest

from hagd.errors import TaskError
from hagd.tasks.data_files import read_json, read_records


def test_lines_arrays_and_patterns(tmp_path: Path) -> None:
    (tmp_path / "b.jsonl").write_text('{"x": 2}\n\n{"x": 3}\n', encoding="utf-8")
    (tmp_path / "a.jsonl").write_text('[{"x": 1}]', encoding="utf-8")
    assert read_records(str(tmp_path / "*.jsonl"), {"x": int}) == [{"x": 1}, {"x": 2}, {"x": 3}]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"x": 1}\n{"y": 1}\n', r"row 2 lacks x; expected the columns x"),
        ('{"x": 1}\nno json\n', r"line 2 is no JSON"),
        ("[1]", r"row 1 lacks x"),
        ("[1", r"expected JSON"),
        ('{"x": "1"}', r"row 1 has x='1'; expected a whole number"),
        ('{"x": null}', r"row 1 has x=None; expected a whole number"),
    ],
)
def test_bad_content_names_the_line(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(TaskError, match=rf"task\.data_files=.*bad\.jsonl: {message}"):
        read_records(str(path), {"x": int})


def test_another_format_is_named(tmp_path: Path) -> None:
    path = tmp_path / "part-0.parquet"
    path.write_bytes(b"PAR1\x15\x04\xff\xfe")
    for read in (lambda: read_records(str(path), {"x": int}), lambda: read_json(path)):
        with pytest.raises(TaskError, match=r"part-0\.parquet: expected JSON.*, found no UTF-8 text; convert"):
            read()


def test_a_file_in_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.jsonl").write_text('{"x": 1}', encoding="utf-8")
    assert read_records("~/a.jsonl", {"x": int}) == [{"x": 1}]


def test_missing_file() -> None:
    with pytest.raises(TaskError, match=r"task\.data_files=nowhere/x\.jsonl: no such file"):
        read_records("nowhere/x.jsonl", {"x": int})
