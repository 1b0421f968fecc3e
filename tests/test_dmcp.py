"""DMCP as a search: what its steps do, when, to what, and how it ends."""

import dataclasses
import json
import logging
import math
from itertools import pairwise

import pytest
import torch
from small import RUNTIME, Instrument, SmallNetwork, Synthetic, digits, make_recipe, make_setting
from torch import nn
from torch.nn import functional

from widthopt.algorithms import SearchContext
from widthopt.algorithms.dmcp import DMCP, _Architecture
from widthopt.algorithms.markov import AlphaSGD, regularizer_slope, schedule
from widthopt.data import Counts, Sizes, Split, search_counts, search_split
from widthopt.errors import InputError
from widthopt.networks import TorchvisionNetwork
from widthopt.networks.resize import Blueprint
from widthopt.networks.supernet import Supernet
from widthopt.training import checkpoints
from widthopt.training.loop import Interrupted, Loop


RECIPE = make_recipe(search_epochs=4, learning_rate=0.8)  # a peak of 0.05 for 16 images
DEFAULT = {
    "name": "dmcp",
    "enlarge": 1.5,
    "group": 0.1,
    "least": 0.1,
    "grid": "even",
    "random_subnets": 2,
    "reduction": "sum",
    "markov_subnets": "scheduled",
    "strength": 0.1,
    "learning_rate": 0.5,
    "final_learning_rate": 0.1,
    "momentum": 0.9,
    "alpha_init": "auto",
    "scale_site": "norm",
}
STEPS = 4 * RECIPE.search_epochs
BASE = Blueprint(make_setting()).graph


def search(folder, *, data=None, seed=0, recipe=RECIPE, where=None, budget=None, **options):
    where = where or make_setting()
    return DMCP(**(DEFAULT | options)).search(
        where,
        data or Split(Synthetic(), Synthetic(), 4),
        budget_macs=budget or Blueprint(where).graph.macs(),
        context=SearchContext(recipe, RUNTIME, seed, folder),
    )


def architecture(*, steps=STEPS, seed=0, budget=None, network=None, **options):
    """The objective of a search on its own supernet, in float64."""
    algorithm = DMCP(**(DEFAULT | options))
    where = make_setting() if network is None else make_setting(network, width=0.25, resolution=32)
    blueprint = Blueprint(where)
    supernet = Supernet(blueprint, enlarge=algorithm.enlarge, seed=0)
    supernet.model.double()
    return _Architecture(
        algorithm,
        supernet,
        algorithm.options(supernet.graph),
        steps=steps,
        budget_macs=budget or BASE.macs(),
        label_smoothing=0.1,
        seed=seed,
    )


def batch(count=16, dtype=torch.float64):
    pixels, labels = next(Synthetic(count).epoch(0))
    return pixels.to(dtype), labels


def result(found):
    """All of a result but the time, as a record would have it."""
    return json.dumps(dataclasses.asdict(dataclasses.replace(found, seconds=0.0)), sort_keys=True)


# ----------------------------------------------------------------- what a step of the chains does


def mean_field(objective, marginals, images, labels):
    """The loss of the mixture, by multiplying what BatchNorm gives in the forward code."""
    model = objective.supernet.model
    graph = objective.supernet.graph
    factors = {}
    for row, name in enumerate(graph.free):
        grid = objective.grids[name]
        parts = [marginals.new_ones(grid[0])]
        for group, (low, high) in enumerate(pairwise(grid)):
            parts.append(marginals[row, group].expand(high - low))
        factors[name] = torch.cat(parts).view(1, -1, 1, 1)
    stem, inner, down, wide = (factors[item] for item in ("stem", "inner", "down", "wide"))
    weights = {name: value.detach() for name, value in model.named_parameters()}

    def norm(name, x):
        return functional.batch_norm(
            x, None, None, weights[f"{name}.weight"], weights[f"{name}.bias"], training=True
        )

    def conv(name, x, **arguments):
        return functional.conv2d(x, weights[f"{name}.weight"], **arguments)

    x = functional.relu(stem * norm("bn0", conv("stem", images, padding=1)))
    y = functional.relu(inner * norm("bn1", conv("inner", x, padding=1)))
    x = functional.relu(x + stem * norm("bn2", conv("back", y, padding=1)))
    x = functional.relu(down * norm("bn3", conv("down", x, stride=2, padding=1)))
    x = functional.relu(down * norm("bn4", conv("deep", x, padding=1, groups=x.shape[1])))
    x = functional.relu(wide * norm("bn5", conv("wide", x)))
    logits = functional.linear(x.mean((2, 3)), weights["head.weight"], weights["head.bias"])
    return functional.cross_entropy(logits, labels, label_smoothing=0.1)


