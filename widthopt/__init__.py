"""Better channel counts for a CNN at the same FLOPs, found on a cheap proxy.

The names below are the public interface. Each is imported when it is first used, so that
``import widthopt`` does not load torch.
"""

import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any, cast


if TYPE_CHECKING:
    from importlib.abc import Loader

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


class _TorchvisionFinder:
    """Import hook that declares torchvision's operators before torchvision is imported.

    Without it, torchvision cannot be imported beside a torch that its extension was not built for;
    see `widthopt.networks.torchvision_operators`. The hook acts when torchvision is imported, not
    when it is only searched for (``importlib.util.find_spec``), because it imports torch.
    """

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the spec of torchvision with a loader that declares the operators first."""
        if name != "torchvision" or self not in sys.meta_path:
            return None
        for finder in sys.meta_path[sys.meta_path.index(self) + 1 :]:
            spec = finder.find_spec(name, path, target)
            if spec is not None:
                folders = spec.submodule_search_locations
                if spec.loader is not None and folders:  # a package with code
                    spec.loader = cast("Loader", _TorchvisionLoader(spec.loader, folders))
                return spec
        return None


class _TorchvisionLoader:
    """Declares the operators, then runs torchvision's own loader."""

    def __init__(self, loader: "Loader", folders: Iterable[str]) -> None:
        self._loader, self._folders = loader, folders

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = module.__loader__ = self._loader
        shim = import_module("widthopt.networks.torchvision_operators")
        shim.declare_operators(self._folders)
        self._loader.exec_module(module)


sys.meta_path.insert(0, _TorchvisionFinder())
