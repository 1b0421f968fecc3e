import math
import statistics
from collections import defaultdict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small import make_recipe
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from widthopt.algorithms import check_searchable
from widthopt.algorithms.penalty import Penalty
from widthopt.errors import InputError
from widthopt.networks import TorchvisionNetwork
from widthopt.tracing import trace
from widthopt.training.loop import learning_rate


PAPER = make_recipe(
    batch_size=1024,
    epochs=100,
    search_epochs=40,
    learning_rate=0.2,
    warmup_epochs=5,
    augmentation="paper",
)
NINE = [
    "resnet18",
    "resnet50",
    "resnext50_32x4d",
    "mobilenet_v2",
    "mobilenet_v3_large",
    "vgg11_bn",
    "regnet_x_400mf",
    "densenet121",
    "efficientnet_b0",
]


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Flat tensors this short are no work to share: threads would wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Norms(nn.Module):
    """Nothing but the BatchNorms of a network, under their names: all that a penalty touches."""

    def __init__(self, graph, *, dtype=torch.float64):
        super().__init__()
        self._norms = {}
        for norm in graph.norms:
            if norm.gamma:
                item = nn.BatchNorm2d(graph.length(norm.axis)).to(dtype)
                self._norms[norm.name] = item
                self.register_module(norm.name.replace(".", "/"), item)

    def get_submodule(self, target):
        return self._norms[target]

    @property
    def gammas(self):
        return {name: norm.weight for name, norm in self._norms.items()}

    @property
    def betas(self):
        return {name: norm.bias for name, norm in self._norms.items()}


def build_penalty(graph, *, threshold=0.01, tie="max", depthwise="double", dtype=torch.float64):
    """The norms of a network, in float64 where rounding would hide a fault, and its penalty."""
    norms = Norms(graph, dtype=dtype)
    return norms, Penalty(norms, graph, threshold=threshold, tie=tie, depthwise=depthwise)


def gradients(norms, penalty, strength=1.0):
    """R/F0, and what one call adds to the gradient of each norm's scale."""
    for gamma in norms.gammas.values():
        gamma.grad = torch.zeros_like(gamma)
    value = penalty.add_gradient(strength)
    return float(value), {name: gamma.grad.clone() for name, gamma in norms.gammas.items()}


def scatter(norms, seed, *, dead=0.4):
    """Set scales of both signs, about two fifths of them small, and no two alike in size."""
    total = sum(gamma.numel() for gamma in norms.gammas.values())
    draws = torch.Generator().manual_seed(seed)
    sizes = torch.linspace(0.02, 1.5, total, dtype=torch.float64)
    sizes[: int(dead * total)] = torch.linspace(1e-4, 9e-3, int(dead * total)).double()
    values = sizes[torch.randperm(total, generator=draws)]
    values *= torch.randint(0, 2, (total,), generator=draws) * 2 - 1
    with torch.no_grad():
        parts = values.split([gamma.numel() for gamma in norms.gammas.values()])
        for gamma, part in zip(norms.gammas.values(), parts, strict=True):
            gamma.copy_(part)


# ------------------------------------------------------- the textbook, one layer at a time
#
# Written from the networks' own forward code: which tensor each layer reads and writes, and
# which BatchNorms its channels pass. Sizes are those that hooks see in a real forward pass.


class Textbook:
    """docs/algorithms/morphnet.md, 1.4, written as there: a sum over layers, by autograd.

    A layer is its name, the tensors that it reads (joined, each entry repeated) and the one
    that it writes. A tensor is the names of the BatchNorms whose scales are tied in it: none
    means that nothing regularises it.
    """

    def __init__(self, layers, tensors):
        self.layers, self.tensors = layers, tensors

    def __call__(self, model, resolution, gammas, *, threshold, double=True, l2=False):
        """R, and F0 at the counts alive, of which R is the penalty."""
        outputs = _positions(model, [name for name, *_ in self.layers], resolution)
        sizes = {}
        for tensor, norms in self.tensors.items():
            members = torch.stack([gammas[norm].abs() for norm in norms])
            sizes[tensor] = members.square().sum(0).sqrt() if l2 else members.amax(0)
        penalty, cost, whole = 0.0, 0, 0
        for name, reads, writes in self.layers:
            layer = model.get_submodule(name)
            kappa = outputs[name]
            if isinstance(layer, nn.Conv2d):
                kappa *= math.prod(layer.kernel_size)
            fan_in = layer.weight.shape[1]
            alive_out, rho_out = _side(sizes, [(writes, 1)], threshold, len(layer.weight))
            alive_in, rho_in = _side(sizes, reads, threshold, fan_in)
            if getattr(layer, "groups", 1) > 1:
                assert layer.groups == layer.in_channels == layer.out_channels
                penalty = penalty + kappa * (rho_out + rho_in if double else rho_out)
                cost += kappa * alive_out
                whole += kappa * len(layer.weight)
            else:
                penalty = penalty + kappa * (alive_in * rho_out + alive_out * rho_in)
                cost += kappa * alive_in * alive_out
                whole += (
                    kappa
                    * layer.weight[0, :].numel()
                    // max(1, math.prod(getattr(layer, "kernel_size", (1,))))
                    * len(layer.weight)
                )
        return penalty, cost, whole


