"""From a plain container (what Hydra composed) to a validated, frozen configuration."""

from __future__ import annotations

import difflib
import json
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from hagd.config.base import Section
from hagd.errors import ConfigError

S = TypeVar("S", bound=Section)


def load_config(schema: type[S], container: dict[str, Any]) -> S:
    """Validate `container` against `schema`.

    Strict: no unknown keys, no coercion of text to numbers. Every problem is reported at once.

    Raises:
        ConfigError: one line a problem, each with key, expectation, what was found and the fix.
    """
    try:
        return schema.model_validate_json(json.dumps(container))
    except ValidationError as error:
        lines = [_explain(schema, problem) for problem in error.errors()]
        raise ConfigError("\n".join(dict.fromkeys(lines))) from None


def field_names(schema: type[BaseModel], prefix: str = "") -> dict[str, str]:
    """Dotted name → description of every field below `schema` (unions contribute all their members)."""
    names: dict[str, str] = {}
    for name, field in schema.model_fields.items():
        names[prefix + name] = field.description or ""
        for section in _sections(field.annotation):
            names |= field_names(section, f"{prefix}{name}.")
    return names


def _sections(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [section for argument in get_args(annotation) for section in _sections(argument)]


def _explain(schema: type[BaseModel], problem: Any) -> str:
    names = field_names(schema)
    key = ".".join(str(part) for part in problem["loc"] if not _is_tag(part, problem["loc"], names))
    found = problem.get("input")
    match problem["type"]:
        case "extra_forbidden":
            near = difflib.get_close_matches(key, names, n=1, cutoff=0.5)
            hint = f"; did you mean {near[0]}?" if near else "; see docs/config.md for the keys"
            return f"{key}: unknown key (value {found!r}){hint}"
        case "missing":
            return f"{key}: missing; {names.get(key, '')}; set {key}=…"
        case "value_error":
            message = str(problem["ctx"]["error"])
            return f"{key}: {message}" if key else message
        case _:
            what = names.get(key, "")
            expected = problem["msg"][0].lower() + problem["msg"][1:]
            return f"{key}: {expected}, found {found!r}" + (f" ({what})" if what else "")


def _is_tag(part: Any, loc: tuple[Any, ...], names: dict[str, str]) -> bool:
    """Pydantic puts the tag of a discriminated union into the location; it is no part of the key."""
    position = loc.index(part)
    return position == 1 and loc[0] in {"model", "task"} and f"{loc[0]}.{part}" not in names and len(loc) > 2
