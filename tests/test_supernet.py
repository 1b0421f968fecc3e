import functools
import random

import pytest
import torch
from small import RUNTIME, ListedBatches, make_setting
from torch import nn
from torch.nn import functional
from torchvision.ops.misc import Permute

from widthopt.errors import InputError
from widthopt.networks import TorchvisionNetwork
from widthopt.networks.resize import Blueprint, resize
from widthopt.networks.supernet import Supernet, check_maskable, enlarge_channels
from widthopt.tracing import trace
from widthopt.training.evaluation import recalibrate


# Width multiplier and enlargement of each network; narrow networks are faster. ShuffleNet's forward
# code contains channel counts, and its oracle needs torchvision's own network.
NARROW = (0.25, 1.5)
LEADING = {  # a subnet has the leading entries of every tensor
    "resnet18": NARROW,
    "mobilenet_v2": NARROW,
    "resnext50_32x4d": NARROW,
    "efficientnet_b0": NARROW,
    "regnet_y_400mf": NARROW,
    "mobilenet_v3_small": NARROW,
}
JOINED = {  # a subnet has the leading entries of every part of a concatenated tensor
    "densenet121": NARROW,
    "googlenet": NARROW,
    "shufflenet_v2_x0_5": (1.0, 1.0),
}
ALL = LEADING | JOINED


class FactoryNetwork:
    """A network of these tests, built by a factory."""

    name = "factory"
    rules = {}  # noqa: RUF012 (never written to)

    def __init__(self, factory):
        self.build = lambda *, depth, classes: factory(classes) if depth == 1 else None

    def stages(self, _model):
        return []


class Small(nn.Module):
    """A stem, an identity block with a depthwise layer, and a head of another width."""

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
        self.head = nn.Conv2d(4, 5, 1)
        self.bn4 = nn.BatchNorm2d(5)
        self.classifier = nn.Linear(5, classes)

    def forward(self, x):
        x = functional.relu(self.bn0(self.stem(x)))
        inner = functional.relu6(self.bn1(self.expand(x)))
        x = x + self.bn3(self.back(functional.relu6(self.bn2(self.deep(inner)))))
        return self.classifier(functional.relu(self.bn4(self.head(x))).mean((2, 3)))


@functools.cache
def blueprint(network, width=1.0, resolution=64):
    return Blueprint(make_setting(network, classes=5, width=width, resolution=resolution))


def randomise_norms(supernet, dtype=torch.float64):
    """Give every BatchNorm random scales and shifts; return the supernet."""
    supernet.model.to(dtype)
    draws = torch.Generator().manual_seed(1)
    for module in supernet.model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data.uniform_(0.5, 1.5, generator=draws)
            module.bias.data.uniform_(-0.5, 0.5, generator=draws)
    return supernet


@functools.cache
def supernet_of(name, dtype=torch.float64):
    """Return a cached supernet; a test that changes its weights uses `new_supernet`."""
    return new_supernet(name, dtype)


def new_supernet(name, dtype=torch.float64):
    width, enlarge = ALL[name]
    plan = blueprint(name, width)
    return plan, randomise_norms(Supernet(plan, enlarge=enlarge, seed=0), dtype)


def small(enlarge=1.5, **options):
    plan = blueprint(SMALL, resolution=8)
    return randomise_norms(Supernet(plan, enlarge=enlarge, seed=0, **options))


SMALL = FactoryNetwork(Small)


def images(count=4, side=64, seed=2, dtype=torch.float64):
    draws = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, side, side, generator=draws, dtype=dtype)


def counts(graph, choose):
    """Return counts with ``choose(classes)`` classes for every searchable variable."""
    searchable = set(graph.searchable)
    return {
        name: var.unit * choose(var.classes) if name in searchable else var.channels
        for name, var in graph.free.items()
    }


def draw_counts(graph, seed):
    """Return random counts."""
    draws = random.Random(seed)  # noqa: S311 (no secret)
    return counts(graph, lambda classes: draws.randint(1, classes))


