"""The channel counts that a search may choose among, for each width variable of a supernet.

A grid is ascending, has no duplicates, and ends with the supernet's own count. Variables that
cannot be searched have one entry. Where a variable's channels come in groups, all numbers here
are numbers of groups; the grid is in channels again.
"""

import math
from collections.abc import Callable
from typing import Literal

from widthopt.widthgraph import WidthGraph


Grids = dict[str, tuple[int, ...]]
"""By free width variable, in forward order."""


def grids(graph: WidthGraph, rule: Callable[[int], list[int]]) -> Grids:
    """The grid of each free width variable of a supernet.

    Args:
        graph: The supernet's.
        rule: From a count to what may be chosen, ascending, the count itself last.
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
    """AutoSlim's grid of one variable.

    ``fraction``: the nearest multiples of the divisor to ``count * k / bins``, k from
    ``least_bins``; a single channel where that is none.
    ``step``: ``count`` less multiples of one step, ``count / bins`` to the nearest multiple of
    the divisor (halves to even), down to ``least_bins / bins`` of it: with 12 bins, a divisor of
    8 and no lower bound, the published lists of channels lie on it.

    Args:
        count: Channels in the supernet.
        bins: Parts that they are divided into.
        divisor: Entries of ``fraction`` between one and the count, and steps of ``step``, are
            multiples of this.
        least_bins: Bins that always stay.
        kind: ``fraction`` or ``step``.

    Source: Yu and Huang, 2019, "AutoSlim"; its specification, 1.2 and 3.4.
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
    """DMCP's grid of one variable: what always stays, and one entry more for each group.

    There are ``(enlarge - least) / step`` groups. ``reference``: each has ``count * step /
    enlarge`` channels, rounded down, and what rounding leaves over always stays; a variable too
    narrow for that has no groups. ``even``: boundaries are spread evenly and rounded.

    Args:
        count: Channels in the supernet.
        step: Size of a group, as a part of the un-enlarged channels.
        least: What always stays, as a part of the un-enlarged channels.
        enlarge: The supernet's channels, as a multiple of the un-enlarged ones.
        kind: ``auto``, ``reference`` or ``even``.

    Source: Guo et al., 2020, "DMCP"; its specification, 1.1 and D6.
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
