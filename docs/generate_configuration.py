# ruff: noqa: INP001 (MkDocs loads this file by its path)
"""MkDocs hook: write the configuration reference from ``conf/`` and the classes it names.

Type, default and meaning of a key come from the code and the YAML files, so the page cannot
differ from them. A key without a meaning stops the build.
"""

import inspect
import re
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from omegaconf import OmegaConf


CONF = Path(__file__).parents[1] / "conf"

MARKER = "<!-- configuration reference -->"

GROUPS = (
    "network", "dataset", "projection", "algorithm", "extrapolation", "recipe", "tracking",
    "hydra/launcher", "hydra/sweeper",
)  # fmt: skip

CLASSES = {
    "target": "widthopt.request.Target",
    "runtime": "widthopt.setting.Runtime",
    "resources": "widthopt.setting.Resources",
    "WidthoptLocalLauncher": "hydra_plugins.widthopt_launchers.local.Pool",
    "WidthoptSlurmLauncher": "hydra_plugins.widthopt_launchers.slurm.Slurm",
    "WidthoptSlurmLauncher.resources": "hydra_plugins.widthopt_launchers.slurm.Resources",
}
"""Classes with the types and meanings of keys, where no ``_target_`` names them."""

SKIPPED = ("_target_",)

_COMMENT = re.compile(r"^\s*# ?(.*)")
_KEY = re.compile(r"^(\s*)([\w.]+):(?:\s+(?!#)[^#]*)?(?:\s*#\s*(.*))?$")
_ENTRY = re.compile(r"^ {4}(\w+):\s*(.*)")


