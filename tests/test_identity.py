import enum
import json
import math
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from widthopt.errors import InputError
from widthopt.identity import canonical, differences, differing_values, is_sealed, key, seal


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
        # printf 'search\n{}' | sha256sum, and so on: computed by another program.
        ("search", {}, "ed68d4452baf"),
        ("search", {"width": 0.5, "depth": 1}, "cb680b12a779"),
        ("training", {"width": 0.5, "depth": 1}, "65d9d346e801"),
    ],
)
def test_keys_do_not_change_so_that_stored_results_are_used_again(kind, fields, pinned):
    assert key(kind, fields) == pinned


def test_the_canonical_string_is_compact_sorted_json_with_floats_by_repr():
    fields = {"b": (1, 2.0, 0.1), "a": Inner(width=1e-5, depth=3), "c": [None, True, "é"]}
    assert canonical(fields) == (
        r'{"a":{"depth":3,"width":1e-05},"b":[1,2.0,0.1],"c":[null,true,"\u00e9"]}'
    )


def test_differences_are_named_by_the_values_that_differ():
    stored = {"seed": 1, "recipe": {"epochs": 3, "momentum": 0.9}, "data": "x", "old": [1]}
    current = {"seed": 1, "recipe": {"epochs": 3, "momentum": 0.8}, "data": "y", "old": (1,)}
    assert differences(stored, current) == (
        'data is "x" there and "y" here; recipe.momentum is 0.9 there and 0.8 here'
    )
    assert differences(stored, stored) == ""
    assert differences({}, {"table": {}}) == "table is null there and {} here"


def test_differences_are_cut_to_a_short_line():
    text = differences({}, {f"grid{place}": list(range(1000)) for place in range(10)})
    assert text.startswith(
        "grid0 is null there and [0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,1... here; "
    )
    assert text.endswith(" here; and 6 more")
    assert text.count(" there and ") == 4


@settings(deadline=None)
@given(PLAIN)
def test_the_canonical_string_can_be_read_as_json(data):
    assert json.loads(canonical(data)) == data


@settings(deadline=None)
@given(st.dictionaries(st.text(), PLAIN))
def test_the_order_of_the_fields_does_not_matter(fields):
    assert canonical(dict(reversed(fields.items()))) == canonical(fields)


def test_a_dataclass_is_identified_by_its_fields_and_not_by_its_name():
    assert canonical(Inner(0.5, 2)) == canonical(Renamed(2, 0.5))


def test_an_integer_and_a_float_are_different():
    assert canonical(1) != canonical(1.0)


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_are_refused_with_their_field(number):
    with pytest.raises(InputError, match=r"fields\.recipe\[1\] is -?(nan|inf), but it must be"):
        canonical({"recipe": [0.0, number]})


@pytest.mark.parametrize(
    "value", [{1}, object(), b"x", {1: "x"}, Inner, enum.IntEnum("E", "A").A, 1 + 2j]
)
def test_a_value_that_is_not_plain_data_is_refused_with_its_field(value):
    with pytest.raises(TypeError, match=r"fields\.x is .*, but only plain data can name a run"):
        canonical({"x": value})


def test_differing_values_are_those_that_are_not_the_same_in_all_mappings():
    mappings = [
        {"seed": 1, "recipe": {"epochs": 3, "momentum": 0.9}},
        {"seed": 1, "recipe": {"epochs": 3, "momentum": 0.8}, "extra": True},
    ]
    assert differing_values(mappings) == [
        {("recipe", "momentum"): 0.9, ("extra",): None},
        {("recipe", "momentum"): 0.8, ("extra",): True},
    ]


# Sealed documents.


def test_a_sealed_document_is_its_labels_its_digest_and_its_content_in_this_order():
    document = seal("result", {"top1": 70.25, "flags": ()}, format=1, key="abc")
    # printf '{"flags":[],"top1":70.25}' | sha256sum
    assert json.dumps(document) == (
        '{"format": 1, "key": "abc", "sha256": '
        '"e9c2e7b42ad29e665d3994e94d207775a515fd0ae6f8785ecadabda103907044", '
        '"result": {"top1": 70.25, "flags": []}}'
    )
    assert is_sealed(document, "result", format=1, key="abc")


@pytest.mark.parametrize(
    "changes",
    [
        {"result": [1, 2.5]},
        {"result": [1]},
        {"sha256": "0" * 64},
        {"format": 2},
        {"key": "other"},
        {"extra": 1},
        {"result": [math.nan]},
    ],
)
def test_a_document_that_was_changed_is_not_sealed(changes):
    document = seal("result", [1, 2], format=1, key="abc")
    assert not is_sealed({**document, **changes}, "result", format=1, key="abc")


def test_a_document_that_is_nested_too_deeply_is_not_sealed():
    deep = []
    for _ in range(100_000):
        deep = [deep]
    assert not is_sealed({"sha256": "", "result": deep}, "result")


def test_a_number_that_is_not_finite_is_not_sealed():
    with pytest.raises(ValueError, match="not JSON compliant"):
        seal("result", [math.inf])


@pytest.mark.parametrize("document", [{}, {"format": 1}, [], 3, None])
def test_a_value_that_is_not_a_document_raises(document):
    with pytest.raises((KeyError, TypeError)):
        is_sealed(document, "result")
