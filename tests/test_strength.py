"""The automatic strength of MorphNet's penalty, against hand arithmetic and slow loops."""

import dataclasses
import itertools
import math
import statistics

import pytest
import torch
from small import RECIPE, RUNTIME, Synthetic, make_setting

from widthopt.algorithms import SearchContext
from widthopt.algorithms.morphnet import MorphNet
from widthopt.algorithms.penalty import Penalty
from widthopt.algorithms.strength import (
    GAIN,
    KAPPA,
    LARGEST_FACTOR,
    LEAST_FACTOR,
    RAMP_END,
    ControlledPenalty,
)
from widthopt.data import Counts, Split
from widthopt.errors import InputError
from widthopt.networks.resize import Blueprint
from widthopt.training.loop import Interrupted, learning_rate


AUTO = MorphNet(
    name="morphnet", strength="auto", enlarge=2.0, threshold=0.01, tie="max", depthwise="single",
    truncate=False, floor=1,
)  # fmt: skip


@pytest.fixture
def model():
    plan = Blueprint(make_setting())
    return plan.build(plan.graph.channels, seed=0).double()


def penalty_of(model):
    graph = Blueprint(make_setting()).graph
    return Penalty(model, graph, threshold=0.01, tie="max", depthwise="single")


def objective_of(model, *, share=0.25, recipe=RECIPE, steps_per_epoch=4):
    return ControlledPenalty(
        penalty_of(model), recipe, share=share, steps_per_epoch=steps_per_epoch
    )


