import re
import sys
import textwrap
import uuid

import pytest
import torch
from small import make_setting
from torch import nn
from torchvision import models

from widthopt.errors import InputError
from widthopt.networks import CustomNetwork, TorchvisionNetwork
from widthopt.networks.resize import Blueprint


def stages(name, depth=1):
    network = TorchvisionNetwork(name)
    with torch.device("cpu" if "regnet" in name else "meta"):
        model = network.build(depth=depth, classes=10)
    return model, [len(blocks) for _, blocks in network.stages(model)]


@pytest.mark.parametrize(
    ("name", "depth", "published"),
    [
        ("resnet18", 1, 1_814_073_344),
        ("resnet18", 2, 3_663_761_408),
        ("resnet18", 3, 5_513_449_472),
        ("resnet18", 4, 7_363_137_536),
        ("mobilenet_v2", 1, 300_774_272),
        ("mobilenet_v2", 2, 540_969_920),
        ("mobilenet_v2", 3, 781_165_568),
        ("mobilenet_v2", 4, 1_021_361_216),
    ],
)
def test_macs_at_a_depth_multiplier_are_the_published_ones(traced, name, depth, published):
    assert traced(name, depth=depth)[1].macs() == published


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
@pytest.mark.parametrize(
    ("name", "fixed", "repeated"), [("resnet18", 4, 8), ("mobilenet_v2", 10, 15)]
)
def test_a_network_has_as_many_width_variables_as_its_depth_makes(
    traced, name, depth, fixed, repeated
):
    """docs/algorithms/autoslim.md, property 5."""
    assert len(traced(name, depth=depth)[1].free) == fixed + repeated * depth


@pytest.mark.parametrize(
    ("name", "width", "macs", "parameters"),
    [
        ("mobilenet_v2", 1.0, 300_774_272, 3_504_872),
        ("resnet18", 1.0, 1_814_073_344, 11_689_512),
        ("resnet18", 1.5, 3_992_770_560, 25_901_896),
    ],
)
def test_macs_and_parameters_at_a_width_are_the_published_ones(name, width, macs, parameters):
    """docs/algorithms/autoslim.md, 3.3."""
    network = Blueprint(make_setting(name, classes=1000, width=width, resolution=224))
    assert network.graph.macs() == macs
    model = network.build(network.graph.channels, seed=0)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


def test_the_first_and_last_stage_of_mobilenet_v2_are_not_repeated():
    model, blocks = stages("mobilenet_v2", 3)
    assert blocks == [1, 6, 9, 12, 9, 9, 1]
    assert [model.features[place].conv[-1].num_features for place in (1, 2, 7, 46, 47)] == [
        16,
        24,
        24,
        160,
        320,
    ]


@pytest.mark.parametrize(
    ("name", "blocks"),
    [
        ("resnet18", [2, 2, 2, 2]),
        ("resnet50", [3, 4, 6, 3]),
        ("wide_resnet50_2", [3, 4, 6, 3]),
        ("regnet_x_400mf", [1, 2, 7, 12]),
        ("regnet_y_400mf", [1, 3, 6, 6]),
        ("efficientnet_b0", [1, 2, 2, 3, 3, 4, 1]),
        ("efficientnet_v2_s", [2, 4, 4, 6, 9, 15]),
        ("convnext_tiny", [3, 3, 9, 3]),
        ("densenet121", [6, 12, 24, 16]),
    ],
)
@pytest.mark.parametrize("depth", [1, 2])
def test_each_stage_has_its_blocks_times_the_depth_multiplier(name, blocks, depth):
    assert stages(name, depth)[1] == [depth * count for count in blocks]


@pytest.mark.parametrize(
    ("name", "blocks"),
    [
        ("mobilenet_v3_large", [1, 2, 3, 4, 2, 3]),
        ("mobilenet_v3_small", [1, 2, 3, 2, 3]),
        ("mnasnet1_0", [3, 3, 3, 2, 4, 1]),
        ("shufflenet_v2_x1_0", [4, 8, 4]),
        ("vgg11", []),
        ("inception_v3", []),
    ],
)
def test_a_network_has_stages_only_if_its_topology_has_them(name, blocks):
    assert stages(name)[1] == blocks


