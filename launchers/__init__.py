"""Hydra's sweeper and launchers: where the runs of a sweep are computed.

They know that a sweep consists of tasks that need one another, and nothing about what a task
does: ``conf/hydra/launcher`` names what plans a sweep and what runs one task.

The package is installed below ``hydra_plugins``, since Hydra instantiates launchers and sweepers
only from there.
"""

from hydra.core.plugins import Plugins


def register() -> None:
    """Register the sweeper and the launchers with Hydra. A second call changes nothing.

    Hydra discovers plugins by listing the folder of ``hydra_plugins``, which an editable
    installation does not have.
    """
    from hydra_plugins.widthopt_launchers.launcher import (  # noqa: PLC0415
        WidthoptInProcessLauncher,
        WidthoptLocalLauncher,
        WidthoptSlurmLauncher,
    )
    from hydra_plugins.widthopt_launchers.sweeper import WidthoptSweeper  # noqa: PLC0415

    plugins = Plugins.instance()
    for plugin in (
        WidthoptSweeper,
        WidthoptInProcessLauncher,
        WidthoptLocalLauncher,
        WidthoptSlurmLauncher,
    ):
        plugins.register(plugin)
