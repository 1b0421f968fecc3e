"""What must reach no file, log or server: keys, by their names and by what they look like."""

import os
import re
from collections.abc import Mapping
from typing import Any


HIDDEN = "(hidden)"

_NAMED = re.compile(r"api_?key|token|secret|password|credential", re.IGNORECASE)
# Letters and digits without a break, as keys are; a path, a name or a sentence has breaks.
_LIKE_A_KEY = re.compile(r"(?<![0-9A-Za-z])[0-9A-Za-z_]{40,}(?![0-9A-Za-z])")


def hidden(value: Any) -> Any:
    """Plain data without secrets: what is called like one goes, what looks like one is replaced.

    Args:
        value: Nested dictionaries, lists, tuples, texts and numbers.
    """
    if isinstance(value, Mapping):
        return {
            str(name): hidden(one) for name, one in value.items() if not _NAMED.search(str(name))
        }
    if isinstance(value, list | tuple):
        return [hidden(one) for one in value]
    return _hidden_text(value) if isinstance(value, str) else value


def _hidden_text(text: str) -> str:
    for name, secret in os.environ.items():
        if _NAMED.search(name) and len(secret) >= 8:  # noqa: PLR2004 (shorter is no secret)
            text = text.replace(secret, HIDDEN)
    return _LIKE_A_KEY.sub(HIDDEN, text)
