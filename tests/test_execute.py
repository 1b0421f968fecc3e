"""One request end to end, in process, with a network that trains in a second."""

import functools
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch import nn

import widthopt
from widthopt.config.compose import compose, search
from widthopt.errors import InputError
from widthopt.records import from_json
from widthopt.runs.execute import run_request, search_widths
from widthopt.runs.plan import Plan
from widthopt.runs.point import SizedRequest


class Tiny(nn.Module):
    """A stem, a residual block and a head: four free width variables."""

    def __init__(self, num_classes, scale=1):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 24 * scale, 3, 2, 1, bias=False), _norm(24 * scale))
        self.inner = nn.Sequential(nn.Conv2d(24 * scale, 40, 3, 1, 1, bias=False), _norm(40))
        self.outer = nn.Sequential(
            nn.Conv2d(40, 24 * scale, 3, 1, 1, bias=False), _norm(24 * scale)
        )
        self.last = nn.Sequential(nn.Conv2d(24 * scale, 56, 3, 2, 1, bias=False), _norm(56))
        self.head = nn.Linear(56, num_classes)

    def forward(self, images):
        stem = self.stem(images)
        block = stem + self.outer(self.inner(stem))
        return self.head(self.last(block).mean((2, 3)))


def _norm(channels):
    return nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU())


@pytest.fixture(scope="module", autouse=True)
def _importable():
    sys.modules["network_of_this_test"] = sys.modules[__name__]
    yield
    del sys.modules["network_of_this_test"]


BASE = (
    "network=custom",
    "network.factory=network_of_this_test.Tiny",
    "network.name=tiny",
    "recipe=smoke",
    "recipe.search_epochs=3",
    "algorithm=morphnet",
    "algorithm.strength=5",
    "target.resolution=12",
    "projection.width=0.5",
    "projection.fraction=0.5",
    "runtime.device=cpu",
    "tracking=disabled",
    "methods=[uniform,direct,transfer]",
)


def point(*overrides):
    return SizedRequest(compose([*BASE, *overrides]))


def without_search(*overrides):
    """The same with an algorithm that finds nothing, quickly."""
    base = [item for item in BASE if not item.startswith("algorithm")]
    return SizedRequest(compose([*base, "algorithm=uniform", *overrides]))


def entries(root, kind):
    return sorted(path.name for path in (Path(root) / "stages").glob(f"{kind}-*"))


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """A run of all three methods: its point and its records."""
    item = point(f"root={tmp_path_factory.mktemp('runs')}")
    return item, run_request(item)


@pytest.fixture(scope="module")
def records(ran):
    return {record.found.method: record for record in ran[1]}


# What a run comes to.


def test_the_search_found_something_to_change(records):
    channels = {method: tuple(record.found.channels.values()) for method, record in records.items()}
    assert len(set(channels.values())) == 3


def test_a_run_gives_one_record_for_each_method_and_seed(ran):
    assert [record.found.method for record in ran[1]] == ["uniform", "direct", "transfer"]
    assert {record.found.seed for record in ran[1]} == {0}


def test_the_records_on_disk_are_those_returned(ran):
    item, records = ran
    assert from_json((item.folder / "record.json").read_text()) == records


def test_no_method_costs_more_than_the_budget_and_what_is_left_over_is_said(ran):
    item, records = ran
    for record in records:
        macs = item.target_blueprint.graph.macs(record.found.channels)
        assert record.found.macs == macs <= record.found.budget_macs
        left = 1 - macs / record.found.budget_macs
        assert record.found.diagnostics["budget_shortfall"] == pytest.approx(left)
        message = f"{record.found.method}: {100 * left:.2f} % of the budget is left over"
        assert (message in (item.folder / "run.log").read_text()) is (left > 0.005)


@pytest.mark.parametrize("part", [0.6, 1.0, 1.4])
def test_a_network_of_the_usual_size_is_within_half_a_per_cent_of_its_budget(part, tmp_path):
    overrides = (
        "algorithm=uniform",
        "target.width=0.25",
        "projection.width=0.1",
        f"root={tmp_path}",
    )
    full = SizedRequest(compose(overrides)).budget_macs
    budget = round(part * full)
    taken = search(*overrides, f"budget_macs={budget}")
    assert 0.995 * budget <= taken.macs <= budget == taken.budget_macs


def test_the_budget_is_what_the_target_costs(records, counted):
    expected = counted(Tiny(10), 12)
    assert {record.found.budget_macs for record in records.values()} == {expected}
    assert records["uniform"].found.channels == {
        "stem.0": 24, "inner.0": 40, "last.0": 56
    }  # fmt: skip


