"""Comparison of runs: tables whose rows are named by the values that differ."""

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
from widthopt.reporting.console import new_console, search_problems
from widthopt.reporting.figures import savings as savings_figure
from widthopt.reporting.figures import similarity
from widthopt.reporting.figures.style import RC
from widthopt.reporting.figures.summary import table


class RecordGroup(NamedTuple):
    """Records of one method whose values differ only in the seed.

    Attributes:
        trained: The values that their final trainings depend on, except widths and seed.
        searched: The values that their searches depend on, except the seed; empty for the
            method ``uniform``.
        records: The records.
    """

    trained: Mapping[str, Any]
    searched: Mapping[str, Any]
    records: list[Record]


def compare(folders: Sequence[Path], *, into: Path) -> None:
    """Print and draw a comparison of runs: one table and one figure for each target.

    Args:
        folders: The folders of the runs, each with a ``record.json`` and a ``config.yaml``.
        into: The output folder; it gets one folder for each network, data set and target.

    Raises:
        InputError: A folder has no record, or the figures cannot be written.
    """
    groups: list[RecordGroup] = []
    for folder in folders:
        path = folder / "record.json"
        try:
            text, config = path.read_bytes(), _config(folder / "config.yaml")
        except OSError as error:
            raise InputError(
                f"RUN is {folder}, but it contains no record ({error.strerror}); give the "
                "folder of a finished run, for example runs/resnet18-digits-..."
            ) from error
        recipe = {**config["recipe"], "search_epochs": None}
        trained = {**{key: config.get(key) for key in _TRAINED}, "recipe": recipe}
        for method, records in by_method(from_json(text, name=str(path))).items():
            searched = {key: config.get(key) for key in _SEARCHED[method]}
            groups.append(RecordGroup(trained, searched, records))
    show_comparison(groups, into=into)


def _config(path: Path) -> dict[str, Any]:
    """Load the configuration of a run."""
    try:
        config = OmegaConf.to_container(OmegaConf.load(path))
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError):
        config = None
    if not isinstance(config, dict) or not isinstance(config.get("recipe"), dict):
        raise InputError(
            f"{path} is not the configuration of a run, but runs are named by it; restore it, or "
            "start the run again"
        )
    return {str(key): value for key, value in config.items()}


_TRAINED = ("network", "dataset", "target")
"""Groups of a configuration, besides the recipe, that a final training depends on."""


_SEARCHED: Mapping[str, Sequence[str]] = {
    "uniform": (),
    "direct": ("algorithm", "recipe", "budget_macs"),
    "transfer": ("algorithm", "recipe", "budget_macs", "projection", "extrapolation"),
}
"""Groups of a configuration that the search of each method depends on."""


def show_comparison(groups: Sequence[RecordGroup], *, into: Path) -> None:
    """Print a table of results and one of similarities for each target, and draw a figure.

    Records with different final trainings are in different tables. Records with different
    searches are different rows, named by the values that differ.

    Args:
        groups: The records; a record that occurs twice is shown once.
        into: The output folder; it gets one folder for each network, data set and target.

    Raises:
        InputError: The figures cannot be written.
    """
    targets: dict[str, list[RecordGroup]] = {}
    for group in groups:
        first = group.records[0]
        name = f"{first.network}-{first.dataset}-{_axes_name(first.target)}".replace("/", "_")
        targets.setdefault(name, []).append(group)
    console = new_console()
    for name, target in targets.items():
        titles = _labels([group.trained for group in target])
        for title in dict.fromkeys(titles):
            records = _label_records(
                [group for group, label in zip(target, titles, strict=True) if label == title]
            )
            if title:
                console.print(title, style="bold")
            console.print(table(records))
            similarities = similarity.table(records)
            if similarities.row_count:
                console.print(similarities)
            for line in search_problems(records):
                console.print(line, soft_wrap=True)
            with mpl.rc_context(RC):
                figure = Figure()
                savings_figure.draw(figure.subplots(), records)
                path = into / f"{name} {title}".strip().replace(" ", "-") / "accuracy.png"
                with writing(path.parent):
                    path.parent.mkdir(parents=True, exist_ok=True)
                    figure.savefig(path)
            console.print(str(path), soft_wrap=True)


def _axes_name(setting: Mapping[str, float]) -> str:
    """Return the axes of a setting as a part of a name: ``0.25-1-20-1``."""
    return "-".join(f"{value:g}" for value in setting.values())


def _label_records(groups: Sequence[RecordGroup]) -> list[Record]:
    """Return each record once; those of different searches get different algorithm names.

    Args:
        groups: Groups whose final trainings depend on the same values.
    """
    searches: dict[tuple[str, str], list[RecordGroup]] = {}
    for group in groups:
        first = group.records[0]
        searches.setdefault((first.algorithm, first.found.method), []).append(group)
    result: list[Record] = []
    for (algorithm, method), members in searches.items():
        proxies = [_axes_name(group.records[0].proxy) for group in members]
        if method != "transfer" or len(set(proxies)) == 1:
            proxies = [""] * len(members)
        labels = _labels([group.searched for group in members], proxies)
        for label, group in zip(labels, members, strict=True):
            for record in group.records:
                if not any(record.stages == known.stages for known in result):
                    name = f"{algorithm} {label}".strip()
                    result.append(replace(record, algorithm=name))
    return result


def _labels(mappings: Sequence[Mapping[str, Any]], suffixes: Sequence[str] = ()) -> list[str]:
    """Return a label for each mapping, of as few of the values as tell the mappings apart.

    Args:
        mappings: Nested mappings; equal ones get equal labels, and different ones different labels.
        suffixes: The end of each label; a value that they already imply is not in the label.
    """
    suffixes = suffixes or [""] * len(mappings)
    values = [
        {
            path: value
            for path, value in differing.items()
            if not (any(suffixes) and path[0] in _PROXY)
        }
        for differing in identity.differing_values(mappings)
    ]
    chosen: list[tuple[str, ...]] = []
    kinds: list[tuple[str, ...]] = [(suffix,) for suffix in suffixes]
    for path in values[0]:
        more = [
            (*kind, identity.canonical(differing[path]))
            for kind, differing in zip(kinds, values, strict=True)
        ]
        if len(set(more)) > len(set(kinds)):
            chosen, kinds = [*chosen, path], more
    labels = [
        " ".join(
            filter(None, (*(f"{path[-1]} {_short(differing[path])}" for path in chosen), suffix))
        )
        for differing, suffix in zip(values, suffixes, strict=True)
    ]
    # Values that are cut or rounded may look equal; a number distinguishes them.
    numbers: dict[str, dict[tuple[str, ...], int]] = {}
    for label, kind in zip(labels, kinds, strict=True):
        numbers.setdefault(label, {}).setdefault(kind, len(numbers[label]) + 1)
    return [
        f"{label} {numbers[label][kind]}" if len(numbers[label]) > 1 else label
        for label, kind in zip(labels, kinds, strict=True)
    ]


_PROXY = ("projection", "setting")
"""Keys of mappings whose values the axes of a proxy imply."""


def _short(value: Any) -> str:
    """Return a value as a part of a name."""
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return re.sub(r"[^\w.,+-]+", "", text)[:24]


def runs(root: Path) -> list[Path]:
    """Return the folders below a root that contain a record, the oldest record first."""
    paths = root.glob("*/record.json")
    return [path.parent for path in sorted(paths, key=lambda path: (path.stat().st_mtime_ns, path))]