RULES = {
    "one channel": lambda _: 1,
    "all but one": lambda classes: max(1, classes - 1),
    "odd counts": lambda classes: min(classes, (classes * 2 // 3) | 1),
}


def some_counts(graph, number):
    """Return the counts of all rules, and random ones up to ``number``."""
    corners = [counts(graph, rule) for rule in RULES.values()]
    return corners + [draw_counts(graph, seed) for seed in range(number - len(corners))]


def use_batch_statistics(model):
    """Normalise with the statistics of the batch, with dropout off; return the model."""
    model.eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.train()
    return model


def build_standalone(plan, supernet, channels):
    """Return a plain network at these counts with the leading entries of the supernet's weights."""
    model = plan.build(channels, seed=7).to(next(supernet.model.parameters()).dtype)
    weights = dict(supernet.model.named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            leading = tuple(slice(0, size) for size in parameter.shape)
            parameter.copy_(weights[name][leading])
    return model


def plain(name, supernet):
    """Return the supernet's network, or torchvision's if the forward code is rewritten."""
    if name not in JOINED or ALL[name][1] != 1:
        return supernet.model
    model = TorchvisionNetwork(name).build(depth=1, classes=5)
    model.to(next(supernet.model.parameters()).dtype)
    model.load_state_dict(supernet.model.state_dict(), strict=False)
    return model


@functools.cache
def graph_of(name):
    """Return the graph of the network that `plain` returns."""
    _, supernet = supernet_of(name)
    return trace(plain(name, supernet), 64) if supernet.graph.rewrites else supernet.graph


def active(name, supernet, channels):
    """Return masks of the entries of each parameter that a subnet has: those `resize` keeps.

    Every entry is numbered; the numbers that the resized network keeps are the active entries.
    """
    model = plain(name, supernet)
    before = {key: value.detach().clone() for key, value in model.named_parameters()}
    masks = {}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.arange(parameter.numel()).view_as(parameter))
        kept = resize(model, graph_of(name), channels, weights="sliced")
        for key, parameter in model.named_parameters():
            places = dict(kept.named_parameters())[key].flatten().long()
            mask = torch.zeros(parameter.numel(), dtype=torch.bool)
            masks[key] = mask.index_fill(0, places, value=True).view_as(parameter)
            parameter.copy_(before[key])
    return masks


def gradients(supernet):
    return {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
        for name, parameter in supernet.model.named_parameters()
    }


LABELS = torch.tensor([0, 3, 1, 4, 2, 2])


def run_subnet(supernet, channels, pixels, backend):
    """Return the logits of a subnet and the gradients of the supernet's parameters."""
    supernet.model.zero_grad(set_to_none=True)
    subnet = supernet.subnet(channels, backend=backend)
    logits = subnet(pixels)
    functional.cross_entropy(logits, LABELS[: len(pixels)]).backward()
    subnet.collect()
    return logits.detach(), gradients(supernet)


def assert_close(value, expected, tolerance, of=None):
    """Compare with a tolerance relative to the largest entry, or to ``of`` if that is larger."""
    value, expected = value.detach(), expected.detach()
    size = max(float(expected.abs().max()), float(of or 0), 1e-300)
    assert (value - expected).abs().max() <= tolerance * size


# ------------------------------------------------------------------------------- subnets


@pytest.mark.parametrize("name", ALL)
def test_the_full_width_is_the_plain_network(name):
    plan, supernet = supernet_of(name)
    model = plan.build(supernet.graph.channels, seed=1).double()
    parameters = dict(supernet.model.named_parameters())
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.copy_(parameters[key])
    with torch.no_grad():
        expected = use_batch_statistics(model)(images())
        assert expected.std(0).min() > 1e-4
        assert_close(supernet.full(images()), expected, 1e-12)
        for backend in ("slice", "mask"):
            subnet = supernet.subnet(supernet.graph.channels, backend=backend)
            assert_close(subnet(images()), expected, 1e-12)


@pytest.mark.parametrize(
    ("name", "number"), [(name, 20 if name in ("resnet18", "mobilenet_v2") else 4) for name in ALL]
)
def test_a_slice_computes_what_a_network_with_the_leading_weights_does(name, number):
    plan, supernet = supernet_of(name)
    spreads = []
    for channels in some_counts(supernet.graph, number):
        if name in LEADING:
            standalone = build_standalone(plan, supernet, channels)
        else:
            full = plain(name, supernet)
            standalone = resize(full, graph_of(name), channels, weights="sliced")
        with torch.no_grad():
            expected = use_batch_statistics(standalone)(images())
            logits = supernet.subnet(channels, backend="slice")(images())
        assert_close(logits, expected, 1e-9)
        spreads.append(expected.std(0).max())
    # A single channel may die at an activation; then the logits of all images are equal.
    assert sum(spread > 1e-5 for spread in spreads) >= number - 1


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
@pytest.mark.parametrize("rule", RULES)
def test_a_slice_is_a_recalibrated_network_in_evaluation_mode(name, rule):
    """Except for the variance, which the network divides by n - 1 instead of n."""
    plan, supernet = supernet_of(name)
    channels = counts(supernet.graph, RULES[rule])
    standalone = build_standalone(plan, supernet, channels)
    pixels = images(6)
    sizes = {}
    norms = [module for module in standalone.modules() if isinstance(module, nn.BatchNorm2d)]
    handles = [
        norm.register_forward_pre_hook(
            lambda module, inputs: sizes.update({module: inputs[0][:, 0].numel()})
        )
        for norm in norms
    ]
    batches = ListedBatches([(pixels, LABELS)])
    assert recalibrate(standalone, batches, runtime=RUNTIME) == 6
    for handle in handles:
        handle.remove()
    for norm in norms:
        norm.running_var *= (sizes[norm] - 1) / sizes[norm]
    standalone.eval()
    with torch.no_grad():
        assert_close(supernet.subnet(channels)(pixels), standalone(pixels), 1e-8)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("seed", [None, 0])
def test_a_mask_computes_and_learns_what_the_slice_does(name, seed):
    """Equal logits and gradients; the gradients of inactive entries are 0."""
    _, supernet = supernet_of(name)
    graph = supernet.graph
    channels = counts(graph, RULES["one channel"]) if seed is None else draw_counts(graph, seed)
    on = active(name, supernet, channels)
    sliced, slice_gradients = run_subnet(supernet, channels, images(), "slice")
    masked, mask_gradients = run_subnet(supernet, channels, images(), "mask")
    assert_close(masked, sliced, 1e-9)
    largest = max(float(gradient.abs().max()) for gradient in slice_gradients.values())
    assert largest > 0
    for key, gradient in slice_gradients.items():
        assert_close(mask_gradients[key], gradient, 1e-9, of=largest)
        assert not gradient[~on[key]].any(), key
        assert not mask_gradients[key][~on[key]].any(), key


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "efficientnet_b0"])
def test_a_mask_agrees_with_the_slice_in_single_precision(name):
    _, supernet = supernet_of(name, torch.float32)
    channels = draw_counts(supernet.graph, 0)
    pixels = images(6, dtype=torch.float32)
    sliced, slice_gradients = run_subnet(supernet, channels, pixels, "slice")
    masked, mask_gradients = run_subnet(supernet, channels, pixels, "mask")
    assert_close(masked, sliced, 1e-4)
    largest = max(float(gradient.abs().max()) for gradient in slice_gradients.values())
    for key, gradient in slice_gradients.items():
        assert_close(mask_gradients[key], gradient, 1e-4, of=largest)


