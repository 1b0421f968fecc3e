import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from widthopt.errors import InputError
from widthopt.widthgraph import (
    Layer,
    Norm,
    Parameter,
    Rewrite,
    Span,
    Stage,
    Variable,
    WidthGraph,
)


ROOT = Path(__file__).parents[1]


def whole(variable, classes, repeat=1):
    return (Span(variable, 0, classes, repeat),)


# image 3 -> a 8 -> depthwise a -> grouped (a in groups of 2, unit 2) ... by hand:
#   first   3 -> a, 100 positions x 9
#   deep    depthwise on a, 100 x 9
#   mix     dense cat(a, b) -> b, 25 x 1
#   group   grouped b -> b, 3 inputs to a group (one class is a group of 3), 25 x 9
#   square  dense a -> a (a module between two tied ends), 25 x 1
#   head    dense flattened b (each channel fills 4 entries) -> 10 classes
IMAGE, A, B, LOGITS = range(4)
VARIABLES = (
    Variable("image", 3, 1, False, ("image",)),  # noqa: FBT003
    Variable("a", 8, 1, True, ("first", "deep", "square")),  # noqa: FBT003
    Variable("b", 12, 3, True, ("mix", "group")),  # noqa: FBT003
    Variable("head", 10, 1, False, ("head",)),  # noqa: FBT003
)
LAYERS = (
    Layer("first", "dense", 900, whole(IMAGE, 3), whole(A, 8)),
    Layer("deep", "depthwise", 900, whole(A, 8), whole(A, 8)),
    Layer("mix", "dense", 25, whole(A, 8) + whole(B, 4, 3), whole(B, 4, 3)),
    Layer("group", "grouped", 25 * 9 * 3, whole(B, 4, 3), whole(B, 4, 3)),
    Layer("square", "dense", 25, whole(A, 8), whole(A, 8)),
    Layer("head", "dense", 1, whole(B, 4, 12), whole(LOGITS, 10)),
)
GRAPH = WidthGraph(
    resolution=10,
    variables=VARIABLES,
    layers=LAYERS,
    norms=(Norm("bn", True, whole(A, 8)),),  # noqa: FBT003
    parameters=(Parameter("scale", 0, whole(B, 4, 3)),),
    rewrites=(Rewrite("chunk", "select", "first", 1, whole(A, 8), whole(A, 8), (1, 0)),),
    stages=(Stage("stage", ("one", "two")),),
)


def by_hand(a, b):
    """The sum over layers, as it stands in the comment above."""
    return 900 * 3 * a + 900 * a + 25 * (a + b) * b + 25 * 9 * 3 * b + 25 * a * a + 4 * b * 10


def counts(least=0):
    return st.tuples(st.integers(least, 60), st.integers(least, 20).map(lambda one: 3 * one))


@given(counts())
def test_macs_are_the_sum_over_layers(pair):
    a, b = pair
    assert GRAPH.macs({"a": a, "b": b}) == by_hand(a, b)


def test_macs_without_channels_are_those_of_the_traced_network():
    assert GRAPH.macs() == by_hand(8, 12)
    assert GRAPH.channels == {"a": 8, "b": 12}


@given(counts())
def test_whole_numbers_cost_an_exact_int_and_floats_the_same_float(pair):
    a, b = pair
    exact = GRAPH.macs({"a": a, "b": b})
    real = GRAPH.macs({"a": float(a), "b": float(b)})
    assert type(exact) is int
    assert type(real) is float
    assert real == pytest.approx(exact, rel=1e-12)


@given(st.floats(0, 50), st.floats(0, 50))
def test_expected_counts_may_lie_between_channels(a, b):
    assert GRAPH.macs({"a": a, "b": b}) == pytest.approx(by_hand(a, b), rel=1e-12)


@given(counts())
def test_the_gradient_is_the_difference_that_one_more_class_makes(pair):
    """F is quadratic, so central differences are its slope exactly (P9)."""
    a, b = pair
    slopes = GRAPH.gradient({"a": a, "b": b})
    up, down = by_hand(a + 1, b), by_hand(a - 1, b)
    assert slopes["a"] == (up - down) / 2
    up, down = by_hand(a, b + 3), by_hand(a, b - 3)
    assert slopes["b"] == (up - down) / 6


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "densenet121"])
def test_killing_one_class_changes_macs_by_the_slope_of_its_variable(traced, name):
    """P9 on real networks: exact where F is linear in a variable, and its own square else."""
    _, graph = traced(name)
    full, slopes = graph.macs(), graph.gradient()
    owners = graph.quadratic.pairs
    for index, variable in enumerate(graph.variables):
        if variable.free:
            fewer = {**graph.channels, variable.name: variable.channels - variable.unit}
            square = owners.get((index, index), 0)
            saved = full - graph.macs(fewer)
            assert saved == slopes[variable.name] * variable.unit - square


