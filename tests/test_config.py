"""Choices of ``conf/`` become typed values, and invalid input is an error of one line."""

import sys
from dataclasses import MISSING, fields
from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf
from PIL import Image
from torch import nn

from widthopt.config.compose import compose
from widthopt.config.typed import to_plain
from widthopt.errors import InputError
from widthopt.files import check_writable
from widthopt.runs.point import SizedRequest
from widthopt.setting import Recipe


CONF = Path(__file__).parents[1] / "conf"
GROUPS = (
    "network",
    "dataset",
    "projection",
    "algorithm",
    "extrapolation",
    "recipe",
    "tracking",
    "experiment",
)
CHOICES = [(group, path.stem) for group in GROUPS for path in sorted((CONF / group).glob("*.yaml"))]
NEEDED = {
    ("network", "torchvision"): ["network.name=resnet50"],
    ("network", "custom"): ["network.factory=my_module.my_network"],
}
"""Keys without a default, by choice."""

TINY = ("target.width=0.125", "target.resolution=24", "recipe=smoke")


class Branching(nn.Module):
    """A network with control flow that depends on its images, so it cannot be traced."""

    def __init__(self, num_classes):
        super().__init__()
        self.conv = nn.Conv2d(3, num_classes, 1)

    def forward(self, images):
        if images.mean() > 0:
            images = -images
        return self.conv(images).mean((2, 3))


class Sorting(nn.Module):
    """A network with an operation that has no rule."""

    def __init__(self, num_classes):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 1)
        self.head = nn.Linear(8, num_classes)

    def forward(self, images):
        return self.head(self.conv(images).sort(1).values.mean((2, 3)))


class Small(nn.Module):
    """Two convolutions; the smallest resolution is 17 pixels."""

    def __init__(self, num_classes):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 9, stride=2, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.conv = nn.Conv2d(8, 16, 5)
        self.head = nn.Linear(16, num_classes)

    def forward(self, images):
        return self.head(self.conv(self.norm(self.stem(images)).relu()).relu().mean((2, 3)))


@pytest.fixture
def custom():
    """Return the overrides that choose a network of this file."""
    sys.modules["networks_of_this_test"] = sys.modules[__name__]
    yield lambda kind: ("network=custom", f"network.factory=networks_of_this_test.{kind.__name__}")
    del sys.modules["networks_of_this_test"]


@pytest.fixture
def photos(tmp_path):
    """Write an image folder with a number of images per class; return the overrides for it."""

    def make(**counts):
        for split in ("train", "val"):
            for name, count in counts.items():
                folder = tmp_path / "photos" / split / name
                folder.mkdir(parents=True)
                for number in range(count):
                    pixels = np.full((8, 9, 3), 10 * number, dtype=np.uint8)
                    Image.fromarray(pixels).save(folder / f"{number}.png")
        return ("dataset=image_folder", f"dataset.root={tmp_path / 'photos'}")

    return make


def refusal(*overrides, point=False):
    """Return the error message for overrides; ``point`` also checks sizes and images."""
    with pytest.raises(InputError) as caught:
        SizedRequest(compose([*TINY, *overrides])) if point else compose(overrides)
    line = str(caught.value)
    assert "\n" not in line
    return line


# Choices.


def test_conf_has_all_groups():
    folders = {path.name for path in CONF.iterdir() if path.is_dir() and any(path.glob("*.yaml"))}
    assert folders - {"hydra"} == set(GROUPS)
    assert len(CHOICES) >= 6 + 9 + 4 + 2 + 2 + 3 + 1


@pytest.mark.parametrize(("group", "choice"), CHOICES)
def test_every_choice_becomes_typed_values(group, choice):
    request = compose([f"{group}={choice}", *NEEDED.get((group, choice), [])])
    if group == "experiment":
        return
    typed = getattr(request, group)
    written = OmegaConf.load(CONF / group / f"{choice}.yaml")
    for key in written.keys() - {"_target_", "defaults"}:
        if OmegaConf.is_missing(written, key) or OmegaConf.is_interpolation(written, key):
            continue
        value = getattr(typed, key)
        assert (list(value) if isinstance(value, tuple) else value) == written[key], key
    keys = to_plain(request)[group].keys() - {"_target_"}
    required = {field.name for field in fields(typed) if field.default is MISSING}
    assert required <= keys <= {field.name for field in fields(typed)}


