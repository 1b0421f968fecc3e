"""Plans of the paper's experiments, keys and cost of runs, manifests, and invalid sweeps."""

import dataclasses
import html
import json
from pathlib import Path

import pytest
from hydra import initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from PIL import Image

from hydra_plugins.widthopt_launchers.sweeper import check_once, expand_sweep
from widthopt.cli import _plan
from widthopt.config.compose import build_requests, compose, compose_sweep
from widthopt.config.typed import NON_IDENTITY_KEYS, build_request, to_plain
from widthopt.errors import InputError
from widthopt.reporting.console import show_plan
from widthopt.reporting.sweeps import draw
from widthopt.runs.manifest import Manifest
from widthopt.runs.plan import GPU_MACS_PER_SECOND, Cost, Plan
from widthopt.runs.point import SizedRequest
from widthopt.sweeps.workload import Sweep


CONF = Path(__file__).parents[1] / "conf"
EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))
# Points, searches and trainings of each experiment (docs/paper.md).
PAPER = {
    "fig3_width": (108, 108, 108),
    "fig3_depth": (72, 72, 72),
    "fig4_extrapolation": (48, 24, 42),
    "fig5_resolution": (72, 72, 72),
    "fig5_fraction": (90, 90, 90),
    "fig6_compound": (72, 72, 72),
    "uniform": (30, 0, 30),
    "table1": (108, 54, 108),
}


def counts(plan):
    """Return the number of points, searches and trainings."""
    kinds = [run.kind for run in plan.runs.values()]
    return len(plan.points), kinds.count("search"), kinds.count("train")


@pytest.fixture(scope="module")
def experiments():
    """The requests of every experiment of the paper."""
    return {name: compose_sweep([f"experiment={name}"]) for name in PAPER}


@pytest.fixture(scope="module")
def paper(experiments):
    return Plan.of([item for items in experiments.values() for item in items], images=False)


# ---------------------------------------------------------------------------- the paper's grid


def test_the_paper_has_600_points_369_searches_and_552_trainings(paper):
    assert counts(paper) == (600, 369, 552)


@pytest.mark.parametrize("name", PAPER)
def test_each_experiment_has_the_documented_points_and_runs(name, experiments):
    assert counts(Plan.of(experiments[name], images=False)) == PAPER[name]


def test_all_runs_have_different_descriptions(paper):
    assert len({run.what for run in paper.runs.values()}) == 369 + 552


def test_descriptions_contain_only_the_values_that_differ():
    words = ["dataset=digits", "network=resnet18", "methods=[transfer]", "seeds=[0]"]
    sweep = [*words, "algorithm=morphnet", "algorithm.strength=1,2", "recipe.epochs=3,4"]
    proxy, target = "(0.312, 1, 32, 100%)", "(1, 1, 32, 100%)"
    start = "resnet18 on digits,"
    assert [run.what for run in Plan.of(compose_sweep(sweep)).runs.values()] == [
        f"{start} {proxy}: morphnet search, strength {strength}, seed 0" for strength in (1.0, 2.0)
    ] + [
        f"{start} {target}: training, morphnet at {proxy}, epochs {epochs}, strength {strength}, "
        "seed 0"
        for strength in (1.0, 2.0)
        for epochs in (3, 4)
    ]


