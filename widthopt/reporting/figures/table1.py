"""Accuracy and similarity on two data sets by configuration: the paper's table 1."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, NamedTuple

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from widthopt.records import Record, Summary
from widthopt.reporting.figures.cosine import mean_cosine, to_uniform
from widthopt.reporting.figures.grid import NOTHING, TextTable
from widthopt.reporting.figures.groups import Group, clash_notes, direct_groups
from widthopt.reporting.figures.style import (
    COLOURS,
    MARKERS,
    PRINTED_INCHES,
    RC,
    SMALL,
    series_style,
)


Configuration = tuple[float, float]
"""Depth and width multiplier of a target; sorting gives the order of the paper."""

PAPER_CONFIGURATIONS: Mapping[Configuration, str] = {
    (1, 0.312): "0.3w,1d",
    (1, 0.5): "0.5w,1d",
    (1, 0.707): "0.7w,1d",
    (1, 1.0): "1w,1d",
    (1, 1.414): "1.4w,1d",
    (1, 1.732): "1.7w,1d",
    (2, 1.0): "1w,2d",
    (3, 1.0): "1w,3d",
    (4, 1.0): "1w,4d",
}
"""The paper's columns. Source: paper appendix C, table 1."""

PAPER_NETWORK = "resnet18"

PAPER: Mapping[tuple[str, str], Sequence[float]] = {
    ("CIFAR-100", "uniform"): (61.1, 64.6, 66.5, 67.5, 68.8, 69.4, 68.7, 69.0, 69.9),
    ("CIFAR-100", "dmcp"): (60.8, 64.5, 66.4, 67.4, 68.4, 69.2, 68.5, 69.0, 69.8),
    ("ImageNet", "uniform"): (53.1, 61.7, 66.8, 70.7, 73.4, 75.0, 74.4, 76.2, 77.0),
    ("ImageNet", "dmcp"): (56.2, 64.1, 68.2, 71.8, 74.3, 75.3, 74.7, 76.0, 77.0),
    ("cosine(CIFAR-100, ImageNet)", "dmcp"): (
        0.96, 0.95, 0.95, 0.94, 0.94, 0.95, 0.91, 0.91, 0.92,
    ),
    ("cosine(CIFAR-100, uniform)", "dmcp"): (
        0.93, 0.92, 0.92, 0.92, 0.91, 0.92, 0.88, 0.88, 0.88,
    ),
}  # fmt: skip
"""The paper's numbers, in the order of its columns. Source: paper appendix C, table 1."""


class Row(NamedTuple):
    """Records of one data set and one algorithm or the baseline, by configuration."""

    dataset: str
    widths: str
    records: Mapping[Configuration, Sequence[Record]]