@pytest.mark.parametrize(("group", "choice"), CHOICES)
def test_every_choice_starts_with_a_comment(group, choice):
    assert (CONF / group / f"{choice}.yaml").read_text().startswith("# ")


def test_the_paper_recipe_is_appendix_a():
    assert compose(["recipe=paper"]).recipe == Recipe(
        batch_size=1024,
        accumulation=1,
        epochs=100,
        search_epochs=40,
        learning_rate=0.2,
        warmup_epochs=5.0,
        momentum=0.9,
        weight_decay=5e-5,
        label_smoothing=0.1,
        augmentation="paper",
    )


@pytest.mark.parametrize(
    ("number", "axes"),
    [
        (1, (0.312, 1, 64, 0.05)),
        (2, (0.707, 1, 160, 0.1)),
        (3, (1.0, 1, 224, 0.5)),
        (4, (1.414, 2, 320, 1.0)),
    ],
)
def test_compound_projections_are_the_papers_sources(number, axes):
    projection = compose([f"projection=compound_{number}"]).projection
    assert (
        projection.width,
        projection.depth,
        projection.resolution,
        projection.fraction,
    ) == axes


def test_integers_and_equal_floats_name_the_same_run():
    keys = ("target.width", "recipe.learning_rate", "algorithm.strength", "dataset.crop")
    integers = compose([f"{key}=1" for key in keys])
    floats = compose([f"{key}=1.0" for key in keys])
    assert integers == floats
    for value in (integers.target.width, integers.recipe.learning_rate):
        assert type(value) is float
    assert repr(integers.fields) == repr(floats.fields)


def test_the_target_has_the_resolution_of_the_data_set_by_default():
    assert compose(["dataset=imagenet"]).target.resolution == 224
    assert compose(["dataset=imagenet", "target.resolution=320"]).target.resolution == 320


def test_the_data_folder_is_read_from_the_environment(monkeypatch):
    monkeypatch.setenv("WIDTHOPT_DATA", "/elsewhere")
    assert compose(["dataset=imagenet"]).dataset.root == "/elsewhere/imagenet"


def test_keys_outside_the_identity_are_not_in_the_fields():
    assert compose([]).fields.keys() & {"root", "runtime", "tracking"} == set()


# Unknown names.


@pytest.mark.parametrize(
    ("override", "line"),
    [
        (
            "network=resnet19",
            (
                "network is resnet19, but there is no such choice; use one of custom, "
                "mobilenet_v2, "
                "resnet18, torchvision"
            ),
        ),
        (
            "algorithm=morfnet",
            (
                "algorithm is morfnet, but there is no such choice; use one of autoslim, "
                "autoslim_short, dmcp, dmcp_short, morphnet, morphnet_auto, morphnet_short, "
                "pyramid, uniform"
            ),
        ),
        (
            "projection=0.5",
            "projection is 0.5, but a group takes the name of a choice; see widthopt --help",
        ),
        (
            "recipe.epoch=3",
            "recipe.epoch is not a key, but only known keys are read; did you mean recipe.epochs?",
        ),
        (
            "+recipe.epoch=3",
            "recipe.epoch is not a key, but only known keys are read; did you mean recipe.epochs?",
        ),
        (
            "algoritm=uniform",
            "algoritm is not a key, but only known keys are read; did you mean algorithm?",
        ),
        (
            "+zzz=1",
            (
                "zzz is not a key, but only known keys are read; use one of algorithm, "
                "budget_macs, dataset, extrapolation, figures, methods, network, projection, "
                "recipe, resources, root, runtime, seeds, target, tracking"
            ),
        ),
        (
            "network=torchvision",
            (
                "network.name is missing, but this choice needs it; add network.name=... to the "
                "command"
            ),
        ),
        (
            "network=custom",
            (
                "network.factory is missing, but this choice needs it; add network.factory=... "
                "to the "
                "command"
            ),
        ),
        (
            "~target.width",
            "target.width is missing, but target needs it; add target.width=...",
        ),
        (
            "~seeds",
            "seeds is missing, but this choice needs it; add seeds=... to the command",
        ),
        (
            "~network",
            "network is null, but a choice of this group has a _target_; see conf/network",
        ),
        (
            "network.name=resnet19",
            (
                "network.name is resnet19, but torchvision has no such classification CNN; choose "
                "among resnet101, resnet152, resnet18, resnet34, resnet50, resnext101_32x8d, "
                "resnext101_64x4d, resnext50_32x4d"
            ),
        ),
        (
            "network._target_=no_such_module.Network",
            (
                "network._target_ is no_such_module.Network, but it cannot be imported (No module "
                "named 'no_such_module'); start in the folder that holds it, or install it"
            ),
        ),
        (
            "network._target_=os.path",
            (
                "network._target_ is os.path, but it must be a dataclass, whose fields give the "
                "types of the values; name a dataclass"
            ),
        ),
        (
            "epochs 3",
            (
                "epochs 3 is not an override, but arguments are KEY=VALUE or GROUP=CHOICE; see "
                "widthopt --help"
            ),
        ),
    ],
)
def test_an_unknown_name_is_reported_with_the_available_ones(override, line):
    assert refusal(override) == line


