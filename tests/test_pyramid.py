"""The pyramid baseline, on networks whose sides and growth follow from hand arithmetic."""

import itertools
import re

import pytest
from small import FactoryNetwork, make_setting
from torch import nn

from widthopt.algorithms.pyramid import Pyramid, multipliers, own_growth, sides
from widthopt.errors import InputError
from widthopt.networks.resize import Blueprint
from widthopt.widths import match_macs


def conv(inputs, outputs, stride=1, groups=1, kernel=3):
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )


class Head(nn.Module):
    def __init__(self, inputs, classes, hidden=0):
        super().__init__()
        widths = [inputs, *([hidden] if hidden else []), classes]
        self.layers = nn.Sequential(*[nn.Linear(a, b) for a, b in itertools.pairwise(widths)])

    def forward(self, x):
        return self.layers(x.mean((2, 3)))


def flat(classes):
    return nn.Sequential(conv(3, 6), conv(6, 6, 2), conv(6, 6, 2, kernel=1), Head(6, classes))


def doubling(classes):
    return nn.Sequential(conv(3, 8), conv(8, 16, 2), conv(16, 32, 2), Head(32, classes))


def separable(classes):
    """A depthwise layer halves the side; its variable is written at 8 and at 4 pixels."""
    return nn.Sequential(
        conv(3, 8), conv(8, 8, 2, groups=8), conv(8, 8, kernel=1), Head(8, classes, hidden=12)
    )


def blueprint(factory, resolution=8):
    return Blueprint(make_setting(FactoryNetwork(factory), resolution=resolution))


@pytest.mark.parametrize(
    ("factory", "expected"),
    [
        (flat, [8, 4, 2]),
        (doubling, [8, 4, 2]),
        (separable, [8, 4, 4]),  # the hidden layer has the side of the layer before it
    ],
)
def test_the_side_is_that_of_the_output(factory, expected):
    assert list(sides(blueprint(factory)).values()) == pytest.approx(expected)


def test_sides_of_resnet18_are_the_published_ones():
    found = sides(Blueprint(make_setting("resnet18", resolution=224)))
    assert sorted(set(found.values())) == [7, 14, 28, 56, 112]


def test_the_growth_of_a_network_is_the_factor_between_its_stages():
    assert own_growth(blueprint(flat)) == pytest.approx(1)
    assert own_growth(blueprint(doubling)) == pytest.approx(2)


def test_a_network_of_one_resolution_has_no_growth():
    one = blueprint(lambda classes: nn.Sequential(conv(3, 6), conv(6, 12), Head(12, classes)))
    assert own_growth(one) == 1
    assert set(multipliers(one, 2.0).values()) == {1.0}


@pytest.mark.parametrize("growth", [1.0, 2.0, 2.8])
def test_the_result_grows_by_the_factor_whatever_the_network_does(growth):
    for factory in (flat, doubling):
        plan = blueprint(factory)
        factors = multipliers(plan, growth)
        channels = [factors[name] * count for name, count in plan.graph.channels.items()]
        ratios = [b / a for a, b in itertools.pairwise(channels)]
        assert ratios == pytest.approx([growth, growth])


def test_a_pyramid_with_the_networks_own_growth_is_the_network():
    graph = blueprint(doubling).graph
    match = match_macs(graph, multipliers(blueprint(doubling), 2.0), budget_macs=graph.macs())
    assert match.channels == graph.channels


def test_a_search_costs_nothing_and_returns_the_multipliers():
    plan = blueprint(flat)
    algorithm = Pyramid("pyramid", 2.0)
    result = algorithm.search(plan.setting, None, budget_macs=1, context=None)
    assert result.multipliers == pytest.approx(dict(zip(plan.graph.free, [1, 2, 4], strict=True)))
    assert result.overhead_macs == 0
    assert algorithm.overhead_macs(plan.setting, None, recipe=None, budget_macs=1) == 0


@pytest.mark.parametrize("growth", [0.5, 17.0])
def test_a_growth_out_of_range_is_refused(growth):
    message = f"algorithm.growth is {growth:g}, but it is a number from 1 to 16"
    with pytest.raises(InputError, match=re.escape(message)):
        Pyramid("pyramid", growth)


def test_sides_do_not_depend_on_the_width():
    wide = Blueprint(make_setting(FactoryNetwork(doubling), width=2.0))
    assert sides(wide) == sides(blueprint(doubling))