def _side(sizes, tensors, threshold, entries):
    """Alive entries of one side of a layer, and the sum of their scales."""
    if any(tensor not in sizes for tensor, _ in tensors):
        return entries, 0.0
    alive, rho = 0, 0.0
    for tensor, repeat in tensors:
        for size in sizes[tensor]:  # one channel at a time, on purpose
            alive += repeat * int(size.item() > threshold)
        rho = rho + repeat * sizes[tensor].sum()
    return alive, rho


def _positions(model, names, resolution):
    """Output positions of each layer, from a forward pass."""
    seen = {}

    def hook(name):
        def look(_module, _inputs, output):
            seen[name] = math.prod(output.shape[2:])

        return look

    handles = [model.get_submodule(name).register_forward_hook(hook(name)) for name in names]
    with torch.no_grad():
        model.eval()(torch.zeros(1, 3, resolution, resolution, device="meta"))
    for handle in handles:
        handle.remove()
    return seen


def resnet18_textbook():
    layers = [("conv1", [("image", 1)], "1")]
    tensors = {"1": ["bn1"]}
    before = "1"
    for stage in "1234":
        for block in "01":
            name = f"layer{stage}.{block}"
            layers += [
                (f"{name}.conv1", [(before, 1)], f"{name}"),
                (f"{name}.conv2", [(name, 1)], stage),
            ]
            tensors[name] = [f"{name}.bn1"]
            tensors.setdefault(stage, []).append(f"{name}.bn2")
            if stage != before:
                layers.append((f"{name}.downsample.0", [(before, 1)], stage))
                tensors[stage].append(f"{name}.downsample.1")
            before = stage
    layers.append(("fc", [("4", 1)], "classes"))
    return Textbook(layers, tensors)


def mobilenet_v2_textbook():
    layers = [("features.0.0", [("image", 1)], "stem")]
    tensors = {"stem": ["features.0.1"]}
    number, before = 1, "stem"
    for expansion, channels, blocks in (
        (1, 16, 1), (6, 24, 2), (6, 32, 3), (6, 64, 4), (6, 96, 3), (6, 160, 3), (6, 320, 1),
    ):  # fmt: skip
        for _ in range(blocks):
            name, after = f"features.{number}.conv", f"{channels}"
            inner = before if expansion == 1 else name
            place = 0
            if expansion > 1:
                layers.append((f"{name}.0.0", [(before, 1)], inner))
                tensors[inner] = [f"{name}.0.1"]
                place = 1
            layers.append((f"{name}.{place}.0", [(inner, 1)], inner))
            tensors[inner].append(f"{name}.{place}.1")
            layers.append((f"{name}.{place + 1}", [(inner, 1)], after))
            tensors.setdefault(after, []).append(f"{name}.{place + 2}")
            number, before = number + 1, after
    layers += [("features.18.0", [("320", 1)], "1280"), ("classifier.1", [("1280", 1)], "classes")]
    tensors["1280"] = ["features.18.1"]
    return Textbook(layers, tensors)


def vgg11_textbook():
    """Flattened 7x7: every entry of the last convolution is read 49 times; no norm after."""
    layers, tensors, before = [], {}, "image"
    for place in (0, 4, 8, 11, 15, 18, 22, 25):
        name = f"features.{place}"
        layers.append((name, [(before, 1)], name))
        tensors[name] = [f"features.{place + 1}"]
        before = name
    layers += [
        ("classifier.0", [(before, 49)], "hidden1"),
        ("classifier.3", [("hidden1", 1)], "hidden2"),
        ("classifier.6", [("hidden2", 1)], "classes"),
    ]
    return Textbook(layers, tensors)


TEXTBOOKS = {
    "resnet18": resnet18_textbook(),
    "mobilenet_v2": mobilenet_v2_textbook(),
    "vgg11_bn": vgg11_textbook(),
}


@pytest.fixture(params=TEXTBOOKS)
def book(request, traced):
    model, graph = traced(request.param, 64)
    return model.to("meta"), graph, TEXTBOOKS[request.param]


@pytest.mark.parametrize("seed", [0, 1])
def test_the_penalty_is_the_textbooks_sum_over_layers(book, seed):
    """docs/algorithms/morphnet.md, P5.

    And its gradient: autograd's, through the maxima but not through the counts.
    """
    model, graph, textbook = book
    norms, penalty = build_penalty(graph)
    scatter(norms, seed)
    value, found = gradients(norms, penalty)
    total, cost, whole = textbook(model, 64, norms.gammas, threshold=0.01)
    assert whole == penalty.macs == graph.macs()
    assert cost == graph.macs(
        {name: count * graph.free[name].unit for name, count in penalty.counts().items()}
    )
    assert value == pytest.approx(total.item() / whole, rel=1e-12)
    for name, gamma in norms.gammas.items():
        (expected,) = torch.autograd.grad(total / whole, gamma, retain_graph=True)
        torch.testing.assert_close(found[name], expected, rtol=1e-12, atol=1e-18)