def test_a_sweep_lists_the_modules_that_its_data_sets_import(tmp_path):
    words = ["dataset=digits", f"root={tmp_path}", "seeds=[0]"]
    with initialize_config_module("conf", version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        imports = Sweep(loader, [words, [*words, "algorithm=uniform"]]).imports
    assert imports == ["sklearn.datasets"]


def test_the_task_of_a_training_names_the_search_that_it_needs(tmp_path):
    words = ["recipe=smoke", f"root={tmp_path}", "seeds=[0]", "methods=[uniform,transfer]"]
    with initialize_config_module("conf", version_base="1.3"):
        sweep = Sweep(GlobalHydra.instance().config_loader(), [words])
    sweep.begin(assume_yes=True)
    search, *trainings = sweep.tasks()
    assert (search.name[:7], search.needs) == ("search-", ())
    needs = {"baseline" in training.what: training.needs for training in trainings}
    assert needs == {True: (), False: (search.name,)}


def test_a_report_lists_missing_points_and_their_baselines(tmp_path, experiments):
    few = [item for item in experiments["fig4_extrapolation"] if item.network.name == "resnet18"]
    few = [dataclasses.replace(item, root=str(tmp_path)) for item in few if item.seeds == (1,)]
    draw(tmp_path, [Manifest.of(Plan.of(few, images=False), title="few", tracking={})])
    page = html.unescape((tmp_path / "report" / "index.html").read_text())
    start = "resnet18 on imagenet, (1, 4, 224, 100%): training,"
    assert f"{start} dmcp at (1, 3, 224, 100%), strategy stack_last_block, seed 1" in page
    assert f"{start} baseline, seed 1" in page
    assert (
        page.count(start) == 7 + 1
    )  # two of the eight points share a training, because no block is added


def test_the_shared_searches_match_a_count_by_hand(paper):
    """Each network, algorithm and seed has 6 + 3 + 3 + 4 + 3 = 19 searches."""
    searches = [run for run in paper.runs.values() if run.kind == "search"]
    imagenet = [run for run in searches if run.point.request.dataset.name == "imagenet"]
    for network in ("resnet18", "mobilenet_v2"):
        for algorithm in ("morphnet", "autoslim", "dmcp"):
            for seed in (0, 1, 2):
                mine = [
                    run
                    for run in imagenet
                    if (run.point.request.network.name, run.seed) == (network, seed)
                    and run.point.request.algorithm.name == algorithm
                ]
                # Widths, depths, resolutions, fractions, compound; shared settings count once.
                assert len(mine) == 6 + 3 + 3 + 4 + 3
    assert len(searches) - len(imagenet) == 9 * 3


def test_every_training_comes_after_the_search_that_it_needs(paper):
    seen = set()
    for name, run in paper.runs.items():
        assert seen.issuperset(run.needs)
        assert len(run.needs) == (run.kind == "train" and run.method != "uniform")
        seen.add(name)


def test_the_projected_settings_are_those_of_the_paper(paper):
    sources = {
        (s.width, s.depth, s.resolution, s.fraction)
        for s in (
            run.point.setting(run.method) for run in paper.runs.values() if run.kind == "search"
        )
    }
    widths = {(w, 1, 224, 1.0) for w in (0.312, 0.5, 0.707, 1, 1.414, 1.732)}
    depths = {(1, d, 224, 1.0) for d in (1, 2, 3, 4)}
    resolutions = {(1, 1, r, 1.0) for r in (64, 160, 224, 320)}
    fractions = {(1, 1, 224, f) for f in (0.05, 0.1, 0.2, 0.5, 1.0)}
    compound = {(0.312, 1, 64, 0.05), (0.707, 1, 160, 0.1), (1, 1, 224, 0.5), (1.414, 2, 320, 1.0)}
    cifar = {(w, d, 64, 1.0) for w, d, r, f in widths | depths}
    assert sources == widths | depths | resolutions | fractions | compound | cifar


def test_the_counted_saving_of_the_320_times_headline_is_312(paper):
    point = next(
        item.point
        for item in paper.points
        if item.point.request.projection.width == 0.707
        and item.point.request.projection.resolution == 160
        and item.point.request.algorithm.name == "morphnet"
        and item.point.request.network.name == "resnet18"
    )
    # The nominal saving is 4 * 2 * 4 * 10 = 320. Counted MACs give 312.
    ratio = point.overhead_macs("direct") / point.overhead_macs("transfer")
    assert ratio == pytest.approx(312, rel=0.02)


def test_all_experiments_of_the_paper_exist():
    assert set(PAPER) | {"demo"} <= set(EXPERIMENTS)


@pytest.mark.parametrize("name", [experiment for experiment in EXPERIMENTS if experiment != "demo"])
def test_every_experiment_states_claim_command_points_and_goal(name):
    text = (CONF / "experiment" / f"{name}.yaml").read_text()
    head = text.partition("defaults:")[0].lower()
    for word in ("claim", f"command: widthopt experiment={name}", "points:", "goal:"):
        assert word in head
    for line in text.splitlines():
        assert len(line) <= 200


@pytest.mark.parametrize("name", [experiment for experiment in EXPERIMENTS if experiment != "demo"])
def test_the_stated_number_of_points_is_correct(name):
    text = (CONF / "experiment" / f"{name}.yaml").read_text()
    stated = int(text.lower().partition("points: ")[2].split()[0])
    with initialize_config_module("conf", version_base="1.3"):
        points = expand_sweep(GlobalHydra.instance().config_loader(), [f"experiment={name}"])
    assert len(points) == stated


@pytest.mark.parametrize(
    "name", [experiment for experiment in EXPERIMENTS if experiment.startswith("mini_")]
)
def test_a_miniature_has_the_figures_of_its_experiment(name):
    paper = {"mini_fig4_extrapolation": "fig4_extrapolation"}.get(name, name[len("mini_") :])
    figures, expected = (
        {
            type(figure).__name__
            for figure in compose([f"experiment={item}", *first_values(item)]).figures
        }
        for item in (name, paper)
    )
    assert figures == expected


def first_values(experiment):
    """Return overrides with the first value of each swept key of an experiment."""
    with initialize_config_module("conf", version_base="1.3"):
        words = expand_sweep(GlobalHydra.instance().config_loader(), [f"experiment={experiment}"])[
            0
        ]
    return [word for word in words if not word.startswith("experiment=")]


def test_values_on_the_command_line_replace_swept_values():
    words = ["experiment=fig3_width", "network=resnet18", "algorithm=dmcp", "seeds=[0]"]
    requests = compose_sweep(words)
    assert [item.projection.width for item in requests] == [0.312, 0.5, 0.707, 1, 1.414, 1.732]
    assert {item.network.name for item in requests} == {"resnet18"}


SAVINGS = {
    # Saving without loss of accuracy in percent, with a quotation of the paper.
    "fig3_width": (
        ("resnet18", 96, "can be saved by up to 96% for all three algorithms"),
        ("mobilenet_v2", 80, "can transfer well and save up to 80% width optimization overhead"),
    ),
    "fig3_depth": tuple(
        (name, 75, "up to 75% width optimization overhead can be saved ... two networks")
        for name in ("resnet18", "mobilenet_v2")
    ),
    "fig5_resolution": tuple(
        (name, 96, "except for MorphNet targeting ResNet18 ... up to 96%")
        for name in ("resnet18", "mobilenet_v2")
    ),
    "fig5_fraction": tuple(
        (name, 95, "95% ... can be saved and still outperform the uniform baseline for both")
        for name in ("resnet18", "mobilenet_v2")
    ),
    "fig6_compound": tuple(
        (name, pytest.approx(100 * (1 - 1 / 320), abs=0.05), "up to 320x")
        for name in ("resnet18", "mobilenet_v2")
    ),
}


@pytest.mark.parametrize("name", SAVINGS)
def test_the_savings_are_those_of_the_paper(name, experiments):
    curves = experiments[name][0].figures[0]
    assert curves.paper_saved == {network: percent for network, percent, _ in SAVINGS[name]}


def test_the_widths_of_the_last_layers_are_those_of_the_paper(experiments):
    """ "The average optimized width has 1300 channels for ResNet18 and 3785 for MobileNetV2." """
    (average,) = (
        figure for figure in experiments["fig3_width"][0].figures if figure.name == "figA1"
    )
    assert average.paper_last == {"resnet18": 1300, "mobilenet_v2": 3785}


def test_the_recipe_is_that_of_appendix_a(paper):
    """Appendix A: rate 0.2 at 256 images, 5 warm-up epochs, 100 and 40 epochs, batch size 1024."""
    for run in paper.runs.values():
        recipe = run.point.request.recipe
        assert (recipe.learning_rate, recipe.warmup_epochs, recipe.batch_size) == (0.2, 5, 1024)
        assert (recipe.epochs, recipe.search_epochs, recipe.momentum) == (100, 40, 0.9)
        assert (recipe.label_smoothing, recipe.augmentation) == (0.1, "paper")


# ------------------------------------------------------------------------------- composition


@pytest.mark.parametrize("name", [*PAPER, "mini_fig6_compound"])
def test_points_of_a_sweep_equal_points_composed_by_hydra(name):
    """Compare every 17th point with Hydra's composition of the same overrides."""
    with initialize_config_module("conf", version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        points = expand_sweep(loader, [f"experiment={name}"])[::17]
        together = build_requests(loader, points)
    for words, item in zip(points, together, strict=True):
        single = compose(words)
        assert item.fields == single.fields
        assert (item.root, item.runtime, item.figures) == (
            single.root,
            single.runtime,
            single.figures,
        )


def test_values_of_a_point_do_not_affect_the_next_point():
    with initialize_config_module("conf", version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        left, second = build_requests(
            loader, [["projection.width=0.7", "seeds=[3]"], ["target.depth=2"]]
        )
    assert (left.projection.width, left.seeds, left.target.depth) == (0.7, (3,), 1)
    assert second.fields == compose(["target.depth=2"]).fields


def test_groups_are_composed_once_for_each_choice(monkeypatch):
    calls = []
    with initialize_config_module("conf", version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        points = expand_sweep(loader, ["experiment=fig3_width"])
        compose_one = loader.load_configuration

        def count(*args, **kwargs):
            calls.append(args)
            return compose_one(*args, **kwargs)

        monkeypatch.setattr(loader, "load_configuration", count)
        assert len(build_requests(loader, points)) == 108
    assert len(calls) == 2 * 3  # networks and algorithms


def test_a_request_built_from_its_written_values_is_equal():
    words = ["root=elsewhere", "runtime.workers=3", *first_values("fig6_compound")]
    request = compose(["experiment=fig6_compound", *words])
    again = build_request(_config(json.loads(json.dumps(to_plain(request)))))
    assert again.fields == request.fields
    assert (again.root, again.runtime) == (request.root, request.runtime)


def _config(content):
    from omegaconf import OmegaConf  # noqa: PLC0415 (used only here)

    return OmegaConf.create(content)


@pytest.mark.parametrize("value", ["1", "1.0", "'1'", "'1.0'", '"1e0"'])
def test_equal_numbers_in_any_notation_give_equal_keys(value):
    here = compose([f"projection.width={value}", f"algorithm.strength={value}"])
    there = compose(["projection.width=1.0", "algorithm.strength=1.0"])
    assert here.fields == there.fields
    keys = [SizedRequest(item).search_entry("transfer", 0).key for item in (here, there)]
    assert keys[0] == keys[1]


@pytest.mark.parametrize("value", ["one", "'1,5'", "''", "nan", "'nan'", "true"])
def test_a_value_that_is_not_a_number_is_refused(value):
    with pytest.raises(InputError, match=r"^projection.width is .*, but (it must be a number|a w)"):
        compose([f"projection.width={value}"])


# ---------------------------------------------------------------------------------- identity


def test_the_keys_of_pinned_runs_do_not_change():
    """If a pinned key changes, stored results are no longer found."""
    words = ["experiment=fig3_width", *first_values("fig3_width")]
    point = SizedRequest(compose(words), images=False)
    assert point.search_entry("transfer", 0).folder.name == PINNED["search"]
    assert point.train_entry("transfer", 0).folder.name == PINNED["train"]
    assert point.train_entry("uniform", 0).folder.name == PINNED["uniform"]


PINNED = {
    "search": "search-2803cd6802ad",
    "train": "train-257eeb49730a",
    "uniform": "train-f6015661743d",
}

CHANGES = {
    str: lambda value: f"{value}x",
    bool: lambda value: not value,
    int: lambda value: value + 1,
    float: lambda value: value * 0.9,
    type(None): lambda _: 0.5,
    dict: lambda _: {"more": 1},
}
EXCEPTIONS = {
    # Keys contain only the values that follow from these.
    "projection._target_", "projection.width", "projection.depth", "projection.resolution",
    "projection.fraction", "target._target_", "target.width", "target.depth", "target.resolution",
    "budget_macs", "extrapolation.strategy",
    # These select the runs.
    "methods", "seeds",
    # These do not change results.
    "dataset.memory_limit_gb", "dataset.resolution", "dataset.download",
}  # fmt: skip
"""Values that are in no key; see also `verification_keys`."""

EXCEPT_PREFIXES = {
    "search": ("extrapolation.", "recipe.epochs"),
    "train": (),
    "uniform": ("algorithm.", "recipe.search_epochs"),
}
"""Prefixes of further values that are not in the key of an entry."""


def verification_keys(dataset):
    """Return the values of a data set that only locate or verify its images.

    The classes of an image folder depend on ``root``, so there it is part of the key.
    """
    return {"dataset.verify"} if hasattr(dataset, "verify") else {"dataset.root"}


def leaves(table, path=()):
    """Yield the path and value of each leaf of nested mappings."""
    for key, value in table.items():
        if value and isinstance(value, dict):
            yield from leaves(value, (*path, key))
        else:
            yield (*path, key), value


def with_leaf(fields, path, value):
    """Return a copy of the fields with another value at this path."""
    copied = json.loads(json.dumps(fields))
    table = copied
    for key in path[:-1]:
        table = table[key]
    table[path[-1]] = value
    return copied


CHOICES = [
    (group, path.stem)
    for group in ("network", "dataset", "algorithm", "projection", "extrapolation", "recipe")
    for path in sorted((CONF / group).glob("*.yaml"))
]
REQUIRED = {
    "custom": ["network.factory=torchvision.models.resnet18"],
    "torchvision": ["network.name=alexnet"],
}


@pytest.mark.parametrize(("group", "choice"), CHOICES)
def test_every_value_changes_a_key_or_is_a_listed_exception(group, choice, tmp_path, monkeypatch):
    """A new value fails here if it is in no key and not listed above."""
    monkeypatch.setenv("WIDTHOPT_DATA", str(tmp_path))
    for name in ("image_folder", "cifar100-subset"):
        for split in ("train/a", "train/b", "val/a", "val/b"):
            (tmp_path / name / split).mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(tmp_path / name / split / "0.png")
    depth = 2 if group == "projection" else 1  # the depth of the deepest proxy
    words = [f"{group}={choice}", "target.resolution=224", f"target.depth={depth}"]
    request = compose([*words, *REQUIRED.get(choice, ())])
    point = SizedRequest(request, images=False)

    def names(fields):
        point.request = dataclasses.replace(request, fields=fields)
        return {
            "search": point.search_entry("transfer", 0).key,
            "train": point.train_entry("transfer", 0).key,
            "uniform": point.train_entry("uniform", 0).key,
        }

    before, unused_of = names(request.fields), {kind: set() for kind in EXCEPT_PREFIXES}
    every = {".".join(path) for path, _ in leaves(request.fields)}
    for path, value in leaves(request.fields):
        kind = type(value)
        changed = CHANGES[kind](value) if kind in CHANGES else [9]
        after = names(with_leaf(request.fields, path, changed))
        for entry, unused in unused_of.items():
            if after[entry] == before[entry]:
                unused.add(".".join(path))
    exceptions = EXCEPTIONS | verification_keys(request.dataset)
    assert unused_of == {
        entry: {name for name in every if name in exceptions or name.startswith(prefixes)}
        for entry, prefixes in EXCEPT_PREFIXES.items()
    }


def test_non_identity_keys_are_not_in_the_fields():
    assert set(NON_IDENTITY_KEYS) == {"root", "runtime", "resources", "figures", "tracking"}
    request = compose([])
    assert request.fields.keys() & set(NON_IDENTITY_KEYS) == set()


# -------------------------------------------------------------------------------------- cost


def test_the_cost_covers_runs_that_are_not_done_and_the_longest_chain(paper):
    states = dict.fromkeys(paper.runs, "missing")
    item = paper.cost(states, nodes=1, macs_per_second=1e12)
    assert item.macs == item.macs_left == sum(run.macs for run in paper.runs.values())
    assert item.gpu_hours_left == pytest.approx(item.macs / 1e12 / 3600)
    assert item.wall_hours_left == pytest.approx(item.gpu_hours_left / 8)
    many = paper.cost(states, nodes=10**6, macs_per_second=1e12)
    longest = max(
        run.macs + sum(paper.runs[need].macs for need in run.needs) for run in paper.runs.values()
    )
    assert many.wall_hours_left == pytest.approx(longest / 8e12 / 3600)
    done = dict.fromkeys(paper.runs, "done")
    nothing = paper.cost(done, nodes=1, macs_per_second=1e12)
    assert nothing == Cost(600, 369, 552, {"done": 921}, item.macs, 0, 0.0, 0.0)


def test_the_macs_of_a_resnet18_training_match_a_calculation_by_hand(paper):
    """1.814 GMACs, three passes, 1251 steps of 1024 images, 100 epochs."""
    name = next(
        point.train
        for point in paper.points
        if point.method == "uniform"
        and point.point.request.network.name == "resnet18"
        and (point.point.target.width, point.point.target.depth) == (1, 1)
        and point.point.target.resolution == 224
    )
    assert paper.runs[name].macs == 3 * 1_814_073_344 * 1251 * 1024 * 100


def test_the_speed_of_a_v100_follows_from_100_gpu_hours_of_resnet50():
    """Paper, section 1: 100 GPU hours; 4.089 GMACs, three passes, 100 epochs of ImageNet."""
    macs = 3 * 4.089e9 * 1_281_167 * 100
    assert pytest.approx(macs / (100 * 3600), rel=0.01) == GPU_MACS_PER_SECOND


# ----------------------------------------------------------------------------------- manifests


def test_a_manifest_read_from_json_has_the_runs_of_the_plan(experiments, tmp_path):
    plan = Plan.of(experiments["fig4_extrapolation"], images=False)
    item = Manifest.of(plan, title="fig4", tracking={})
    again = Manifest.from_json(item.to_json(), name="x")
    assert again.name == item.name
    assert again.own.keys() == plan.runs.keys()
    assert len(again.points) == 48
    store = plan.points[0].point.store
    assert {
        name: entry.folder for name, entry in again.entries(store).items() if name in plan.runs
    } == {name: run.entry.folder for name, run in plan.runs.items()}
    assert set(again.states(store).values()) == {"missing"}
    assert [figure["_target_"] for figure in again.figures.values()] == [
        "widthopt.reporting.figures.transfer.Transfer"
    ]
    del tmp_path


def test_shared_points_are_in_the_figures_of_both_experiments(experiments):
    plan = Plan.of([*experiments["fig3_depth"], *experiments["fig4_extrapolation"]], images=False)
    shown = [
        name
        for point in Manifest.of(plan, title="two", tracking={}).points
        for name in point["figures"]
    ]
    counts = {name: shown.count(name) for name in set(shown)}
    assert counts == {"fig3_depth": 72, "figA2_depth": 72, "fig4": 48}


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", "x is not the manifest of a sweep"),
        ("[]", "x is not the manifest of a sweep"),
        ('{"format": 3}', "x is not the manifest of a sweep"),
        (b"\xff", "x is not the manifest of a sweep"),
        ('{"format": 1, "name": "", "points": [], "runs": {}, "figures": {}}', "x has format 1,"),
    ],
)
def test_a_file_that_is_not_a_manifest_is_refused(text, line):
    with pytest.raises(InputError, match=f"^{line}"):
        Manifest.from_json(text, name="x")


@pytest.mark.parametrize(
    ("key", "value"), [("points", [{}]), ("points", 3), ("runs", {}), ("name", "another")]
)
def test_an_edited_manifest_is_refused(experiments, key, value):
    plan = Plan.of(experiments["uniform"][:1], images=False)
    content = json.loads(Manifest.of(plan, title="one", tracking={}).to_json())
    content["sweep"][key] = value
    with pytest.raises(InputError) as error:
        Manifest.from_json(json.dumps(content), name="x")
    assert str(error.value) == (
        "x was changed after it was written, but its checksum must match; restore it, or start "
        "the same sweep again"
    )


# ----------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (
            ["experiment=glob(fig9*)"],
            (
                "experiment is glob(fig9*), but nothing matches it and the sweep has no points; "
                "see widthopt --help"
            ),
        ),
        (
            ["algorithm=glob(none*)", "experiment=fig3_width"],
            (
                "algorithm is glob(none*), but nothing matches it and the sweep has no points; "
                "see widthopt --help"
            ),
        ),
        (
            ["experiment=fig3_width", "projection.widht=1"],
            (
                "projection.widht is not a key, but only known keys are read; did you mean "
                "projection.width?"
            ),
        ),
        (
            ["experiment=fig3_widht"],
            "experiment is fig3_widht, but there is no such choice; use one of "
            + ", ".join(EXPERIMENTS),
        ),
        (
            ["experiment=mini"],
            "experiment is mini, but there is no such choice; use one of " + ", ".join(EXPERIMENTS),
        ),
        (
            ["algorithm=dmcp,autoslim", "algorithm.strength=1"],
            (
                "algorithm.strength is set, but not every choice of algorithm=dmcp,autoslim has "
                "it; sweep over the choices that have it in a command of their own: "
                "algorithm=dmcp, algorithm=morphnet, algorithm=morphnet_auto, "
                "algorithm=morphnet_short"
            ),
        ),
        (
            ["hydra.launcher.max_parallel=2"],
            (
                "hydra.launcher.max_parallel is not a key, but only known keys are read; first "
                "choose hydra/launcher=local, which has it"
            ),
        ),
        (
            ["hydra/launcher=local", "hydra.launcher.max_paralel=2"],
            (
                "hydra.launcher.max_paralel is not a key, but only known keys are read; did you "
                "mean hydra.launcher.max_parallel?"
            ),
        ),
        (
            ["root="],
            "root is empty, but it must be the path of a folder, such as root=runs; correct it",
        ),
        (
            ["experiment=mini_uniform", "recipe=smoke", "recipe.epochs=1", "seeds=[0]"],
            (
                "recipe is smoke, but experiment=mini_uniform has values of its own for "
                "recipe.learning_rate, recipe.search_epochs, recipe.warmup_epochs; give values for "
                "these too, or leave recipe=smoke out"
            ),
        ),
        (
            ["experiment=demo", "projection=none,compound_1"],
            (
                "projection is none,compound_1, but experiment=demo has values of its own for "
                "projection.fraction, projection.width; give values for these too, or leave "
                "projection=none,compound_1 out"
            ),
        ),
        (
            ["experiment=fig3_width", "projection.width=abc"],
            "projection.width is abc, but it must be a number; correct it",
        ),
    ],
)
def test_an_invalid_sweep_raises_a_one_line_error(words, line):
    with pytest.raises(InputError) as error:
        Plan.of(compose_sweep(words), images=False)
    assert str(error.value) == line


