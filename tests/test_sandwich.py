import dataclasses
import itertools
import json
import math
import random
import statistics
from collections import Counter

import pytest
import torch
from small import RECIPE, RUNTIME, FactoryNetwork, Synthetic, make_setting
from torch import nn
from torch.nn import functional
from torch.optim.optimizer import register_optimizer_step_post_hook

from widthopt.algorithms import SearchContext, sandwich
from widthopt.algorithms.grids import grids
from widthopt.algorithms.sandwich import (
    Sandwich,
    check_budget,
    distillation,
    prepare_supernet,
    step_macs,
)
from widthopt.errors import InputError
from widthopt.networks.resize import Blueprint
from widthopt.networks.supernet import Supernet
from widthopt.training.loop import Interrupted, Loop, train


class Small(nn.Module):
    """A stem, an identity block with a depthwise layer, and a head of its own width."""

    def __init__(self, classes):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.bn0 = nn.BatchNorm2d(4)
        self.expand = nn.Conv2d(4, 6, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(6)
        self.deep = nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False)
        self.bn2 = nn.BatchNorm2d(6)
        self.back = nn.Conv2d(6, 4, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4)
        self.head = nn.Conv2d(4, 8, 1, stride=2)
        self.bn4 = nn.BatchNorm2d(8)
        self.classifier = nn.Linear(8, classes)

    def forward(self, x):
        x = functional.relu(self.bn0(self.stem(x)))
        inner = functional.relu6(self.bn1(self.expand(x)))
        x = x + self.bn3(self.back(functional.relu6(self.bn2(self.deep(inner)))))
        return self.classifier(functional.relu(self.bn4(self.head(x))).mean((2, 3)))


def by_hand(weights, x, stem, expand, head):
    """What `Small` computes with the leading channels of its weights, by autograd alone."""

    def norm(x, name, count):
        scale, shift = weights[f"{name}.weight"][:count], weights[f"{name}.bias"][:count]
        return functional.batch_norm(x, None, None, scale, shift, training=True)

    x = functional.conv2d(x, weights["stem.weight"][:stem], padding=1)
    x = norm(x, "bn0", stem).relu()
    inner = functional.conv2d(x, weights["expand.weight"][:expand, :stem])
    inner = functional.relu6(norm(inner, "bn1", expand))
    inner = functional.conv2d(inner, weights["deep.weight"][:expand], padding=1, groups=expand)
    inner = functional.relu6(norm(inner, "bn2", expand))
    inner = functional.conv2d(inner, weights["back.weight"][:stem, :expand])
    x = x + norm(inner, "bn3", stem)
    x = functional.conv2d(x, weights["head.weight"][:head, :stem], weights["head.bias"][:head], 2)
    x = norm(x, "bn4", head).relu().mean((2, 3))
    return x @ weights["classifier.weight"][:, :head].T + weights["classifier.bias"]


def smooth_loss(logits, labels, smoothing):
    """Cross-entropy with label smoothing, written out."""
    logs = logits.log_softmax(1)
    chosen = logs[torch.arange(len(labels)), labels]
    return -((1 - smoothing) * chosen + smoothing * logs.mean(1)).mean()


def soft(logits, teacher):
    """Cross-entropy with a teacher's predictions, written out."""
    return -(teacher * logits.log_softmax(1)).sum(1).mean()


BLUEPRINT = Blueprint(make_setting(FactoryNetwork(Small)))
GRIDS = {"stem": (2, 3, 5, 6), "expand": (1, 4, 9), "head": (3, 6, 9, 12)}
COUNTS = tuple(grid[-1] for grid in GRIDS.values())


