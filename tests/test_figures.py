"""Figures and tables of a run and of comparisons, from handmade records."""

import json
import re
from dataclasses import replace

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from PIL import Image

from widthopt.errors import InputError
from widthopt.records import METHODS, Record, WidthResult, to_json
from widthopt.reporting import console
from widthopt.reporting.compare import compare
from widthopt.reporting.figures import channels, savings, similarity
from widthopt.reporting.figures.style import COLOURS, MARKERS, RC
from widthopt.reporting.figures.summary import short, table


NAMES = ("conv1", "layer1.0.conv1", "layer2.0.conv1", "layer3.0.conv1")
COUNTS = {
    ("uniform", 0): (16, 16, 32, 64),
    ("uniform", 1): (16, 16, 32, 64),
    ("direct", 0): (10, 12, 40, 90),
    ("direct", 1): (14, 8, 40, 110),
    ("transfer", 0): (9, 14, 44, 80),
    ("transfer", 1): (11, 10, 52, 100),
}
TOP1 = {"uniform": (90.0, 91.0), "direct": (93.0, 95.0), "transfer": (92.0, 96.0)}
OVERHEAD = {"uniform": (0, 0), "direct": (2_000_000, 2_000_000), "transfer": (200_000, 600_000)}


def record(method, seed):
    counts = COUNTS[method, seed]
    found = WidthResult(
        method=method,
        seed=seed,
        channels=dict(zip(NAMES, counts, strict=True)),
        multipliers=dict.fromkeys(NAMES, 1.0),
        alpha=1.0,
        macs=1_814_073 + 2 * seed,
        budget_macs=1_814_075,
        parameters=11_689 + 2 * seed,
        overhead_macs=OVERHEAD[method][seed],
        direct_overhead_macs=0 if method == "uniform" else 2_000_000,
        nominal_saving=320.0 if method == "transfer" else 1.0,
        search_seconds=0.0 if method == "uniform" else 10.0 + 4 * seed,
        diagnostics={},
        searched=dict.fromkeys(NAMES, 1.0),
    )
    return Record(
        network="resnet18",
        dataset="digits",
        algorithm="morphnet",
        target={"width": 1.0, "depth": 1, "resolution": 24, "fraction": 1.0},
        proxy={"width": 0.5, "depth": 1, "resolution": 24, "fraction": 1.0},
        extrapolation="",
        found=found,
        top1=TOP1[method][seed],
        top5=99.0,
        train_macs=10**9,
        train_seconds=20.0 + 2 * seed,
        train_loss=0.5,
        stages={},
    )


RECORDS = [record(method, seed) for seed in (0, 1) for method in METHODS]
ONE_SEED = [record(method, 0) for method in METHODS]


def draw_figure(figure, records=RECORDS):
    with mpl.rc_context(RC):
        axes = Figure().subplots()
        figure.draw(axes, records)
    return axes


def lines(axes):
    """Return the lines and error bars of the axes, by label."""
    handles, labels = axes.get_legend_handles_labels()
    return dict(zip(labels, handles, strict=True))


# Channels by layer.


@pytest.mark.parametrize("method", METHODS)
def test_the_line_of_a_method_is_the_mean_of_its_channels(method):
    x, y = lines(draw_figure(channels))[method].get_data()
    assert list(x) == [0, 1, 2, 3]
    assert list(y) == list(np.mean([COUNTS[method, 0], COUNTS[method, 1]], axis=0))


def test_the_shade_is_one_sample_deviation():
    shade = draw_figure(channels).collections[METHODS.index("transfer")]
    # The smallest value is 10 - sqrt(2), and the largest 90 + sqrt(200).
    vertices = shade.get_paths()[0].vertices[:, 1]
    assert vertices.min() == pytest.approx(10 - 2**0.5)
    assert vertices.max() == pytest.approx(90 + 200**0.5)


