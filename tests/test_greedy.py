import copy
import itertools
import json
import logging
import math
import re

import pytest
import torch
from small import FactoryNetwork, make_runtime, make_setting
from torch import nn
from torchvision import models

from widthopt.algorithms import greedy
from widthopt.algorithms.greedy import assumed_path, path_macs, slim
from widthopt.errors import InputError
from widthopt.networks.resize import Blueprint
from widthopt.networks.supernet import Supernet


RUNTIME = make_runtime(memory_format="auto")
CLASSES = 5


class Tiny(nn.Module):
    """A stream that is summed, a depthwise layer, an inner layer; out of alphabetical order."""

    def __init__(self, classes):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU())
        self.inner = nn.Sequential(nn.Conv2d(6, 9, 1, bias=False), nn.BatchNorm2d(9))
        self.deep = nn.Sequential(nn.Conv2d(9, 9, 3, 1, 1, groups=9), nn.BatchNorm2d(9), nn.ReLU6())
        self.back = nn.Sequential(nn.Conv2d(9, 6, 1, bias=False), nn.BatchNorm2d(6))
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, 6).reshape(6, 1, 1))
        self.a = nn.Sequential(nn.Conv2d(6, 8, 3, bias=False), nn.BatchNorm2d(8))
        self.fc = nn.Linear(8, classes)

    def forward(self, images):
        stream = self.stem(images)
        stream = stream + self.scale * self.back(self.deep(self.inner(stream)))
        return self.fc(nn.functional.relu(self.a(stream)).mean((2, 3)))


def blueprint(network, *, width=1.0, resolution=9):
    if not isinstance(network, str):
        network = FactoryNetwork(network)
    return Blueprint(make_setting(network, classes=CLASSES, width=width, resolution=resolution))


def build_supernet(network, *, width=1.0, resolution=9, seed=0, dtype=torch.double):
    """A supernet with its norms in disorder; double, so that rounding decides nothing."""
    supernet = Supernet(
        blueprint(network, width=width, resolution=resolution), enlarge=1.5, seed=seed
    )
    draws = torch.Generator().manual_seed(seed)
    for module in supernet.model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data.uniform_(0.5, 1.5, generator=draws)
            module.bias.data.uniform_(-0.5, 0.5, generator=draws)
    supernet.model.to(dtype)
    return supernet


def grids_of(supernet, bins=3):
    return {
        name: sorted(
            {max(1, round(k * variable.classes / bins)) * variable.unit for k in range(1, bins + 1)}
        )
        for name, variable in supernet.graph.free.items()
    }


def images_and_labels(count=40, resolution=9, seed=1):
    draws = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 3, resolution, resolution, generator=draws, dtype=torch.double)
    return images, torch.randint(CLASSES, (count,), generator=draws)


def least(supernet, grids):
    """The MACs of the narrowest: a budget that takes the whole path."""
    return supernet.graph.macs({name: grid[0] for name, grid in grids.items()})


def run_slim(supernet, grids=None, chunks=None, *, budgets=None, **options):
    grids = grids or grids_of(supernet)
    resolution = supernet.graph.resolution
    chunks = chunks or [images_and_labels(resolution=resolution)]
    budgets = budgets or [least(supernet, grids)]
    return slim(supernet, grids, chunks, budgets_macs=budgets, runtime=RUNTIME, **options)


def mistakes_of_a_standalone_network(supernet, channels, images, labels, calibration):
    """A network of its own at these counts, its weights the leading ones of the supernet."""
    alone = blueprint(Tiny).build(channels, seed=9).double().train()
    given = dict(supernet.model.named_parameters())
    for name, parameter in alone.named_parameters():
        parameter.data.copy_(given[name][tuple(map(slice, parameter.shape))])
    if calibration is not None:
        for module in alone.modules():
            module.momentum = None  # of BatchNorm: the mean over all batches, of which there is one
        alone(calibration)
        alone.eval()
    return sum(
        item.argmax().item() != label for item, label in zip(alone(images), labels, strict=True)
    )