# Types.


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("recipe.epochs=3.5", "recipe.epochs is 3.5, but it must be an integer; correct it"),
        ("recipe.epochs=true", "recipe.epochs is true, but it must be an integer; correct it"),
        ("recipe.epochs=null", "recipe.epochs is null, but it must be an integer; correct it"),
        ("target.depth=1.0", "target.depth is 1.0, but it must be an integer; correct it"),
        ("target.width=wide", "target.width is wide, but it must be a number; correct it"),
        ("target.width=true", "target.width is true, but it must be a number; correct it"),
        ("projection.width=[1]", "projection.width is [1], but it must be a number; correct it"),
        ("dataset.flip=1", "dataset.flip is 1, but it must be true or false; correct it"),
        ("dataset.flip=maybe", "dataset.flip is maybe, but it must be true or false; correct it"),
        ("root=3", "root is 3, but it must be a string; correct it"),
        ("seeds=0", "seeds is 0, but it is a list; write [a, b]"),
        ("seeds=[0,x]", "seeds[1] is x, but it must be an integer; correct it"),
        ("methods=direct", "methods is direct, but it is a list; write [a, b]"),
        ("dataset.mean=[1,1]", "dataset.mean is [1, 1], but it is a list of 3; write [a, b]"),
        ("budget_macs=2e6", "budget_macs is 2000000.0, but it must be an integer; correct it"),
        (
            "runtime.precision=float16",
            (
                "runtime.precision is float16, but it must be one of auto, float32, bfloat16; "
                "correct it"
            ),
        ),
        (
            "algorithm.grid=odd",
            "algorithm.grid is odd, but it must be one of auto, reference, even; correct it",
        ),
        (
            "target=3",
            "target is 3, but it is a mapping of keys; set them one by one, as in target.width=...",
        ),
        (
            "target.width=0.25,0.5",
            (
                "target.width is 0.25,0.5, but one run takes one value; add -m to run once for "
                "each, "
                "or write [a,b] for a list"
            ),
        ),
    ],
)
def test_a_value_of_a_wrong_type_is_refused(override, line):
    assert refusal(override) == line


def test_a_list_cannot_replace_a_mapping():
    assert refusal("network=custom", "network.factory=a.b", "network.arguments=[1]") == (
        "network.arguments is [1], but it replaces a value of another kind (a mapping, a list or a "
        "single value); see widthopt --help"
    )


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (
            ("dataset=image_folder", "dataset.rooot=x"),
            "dataset.rooot is not a key, but only known keys are read; did you mean dataset.root?",
        ),
        (
            ("algorithm=uniform", "algorithm.strength=3"),
            (
                "algorithm.strength is not a key, but only known keys are read; first choose "
                "algorithm=dmcp or algorithm=morphnet or algorithm=morphnet_auto or "
                "algorithm=morphnet_short, which has it"
            ),
        ),
        (
            ("network.factory=my_module.MyNetwork",),
            (
                "network.factory is not a key, but only known keys are read; first choose "
                "network=custom, which has it"
            ),
        ),
        (
            ("algorithm=uniform", "algorithm.zzz=3"),
            ("algorithm.zzz is not a key, but only known keys are read; use one of algorithm.name"),
        ),
    ],
)
def test_keys_of_other_choices_are_refused(overrides, line):
    assert refusal(*overrides) == line