@pytest.mark.parametrize("name", ["resnet18", "densenet121"])
def test_a_slice_has_the_gradients_of_a_standalone_network(name):
    """At their places in the gradients of the supernet."""
    _, supernet = supernet_of(name)
    channels = draw_counts(supernet.graph, 3)
    on = active(name, supernet, channels)
    resized = resize(supernet.model, supernet.graph, channels, weights="sliced")
    standalone = use_batch_statistics(resized)
    functional.cross_entropy(standalone(images()), LABELS[:4]).backward()
    _, slice_gradients = run_subnet(supernet, channels, images(), "slice")
    for key, parameter in standalone.named_parameters():
        assert_close(slice_gradients[key][on[key]], parameter.grad.flatten(), 1e-9, of=1)


@pytest.mark.parametrize("backend", ["slice", "mask"])
def test_gradients_of_subnets_add_up(backend):
    _, supernet = supernet_of("densenet121")
    several = [draw_counts(supernet.graph, seed) for seed in (0, 1)]
    apart = [run_subnet(supernet, channels, images(), backend)[1] for channels in several]
    supernet.model.zero_grad(set_to_none=True)
    for channels in several:
        subnet = supernet.subnet(channels, backend=backend)
        functional.cross_entropy(subnet(images()), LABELS[:4]).backward()
        subnet.collect()
    for key, gradient in gradients(supernet).items():
        assert_close(gradient, apart[0][key] + apart[1][key], 1e-12, of=1)


@pytest.mark.parametrize("name", LEADING)
def test_active_entries_are_the_leading_ones(name):
    """Without concatenated tensors, `active` follows from the shapes alone."""
    plan, supernet = supernet_of(name)
    channels = draw_counts(supernet.graph, 4)
    on = active(name, supernet, channels)
    for key, parameter in plan.build(channels, seed=0).named_parameters():
        leading = tuple(slice(0, size) for size in parameter.shape)
        assert on[key][leading].all(), key
        assert on[key].sum() == parameter.numel(), key


