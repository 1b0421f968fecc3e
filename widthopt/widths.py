"""Between multipliers and channels: rounding, matching a MAC budget, similarity.

Multipliers stay real until a network is built; they are rounded once, here, by variable.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from widthopt.errors import InputError
from widthopt.widthgraph import WidthGraph


TOLERANCE = 0.005
"""How far below its budget a matched network may stay (design, section 10.3)."""

REPAIR_STEPS = 2
"""Steps above its share that a variable may be given without need."""


@dataclass(frozen=True, slots=True)
class Match:
    """Channel counts that meet a MAC budget.

    Attributes:
        channels: Count of each free width variable.
        alpha: The factor on the multipliers, the paper's alpha, solved after rounding.
        macs: What the channels cost.
        budget_macs: What they may cost; ``macs`` is never above it.
    """

    channels: dict[str, int]
    alpha: float
    macs: int
    budget_macs: int

    @property
    def shortfall(self) -> float:
        """The part of the budget that is left over, in [0, 1)."""
        return 1 - self.macs / self.budget_macs


def scale_channels(graph: WidthGraph, width: float) -> dict[str, int]:
    """Channels of a network under a width multiplier: ``round(width * N)`` for each variable.

    Reading: the multiplier applies to every width variable, MobileNetV2's last layer too,
    and nothing is rounded to multiples of 8 (paper section 3.4, "applies to all the layers").

    Raises:
        InputError: The multiplier is not above 0, or rounds a variable to 0 channels.
    """
    if not width > 0 or math.isinf(width):
        raise InputError(
            f"width is {width:g}, but a width multiplier is a number above 0; 1 keeps the network"
        )
    channels = {}
    for name, variable in graph.free.items():
        channels[name] = variable.unit * round(width * variable.classes)
        if channels[name] == 0:
            narrowest = min(one.classes for one in graph.free.values())
            raise InputError(
                f"width is {width:g}, but it rounds the {variable.channels} channels of `{name}` "
                f"to 0; use {math.floor(500 / narrowest + 1) / 1000:g} or more"
            )
    return channels


def multipliers(channels: Mapping[str, float], graph: WidthGraph) -> dict[str, float]:
    """Channels as factors on those of ``graph``, the un-enlarged network N."""
    return {name: channels[name] / count for name, count in graph.channels.items()}


def match_macs(
    graph: WidthGraph,
    multipliers: Mapping[str, float],
    *,
    budget_macs: int,
    round_to: int = 1,
) -> Match:
    """The widest network in the direction of the multipliers that a budget allows.

    Alpha is the largest factor whose rounded channels cost no more than the budget, found by
    bisection on that staircase. What rounding left over is then given back, one step at a
    time, to the variables that lost most of their share.

    Args:
        graph: The network to size, at the resolution that the budget is meant for.
        multipliers: A factor above 0 for each free width variable; only ratios matter.
        budget_macs: MACs of one forward pass on one image that must not be exceeded.
        round_to: Channel counts are multiples of this; 8 suits tensor cores and leaves up
            to 3 % of the budget unused.

    Raises:
        InputError: The budget is below the narrowest network's cost, or a multiplier is
            missing or not above 0.

    Source: paper section 3.3, E(w) = alpha * M(w); specification of MorphNet, section 1.8.
    """
    wanted = _target_widths(graph, multipliers)
    steps = {name: math.lcm(variable.unit, round_to) for name, variable in graph.free.items()}

    def round_channels(alpha: float) -> dict[str, int]:
        return {
            name: max(step, step * round(alpha * wanted[name] / step))
            for name, step in steps.items()
        }

    def fits(alpha: float) -> bool:
        return bool(graph.macs(round_channels(alpha)) <= budget_macs)

    low, high = 0.0, 1.0
    if not fits(low):
        raise InputError(
            f"budget_macs is {budget_macs:,}, but the narrowest network already takes "
            f"{graph.macs(round_channels(low)):,} at resolution {graph.resolution}; raise the budget"
        )
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1e-12 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    channels = round_channels(low)
    _repair(graph, channels, steps, {n: low * one for n, one in wanted.items()}, budget_macs)
    return Match(channels, low, graph.macs(channels), budget_macs)


def _target_widths(graph: WidthGraph, multipliers: Mapping[str, float]) -> dict[str, float]:
    wanted = {}
    for name, variable in graph.free.items():
        factor = multipliers.get(name, math.nan)
        if not factor > 0 or math.isinf(factor):
            raise InputError(
                f"multipliers.{name} is {factor}, but every free width variable needs a factor "
                "above 0; search again, or give it 1"
            )
        wanted[name] = factor * variable.channels
    return wanted


def _repair(
    graph: WidthGraph,
    channels: dict[str, int],
    steps: Mapping[str, int],
    ideal: Mapping[str, float],
    budget_macs: int,
) -> None:
    """Give single steps to the variables most rounded down, while the budget allows.

    First no variable rises more than one step above its share. What then is left over,
    because the steps that remain are too dear, goes to the cheaper ones, up to two steps, and
    to more only where the match would otherwise miss its tolerance.
    """
    reach, given = 0, True
    while given or reach < REPAIR_STEPS:
        reach += 1
        if reach > REPAIR_STEPS and graph.macs(channels) >= (1 - TOLERANCE) * budget_macs:
            return
        given = False
        for name in sorted(channels, key=lambda name: channels[name] / ideal[name]):
            more = {**channels, name: channels[name] + steps[name]}
            near = more[name] - ideal[name] <= reach * steps[name]
            if near and graph.macs(more) <= budget_macs:
                channels[name] = more[name]
                given = True


def cosine(one: Mapping[str, float], other: Mapping[str, float]) -> float:
    """Cosine similarity of two vectors of multipliers over the same width variables.

    Source: paper appendix D; un-optimised widths are the vector of ones.
    """
    assert one.keys() == other.keys()
    product = sum(value * other[name] for name, value in one.items())
    return product / math.sqrt(
        sum(value**2 for value in one.values()) * sum(value**2 for value in other.values())
    )
