"""Conversion of composed values to dataclasses; every value is checked before work starts."""

import json
import math
import re
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, fields, is_dataclass
from importlib import import_module
from typing import Any, Literal, get_args, get_origin, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from widthopt import identity
from widthopt.config.messages import GROUPS, missing_key, to_input_error, unknown_key
from widthopt.errors import InputError
from widthopt.request import FigureSpec, Request, Target
from widthopt.setting import Resources, Runtime
from widthopt.tracking import Tracking


_VALUES = (
    "target", "budget_macs", "methods", "seeds", "root", "runtime", "resources", "figures",
)  # fmt: skip


NON_IDENTITY_KEYS = ("root", "runtime", "resources", "figures", "tracking")
"""Keys that no result depends on: where it is stored, how it is computed, reports and tracking."""

ObjectCache = dict[tuple[str, str], Any]
"""Objects by their group and the canonical text of their values."""


def build_request(config: DictConfig, cache: ObjectCache | None = None) -> Request:
    """Build a request from a composed configuration.

    Args:
        config: The configuration as composed by Hydra, with or without its node ``hydra``.
        cache: Objects that requests with equal values share; new ones are added.

    Raises:
        InputError: A key is unknown or missing, or a value has the wrong type or range.
    """
    try:
        for key in sorted(OmegaConf.missing_keys(config)):
            raise InputError(missing_key(key))
        plain = OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        raise to_input_error(error) from error
    assert isinstance(plain, dict)
    values = {str(key): value for key, value in plain.items()}
    values.pop("hydra", None)
    unknown = [key for key in values if key not in (*GROUPS, *_VALUES)]
    if unknown:
        raise InputError(unknown_key(unknown[0], (*GROUPS, *_VALUES)))
    absent = [key for key in _VALUES if key not in values]
    if absent:
        raise InputError(missing_key(absent[0]))
    kinds = {group: _target_class(group, values.get(group)) for group in GROUPS}
    kinds |= {"target": Target, "runtime": Runtime, "resources": Resources}
    # Types are settled before the values enter an identity, so that 1 and 1.0 name the same run.
    typed = {key: _check_fields(kind, key, values[key]) for key, kind in kinds.items()}
    plain_values = {
        "budget_macs": _value(int | None, "budget_macs", values["budget_macs"]),
        "methods": _value(tuple[str, ...], "methods", values["methods"]),
        "seeds": _value(tuple[int, ...], "seeds", values["seeds"]),
        "root": _value(str, "root", values["root"]),
    }
    composed = {**plain_values, **{key: {**values[key], **typed[key]} for key in typed}}
    if not plain_values["root"].strip():
        raise InputError(
            "root is empty, but it must be the path of a folder, such as root=runs; correct it"
        )
    cache = {} if cache is None else cache
    objects: dict[str, Any] = {}
    for key, kind in kinds.items():
        try:
            name = (key, identity.canonical(composed[key]))
        except InputError:  # a number is not finite; the dataclass reports it by its key
            kind(**typed[key])
            raise
        if name not in cache:
            cache[name] = kind(**typed[key])
        objects[key] = cache[name]
    return Request(
        **objects,
        **plain_values,
        figures=build_figures(values["figures"]),
        fields={key: composed[key] for key in values if key not in NON_IDENTITY_KEYS},
    )


def to_plain(request: Request) -> dict[str, Any]:
    """Convert a request to plain data that `build_request` reads, without its figures."""
    kind = type(request.tracking)
    tracking = {"_target_": f"{kind.__module__}.{kind.__qualname__}", **asdict(request.tracking)}
    tracking["tags"] = list(request.tracking.tags)
    return {
        **request.fields,
        "runtime": asdict(request.runtime),
        "resources": asdict(request.resources),
        "tracking": tracking,
        "root": request.root,
        "figures": [],
    }


def build_figures(values: Any) -> tuple[FigureSpec, ...]:
    """Build the figures of a report, each of the class that its ``_target_`` names.

    Raises:
        InputError: The values are not a list of mappings, or a figure is invalid.
    """
    if not isinstance(values, list):
        raise InputError(
            f"figures is {_format(values)}, but it is a list of mappings; see conf/experiment"
        )
    result = []
    for index, content in enumerate(values):
        key = f"figures[{index}]"
        kind = _target_class(key, content)
        figure = kind(**_check_fields(kind, key, content))
        lacking = [name for name in _FIGURE if not hasattr(figure, name)]
        if lacking:
            raise InputError(
                f"{key}._target_ is {content['_target_']}, but a figure has {', '.join(_FIGURE)}, "
                f"and this has no {lacking[0]}; name a class of widthopt.reporting.figures, or "
                "one of your own"
            )
        if not re.fullmatch(r"\w[\w.+-]*", figure.name):
            raise InputError(
                f"{key}.name is {figure.name}, but it is part of file names, so it consists of "
                "letters, digits and . + - _; correct it"
            )
        result.append(figure)
    return tuple(result)


