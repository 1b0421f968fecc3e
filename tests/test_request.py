import inspect
import pickle
from dataclasses import dataclass, replace

import pytest
from small import SmallNetwork

from widthopt.config import typed
from widthopt.config.compose import compose
from widthopt.errors import AxisError, InputError, check_fields, check_value
from widthopt.reporting.figures.average import AverageWidths
from widthopt.reporting.figures.cosine import PairwiseCosine
from widthopt.reporting.figures.grid import TextTable
from widthopt.reporting.figures.table1 import Table1
from widthopt.reporting.figures.transfer import Transfer
from widthopt.request import FigureSpec, FigureTable


# Axes that cannot be built.


DEPTH_ERROR = AxisError("depth", "2, but a flat network has depth 1; use depth 1")


@dataclass(frozen=True)
class Flat(SmallNetwork):
    """A network that raises an error at any depth multiplier but 1."""

    error: InputError = DEPTH_ERROR

    def build(self, *, depth, classes):
        if depth > 1:
            raise self.error
        return super().build(depth=depth, classes=classes)


@pytest.mark.parametrize(
    ("overrides", "depth", "key"),
    [
        (["target.depth=2", "projection.depth=1"], 2, "target.depth"),
        (["target.depth=1", "projection.depth=2"], 2, "projection.depth"),
        (["target.depth=2"], 2, "target.depth"),
    ],
)
def test_an_axis_error_names_the_key_that_was_typed(overrides, depth, key):
    request = replace(compose(overrides), network=Flat())
    setting = replace(request.target_setting, depth=depth)
    with pytest.raises(InputError) as error:
        request.blueprint(setting)
    assert str(error.value) == f"{key} is 2, but a flat network has depth 1; use depth 1"


def test_an_error_of_another_kind_is_raised_unchanged():
    message = "depth chart is missing, but it is needed; add it"
    request = replace(compose(["target.depth=2"]), network=Flat(error=InputError(message)))
    with pytest.raises(InputError) as error:
        request.blueprint()
    assert str(error.value) == message


def test_an_axis_error_can_be_pickled():
    error = pickle.loads(pickle.dumps(AxisError("width", "0, but it is above 0; raise it")))  # noqa: S301
    assert (type(error), error.axis, str(error)) == (
        AxisError,
        "width",
        "width is 0, but it is above 0; raise it",
    )


# Ranges.


@dataclass
class Values:
    count: int = 3
    share: float = 0.5


def test_the_message_is_the_first_rule_that_does_not_hold():
    rules = [("count", True, "no"), ("share", False, "it is 1"), ("count", False, "no")]
    with pytest.raises(InputError, match=r"^group\.share is 0\.5, but it is 1; set it$"):
        check_fields("group", Values(), *rules, remedy="set it")
    check_fields("group", Values(), *rules[:1], remedy="set it")


@pytest.mark.parametrize(
    ("value", "shown"), [(0.1 + 0.2, "0.3"), (2_000_000, "2000000"), (float("nan"), "nan")]
)
def test_messages_have_floats_in_few_digits_and_complete_integers(value, shown):
    with pytest.raises(InputError, match=f"^key is {shown}, but it is 1; set it$"):
        check_value("key", value, holds=False, rule="it is 1; set it")


# Figures.


@pytest.mark.parametrize(
    ("protocol", "implementation"),
    [
        *((FigureSpec, kind) for kind in (AverageWidths, PairwiseCosine, Table1, Transfer)),
        (FigureTable, TextTable),
    ],
    ids=lambda kind: kind.__name__,
)
def test_an_implementation_has_the_members_of_its_protocol(protocol, implementation):
    members = {name: member for name, member in vars(protocol).items() if name[0] != "_"}
    fields = implementation.__dataclass_fields__
    for name, member in members.items():
        if isinstance(member, property):
            assert fields[name].type in ("str", str)
        else:
            expected = inspect.signature(member).parameters
            parameters = inspect.signature(getattr(implementation, name)).parameters
            assert parameters == expected


def test_a_figure_needs_every_member_of_the_protocol():
    assert typed._FIGURE == ("name", "title", "claim", "draw", "table")  # noqa: SLF001