@dataclass(frozen=True, slots=True)
class Table1:
    """Table 1: similarity and accuracy of widths that are searched on two data sets.

    Only the baseline and direct searches are used.

    Attributes:
        name: The stem of the file names.
        title: The title of the table.
        datasets: The paper's label of each data set.
        network: The name of the network.
        claim: The claim of the paper, in one sentence.

    Source: paper appendix C, table 1.
    """

    name: str
    title: str
    datasets: Mapping[str, str]
    network: str
    claim: str = ""

    def draw(self, records: Sequence[Record]) -> dict[str, Figure]:
        """Draw one panel for each data set: the accuracy of each configuration.

        Hollow markers are the numbers of the paper.
        """
        rows, _ = self._rows(records)
        configurations = _configurations(rows)
        order = sorted({row.widths for row in rows} - {"uniform"})
        with mpl.rc_context(RC):
            panels = list(self.datasets.values())
            size = (PRINTED_INCHES, 3.9)
            figure = Figure(figsize=size, layout="constrained")
            figure.suptitle(self.title)
            cells = figure.subplots(1, max(1, len(panels)), squeeze=False).flat
            handles: dict[str, Any] = {}
            for axes, label in zip(cells, panels, strict=False):
                group = [row for row in rows if row.dataset == label]
                axes.set_title(f"{self.network}, {label}", loc="left", fontsize=9)
                if not group:
                    axes.text(0.5, 0.5, "no records yet", ha="center", transform=axes.transAxes)
                    axes.set(xticks=[], yticks=[])
                    continue
                for row in group:
                    number = order.index(row.widths) if row.widths in order else -1
                    self._line(axes, row, configurations, number)
                names = [_column(configuration) for configuration in configurations]
                axes.set_xticks(range(len(names)), names, rotation=60, fontsize=SMALL)
                axes.set_xlim(-0.5, len(names) - 0.5)
                axes.set(
                    xlabel="width and depth multiplier of the target", ylabel="top-1 accuracy (%)"
                )
                drawn, labels = axes.get_legend_handles_labels()
                handles.update(zip(labels, drawn, strict=True))
            names = [name for item in ("uniform", *order) for name in (item, f"{item}, paper")]
            names = [name for name in names if name in handles]
            if names:
                figure.legend(
                    [handles[name] for name in names],
                    names,
                    loc="outside lower center",
                    ncols=4,
                    fontsize=SMALL,
                )
        return {self.name: figure}

    def _line(
        self, axes: Axes, row: Row, configurations: Sequence[Configuration], number: int
    ) -> None:
        """Draw the accuracy of a row with deviations, and the numbers of the paper."""
        style: dict[str, Any] = {
            "color": COLOURS["uniform"],
            "marker": MARKERS["uniform"],
            "linestyle": "--",
        }
        style = style if number < 0 else series_style(number)
        done = [configuration for configuration in configurations if configuration in row.records]
        top1 = [Summary.of(record.top1 for record in row.records[place]) for place in done]
        axes.errorbar(
            [configurations.index(item) for item in done],
            [summary.mean for summary in top1],
            yerr=[summary.std for summary in top1]
            if any(summary.seeds > 1 for summary in top1)
            else None,
            label=row.widths,
            markersize=4,
            linewidth=1.3,
            capsize=2,
            **style,
        )
        paper = self._paper(row.dataset, row.widths)
        printed = [configuration for configuration in configurations if configuration in paper]
        if printed:
            axes.plot(
                [configurations.index(item) for item in printed],
                [paper[item] for item in printed],
                color=style["color"],
                marker=style["marker"],
                markerfacecolor="none",
                markersize=7,
                linestyle="none",
                label=f"{row.widths}, paper",
            )

    def table(self, records: Sequence[Record]) -> TextTable:
        """Return the rows and columns of the paper: accuracies, then similarities of widths."""
        rows, notes = self._rows(records)
        configurations = _configurations(rows)
        lines: list[tuple[str, ...]] = []

        def add(what: str, widths: str, ours: Mapping[Configuration, str], *, digits: int) -> None:
            lines.append(
                (
                    what,
                    widths,
                    "ours",
                    *(ours.get(configuration, NOTHING) for configuration in configurations),
                )
            )
            paper = self._paper(what, widths)
            if any(configuration in paper for configuration in configurations):
                cells = (
                    f"{paper[place]:.{digits}f}" if place in paper else NOTHING
                    for place in configurations
                )
                lines.append((what, widths, "paper", *cells))

        for row in rows:
            cells = {
                place: str(Summary.of(item.top1 for item in record))
                for place, record in row.records.items()
            }
            add(row.dataset, row.widths, cells, digits=1)
        searched = [row for row in rows if row.widths != "uniform"]
        for first, second in combinations(searched, 2):
            if first.widths == second.widths:
                shared = first.records.keys() & second.records.keys()
                cells = {place: _format(mean_cosine(first.records[place], second.records[place]))
                         for place in shared}  # fmt: skip
                add(f"cosine({first.dataset}, {second.dataset})", first.widths, cells, digits=2)
        for row in searched:
            cells = {place: _format(to_uniform(record)) for place, record in row.records.items()}
            add(f"cosine({row.dataset}, uniform)", row.widths, cells, digits=2)
        columns = (
            "what",
            "widths",
            "from",
            *(_column(configuration) for configuration in configurations),
        )
        notes = [self.claim, *notes] if self.claim else notes
        return TextTable(self.title, columns, tuple(lines), tuple(notes))

    def _paper(self, what: str, widths: str) -> dict[Configuration, float]:
        """Return the numbers of the paper for a row; empty if it has no such row."""
        numbers = PAPER.get((what, widths)) if self.network == PAPER_NETWORK else None
        return dict(zip(PAPER_CONFIGURATIONS, numbers, strict=True)) if numbers else {}

    def _rows(self, records: Sequence[Record]) -> tuple[list[Row], list[str]]:
        """Return the rows by data set, the baseline first, and notes on missing rows."""
        rows, notes = [], []
        all_groups = direct_groups(records, network=self.network)
        for dataset, label in self.datasets.items():
            by_resolution: dict[float, dict[Configuration, Group]] = {}
            for group in all_groups:
                if group.dataset == dataset:
                    resolution = group.target["resolution"]
                    by_resolution.setdefault(resolution, {})[_place(group)] = group
            if not by_resolution:
                notes.append(f"{label}: no records yet.")
                continue
            chosen = max(by_resolution, key=lambda resolution: len(by_resolution[resolution]))
            rest = sorted(by_resolution.keys() - {chosen})
            if rest:
                left_out = ", ".join(f"{item:g}" for item in rest)
                notes.append(f"{label}: at {chosen:g} pixels; left out: {left_out}.")
            members = by_resolution[chosen]
            rows.append(
                Row(label, "uniform", {place: member.uniform for place, member in members.items()})
            )
            for name in sorted(
                {item.algorithm for group in members.values() for item in group.searched}
            ):
                items = {
                    place: [item for item in group.searched if item.algorithm == name]
                    for place, group in members.items()
                }
                rows.append(Row(label, name, items))
            shown = [
                (dataset, f"{label}, {_column(place)}", member) for place, member in members.items()
            ]
            notes += clash_notes(shown)
        filled = [
            row._replace(records={place: record for place, record in row.records.items() if record})
            for row in rows
        ]
        return [row for row in filled if row.records], notes


def _configurations(rows: Sequence[Row]) -> list[Configuration]:
    return sorted({place for row in rows for place in row.records})


def _place(group: Group) -> Configuration:
    return group.target["depth"], group.target["width"]


def _column(place: Configuration) -> str:
    depth, width = place
    return PAPER_CONFIGURATIONS.get(place, f"{width:g}w,{depth:g}d")


def _format(value: float) -> str:
    return NOTHING if math.isnan(value) else f"{value:.2f}"
