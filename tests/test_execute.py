"""Run a request end to end in this process, with a network that trains in a second."""

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


def make_point(*overrides):
    return SizedRequest(compose([*BASE, *overrides]))


def make_point_without_search(*overrides):
    """Return a point whose algorithm returns uniform widths without a search."""
    base = [value for value in BASE if not value.startswith("algorithm")]
    return SizedRequest(compose([*base, "algorithm=uniform", *overrides]))


def entry_names(root, kind):
    """Return the names of the entries of one kind below a root, sorted."""
    return sorted(path.name for path in (Path(root) / "stages").glob(f"{kind}-*"))


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    """Run all three methods; the point and its records."""
    point = make_point(f"root={tmp_path_factory.mktemp('runs')}")
    return point, run_request(point)


@pytest.fixture(scope="module")
def records(finished_run):
    return {record.found.method: record for record in finished_run[1]}


# Results of a run.


def test_the_methods_give_different_channels(records):
    channels = {method: tuple(record.found.channels.values()) for method, record in records.items()}
    assert len(set(channels.values())) == 3


def test_a_run_returns_one_record_for_each_method_and_seed(finished_run):
    assert [record.found.method for record in finished_run[1]] == ["uniform", "direct", "transfer"]
    assert {record.found.seed for record in finished_run[1]} == {0}


def test_the_stored_records_equal_the_returned_records(finished_run):
    point, records = finished_run
    assert from_json((point.folder / "record.json").read_text()) == records


def test_no_method_exceeds_the_budget_and_an_unused_share_is_logged(finished_run):
    point, records = finished_run
    for record in records:
        macs = point.target_blueprint.graph.macs(record.found.channels)
        assert record.found.macs == macs <= record.found.budget_macs
        left = 1 - macs / record.found.budget_macs
        assert record.found.diagnostics["budget_shortfall"] == pytest.approx(left)
        message = f"{record.found.method}: {100 * left:.2f} % of the budget is unused"
        assert (message in (point.folder / "run.log").read_text()) is (left > 0.005)


@pytest.mark.parametrize("share", [0.6, 1.0, 1.4])
def test_a_network_of_usual_size_is_within_half_a_percent_of_its_budget(share, tmp_path):
    overrides = (
        "algorithm=uniform",
        "target.width=0.25",
        "projection.width=0.1",
        f"root={tmp_path}",
    )
    full = SizedRequest(compose(overrides)).budget_macs
    budget = round(share * full)
    result = search(*overrides, f"budget_macs={budget}")
    assert 0.995 * budget <= result.macs <= budget == result.budget_macs


def test_the_default_budget_is_the_macs_of_the_target(records, counted):
    expected = counted(Tiny(10), 12)
    assert {record.found.budget_macs for record in records.values()} == {expected}
    assert records["uniform"].found.channels == {
        "stem.0": 24, "inner.0": 40, "last.0": 56
    }  # fmt: skip


def test_the_final_training_uses_all_images_at_any_fraction(finished_run):
    labels = load_digits().target
    images = sum(math.floor(0.8 * n + 0.5) for n in np.bincount(labels))
    # Batch size 64 and 2 epochs, as in the recipe; incomplete batches are dropped.
    seen = images // 64 * 64 * 2
    for record in finished_run[1]:
        assert record.train_macs == 3 * record.found.macs * seen
        assert (record.target["fraction"], record.target["width"]) == (1.0, 1.0)
    assert finished_run[1][2].proxy["fraction"] == 0.5


def test_accuracy_is_measured_on_images_that_are_not_trained_on(finished_run):
    point, records = finished_run
    result = json.loads((point.store.root / records[0].stages["train"] / "result.json").read_text())
    right = result["result"]["top1"] / 100 * (1797 - len(point.request.dataset.train().labels))
    assert right == pytest.approx(round(right), abs=1e-9)


def test_the_counted_overhead_equals_the_closed_form(finished_run, records):
    point = finished_run[0]
    assert records["uniform"].found.overhead_macs == 0
    for method in ("direct", "transfer"):
        assert records[method].found.overhead_macs == point.overhead_macs(method)
        assert records[method].found.direct_overhead_macs == records["direct"].found.overhead_macs


def test_the_overhead_is_three_passes_for_training_and_one_otherwise(finished_run, records):
    graph = finished_run[0].proxy_blueprint.graph
    drawn = [
        math.floor(0.5 * n + 0.5)
        for n in np.bincount(finished_run[0].request.dataset.train().labels)
    ]
    held = [max(1, math.floor(0.1 * n + 0.5)) for n in drawn]
    steps = (sum(drawn) - sum(held)) // 64
    trained = 3 * 3 * 64 * steps
    forward = records["transfer"].found.overhead_macs / graph.macs() - trained
    # Two evaluations, each on all held-out images after recalibration on at most one epoch.
    assert 2 * sum(held) < forward <= 2 * (sum(held) + 64 * steps)


