import enum
import json
import math
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from widthopt.errors import InputError
from widthopt.identity import canonical, differences, key


@dataclass
class Inner:
    width: float
    depth: int


@dataclass
class Renamed:
    depth: int
    width: float


PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=12,
)


@pytest.mark.parametrize(
    ("kind", "fields", "pinned"),
    [
        # printf 'search\n{}' | sha256sum, and so on: the definition, computed by another program.
        ("search", {}, "ed68d4452baf"),
        ("search", {"width": 0.5, "depth": 1}, "cb680b12a779"),
        ("training", {"width": 0.5, "depth": 1}, "65d9d346e801"),
    ],
)
def test_keys_stay_what_they_are_so_that_results_are_found_again(kind, fields, pinned):
    assert key(kind, fields) == pinned


def test_the_canonical_text_is_compact_sorted_json_with_floats_by_repr():
    fields = {"b": (1, 2.0, 0.1), "a": Inner(width=1e-5, depth=3), "c": [None, True, "é"]}
    assert canonical(fields) == (
        r'{"a":{"depth":3,"width":1e-05},"b":[1,2.0,0.1],"c":[null,true,"\u00e9"]}'
    )


def test_differences_are_named_by_the_values_that_differ():
    there = {"seed": 1, "recipe": {"epochs": 3, "momentum": 0.9}, "data": "x", "old": [1]}
    here = {"seed": 1, "recipe": {"epochs": 3, "momentum": 0.8}, "data": "y", "old": (1,)}
    assert differences(there, here) == (
        'data is "x" there and "y" here; recipe.momentum is 0.9 there and 0.8 here'
    )
    assert differences(there, there) == ""
    assert differences({}, {"table": {}}) == "table is null there and {} here"


def test_differences_are_cut_to_one_line_that_can_be_read():
    text = differences({}, {f"grid{place}": list(range(1000)) for place in range(10)})
    assert text.startswith(
        "grid0 is null there and [0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,1... here; "
    )
    assert text.endswith(" here; and 6 more")
    assert text.count(" there and ") == 4


@settings(deadline=None)
@given(PLAIN)
def test_the_canonical_text_reads_back_as_the_data(data):
    assert json.loads(canonical(data)) == data


@settings(deadline=None)
@given(st.dictionaries(st.text(), PLAIN))
def test_the_order_of_the_fields_does_not_matter(fields):
    assert canonical(dict(reversed(fields.items()))) == canonical(fields)


def test_a_dataclass_counts_by_its_fields_and_not_by_its_name():
    assert canonical(Inner(0.5, 2)) == canonical(Renamed(2, 0.5))


def test_a_whole_number_and_a_float_are_different():
    assert canonical(1) != canonical(1.0)


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_are_refused_with_the_field(number):
    with pytest.raises(InputError, match=r"fields\.recipe\[1\] is -?(nan|inf), but it must be"):
        canonical({"recipe": [0.0, number]})


@pytest.mark.parametrize(
    "thing", [{1}, object(), b"x", {1: "x"}, Inner, enum.IntEnum("E", "A").A, 1 + 2j]
)
def test_what_is_not_plain_data_is_refused_with_the_field(thing):
    with pytest.raises(TypeError, match=r"fields\.x is .*, but only plain data can name a run"):
        canonical({"x": thing})
