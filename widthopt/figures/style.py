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
    "savefig.bbox": "tight",
}
"""matplotlib's settings for every figure."""
