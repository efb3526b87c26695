"""Slips in configuration files: file and line, what was expected, what was found, and what to do."""

from __future__ import annotations

from pathlib import Path

import pytest

from hagd.config.yaml_files import unreadable, yaml_content
from hagd.errors import ConfigError


@pytest.mark.parametrize(
    ("content", "line", "found", "fix"),
    [
        (b"search:\n\tn_nodes: 5\n", 2, r"'\tn_nodes: 5' (found character '\t' that", "indent by spaces, not by tabs"),
        (b"search\n  n_nodes: 5\n", 2, "'  n_nodes: 5' (mapping values are not", "check it and the line above: a key"),
        (b"task:\nname ioi\n", 2, "'name ioi' (could not find expected ':')", "put a colon and a space between key"),
        (
            b"search:\n  n_nodes: 5\n k: 3\n",
            3,
            "' k: 3' (while parsing a block mapping that begins in line 1",
            "indent",
        ),
        (b"a: 1\ntask: 'abc\n", 2, '"task: \'abc" (found unexpected end of stream)', "close the quote"),
        (b"seed: [1,\n", 2, "the end of the file (expected the node content", "close the bracket"),
        (
            b"seed: [1, 2\ntask:\n  name: x\n",
            2,
            "'task:' (while parsing a flow sequence that begins in line 1",
            "correct",
        ),
        (b"seed: *a\n", 1, "'seed: *a' (found undefined alias 'a')", "correct it, or the line above"),
        (b"seed: 1\n# \xff\n", 2, "the byte 0xff", "save the file as UTF-8"),
        (b"seed: 1\nname: \x01\n", 2, "the control character 0x01", "remove it"),
    ],
)
def test_a_slip_is_found(tmp_path: Path, content: bytes, line: int, found: str, fix: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        yaml_content(file)
    said = str(caught.value)
    assert said.startswith(f"{file}, line {line}: expected ") and f", found {found}" in said
    assert said.partition("; ")[2].startswith(fix) and "\n" not in said


def test_a_file_that_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match="expected a configuration file, found: Is a directory; correct or replace it"
    ):
        yaml_content(tmp_path)


def test_another_problem_keeps_its_words(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("")
    assert (
        unreadable(file, ValueError("no header"))
        == f"{file}: expected a configuration file, found: no header; correct it"
    )
