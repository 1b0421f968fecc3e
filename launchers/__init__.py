"""Where sweeps run: launchers that Hydra's ``hydra/launcher`` group chooses among.

They know that a sweep is made of units of work which need one another, and nothing about what
those do: ``conf/hydra/launcher`` names what plans a sweep and what does one unit.
"""

import sys
from importlib import import_module
from types import ModuleType

from hydra.core.plugins import Plugins


PLUGINS = "hydra_plugins.widthopt"
"""Hydra instantiates plugins by dotted name, and only below ``hydra_plugins``."""


def register() -> None:
    """Make our sweeper and launchers known to Hydra; call it before Hydra starts.

    Done again it changes nothing. Hydra finds plugins by scanning the package ``hydra_plugins``,
    which an editable installation does not fill; so the classes are put there by hand.
    """
    from launchers.launcher import (  # noqa: PLC0415
        WidthoptInProcessLauncher,
        WidthoptLocalLauncher,
        WidthoptSlurmLauncher,
    )
    from launchers.sweeper import WidthoptSweeper  # noqa: PLC0415

    parent = _module("hydra_plugins")
    ours = _module(PLUGINS)
    parent.widthopt = ours  # type: ignore[attr-defined]
    launchers = (WidthoptInProcessLauncher, WidthoptLocalLauncher, WidthoptSlurmLauncher)
    for kind in (WidthoptSweeper, *launchers):
        setattr(ours, kind.__name__, kind)
        kind.__module__ = PLUGINS
        Plugins.instance().register(kind)


def _module(name: str) -> ModuleType:
    """The module of this name, made if there is none."""
    try:
        return import_module(name)
    except ModuleNotFoundError:
        module = ModuleType(name)
        module.__path__ = []
        sys.modules[name] = module
        return module
