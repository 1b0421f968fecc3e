"""Composition of ``conf/`` and overrides by Hydra, and the requests built from it."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_module
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict

import hydra_plugins.widthopt_launchers as launchers
from hydra_plugins.widthopt_launchers.sweeper import CONFIG_NAME, EXPERIMENT, expand_sweep
from widthopt import current_folder_last
from widthopt.config.messages import (
    CONFIG_MODULE,
    is_configuration_error,
    no_config_dir,
    to_input_error,
)
from widthopt.config.typed import ObjectCache, build_request
from widthopt.errors import InputError
from widthopt.records import WidthResult
from widthopt.request import Request
from widthopt.runs.execute import search_widths


def search(*overrides: str) -> WidthResult:
    """Search channel counts as the command ``widthopt`` does, without the final training.

    Example: ``widthopt.search("network=custom", "network.factory=my_module.my_network")``.

    Args:
        overrides: Overrides as typed after ``widthopt``.

    Returns:
        Channel counts of the target for the first seed, their MACs, and the cost of the search.

    Raises:
        InputError: An override is invalid, or the network cannot be searched.
    """
    with current_folder_last():  # modules are imported during the search too
        return search_widths(compose(overrides))


def compose(overrides: Sequence[str], *, config_dir: str | None = None) -> Request:
    """Compose ``conf/`` with overrides, and build the request.

    Args:
        overrides: Overrides as typed after ``widthopt``.
        config_dir: A folder with further choices, as for ``--config-dir``.

    Raises:
        InputError: An override is invalid.
    """
    with _loading(overrides, config_dir) as words:
        return build_request(hydra_compose(CONFIG_NAME, overrides=words))


def compose_sweep(overrides: Sequence[str], *, config_dir: str | None = None) -> list[Request]:
    """Build the requests of a sweep, one for each point; one request if nothing is swept.

    Args:
        overrides: Overrides as typed after ``widthopt -m``.
        config_dir: A folder with further choices, as for ``--config-dir``.

    Raises:
        InputError: An override is invalid, or the sweep has no points.
    """
    with _loading(overrides, config_dir) as words:
        loader = GlobalHydra.instance().config_loader()
        return build_requests(loader, expand_sweep(loader, words))


def compose_launcher(
    overrides: Sequence[str], *, config_dir: str | None = None
) -> tuple[dict[str, Any], str]:
    """Return the values of the chosen launcher as plain data, and ``runtime.device``.

    Args:
        overrides: Overrides as typed after ``widthopt``.
        config_dir: A folder with further choices, as for ``--config-dir``.

    Raises:
        InputError: An override is invalid.
    """
    with _loading(overrides, config_dir) as words:
        composed = hydra_compose(CONFIG_NAME, overrides=words, return_hydra_config=True)
        values = OmegaConf.to_container(composed.hydra.launcher, resolve=True)
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}, str(composed.runtime.device)


@contextmanager
def _loading(overrides: Sequence[str], config_dir: str | None) -> Iterator[list[str]]:
    """Initialise Hydra, yield the overrides to compose, and convert its errors to one line."""
    launchers.register()
    words = list(overrides)
    if config_dir is not None:
        if not Path(config_dir).is_dir():
            raise InputError(no_config_dir(config_dir))
        words.append(f"hydra.searchpath=[file://{Path(config_dir).resolve()}]")
    try:
        with initialize_config_module(CONFIG_MODULE, version_base="1.3"):
            yield words
    except Exception as error:
        if not is_configuration_error(error):
            raise
        raise to_input_error(error, words) from error


def build_requests(loader: ConfigLoader, points: Sequence[Sequence[str]]) -> list[Request]:
    """Build the requests of points.

    Composing groups is the slow part of Hydra. It is done once for each combination of choices,
    and the other values are set in a copy.

    Args:
        loader: Hydra's configuration loader.
        points: The overrides of each point.

    Raises:
        InputError: An override is invalid.
    """
    parser = OverridesParser.create(config_loader=loader)
    bases: dict[tuple[str, ...], DictConfig] = {}
    groups: dict[str, bool] = {}
    cache: ObjectCache = {}
    result = []
    for words in points:
        overrides = parser.parse_overrides(list(words))
        for override in overrides:
            name = str(override.key_or_group)
            if name not in groups:
                groups[name] = bool(loader.get_group_options(name))
        choices = [o for o in overrides if groups[str(o.key_or_group)] or not _is_value(o)]
        key = tuple(str(choice.input_line) for choice in choices)
        if key not in bases:
            base = loader.load_configuration(CONFIG_NAME, list(key), RunMode.RUN)
            with open_dict(base):
                del base["hydra"]
            bases[key] = base
        config = copy.deepcopy(bases[key])
        values = [override for override in overrides if override not in choices]
        ConfigLoaderImpl._apply_overrides_to_config(values, config)  # noqa: SLF001 (Hydra has no public function)
        result.append(build_request(config, cache))
    return result


def _is_value(override: Override) -> bool:
    """Return whether an override of no group only sets a value."""
    key = str(override.key_or_group)
    return not (
        key.startswith("hydra")
        or "/" in key
        or override.package is not None
        or override.is_delete()
        or key == EXPERIMENT
    )