@dataclass(frozen=True)
class File:
    """One YAML file of ``conf/``.

    Attributes:
        name: The choice that it is.
        text: The comment at its top.
        values: Its values, merged into those of the choices in its ``defaults``.
        inherits: Whether it has such.
        comments: The comment on each dotted key.
    """

    name: str
    text: str
    values: Mapping[str, Any]
    inherits: bool
    comments: Mapping[str, str]


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace the marker in a page by the reference; MkDocs calls this for every page."""
    return markdown.replace(MARKER, reference()) if MARKER in markdown else markdown


def reference() -> str:
    """Return the reference as Markdown.

    Raises:
        ValueError: A key has no meaning.
    """
    lacking: list[str] = []
    parts = ["## Values\n", _values(lacking)]
    for group in GROUPS:
        parts += [f"## {group}\n", _group(group, lacking)]
    parts += ["## experiment\n", _experiments(), "### Figures of experiments\n", _figures(lacking)]
    if lacking:
        raise ValueError(
            f"{', '.join(lacking)} have no meaning, but every key needs one; add a comment in "
            "conf/ or a line to the Attributes section of the class"
        )
    return "\n".join(parts)


def read(path: Path) -> File:
    """Read a YAML file with its comments."""
    text = path.read_text("utf-8")
    own = _plain(text)
    parents = [name for name in own.pop("defaults", []) if isinstance(name, str)]
    parents = [name.removesuffix(".yaml") for name in parents if name != "_self_"]
    values: dict[str, Any] = {}
    for parent in parents:
        values = _merged(values, read(path.parent / f"{parent}.yaml").values)
    lines = (match[1] for line in text.splitlines() if (match := _COMMENT.match(line)))
    lines = (line for line in lines if not line.startswith("@package"))
    head = " ".join(takewhile(lambda line: line and not line.startswith("Command:"), lines))
    return File(path.stem, head, _merged(values, own), bool(parents), _comments(text))


def _plain(text: str) -> dict[str, Any]:
    values = OmegaConf.to_container(OmegaConf.create(text))
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


def _merged(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    merged = OmegaConf.to_container(OmegaConf.merge(dict(first), dict(second)))
    assert isinstance(merged, dict)
    return {str(key): value for key, value in merged.items()}


def _comments(text: str) -> dict[str, str]:
    """The comment on each dotted key: above it, or behind its value."""
    comments: dict[str, str] = {}
    above: list[str] = []
    path: list[tuple[int, str]] = []
    for line in text.splitlines():
        if match := _COMMENT.match(line):
            above.append(match[1])
        elif match := _KEY.match(line):
            depth = len(match[1])
            path = [(indent, key) for indent, key in path if indent < depth] + [(depth, match[2])]
            name = ".".join(key for _, key in path)
            if found := match[3] or " ".join(above):
                comments[name] = found
            above = []
        else:
            above = []
    return comments


def _flat(values: Mapping[str, Any], before: str = "") -> Iterator[str]:
    for key, value in values.items():
        name = f"{before}{key}"
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{name}.")
        else:
            yield name


def _documented(kind: type[Any]) -> dict[str, str]:
    """What the docstrings of a class and its bases say about each attribute or argument."""
    entries: dict[str, str] = {}
    for base in reversed(kind.__mro__[:-1]):
        for text in (base.__doc__, vars(base).get("__init__", base).__doc__):
            name = ""
            inside = False
            for line in inspect.cleandoc(text or "").splitlines():
                if re.fullmatch(r"\w+:", line):
                    inside = line in ("Attributes:", "Args:")
                elif inside and (match := _ENTRY.match(line)):
                    name, entries[match[1]] = match[1], match[2]
                elif inside and name and line.startswith(" " * 8):
                    entries[name] += f" {line.strip()}"
    return entries


def _imported(name: str) -> type[Any]:
    module, _, attribute = name.rpartition(".")
    kind = getattr(import_module(module), attribute)
    assert isinstance(kind, type)
    return kind


def _type(hint: Any) -> str:
    """A type hint in words."""
    names = {
        bool: "`true` or `false`",
        int: "integer",
        float: "number",
        str: "string",
        type(None): "`null`",
        Any: "any value",
    }
    if hint in names:
        return names[hint]
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Literal:
        return _either([f"`{value}`" for value in arguments])
    if origin in (Union, types.UnionType):
        return _either([_type(argument) for argument in arguments])
    if inspect.isclass(origin) and issubclass(origin, Mapping):
        return "mapping"
    if inspect.isclass(origin) and issubclass(origin, Sequence):
        size = len(arguments) if origin is tuple and ... not in arguments else ""
        return f"list of {size} {_type(arguments[0])}s".replace("  ", " ").replace("`s", "`")
    return str(getattr(hint, "__name__", hint))


def _either(names: Sequence[str]) -> str:
    *most, last = names
    return f"{', '.join(most)} or {last}" if most else last


def _shown(value: Any) -> str:
    """A value as it is typed."""
    if isinstance(value, Mapping):
        return "`{" + ", ".join(f"{key}: {item}" for key, item in value.items()) + "}`"
    if isinstance(value, list):
        return f"`[{', '.join(map(str, value))}]`"
    words = {None: "null", True: "true", False: "false", "": '""'}
    return f"`{words.get(value, value) if isinstance(value, bool | str | None) else value}`"


def _rows(
    file: File, prefix: str, *, label: str, lacking: list[str], classes: Mapping[str, type[Any]]
) -> Iterator[tuple[str, str, str, str]]:
    """Key, type, default and meaning of each value of a file.

    Args:
        file: The file.
        prefix: What stands before its keys where they are typed.
        label: What the file is called where something is missing.
        lacking: Gets the keys that have no meaning.
        classes: The class of the keys below each dotted key; below ``""`` for the others.
    """
    for name in _flat(file.values):
        if name in SKIPPED:
            continue
        table, _, last = name.rpartition(".")
        kind, name_or_table = classes.get(table), name
        hints = get_type_hints(kind) if kind else {}
        if kind and last not in hints:
            hints = get_type_hints(kind.__init__)
        meaning = _documented(kind).get(last, "") if kind else ""
        while name_or_table and not meaning:
            meaning = file.comments.get(name_or_table, "")
            name_or_table = name_or_table.rpartition(".")[0]
        if not meaning:
            lacking.append(f"{label}: {prefix}{name}")
            continue
        value = _value(file.values, name)
        hint = _type(hints[last]) if last in hints else _type_of(value)
        yield f"{prefix}{name}", hint, _shown(value), _sentence(meaning)


def _sentence(text: str) -> str:
    """A comment as a sentence, in the words of YAML."""
    text = re.sub(r"\bNone\b", "`null`", text)
    first = text[0] if re.match(r"\w+:", text) else text[0].upper()  # a value stays as it is
    return first + text[1:] + ("" if text.endswith((".", "]")) else ".")


def _value(values: Any, name: str) -> Any:
    for key in name.split("."):
        values = values[key]
    return values


def _type_of(value: Any) -> str:
    """The type of a value that no type hint describes."""
    if isinstance(value, list):
        return "list"
    return "string or `null`" if value is None else _type(type(value))


def _table(heads: Sequence[str], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for row in rows:
        cells = [re.sub(r"<(?=\w)", "&lt;", cell.replace("|", "\\|")) for cell in row]
        lines.append(f"| {' | '.join(cells)} |".replace("``", "`"))
    return "\n".join(lines) + "\n"


def _keys(rows: Iterable[tuple[str, ...]]) -> str:
    heads = ("key", "type", "default", "meaning")
    return _table(heads, [(f"`{key}`", *rest) for key, *rest in rows])


def _values(lacking: list[str]) -> str:
    """The keys of ``config.yaml`` itself."""
    file = read(CONF / "config.yaml")
    classes = {key: _imported(CLASSES[key]) for key in ("target", "runtime", "resources")}
    hints = get_type_hints(_imported("widthopt.request.Request"))
    rows = _rows(file, "", label="config.yaml", lacking=lacking, classes=classes)
    return _keys(
        (key, _type(hints[key]) if key in hints else kind, *rest) for key, kind, *rest in rows
    )


def _group(group: str, lacking: list[str]) -> str:
    """The choices of a group, and the keys of each class among them."""
    files = [read(path) for path in sorted((CONF / group).glob("*.yaml"))]
    default = _default(group)
    parts = [f"Chosen by `{group}=CHOICE`; the default is `{group}={default}`.\n"]
    bases: dict[str, File] = {}
    for file in sorted(files, key=lambda file: (file.name != default, file.inherits)):
        bases.setdefault(str(file.values["_target_"]), file)
    rows = []
    for file in files:
        base = bases[str(file.values["_target_"])]
        changed = [
            f"`{name}`: {_shown(_value(file.values, name))}"
            for name in _flat(file.values)
            if name not in SKIPPED and not _same(file.values, base.values, name)
        ]
        rows.append((f"`{file.name}`", file.text, "; ".join(changed)))
    parts.append(_table(("choice", "", "differs in"), rows))
    prefix = f"{group.replace('/', '.')}."
    for target, base in bases.items():
        if set(base.values) <= set(SKIPPED):
            continue
        name = target.rpartition(".")[2]
        kind = _imported(CLASSES.get(name, target))
        classes = {"": kind}
        classes |= {
            key.removeprefix(f"{name}."): _imported(path)
            for key, path in CLASSES.items()
            if key.startswith(f"{name}.")
        }
        launcher = _imported(target)
        extra = _documented(launcher) if launcher is not kind else {}
        shown = replace(base, comments={**base.comments, **extra})
        label = f"{group}/{base.name}.yaml"
        rows_of = _rows(shown, prefix, label=label, lacking=lacking, classes=classes)
        parts += [f"Keys of `{name}`, with the defaults of `{base.name}`:\n", _keys(rows_of)]
    return "\n".join(parts)


def _same(values: Mapping[str, Any], rest: Mapping[str, Any], name: str) -> bool:
    try:
        return bool(_value(values, name) == _value(rest, name))
    except (KeyError, TypeError):
        return False


def _default(group: str) -> str:
    """The choice that ``config.yaml`` names for a group."""
    for entry in _plain((CONF / "config.yaml").read_text("utf-8"))["defaults"]:
        if isinstance(entry, Mapping):
            for key, choice in entry.items():
                if str(key).removeprefix("override ").removeprefix("/") == group:
                    return str(choice)
    raise ValueError(f"config.yaml names no choice of {group}, but every group has a default")


def _experiments() -> str:
    files = [read(path) for path in sorted((CONF / "experiment").glob("*.yaml"))]
    return (
        "Chosen by `experiment=NAME`. An experiment sets values of the groups above and what is "
        "swept; none is the default.\n\n"
        + _table(("experiment", ""), [(f"`{file.name}`", file.text) for file in files])
    )


def _figures(lacking: list[str]) -> str:
    """The keys of each kind of figure in the experiments."""
    seen: dict[str, dict[str, Any]] = {}
    for path in sorted((CONF / "experiment").glob("*.yaml")):
        for figure in _plain(path.read_text("utf-8")).get("figures", []):
            seen.setdefault(figure["_target_"], {}).update(figure)
    parts = ["Each entry of `figures` has a `_target_` and the keys of its class.\n"]
    for target, values in sorted(seen.items()):
        kind = _imported(target)
        hints, documented = get_type_hints(kind), _documented(kind)
        rows = []
        for key in (key for key in values if key not in SKIPPED):
            if key not in documented:
                lacking.append(f"{target}.{key}")
                continue
            rows.append((f"`{key}`", _type(hints[key]), documented[key]))
        parts += [f"`{target}`:\n", _table(("key", "type", "meaning"), rows)]
    return "\n".join(parts)