def test_a_step_of_the_chains_follows_the_loss_and_the_regulariser():
    """By hand: the mixture in plain torch, MACs by the graph, alpha a parameter of torch's SGD."""
    objective = architecture(budget=round(0.8 * BASE.macs()))
    chains, graph = objective.chains, objective.supernet.graph
    chains.alpha.copy_(torch.linspace(-1, 3, chains.alpha.numel()).view(chains.alpha.shape))
    chains.alpha.mul_(chains.real)
    alpha = chains.alpha.clone().requires_grad_()
    theirs = torch.optim.SGD([alpha], lr=0.5, momentum=0.9, nesterov=True)
    images, labels = batch()
    for number in range(2):
        theirs.param_groups[0]["lr"] = objective.rate(number)
        theirs.zero_grad()
        marginals = (alpha.sigmoid().cumprod(1)) * chains.real
        counts = {}
        for row, name in enumerate(graph.free):
            grid = objective.grids[name]
            sizes = torch.tensor([b - a for a, b in pairwise(grid)])
            counts[name] = grid[0] + (sizes * marginals[row, : len(sizes)]).sum()
        macs = graph.macs(counts)
        budget = round(0.8 * BASE.macs())
        assert not 0.95 * budget <= float(macs.detach()) < budget
        above = (macs - 0.95 * budget) if float(macs.detach()) >= budget else (budget - macs)
        loss = mean_field(objective, marginals, images, labels) + 0.1 * above.log()
        loss.backward()
        theirs.step()
        objective.after_step(STEPS // 2 + number, [(images, labels)])
        # The factors are float32 on the way to the network.
        assert torch.allclose(chains.alpha, alpha.detach() * chains.real, rtol=1e-5, atol=1e-6)


def test_slices_and_masks_move_the_chains_alike():
    """docs/algorithms/dmcp.md, T20, on the CPU: 20 steps of weights and chains in double.

    Only the factors are float32 on the way to the network, in both.
    """
    paths = []
    for backend in ("slice", "mask"):
        objective = architecture(steps=40)
        objective.supernet.backend = backend
        objective.chains.set_expected_macs(1.25 * BASE.macs())
        loop = Loop(
            objective.supernet.model, recipe=RECIPE, steps_per_epoch=4, epochs=10, seed=0,
            runtime=RUNTIME, objective=objective,
        )  # fmt: skip
        path = []
        for epoch in range(5, 10):
            for place, (pixels, labels) in enumerate(Synthetic().epoch(epoch)):
                loop.step(pixels.double(), labels, 4 * epoch + place)
                path.append(objective.chains.alpha.clone())
        paths.append(torch.stack(path))
    assert len(paths[0]) == 20
    assert (paths[0][-1] - paths[0][0]).abs().max() > 0.1
    assert torch.allclose(*paths, rtol=1e-6, atol=1e-7)


def test_chains_act_where_they_are_told_to():
    """It makes a difference to ReLU6 alone, and only where that clips."""

    def move_chains(network, site, scale):
        objective = architecture(network=network, budget=10**7, scale_site=site)
        for module in objective.supernet.model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.data.mul_(scale)
        draws = torch.Generator().manual_seed(0)
        images = torch.randn(16, 3, 32, 32, generator=draws, dtype=torch.float64)
        objective.after_step(STEPS - 1, [(images, torch.arange(16) % 4)])
        return objective.chains.alpha

    for network, scale, same in (
        (TorchvisionNetwork("mobilenet_v2"), 5.0, False),
        (TorchvisionNetwork("mobilenet_v2"), 0.1, True),
        (TorchvisionNetwork("resnet18"), 5.0, True),
    ):
        there, behind = (move_chains(network, site, scale) for site in ("norm", "activation"))
        assert torch.allclose(there, behind, rtol=1e-9, atol=1e-12) == same


def test_micro_batches_give_the_same_step_where_batchnorm_sees_the_same():
    """The two halves are equal, so that each half's statistics are those of the whole."""
    images, labels = batch(8)
    whole, parts = architecture(), architecture()
    for objective in (whole, parts):
        objective.chains.alpha.fill_(1.0).mul_(objective.chains.real)
    double = (torch.cat([images, images]), torch.cat([labels, labels]))
    whole.after_step(STEPS - 1, [double])
    parts.after_step(STEPS - 1, [(images, labels), (images, labels)])
    assert torch.allclose(whole.chains.alpha, parts.chains.alpha, rtol=1e-9)


def test_a_step_of_the_chains_leaves_the_network_as_it_was():
    objective = architecture()
    before = {name: value.clone() for name, value in objective.supernet.model.state_dict().items()}
    objective.after_step(STEPS - 1, [batch()])
    after = objective.supernet.model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert all(parameter.grad is None for parameter in objective.supernet.model.parameters())


def test_the_chains_are_no_parameters_of_the_network():
    objective = architecture()
    loop = Loop(
        objective.supernet.model.float(), recipe=RECIPE, steps_per_epoch=4, epochs=4, seed=0,
        runtime=RUNTIME, objective=objective,
    )  # fmt: skip
    before = objective.chains.alpha.clone()
    loop.step(*batch(dtype=torch.float32), 0)
    assert torch.equal(objective.chains.alpha, before)
    named = dict(loop.model.named_parameters())
    assert not any(value.shape == before.shape for value in named.values())


# ------------------------------------------------------------------------------- the schedule


@pytest.mark.parametrize("steps", [1, 2, 7, 16])
def test_the_chains_move_in_the_second_half_only(steps):
    objective = architecture(steps=steps)
    moved = []
    for step in range(steps):
        before = objective.chains.alpha.clone()
        objective.after_step(step, [batch()])
        moved.append(not torch.equal(before, objective.chains.alpha))
    assert moved == [step >= steps // 2 for step in range(steps)]


def test_subnets_are_drawn_by_the_chains_more_and_more():
    """In the original, 0.9999 twice for every tenth of its 25,020 steps."""
    algorithm = DMCP(**DEFAULT)
    for step in (0, 9, 10, 99, 12_345, 25_019):
        assert algorithm.uniform_share(step, 25_020) == pytest.approx(0.9999 ** (2 * (step // 10)))
    assert algorithm.uniform_share(25_019, 25_020) == pytest.approx(0.606, abs=1e-3)
    assert algorithm.uniform_share(99, 100) == pytest.approx(0.9999 ** (2 * 2476))
    assert DMCP(**(DEFAULT | {"markov_subnets": "always"})).uniform_share(0, 100) == 0


def test_as_many_subnets_as_the_schedule_says_are_drawn_by_the_chains():
    """The chains are certain of the narrowest subnet, which a uniform draw hardly ever is."""
    objective = architecture(steps=4000)
    objective.chains.alpha.fill_(-60.0)
    narrowest = {name: grid[0] for name, grid in objective.grids.items()}
    for first, wanted in ((0, 0.0), (2000, 0.02), (3600, 0.34)):
        draws = [objective.draw(step, 0) == narrowest for step in range(first, first + 400)]
        share = sum(draws) / len(draws)
        assert share == pytest.approx(wanted, abs=4 * math.sqrt(0.25 / 400) + 0.02)


def test_draws_follow_from_seed_step_and_number():
    left, second = architecture(seed=3), architecture(seed=3)
    steps = [STEPS - 1, 0, 5]
    first = [left.draw(step, number) for step in steps for number in (0, 1)]
    again = [second.draw(step, number) for step in reversed(steps) for number in (1, 0)]
    assert first == again[::-1]
    assert first[0] != first[1]
    assert architecture(seed=4).draw(5, 0) != second.draw(5, 0)


def test_the_chains_draw_each_subnet_of_a_step_anew():
    """Two draws of four chains of 9 to 14 groups at a half are the same by chance at times."""
    objective = architecture(steps=200, markov_subnets="always")
    pairs = [[objective.draw(step, number) for number in (0, 1)] for step in range(100, 200)]
    assert sum(first == second for first, second in pairs) < 10


# -------------------------------------------------------------------- how a search starts and ends


def test_a_search_of_10_000_architecture_steps_starts_at_a_half():
    """docs/algorithms/dmcp.md, D12: half of the steps are architecture steps."""
    objective = architecture(steps=20_000)
    start = DMCP(**DEFAULT)._initialise_chains(objective)  # noqa: SLF001
    assert not objective.chains.alpha.any()
    assert start["part_of_budget_at_start"] < 0.4
    shorter = architecture(steps=19_998)
    start = DMCP(**DEFAULT)._initialise_chains(shorter)  # noqa: SLF001
    assert start["part_of_budget_at_start"] == pytest.approx(1.25, rel=1e-6)


def test_a_short_search_starts_above_its_budget_unless_told_to_start_at_a_half(tmp_path, caplog):
    found = search(tmp_path / "short")
    assert found.details["part_of_budget_at_start"] == pytest.approx(1.25, rel=1e-6)
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="widthopt"):
        found = search(tmp_path / "zero", alpha_init="zero")
    assert found.details["part_of_budget_at_start"] < 0.4
    assert found.diagnostics == {"budget_reached": False}
    reported = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "may be too few: the regularizer alone would move the expected" in reported[0]
    assert reported[1].startswith("the search ended at ")
    assert all(item.endswith("images, or use algorithm.alpha_init=budget") for item in reported)


@pytest.mark.parametrize("start", ["auto", "budget"])
def test_a_search_that_starts_at_its_budget_is_not_advised_to_start_there(tmp_path, caplog, start):
    """It is a short one, that hardly moves."""
    with caplog.at_level(logging.WARNING, logger="widthopt"):
        search(tmp_path, alpha_init=start, learning_rate=1e-9, final_learning_rate=0.0)
    reported = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(reported) == 2
    assert all(
        item.endswith("; raise recipe.search_epochs, or search on more images") for item in reported
    )


@pytest.mark.parametrize(("part", "reached"), [(1.01, True), (1.04, False)])
def test_a_budget_is_reached_up_to_1_02_of_it(tmp_path, part, reached):
    """docs/algorithms/dmcp.md, D12.

    It starts half-way from the budget to the supernet, and hardly moves from there.
    """
    budget = round(architecture().supernet.graph.macs() / (2 * part - 1))
    still = {"learning_rate": 1e-9, "final_learning_rate": 0.0, "alpha_init": "budget"}
    found = search(tmp_path, budget=budget, **still)
    assert found.details["expected_part_of_budget"] == pytest.approx(part, abs=1e-4)
    assert found.diagnostics == {"budget_reached": reached}


def test_the_simulation_of_the_start_moves_nothing_and_ends_where_the_regulariser_alone_does():
    objective = architecture(steps=120)
    chains, budget = objective.chains, BASE.macs()
    chains.set_expected_macs(1.25 * budget)
    before = chains.alpha.clone()
    end = objective.simulate_regulariser()
    assert torch.equal(chains.alpha, before)
    alone = AlphaSGD(chains, mu=0.9)
    for step in range(60):
        slope = regularizer_slope(chains.expected_macs(), budget)
        gradient = chains.alpha_gradient(0.1 * slope / budget * chains.macs_gradient())
        alone.step(gradient, rate=schedule(step, 60, start=0.5, end=0.1))
    assert chains.expected_macs() / budget == pytest.approx(end, rel=1e-12)
    assert 0.95 < end < 1.0


@pytest.mark.slow
def test_a_search_reaches_its_budget_and_says_so(tmp_path):
    recipe = dataclasses.replace(RECIPE, search_epochs=40)
    totals = []
    for name, share in (("less", 0.6), ("whole", 1.0)):
        budget = round(share * BASE.macs())
        found = search(tmp_path / name, recipe=recipe, budget=budget)
        assert found.diagnostics == {"budget_reached": True}
        channels = found.details["expected_channels"]
        assert found.multipliers == {
            key: pytest.approx(channels[key] / n) for key, n in BASE.channels.items()
        }
        supernet = Blueprint(make_setting()).resize_graph(
            {key: round(1.5 * n) for key, n in BASE.channels.items()}
        )
        part = supernet.macs(channels) / budget
        assert part == pytest.approx(found.details["expected_part_of_budget"], rel=1e-9)
        assert 0.95 <= part <= 1.02
        sides = found.details["steps_by_side_of_budget"]
        assert sum(sides.values()) == 80
        assert sides["above"] > 0
        assert len(found.details["part_of_budget_by_epoch"]) == 40
        totals.append(sum(channels.values()))
    assert totals[0] < totals[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("network", "width", "epochs", "least"),
    [("resnet18", 0.25, 12, 0.1), ("mobilenet_v2", 0.35, 24, 0.5)],
)
def test_the_papers_networks_reach_their_budget_on_digits(tmp_path, network, width, epochs, least):
    """B1: from above, by the chains' expectation and by the rounded channels' own cost.

    Layers of MobileNetV2 of one or two channels want more of them by more than the regulariser
    takes, so it is wider and keeps half of every layer.
    """
    batch = 32 if network == "resnet18" else 64
    recipe = dataclasses.replace(
        RECIPE, batch_size=batch, search_epochs=epochs, learning_rate=0.2, warmup_epochs=2
    )
    where = make_setting(network, classes=10, width=width, resolution=20)
    data = search_split(
        digits(), resolution=20, fraction=1.0, seed=0, recipe=recipe, runtime=RUNTIME,
        device=torch.device("cpu"),
    )  # fmt: skip
    found = search(
        tmp_path, recipe=recipe, data=data, where=where, alpha_init="budget", least=least
    )
    assert found.diagnostics == {"budget_reached": True}
    assert found.details["part_of_budget_at_start"] == pytest.approx(1.25, rel=1e-6)
    assert 0.95 <= found.details["expected_part_of_budget"] <= 1.02
    graph = Blueprint(where).graph
    rounded = {name: round(count) for name, count in found.details["expected_channels"].items()}
    assert Blueprint(where).resize_graph(rounded).macs() == pytest.approx(graph.macs(), rel=0.05)
    steps = found.details["steps_by_side_of_budget"]
    assert steps["within"] > steps["above"] > 0


def test_a_useless_layer_keeps_fewer_channels_than_an_equally_costly_useful_one(tmp_path):
    """Two branches of equal shape; nothing of the second reaches the logits."""

    class Branches(nn.Module):
        def __init__(self, classes):
            super().__init__()
            for name in ("used", "unused"):
                self.add_module(name, nn.Conv2d(3, 16, 3, padding=1, bias=False))
                self.add_module(f"{name}_norm", nn.BatchNorm2d(16))
                self.add_module(f"{name}_mix", nn.Conv2d(16, 8, 1, bias=False))
            self.norm = nn.BatchNorm2d(8)
            self.head = nn.Linear(8, classes)

        def forward(self, x):
            first = self.used_mix(functional.relu(self.used_norm(self.used(x))))
            second = self.unused_mix(functional.relu(self.unused_norm(self.unused(x))))
            return self.head(functional.relu(self.norm(first + 0.0 * second)).mean((2, 3)))

    class Network(SmallNetwork):
        def build(self, *, depth, classes):  # noqa: ARG002
            return Branches(classes)

    recipe = dataclasses.replace(RECIPE, search_epochs=40)
    found = search(tmp_path, recipe=recipe, where=make_setting(Network()))
    assert found.multipliers["unused"] < found.multipliers["used"] - 0.1


# ------------------------------------------------------------------------- kept and resumed


@pytest.mark.parametrize("step", [3, 8, 10, 13])
def test_a_search_that_was_interrupted_finds_the_same_bits(tmp_path, step):
    whole = search(tmp_path / "whole")
    with pytest.raises(Interrupted):
        search(tmp_path / "parts", data=Split(Synthetic(interrupt=step), Synthetic(), 4))
    assert result(search(tmp_path / "parts")) == result(whole)
    tensors = [
        checkpoints.newest(tmp_path / item / "checkpoints").tensors for item in ("whole", "parts")
    ]
    assert tensors[0].keys() == tensors[1].keys()
    assert all(torch.equal(value, tensors[1][name]) for name, value in tensors[0].items())
    assert not torch.equal(
        tensors[0]["objective.alpha"], torch.zeros_like(tensors[0]["objective.alpha"])
    )


def test_one_seed_gives_one_result_and_another_gives_another(tmp_path):
    assert result(search(tmp_path / "a")) == result(search(tmp_path / "b"))
    assert result(search(tmp_path / "a")) != result(search(tmp_path / "c", seed=1))


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"group": 0.2}, "grids"),
        ({"strength": 0.2}, "algorithm"),
        ({"seed": 1}, "seed"),
        ({"budget": round(0.9 * BASE.macs())}, "budget_macs"),
    ],
)
def test_checkpoints_of_another_search_are_refused(tmp_path, changed, named):
    search(tmp_path)
    with pytest.raises(
        InputError, match=rf"^folder is .*, but its checkpoints are of another .*{named}"
    ):
        search(tmp_path, **changed)


