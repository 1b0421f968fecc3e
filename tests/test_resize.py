import functools
import gc
import random
import re

import pytest
import torch
from small import make_setting
from torch import nn
from torchvision import models

from widthopt.errors import InputError
from widthopt.networks import TorchvisionNetwork, initialise
from widthopt.networks.resize import Blueprint, resize
from widthopt.tracing import trace
from widthopt.widthgraph import WidthGraph
from widthopt.widths import scale_channels


# The nine networks of docs/algorithms/morphnet.md, section 5, and one with channel shuffles.
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
SHUFFLED = "shufflenet_v2_x0_5"


def blueprint(name, width=1.0, resolution=64):
    return Blueprint(make_setting(name, classes=10, width=width, resolution=resolution))


def count_weights_in_memory():
    """Return the number of entries of all parameters in memory."""
    gc.collect()
    parameters = [value for value in gc.get_objects() if type(value) is nn.Parameter]
    return sum(parameter.numel() for parameter in parameters if not parameter.is_meta)


def test_settings_that_are_only_counted_hold_no_weights():
    before = count_weights_in_memory()
    plans = [blueprint("resnet18", width) for width in (0.25, 0.5, 1.0)]
    counts = [plan.parameters(plan.graph.channels) for plan in plans]
    assert counts[-1] == 11_689_512 - 990 * 513  # torchvision's, with 10 classes instead of 1000
    assert counts == sorted(set(counts))
    assert count_weights_in_memory() == before


@functools.cache
def half_wide(name):
    """Return a network at half width (for speed), with random BatchNorms, and its graph."""
    if name == SHUFFLED:  # it is narrow already, and a resized one cannot be traced again
        model = TorchvisionNetwork(name).build(depth=1, classes=10)
    else:
        half = blueprint(name, 0.5)
        model = half.build(half.graph.channels, seed=0)
    graph = trace(model, 64)
    model.eval()
    draws = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data.uniform_(0.5, 1.5, generator=draws)
            module.bias.data.uniform_(-0.5, 0.5, generator=draws)
            module.running_mean.uniform_(-0.5, 0.5, generator=draws)
            module.running_var.uniform_(0.5, 1.5, generator=draws)
    return model, graph


def random_subset(graph, *, dead, seed):
    """Return random classes to keep, and the channel counts that they make."""
    draws = random.Random(seed)  # noqa: S311 (no secret)
    keep = {}
    for name, variable in graph.free.items():
        alive = [number for number in range(variable.classes) if draws.random() >= dead]
        keep[name] = alive or [draws.randrange(variable.classes)]
    return keep, {name: len(kept) * graph.free[name].unit for name, kept in keep.items()}


def mask(model, graph, keep):
    """Set gamma and beta of dead classes to 0, and the weights that write them."""

    def dead(axis):
        alive = [
            number in keep.get(graph.variables[span.variable].name, range(10**9))
            for span in axis
            for number in range(span.start, span.start + span.classes)
            for _ in range(span.repeat)
        ]
        return ~torch.tensor(alive)

    for norm in graph.norms:
        module = model.get_submodule(norm.name)
        module.weight.data[dead(norm.axis)] = 0
        module.bias.data[dead(norm.axis)] = 0
    for layer in graph.layers:
        module = model.get_submodule(layer.name)
        module.weight.data[dead(layer.writes)] = 0
        if module.bias is not None:
            module.bias.data[dead(layer.writes)] = 0


@pytest.mark.parametrize("name", [*NINE, SHUFFLED])
def test_a_masked_network_computes_what_the_sliced_one_does_and_costs_are_exact(counted, name):
    """docs/algorithms/morphnet.md, P2 and P3: 40 % of the classes dead, random BatchNorms."""
    model, graph = half_wide(name)
    keep, channels = random_subset(graph, dead=0.4, seed=2)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    sliced = resize(model, graph, channels, weights="sliced", keep=keep)
    images = torch.randn(2, 3, 64, 64)
    try:
        mask(model, graph, keep)
        with torch.no_grad():
            masked, small = model(images), sliced(images)
    finally:
        model.load_state_dict(before)
    assert (masked - small).abs().max() <= 1e-5 * masked.abs().max()
    assert graph.macs(channels) == counted(sliced, 64)