def test_every_width_variable_is_named_in_forward_order():
    axes = draw_figure(channels)
    assert [label.get_text() for label in axes.get_xticklabels()] == list(NAMES)
    assert axes.get_xlabel() == "width variable, in forward order"
    assert axes.get_ylabel() == "channels"
    assert axes.get_yscale() == "log"
    assert "resnet18" in axes.get_title()


# Accuracy against saved overhead.


@pytest.mark.parametrize(
    ("method", "saved", "top1", "deviation"),
    # 1 - 0.2 / 2 and 1 - 0.6 / 2 in per cent; deviations over two seeds: difference / sqrt(2)
    [("direct", 0.0, 94.0, 2 / 2**0.5), ("transfer", 80.0, 94.0, 4 / 2**0.5)],
)
def test_a_searched_method_is_a_point_with_its_deviation(method, saved, top1, deviation):
    point, _, (bar,) = lines(draw_figure(savings))[f"morphnet, {method}"]
    assert point.get_xdata() == pytest.approx([saved])
    assert point.get_ydata() == pytest.approx([top1])
    ((_, low), (_, high)) = bar.get_segments()[0]
    assert (low, high) == pytest.approx((top1 - deviation, top1 + deviation))


def test_the_baseline_is_a_line_at_its_accuracy_with_a_shade():
    axes = draw_figure(savings)
    assert list(lines(axes)["uniform"].get_ydata()) == [90.5, 90.5]
    shade = axes.patches[0].get_extents().transformed(axes.transData.inverted())
    deviation = 1 / 2**0.5
    assert (shade.y0, shade.y1) == pytest.approx((90.5 - deviation, 90.5 + deviation))


def test_the_axis_shows_savings_from_0_to_100_per_cent():
    axes = draw_figure(savings)
    low, high = axes.get_xlim()
    assert low < 0
    assert high > 100
    assert axes.get_xlabel() == "width optimization overhead saved (%)"
    assert axes.get_ylabel() == "digits top-1 accuracy (%)"
    assert "FLOPs (multiply-adds)" in axes.get_title()


def test_a_search_more_expensive_than_the_direct_one_is_within_the_axes():
    expensive = [
        replace(item, found=replace(item.found, overhead_macs=3 * item.found.direct_overhead_macs))
        if item.found.method == "transfer"
        else item
        for item in RECORDS
    ]
    axes = draw_figure(savings, expensive)
    point, _, _ = lines(axes)["morphnet, transfer"]
    assert point.get_xdata() == pytest.approx([-200.0])
    assert axes.get_xlim()[0] < -200


def test_one_seed_has_no_bars():
    _, caps, bars = lines(draw_figure(savings, ONE_SEED))["morphnet, transfer"]
    assert len(caps) == len(bars) == 0


def test_several_algorithms_are_drawn_apart_and_share_one_baseline():
    another = [replace(item, algorithm="dmcp") for item in RECORDS]
    drawn_lines = lines(draw_figure(savings, [*RECORDS, *another]))
    assert sorted(drawn_lines) == sorted(
        ["uniform", *(f"{a}, {m}" for a in ("morphnet", "dmcp") for m in ("direct", "transfer"))]
    )
    places = [drawn_lines[f"{name}, direct"][0] for name in ("morphnet", "dmcp")]
    first, second = (float(place.get_xdata()[0]) for place in places)
    assert 0 < second - first < 2
    assert (first + second) / 2 == pytest.approx(0)
    assert to_hex(places[0].get_color()) != to_hex(places[1].get_color())


# Both.


@pytest.mark.parametrize("figure", [channels, savings])
@pytest.mark.parametrize("records", [RECORDS, ONE_SEED, RECORDS[:1], RECORDS[1:3]])
def test_the_legend_has_all_methods(figure, records):
    axes = draw_figure(figure, records)
    labels = [text.get_text().split(", ")[-1] for text in axes.get_legend().get_texts()]
    present = {item.found.method for item in records}
    assert sorted(labels) == sorted(present)


