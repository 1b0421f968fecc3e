import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torchvision import models

from widthopt.algorithms.grids import bin_grid, grids, group_grid
from widthopt.networks import TorchvisionNetwork
from widthopt.networks.resize import resize
from widthopt.networks.supernet import enlarge_channels
from widthopt.tracing import trace
from widthopt.widths import scale_channels


PUBLISHED = {"bins": 12, "divisor": 8, "least_bins": 0, "kind": "step"}
USUAL = {"bins": 10, "divisor": 1, "least_bins": 1, "kind": "fraction"}
PAPER = {"step": 0.1, "least": 0.1, "enlarge": 1.5}

# The author's own lists: stem, R0, (middle, output) x 16, last. docs/algorithms/autoslim.md, 3.4.
AUTOSLIM_505M = (32, 16, 144, 24, 176, 24, 192, 48, 240, 48, 144, 48, 264, 88, 288, 88, 336, 88,
                 432, 88, 576, 144, 576, 144, 648, 144, 864, 240, 1440, 240, 1440, 240, 1440, 480,
                 1920)  # fmt: skip
AUTOSLIM_305M = (8, 8, 96, 16, 96, 16, 96, 24, 144, 24, 144, 24, 144, 56, 288, 56, 288, 56, 288,
                 56, 288, 96, 432, 96, 432, 96, 864, 240, 1440, 240, 960, 240, 1440, 480,
                 1920)  # fmt: skip
LISTS = {
    "505M": (AUTOSLIM_505M, 43, 504_934_400, 6_495_992),
    "305M": (AUTOSLIM_305M, 100, 305_072_416, 5_767_288),
}


@pytest.fixture(scope="module")
def wide():
    """torchvision's MobileNetV2 at width multiplier 1.5, rounded to multiples of 8."""
    model = models.mobilenet_v2(width_mult=1.5)
    return model, trace(model, 224)


def by_variable(graph, counts):
    """The channels of a published list, by width variable."""
    writers = ["features.0.0", "features.1.conv.1"]
    for block in range(2, 18):
        writers += [f"features.{block}.conv.0.0", f"features.{block}.conv.2"]
    channels = {}
    for writer, count in zip([*writers, "features.18.0"], counts, strict=True):
        (name,) = (name for name, variable in graph.free.items() if writer in variable.writers)
        assert channels.setdefault(name, count) == count, "tied layers differ"
    return channels


# -------------------------------------------------------------------- AutoSlim's grid


def test_the_network_of_the_published_lists_is_torchvisions(wide):
    model, graph = wide
    assert graph.macs() == 672_832_704
    assert sum(parameter.numel() for parameter in model.parameters()) == 6_858_152
    assert len(graph.free) == 25


@pytest.mark.parametrize("name", LISTS)
def test_a_published_list_costs_what_was_published(wide, name):
    model, graph = wide
    counts, _, macs, parameters = LISTS[name]
    channels = by_variable(graph, counts)
    assert graph.macs(channels) == macs
    resized = resize(model, graph, channels)
    assert sum(parameter.numel() for parameter in resized.parameters()) == parameters


@pytest.mark.parametrize("name", LISTS)
def test_a_published_list_lies_on_the_step_grid_as_many_moves_down_as_it_took(wide, name):
    _, graph = wide
    counts, moves, _, _ = LISTS[name]
    options = grids(graph, lambda count: bin_grid(count, **PUBLISHED))
    taken = 0
    for variable, count in by_variable(graph, counts).items():
        grid = options[variable]
        assert count in grid
        taken += len(grid) - 1 - grid.index(count)
    assert taken == moves


def test_the_published_lists_are_nested():
    assert all(first <= second for first, second in zip(AUTOSLIM_305M, AUTOSLIM_505M, strict=True))


@pytest.mark.parametrize(
    ("count", "step"),
    [
        (48, 8), (24, 8), (144, 16), (40, 8), (240, 16), (288, 24), (96, 8), (576, 48),
        (864, 72), (1440, 120), (480, 40), (1920, 160),
    ],
)  # fmt: skip
def test_published_steps_are_a_twelfth_in_multiples_of_8_with_halves_to_even(count, step):
    grid = bin_grid(count, **PUBLISHED)
    assert grid == list(range(count, 0, -step))[::-1]