def build(options=GRIDS, *, dtype=torch.float64, backend="slice", **given):
    """A supernet, half as wide again as `Small`, and what its steps minimise."""
    supernet = Supernet(BLUEPRINT, enlarge=1.5, seed=0, backend=backend)
    supernet.model.to(dtype)
    draws = torch.Generator().manual_seed(1)
    for module in supernet.model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data.uniform_(0.5, 1.5, generator=draws)
            module.bias.data.uniform_(-0.5, 0.5, generator=draws)
    defaults = {"random_subnets": 2, "reduction": "sum", "label_smoothing": 0.1, "seed": 0}
    return supernet, Sandwich(supernet, options, **(defaults | given))


IMAGES, LABELS = Synthetic().pixels[:16].double(), Synthetic().labels[:16]


def gradients(supernet):
    return {name: parameter.grad.clone() for name, parameter in supernet.model.named_parameters()}


def after_a_step(supernet, objective, images=IMAGES, labels=LABELS, *, step=0, share=1.0):
    """The gradients of one step."""
    supernet.model.zero_grad(set_to_none=True)
    objective.begin_step(step, images=len(images))
    objective.backward(supernet.model, images, labels, share=share)
    return gradients(supernet)


class Watch:
    """Which subnets a supernet ran, in order, by the weights that its layers had then."""

    def __init__(self, supernet):
        self.runs = []
        self.forwards = 0
        for name in ("stem", "expand", "head"):
            supernet.model.get_submodule(name).register_forward_pre_hook(self._look)
        supernet.model.register_forward_pre_hook(self._begin)

    def _begin(self, *_):
        self.forwards += 1
        self.runs.append(())

    def _look(self, module, _inputs):
        self.runs[-1] += (len(module.weight),)


def close(first, second, tolerance=1e-5):
    """Losses are in float32, so gradients in float64 agree to float32's precision."""
    assert first.keys() == second.keys()
    size = max(float(tensor.abs().max()) for tensor in second.values())
    assert size > 0
    for name, tensor in first.items():
        assert (tensor - second[name]).abs().max() <= tolerance * size, name


# -------------------------------------------------------------------- one step's gradient


@pytest.mark.parametrize("backend", ["slice", "mask"])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_the_gradient_of_a_step_is_that_of_its_four_losses_by_hand(backend, reduction):
    """Test 10: four losses of one set of weights, sliced and differentiated by autograd."""
    supernet, objective = build(backend=backend, reduction=reduction)
    found = after_a_step(supernet, objective, step=7)
    drawn = [tuple(objective.draw(7, number).values()) for number in (0, 1)]
    assert len({COUNTS, (2, 1, 3), *drawn}) == 4

    weights = {
        name: parameter.detach().clone().requires_grad_()
        for name, parameter in supernet.model.named_parameters()
    }
    total = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    logits = by_hand(weights, IMAGES, *COUNTS)
    teacher = logits.detach().softmax(1)
    losses = [smooth_loss(logits, LABELS, 0.1)]
    losses += [soft(by_hand(weights, IMAGES, *item), teacher) for item in [(2, 1, 3), *drawn]]
    for loss in losses:
        for name, item in zip(
            weights, torch.autograd.grad(loss, list(weights.values())), strict=True
        ):
            total[name] += item if reduction == "sum" else item / 4
    close(found, total)


def test_the_loss_and_logits_of_a_step_are_the_widests():
    supernet, objective = build()
    objective.begin_step(0, images=16)
    loss, logits = objective.backward(supernet.model, IMAGES, LABELS, share=1.0)
    weights = dict(supernet.model.named_parameters())
    expected = by_hand(weights, IMAGES, *COUNTS).detach()
    torch.testing.assert_close(logits, expected)
    assert loss.item() == pytest.approx(smooth_loss(expected, LABELS, 0.1).item(), rel=1e-5)
    assert not loss.requires_grad
    assert not logits.requires_grad


def test_the_mean_is_a_quarter_of_the_sum():
    by_reduction = [after_a_step(*build(reduction=item)) for item in ("sum", "mean")]
    close({name: item / 4 for name, item in by_reduction[0].items()}, by_reduction[1], 1e-12)


