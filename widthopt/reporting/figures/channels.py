"""Channels by layer for each method, in the form of the paper's figure A1."""

from collections.abc import Sequence

from matplotlib.axes import Axes

from widthopt.records import Record, Summary, by_method
from widthopt.reporting.figures.style import COLOURS, MARKERS


def draw(axes: Axes, records: Sequence[Record]) -> None:
    """Draw the channel count of each width variable, in forward order.

    Lines are means over seeds, and shades are one standard deviation. The vertical axis is
    logarithmic, since widths within a network differ more than tenfold.
    """
    names = list(records[0].found.channels)
    places = range(len(names))
    for method, items in by_method(records).items():
        counts = [Summary.of(record.found.channels[name] for record in items) for name in names]
        means = [count.mean for count in counts]
        axes.plot(
            places,
            means,
            color=COLOURS[method],
            marker=MARKERS[method],
            markersize=4,
            linewidth=1.5,
            label=method,
        )
        low = [max(1.0, count.mean - count.std) for count in counts]
        high = [count.mean + count.std for count in counts]
        axes.fill_between(places, low, high, color=COLOURS[method], alpha=0.15, linewidth=0)
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xticks(list(places), names, rotation=60, ha="right", fontsize=7)
    axes.set(xlabel="width variable, in forward order", ylabel="channels")
    axes.set_title(f"{records[0].network}, {records[0].dataset}: channels at equal FLOPs")
    axes.legend()
