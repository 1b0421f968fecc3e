"""From composed values to dataclasses: every value is typed and checked before work starts."""

import json
import math
import re
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass
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
"""What no result depends on: where it is kept, how it is computed, what is drawn and logged."""


Made = dict[tuple[str, str], Any]
"""What was made of each group's values before, by their canonical text."""


def build_request(config: DictConfig, made: Made | None = None) -> Request:
    """A composed configuration as typed values.

    Args:
        config: As Hydra composes it, or what is left of it without Hydra's own.
        made: What was made of equal values before; requests share it, and add to it.

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
    # Typed before they name anything, so that 1 and 1.0 name the same run.
    typed = {key: _check_fields(kind, key, values[key]) for key, kind in kinds.items()}
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
        figures=build_figures(values["figures"]),
        fields={key: composed[key] for key in values if key not in NON_IDENTITY_KEYS},
    )


def to_plain(asked: Request) -> dict[str, Any]:
    """All of a request as plain data, from which `build_request` makes it again anywhere.

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


def build_figures(values: Any) -> tuple[FigureSpec, ...]:
    """What a report draws, each of the kind that its ``_target_`` names.

    Raises:
        InputError: The values are no list of such tables.
    """
    if not isinstance(values, list):
        raise InputError(f"figures is {_format(values)}, but it is a list of tables; see conf")
    result = []
    for place, one in enumerate(values):
        key = f"figures[{place}]"
        kind = _target_class(key, one)
        made = kind(**_check_fields(kind, key, one))
        lacking = [name for name in _FIGURE if not hasattr(made, name)]
        if lacking:
            raise InputError(
                f"{key}._target_ is {one['_target_']}, but a figure has {', '.join(_FIGURE)}, and "
                f"this has no {lacking[0]}; name one of widthopt.reporting.figures or of yours"
            )
        if not re.fullmatch(r"\w[\w.+-]*", made.name):
            raise InputError(
                f"{key}.name is {made.name}, but it begins the names of files, in letters, digits "
                "and . + - _; correct it"
            )
        result.append(made)
    return tuple(result)


_FIGURE = ("name", "title", "claim", "draw", "table")
"""What figures and tables have; see `widthopt.request.FigureSpec`."""


def build_tracking(values: Any) -> Tracking:
    """How runs are tracked, from what `to_plain` made of it.

    Raises:
        InputError: The values are something else.
    """
    kind = _target_class("tracking", values)
    made = kind(**_check_fields(kind, "tracking", values))
    assert isinstance(made, Tracking)
    return made


def _target_class(group: str, values: Any) -> type[Any]:
    """The dataclass that a group's ``_target_`` names."""
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
            f"{group}._target_ is {name}, but it cannot be imported ({error}); start in the "
            "folder that holds it, or install it"
        ) from error
    if not (isinstance(kind, type) and is_dataclass(kind)):
        raise InputError(
            f"{group}._target_ is {name}, but its values are checked by a dataclass's fields; "
            "name a dataclass"
        )
    return kind


def _check_fields(kind: type[Any], key: str, values: Any) -> dict[str, Any]:
    """The arguments of a dataclass from plain values, each of the type that its field says."""
    hints = get_type_hints(kind)
    names = [field.name for field in fields(kind) if field.init]
    if not isinstance(values, Mapping):
        raise InputError(
            f"{key} is {_format(values)}, but it is a table of keys; give them one by one, as in "
            f"{key}.{names[0]}=..."
        )
    for name in values:
        if name not in names and name != "_target_":
            raise InputError(unknown_key(f"{key}.{name}", [f"{key}.{one}" for one in names]))
    for name in names:
        if name not in values:
            raise InputError(f"{key}.{name} is missing, but {key} needs it; add {key}.{name}=...")
    return {name: _value(hints[name], f"{key}.{name}", values[name]) for name in names}


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
        raise InputError(f"{key} is {_format(value)}, but it must be {rule}; correct it")
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


def _format(value: Any) -> str:
    """A plain value as it is typed."""
    return json.dumps(value) if value is None or isinstance(value, bool) else str(value)


def _values(kind: Any, key: str, value: Any) -> tuple[Any, ...]:
    arguments = get_args(kind)
    one = arguments[0]
    length = None if get_origin(kind) is not tuple or Ellipsis in arguments else len(arguments)
    if not isinstance(value, (list, tuple)) or (length is not None and len(value) != length):
        size = "" if length is None else f" of {length}"
        raise InputError(f"{key} is {_format(value)}, but it is a list{size}; write [a, b]")
    return tuple(_value(one, f"{key}[{place}]", item) for place, item in enumerate(value))
