import re

import pytest
import torch
from torch import nn
from torch.nn import functional

from widthopt.errors import AxisError, InputError
from widthopt.networks import TorchvisionNetwork
from widthopt.networks.resize import resize
from widthopt.tracing import same_channels, tied_channels, trace
from widthopt.widths import scale_channels


# Number of free width variables of each network; the first nine are in the table of
# docs/algorithms/morphnet.md, 8.
NETWORKS = {
    "resnet18": 12,
    "resnet50": 37,
    "mobilenet_v2": 25,
    "mobilenet_v3_large": 30,
    "efficientnet_b0": 40,
    "regnet_x_400mf": 27,
    "densenet121": 120,
    "inception_v3": 94,
    "convnext_tiny": 22,
    # By hand: a stream for each stage and one or two variables inside each block.
    "resnet34": 4 + 16,
    "resnet101": 5 + 2 * (3 + 4 + 23 + 3),
    "wide_resnet50_2": 37,
    # In ResNeXt and RegNet a grouped convolution ties the two inner counts of a block.
    "resnext50_32x4d": 5 + (3 + 4 + 6 + 3),
    # RegNetY also has a squeeze width in each of its 1 + 3 + 6 + 6 blocks.
    "regnet_y_400mf": 5 + 2 * (1 + 3 + 6 + 6),
    # A plain chain: eight convolutions (five in AlexNet) and two hidden linear layers.
    "vgg11": 8 + 2,
    "vgg11_bn": 8 + 2,
    "alexnet": 5 + 2,
    # Stem, and squeeze and two expands in each of eight fire modules.
    "squeezenet1_0": 1 + 3 * 8,
    "squeezenet1_1": 1 + 3 * 8,
    # Three stem convolutions, and six in each of nine inceptions.
    "googlenet": 3 + 6 * 9,
    # Stem and first depthwise, 16, then 3 + 3 + 3 + 2 + 4 + 1 expansions, 6 streams, head.
    "mnasnet1_0": 2 + 16 + 6 + 1,
}
ALL = [*NETWORKS, "mobilenet_v3_small", "efficientnet_v2_s", "shufflenet_v2_x1_0"]
SMALLEST = {"inception_v3": 75, "alexnet": 63, "vgg11": 32, "vgg11_bn": 32}


@pytest.mark.parametrize("name", ALL)
def test_macs_are_those_that_hooks_count(traced, counted, name):
    model, graph = traced(name)
    assert graph.macs() == counted(model.to("meta"), 224)


@pytest.mark.parametrize("resolution", [96, 161])
@pytest.mark.parametrize(
    "name",
    ["resnet18", "mobilenet_v2", "shufflenet_v2_x1_0", "regnet_y_400mf", "vgg11", "squeezenet1_1"],
)
def test_macs_follow_the_resolution(traced, counted, name, resolution):
    model, graph = traced(name, resolution)
    assert graph.macs() == counted(model.to("meta"), resolution)


@pytest.mark.parametrize(
    ("name", "resolution", "published"),
    [
        ("resnet18", 64, 148_557_824),
        ("resnet18", 160, 925_798_400),
        ("resnet18", 224, 1_814_073_344),
        ("resnet18", 320, 3_701_657_600),
        ("mobilenet_v2", 64, 25_728_512),
        ("mobilenet_v2", 160, 154_083_200),
        ("mobilenet_v2", 224, 300_774_272),
        ("mobilenet_v2", 320, 612_492_800),
        ("resnet50", 224, 4_089_184_256),
    ],
)
def test_macs_are_the_published_ones(traced, name, resolution, published):
    assert traced(name, resolution)[1].macs() == published


@pytest.mark.parametrize(
    ("name", "width", "published"),
    [
        ("resnet18", 0.312, 202_620_160),
        ("resnet18", 0.5, 483_149_824),
        ("resnet18", 0.707, 925_944_364),
        ("resnet18", 1.414, 3_546_153_104),
        ("resnet18", 1.732, 5_297_740_401),
        ("mobilenet_v2", 0.312, 36_162_140),
        ("mobilenet_v2", 0.5, 83_402_176),
        ("mobilenet_v2", 0.707, 157_248_810),
        ("mobilenet_v2", 1.414, 582_391_939),
        ("mobilenet_v2", 1.732, 861_313_028),
    ],
)
def test_macs_at_a_width_multiplier_are_the_published_ones(traced, name, width, published):
    _, graph = traced(name)
    assert graph.macs(scale_channels(graph, width)) == published


