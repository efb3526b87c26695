"""What is wrong with a configuration, in sentences that say key, expectation, what was found and the fix."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterator, Sequence
from typing import Any, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo

_LIKE = 0.6
_GLOBAL = ("experiment", "hparams_search", "recipe", "variant")
"""Groups of `conf/` whose files set keys of all sections."""


def sections_of(annotation: Any) -> list[type[BaseModel]]:
    """The sections that an annotation admits: itself, or every member of a union."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [section for argument in get_args(annotation) for section in sections_of(argument)]


def explain(schema: type[BaseModel], container: dict[str, Any], errors: Sequence[Any]) -> str:
    """One line a problem.

    Args:
        schema: what `container` was validated against.
        container: the plain configuration.
        errors: `ValidationError.errors()`.
    """
    fields = dict(_fields(schema, container, ""))
    lines: dict[str, str] = {}
    expected: dict[str, list[str]] = {}
    for error in errors:
        key = _key(error, fields)
        match error["type"]:
            case "extra_forbidden":
                lines[key] = _unknown(key, error["input"], fields)
            case "missing":
                lines[key] = f"{key}: expected {_what(fields[key])}, found nothing; set {key}=…"
            case "value_error":
                message = str(error["ctx"]["error"])
                lines[f"{key} {message}"] = f"{key}.{message}" if key else message
            case "union_tag_invalid" | "union_tag_not_found":
                tag = f"{key}.{fields[key].discriminator}"
                known = error["ctx"].get("expected_tags", "a name of a section")
                lines[key] = (
                    f"{tag}: expected one of {known}, found {error['ctx'].get('tag')!r}; choose {key}=… instead"
                )
            case _:  # members of a union of types are reported one by one
                expected.setdefault(key, []).append(_expectation(error))
                choices = " or ".join(dict.fromkeys(expected[key]))
                lines[key] = f"{key}: expected {choices}, found {error['input']!r}{_fix(key, fields, error)}"
    return "\n".join(lines.values())


def _fields(schema: type[BaseModel], value: Any, prefix: str) -> Iterator[tuple[str, FieldInfo]]:
    """Dotted key → field, of the sections that `value` chooses where there are several."""
    for name, field in schema.model_fields.items():
        key = prefix + name
        yield key, field
        inner = value.get(name) if isinstance(value, dict) else None
        for section in sections_of(field.annotation):
            tag = section.model_fields[field.discriminator].default if isinstance(field.discriminator, str) else None
            if tag is None or (isinstance(inner, dict) and inner.get(field.discriminator) == tag):
                yield from _fields(section, inner, f"{key}.")


def _key(error: Any, fields: dict[str, FieldInfo]) -> str:
    """Pydantic's location without the tags of unions, which are no part of the key."""
    parts = list(error["loc"])
    key = ""
    for position, part in enumerate(parts):
        dotted = f"{key}.{part}" if key else str(part)
        unknown = error["type"] == "extra_forbidden" and position == len(parts) - 1
        if isinstance(part, int):
            key += f"[{part}]"
        elif dotted in fields or unknown:
            key = dotted
    return key


def _unknown(key: str, value: Any, fields: dict[str, FieldInfo]) -> str:
    if key in _GLOBAL and isinstance(value, dict):
        return (
            f"{key}: expected a file that sets keys of other sections, found {key}={value!r}; make "
            "`# @package _global_` its first line"
        )
    if near := nearest(key, fields):
        return f"{key}: expected a known key, found {key}={value!r}; did you mean {near}?"
    parent = key.rpartition(".")[0]
    beside = [known.rpartition(".")[2] for known in fields if known.rpartition(".")[0] == parent]
    return f"{key}: expected one of the keys {', '.join(beside)}, found {key}={value!r}; remove or correct it"


def nearest(key: str, known: Collection[str]) -> str | None:
    """The known dotted key that an unknown one probably stands for: its name elsewhere, or one spelt alike."""
    section, _, name = key.rpartition(".")
    elsewhere = [each for each in known if each.rpartition(".")[2] == name]
    if elsewhere:
        return elsewhere[0]
    beside = {each.rpartition(".")[2]: each for each in known if each.rpartition(".")[0] == section}
    # A section that exists is taken to be meant: its name, alike in all its keys, says nothing about which.
    spelt, names = (name, beside) if beside else (key, {each: each for each in known})
    alike = difflib.get_close_matches(spelt, names, n=1, cutoff=_LIKE)
    return names[alike[0]] if alike else None


def _expectation(error: Any) -> str:
    limits = {"greater_than_equal": "at least", "greater_than": "more than", "less_than_equal": "at most"}
    if error["type"] in limits:
        (bound,) = error["ctx"].values()
        return f"{limits[error['type']]} {bound}"
    if error["type"] == "string_too_short":
        return "text that is not empty"
    text: str = error["msg"].removeprefix("Input should be ")
    names = {"a valid array": "a list", "an object": "a section", "a valid string": "text"}
    return names.get(text, text)


def _fix(key: str, fields: dict[str, FieldInfo], error: Any) -> str:
    field = fields.get(key.partition("[")[0])
    if field is None:
        return ""
    what = f" ({field.description})" if field.description else ""
    if error["type"] == "string_type" and isinstance(error["input"], int | float) and "[" not in key:
        return f"{what}; quote it for Hydra and for the shell, \"{key}='{_plain(error['input'])}'\""
    if field.is_required() or isinstance(field.default, BaseModel):
        return what
    return f"{what}; for example {key.partition('[')[0]}={_plain(field.default)}"


def _plain(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return f"[{','.join(map(str, value))}]" if isinstance(value, tuple) else str(value)


def _what(field: FieldInfo) -> str:
    return field.description or "a section"
