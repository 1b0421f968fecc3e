"""Removes API keys and other secrets from text and data before they are written or sent."""

import os
import re
from collections.abc import Mapping
from typing import Any


HIDDEN = "(hidden)"

_SECRET_NAME = re.compile(r"api_?key|token|secret|password|credential", re.IGNORECASE)
# A key is a long sequence of letters and digits; paths, names and sentences have separators.
_SECRET_VALUE = re.compile(r"(?<![0-9A-Za-z])[0-9A-Za-z_]{40,}(?![0-9A-Za-z])")


def redact(value: Any) -> Any:
    """Return plain data without secrets.

    Entries whose names indicate a secret are removed. In strings, text that looks like a key and
    secrets from the environment are replaced.
    """
    if isinstance(value, Mapping):
        return {
            str(name): redact(entry)
            for name, entry in value.items()
            if not _SECRET_NAME.search(str(name))
        }
    if isinstance(value, list | tuple):
        return [redact(entry) for entry in value]
    if not isinstance(value, str):
        return value
    for name, secret in os.environ.items():
        if _SECRET_NAME.search(name) and len(secret) >= 8:  # noqa: PLR2004 (too short for a secret)
            value = value.replace(secret, HIDDEN)
    return _SECRET_VALUE.sub(HIDDEN, value)


def error_line(error: BaseException) -> str:
    """Return the message of an exception in one line, without secrets."""
    line: str = redact(" ".join(str(error).split()) or type(error).__name__)
    return line
