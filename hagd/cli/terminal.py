"""Terminals and logs of other encodings than UTF-8, as on some clusters."""

from __future__ import annotations

import io
import sys


def never_fail_to_print() -> None:
    """Print `?` for what standard output has no sign for; Python would end the job, standard error escapes it."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
