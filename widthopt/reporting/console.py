"""What is printed: the cost of a run, its table and figures, states of sweeps, widths."""

import io
import json
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

import matplotlib as mpl
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from widthopt.files import check_writable, write_atomically, writing
from widthopt.projection import nominal_saving
from widthopt.records import Record, by_algorithm, read_channels
from widthopt.reporting.figures import channels as channels_figure
from widthopt.reporting.figures import savings as savings_figure
from widthopt.reporting.figures.page import Section, page
from widthopt.reporting.figures.style import RC
from widthopt.reporting.figures.summary import short, table
from widthopt.request import FigureSpec, Request
from widthopt.runs.execute import run_request
from widthopt.runs.plan import GPU_MACS_PER_SECOND, Plan, axes
from widthopt.runs.states import State


logger = logging.getLogger("widthopt")


logger = logging.getLogger("widthopt")


def run_and_report(request: Request) -> Path:
    """Say what a run will cost, run it, and show what came out; the run's folder.

    Raises:
        InputError: Something asked for cannot be done; nothing has started.
    """
    console, plan = new_console(), Plan.of([request])
    point = plan.points[0].point
    states = plan.states()
    check_writable(Path(request.root))
    point.store.check()
    show_plan(plan, states)
    records = run_request(point, show=lambda line: console.print(line, style="bold"))
    folder = point.folder
    pictures = draw(records, folder / "figures")
    console.print(table(records))
    for line in complaints(records):
        console.print(line)
    _write_table(records, folder / "table.txt")
    for path in (*pictures, folder / "record.json", folder / "channels"):
        console.print(str(path), soft_wrap=True)
    return folder


def new_console(*, width: int | None = None) -> Console:
    """Standard output; wide enough for the table where it is not a terminal."""
    console = Console(width=width, **_PLAIN)
    return console if console.is_terminal or width else Console(width=118, **_PLAIN)


_PLAIN: Mapping[str, Any] = {"highlight": False, "markup": False, "emoji": False}
"""What is printed are names and others' messages: brackets in them are no commands to rich."""


def _write_table(records: Sequence[Record], path: Path) -> None:
    text = io.StringIO()
    Console(width=118, file=text, **_PLAIN).print(table(records))
    write_atomically(path, text.getvalue())


def complaints(records: Sequence[Record]) -> list[str]:
    """What went wrong in searches, so that matching FLOPs does not hide it; seeds together."""
    seeds: dict[tuple[str, str], list[str]] = {}
    several = len(by_algorithm([one for one in records if one.found.method != "uniform"])) > 1
    for record in records:
        method = record.found.method
        name = f"{record.algorithm}, {method}" if several else method
        for what in _wrong(record.found.diagnostics):
            seeds.setdefault((name, what), []).append(str(record.found.seed))
    return [
        f"{name}, seed{'s' * (len(its) > 1)} {', '.join(its)}: {what}"
        for (name, what), its in seeds.items()
    ]


def _wrong(diagnostics: Mapping[str, Any]) -> Iterator[str]:
    """What went wrong in a search."""
    if diagnostics.get("valid") is False:
        cut = ", ".join(diagnostics["cut"]) or "nothing"
        yield (
            f"the search is not valid: removing its dead channels cost "
            f"{diagnostics['masked_accuracy_gap']:.1f} points; cut: {cut}"
        )
    if diagnostics.get("unchanged"):
        yield "the search pruned nothing; its widths are the un-optimised ones"
    if diagnostics.get("collapsed"):
        yield f"fell to the floor: {', '.join(diagnostics['collapsed'])}"
    if diagnostics.get("budget_reached") is False:
        yield "the search did not reach its budget"