def test_methods_differ_by_marker_and_by_colour():
    assert set(COLOURS) == set(MARKERS) == set(METHODS)
    assert len(set(MARKERS.values())) == len(METHODS)
    handles = lines(draw_figure(channels))
    assert {handles[method].get_marker() for method in METHODS} == set(MARKERS.values())
    assert {to_hex(handles[method].get_color()) for method in METHODS} == set(COLOURS.values())


def test_the_files_are_pictures_of_all_methods(tmp_path):
    paths = console.draw(RECORDS, tmp_path / "figures")
    assert [path.name for path in paths] == ["channels.png", "accuracy.png"]
    for path in paths:
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB"))
        assert min(pixels.shape[:2]) > 400
        for method in METHODS:
            colour = np.array([int(COLOURS[method][i : i + 2], 16) for i in (1, 3, 5)])
            assert (np.abs(pixels.astype(int) - colour).max(axis=2) < 8).sum() > 50


# Comparisons.


def rows(rich_table):
    columns = [list(column.cells) for column in rich_table.columns]
    return [
        dict(zip((c.header for c in rich_table.columns), row, strict=True))
        for row in zip(*columns, strict=True)
    ]


def test_several_algorithms_are_rows_of_one_table_with_one_baseline():
    second = [replace(item, algorithm="dmcp") for item in RECORDS]
    found = rows(table([*RECORDS, *second]))
    assert [(row["algorithm"], row["method"]) for row in found] == [
        ("-", "uniform"), ("morphnet", "direct"), ("morphnet", "transfer"), ("dmcp", "direct"),
        ("dmcp", "transfer"),
    ]  # fmt: skip
    assert found[1]["top-1 %"] == "94.0±1.4"


def test_the_baseline_is_shown_for_any_algorithm():
    uniform, second = record("uniform", 0), replace(record("direct", 0), algorithm="dmcp")
    records = [
        second,
        uniform,
        record("direct", 0),
        replace(record("uniform", 1), algorithm="dmcp"),
    ]
    found = rows(table(records))
    assert [(row["algorithm"], row["method"]) for row in found] == [
        ("-", "uniform"), ("dmcp", "direct"), ("morphnet", "direct"),
    ]  # fmt: skip
    assert found[0]["top-1 %"] == "90.5±0.7"  # of two seeds, each with another algorithm
    axes = draw_figure(savings, [second, uniform, record("direct", 0)])
    assert "uniform" in [text.get_text() for text in axes.get_legend().get_texts()]


def test_widths_are_compared_between_seeds_and_with_direct_and_uniform_widths():
    widths = {
        ("uniform", 0): (1, 1, 1, 1), ("uniform", 1): (1, 1, 1, 1),
        ("direct", 0): (1, 1, 1, 1), ("direct", 1): (0, 0, 1, 1),
        ("transfer", 0): (2, 2, 0, 0), ("transfer", 1): (0, 0, 3, 3),
    }  # fmt: skip
    records = []
    for item in RECORDS:
        values = widths[item.found.method, item.found.seed]
        found = replace(
            item.found,
            multipliers=dict(zip(NAMES, map(float, values), strict=True)),
            diagnostics={"budget_reached": item.found.method == "direct" or item.found.seed == 1},
        )
        records.append(replace(item, found=found))
    direct, transfer = rows(similarity.table(records))
    half = 0.5**0.5
    assert direct == {
        "algorithm": "morphnet", "method": "direct", "seeds": f"{half:.3f}", "direct": "-",
        "uniform": f"{(1 + half) / 2:.3f} ({half:.3f})", "budget": "2 of 2",
    }  # fmt: skip
    assert transfer == {
        "algorithm": "morphnet", "method": "transfer", "seeds": "0.000",
        "direct": f"{(1 + half) / 2:.3f} ({half:.3f})", "uniform": f"{half:.3f} ({half:.3f})",
        "budget": "1 of 2",
    }  # fmt: skip


# The table.