def test_the_mean_is_over_as_many_subnets_as_there_are():
    first, second = (
        after_a_step(*build(reduction=item, random_subnets=0)) for item in ("sum", "mean")
    )
    close({name: tensor / 2 for name, tensor in first.items()}, second, 1e-12)


def test_a_share_of_the_images_has_that_share_of_the_gradient():
    supernet, objective = build()
    whole = after_a_step(supernet, objective)
    part = after_a_step(supernet, objective, share=0.25)
    close({name: item / 4 for name, item in whole.items()}, part, 1e-12)


def test_gradients_are_added_to_those_that_are_there():
    supernet, objective = build()
    once = after_a_step(supernet, objective)
    objective.backward(supernet.model, IMAGES, LABELS, share=1.0)
    close(gradients(supernet), {name: 2 * item for name, item in once.items()}, 1e-12)


@pytest.mark.parametrize("backend", ["slice", "mask"])
def test_the_widest_learns_nothing_from_its_students(backend):
    """Channels that only it has get the gradient of its own loss and not a bit more."""
    supernet, objective = build(random_subnets=0, backend=backend)
    found = after_a_step(supernet, objective)
    supernet.model.zero_grad()
    objective.loss(supernet.full(IMAGES), LABELS).backward()
    alone = gradients(supernet)
    assert torch.equal(found["stem.weight"][2:], alone["stem.weight"][2:])
    assert torch.equal(found["deep.weight"][1:], alone["deep.weight"][1:])
    assert torch.equal(found["head.weight"][:, 2:], alone["head.weight"][:, 2:])
    assert torch.equal(found["classifier.weight"][:, 3:], alone["classifier.weight"][:, 3:])
    assert torch.equal(found["bn3.bias"][2:], alone["bn3.bias"][2:])
    assert alone["stem.weight"][2:].any()
    assert not torch.equal(found["stem.weight"][:2], alone["stem.weight"][:2])


def test_other_labels_change_the_widests_part_of_the_gradient_only():
    """docs/algorithms/dmcp.md, T16: the other subnets see no labels."""
    supernet, objective = build()
    rest = LABELS.flip(0).roll(1)
    assert not torch.equal(rest, LABELS)
    steps = [after_a_step(supernet, objective, labels=item) for item in (LABELS, rest)]
    widest = []
    for labels in (LABELS, rest):
        supernet.model.zero_grad()
        objective.loss(supernet.full(IMAGES), labels).backward()
        widest.append(gradients(supernet))
    close(
        {name: step - steps[1][name] for name, step in steps[0].items()},
        {name: item - widest[1][name] for name, item in widest[0].items()},
        1e-9,
    )


def test_the_gradient_of_distillation_is_that_of_the_divergence():
    """Test 11; and it is zero where student and teacher agree."""
    draws = torch.Generator().manual_seed(2)
    logits = torch.randn(6, 5, generator=draws, requires_grad=True)
    teacher = torch.randn(6, 5, generator=draws).softmax(1)
    (found,) = torch.autograd.grad(distillation(logits, teacher), logits)
    divergence = functional.kl_div(logits.log_softmax(1), teacher, reduction="batchmean")
    (expected,) = torch.autograd.grad(divergence, logits)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(found, (logits.softmax(1) - teacher) / 6)
    same = distillation(logits, logits.detach().softmax(1))
    (nothing,) = torch.autograd.grad(same, logits)
    assert nothing.abs().max() < 1e-7
    entropy = -(logits.softmax(1) * logits.log_softmax(1)).sum(1).mean()
    assert same.item() == pytest.approx(entropy.item(), rel=1e-5)


def test_a_student_as_wide_as_its_teacher_learns_nothing():
    """Grids of one entry: all four subnets are the widest, and only its own loss has a slope."""
    single = {name: grid[-1:] for name, grid in GRIDS.items()}
    supernet, objective = build(single)
    found = after_a_step(supernet, objective)
    supernet.model.zero_grad()
    objective.loss(supernet.full(IMAGES), LABELS).backward()
    close(found, gradients(supernet), 1e-6)


