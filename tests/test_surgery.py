import functools
import gc
import random
import re

import pytest
import torch
from torch import nn
from torchvision import models

from widthopt.errors import InputError
from widthopt.networks import TorchvisionNetwork, initialise
from widthopt.networks.resize import Blueprint, resize
from widthopt.setting import Setting
from widthopt.tracing import trace
from widthopt.widthgraph import WidthGraph
from widthopt.widths import scale_channels


# The nine of the specification of MorphNet, section 5, and one whose forward code shuffles.
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
    return Blueprint(
        Setting(
            network=TorchvisionNetwork(name),
            classes=10,
            width=width,
            depth=1,
            resolution=resolution,
            fraction=1.0,
        )
    )


def weights_held():
    """Numbers in all parameters that are in memory."""
    gc.collect()
    held = [one for one in gc.get_objects() if type(one) is nn.Parameter]
    return sum(one.numel() for one in held if not one.is_meta)


def test_settings_that_are_only_counted_hold_no_weights():
    before = weights_held()
    plans = [blueprint("resnet18", width) for width in (0.25, 0.5, 1.0)]
    counts = [plan.parameters(plan.graph.channels) for plan in plans]
    assert counts[-1] == 11_689_512 - 990 * 513  # torchvision's, with 10 classes instead of 1000
    assert counts == sorted(set(counts))
    assert weights_held() == before


@functools.cache
def half_wide(name):
    """A network of half its width, to be quick, with random BatchNorms, and its graph."""
    if name == SHUFFLED:  # it is narrow as it is, and a resized one is not traced again
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
    """Classes that stay, and the channel counts that they make."""
    draws = random.Random(seed)  # noqa: S311 (no secret)
    keep = {}
    for name, variable in graph.free.items():
        alive = [one for one in range(variable.classes) if draws.random() >= dead]
        keep[name] = alive or [draws.randrange(variable.classes)]
    return keep, {name: len(one) * graph.free[name].unit for name, one in keep.items()}


def mask(model, graph, keep):
    """Silence dead classes: gamma and beta 0, and weights where no BatchNorm follows."""

    def dead(axis):
        alive = [
            number in keep.get(graph.variables[run.variable].name, range(10**9))
            for run in axis
            for number in range(run.start, run.start + run.classes)
            for _ in range(run.repeat)
        ]
        return torch.tensor([not one for one in alive])

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
    """P2 and P3: 40 % of the classes dead, random BatchNorm statistics."""
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


def test_a_slice_keeps_the_leading_channels_unless_it_is_told_which():
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
OTHERS = ["resnet50", "resnext50_32x4d", "mobilenet_v3_large", "densenet121", "efficientnet_b0"]


@pytest.mark.parametrize(
    ("name", "counts"),
    [(name, counts) for name in QUICK for counts in COUNTS]
    + [(name, "odd counts") for name in OTHERS],
)
def test_a_network_at_any_counts_runs_and_costs_what_the_graph_says(counted, name, counts):
    with torch.device("cpu" if "regnet" in name else "meta"):
        model = TorchvisionNetwork(name).build(depth=1, classes=10)
    graph = trace(model, 64)
    channels = {one: COUNTS[counts](variable) for one, variable in graph.free.items()}
    resized = resize(model, graph, channels)
    assert counted(resized, 64) == graph.macs(channels) == graph.resize_graph(channels).macs()
    resized.train()
    assert resized(torch.randn(2, 3, 64, 64)).shape == (2, 10)
    assert {
        name: value.device.type for name, value in resized.state_dict().items()
    } == dict.fromkeys(resized.state_dict(), "cpu")


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "densenet121"])
def test_a_resized_network_traces_to_the_resized_graph(name):
    plan = blueprint(name)
    keep, channels = random_subset(plan.graph, dead=0.4, seed=3)
    del keep
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


SAMPLE = 200_000  # entries that moments are taken over


def moments(values):
    """Mean, standard deviation and kurtosis; the last tells Gaussian, uniform and truncated."""
    values = values.detach().flatten()[:SAMPLE].double()
    # torch 2.6 truncates at 200 deviations by drawing, once in 100,000, the bound itself.
    values = values[values.abs() < 2]
    centred = values - values.mean()
    std = centred.square().mean().sqrt()
    kurtosis = centred.pow(4).mean() / std**4 if std > 0 else torch.tensor(0.0)
    return values.mean().item(), std.item(), kurtosis.item()


def assert_same_law(ours, theirs):
    """Each parameter was drawn as its like was; six standard errors of difference are allowed."""
    theirs = theirs.state_dict()
    assert ours.state_dict().keys() == theirs.keys()
    for name, value in ours.state_dict().items():
        other = theirs[name]
        assert value.shape == other.shape, name
        if not value.is_floating_point():
            assert torch.equal(value, other), name
            continue
        (mean, std, kurtosis), (mean2, std2, kurtosis2) = moments(value), moments(other)
        size = min(value.numel(), SAMPLE)
        if std2 == 0:  # a constant: zeros and ones
            assert torch.equal(value, other), name
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
    blocks = [models.convnext.CNBlockConfig(*one) for one in ((48, 96, 1), (96, None, 2))]
    return models.ConvNeXt(blocks)


def small_densenet(growth=32):
    return models.DenseNet(growth, (2, 3), 2 * growth)


# One network of each law, small ones where the law does not care.
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
def test_fresh_weights_follow_the_law_of_torchvisions_constructor(family):
    # A ConvNeXt's layer scale belongs to no layer that resets, so its value is carried over.
    model, theirs = FAMILIES[family](), FAMILIES[family]()
    graph = trace(model, 96)
    assert_same_law(resize(model, graph, graph.channels, seed=1), theirs)