# --------------------------------------------------------------------------- the overhead


class Watched(Synthetic):
    """Starts an instrument's count when the first epoch begins, after the trial of the start."""

    def __init__(self, instrument):
        super().__init__()
        self._instrument = instrument

    def epoch(self, epoch, first_step=0, rank=0, ranks=1):
        if epoch == 0:
            self._instrument.total = 0
        return super().epoch(epoch, first_step, rank, ranks)


@pytest.mark.parametrize("backend", ["slice", "mask"])
def test_the_overhead_is_what_the_layers_did(tmp_path, backend):
    """A mask runs all channels, so its own count is more: overhead is what the subnets take."""
    algorithm = DMCP(**DEFAULT)
    with Instrument() as instrument:
        found = algorithm.search(
            make_setting(),
            Split(Watched(instrument), Synthetic(), 4),
            budget_macs=BASE.macs(),
            context=SearchContext(
                RECIPE, dataclasses.replace(RUNTIME, backend=backend), 0, tmp_path
            ),
        )
    if backend == "slice":
        assert found.overhead_macs == instrument.total
    else:
        assert instrument.total == 64 * 4 * (4 * 3 + 1) * found.details["searched_macs"]


@pytest.mark.slow
def test_the_overhead_is_that_of_the_closed_form_within_a_hundredth(tmp_path):
    recipe = dataclasses.replace(RECIPE, batch_size=8, search_epochs=12)
    dataset, where = digits(), make_setting(classes=10, width=2.0, fraction=0.6)
    data = search_split(
        dataset, resolution=8, fraction=0.6, seed=0, recipe=recipe, runtime=RUNTIME,
        device=torch.device("cpu"),
    )  # fmt: skip
    counts = search_counts(Sizes.of(dataset), fraction=0.6, validation=0.2, batch_size=8)
    found = search(tmp_path, recipe=recipe, data=data, where=where)
    budget = Blueprint(where).graph.macs()
    foretold = DMCP(**DEFAULT).overhead_macs(where, counts, recipe=recipe, budget_macs=budget)
    assert found.overhead_macs == pytest.approx(foretold, rel=0.01)