@pytest.mark.parametrize("name", ["resnet18", "densenet121", SHUFFLED])
def test_a_slice_of_full_width_is_the_network(name):
    model, graph = half_wide(name)
    same = resize(model, graph, graph.channels, weights="sliced")
    images = torch.randn(2, 3, 64, 64)
    assert same is not model
    with torch.no_grad():
        assert torch.equal(same(images), model(images))


def test_a_slice_keeps_the_leading_channels_by_default():
    model, graph = half_wide("resnet18")
    channels = {**graph.channels, "layer1.0.conv1": 3}
    given = model.layer1[0].conv1.weight
    leading = resize(model, graph, channels, weights="sliced")
    assert torch.equal(leading.layer1[0].conv1.weight, given[:3])
    keep = {"layer1.0.conv1": [4, 7, 30]}
    chosen = resize(model, graph, channels, weights="sliced", keep=keep)
    assert torch.equal(chosen.layer1[0].conv1.weight, given[[4, 7, 30]])
    assert torch.equal(chosen.layer1[0].conv2.weight, model.layer1[0].conv2.weight[:, [4, 7, 30]])
    assert torch.equal(
        chosen.layer1[0].bn1.running_mean, model.layer1[0].bn1.running_mean[[4, 7, 30]]
    )


def test_a_slice_shares_no_memory_with_the_network():
    model, graph = half_wide("resnet18")
    before = model.conv1.weight.detach().clone()
    sliced = resize(model, graph, graph.channels, weights="sliced")
    sliced.conv1.weight.data.zero_()
    assert torch.equal(model.conv1.weight, before)