def test_the_penalty_at_the_start_is_the_textbooks_and_ties_share_evenly(book):
    """All scales are 1 then, so every member of a class attains its maximum."""
    model, graph, textbook = book
    norms, penalty = build_penalty(graph)
    value, found = gradients(norms, penalty)
    total, _, whole = textbook(model, 64, norms.gammas, threshold=0.01)
    assert value == pytest.approx(total.item() / whole, rel=1e-12)
    for name, gamma in norms.gammas.items():
        (expected,) = torch.autograd.grad(total / whole, gamma, retain_graph=True)
        torch.testing.assert_close(found[name], expected, rtol=1e-12, atol=1e-18)


def test_the_euclidean_tie_is_the_textbooks(book):
    model, graph, textbook = book
    norms, penalty = build_penalty(graph, tie="l2")
    scatter(norms, 2)
    value, found = gradients(norms, penalty)
    total, _, whole = textbook(model, 64, norms.gammas, threshold=0.01, l2=True)
    assert value == pytest.approx(total.item() / whole, rel=1e-12)
    for name, gamma in norms.gammas.items():
        (expected,) = torch.autograd.grad(total / whole, gamma, retain_graph=True)
        torch.testing.assert_close(found[name], expected, rtol=1e-12, atol=1e-18)


def test_depthwise_layers_can_be_charged_by_their_gradient_alone(traced):
    """docs/algorithms/morphnet.md, P19: twice kappa times the scales by default, once without."""
    model, graph = traced("mobilenet_v2", 64)
    norms, penalty = build_penalty(graph, depthwise="single")
    scatter(norms, 3)
    value, _ = gradients(norms, penalty)
    total, _, whole = TEXTBOOKS["mobilenet_v2"](
        model.to("meta"), 64, norms.gammas, threshold=0.01, double=False
    )
    assert value == pytest.approx(total.item() / whole, rel=1e-12)
    double = build_penalty(graph)[1]
    twice = sum(
        layer.coefficient * graph.length(layer.writes)
        for layer in graph.layers
        if layer.kind == "depthwise"
    )
    single = build_penalty(graph, depthwise="single")[1]
    difference = double.value_and_gradient()[0] - single.value_and_gradient()[0]
    assert float(difference) == pytest.approx(twice / graph.macs(), rel=1e-12)


# ------------------------------------------------- the numbers of the reference's own tests


class Branches(nn.Module):
    """An image of 17x19, whose convolutions are joined before two others read them.

    Both outputs are summed over their channels, so that these can be pruned as they can in
    the reference.
    """

    def __init__(self):
        super().__init__()
        self.wider = nn.ZeroPad2d((0, 2, 0, 0))
        self.conv1 = nn.Conv2d(3, 13, (7, 5), padding=(3, 2))
        self.bn1 = nn.BatchNorm2d(13)
        self.conv2 = nn.Conv2d(3, 23, 1)
        self.bn2 = nn.BatchNorm2d(23)
        self.conv3 = nn.Conv2d(36, 29, 3, stride=2, padding=1)
        self.bn3 = nn.BatchNorm2d(29)
        self.conv4 = nn.Conv2d(36, 31, 1)
        self.bn4 = nn.BatchNorm2d(31)

    def forward(self, x):
        x = self.wider(x)
        x = torch.cat([self.bn1(self.conv1(x)), self.bn2(self.conv2(x))], 1)
        return self.bn3(self.conv3(x)).sum(1), self.bn4(self.conv4(x)).sum(1)


class Depthwise(nn.Module):
    """The reference's second network: depthwise on the image, and behind a convolution."""

    def __init__(self):
        super().__init__()
        self.wider = nn.ZeroPad2d((0, 2, 0, 0))
        self.dw1 = nn.Conv2d(3, 3, 3, padding=1, groups=3)
        self.bnd1 = nn.BatchNorm2d(3)
        self.conv1 = nn.Conv2d(3, 13, (7, 5), padding=(3, 2))
        self.bn1 = nn.BatchNorm2d(13)
        self.conv2 = nn.Conv2d(3, 23, 1)
        self.bn2 = nn.BatchNorm2d(23)
        self.dw2 = nn.Conv2d(23, 23, 5, padding=2, groups=23)
        self.bnd2 = nn.BatchNorm2d(23)
        self.conv3 = nn.Conv2d(36, 29, 3, stride=2, padding=1)
        self.bn3 = nn.BatchNorm2d(29)

    def forward(self, x):
        x = self.wider(x)
        first = self.bn1(self.conv1(self.bnd1(self.dw1(x))))
        second = self.bnd2(self.dw2(self.bn2(self.conv2(x))))
        return self.bn3(self.conv3(torch.cat([first, second], 1))).sum(1)


