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

from widthopt.cli import PAPER
from widthopt.config.compose import compose
from widthopt.reporting.dashboard import HEALTH, as_json, push, sections, workspace
from widthopt.runs.execute import run
from widthopt.runs.point import SizedRequest
from widthopt.tracking.client import Kept
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
def tracked(tmp_path_factory):
    """The folder of a search by each algorithm, and of the trainings behind them."""
    folder = tmp_path_factory.mktemp("logged")
    (folder / "network_of_the_dashboard.py").write_text(NETWORK)
    sys.path.append(str(folder))
    words = [one for one in TINY if not one.startswith(("algorithm", "tracking"))]
    words += ["network.factory=network_of_the_dashboard.MyNetwork", f"root={folder}"]
    figures = tuple(compose(["experiment=fig3_width"]).figures)
    for name in ("morphnet", "autoslim", "dmcp"):
        asked = compose([*words, f"algorithm={name}", "tracking.every=10"])
        run(SizedRequest(replace(asked, figures=figures)))
    sys.path.remove(str(folder))
    return folder / "stages"


@pytest.fixture(scope="module")
def logged(tracked):
    """Every name in their rows."""
    return {key for path in tracked.rglob("metrics.jsonl") for row in rows(path) for key in row}


def summaries(tracked, kind):
    """Of each: its result, and what the summary of its tracked run says."""
    for stage in sorted(tracked.glob(f"{kind}-*")):
        result = json.loads((stage / "result.json").read_text())["result"]
        kept = Kept(stage)
        yield result, kept.about, kept.ended.summary


def test_the_summary_of_a_training_is_what_its_record_says(tracked):
    found = list(summaries(tracked, "train"))
    assert {about.kind for _, about, _ in found} == {"train", "baseline"}
    for result, about, summary in found:
        mine = result["found"]
        if about.kind == "train":
            saved = 100 * (1 - mine["overhead_macs"] / mine["direct_overhead_macs"])
            assert summary["overhead_saved_pct"] == pytest.approx(saved)
        assert {name: summary[name] for name in ("test/top1", "test/top5", "seconds")} == {
            "test/top1": result["top1"], "test/top5": result["top5"],
            "seconds": result["train_seconds"],
        }  # fmt: skip
        same = ("alpha", "macs", "budget_macs", "parameters", "overhead_macs")
        assert {name: summary[name] for name in same} == {name: mine[name] for name in same}
        assert about.figures == ("fig3_width", "figA1", "figA2_width")
        for figure in about.figures:
            assert summary[f"figures/{figure}/top1"] == result["top1"]
            assert summary[f"figures/{figure}/saved_pct"] == summary["overhead_saved_pct"]


def test_the_summary_of_a_search_is_what_it_came_to(tracked):
    for result, _, summary in summaries(tracked, "search"):
        assert summary["overhead_macs"] == result["overhead_macs"] > 0
        assert summary["budget_macs"] > 0
        assert summary["seconds"] == result["seconds"]
        for name, one in result["flags"].items():
            assert summary[f"flags/{name}"] == one
        if "reach" in result["details"]:  # of MorphNet, by variable
            for name, one in result["details"]["reach"].items():
                assert summary[f"details/reach/{name}"] == one


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
    point = SizedRequest(compose([*words]), images=False)
    config = point.about("train", "transfer", 0, point.train_stage("transfer", 0)).config
    keys = {panel.by for one in paper for panel in one.panels if panel.kind == "line"}
    assert keys == {"algorithm", "extrapolation"}
    assert {key: config[key] for key in keys} == {
        "algorithm": "dmcp", "extrapolation": "stack_last_block",
    }  # fmt: skip


def test_every_point_of_the_dashboard_is_of_what_runs_come_to(paper, tracked):
    """In the summary of each kind of run that its section is about, a figure's for trainings."""
    for one in paper:
        names = {name for panel in one.panels if panel.kind in {"scatter", "scalar"}
                 for name in (*panel.y, panel.x) if name}  # fmt: skip
        mine = {name.replace(f"/{one.figure}/", "/fig3_width/") for name in names}
        for kind in ("search", "train"):
            if kind in one.kinds:
                assert all(mine <= summary.keys() for *_, summary in summaries(tracked, kind))
    (width,) = [one for one in paper if one.figure == "fig3_width"]
    assert [(one.x, *one.y) for one in width.panels if one.kind == "scatter"] == [
        ("figures/fig3_width/saved_pct", "figures/fig3_width/top1")
    ]


def test_a_section_shows_its_own_figure_and_table(paper):
    """By the names that a sweep's figures are tracked by (`check_server` in the tests of W&B)."""
    for one in paper:
        if one.figure:
            shown = {
                panel.kind: panel.y for panel in one.panels if panel.kind in ("media", "table")
            }
            assert shown == {
                "media": (f"figures/{one.figure}",), "table": (f"tables/{one.figure}",),
            }  # fmt: skip


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
@pytest.mark.filterwarnings("ignore")  # the package's own
def test_a_workspace_is_remembered_although_its_report_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    kept = tmp_path / "runs" / "dashboard.json"
    with Server() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        with monkeypatch.context() as patched:
            patched.setattr("widthopt.reporting.dashboard.report", refuse)
            with pytest.raises(ConnectionError):
                push(HEALTH, project="width-transfer", entity="loop", kept=kept)
        push(HEALTH, project="width-transfer", entity="loop", kept=kept)
        assert sorted(one["type"] for one in server.views.values()) == ["project-view", "runs"]


def refuse(*_, **__):
    raise ConnectionError("no")


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
        for figure in ("fig3_width", "figA1", "figA2_width"):  # of this experiment
            assert f'"{figure}"' in filters
        assert server.unknown == []
        assert KEY not in (tmp_path / "runs" / "dashboard.json").read_text()