@pytest.mark.parametrize("engine", ["fast", "naive"])
@pytest.mark.parametrize("labels", ["random", "constant"])
@pytest.mark.parametrize("calibrated", [False, True])
def test_the_path_is_that_of_networks_built_for_every_candidate(engine, labels, calibrated):
    """14, 2: with constant labels, which the network never says, every candidate is as bad."""
    supernet = build_supernet(Tiny)
    grids = grids_of(supernet)
    images, truth = images_and_labels()
    if labels == "constant":
        truth[:] = 0
        supernet.model.fc.bias.data[0] = -1e6
    calibration = 2 * images_and_labels(16, seed=7)[0] + 1 if calibrated else None
    chunks = (
        [(images, truth)] if not calibrated else [(images[:7], truth[:7]), (images[7:], truth[7:])]
    )
    found = run_slim(supernet, grids, chunks, engine=engine, calibration=calibration)
    channels = dict(supernet.graph.channels)
    order = list(supernet.graph.free)
    assert order != sorted(order)
    for move in found.moves:
        errors = {}
        for name in order:
            lower = [entry for entry in grids[name] if entry < channels[name]]
            if lower:
                candidate = {**channels, name: lower[-1]}
                errors[name] = mistakes_of_a_standalone_network(
                    supernet, candidate, images, truth, calibration
                )
        assert move.errors == errors
        fewest = min(errors.values())
        first = next(name for name in order if errors.get(name) == fewest)
        channels[first] = [entry for entry in grids[first] if entry < channels[first]][-1]
        assert (move.variable, move.channels) == (first, channels[first])
        assert move.macs == supernet.graph.macs(channels)
    assert channels == {name: grid[0] for name, grid in grids.items()}
    assert found.solutions == ((least(supernet, grids), channels),)


def small_densenet(classes):
    return models.DenseNet(4, (2, 2), 8, num_classes=classes)


class Squeezing(nn.Module):
    """Squeeze and excitation by a mean, and a flatten of positions."""

    def __init__(self, classes):
        super().__init__()
        self.one = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.SiLU(inplace=True))
        self.down, self.up = nn.Linear(8, 4), nn.Linear(4, 8)
        self.two = nn.Sequential(nn.ConvTranspose2d(8, 6, 2), nn.BatchNorm2d(6))
        self.fc = nn.Linear(6 * 25, classes)

    def forward(self, x):
        x = self.one(x)
        part = torch.sigmoid(self.up(torch.relu(self.down(x.mean([2, 3])))))
        return self.fc(self.two(x * part.unsqueeze(2).unsqueeze(3)).flatten(1))


