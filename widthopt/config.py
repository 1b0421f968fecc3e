"""From what a user typed to a `Request`: composed, typed and checked before anything starts."""

import copy
import difflib
import json
import math
import re
import traceback
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields, is_dataclass
from importlib import import_module
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from hydra import compose as hydra_compose
from hydra import initialize_config_module
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException
from yaml import MarkedYAMLError, YAMLError

import launchers
from launchers.sweeper import CONFIG_NAME, EXPERIMENT, expanded
from widthopt import identity
from widthopt.errors import InputError
from widthopt.pipeline import Request, Target, found
from widthopt.records import Found
from widthopt.setting import Resources, Runtime
from widthopt.tracking import Tracking


CONFIG_MODULE = "conf"

_GROUPS = (
    "network", "dataset", "projection", "algorithm", "extrapolation", "recipe", "tracking"
)  # fmt: skip
_VALUES = (
    "target", "budget_macs", "methods", "seeds", "root", "runtime", "resources", "figures",
)  # fmt: skip

_LAUNCHER = "hydra/launcher"

NEUTRAL = ("root", "runtime", "resources", "figures", "tracking")
"""What no result depends on: where it is kept, how it is computed, what is drawn and logged."""


def search(*overrides: str) -> Found:
    """Better channel counts, as the command would find them, without the final training.

    ``widthopt.search("network=custom", "network.factory=my_module.my_network")``.

    Args:
        overrides: As typed behind ``widthopt``.

    Returns:
        The channel counts of the target found for the first seed, and how.

    Raises:
        InputError: Something asked for cannot be done.
    """
    return found(compose(overrides))


def compose(overrides: Sequence[str], *, config_dir: str | None = None) -> Request:
    """The request that these overrides make of ``conf/``.

    Args:
        overrides: As typed behind ``widthopt``.
        config_dir: A folder of further choices, as ``--config-dir`` names it.

    Raises:
        InputError: They do not fit it.
    """
    with _loading(overrides, config_dir) as words:
        return request(hydra_compose(CONFIG_NAME, overrides=words))


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
        return requests(loader, expanded(loader, words))


