"""The dashboard shows metrics that are logged, and the documentation names all of them."""

import importlib.util
import json
import os
import re
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
from commands import NETWORK, TINY, command, one_line, widthopt
from wandb_server import KEY, Server

from widthopt.cli import PAPER
from widthopt.config.compose import compose
from widthopt.reporting.dashboard import as_json, push, sections, workspace
from widthopt.runs.execute import run_request
from widthopt.runs.point import SizedRequest
from widthopt.tracking.files import TrackingFiles


LIBRARY = pytest.mark.skipif(
    importlib.util.find_spec("wandb_workspaces") is None, reason="wandb-workspaces is optional"
)


def environment(folder):
    """Return an environment whose home is the folder, and that imports modules from it first."""
    modules = os.pathsep.join([str(folder), str(Path(__file__).parents[1]), *sys.path])
    return {**os.environ, "PYTHONPATH": modules, "HOME": str(folder)}


@pytest.fixture(scope="module")
def paper():
    """The sections of the paper's figures."""
    pytest.importorskip("wandb_workspaces")
    experiments = [compose([f"experiment={name}"]) for name in PAPER]
    figures = {figure.name: figure for request in experiments for figure in request.figures}
    with warnings.catch_warnings(action="ignore"):  # of wandb-workspaces
        return sections(figures.values())


def lines(section):
    """Return the x axis, the metric and the grouping key of each line plot of a section."""
    plots = [panel for panel in section.panels if type(panel).__name__ == "LinePlot"]
    return [(plot.x, *plot.y, plot.groupby) for plot in plots]


@pytest.fixture(scope="module")
def tracked(tmp_path_factory):
    """Run a search by each algorithm with its final trainings; return the folder of the stages."""
    folder = tmp_path_factory.mktemp("logged")
    (folder / "network_of_the_dashboard.py").write_text(NETWORK)
    sys.path.append(str(folder))
    words = [entry for entry in TINY if not entry.startswith(("algorithm", "tracking"))]
    words += ["network.factory=network_of_the_dashboard.MyNetwork", f"root={folder}"]
    figures = tuple(compose(["experiment=fig3_width"]).figures)
    for name in ("morphnet", "autoslim", "dmcp"):
        composed = compose([*words, f"algorithm={name}", "tracking.log_every_steps=10"])
        run_request(SizedRequest(replace(composed, figures=figures)))
    sys.path.remove(str(folder))
    return folder / "stages"


@pytest.fixture(scope="module")
def logged(tracked):
    """The names of all metrics in the rows."""
    folders = [path.parent for path in tracked.rglob("metrics.jsonl")]
    rows = [row for folder in folders for row, _ in TrackingFiles(folder).rows()]
    return {name for row in rows for name in row} - {"step", "time"}


def summaries(tracked, kind):
    """Yield the result, the arguments of ``wandb.init`` and the summary of each run of a kind."""
    for stage in sorted(tracked.glob(f"{kind}-*")):
        result = json.loads((stage / "result.json").read_text())["result"]
        files = TrackingFiles(stage)
        yield result, files.init, files.end.summary


@pytest.mark.slow
def test_the_summary_of_a_training_has_the_values_of_its_record(tracked):
    results = list(summaries(tracked, "train"))
    assert {init["job_type"] for _, init, _ in results} == {"train", "baseline"}
    for result, init, summary in results:
        widths = result["found"]
        if init["job_type"] == "train":
            saved = 100 * (1 - widths["overhead_macs"] / widths["direct_overhead_macs"])
            assert summary["overhead_saved_pct"] == pytest.approx(saved)
        assert {name: summary[name] for name in ("test/top1", "test/top5", "seconds")} == {
            "test/top1": result["top1"], "test/top5": result["top5"],
            "seconds": result["train_seconds"],
        }  # fmt: skip
        same = ("alpha", "macs", "budget_macs", "parameters", "overhead_macs")
        assert {name: summary[name] for name in same} == {name: widths[name] for name in same}
        figures = ["fig3_width", "figA1", "figA2_width"]
        assert init["config"]["figures"] == figures == init["tags"][:3]
        for figure in figures:
            assert summary[f"figures/{figure}/top1"] == result["top1"]
            assert summary[f"figures/{figure}/saved_pct"] == summary["overhead_saved_pct"]