def cells(records):
    result = table(records)
    columns = [column.header for column in result.columns]
    rows = zip(*(column.cells for column in result.columns), strict=True)
    return columns, [list(row) for row in rows]


def test_the_table_over_two_seeds_has_the_values_computed_by_hand():
    columns, rows = cells(RECORDS)
    assert columns == [
        "method", "channels", "MACs", "params", "overhead", "nominal",
        "saved", "top-1 %", "seconds",
    ]  # fmt: skip
    assert rows == [
        ["uniform", "16-64", "1.81M", "11.7k", "-", "-", "-", "90.5±0.7",
         "0+21"],
        ["direct", "8-110", "1.81M", "11.7k", "2M", "1x", "0.0%", "94.0±1.4",
         "12+21"],
        ["transfer", "9-100", "1.81M", "11.7k", "400k", "320x", "80.0%",
         "94.0±2.8", "12+21"],
    ]  # fmt: skip
    assert table(RECORDS).title == "resnet18 on digits, 2 seeds"


def test_the_table_of_one_seed_has_no_deviations():
    _, rows = cells(ONE_SEED)
    assert rows[2] == [
        "transfer", "9-80", "1.81M", "11.7k", "200k", "320x", "90.0%", "92.0", "10+20",
    ]  # fmt: skip
    assert table(ONE_SEED).title == "resnet18 on digits, 1 seed"


def test_the_table_in_a_file_is_not_truncated(tmp_path):
    console._write_table(RECORDS, tmp_path / "table.txt")  # noqa: SLF001 (a run writes it)
    text = (tmp_path / "table.txt").read_text("utf-8")
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= 118
    for cell in (cell for row in cells(RECORDS)[1] for cell in row):
        assert f" {cell} " in text


@pytest.mark.parametrize(
    ("count", "words"),
    [
        (0, "0"),
        (999, "999"),
        (1_000, "1k"),
        (11_689_512, "11.7M"),
        (1_814_073_344, "1.81G"),
        (2.5e12, "2.5T"),
        (6.972e17, "697P"),
        (1.81e20, "181E"),
    ],
)
def test_counts_are_short_with_their_unit(count, words):
    assert short(count) == words


def test_problems_of_a_search_are_listed():
    diagnostics = {
        "valid": False,
        "masked_accuracy_gap": 3.25,
        "cut": ["conv1"],
        "collapsed": ["conv1", "conv2"],
        "budget_reached": False,
    }
    item = replace(RECORDS[1], found=replace(RECORDS[1].found, diagnostics=diagnostics))
    assert console.search_problems([item]) == [
        (
            "direct, seed 0: the search is not valid: removing its dead channels cost 3.2 points; "
            "cut: conv1"
        ),
        "direct, seed 0: fell to the floor: conv1, conv2",
        "direct, seed 0: the search did not reach its budget",
    ]
    assert console.search_problems(RECORDS) == []


def test_a_comparison_lists_a_problem_once_for_all_seeds(tmp_path, capsys):
    diagnostics = {"unchanged": True}
    bad = [replace(item, found=replace(item.found, diagnostics=diagnostics)) for item in OPTIMISED]
    folders = [
        run_folder(tmp_path, "a", in_store(OPTIMISED, "a")),
        run_folder(tmp_path, "b", in_store(bad, "b"), **STRONG),
    ]
    compare(folders, into=tmp_path / "report")
    message = [line for line in capsys.readouterr().out.splitlines() if "pruned" in line]
    nothing = "the search pruned nothing; its widths are those of the baseline (uniform widths)"
    assert message == [
        f"morphnet strength 7, {method}, seeds 0, 1: {nothing}" for method in ("direct", "transfer")
    ]