@pytest.mark.parametrize(
    ("count", "options", "grid"),
    [
        (96, {}, [10, 19, 29, 38, 48, 58, 67, 77, 86, 96]),
        (24, {}, [2, 5, 7, 10, 12, 14, 17, 19, 22, 24]),
        (10, {}, list(range(1, 11))),
        (4, {}, [1, 2, 3, 4]),  # 0.4, 0.8 and 1.2 are all one channel
        (1, {}, [1]),
        (96, {"least_bins": 3}, [29, 38, 48, 58, 67, 77, 86, 96]),
        (96, {"least_bins": 0}, [1, 10, 19, 29, 38, 48, 58, 67, 77, 86, 96]),
        (96, {"divisor": 8, "bins": 4}, [24, 48, 72, 96]),
        (100, {"divisor": 8, "bins": 4}, [24, 48, 72, 100]),  # 25, 50, 75 to multiples of 8
        (20, {"divisor": 8}, [1, 8, 16, 20]),  # 2 and 4 are nearest to no channels
        (96, {"kind": "step", "bins": 12, "divisor": 8, "least_bins": 6}, list(range(48, 97, 8))),
        (97, {"kind": "step", "bins": 12, "divisor": 8, "least_bins": 6}, list(range(49, 98, 8))),
        (5, {"kind": "step", "bins": 12, "divisor": 8}, [5]),
    ],
)
def test_bins_are_those_of_hand_arithmetic(count, options, grid):
    assert bin_grid(count, **(USUAL | options)) == grid


COUNTS = st.integers(1, 4000)


@given(
    count=COUNTS,
    bins=st.integers(2, 20),
    divisor=st.sampled_from([1, 2, 8, 16]),
    kind=st.sampled_from(["fraction", "step"]),
    data=st.data(),
)
def test_a_grid_ascends_without_duplicates_from_its_least_bins_to_the_count(
    count, bins, divisor, kind, data
):
    least = data.draw(st.integers(0, bins - 1))
    grid = bin_grid(count, bins=bins, divisor=divisor, least_bins=least, kind=kind)
    assert grid == sorted(set(grid))
    assert grid[0] >= 1
    assert grid[-1] == count
    assert all(type(item) is int for item in grid)
    if kind == "fraction":
        nearest = count * least / bins
        assert len(grid) <= bins + (least == 0)
        assert abs(grid[0] - nearest) <= max(1, divisor / 2)
        assert all(item % divisor == 0 or item == 1 for item in grid[:-1])
    else:
        assert grid[0] >= count * least / bins
        steps = {first - second for first, second in zip(grid[1:], grid, strict=False)}
        assert len(steps) <= 1
        if steps:
            (step,) = steps
            assert step % divisor == 0
            assert abs(step - count / bins) <= max(divisor / 2, divisor - count / bins)
            assert grid[0] - step < max(1, count * least / bins)  # one more would be too few


@given(count=COUNTS, bins=st.integers(2, 20), data=st.data())
def test_a_greater_least_takes_entries_from_below_only(count, bins, data):
    least = data.draw(st.integers(1, bins - 1))
    for kind in ("fraction", "step"):
        every, some = (
            bin_grid(count, bins=bins, divisor=1, least_bins=item, kind=kind) for item in (0, least)
        )
        assert every[-len(some) :] == some


# ------------------------------------------------------------------------ DMCP's grid


@pytest.mark.parametrize(
    ("count", "size", "kept"),
    [
        # ResNet18, 1.5 times as wide.
        (96, 6, 12), (192, 12, 24), (384, 25, 34), (768, 51, 54),
        # MobileNetV2.
        (24, 1, 10), (40, 2, 12), (48, 3, 6), (144, 9, 18), (240, 16, 16), (288, 19, 22),
        (480, 32, 32), (576, 38, 44), (864, 57, 66), (1440, 96, 96), (1920, 128, 128),
    ],
)  # fmt: skip
def test_groups_are_those_of_dmcps_tables(count, size, kept):
    grid = group_grid(count, **PAPER, kind="reference")
    assert grid == [kept + number * size for number in range(15)]
    assert grid[-1] == count


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
@pytest.mark.parametrize("width", [0.312, 0.5, 0.707, 1.0, 1.414, 1.732])
def test_fourteen_groups_and_what_is_kept_make_up_every_supernet_of_the_paper(traced, name, width):
    """docs/algorithms/dmcp.md, T2: a group is a fifteenth; narrower variables have none."""
    _, graph = traced(name)
    graph = graph.resize_graph(scale_channels(graph, width))
    graph = graph.resize_graph(enlarge_channels(graph, 1.5))
    options = grids(graph, lambda count: group_grid(count, **PAPER, kind="reference"))
    assert options.keys() == graph.free.keys()
    for variable, count in graph.channels.items():
        size = count // 15
        kept = count - 14 * size
        expected = range(kept, count + 1, size) if size else [count]
        assert list(options[variable]) == list(expected), variable
    if (name, width) == ("mobilenet_v2", 0.312):
        assert [8] in [list(grid) for grid in options.values()]