COUNTS = {
    "one channel": lambda variable: variable.unit,
    "odd counts": lambda variable: variable.unit * max(1, (variable.classes * 2 // 3) | 1),
    "larger counts": lambda variable: (
        variable.unit * (variable.classes + variable.classes // 3 + 1)
    ),
}


QUICK = ["resnet18", "mobilenet_v2", "regnet_x_400mf", SHUFFLED, "squeezenet1_1", "mnasnet0_5"]
SLOW = ["resnet50", "resnext50_32x4d", "mobilenet_v3_large", "densenet121", "efficientnet_b0"]


@pytest.mark.parametrize(
    ("name", "counts"),
    [(name, counts) for name in QUICK for counts in COUNTS]
    + [(name, "odd counts") for name in SLOW],
)
def test_a_network_at_any_counts_runs_and_has_the_macs_of_its_graph(counted, name, counts):
    with torch.device("cpu" if "regnet" in name else "meta"):
        model = TorchvisionNetwork(name).build(depth=1, classes=10)
    graph = trace(model, 64)
    channels = {key: COUNTS[counts](variable) for key, variable in graph.free.items()}
    resized = resize(model, graph, channels)
    assert counted(resized, 64) == graph.macs(channels) == graph.resize_graph(channels).macs()
    resized.train()
    assert resized(torch.randn(2, 3, 64, 64)).shape == (2, 10)
    assert {value.device.type for value in resized.state_dict().values()} == {"cpu"}


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "densenet121"])
def test_a_resized_network_traces_to_the_resized_graph(name):
    plan = blueprint(name)
    _, channels = random_subset(plan.graph, dead=0.4, seed=3)
    again = trace(plan.build(channels, seed=0), 64)
    assert again.channels == channels
    assert again.quadratic == plan.graph.quadratic


def test_a_shuffling_network_at_odd_counts_keeps_torchvisions_parameter_names():
    model, graph = half_wide(SHUFFLED)
    channels = {name: count | 1 for name, count in graph.channels.items()}
    assert channels != graph.channels
    resized = resize(model, graph, channels)
    assert set(resized.state_dict()) == set(model.state_dict())
    assert resized(torch.randn(2, 3, 64, 64)).shape == (2, 10)


SAMPLE = 200_000  # entries that moments are computed from


def moments(values):
    """Return mean, standard deviation and kurtosis, which differs between distributions."""
    values = values.detach().flatten()[:SAMPLE].double()
    # torch 2.6 truncates at 200 deviations by drawing, once in 100,000, the bound itself.
    values = values[values.abs() < 2]
    centred = values - values.mean()
    std = centred.square().mean().sqrt()
    kurtosis = centred.pow(4).mean() / std**4 if std > 0 else torch.tensor(0.0)
    return values.mean().item(), std.item(), kurtosis.item()


def assert_same_distribution(model, reference):
    """Compare the moments of each parameter, up to some standard errors."""
    expected = reference.state_dict()
    assert model.state_dict().keys() == expected.keys()
    for name, value in model.state_dict().items():
        target = expected[name]
        assert value.shape == target.shape, name
        if not value.is_floating_point():
            assert torch.equal(value, target), name
            continue
        (mean, std, kurtosis), (mean2, std2, kurtosis2) = moments(value), moments(target)
        size = min(value.numel(), SAMPLE)
        if std2 == 0:  # a constant: zeros and ones
            assert torch.equal(value, target), name
        elif size >= 128:
            assert abs(std / std2 - 1) < 8 / size**0.5, name
            assert abs(mean - mean2) < 8 * std2 / size**0.5, name
            if size >= 8192:
                assert abs(kurtosis - kurtosis2) < 50 / size**0.5, name


def narrow_resnet(width=32, groups=1):
    return models.ResNet(
        models.resnet.Bottleneck, [1, 1, 1, 1], groups=groups, width_per_group=width
    )


def small_convnext():
    blocks = [models.convnext.CNBlockConfig(*widths) for widths in ((48, 96, 1), (96, None, 2))]
    return models.ConvNeXt(blocks)


def small_densenet(growth=32):
    return models.DenseNet(growth, (2, 3), 2 * growth)


# One network for each initialiser, small where that makes no difference.
FAMILIES = {
    "ResNet": narrow_resnet,
    "ResNeXt": lambda: narrow_resnet(4, 32),
    "MobileNetV2": models.mobilenet_v2,
    "MobileNetV3": models.mobilenet_v3_small,
    "MNASNet": models.mnasnet0_5,
    "RegNet": models.regnet_y_400mf,
    "EfficientNet": models.efficientnet_b0,
    "ConvNeXt": small_convnext,
    "DenseNet": small_densenet,
    "ShuffleNetV2": models.shufflenet_v2_x0_5,
    "SqueezeNet 1.0": models.squeezenet1_0,
    "SqueezeNet 1.1": models.squeezenet1_1,
    "GoogLeNet": lambda: models.googlenet(init_weights=True, aux_logits=False),
    "InceptionV3": lambda: models.inception_v3(init_weights=True, aux_logits=False),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_fresh_weights_are_distributed_as_torchvisions_constructor_draws_them(family):
    # No layer resets ConvNeXt's layer scale, so its value is copied.
    model, reference = FAMILIES[family](), FAMILIES[family]()
    graph = trace(model, 96)
    assert_same_distribution(resize(model, graph, graph.channels, seed=1), reference)


class Derived(models.SqueezeNet):
    """A subclass of a torchvision network."""


def test_a_subclass_of_a_torchvision_network_is_initialised_like_it():
    model, reference = Derived(), models.squeezenet1_0()
    graph = trace(model, 96)
    assert_same_distribution(resize(model, graph, graph.channels, seed=1), reference)


class Namesake(nn.Sequential):
    """A custom network with the names of torchvision's class and module."""

    __module__, __qualname__ = "resnet", "ResNet"


def test_a_namesake_of_a_torchvision_network_is_initialised_as_torchs_layers_are():
    model = Namesake(nn.Conv2d(8, 64, 1), nn.BatchNorm2d(64))
    initialise(model, seed=1)
    # Uniform within 1 / sqrt(fan-in); torchvision draws a ResNet's from a Gaussian.
    assert model[0].weight.abs().max() <= 8**-0.5


@pytest.mark.parametrize(
    ("wide", "narrow"),
    [
        (lambda: narrow_resnet(64), narrow_resnet),
        (models.mobilenet_v2, lambda: models.mobilenet_v2(width_mult=0.5)),
        (models.mnasnet1_0, models.mnasnet0_5),
        (small_densenet, lambda: small_densenet(16)),
    ],
    ids=["resnet", "mobilenet_v2", "mnasnet", "densenet"],
)
def test_the_weights_of_a_resized_network_are_distributed_as_at_its_widths(wide, narrow):
    """They depend on the fan-in or fan-out of the resized network, not of the original one."""
    reference = narrow()
    with torch.device("meta"):
        model = wide()
    graph = trace(model, 96)
    sizes = trace(reference, 96).channels
    assert graph.channels.keys() == sizes.keys()
    assert_same_distribution(resize(model, graph, sizes, seed=1), reference)


@pytest.mark.parametrize(
    ("name", "linear", "convolution", "bias"),
    [
        # He initialisation by fan-out; 0.01 for linear layers.
        ("vgg11_bn", lambda _: 0.01, lambda conv: (2 / (9 * conv.out_channels)) ** 0.5, False),
        # Uniform within 1 / sqrt(fan-in), torch's default.
        (
            "alexnet",
            lambda layer: (3 * layer.in_features) ** -0.5,
            lambda conv: (3 * conv.weight[0].numel()) ** -0.5,
            True,
        ),
    ],
    ids=["VGG", "AlexNet"],
)
def test_fresh_weights_of_large_networks_have_the_right_deviation_at_an_eighth_of_the_width(
    traced, name, linear, convolution, bias
):
    model, graph = traced(name)
    small = resize(model, graph, scale_channels(graph, 0.125), seed=1)
    for module in small.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            expected = (linear if isinstance(module, nn.Linear) else convolution)(module)
            size = module.weight.numel()
            assert abs(module.weight.std().item() / expected - 1) < 6 / size**0.5
            assert bool(module.bias.any()) is bias


@pytest.mark.parametrize(
    "name", ["resnet18", "mobilenet_v2", "shufflenet_v2_x0_5", "convnext_tiny"]
)
def test_torchvisions_weights_load_at_width_and_depth_one(name):
    plan = blueprint(name)
    model = plan.build(plan.graph.channels, seed=0)
    reference = models.get_model(name, num_classes=10)
    model.load_state_dict(reference.state_dict(), strict=True)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(images), reference.eval()(images))


def same_weights(left, right):
    pairs = zip(left.state_dict().values(), right.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def test_the_seed_alone_decides_the_weights():
    plan = blueprint("mobilenet_v2", 0.5)
    channels = plan.graph.channels
    torch.manual_seed(1)
    first = plan.build(channels, seed=7)
    torch.manual_seed(2)
    assert same_weights(first, plan.build(channels, seed=7))
    assert same_weights(first, blueprint("mobilenet_v2", 0.5).build(channels, seed=7))
    assert not same_weights(first, plan.build(channels, seed=8))


def test_building_preserves_the_global_rng_states():
    plan = blueprint("resnet18", 0.25)
    torch.manual_seed(3)
    random.seed(3)
    expected = torch.rand(3), random.random()  # noqa: S311 (no secret)
    torch.manual_seed(3)
    random.seed(3)
    plan.build(plan.graph.channels, seed=0)
    assert torch.equal(torch.rand(3), expected[0])
    assert random.random() == expected[1]  # noqa: S311 (no secret)


def test_a_network_with_a_variable_at_one_channel_runs_and_has_the_macs_of_its_graph(counted):
    """docs/algorithms/morphnet.md, P18: the least width is a valid network."""
    model, graph = half_wide("resnet18")
    channels = {**graph.channels, "layer3.0.conv2": 1}
    sliced = resize(model, graph, channels, weights="sliced", keep={"layer3.0.conv2": [17]})
    assert sliced(torch.randn(2, 3, 64, 64)).shape == (2, 10)
    assert counted(sliced, 64) == graph.macs(channels)
    assert torch.equal(sliced.layer3[0].bn2.weight, model.layer3[0].bn2.weight[[17]])


def test_a_blueprint_counts_the_parameters_of_the_network_it_builds():
    plan = blueprint("mobilenet_v2")
    reference = models.mobilenet_v2(num_classes=10)
    assert plan.parameters(plan.graph.channels) == sum(p.numel() for p in reference.parameters())
    _, channels = random_subset(plan.graph, dead=0.4, seed=4)
    built = plan.build(channels, seed=0)
    assert plan.parameters(channels) == sum(p.numel() for p in built.parameters())


def test_the_width_of_a_setting_is_in_its_blueprint():
    plan = blueprint("resnet18", 0.5, resolution=224)
    assert plan.graph.macs() == 483_149_824 - 990 * 256  # the classifier has 10 outputs, not 1000
    assert plan.graph.channels["conv1"] == 32


@pytest.mark.parametrize("resized", [True, False])
def test_a_blueprints_graph_is_that_of_the_network_it_builds(resized):
    plan = blueprint("shufflenet_v2_x1_0" if resized else "resnet18", 0.7 if resized else 1.0)
    assert isinstance(plan.graph, WidthGraph)
    built = plan.build(plan.graph.channels, seed=0)
    written = {layer.name: plan.graph.length(layer.writes) for layer in plan.graph.layers}
    for name, module in built.named_modules():
        if isinstance(module, nn.Conv2d):
            assert module.out_channels == written[name]


class Scaled(nn.Module):
    """A network with a parameter outside all layers, which no layer resets."""

    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 8, 1)
        self.scale = nn.Parameter(torch.arange(8.0).reshape(8, 1, 1))
        self.register_buffer("mean", torch.rand(3, 1, 1))
        self.b = nn.Conv2d(8, 5, 1)

    def forward(self, x):
        return self.b(self.a(x - self.mean) * self.scale)


def test_a_parameter_outside_all_layers_is_resized_and_keeps_its_values():
    model = Scaled()
    resized = resize(model, trace(model, 8), {"a": 4})
    assert resized.scale.flatten().tolist() == [0, 2, 4, 6]  # spread evenly
    assert torch.equal(resized.mean, model.mean)
    assert resized(torch.randn(2, 3, 8, 8)).shape == (2, 5, 8, 8)


class Resetting(Scaled):
    """A network with its own ``reset_parameters``."""

    def reset_parameters(self):
        nn.init.constant_(self.a.weight, 0.5)
        nn.init.constant_(self.b.weight, torch.rand(1).item())


def test_a_network_with_reset_parameters_is_initialised_by_it():
    model = Resetting()
    graph = trace(model, 8)
    first, second = (resize(model, graph, {"a": 4}, seed=seed) for seed in (1, 2))
    assert (first.a.weight == 0.5).all()
    assert first.b.weight.unique().numel() == 1
    assert first.b.weight[0, 0, 0, 0] != second.b.weight[0, 0, 0, 0]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"conv1": 65}, "channels.conv1 is 65, but the given network has 64 to slice from; "),
        ({"conv1": 0}, "channels.conv1 is 0, but "),
        ({"conv1": 1.5}, "channels.conv1 is 1.5, but "),
        ({"conv9": 1}, "unknown: conv9"),
    ],
)
def test_counts_that_cannot_be_sliced_are_refused(traced, changed, message):
    model, graph = traced("resnet18")
    with pytest.raises(InputError, match=re.escape(message)):
        resize(model, graph, {**graph.channels, **changed}, weights="sliced")
