import functools
import random

import pytest
import torch
from torch import nn
from torch.nn import functional
from torchvision.ops.misc import Permute

from widthopt.errors import InputError
from widthopt.networks import TorchvisionNetwork
from widthopt.networks.resize import Blueprint, resize
from widthopt.networks.supernet import Supernet, check_maskable, enlarge_channels
from widthopt.setting import Runtime, Setting
from widthopt.tracing import trace
from widthopt.training.evaluation import recalibrate


# Width multiplier and enlargement of each: as narrow as is quick. The forward code of ShuffleNet
# has channel counts written into it, and its oracle needs it as torchvision wrote it.
NARROW = (0.25, 1.5)
LEADING = {  # a subnet has the first entries of every tensor
    "resnet18": NARROW,
    "mobilenet_v2": NARROW,
    "resnext50_32x4d": NARROW,
    "efficientnet_b0": NARROW,
    "regnet_y_400mf": NARROW,
    "mobilenet_v3_small": NARROW,
}
JOINED = {  # it has the first entries of every part of a joined tensor
    "densenet121": NARROW,
    "googlenet": NARROW,
    "shufflenet_v2_x0_5": (1.0, 1.0),
}
ALL = LEADING | JOINED
RUNTIME = Runtime(
    device="cpu",
    workers=0,
    precision="float32",
    memory_format="contiguous",
    backend="auto",
    progress=False,
)


class Home:
    """A network of these tests, in the place of one of torchvision's."""

    name = "home"
    rules = {}  # noqa: RUF012 (nobody writes to it)

    def __init__(self, factory):
        self.build = lambda *, depth, classes: factory(classes) if depth == 1 else None

    def stages(self, _model):
        return []


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
    if isinstance(network, str):
        network = TorchvisionNetwork(network)
    return Blueprint(
        Setting(
            network=network,
            classes=5,
            width=width,
            depth=1,
            resolution=resolution,
            fraction=1.0,
        )
    )


def varied(supernet, dtype=torch.float64):
    """The supernet with BatchNorms whose scale and shift are no two alike."""
    supernet.model.to(dtype)
    draws = torch.Generator().manual_seed(1)
    for module in supernet.model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data.uniform_(0.5, 1.5, generator=draws)
            module.bias.data.uniform_(-0.5, 0.5, generator=draws)
    return supernet


@functools.cache
def supernet_of(name, dtype=torch.float64):
    """A supernet that all tests share; one that changes its weights takes `another`."""
    return another(name, dtype)


def another(name, dtype=torch.float64):
    width, enlarge = ALL[name]
    plan = blueprint(name, width)
    return plan, varied(Supernet(plan, enlarge=enlarge, seed=0), dtype)


def small(enlarge=1.5, **options):
    plan = blueprint(SMALL, resolution=8)
    return varied(Supernet(plan, enlarge=enlarge, seed=0, **options))


SMALL = Home(Small)


def images(count=4, side=64, seed=2, dtype=torch.float64):
    draws = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, side, side, generator=draws, dtype=dtype)


def counts(graph, choose):
    """Channels that searchable variables get by a rule on their classes; others keep theirs."""
    searchable = set(graph.searchable)
    return {
        name: one.unit * choose(one.classes) if name in searchable else one.channels
        for name, one in graph.free.items()
    }


def drawn(graph, seed):
    draws = random.Random(seed)  # noqa: S311 (no secret)
    return counts(graph, lambda classes: draws.randint(1, classes))