def test_arguments_of_a_custom_network_are_added_one_by_one():
    network = ("network=custom", "network.factory=a.b")
    assert refusal(*network, "network.arguments={scale: 1}") == (
        "network.arguments is a mapping, but its keys are added one by one; write "
        "+network.arguments.NAME=VALUE"
    )
    added = compose([*network, "+network.arguments.scale=1"])
    assert added.network.arguments == {"scale": 1}


def test_a_missing_environment_variable_is_named():
    line = refusal("root=${oc.env:WIDTHOPT_NOT_SET}")
    assert line.startswith("root cannot be read (")
    assert "WIDTHOPT_NOT_SET" in line


# Ranges.


@pytest.mark.parametrize("fraction", ["0", "-0.1", "1.01", "nan"])
def test_a_fraction_lies_above_0_and_at_most_1(fraction):
    assert refusal(f"projection.fraction={fraction}") == (
        f"projection.fraction is {fraction}, but it is a part of the training images, above 0 and "
        "at most 1; 0.1 is 10 per cent"
    )


@pytest.mark.parametrize(
    ("override", "line"),
    [
        (
            "projection.width=0",
            (
                "projection.width is 0, but a width multiplier is a number above 0; the paper uses "
                "0.312 to 1.732"
            ),
        ),
        (
            "projection.depth=0",
            (
                "projection.depth is 0, but a stage has at least one block; use an integer of at "
                "least 1"
            ),
        ),
        (
            "target.depth=0",
            "target.depth is 0, but it must be an integer of at least 1; correct it",
        ),
        (
            "target.resolution=-1",
            "target.resolution is -1, but it must be an integer of at least 1; correct it",
        ),
        (
            "methods=[uniform,best]",
            (
                "methods is [uniform, best], but it must list some of uniform, direct, transfer, "
                "each once; correct it"
            ),
        ),
        (
            "methods=[]",
            (
                "methods is [], but it must list some of uniform, direct, transfer, each once; "
                "correct it"
            ),
        ),
        (
            "methods=[direct,direct]",
            (
                "methods is [direct, direct], but it must list some of uniform, direct, transfer, "
                "each once; correct it"
            ),
        ),
        (
            "seeds=[1,0,1]",
            "seeds is [1, 0, 1], but it must list integers of at least 0, each once; correct it",
        ),
        (
            "seeds=[-1]",
            "seeds is [-1], but it must list integers of at least 0, each once; correct it",
        ),
        (
            "seeds=[]",
            "seeds is [], but it must list integers of at least 0, each once; correct it",
        ),
        (
            "runtime.workers=-1",
            (
                "runtime.workers is -1, but it is a number of processes; use at least 0, which "
                "loads images in the training process"
            ),
        ),
        (
            "recipe.momentum=1",
            (
                "recipe.momentum is 1, but it must be at least 0 and below 1; "
                "conf/recipe/paper.yaml has the paper's value"
            ),
        ),
        (
            "recipe.batch_size=1",
            (
                "recipe.batch_size is 1, but BatchNorm needs at least two images in a step; "
                "conf/recipe/paper.yaml has the paper's value"
            ),
        ),
        (
            "algorithm.enlarge=0.5",
            (
                "algorithm.enlarge is 0.5, but a supernet is no narrower than its network; "
                "conf/algorithm/dmcp.yaml has the original's value"
            ),
        ),
    ],
)
def test_a_value_out_of_range_is_refused(override, line):
    assert refusal(override) == line


# Invalid networks.


