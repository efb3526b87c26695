"""The direction of imports, and that no configuration field is idle."""

from __future__ import annotations

import ast
import importlib
import pkgutil
from collections.abc import Iterator
from pathlib import Path

import pytest

import hagd.config
from hagd.config.base import Section

PACKAGE = Path(__file__).resolve().parents[1] / "hagd"

ORDER = (
    "errors",
    "config",
    "hub",
    "disk",
    "tasks",
    "training",
    "models",
    "activations",
    "transcoders",
    "patching",
    "attribution",
    "hierarchy",
    "search",
    "validation",
    "report",
    "artifacts",
    "tracking",
    "pipeline",
    "cli",
    "tables",
)


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def package_of(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and dotted name of every import, also inside functions and under TYPE_CHECKING."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are absolute"
            names = [node.module or ""]
            if node.module == "hagd":
                names = [f"hagd.{alias.name}" for alias in node.names]
            yield from ((node.lineno, name) for name in names)


def violations(package: str, source: str) -> list[str]:
    """Imports of `source`, a module of `package`, that go downstream."""
    found = []
    for line, name in imported(ast.parse(source)):
        parts = name.split(".")
        if parts[0] != "hagd" or len(parts) < 2 or parts[1] == package:
            continue
        if parts[1] not in ORDER or ORDER.index(parts[1]) > ORDER.index(package):
            found.append(f"{line}: {package} imports {name}")
    return found


def test_every_package_has_its_place() -> None:
    names = {package_of(file) for file in modules()} - {"__init__"}
    assert names <= set(ORDER), f"add to ORDER: {sorted(names - set(ORDER))}"


@pytest.mark.parametrize("file", modules(), ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_only_from_upstream(file: Path) -> None:
    package = package_of(file)
    if package != "__init__":
        assert violations(package, file.read_text()) == []


def test_a_downstream_import_would_be_noticed() -> None:
    assert violations("models", "def f():\n    from hagd.search.gates import train") == [
        "2: models imports hagd.search.gates"
    ]
    assert violations("models", "from hagd import search") == ["1: models imports hagd.search"]
    assert violations("search", "from hagd import models") == []


def sections() -> list[type[Section]]:
    for module in pkgutil.iter_modules(hagd.config.__path__):
        importlib.import_module(f"hagd.config.{module.name}")

    def below(cls: type[Section]) -> Iterator[type[Section]]:
        for subclass in cls.__subclasses__():
            yield subclass
            yield from below(subclass)

    return [section for section in below(Section) if section.__module__.startswith("hagd.config.")]


def own_fields(section: type[Section]) -> list[str]:
    return [name for name in section.model_fields if name in vars(section).get("__annotations__", {})]


def attributes_read() -> set[str]:
    """Every `x.name` that is read outside `hagd/config`, and every class pattern's keyword."""
    names: set[str] = set()
    for file in modules():
        if package_of(file) == "config":
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                names.add(node.attr)
            elif isinstance(node, ast.MatchClass):
                names.update(node.kwd_attrs)
    return names


def test_every_config_field_is_read() -> None:
    read = attributes_read()
    idle = {f"{section.__name__}.{name}" for section in sections() for name in own_fields(section) if name not in read}
    assert not idle, f"fields that nothing reads: {sorted(idle)}"
