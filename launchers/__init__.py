"""Where sweeps run: launchers that Hydra's ``hydra/launcher`` group chooses among."""

from hydra.core.config_store import ConfigStore


def register() -> None:
    """Make the choices of ``hydra/launcher`` known to Hydra; call it before Hydra starts.

    ``inprocess`` runs a sweep's points one after the other in this process.
    """
    ConfigStore.instance().store(
        group="hydra/launcher",
        name="inprocess",
        node={"_target_": "hydra._internal.core_plugins.basic_launcher.BasicLauncher"},
        provider="launchers",
    )