class Shared(nn.Module):
    """One layer that is called twice."""

    def __init__(self, classes):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6))
        self.twice = nn.Conv2d(6, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.last = nn.Conv2d(6, 7, 1)
        self.fc = nn.Linear(7, classes)

    def forward(self, x):
        x = self.stem(x)
        x = x + torch.tanh(self.norm(self.twice(x)))
        x = x + torch.relu(self.norm(self.twice(x)))
        return self.fc(torch.relu_(self.last(x)).mean((2, 3)))


class Mixing(Tiny):
    """Channels are mixed by something other than a layer."""

    def __init__(self, classes):
        super().__init__(classes)
        self.soft = nn.Softmax2d()

    def forward(self, images):
        stream = self.stem(images)
        inner = self.deep(self.inner(stream))
        inner = inner * self.soft(inner) / inner.shape[1]
        return self.fc((self.a(stream + self.back(inner))).mean((2, 3)))


class Averaging(Tiny):
    """As `Mixing`, by a mean and by a LayerNorm."""

    def __init__(self, classes):
        super().__init__(classes)
        self.norm = nn.LayerNorm(6)

    def forward(self, images):
        stream = self.norm(self.stem(images).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        inner = self.deep(self.inner(stream))
        inner = inner - inner.mean(1, keepdim=True)
        return self.fc(self.a(stream + self.back(inner)).mean((2, 3)))


class Overwriting(Tiny):
    """Sums in place, on both sides."""

    def forward(self, images):
        stream = self.stem(images)
        back = self.back(self.deep(self.inner(stream)))
        back = back.add_(stream)
        late = self.stem(torch.relu(images))
        late = late.add_(back)
        return self.fc(torch.relu_(self.a(late)).mean((2, 3)))


class Entangled(Tiny):
    """Reads a value again that was written over since."""

    def forward(self, images):
        stream = self.stem(images)
        inner = self.inner(stream)
        again = self.back(inner)
        deep = self.deep(torch.relu_(inner) + inner)
        stream.mul_(0.5)
        return self.fc(self.a(stream + again + self.back(deep)).mean((2, 3)))


NETWORKS = {
    "resnet18": ("resnet18", 0.1, 32),
    "mobilenet_v2": ("mobilenet_v2", 0.1, 32),
    "concatenated": (small_densenet, 1.0, 16),
    "squeezing": (Squeezing, 1.0, 9),
    "shared": (Shared, 1.0, 9),
    "mixing": (Mixing, 1.0, 9),
    "averaging": (Averaging, 1.0, 9),
    "overwriting": (Overwriting, 1.0, 9),
    "entangled": (Entangled, 1.0, 9),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_the_fast_engine_counts_what_the_naive_one_does(name):
    """15: the whole path, and every count of it."""
    network, width, resolution = NETWORKS[name]
    supernet = build_supernet(network, width=width, resolution=resolution)
    grids = grids_of(supernet, 2 if isinstance(network, str) else 3)
    chunks = [images_and_labels(200 if resolution == 9 else 24, resolution)]
    fast, naive = (run_slim(supernet, grids, chunks, engine=engine) for engine in ("fast", "naive"))
    assert fast.moves == naive.moves
    assert fast.solutions == naive.solutions
    assert len({count for move in fast.moves for count in move.errors.values()}) > 3


@pytest.mark.parametrize("name", ["resnet18", pytest.param("mobilenet_v2", marks=pytest.mark.slow)])
def test_single_precision_counts_the_same_with_and_without_what_was_kept(name):
    """15: naive, fast with no value of the base kept, fast with all kept.

    As of a trained network, no channel is almost constant: dividing by its deviation would make
    rounding matter, and 3 of 600 counts of MobileNetV2 would differ by one.
    """
    network, width, resolution = NETWORKS[name]
    supernet = build_supernet(network, width=width, resolution=resolution, dtype=torch.float32)
    for module in supernet.model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 0.1
    images, labels = images_and_labels(32, resolution)
    given = (grids_of(supernet, 2), [(images.float(), labels)])
    naive = run_slim(supernet, *given, engine="naive")
    assert run_slim(supernet, *given, cache_bytes=0).moves == naive.moves
    assert run_slim(supernet, *given).moves == naive.moves
    assert len({count for move in naive.moves for count in move.errors.values()}) > 3


@pytest.mark.parametrize("name", ["mobilenet_v3_small", "googlenet", "shufflenet_v2_x0_5"])
def test_the_fast_engine_counts_what_the_naive_one_does_in_large_networks(name):
    """15, for a few variables spread over a network with excitation, branches or shuffles."""
    width = 1.0 if name == "shufflenet_v2_x0_5" else 0.2
    supernet = build_supernet(name, width=width, resolution=32)
    every = grids_of(supernet, 2)
    step = math.ceil(len(every) / 8)
    moved = list(itertools.islice(every, 0, None, step))
    grids = {name: grid if name in moved else grid[-1:] for name, grid in every.items()}
    chunks = [images_and_labels(16, 32)]
    fast, naive = (run_slim(supernet, grids, chunks, engine=engine) for engine in ("fast", "naive"))
    assert fast.moves == naive.moves
    assert len(fast.moves) == len(moved)
    assert fast.macs < naive.macs


class Dropping(Tiny):
    """Draws while it is trained."""

    def forward(self, images):
        return self.fc(
            nn.functional.dropout(self.a(self.stem(images)).mean((2, 3)), 0.5, self.training)
        )


def test_nothing_is_drawn_though_the_supernet_was_in_training():
    supernet = build_supernet(Dropping)
    first, again, naive = (
        run_slim(supernet, engine=engine)
        for engine in ("fast", "fast", "naive")
        if supernet.model.train()
    )
    assert first.moves == again.moves == naive.moves


@pytest.mark.parametrize("limit", [0, 30_000, 200_000])
@pytest.mark.parametrize("chunks", [1, 2])
@pytest.mark.parametrize("network", [Tiny, Overwriting, small_densenet])
def test_little_memory_changes_the_work_and_not_the_counts(limit, chunks, network):
    supernet = build_supernet(network, resolution=9 if network is not small_densenet else 16)
    parts = [
        images_and_labels(40 // chunks, supernet.graph.resolution, seed) for seed in range(chunks)
    ]
    enough = run_slim(supernet, chunks=parts)
    little = run_slim(supernet, chunks=parts, cache_bytes=limit)
    assert little.moves == enough.moves
    assert little.macs >= enough.macs
    assert (little.macs > enough.macs) or limit


def test_the_order_in_which_grids_are_given_changes_nothing():
    """17."""
    supernet = build_supernet(Tiny)
    grids = grids_of(supernet)
    turned = dict(reversed(grids.items()))
    assert run_slim(supernet, turned).moves == run_slim(supernet, grids).moves


@pytest.mark.parametrize("engine", ["fast", "naive"])
def test_mistakes_of_chunks_add_up_in_any_order(engine):
    """17 and 22."""
    supernet = build_supernet(Tiny)
    chunks = [images_and_labels(count, seed=count) for count in (12, 20, 31)]
    budget = [supernet.graph.macs() - 1]
    together = run_slim(supernet, chunks=chunks, budgets=budget, engine=engine)
    turned = run_slim(supernet, chunks=chunks[::-1], budgets=budget, engine=engine)
    alone = [run_slim(supernet, chunks=[chunk], budgets=budget, engine=engine) for chunk in chunks]
    sums = {
        name: sum(item.moves[0].errors[name] for item in alone) for name in together.moves[0].errors
    }
    assert together.moves[0].errors == turned.moves[0].errors == sums


def test_images_sorted_by_class_are_judged_otherwise():
    """22: why the order of the images matters where BatchNorm sees their batch."""
    supernet = build_supernet(Tiny)
    images, _ = images_and_labels(60)
    images += torch.arange(60)[:, None, None, None] / 20
    labels = torch.arange(60) // 12
    budget = [supernet.graph.macs() - 1]

    def first(order):
        pairs = list(zip(images[order].split(12), labels[order].split(12), strict=True))
        return run_slim(supernet, chunks=pairs, budgets=budget).moves[0].errors

    mixed = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    assert first(torch.arange(60)) != first(mixed)


def attributes(model):
    """All that a module keeps, and the places where tensors lie."""
    return [
        {
            key: value if isinstance(value, (bool, int, str, tuple, type(None))) else id(value)
            for key, value in vars(module).items()
        }
        | {
            name: (id(value), value.data_ptr(), value.requires_grad, value._version)  # noqa: SLF001
            for name, value in module._parameters.items()  # noqa: SLF001
            if value is not None
        }
        for module in model.modules()
    ]


@pytest.mark.parametrize("engine", ["fast", "naive"])
@pytest.mark.parametrize("calibration", [None, images_and_labels(8, 32)[0]])
def test_a_search_leaves_the_supernet_as_it_was(engine, calibration):
    """18."""
    supernet = build_supernet("shufflenet_v2_x0_5", resolution=32)
    model = supernet.model
    model.train()
    model.conv1.eval()
    images, labels = images_and_labels(24, 32)
    nn.functional.cross_entropy(model(images), labels).backward()
    tensors = itertools.chain(model.parameters(), model.buffers())
    before = [(tensor, tensor.detach().clone(), copy.deepcopy(tensor.grad)) for tensor in tensors]
    kept, buffers = attributes(model), dict(model.named_buffers())
    every = grids_of(supernet, 2)
    grids = {item: every[item][-1 - (place % 8 == 0) :] for place, item in enumerate(every)}
    run_slim(
        supernet, grids, [(images, labels)],
        budgets=[supernet.graph.macs() - 1], engine=engine, calibration=calibration,
    )  # fmt: skip
    assert attributes(model) == kept
    assert dict(model.named_buffers()).keys() == buffers.keys()
    for now, value, grad in before:
        assert torch.equal(now, value)
        assert grad is None or torch.equal(now.grad, grad)
    assert torch.is_grad_enabled()


def test_one_pass_serves_all_budgets():
    """19: and each solution is the first of the path that meets its budget."""
    supernet = build_supernet(Tiny)
    widest = supernet.graph.macs()
    budgets = [widest * 4 // 10, widest * 9 // 10, widest * 6 // 10]
    found = run_slim(supernet, budgets=budgets)
    assert [item.budget_macs for item in found.solutions] == sorted(budgets, reverse=True)
    for solution in found.solutions:
        alone = run_slim(supernet, budgets=[solution.budget_macs])
        assert alone.solutions == (solution,)
        assert alone.moves == found.moves[: len(alone.moves)]
        assert alone.moves[-1].macs <= solution.budget_macs
        assert all(move.macs > solution.budget_macs for move in alone.moves[:-1])
    for wider, narrower in itertools.pairwise(found.solutions):
        assert all(wider.channels[name] >= count for name, count in narrower.channels.items())


def test_a_budget_that_is_met_exactly_is_met():
    supernet = build_supernet(Tiny)
    path = run_slim(supernet).moves
    found = run_slim(supernet, budgets=[path[2].macs])
    assert found.moves == path[:3]


def test_channels_that_nothing_reads_go_first():
    """20: the labels are the supernet's own, so without them it makes no mistake."""
    supernet = build_supernet(Tiny)
    grids = grids_of(supernet)
    name = "inner.0"
    supernet.model.back[0].weight.data[:, grids[name][0] :] = 0
    images, _ = images_and_labels(400)
    with torch.no_grad():
        labels = supernet.full(images).argmax(1)
    first, second, third, *_ = run_slim(supernet, grids, [(images, labels)]).moves
    for move in (first, second):
        assert (move.variable, move.errors[name]) == (name, 0)
        assert all(count > 0 for error, count in move.errors.items() if error != name)
    assert name not in third.errors


def test_the_narrowest_is_reached_and_never_stepped_below():
    """21."""
    supernet = build_supernet(Tiny)
    grids = {**grids_of(supernet), "a.0": [supernet.graph.channels["a.0"]]}
    found = run_slim(supernet, grids)
    assert found.solutions[0].channels == {name: grid[0] for name, grid in grids.items()}
    assert all("a.0" not in move.errors for move in found.moves)
    assert len(found.moves) == sum(len(grid) - 1 for grid in grids.values())


@pytest.mark.parametrize("function", ["slim", "assumed_path"])
@pytest.mark.parametrize(
    ("budget", "message"),
    [
        (lambda widest, _: widest, "budget_macs is {0:,}, but the widest subnet takes {0:,} and "),
        (
            lambda _, narrowest: narrowest - 1,
            "budget_macs is {0:,}, but the narrowest subnet takes {1:,}; raise ",
        ),
    ],
)
def test_a_budget_out_of_reach_is_refused_before_any_work(function, budget, message):
    """21."""
    supernet = build_supernet(Tiny)
    grids = grids_of(supernet)
    narrowest = least(supernet, grids)
    request = budget(supernet.graph.macs(), narrowest)
    supernet.model = None  # there is nothing that could run
    ask = {
        "slim": lambda: run_slim(supernet, grids, budgets=[narrowest, request]),
        "assumed_path": lambda: assumed_path(supernet.graph, grids, request),
    }[function]
    with pytest.raises(InputError, match=re.escape(message.format(request, narrowest))):
        ask()


@pytest.mark.parametrize("engine", ["fast", "naive"])
@pytest.mark.parametrize("name", ["resnet18", "concatenated", "squeezing", "shared", "mixing"])
@pytest.mark.parametrize("limit", [0, 10**9])
def test_the_macs_are_those_of_every_convolution_that_ran(monkeypatch, engine, name, limit):
    """24: counted where torch computes."""
    network, width, resolution = NETWORKS[name]
    supernet = build_supernet(network, width=width, resolution=resolution)
    grids = grids_of(supernet, 2)
    ran = 0

    def counting(function, positions):
        def call(images, weight, *args, **kwargs):
            nonlocal ran
            assert not torch.is_grad_enabled()
            result = function(images, weight, *args, **kwargs)
            ran += len(images) * math.prod(positions(images, result)) * weight.numel()
            return result

        return call

    for function, positions in (
        ("conv2d", lambda _, result: result.shape[2:]),
        ("conv_transpose2d", lambda images, _: images.shape[2:]),
        ("linear", lambda _, result: result.shape[1:-1]),
    ):
        original = getattr(nn.functional, function)
        monkeypatch.setattr(nn.functional, function, counting(original, positions))
    chunks = [images_and_labels(12, resolution, seed) for seed in (1, 2)]
    budgets = [round(0.9 * supernet.graph.macs())]
    for used, calibration in ((chunks, None), (chunks[:1], None), (chunks, chunks[0][0][:8])):
        ran = 0
        found = run_slim(
            supernet, grids, used,
            budgets=budgets, engine=engine, cache_bytes=limit, calibration=calibration,
        )  # fmt: skip
        assert found.macs == ran > 0


def test_a_logit_that_is_not_a_number_is_a_mistake():
    supernet = build_supernet(Tiny)
    images, labels = images_and_labels()
    labels[:] = 2
    supernet.model.fc.bias.data[2] = 1e6
    budget = [supernet.graph.macs() - 1]
    assert set(
        run_slim(supernet, chunks=[(images, labels)], budgets=budget).moves[0].errors.values()
    ) == {0}
    supernet.model.fc.bias.data[2] = math.nan  # argmax finds it at the label's place
    for engine in ("fast", "naive"):
        found = run_slim(supernet, chunks=[(images, labels)], budgets=budget, engine=engine)
        assert set(found.moves[0].errors.values()) == {len(labels)}


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_bin_of_broken_channels_is_worth_losing(broken):
    """Zeros do not silence what is no number; the fast engine has to see that."""
    supernet = build_supernet(Tiny)
    supernet.model.inner[1].bias.data[-1] = broken
    fast, naive = (run_slim(supernet, engine=engine) for engine in ("fast", "naive"))
    assert fast.moves == naive.moves
    assert fast.moves[0].variable == "inner.0"


class KilledError(BaseException):
    """What stands for a kill."""


@pytest.mark.parametrize("written", [True, False])
@pytest.mark.parametrize("chunks", [1, 2])
def test_a_search_killed_after_every_move_ends_as_one_that_was_not(
    monkeypatch, tmp_path, written, chunks
):
    """16 as well: each move starts without what the one before had kept."""
    supernet = build_supernet(Tiny)
    parts = [images_and_labels(30, seed=seed) for seed in range(chunks)]
    budgets = [supernet.graph.macs() * 8 // 10, least(supernet, grids_of(supernet))]
    whole = run_slim(supernet, chunks=parts, budgets=budgets, log=tmp_path / "whole.json")
    log = tmp_path / "folder" / "moves.json"
    write, writes = greedy.write_atomically, 0

    def killing(path, content):
        nonlocal writes
        writes += 1
        if written or writes % 2:
            write(path, content)
        if written or not writes % 2:
            raise KilledError

    monkeypatch.setattr(greedy, "write_atomically", killing)
    kills = 0
    while True:
        try:
            found = run_slim(supernet, chunks=parts, budgets=budgets, log=log)
        except KilledError:
            kills += 1
        else:
            break
    assert kills >= len(whole.moves) - 1
    assert found.moves == whole.moves
    assert found.solutions == whole.solutions
    assert found.macs == whole.macs
    assert found.seconds > 0


def test_a_finished_search_is_read_from_its_log_without_a_pass(tmp_path):
    supernet = build_supernet(Tiny)
    log = tmp_path / "moves.json"
    whole = run_slim(supernet, log=log, identity={"seed": 1})
    model, supernet.model = supernet.model, None
    assert run_slim(supernet, log=log, identity={"seed": 1}) == whole
    higher = [supernet.graph.macs() * 8 // 10]
    again = run_slim(supernet, log=log, identity={"seed": 1}, budgets=higher)
    supernet.model = model
    assert again.solutions == run_slim(supernet, budgets=higher).solutions


def test_a_log_of_another_search_is_refused_in_one_line_that_says_why(tmp_path):
    supernet = build_supernet(Tiny)
    log = tmp_path / "moves.json"
    budgets = [supernet.graph.macs() - 1]
    run_slim(supernet, log=log, identity={"seed": 1, "data": "x"}, budgets=budgets)
    message = f"log is {log}, but it belongs to another search (seed is 1 there and 2 here); name "
    with pytest.raises(InputError, match=re.escape(message)) as error:
        run_slim(supernet, log=log, identity={"seed": 2, "data": "x"}, budgets=budgets)
    assert "\n" not in str(error.value)
    with pytest.raises(InputError, match=r"\(grids\.[\w.]+ is \[\d.*\] there and \[\d"):
        run_slim(supernet, grids_of(supernet, 2), log=log, identity={"seed": 1, "data": "x"})
    chunks = [images_and_labels(20)]
    with pytest.raises(InputError, match=re.escape("(chunks is [40] there and [20] here)")):
        run_slim(supernet, chunks=chunks, log=log, identity={"seed": 1, "data": "x"})


@pytest.mark.parametrize("there", ["another grid", "another network"])
def test_the_whole_path_of_another_search_is_refused_and_kept(tmp_path, there):
    """The log is no path through these grids. An incomplete log is overwritten."""
    supernet = build_supernet(Tiny)
    log = tmp_path / "moves.json"
    if there == "another grid":
        run_slim(supernet, grids_of(supernet, 6), log=log)
    else:
        run_slim(build_supernet("resnet18", width=0.07, resolution=32), log=log)
    text = log.read_text()
    with pytest.raises(InputError, match=r"belongs to another search \(.*grids\.") as error:
        run_slim(supernet, log=log)
    assert len(str(error.value)) < 600
    assert log.read_text() == text


@pytest.mark.parametrize(
    ("grid", "shown"), [([4, 4, 9], "[4, 4, 9]"), ([6, 3, 9], "[6, 3, 9]"), ([3, 6], "[3, 6]")]
)
def test_a_grid_that_does_not_ascend_to_the_supernets_count_is_refused(grid, shown):
    supernet = build_supernet(Tiny)
    name, count = next((n, c) for n, c in supernet.graph.channels.items() if c == 9)
    message = f"grids is {shown} for {name}, but it must ascend strictly to the supernet's "
    with pytest.raises(InputError, match=f"^{re.escape(message)}{count} channels; "):
        run_slim(supernet, grids_of(supernet) | {name: grid}, budgets=[1])


def cut_short(text):
    return text[: len(text) // 2]


def another_path(text):
    record = json.loads(text)
    record["moves"][0]["variable"] = "fc"
    return json.dumps(record)


def errors_in_a_list(text):
    record = json.loads(text)
    record["moves"][0]["errors"] = list(record["moves"][0]["errors"].values())
    return json.dumps(record)


def errors_in_words(text):
    record = json.loads(text)
    record["moves"][0]["errors"] = dict.fromkeys(record["moves"][0]["errors"], "few")
    return json.dumps(record)


DAMAGES = {
    "errors in a list": errors_in_a_list,
    "errors in words": errors_in_words,
    "cut short": cut_short,
    "another path": another_path,
    "no table": lambda _: "[]",
    "empty": lambda _: "",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_log_counts_as_none_with_a_warning(tmp_path, caplog, damage):
    supernet = build_supernet(Tiny)
    log = tmp_path / "moves.json"
    whole = run_slim(supernet, log=log)
    text = log.read_text()
    log.write_text(DAMAGES[damage](text))
    with caplog.at_level(logging.WARNING, "widthopt"):
        again = run_slim(supernet, log=log)
    assert (again.moves, again.macs) == (whole.moves, whole.macs)
    assert f"{log} is incomplete; the search starts again" in caplog.text
    assert json.loads(log.read_text())["moves"][0]["variable"] == whole.moves[0].variable


@pytest.mark.parametrize(("name", "passes"), [("resnet18", 416), ("mobilenet_v2", 1791)])
def test_the_expected_macs_are_those_of_the_documentation(name, passes):
    """Section 4.2: with ten bins, in passes of the network that is to be matched."""
    plan = blueprint(name, resolution=224)
    graph = plan.resize_graph(
        {name: round(1.5 * count) for name, count in plan.graph.channels.items()}
    )
    grids = {
        name: [round(k * count / 10) for k in range(1, 11)]
        for name, count in graph.channels.items()
    }
    budget = plan.graph.macs()
    path = assumed_path(graph, grids, budget)
    macs = path_macs(graph, grids, path, images=3, chunk=1)
    assert macs / (3 * budget) == pytest.approx(passes, rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "concatenated", "squeezing"])
@pytest.mark.parametrize("chunks", [1, 2])
def test_the_closed_form_along_the_path_is_what_a_search_runs(name, chunks):
    """24: within a hundredth, whether values outlive a move (a single chunk) or not.

    Three where channels are joined: the other parts of what is stale may not be kept.
    """
    network, width, resolution = NETWORKS[name]
    supernet = build_supernet(network, width=width, resolution=resolution)
    grids = grids_of(supernet)
    parts = [images_and_labels(6, resolution, seed) for seed in range(chunks)]
    found = run_slim(supernet, grids, parts)
    path = [move.variable for move in found.moves]
    expected = path_macs(supernet.graph, grids, path, images=6 * chunks, chunk=6)
    joined = name == "concatenated" and chunks == 1
    assert expected == pytest.approx(found.macs, rel=0.03 if joined else 0.01)
