"""Names of runs: plain data as one canonical string, a key of that string, and sealed files."""

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

from widthopt.errors import InputError


_SHOWN = 4
_LONGEST = 40


def canonical(fields: Any) -> str:
    """Return the canonical string of plain data; different data has different strings.

    It is compact JSON with sorted keys. Numbers keep their type, so 1 and 1.0 differ, and the
    caller converts values to their types first. A tuple is written as a list and a dataclass as
    its fields by name, so that no run changes its name when a class is moved or renamed.

    Args:
        fields: Nested dictionaries with string keys, dataclasses, lists, tuples, strings,
            integers, finite floats, booleans and None.

    Raises:
        InputError: A number is infinite or not a number.
        TypeError: A value is of another type.
    """
    return json.dumps(_plain(fields, "fields"), sort_keys=True, separators=(",", ":"))


def key(kind: str, fields: Any) -> str:
    """Return twelve hex digits that name a result that depends only on ``kind`` and ``fields``.

    They are the first digits of the SHA-256 of the kind, a newline and the `canonical` string.
    """
    return hashlib.sha256(f"{kind}\n{canonical(fields)}".encode()).hexdigest()[:12]


def differences(stored: Mapping[str, Any], current: Mapping[str, Any]) -> str:
    """Return where two sets of fields differ, in one line for a message; empty if nowhere.

    For nested mappings the values that differ are named. Only the first few are shown, and long
    values are cut.

    Args:
        stored: Fields from a file ("there" in the line); see `canonical`.
        current: Fields of this run ("here").
    """
    differing = list(_differing(stored, current, ""))
    shown = [
        f"{name} is {_shorten(old)} there and {_shorten(new)} here"
        for name, old, new in differing[:_SHOWN]
    ]
    if len(differing) > _SHOWN:
        shown.append(f"and {len(differing) - _SHOWN} more")
    return "; ".join(shown)


def _differing(
    stored: Mapping[str, Any], current: Mapping[str, Any], prefix: str
) -> Iterator[tuple[str, Any, Any]]:
    """Yield names and both values, those of nested mappings last, since they may be many."""
    nested = []
    for name in sorted(stored.keys() | current.keys()):
        old, new = stored.get(name), current.get(name)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            nested.append((old, new, f"{prefix}{name}."))
        elif canonical(old) != canonical(new):
            yield f"{prefix}{name}", old, new
    for mappings in nested:
        yield from _differing(*mappings)


def differing_values(mappings: Sequence[Mapping[str, Any]]) -> list[dict[tuple[str, ...], Any]]:
    """Return for each mapping its values that are not the same in all mappings.

    Args:
        mappings: Nested dictionaries; see `canonical`.

    Returns:
        For each mapping its values by their path of names; None where it has no such value.
    """
    values = [dict(_leaves(mapping, ())) for mapping in mappings]
    paths = dict.fromkeys(path for leaves in values for path in leaves)
    differing = [
        path for path in paths if len({canonical(leaves.get(path)) for leaves in values}) > 1
    ]
    return [{path: leaves.get(path) for path in differing} for leaves in values]


def _leaves(fields: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield every value of nested mappings with its path of names."""
    if isinstance(fields, Mapping):
        for name, value in fields.items():
            yield from _leaves(value, (*path, name))
    else:
        yield path, fields


def _shorten(value: Any) -> str:
    string = canonical(value)
    return string if len(string) <= _LONGEST else f"{string[: _LONGEST - 3]}..."


def seal(name: str, content: Any, **labels: Any) -> dict[str, Any]:
    """Return a JSON document of labels, the SHA-256 of the content, and the content.

    Args:
        name: The key of the content.
        content: Values that JSON can represent.
        labels: Further values of the document, for example the version of its format.

    Raises:
        ValueError: A number is infinite or not a number.
    """
    plain = json.loads(json.dumps(content, allow_nan=False))
    return {**labels, "sha256": _digest(plain), name: plain}


def is_sealed(document: Any, name: str, **labels: Any) -> bool:
    """Return whether a document is unchanged since `seal` returned it for these labels.

    Raises:
        KeyError, TypeError: The value is not such a document.
    """
    content = document[name]
    # A changed document may contain a number that is not finite, or be nested too deeply.
    with suppress(InputError, RecursionError):
        return bool(document == {**labels, "sha256": _digest(content), name: content})
    return False


def _digest(fields: Any) -> str:
    return hashlib.sha256(canonical(fields).encode()).hexdigest()


def _plain(value: Any, where: str) -> Any:
    """Return ``value`` as types of JSON; ``where`` names the field in messages."""
    # Exact types, because a subclass (an enumeration, a number of numpy) may print differently.
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
