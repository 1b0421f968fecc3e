from statistics import fmean

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from widthopt.errors import InputError
from widthopt.extrapolation import Extrapolation, stack_blocks
from widthopt.widthgraph import WidthGraph
from widthopt.widths import match_macs


LAST, AVERAGE = "stack_last_block", "stack_average_block"
STRATEGIES = [LAST, AVERAGE]
DEEPENED = [
    "resnet18",
    "resnet50",
    "mobilenet_v2",
    "regnet_x_400mf",
    "efficientnet_b0",
    "convnext_tiny",
]


def graph_of(traced, name, depth):
    return traced(name, 64, depth=depth, classes=10)[1]


def uniform(graph):
    return dict.fromkeys(graph.free, 1.0)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", DEEPENED)
def test_uniform_widths_extrapolate_to_uniform_widths(traced, name, strategy):
    """Section 3.3: the baseline has one width per stage, so M_dim changes nothing."""
    source, target = graph_of(traced, name, 1), graph_of(traced, name, 3)
    assert stack_blocks(
        uniform(source), source=source, target=target, strategy=strategy
    ) == uniform(target)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_uniform_widths_of_a_densenet_extrapolate_to_uniform_widths(traced, strategy):
    source, target = graph_of(traced, "densenet121", 1), graph_of(traced, "densenet121", 3)
    stacked = stack_blocks(uniform(source), source=source, target=target, strategy=strategy)
    assert stacked == uniform(target)
    assert len(stacked) == 3 * 2 * 58 + 4  # two in each dense layer; the stem and 3 transitions


@given(st.data())
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
@settings(max_examples=20)
def test_at_equal_depth_every_multiplier_is_unchanged(traced, name, strategy, data):
    graph = graph_of(traced, name, 2)
    multipliers = {name: data.draw(st.floats(0.1, 3)) for name in graph.free}
    assert stack_blocks(multipliers, source=graph, target=graph, strategy=strategy) == multipliers


@given(st.data())
@pytest.mark.parametrize("strategy", STRATEGIES)
@settings(max_examples=20)
def test_stacked_multipliers_are_within_the_range_of_the_search(traced, strategy, data):
    source, target = graph_of(traced, "mobilenet_v2", 1), graph_of(traced, "mobilenet_v2", 2)
    multipliers = {name: data.draw(st.floats(0.1, 3)) for name in source.free}
    stacked = stack_blocks(multipliers, source=source, target=target, strategy=strategy)
    assert stacked.keys() == target.free.keys()
    assert min(stacked.values()) >= min(multipliers.values()) - 1e-12
    assert max(stacked.values()) <= max(multipliers.values()) + 1e-12


@pytest.mark.parametrize(
    ("strategy", "added"), [(AVERAGE, [2.0, 2.0, 2.0, 2.0]), (LAST, [3.0, 3.0, 3.0, 3.0])]
)
def test_blocks_added_to_a_resnet18_are_filled_by_hand(traced, strategy, added):
    """The average excludes the first block, whose input comes from another stage."""
    source, target = graph_of(traced, "resnet18", 2), graph_of(traced, "resnet18", 4)
    multipliers = uniform(source)
    multipliers |= {f"layer3.{block}.conv1": w for block, w in enumerate([9.0, 1.0, 2.0, 3.0])}
    multipliers |= {"conv1": 0.25, "layer3.0.conv2": 5.0}
    stacked = stack_blocks(multipliers, source=source, target=target, strategy=strategy)
    expected = uniform(target) | {"conv1": 0.25, "layer3.0.conv2": 5.0}
    expected |= {f"layer3.{block}.conv1": w for block, w in enumerate([9.0, 1.0, 2.0, 3.0, *added])}
    assert stacked == expected


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_blocks_added_to_a_mobilenet_v2_are_filled_by_hand(traced, strategy):
    """Names of modules change: features.7 to 10 are the stage features.12 to 19."""
    source, target = graph_of(traced, "mobilenet_v2", 1), graph_of(traced, "mobilenet_v2", 2)
    values = {name: 1 + number / 8 for number, name in enumerate(source.free)}

    def expansion(block):
        return f"features.{block}.conv.0.0"

    first = {
        2: (2, 2),
        4: (6, 3),
        7: (12, 4),
        11: (20, 3),
        14: (26, 3),
    }  # block in the source: block in the target, number of blocks
    expected = {
        "features.0.0": values["features.0.0"],
        "features.1.conv.1": values["features.1.conv.1"],
        "features.32.conv.0.0": values["features.17.conv.0.0"],
        "features.32.conv.2": values["features.17.conv.2"],
        "features.33.0": values["features.18.0"],
    }
    for block, (place, blocks) in first.items():
        expected[f"features.{place}.conv.2"] = values[f"features.{block}.conv.2"]
        searched = [values[expansion(block + number)] for number in range(blocks)]
        added = searched[-1] if strategy == LAST else fmean(searched[1:])
        for number, value in enumerate(searched + [added] * blocks):
            expected[expansion(place + number)] = value
    stacked = stack_blocks(values, source=source, target=target, strategy=strategy)
    assert stacked == pytest.approx(expected, rel=1e-12)
    assert len(expected) == len(target.free) == 40


