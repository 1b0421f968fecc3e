"""The points of a sweep, for Hydra's command line: every point before any work."""

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
    """Raise where one key is given two values.

    Args:
        overrides: As typed; flags among them are passed over.

    Raises:
        InputError: Two overrides contradict each other.
    """
    given: dict[str, str] = {}
    for word in overrides:
        for key, value in _given(word):
            if given.setdefault(key, value) != value:
                raise InputError(
                    f"{key} is {given[key]} and {value}, but it has one value in one command; "
                    "leave one of them out, or sweep over both with -m and a comma"
                )


def _given(word: str) -> Iterator[tuple[str, str]]:
    """The keys that an override gives a value, each with its text; those inside of tables too."""
    key, equals, text = word.partition("=")
    if not equals or key.startswith("-"):
        return
    key = key.lstrip("+")
    tables: list[Any] = []
    if "{" in text:
        with suppress(HydraException):  # it says itself what it cannot read
            value = OverridesParser.create().parse_override(word).value()
            tables = list(value.list) if isinstance(value, ChoiceSweep) else [value]
    if not tables or not all(isinstance(one, dict) for one in tables):
        yield key, text
        return
    inside: dict[str, list[str]] = {}
    for one in tables:
        for name, value in _leaves(one, key):
            inside.setdefault(name, []).append(value)
    for name, values in inside.items():
        yield name, ",".join(values)


def _values(config: DictConfig, group: str) -> Iterator[tuple[str, str]]:
    """Every value of a group in a configuration, with its key, as it is written there."""
    table = OmegaConf.to_container(config[group])
    if isinstance(table, dict):
        yield from _leaves(table, group)


def _leaves(table: Mapping[Any, Any], key: str) -> Iterator[tuple[str, str]]:
    """Every value of nested tables, with its key."""
    for name, value in table.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{key}.{name}")
        else:
            yield f"{key}.{name}", str(value)


def expand_sweep(loader: ConfigLoader, words: Sequence[str]) -> list[list[str]]:
    """The overrides of each point of a sweep.

    The values that an experiment sweeps over are those of its file, but where the command line
    says otherwise. Several experiments are swept one after another.

    Args:
        loader: Hydra's.
        words: As typed, without flags.

    Raises:
        InputError: The sweep has no points.
    """
    parser = OverridesParser.create(config_loader=loader)
    fixed = [word for word in words if word.lstrip("+~").startswith(("hydra.", "hydra/"))]
    rest = [word for word in words if word not in fixed]
    chosen = [one for one in parser.parse_overrides(rest) if one.key_or_group == EXPERIMENT]
    names: list[str | None] = [None]
    if chosen:
        one = chosen[-1]
        value = str(one.input_line).partition("=")[2]
        names = list(one.sweep_string_iterator()) if one.is_sweep_override() else [value]
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
                f"hydra.sweeper.params is {swept}, but it is a table of keys and their values; "
                "correct it"
            )
        params = [f"{key}={value}" for key, value in swept.items()]
        overrides = parser.parse_overrides([*params, *rest])
        for one in overrides:
            if one.is_sweep_override() and not list(one.sweep_string_iterator()):
                raise _no_values(str(one.key_or_group), str(one.input_line).partition("=")[2])
        (batch,) = BasicSweeper.split_arguments(overrides, None)
        points += [[*fixed, *first, *one] for one in batch]
    return points


def _check_choices(loader: ConfigLoader, config: DictConfig, typed: Sequence[Override]) -> None:
    """Raise where an experiment has values of its own for a choice that was typed.

    An experiment's values go before those of any choice, so that what was typed would be another
    thing than what is run.

    Args:
        loader: Hydra's.
        config: The experiment's configuration, with nothing that was typed.
        typed: The overrides that were.

    Raises:
        InputError: An experiment and a choice contradict each other.
    """
    chosen = config.hydra.runtime.choices
    groups = [one for one in typed if one.key_or_group in chosen and not one.is_delete()]
    if not groups:
        return
    same = [f"{one.key_or_group}={chosen[one.key_or_group]}" for one in groups]
    without = loader.load_configuration(CONFIG_NAME, same, RunMode.MULTIRUN)
    given = {key for one in typed for key, _ in _given(one.input_line or "")}
    for one in groups:
        group = one.key_or_group
        its, usual = (dict(_values(made, group)) for made in (config, without))
        own = sorted(key for key, value in its.items() if usual.get(key) != value)
        if left := [key for key in own if key not in given]:
            value = (one.input_line or "").partition("=")[2]
            raise InputError(
                f"{group} is {value}, but experiment={chosen[EXPERIMENT]} has values of its own "
                f"for {', '.join(left)}; give values for these too, or leave {group}={value} out"
            )


def _no_values(key: str, value: str) -> InputError:
    return InputError(
        f"{key} is {value}, but nothing matches it and the sweep has no points; see widthopt --help"
    )


class WidthoptSweeper(Sweeper):
    """Hands all points to the launcher at once.

    Hydra's own sweeper composes every point to see that it can be composed, and its launchers
    do so again; ours plans all points before it starts any, so that once is enough.
    """

    def __init__(self, *, params: Mapping[str, str] | None) -> None:
        """Args: params: What an experiment sweeps over; `expand_sweep` reads it again."""
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
        """Launch the points of these arguments."""
        assert self.context is not None
        assert self.launcher is not None
        points = expand_sweep(self.context.config_loader, arguments)
        return [self.launcher.launch(points, initial_job_idx=0)]