@given(count=st.integers(1, 6000))
def test_floating_point_loses_no_group(count):
    """(1.5 - 0.1) / 0.1 is below 14 in floating point, and 0.1 * count / 1.5 below count // 15."""
    grid = group_grid(count, **PAPER, kind="reference")
    size = count // 15
    assert grid == ([count] if size == 0 else [count - size * j for j in range(14, -1, -1)])


@pytest.mark.parametrize(
    ("count", "grid"),
    [
        (24, [2, 4, 5, 7, 8, 10, 11, 13, 15, 16, 18, 19, 21, 22, 24]),
        (96, [6, 12, 19, 25, 32, 38, 45, 51, 57, 64, 70, 77, 83, 90, 96]),
        (15, list(range(1, 16))),
        (8, [1, 2, 3, 4, 5, 6, 7, 8]),
        (1, [1]),
    ],
)
def test_even_groups_are_those_of_hand_arithmetic(count, grid):
    assert group_grid(count, **PAPER, kind="even") == grid


@given(count=st.integers(1, 6000))
def test_even_boundaries_ascend_to_the_count_and_lie_within_half_of_their_place(count):
    grid = group_grid(count, **PAPER, kind="even")
    assert grid == sorted(set(grid))
    assert grid[-1] == count
    assert grid[0] == max(1, round(count / 15))
    if count >= 30:
        assert len(grid) == 15
        places = [grid[0] + (count - grid[0]) * j / 14 for j in range(15)]
        assert all(abs(item - place) <= 0.5 for item, place in zip(grid, places, strict=True))


@given(count=st.integers(1, 6000))
def test_the_automatic_grid_is_the_references_but_even_where_that_has_no_groups(count):
    kind = "even" if count < 15 else "reference"
    assert group_grid(count, **PAPER, kind="auto") == group_grid(count, **PAPER, kind=kind)


@given(
    count=COUNTS,
    enlarge=st.floats(1, 3),
    least=st.floats(0.01, 0.9),
    kind=st.sampled_from(["auto", "reference", "even"]),
    data=st.data(),
)
def test_groups_of_any_size_keep_at_least_one_channel_and_reach_the_count(
    count, enlarge, least, kind, data
):
    step = data.draw(st.floats(0.02, enlarge - least))
    grid = group_grid(count, step=step, least=least, enlarge=enlarge, kind=kind)
    assert grid == sorted(set(grid))
    assert grid[0] >= 1
    assert grid[-1] == count
    assert len(grid) <= 1 + math.floor((enlarge - least) / step + 1e-3)


# ------------------------------------------------------------ the grids of a network


RULES = {
    "AutoSlim": lambda count: bin_grid(count, **USUAL),
    "AutoSlim, published": lambda count: bin_grid(count, **PUBLISHED),
    "DMCP": lambda count: group_grid(count, **PAPER, kind="reference"),
    "DMCP, even": lambda count: group_grid(count, **PAPER, kind="even"),
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", ["resnext50_32x4d", "efficientnet_b0"])
def test_the_cost_rises_with_every_entry_and_every_entry_can_be_built(traced, name, rule):
    _, graph = traced(name)
    graph = graph.resize_graph(enlarge_channels(graph, 1.5))
    options = grids(graph, RULES[rule])
    assert list(options) == list(graph.free)
    narrowest = {variable: grid[0] for variable, grid in options.items()}
    graph.check(narrowest)
    for variable, grid in options.items():
        macs = [graph.macs(narrowest | {variable: count}) for count in grid]
        assert macs == sorted(set(macs)), variable
        graph.check(narrowest | {variable: grid[len(grid) // 2]})


@pytest.mark.parametrize("rule", RULES)
def test_grouped_channels_come_in_the_grid_of_their_groups(traced, rule):
    """ResNeXt-50, 1.5 times as wide: 48 groups of 4 to 32 channels."""
    _, graph = traced("resnext50_32x4d")
    graph = graph.resize_graph(enlarge_channels(graph, 1.5))
    options = grids(graph, RULES[rule])
    several = {name: variable.unit for name, variable in graph.free.items() if variable.unit > 1}
    assert sorted(set(several.values())) == [4, 8, 16, 32]
    for name, unit in several.items():
        assert options[name] == tuple(unit * item for item in RULES[rule](48))


@pytest.mark.parametrize("rule", RULES)
def test_a_variable_that_cannot_be_searched_has_one_entry(rule):
    network = TorchvisionNetwork("efficientnet_b0")
    graph = trace(network.build(depth=1, classes=10), 64)
    options = grids(graph, RULES[rule])
    single = {name for name, grid in options.items() if name not in graph.searchable}
    assert len(single) == 16
    assert all(options[name] == (graph.channels[name],) for name in single)