GAMMAS = {
    "bn1": [0.8] * 7 + [0.2] * 6,
    "bn2": [-0.7] * 11 + [0.1] * 12,
    "bn3": [0.6] * 10 + [-0.3] * 19,
    "bn4": [-0.5] * 17 + [-0.4] * 14,
    "bnd1": [-0.3] + [-0.9] * 2,
    "bnd2": [0.3] * 5 + [0.9] * 10 + [-0.1] * 8,
}


def reference(model):
    graph = trace(model, 17)
    model.double()
    with torch.no_grad():
        for name, values in GAMMAS.items():
            if hasattr(model, name):
                model.get_submodule(name).weight.copy_(torch.tensor(values, dtype=torch.float64))
    return graph, Penalty(model, graph, threshold=0.45, tie="max", depthwise="double")


def test_joined_branches_cost_what_the_reference_counts():
    """google-research/morph-net, flop_regularizer_test; it counts two for a multiply-add."""
    graph, penalty = reference(Branches())
    counts = penalty.counts()
    assert counts == {"conv1": 7, "conv2": 11, "conv3": 10, "conv4": 17}
    assert 2 * graph.macs(counts) == 985_404
    assert 2 * float(penalty.value_and_gradient()[0]) * penalty.macs == pytest.approx(
        1_410_376.4, rel=1e-12
    )


def test_a_depthwise_layer_costs_what_the_reference_counts():
    graph, penalty = reference(Depthwise())
    counts = penalty.counts()
    assert counts == {"conv1": 7, "conv2": 15, "conv3": 10}  # max/OR: 11 and 10 alive make 15
    area, small = 17 * 19, 9 * 10
    cost = area * (9 * 3 + 35 * 3 * 7 + 3 * 15 + 25 * 15) + small * 9 * 10 * 22
    assert graph.macs(counts) == cost
    sums = {name: sum(map(abs, values)) for name, values in GAMMAS.items()}
    both = sum(
        max(abs(first), abs(second))
        for first, second in zip(GAMMAS["bn2"], GAMMAS["bnd2"], strict=True)
    )
    total = area * (35 * 3 * sums["bn1"] + 3 * both + 25 * 2 * both)  # dw1: nothing, by rule
    total += small * 9 * (22 * sums["bn3"] + 10 * (sums["bn1"] + both))
    value = float(penalty.value_and_gradient()[0]) * penalty.macs
    assert value == pytest.approx(total, rel=1e-12)


def test_scales_of_the_image_are_neither_charged_nor_pruned():
    model = Depthwise()
    graph, penalty = reference(model)
    assert sum(penalty.members().values()) == 1 + 2 + 1
    with torch.no_grad():
        for name in GAMMAS:
            if hasattr(model, name):
                model.get_submodule(name).weight.zero_()
    penalty.add_gradient(1.0)
    assert not model.bnd1.weight.grad.any()
    model.bnd1.bias.data.fill_(1)
    penalty.truncate()
    assert model.bnd1.bias.eq(1).all()
    assert graph.macs(penalty.counts()) == 17 * 19 * 9 * 3  # only the image's own layer is left


# ------------------------------------------------------ numbers of docs/algorithms/morphnet.md


@pytest.mark.parametrize(
    ("name", "slots", "classes"), [("resnet18", 4_800, 2_880), ("mobilenet_v2", 17_056, 9_128)]
)
def test_a_network_has_as_many_slots_and_classes_as_counted_by_hand(traced, name, slots, classes):
    _, graph = traced(name)
    _, penalty = build_penalty(graph)
    scales = penalty.scales()
    assert (len(scales.flat), len(scales.classes)) == (slots, classes)


def test_the_members_of_a_class_are_those_of_the_hand_written_table(traced):
    """Section 1.4: three norms write each stream of ResNet18, MobileNetV2's as it has blocks."""
    resnet = build_penalty(traced("resnet18")[1])[1].members()
    streams = {"conv1": 3, "layer2.0.conv2": 3, "layer3.0.conv2": 3, "layer4.0.conv2": 3}
    assert {name: count for name, count in resnet.items() if count > 1} == streams
    assert len(resnet) == 12
    _, graph = traced("mobilenet_v2")
    members = build_penalty(graph)[1].members()
    by_width = defaultdict(list)
    for name, count in members.items():
        by_width[graph.free[name].channels].append(count)
    assert by_width == {
        32: [2, 3], 16: [1], 96: [2, 3], 24: [2], 144: [2, 2], 192: [2, 2, 2], 64: [4],
        384: [2, 2, 2, 2], 576: [2, 2, 2], 160: [3], 960: [2, 2, 2], 320: [1], 1280: [1],
    }  # fmt: skip


@pytest.mark.parametrize("name", NINE)
def test_every_batchnorm_of_a_network_is_in_its_penalty(traced, name):
    """docs/algorithms/morphnet.md, P23.

    And that the penalty at the start lies where a slip of the unit would not put it.
    """
    model, graph = traced(name, 64)
    norms, penalty = build_penalty(graph)
    affine = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert len(penalty.scales().flat) == sum(item.num_features for item in affine)
    value, found = gradients(norms, penalty)
    assert 1.5 < value < 2
    assert all(item.gt(0).all() for item in found.values())