def test_the_final_training_sees_all_images_whatever_the_fraction(ran):
    labels = load_digits().target
    images = sum(math.floor(0.8 * n + 0.5) for n in np.bincount(labels))
    seen = images // 64 * 64 * 2  # the recipe's batches and epochs; what is left over is dropped
    for record in ran[1]:
        assert record.train_macs == 3 * record.found.macs * seen
        assert (record.target["fraction"], record.target["width"]) == (1.0, 1.0)
    assert ran[1][2].proxy["fraction"] == 0.5


def test_accuracy_is_measured_on_the_images_that_no_training_sees(ran):
    item, records = ran
    result = json.loads((item.store.root / records[0].stages["train"] / "result.json").read_text())
    right = result["result"]["top1"] / 100 * (1797 - len(item.request.dataset.train().labels))
    assert right == pytest.approx(round(right), abs=1e-9)


def test_the_overhead_counted_is_the_closed_form(ran, records):
    item = ran[0]
    assert records["uniform"].found.overhead_macs == 0
    for method in ("direct", "transfer"):
        assert records[method].found.overhead_macs == item.overhead_macs(method)
        assert records[method].found.direct_overhead_macs == records["direct"].found.overhead_macs


def test_the_overhead_is_three_passes_over_what_trains_and_one_over_the_rest(ran, records):
    graph = ran[0].proxy_blueprint.graph
    drawn = [math.floor(0.5 * n + 0.5) for n in np.bincount(ran[0].request.dataset.train().labels)]
    held = [max(1, math.floor(0.1 * n + 0.5)) for n in drawn]
    steps = (sum(drawn) - sum(held)) // 64
    trained = 3 * 3 * 64 * steps
    forward = records["transfer"].found.overhead_macs / graph.macs() - trained
    # Twice: all held out, and at most as many to recalibrate as there are in an epoch.
    assert 2 * sum(held) < forward <= 2 * (sum(held) + 64 * steps)


def test_what_was_saved_is_a_part_of_the_direct_search(records):
    saved = records["transfer"].found.saved
    # A quarter or so of the MACs (the image's channels stay) and half of the images.
    assert 1 - 0.5 * 0.4 < saved < 1 - 0.5 * 0.2
    assert records["direct"].found.saved == 0
    assert records["transfer"].found.nominal_saving == pytest.approx(4 * 2)
    assert records["direct"].found.nominal_saving == 1


def test_the_multipliers_are_channels_over_those_of_the_network(records):
    full = {"stem.0": 24, "inner.0": 40, "last.0": 56}
    for record in records.values():
        for name, count in record.found.channels.items():
            assert record.found.multipliers[name] == pytest.approx(count / full[name])


def test_training_taught_something(ran):
    assert all(record.top1 > 30 for record in ran[1])
    assert all(record.top1 <= record.top5 <= 100 for record in ran[1])


def test_the_run_folder_gathers_what_belongs_to_the_request(ran):
    item, records = ran
    for record in records:
        method = record.found.method
        written = json.loads((item.folder / "channels" / f"{method}-seed0.json").read_text())
        assert written["channels"] == record.found.channels
        link = item.folder / f"train-{method}-seed0"
        assert link.resolve() == item.store.root / record.stages["train"]
        assert list(link.glob("checkpoints/step-*/tensors.safetensors"))
    assert not (item.folder / "search-uniform-seed0").exists()
    assert (item.folder / "search-direct-seed0" / "gammas.safetensors").is_file()
    graph = widthopt.WidthGraph.from_json((item.folder / "graph.json").read_text())
    assert graph.macs() == records[0].found.budget_macs
    assert (item.folder / "run.log").is_file()


def test_what_is_done_is_not_done_again(ran):
    item, records = ran
    files = {path: path.stat().st_mtime_ns for path in item.store.root.rglob("result.json")}
    written = (item.folder / "record.json").read_bytes()
    shown = []
    assert run_request(point(f"root={item.request.root}"), show=shown.append) == records
    assert shown == ["uniform, seed 0", "direct, seed 0", "transfer, seed 0"]
    assert {path: path.stat().st_mtime_ns for path in item.store.root.rglob("result.json")} == files
    assert (item.folder / "record.json").read_bytes() == written


def test_the_same_seed_gives_the_same_record_anywhere(ran, tmp_path):
    again = run_request(point(f"root={tmp_path}", "methods=[transfer]"))[0]
    before = ran[1][2]
    assert again.found.channels == before.found.channels
    assert again.found.diagnostics == before.found.diagnostics
    assert (again.top1, again.train_loss) == (before.top1, before.train_loss)
    assert again.stages == before.stages


