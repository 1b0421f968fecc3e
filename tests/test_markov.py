"""DMCP's chains against hand arithmetic, brute force, samples and published numbers."""

import itertools
import math

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from widthopt.algorithms.grids import grids, group_grid
from widthopt.algorithms.markov import BAND, AlphaSGD, Chains, regularizer_slope, schedule
from widthopt.networks.resize import resize
from widthopt.tracing import trace


CPU = torch.device("cpu")


def reference(count):
    return group_grid(count, step=0.1, least=0.1, enlarge=1.5, kind="reference")


class Plain(nn.Module):
    """Three dense layers in a row, one of them depthwise, and a classifier."""

    def __init__(self, channels=6):
        super().__init__()
        self.one = nn.Conv2d(3, channels, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.deep = nn.Conv2d(channels, channels, 3, groups=channels, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.two = nn.Conv2d(channels, 4, 1, bias=False)
        self.norm3 = nn.BatchNorm2d(4)
        self.last = nn.Linear(4, 5)

    def forward(self, images):
        hidden = self.norm2(self.deep(torch.relu(self.norm1(self.one(images)))))
        return self.last(torch.relu(self.norm3(self.two(hidden))).mean(dim=(2, 3)))


class Looped(nn.Module):
    """A convolution that reads and writes the same variable, around which a shortcut goes."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 5, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(5)
        self.inner = nn.Conv2d(5, 5, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(5)
        self.last = nn.Linear(5, 3)

    def forward(self, images):
        stream = torch.relu(self.norm1(self.stem(images)))
        return self.last(torch.relu(stream + self.norm2(self.inner(stream))).mean(dim=(2, 3)))


def counts(least, count):
    """A grid of every count from the least on."""
    return lambda classes: list(range(min(least, classes), min(count, classes) + 1))


def small(module=Plain, least=1):
    graph = trace(module(), 8)
    options = grids(graph, counts(least, 99))
    return graph, Chains(graph, options, device=CPU), options


def randomize(chains, seed=0, size=1.5):
    draws = torch.Generator().manual_seed(seed)
    alpha = size * torch.randn(chains.alpha.shape, generator=draws, dtype=torch.float64)
    chains.alpha.copy_(alpha * chains.real)
    return chains


def by_hand(alpha, grid):
    """P(count) of one chain: the probability that it stops just there."""
    kept = 1.0
    law = {}
    for count, item in zip(grid, [*alpha, None], strict=True):
        go_on = 0.0 if item is None else 1 / (1 + math.exp(-item))
        law[count] = kept * (1 - go_on)
        kept *= go_on
    return law


def enlarged_network(name):
    """The supernet that DMCP's published numbers are of, and the network's own MACs."""
    with torch.device("meta"):
        base = trace(torchvision.models.get_model(name), 224)
        if name == "mobilenet_v2":
            return trace(torchvision.models.mobilenet_v2(width_mult=1.5), 224), base.macs()
        return base.resize_graph({key: 3 * n // 2 for key, n in base.channels.items()}), base.macs()


@given(st.lists(st.floats(-30, 30), min_size=1, max_size=14))
def test_marginals_fall_and_the_law_sums_to_one(alpha):
    graph = trace(Plain(len(alpha) + 1), 8)
    chains = Chains(graph, grids(graph, counts(1, 99)), device=CPU)
    chains.alpha[0, : len(alpha)] = torch.tensor(alpha, dtype=torch.float64)
    marginals = chains.marginals()[0, : len(alpha)].tolist()
    law = by_hand(alpha, range(1, len(alpha) + 2))
    assert all(0 < later <= item <= 1 for item, later in itertools.pairwise([1.0, *marginals]))
    assert sum(law.values()) == pytest.approx(1, abs=1e-12)
    mean = sum(count * share for count, share in law.items())
    assert chains.expected_channels()["one"] == pytest.approx(mean, rel=1e-9)
    gradient = chains.alpha_gradient(chains.macs_gradient())
    assert gradient.isfinite().all()
    assert (gradient[chains.real] >= 0).all()
    assert (gradient[~chains.real] == 0).all()


def test_expected_channels_rise_with_every_alpha():
    _, chains, _ = small()
    randomize(chains)
    before = chains.expected_macs()
    for place in chains.real.nonzero().tolist():
        chains.alpha[tuple(place)] += 0.1
        after = chains.expected_macs()
        assert after > before
        before = after


@pytest.mark.parametrize("module", [Plain, Looped])
def test_expected_macs_are_the_mean_over_all_networks_there_are(module):
    graph, chains, options = small(module)
    randomize(chains)
    laws = []
    for row, (name, grid) in enumerate(options.items()):
        laws.append(
            [
                (name, n, p)
                for n, p in by_hand(chains.alpha[row][: len(grid) - 1].tolist(), grid).items()
            ]
        )
    mean = 0.0
    for choice in itertools.product(*laws):
        share = math.prod(p for _, _, p in choice)
        mean += share * graph.macs({name: n for name, n, _ in choice})
    assert chains.expected_macs() == pytest.approx(mean, rel=1e-12)


def test_without_a_layer_on_one_variable_expected_macs_are_those_of_expected_channels():
    graph, chains, _ = small()
    randomize(chains)
    assert chains.expected_macs() == pytest.approx(
        graph.macs(chains.expected_channels()), rel=1e-12
    )


def test_with_a_layer_on_one_variable_they_are_more():
    graph, chains, _ = small(Looped)
    randomize(chains)
    assert chains.expected_macs() > 1.01 * graph.macs(chains.expected_channels())


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_expected_macs_are_the_mean_of_samples(name):
    graph, _ = enlarged_network(name)
    chains = Chains(graph, grids(graph, reference), device=CPU)
    chains.alpha.fill_(1.0).mul_(chains.real)
    random = torch.Generator().manual_seed(0)
    drawn = np.array([graph.macs(chains.sample(random)) for _ in range(20_000)])
    error = abs(drawn.mean() - chains.expected_macs())
    assert error < 4 * drawn.std() / math.sqrt(len(drawn))


def test_samples_follow_the_chains_law():
    _, chains, options = small()
    randomize(chains)
    random = torch.Generator().manual_seed(1)
    drawn = [chains.sample(random) for _ in range(4000)]
    for row, (name, grid) in enumerate(options.items()):
        law = by_hand(chains.alpha[row][: len(grid) - 1].tolist(), grid)
        square = sum(
            (sum(item[name] == count for item in drawn) - len(drawn) * share) ** 2
            / (len(drawn) * share)
            for count, share in law.items()
        )
        freedom = len(law) - 1
        assert square < freedom + 4 * math.sqrt(2 * freedom)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_certain_chains_cost_what_the_built_network_does(name, seed, traced, counted):
    model, graph = traced(name, 64)
    options = grids(graph, reference)
    chains = Chains(graph, options, device=CPU)
    draws = np.random.default_rng(seed)
    channels = {}
    for row, (key, grid) in enumerate(options.items()):
        kept = int(draws.integers(len(grid)))
        channels[key] = grid[kept]
        chains.alpha[row] = torch.where(torch.arange(chains.alpha.shape[1]) < kept, 60.0, -60.0)
    built = resize(model, graph, channels).to("meta")
    assert chains.expected_macs() == pytest.approx(counted(built, 64), rel=1e-9)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_the_gradient_of_expected_macs_is_that_of_finite_differences(name):
    graph, _ = enlarged_network(name)
    chains = randomize(Chains(graph, grids(graph, reference), device=CPU))
    gradient = chains.alpha_gradient(chains.macs_gradient())
    places = chains.real.nonzero()[
        torch.randperm(int(chains.real.sum()), generator=torch.Generator().manual_seed(0))[:40]
    ].tolist()
    for place in map(tuple, places):
        middle, ends = float(chains.alpha[place]), {}
        for steps in (-2, -1, 1, 2):
            chains.alpha[place] = middle + 1e-3 * steps
            ends[steps] = chains.expected_macs()
        chains.alpha[place] = middle
        slope = (8 * (ends[1] - ends[-1]) - (ends[2] - ends[-2])) / 12e-3  # of fourth order
        # Hundreds of millions of MACs in float64 leave this much.
        assert float(gradient[place]) == pytest.approx(slope, rel=1e-6, abs=1e-3)


def test_a_depthwise_layer_alone_costs_in_proportion_to_its_channels():
    """The original's code gives exactly twice this gradient (docs/algorithms/dmcp.md, D8)."""

    class Depthwise(nn.Module):
        def __init__(self):
            super().__init__()
            self.spread = nn.Conv2d(3, 6, 1, groups=3, bias=False)
            self.norm = nn.BatchNorm2d(6)
            self.deep = nn.Conv2d(6, 6, 3, groups=6, bias=False)
            self.norm2 = nn.BatchNorm2d(6)

        def forward(self, images):
            return self.norm2(self.deep(self.norm(self.spread(images))))

    graph = trace(Depthwise(), 8)
    assert graph.free == {}  # the image's channels, repeated: nothing to choose
    graph, chains, _ = small()
    randomize(chains)
    alone = [layer for layer in graph.layers if layer.kind == "depthwise"]
    assert [layer.coefficient for layer in alone] == [9 * 6 * 6]
    gradient = chains.macs_gradient()[0, 0]
    means = chains.expected_channels()
    by_formula = 3 * 9 * 8 * 8 + 9 * 6 * 6 + 6 * 6 * means["two"]
    assert float(gradient) == pytest.approx(by_formula, rel=1e-12)


@pytest.mark.parametrize(
    ("part", "slope"),
    [(0.5, -2.0), (0.9, -10.0), (0.95, 0.0), (0.97, 0.0), (0.9999, 0.0), (1.0, 20.0), (1.95, 1.0)],
)
def test_the_regulariser_pushes_up_below_the_band_and_down_from_the_budget_on(part, slope):
    assert regularizer_slope(part * 1e9, 1e9) == pytest.approx(slope, rel=1e-9)


@pytest.mark.parametrize("budget", [1.0, 300.77, 1.8e9])
def test_the_regularisers_pull_does_not_depend_on_the_unit(budget):
    assert regularizer_slope(0.7 * budget, budget) == pytest.approx(-1 / 0.3, rel=1e-9)


def test_the_push_is_strongest_next_to_the_band():
    below = [regularizer_slope(part, 1.0) for part in (0.2, 0.5, 0.8, 0.949)]
    above = [regularizer_slope(part, 1.0) for part in (1.0, 1.1, 1.5, 3.0)]
    assert below == sorted(below, reverse=True)
    assert above == sorted(above, reverse=True)
    assert below[-1] == pytest.approx(-1 / (1 - 0.949))
    assert BAND == 0.95


def test_the_learning_rate_of_the_chains_falls_as_half_a_cosine():
    rates = [schedule(step, 100, start=0.5, end=0.1) for step in (0, 50, 100)]
    assert rates == pytest.approx([0.5, 0.3, 0.1])


def test_alpha_moves_as_torchs_sgd_moves_it():
    _, chains, _ = small()
    randomize(chains)
    parameter = chains.alpha.clone().requires_grad_()
    theirs = torch.optim.SGD([parameter], lr=0.3, momentum=0.9, nesterov=True)
    ours = AlphaSGD(chains, mu=0.9)
    draws = torch.Generator().manual_seed(5)
    for _ in range(5):
        parameter.grad = torch.randn(parameter.shape, generator=draws, dtype=torch.float64)
        ours.step(parameter.grad, rate=0.3)
        theirs.step()
    assert torch.allclose(chains.alpha, parameter.detach(), rtol=1e-12)


GOLDEN = {
    "resnet18": (
        {0: 142.59, 1: 142.611, 10: 143.105, 100: 153.402, 1000: 361.4, 2000: 1299.6},
        2099, 1804.57, 2.63,
    ),
    "mobilenet_v2": (
        {0: 29.184, 1: 29.186, 10: 29.237, 100: 30.250, 1000: 45.37, 2000: 74.69},
        3709, 294.66, 2.56,
    ),
}  # fmt: skip
"""Million MACs by step, the step at which the band is entered, where it rests, and the common
alpha of 0.975 of the budget: docs/algorithms/dmcp.md, T8 and D12, computed independently."""


def regularize(chains, budget, *, steps, until):
    """Expected MACs before each of the steps under the regulariser alone."""
    optimiser = AlphaSGD(chains, mu=0.9)
    for step in range(until):
        yield chains.expected_macs()
        slope = regularizer_slope(chains.expected_macs(), budget)
        gradient = chains.alpha_gradient(0.1 * slope / budget * chains.macs_gradient())
        optimiser.step(gradient, rate=schedule(step, steps, start=0.5, end=0.1))


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_the_regulariser_alone_moves_expected_macs_as_computed_elsewhere(name):
    graph, budget = enlarged_network(name)
    chains = Chains(graph, grids(graph, reference), device=CPU)
    by_step, entered, rests, _ = GOLDEN[name]
    path = list(regularize(chains, budget, steps=25_020, until=round(1.15 * entered)))
    for step, millions in by_step.items():
        assert path[step] / 1e6 == pytest.approx(millions, rel=0.001)
    first = next(step for step, macs in enumerate(path) if macs >= 0.95 * budget)
    assert first == pytest.approx(entered, rel=0.02)
    assert path[-1] / 1e6 == pytest.approx(rests, rel=0.002)


@pytest.mark.parametrize(("name", "within"), [("resnet18", 30), ("mobilenet_v2", 60)])
def test_from_above_the_regulariser_enters_the_band_within_steps(name, within):
    graph, budget = enlarged_network(name)
    chains = Chains(graph, grids(graph, reference), device=CPU)
    chains.alpha.fill_(3.0).mul_(chains.real)
    path = list(regularize(chains, budget, steps=25_020, until=within + 1))
    assert path[0] > 1.2 * budget
    assert path[-1] < budget


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_a_start_is_found_at_any_share_of_the_budget(name):
    graph, budget = enlarged_network(name)
    chains = Chains(graph, grids(graph, reference), device=CPU)
    assert chains.set_expected_macs(0.975 * budget) == pytest.approx(GOLDEN[name][3], abs=0.005)
    assert chains.expected_macs() == pytest.approx(0.975 * budget, rel=1e-6)
    assert len(set(chains.alpha[chains.real].tolist())) == 1


@pytest.mark.parametrize(("width", "within"), [(1.0, 0.04), (0.312, 0.08)])
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_rounded_expectations_cost_about_what_is_expected(name, width, within):
    """Within what is seen of random chains, and within what half a channel can do (T10)."""
    graph, _ = enlarged_network(name)
    graph = graph.resize_graph({key: max(1, round(width * n)) for key, n in graph.channels.items()})
    options = grids(graph, reference)
    places = [variable.name for variable in graph.variables]
    for seed in range(5):
        chains = randomize(Chains(graph, options, device=CPU), seed)
        expected = chains.expected_channels()
        rounded = {key: round(value) for key, value in expected.items()}
        for key, grid in options.items():
            assert grid[0] <= rounded[key] <= grid[-1]
            assert abs(rounded[key] - expected[key]) <= 0.5001
        half = {key: 0.5001 / value for key, value in expected.items()}
        bound = max(
            (1 + half[places[first]]) * (1 + half[places[second]]) - 1
            for first, second in graph.quadratic.pairs
        )
        error = abs(graph.macs(rounded) / chains.expected_macs() - 1)
        assert error <= min(bound, within)


def test_a_variable_too_narrow_for_groups_keeps_its_channels():
    graph = trace(Plain(8), 8)
    options = grids(graph, reference)
    assert options["one"] == (8,)
    chains = Chains(graph, {**options, "two": (1, 2, 3, 4)}, device=CPU)
    assert chains.expected_channels()["one"] == 8
    assert not chains.real[0].any()
    assert (chains.alpha_gradient(chains.macs_gradient())[0] == 0).all()


def test_factors_are_the_marginals_of_each_channels_group():
    graph = trace(Plain(6), 8)
    options = {"one": (2, 4, 6), "two": (1, 4)}
    chains = randomize(Chains(graph, options, device=CPU))
    (first, second), (third, _) = chains.marginals().tolist()
    factors = chains.factors(chains.marginals()).tolist()
    wanted = [1, 1, first, first, second, second, 1, third, third, third]
    assert factors == pytest.approx(wanted)


def test_the_published_lists_of_channels_cost_what_is_published():
    """docs/algorithms/dmcp.md, 3.2: the 300M list of MobileNetV2, counted as in 1.5."""
    with torch.device("meta"):
        graph = trace(torchvision.models.mobilenet_v2(width_mult=1.5), 224)
    outs = [10, 19, 35, 76, 109, 231, 449]
    hidden = [46, 50, 127, 92, 105, 241, 212, 274, 273, 459, 400, 429, 809, 990, 1178, 1319]
    by_name = {}
    stages, mids = iter(outs), iter(hidden)
    for name in graph.free:
        if name == "features.0.0":
            by_name[name] = 13
        elif name == "features.18.0":
            by_name[name] = 1785
        elif name.endswith("conv.0.0"):
            by_name[name] = next(mids)
        else:
            by_name[name] = next(stages)
    assert graph.macs(by_name) / 1e6 == pytest.approx(300.17, rel=1e-4)
    built = resize(torchvision.models.mobilenet_v2(width_mult=1.5), graph, by_name)
    parameters = sum(parameter.numel() for parameter in built.parameters())
    assert parameters / 1e6 == pytest.approx(5.29, abs=0.005)  # as printed


def test_with_a_task_the_chains_settle_on_the_constrained_optimum():
    """B2: the loss is -log E[c_1] - 0.6 log E[c_2], the cost nearly c_1 (27 + 9 c_2).

    On the budget c_1 = K / (27 + 9 c_2), so the loss is least where 0.6 / c_2 = 9 / (27 + 9 c_2),
    which is c_2 = 4.5.
    """
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.Conv2d(16, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 2),
    )
    graph = trace(model, 16)
    options = grids(graph, counts(1, 16))
    assert list(options) == ["0", "2"]
    budget = round(0.25 * graph.macs())
    chains = Chains(graph, options, device=CPU)
    chains.set_expected_macs(1.25 * budget)
    optimiser = AlphaSGD(chains, mu=0.9)
    steps = 6000
    for step in range(steps):
        expected = chains.expected_channels()
        by_count = torch.tensor([[-1 / expected["0"]], [-0.6 / expected["2"]]])
        task = chains.alpha_gradient(0.1 * by_count * chains.real)
        slope = regularizer_slope(chains.expected_macs(), budget)
        push = chains.alpha_gradient(0.1 * slope / budget * chains.macs_gradient())
        optimiser.step(task + push, rate=schedule(step, steps, start=0.2, end=0.002))
    assert 0.95 <= chains.expected_macs() / budget <= 1.02
    found = chains.expected_channels()
    assert found["2"] == pytest.approx(4.5, rel=0.03)
    assert found["0"] == pytest.approx(0.25 * 16 * (27 + 9 * 16) / (27 + 9 * 4.5), rel=0.03)