def launcher(
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
            raise InputError(_no_config_dir(config_dir))
        words.append(f"hydra.searchpath=[file://{Path(config_dir).resolve()}]")
    try:
        with initialize_config_module(CONFIG_MODULE, version_base="1.3"):
            yield words
    except Exception as error:
        if not of_configuration(error):
            raise
        raise refusal(error, words) from error


def requests(loader: ConfigLoader, points: Sequence[Sequence[str]]) -> list[Request]:
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
        result.append(request(config, made))
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


Made = dict[tuple[str, str], Any]
"""What was made of each group's values before, by their canonical text."""


def request(config: DictConfig, made: Made | None = None) -> Request:
    """A composed configuration as typed values.

    Args:
        config: As Hydra composes it, or what is left of it without Hydra's own.
        made: What was made of equal values before; requests share it, and add to it.

    Raises:
        InputError: A key is unknown or missing, or a value has the wrong type or range.
    """
    try:
        for key in sorted(OmegaConf.missing_keys(config)):
            raise InputError(_missing(key))
        plain = OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        raise refusal(error) from error
    assert isinstance(plain, dict)
    values = {str(key): value for key, value in plain.items()}
    values.pop("hydra", None)
    unknown = [key for key in values if key not in (*_GROUPS, *_VALUES)]
    if unknown:
        raise InputError(_unknown(unknown[0], (*_GROUPS, *_VALUES)))
    absent = [key for key in _VALUES if key not in values]
    if absent:
        raise InputError(_missing(absent[0]))
    kinds = {group: _kind(group, values.get(group)) for group in _GROUPS}
    kinds |= {"target": Target, "runtime": Runtime, "resources": Resources}
    # Typed before they name anything, so that 1 and 1.0 name the same run.
    typed = {key: _typed(kind, key, values[key]) for key, kind in kinds.items()}
    plain_values = {
        "budget_macs": _value(int | None, "budget_macs", values["budget_macs"]),
        "methods": _value(tuple[str, ...], "methods", values["methods"]),
        "seeds": _value(tuple[int, ...], "seeds", values["seeds"]),
        "root": _value(str, "root", values["root"]),
    }
    composed = {**plain_values, **{key: {**values[key], **one} for key, one in typed.items()}}
    if not plain_values["root"].strip():
        raise InputError("root is empty, but it names a folder; give one, such as root=runs")
    made = {} if made is None else made
    objects: dict[str, Any] = {}
    for key, kind in kinds.items():
        try:
            name = (key, identity.canonical(composed[key]))
        except InputError:  # a number that is not finite; the kind says what is wrong with it
            kind(**typed[key])
            raise
        if name not in made:
            made[name] = kind(**typed[key])
        objects[key] = made[name]
    return Request(
        **objects,
        **plain_values,
        figures=figures(values["figures"]),
        fields={key: composed[key] for key in values if key not in NEUTRAL},
    )


def frozen(asked: Request) -> dict[str, Any]:
    """All of a request as plain data, from which `request` makes it again anywhere.

    Figures are left out: they change no result.
    """
    kind = type(asked.tracking)
    tracking = {"_target_": f"{kind.__module__}.{kind.__qualname__}", **asdict(asked.tracking)}
    tracking["tags"] = list(asked.tracking.tags)
    return {
        **asked.fields,
        "runtime": asdict(asked.runtime),
        "resources": asdict(asked.resources),
        "tracking": tracking,
        "root": asked.root,
        "figures": [],
    }


def figures(values: Any) -> tuple[Any, ...]:
    """What a report draws, each of the kind that its ``_target_`` names.

    Raises:
        InputError: The values are no list of such tables.
    """
    if not isinstance(values, list):
        raise InputError(f"figures is {_shown(values)}, but it is a list of tables; see conf")
    result = []
    for place, one in enumerate(values):
        key = f"figures[{place}]"
        kind = _kind(key, one)
        made = kind(**_typed(kind, key, one))
        lacking = [name for name in _FIGURE if not hasattr(made, name)]
        if lacking:
            raise InputError(
                f"{key}._target_ is {one['_target_']}, but a figure has {', '.join(_FIGURE)}, and "
                f"this has no {lacking[0]}; name one of widthopt.figures or of yours"
            )
        if not re.fullmatch(r"\w[\w.+-]*", made.name):
            raise InputError(
                f"{key}.name is {made.name}, but it begins the names of files, in letters, digits "
                "and . + - _; correct it"
            )
        result.append(made)
    return tuple(result)


_FIGURE = ("name", "title", "claim", "draw", "table")
"""What figures and tables have; see `widthopt.figures.grid.Kind`."""


def tracking(values: Any) -> Tracking:
    """How runs are tracked, from what `frozen` made of it.

    Raises:
        InputError: The values are something else.
    """
    kind = _kind("tracking", values)
    made = kind(**_typed(kind, "tracking", values))
    assert isinstance(made, Tracking)
    return made


def _kind(group: str, values: Any) -> type[Any]:
    """The dataclass that a group's ``_target_`` names."""
    name = values.get("_target_") if isinstance(values, Mapping) else None
    if not isinstance(name, str):
        raise InputError(
            f"{group} is {_shown(values)}, but a choice of this group has a _target_; "
            f"see conf/{group}"
        )
    module, _, attribute = name.rpartition(".")
    try:
        kind = getattr(import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(
            f"{group}._target_ is {name}, but it cannot be imported ({error}); start in the "
            "folder that holds it, or install it"
        ) from error
    if not (isinstance(kind, type) and is_dataclass(kind)):
        raise InputError(
            f"{group}._target_ is {name}, but its values are checked by a dataclass's fields; "
            "name a dataclass"
        )
    return kind


def _typed(kind: type[Any], key: str, values: Any) -> dict[str, Any]:
    """The arguments of a dataclass from plain values, each of the type that its field says."""
    hints = get_type_hints(kind)
    names = [field.name for field in fields(kind) if field.init]
    if not isinstance(values, Mapping):
        raise InputError(
            f"{key} is {_shown(values)}, but it is a table of keys; give them one by one, as in "
            f"{key}.{names[0]}=..."
        )
    for name in values:
        if name not in names and name != "_target_":
            raise InputError(_unknown(f"{key}.{name}", [f"{key}.{one}" for one in names]))
    for name in names:
        if name not in values:
            raise InputError(f"{key}.{name} is missing, but {key} needs it; add {key}.{name}=...")
    return {name: _value(hints[name], f"{key}.{name}", values[name]) for name in names}


def _with_key(group: str, key: str) -> list[str]:
    """The choices of a group, as they are typed, that have a key."""
    folder = files(CONFIG_MODULE) / group
    if group not in (*_GROUPS, _LAUNCHER) or not folder.is_dir():
        return []
    found = sorted(one.name for one in folder.iterdir() if one.name.endswith(".yaml"))
    return [
        f"{group}={name.removesuffix('.yaml')}"
        for name in found
        if key in list(OmegaConf.create((folder / name).read_text("utf-8")))
    ]


def _unknown(key: str, names: Sequence[str]) -> str:
    """What to say about a key that is not among ``names``; the nearest of its own table's."""
    if key in names:  # Hydra gives a table that is there no new keys unasked
        return f"{key} is a table, but its keys are added one by one; write +{key}.NAME=VALUE"
    table, _, last = key.rpartition(".")
    beside = sorted(name for name in names if name.rpartition(".")[0] == table) or sorted(names)
    near = {name.rpartition(".")[2]: name for name in beside}
    close = difflib.get_close_matches(last, near, n=1)
    remedy = f"did you mean {near[close[0]]}?" if close else f"choose among {', '.join(beside)}"
    if not close and (choices := _with_key(table.replace(".", "/"), last)):
        remedy = f"first choose {' or '.join(choices)}, which has it"
    return f"{key} is not a key, but only known keys are read; {remedy}"


def _not_in_all(key: str, words: Sequence[str]) -> str | None:
    """What to say about a key that some choices of a sweep over its group have, and not all."""
    group, _, name = key.rpartition(".")
    swept = next((word for word in words if word.startswith(f"{group}=") and "," in word), None)
    choices = _with_key(group, name)
    if swept is None or not choices:
        return None
    return (
        f"{key} is given, but not every choice of {swept} has it; sweep in another command over "
        f"those that have it, of {', '.join(choices)}"
    )


_WORDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a text",
}


def _value(kind: Any, key: str, value: Any) -> Any:
    """A plain value as this type; whole numbers are numbers, and nothing else converts."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (typing.Union, types.UnionType):
        inner = next(one for one in arguments if one is not types.NoneType)
        return None if value is None else _value(inner, key, value)
    if origin is tuple or (isinstance(origin, type) and issubclass(origin, Sequence)):
        return _values(kind, key, value)
    rule = ""
    if origin is Literal:
        rule = "" if value in arguments else f"one of {', '.join(map(str, arguments))}"
    elif isinstance(origin, type) and issubclass(origin, Mapping):
        rule = "" if isinstance(value, Mapping) else "a table, {name: value}"
    elif kind is float and _as_number(value) is not None:
        return _as_number(value)
    elif kind is not Any and (
        not isinstance(value, kind) or isinstance(value, bool) > (kind is bool)
    ):
        rule = _WORDS[kind]
    if rule:
        raise InputError(f"{key} is {_shown(value)}, but it must be {rule}; correct it")
    return value


def _as_number(value: Any) -> float | None:
    """A number, or one in quotes: 1, 1.0 and "1" are the same."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except ValueError:
        return None
    return number if math.isfinite(number) or isinstance(value, float) else None


def _shown(value: Any) -> str:
    """A plain value as it is typed."""
    return json.dumps(value) if value is None or isinstance(value, bool) else str(value)


def _values(kind: Any, key: str, value: Any) -> tuple[Any, ...]:
    arguments = get_args(kind)
    one = arguments[0]
    length = None if get_origin(kind) is not tuple or Ellipsis in arguments else len(arguments)
    if not isinstance(value, (list, tuple)) or (length is not None and len(value) != length):
        size = "" if length is None else f" of {length}"
        raise InputError(f"{key} is {_shown(value)}, but it is a list{size}; write [a, b]")
    return tuple(_value(one, f"{key}[{place}]", item) for place, item in enumerate(value))


def _missing(key: str) -> str:
    return f"{key} is missing, but this choice needs it; add {key}=... to the command"


_NO_CHOICE = "Config group override must be a string"
"""How Hydra's ValueError about ``network=3`` begins; it does not say which group."""


def of_configuration(error: Exception) -> bool:
    """Whether an error says that a configuration cannot be read: one of Hydra's, or any on its way.

    A file that is no table, that is not UTF-8 or that includes itself has no error of its own.
    """
    if isinstance(error, InputError):
        return False
    return isinstance(error, HydraException | OmegaConfBaseException | YAMLError) or any(
        frame.f_globals.get("__name__") == ConfigLoaderImpl.__module__
        for frame, _ in traceback.walk_tb(error.__traceback__)
    )


def refusal(error: Exception, words: Sequence[str] = ()) -> InputError:
    """Hydra's error about a configuration, in one line.

    Args:
        error: What Hydra, OmegaConf or the reader of YAML raised.
        words: What was typed.
    """
    text = str(error)
    reason = _no_yaml(error) or _no_table(error, words) or _not_one(text, words) or _no_folder(text)
    if reason:
        return InputError(reason)
    line = " ".join(text.split())
    if isinstance(error, OverrideParseException):
        return InputError(
            f"{error.override} is not an override, but arguments are KEY=VALUE or GROUP=CHOICE; "
            "see widthopt --help"
        )
    if found := re.search(r"Could not find '(.+)/(.+)'", text):
        listed = text.partition("Available options")[2].partition("Config search path")[0]
        names = [name.strip() for name in listed.split("\n")[1:] if name.strip()]
        return InputError(
            f"{found[1]} is {found[2]}, but there is no such choice; use one of "
            f"{', '.join(sorted(names))}"
        )
    if found := re.search(r"Missing mandatory value: ([\w.]+)", text):
        return InputError(_missing(found[1]))
    if found := re.search(r"Could not override '([^']+)'", text):
        return InputError(_not_in_all(found[1], words) or _unknown(found[1], _keys(words)))
    key = getattr(error, "full_key", None) or "the configuration"
    return InputError(f"{key} cannot be read, but it must be ({line}); see widthopt --help")


def _no_yaml(error: Exception) -> str | None:
    """What is wrong with a file that the reader of YAML gave up on."""
    if not isinstance(error, MarkedYAMLError) or not error.problem_mark:
        return None
    mark = error.problem_mark
    problem = " ".join(str(error.problem).split())
    return (
        f"{mark.name} is no YAML ({problem} in line {mark.line + 1}), but configurations are; "
        "correct it"
    )


def _no_table(error: Exception, words: Sequence[str]) -> str | None:
    """What is wrong with a choice whose file Hydra could not make a table of."""
    kinds = OSError | UnicodeDecodeError | RecursionError
    if isinstance(error, HydraException) or not isinstance(error, kinds):
        return None
    chosen = [word for word in words if word.partition("=")[0] in (*_GROUPS, EXPERIMENT)]
    problem = "one includes itself" if isinstance(error, RecursionError) else str(error)
    return (
        f"{' '.join(chosen) or 'the configuration'} cannot be read, but each choice is a file of "
        f"UTF-8 with a table of keys ({problem}); correct it"
    )


def _no_folder(text: str) -> str | None:
    """What is wrong where Hydra does not find a person's choices."""
    found = re.search(r"Additional config directory '(.+)' not found", text)
    return _no_config_dir(found[1]) if found else None


def _no_config_dir(folder: str) -> str:
    return f"--config-dir is {folder}, but there is no such folder; name one of your own choices"


def _not_one(text: str, words: Sequence[str]) -> str | None:
    """What is wrong where one choice or one value was wanted, and something else was given."""
    if _NO_CHOICE in text:
        typed = [word for word in words if not word.startswith("-")]
        group, value = next(
            (one.key_or_group, str(one.input_line).partition("=")[2])
            for one in OverridesParser.create().parse_overrides(typed)
            if one.key_or_group in (*_GROUPS, "experiment") or "/" in one.key_or_group
            if not isinstance(one.value(), str | list | dict)
        )
        return f"{group} is {value}, but a group takes the name of a choice; see widthopt --help"
    if found := re.search(r"Ambiguous value for argument '([^=]+)=(.*)'", text):
        return (
            f"{found[1]} is {found[2]}, but one run takes one value; add -m to run once for each, "
            "or write [a,b] for a list"
        )
    if found := re.search(r"Error merging override ([^=]+)=(.*)", text):
        return (
            f"{found[1]} is {found[2]}, but it replaces a value of another kind (a table, a list "
            "or a single value); see widthopt --help"
        )
    return None


def _keys(words: Sequence[str]) -> list[str]:
    """Every key there is with the choices among ``words``, groups and values alike."""
    groups = (*_GROUPS, EXPERIMENT, "hydra.searchpath", _LAUNCHER)
    chosen = [one for one in words if one.partition("=")[0] in groups and "," not in one]
    with initialize_config_module(CONFIG_MODULE, version_base="1.3"):
        try:
            composed = hydra_compose(CONFIG_NAME, overrides=chosen, return_hydra_config=True)
        except (HydraException, OmegaConfBaseException):  # there may be the mistake
            composed = hydra_compose(CONFIG_NAME, return_hydra_config=True)
        own = OmegaConf.to_container(composed.hydra.launcher)
    config = OmegaConf.to_container(composed)
    assert isinstance(config, dict)
    del config["hydra"]
    config["hydra.launcher"] = own
    names: list[str] = []
    for group, values in config.items():
        names.append(str(group))
        if isinstance(values, dict):
            names += [f"{group!s}.{name!s}" for name in values if name != "_target_"]
    return names