@pytest.mark.parametrize(
    ("name", "resolution", "published"),
    [("resnet18", 224, 1.93466), ("mobilenet_v2", 224, 1.95971), ("vgg11_bn", 64, None)],
)
def test_the_penalty_starts_at_twice_the_macs_but_for_one_sided_layers(
    traced, name, resolution, published
):
    """docs/algorithms/morphnet.md, P6. VGG's hidden layers have no scales.

    One side of the first, none of the second.
    """
    _, graph = traced(name, resolution)
    share = {layer.name: layer.coefficient * graph.length(layer.reads) for layer in graph.layers}
    share = {layer.name: share[layer.name] * graph.length(layer.writes) for layer in graph.layers}
    lost = next(iter(share.values())) + list(share.values())[-1]
    if name == "vgg11_bn":
        lost = share["features.0"] + share["classifier.0"]
        lost += 2 * (share["classifier.3"] + share["classifier.6"])
    value = float(build_penalty(graph)[1].value_and_gradient()[0])
    assert value == pytest.approx(2 - lost / graph.macs(), rel=1e-9)
    if published:
        assert value == pytest.approx(published, abs=5e-6)
    else:
        assert value == pytest.approx(1.80, abs=1e-2)


def test_resnet50_too_starts_at_twice_the_macs_but_for_its_ends(traced):
    _, graph = traced("resnet50", 64)
    ends = [graph.layers[0], graph.layers[-1]]
    lost = sum(end.coefficient * graph.length(end.reads) * graph.length(end.writes) for end in ends)
    value = float(build_penalty(graph)[1].value_and_gradient()[0])
    assert value == pytest.approx(2 - lost / graph.macs(), rel=1e-9)


@pytest.mark.parametrize(
    ("name", "least", "median", "most"),
    [("resnet18", 1.9e-4, 8.2e-4, 5.5e-3), ("mobilenet_v2", 5.5e-5, 2.1e-4, 5.5e-3)],
)
def test_the_pressure_on_a_channel_is_that_of_the_table(traced, name, least, median, most):
    """Section 1.5, which gives two digits (5.5528e-3 it cuts off where others are rounded)."""
    _, graph = traced(name)
    pressure = build_penalty(graph)[1].pressure()
    assert min(pressure.values()) == pytest.approx(least, rel=0.02)
    assert statistics.median(pressure.values()) == pytest.approx(median, rel=0.02)
    assert max(pressure.values()) == pytest.approx(most, rel=0.02)
    hardest, softest = max(pressure, key=pressure.get), min(pressure, key=pressure.get)
    assert graph.free[hardest].channels == {"resnet18": 64, "mobilenet_v2": 24}[name]
    assert graph.free[softest].channels == {"resnet18": 512, "mobilenet_v2": 960}[name]


@pytest.mark.parametrize("resolution", [160, 224, 320])
def test_the_pressure_hardly_depends_on_the_resolution(traced, resolution):
    """docs/algorithms/morphnet.md, P15."""
    small = build_penalty(traced("resnet18", 64)[1])[1].pressure()
    large = build_penalty(traced("resnet18", resolution)[1])[1].pressure()
    for name, item in small.items():
        assert large[name] == pytest.approx(item, rel=0.015)


@pytest.mark.parametrize(
    ("images", "travel", "reach"), [(1_281_167, 200_160, 11), (64_058, 9_920, 0.55)]
)
def test_how_far_the_papers_schedule_can_move_a_scale(traced, images, travel, reach):
    """Section 3.2: with 5 % of the images MobileNetV2's last layer cannot be pruned."""
    steps = images // PAPER.batch_size
    rates = [
        learning_rate(PAPER, step=step, steps_per_epoch=steps, epochs=40)
        for step in range(40 * steps)
    ]
    far = sum(rates) / (1 - PAPER.momentum)
    assert far == pytest.approx(travel, rel=1e-3)
    _, graph = traced("mobilenet_v2")
    last = build_penalty(graph)[1].pressure()["features.18.0"]
    assert last * far == pytest.approx(reach, rel=0.02)
    assert (
        2.2 * max(rates) * max(build_penalty(graph)[1].pressure().values()) < 0.01
    )  # docs/algorithms/morphnet.md, D9