@pytest.mark.slow
def test_the_summary_of_a_search_has_the_values_of_its_result(tracked):
    for result, _, summary in summaries(tracked, "search"):
        assert summary["overhead_macs"] == result["overhead_macs"] > 0
        assert summary["budget_macs"] > 0
        assert summary["seconds"] == result["seconds"]
        for name, entry in result["flags"].items():
            assert summary[f"flags/{name}"] == entry
        if "reach" in result["details"]:  # of MorphNet, by variable
            for name, entry in result["details"]["reach"].items():
                assert summary[f"details/reach/{name}"] == entry


@pytest.mark.slow
def test_every_line_of_the_dashboard_is_a_logged_metric(paper, logged):
    networks = "/(resnet18|mobilenet_v2)/"
    for figure, section in paper.items():
        for x, y, _ in lines(section):
            names = [name.replace(f"/{figure}/", "/fig3_width/") for name in (x, y)]
            names = [re.sub(networks, "/network_of_the_dashboard.MyNetwork/", n) for n in names]
            assert logged.issuperset(names)


@pytest.mark.parametrize(
    ("figure", "by"),
    [
        ("fig3_width", "algorithm"), ("fig3_depth", "algorithm"), ("fig4", "extrapolation"),
        ("fig5_resolution", "algorithm"), ("fig5_fraction", "algorithm"), ("fig6", "algorithm"),
    ],
)  # fmt: skip
def test_a_figure_has_a_panel_for_each_network(figure, by, paper):
    """Lines are algorithms, and in figure 4 extrapolation strategies."""
    assert [(x, y, key.name) for x, y, key in lines(paper[figure])] == [
        (f"figures/{figure}/saved_pct", f"figures/{figure}/{network}/top1", by)
        for network in ("resnet18", "mobilenet_v2")
    ]


def test_the_grouping_keys_of_lines_are_in_the_configuration_of_a_run(paper):
    words = ("target.depth=2", "projection.depth=1", "extrapolation=stack_last_block")
    point = SizedRequest(compose([*words]), images=False)
    about = point.about("train", "transfer", 0, point.train_entry("transfer", 0))
    config = about.init["config"]
    keys = {key.name for section in paper.values() for _, _, key in lines(section)}
    assert keys == {"algorithm", "extrapolation"}
    assert {key: config[key] for key in keys} == {
        "algorithm": "dmcp", "extrapolation": "stack_last_block",
    }  # fmt: skip


@pytest.mark.slow
def test_every_point_of_the_dashboard_is_in_the_summary_of_a_training(paper, tracked):
    points = 0
    for figure, section in paper.items():
        for panel in section.panels:
            if type(panel).__name__ == "ScatterPlot":
                names = {panel.x.name, panel.y.name}
                assert names == {f"figures/{figure}/saved_pct", f"figures/{figure}/top1"}
                logged = {name.replace(figure, "fig3_width") for name in names}
                assert all(logged <= summary.keys() for *_, summary in summaries(tracked, "train"))
                points += 1
    assert points == 6


def test_a_section_shows_the_figure_and_the_table_of_the_report(paper):
    """The names are those of the tracked figures (see `test_wandb.py`)."""
    for figure, section in paper.items():
        media, table = section.panels[-2:]
        assert media.media_keys == [f"figures/{figure}"]
        assert table.table_name == f"tables/{figure}"


@pytest.mark.slow
def test_every_logged_metric_is_documented(logged):
    """Every documented metric is also logged."""
    text = (Path(__file__).parents[1] / "docs" / "wandb.md").read_text()
    table = text.partition("| metric | meaning |")[2].partition("\n\n")[0]
    names = re.findall(r"`([\w/<>]+)`", table)
    names = [name for name in names if "/" in name or name == "epoch"]
    assert len(names) > 30
    patterns = {name: re.sub("<[a-z]+>", "[^/]+", name.replace("<network>", ".+"))
                for name in names}  # fmt: skip
    assert [
        name for name in sorted(logged) if not any(re.fullmatch(p, name) for p in patterns.values())
    ] == []
    unused = [
        name for name, p in patterns.items() if not any(re.fullmatch(p, key) for key in logged)
    ]
    assert unused == ["perf/gpu_memory_gib"]  # only with CUDA


