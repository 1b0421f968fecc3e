"""Accuracy against saved overhead, in the form of the paper's figures 3 to 6."""

from collections.abc import Sequence

from matplotlib.axes import Axes

from widthopt.records import Record, Summary, baseline, by_algorithm, by_method
from widthopt.reporting.figures.style import COLOURS, MARKERS, SERIES


LEAST_SPAN = 2.0
"""Smallest range of the vertical axis in per cent, so that noise looks small."""


APART = 1.2
"""Horizontal offset between algorithms in per cent, since all direct searches save 0."""


def draw(axes: Axes, records: Sequence[Record]) -> None:
    """Draw one point for each searched setting, and the baseline as a line.

    Methods differ by marker, and with one algorithm also by colour. Points of several algorithms
    are moved apart horizontally, so that they do not overlap.

    Bars and the shade are one sample standard deviation over seeds. The overhead is counted and
    relative to a search on the target itself, so its unit cancels.
    """
    groups = by_algorithm(records)
    if plain := baseline(records):
        _baseline(axes, Summary.of(record.top1 for record in plain))
    places = [0.0]
    for number, (algorithm, group) in enumerate(groups.items()):
        for method, items in by_method(group).items():
            if method == "uniform":
                continue
            top1 = Summary.of(record.top1 for record in items)
            saved = Summary.of(100 * record.found.saved for record in items)
            places.append(saved.mean + APART * (number - (len(groups) - 1) / 2))
            axes.errorbar(
                places[-1],
                top1.mean,
                yerr=top1.std or None,
                color=COLOURS[method] if len(groups) == 1 else SERIES[number % len(SERIES)],
                marker=MARKERS[method],
                markersize=6,
                capsize=3,
                linestyle="none",
                label=f"{algorithm}, {method}",
            )
    axes.set_xlim(min(-4.0, min(places) - 2), 104)  # a proxy may cost more than its target
    axes.margins(y=0.2)
    low, high = axes.get_ylim()
    slack = max(0.0, LEAST_SPAN - (high - low)) / 2
    axes.set_ylim(low - slack, high + slack)
    axes.set(
        xlabel="width optimization overhead saved (%)",
        ylabel=f"{records[0].dataset} top-1 accuracy (%)",
    )
    axes.set_title(f"{records[0].network}: accuracy at equal FLOPs (multiply-adds)")
    axes.legend()


def _baseline(axes: Axes, top1: Summary) -> None:
    """Draw the accuracy of the baseline as a line, with its deviation as a shade."""
    colour = COLOURS["uniform"]
    axes.axhline(top1.mean, color=colour, linestyle="--", label="uniform")
    low, high = top1.mean - top1.std, top1.mean + top1.std
    axes.axhspan(low, high, color=colour, alpha=0.1, linewidth=0)