RULES = {
    "one channel": lambda _: 1,
    "all but one": lambda classes: max(1, classes - 1),
    "odd counts": lambda classes: min(classes, (classes * 2 // 3) | 1),
}


def some_counts(graph, many):
    """The corners, and random counts up to so many in all."""
    corners = [counts(graph, rule) for rule in RULES.values()]
    return corners + [drawn(graph, seed) for seed in range(many - len(corners))]


def in_batch_mode(model):
    """Normalise with the batch's own statistics, and draw nothing."""
    model.eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.train()
    return model


def standalone(plan, supernet, channels):
    """A plain network at these counts, with the leading entries of the supernet's weights."""
    model = plan.build(channels, seed=7).to(next(supernet.model.parameters()).dtype)
    own = dict(supernet.model.named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            leading = tuple(slice(0, size) for size in parameter.shape)
            parameter.copy_(own[name][leading])
    return model


def plain(name, supernet):
    """The supernet's network as an ordinary one: torchvision's where ours is rewritten."""
    if name not in JOINED or ALL[name][1] != 1:
        return supernet.model
    model = TorchvisionNetwork(name).build(depth=1, classes=5)
    model.to(next(supernet.model.parameters()).dtype)
    model.load_state_dict(supernet.model.state_dict(), strict=False)
    return model


@functools.cache
def graph_of(name):
    """The graph of what `plain` gives."""
    _, supernet = supernet_of(name)
    return trace(plain(name, supernet), 64) if supernet.graph.rewrites else supernet.graph


def active(name, supernet, channels):
    """Which entries of each parameter a subnet has: those that `resize` would keep.

    Every entry is numbered, and the numbers that a network of these counts still has are read.
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
        name: torch.zeros_like(one) if one.grad is None else one.grad.clone()
        for name, one in supernet.model.named_parameters()
    }


LABELS = torch.tensor([0, 3, 1, 4, 2, 2])


def learnt(supernet, channels, pixels, backend):
    """Logits of a subnet, and the gradients that it leaves."""
    supernet.model.zero_grad(set_to_none=True)
    subnet = supernet.subnet(channels, backend=backend)
    logits = subnet(pixels)
    functional.cross_entropy(logits, LABELS[: len(pixels)]).backward()
    subnet.collect()
    return logits.detach(), gradients(supernet)


def assert_close(one, other, tolerance, of=None):
    """Apart by no more than a part of the larger one's size."""
    one, other = one.detach(), other.detach()
    size = max(float(other.abs().max()), float(of or 0), 1e-300)
    assert (one - other).abs().max() <= tolerance * size


# ------------------------------------------------------------------ what a subnet computes


@pytest.mark.parametrize("name", ALL)
def test_the_full_width_is_the_plain_network(name):
    plan, supernet = supernet_of(name)
    model = plan.build(supernet.graph.channels, seed=1).double()
    parameters = dict(supernet.model.named_parameters())
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.copy_(parameters[key])
    with torch.no_grad():
        expected = in_batch_mode(model)(images())
        assert expected.std(0).min() > 1e-4
        assert_close(supernet.full(images()), expected, 1e-12)
        for backend in ("slice", "mask"):
            subnet = supernet.subnet(supernet.graph.channels, backend=backend)
            assert_close(subnet(images()), expected, 1e-12)


@pytest.mark.parametrize(
    ("name", "many"), [(name, 20 if name in ("resnet18", "mobilenet_v2") else 4) for name in ALL]
)
def test_a_slice_is_a_network_of_its_own_with_the_leading_weights(name, many):
    plan, supernet = supernet_of(name)
    spreads = []
    for channels in some_counts(supernet.graph, many):
        if name in LEADING:
            alone = standalone(plan, supernet, channels)
        else:
            whole = plain(name, supernet)
            alone = resize(whole, graph_of(name), channels, weights="sliced")
        with torch.no_grad():
            expected = in_batch_mode(alone)(images())
            found = supernet.subnet(channels, backend="slice")(images())
        assert_close(found, expected, 1e-9)
        spreads.append(expected.std(0).max())
    # A single channel may die at an activation, and then all images give the same.
    assert sum(spread > 1e-5 for spread in spreads) >= many - 1


class OneBatch:
    """A single batch to take statistics from."""

    batch_size, steps_per_epoch = 6, 1

    def __init__(self, pixels):
        self.pixels = pixels

    def epoch(self, _epoch, **_):
        yield self.pixels, LABELS


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
@pytest.mark.parametrize("rule", RULES)
def test_a_slice_is_a_recalibrated_network_in_evaluation_mode(name, rule):
    """But for the variance, which the network keeps with n - 1 in the place of n."""
    plan, supernet = supernet_of(name)
    channels = counts(supernet.graph, RULES[rule])
    alone = standalone(plan, supernet, channels)
    pixels = images(6)
    sizes = {}
    norms = [one for one in alone.modules() if isinstance(one, nn.BatchNorm2d)]
    handles = [
        norm.register_forward_pre_hook(
            lambda module, inputs: sizes.update({module: inputs[0][:, 0].numel()})
        )
        for norm in norms
    ]
    assert recalibrate(alone, OneBatch(pixels), runtime=RUNTIME) == 6
    for handle in handles:
        handle.remove()
    for norm in norms:
        norm.running_var *= (sizes[norm] - 1) / sizes[norm]
    alone.eval()
    with torch.no_grad():
        assert_close(supernet.subnet(channels)(pixels), alone(pixels), 1e-8)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("seed", [None, 0])
def test_a_mask_computes_and_learns_what_the_slice_does(name, seed):
    """Logits, every gradient, and nothing at all for the entries that are off."""
    _, supernet = supernet_of(name)
    graph = supernet.graph
    channels = counts(graph, RULES["one channel"]) if seed is None else drawn(graph, seed)
    on = active(name, supernet, channels)
    sliced, slice_gradients = learnt(supernet, channels, images(), "slice")
    masked, mask_gradients = learnt(supernet, channels, images(), "mask")
    assert_close(masked, sliced, 1e-9)
    largest = max(float(one.abs().max()) for one in slice_gradients.values())
    assert largest > 0
    for key, gradient in slice_gradients.items():
        assert_close(mask_gradients[key], gradient, 1e-9, of=largest)
        assert not gradient[~on[key]].any(), key
        assert not mask_gradients[key][~on[key]].any(), key


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "efficientnet_b0"])
def test_a_mask_agrees_with_the_slice_in_single_precision(name):
    _, supernet = supernet_of(name, torch.float32)
    channels = drawn(supernet.graph, 0)
    pixels = images(6, dtype=torch.float32)
    sliced, slice_gradients = learnt(supernet, channels, pixels, "slice")
    masked, mask_gradients = learnt(supernet, channels, pixels, "mask")
    assert_close(masked, sliced, 1e-4)
    largest = max(float(one.abs().max()) for one in slice_gradients.values())
    for key, gradient in slice_gradients.items():
        assert_close(mask_gradients[key], gradient, 1e-4, of=largest)


@pytest.mark.parametrize("name", ["resnet18", "densenet121"])
def test_a_slice_learns_what_a_network_of_its_own_does(name):
    """The gradients, at their places in the supernet's."""
    _, supernet = supernet_of(name)
    channels = drawn(supernet.graph, 3)
    on = active(name, supernet, channels)
    alone = in_batch_mode(resize(supernet.model, supernet.graph, channels, weights="sliced"))
    functional.cross_entropy(alone(images()), LABELS[:4]).backward()
    _, found = learnt(supernet, channels, images(), "slice")
    for key, parameter in alone.named_parameters():
        assert_close(found[key][on[key]], parameter.grad.flatten(), 1e-9, of=1)


@pytest.mark.parametrize("backend", ["slice", "mask"])
def test_gradients_of_subnets_add_up(backend):
    _, supernet = supernet_of("densenet121")
    several = [drawn(supernet.graph, seed) for seed in (0, 1)]
    apart = [learnt(supernet, channels, images(), backend)[1] for channels in several]
    supernet.model.zero_grad(set_to_none=True)
    for channels in several:
        subnet = supernet.subnet(channels, backend=backend)
        functional.cross_entropy(subnet(images()), LABELS[:4]).backward()
        subnet.collect()
    for key, gradient in gradients(supernet).items():
        assert_close(gradient, apart[0][key] + apart[1][key], 1e-12, of=1)


@pytest.mark.parametrize("name", LEADING)
def test_active_entries_are_the_first_ones(name):
    """What `active` says of a network without joined tensors, by the shapes alone."""
    plan, supernet = supernet_of(name)
    channels = drawn(supernet.graph, 4)
    on = active(name, supernet, channels)
    for key, parameter in plan.build(channels, seed=0).named_parameters():
        leading = tuple(slice(0, size) for size in parameter.shape)
        assert on[key][leading].all(), key
        assert on[key].sum() == parameter.numel(), key


@pytest.mark.parametrize("name", ALL)
def test_weights_that_are_off_do_not_matter(name):
    """Not even if they are no numbers, to a slice; to a mask, whatever number they are."""
    _, supernet = another(name)
    channels = drawn(supernet.graph, 5)
    on = active(name, supernet, channels)
    draws = torch.Generator().manual_seed(3)
    with torch.no_grad():
        sliced, masked = (supernet.subnet(channels, backend=b)(images()) for b in ("slice", "mask"))
        for key, parameter in supernet.model.named_parameters():
            tail = parameter[~on[key]]
            order = torch.randperm(len(tail), generator=draws)
            parameter[~on[key]] = -3 * tail[order] + 0.1
        assert any((~one).any() for one in on.values())
        again = supernet.subnet(channels, backend="mask")(images())
        assert_close(again, masked, 1e-12)
        for key, parameter in supernet.model.named_parameters():
            parameter[~on[key]] = torch.nan
        assert torch.equal(supernet.subnet(channels, backend="slice")(images()), sliced)
        for key, parameter in supernet.model.named_parameters():
            parameter[on[key]] *= 1.1
        assert not torch.equal(supernet.subnet(channels, backend="slice")(images()), sliced)


def test_a_layer_norm_of_a_slice_is_that_of_a_network_of_its_own():
    network = Home(lambda classes: Mixing(classes, "norm"))
    plan = blueprint(network, resolution=8)
    supernet = varied(Supernet(plan, enlarge=1.5, seed=0))
    channels = drawn(supernet.graph, 0)
    assert channels != supernet.graph.channels
    alone = in_batch_mode(standalone(plan, supernet, channels))
    with torch.no_grad():
        found = supernet.subnet(channels)(images(side=8))
        assert_close(found, alone(images(side=8)), 1e-12)


def test_the_memory_format_changes_no_more_than_rounding():
    _, supernet = another("mobilenet_v2")
    channels = drawn(supernet.graph, 6)
    logits, expected = learnt(supernet, channels, images(), "slice")
    supernet.model.to(memory_format=torch.channels_last)
    pixels = images().contiguous(memory_format=torch.channels_last)
    for backend in ("slice", "mask"):
        found, others = learnt(supernet, channels, pixels, backend)
        assert_close(found, logits, 1e-9)
        for key, gradient in expected.items():
            assert_close(others[key], gradient, 1e-9, of=1)


@pytest.mark.parametrize("name", ["mobilenet_v2", "resnet18", "shufflenet_v2_x0_5"])
def test_convolutions_that_mix_memory_formats_compute_the_same(name):
    _, supernet = another(name)
    channels = drawn(supernet.graph, 6)
    seen = []
    for module in supernet.model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(
                lambda _module, inputs, _output: seen.append(
                    inputs[0].is_contiguous(memory_format=torch.channels_last)
                )
            )
    for backend in ("slice", "mask"):
        supernet.mixed = False
        logits, expected = learnt(supernet, channels, images(), backend)
        seen.clear()
        supernet.mixed = True
        found, others = learnt(supernet, channels, images(), backend)
        assert any(seen)
        assert_close(found, logits, 1e-9)
        for key, gradient in expected.items():
            assert_close(others[key], gradient, 1e-9, of=1)


# ----------------------------------------------------------------------------- the mixture


def classes_of(graph):
    return sum(graph.free[name].classes for name in graph.searchable)


@pytest.mark.parametrize("name", ALL)
def test_a_mixture_of_zeros_and_ones_is_the_mask_and_of_ones_the_full_network(name):
    _, supernet = supernet_of(name)
    graph = supernet.graph
    channels = drawn(graph, 7)
    factors = torch.cat(
        [
            torch.tensor(
                [float(number * one.unit < channels[key]) for number in range(one.classes)]
            )
            for key, one in graph.free.items()
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
def test_a_mixture_multiplies_what_every_batch_norm_returns(name):
    """T13: hooks multiply the outputs of the plain network's, forward and backward."""
    _, supernet = supernet_of(name)
    graph = supernet.graph
    draws = torch.Generator().manual_seed(4)
    factors = torch.rand(classes_of(graph), generator=draws, dtype=torch.float64) * 1.2
    factors.requires_grad_()
    logits = supernet.mixture(images(), factors)
    loss = functional.cross_entropy(logits, LABELS[:4])
    (found,) = torch.autograd.grad(loss, factors)

    parts = dict(
        zip(
            graph.searchable,
            factors.split([graph.free[key].classes for key in graph.searchable]),
            strict=True,
        )
    )

    def multiplied(norm):
        spread = torch.cat(
            [
                parts[graph.variables[run.variable].name][run.start : run.start + run.classes]
                .repeat_interleave(run.repeat)
                for run in norm.axis
            ]
        )  # fmt: skip
        return lambda _module, _inputs, output: output * spread[:, None, None]

    handles = [
        supernet.model.get_submodule(norm.name).register_forward_hook(multiplied(norm))
        for norm in graph.norms
    ]
    expected = supernet.full(images())
    for handle in handles:
        handle.remove()
    (derivative,) = torch.autograd.grad(
        functional.cross_entropy(expected, LABELS[:4]), factors, retain_graph=True
    )
    assert_close(logits, expected, 1e-9)
    assert_close(found, derivative, 1e-9)
    assert (derivative.abs() > 1e-12 * derivative.abs().max()).double().mean() > 0.5


@pytest.mark.parametrize("site", ["norm", "activation"])
@pytest.mark.parametrize("inplace", [False, True])
def test_a_mixture_acts_before_or_behind_relu6(site, inplace):
    """T13: by hand, where many values are clipped; a ReLU6 that reads no BatchNorm is let be."""

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

    supernet = Supernet(blueprint(Home(Clipped), resolution=8), enlarge=1.5, seed=0)
    varied(supernet)
    model = supernet.model
    for norm in (model.bn0, model.bn1, model.bn2):
        norm.weight.data.mul_(5)
    draws = torch.Generator().manual_seed(4)
    factors = torch.rand(6 + 8, generator=draws, dtype=torch.float64).requires_grad_()
    assert classes_of(supernet.graph) == 14
    stem, wide = (one[:, None, None] for one in factors.split([6, 8]))
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
    found = supernet.mixture(pixels, factors, site=site)
    assert_close(found, expected, 1e-9)
    wanted, got = (
        torch.autograd.grad(functional.cross_entropy(one, LABELS), factors)[0]
        for one in (expected, found)
    )
    assert_close(got, wanted, 1e-9)
    with torch.no_grad():
        plain = supernet.mixture(pixels, torch.ones(14, dtype=torch.float64))
        assert_close(plain, supernet.full(pixels), 1e-12)


def test_the_gradient_of_a_mixture_is_that_of_central_differences():
    """T14, on a network with an identity block and a depthwise layer."""
    supernet = small()
    pixels = images(6, side=8)
    draws = torch.Generator().manual_seed(5)
    factors = 0.3 + torch.rand(classes_of(supernet.graph), generator=draws, dtype=torch.float64)

    def loss(values):
        return functional.cross_entropy(supernet.mixture(pixels, values), LABELS)

    leaf = factors.clone().requires_grad_()
    (found,) = torch.autograd.grad(loss(leaf), leaf)
    assert len(found) == 6 + 9 + 8
    for place in range(len(factors)):
        change = torch.zeros_like(factors)
        change[place] = 1e-6
        slope = (loss(factors + change) - loss(factors - change)) / 2e-6
        assert float(found[place]) == pytest.approx(float(slope), rel=1e-5, abs=1e-8)


def test_a_batch_norm_of_the_image_is_not_multiplied():
    """Its channels are no variable's, so they have no factor."""

    def normalised(classes):
        return nn.Sequential(nn.BatchNorm2d(3), Mixing(classes, "relu"))

    supernet = Supernet(blueprint(Home(normalised), resolution=8), enlarge=1.5, seed=0)
    varied(supernet)
    factors = torch.linspace(0.2, 1.3, classes_of(supernet.graph), dtype=torch.float64)
    assert len(factors) == 12
    with torch.no_grad():
        found = supernet.mixture(images(side=8), factors)
        norm = supernet.model.get_submodule("1.bn")
        norm.register_forward_hook(lambda *given: given[2] * factors[:, None, None])
        assert_close(found, supernet.full(images(side=8)), 1e-12)


def test_a_mixture_learns_nothing_but_its_factors():
    """T15: no gradient of a weight, and every parameter and buffer bit for bit as before."""
    _, supernet = supernet_of("shufflenet_v2_x0_5")
    supernet.model.zero_grad(set_to_none=True)
    before = {key: value.clone() for key, value in supernet.model.state_dict().items()}
    parameters = dict(supernet.model.named_parameters())
    factors = torch.full((classes_of(supernet.graph),), 0.7, requires_grad=True)
    supernet.mixture(images(), factors).square().sum().backward()
    assert factors.grad.any()
    assert all(one.grad is None for one in supernet.model.parameters())
    after = supernet.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    now = dict(supernet.model.named_parameters())
    assert all(now[key] is parameter for key, parameter in parameters.items())
    assert all(one.requires_grad for one in parameters.values())


# --------------------------------------------------------------------- what a pass leaves


def state(model):
    """All that the forward code of a network depends on."""
    found = {}
    for name, module in model.named_modules():
        for key in ("groups", "normalized_shape", "in_channels", "out_channels", "num_features"):
            if hasattr(module, key):
                found[name, key] = getattr(module, key)
        for key, tensor in {**module._parameters, **module._buffers}.items():  # noqa: SLF001
            found[name, key] = (id(tensor), None if tensor is None else tensor.clone())
    return found


def same_state(one, other):
    if one.keys() != other.keys():
        return False
    for key, value in one.items():
        theirs = other[key]
        if isinstance(value, tuple) and isinstance(value[1], torch.Tensor):
            if value[0] != theirs[0] or not torch.equal(value[1], theirs[1]):
                return False
        elif value != theirs:
            return False
    return True


class StopError(Exception):
    """What a test throws into a pass."""


@pytest.mark.parametrize("backend", ["slice", "mask"])
@pytest.mark.parametrize("name", ["mobilenet_v2", "resnext50_32x4d", "shufflenet_v2_x0_5"])
def test_a_pass_leaves_the_network_as_it_was_even_if_it_fails(name, backend):
    _, supernet = supernet_of(name)
    channels = counts(supernet.graph, RULES["odd counts"])
    before = state(supernet.model)
    with torch.no_grad():
        full = supernet.full(images())
    learnt(supernet, channels, images(), backend)
    assert same_state(state(supernet.model), before)

    def fail(*_):
        raise StopError

    *_, last = (one for one in supernet.model.modules() if isinstance(one, nn.BatchNorm2d))
    handle = last.register_forward_hook(fail)
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
        learnt(supernet, drawn(supernet.graph, 0), images(seed=8), backend)
    supernet.mixture(10 * images(seed=9), torch.ones(classes_of(supernet.graph)))
    kept = {key for key in supernet.model.state_dict() if "running" in key or "batches" in key}
    assert kept == set()
    buffers = {key for key, _ in supernet.model.named_buffers()}
    assert all(key.startswith("channel_selection_") for key in buffers)
    assert torch.equal(supernet.full(images()), first)


@pytest.mark.parametrize("name", ["mobilenet_v2", "efficientnet_b0", "densenet121"])
def test_nothing_is_drawn_in_a_pass_though_the_loop_trains(name):
    """Dropout and stochastic depth would make the two ways differ."""
    _, supernet = supernet_of(name)
    channels = drawn(supernet.graph, 1)
    factors = torch.ones(classes_of(supernet.graph))
    before = torch.get_rng_state()
    found = []
    for run in (
        supernet.full,
        supernet.subnet(channels, backend="slice"),
        supernet.subnet(channels, backend="mask"),
        lambda pixels: supernet.mixture(pixels, factors),
    ):
        supernet.model.train()
        with torch.no_grad():
            found.append(run(images()))
    assert torch.equal(torch.get_rng_state(), before)
    assert_close(found[1], found[2], 1e-9)
    assert_close(found[0], found[3], 1e-9)


# ------------------------------------------------------------------------- what is enlarged


def test_a_supernet_is_half_as_wide_again(traced):
    _, graph = traced("resnet18")
    wide = enlarge_channels(graph, 1.5)
    assert sorted(set(wide.values())) == [96, 192, 384, 768]
    assert wide == {name: count * 3 // 2 for name, count in graph.channels.items()}


def test_grouped_channels_are_enlarged_by_whole_groups(traced):
    """ResNeXt-50 has 32 groups of 4, 8, 16 and 32 channels: a group is a class, 48 of them."""
    _, graph = traced("resnext50_32x4d")
    wide = enlarge_channels(graph, 1.5)
    grouped = {name: one for name, one in graph.free.items() if one.unit > 1}
    assert sorted({one.unit for one in grouped.values()}) == [4, 8, 16, 32]
    assert all(wide[name] == 48 * one.unit for name, one in grouped.items())


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
    seen = {}
    handles = [
        supernet.model.get_submodule(key).register_forward_hook(
            lambda _module, _inputs, output, key=key: seen.update({key: output.shape[1]})
        )
        for key in squeezes
    ]
    channels = counts(supernet.graph, RULES["one channel"])
    for run in (supernet.full, *(supernet.subnet(channels, backend=b) for b in ("slice", "mask"))):
        run(images())
        assert seen == {key: plan.graph.channels[key] for key in squeezes}
    for handle in handles:
        handle.remove()
    others = set(plan.graph.searchable)
    assert all(
        supernet.graph.channels[key] == round(1.5 * plan.graph.channels[key]) for key in others
    )


# AutoSlim's list of 305 million MACs: stem, R0, (middle, output) x 16, last.
AUTOSLIM_305M = (8, 8, 96, 16, 96, 16, 96, 24, 144, 24, 144, 24, 144, 56, 288, 56, 288, 56, 288,
                 56, 288, 96, 432, 96, 432, 96, 864, 240, 1440, 240, 960, 240, 1440, 480,
                 1920)  # fmt: skip


@pytest.mark.parametrize("backend", ["slice", "mask"])
def test_equal_counts_make_no_shortcut(backend):
    """Block 0 of AutoSlim's MobileNetV2 goes from 8 channels to 8, and has none all the same."""
    plan = blueprint("mobilenet_v2", resolution=32)
    supernet = Supernet(plan, enlarge=1.5, seed=0)
    names = ["features.0.0", "features.1.conv.1"]
    for block in range(2, 18):
        names += [f"features.{block}.conv.0.0", f"features.{block}.conv.2"]
    names.append("features.18.0")
    channels = {}
    for name, count in zip(names, AUTOSLIM_305M, strict=True):
        (variable,) = (k for k, one in supernet.graph.free.items() if name in one.writers)
        assert channels.setdefault(variable, count) == count
    assert len(channels) == 25
    seen = {}
    for name in ("features.0", "features.1", "features.1.conv", "features.3.conv", "features.3"):
        supernet.model.get_submodule(name).register_forward_hook(
            lambda _module, inputs, output, name=name: seen.update({name: (inputs[0], output)})
        )
    with torch.no_grad():
        supernet.subnet(channels, backend=backend)(images(2, side=32, dtype=torch.float32))
    if backend == "slice":
        assert seen["features.1"][0].shape[1] == seen["features.1"][1].shape[1] == 8
    assert torch.equal(seen["features.1"][1], seen["features.1.conv"][1])
    given, returned = seen["features.3"]
    assert torch.equal(returned, given + seen["features.3.conv"][1])
    assert given.any()


def test_equal_seeds_give_equal_weights_and_other_seeds_others():
    plan = blueprint(SMALL, resolution=8)
    one, same, other = (Supernet(plan, enlarge=1.5, seed=seed).model for seed in (0, 0, 1))
    assert torch.equal(one.stem.weight, same.stem.weight)
    assert not torch.equal(one.stem.weight, other.stem.weight)


def test_multipliers_refer_to_the_network_that_is_not_enlarged():
    supernet = small()
    assert supernet.base.channels == {"stem": 4, "expand": 6, "head": 5}
    assert supernet.graph.channels == {"stem": 6, "expand": 9, "head": 8}


def test_a_supernet_runs_in_its_own_way_unless_told_otherwise():
    """A mask convolves with all the weights of the stem, a slice with those of 2 channels."""
    channels = {"stem": 2, "expand": 3, "head": 2}
    for own in ("slice", "mask"):
        supernet = small(backend=own)
        seen = []
        supernet.model.stem.register_forward_hook(
            lambda _module, _inputs, output, seen=seen: seen.append(output.shape[1])
        )
        for backend in (None, "slice", "mask"):
            supernet.subnet(channels, backend=backend)(images(side=8))
        assert seen == [2 if own == "slice" else 6, 2, 6]


# ---------------------------------------------------------------- what a mask cannot remove


class Mixing(nn.Module):
    """A stem whose channels are no longer 0 behind a BatchNorm that gives 0, or depend on all."""

    def __init__(self, classes, how):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.how = how
        if how == "norm":
            self.mix = nn.Sequential(Permute([0, 2, 3, 1]), nn.LayerNorm(8), Permute([0, 3, 1, 2]))
        self.head = nn.Linear(8, classes)

    def forward(self, x):
        x = self.bn(self.stem(x))
        if self.how == "constant":
            x = x + 1.0
        elif self.how == "little":  # differs by some per cent
            x = functional.relu(x) + 0.05
        elif self.how == "sigmoid":
            x = torch.sigmoid(x)
        elif self.how == "norm":
            x = self.mix(functional.relu(x))
        elif self.how == "relu":
            x = functional.relu(x)
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize("how", ["constant", "little", "sigmoid", "norm"])
def test_a_network_that_a_mask_does_not_narrow_is_refused(how):
    plan = blueprint(Home(lambda classes: Mixing(classes, how)), resolution=8)
    supernet = Supernet(plan, enlarge=1.5, seed=0)
    with pytest.raises(
        InputError,
        match=r"^network computes something else once BatchNorm switches channels off \(logits "
        r"differ by [0-9.e+-]+ of their size\), but that is how it would be searched; let channels "
        r"pass a BatchNorm and an activation that is 0 at 0 before they are mixed$",
    ):
        check_maskable(supernet, images(side=8, dtype=torch.float32), {"stem": 6})


def test_a_network_that_is_not_finite_is_refused():
    plan = blueprint(SMALL, resolution=8)
    supernet = Supernet(plan, enlarge=1.5, seed=0)
    supernet.model.classifier.bias.data[0] = torch.nan
    with pytest.raises(InputError, match="logits differ by nan of their size"):
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
    assert all(one.grad is None for one in supernet.model.parameters())


def test_a_network_whose_activation_is_0_at_0_is_not_refused():
    plan = blueprint(Home(lambda classes: Mixing(classes, "relu")), resolution=8)
    supernet = Supernet(plan, enlarge=1.5, seed=0)
    check_maskable(supernet, images(side=8, dtype=torch.float32), {"stem": 6})