@given(st.data())
@settings(max_examples=20)
def test_with_two_blocks_to_a_stage_both_strategies_agree(traced, data):
    source, target = graph_of(traced, "resnet18", 1), graph_of(traced, "resnet18", 4)
    multipliers = {name: data.draw(st.floats(0.1, 3)) for name in source.free}
    last, average = (
        stack_blocks(multipliers, source=source, target=target, strategy=name)
        for name in STRATEGIES
    )
    assert last == average


def test_a_stage_searched_with_one_block_has_that_block_stacked(traced):
    source, target = graph_of(traced, "regnet_x_400mf", 1), graph_of(traced, "regnet_x_400mf", 2)
    inner = "trunk_output.block1.block1-0.f.a.0"
    multipliers = {**uniform(source), inner: 1.5}
    for strategy in STRATEGIES:
        stacked = stack_blocks(multipliers, source=source, target=target, strategy=strategy)
        assert stacked["trunk_output.block1.block1-1.f.a.0"] == stacked[inner] == 1.5


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_extrapolating_the_baseline_returns_the_baseline_of_the_target(traced, strategy):
    source, target = graph_of(traced, "mobilenet_v2", 1), graph_of(traced, "mobilenet_v2", 3)
    extrapolation = Extrapolation(strategy, 1)
    match = extrapolation(uniform(source), source=source, target=target, budget_macs=target.macs())
    assert match.channels == target.channels
    assert match.macs == target.macs()


def test_dimensions_are_matched_first_then_alpha_is_solved(traced):
    source, target = graph_of(traced, "resnet50", 1), graph_of(traced, "resnet50", 2)
    multipliers = {name: 0.5 + number / 20 for number, name in enumerate(source.free)}
    match = Extrapolation(AVERAGE, 8)(
        multipliers, source=source, target=target, budget_macs=target.macs()
    )
    stacked = stack_blocks(multipliers, source=source, target=target, strategy=AVERAGE)
    assert match == match_macs(target, stacked, budget_macs=target.macs(), round_to=8)
    assert all(count % 8 == 0 for count in match.channels.values())


def test_graphs_read_from_json_extrapolate_alike(traced):
    source, target = graph_of(traced, "resnet18", 2), graph_of(traced, "resnet18", 4)
    multipliers = {name: 0.5 + number / 20 for number, name in enumerate(source.free)}
    read = [WidthGraph.from_json(graph.to_json()) for graph in (source, target)]
    assert stack_blocks(multipliers, source=read[0], target=read[1], strategy=LAST) == stack_blocks(
        multipliers, source=source, target=target, strategy=LAST
    )


def test_a_proxy_deeper_than_its_target_is_refused(traced):
    source, target = graph_of(traced, "resnet18", 2), graph_of(traced, "resnet18", 1)
    with pytest.raises(
        InputError,
        match=r"^projection\.depth is too large: stage `layer1` has 4 blocks in the proxy, but 2 "
        r"in the target; use a proxy that is at most as deep as its target$",
    ):
        stack_blocks(uniform(source), source=source, target=target, strategy=LAST)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_variable_without_counterpart_is_refused(traced, strategy):
    source, target = graph_of(traced, "resnet18", 1), graph_of(traced, "resnet50", 1)
    with pytest.raises(
        InputError,
        match=rf"^extrapolation\.strategy is {strategy}, but the width variable `.*` of the target "
        "has no counterpart in the searched network; search at the target's depth$",
    ):
        stack_blocks(uniform(source), source=source, target=target, strategy=strategy)


@pytest.mark.parametrize("step", [0, -8])
def test_rounding_to_less_than_one_is_refused(step):
    with pytest.raises(
        InputError,
        match=rf"^extrapolation\.round_to is {step}, but it must be an integer of at least 1; use "
        "1, or 8 for tensor cores$",
    ):
        Extrapolation(LAST, step)
