"""W&B's dashboard as code: a section for each figure, and one for the health of runs.

What it shows is plain data (`sections`), checked without W&B. Only `workspace` and `report`
need the optional package ``wandb-workspaces``, and only `push` needs a server. Panels are drawn
by W&B from its own copy; the figures to print are drawn from records (``widthopt report``).
"""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from widthopt.errors import InputError
from widthopt.files import write_atomically
from widthopt.reporting.figures.average import AverageWidths
from widthopt.reporting.figures.transfer import Transfer
from widthopt.request import FigureSpec


NAME = "Width transfer"

LACKING = (
    "widthopt dashboard needs wandb-workspaces, but it is not installed; run "
    "pip install 'wandb-workspaces>=0.4.13,<0.5'"
)


@dataclass(frozen=True, slots=True)
class Panel:
    """One panel.

    Attributes:
        kind: ``line``: rows over an axis; ``scatter``: outcomes, a point for each run; ``media``:
            pictures; ``table``: a table; ``scalar``: one outcome.
        title: What a person reads above it.
        y: Names of what it shows, of `widthopt.tracking.metrics`.
        x: What it is drawn over; empty where there is no axis.
        by: What tells lines apart, a key of a run's configuration; other runs are averaged.
    """

    kind: Literal["line", "scatter", "media", "table", "scalar"]
    title: str
    y: tuple[str, ...]
    x: str = ""
    by: str = "algorithm"


@dataclass(frozen=True, slots=True)
class Section:
    """Panels below one heading.

    Attributes:
        name: The heading.
        panels: What is below it.
        kinds: Kinds of runs that it shows, as `widthopt.tracking.about.About` has them.
        figure: The figure that it is about; empty for none.
    """

    name: str
    panels: tuple[Panel, ...]
    kinds: tuple[str, ...]
    figure: str = ""

    @property
    def metrics(self) -> set[str]:
        """All names that it shows."""
        return {name for one in self.panels for name in (*one.y, one.x) if name}


HEALTH = (
    Section(
        "Trainings",
        (
            Panel("line", "Loss", ("train/loss", "train/epoch_loss"), "epoch"),
            Panel(
                "line", "Accuracy while training (%)", ("train/top1", "train/top5"), "epoch",
            ),
            Panel("line", "Learning rate", ("train/learning_rate",), "epoch"),
            Panel("line", "Gradient norm", ("train/gradient_norm",), "epoch"),
            Panel("scatter", "Top-1 against the matching factor", ("test/top1",), "alpha"),
        ),
        ("train", "baseline"),
    ),
    Section(
        "Searches",
        (
            Panel("line", "Loss", ("search/loss", "search/epoch_loss"), "epoch"),
            Panel("line", "DMCP: expected MACs, of the budget", ("search/budget_share",), "epoch"),
            Panel("line", "MorphNet: penalty", ("search/penalty",), "epoch"),
            Panel("line", "MorphNet: MACs alive", ("search/macs_share",), "epoch"),
            Panel(
                "line", "MorphNet: dead and mixed classes",
                ("search/dead_classes", "search/mixed_classes"), "epoch",
            ),
            Panel(
                "line", "Losses of subnets",
                ("search/loss", "search/loss_narrowest", "search/loss_random_1"), "epoch",
            ),
            Panel("line", "AutoSlim: slimming", ("slimming/errors",), "slimming/move"),
            Panel("scalar", "Overhead, MACs", ("overhead_macs",)),
        ),
        ("search",),
    ),
    Section(
        "Health",
        (
            Panel("line", "Images per second", ("perf/images_per_second",), "epoch"),
            Panel("line", "GPU memory (GiB)", ("perf/gpu_memory_gib",), "epoch"),
            Panel("scalar", "Seconds", ("seconds",)),
        ),
        ("search", "train", "baseline"),
    ),
)  # fmt: skip


def sections(figures: Iterable[FigureSpec]) -> list[Section]:
    """The whole dashboard.

    Args:
        figures: What a report draws.
    """
    result = []
    for one in figures:
        panels = []
        if isinstance(one, Transfer):
            saved = f"figures/{one.name}/saved_pct"
            panels += [
                Panel(
                    "line", f"{network}: top-1 (%) against overhead saved (%)",
                    (f"figures/{one.name}/{network}/top1",), saved, one.series,
                )
                for network in one.panels
            ]  # fmt: skip
            panels.append(
                Panel("scatter", "All runs, a point each", (f"figures/{one.name}/top1",), saved)
            )
        elif isinstance(one, AverageWidths):
            panels += [
                Panel(
                    "line", f"{network}: {title} by layer", (f"layers/{network}/{what}",),
                    "layer/index",
                )
                for network in one.panels
                for what, title in (("channels", "channels"), ("multiplier", "multipliers"))
            ]  # fmt: skip
        panels.append(Panel("media", "As the report draws it", (f"figures/{one.name}",)))
        panels.append(Panel("table", "Its numbers", (f"tables/{one.name}",)))
        kinds = ("train", "baseline", "figures")
        result.append(Section(one.title, tuple(panels), kinds, one.name))
    return [*result, *HEALTH]