@pytest.mark.parametrize("name", ALL)
def test_inactive_weights_do_not_matter(name):
    """A slice ignores them even if they are NaN; a mask ignores any finite value."""
    _, supernet = new_supernet(name)
    channels = draw_counts(supernet.graph, 5)
    on = active(name, supernet, channels)
    draws = torch.Generator().manual_seed(3)
    with torch.no_grad():
        sliced, masked = (supernet.subnet(channels, backend=b)(images()) for b in ("slice", "mask"))
        for key, parameter in supernet.model.named_parameters():
            tail = parameter[~on[key]]
            order = torch.randperm(len(tail), generator=draws)
            parameter[~on[key]] = -3 * tail[order] + 0.1
        assert any((~mask).any() for mask in on.values())
        again = supernet.subnet(channels, backend="mask")(images())
        assert_close(again, masked, 1e-12)
        for key, parameter in supernet.model.named_parameters():
            parameter[~on[key]] = torch.nan
        assert torch.equal(supernet.subnet(channels, backend="slice")(images()), sliced)
        for key, parameter in supernet.model.named_parameters():
            parameter[on[key]] *= 1.1
        assert not torch.equal(supernet.subnet(channels, backend="slice")(images()), sliced)


def test_a_layer_norm_of_a_slice_is_that_of_a_standalone_network():
    network = FactoryNetwork(lambda classes: Mixing(classes, "norm"))
    plan = blueprint(network, resolution=8)
    supernet = randomise_norms(Supernet(plan, enlarge=1.5, seed=0))
    channels = draw_counts(supernet.graph, 0)
    assert channels != supernet.graph.channels
    standalone = use_batch_statistics(build_standalone(plan, supernet, channels))
    with torch.no_grad():
        logits = supernet.subnet(channels)(images(side=8))
        assert_close(logits, standalone(images(side=8)), 1e-12)


def test_the_memory_format_changes_no_more_than_rounding():
    _, supernet = new_supernet("mobilenet_v2")
    channels = draw_counts(supernet.graph, 6)
    expected, expected_gradients = run_subnet(supernet, channels, images(), "slice")
    supernet.model.to(memory_format=torch.channels_last)
    pixels = images().contiguous(memory_format=torch.channels_last)
    for backend in ("slice", "mask"):
        logits, last_gradients = run_subnet(supernet, channels, pixels, backend)
        assert_close(logits, expected, 1e-9)
        for key, gradient in expected_gradients.items():
            assert_close(last_gradients[key], gradient, 1e-9, of=1)


@pytest.mark.parametrize("name", ["mobilenet_v2", "resnet18", "shufflenet_v2_x0_5"])
def test_convolutions_that_mix_memory_formats_compute_the_same(name):
    _, supernet = new_supernet(name)
    channels = draw_counts(supernet.graph, 6)
    formats = []
    for module in supernet.model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(
                lambda _module, inputs, _output: formats.append(
                    inputs[0].is_contiguous(memory_format=torch.channels_last)
                )
            )
    for backend in ("slice", "mask"):
        supernet.mixed = False
        expected, expected_gradients = run_subnet(supernet, channels, images(), backend)
        formats.clear()
        supernet.mixed = True
        logits, mixed_gradients = run_subnet(supernet, channels, images(), backend)
        assert any(formats)
        assert_close(logits, expected, 1e-9)
        for key, gradient in expected_gradients.items():
            assert_close(mixed_gradients[key], gradient, 1e-9, of=1)


# ----------------------------------------------------------------------------- the mixture


def classes_of(graph):
    return sum(graph.free[name].classes for name in graph.searchable)


@pytest.mark.parametrize("name", ALL)
def test_a_mixture_of_zeros_and_ones_is_the_mask_and_of_ones_the_full_network(name):
    _, supernet = supernet_of(name)
    graph = supernet.graph
    channels = draw_counts(graph, 7)
    factors = torch.cat(
        [
            torch.tensor(
                [float(number * var.unit < channels[key]) for number in range(var.classes)]
            )
            for key, var in graph.free.items()
            if key in graph.searchable
        ]
    ).double()
    with torch.no_grad():
        masked = supernet.subnet(channels, backend="mask")(images())
        sliced = supernet.subnet(channels, backend="slice")(images())
        mixed = supernet.mixture(images(), factors)
        assert_close(mixed, masked, 1e-12)
        assert_close(mixed, sliced, 1e-9)
        full = supernet.full(images())
        assert_close(supernet.mixture(images(), torch.ones_like(factors)), full, 1e-12)


