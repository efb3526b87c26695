"""What to do about an argument that Hydra cannot parse, a key that it cannot override, and an unknown option."""

from __future__ import annotations

import difflib
import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, get_args

from hydra.errors import OverrideParseException

from hagd.errors import ConfigError

if TYPE_CHECKING:
    from pydantic import BaseModel

    from hagd.config.base import Section

_REFUSED = re.compile(r"Could not override '(?P<key>[^']+)'")
_MISSING = re.compile(
    r"Could not find '(?P<file>[^']+)'\s+Available options in '(?P<group>[^']+)':\n(?P<options>(?:\t.*\n)+)"
)


@contextmanager
def problems_explained(schema: Callable[[], type[Section]]) -> Iterator[None]:
    """One line when the configuration cannot be composed: alone, or after Hydra's message of a key or an option.

    Args:
        schema: gives the schema; called only for a key, because it takes a second to import.
    """
    try:
        yield
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:  # before the job, which has its own message
        print("interrupted before anything was run", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except SystemExit as stop:  # Hydra exits while it handles its own exception
        cause, said = stop.__context__, str(stop.__context__ or "")
        unread = syntax_advice(cause.override) if isinstance(cause, OverrideParseException) else None
        if line := unread or key_advice(said, schema) or option_advice(said):
            print(f"error: {line}", file=sys.stderr)
        raise


def syntax_advice(override: str) -> str:
    """What to say of an argument that Hydra cannot parse."""
    key, sign, value = override.partition("=")
    if not sign:
        return f"{override}: expected key=value, found no =; remove it or give {override}=VALUE"
    return (
        f"{key}: expected a value without signs that mean something to Hydra (= , : {{ }} [ ] ( ) quotes, $), found "
        f"{value}; quote it for Hydra and for the shell: \"{key}='…'\""
    )


def option_advice(said: str) -> str | None:
    """What to say to Hydra's message `said` about a file that a group does not have; None when it is another one."""
    missing = _MISSING.search(said)
    if missing is None:
        return None
    group, options = missing["group"], missing["options"].split()
    name = missing["file"].removeprefix(f"{group}/")
    near = difflib.get_close_matches(name, options, n=1)
    fix = f"did you mean {group}={near[0]}?" if near else "choose one, or give the folder of your own by --config-dir"
    return f"{group}: expected one of {', '.join(options)}, found {name}; {fix}"


def key_advice(said: str, schema: Callable[[], type[Section]]) -> str | None:
    """What to say to Hydra's message `said` about a key; None when it is another one, or nothing is to be said."""
    refused = _REFUSED.match(said)
    if refused is None:
        return None
    from hagd.config.load import field_names
    from hagd.config.problems import nearest
    from hagd.config.run import ExtractConfig, TrainConfig

    key, known = refused["key"], field_names(schema())
    if key in known:
        return _not_chosen(key, schema())
    for entry, other in (("extract.py", ExtractConfig), ("train.py", TrainConfig)):
        if key in field_names(other):
            return f"{key}: a key of {entry} alone; run {entry} for it, or leave it out"
    near = nearest(key, known)
    return f"{key}: expected a known key; did you mean {near}?" if near else None


def _not_chosen(key: str, schema: type[Section]) -> str | None:
    """Why a key of the schema is not in a configuration: a section on its way is null, or another one."""
    from hagd.config.problems import sections_of

    sections: list[type[BaseModel]] = [schema]
    way, discriminator = "", None
    for part in key.split("."):
        holders = [section for section in sections if part in section.model_fields]
        if isinstance(discriminator, str) and len(holders) < len(sections):
            kinds = " or ".join(str(holder.model_fields[discriminator].default) for holder in holders)
            return f"{key}: needs {way}.{discriminator}={kinds}, found another; choose {way}=… with it, or leave it out"
        field = holders[0].model_fields[part]
        parent, way = way, f"{way}.{part}".lstrip(".")
        sections, discriminator = sections_of(field.annotation), field.discriminator
        if way != key and type(None) in get_args(field.annotation):
            rest = key.removeprefix(f"{way}.")
            fix = f"set it as a whole: '{way}={{{rest}: …}}'" if parent else f"choose {way}=… as well"
            return f"{key}: {way} is null; {fix}"
    return None
