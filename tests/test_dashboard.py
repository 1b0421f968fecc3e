"""The dashboard shows what is logged, and nothing else."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from commands import NETWORK, TINY, command, one_line, widthopt
from wandb_server import KEY, Server

from widthopt.__main__ import PAPER
from widthopt.config import compose
from widthopt.dashboard import HEALTH, as_json, sections, workspace
from widthopt.pipeline import Point, run
from widthopt.tracking.lines import rows
from widthopt.tracking.metrics import BY_STEP, CURVES, MEDIA, OUTCOME, PERFORMANCE, SEARCH, known


LIBRARY = pytest.mark.skipif(
    importlib.util.find_spec("wandb_workspaces") is None, reason="wandb-workspaces is optional"
)


def environment(folder):
    """What a process finds: modules in the folder first, and no home but that."""
    modules = os.pathsep.join([str(folder), str(Path(__file__).parents[1]), *sys.path])
    return {**os.environ, "PYTHONPATH": modules, "HOME": str(folder)}


@pytest.fixture(scope="module")
def paper():
    """The dashboard of the paper's figures."""
    figures = {one.name: one for name in PAPER for one in compose([f"experiment={name}"]).figures}
    return sections(figures.values())


@pytest.fixture(scope="module")
def logged(tmp_path_factory):
    """Every name in the rows of a search by each algorithm, and of the trainings behind them."""
    folder = tmp_path_factory.mktemp("logged")
    (folder / "network_of_the_dashboard.py").write_text(NETWORK)
    sys.path.append(str(folder))
    words = [one for one in TINY if not one.startswith("algorithm")]
    words += ["network.factory=network_of_the_dashboard.MyNetwork", f"root={folder}"]
    figures = tuple(compose(["experiment=fig3_width"]).figures)
    for name in ("morphnet", "autoslim", "dmcp"):
        asked = compose([*words, f"algorithm={name}", "tracking.every=10"])
        run(Point(replace(asked, figures=figures)))
    sys.path.remove(str(folder))
    return {key for path in folder.rglob("metrics.jsonl") for row in rows(path) for key in row}


def test_every_line_of_the_dashboard_is_of_what_runs_log(paper, logged):
    shown = set()
    for one in paper:
        for panel in one.panels:
            if panel.kind == "line":
                shown |= {name.replace(f"/{one.figure}/", "/fig3_width/") for name in panel.y}
                shown.add(panel.x.replace(f"/{one.figure}/", "/fig3_width/"))
    mine = {
        re.sub("/(resnet18|mobilenet_v2)/", "/network_of_the_dashboard.MyNetwork/", name)
        for name in shown
    }
    assert mine - logged == {"perf/gpu_memory_gib"}  # on an accelerator


@pytest.mark.parametrize(
    ("figure", "by"),
    [
        ("fig3_width", "algorithm"), ("fig3_depth", "algorithm"), ("fig4", "extrapolation"),
        ("fig5_resolution", "algorithm"), ("fig5_fraction", "algorithm"), ("fig6", "algorithm"),
    ],
)  # fmt: skip
def test_a_figure_of_the_paper_has_its_panels_and_its_lines(figure, by, paper):
    """Two networks; a line for each algorithm, but for each strategy in figure 4."""
    (one,) = [section for section in paper if section.figure == figure]
    assert [
        (panel.x, *panel.y, panel.by) for panel in one.panels if panel.kind == "line"
    ] == [
        (f"figures/{figure}/saved_pct", f"figures/{figure}/{network}/top1", by)
        for network in ("resnet18", "mobilenet_v2")
    ]  # fmt: skip


def test_what_tells_lines_apart_is_in_a_runs_configuration(paper):
    words = ("target.depth=2", "projection.depth=1", "extrapolation=stack_last_block")
    point = Point(compose([*words]), images=False)
    config = point.about("train", "transfer", 0, point.train_stage("transfer", 0)).config
    keys = {panel.by for one in paper for panel in one.panels if panel.kind == "line"}
    assert keys == {"algorithm", "extrapolation"}
    assert {key: config[key] for key in keys} == {
        "algorithm": "dmcp", "extrapolation": "stack_last_block",
    }  # fmt: skip


def test_every_point_of_the_dashboard_is_of_a_declared_outcome(paper):
    outcomes = {name for name in OUTCOME if "*" not in name}
    for one in paper:
        for panel in one.panels:
            if panel.kind in {"scatter", "scalar"}:
                names = {name for name in (*panel.y, panel.x) if name}
                curve = {f"figures/{one.figure}/top1", f"figures/{one.figure}/saved_pct"}
                assert names <= outcomes | curve


def test_all_that_is_shown_is_declared(paper):
    assert [name for one in paper for name in one.metrics if not known(name)] == []


