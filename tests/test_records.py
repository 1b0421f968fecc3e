import json
import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from widthopt.errors import InputError
from widthopt.records import (
    FORMAT,
    Record,
    Summary,
    WidthResult,
    by_method,
    from_json,
    read_channels,
    to_json,
)


FOUND = WidthResult(
    method="transfer",
    seed=3,
    channels={"conv1": 5, "layer1.0": 7},
    multipliers={"conv1": 0.5, "layer1.0": 1 / 3},
    alpha=1.25,
    macs=995,
    budget_macs=1_000,
    parameters=77,
    overhead_macs=25,
    direct_overhead_macs=100,
    nominal_saving=8.0,
    search_seconds=2.5,
    diagnostics={"collapsed": ["conv1"], "valid": False, "masked_accuracy_gap": 0.1},
    searched={"conv1": 0.4, "layer1.0": 0.3},
)
RECORD = Record(
    network="tiny",
    dataset="digits",
    algorithm="morphnet",
    target={"width": 1.0, "depth": 1, "resolution": 24, "fraction": 1.0},
    proxy={"width": 0.5, "depth": 1, "resolution": 24, "fraction": 0.1},
    extrapolation="",
    found=FOUND,
    top1=91.3,
    top5=99.9,
    train_macs=12_345,
    train_seconds=1.5,
    train_loss=0.1 + 0.2,
    stages={"train": "train-0", "search": "search-0"},
)


def of(method, seed=0):
    return replace(RECORD, found=replace(FOUND, method=method, seed=seed))


def test_records_come_back_from_json_as_they_were():
    records = [RECORD, of("uniform", 1)]
    assert from_json(to_json(records)) == records
    assert from_json(to_json([])) == []


def test_the_json_form_says_its_version_and_is_read_by_anyone():
    content = json.loads(to_json([RECORD]))
    assert content["format"] == FORMAT
    assert content["records"][0]["found"]["channels"] == {"conv1": 5, "layer1.0": 7}
    assert content["records"][0]["train_loss"] == 0.30000000000000004


def test_what_is_no_number_is_not_written_as_one():
    with pytest.raises(ValueError, match="not JSON compliant"):
        to_json([replace(RECORD, train_loss=math.nan)])


def test_a_later_format_is_refused():
    text = to_json([RECORD]).replace(f'"format": {FORMAT}', '"format": 99')
    with pytest.raises(
        InputError,
        match=rf"^old\.json has format 99, but this version reads {FORMAT}; run again$",
    ):
        from_json(text, name="old.json")


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "{}", f'{{"format": {FORMAT}}}', "3", b"\xff", "[" * 100_000],
)
def test_what_is_no_record_is_refused(text):
    with pytest.raises(
        InputError, match=r"^record\.json is no record \(.*\), but one is needed; run again$"
    ):
        from_json(text)


@pytest.mark.parametrize("edited", ["99.9", '"ninety"', "null", "NaN"])
def test_records_that_were_edited_by_hand_are_refused(edited):
    text = to_json([RECORD]).replace('"top1": 91.3', f'"top1": {edited}')
    with pytest.raises(InputError) as error:
        from_json(text, name="runs/x/record.json")
    assert str(error.value) == (
        "runs/x/record.json is not what was written, but only that is shown; restore it, or run "
        "again, which makes it again from the runs that are done"
    )


# Over seeds.


def test_a_summary_is_the_mean_and_the_sample_deviation():
    # Mean 4; squares of the differences 4 + 0 + 4, over two, not three.
    assert Summary.of([2.0, 4.0, 6.0]) == (4.0, 2.0, 3)
    mean, std, seeds = Summary.of(iter([1.0, 2.0]))
    assert (mean, seeds) == (1.5, 2)
    assert std == pytest.approx(math.sqrt(0.5))


def test_one_value_has_no_deviation():
    assert Summary.of([7.25]) == (7.25, 0.0, 1)


def test_a_summary_in_words_has_a_deviation_where_there_are_seeds():
    assert str(Summary(91.26, 0.0, 1)) == "91.3"
    assert str(Summary(91.26, 0.44, 3)) == "91.3±0.4"


@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=9), st.floats(-1e3, 1e3))
def test_a_shift_of_all_values_moves_the_mean_and_not_the_deviation(values, shift):
    one, moved = Summary.of(values), Summary.of([value + shift for value in values])
    assert moved.mean == pytest.approx(one.mean + shift, abs=1e-6)
    assert moved.std == pytest.approx(one.std, abs=1e-6)


def test_methods_come_in_the_papers_order_whatever_the_records():
    records = [of("transfer", 0), of("uniform", 0), of("transfer", 1)]
    assert by_method(records) == {
        "uniform": [of("uniform", 0)],
        "transfer": [of("transfer", 0), of("transfer", 1)],
    }
    assert list(by_method(records)) == ["uniform", "transfer"]


# What was saved.


@pytest.mark.parametrize(
    ("overhead", "direct", "saved"),
    [(25, 100, 0.75), (100, 100, 0.0), (0, 100, 1.0), (150, 100, -0.5), (0, 0, 0.0)],
)
def test_saved_is_the_part_of_the_direct_overhead_that_was_not_spent(overhead, direct, saved):
    found = replace(FOUND, overhead_macs=overhead, direct_overhead_macs=direct)
    assert found.saved == pytest.approx(saved)


# Channel counts from a file.


@pytest.mark.parametrize("wrap", [True, False])
def test_channels_are_read_from_a_runs_file_and_from_a_bare_table(tmp_path, wrap):
    table = {"conv1": 5, "layer1.0": 7}
    path = tmp_path / "channels.json"
    path.write_text(json.dumps({"network": "tiny", "channels": table} if wrap else table))
    assert read_channels(path) == table


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"{", "Expecting property name"),
        (b"[1, 2]", "has no attribute"),
        (b'{"channels": 3}', "has no attribute"),
        (b'{"conv1": 2.5}', r"2\.5 is not a whole number"),
        (b'{"conv1": true}', "True is not a whole number"),
        (b'{"channels": {"conv1": "8"}}', "8 is not a whole number"),
        (b"\xff\xfe\xfa", "codec can't decode"),
    ],
)
def test_a_file_that_holds_something_else_is_refused(tmp_path, content, reason):
    path = tmp_path / "channels.json"
    path.write_bytes(content)
    with pytest.raises(
        InputError,
        match=rf"^--channels is {path}, but channel counts cannot be read from it "
        rf"\(.*{reason}.*\); give a JSON file such as a run's channels/transfer-seed0\.json$",
    ):
        read_channels(path)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(
        InputError, match=r"^--channels is \S+/none\.json, but .*No such file or directory"
    ):
        read_channels(tmp_path / "none.json")
