"""Whether the model and data hub can be reached, asked before its client starts to retry for half a minute."""

from __future__ import annotations

import socket
from urllib.parse import urlsplit
from urllib.request import getproxies

TIMEOUT = 5.0
"""Seconds for one connection."""


def hub_problem() -> str | None:
    """Why nothing can be downloaded now, in words, or None if it is worth a try."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    address = urlsplit(constants.ENDPOINT)
    if address.scheme in getproxies():
        return None  # only the proxy can tell
    host, port = address.hostname or "", address.port or (443 if address.scheme == "https" else 80)
    try:
        socket.create_connection((host, port), TIMEOUT).close()
    except OSError as error:
        return f"{host} cannot be reached ({error.strerror or error})"
    return None