@pytest.mark.parametrize(("name", "variables"), NETWORKS.items())
def test_the_number_of_free_width_variables_is_that_of_the_topology(traced, name, variables):
    assert len(traced(name)[1].free) == variables


@pytest.mark.parametrize("name", ALL)
def test_every_layer_and_normalisation_of_a_network_is_in_its_graph(traced, name):
    model, graph = traced(name)
    weighted = (nn.modules.conv._ConvNd, nn.Linear)  # noqa: SLF001
    layers = {n for n, module in model.named_modules() if isinstance(module, weighted)}
    norms = {
        n
        for n, module in model.named_modules()
        if isinstance(module, (nn.modules.batchnorm._BatchNorm, nn.LayerNorm))  # noqa: SLF001
    }
    assert {layer.name for layer in graph.layers} == layers
    called = {norm.name for norm in graph.norms}
    read = {parameter.name.rpartition(".")[0] for parameter in graph.parameters}
    assert called <= norms <= called | read  # the forward code may read parameters directly
    gammas = {norm.name for norm in graph.norms if norm.gamma}
    assert gammas == {n for n in norms if not isinstance(model.get_submodule(n), nn.LayerNorm)}


def ties_of_resnet18():
    """BatchNorms whose channels are tied, by hand (docs/algorithms/morphnet.md, 1.1)."""
    inner = [{f"layer{stage}.{block}.bn1"} for stage in (1, 2, 3, 4) for block in (0, 1)]
    streams = [
        {f"layer{stage}.0.bn2", f"layer{stage}.0.downsample.1", f"layer{stage}.1.bn2"}
        for stage in (2, 3, 4)
    ]
    return [{"bn1", "layer1.0.bn2", "layer1.1.bn2"}, *streams, *inner]


def ties_of_mobilenet_v2():
    """Expansion and depthwise layer of a block, and the projections of a stage."""
    expansions = [
        {f"features.{block}.conv.0.1", f"features.{block}.conv.1.1"} for block in range(2, 18)
    ]
    stages = [(2, 3), (4, 5, 6), (7, 8, 9, 10), (11, 12, 13), (14, 15, 16), (17,)]
    streams = [{f"features.{block}.conv.3" for block in blocks} for blocks in stages]
    stem = {"features.0.1", "features.1.conv.0.1"}
    return [stem, {"features.1.conv.2"}, *expansions, *streams, {"features.18.1"}]


@pytest.mark.parametrize(
    ("name", "ties", "slots", "classes"),
    [
        ("resnet18", ties_of_resnet18(), 4_800, 2_880),
        ("mobilenet_v2", ties_of_mobilenet_v2(), 17_056, 9_128),
    ],
)
def test_tied_batchnorms_are_those_of_the_hand_written_table(traced, name, ties, slots, classes):
    _, graph = traced(name)
    members = {}
    for norm in graph.norms:
        (span,) = norm.axis
        assert (span.start, span.classes) == (0, graph.variables[span.variable].classes)
        members.setdefault(span.variable, set()).add(norm.name)
    assert sorted(map(sorted, members.values())) == sorted(map(sorted, ties))
    assert len(members) == len(graph.free)
    assert sum(graph.length(norm.axis) for norm in graph.norms) == slots
    assert sum(variable.classes for variable in graph.free.values()) == classes


def test_variables_are_named_after_their_first_writer_in_forward_order(traced):
    _, graph = traced("resnet18")
    assert list(graph.free)[:6] == [
        "conv1",
        "layer1.0.conv1",
        "layer1.1.conv1",
        "layer2.0.conv1",
        "layer2.0.conv2",
        "layer2.1.conv1",
    ]
    assert graph.free["conv1"].writers == ("conv1", "layer1.0.conv2", "layer1.1.conv2")
    assert graph.free["layer2.0.conv2"].writers == (
        "layer2.0.conv2",
        "layer2.0.downsample.0",
        "layer2.1.conv2",
    )


