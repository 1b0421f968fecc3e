"""Runs side by side: rows named by what differs between them."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
from matplotlib.figure import Figure
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from widthopt import identity
from widthopt.errors import InputError
from widthopt.files import writing
from widthopt.records import Record, by_method, from_json
from widthopt.reporting.console import complaints, new_console
from widthopt.reporting.figures import savings as savings_figure
from widthopt.reporting.figures import similarity
from widthopt.reporting.figures.style import RC
from widthopt.reporting.figures.summary import table


class Gathered(NamedTuple):
    """Records that differ in nothing but their seeds, or in their method.

    Attributes:
        trained: What their final trainings depend on, but for widths and seed, as plain data.
        searched: Likewise of their searches; empty where nothing was searched.
        records: The records.
    """

    trained: Mapping[str, Any]
    searched: Mapping[str, Any]
    records: list[Record]


def compare(folders: Sequence[Path], *, into: Path) -> None:
    """Show runs side by side: algorithms of one network and data in one table and one figure.

    Args:
        folders: Runs' folders, with a ``record.json`` and a ``config.yaml`` each.
        into: Where the figures go, in a folder for each network and data set.

    Raises:
        InputError: A folder has no record, or the figures cannot be written.
    """
    found: list[Gathered] = []
    for folder in folders:
        path = folder / "record.json"
        try:
            text, config = path.read_bytes(), _config(folder / "config.yaml")
        except OSError as error:
            raise InputError(
                f"RUN is {folder}, but there is no record in it ({error.strerror}); give a run's "
                "folder, such as runs/resnet18-digits-..."
            ) from error
        recipe = {**config["recipe"], "search_epochs": None}
        trained = {**{key: config.get(key) for key in _TRAINED}, "recipe": recipe}
        for method, records in by_method(from_json(text, name=str(path))).items():
            searched = {key: config.get(key) for key in _SEARCHED[method]}
            found.append(Gathered(trained, searched, records))
    side_by_side(found, into=into)


def _config(path: Path) -> dict[str, Any]:
    """The configuration that a run has left."""
    try:
        config = OmegaConf.to_container(OmegaConf.load(path))
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError):
        config = None
    if not isinstance(config, dict) or not isinstance(config.get("recipe"), dict):
        raise InputError(
            f"{path} is not what a run leaves, but runs are told apart by it; restore it, or give "
            "the run's command again"
        )
    return {str(key): value for key, value in config.items()}


_TRAINED = ("network", "dataset", "target")


_SEARCHED: Mapping[str, Sequence[str]] = {
    "uniform": (),
    "direct": ("algorithm", "recipe", "budget_macs"),
    "transfer": ("algorithm", "recipe", "budget_macs", "projection", "extrapolation"),
}
"""Groups of a configuration that a final training, and the search of a method, depend on."""


def side_by_side(found: Sequence[Gathered], *, into: Path) -> None:
    """Show records side by side: a table, one of similarities and a figure for each target.

    What was trained otherwise has a table of its own; what was searched otherwise has a row of
    its own, named by the values that differ.

    Args:
        found: What there is; what is there twice is shown once.
        into: Where the figures go, in a folder for each network and data set.

    Raises:
        InputError: The figures cannot be written.
    """
    targets: dict[str, list[Gathered]] = {}
    for gathered in found:
        first = gathered.records[0]
        name = f"{first.network}-{first.dataset}-{_axes_name(first.target)}".replace("/", "_")
        targets.setdefault(name, []).append(gathered)
    console = new_console()
    for name, target in targets.items():
        titles = _labels([gathered.trained for gathered in target])
        for label in dict.fromkeys(titles):
            records = _label_records(
                [gathered for gathered, own in zip(target, titles, strict=True) if own == label]
            )
            if label:
                console.print(label, style="bold")
            console.print(table(records))
            alike = similarity.table(records)
            if alike.row_count:
                console.print(alike)
            for line in complaints(records):
                console.print(line, soft_wrap=True)
            with mpl.rc_context(RC):
                figure = Figure()
                savings_figure.draw(figure.subplots(), records)
                path = into / f"{name} {label}".strip().replace(" ", "-") / "accuracy.png"
                with writing(path.parent):
                    path.parent.mkdir(parents=True, exist_ok=True)
                    figure.savefig(path)
            console.print(str(path), soft_wrap=True)


def _axes_name(setting: Mapping[str, float]) -> str:
    """A setting's axes as a part of a name: 0.25-1-20-1."""
    return "-".join(f"{value:g}" for value in setting.values())


def _label_records(found: Sequence[Gathered]) -> list[Record]:
    """Records that were trained alike, each once; what was searched otherwise has its own name."""
    groups: dict[tuple[str, str], list[Gathered]] = {}
    for gathered in found:
        first = gathered.records[0]
        groups.setdefault((first.algorithm, first.found.method), []).append(gathered)
    result: list[Record] = []
    for (algorithm, method), group in groups.items():
        proxies = [_axes_name(gathered.records[0].proxy) for gathered in group]
        if method != "transfer" or len(set(proxies)) == 1:
            proxies = [""] * len(group)
        labels = _labels([gathered.searched for gathered in group], proxies)
        for label, gathered in zip(labels, group, strict=True):
            for record in gathered.records:
                if not any(record.stages == known.stages for known in result):
                    name = f"{algorithm} {label}".strip()
                    result.append(replace(record, algorithm=name))
    return result


def _labels(tables: Sequence[Mapping[str, Any]], ends: Sequence[str] = ()) -> list[str]:
    """What tells tables of plain values apart, for each: as few of the values as do; a known end.

    Args:
        tables: Nested tables; equal ones have the same label, and no others.
        ends: What each label ends with; where that tells them apart, no value is needed.
    """
    ends = ends or [""] * len(tables)
    values = [
        {path: value for path, value in item.items() if not (any(ends) and path[0] in _PROXY)}
        for item in identity.differing_values(tables)
    ]
    chosen: list[tuple[str, ...]] = []
    kinds: list[tuple[str, ...]] = [(end,) for end in ends]
    for path in values[0]:
        more = [
            (*kind, identity.canonical(item[path]))
            for kind, item in zip(kinds, values, strict=True)
        ]
        if len(set(more)) > len(set(kinds)):
            chosen, kinds = [*chosen, path], more
    labels = [
        " ".join(filter(None, (*(f"{path[-1]} {_short(item[path])}" for path in chosen), end)))
        for item, end in zip(values, ends, strict=True)
    ]
    # Values that are cut or rounded may read alike.
    alike: dict[str, dict[tuple[str, ...], int]] = {}
    for label, kind in zip(labels, kinds, strict=True):
        alike.setdefault(label, {}).setdefault(kind, len(alike[label]) + 1)
    return [
        f"{label} {alike[label][kind]}" if len(alike[label]) > 1 else label
        for label, kind in zip(labels, kinds, strict=True)
    ]


_PROXY = ("projection", "setting")
"""Tables that say no more than a proxy's axes do."""


def _short(value: Any) -> str:
    """A value as a part of a name."""
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return re.sub(r"[^\w.,+-]+", "", text)[:24]


def runs(root: Path) -> list[Path]:
    """The folders below a root that have a record, in the order in which these were written."""
    found = root.glob("*/record.json")
    return [path.parent for path in sorted(found, key=lambda item: (item.stat().st_mtime_ns, item))]
