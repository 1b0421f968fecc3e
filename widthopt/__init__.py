"""Better channel counts for a CNN at the same FLOPs, found on a cheap proxy.

The names below are the public interface. Each is imported when it is first used, so that
``import widthopt`` does not load torch.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from widthopt.config.compose import search
    from widthopt.errors import InputError
    from widthopt.networks.resize import resize
    from widthopt.tracing import trace
    from widthopt.widthgraph import WidthGraph
    from widthopt.widths import match_macs

__all__ = ["InputError", "WidthGraph", "match_macs", "resize", "search", "trace"]

_HOMES = {
    "InputError": "widthopt.errors",
    "WidthGraph": "widthopt.widthgraph",
    "match_macs": "widthopt.widths",
    "resize": "widthopt.networks.resize",
    "search": "widthopt.config.compose",
    "trace": "widthopt.tracing",
}

if not TYPE_CHECKING:  # a type checker reads the imports above, and reports unknown names

    def __getattr__(name: str) -> Any:
        if name not in _HOMES:
            raise AttributeError(f"module 'widthopt' has no attribute {name!r}")
        with current_folder_last():
            return getattr(import_module(_HOMES[name]), name)


@contextmanager
def current_folder_last() -> Iterator[None]:
    """Search the current folder last for modules.

    Python searches the folder of a script, or the current one, first. There a user's ``random.py``
    or ``numpy.py`` would be imported in place of the real one.
    """
    if not sys.path or sys.path[0] not in ("", os.getcwd()):  # noqa: PTH109 (as Python sets it)
        yield
        return
    current = sys.path.pop(0)
    sys.path.append(current)
    try:
        yield
    finally:
        sys.path.remove(current)
        sys.path.insert(0, current)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