@pytest.mark.parametrize("name", ["mobilenet_v2", "resnet18", "densenet121", "shufflenet_v2_x0_5"])
def test_a_mixture_multiplies_the_output_of_every_batch_norm(name):
    """docs/algorithms/dmcp.md, T13: hooks multiply the outputs in the plain network."""
    _, supernet = supernet_of(name)
    graph = supernet.graph
    draws = torch.Generator().manual_seed(4)
    factors = torch.rand(classes_of(graph), generator=draws, dtype=torch.float64) * 1.2
    factors.requires_grad_()
    logits = supernet.mixture(images(), factors)
    loss = functional.cross_entropy(logits, LABELS[:4])
    (derivative,) = torch.autograd.grad(loss, factors)

    parts = dict(
        zip(
            graph.searchable,
            factors.split([graph.free[key].classes for key in graph.searchable]),
            strict=True,
        )
    )

    def multiply(norm):
        spread = torch.cat(
            [
                parts[graph.variables[span.variable].name][span.start : span.start + span.classes]
                .repeat_interleave(span.repeat)
                for span in norm.axis
            ]
        )  # fmt: skip
        return lambda _module, _inputs, output: output * spread[:, None, None]

    handles = [
        supernet.model.get_submodule(norm.name).register_forward_hook(multiply(norm))
        for norm in graph.norms
    ]
    expected = supernet.full(images())
    for handle in handles:
        handle.remove()
    loss = functional.cross_entropy(expected, LABELS[:4])
    (expected_derivative,) = torch.autograd.grad(loss, factors, retain_graph=True)
    assert_close(logits, expected, 1e-9)
    assert_close(derivative, expected_derivative, 1e-9)
    relative = expected_derivative.abs() / expected_derivative.abs().max()
    assert (relative > 1e-12).double().mean() > 0.5


@pytest.mark.parametrize("site", ["norm", "activation"])
@pytest.mark.parametrize("inplace", [False, True])
def test_a_mixture_applies_before_or_after_relu6(site, inplace):
    """docs/algorithms/dmcp.md, T13: many values are clipped.

    A ReLU6 that does not read a BatchNorm is unchanged.
    """

    class Clipped(nn.Module):
        def __init__(self, classes):
            super().__init__()
            self.stem = nn.Conv2d(3, 4, 3, bias=False)
            self.bn0 = nn.BatchNorm2d(4)
            self.act0 = nn.ReLU6(inplace)
            self.deep = nn.Conv2d(4, 4, 3, groups=4, bias=False)
            self.bn1 = nn.BatchNorm2d(4)
            self.act1 = nn.ReLU6(inplace)
            self.wide = nn.Conv2d(4, 5, 1, bias=False)
            self.bn2 = nn.BatchNorm2d(5)
            self.act2 = nn.ReLU6()
            self.head = nn.Linear(5, classes)

        def forward(self, x):
            x = self.act0(self.bn0(self.stem(x)))
            x = self.act1(self.bn1(self.deep(x)))
            return self.head(self.act2(2 * self.bn2(self.wide(x))).mean((2, 3)))

    supernet = Supernet(blueprint(FactoryNetwork(Clipped), resolution=8), enlarge=1.5, seed=0)
    randomise_norms(supernet)
    model = supernet.model
    for norm in (model.bn0, model.bn1, model.bn2):
        norm.weight.data.mul_(5)
    draws = torch.Generator().manual_seed(4)
    factors = torch.rand(6 + 8, generator=draws, dtype=torch.float64).requires_grad_()
    assert classes_of(supernet.graph) == 14
    stem, wide = (part[:, None, None] for part in factors.split([6, 8]))
    clipped = 0

    def relu6(z, s):
        nonlocal clipped
        clipped += int((z > 6).sum())
        return s * functional.relu6(z) if site == "activation" else functional.relu6(s * z)

    pixels = images(6, side=8)
    x = relu6(model.bn0(model.stem(pixels)), stem)
    x = relu6(model.bn1(model.deep(x)), stem)
    x = functional.relu6(2 * wide * model.bn2(model.wide(x)))
    expected = model.head(x.mean((2, 3)))
    assert clipped > 100
    logits = supernet.mixture(pixels, factors, site=site)
    assert_close(logits, expected, 1e-9)
    derivative, expected_derivative = (
        torch.autograd.grad(functional.cross_entropy(output, LABELS), factors)[0]
        for output in (logits, expected)
    )
    assert_close(derivative, expected_derivative, 1e-9)
    with torch.no_grad():
        plain = supernet.mixture(pixels, torch.ones(14, dtype=torch.float64))
        assert_close(plain, supernet.full(pixels), 1e-12)


def test_the_gradient_of_a_mixture_is_that_of_central_differences():
    """docs/algorithms/dmcp.md, T14: a network with an identity block and a depthwise layer."""
    supernet = small()
    pixels = images(6, side=8)
    draws = torch.Generator().manual_seed(5)
    factors = 0.3 + torch.rand(classes_of(supernet.graph), generator=draws, dtype=torch.float64)

    def loss(values):
        return functional.cross_entropy(supernet.mixture(pixels, values), LABELS)

    leaf = factors.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(leaf), leaf)
    assert len(gradient) == 6 + 9 + 8
    for place in range(len(factors)):
        change = torch.zeros_like(factors)
        change[place] = 1e-6
        slope = (loss(factors + change) - loss(factors - change)) / 2e-6
        assert float(gradient[place]) == pytest.approx(float(slope), rel=1e-5, abs=1e-8)