# What is shared.


def test_a_training_is_named_before_its_channels_are_known(tmp_path):
    """By where they come from; two ways to the same channels are two trainings, and alike."""
    item = without_search(f"root={tmp_path}", "recipe.epochs=1")
    names = [
        item.train_entry(method, 0).folder.name for method in ("uniform", "direct", "transfer")
    ]
    records = run_request(item)
    assert [record.stages["train"] for record in records] == names
    assert len({tuple(record.found.channels.items()) for record in records}) == 1
    assert entries(tmp_path, "train") == sorted(names)
    assert len(entries(tmp_path, "search")) == 2
    assert len({record.top1 for record in records}) == 1


def test_direct_and_transfer_without_a_projection_share_one_search(tmp_path):
    item = point(f"root={tmp_path}", "projection=none", "projection.width=null",
                "projection.fraction=null")  # fmt: skip
    assert item.search_entry("direct", 0).folder == item.search_entry("transfer", 0).folder
    again = point("projection.width=1", "projection.fraction=1.0")
    assert again.search_entry("transfer", 0).key == item.search_entry("transfer", 0).key
    assert item.train_entry("direct", 0).key == again.train_entry("transfer", 0).key
    records = run_request(item)
    assert [record.found.method for record in records] == ["uniform", "direct", "transfer"]
    assert len(entries(tmp_path, "search")) == 1
    assert len(entries(tmp_path, "train")) == 2
    assert records[2].found.saved == 0


def test_seeds_share_nothing():
    item = point("seeds=[0,1]")
    assert item.search_entry("direct", 0).key != item.search_entry("direct", 1).key
    for method in ("uniform", "direct", "transfer"):
        assert item.train_entry(method, 0).key != item.train_entry(method, 1).key


@functools.cache
def search_key(*overrides):
    return point(*overrides).search_entry("transfer", 0).key


@functools.cache
def train_key(*overrides, method="transfer"):
    return point(*overrides).train_entry(method, 0).key


@pytest.mark.parametrize(
    "override",
    [
        "root=elsewhere",
        "runtime.workers=2",
        "runtime.progress=false",
        "recipe.epochs=7",
        "methods=[transfer]",
        "seeds=[2,0]",
        "extrapolation=stack_last_block",
        "extrapolation.round_to=2",
        "dataset.memory_limit_gb=0",
        "algorithm.strength=5.0",
        "target.width=2",
    ],
)
def test_a_search_is_the_same_whatever_it_does_not_depend_on(override):
    assert search_key(override) == search_key()


@pytest.mark.parametrize(
    "override",
    [
        "recipe.search_epochs=4",
        "recipe.batch_size=32",
        "recipe.learning_rate=0.1",
        "recipe.augmentation=crop",
        "algorithm.strength=6",
        "algorithm.tie=l2",
        "projection.width=0.6",
        "projection.resolution=14",
        "projection.fraction=0.6",
        "dataset.validation=0.2",
        "dataset.flip=true",
        "+network.arguments.scale=2",
        "budget_macs=200000",
    ],
)
def test_a_search_is_another_where_its_result_may_be(override):
    assert search_key(override) != search_key()


@pytest.mark.parametrize(
    "override",
    ["root=elsewhere", "runtime.workers=2", "extrapolation=stack_last_block", "seeds=[2,0]",
     "methods=[transfer]", "dataset.memory_limit_gb=0", "algorithm.strength=5.0"],
)  # fmt: skip
def test_a_training_is_the_same_whatever_it_does_not_depend_on(override):
    """How widths are carried to another depth is nothing to it where there is no other."""
    assert train_key(override) == train_key()


@pytest.mark.parametrize(
    "override",
    ["recipe.search_epochs=7", "algorithm.strength=7", "projection.width=0.6",
     "projection.fraction=0.6"],
)  # fmt: skip
def test_the_un_optimised_network_is_the_same_beside_every_search(override):
    assert train_key(override, method="uniform") == train_key(method="uniform")
    assert train_key(override) != train_key()


def test_strategies_share_no_training_where_the_target_is_deeper():
    words = ("network=resnet18", "recipe=smoke", "algorithm=morphnet", "target.depth=2",
             "projection.depth=1", "target.resolution=24", "target.width=0.125",
             "projection.width=0.125")  # fmt: skip
    first, second = (
        SizedRequest(compose([*words, f"extrapolation={name}"]))
        for name in ("stack_last_block", "stack_average_block")
    )
    assert first.search_entry("transfer", 0).key == second.search_entry("transfer", 0).key
    assert first.train_entry("transfer", 0).key != second.train_entry("transfer", 0).key
    assert first.train_entry("direct", 0).key == second.train_entry("direct", 0).key


