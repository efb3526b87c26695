"""`docs/config.md`, written from the schemas: `python -m hagd.config.document > docs/config.md`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from hagd.config.problems import sections_of
from hagd.config.run import ExtractConfig, TrainConfig


def document() -> str:
    """Every key of both entry points with its type, default and meaning, as Markdown."""
    lines = [
        "# Configuration",
        "",
        "Every key of `extract.py` and `train.py` (`mode` belongs to the first; `stage`, `gnn` and `export` belong to",
        "the other). Files in `conf/` set them; the command line overrides them: `python extract.py transcoder.k=64",
        "search.n_nodes=50`. Unknown keys, wrong types and values out of range are refused before anything runs.",
        "",
    ]
    both = {**ExtractConfig.model_fields, **TrainConfig.model_fields}
    top = {name: field for name, field in both.items() if not sections_of(field.annotation)}
    lines += _table("Top level", "", top)
    for name, field in TrainConfig.model_fields.items():
        for section in sections_of(field.annotation):
            lines += _section(name, section)
    return "\n".join(lines).rstrip() + "\n"


def _section(prefix: str, section: type[BaseModel]) -> Iterator[str]:
    kind = section.model_fields.get("kind") or section.model_fields.get("name")
    choice = get_args(kind.annotation) if kind is not None else ()
    title = f"`{prefix}`" + (f", `{choice[0]}`" if choice else "")
    plain = {name: field for name, field in section.model_fields.items() if not sections_of(field.annotation)}
    yield from _table(title, prefix + ".", plain, (section.__doc__ or "").strip())
    for name, field in section.model_fields.items():
        for nested in sections_of(field.annotation):
            yield from _section(f"{prefix}.{name}", nested)


def _table(title: str, prefix: str, fields: dict[str, FieldInfo], text: str = "") -> Iterator[str]:
    yield f"## {title}"
    yield ""
    if text:
        yield " ".join(text.split())
        yield ""
    yield "| key | type | default | meaning |"
    yield "| --- | --- | --- | --- |"
    for name, field in fields.items():
        default = "required" if field.is_required() else f"`{_plain(field.default)}`"
        yield f"| `{prefix}{name}` | {_type(field)} | {default} | {field.description or ''} |"
    yield ""


def _type(field: FieldInfo) -> str:
    annotation = str(field.annotation).replace("typing.", "")
    name = annotation if "[" in annotation or "|" in annotation else getattr(field.annotation, "__name__", annotation)
    bounds = [f"{sign} {value}" for sign, value in _bounds(field)]
    return f"`{name}`".replace("|", "\\|") + (f" {', '.join(bounds)}" if bounds else "")


def _bounds(field: FieldInfo) -> Iterator[tuple[str, Any]]:
    for sign, attribute in (("≥", "ge"), (">", "gt"), ("≤", "le"), ("<", "lt")):
        for constraint in field.metadata:
            if hasattr(constraint, attribute):
                yield sign, getattr(constraint, attribute)


def _plain(value: Any) -> str:
    return "null" if value is None else str(value) or '""'


if __name__ == "__main__":
    print(document(), end="")
