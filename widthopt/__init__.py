"""Better channel counts for a CNN at the same FLOPs, found on a cheap proxy.

The names below are what a program uses; each is imported when it is first asked for, so that
``import widthopt`` does not load torch.
"""

from importlib import import_module
from typing import Any


_HOMES = {
    "InputError": "widthopt.errors",
    "WidthGraph": "widthopt.widthgraph",
    "match_macs": "widthopt.widths",
    "resize": "widthopt.surgery",
    "search": "widthopt.config",
    "trace": "widthopt.tracing",
}

__all__ = ["InputError", "WidthGraph", "match_macs", "resize", "search", "trace"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'widthopt' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
