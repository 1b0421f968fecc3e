"""Pairwise similarity of the widths of all searches: the paper's figure A2."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from widthopt.records import Record, Summary
from widthopt.reporting.figures.grid import NOTHING, TextTable
from widthopt.reporting.figures.groups import Axis, Group, clash_notes, panels, source_words
from widthopt.reporting.figures.style import PRINTED_INCHES, RC, SMALL
from widthopt.widths import cosine


MOST_VALUES = 12
"""Largest number of rows of a map whose cells show their values."""

LETTER_INCHES = 0.065
"""Width of one letter in the label of a source."""

MOST_INCHES = 4.0
"""Largest side of a map."""

COLOUR_MAP = "viridis"
"""Perceptually uniform, and readable in greyscale."""


class Entry(NamedTuple):
    """One row and column of a map: the records of one algorithm and source."""

    algorithm: str
    source: str
    records: Sequence[Record]


@dataclass(frozen=True, slots=True)
class PairwiseCosine:
    """Figure A2: similarity of optimised widths within and between algorithms.

    The similarity is the cosine of the target's multipliers, after extrapolation. It is averaged
    over the seeds that both sides have.

    Attributes:
        name: The stem of the file names.
        title: The title of the figure.
        axis: The axis on which sources and target differ.
        panels: The paper's label of the panel of each network.
        claim: The claim of the paper, in one sentence.

    Source: paper appendix D.
    """

    name: str
    title: str
    axis: Axis
    panels: Mapping[str, str]
    claim: str = ""

    def draw(self, records: Sequence[Record]) -> dict[str, Figure]:
        """Draw one map for each network, all with the same scale."""
        shown = panels(records, self.panels, self.axis)
        entries = [self._entries(group) for _, _, group in shown]
        matrices = [_matrix(entry) for entry in entries]
        values = [
            value for matrix in matrices for row in matrix for value in row if not math.isnan(value)
        ]
        least = min(0.95, math.floor(20 * min(values, default=0.0)) / 20)
        columns = min(2, max(1, len(shown)))
        rows = max(1, -(-len(shown) // columns))
        with mpl.rc_context({**RC, "axes.grid": False}):
            longest = max((len(entry.source) for group in entries for entry in group), default=0)
            margin = LETTER_INCHES * longest
            side = min(MOST_INCHES, (PRINTED_INCHES - 0.4 - margin) / columns)
            size = (PRINTED_INCHES, 1.4 + rows * (side + 0.7 + margin))
            figure = Figure(figsize=size, layout="compressed")
            figure.suptitle(self.title)
            cells = list(figure.subplots(rows, columns, squeeze=False).flat)
            image = None
            for axes, (_, title, _), entry, matrix in zip(
                cells, shown, entries, matrices, strict=False
            ):
                axes.set_title(title, loc="left", fontsize=9, pad=18 if entry else 6)
                if entry:
                    image = _map(axes, entry, matrix, least)
                    shared = [item[:2] for item in entry] == [entry[:2] for entry in entries[0]]
                    if shared and axes is not cells[0] and columns > 1:
                        axes.tick_params(labelleft=axes.get_subplotspec().is_first_col())
                else:
                    axes.text(0.5, 0.5, "no records yet", ha="center", transform=axes.transAxes)
                    axes.set(xticks=[], yticks=[])
            for axes in cells[len(shown) :]:
                axes.set_axis_off()
            if image is not None:
                figure.colorbar(
                    image, ax=cells, orientation="horizontal", shrink=0.5, aspect=40,
                    label="cosine similarity of multipliers",
                )  # fmt: skip
        return {self.name: figure}

    def _entries(self, group: Group | None) -> list[Entry]:
        if group is None:
            return []
        return [
            Entry(series, source_words(source, self.axis), point)
            for series, points in group.series(self.axis, "algorithm").items()
            for source, point in points.items()
        ]

    def table(self, records: Sequence[Record]) -> TextTable:
        """Return the numbers of the maps, and the similarity of each setting to uniform widths.

        A column has the same algorithm and source in all rows.
        """
        shown = panels(records, self.panels, self.axis)
        names: dict[tuple[str, str], None] = {}
        for _, _, group in shown:
            names.update(
                dict.fromkeys((item.algorithm, item.source) for item in self._entries(group))
            )
        rows: list[tuple[str, ...]] = []
        notes = [self.claim] if self.claim else []
        for network, title, group in shown:
            name = title.removeprefix(f"({self.panels[network]}) ")
            entries = self._entries(group)
            if not entries:
                notes.append(f"{name}: no records yet.")
            matrix = _matrix(entries)
            for entry, line in zip(entries, matrix, strict=True):
                cells = {
                    (second.algorithm, second.source): _format(value)
                    for second, value in zip(entries, line, strict=True)
                }
                rows.append(
                    (
                        name,
                        entry.algorithm,
                        entry.source,
                        _format(to_uniform(entry.records)),
                        *(cells.get(column, NOTHING) for column in names),
                    )
                )
        columns = (
            "network", "algorithm", f"source {self.axis}", "cosine to uniform",
            *(f"{algorithm} {source}" for algorithm, source in names),
        )  # fmt: skip
        return TextTable(self.title, columns, tuple(rows), (*notes, *clash_notes(shown)))


def mean_cosine(first: Sequence[Record], second: Sequence[Record]) -> float:
    """Return the mean cosine similarity over shared seeds, or NaN if there are none.

    Pairs of records with different width variables are left out.
    """
    by_seed = {record.found.seed: record.found.multipliers for record in second}
    return _mean(
        cosine(record.found.multipliers, by_seed[record.found.seed])
        for record in first
        if by_seed.get(record.found.seed, {}).keys() == record.found.multipliers.keys()
    )


def to_uniform(records: Sequence[Record]) -> float:
    """Return the mean cosine similarity to uniform widths, the vector of ones."""
    return _mean(
        cosine(record.found.multipliers, dict.fromkeys(record.found.multipliers, 1.0))
        for record in records
    )


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return Summary.of(values).mean if values else math.nan


def _format(value: float) -> str:
    return NOTHING if math.isnan(value) else f"{value:.3f}"


def _matrix(entries: Sequence[Entry]) -> list[list[float]]:
    """Return the similarities of all pairs, a symmetric matrix; each pair is computed once."""
    size = range(len(entries))
    half = {
        (row, column): mean_cosine(entries[row].records, entries[column].records)
        for row in size
        for column in size
        if row <= column
    }
    return [[half[min(row, column), max(row, column)] for column in size] for row in size]


def _map(
    axes: Axes, entries: Sequence[Entry], matrix: Sequence[Sequence[float]], least: float
) -> Any:
    """Draw a map and return its image, which the colour bar needs."""
    image = axes.imshow(matrix, cmap=COLOUR_MAP, vmin=least, vmax=1.0)
    sources = [entry.source for entry in entries]
    axes.set_xticks(range(len(entries)), sources, rotation=90, fontsize=SMALL)
    axes.set_yticks(range(len(entries)), sources, fontsize=SMALL)
    axes.tick_params(length=2)
    start = 0
    for algorithm in dict.fromkeys(entry.algorithm for entry in entries):
        count = sum(entry.algorithm == algorithm for entry in entries)
        axes.add_patch(
            Rectangle(
                (start - 0.5, start - 0.5), count, count, fill=False, edgecolor="white",
                linewidth=2.5,
            )
        )  # fmt: skip
        axes.add_patch(
            Rectangle(
                (start - 0.5, start - 0.5), count, count, fill=False, edgecolor="black",
                linewidth=1.2,
            )
        )  # fmt: skip
        axes.annotate(
            algorithm,
            (start + (count - 1) / 2, 1.0),
            (0, 4),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            ha="center",
            fontsize=SMALL,
            annotation_clip=False,
        )
        start += count
    if len(entries) <= MOST_VALUES:
        for row, line in enumerate(matrix):
            for column, value in enumerate(line):
                if not math.isnan(value):
                    light = value < (least + 1) / 2
                    axes.text(
                        column, row, _short(value), ha="center", va="center", fontsize=SMALL,
                        color="white" if light else "black",
                    )  # fmt: skip
    return image


def _short(value: float) -> str:
    """Return a value with two digits that fits in a cell: ``.96``, or ``1`` if it rounds to 1."""
    return f"{value:.2f}".removeprefix("0").removesuffix(".00")