def run_folder(tmp_path, name, records, **config):
    """Write the folder of a run; ``config`` replaces groups of its configuration."""
    groups = {
        "network": {"name": "resnet18"},
        "algorithm": {"name": "morphnet", "strength": 1.0, "floor": 2},
        "recipe": {"epochs": 3, "search_epochs": 2, "learning_rate": 0.1},
        "projection": {"width": 0.5},
        "budget_macs": None,
    } | config
    (tmp_path / name).mkdir()
    (tmp_path / name / "record.json").write_text(to_json(records))
    (tmp_path / name / "config.yaml").write_text(json.dumps(groups))
    return tmp_path / name


def in_store(records, name):
    """Return the records with distinct store entries."""
    return [
        replace(item, stages={"train": f"{name}{number}"}) for number, item in enumerate(records)
    ]


def table_rows(message):
    """Yield the rows of all tables: the algorithm if it is named, the method, and further cells."""
    for line in map(str.strip, message.splitlines()):
        found = re.fullmatch(rf"(?:(.*\S) +)?({'|'.join(METHODS)}) +([-\d].*)", line)
        if found:
            yield found[1], found[2], found[3].split()


OPTIMISED = [item for item in RECORDS if item.found.method != "uniform"]
STRONG = {"algorithm": {"name": "morphnet", "strength": 7.0, "floor": 2}}


def test_shared_records_count_once_and_different_searches_have_different_names(tmp_path, capsys):
    uniform = in_store([item for item in RECORDS if item.found.method == "uniform"], "u")
    folders = [
        run_folder(tmp_path, "a", [*uniform, *in_store(OPTIMISED, "a")]),
        run_folder(tmp_path, "b", [*uniform, *in_store(OPTIMISED, "b")], **STRONG),
        run_folder(tmp_path, "c", in_store(OPTIMISED, "a")),
    ]
    compare(folders, into=tmp_path / "report")
    found = list(table_rows(capsys.readouterr().out))
    names = ["morphnet strength 1", "morphnet strength 7"]
    first, second = found[:5], found[5:]
    assert [item[:2] for item in first] == [
        ("-", "uniform"), *((name, method) for name in names for method in METHODS[1:])
    ]  # fmt: skip
    assert [item[:2] for item in second] == [item[:2] for item in first[1:]]
    assert {item[2][-2] for item in first if item[1] == "transfer"} == {"94.0±2.8"}
    assert [item[2][-2:] for item in second] == [["of", "2"]] * 4  # not 4: c has the records of a


def test_runs_that_differ_in_their_proxy_are_named_by_it_and_compared_with_one_direct_search(
    tmp_path, capsys
):
    moved = [item for item in RECORDS if item.found.method == "transfer"]
    narrow = [replace(item, proxy={**item.proxy, "width": 0.25}) for item in moved]
    folders = [
        run_folder(tmp_path, "a", in_store(OPTIMISED, "a")),
        run_folder(tmp_path, "b", in_store(narrow, "b"), projection={"width": 0.25}),
    ]
    compare(folders, into=tmp_path / "report")
    found = list(table_rows(capsys.readouterr().out))[3:]
    assert [item[:2] for item in found] == [
        ("morphnet", "direct"),
        ("morphnet 0.5-1-24-1", "transfer"),
        ("morphnet 0.25-1-24-1", "transfer"),
    ]
    assert [item[2][1] for item in found[1:]] == ["1.000", "1.000"]  # with the direct search


def test_searches_on_different_proxies_are_not_averaged(tmp_path, capsys):
    first, second = record("transfer", 0), record("transfer", 1)
    narrow = replace(second, proxy={**second.proxy, "width": 0.25})
    folders = [
        run_folder(tmp_path, "a", in_store([first], "a")),
        run_folder(tmp_path, "b", in_store([narrow], "b"), projection={"width": 0.25}),
    ]
    compare(folders, into=tmp_path / "report")
    tops = [item[2][-2] for item in table_rows(capsys.readouterr().out) if "+" in item[2][-1]]
    assert tops == ["92.0", "96.0"]  # not 94.0±2.8


