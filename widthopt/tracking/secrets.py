"""Removes API keys and other secrets from whatever is written to a file, a log or a server."""

import os
import re
from collections.abc import Mapping
from typing import Any


HIDDEN = "(hidden)"

_SECRET_NAME = re.compile(r"api_?key|token|secret|password|credential", re.IGNORECASE)
# A key is a long run of letters and digits; a path, a name or a sentence has separators.
_SECRET_VALUE = re.compile(r"(?<![0-9A-Za-z])[0-9A-Za-z_]{40,}(?![0-9A-Za-z])")


def redact(value: Any) -> Any:
    """Return plain data without secrets.

    Entries with a secret's name are dropped. Text that looks like a key, or that is a secret in the
    environment, is replaced.
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
        if _SECRET_NAME.search(name) and len(secret) >= 8:  # noqa: PLR2004 (shorter is no secret)
            value = value.replace(secret, HIDDEN)
    return _SECRET_VALUE.sub(HIDDEN, value)


def error_line(error: BaseException) -> str:
    """Return the message of an error in one line without secrets."""
    line: str = redact(" ".join(str(error).split()) or type(error).__name__)
    return line