class Derived(models.SqueezeNet):
    """A user's own, of torchvision's."""


def test_a_network_derived_from_torchvisions_starts_by_its_law():
    model, theirs = Derived(), models.squeezenet1_0()
    graph = trace(model, 96)
    assert_same_law(resize(model, graph, graph.channels, seed=1), theirs)


class Namesake(nn.Sequential):
    """A user's own that is called as one of torchvision's, in a module that is called so too."""

    __module__, __qualname__ = "resnet", "ResNet"


def test_a_namesake_of_torchvisions_starts_as_torchs_layers_do():
    model = Namesake(nn.Conv2d(8, 64, 1), nn.BatchNorm2d(64))
    initialise(model, seed=1)
    # Uniform within 1 / sqrt(fan-in); torchvision's law for a ResNet is a Gaussian.
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
def test_the_law_of_a_resized_network_is_that_of_torchvisions_at_its_widths(wide, narrow):
    """A law depends on fan-in or fan-out: here those of the result, not those of the original."""
    theirs = narrow()
    with torch.device("meta"):
        model = wide()
    graph = trace(model, 96)
    sizes = trace(theirs, 96).channels
    assert graph.channels.keys() == sizes.keys()
    assert_same_law(resize(model, graph, sizes, seed=1), theirs)


@pytest.mark.parametrize(
    ("name", "linear", "convolution", "bias"),
    [
        # He, Gaussian, by the weights that leave an output; torchvision's 0.01 for the rest.
        ("vgg11_bn", lambda _: 0.01, lambda conv: (2 / (9 * conv.out_channels)) ** 0.5, False),
        # Uniform within 1 / sqrt(fan-in), torch's own.
        (
            "alexnet",
            lambda layer: (3 * layer.in_features) ** -0.5,
            lambda conv: (3 * conv.weight[0].numel()) ** -0.5,
            True,
        ),
    ],
    ids=["VGG", "AlexNet"],
)
def test_fresh_weights_of_the_large_networks_follow_their_law_at_an_eighth_of_the_width(
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
    ours = plan.build(plan.graph.channels, seed=0)
    theirs = models.get_model(name, num_classes=10)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(images), theirs.eval()(images))


def same_weights(one, other):
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
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


def test_building_leaves_the_callers_random_numbers_alone():
    plan = blueprint("resnet18", 0.25)
    torch.manual_seed(3)
    random.seed(3)
    expected = torch.rand(3), random.random()  # noqa: S311 (no secret)
    torch.manual_seed(3)
    random.seed(3)
    plan.build(plan.graph.channels, seed=0)
    assert torch.equal(torch.rand(3), expected[0])
    assert random.random() == expected[1]  # noqa: S311 (no secret)


def test_a_variable_at_one_channel_still_builds_runs_and_costs_what_it_says(counted):
    """As P18: what the least width leaves is a network."""
    model, graph = half_wide("resnet18")
    channels = {**graph.channels, "layer3.0.conv2": 1}
    sliced = resize(model, graph, channels, weights="sliced", keep={"layer3.0.conv2": [17]})
    assert sliced(torch.randn(2, 3, 64, 64)).shape == (2, 10)
    assert counted(sliced, 64) == graph.macs(channels)
    assert torch.equal(sliced.layer3[0].bn2.weight, model.layer3[0].bn2.weight[[17]])


def test_a_blueprint_knows_the_parameters_of_what_it_builds():
    plan = blueprint("mobilenet_v2")
    theirs = models.mobilenet_v2(num_classes=10)
    assert plan.parameters(plan.graph.channels) == sum(p.numel() for p in theirs.parameters())
    keep, channels = random_subset(plan.graph, dead=0.4, seed=4)
    del keep
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
    """A parameter outside all layers, which no reset reaches."""

    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 8, 1)
        self.scale = nn.Parameter(torch.arange(8.0).reshape(8, 1, 1))
        self.register_buffer("mean", torch.rand(3, 1, 1))
        self.b = nn.Conv2d(8, 5, 1)

    def forward(self, x):
        return self.b(self.a(x - self.mean) * self.scale)


def test_a_parameter_outside_all_layers_is_sized_and_keeps_its_values():
    model = Scaled()
    resized = resize(model, trace(model, 8), {"a": 4})
    assert resized.scale.flatten().tolist() == [0, 2, 4, 6]  # spread evenly
    assert torch.equal(resized.mean, model.mean)
    assert resized(torch.randn(2, 3, 8, 8)).shape == (2, 5, 8, 8)


class Own(Scaled):
    """It starts its own weights."""

    def reset_parameters(self):
        nn.init.constant_(self.a.weight, 0.5)
        nn.init.constant_(self.b.weight, torch.rand(1).item())


def test_a_network_that_starts_its_own_weights_is_asked_to():
    model = Own()
    graph = trace(model, 8)
    one, other = (resize(model, graph, {"a": 4}, seed=seed) for seed in (1, 2))
    assert (one.a.weight == 0.5).all()
    assert one.b.weight.unique().numel() == 1
    assert one.b.weight[0, 0, 0, 0] != other.b.weight[0, 0, 0, 0]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"conv1": 65}, "channels.conv1 is 65, but the given network has 64 to slice from; "),
        ({"conv1": 0}, "channels.conv1 is 0, but it must be a whole number from 1 up; "),
        ({"conv1": 1.5}, "channels.conv1 is 1.5, but it must be a whole number from 1 up; "),
        ({"conv9": 1}, "unknown: conv9"),
    ],
)
def test_counts_that_cannot_be_sliced_are_refused(traced, changed, message):
    model, graph = traced("resnet18")
    with pytest.raises(InputError, match=re.escape(message)):
        resize(model, graph, {**graph.channels, **changed}, weights="sliced")
