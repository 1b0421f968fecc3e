"""Conversion between multipliers and channels: rounding, matching a MAC budget, similarity.

Multipliers are real numbers until a network is built. Only this module rounds them, once for
each width variable.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from widthopt.errors import AxisError, InputError
from widthopt.widthgraph import WidthGraph


TOLERANCE = 0.005
"""Largest part of the budget that a matched network may leave unused."""

REPAIR_STEPS = 2
"""Steps above its share that a variable may get while the match is within its tolerance."""


@dataclass(frozen=True, slots=True)
class Match:
    """Channel counts that meet a MAC budget.

    Attributes:
        channels: Count of each free width variable.
        alpha: The factor on the multipliers (alpha in the paper), solved after rounding.
        macs: MACs of a network with these channels.
        budget_macs: Its upper bound.
    """

    channels: dict[str, int]
    alpha: float
    macs: int
    budget_macs: int

    @property
    def shortfall(self) -> float:
        """The unused part of the budget, in [0, 1)."""
        return 1 - self.macs / self.budget_macs


def scale_channels(graph: WidthGraph, width: float) -> dict[str, int]:
    """Return the channels under a width multiplier: ``round(width * N)`` for each variable.

    Interpretation: the multiplier applies to every width variable, including the last layer of
    MobileNetV2, and channels are not rounded to multiples of 8 (paper section 3.4, "applies to
    all the layers").

    Raises:
        AxisError: The multiplier is not above 0, or rounds a variable to 0 channels.
    """
    if not 0 < width < math.inf:
        raise AxisError(
            "width", f"{width:g}, but a width multiplier is a number above 0; 1 keeps the network"
        )
    channels = {}
    for name, variable in graph.free.items():
        channels[name] = variable.unit * round(width * variable.classes)
        if channels[name] == 0:
            narrowest = min(variable.classes for variable in graph.free.values())
            raise AxisError(
                "width",
                f"{width:g}, but it rounds the {variable.channels} channels of `{name}` to 0; use "
                f"{math.floor(500 / narrowest + 1) / 1000:g} or more",
            )
    return channels


def multipliers(channels: Mapping[str, float], graph: WidthGraph) -> dict[str, float]:
    """Return channels as factors on those of ``graph``, the network N before it is enlarged."""
    return {name: channels[name] / count for name, count in graph.channels.items()}


def match_macs(
    graph: WidthGraph,
    multipliers: Mapping[str, float],
    *,
    budget_macs: int,
    round_to: int = 1,
) -> Match:
    """Return the widest network in the direction of the multipliers within a MAC budget.

    Alpha is the largest factor whose rounded channels do not exceed the budget, computed by
    bisection. Then single steps are added to the variables that rounding reduced most, while the
    budget allows.

    Args:
        graph: The network to size, at the resolution that the budget applies to.
        multipliers: A factor above 0 for each free width variable; only ratios matter.
        budget_macs: Upper bound on the MACs of one forward pass on one image.
        round_to: Channel counts are multiples of this. 8 suits tensor cores and leaves up to 3 %
            of the budget unused.

    Raises:
        InputError: The narrowest network exceeds the budget, or a multiplier is missing or not
            above 0.

    Source: paper section 3.3, E(w) = alpha * M(w); docs/algorithms/morphnet.md, 1.8.
    """
    ideal = _ideal_channels(graph, multipliers)
    steps = {name: math.lcm(variable.unit, round_to) for name, variable in graph.free.items()}

    def round_channels(alpha: float) -> dict[str, int]:
        return {
            name: max(step, step * round(alpha * ideal[name] / step))
            for name, step in steps.items()
        }

    def fits(alpha: float) -> bool:
        return graph.macs(round_channels(alpha)) <= budget_macs

    low, high = 0.0, 1.0
    if not fits(low):
        raise InputError(
            f"budget_macs is {budget_macs:,}, but the narrowest network has "
            f"{graph.macs(round_channels(low)):,} MACs at resolution {graph.resolution}; raise the "
            "budget"
        )
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1e-12 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    channels = round_channels(low)
    shares = {name: low * count for name, count in ideal.items()}
    _add_steps(graph, channels, steps, shares, budget_macs)
    return Match(channels, low, graph.macs(channels), budget_macs)


def _ideal_channels(graph: WidthGraph, multipliers: Mapping[str, float]) -> dict[str, float]:
    """Return the real channel counts at alpha = 1."""
    ideal = {}
    for name, variable in graph.free.items():
        factor = multipliers.get(name, math.nan)
        if not 0 < factor < math.inf:
            raise InputError(
                f"multipliers.{name} is {factor}, but every free width variable needs a factor "
                "above 0; search again, or set it to 1"
            )
        ideal[name] = factor * variable.channels
    return ideal


def _add_steps(
    graph: WidthGraph,
    channels: dict[str, int],
    steps: Mapping[str, int],
    shares: Mapping[str, float],
    budget_macs: int,
) -> None:
    """Add single steps to the variables that were rounded down most, while the budget allows.

    First no variable may exceed its share by more than one step. The steps that the budget does
    not allow then go to variables that are less expensive: up to two steps, and more only while
    the match is outside its tolerance.
    """
    reach, changed = 0, True
    while changed or reach < REPAIR_STEPS:
        reach += 1
        if reach > REPAIR_STEPS and graph.macs(channels) >= (1 - TOLERANCE) * budget_macs:
            return
        changed = False
        for name in sorted(channels, key=lambda name: channels[name] / shares[name]):
            wider = {**channels, name: channels[name] + steps[name]}
            is_near = wider[name] - shares[name] <= reach * steps[name]
            if is_near and graph.macs(wider) <= budget_macs:
                channels[name] = wider[name]
                changed = True


def cosine(first: Mapping[str, float], second: Mapping[str, float]) -> float:
    """Return the cosine similarity of two vectors of multipliers over the same width variables.

    Source: paper appendix D; the baseline (uniform widths) is the vector of ones.
    """
    assert first.keys() == second.keys()
    product = sum(value * second[name] for name, value in first.items())
    return product / math.sqrt(
        sum(value**2 for value in first.values()) * sum(value**2 for value in second.values())
    )