def workspace(shown: Sequence[Section], *, project: str, entity: str | None) -> Any:
    """The workspace; nothing is contacted.

    Raises:
        InputError: The package that builds it is not installed.
    """
    ws, wr = _library()
    return ws.Workspace(
        entity=entity or "",
        project=project,
        name=NAME,
        sections=[
            ws.Section(
                name=one.name, panels=[_panel(wr, panel) for panel in one.panels], is_open=place < 1
            )
            for place, one in enumerate(shown)
        ],
        settings=ws.WorkspaceSettings(x_axis="epoch", smoothing_type="none", max_runs=100),
    )


def as_json(built: Any) -> str:
    """A workspace or a report as the JSON that is sent."""
    result: str = built._to_model().spec.model_dump_json(by_alias=True, exclude_none=True)  # noqa: SLF001 (there is no other way)
    return result


def report(shown: Sequence[Section], *, project: str, entity: str | None) -> Any:
    """The report: each section with the runs that it is about; contacts W&B for the entity's id.

    Raises:
        InputError: The package that builds it is not installed.
    """
    _, wr = _library()
    blocks: list[Any] = [wr.TableOfContents(), wr.H1(NAME)]
    for one in shown:
        kinds = f"Config('kind') in [{', '.join(repr(kind) for kind in one.kinds)}]"
        runs = wr.Runset(
            entity=entity or "",
            project=project,
            name=one.name,
            filters=f"Tags in ['{one.figure}']" if one.figure else kinds,
            groupby=["config.algorithm"],
        )
        panels = [_panel(wr, panel) for panel in one.panels]
        blocks += [wr.H2(one.name), wr.PanelGrid(runsets=[runs], panels=panels)]
    return wr.Report(entity=entity or "", project=project, title=NAME, blocks=blocks, width="fluid")


def push(shown: Sequence[Section], *, project: str, entity: str | None, kept: Path) -> list[str]:
    """Send the workspace and the report; again it changes those that were sent before.

    Args:
        shown: What they show.
        project: W&B's project.
        entity: A user or team.
        kept: A file that remembers what was sent.

    Returns:
        Where a person finds them.

    Raises:
        InputError: The package that builds them is not installed.
    """
    os.environ["WANDB_ERROR_REPORTING"] = "false"  # no telemetry
    before: Mapping[str, Any] = json.loads(kept.read_text("utf-8")) if kept.is_file() else {}
    place = f"{entity or ''}/{project}"
    names: dict[str, str] = dict(before.get(place, {}))
    made = workspace(shown, project=project, entity=entity)
    if "workspace" in names:
        made._internal_id, made._internal_name = names["workspace"], names["name"]  # noqa: SLF001
    made.save()
    names["workspace"], names["name"] = made._internal_id, made._internal_name  # noqa: SLF001
    _remember(kept, {**before, place: names})  # at once: the report may not be taken
    written = report(shown, project=project, entity=entity)
    if "report" in names:
        written.id = names["report"]
    written.save()
    names["report"] = written.id
    _remember(kept, {**before, place: names})
    return [made.url, written.url]


def _remember(kept: Path, sent: Mapping[str, Any]) -> None:
    kept.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(kept, json.dumps(sent, indent=2) + "\n")


def _panel(wr: Any, panel: Panel) -> Any:
    title, names = panel.title, list(panel.y)
    if panel.kind == "line":
        return wr.LinePlot(
            title=title,
            x=panel.x,
            y=names,
            groupby=wr.Config(panel.by),
            groupby_aggfunc="mean",
            groupby_rangefunc="stddev",
            smoothing_type="none",
            max_runs_to_show=100,
        )
    if panel.kind == "scatter":
        return wr.ScatterPlot(
            title=title, x=wr.SummaryMetric(panel.x), y=wr.SummaryMetric(panel.y[0])
        )
    if panel.kind == "media":
        return wr.MediaBrowser(title=title, media_keys=names)
    if panel.kind == "table":
        return wr.WeavePanelSummaryTable(table_name=panel.y[0])
    return wr.ScalarChart(title=title, metric=wr.SummaryMetric(panel.y[0]), groupby_aggfunc="mean")


def _library() -> tuple[Any, Any]:
    """The package's two modules.

    Raises:
        InputError: It is not installed.
    """
    try:
        import wandb_workspaces.reports.v2 as wr  # noqa: PLC0415 (optional)
        import wandb_workspaces.workspaces as ws  # noqa: PLC0415
    except ImportError as error:
        raise InputError(LACKING) from error
    return ws, wr