def test_the_dashboard_has_a_section_for_each_figure_and_table_1(paper):
    assert list(paper) == [
        "fig3_width", "figA1", "figA2_width", "fig3_depth", "figA2_depth", "fig4",
        "fig5_resolution", "figA2_resolution", "fig5_fraction", "figA2_fraction", "fig6",
        "figA2_compound", "table1",
    ]  # fmt: skip


def test_an_error_without_the_package_says_what_to_install(tmp_path):
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


def test_a_dashboard_needs_an_entity(tmp_path):
    assert one_line(widthopt("dashboard", "push", "table1", folder=tmp_path), 2) == (
        "--entity is missing, but a dashboard belongs to a user or team; add --entity=..."
    )


@LIBRARY
@pytest.mark.filterwarnings("ignore")  # the package's own
def test_the_workspace_is_built_without_a_server(paper):
    from wandb_workspaces.workspaces.internal import WorkspaceViewspec  # noqa: PLC0415

    text = as_json(workspace(paper, project="width-transfer", entity=None))
    again = WorkspaceViewspec.model_validate_json(text)
    assert again.model_dump_json(by_alias=True, exclude_none=True) == text
    section = json.loads(text)["section"]
    banks = section["panelBankConfig"]["sections"]
    assert [bank["name"] for bank in banks] == [section.name for section in paper.values()]
    assert [len(bank["panels"]) for bank in banks] == [
        len(section.panels) for section in paper.values()
    ]
    assert '"shouldAutoGeneratePanels":true' in text  # the automatic panels


@pytest.mark.slow
@LIBRARY
def test_an_error_while_sending_is_one_line(tmp_path):
    with Server() as server:
        env = {**environment(tmp_path), "WANDB_BASE_URL": server.url}
        done = subprocess.run(  # noqa: S603 (our own words)
            command("dashboard", "push", "table1", "--entity", "loop"),
            cwd=tmp_path, env=env, capture_output=True, text=True, check=False,
        )  # fmt: skip
    assert one_line(done, 1).startswith("the dashboard was not sent (No API key configured")


@LIBRARY
@pytest.mark.filterwarnings("ignore")  # the package's own
def test_a_workspace_is_updated_after_its_report_was_refused(paper, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    sent = tmp_path / "runs" / "dashboard.json"
    with Server() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        with monkeypatch.context() as patched:
            patched.setattr("widthopt.reporting.dashboard.report", refuse)
            with pytest.raises(ConnectionError):
                push(paper, project="width-transfer", entity="loop", sent=sent)
        push(paper, project="width-transfer", entity="loop", sent=sent)
        assert sorted(entry["type"] for entry in server.views.values()) == ["project-view", "runs"]


def refuse(*_, **__):
    raise ConnectionError("no")


@pytest.mark.slow
@LIBRARY
def test_sending_again_updates_the_dashboard(tmp_path):
    with Server() as server:
        env = {**environment(tmp_path), "WANDB_BASE_URL": server.url, "WANDB_API_KEY": KEY}
        for _ in range(2):
            done = subprocess.run(  # noqa: S603 (our own words)
                command("dashboard", "push", "fig3_width", "--entity", "loop"),
                cwd=tmp_path, env=env, capture_output=True, text=True, check=False,
            )  # fmt: skip
            assert done.returncode == 0, done.stderr
            assert sorted(entry["type"] for entry in server.views.values()) == [
                "project-view",
                "runs",
            ]
        (report,) = [entry for entry in server.views.values() if entry["type"] == "runs"]
        filters = json.dumps(json.loads(report["spec"]))
        for figure in ("fig3_width", "figA1", "figA2_width"):  # of this experiment
            assert f'"{figure}"' in filters
        assert server.unknown == []
        assert KEY not in (tmp_path / "runs" / "dashboard.json").read_text()
