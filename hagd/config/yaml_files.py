"""What is wrong with a configuration file that cannot be read: file and line, expectation, what was found, the fix."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from yaml.reader import ReaderError

from hagd.errors import ConfigError

UNREADABLE = (yaml.YAMLError, ValueError, OSError)
"""Errors that reading a file can end in; of the second kind are wrong encodings and, in Hydra, wrong headers."""

_FIXES = {
    r"'\t'": "indent by spaces, not by tabs",
    "mapping values are not allowed": "check it and the line above: a key ends in one colon, keys of a section are "
    "indented alike, text with a colon needs quotes",
    "expected ':'": "put a colon and a space between key and value",
    "duplicate key": "keep one of them",
    "<block end>": "indent it as the lines beside it",
    "end of stream": "close the quote",
    "<stream end>": "close the bracket",
}
"""Part of the parser's message → fix."""

_BEGUN_EARLIER = ("expected ':'", "end of stream")
"""Messages at whose position nothing is wrong: the slip is where the parser began."""


def yaml_content(file: Path) -> Any:
    """The content of one YAML file.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        return yaml.safe_load(file.read_text(encoding="utf-8"))
    except UNREADABLE as error:
        raise ConfigError(unreadable(file, error)) from None


def no_keys(file: Path, content: Any) -> str:
    """What to say of a file whose `content` should be keys with values and is not."""
    if isinstance(content, str) or not isinstance(content, Sequence):
        return f"{file}: expected keys with values, found {content!r}; write key: value in each line"
    return f"{file}: expected keys with values, found a list; write key: value in each line, without a dash before it"


def unreadable(file: Path, error: Exception) -> str:
    """What to say of one of `UNREADABLE`, which reading `file` ended in."""
    if isinstance(error, OSError):
        return f"{file}: expected a configuration file, found: {error.strerror or error}; correct or replace it"
    text = file.read_bytes().decode(encoding="utf-8", errors="replace")
    if isinstance(error, yaml.MarkedYAMLError):
        return _malformed(file, text.splitlines(), error)
    if isinstance(error, UnicodeDecodeError):
        line, found = _line(text, text.find("�")), f"the byte 0x{error.object[error.start]:02x}"
        return f"{file}, line {line}: expected UTF-8 text, found {found}; save the file as UTF-8"
    if isinstance(error, ReaderError):
        line, found = _line(text, error.position), f"the control character 0x{error.character:02x}"
        return f"{file}, line {line}: expected YAML, found {found}; remove it"
    return f"{file}: expected a configuration file, found: {error}; correct it"


def _malformed(file: Path, lines: list[str], error: yaml.MarkedYAMLError) -> str:
    problem = str(error.problem)
    begun, noticed = error.context_mark or error.problem_mark, error.problem_mark or error.context_mark
    assert begun is not None and noticed is not None, "the parser gives one of them"
    mark = begun if any(part in problem for part in _BEGUN_EARLIER) else noticed
    context = f"{error.context} that begins in line {begun.line + 1}: " if error.context and begun is not mark else ""
    fix = next((fix for part, fix in _FIXES.items() if part in problem), "correct it, or the line above")
    found = repr(lines[mark.line].rstrip()) if mark.line < len(lines) else "the end of the file"
    return f"{file}, line {mark.line + 1}: expected YAML, found {found} ({context}{problem}); {fix}"


def _line(text: str, position: int) -> int:
    return text.count("\n", 0, position) + 1
