"""How all figures look: colours that the colour-blind can tell apart, sizes for print."""

from collections.abc import Mapping, Sequence
from typing import Any


COLOURS: Mapping[str, str] = {"uniform": "#555555", "direct": "#0072b2", "transfer": "#d55e00"}
"""One colour for each method (Okabe and Ito, 2008)."""

SERIES: Sequence[str] = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""Colours of several algorithms in one figure, in their order (Okabe and Ito, 2008)."""

MARKERS: Mapping[str, str] = {"uniform": "s", "direct": "o", "transfer": "^"}

RC: dict[Any, Any] = {
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.dpi": 150,
    "figure.figsize": (7.0, 4.0),
    "font.size": 9,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "pdf.fonttype": 42,  # text stays text
    "savefig.bbox": "tight",
}
"""matplotlib's settings for every figure."""

SMALL = 8
"""The smallest type, in points; figures are made as wide as they are printed."""

PRINTED_INCHES = 7.0
"""Width of a figure across a page."""

SERIES_MARKERS: Sequence[str] = ("o", "^", "D", "v", "P", "X")
"""Markers of several series, so that they can be told apart in black and white."""

SERIES_LINES: Sequence[Any] = ("-", (0, (5, 1)), "-.", (0, (1, 1)), (0, (3, 1, 1, 1, 1, 1)), "-")
"""Line styles likewise; the baseline's own is ``--``."""


def series_style(number: int) -> dict[str, Any]:
    """Colour, marker and line style of a figure's series, by its number from 0."""
    return {
        "color": SERIES[number % len(SERIES)],
        "marker": SERIES_MARKERS[number % len(SERIES_MARKERS)],
        "linestyle": SERIES_LINES[number % len(SERIES_LINES)],
    }
