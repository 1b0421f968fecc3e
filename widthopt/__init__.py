"""Better channel counts for a CNN at the same FLOPs, found on a cheap proxy.

The names below are the public interface. Each is imported when it is first used, so that
``import widthopt`` does not load torch.
"""

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
        return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