def test_the_saving_is_relative_to_the_direct_search(records):
    saved = records["transfer"].found.saved
    # About a quarter of the MACs (the image keeps its channels) and half of the images.
    assert 1 - 0.5 * 0.4 < saved < 1 - 0.5 * 0.2
    assert records["direct"].found.saved == 0
    assert records["transfer"].found.nominal_saving == pytest.approx(4 * 2)
    assert records["direct"].found.nominal_saving == 1


def test_the_multipliers_are_relative_to_the_channels_of_the_network(records):
    full = {"stem.0": 24, "inner.0": 40, "last.0": 56}
    for record in records.values():
        for name, count in record.found.channels.items():
            assert record.found.multipliers[name] == pytest.approx(count / full[name])


def test_the_accuracy_is_above_chance(finished_run):
    assert all(record.top1 > 30 for record in finished_run[1])
    assert all(record.top1 <= record.top5 <= 100 for record in finished_run[1])


def test_the_run_folder_has_channels_links_graph_and_log(finished_run):
    point, records = finished_run
    for record in records:
        method = record.found.method
        written = json.loads((point.folder / "channels" / f"{method}-seed0.json").read_text())
        assert written["channels"] == record.found.channels
        link = point.folder / f"train-{method}-seed0"
        assert link.resolve() == point.store.root / record.stages["train"]
        assert list(link.glob("checkpoints/step-*/tensors.safetensors"))
    assert not (point.folder / "search-uniform-seed0").exists()
    assert (point.folder / "search-direct-seed0" / "gammas.safetensors").is_file()
    graph = widthopt.WidthGraph.from_json((point.folder / "graph.json").read_text())
    assert graph.macs() == records[0].found.budget_macs
    assert (point.folder / "run.log").is_file()


def test_stored_results_are_reused(finished_run):
    point, records = finished_run
    files = {path: path.stat().st_mtime_ns for path in point.store.root.rglob("result.json")}
    written = (point.folder / "record.json").read_bytes()
    shown = []
    assert run_request(make_point(f"root={point.request.root}"), show=shown.append) == records
    assert shown == ["uniform, seed 0", "direct, seed 0", "transfer, seed 0"]
    assert {
        path: path.stat().st_mtime_ns for path in point.store.root.rglob("result.json")
    } == files
    assert (point.folder / "record.json").read_bytes() == written


def test_the_same_seed_gives_the_same_record_in_another_root(finished_run, tmp_path):
    again = run_request(make_point(f"root={tmp_path}", "methods=[transfer]"))[0]
    before = finished_run[1][2]
    assert again.found.channels == before.found.channels
    assert again.found.diagnostics == before.found.diagnostics
    assert (again.top1, again.train_loss) == (before.top1, before.train_loss)
    assert again.stages == before.stages


# Sharing.


def test_the_key_of_a_training_does_not_depend_on_its_channels(tmp_path):
    """It depends on their origin: equal channels of different origin are trained twice."""
    point = make_point_without_search(f"root={tmp_path}", "recipe.epochs=1")
    names = [
        point.train_entry(method, 0).folder.name for method in ("uniform", "direct", "transfer")
    ]
    records = run_request(point)
    assert [record.stages["train"] for record in records] == names
    assert len({tuple(record.found.channels.items()) for record in records}) == 1
    assert entry_names(tmp_path, "train") == sorted(names)
    assert len(entry_names(tmp_path, "search")) == 2
    assert len({record.top1 for record in records}) == 1


def test_direct_and_transfer_without_a_projection_share_one_search(tmp_path):
    point = make_point(f"root={tmp_path}", "projection=none", "projection.width=null",
                "projection.fraction=null")  # fmt: skip
    assert point.search_entry("direct", 0).folder == point.search_entry("transfer", 0).folder
    again = make_point("projection.width=1", "projection.fraction=1.0")
    assert again.search_entry("transfer", 0).key == point.search_entry("transfer", 0).key
    assert point.train_entry("direct", 0).key == again.train_entry("transfer", 0).key
    records = run_request(point)
    assert [record.found.method for record in records] == ["uniform", "direct", "transfer"]
    assert len(entry_names(tmp_path, "search")) == 1
    assert len(entry_names(tmp_path, "train")) == 2
    assert records[2].found.saved == 0


def test_seeds_share_no_entry():
    point = make_point("seeds=[0,1]")
    assert point.search_entry("direct", 0).key != point.search_entry("direct", 1).key
    for method in ("uniform", "direct", "transfer"):
        assert point.train_entry(method, 0).key != point.train_entry(method, 1).key


@functools.cache
def search_key(*overrides):
    return make_point(*overrides).search_entry("transfer", 0).key


@functools.cache
def train_key(*overrides, method="transfer"):
    return make_point(*overrides).train_entry(method, 0).key


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
def test_the_key_of_a_search_ignores_values_that_do_not_affect_it(override):
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
def test_the_key_of_a_search_changes_with_values_that_affect_it(override):
    assert search_key(override) != search_key()