_FIGURE = tuple(name for name in vars(FigureSpec) if not name.startswith("_"))
"""Attributes of a figure; see `widthopt.request.FigureSpec`."""


def build_tracking(values: Any) -> Tracking:
    """Build the tracking settings from the plain data of `to_plain`.

    Raises:
        InputError: The values are invalid.
    """
    kind = _target_class("tracking", values)
    settings = kind(**_check_fields(kind, "tracking", values))
    assert isinstance(settings, Tracking)
    return settings


def _target_class(group: str, values: Any) -> type[Any]:
    """Import the dataclass that a group's ``_target_`` names."""
    name = values.get("_target_") if isinstance(values, Mapping) else None
    if not isinstance(name, str):
        raise InputError(
            f"{group} is {_format(values)}, but a choice of this group has a _target_; "
            f"see conf/{group}"
        )
    module, _, attribute = name.rpartition(".")
    try:
        kind = getattr(import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(
            f"{group}._target_ is {name}, but it cannot be imported ({error}); start in "
            "the folder that holds it, or install it"
        ) from error
    if not (isinstance(kind, type) and is_dataclass(kind)):
        raise InputError(
            f"{group}._target_ is {name}, but it must be a dataclass, whose fields give the types "
            "of the values; name a dataclass"
        )
    return kind


def _check_fields(kind: type[Any], key: str, values: Any) -> dict[str, Any]:
    """Return the arguments of a dataclass, each converted to the type of its field."""
    hints = get_type_hints(kind)
    names = [field.name for field in fields(kind) if field.init]
    optional = {
        field.name
        for field in fields(kind)
        if field.default is not MISSING or field.default_factory is not MISSING
    }
    if not isinstance(values, Mapping):
        raise InputError(
            f"{key} is {_format(values)}, but it is a mapping of keys; set them one by one, as in "
            f"{key}.{names[0]}=..."
        )
    for name in values:
        if name not in names and name != "_target_":
            raise InputError(unknown_key(f"{key}.{name}", [f"{key}.{known}" for known in names]))
    for name in names:
        if name not in values and name not in optional:
            raise InputError(f"{key}.{name} is missing, but {key} needs it; add {key}.{name}=...")
    return {
        name: _value(hints[name], f"{key}.{name}", values[name]) for name in names if name in values
    }


_TYPE_NAMES = {
    int: "an integer",
    float: "a number",
    bool: "true or false",
    str: "a string",
}


def _value(kind: Any, key: str, value: Any) -> Any:
    """Return a plain value as this type. Integers convert to float, and nothing else converts."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return _one_of_types(arguments, key, value)
    if origin is tuple or (isinstance(origin, type) and issubclass(origin, Sequence)):
        return _values(kind, key, value)
    rule = ""
    if origin is Literal:
        rule = "" if value in arguments else f"one of {', '.join(map(str, arguments))}"
    elif isinstance(origin, type) and issubclass(origin, Mapping):
        rule = "" if isinstance(value, Mapping) else "a mapping, {name: value}"
    elif kind is float and _as_number(value) is not None:
        return _as_number(value)
    elif kind is not Any and (
        not isinstance(value, kind) or isinstance(value, bool) > (kind is bool)
    ):
        rule = _TYPE_NAMES[kind]
    if rule:
        raise InputError(f"{key} is {_format(value)}, but it must be {rule}; correct it")
    return value


def _one_of_types(options: Sequence[Any], key: str, value: Any) -> Any:
    """Return a plain value as one of these types: None, words, and one further type."""
    if value is None and types.NoneType in options:
        return None
    words = [word for kind in options if get_origin(kind) is Literal for word in get_args(kind)]
    if value in words:
        return value
    (kind,) = (
        kind for kind in options if kind is not types.NoneType and get_origin(kind) is not Literal
    )
    try:
        return _value(kind, key, value)
    except InputError:
        if not words:
            raise
        rule = f"{', '.join(words)} or {_TYPE_NAMES[kind]}"
        raise InputError(f"{key} is {_format(value)}, but it must be {rule}; correct it") from None


def _as_number(value: Any) -> float | None:
    """Convert a number, or a string that holds one, to float; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except ValueError:
        return None
    return number if math.isfinite(number) or isinstance(value, float) else None


def _format(value: Any) -> str:
    """Format a plain value as it is typed."""
    return json.dumps(value) if value is None or isinstance(value, bool) else str(value)


def _values(kind: Any, key: str, value: Any) -> tuple[Any, ...]:
    """Return a list as a tuple, each item converted to the type of the elements."""
    arguments = get_args(kind)
    length = None if get_origin(kind) is not tuple or Ellipsis in arguments else len(arguments)
    if not isinstance(value, (list, tuple)) or (length is not None and len(value) != length):
        size = "" if length is None else f" of {length}"
        raise InputError(f"{key} is {_format(value)}, but it is a list{size}; write [a, b]")
    return tuple(_value(arguments[0], f"{key}[{i}]", item) for i, item in enumerate(value))