def test_a_missing_config_dir_raises_a_one_line_error(tmp_path):
    with pytest.raises(InputError) as error:
        compose_sweep([], config_dir=str(tmp_path / "none"))
    assert str(error.value) == (
        f"--config-dir is {tmp_path}/none, but there is no such folder; name a folder with "
        "choices of your own"
    )


def test_a_plan_names_proxies_more_expensive_than_their_targets(capsys):
    words = ["target.width=0.25", "projection.width=0.125,0.25,0.5", "seeds=[0,1]"]
    plan = Plan.of(compose_sweep(words))
    show_plan(plan, plan.states())
    lines = [line for line in capsys.readouterr().out.splitlines() if "costs about" in line]
    # Twice the width is four times the MACs.
    (line,) = lines
    assert line == (
        "a search on the proxy (0.5, 1, 32, 100%) costs about 4 times as much as on its target "
        "(0.25, 1, 32, 100%); lower the larger axis, for example projection.width=..."
    )


@pytest.mark.parametrize(
    ("words", "key", "value"),
    [
        (["network=mobilenet_v2"], ("network", "name"), "mobilenet_v2"),
        (["tracking=disabled", "seeds=[3]"], ("recipe", "epochs"), 6),
        (["projection=none", "projection.width=0.2", "projection.fraction=1"],
         ("projection", "width"), 0.2),
    ],
)  # fmt: skip
def test_a_choice_that_discards_no_value_of_an_experiment_is_accepted(words, key, value):
    group, name = key
    assert {item.fields[group][name] for item in compose_sweep(["experiment=demo", *words])} == {
        value
    }


