"""Accuracy against saved overhead for each source: the paper's figures 3 to 6.

*Saved* is relative to the counted overhead of the direct search. *Direct* is the point whose source
is the target itself.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import ScaledTranslation

from widthopt.records import Record, Summary
from widthopt.reporting.figures.grid import NOTHING, TextTable
from widthopt.reporting.figures.groups import (
    Axis,
    By,
    Group,
    Source,
    clash_notes,
    panels,
    source_words,
)
from widthopt.reporting.figures.savings import LEAST_SPAN
from widthopt.reporting.figures.style import COLOURS, PRINTED_INCHES, RC, SMALL, series_style


BASELINE = "uniform (not optimised)"
"""Name of the baseline in the legend."""

APART_POINTS = 2.5
"""Horizontal offset between neighbouring series in points, so that bars do not overlap."""

LEGEND_LETTERS = 75
"""Number of letters that fit in one line of a legend."""

TILTED_POINTS = 3.7
"""Height that each letter adds to a tilted label, in points."""

LABEL_GAP = 7.0
"""Smallest distance between two labels of sources, in per cent of the horizontal axis."""

POINTS_PER_PERCENT = 1.8
"""Approximate width of one per cent of the horizontal axis, in points; only for labels."""


class Point(NamedTuple):
    """The results of one source over seeds.

    Attributes:
        saved: Saved part of the counted direct overhead, in per cent; the mean over seeds.
        top1: Top-1 accuracy over seeds, in per cent.
        records: The records, one for each seed.
    """

    saved: float
    top1: Summary
    records: Sequence[Record]


@dataclass(frozen=True, slots=True)
class Transfer:
    """Figures 3a-d, 4, 5a-d and 6: accuracy of widths that a cheaper search found.

    Attributes:
        name: The stem of the file names.
        title: The title of the figure.
        axis: The axis on which sources and target differ.
        series: The meaning of a line: an algorithm, or an extrapolation strategy (figure 4).
        panels: The paper's label of the panel of each network.
        claim: The claim of the paper, in one sentence.
        paper_saved: Overhead that the paper saves at most, in per cent, by network.

    Source: paper section 4, figures 3 to 6.
    """

    name: str
    title: str
    axis: Axis
    series: By
    panels: Mapping[str, str]
    claim: str
    paper_saved: Mapping[str, float]

    def draw(self, records: Sequence[Record]) -> dict[str, Figure]:
        """Draw one panel for each network: accuracy against saved overhead.

        Bars and the shade of the baseline are one sample standard deviation over seeds. Series are
        drawn with a small horizontal offset; their data are unchanged.
        """
        shown = panels(records, self.panels, self.axis)
        curves = [self._curves(group) for _, _, group in shown]
        order = sorted({name for curve in curves for name in curve})
        sources = {source for curve in curves for points in curve.values() for source in points}
        longest = max((len(source_words(item, self.axis)) for item in sources), default=0)
        pad = 20.0 + TILTED_POINTS * longest
        columns = min(2, max(1, len(shown)))
        rows = max(1, -(-len(shown) // columns))
        with mpl.rc_context(RC):
            size = (PRINTED_INCHES, 0.9 + rows * (2.7 + pad / 72))
            figure = Figure(figsize=size, layout="constrained")
            figure.suptitle(self.title)
            cells = list(figure.subplots(rows, columns, squeeze=False).flat)
            handles: dict[str, Any] = {}
            for axes, (_, title, group), curve in zip(cells, shown, curves, strict=False):
                self._panel(axes, group, curve, order)
                axes.set_title(title, loc="left", pad=pad, fontsize=9)
                drawn, names = axes.get_legend_handles_labels()
                handles.update(zip(names, drawn, strict=True))
            for axes in cells[len(shown) :]:
                axes.set_axis_off()
            names = [name for name in [*order, BASELINE] if name in handles]
            if names:
                figure.legend(
                    [handles[name] for name in names],
                    names,
                    title=f"above the panels: the source's {self._source_name()}",
                    loc="outside lower center",
                    ncols=4 if sum(map(len, names)) < LEGEND_LETTERS else 2,
                    fontsize=SMALL,
                    title_fontsize=SMALL,
                )
        return {self.name: figure}

    def _source_name(self) -> str:
        return "width, depth, resolution, fraction" if self.axis == "compound" else self.axis

    def _curves(self, group: Group | None) -> dict[str, dict[Source, Point]]:
        """Return the points of each series, by source in descending order."""
        if group is None:
            return {}
        return {
            name: {source: _point(point) for source, point in points.items()}
            for name, points in group.series(self.axis, self.series).items()
        }

    def _panel(
        self,
        axes: Axes,
        group: Group | None,
        curves: Mapping[str, Mapping[Source, Point]],
        order: Sequence[str],
    ) -> None:
        axes.set_xlabel("width optimization overhead saved (%)")
        axes.set_xlim(-4, 104)
        if group is None:
            axes.text(0.5, 0.5, "no records yet", ha="center", transform=axes.transAxes)
            axes.set_yticks([])
            return
        axes.set_ylabel(f"{group.dataset} top-1 accuracy (%)")
        heights = []
        if group.uniform:
            heights.append(Summary.of(record.top1 for record in group.uniform))
            _baseline(axes, heights[0])
        saved: dict[Source, list[float]] = {}
        for name, points in curves.items():
            _curve(axes, list(points.values()), name=name, number=order.index(name), of=len(order))
            for source, point in points.items():
                heights.append(point.top1)
                saved.setdefault(source, []).append(point.saved)
        places = {source: sum(values) / len(values) for source, values in saved.items()}
        if places:
            axes.set_xlim(left=min(-4.0, min(places.values()) - 4))
        axes.set_ylim(*_limits(heights))
        _label_sources(axes, {source_words(place, self.axis): x for place, x in places.items()})

    def table(self, records: Sequence[Record]) -> TextTable:
        """Return a row for each point of each series; notes compare with the paper.

        Differences are between means, in points of accuracy. *Still above uniform* is the
        largest saving whose mean accuracy is above that of the baseline. *Within a deviation of
        direct or better* is the largest saving whose mean accuracy is at least that of the direct
        search minus its standard deviation.
        """
        shown = panels(records, self.panels, self.axis)
        rows: list[tuple[str, ...]] = []
        notes = [self.claim] if self.claim else []
        for network, title, group in shown:
            name = title.removeprefix(f"({self.panels[network]}) ")
            paper = self.paper_saved.get(network)
            if paper is not None:
                notes.append(f"{name}: the paper saves up to {paper:g}%.")
            if group is None:
                notes.append(f"{name}: no records yet.")
                continue
            uniform = Summary.of(record.top1 for record in group.uniform) if group.uniform else None
            if uniform is not None:
                rows.append(_baseline_row(name, uniform))
            above, matching = [], []
            for series, points in self._curves(group).items():
                direct = points.get(group.direct(self.axis))
                rows += [
                    (name, series, source_words(source, self.axis), *_cells(point, uniform, direct))
                    for source, point in points.items()
                ]
                proxies = {
                    source_words(source, self.axis): point
                    for source, point in points.items()
                    if point is not direct
                }
                above.append(f"{series} {_above(proxies, uniform)}")
                matching.append(f"{series} {_matching(proxies, direct)}")
            if above:
                notes.append(f"{name}: saved, still above uniform: {'; '.join(above)}.")
                notes.append(
                    f"{name}: saved, within a deviation of direct or better: {'; '.join(matching)}."
                )
        columns = (
            "network", "series", f"source {self.axis}", "seeds", "saved %", "nominal",
            "seconds saved %", "top-1 %", "minus uniform", "minus direct", "flags",
        )  # fmt: skip
        return TextTable(self.title, columns, tuple(rows), (*notes, *clash_notes(shown)))


def _point(records: Sequence[Record]) -> Point:
    saved = Summary.of(100 * record.found.saved for record in records)
    return Point(saved.mean, Summary.of(record.top1 for record in records), records)


def _baseline(axes: Axes, top1: Summary) -> None:
    colour = COLOURS["uniform"]
    axes.axhline(top1.mean, color=colour, linestyle="--", linewidth=1.2, label=BASELINE, zorder=1.5)
    low, high = top1.mean - top1.std, top1.mean + top1.std
    axes.axhspan(low, high, color=colour, alpha=0.12, linewidth=0)


def _curve(axes: Axes, points: Sequence[Point], *, name: str, number: int, of: int) -> None:
    """Draw a line through the means, with bars if there is more than one seed."""
    ordered = sorted(points, key=lambda point: point.saved)
    inches = APART_POINTS * (number - (of - 1) / 2) / 72
    figure = axes.get_figure()
    assert figure is not None
    shift = ScaledTranslation(inches, 0, figure.dpi_scale_trans)
    bars = any(point.top1.seeds > 1 for point in ordered)
    axes.errorbar(
        [point.saved for point in ordered],
        [point.top1.mean for point in ordered],
        yerr=[point.top1.std for point in ordered] if bars else None,
        transform=axes.transData + shift,
        label=name,
        markersize=4.5,
        linewidth=1.3,
        elinewidth=0.9,
        capsize=2.0,
        **series_style(number),
    )


def _limits(heights: Sequence[Summary]) -> tuple[float, float]:
    """Return the limits of the vertical axis: all points with their deviations, and a margin."""
    low = min(height.mean - height.std for height in heights)
    high = max(height.mean + height.std for height in heights)
    slack = max(0.08 * (high - low), (LEAST_SPAN - (high - low)) / 2)
    return low - slack, high + slack


def _label_sources(axes: Axes, words: Mapping[str, float]) -> None:
    """Label each source above the panel at its saving; a thin line connects a label that was moved.

    Labels are tilted towards the middle of the panel, so that long labels stay above it.
    """
    spread = _spread(list(words.values()), gap=LABEL_GAP)
    for (text, place), moved in zip(words.items(), spread, strict=True):
        shift = POINTS_PER_PERCENT * (moved - place)
        right = place > 50  # noqa: PLR2004 (the middle)
        axes.annotate(
            "",
            xy=(place, 1.0),
            xytext=(shift, 8),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            arrowprops={
                "arrowstyle": "-", "linewidth": 0.6, "color": "#777777", "shrinkA": 0, "shrinkB": 0,
            },
            annotation_clip=False,
        )  # fmt: skip
        axes.annotate(
            text,
            xy=(place, 1.0),
            xytext=(shift, 9),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            rotation=-45 if right else 45,
            ha="right" if right else "left",
            rotation_mode="anchor",
            fontsize=SMALL,
            annotation_clip=False,
        )


def _spread(places: Sequence[float], *, gap: float) -> list[float]:
    """Return places in the same order, at least a gap apart and close to the given ones."""
    order = sorted(range(len(places)), key=lambda number: places[number])
    runs: list[tuple[float, list[int]]] = []  # centre and members of labels that touch
    for number in order:
        runs.append((places[number], [number]))
        while len(runs) > 1:
            (left, items), (right, rest) = runs[-2:]
            if right - left >= gap * (len(items) + len(rest)) / 2:
                break
            members = items + rest
            runs[-2:] = [(sum(places[member] for member in members) / len(members), members)]
    moved = list(places)
    for centre, members in runs:
        for rank, number in enumerate(members):
            moved[number] = centre + gap * (rank - (len(members) - 1) / 2)
    return moved


def _baseline_row(name: str, top1: Summary) -> tuple[str, ...]:
    return (
        name, "uniform", NOTHING, str(top1.seeds), NOTHING, NOTHING, NOTHING, _accuracy(top1),
        NOTHING, NOTHING, NOTHING,
    )  # fmt: skip


def _cells(point: Point, uniform: Summary | None, direct: Point | None) -> tuple[str, ...]:
    """Return the cells of a point, from ``seeds`` to ``flags``."""
    return (
        str(point.top1.seeds),
        f"{point.saved:z.2f}",
        f"{point.records[0].found.nominal_saving:.4g}x",
        _saved_seconds_text(point, direct),
        _accuracy(point.top1),
        _difference(point.top1, uniform),
        _difference(point.top1, None if direct is None else direct.top1),
        _flags(point.records),
    )


def _saved_seconds_text(point: Point, direct: Point | None) -> str:
    """Return the saved wall-clock time, which may be less than the saving in MACs."""
    reference = _seconds(direct) if direct else 0.0
    return f"{100 * (1 - _seconds(point) / reference):z.1f}" if reference > 0 else NOTHING


def _seconds(point: Point) -> float:
    return Summary.of(record.found.search_seconds for record in point.records).mean


def _accuracy(top1: Summary) -> str:
    return f"{top1.mean:.2f}±{top1.std:.2f}" if top1.seeds > 1 else f"{top1.mean:.2f}"


def _difference(top1: Summary, second: Summary | None) -> str:
    return NOTHING if second is None else f"{top1.mean - second.mean:+z.2f}"


def _flags(records: Sequence[Record]) -> str:
    """Return how many searches were valid and reached their budget, and the problems of others."""
    diagnostics, seeds = [record.found.diagnostics for record in records], len(records)
    words = []
    for name, message in (("valid", "valid"), ("budget_reached", "budget reached")):
        if any(name in diagnostic for diagnostic in diagnostics):
            good = sum(diagnostic.get(name) is not False for diagnostic in diagnostics)
            words.append(f"{message} {good} of {seeds}")
    for name, message in (("unchanged", "pruned nothing"), ("collapsed", "fell to the floor")):
        bad = sum(bool(diagnostic.get(name)) for diagnostic in diagnostics)
        if bad:
            words.append(f"{message} {bad} of {seeds}")
    return "; ".join(words) or NOTHING


def _above(proxies: Mapping[str, Point], uniform: Summary | None) -> str:
    """Return the largest saving whose accuracy is above that of the baseline."""
    if uniform is None:
        return "unknown"
    return _largest(
        {source: proxy for source, proxy in proxies.items() if proxy.top1.mean > uniform.mean}
    )


def _matching(proxies: Mapping[str, Point], direct: Point | None) -> str:
    """Return the largest saving that is within a deviation of the direct search, or better."""
    if direct is None or direct.top1.seeds == 1:
        return "unknown (no direct search)" if direct is None else "unknown (one seed)"
    bound = direct.top1.mean - direct.top1.std
    return _largest(
        {source: proxy for source, proxy in proxies.items() if proxy.top1.mean >= bound}
    )


def _largest(points: Mapping[str, Point]) -> str:
    if not points:
        return "none"
    source = max(points, key=lambda source: points[source].saved)
    return f"{points[source].saved:.1f}% (source {source})"
