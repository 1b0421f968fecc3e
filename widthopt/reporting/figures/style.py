"""Style of all figures: colour-blind safe colours, markers, line styles and print sizes."""

from collections.abc import Mapping, Sequence
from typing import Any


COLOURS: Mapping[str, str] = {"uniform": "#555555", "direct": "#0072b2", "transfer": "#d55e00"}
"""One colour for each method (Okabe and Ito, 2008)."""

SERIES: Sequence[str] = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""Colours of the series of a figure, in order (Okabe and Ito, 2008)."""

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
    "pdf.fonttype": 42,  # embeds fonts, so that text stays selectable
    "savefig.bbox": "tight",
}
"""Matplotlib settings of all figures."""

SMALL = 8
"""Smallest font size in points; figures have the size at which they are printed."""

PRINTED_INCHES = 7.0
"""Width of a figure, which is that of a page."""

SERIES_MARKERS: Sequence[str] = ("o", "^", "D", "v", "P", "X")
"""Markers of the series of a figure, which distinguish them in black and white."""

SERIES_LINES: Sequence[Any] = ("-", (0, (5, 1)), "-.", (0, (1, 1)), (0, (3, 1, 1, 1, 1, 1)), "-")
"""Line styles of the series of a figure; the baseline has ``--``."""


def series_style(number: int) -> dict[str, Any]:
    """Return colour, marker and line style of a series, by its number from 0."""
    return {
        "color": SERIES[number % len(SERIES)],
        "marker": SERIES_MARKERS[number % len(SERIES_MARKERS)],
        "linestyle": SERIES_LINES[number % len(SERIES_LINES)],
    }
