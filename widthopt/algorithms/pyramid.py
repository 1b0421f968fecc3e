"""The pyramid baseline: channels grow by one factor wherever the resolution is halved.

Hand-designed networks often double the channels at every stride. This baseline applies the rule to
any network: the channels of a width variable are proportional to a power of the side of its feature
maps. It needs no search, so it is the baseline that a search should exceed.
"""

import math
from dataclasses import dataclass

import torch

from widthopt.algorithms import SearchContext, SearchResult
from widthopt.data import Counts, Split
from widthopt.errors import check_value
from widthopt.networks.resize import Blueprint
from widthopt.setting import Recipe, Setting


@dataclass(frozen=True, slots=True)
class Pyramid:
    """The pyramid; ``conf/algorithm/pyramid.yaml`` has its values.

    Attributes:
        name: Name in records.
        growth: Factor on the channels of the result at every halving of the side of the feature
            maps. The growth of the network itself is divided out, so a value means the same for a
            network of constant width and for a ResNet.
    """

    name: str
    growth: float

    def __post_init__(self) -> None:
        check_value(
            "algorithm.growth",
            self.growth,
            holds=1 <= self.growth <= 16,  # noqa: PLR2004
            rule="it is a number from 1 to 16; 2 doubles the channels at every stride",
        )

    def search(
        self, setting: Setting, data: Split, *, budget_macs: int, context: SearchContext
    ) -> SearchResult:
        """See `widthopt.algorithms.WidthSearch`. No training is needed."""
        del data, budget_macs, context
        blueprint = Blueprint(setting)
        return SearchResult(
            multipliers=multipliers(blueprint, self.growth),
            overhead_macs=0,
            seconds=0.0,
            diagnostics={},
            details={"own_growth": own_growth(blueprint)},
        )

    def overhead_macs(
        self, setting: Setting, counts: Counts, *, recipe: Recipe, budget_macs: int
    ) -> int:
        """See `widthopt.algorithms.WidthSearch`."""
        del setting, counts, recipe, budget_macs
        return 0


def sides(blueprint: Blueprint) -> dict[str, float]:
    """Return the side of the feature maps of each free width variable, in pixels.

    The side is the square root of the number of output positions of the layers that write the
    variable, or the largest of several. A variable without a spatial extent (a squeeze layer, a
    hidden linear layer) has the side of the variable before it.
    """
    graph, model = blueprint.graph, blueprint.shapes()
    largest: dict[int, float] = {}
    for layer in graph.layers:
        weight = model.get_submodule(layer.name).weight
        assert isinstance(weight, torch.Tensor)
        kernel = weight[0, 0].numel() if layer.kind == "dense" else weight[0].numel()
        for span in layer.writes:
            side = math.sqrt(layer.coefficient / kernel)
            largest[span.variable] = max(side, largest.get(span.variable, 0.0))
    result: dict[str, float] = {}
    before = float(blueprint.setting.resolution)
    for index, variable in enumerate(graph.variables):
        side = largest.get(index, 1.0)
        before = side if side > 1 else before
        if variable.free:
            result[variable.name] = before
    return result


def own_growth(blueprint: Blueprint) -> float:
    """Return the growth of the network itself, by least squares of log channels on log side."""
    side, channels = sides(blueprint), blueprint.graph.channels
    places = [-math.log2(side[name]) for name in channels]
    counts = [math.log2(count) for count in channels.values()]
    mean = sum(places) / max(1, len(places))
    spread = sum((place - mean) ** 2 for place in places)
    if spread == 0:
        return 1.0
    centre = sum(counts) / len(counts)
    slope = sum((p - mean) * (c - centre) for p, c in zip(places, counts, strict=True)) / spread
    return float(2**slope)


def multipliers(blueprint: Blueprint, growth: float) -> dict[str, float]:
    """Return the multiplier of each free width variable for a growth of the result."""
    side = sides(blueprint)
    first = max(side.values(), default=1.0)
    exponent = math.log2(growth / own_growth(blueprint))
    return {name: (first / side[name]) ** exponent for name in blueprint.graph.free}