@pytest.mark.parametrize("name", ["resnet18", "efficientnet_b0", "mobilenet_v3_large"])
def test_stages_name_modules_in_forward_order(name):
    network = TorchvisionNetwork(name)
    model = network.build(depth=1, classes=10)
    order = [module for module, _ in model.named_modules()]
    names = [block for _, blocks in network.stages(model) for block in blocks]
    assert names == sorted(names, key=order.index)


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("wide_resnet50_2", lambda model: model.layer1[5].conv2.out_channels == 128),
        ("resnext50_32x4d", lambda model: model.layer1[5].conv2.groups == 32),
        ("regnet_y_400mf", lambda model: hasattr(model.trunk_output.block1[0].f, "se")),
        ("efficientnet_v2_s", lambda model: model.features[0][1].eps == 1e-3),
        ("densenet121", lambda model: model.features.conv0.out_channels == 64),
        ("convnext_tiny", lambda model: model.features[1][5].stochastic_depth.p > 0),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_deeper_network_keeps_the_constructor_arguments_besides_its_depth(name, kept):
    shallow, deep = stages(name)[0], stages(name, 2)[0]
    assert type(deep) is type(shallow)
    assert kept(deep)
    last = [list(model.modules())[-1] for model in (shallow, deep)]
    assert last[0].out_features == last[1].out_features == 10


@pytest.mark.parametrize("name", ["mobilenet_v3_large", "vgg11", "shufflenet_v2_x1_0", "alexnet"])
def test_a_depth_is_refused_for_a_network_without_depths(name):
    with pytest.raises(
        InputError,
        match=rf"^depth is 2, but torchvision's builder of {name} takes no depths; use depth 1, or "
        "a ResNet, RegNet, EfficientNet, ConvNeXt, DenseNet or mobilenet_v2$",
    ):
        TorchvisionNetwork(name).build(depth=2, classes=10)


def test_a_constructor_is_restored_after_a_deeper_build():
    original = models.ResNet.__init__
    TorchvisionNetwork("resnet18").build(depth=2, classes=10)
    assert models.ResNet.__init__ is original


@pytest.mark.parametrize(
    ("name", "choice"),
    [("resnet17", "resnet101, resnet152, resnet18"), ("lenet", "alexnet"), ("vit_b_16", "alexnet")],
)
def test_an_unknown_name_is_refused_with_a_list_of_names(name, choice):
    with pytest.raises(
        InputError,
        match=f"^network.name is {name}, but torchvision has no such classification CNN; choose "
        f"among {choice}",
    ):
        TorchvisionNetwork(name)


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_auxiliary_heads_are_off(name):
    with torch.device("meta"):
        model = TorchvisionNetwork(name).build(depth=1, classes=10)
    assert not any("aux" in key.lower() for key in model.state_dict())


def test_torchvisions_networks_need_no_rules():
    assert TorchvisionNetwork("resnet18").rules == {}


SOURCE = """
import torch
from torch import nn
from widthopt.tracing import same_channels


class Twice(nn.Module):
    def forward(self, x):
        return 2 * x if x.sum() > 0 else x


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)
        self.twice = Twice()

    def forward(self, x):
        return x + self.twice(self.conv(x))


class Tower(nn.Module):
    def __init__(self, num_classes, width, depth=1):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3)
        self.body = nn.Sequential(*(Block(width) for _ in range(2 * depth)))
        self.head = nn.Linear(width, num_classes)

    def forward(self, x):
        return self.head(self.body(self.stem(x)).mean((2, 3)))


def shallow(num_classes, width=8):
    return Tower(num_classes, width)


def nothing(num_classes):
    return 3


def keeps(call):
    return same_channels(call)
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Write a module into a folder on the path; return its name."""
    name = f"user_{uuid.uuid4().hex[:8]}"
    (tmp_path / f"{name}.py").write_text(textwrap.dedent(SOURCE))
    monkeypatch.syspath_prepend(tmp_path)
    yield name
    sys.modules.pop(name, None)


def custom(factory, *, arguments=None, stages_in=(), rules_for=None):
    return CustomNetwork("tower", factory, arguments or {}, stages_in, rules_for or {})


def test_a_custom_network_is_imported_and_built(module):
    model = custom(f"{module}.Tower", arguments={"width": 6}).build(depth=1, classes=4)
    assert isinstance(model, nn.Module)
    assert model.stem.out_channels == 6
    assert model.head.out_features == 4


def test_a_factory_that_takes_a_depth_gets_it(module):
    network = custom(f"{module}.Tower", arguments={"width": 6})
    assert len(network.build(depth=3, classes=4).body) == 6