# ------------------------------------------------------------------------- passes and steps


def loop(supernet, objective, **options):
    recipe = dataclasses.replace(RECIPE, **options)
    return Loop(
        supernet.model,
        recipe=recipe,
        steps_per_epoch=4,
        epochs=3,
        seed=0,
        runtime=RUNTIME,
        objective=objective,
    )


@pytest.fixture
def updates():
    """Updates by any optimiser of torch's while a test runs."""
    seen = []
    handle = register_optimizer_step_post_hook(lambda *_: seen.append(1))
    yield seen
    handle.remove()


@pytest.mark.parametrize("subnets", [0, 2, 3])
def test_a_batch_takes_four_passes_and_one_update(updates, subnets):
    supernet, objective = build(dtype=torch.float32, random_subnets=subnets)
    watch = Watch(supernet)
    training = loop(supernet, objective)
    for step in range(3):
        training.step(IMAGES.float(), LABELS, step)
    assert watch.forwards == 3 * (2 + subnets)
    assert len(updates) == 3


def test_the_subnets_of_a_step_are_the_widest_the_narrowest_and_its_draws():
    supernet, objective = build(dtype=torch.float32)
    watch = Watch(supernet)
    training = loop(supernet, objective)
    for step in range(3):
        training.step(IMAGES.float(), LABELS, step)
    drawn = [[tuple(objective.draw(step, n).values()) for n in (0, 1)] for step in range(3)]
    assert watch.runs == [item for two in drawn for item in [COUNTS, (2, 1, 3), *two]]
    assert len(set(itertools.chain(*drawn))) > 3


def test_micro_batches_of_a_step_have_the_same_subnets(updates):
    supernet, objective = build(dtype=torch.float32)
    watch = Watch(supernet)
    training = loop(supernet, objective, accumulation=2)
    for step in range(2):
        training.step(IMAGES.float(), LABELS, step)
    first, second, third, fourth = (watch.runs[i : i + 4] for i in range(0, 16, 4))
    assert first == second
    assert third == fourth
    assert first != third
    assert len(updates) == 2
    one_batch = build(dtype=torch.float32)[1]
    one_batch.begin_step(0, images=16)
    one_batch.backward(one_batch.supernet.model, IMAGES.float(), LABELS, share=1.0)
    one_batch.begin_step(1, images=16)
    one_batch.backward(one_batch.supernet.model, IMAGES.float(), LABELS, share=1.0)
    assert objective.macs == one_batch.macs


def test_the_gradient_of_micro_batches_is_that_of_each_by_its_share():
    """BatchNorm sees one micro-batch at a time, so they are not one batch."""
    supernet, objective = build()
    parts = [
        after_a_step(supernet, objective, IMAGES[a:b], LABELS[a:b], share=(b - a) / 16)
        for a, b in ((0, 10), (10, 16))
    ]
    supernet.model.zero_grad()
    objective.begin_step(0, images=16)
    for a, b in ((0, 10), (10, 16)):
        objective.backward(supernet.model, IMAGES[a:b], LABELS[a:b], share=(b - a) / 16)
    close(
        gradients(supernet), {name: part + parts[1][name] for name, part in parts[0].items()}, 1e-12
    )


# ------------------------------------------------------------------------------ the draws


DRAWS = 6000


def quantile(freedom):
    """Of chi-square, beyond which one of 10,000 lies (Wilson and Hilferty, 1931)."""
    part = 2 / (9 * freedom)
    return freedom * (1 - part + 3.72 * math.sqrt(part)) ** 3


def chi_square(observed, cells):
    expected = sum(observed.values()) / cells
    rest = (cells - len(observed)) * expected  # of cells that nothing fell into
    return sum((item - expected) ** 2 / expected for item in observed.values()) + rest