def test_two_values_of_one_key_raise_an_error():
    with pytest.raises(InputError) as error:
        check_once(["-m", "projection.width=0.5", "seeds=[0]", "projection.width=1"])
    assert str(error.value) == (
        "projection.width is 0.5 and 1, but it has one value in one command; leave one of them "
        "out, or sweep over both with -m and a comma"
    )
    check_once(["--config-dir=a", "--config-dir=b", "seeds=[0]", "seeds=[0]"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["+seeds=[0]", "seeds=[1]"], "seeds is [0] and [1]"),
        (["seeds=[0]", "++seeds=[1]"], "seeds is [0] and [1]"),
        (["target.width=1", "target={width:0.5,depth:1}"], "target.width is 1 and 0.5"),
        (["target={width:1},{width:2}", "target.width=1"], "target.width is 1,2 and 1"),
        (["a={b:{c:1}}", "a.b={c:2}"], "a.b.c is 1 and 2"),
    ],
)
def test_two_values_of_one_key_raise_an_error_in_any_notation(words, message):
    with pytest.raises(InputError) as error:
        check_once(words)
    assert str(error.value).startswith(f"{message}, but it has one value in one command;")


def test_values_that_do_not_conflict_are_accepted():
    check_once(["target={width:0.5,depth:1}", "target.resolution=64", "target.width=0.5"])
    check_once(["projection=width", "projection.width=0.5", "+projection.more=1", "a={b", "a={b"])