def test_killing_a_class_changes_the_slopes_of_neighbours_only(traced):
    _, graph = traced("resnet18")
    before = graph.gradient()
    after = graph.gradient({**graph.channels, "layer1.0.conv1": 63})
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"conv1"}
    assert after["conv1"] < before["conv1"]


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "shufflenet_v2_x1_0", "vgg11"])
def test_json_keeps_the_whole_graph(traced, name):
    _, graph = traced(name)
    again = WidthGraph.from_json(graph.to_json())
    assert again == graph
    assert again.macs() == graph.macs()


def test_json_keeps_every_kind_of_record():
    assert WidthGraph.from_json(GRAPH.to_json()) == GRAPH


def test_reading_a_graph_needs_neither_torch_nor_numpy(traced):
    _, graph = traced("resnet18")
    script = """
import sys
sys.modules["torch"] = sys.modules["numpy"] = None
from widthopt.extrapolation import stack_blocks
from widthopt.widthgraph import WidthGraph
from widthopt.widths import match_macs, scale_channels
graph = WidthGraph.from_json(sys.stdin.read())
print(graph.macs(), graph.macs(scale_channels(graph, 0.5)))
"""
    done = subprocess.run(  # noqa: S603 (our own words)
        [sys.executable, "-c", script],
        input=graph.to_json(),
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["1814073344", "483149824"]


def test_an_axis_has_a_length_and_a_linear_form():
    axis = whole(A, 8) + whole(B, 4, 3)
    assert GRAPH.length(axis) == 20
    assert GRAPH.form(axis) == {A: 1, B: 3}


def test_a_resized_graph_costs_what_the_polynomial_says():
    smaller = GRAPH.resize_graph({"a": 5, "b": 6})
    assert smaller.channels == {"a": 5, "b": 6}
    assert smaller.macs() == GRAPH.macs({"a": 5, "b": 6}) == by_hand(5, 6)


def test_a_resized_graph_keeps_half_variables_apart(traced):
    """Where a layer's output is used in halves, each half is resized by its own variable."""
    _, graph = traced("shufflenet_v2_x1_0")
    channels = {name: max(1, count - 3) for name, count in graph.channels.items()}
    smaller = graph.resize_graph(channels)
    assert smaller.macs() == graph.macs(channels)
    written = {layer.name: smaller.length(layer.writes) for layer in smaller.layers}
    for layer in graph.layers:
        entries = sum(
            each * (channels[one.name] if one.free else one.channels) // one.unit
            for index, each in graph.form(layer.writes).items()
            for one in [graph.variables[index]]
        )
        assert written[layer.name] == entries


@pytest.mark.parametrize(
    ("channels", "message"),
    [
        (
            {"a": 8},
            (
                r"channels is a table of 1 names, but this network has 2 free width variables "
                r"\(missing: b; unknown: none\); `widthopt macs` lists them"
            ),
        ),
        (
            {"a": 8, "b": 12, "conv9": 1},
            r"channels is a table of 3 names, .* \(missing: none; unknown: conv9\)",
        ),
        ({"a": 8, "b": 12, **dict.fromkeys("cdefg", 1)}, "unknown: c, d, e and 2 more"),
        (
            {"a": -1, "b": 12},
            (
                "channels.a is -1, but it must be a whole number from 0 up; the network as traced "
                "has 8"
            ),
        ),
        (
            {"a": 8, "b": 10},
            "channels.b is 10, but its channels come in groups of 3; use a multiple of 3",
        ),
    ],
)
def test_channels_that_do_not_fit_are_refused(channels, message):
    with pytest.raises(InputError, match=f"^.*{message}"):
        GRAPH.macs(channels)


@pytest.mark.parametrize("count", [0, 2.0, True, "8"])
def test_a_network_is_built_at_whole_numbers_from_one_up_only(count):
    with pytest.raises(InputError, match=r"channels.a is .*, but it must be a whole number from 1"):
        GRAPH.check({"a": count, "b": 12})


def test_a_fitting_table_passes_the_check():
    GRAPH.check({"a": 1, "b": 3})


def test_another_format_of_json_is_refused():
    text = GRAPH.to_json().replace('"format":1', '"format":2')
    with pytest.raises(
        InputError, match=r"^graph format is 2, but this version reads 1; trace the network again$"
    ):
        WidthGraph.from_json(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '"graph"',
        GRAPH.to_json()[:-9],
        json.dumps({**json.loads(GRAPH.to_json()), "variables": 3}),
        json.dumps({**json.loads(GRAPH.to_json()), "layers": [{"name": "a"}]}),
        json.dumps({**json.loads(GRAPH.to_json()), "norms": [{"name": "a", "axis": [["x"]]}]}),
    ],
)
def test_text_that_is_no_graph_is_refused(text):
    with pytest.raises(InputError, match=r"^graph is not a width graph .*; trace the network aga"):
        WidthGraph.from_json(text)


def test_macs_of_tensors_are_tensors_that_know_their_gradient(traced):
    torch = pytest.importorskip("torch")
    _, graph = traced("mobilenet_v2")
    expected = {
        name: torch.tensor(float(count), dtype=torch.float64, requires_grad=True)
        for name, count in graph.channels.items()
    }
    graph.macs(expected).backward()
    for name, slope in graph.gradient().items():
        assert math.isclose(expected[name].grad.item(), slope, rel_tol=1e-12)
