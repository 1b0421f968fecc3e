import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from small import make_recipe

from widthopt.errors import InputError
from widthopt.networks import TorchvisionNetwork
from widthopt.projection import Depth, Fraction, Projection, Resolution, Width, nominal_saving
from widthopt.setting import Setting


NETWORK = TorchvisionNetwork("resnet18")
WIDTHS = st.floats(0.01, 4)
DEPTHS = st.integers(1, 8)
RESOLUTIONS = st.integers(1, 1000)
FRACTIONS = st.floats(0.001, 1)
SETTINGS = st.builds(
    Setting,
    network=st.just(NETWORK),
    classes=st.integers(1, 1000),
    width=WIDTHS,
    depth=DEPTHS,
    resolution=RESOLUTIONS,
    fraction=FRACTIONS,
)


def setting(width, depth, resolution, fraction):
    return Setting(NETWORK, 1000, width, depth, resolution, fraction)


@given(SETTINGS)
def test_axes_that_are_not_named_change_nothing(target):
    assert Projection(None, None, None, None)(target) == target


@given(SETTINGS)
def test_projecting_to_what_the_target_has_changes_nothing(target):
    same = Projection(target.width, target.depth, target.resolution, target.fraction)
    assert same(target) == target


@given(SETTINGS, WIDTHS, DEPTHS, RESOLUTIONS, FRACTIONS)
def test_axes_commute_and_together_are_the_compound_projection(target, width, depth, pixels, part):
    axes = [Width(width), Depth(depth), Resolution(pixels), Fraction(part)]
    compound = Projection(width, depth, pixels, part)(target)
    assert compound == Setting(target.network, target.classes, width, depth, pixels, part)
    for order in itertools.permutations(axes):
        proxy = target
        for axis in order:
            proxy = axis(proxy)
        assert proxy == compound


@given(SETTINGS, WIDTHS, DEPTHS, RESOLUTIONS, FRACTIONS)
def test_each_axis_changes_its_own_value_only(target, width, depth, pixels, part):
    old = (target.width, target.depth, target.resolution, target.fraction)
    new = (width, depth, pixels, part)
    for place, value in enumerate(new):
        single = Projection(*(value if place == axis else None for axis in range(4)))(target)
        expected = [value if place == axis else old[axis] for axis in range(4)]
        assert [single.width, single.depth, single.resolution, single.fraction] == expected


@given(SETTINGS, WIDTHS)
def test_projecting_twice_is_projecting_once(target, width):
    assert Width(width)(Width(width)(target)) == Width(width)(target)


@pytest.mark.parametrize(
    ("proxy", "target", "times"),
    [
        # The compound points of the paper; its "320x" is the second point.
        (setting(0.707, 1, 160, 0.1), setting(1.414, 2, 320, 1.0), 320),
        (setting(0.312, 1, 64, 0.05), setting(1.414, 2, 320, 1.0), 20_540),
        # "96 % saved" by resolution, 75 % by depth, 96.8 % by width, 95 % by fraction.
        (setting(1.0, 1, 64, 1.0), setting(1.0, 1, 320, 1.0), 25),
        (setting(1.0, 1, 224, 1.0), setting(1.0, 4, 224, 1.0), 4),
        (setting(0.312, 1, 224, 1.0), setting(1.732, 1, 224, 1.0), (1.732 / 0.312) ** 2),
        (setting(1.0, 1, 224, 0.05), setting(1.0, 1, 224, 1.0), 20),
    ],
)
def test_the_nominal_saving_of_points_of_the_paper_is_that_of_the_paper(proxy, target, times):
    assert nominal_saving(target, proxy) == pytest.approx(times, rel=5e-5)


@given(SETTINGS)
def test_nothing_is_saved_where_nothing_is_projected(target):
    assert nominal_saving(target, target) == 1


@pytest.mark.parametrize("width", [0.0, -1.0, math.nan, math.inf])
def test_a_width_that_is_not_a_positive_number_is_refused(width):
    with pytest.raises(
        InputError,
        match=rf"^projection\.width is {width:g}, but a width multiplier is a number above 0; "
        r"the paper uses 0\.312 to 1\.732$",
    ):
        Projection(width, None, None, None)(setting(1.0, 1, 224, 1.0))


def test_a_depth_below_one_is_refused():
    with pytest.raises(
        InputError,
        match=r"^projection\.depth is 0, but a stage has at least one block; use an integer of at "
        r"least 1$",
    ):
        Depth(0)


def test_a_resolution_below_one_is_refused():
    with pytest.raises(
        InputError,
        match=r"^projection\.resolution is 0, but an image has at least one pixel; use an integer "
        r"of at least 1$",
    ):
        Resolution(0)


@pytest.mark.parametrize("fraction", [0.0, -0.5, 1.01, 10.0, math.nan])
def test_a_fraction_outside_its_range_is_refused(fraction):
    with pytest.raises(
        InputError,
        match=rf"^projection\.fraction is {fraction:g}, but it is a part of the training images, "
        r"above 0 and at most 1; 0\.1 is 10 per cent$",
    ):
        Fraction(fraction)


def test_a_fraction_may_be_all_training_images():
    assert Fraction(1.0)(setting(1.0, 1, 224, 0.5)).fraction == 1


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("batch_size", 0),
        ("batch_size", 1),
        ("accumulation", 0),
        ("accumulation", 17),
        ("epochs", 0),
        ("search_epochs", 0),
        ("learning_rate", 0.0),
        ("warmup_epochs", -1.0),
        ("momentum", 1.0),
        ("weight_decay", -0.1),
        ("label_smoothing", 1.0),
    ],
)
def test_a_value_of_a_recipe_out_of_range_is_refused_with_its_key(key, value):
    with pytest.raises(InputError, match=rf"^recipe\.{key} is {value:g}, but .*; conf/recipe/"):
        make_recipe(**{key: value})