@pytest.mark.parametrize(
    ("override", "key"),
    [("target.width=0.001", "target"), ("projection.width=0.001", "projection")],
)
def test_a_width_that_rounds_a_variable_to_0_is_refused_with_the_smallest_width(override, key):
    line = refusal(override, point=True)
    assert line == (
        f"{key}.width is 0.001, but it rounds the 64 channels of `conv1` to 0; use 0.008 or more"
    )
    SizedRequest(compose([*TINY, f"{key}.width=0.008"]))


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (("target.resolution=16",), "target.resolution is 16"),
        (("target.resolution=32", "projection.resolution=16"), "projection.resolution is 16"),
    ],
)
def test_a_resolution_too_small_for_the_network_is_refused(custom, overrides, key):
    line = refusal(
        *custom(Small), "target.width=1", "projection.width=null", *overrides, point=True
    )
    # 16 pixels become 4 after the stem, too few for a 5x5 convolution.
    assert line.startswith(
        f"{key}, but node `conv` in module `conv` fails on images of this size ("
    )
    assert line.endswith("; use a larger resolution, or check that the network accepts images of "
                         "this size")  # fmt: skip


def test_the_smallest_resolution_is_accepted(custom):
    point = SizedRequest(compose([*TINY, *custom(Small), "target.width=1", "target.resolution=17"]))
    assert point.target_blueprint.graph.resolution == 17


def test_a_depth_that_the_network_does_not_support_is_refused(custom):
    network = ("network=torchvision", "network.name=squeezenet1_1")
    assert refusal(*network, "target.depth=2", point=True) == (
        "target.depth is 2, but torchvision's builder of squeezenet1_1 takes no depths; use depth "
        "1, or a ResNet, RegNet, EfficientNet, ConvNeXt, DenseNet or mobilenet_v2"
    )
    line = refusal(*custom(Small), "target.width=1", "projection.depth=2", point=True)
    assert line == (
        "projection.depth is 2, but networks_of_this_test.Small takes no argument `depth`; add "
        "the argument, or use depth 1"
    )


def test_a_proxy_deeper_than_its_target_is_refused():
    assert refusal("projection.depth=2", point=True) == (
        "projection.depth is too large: stage `layer1` has 4 blocks in the proxy, but 2 in the "
        "target; use a proxy that is at most as deep as its target"
    )


def test_a_budget_below_the_narrowest_network_is_refused(custom):
    line = refusal(*custom(Small), "target.width=1", "budget_macs=500", point=True)
    # One channel each: 8 x 8 positions of 9 x 9 x 3, 4 x 4 positions of 5 x 5, 10 classes.
    smallest = 64 * 243 + 16 * 25 + 10
    assert line == (
        f"budget_macs is 500, but the narrowest network has {smallest:,} MACs at resolution 24; "
        "raise the budget"
    )
    SizedRequest(compose([*TINY, *custom(Small), "target.width=1", f"budget_macs={smallest}"]))


@pytest.mark.parametrize("algorithm", ["autoslim", "dmcp"])
@pytest.mark.parametrize(
    ("typed", "value"), [("budget_macs=900000000", "1.5"), ("algorithm.enlarge=1", "1")]
)
def test_a_budget_that_no_search_meets_is_reported_by_algorithm_enlarge(algorithm, typed, value):
    """The budget of the proxy is not an input, so the message names another key with its value."""
    point = SizedRequest(compose([*TINY, f"algorithm={algorithm}", typed, "methods=[transfer]"]))
    with pytest.raises(InputError, match=rf"^algorithm\.enlarge is {value}, but") as caught:
        point.overhead_macs("transfer")
    assert "budget_macs is" not in str(caught.value)


def test_a_network_with_data_dependent_control_flow_is_refused(custom):
    assert refusal(*custom(Branching), "target.width=1", point=True) == (
        "network is Branching, but torch.fx cannot trace it (symbolically traced variables cannot "
        "be used as inputs to control flow); move the code that depends on values into a separate "
        "module and add a rule for it"
    )


def test_an_operation_without_a_rule_is_reported_with_the_remedy(custom):
    line = refusal(*custom(Sorting), "target.width=1", point=True)
    assert line.startswith(
        "network operation is `sort` (node `sort` in the forward of the network), but no rule "
        "describes what it does to channels; add "
    )
    assert "network.rules" in line