def test_a_densenet_channel_is_in_every_later_batchnorm_of_its_block(traced):
    _, graph = traced("densenet121")
    name = "features.denseblock1.denselayer2.conv2"
    index = [variable.name for variable in graph.variables].index(name)
    readers = {norm.name for norm in graph.norms if index in graph.form(norm.axis)}
    later = {f"features.denseblock1.denselayer{layer}.norm1" for layer in range(3, 7)}
    assert readers == later | {"features.transition1.norm"}


def test_a_removed_channel_of_a_branch_removes_an_input_of_every_reader(traced):
    """docs/algorithms/morphnet.md, P20."""
    _, graph = traced("densenet121")
    name = "features.denseblock1.denselayer2.conv2"
    fewer = graph.resize_graph({**graph.channels, name: graph.channels[name] - 1})
    shorter = {
        old.name
        for old, new in zip(graph.layers, fewer.layers, strict=True)
        if graph.length(old.reads) - fewer.length(new.reads) == 1
    }
    later = {f"features.denseblock1.denselayer{layer}.conv1" for layer in range(3, 7)}
    assert shorter == later | {"features.transition1.conv"}


def test_the_classes_of_a_grouped_convolution_are_its_groups(traced):
    _, graph = traced("resnext50_32x4d")
    inner = graph.free["layer1.0.conv1"]
    assert (inner.channels, inner.unit) == (128, 4)
    assert inner.writers == ("layer1.0.conv1", "layer1.0.conv2")


def test_a_trace_does_not_change_the_network():
    model = TorchvisionNetwork("resnet18").build(depth=1, classes=10)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trace(model, 32)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class Net(nn.Module):
    """Layers by name, and a forward pass."""

    def __init__(self, forward, **layers):
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer)
        self.body = forward

    def forward(self, images):
        return self.body(self, images)


