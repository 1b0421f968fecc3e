"""Composition of ``conf/`` and overrides by Hydra, and requests made of it."""

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
from widthopt.config.typed import Made, build_request
from widthopt.errors import InputError
from widthopt.records import WidthResult
from widthopt.request import Request
from widthopt.runs.execute import search_widths


def search(*overrides: str) -> WidthResult:
    """Better channel counts, as the command would find them, without the final training.

    ``widthopt.search("network=custom", "network.factory=my_module.my_network")``.

    Args:
        overrides: As typed behind ``widthopt``.

    Returns:
        The channel counts of the target found for the first seed, and how.

    Raises:
        InputError: Something asked for cannot be done.
    """
    with current_folder_last():  # parts of it are imported only when they are needed
        return search_widths(compose(overrides))


def compose(overrides: Sequence[str], *, config_dir: str | None = None) -> Request:
    """The request that these overrides make of ``conf/``.

    Args:
        overrides: As typed behind ``widthopt``.
        config_dir: A folder of further choices, as ``--config-dir`` names it.

    Raises:
        InputError: They do not fit it.
    """
    with _loading(overrides, config_dir) as words:
        return build_request(hydra_compose(CONFIG_NAME, overrides=words))


def compose_sweep(overrides: Sequence[str], *, config_dir: str | None = None) -> list[Request]:
    """The requests of a sweep, one for each of its points; a single one where nothing is swept.

    Args:
        overrides: As typed behind ``widthopt -m``.
        config_dir: A folder of further choices, as ``--config-dir`` names it.

    Raises:
        InputError: They do not fit ``conf/``, or the sweep has no points.
    """
    with _loading(overrides, config_dir) as words:
        loader = GlobalHydra.instance().config_loader()
        return build_requests(loader, expand_sweep(loader, words))


def compose_launcher(
    overrides: Sequence[str], *, config_dir: str | None = None
) -> tuple[dict[str, Any], str]:
    """The values of the launcher that these overrides choose, as plain data; the runs' device.

    Args:
        overrides: As typed behind ``widthopt``.
        config_dir: A folder of further choices, as ``--config-dir`` names it.

    Raises:
        InputError: They do not fit ``conf/``.
    """
    with _loading(overrides, config_dir) as words:
        composed = hydra_compose(CONFIG_NAME, overrides=words, return_hydra_config=True)
        values = OmegaConf.to_container(composed.hydra.launcher, resolve=True)
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}, str(composed.runtime.device)


@contextmanager
def _loading(overrides: Sequence[str], config_dir: str | None) -> Iterator[list[str]]:
    """Have Hydra read ``conf/``; the words to compose, and its refusals as ours."""
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
    """The requests of these points, none of them composed twice.

    What takes time in Hydra is the composition of groups, so that is done once for every
    choice of groups there is, and the single values are put into a copy.

    Args:
        loader: Hydra's.
        points: The overrides of each.
    """
    parser = OverridesParser.create(config_loader=loader)
    bases: dict[tuple[str, ...], DictConfig] = {}
    groups: dict[str, bool] = {}
    made: Made = {}
    result = []
    for words in points:
        overrides = parser.parse_overrides(list(words))
        for one in overrides:
            name = str(one.key_or_group)
            if name not in groups:
                groups[name] = bool(loader.get_group_options(name))
        whole = [one for one in overrides if groups[str(one.key_or_group)] or not _is_value(one)]
        key = tuple(str(one.input_line) for one in whole)
        if key not in bases:
            base = loader.load_configuration(CONFIG_NAME, list(key), RunMode.RUN)
            with open_dict(base):
                del base["hydra"]
            bases[key] = base
        config = copy.deepcopy(bases[key])
        values = [one for one in overrides if one not in whole]
        ConfigLoaderImpl._apply_overrides_to_config(values, config)  # noqa: SLF001 (no other way)
        result.append(build_request(config, made))
    return result


def _is_value(override: Override) -> bool:
    """Whether an override that chooses no group only changes a value."""
    key = str(override.key_or_group)
    return not (
        key.startswith("hydra")
        or "/" in key
        or override.package is not None
        or override.is_delete()
        or key == EXPERIMENT
    )