def scatter(model, seed=0):
    """Set random scales of both signs."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith("bn") and name.endswith("weight"):
                parameter.copy_(torch.randn(parameter.shape, generator=rng))


def slow_counts(model):
    """The soft counts, class by class; the residual stream and the depthwise layer are tied."""
    tied = {"stem": ("bn0", "bn2"), "inner": ("bn1",), "down": ("bn3", "bn4"), "wide": ("bn5",)}
    result = {}
    for name, norms in tied.items():
        sizes = [
            max(abs(model.get_submodule(norm).weight[index].item()) for norm in norms)
            for index in range(len(model.get_submodule(norms[0]).weight))
        ]
        result[name] = sum(sizes) / max(sizes)
    return result


def test_the_soft_count_is_the_sum_of_scales_over_the_largest(model):
    scatter(model)
    penalty = penalty_of(model)
    found = dict(zip(penalty.variables, penalty.soft_counts().tolist(), strict=True))
    assert found == pytest.approx(slow_counts(model))


def test_equal_scales_count_every_channel_and_their_size_does_not_matter(model):
    penalty = penalty_of(model)
    assert penalty.soft_counts().tolist() == pytest.approx([8, 6, 12, 10])
    with torch.no_grad():
        model.bn1.weight.mul_(1e-6)
    assert penalty.soft_counts().tolist() == pytest.approx([8, 6, 12, 10])


def test_one_scale_that_is_left_counts_one(model):
    with torch.no_grad():
        model.bn5.weight.zero_()
        model.bn5.weight[3] = -0.2
    assert float(penalty_of(model).soft_counts()[3]) == pytest.approx(1)


def test_a_layer_without_any_scale_counts_nothing_and_is_no_nan(model):
    with torch.no_grad():
        model.bn5.weight.zero_()
    assert float(penalty_of(model).soft_counts()[3]) == 0


def test_the_soft_share_is_the_cost_at_the_soft_counts(model):
    """By hand: 8 pixels, then 4; stem, inner and back, down and deep, wide, head."""
    scatter(model, seed=1)
    n = slow_counts(model)
    macs = 64 * 9 * (3 * n["stem"] + 2 * n["stem"] * n["inner"])
    macs += 16 * 9 * (n["stem"] * n["down"] + n["down"]) + 16 * n["down"] * n["wide"]
    macs += 4 * n["wide"]
    total = Blueprint(make_setting()).graph.macs()
    assert float(objective_of(model).soft_share()) == pytest.approx(macs / total)


def test_the_initial_strength_moves_a_median_scale_by_kappa(model):
    objective = objective_of(model)
    penalty = objective.penalty
    rates = [
        learning_rate(RECIPE, step=step, steps_per_epoch=4, epochs=RECIPE.search_epochs)
        for step in range(4 * RECIPE.search_epochs)
    ]
    # SGD with momentum m moves a scale under a constant gradient g by g * rates / (1 - m).
    travel = sum(rates) / (1 - RECIPE.momentum)
    members = {"stem": 2, "inner": 1, "down": 2, "wide": 1}
    distances = [
        objective.start * pressure / members[name] * travel
        for name, pressure in penalty.pressure().items()
    ]
    assert statistics.median(distances) == pytest.approx(KAPPA)


def test_the_wanted_share_falls_with_the_sum_of_learning_rates(model):
    objective = objective_of(model, share=0.25)
    total = sum(objective.rates)
    for step, spent in enumerate(itertools.accumulate(objective.rates)):
        expected = max(0.25, 1 - 0.75 * spent / total / RAMP_END)
        objective.begin_step(step, images=8)
        assert objective.step_metrics()["wanted_share"] == pytest.approx(expected)


def steps(objective, model, count):
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for _ in range(count):
        objective.begin_step(len(objective.rates) - 1, images=8)
        objective.before_step()
    return objective.step_metrics()["strength"]


def test_a_network_above_its_share_raises_the_strength_at_the_full_rate(model):
    objective = objective_of(model, share=0.25)  # all scales are 1, so its share is 1
    after = steps(objective, model, 3)
    assert math.log(after / objective.start) == pytest.approx(3 * GAIN / len(objective.rates))


@pytest.mark.parametrize(("scale", "factor"), [(1.0, LARGEST_FACTOR), (0.0, LEAST_FACTOR)])
def test_the_strength_stays_in_its_range(model, scale, factor):
    with torch.no_grad():
        for norm in (model.bn0, model.bn1, model.bn2, model.bn3, model.bn4, model.bn5):
            norm.weight[1:] = scale  # of 0: one channel is left, less than its share
    objective = objective_of(model, share=0.25)
    assert steps(objective, model, 500) == pytest.approx(factor * objective.start)


def test_the_gradient_is_the_penaltys_times_the_strength(model):
    scatter(model, seed=2)
    objective = objective_of(model)
    strength = steps(objective, model, 1)
    added = model.bn1.weight.grad.clone()
    model.bn1.weight.grad.zero_()
    objective.penalty.add_gradient(strength)
    assert torch.allclose(added, model.bn1.weight.grad)


# --------------------------------------------------------------------------------- the search


def search(folder, *, data=None, recipe=RECIPE, budget_macs=None, algorithm=AUTO, network=None):
    setting = make_setting(network)
    data = data or Split(Synthetic(), Synthetic(), 4)
    budget = budget_macs or Blueprint(setting).graph.macs()
    context = SearchContext(recipe, RUNTIME, 0, folder)
    return algorithm.search(setting, data, budget_macs=budget, context=context)


def test_the_multipliers_are_soft_counts_over_the_channels_of_the_network(tmp_path):
    result = search(tmp_path)
    base = Blueprint(make_setting()).graph.channels
    assert result.multipliers == pytest.approx(
        {name: count / base[name] for name, count in result.details["channels_soft"].items()}
    )
    assert all(0 < value <= 2 for value in result.multipliers.values())


@pytest.mark.parametrize("epochs", [12, 60])
def test_a_search_reaches_its_share_in_any_number_of_steps(tmp_path, epochs):
    recipe = dataclasses.replace(RECIPE, search_epochs=epochs)
    result = search(tmp_path, recipe=recipe)
    assert result.details["soft_share"] <= 2 * result.details["wanted_share"]
    assert result.diagnostics["budget_reached"]


def test_the_overhead_is_the_training_of_the_enlarged_network(tmp_path):
    result = search(tmp_path)
    data = Synthetic()
    macs = 3 * result.details["searched_macs"]
    assert result.overhead_macs == macs * data.steps_per_epoch * data.batch_size * 3
    counts = Counts(data.batch_size, data.steps_per_epoch, 16)
    estimate = AUTO.overhead_macs(
        make_setting(), counts, recipe=RECIPE, budget_macs=Blueprint(make_setting()).graph.macs()
    )
    assert estimate == result.overhead_macs


def test_an_interrupted_search_ends_with_the_same_result(tmp_path):
    whole = search(tmp_path / "whole")
    with pytest.raises(Interrupted):
        search(tmp_path / "parts", data=Split(Synthetic(interrupt=5), Synthetic(), 4))
    parts = search(tmp_path / "parts")
    assert parts.multipliers == whole.multipliers
    assert parts.details["epochs"] == whole.details["epochs"]


def test_a_budget_that_leaves_nothing_to_prune_is_refused(tmp_path):
    budget = 10 * Blueprint(make_setting()).graph.macs()
    with pytest.raises(InputError, match=r"so there is nothing to prune; raise algorithm\.enlarge"):
        search(tmp_path, budget_macs=budget)


@pytest.mark.parametrize(("value", "shown"), [(0.5, "0.5"), (float("inf"), "inf")])
def test_an_enlargement_below_one_is_refused(value, shown):
    with pytest.raises(InputError, match=rf"algorithm\.enlarge is {shown}, but the searched"):
        dataclasses.replace(AUTO, enlarge=value)


@pytest.mark.parametrize(("width", "enlarge"), [(1.0, 2.0), (0.5, 3.0)])
def test_a_network_with_fewer_than_six_channels_in_a_layer_is_enlarged_more(width, enlarge):
    """`inner` has 6 channels at width 1."""
    setting, counts = make_setting(width=width), Counts(4, 4, 16)
    budget = Blueprint(setting).graph.macs()

    def cost(algorithm):
        return algorithm.overhead_macs(setting, counts, recipe=RECIPE, budget_macs=budget)

    automatic = dataclasses.replace(AUTO, enlarge="auto")
    assert cost(automatic) == cost(dataclasses.replace(AUTO, enlarge=enlarge))