# ------------------------------------------------------------------------------ properties


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "densenet121", "resnext50_32x4d"])
def test_the_gradient_is_the_difference_quotient(traced, name):
    """docs/algorithms/morphnet.md, P4.

    At 60 slots: away from |gamma| = tau, from tied maxima and from 0, R is linear.
    """
    _, graph = traced(name, 64)
    norms, penalty = build_penalty(graph)
    scatter(norms, 4, dead=0.2)
    _, found = gradients(norms, penalty)
    flat = torch.cat(list(found.values()))
    winners = flat.nonzero().flatten()
    assert 0 < len(winners) < len(flat)
    draws = torch.Generator().manual_seed(5)
    places = [
        *winners[torch.randperm(len(winners), generator=draws)[:50]].tolist(),
        *torch.randperm(len(flat), generator=draws)[:10].tolist(),
    ]
    gammas = list(norms.gammas.values())
    owners = [(item, entry) for item in gammas for entry in range(len(item))]
    step = 1e-5  # carries none of these past the threshold, 0 or another of its class
    for place in places:
        gamma, entry = owners[place]
        before = gamma.data[entry].item()
        values = []
        for sign in (1, -1):
            gamma.data[entry] = before + sign * step
            values.append(float(penalty.value_and_gradient()[0]))
        gamma.data[entry] = before
        quotient = (values[0] - values[1]) / (2 * step)
        assert quotient == pytest.approx(flat[place].item(), rel=1e-6, abs=1e-10)


@given(st.integers(0, 2**32), st.floats(0.3, 3))
@settings(max_examples=20)
def test_the_penalty_grows_with_the_scales_and_forgets_signs_and_order(traced, seed, factor):
    """docs/algorithms/morphnet.md, P7."""
    _, graph = traced("resnet18", 64)
    norms, penalty = build_penalty(graph, threshold=0.0)  # nothing dies as the scales shrink
    scatter(norms, seed)
    value = float(penalty.value_and_gradient()[0])
    with torch.no_grad():
        for gamma in norms.gammas.values():
            gamma.mul_(-factor)
    assert float(penalty.value_and_gradient()[0]) == pytest.approx(factor * value, rel=1e-9)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        for name in ("bn1", "layer1.0.bn2", "layer1.1.bn2"):
            norms.gammas[name].copy_(norms.gammas[name][order])
    assert float(penalty.value_and_gradient()[0]) == pytest.approx(factor * value, rel=1e-9)


@pytest.mark.parametrize("threshold", [0.01, 0.5])
def test_a_scale_at_the_threshold_is_dead(traced, threshold):
    """Section 1.3: strictly above."""
    _, graph = traced("resnet18", 64)
    norms, penalty = build_penalty(graph, threshold=threshold, dtype=torch.float32)
    with torch.no_grad():
        norms.gammas["layer4.0.bn1"].fill_(threshold)
        norms.gammas["layer4.1.bn1"].fill_(-threshold)
        norms.gammas["layer3.0.bn1"].fill_(threshold * (1 + 1e-6))
    counts = penalty.counts()
    assert (counts["layer4.0.conv1"], counts["layer4.1.conv1"]) == (0, 0)
    assert counts["layer3.0.conv1"] == 256


@pytest.mark.parametrize("name", NINE)
@pytest.mark.parametrize("tie", ["max", "l2"])
def test_truncating_zeroes_all_members_of_dead_classes_and_nothing_else(traced, name, tie):
    """docs/algorithms/morphnet.md, P8 and P17.

    With the classes looked up in the graph slot by slot.
    """
    _, graph = traced(name, 64)
    norms, penalty = build_penalty(graph, tie=tie)
    scatter(norms, 6, dead=0.6)
    with torch.no_grad():
        for beta in norms.betas.values():
            beta.fill_(0.3)
    members = defaultdict(list)
    for norm in graph.norms:
        place = 0
        for run in norm.axis:
            for number in range(run.start, run.start + run.classes):
                slots = [(norm.name, entry) for entry in range(place, place + run.repeat)]
                members[run.variable, number] += slots
                place += run.repeat
    before = {name: gamma.tolist() for name, gamma in norms.gammas.items()}
    counts = penalty.counts()
    penalty.truncate()
    assert penalty.counts() == counts
    gammas = {name: gamma.tolist() for name, gamma in norms.gammas.items()}
    betas = {name: beta.tolist() for name, beta in norms.betas.items()}
    dead = 0
    for slots in members.values():
        old = [before[name][entry] for name, entry in slots]
        size = max(map(abs, old)) if tie == "max" else math.hypot(*old)
        new = [gammas[name][entry] for name, entry in slots]
        shifts = [betas[name][entry] for name, entry in slots]
        if size > 0.01:
            assert new == old
            assert shifts == [0.3] * len(slots)
        else:
            dead += 1
            assert new == shifts == [0] * len(slots)
    assert dead == sum(graph.free[name].classes - count for name, count in counts.items()) > 0


def test_one_class_dead_relieves_its_neighbours_and_no_stranger(traced):
    """docs/algorithms/morphnet.md, P9.

    What reads or writes the other side of the same layer, and nothing else.
    """
    _, graph = traced("resnet18", 64)
    norms, penalty = build_penalty(graph)
    before = penalty.pressure()
    with torch.no_grad():
        norms.gammas["layer2.1.bn1"][7] = 0.001
    after = penalty.pressure()
    assert {name for name in before if after[name] != before[name]} == {"layer2.0.conv2"}
    fallen = (before["layer2.0.conv2"] - after["layer2.0.conv2"]) * penalty.macs
    assert fallen == pytest.approx(2 * 9 * 8 * 8, rel=1e-9)  # two 3x3 layers on 8x8 positions