def test_plan_detects_conflicts_and_accepts_the_multirun_flag(capsys):
    words = ["dataset=imagenet", "methods=[uniform]", "seeds=[0],[1]"]
    for more in (["-m"], ["--multirun"]):
        _plan([*more, *words, "--json"])
        assert json.loads(capsys.readouterr().out)["points"] == 2
    with pytest.raises(InputError, match=r"^methods is \[uniform\] and \[direct\], but it has one"):
        _plan([*words, "methods=[direct]"])


FIGURE = """figures:
  - _target_: widthopt.reporting.figures.average.AverageWidths
    title: ""
    claim: ""
    panels: {}
    paper_last: {}
    last: {}
"""


@pytest.mark.parametrize("content", [b"3\n", b"\xff\xfe\xfa\n"])
def test_an_experiment_file_that_is_not_a_mapping_raises_one_line(tmp_path, content):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_bytes(content)
    with pytest.raises(
        InputError, match=r"^experiment=mine cannot be read, but each .*; correct it$"
    ):
        compose_sweep(["experiment=mine"], config_dir=str(tmp_path))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("projection:\n  widht: 1\n", "projection.widht"),
        ("wrong: [1\n", "mine.yaml"),
        ("hydra:\n  sweeper:\n    params:\n      projection.widht: 1,2\n", "projection.widht"),
        (
            "figures:\n  - _target_: widthopt.reporting.figures.nothing.FigureSpec\n",
            "figures[0]._target_",
        ),
        ("figures: 3\n", "figures is 3, but it is a list"),
        (
            "hydra:\n  sweeper:\n    params: 3\n",
            "hydra.sweeper.params is 3, but it is a mapping of keys",
        ),
        (
            "defaults:\n  - mine\n",
            "experiment=mine cannot be read, but each choice is a UTF-8 file with a ",
        ),
        (
            f"{FIGURE}    name: ../../evil\n",
            "figures[0].name is ../../evil, but it is part of file names",
        ),
        (
            f"{FIGURE}    name: .hidden\n",
            "figures[0].name is .hidden, but it is part of file names",
        ),
        (
            "figures:\n  - _target_: widthopt.projection.Width\n    multiplier: 1\n",
            "figures[0]._target_ is widthopt.projection.Width, but a figure has name, title, claim",
        ),
        ("seeds: zero\n", "seeds is zero, but it is a list"),
    ],
)
def test_an_invalid_experiment_file_raises_a_one_line_error(tmp_path, text, message):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(f"# @package _global_\n{text}")
    with pytest.raises(InputError) as error:
        compose_sweep(["experiment=mine"], config_dir=str(tmp_path))
    assert message in str(error.value)
    assert "\n" not in str(error.value)
