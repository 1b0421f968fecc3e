"""Grids: the channel counts that each width variable of a supernet may have in a search.

A grid is ascending, has no duplicates, and ends with the count of the supernet. Variables that
cannot be searched have one entry. If the channels of a variable come in groups, the functions
below count groups, and `grids` converts them to channels.
"""

import math
from collections.abc import Callable
from typing import Literal

from widthopt.widthgraph import WidthGraph


Grids = dict[str, tuple[int, ...]]
"""By free width variable, in forward order."""


def grids(graph: WidthGraph, rule: Callable[[int], list[int]]) -> Grids:
    """Return the grid of each free width variable of a supernet.

    Args:
        graph: The graph of the supernet.
        rule: Returns the entries for a count, ascending, with the count as the last.
    """
    searchable = set(graph.searchable)
    return {
        name: tuple(variable.unit * count for count in rule(variable.classes))
        if name in searchable
        else (variable.channels,)
        for name, variable in graph.free.items()
    }


def bin_grid(
    count: int, *, bins: int, divisor: int, least_bins: int, kind: Literal["fraction", "step"]
) -> list[int]:
    """Return AutoSlim's grid of one variable.

    ``fraction``: the nearest multiples of the divisor to ``count * k / bins``, k from
    ``least_bins``; 1 where the nearest multiple is 0.
    ``step``: ``count`` minus multiples of one step, which is ``count / bins`` rounded to a multiple
    of the divisor (halves to even), down to ``least_bins / bins`` of the count. The published
    channel counts lie on this grid with 12 bins, a divisor of 8 and no lower bound.

    Args:
        count: Channels in the supernet.
        bins: Number of bins.
        divisor: Entries of ``fraction`` between 1 and the count, and steps of ``step``, are
            multiples of this.
        least_bins: Bins that are always kept.
        kind: ``fraction`` or ``step``.

    Source: Yu and Huang, 2019, "AutoSlim"; docs/algorithms/autoslim.md, 1.2 and 3.4.
    """
    if kind == "fraction":
        parts = {
            min(count, max(1, divisor * round(count * k / (bins * divisor))))
            for k in range(least_bins, bins)
        }
        return sorted(parts | {count})
    step = max(divisor, divisor * round(count / (bins * divisor)))
    least = max(1, math.ceil(count * least_bins / bins))
    return sorted({*range(count, least - 1, -step), count})


def group_grid(
    count: int,
    *,
    step: float,
    least: float,
    enlarge: float,
    kind: Literal["auto", "reference", "even"],
) -> list[int]:
    """Return DMCP's grid of one variable: the channels always kept, then one entry per group.

    There are ``(enlarge - least) / step`` groups. ``reference``: each group has ``count * step /
    enlarge`` channels, rounded down, and the rest is always kept; a variable that is too narrow
    has no groups. ``even``: boundaries are spread evenly and rounded.

    Args:
        count: Channels in the supernet.
        step: Size of a group, as a fraction of the channels of the network.
        least: Channels always kept, as a fraction of the channels of the network.
        enlarge: Factor on the channels of the network for the supernet.
        kind: ``auto``, ``reference`` or ``even``.

    Source: Guo et al., 2020, "DMCP"; docs/algorithms/dmcp.md, 1.1 and D6.
    """
    slack = 1e-4  # (1.5 - 0.1) / 0.1 is below 14 in floating point
    groups = math.floor((enlarge - least) / step + slack)
    size = math.floor(count * step / enlarge + slack)
    if kind == "even" or (kind == "auto" and size == 0):
        kept = max(1, round(count * least / enlarge))
        return sorted({round(kept + (count - kept) * j / groups) for j in range(groups + 1)})
    if size == 0:
        return [count]
    return list(range(count - size * groups, count + 1, size))
