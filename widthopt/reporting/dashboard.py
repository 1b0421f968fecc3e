"""The W&B dashboard: a workspace and a report with a section for each figure.

It needs the optional package ``wandb-workspaces``, and only `push` and `report` need a server. W&B
draws the panels from its own data; printed figures are drawn from records (``widthopt report``).
"""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from widthopt.errors import InputError
from widthopt.files import write_atomically
from widthopt.reporting.figures.average import AverageWidths
from widthopt.reporting.figures.transfer import Transfer
from widthopt.request import FigureSpec


NAME = "Width transfer"


def sections(figures: Iterable[FigureSpec]) -> dict[str, Any]:
    """Return the section of each figure, by name.

    Raises:
        InputError: ``wandb-workspaces`` is not installed.
    """
    ws, wr = _import_library()

    def line(title: str, x: str, y: str, by: str) -> Any:
        """Return a line plot: mean and deviation over the runs with the same value of a key."""
        return wr.LinePlot(
            title=title, x=x, y=[y], groupby=wr.Config(by), groupby_aggfunc="mean",
            groupby_rangefunc="stddev", smoothing_type="none", max_runs_to_show=100,
        )  # fmt: skip

    result = {}
    for figure in figures:
        panels = []
        if isinstance(figure, Transfer):
            saved, top1 = (f"figures/{figure.name}/{name}" for name in ("saved_pct", "top1"))
            for network in figure.panels:
                title = f"{network}: top-1 (%) against overhead saved (%)"
                y = f"figures/{figure.name}/{network}/top1"
                panels.append(line(title, saved, y, figure.series))
            x, y = wr.SummaryMetric(saved), wr.SummaryMetric(top1)
            panels.append(wr.ScatterPlot(title="All runs, one point each", x=x, y=y))
        elif isinstance(figure, AverageWidths):
            for network in figure.panels:
                for name in ("channels", "multiplier"):
                    y = f"layers/{network}/{name}"
                    panels.append(line(f"{network}: {name}", "layer/index", y, "algorithm"))
        panels.append(wr.MediaBrowser(title="In the report", media_keys=[f"figures/{figure.name}"]))
        panels.append(wr.WeavePanelSummaryTable(table_name=f"tables/{figure.name}"))
        result[figure.name] = ws.Section(name=figure.title, panels=panels)
    return result


def workspace(shown: Mapping[str, Any], *, project: str, entity: str | None) -> Any:
    """Return the workspace: the sections, and the automatic panels of all logged metrics."""
    ws, _ = _import_library()
    return ws.Workspace(
        entity=entity or "",
        project=project,
        name=NAME,
        sections=list(shown.values()),
        settings=ws.WorkspaceSettings(x_axis="epoch", smoothing_type="none", max_runs=100),
        auto_generate_panels=True,
    )


def as_json(view: Any) -> str:
    """Return a workspace as the JSON that is sent."""
    text: str = view._to_model().spec.model_dump_json(by_alias=True, exclude_none=True)  # noqa: SLF001 (no public API)
    return text


def report(shown: Mapping[str, Any], *, project: str, entity: str) -> Any:
    """Return the report: each section with the runs of its figure. W&B looks up the entity."""
    _, wr = _import_library()
    place = {"entity": entity, "project": project}
    blocks: list[Any] = [wr.TableOfContents(), wr.H1(NAME)]
    for figure, section in shown.items():
        tag = f"Tags in ['{figure}']"
        runs = wr.Runset(**place, name=section.name, filters=tag, groupby=["config.algorithm"])
        blocks += [wr.H2(section.name), wr.PanelGrid(runsets=[runs], panels=section.panels)]
    return wr.Report(**place, title=NAME, blocks=blocks, width="fluid")


def push(shown: Mapping[str, Any], *, project: str, entity: str, sent: Path) -> list[str]:
    """Create or update the workspace and the report, and return their URLs.

    Args:
        shown: The sections.
        project: W&B's project.
        entity: A user or team.
        sent: A JSON file with the ids of sent workspaces and reports, by entity and project.
    """
    os.environ["WANDB_ERROR_REPORTING"] = "false"  # no telemetry
    before: Mapping[str, Any] = json.loads(sent.read_text("utf-8")) if sent.is_file() else {}
    place = f"{entity}/{project}"
    ids: dict[str, str] = dict(before.get(place, {}))
    view = workspace(shown, project=project, entity=entity)
    view._internal_id = ids.get("workspace", "")  # noqa: SLF001 (no public API)
    view._internal_name = ids.get("name", "")  # noqa: SLF001
    try:
        view.save()
        ids["workspace"], ids["name"] = view._internal_id, view._internal_name  # noqa: SLF001
        document = report(shown, project=project, entity=entity)
        document.id = ids.get("report", document.id)
        document.save()
        ids["report"] = document.id
    finally:  # also if the report is refused
        sent.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(sent, json.dumps({**before, place: ids}, indent=2) + "\n")
    return [view.url, document.url]


def _import_library() -> tuple[Any, Any]:
    """Import the modules of ``wandb-workspaces`` for workspaces and reports."""
    try:
        import wandb_workspaces.reports.v2 as wr  # noqa: PLC0415 (optional)
        import wandb_workspaces.workspaces as ws  # noqa: PLC0415
    except ImportError as error:
        raise InputError(
            "widthopt dashboard needs wandb-workspaces, but it is not installed; run "
            "pip install 'wandb-workspaces>=0.4.13,<0.5'"
        ) from error
    return ws, wr