def test_a_batch_norm_of_the_image_is_not_multiplied():
    """Its channels belong to no variable, so they have no factor."""

    def build(classes):
        return nn.Sequential(nn.BatchNorm2d(3), Mixing(classes, "relu"))

    supernet = Supernet(blueprint(FactoryNetwork(build), resolution=8), enlarge=1.5, seed=0)
    randomise_norms(supernet)
    factors = torch.linspace(0.2, 1.3, classes_of(supernet.graph), dtype=torch.float64)
    assert len(factors) == 12
    with torch.no_grad():
        logits = supernet.mixture(images(side=8), factors)
        norm = supernet.model.get_submodule("1.bn")
        norm.register_forward_hook(lambda *arguments: arguments[2] * factors[:, None, None])
        assert_close(logits, supernet.full(images(side=8)), 1e-12)


def test_a_mixture_computes_gradients_of_its_factors_only():
    """docs/algorithms/dmcp.md, T15: no weight has a gradient; the state dict is unchanged."""
    _, supernet = supernet_of("shufflenet_v2_x0_5")
    supernet.model.zero_grad(set_to_none=True)
    before = {key: value.clone() for key, value in supernet.model.state_dict().items()}
    parameters = dict(supernet.model.named_parameters())
    factors = torch.full((classes_of(supernet.graph),), 0.7, requires_grad=True)
    supernet.mixture(images(), factors).square().sum().backward()
    assert factors.grad.any()
    assert all(parameter.grad is None for parameter in supernet.model.parameters())
    after = supernet.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    now = dict(supernet.model.named_parameters())
    assert all(now[key] is parameter for key, parameter in parameters.items())
    assert all(parameter.requires_grad for parameter in parameters.values())


# ------------------------------------------------------------------- state after a pass


def state(model):
    """Return everything that the forward pass of a network depends on."""
    values = {}
    for name, module in model.named_modules():
        for key in ("groups", "normalized_shape", "in_channels", "out_channels", "num_features"):
            if hasattr(module, key):
                values[name, key] = getattr(module, key)
        for key, tensor in {**module._parameters, **module._buffers}.items():  # noqa: SLF001
            values[name, key] = (id(tensor), None if tensor is None else tensor.clone())
    return values


def same_state(left, right):
    if left.keys() != right.keys():
        return False
    for key, value in left.items():
        expected = right[key]
        if isinstance(value, tuple) and isinstance(value[1], torch.Tensor):
            if value[0] != expected[0] or not torch.equal(value[1], expected[1]):
                return False
        elif value != expected:
            return False
    return True


class StopError(Exception):
    """Raised by a test during a pass."""


@pytest.mark.parametrize("backend", ["slice", "mask"])
@pytest.mark.parametrize("name", ["mobilenet_v2", "resnext50_32x4d", "shufflenet_v2_x0_5"])
def test_a_pass_leaves_the_network_as_it_was_even_if_it_fails(name, backend):
    _, supernet = supernet_of(name)
    channels = counts(supernet.graph, RULES["odd counts"])
    before = state(supernet.model)
    with torch.no_grad():
        full = supernet.full(images())
    run_subnet(supernet, channels, images(), backend)
    assert same_state(state(supernet.model), before)

    def fail(*_):
        raise StopError

    norms = [m for m in supernet.model.modules() if isinstance(m, nn.BatchNorm2d)]
    handle = norms[-1].register_forward_hook(fail)
    factors = torch.ones(classes_of(supernet.graph))
    for run in (
        supernet.subnet(channels, backend=backend),
        lambda pixels: supernet.mixture(pixels, factors),
    ):
        with pytest.raises(StopError):
            run(images())
    handle.remove()
    assert same_state(state(supernet.model), before)
    with torch.no_grad():
        assert torch.equal(supernet.full(images()), full)


@pytest.mark.parametrize("name", ["resnet18", "shufflenet_v2_x0_5"])
def test_no_running_statistics_are_kept(name):
    _, supernet = supernet_of(name)
    supernet.model.train()
    first = supernet.full(images()).detach()
    for backend in ("slice", "mask"):
        run_subnet(supernet, draw_counts(supernet.graph, 0), images(seed=8), backend)
    supernet.mixture(10 * images(seed=9), torch.ones(classes_of(supernet.graph)))
    kept = {key for key in supernet.model.state_dict() if "running" in key or "batches" in key}
    assert kept == set()
    buffers = {key for key, _ in supernet.model.named_buffers()}
    assert all(key.startswith("channel_selection_") for key in buffers)
    assert torch.equal(supernet.full(images()), first)