# --------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"enlarge": 0.9}, "algorithm.enlarge is 0.9, but a supernet is no narrower than"),
        ({"least": 0.0}, "algorithm.least is 0, but it is above 0 and below algorithm.enlarge"),
        ({"least": 1.5}, "algorithm.least is 1.5, but"),
        ({"group": 0.0}, "algorithm.group is 0, but at least one group fits between"),
        ({"group": 1.45}, "algorithm.group is 1.45, but"),
        (
            {"random_subnets": -1},
            "algorithm.random_subnets is -1, but it is an integer of at least 0",
        ),
        ({"strength": -0.1}, "algorithm.strength is -0.1, but it is a number of at least 0"),
        ({"learning_rate": 0.0}, "algorithm.learning_rate is 0, but it is a number above 0"),
        ({"final_learning_rate": 0.6}, "algorithm.final_learning_rate is 0.6, but it is a number"),
        (
            {"momentum": 1.0},
            "algorithm.momentum is 1, but it is a number of at least 0 and below 1",
        ),
    ],
)
def test_values_out_of_range_are_refused(options, message):
    with pytest.raises(InputError, match=f"^{message}"):
        DMCP(**(DEFAULT | options))


@pytest.mark.parametrize("share", [0.001, 2.3])
def test_a_budget_that_no_subnet_meets_is_refused_before_and_in_a_search(tmp_path, share):
    budget = round(share * BASE.macs())
    where = make_setting()
    message = (
        r"^algorithm.enlarge is 1.5, but the subnets that are searched then take [\d,]+ to [\d,]+ "
        rf"MACs and their budget, {budget:,}, is not between; change it or budget_macs, which is "
        r"the target's budget and scaled to what is searched$"
    )
    with pytest.raises(InputError, match=message):
        DMCP(**DEFAULT).overhead_macs(where, Counts(16, 4, 10), recipe=RECIPE, budget_macs=budget)
    with pytest.raises(InputError, match=message):
        search(tmp_path, budget=budget)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("part", "reachable"), [(0.94, True), (0.96, False)])