@pytest.fixture(scope="module")
def drawn():
    """The random subnets of many steps, one after the other."""
    _, objective = build()
    return [objective.draw(step, number) for step in range(DRAWS // 2) for number in (0, 1)]


def test_every_entry_is_drawn_equally_often(drawn):
    """Test 12: the narrowest and the widest too."""
    for name, grid in GRIDS.items():
        found = Counter(item[name] for item in drawn)
        assert found.keys() == set(grid)
        assert chi_square(found, len(grid)) < quantile(len(grid) - 1)


@pytest.mark.parametrize("pair", list(itertools.combinations(GRIDS, 2)))
def test_variables_are_drawn_independently(drawn, pair):
    found = Counter(tuple(item[name] for name in pair) for item in drawn)
    cells = math.prod(len(GRIDS[name]) for name in pair)
    assert chi_square(found, cells) < quantile(cells - 1)


@pytest.mark.parametrize("lag", [1, 2])
def test_subnets_are_drawn_independently_of_those_before(drawn, lag):
    """1: of the same step, half of the time; 2: of the step before."""
    name = "head"
    found = Counter(
        (first[name], second[name]) for first, second in zip(drawn, drawn[lag:], strict=False)
    )
    assert chi_square(found, 16) < quantile(15)


def test_a_draw_follows_from_the_seed_and_the_step_alone():
    _, objective = build()
    steps = (9, 3, 1000)
    first = {step: [objective.draw(step, n) for n in (0, 1)] for step in steps}
    for seed in (1, 2):
        random.seed(seed)
        torch.manual_seed(seed)
        _, again = build(backend="mask")
        before = random.getstate(), torch.get_rng_state()
        for step in sorted(steps):
            again.begin_step(step, images=16)
            assert [again.draw(step, n) for n in (0, 1)] == first[step]
        assert random.getstate() == before[0]
        assert torch.equal(torch.get_rng_state(), before[1])
    _, second = build(seed=1)
    assert {step: [second.draw(step, n) for n in (0, 1)] for step in steps} != first


# ------------------------------------------------------------------------------- the cost


class Meter:
    """Multiply-adds of all passes, by hooks on the layers: every weight, at every position."""

    def __init__(self, model):
        self.macs = 0
        for module in model.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                module.register_forward_hook(self._count)

    def _count(self, module, _inputs, output):
        positions = output.shape[0] * math.prod(output.shape[2:])
        self.macs += positions * module.weight.numel()


def test_the_macs_of_steps_are_three_times_those_of_their_layers():
    """Forward, and twice as much backward; of every image of every pass."""
    supernet, objective = build(dtype=torch.float32)
    meter = Meter(supernet.model)
    training = loop(supernet, objective, accumulation=2)
    for step in range(3):
        training.step(IMAGES.float()[: 16 - step], LABELS[: 16 - step], step)
        assert objective.macs == 3 * meter.macs
    assert isinstance(objective.macs, int)


def test_masks_are_charged_as_slices_are():
    """The overhead is that of the algorithm, not of how it is run."""
    totals = []
    for backend in ("slice", "mask"):
        supernet, objective = build(backend=backend)
        after_a_step(supernet, objective)
        totals.append(objective.macs)
    assert totals[0] == totals[1] > 0


def test_the_expected_cost_of_a_step_is_that_of_all_subnets_there_are():
    """All 48 of them, by the layers of the network itself: hand arithmetic."""

    def macs(stem, expand, head):
        at_stem = 64 * (27 * stem + stem * expand + 9 * expand + expand * stem)
        return at_stem + 16 * stem * head + 4 * head

    every = [macs(*counts) for counts in itertools.product(*GRIDS.values())]
    assert len(every) == 48
    graph = build()[0].graph
    assert graph.macs() == macs(*COUNTS)
    for subnets in (0, 2, 5):
        expected = 3 * (macs(*COUNTS) + macs(2, 1, 3) + subnets * statistics.mean(every))
        assert step_macs(graph, GRIDS, random_subnets=subnets) == pytest.approx(expected, rel=1e-12)


def test_the_expected_cost_of_a_step_is_the_mean_of_many(traced):
    """On ResNeXt-50, whose groups have several channels; within four standard errors."""
    _, graph = traced("resnext50_32x4d")
    options = grids(graph, lambda count: sorted({max(1, count * k // 10) for k in range(1, 11)}))
    draws = random.Random(0)  # noqa: S311 (no secret)
    narrowest = graph.macs({name: grid[0] for name, grid in options.items()})
    costs = [
        3
        * (
            graph.macs()
            + narrowest
            + sum(
                graph.macs({name: draws.choice(grid) for name, grid in options.items()})
                for _ in range(2)
            )
        )
        for _ in range(1000)
    ]
    expected = step_macs(graph, options, random_subnets=2)
    error = statistics.stdev(costs) / math.sqrt(len(costs))
    assert abs(statistics.mean(costs) - expected) < 4 * error
    assert error < 0.01 * expected


@pytest.mark.parametrize(("least", "budget"), [(0, 100), (10**9, 10**9), (101, 10**9)])
def test_a_budget_that_no_search_ends_at_is_refused(least, budget):
    graph = build()[0].graph
    narrowest = graph.macs({"stem": 2, "expand": 1, "head": 3})
    with pytest.raises(
        InputError,
        match=r"^algorithm.enlarge is 1.5, but the subnets that are searched then take "
        rf"{narrowest:,} to {graph.macs():,} MACs and their budget, {budget:,}, is not between; "
        r"change it or budget_macs, which is the target's budget and scaled to what is searched$",
    ):
        check_budget(graph, GRIDS, least, budget, enlarge=1.5)


def test_a_budget_between_the_narrowest_and_the_widest_is_not_refused():
    graph = build()[0].graph
    narrowest = graph.macs({"stem": 2, "expand": 1, "head": 3})
    check_budget(graph, GRIDS, narrowest + 1, graph.macs() - 1, enlarge=1.5)
    with pytest.raises(InputError):
        check_budget(graph, GRIDS, narrowest, graph.macs() - 1, enlarge=1.5)
    with pytest.raises(InputError):
        check_budget(graph, GRIDS, narrowest + 1, graph.macs(), enlarge=1.5)


# --------------------------------------------------------------------------- the training


def run_training(objective, folder=None, *, epochs=3, data=None):
    return train(
        objective.supernet.model,
        data or Synthetic(),
        recipe=RECIPE,
        epochs=epochs,
        seed=0,
        runtime=RUNTIME,
        objective=objective,
        folder=folder,
    )


def four_losses(supernet, objective):
    """Of all images: the widest's with the labels, the others' with the widest."""
    data = Synthetic()
    with torch.no_grad():
        logits = supernet.full(data.pixels)
        losses = [smooth_loss(logits, data.labels, 0.0).item()]
        students = [
            {name: grid[0] for name, grid in GRIDS.items()},
            *(objective.draw(0, number) for number in (0, 1)),
        ]
        losses += [
            soft(supernet.subnet(channels)(data.pixels), logits.softmax(1)).item()
            for channels in students
        ]
    return losses


def test_all_four_losses_fall_on_64_images():
    """Test 13; chance is log 4 = 1.39. The narrowest has a single channel in its block."""
    supernet, objective = build(dtype=torch.float32)
    before = four_losses(supernet, objective)
    run_training(objective, epochs=12)
    after = four_losses(supernet, objective)
    assert min(before) > 1.2
    assert after[0] < 0.3
    assert all(now < 0.8 * then for now, then in zip(after, before, strict=True))
    with torch.no_grad():
        narrowest = supernet.subnet({"stem": 2, "expand": 1, "head": 3})(Synthetic().pixels)
    assert (narrowest.argmax(1) == Synthetic().labels).double().mean() > 0.5


def weights(supernet):
    return {name: item.clone() for name, item in supernet.model.state_dict().items()}


def test_both_ways_train_the_same_network():
    ends = []
    for backend in ("slice", "mask"):
        supernet, objective = build(backend=backend)
        training = loop(supernet, objective)
        for step in range(4):
            training.step(IMAGES, LABELS, step)
        ends.append(weights(supernet))
    close(*ends, 1e-5)


@pytest.mark.parametrize("step", [2, 4, 7])
@pytest.mark.parametrize("backend", ["slice", "mask"])
def test_a_training_that_was_interrupted_ends_with_the_same_bits(tmp_path, step, backend):
    """Step 4 begins an epoch."""
    supernet, objective = build(dtype=torch.float32, backend=backend)
    whole = run_training(objective)
    cut, first = build(dtype=torch.float32, backend=backend)
    with pytest.raises(Interrupted):
        run_training(first, tmp_path, data=Synthetic(interrupt=step))
    assert 0 < first.macs < objective.macs
    assert not torch.equal(cut.model.stem.weight, supernet.model.stem.weight)
    resumed, second = build(dtype=torch.float32, backend=backend)
    again = run_training(second, tmp_path)
    assert second.macs == objective.macs
    assert dataclasses.replace(again, seconds=0) == dataclasses.replace(whole, seconds=0)
    ours, theirs = weights(resumed), weights(supernet)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(our, theirs[name]) for name, our in ours.items())


@pytest.mark.parametrize(
    "second",
    [
        {"options": GRIDS | {"head": (3, 12)}},
        {"random_subnets": 1, "reduction": "sum"},
        {"reduction": "mean"},
        {"options": {f"other{place}": tuple(range(1, 1000)) for place in range(30)}},
    ],
    ids=["grid", "subnets", "reduction", "many long grids"],
)
def test_a_checkpoint_of_another_search_is_refused_in_one_line(tmp_path, second):
    run_training(build(dtype=torch.float32)[1], tmp_path, epochs=1)
    with pytest.raises(
        InputError, match=r"checkpoints are of another training \(.*\); use"
    ) as info:
        run_training(build(dtype=torch.float32, **second)[1], tmp_path, epochs=1)
    assert "\n" not in str(info.value)
    assert len(str(info.value)) < 600


# ------------------------------------------------------------------------------ the trial


@pytest.fixture
def passes():
    """Forward passes of any network of these tests."""
    seen = []

    def count(module, *_):
        if isinstance(module, Small):
            seen.append(module)

    handle = nn.modules.module.register_module_forward_hook(count)
    yield seen
    handle.remove()


def prepare(folder, *, seed=0, **runtime):
    context = SearchContext(
        recipe=RECIPE, runtime=dataclasses.replace(RUNTIME, **runtime), seed=seed, folder=folder
    )
    return prepare_supernet(BLUEPRINT, context, enlarge=1.5, batch_size=16)


WAYS = [
    {"memory_format": "contiguous", "mixed": mixed, "backend": backend}
    for mixed in (False, True)
    for backend in ("slice", "mask")
]
"""What a runtime of a CPU leaves open."""

TRIED = [*WAYS[2:], *WAYS[:2]]
"""The same in the order of the trial: mixed formats with slices are the default of a CPU."""


def kept_in(folder):
    return json.loads((folder / "trial.json").read_text("utf-8"))


def way_of(supernet, runtime):
    """How a prepared search runs, which its runtime says as well."""
    assert supernet.backend == runtime.backend
    return {
        "memory_format": runtime.memory_format,
        "mixed": supernet.mixed,
        "backend": supernet.backend,
    }


def test_the_trial_chooses_a_way_and_keeps_it(tmp_path, passes):
    supernet, runtime = prepare(tmp_path, backend="auto", memory_format="auto")
    assert kept_in(tmp_path) == way_of(supernet, runtime)
    assert kept_in(tmp_path) in WAYS
    assert len(passes) == 2 + 4 * 5 * 3  # four ways, five rounds of three passes
    assert all(parameter.grad is None for parameter in supernet.model.parameters())
    fresh = Supernet(BLUEPRINT, enlarge=1.5, seed=0).model.state_dict()
    assert fresh.keys() == supernet.model.state_dict().keys()


@pytest.mark.parametrize(
    ("seconds", "chosen"),
    [
        # The default way is the first; the seconds of four rounds follow a warm-up.
        ([[9, 9, 9, 9], [10, 10, 9.4, 10], *[[10, 10, 10, 10]] * 3], 2),
        ([[9, 9, 9, 9], [10, 8, 10, 7], *[[10, 10, 10, 10]] * 3], 3),
        ([[1, 9, 9, 9], [10, 9.6, 9.7, 9.8], *[[10, 10, 10, 10]] * 3], 0),
        ([[9, 9, 9, 0.1], *[[10, 10, 10, 10]] * 4], 0),
    ],
    ids=["faster", "fastest", "too close", "only in the warm-up"],
)
def test_the_trial_chooses_the_fastest_way_if_it_is_clearly_faster(
    tmp_path, monkeypatch, seconds, chosen
):
    times = iter([time for times in seconds for time in times])
    monkeypatch.setattr(sandwich, "_pass_seconds", lambda *_: next(times))
    way = way_of(*prepare(tmp_path, backend="auto", memory_format="auto"))
    assert next(times, None) is None
    assert way == TRIED[chosen]
    assert kept_in(tmp_path) == way


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_a_choice_that_was_kept_is_used_again_and_nothing_is_timed(tmp_path, passes, way):
    (tmp_path / "trial.json").write_text(json.dumps(way))
    assert way_of(*prepare(tmp_path, backend="auto", memory_format="auto")) == way
    assert kept_in(tmp_path) == way
    assert len(passes) == 2  # those that see whether the network can be masked


@pytest.mark.parametrize("backend", ["slice", "mask"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_what_the_runtime_fixes_is_not_timed(tmp_path, passes, backend, layout):
    supernet, runtime = prepare(tmp_path, backend=backend, memory_format=layout)
    fixed = {"memory_format": layout, "mixed": False, "backend": backend}
    assert way_of(supernet, runtime) == fixed
    last = supernet.model.stem.weight.is_contiguous(memory_format=torch.channels_last)
    assert last == (layout == "channels_last")
    assert len(passes) == 2


def test_what_the_runtime_fixes_goes_before_what_was_kept(tmp_path):
    kept = {"memory_format": "contiguous", "mixed": True, "backend": "mask"}
    for fixed in (
        {"backend": "slice", "memory_format": "channels_last"},
        {"backend": "slice", "memory_format": "auto"},
        {"backend": "auto", "memory_format": "channels_last"},
    ):
        (tmp_path / "trial.json").write_text(json.dumps(kept))
        _, runtime = prepare(tmp_path, **fixed)
        assert fixed["backend"] in ("auto", runtime.backend)
        assert fixed["memory_format"] in ("auto", runtime.memory_format)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "{}",
        "null",
        '{"backend": "mask"}',
        '{"memory_format": "contiguous", "mixed": false, "backend": 3}',
        '{"memory_format": "auto", "mixed": false, "backend": "slice"}',
        '{"memory_format": "contiguous", "mixed": false, "backend": "slice", "device": "cuda"}',
    ],
)
def test_a_choice_that_cannot_be_read_is_made_again(tmp_path, passes, text):
    (tmp_path / "trial.json").write_text(text)
    way = way_of(*prepare(tmp_path, backend="auto", memory_format="auto"))
    assert way in WAYS
    assert kept_in(tmp_path) == way
    assert len(passes) == 2 + 4 * 5 * 3


def test_weights_of_a_search_depend_on_its_seed_and_not_on_the_trial(tmp_path):
    first = weights(prepare(tmp_path / "1")[0])
    timed = weights(prepare(tmp_path / "2", backend="auto")[0])
    assert all(torch.equal(item, timed[name]) for name, item in first.items())
    second = weights(prepare(tmp_path / "3", seed=1)[0])
    assert not torch.equal(first["stem.weight"], second["stem.weight"])