@pytest.mark.parametrize("name", ["mobilenet_v2", "efficientnet_b0", "densenet121"])
def test_a_pass_draws_no_random_numbers_in_training_mode(name):
    """Dropout and stochastic depth would make the two backends differ."""
    _, supernet = supernet_of(name)
    channels = draw_counts(supernet.graph, 1)
    factors = torch.ones(classes_of(supernet.graph))
    before = torch.get_rng_state()
    logits = []
    for run in (
        supernet.full,
        supernet.subnet(channels, backend="slice"),
        supernet.subnet(channels, backend="mask"),
        lambda pixels: supernet.mixture(pixels, factors),
    ):
        supernet.model.train()
        with torch.no_grad():
            logits.append(run(images()))
    assert torch.equal(torch.get_rng_state(), before)
    assert_close(logits[1], logits[2], 1e-9)
    assert_close(logits[0], logits[3], 1e-9)


# --------------------------------------------------------------------------- enlargement


def test_a_supernet_is_one_and_a_half_times_as_wide(traced):
    _, graph = traced("resnet18")
    wide = enlarge_channels(graph, 1.5)
    assert sorted(set(wide.values())) == [96, 192, 384, 768]
    assert wide == {name: count * 3 // 2 for name, count in graph.channels.items()}


def test_grouped_channels_are_enlarged_by_whole_groups(traced):
    """ResNeXt-50 has 32 groups of 4, 8, 16 and 32 channels: a group is a class, 48 of them."""
    _, graph = traced("resnext50_32x4d")
    wide = enlarge_channels(graph, 1.5)
    grouped = {name: var for name, var in graph.free.items() if var.unit > 1}
    assert sorted({var.unit for var in grouped.values()}) == [4, 8, 16, 32]
    assert all(wide[name] == 48 * var.unit for name, var in grouped.items())


@pytest.mark.parametrize("name", ["efficientnet_b0", "mobilenet_v3_small"])
def test_a_variable_without_batch_norm_is_not_enlarged_and_stays(name):
    plan, supernet = supernet_of(name)
    squeezes = {
        key
        for key, module in supernet.model.named_modules()
        if key.endswith("fc1") and isinstance(module, nn.Conv2d)
    }
    assert len(squeezes) == {"efficientnet_b0": 16, "mobilenet_v3_small": 9}[name]
    assert squeezes == set(plan.graph.free) - set(plan.graph.searchable) - {"classifier.0"}
    widths = {}
    handles = [
        supernet.model.get_submodule(key).register_forward_hook(
            lambda _module, _inputs, output, key=key: widths.update({key: output.shape[1]})
        )
        for key in squeezes
    ]
    channels = counts(supernet.graph, RULES["one channel"])
    for run in (supernet.full, *(supernet.subnet(channels, backend=b) for b in ("slice", "mask"))):
        run(images())
        assert widths == {key: plan.graph.channels[key] for key in squeezes}
    for handle in handles:
        handle.remove()
    assert all(
        supernet.graph.channels[key] == round(1.5 * plan.graph.channels[key])
        for key in plan.graph.searchable
    )


# AutoSlim's list of 305 million MACs: stem, R0, (middle, output) x 16, last.
AUTOSLIM_305M = (8, 8, 96, 16, 96, 16, 96, 24, 144, 24, 144, 24, 144, 56, 288, 56, 288, 56, 288,
                 56, 288, 96, 432, 96, 432, 96, 864, 240, 1440, 240, 960, 240, 1440, 480,
                 1920)  # fmt: skip


@pytest.mark.parametrize("backend", ["slice", "mask"])
def test_equal_counts_do_not_add_a_shortcut(backend):
    """Block 0 of AutoSlim's MobileNetV2 reads and writes 8 channels, but has no shortcut."""
    plan = blueprint("mobilenet_v2", resolution=32)
    supernet = Supernet(plan, enlarge=1.5, seed=0)
    names = ["features.0.0", "features.1.conv.1"]
    for block in range(2, 18):
        names += [f"features.{block}.conv.0.0", f"features.{block}.conv.2"]
    names.append("features.18.0")
    channels = {}
    for name, count in zip(names, AUTOSLIM_305M, strict=True):
        (variable,) = (k for k, var in supernet.graph.free.items() if name in var.writers)
        assert channels.setdefault(variable, count) == count
    assert len(channels) == 25
    tensors = {}
    for name in ("features.0", "features.1", "features.1.conv", "features.3.conv", "features.3"):
        supernet.model.get_submodule(name).register_forward_hook(
            lambda _module, inputs, output, name=name: tensors.update({name: (inputs[0], output)})
        )
    with torch.no_grad():
        supernet.subnet(channels, backend=backend)(images(2, side=32, dtype=torch.float32))
    if backend == "slice":
        assert [tensor.shape[1] for tensor in tensors["features.1"]] == [8, 8]
    assert torch.equal(tensors["features.1"][1], tensors["features.1.conv"][1])
    block_input, output = tensors["features.3"]
    assert torch.equal(output, block_input + tensors["features.3.conv"][1])
    assert block_input.any()


def test_the_weights_depend_on_the_seed():
    plan = blueprint(SMALL, resolution=8)
    first, equal, different = (Supernet(plan, enlarge=1.5, seed=seed).model for seed in (0, 0, 1))
    assert torch.equal(first.stem.weight, equal.stem.weight)
    assert not torch.equal(first.stem.weight, different.stem.weight)


def test_multipliers_refer_to_the_network_that_is_not_enlarged():
    supernet = small()
    assert supernet.base.channels == {"stem": 4, "expand": 6, "head": 5}
    assert supernet.graph.channels == {"stem": 6, "expand": 9, "head": 8}


def test_a_subnet_runs_with_the_supernets_backend_by_default():
    """A mask convolves with all weights of the stem, a slice with those of 2 channels."""
    channels = {"stem": 2, "expand": 3, "head": 2}
    for default in ("slice", "mask"):
        supernet = small(backend=default)
        widths = []
        supernet.model.stem.register_forward_hook(
            lambda _module, _inputs, output, widths=widths: widths.append(output.shape[1])
        )
        for backend in (None, "slice", "mask"):
            supernet.subnet(channels, backend=backend)(images(side=8))
        assert widths == [2 if default == "slice" else 6, 2, 6]


# -------------------------------------------------- networks that a mask does not narrow


class Mixing(nn.Module):
    """A stem whose channels are not 0 after a BatchNorm that gives 0, or depend on each other."""

    def __init__(self, classes, mixing):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.mixing = mixing
        if mixing == "norm":
            self.mix = nn.Sequential(Permute([0, 2, 3, 1]), nn.LayerNorm(8), Permute([0, 3, 1, 2]))
        self.head = nn.Linear(8, classes)

    def forward(self, x):
        x = self.bn(self.stem(x))
        if self.mixing == "constant":
            x = x + 1.0
        elif self.mixing == "little":  # the logits differ by some per cent
            x = functional.relu(x) + 0.05
        elif self.mixing == "sigmoid":
            x = torch.sigmoid(x)
        elif self.mixing == "norm":
            x = self.mix(functional.relu(x))
        elif self.mixing == "relu":
            x = functional.relu(x)
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize("mixing", ["constant", "little", "sigmoid", "norm"])
def test_a_network_that_a_mask_does_not_narrow_is_refused(mixing):
    plan = blueprint(FactoryNetwork(lambda classes: Mixing(classes, mixing)), resolution=8)
    supernet = Supernet(plan, enlarge=1.5, seed=0)
    with pytest.raises(
        InputError,
        match=r"^network gives different logits when BatchNorm switches channels off \(relative "
        r"difference [0-9.e+-]+\), but the search switches channels off this way; let channels "
        r"pass a BatchNorm and an activation that maps 0 to 0 before they are mixed$",
    ):
        check_maskable(supernet, images(side=8, dtype=torch.float32), {"stem": 6})


def test_a_network_that_is_not_finite_is_refused():
    plan = blueprint(SMALL, resolution=8)
    supernet = Supernet(plan, enlarge=1.5, seed=0)
    supernet.model.classifier.bias.data[0] = torch.nan
    with pytest.raises(InputError, match=r"relative difference nan\)"):
        check_maskable(
            supernet, images(side=8, dtype=torch.float32), {"stem": 3, "expand": 4, "head": 4}
        )


@pytest.mark.parametrize("name", ALL)
def test_torchvisions_networks_are_not_refused(name):
    _, supernet = supernet_of(name, torch.float32)
    channels = counts(supernet.graph, lambda classes: max(1, classes // 2))
    supernet.model.zero_grad(set_to_none=True)
    before = torch.get_rng_state()
    check_maskable(supernet, images(dtype=torch.float32), channels)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(parameter.grad is None for parameter in supernet.model.parameters())


def test_a_network_whose_activation_maps_0_to_0_is_not_refused():
    plan = blueprint(FactoryNetwork(lambda classes: Mixing(classes, "relu")), resolution=8)
    supernet = Supernet(plan, enlarge=1.5, seed=0)
    check_maskable(supernet, images(side=8, dtype=torch.float32), {"stem": 6})
