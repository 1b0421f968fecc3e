"""What names a run: plain data in one canonical text, and a short key of that text."""

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from widthopt.errors import InputError


_SHOWN = 4
_LONGEST = 40


def canonical(fields: Any) -> str:
    """The one text of plain data: equal data gives equal text, different data different text.

    Compact JSON with sorted keys. Numbers keep their type, so 1 and 1.0 differ: whoever
    composes the fields settles their types first. A tuple reads as a list and a dataclass as
    its fields by name, so that moving or renaming a class renames no run.

    Args:
        fields: Nested dictionaries with text keys, dataclasses, lists, tuples, text, whole
            numbers, finite numbers, booleans and None.

    Raises:
        InputError: A number is infinite or not a number.
        TypeError: Something else stands among the fields.
    """
    return json.dumps(_plain(fields, "fields"), sort_keys=True, separators=(",", ":"))


def key(kind: str, fields: Any) -> str:
    """Twelve hex digits that name what depends on nothing but ``kind`` and ``fields``.

    They are the start of the SHA-256 of the kind, a line end and the `canonical` text.
    """
    return hashlib.sha256(f"{kind}\n{canonical(fields)}".encode()).hexdigest()[:12]


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """Where two sets of fields differ, in one line for a message; empty where they do not.

    Of tables, their values that differ are named. A few are; long values are cut.

    Args:
        there: Fields that were kept, as `canonical` takes them.
        here: Fields of now.
    """
    found = list(_differing(there, here, ""))
    shown = [
        f"{name} is {_short(one)} there and {_short(other)} here"
        for name, one, other in found[:_SHOWN]
    ]
    if len(found) > _SHOWN:
        shown.append(f"and {len(found) - _SHOWN} more")
    return "; ".join(shown)


def _differing(
    there: Mapping[str, Any], here: Mapping[str, Any], where: str
) -> Iterator[tuple[str, Any, Any]]:
    """Names and both values, those of tables last: they may be many."""
    tables = []
    for name in sorted(there.keys() | here.keys()):
        one, other = there.get(name), here.get(name)
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            tables.append((one, other, f"{where}{name}."))
        elif canonical(one) != canonical(other):
            yield f"{where}{name}", one, other
    for table in tables:
        yield from _differing(*table)


def differing_values(tables: Sequence[Mapping[str, Any]]) -> list[dict[tuple[str, ...], Any]]:
    """Of each of several tables, its values that are not the same in all of them.

    Args:
        tables: Nested dictionaries, as `canonical` takes them.

    Returns:
        For each table its values by the names that lead to them; None where it has none.
    """
    values = [dict(_leaves(one, ())) for one in tables]
    paths = dict.fromkeys(path for one in values for path in one)
    told = [path for path in paths if len({canonical(one.get(path)) for one in values}) > 1]
    return [{path: one.get(path) for path in told} for one in values]


def _leaves(fields: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every value of nested tables, with the names that lead to it."""
    if isinstance(fields, Mapping):
        for name, value in fields.items():
            yield from _leaves(value, (*path, name))
    else:
        yield path, fields


def _short(value: Any) -> str:
    text = canonical(value)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."


def digest(fields: Any) -> str:
    """The SHA-256 of the `canonical` text, by which a file shows that it is as it was written."""
    return hashlib.sha256(canonical(fields).encode()).hexdigest()


def _plain(value: Any, where: str) -> Any:
    """``value`` as what JSON can hold; ``where`` says in messages which field it is."""
    # Exact types: a subclass (an enumeration, a number of numpy) may print as something else.
    if value is None or type(value) in (bool, int, str):
        return value
    if type(value) is float:
        if not math.isfinite(value):
            raise InputError(f"{where} is {value}, but it must be finite; give a number")
        return value
    if type(value) in (list, tuple):
        return [_plain(item, f"{where}[{place}]") for place, item in enumerate(value)]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in dataclasses.fields(value)]
        return {name: _plain(getattr(value, name), f"{where}.{name}") for name in names}
    if type(value) is dict and all(type(name) is str for name in value):
        return {name: _plain(item, f"{where}.{name}") for name, item in value.items()}
    raise TypeError(f"{where} is {value!r}, but only plain data can name a run")