def test_all_that_is_declared_is_logged(logged):
    """A name that nobody logs any more is taken out."""
    families = {name.partition("*")[0] for name in SEARCH}
    families |= {f"{kind}/{name}" for kind in ("train", "search") for name in BY_STEP}
    families |= PERFORMANCE.keys() | {"epoch"}
    families -= {"perf/gpu_memory_gib", "train/epoch", "search/epoch"}
    assert [
        one for one in sorted(families) if not any(name.startswith(one) for name in logged)
    ] == []
    assert [one for one in sorted(logged - {"step", "time"}) if not known(one)] == []


def test_what_is_not_declared_is_not_known():
    for name in (
        "train/epoch",
        "train/penalty",
        "loss",
        "figures/",
        "search/loss_randomly",
        "top1",
    ):
        assert not known(name)
    for name in (*OUTCOME, *CURVES, *MEDIA):
        assert known(name.replace("*", "x"))


def test_the_dashboard_has_a_section_for_each_figure_table_1_and_health(paper):
    figures = [one.figure for one in paper if one.figure]
    assert figures == [
        "fig3_width", "figA1", "figA2_width", "fig3_depth", "figA2_depth", "fig4",
        "fig5_resolution", "figA2_resolution", "fig5_fraction", "figA2_fraction", "fig6",
        "figA2_compound", "table1",
    ]  # fmt: skip
    assert [one.name for one in paper if not one.figure] == [one.name for one in HEALTH]


def test_without_the_package_one_line_says_what_to_install(tmp_path):
    lacking = tmp_path / "lacking"
    lacking.mkdir()
    (lacking / "wandb_workspaces.py").write_text("raise ImportError('No such module')")
    done = subprocess.run(  # noqa: S603 (our own words)
        command("dashboard", "push", "table1", "--entity", "me"),
        cwd=tmp_path, env=environment(lacking), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert one_line(done, 2) == (
        "widthopt dashboard needs wandb-workspaces, but it is not installed; run pip install "
        "'wandb-workspaces>=0.4.13,<0.5'"
    )
    assert not (tmp_path / "runs").exists()


def test_a_dashboard_is_sent_to_someone(tmp_path):
    assert one_line(widthopt("dashboard", "push", "table1", folder=tmp_path), 2) == (
        "--entity is missing, but a dashboard belongs to one; add --entity=..."
    )


@LIBRARY
@pytest.mark.filterwarnings("ignore")  # the package's own
def test_the_workspace_is_built_without_a_server_and_reads_back(paper):
    from wandb_workspaces.workspaces.internal import WorkspaceViewspec  # noqa: PLC0415

    text = as_json(workspace(paper, project="width-transfer", entity=None))
    again = WorkspaceViewspec.model_validate_json(text)
    assert again.model_dump_json(by_alias=True, exclude_none=True) == text
    found = json.loads(text)["section"]["panelBankConfig"]["sections"]
    assert [one["name"] for one in found] == [one.name for one in paper]
    assert [len(one["panels"]) for one in found] == [len(one.panels) for one in paper]
    for one in paper:
        for name in one.metrics:
            # As it is, or behind a word for where it is looked for: summary:NAME.
            assert re.search(rf'[".:]{re.escape(name)}"', text), name


@LIBRARY
def test_a_dashboard_that_cannot_be_sent_is_one_line(tmp_path):
    with Server() as server:
        env = {**environment(tmp_path), "WANDB_BASE_URL": server.url}
        done = subprocess.run(  # noqa: S603 (our own words)
            command("dashboard", "push", "table1", "--entity", "loop"),
            cwd=tmp_path, env=env, capture_output=True, text=True, check=False,
        )  # fmt: skip
    assert one_line(done, 1).startswith("the dashboard was not sent (No API key configured")


@LIBRARY
def test_a_dashboard_that_is_sent_again_changes_the_one_that_is_there(tmp_path):
    with Server() as server:
        env = {**environment(tmp_path), "WANDB_BASE_URL": server.url, "WANDB_API_KEY": KEY}
        for _ in range(2):
            done = subprocess.run(  # noqa: S603 (our own words)
                command("dashboard", "push", "fig3_width", "--entity", "loop"),
                cwd=tmp_path, env=env, capture_output=True, text=True, check=False,
            )  # fmt: skip
            assert done.returncode == 0, done.stderr
            assert sorted(one["type"] for one in server.views.values()) == ["project-view", "runs"]
        (report,) = [one for one in server.views.values() if one["type"] == "runs"]
        filters = json.dumps(json.loads(report["spec"]))
        assert '"fig3_width"' in filters
        assert server.unknown == []
        assert KEY not in (tmp_path / "runs" / "dashboard.json").read_text()