def conv(ins, outs, kernel=1, **options):
    return nn.Conv2d(ins, outs, kernel, padding=kernel // 2, bias=False, **options)


def halves(net, images):
    first, second = net.a(images).chunk(2, 1)
    return net.d(torch.cat([net.b(first), net.c(second)], 1))


def sections(net, images):
    first, second = torch.split(net.a(images), [2, 6], dim=1)
    return net.d(torch.cat([net.b(first), net.c(second)], 1))


def slices(net, images):
    x = net.a(images)
    return net.d(torch.cat([net.b(x[:, :2]), net.c(x[:, 2:])], 1))


def shuffle(net, images):
    x = net.a(images)
    batch, channels, height, width = x.size()
    x = x.view(batch, 2, channels // 2, height, width).transpose(1, 2).contiguous()
    first, second = x.view(batch, -1, height, width).chunk(2, dim=1)
    return net.d(torch.cat([net.b(first), net.c(second)], 1))


def gate(net, images):
    x = net.a(images)
    gate = torch.sigmoid(net.grow(torch.relu(net.squeeze(x.mean((2, 3), keepdim=True)))))
    return net.c(x * gate)


def gate_spatially(net, images):
    x = net.a(images)
    return net.c(x * torch.sigmoid(net.gate(x)) * x.mean(1, keepdim=True))


def last_axis(net, images):
    x = net.norm(net.a(images).permute(0, 2, 3, 1))
    return net.c(torch.relu(net.lin(x)).permute(0, 3, 1, 2))


def squeeze(net, images):
    return net.lin(net.pool(net.a(images)).squeeze(-1).squeeze(-1).unsqueeze(1))


def scaled_layer(net, images):
    return net.c(net.a(images) * net.scale.weight)


class Scale(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(size, 1, 1))


SPLIT = {"a": conv(3, 8), "d": conv(10, 5)}

# The network; its free variables (channels, unit, writers); its MACs at the counts n, by hand.
# Images are 8 x 8, so there are 64 positions.
SMALL = {
    "chain": (
        Net(lambda s, x: s.c(s.b(s.a(x))), a=conv(3, 8, 3), b=conv(8, 8), c=conv(8, 5)),
        {"a": (8, 1, "a"), "b": (8, 1, "b")},
        lambda n: 64 * (27 * n["a"] + n["a"] * n["b"] + 5 * n["b"]),
    ),
    "strides": (
        Net(lambda s, x: s.b(s.a(x)), a=conv(3, 8, 3, stride=2), b=conv(8, 5, 3, stride=2)),
        {"a": (8, 1, "a")},
        lambda n: 16 * 27 * n["a"] + 4 * 9 * 5 * n["a"],
    ),
    "sum": (
        Net(
            lambda s, x: s.c(torch.relu(s.a(x)) + s.b(x)),
            a=conv(3, 8),
            b=conv(3, 8),
            c=conv(8, 5),
        ),
        {"a": (8, 1, "a b")},
        lambda n: 64 * (3 + 3 + 5) * n["a"],
    ),
    "sum in place": (
        Net(lambda s, x: s.c(s.a(x).add_(s.b(x))), a=conv(3, 8), b=conv(3, 8), c=conv(8, 5)),
        {"a": (8, 1, "a b")},
        lambda n: 64 * (3 + 3 + 5) * n["a"],
    ),
    "concatenation": (
        Net(
            lambda s, x: s.d(s.c(torch.cat([s.a(x), s.b(x)], 1))),
            a=conv(3, 5),
            b=conv(3, 7),
            c=conv(12, 4, 3),
            d=conv(4, 5),
        ),
        {"a": (5, 1, "a"), "b": (7, 1, "b"), "c": (4, 1, "c")},
        lambda n: 64 * (3 * n["a"] + 3 * n["b"] + 9 * (n["a"] + n["b"]) * n["c"] + 5 * n["c"]),
    ),
    "concatenation of a tensor with itself": (
        Net(
            lambda s, x: s.c(torch.cat([s.a(x)] * 2, dim=1)),
            a=conv(3, 4),
            c=conv(8, 5),
        ),
        {"a": (4, 1, "a")},
        lambda n: 64 * (3 * n["a"] + 5 * 2 * n["a"]),
    ),
    "sum with a concatenation": (
        Net(
            lambda s, x: s.d(torch.cat([s.a(x), s.b(x)], 1) + s.c(x)),
            a=conv(3, 5),
            b=conv(3, 7),
            c=conv(3, 12),
            d=conv(12, 5),
        ),
        {"a": (5, 1, "a c"), "b": (7, 1, "b c")},
        lambda n: 64 * (3 + 3 + 5) * (n["a"] + n["b"]),
    ),
    "chunk": (
        Net(halves, b=conv(4, 4), c=conv(4, 6), **SPLIT),
        {"a": (4, 1, "a"), "a:2": (4, 1, "a"), "b": (4, 1, "b"), "c": (6, 1, "c")},
        lambda n: (
            64
            * (
                3 * (n["a"] + n["a:2"])
                + n["a"] * n["b"]
                + n["a:2"] * n["c"]
                + 5 * (n["b"] + n["c"])
            )
        ),
    ),
    "split": (
        Net(sections, b=conv(2, 4), c=conv(6, 6), **SPLIT),
        {"a": (2, 1, "a"), "a:2": (6, 1, "a"), "b": (4, 1, "b"), "c": (6, 1, "c")},
        lambda n: (
            64
            * (
                3 * (n["a"] + n["a:2"])
                + n["a"] * n["b"]
                + n["a:2"] * n["c"]
                + 5 * (n["b"] + n["c"])
            )
        ),
    ),
    "slice": (
        Net(slices, b=conv(2, 4), c=conv(6, 6), **SPLIT),
        {"a": (2, 1, "a"), "a:2": (6, 1, "a"), "b": (4, 1, "b"), "c": (6, 1, "c")},
        lambda n: (
            64
            * (
                3 * (n["a"] + n["a:2"])
                + n["a"] * n["b"]
                + n["a:2"] * n["c"]
                + 5 * (n["b"] + n["c"])
            )
        ),
    ),
    "channel shuffle": (
        Net(shuffle, b=conv(4, 4), c=conv(4, 6), **SPLIT),
        {"a": (4, 1, "a"), "a:2": (4, 1, "a"), "b": (4, 1, "b"), "c": (6, 1, "c")},
        lambda n: (
            64
            * (
                3 * (n["a"] + n["a:2"])
                + n["a"] * n["b"]
                + n["a:2"] * n["c"]
                + 5 * (n["b"] + n["c"])
            )
        ),
    ),
    "channel shuffle module": (
        Net(lambda s, x: s.b(s.mix(s.a(x))), a=conv(3, 8), mix=nn.ChannelShuffle(2), b=conv(8, 5)),
        {"a": (8, 1, "a")},
        lambda n: 64 * (3 + 5) * n["a"],
    ),
    "gate": (
        Net(gate, a=conv(3, 8), squeeze=conv(8, 2), grow=conv(2, 8), c=conv(8, 5)),
        {"a": (8, 1, "a grow"), "squeeze": (2, 1, "squeeze")},
        lambda n: 64 * (3 + 5) * n["a"] + 2 * n["a"] * n["squeeze"],
    ),
    "one gate for all channels": (
        Net(gate_spatially, a=conv(3, 8), gate=conv(8, 1), c=conv(8, 5)),
        {"a": (8, 1, "a")},
        lambda n: 64 * (3 + 1 + 5) * n["a"],
    ),
    "depthwise": (
        Net(
            lambda s, x: s.c(s.deep(s.a(x))),
            a=conv(3, 8),
            deep=conv(8, 8, 3, groups=8),
            c=conv(8, 5),
        ),
        {"a": (8, 1, "a deep")},
        lambda n: 64 * (3 + 9 + 5) * n["a"],
    ),
    "depthwise with a multiplier": (
        Net(
            lambda s, x: s.c(s.deep(s.a(x))),
            a=conv(3, 4),
            deep=conv(4, 12, 3, groups=4),
            c=conv(12, 5),
        ),
        {"a": (4, 1, "a deep")},
        lambda n: 64 * (3 + 9 * 3 + 5 * 3) * n["a"],
    ),
    "grouped": (
        Net(
            lambda s, x: s.c(s.g(s.a(x))),
            a=conv(3, 8),
            g=conv(8, 12, 3, groups=4),
            c=conv(12, 5),
        ),
        # A class is a group: 2 channels in, 3 out; the count is that of the first writer.
        {"a": (8, 2, "a g")},
        lambda n: 64 * (3 * n["a"] + 9 * 2 * (n["a"] // 2 * 3) + 5 * (n["a"] // 2 * 3)),
    ),
    "transposed": (
        Net(
            lambda s, x: s.c(s.up(s.a(x))),
            a=conv(3, 8, stride=2),
            up=nn.ConvTranspose2d(8, 6, 2, stride=2, bias=False),
            c=conv(6, 5),
        ),
        {"a": (8, 1, "a"), "up": (6, 1, "up")},
        lambda n: 16 * 3 * n["a"] + 16 * 4 * n["a"] * n["up"] + 64 * 5 * n["up"],
    ),
    "flatten": (
        Net(
            lambda s, x: s.lin(torch.flatten(s.pool(s.a(x)), 1)),
            a=conv(3, 4),
            pool=nn.AdaptiveAvgPool2d(2),
            lin=nn.Linear(16, 10),
        ),
        {"a": (4, 1, "a")},
        lambda n: 64 * 3 * n["a"] + 4 * n["a"] * 10,
    ),
    "view by the batch": (
        Net(
            lambda s, x: s.lin(s.a(x).view(x.size(0), -1)),
            a=conv(3, 4),
            lin=nn.Linear(256, 10),
        ),
        {"a": (4, 1, "a")},
        lambda n: 64 * 3 * n["a"] + 64 * n["a"] * 10,
    ),
    "view to a literal size": (
        Net(lambda s, x: s.lin(s.a(x).view(-1, 256)), a=conv(3, 4), lin=nn.Linear(256, 10)),
        {"a": (4, 1, "a")},
        lambda n: 64 * 3 * n["a"] + 64 * n["a"] * 10,
    ),
    "half of a flatten": (
        Net(
            lambda s, x: s.lin(torch.flatten(s.a(x), 1)[:, 128:]),
            a=conv(3, 4),
            lin=nn.Linear(128, 10),
        ),
        {"a": (2, 1, "a"), "a:2": (2, 1, "a")},
        lambda n: 64 * 3 * (n["a"] + n["a:2"]) + 64 * n["a:2"] * 10,
    ),
    "a module called twice in a row": (
        Net(lambda s, x: s.c(s.b(s.b(s.a(x)))), a=conv(3, 8), b=conv(8, 8), c=conv(8, 5)),
        {"a": (8, 1, "a b")},
        lambda n: 64 * (3 * n["a"] + 2 * n["a"] ** 2 + 5 * n["a"]),
    ),
    "a module called on two tensors": (
        Net(
            lambda s, x: s.d(s.c(s.a(x)) + s.c(s.b(x))),
            a=conv(3, 8),
            b=conv(3, 8),
            c=conv(8, 6),
            d=conv(6, 5),
        ),
        {"a": (8, 1, "a b"), "c": (6, 1, "c")},
        lambda n: 64 * (6 * n["a"] + 2 * n["a"] * n["c"] + 5 * n["c"]),
    ),
    "layer scale": (
        Net(scaled_layer, a=conv(3, 8), scale=Scale(8), c=conv(8, 5)),
        {"a": (8, 1, "a")},
        lambda n: 64 * (3 + 5) * n["a"],
    ),
    "GroupNorm": (
        Net(lambda s, x: s.c(s.norm(s.a(x))), a=conv(3, 8), norm=nn.GroupNorm(2, 8), c=conv(8, 5)),
        {"a": (8, 2, "a")},  # equal numbers of channels in two groups
        lambda n: 64 * (3 + 5) * n["a"],
    ),
    "PReLU": (
        Net(lambda s, x: s.c(s.act(s.a(x))), a=conv(3, 8), act=nn.PReLU(8), c=conv(8, 5)),
        {"a": (8, 1, "a")},
        lambda n: 64 * (3 + 5) * n["a"],
    ),
    "channels last": (
        Net(last_axis, a=conv(3, 8), norm=nn.LayerNorm(8), lin=nn.Linear(8, 6), c=conv(6, 5)),
        {"a": (8, 1, "a"), "lin": (6, 1, "lin")},
        lambda n: 64 * (3 * n["a"] + n["a"] * n["lin"] + 5 * n["lin"]),
    ),
    "squeeze and unsqueeze": (
        Net(squeeze, a=conv(3, 8), pool=nn.AdaptiveAvgPool2d(1), lin=nn.Linear(8, 10)),
        {"a": (8, 1, "a")},
        lambda n: (64 * 3 + 10) * n["a"],
    ),
    "a number, and pixel statistics": (
        Net(
            lambda s, x: s.c(2 * s.a((x - s.mean.weight) / 0.5) + 1),
            a=conv(3, 8),
            mean=Scale(3),
            c=conv(8, 5),
        ),
        {"a": (8, 1, "a")},
        lambda n: 64 * (3 + 5) * n["a"],
    ),
}


@pytest.mark.parametrize("kind", SMALL)
def test_tied_channels_are_those_of_the_topology(kind):
    net, variables, _ = SMALL[kind]
    free = trace(net, 8).free
    traced = {name: (var.channels, var.unit, " ".join(var.writers)) for name, var in free.items()}
    assert traced == variables


@pytest.mark.parametrize("kind", SMALL)
@pytest.mark.parametrize("step", [-1, 0, 3])
def test_macs_at_any_counts_are_those_by_hand_and_those_of_the_resized_network(counted, kind, step):
    net, variables, by_hand = SMALL[kind]
    graph = trace(net, 8)
    channels = {
        name: max(unit, count + step * unit * (number + 1))
        for number, (name, (count, unit, _)) in enumerate(variables.items())
    }
    assert graph.macs(channels) == by_hand(channels)
    assert counted(resize(net, graph, channels), 8) == by_hand(channels)


@pytest.mark.parametrize(
    ("kind", "first"), [("chunk", [0, 1, 2, 3]), ("channel shuffle", [0, 1, 4, 5])]
)
def test_each_branch_behind_a_shuffle_reads_the_right_channels(kind, first):
    graph = trace(SMALL[kind][0], 8)
    written = next(layer.writes for layer in graph.layers if layer.name == "a")
    owners = [graph.variables[span.variable].name for span in written for _ in range(span.classes)]
    assert [place for place, owner in enumerate(owners) if owner == "a"] == first


def test_equal_sizes_alone_tie_nothing():
    layers = {name: conv(8, 8) for name in "bcdefg"}
    net = Net(
        lambda s, x: s.g(s.f(s.e(s.d(s.c(s.b(s.a(x))))))),
        a=conv(3, 8),
        **layers,
    )
    writers = [variable.writers for variable in trace(net, 8).free.values()]
    assert writers == [(name,) for name in "abcdef"]


def test_every_output_of_a_network_is_fixed():
    net = Net(lambda s, x: {"b": s.b(s.a(x)), "c": [s.c(s.a(x))]}, a=conv(3, 8), b=conv(8, 5),
              c=conv(8, 4))  # fmt: skip
    assert list(trace(net, 8).free) == ["a"]


def test_a_sum_with_the_image_is_fixed():
    net = Net(lambda s, x: s.b(s.a(x) + x), a=conv(3, 3), b=conv(3, 5))
    assert not trace(net, 8).free


def test_the_graph_has_the_given_stages():
    graph = trace(SMALL["chain"][0], 8, stages=[("stage1", ["a", "b"])])
    assert [(stage.name, stage.blocks) for stage in graph.stages] == [("stage1", ("a", "b"))]


class Twice(nn.Module):
    """Works on each channel alone, but has no rule."""

    def forward(self, x):
        return 2 * x if x.mean() > 0 else x


def fold(first, second):
    """An elementwise operation without a rule."""
    return first + second if first.sum() > 0 else first


class Inner(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = conv(3, 8)

    def forward(self, images):
        return torch.cumsum(self.a(images), 1)


torch.fx.wrap("fold")


@pytest.mark.parametrize(
    ("net", "operation", "node", "place"),
    [
        (
            Net(lambda s, x: s.c(s.grow(s.a(x))), a=conv(3, 8), grow=nn.PixelShuffle(2),
                c=conv(2, 5)),
            "PixelShuffle", "grow", "module `grow`",
        ),
        (
            Net(lambda s, x: s.b(s.inner(x)), inner=Inner(), b=conv(8, 5)),
            "cumsum", "cumsum", "module `inner`",
        ),
        (
            Net(lambda s, x: torch.roll(s.a(x), 1, 1), a=conv(3, 8)),
            "roll", "roll", "the forward of the network",
        ),
        (
            Net(lambda s, x: fold(s.a(x), s.b(x)), a=conv(3, 8), b=conv(3, 8)),
            "fold", "fold", "the forward of the network",
        ),
    ],
    ids=["module", "inside a module", "function", "wrapped function"],
)  # fmt: skip
def test_an_operation_without_a_rule_is_named_with_its_place_and_the_remedy(
    net, operation, node, place
):
    message = (
        f"network operation is `{operation}` (node `{node}` in {place}), but no rule describes "
        "what it does to channels; add a rule for it to trace(rules={...}) or network.rules, for "
        "example widthopt.tracing.same_channels if it works on each channel alone"
    )
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        trace(net, 8)


def test_a_rule_by_module_type_is_used():
    net = Net(lambda s, x: s.b(s.twice(s.a(x))), a=conv(3, 8), twice=Twice(), b=conv(8, 5))
    graph = trace(net, 8, rules={Twice: same_channels})
    assert graph.channels == {"a": 8}
    assert graph.macs({"a": 3}) == 64 * (3 + 5) * 3


def test_a_rule_by_function_is_used():
    net = Net(lambda s, x: s.c(fold(s.a(x), s.b(x))), a=conv(3, 8), b=conv(3, 8), c=conv(8, 5))
    graph = trace(net, 8, rules={fold: tied_channels})
    assert {name: var.writers for name, var in graph.free.items()} == {"a": ("a", "b")}


def test_a_rule_of_the_user_replaces_the_built_in_rule():
    calls = []

    def rule(call):
        calls.append((call.name, call.before, call.shape))
        return call.args[0]

    net = Net(lambda s, x: s.b(s.act(s.a(x))), a=conv(3, 8), act=nn.ReLU(), b=conv(8, 5))
    trace(net, 8, rules={nn.ReLU: rule})
    assert calls == [("act", (1, 8, 8, 8), (1, 8, 8, 8))]


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (lambda s, x: s.a(x)[:, 2], "it selects a single channel"),
        (
            lambda s, x: s.a(x)[:, [1, 0]],
            "it indexes with something other than integers and slices",
        ),
        (lambda s, x: s.a(x)[:, :4, :2], "it slices channels and positions in one operation"),
        (lambda s, x: functional.pad(s.a(x), (0, 0, 0, 0, 1, 1)), "it pads the channels"),
        (
            lambda s, x: s.a(x).permute(0, 2, 3, 1).flatten(1),
            "it merges the channels with an axis before them",
        ),
        (
            lambda s, x: s.a(x) * torch.ones(8, 1, 1),
            "an operand has an entry per channel, but no known origin",
        ),
        (
            lambda s, x: s.a(x).flatten(1) + s.lin(x.mean((2, 3))),
            "it combines tensors whose channels do not match",
        ),
        (
            lambda s, x: s.a(x) + s.a(x).permute(0, 2, 1, 3),
            "it combines tensors whose channels are on different axes",
        ),
        (
            lambda s, x: torch.cat([s.a(x), s.a(x).permute(0, 2, 1, 3)], 1),
            "it concatenates tensors whose channels have different layouts",
        ),
        (
            lambda s, x: torch.cat([s.a(x), x.mean(1, keepdim=True)], 1),
            "it concatenates tensors with channels and tensors without",
        ),
        (
            lambda s, x: s.a(x).view(1, 2, 2, 2, 8, 8).mean(2),
            "it splits the channels, but is not part of a channel shuffle",
        ),
        (lambda s, x: s.a(x).view(-1, 8, 64), "it has a literal channel count: write -1 instead"),
        (lambda s, x: s.small(s.a(x).permute(0, 2, 3, 1)), "its input has no channels on axis 1"),
        (lambda s, x: s.row(s.a(x)), "its input has no channels on the last axis"),
        (lambda s, x: s.norm(s.a(x)), "it normalises axes other than the channels"),
        (lambda s, x: s.a(x).flatten(1)[:, :96], "it splits a flattened channel"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_ambiguous_case_of_a_rule_is_refused(forward, reason):
    net = Net(
        forward,
        a=conv(3, 8),
        lin=nn.Linear(3, 512),
        small=conv(8, 4),
        row=nn.Linear(8, 4),
        norm=nn.LayerNorm([8, 8, 8]),
    )
    with pytest.raises(InputError, match=f"^network operation is .*but .*{reason}; add a rule"):
        trace(net, 8)


@pytest.mark.parametrize(
    "forward",
    [
        lambda s, x: s.a(x) if x.sum() > 0 else x,
        lambda s, x: s.a(x) * [1, 2][int(x.max())],
        lambda s, x: sum(s.a(image) for image in x),
    ],
    ids=["branch", "index", "loop"],
)
def test_forward_code_that_depends_on_values_is_refused_in_one_line(forward):
    with pytest.raises(
        InputError,
        match=r"^network is Net, but torch.fx cannot trace it \(.*\); move the code that depends "
        r"on values into a separate module and add a rule for it$",
    ):
        trace(Net(forward, a=conv(3, 8)), 8)


@pytest.mark.parametrize(
    ("name", "resolution", "message"),
    [
        ("resnet18", 16, r"`layer\d\..*` has a stride on a map of a single pixel"),
        ("mobilenet_v2", 8, r"`features\..*` has a stride on a map of a single pixel"),
        ("resnet18", 2, "`maxpool` has a stride on a map of a single pixel"),
        (
            "alexnet",
            32,
            r"node `features_12` in module `features.12` fails on images of this size ",
        ),
    ],
)
def test_an_image_too_small_for_the_strides_is_refused(name, resolution, message):
    with torch.device("meta"):
        model = TorchvisionNetwork(name).build(depth=1, classes=10)
    with pytest.raises(
        AxisError,
        match=f"^resolution is {resolution}, but {message}.*; use a larger resolution.*$",
    ) as error:
        trace(model, resolution)
    assert error.value.axis == "resolution"


def test_the_smallest_image_for_the_strides_is_accepted(counted):
    model = TorchvisionNetwork("resnet18").build(depth=1, classes=10)
    assert trace(model, 17).macs() == counted(model, 17)


class _SharedNorm(nn.Module):
    """Two convolutions whose outputs pass the same BatchNorm."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 5, 3), nn.Conv2d(5, 5, 1)
        self.norm, self.head = nn.BatchNorm2d(5), nn.Linear(5, 2)

    def forward(self, x):
        x = self.norm(self.second(self.norm(self.first(x))))
        return self.head(x.mean((2, 3)))


def test_layers_with_a_shared_batchnorm_have_the_same_width():
    model = _SharedNorm()
    graph = trace(model, 8)
    assert graph.channels == {"first": 5}
    smaller = resize(model, graph, {"first": 4})
    assert smaller.eval()(torch.zeros(1, 3, 8, 8)).shape == (1, 2)
