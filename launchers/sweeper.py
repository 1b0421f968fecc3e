"""Hydra's sweeper: expands a command line into the points of a sweep."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Override
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, RunMode, TaskFunction
from omegaconf import DictConfig, OmegaConf

from widthopt.errors import InputError


CONFIG_NAME = "config"
EXPERIMENT = "experiment"


def check_once(overrides: Sequence[str]) -> None:
    """Check that no key has two values.

    Args:
        overrides: The arguments as typed; flags are skipped.

    Raises:
        InputError: Two overrides contradict each other.
    """
    values: dict[str, str] = {}
    for word in overrides:
        for key, value in _assignments(word):
            if values.setdefault(key, value) != value:
                raise InputError(
                    f"{key} is {values[key]} and {value}, but it has one value in one command; "
                    "leave one of them out, or sweep over both with -m and a comma"
                )


def _assignments(word: str) -> Iterator[tuple[str, str]]:
    """Yield each key that an override sets, and its value as text; keys inside mappings too."""
    key, equals, text = word.partition("=")
    if not equals or key.startswith("-"):
        return
    key = key.lstrip("+")
    mappings: list[Any] = []
    if "{" in text:
        with suppress(HydraException):  # Hydra reports what it cannot parse
            value = OverridesParser.create().parse_override(word).value()
            mappings = list(value.list) if isinstance(value, ChoiceSweep) else [value]
    if not mappings or not all(isinstance(mapping, dict) for mapping in mappings):
        yield key, text
        return
    nested: dict[str, list[str]] = {}
    for mapping in mappings:
        for name, value in _leaves(mapping, key):
            nested.setdefault(name, []).append(value)
    for name, values in nested.items():
        yield name, ",".join(values)


def _values(config: DictConfig, group: str) -> Iterator[tuple[str, str]]:
    """Yield each key of a group in a configuration, and its value as text."""
    mapping = OmegaConf.to_container(config[group])
    if isinstance(mapping, dict):
        yield from _leaves(mapping, group)


def _leaves(mapping: Mapping[Any, Any], key: str) -> Iterator[tuple[str, str]]:
    """Yield each key of a nested mapping, and its value as text."""
    for name, value in mapping.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{key}.{name}")
        else:
            yield f"{key}.{name}", str(value)


def expand_sweep(loader: ConfigLoader, words: Sequence[str]) -> list[list[str]]:
    """Return the overrides of each point of a sweep.

    An experiment's own sweep (``hydra.sweeper.params``) is used, except for keys that the command
    line sets. Several experiments are swept one after another.

    Args:
        loader: Hydra's configuration loader.
        words: The overrides as typed, without flags.

    Raises:
        InputError: The sweep has no points.
    """
    parser = OverridesParser.create(config_loader=loader)
    fixed = [word for word in words if word.lstrip("+~").startswith(("hydra.", "hydra/"))]
    rest = [word for word in words if word not in fixed]
    experiments = [o for o in parser.parse_overrides(rest) if o.key_or_group == EXPERIMENT]
    names: list[str | None] = [None]
    if experiments:
        override = experiments[-1]
        value = str(override.input_line).partition("=")[2]
        is_sweep = override.is_sweep_override()
        names = list(override.sweep_string_iterator()) if is_sweep else [value]
        rest = [word for word in rest if word.partition("=")[0] != EXPERIMENT]
        if not names:
            raise _no_values(EXPERIMENT, value)
    points: list[list[str]] = []
    for name in names:
        first = [] if name is None else [f"{EXPERIMENT}={name}"]
        config = loader.load_configuration(CONFIG_NAME, [*fixed, *first], RunMode.MULTIRUN)
        if name is not None:
            _check_choices(loader, config, parser.parse_overrides(rest))
        swept = config.hydra.sweeper.params or {}
        if not isinstance(swept, Mapping):
            raise InputError(
                f"hydra.sweeper.params is {swept}, but it is a mapping of keys to values; "
                "correct it"
            )
        params = [f"{key}={value}" for key, value in swept.items()]
        overrides = parser.parse_overrides([*params, *rest])
        for override in overrides:
            if override.is_sweep_override() and not list(override.sweep_string_iterator()):
                value = str(override.input_line).partition("=")[2]
                raise _no_values(str(override.key_or_group), value)
        (batch,) = BasicSweeper.split_arguments(overrides, None)
        points += [[*fixed, *first, *point] for point in batch]
    return points


def _check_choices(loader: ConfigLoader, config: DictConfig, typed: Sequence[Override]) -> None:
    """Check that a typed choice does not lose against an experiment's own values.

    The values of an experiment override those of any choice. So a typed choice would have values
    that are not the ones used.

    Args:
        loader: Hydra's configuration loader.
        config: The experiment's configuration without the typed overrides.
        typed: The typed overrides.

    Raises:
        InputError: An experiment has values of its own for a typed choice.
    """
    choices = config.hydra.runtime.choices
    groups = [o for o in typed if o.key_or_group in choices and not o.is_delete()]
    if not groups:
        return
    same = [f"{override.key_or_group}={choices[override.key_or_group]}" for override in groups]
    without = loader.load_configuration(CONFIG_NAME, same, RunMode.MULTIRUN)
    given = {key for override in typed for key, _ in _assignments(override.input_line or "")}
    for override in groups:
        group = override.key_or_group
        values, defaults = (dict(_values(composed, group)) for composed in (config, without))
        changed = sorted(key for key, value in values.items() if defaults.get(key) != value)
        if left := [key for key in changed if key not in given]:
            value = (override.input_line or "").partition("=")[2]
            raise InputError(
                f"{group} is {value}, but experiment={choices[EXPERIMENT]} has values of its own "
                f"for {', '.join(left)}; give values for these too, or leave {group}={value} out"
            )


def _no_values(key: str, value: str) -> InputError:
    return InputError(
        f"{key} is {value}, but nothing matches it and the sweep has no points; see widthopt --help"
    )


class WidthoptSweeper(Sweeper):
    """Pass all points to the launcher in one call.

    Hydra's basic sweeper composes each point to validate it, and its launchers compose it again.
    Our launchers plan all points before the first one starts, so one composition is enough.
    """

    def __init__(self, *, params: Mapping[str, str] | None) -> None:
        """Args: params: The sweep of an experiment, which `expand_sweep` reads."""
        self.params = params
        self.context: HydraContext | None = None

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        """See Hydra."""
        self.context = hydra_context
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> Any:
        """Launch the points of these overrides."""
        assert self.context is not None
        assert self.launcher is not None
        points = expand_sweep(self.context.config_loader, arguments)
        return [self.launcher.launch(points, initial_job_idx=0)]