def test_seeds_of_two_runs_are_averaged(tmp_path, capsys):
    folders = [
        run_folder(tmp_path, name, in_store([item], name), seeds=[item.found.seed])
        for name, item in (("a", record("transfer", 0)), ("b", record("transfer", 1)))
    ]
    compare(folders, into=tmp_path / "report")
    found = [item for item in table_rows(capsys.readouterr().out) if "+" in item[2][-1]]
    assert [(item[1], item[2][-2]) for item in found] == [("transfer", "94.0±2.8")]


def test_different_final_trainings_have_separate_tables_and_figures(tmp_path, capsys):
    longer = {"recipe": {"epochs": 6, "search_epochs": 2, "learning_rate": 0.1}}
    searched = {"recipe": {"epochs": 3, "search_epochs": 9, "learning_rate": 0.1}}
    folders = [
        run_folder(tmp_path, "a", in_store(ONE_SEED, "a")),
        run_folder(
            tmp_path, "b", in_store([record(method, 1) for method in METHODS], "b"), **longer
        ),
        run_folder(tmp_path, "c", in_store(ONE_SEED[1:], "c"), **searched),
    ]
    compare(folders, into=tmp_path / "report")
    out = capsys.readouterr().out
    before, _, after = out.partition("\nepochs 6\n")
    assert before.startswith("epochs 3\n")
    assert {item[0] for item in table_rows(before)} == {
        "-", "morphnet search_epochs 2", "morphnet search_epochs 9"
    }  # fmt: skip
    assert {item[0] for item in table_rows(after)} == {None, "morphnet"}  # only one algorithm
    assert [item[2][-2] for item in table_rows(after) if "+" in item[2][-1]] == [
        "91.0",
        "95.0",
        "96.0",
    ]
    figures = sorted(path.parent.name for path in (tmp_path / "report").rglob("accuracy.png"))
    assert figures == ["resnet18-digits-1-1-24-1-epochs-3", "resnet18-digits-1-1-24-1-epochs-6"]


def test_names_have_as_few_values_as_distinguish_them(tmp_path, capsys):
    several = [
        {"name": "morphnet", "strength": strength, "floor": floor, "tie": tie}
        for strength, floor, tie in ((1.0, 2, "max"), (2.0, 2, "l2"), (1.0, 4, "max"))
    ]
    folders = [
        run_folder(
            tmp_path, str(number), in_store([record("direct", 0)], str(number)), algorithm=item
        )
        for number, item in enumerate(several)
    ]
    compare(folders, into=tmp_path / "report")
    assert {item[0] for item in table_rows(capsys.readouterr().out)} == {
        "morphnet strength 1 floor 2", "morphnet strength 2 floor 2", "morphnet strength 1 floor 4"
    }  # fmt: skip


def test_names_that_look_equal_are_numbered(tmp_path, capsys):
    names = [f"a_module_with_a_rather_long_name.{end}" for end in ("One", "Other", "One")]
    folders = [
        run_folder(
            tmp_path, str(number), in_store([record("direct", number % 2)], str(number)),
            algorithm={"name": "morphnet", "how": name},
        )
        for number, name in enumerate(names)
    ]  # fmt: skip
    compare(folders, into=tmp_path / "report")
    assert {item[0] for item in table_rows(capsys.readouterr().out)} == {
        "morphnet how a_module_with_a_rather_l 1", "morphnet how a_module_with_a_rather_l 2"
    }  # fmt: skip


@pytest.mark.parametrize("text", ["- a", "recipe: 3", "a: [", "\tx", "{recipe: ${"])
def test_a_damaged_configuration_is_one_line(tmp_path, text):
    folder = run_folder(tmp_path, "a", in_store(ONE_SEED, "a"))
    (folder / "config.yaml").write_text(text)
    with pytest.raises(InputError) as error:
        compare([folder], into=tmp_path / "report")
    assert str(error.value) == (
        f"{folder}/config.yaml is not the configuration of a run, but runs are named by it; "
        "restore it, or start the run again"
    )