def test_a_custom_network_is_resized_by_its_rules_and_has_its_stages(module, counted):
    network = custom(
        f"{module}.Tower",
        arguments={"width": 6},
        stages_in=["body"],
        rules_for={f"{module}.Twice": f"{module}.keeps"},
    )
    plan = Blueprint(make_setting(network, width=0.5, depth=2))
    assert plan.graph.channels == {"stem": 3}
    assert [(stage.name, stage.blocks) for stage in plan.graph.stages] == [
        ("body", ("body.0", "body.1", "body.2", "body.3"))
    ]
    # 6 x 6 positions: 3 -> 3, four times 3 -> 3, and the classifier.
    assert plan.graph.macs() == 36 * 9 * 9 + 4 * 36 * 9 * 9 + 3 * 4
    assert counted(plan.build({"stem": 5}, seed=0), 8) == plan.graph.macs({"stem": 5})


def test_a_custom_network_without_its_rule_is_refused(module):
    network = custom(f"{module}.Tower", arguments={"width": 6})
    with pytest.raises(InputError, match=r"^network is Tower, but torch\.fx cannot trace it"):
        Blueprint(make_setting(network))


def test_no_stages_and_no_rules_are_the_default(module):
    network = custom(f"{module}.shallow")
    assert network.stages(network.build(depth=1, classes=4)) == []
    assert network.rules == {}


def user_errors():
    """Return pairs of a function with an error, called with the module's name, and its message."""
    return [
        (
            lambda m: custom(f"{m}.shallow").build(depth=2, classes=4),
            (
                "depth is 2, but {m}.shallow takes no argument `depth`; add the argument, or use "
                "depth 1"
            ),
        ),
        (
            lambda m: custom(f"{m}.shallow", arguments={"wide": 3}).build(depth=1, classes=4),
            (
                "network.factory is {m}.shallow, but it cannot be called with num_classes, wide "
                "(*); make it accept num_classes and network.arguments"
            ),
        ),
        (
            lambda m: custom(f"{m}.nothing").build(depth=1, classes=4),
            (
                "network.factory is {m}.nothing, but it returned a value of "
                "type int; return a torch.nn.Module"
            ),
        ),
        (
            lambda m: custom(f"{m}.shalow").build(depth=1, classes=4),
            "network.factory is {m}.shalow, but {m} has no `shalow`; check the spelling",
        ),
        (
            lambda _: custom("no_such_module.net").build(depth=1, classes=4),
            (
                "network.factory is no_such_module.net, but no_such_module cannot be imported (No "
                "module named 'no_such_module'); start in the folder that holds it, or install it"
            ),
        ),
        (
            lambda _: custom("net").build(depth=1, classes=4),
            (
                "network.factory is net, but it must be a dotted name such as "
                "my_module.my_network; give the module too, which may be in the current folder"
            ),
        ),
        (
            lambda _: custom("./my net.py").build(depth=1, classes=4),
            (
                "network.factory is ./my net.py, but it must be a dotted name such as "
                "my_module.my_network; give the module too, which may be in the current folder"
            ),
        ),
        (
            lambda m: custom(f"{m}.shallow", stages_in=["body", "trunk"]).stages(
                custom(f"{m}.shallow").build(depth=1, classes=4)
            ),
            (
                "network.stages_in is body, trunk, but {m}.shallow has no module `trunk`; name "
                "modules whose children are blocks"
            ),
        ),
        (
            lambda m: custom(f"{m}.shallow", rules_for={f"{m}.Twice": f"{m}.kept"}).rules,
            "network.rules_for is {m}.kept, but {m} has no `kept`; check the spelling",
        ),
    ]


@pytest.mark.parametrize("number", range(len(user_errors())))
def test_an_error_in_a_custom_network_is_one_line(module, number):
    call, message = user_errors()[number]
    pattern = re.escape(message.replace("{m}", module)).replace(r"\*", ".*")
    with pytest.raises(InputError, match=f"^{pattern}$"):
        call(module)


def test_an_error_inside_a_custom_factory_keeps_its_traceback(module, tmp_path):
    (tmp_path / f"{module}_broken.py").write_text("def net(num_classes):\n    return 1 / 0\n")
    with pytest.raises(ZeroDivisionError):
        custom(f"{module}_broken.net").build(depth=1, classes=4)