def draw(records: Sequence[Record], folder: Path) -> list[Path]:
    """Draw the figures of a run as PNG files; where they are."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, kind in (("channels", channels_figure), ("accuracy", savings_figure)):
        with mpl.rc_context(RC):
            figure = Figure()
            kind.draw(figure.subplots(), records)
            paths.append(folder / f"{name}.png")
            with writing(folder):
                figure.savefig(paths[-1])
    return paths


LISTED_RUNS = 16
"""Runs up to which a plan lists each of them."""


def show_plan(
    plan: Plan,
    states: Mapping[str, State],
    *,
    as_json: bool = False,
    nodes: int = 1,
    macs_per_second: float = GPU_MACS_PER_SECOND,
) -> None:
    """Print what a plan would do and what it costs.

    Args:
        plan: The plan.
        states: Of each of its runs.
        as_json: Print one JSON object.
        nodes: Nodes that the hours are for, each of eight accelerators.
        macs_per_second: What one accelerator trains at.
    """
    cost = plan.cost(states, nodes=nodes, macs_per_second=macs_per_second)
    if as_json:
        runs = [
            {
                "name": name,
                "kind": one.kind,
                "what": one.what,
                "needs": list(one.needs),
                "macs": one.macs,
                "state": states[name],
            }
            for name, one in plan.runs.items()
        ]
        print(json.dumps({**asdict(cost), "runs": runs}, indent=2))  # noqa: T201
        return
    result = Table(title="What this takes", title_justify="left")
    if len(plan.runs) <= LISTED_RUNS:
        for name in ("run", "MACs", "state"):
            result.add_column(name, justify="right" if name == "MACs" else "left")
        for name, one in plan.runs.items():
            state = "to do" if states[name] == "missing" else states[name]
            result.add_row(one.what, short(one.macs), state)
        result.add_section()
        result.add_row("left to do", short(cost.macs_left), "")
    else:
        for name in ("runs", "all", "done", "left", "MACs left"):
            result.add_column(name, justify="left" if name == "runs" else "right")
        for kind, word in (("search", "searches"), ("train", "trainings")):
            mine = [one for one in plan.runs.values() if one.kind == kind]
            left = [one for one in mine if states[one.name] != "done"]
            macs = short(sum(one.macs for one in left))
            counts = (len(mine), len(mine) - len(left), len(left))
            result.add_row(word, *map(str, counts), macs)
        result.add_section()
        result.add_row(f"for {cost.points} points", "", "", "", short(cost.macs_left))
    console = new_console()
    console.print(result)
    for line in _expensive_proxies(plan):
        console.print(line, soft_wrap=True)
    others = {name: count for name, count in cost.states.items() if name in _NOTEWORTHY}
    for name, count in others.items():
        console.print(f"{count} {name}")
    if cost.gpu_hours_left >= 1:
        console.print(
            f"{cost.gpu_hours_left:,.0f} GPU hours at {macs_per_second:.2g} MACs/s each; "
            f"{cost.wall_hours_left:,.1f} hours on {nodes} node{'s' if nodes > 1 else ''} of eight"
        )


def _expensive_proxies(plan: Plan) -> list[str]:
    """Proxies that take more than their targets to search: what is typed are their own values."""
    lines: dict[str, None] = {}
    for one in plan.points:
        times = 1 / nominal_saving(one.point.target, one.point.proxy)
        if one.method == "transfer" and times > 1:
            proxy, target = (axes(each) for each in (one.point.proxy, one.point.target))
            line = f"the proxy {proxy} takes about {times:.2g} times what its target {target} does"
            lines[f"{line}; lower what is larger in it, as in projection.width=..."] = None
    return list(lines)


_NOTEWORTHY = ("running", "queued", "failed", "blocked", "stale")


LISTED_MISSING = 2
"""Missing points of a figure that are named where it is printed; the page names all."""


def show_figures(
    drawn: Sequence[tuple[FigureSpec, Sequence[Record], Sequence[str]]],
    *,
    into: Path,
    whole: bool = True,
) -> dict[str, dict[str, str]]:
    """Draw figures and tables, and one page with all of them; print where they are.

    Args:
        drawn: Each with its records, and the names of the points that are missing.
        into: The folder they go to: PNG and PDF, CSV and Markdown, ``index.html``.
        whole: Whether they are all there are; of some alone no page is made.

    Returns:
        Of each, the names of its pictures' and tables' files, by ``figures/...`` and
        ``tables/...``.

    Raises:
        InputError: The folder cannot be written.
    """
    console, sections = new_console(), []
    media: dict[str, dict[str, str]] = {}
    with writing(into):
        into.mkdir(parents=True, exist_ok=True)
    for kind, records, missing in drawn:
        images, files_of = [], media.setdefault(kind.name, {})
        for stem, figure in kind.draw(records).items():
            files = {suffix: _encode_figure(figure, suffix) for suffix in _METADATA}
            for suffix, content in files.items():
                write_atomically(into / f"{stem}.{suffix}", content)
            images.append(files["png"])
            files_of[f"figures/{stem}"] = f"{stem}.png"
        grid = kind.table(records)
        write_atomically(into / f"{kind.name}.csv", grid.csv())
        write_atomically(into / f"{kind.name}.md", grid.markdown())
        files_of[f"tables/{kind.name}"] = f"{kind.name}.csv"
        sections.append(Section(kind.name, kind.title, kind.claim, images, [grid], list(missing)))
        lacking = f", {len(missing)} point{'s' * (len(missing) > 1)} missing" if missing else ""
        seen = f"{len(records)} record{'s' * (len(records) != 1)}{lacking}"
        console.print(f"{kind.name}: {kind.title} ({seen})")
        for name in missing[:LISTED_MISSING]:
            console.print(f"  missing: {name}", soft_wrap=True)
        if len(missing) > LISTED_MISSING:
            where = ", on the page" if whole else ""
            console.print(f"  and {len(missing) - LISTED_MISSING} more{where}")
        for name in () if whole else files_of.values():
            console.print(str(into / name), soft_wrap=True)
    if whole:
        write_atomically(into / "index.html", page("Width transfer", sections))
        console.print(str(into / "index.html"), soft_wrap=True)
    return media


def _encode_figure(figure: Figure, suffix: str) -> bytes:
    """A figure as a file of this kind."""
    content = io.BytesIO()
    with mpl.rc_context(RC):
        figure.savefig(content, format=suffix, metadata=_METADATA[suffix])
    return content.getvalue()


_METADATA: Mapping[str, dict[str, Any]] = {
    "pdf": {"CreationDate": None},
    "png": {"Software": None},
}
"""The same records give the same files: no date, no version."""


def show_status(tables: Sequence[Mapping[str, Any]], *, as_json: bool, every: bool = False) -> None:
    """Print how far sweeps are.

    Args:
        tables: As `widthopt.sweeps.control.states` returns them.
        as_json: Print one JSON list.
        every: Name every run, and not only those that run or went wrong.
    """
    if as_json:
        print(json.dumps(list(tables), indent=2))  # noqa: T201
        return
    console = new_console()
    for one in tables:
        console.print(f"{one['sweep']}, {one['points']} points", soft_wrap=True)
        result = Table()
        states = [
            state for state in get_args(State) if any(r["state"] == state for r in one["runs"])
        ]
        for name in ("runs", *states):
            result.add_column(name, justify="left" if name == "runs" else "right")
        for kind, word in (("search", "searches"), ("train", "trainings")):
            counts = Counter(run["state"] for run in one["runs"] if run["kind"] == kind)
            result.add_row(word, *(str(counts[state]) for state in states))
        console.print(result)
        waiting = Counter(row["queue"] for row in one["runs"] if row["state"] == "queued")
        for how, count in waiting.items():
            console.print(f"queued: {count} {how}")
        for row in one["runs"]:
            if every or row["state"] in {"failed", "stale", "running"}:
                why = f": {' '.join(row['why'].split())}" if row["why"] else ""
                job = f", job {row['job']} {row['queue']}" if row.get("queue") else ""
                told = f"{row['state']}: {row['name']} ({row['what']}){job}{why}"
                console.print(told, soft_wrap=True)


def show_macs(request: Request, *, channels: Path | None, as_json: bool) -> None:
    """Print MACs, parameters and width variables of a request's target.

    Args:
        request: Only its network, target and number of classes matter.
        channels: A file of channel counts, instead of the un-optimised ones.
        as_json: Print one JSON object.

    Raises:
        InputError: There is no such network, or the counts do not fit it.
    """
    blueprint = request.blueprint()
    graph = blueprint.graph
    counts = graph.channels if channels is None else read_channels(channels)
    graph.check(counts)
    macs, parameters = graph.macs(counts), blueprint.parameters(counts)
    if as_json:
        content = {
            "network": request.network.name,
            "resolution": graph.resolution,
            "macs": macs,
            "parameters": parameters,
            "channels": counts,
        }
        print(json.dumps(content, indent=2))  # noqa: T201
        return
    target = request.target
    console = new_console()
    console.print(
        f"{request.network.name}, width {target.width:g}, depth {target.depth}, "
        f"{graph.resolution} pixels: {macs:,} MACs, {parameters:,} parameters"
    )
    result = Table()
    result.add_column("width variable")
    result.add_column("channels", justify="right")
    result.add_column("MACs per channel", justify="right")
    result.add_column("layers that write it", justify="right")
    slopes = graph.gradient(counts)
    for name, variable in graph.free.items():
        result.add_row(name, str(counts[name]), short(slopes[name]), str(len(variable.writers)))
    console.print(result)