def test_a_stream_lives_as_long_as_any_of_its_members(traced):
    """docs/algorithms/morphnet.md, P8.

    Max and OR; the downsampling norm and, in stage 1, the stem's are members.
    """
    _, graph = traced("resnet18", 64)
    for stream, norms_of in (
        ("conv1", ["bn1", "layer1.0.bn2", "layer1.1.bn2"]),
        ("layer3.0.conv2", ["layer3.0.bn2", "layer3.0.downsample.1", "layer3.1.bn2"]),
    ):
        for survivor in norms_of:
            norms, penalty = build_penalty(graph)
            with torch.no_grad():
                for name in norms_of:
                    norms.gammas[name].fill_(1.0 if name == survivor else 1e-3)
            assert penalty.counts()[stream] == graph.free[stream].classes
            assert penalty.mixed == graph.free[stream].classes
            _, found = gradients(norms, penalty)
            pushed = {name for name in norms_of if found[name].any()}
            assert pushed == {survivor}
            with torch.no_grad():
                norms.gammas[survivor].fill_(1e-3)
            assert penalty.counts()[stream] == 0


def test_a_scale_of_zero_is_not_pushed(traced):
    _, graph = traced("resnet18", 64)
    norms, penalty = build_penalty(graph)
    with torch.no_grad():
        norms.gammas["layer4.0.bn1"].zero_()
    _, found = gradients(norms, penalty)
    assert not found["layer4.0.bn1"].any()
    assert all(item.isfinite().all() for item in found.values())
    norms, penalty = build_penalty(graph, tie="l2")
    with torch.no_grad():
        norms.gammas["layer4.0.bn1"].zero_()
    _, found = gradients(norms, penalty)
    assert not found["layer4.0.bn1"].any()
    assert all(item.isfinite().all() for item in found.values())


def test_a_layer_at_a_small_scale_is_dead_by_the_absolute_threshold_only(traced):
    """docs/algorithms/morphnet.md, P16."""
    _, graph = traced("resnet18", 64)
    norms, penalty = build_penalty(graph)
    scatter(norms, 7, dead=0.0)
    counts = penalty.counts(relative=True)
    with torch.no_grad():
        norms.gammas["layer3.1.bn1"].mul_(0.005)
    assert penalty.counts()["layer3.1.conv1"] == 0
    assert penalty.counts(relative=True) == counts
    largest = norms.gammas["layer3.1.bn1"].abs().max().item()
    assert penalty.largest()["layer3.1.conv1"] == pytest.approx(largest, rel=1e-12)


def test_a_large_scale_does_not_raise_the_relative_threshold(traced):
    """It is the smaller of 1 and the variable's largest scale that it goes by."""
    _, graph = traced("resnet18", 64)
    norms, penalty = build_penalty(graph)
    with torch.no_grad():
        norms.gammas["layer3.1.bn1"].fill_(0.02)[0] = 5.0
    assert penalty.counts(relative=True) == penalty.counts()
    assert penalty.counts()["layer3.1.conv1"] == 256


@pytest.mark.parametrize(
    ("name", "dead", "least", "left"),
    [("resnet18", 9, 1.0, 0.003), ("mobilenet_v2", 10, 0.85, 0.06)],
)
def test_the_penalty_alone_kills_in_the_order_of_the_pressure(traced, name, dead, least, left):
    """docs/algorithms/morphnet.md, P12.

    As far as 6,000 steps at a rate of 0.2 with momentum go, in 1,000 without.

    Members of a class share its pressure, so a variable dies in the order of pressure over
    members. A step that would carry a scale past 0 ends there, which flicker would hide.
    """
    _, graph = traced(name)
    norms, penalty = build_penalty(graph, dtype=torch.float32)
    first, members = penalty.pressure(), penalty.members()
    gammas = [gamma.data for gamma in norms.gammas.values()]
    died = {}
    for step in range(1_000):
        _, gradient = penalty.value_and_gradient()
        parts = gradient.split([gamma.numel() for gamma in gammas])
        for gamma, part in zip(gammas, parts, strict=True):
            gamma.sub_(part, alpha=6_000 * 0.2 / (1 - 0.9) / 1_000).clamp_(min=0)
        for variable, count in penalty.counts().items():
            if count == 0:
                died.setdefault(variable, step)
    ease = [members[variable] / first[variable] for variable in died]
    assert spearman(list(died.values()), ease) >= least - 1e-9
    assert len(died) == dead  # the neighbours of the dead are no longer pushed
    assert float(penalty.value_and_gradient()[0]) < left


def spearman(first, second):
    """Correlation of the ranks; equal values share the mean of theirs."""

    def ranks(values):
        return [
            sum(v < value for v in values) + (sum(v == value for v in values) - 1) / 2
            for value in values
        ]

    return statistics.correlation(ranks(first), ranks(second))


# ---------------------------------------------------------------------------- how it is used