@pytest.mark.parametrize(
    "override",
    ["root=elsewhere", "runtime.workers=2", "extrapolation=stack_last_block", "seeds=[2,0]",
     "methods=[transfer]", "dataset.memory_limit_gb=0", "algorithm.strength=5.0"],
)  # fmt: skip
def test_the_key_of_a_training_ignores_values_that_do_not_affect_it(override):
    """The extrapolation strategy does not affect it if the depths are equal."""
    assert train_key(override) == train_key()


@pytest.mark.parametrize(
    "override",
    ["recipe.search_epochs=7", "algorithm.strength=7", "projection.width=0.6",
     "projection.fraction=0.6"],
)  # fmt: skip
def test_all_searches_share_the_training_of_the_baseline(override):
    assert train_key(override, method="uniform") == train_key(method="uniform")
    assert train_key(override) != train_key()


def test_strategies_share_no_training_if_the_target_is_deeper():
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
def test_the_key_of_a_training_changes_with_values_that_affect_it(override):
    assert train_key(override) != train_key()


def test_verifying_images_does_not_change_the_key_of_a_search(tmp_path):
    for split, name in (("train", "a"), ("train", "b"), ("val", "a"), ("val", "b")):
        (tmp_path / split / name).mkdir(parents=True)
        for number in range(4):
            Image.new("RGB", (8, 8)).save(tmp_path / split / name / f"{number}.png")
    folder = ("dataset=image_folder", f"dataset.root={tmp_path}")
    keys = {search_key(*folder, f"dataset.verify={verify}") for verify in ("true", "false")}
    assert len(keys) == 1


# Budgets.


def test_the_default_budget_as_a_value_does_not_change_the_key():
    macs = make_point().budget_macs
    assert search_key(f"budget_macs={macs}") == search_key()


@pytest.mark.parametrize("share", [0.5, 1.5])
def test_all_methods_meet_a_given_budget_and_the_proxy_has_its_share(share, tmp_path):
    full = make_point()
    budget = round(share * full.budget_macs)
    point = make_point_without_search(f"root={tmp_path}", f"budget_macs={budget}")
    for method in ("uniform", "direct", "transfer"):
        match = search_widths(point.request, method=method)
        assert match.budget_macs == budget
        assert 0.97 * budget <= match.macs <= budget
    assert point.search_budget("direct") == budget
    assert point.search_budget("transfer") / full.proxy_blueprint.graph.macs() == pytest.approx(
        share, rel=1e-3
    )


def test_an_unreachable_budget_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(InputError, match=r"^budget_macs is 9, but the narrowest network has"):
        search(*BASE, f"root={tmp_path / 'runs'}", "budget_macs=9")
    assert not (tmp_path / "runs").exists()


# The Python interface.


def test_the_returned_channels_build_a_network_of_the_stated_cost(finished_run, counted):
    point, records = finished_run
    overrides = [*BASE, f"root={point.request.root}", "methods=[uniform]"]
    result = search(*overrides)  # the result of the search is in the store
    assert result == records[2].found
    model = Tiny(10)
    graph = widthopt.trace(model, resolution=12)
    resized = widthopt.resize(model, graph, result.channels)
    assert counted(resized, 12) == result.macs
    assert sum(parameter.numel() for parameter in resized.parameters()) == result.parameters
    assert resized(torch.zeros(2, 3, 12, 12)).shape == (2, 10)


@pytest.mark.parametrize("name", widthopt.__all__)
def test_every_public_name_can_be_imported(name):
    assert getattr(widthopt, name).__name__ == name


# Plans.


def test_a_plan_lists_the_runs_and_writes_nothing(tmp_path):
    root = tmp_path / "runs"
    point = make_point(f"root={root}")
    plan = Plan.of([point.request])
    assert [run.what for run in plan.runs.values()] == [
        "tiny on digits, (1, 1, 12, 100%): morphnet search, seed 0",
        "tiny on digits, (0.5, 1, 12, 50%): morphnet search, seed 0",
        "tiny on digits, (1, 1, 12, 100%): training, baseline, seed 0",
        "tiny on digits, (1, 1, 12, 100%): training, morphnet at (1, 1, 12, 100%), seed 0",
        "tiny on digits, (1, 1, 12, 100%): training, morphnet at (0.5, 1, 12, 50%), seed 0",
    ]
    assert set(plan.states().values()) == {"missing"}
    direct, transfer, training, *_ = plan.runs.values()
    assert direct.macs == point.overhead_macs("direct") > transfer.macs
    images = len(point.request.dataset.train().labels) // 64 * 64 * 2
    assert training.macs == 3 * point.budget_macs * images
    assert not root.exists()


def test_a_plan_has_the_states_of_stored_runs(finished_run):
    assert set(Plan.of([finished_run[0].request]).states().values()) == {"done"}
    more = Plan.of([make_point(f"root={finished_run[0].request.root}", "recipe.epochs=3").request])
    kinds = {run.kind: more.states()[name] for name, run in more.runs.items()}
    assert kinds == {"search": "done", "train": "missing"}
