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


RESULT = WidthResult(
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
    found=RESULT,
    top1=91.3,
    top5=99.9,
    train_macs=12_345,
    train_seconds=1.5,
    train_loss=0.1 + 0.2,
    stages={"train": "train-0", "search": "search-0"},
)


def record_of(method, seed=0):
    return replace(RECORD, found=replace(RESULT, method=method, seed=seed))


def test_records_are_equal_after_a_round_trip_through_json():
    records = [RECORD, record_of("uniform", 1)]
    assert from_json(to_json(records)) == records
    assert from_json(to_json([])) == []


def test_the_json_form_has_a_version_and_plain_values():
    content = json.loads(to_json([RECORD]))
    assert content["format"] == FORMAT
    assert content["records"][0]["found"]["channels"] == {"conv1": 5, "layer1.0": 7}
    assert content["records"][0]["train_loss"] == 0.30000000000000004


def test_a_number_that_is_not_finite_is_not_written():
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
def test_a_string_that_is_not_a_list_of_records_is_refused(text):
    with pytest.raises(
        InputError,
        match=r"^record\.json is not a list of records \(.*\), but records are needed; run again$",
    ):
        from_json(text)


@pytest.mark.parametrize("edited", ["99.9", '"ninety"', "null", "NaN"])
def test_records_that_were_edited_by_hand_are_refused(edited):
    text = to_json([RECORD]).replace('"top1": 91.3', f'"top1": {edited}')
    with pytest.raises(InputError) as error:
        from_json(text, name="runs/x/record.json")
    assert str(error.value) == (
        "runs/x/record.json was changed after it was written, but only unchanged records are "
        "shown; restore it, or run again to build it from the stored results"
    )


# Over seeds.


def test_a_summary_is_the_mean_and_the_sample_deviation():
    # The mean is 4, and the squared differences 4 + 0 + 4 are divided by two, not three.
    assert Summary.of([2.0, 4.0, 6.0]) == (4.0, 2.0, 3)
    mean, std, seeds = Summary.of(iter([1.0, 2.0]))
    assert (mean, seeds) == (1.5, 2)
    assert std == pytest.approx(math.sqrt(0.5))


def test_a_single_value_has_a_deviation_of_0():
    assert Summary.of([7.25]) == (7.25, 0.0, 1)


def test_the_string_of_a_summary_has_a_deviation_if_there_are_several_seeds():
    assert str(Summary(91.26, 0.0, 1)) == "91.3"
    assert str(Summary(91.26, 0.44, 3)) == "91.3±0.4"


@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=9), st.floats(-1e3, 1e3))
def test_a_shift_of_all_values_moves_the_mean_and_not_the_deviation(values, shift):
    summary, moved = Summary.of(values), Summary.of([value + shift for value in values])
    assert moved.mean == pytest.approx(summary.mean + shift, abs=1e-6)
    assert moved.std == pytest.approx(summary.std, abs=1e-6)


def test_methods_are_in_the_order_of_the_paper():
    records = [record_of("transfer", 0), record_of("uniform", 0), record_of("transfer", 1)]
    assert by_method(records) == {
        "uniform": [record_of("uniform", 0)],
        "transfer": [record_of("transfer", 0), record_of("transfer", 1)],
    }
    assert list(by_method(records)) == ["uniform", "transfer"]


# Savings.


@pytest.mark.parametrize(
    ("overhead", "direct", "saved"),
    [(25, 100, 0.75), (100, 100, 0.0), (0, 100, 1.0), (150, 100, -0.5), (0, 0, 0.0)],
)
def test_saved_is_the_part_of_the_direct_overhead_that_was_not_spent(overhead, direct, saved):
    result = replace(RESULT, overhead_macs=overhead, direct_overhead_macs=direct)
    assert result.saved == pytest.approx(saved)


# Channel counts from a file.


@pytest.mark.parametrize("wrap", [True, False])
def test_channels_are_read_from_the_file_of_a_run_and_from_a_mapping_alone(tmp_path, wrap):
    counts = {"conv1": 5, "layer1.0": 7}
    path = tmp_path / "channels.json"
    path.write_text(json.dumps({"network": "tiny", "channels": counts} if wrap else counts))
    assert read_channels(path) == counts


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"{", "Expecting property name"),
        (b"[1, 2]", "has no attribute"),
        (b'{"channels": 3}', "has no attribute"),
        (b'{"conv1": 2.5}', r"2\.5 is not an integer"),
        (b'{"conv1": true}', "True is not an integer"),
        (b'{"channels": {"conv1": "8"}}', "8 is not an integer"),
        (b"\xff\xfe\xfa", "codec can't decode"),
    ],
)
def test_a_file_with_other_content_is_refused(tmp_path, content, reason):
    path = tmp_path / "channels.json"
    path.write_bytes(content)
    with pytest.raises(
        InputError,
        match=rf"^--channels is {path}, but channel counts cannot be read from it "
        rf"\(.*{reason}.*\); give a JSON file such as a run's channels/transfer-seed0\.json$",
    ):
        read_channels(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(
        InputError, match=r"^--channels is \S+/none\.json, but .*No such file or directory"
    ):
        read_channels(tmp_path / "none.json")