def test_the_narrowest_subnet_costs_less_than_the_bands_lower_end(part, reachable):
    """docs/algorithms/dmcp.md, 3.3: FLOPs(c_min) < 0.95 T; below it, nothing would prune to it."""
    algorithm, where = DMCP(**DEFAULT), make_setting()
    graph = architecture().supernet.graph
    narrowest = graph.macs({name: grid[0] for name, grid in algorithm.options(graph).items()})
    arguments = {"recipe": RECIPE, "budget_macs": round(narrowest / part)}
    if reachable:
        assert algorithm.overhead_macs(where, Counts(16, 4, 10), **arguments) > 0
    else:
        with pytest.raises(InputError, match=r"^algorithm.enlarge is 1.5, but the subnets"):
            algorithm.overhead_macs(where, Counts(16, 4, 10), **arguments)


def test_a_network_without_batchnorm_is_refused_before_and_in_a_search(tmp_path):
    where = make_setting("squeezenet1_1", resolution=32)
    message = "^algorithm is dmcp, but it searches by BatchNorm scales and no free width variable"
    with pytest.raises(InputError, match=message):
        DMCP(**DEFAULT).overhead_macs(where, Counts(16, 4, 10), recipe=RECIPE, budget_macs=10**8)
    with pytest.raises(InputError, match=message):
        search(tmp_path, where=where)


def test_variables_too_narrow_for_groups_are_told(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="widthopt"):
        where = make_setting(width=1.3)
        search(tmp_path, where=where, grid="reference")
    assert (
        "1 of 4 width variables have too few channels for groups of algorithm.group, so they stay "
        "at 1.5 times their width (inner); algorithm.grid=auto searches them too"
    ) in caplog.text