@pytest.mark.parametrize(
    "override",
    ["recipe.epochs=3", "recipe.weight_decay=0", "target.resolution=14", "dataset.std=[1,1,1]"],
)
def test_a_training_is_another_where_its_result_may_be(override):
    assert train_key(override) != train_key()


def test_looking_at_images_first_names_no_other_search(tmp_path):
    for split, name in (("train", "a"), ("train", "b"), ("val", "a"), ("val", "b")):
        (tmp_path / split / name).mkdir(parents=True)
        for number in range(4):
            Image.new("RGB", (8, 8)).save(tmp_path / split / name / f"{number}.png")
    folder = ("dataset=image_folder", f"dataset.root={tmp_path}")
    keys = {search_key(*folder, f"dataset.verify={verify}") for verify in ("true", "false")}
    assert len(keys) == 1


# Budgets.


def test_a_budget_that_is_the_targets_own_changes_no_search():
    macs = point().budget_macs
    assert search_key(f"budget_macs={macs}") == search_key()


@pytest.mark.parametrize("part", [0.5, 1.5])
def test_a_given_budget_is_met_by_all_and_shared_out_to_the_proxy(part, tmp_path):
    full = point()
    budget = round(part * full.budget_macs)
    item = without_search(f"root={tmp_path}", f"budget_macs={budget}")
    for method in ("uniform", "direct", "transfer"):
        match = search_widths(item.request, method=method)
        assert match.budget_macs == budget
        assert 0.97 * budget <= match.macs <= budget
    assert item.search_budget("direct") == budget
    assert item.search_budget("transfer") / full.proxy_blueprint.graph.macs() == pytest.approx(
        part, rel=1e-3
    )


def test_a_budget_out_of_reach_stops_before_anything_is_written(tmp_path):
    with pytest.raises(InputError, match=r"^budget_macs is 9, but the narrowest network has"):
        search(*BASE, f"root={tmp_path / 'runs'}", "budget_macs=9")
    assert not (tmp_path / "runs").exists()


# What a program takes away.


def test_found_channels_build_the_network_that_they_promise(ran, counted):
    item, records = ran
    overrides = [*BASE, f"root={item.request.root}", "methods=[uniform]"]
    taken = search(*overrides)  # the search is there already
    assert taken == records[2].found
    model = Tiny(10)
    graph = widthopt.trace(model, resolution=12)
    resized = widthopt.resize(model, graph, taken.channels)
    assert counted(resized, 12) == taken.macs
    assert sum(parameter.numel() for parameter in resized.parameters()) == taken.parameters
    assert resized(torch.zeros(2, 3, 12, 12)).shape == (2, 10)


@pytest.mark.parametrize("name", widthopt.__all__)
def test_every_name_of_the_package_is_there(name):
    assert getattr(widthopt, name).__name__ == name


# Plans.


def test_a_plan_costs_nothing_and_says_what_is_to_do(tmp_path):
    root = tmp_path / "runs"
    item = point(f"root={root}")
    plan = Plan.of([item.request])
    assert [run.what for run in plan.runs.values()] == [
        "tiny on digits, (1, 1, 12, 100%): morphnet search, seed 0",
        "tiny on digits, (0.5, 1, 12, 50%): morphnet search, seed 0",
        "tiny on digits, (1, 1, 12, 100%): training, baseline, seed 0",
        "tiny on digits, (1, 1, 12, 100%): training, morphnet at (1, 1, 12, 100%), seed 0",
        "tiny on digits, (1, 1, 12, 100%): training, morphnet at (0.5, 1, 12, 50%), seed 0",
    ]
    assert set(plan.states().values()) == {"missing"}
    direct, transfer, training, *_ = plan.runs.values()
    assert direct.macs == item.overhead_macs("direct") > transfer.macs
    images = len(item.request.dataset.train().labels) // 64 * 64 * 2
    assert training.macs == 3 * item.budget_macs * images
    assert not root.exists()


def test_a_plan_knows_what_is_done(ran):
    assert set(Plan.of([ran[0].request]).states().values()) == {"done"}
    more = Plan.of([point(f"root={ran[0].request.root}", "recipe.epochs=3").request])
    kinds = {run.kind: more.states()[name] for name, run in more.runs.items()}
    assert kinds == {"search": "done", "train": "missing"}