def test_the_gradient_is_added_to_what_is_there(traced):
    _, graph = traced("resnet18", 64)
    norms, penalty = build_penalty(graph)
    scatter(norms, 8)
    value, once = gradients(norms, penalty)
    for gamma in norms.gammas.values():
        gamma.grad = torch.full_like(gamma, 0.25)
    assert float(penalty.add_gradient(3.0)) == value  # the strength is no part of R/F0
    for name, gamma in norms.gammas.items():
        torch.testing.assert_close(gamma.grad, 0.25 + 3 * once[name], rtol=1e-12, atol=0)
        gamma.grad = None
    penalty.add_gradient(3.0)
    for name, gamma in norms.gammas.items():
        torch.testing.assert_close(gamma.grad, 3 * once[name], rtol=1e-12, atol=0)
    assert all(beta.grad is None for beta in norms.betas.values())


def test_autocast_does_not_touch_the_penalty(traced):
    """docs/algorithms/morphnet.md, D22.

    Steps of a scale are smaller than the spacing of bfloat16 near 1.
    """
    _, graph = traced("resnet18", 64)
    norms, penalty = build_penalty(graph, dtype=torch.float32)
    scatter(norms, 9)
    value, found = gradients(norms, penalty)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        again, rest = gradients(norms, penalty)
    assert again == value
    assert all(torch.equal(item, rest[name]) for name, item in found.items())


def test_float32_loses_no_more_than_rounding(traced):
    _, graph = traced("mobilenet_v2")
    exact, wide = build_penalty(graph)
    norms, narrow = build_penalty(graph, dtype=torch.float32)
    scatter(exact, 10)
    scatter(norms, 10)
    assert narrow.counts() == wide.counts()
    value, found = gradients(exact, wide)
    rounded, rest = gradients(norms, narrow)
    assert rounded == pytest.approx(value, rel=1e-6)
    for name, item in found.items():
        torch.testing.assert_close(rest[name].double(), item, rtol=1e-5, atol=0)


class Counted(TorchDispatchMode):
    """How many tensor operations are dispatched."""

    def __init__(self):
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.operations += 1
        return func(*args, **(kwargs or {}))


def operations(graph):
    norms, penalty = build_penalty(graph, dtype=torch.float32)
    gradients(norms, penalty)
    with Counted() as counted:
        penalty.add_gradient(1.0)
    return counted.operations


def test_the_penalty_takes_few_operations_however_deep_the_network(traced):
    """Section 4: on an accelerator its cost is the number of kernels that it launches."""
    counts = {
        name: operations(traced(name)[1]) for name in ("resnet18", "resnet50", "mobilenet_v2")
    }
    assert counts["resnet18"] == counts["resnet50"] == counts["mobilenet_v2"] <= 40


@pytest.mark.parametrize(
    ("name", "variables"),
    [
        ("vgg11", "features.0, features.3, features.6 and 7 more"),
        ("convnext_tiny", "features.0.0, features.1.0.block.3, features.1.1.block.3 and 19 more"),
    ],
)
def test_a_network_without_batchnorm_is_refused(traced, name, variables):
    _, graph = traced(name)
    with pytest.raises(
        InputError,
        match=(
            r"^algorithm is dmcp, but it searches by BatchNorm scales and no free width variable "
            rf"of the network has them on all of its channels \({variables}\); use a network with "
            r"BatchNorm, or algorithm=uniform$"
        ),
    ):
        check_searchable(graph, algorithm="dmcp")
    with pytest.raises(InputError, match="it searches by BatchNorm scales"):
        Penalty(nn.Module(), graph, threshold=0.01, tie="max", depthwise="double")


def test_a_network_whose_only_batchnorm_is_the_images_is_refused():
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 8, 1), nn.Flatten(), nn.Linear(8, 4))
    with pytest.raises(InputError, match="it searches by BatchNorm scales"):
        check_searchable(trace(model, 1), algorithm="morphnet")


def test_batchnorms_without_scales_are_left_alone():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8, affine=False),
        nn.Conv2d(8, 6, 3),
        nn.BatchNorm2d(6),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 4),
    )
    penalty = Penalty(model, trace(model, 8), threshold=0.01, tie="max", depthwise="double")
    assert penalty.variables == ["0", "2"]
    assert penalty.searchable == ["2"]
    assert penalty.members() == {"2": 1}
    with torch.no_grad():
        model[3].weight.zero_()
    assert penalty.counts() == {"0": 8, "2": 0}  # no scales: all of them, always


def test_the_penalty_of_a_real_network_is_that_of_its_norms():
    """Everything above stands on the norms alone; here are a network's own parameters."""
    model = TorchvisionNetwork("resnet18").build(depth=1, classes=10)
    graph = trace(model, 64)
    penalty = Penalty(model, graph, threshold=0.01, tie="max", depthwise="double")
    norms, alone = build_penalty(graph, dtype=torch.float32)
    value, found = gradients(norms, alone)
    assert float(penalty.add_gradient(1.0)) == value
    for name, parameter in model.named_parameters():
        owner = name.rpartition(".")[0]
        if name.endswith(".weight") and owner in found:
            assert torch.equal(parameter.grad, found[owner])
        else:
            assert parameter.grad is None