@pytest.mark.parametrize(
    ("factory", "line"),
    [
        (
            "nowhere.network",
            (
                "network.factory is nowhere.network, but nowhere cannot be imported (No module "
                "named "
                "'nowhere'); start in the folder that holds it, or install it"
            ),
        ),
        (
            "math.network",
            "network.factory is math.network, but math has no `network`; check the spelling",
        ),
        (
            "network",
            (
                "network.factory is network, but it must be a dotted name such as "
                "my_module.my_network; give the module too, which may be in the current folder"
            ),
        ),
        (
            "builtins.dict",
            (
                "network.factory is builtins.dict, but it returned a value of type dict; "
                "return a torch.nn.Module"
            ),
        ),
    ],
)
def test_an_invalid_factory_is_refused(factory, line, monkeypatch):
    if factory == "builtins.dict":  # has no signature
        monkeypatch.setattr("builtins.table", lambda num_classes: {"n": num_classes}, raising=False)
        factory, line = "builtins.table", line.replace("builtins.dict", "builtins.table")
    assert refusal("network=custom", f"network.factory={factory}", point=True) == line


def test_an_unavailable_device_is_refused(custom):
    line = refusal(*custom(Small), "target.width=1", "runtime.device=abacus", point=True)
    assert line.startswith("runtime.device is abacus, but this machine has no such device; use one")


# Images.


def test_a_missing_folder_is_refused(tmp_path):
    gone = tmp_path / "gone"
    assert refusal("dataset=image_folder", f"dataset.root={gone}", point=True) == (
        f"dataset.root is {gone}, but there is no such folder; use the folder that "
        "contains train/<class> and val/<class>"
    )
    assert refusal("dataset=cifar10", f"dataset.root={gone}", point=True) == (
        f"dataset.root is {gone}, but torchvision finds no complete CIFAR10 in it (dataset not "
        "found or corrupted); download it with dataset.download=true, or set dataset.root to the "
        "folder that contains it"
    )


def test_unreadable_images_are_refused_unless_allowed(photos, tmp_path, custom):
    chosen = (*photos(ant=4, bee=4), *custom(Small), "target.width=1")
    for name in ("ant/1.png", "bee/3.png"):
        (tmp_path / "photos" / "train" / name).write_bytes(b"no image")
    line = refusal(*chosen, point=True)
    assert line == (
        f"dataset.root is {tmp_path / 'photos'}, but 2 of 8 images cannot be read "
        "(train/ant/1.png, train/bee/3.png); replace or remove them "
        "(dataset=image_folder can skip them with dataset.allow_unreadable=true)"
    )
    with pytest.warns(UserWarning, match=r"2 of 8 images cannot be read .*; they are skipped"):
        point = SizedRequest(compose([*TINY, *chosen, "dataset.allow_unreadable=true"]))
    assert len(point.request.dataset.train().labels) == 6


def test_fewer_than_two_classes_are_refused(photos, tmp_path):
    assert refusal(*photos(ant=4), point=True) == (
        f"dataset.root is {tmp_path / 'photos'}, but it has fewer than two classes (ant) and "
        "a classifier needs two; use a data set of two classes or more"
    )


def test_a_fraction_that_leaves_a_class_one_image_is_refused(photos, custom):
    chosen = (*photos(ant=20, bee=10), *custom(Small), "target.width=1")
    assert refusal(*chosen, "projection.fraction=0.1", point=True) == (
        "projection.fraction is 0.1, but it leaves class bee 1 image of 10 and a class needs 2, "
        "one of them for validation; use at least 0.15"
    )
    SizedRequest(compose([*TINY, *chosen, "projection.fraction=0.15"]))


# The folder of results.


def test_a_root_that_cannot_be_written_is_refused(tmp_path):
    root = tmp_path / "file"
    root.write_text("no folder")
    with pytest.raises(InputError) as caught:
        check_writable(Path(compose([f"root={root / 'runs'}"]).root))
    assert str(caught.value) == (
        f"root is {root / 'runs'}, but it cannot be written (Not a directory); name a folder you "
        "may write to"
    )


def test_a_point_writes_nothing(tmp_path, monkeypatch, custom):
    monkeypatch.chdir(tmp_path)
    SizedRequest(compose([*TINY, *custom(Small), "target.width=1"]))
    assert list(tmp_path.iterdir()) == []
