"""Printed output: cost of a plan, table and figures of a run, states of sweeps, MACs."""

import io
import json
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
from widthopt.runs.plan import GPU_MACS_PER_SECOND, NODE_GPUS, Plan, axes
from widthopt.runs.states import State


def run_and_report(request: Request) -> Path:
    """Print the cost of a run, start it, and print its results.

    Returns:
        The folder of the run.

    Raises:
        InputError: The request is invalid; nothing has started.
    """
    console, plan = new_console(), Plan.of([request])
    sized = plan.points[0].point
    states = plan.states()
    check_writable(Path(request.root))
    sized.store.check()
    show_plan(plan, states)
    records = run_request(sized, show=lambda line: console.print(line, style="bold"))
    folder = sized.folder
    pictures = draw(records, folder / "figures")
    console.print(table(records))
    for line in search_problems(records):
        console.print(line)
    _write_table(records, folder / "table.txt")
    for path in (*pictures, folder / "record.json", folder / "channels"):
        console.print(str(path), soft_wrap=True)
    return folder


def new_console(*, width: int | None = None) -> Console:
    """Return a console on standard output, wide enough for the tables if it is no terminal."""
    console = Console(width=width, **_PLAIN)
    return console if console.is_terminal or width else Console(width=118, **_PLAIN)


_PLAIN: Mapping[str, Any] = {"highlight": False, "markup": False, "emoji": False}
"""Names and error messages are printed unchanged: rich does not interpret brackets in them."""


def _write_table(records: Sequence[Record], path: Path) -> None:
    text = io.StringIO()
    Console(width=118, file=text, **_PLAIN).print(table(records))
    write_atomically(path, text.getvalue())


def search_problems(records: Sequence[Record]) -> list[str]:
    """Return one line for each problem of the searches; seeds with the same problem share it.

    All methods match the budget, so accuracy alone does not show that a search failed.
    """
    seeds: dict[tuple[str, str], list[str]] = {}
    searched = [record for record in records if record.found.method != "uniform"]
    several = len(by_algorithm(searched)) > 1
    for record in records:
        method = record.found.method
        name = f"{record.algorithm}, {method}" if several else method
        for problem in _problems(record.found.diagnostics):
            seeds.setdefault((name, problem), []).append(str(record.found.seed))
    return [
        f"{name}, seed{'s' * (len(numbers) > 1)} {', '.join(numbers)}: {problem}"
        for (name, problem), numbers in seeds.items()
    ]


def _problems(diagnostics: Mapping[str, Any]) -> Iterator[str]:
    """Yield the problems of one search."""
    if diagnostics.get("valid") is False:
        cut = ", ".join(diagnostics["cut"]) or "nothing"
        yield (
            f"the search is not valid: removing its dead channels cost "
            f"{diagnostics['masked_accuracy_gap']:.1f} points; cut: {cut}"
        )
    if diagnostics.get("unchanged"):
        yield "the search pruned nothing; its widths are those of the baseline (uniform widths)"
    if diagnostics.get("collapsed"):
        yield f"fell to the floor: {', '.join(diagnostics['collapsed'])}"
    if diagnostics.get("budget_reached") is False:
        yield "the search did not reach its budget"


def draw(records: Sequence[Record], folder: Path) -> list[Path]:
    """Draw the figures of a run as PNG files and return their paths."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, module in (("channels", channels_figure), ("accuracy", savings_figure)):
        with mpl.rc_context(RC):
            figure = Figure()
            module.draw(figure.subplots(), records)
            paths.append(folder / f"{name}.png")
            with writing(folder):
                figure.savefig(paths[-1])
    return paths


LISTED_RUNS = 16
"""Largest number of runs that a plan lists one by one."""


def show_plan(
    plan: Plan,
    states: Mapping[str, State],
    *,
    as_json: bool = False,
    nodes: int = 1,
    macs_per_second: float = GPU_MACS_PER_SECOND,
) -> None:
    """Print the runs of a plan and their cost.

    Args:
        plan: The plan.
        states: The state of each run, by name.
        as_json: Whether to print one JSON object.
        nodes: Number of nodes, of eight accelerators each, for the estimate of the hours.
        macs_per_second: Training throughput of one accelerator.
    """
    cost = plan.cost(states, nodes=nodes, macs_per_second=macs_per_second)
    if as_json:
        runs = [
            {
                "name": name,
                "kind": run.kind,
                "what": run.what,
                "needs": list(run.needs),
                "macs": run.macs,
                "state": states[name],
            }
            for name, run in plan.runs.items()
        ]
        print(json.dumps({**asdict(cost), "runs": runs}, indent=2))  # noqa: T201
        return
    result = Table(title="Plan", title_justify="left")
    if len(plan.runs) <= LISTED_RUNS:
        for name in ("run", "MACs", "state"):
            result.add_column(name, justify="right" if name == "MACs" else "left")
        for name, run in plan.runs.items():
            state = "to do" if states[name] == "missing" else states[name]
            result.add_row(run.what, short(run.macs), state)
        result.add_section()
        result.add_row("remaining", short(cost.macs_left), "")
    else:
        for name in ("runs", "all", "done", "remaining", "remaining MACs"):
            result.add_column(name, justify="left" if name == "runs" else "right")
        for kind, word in (("search", "searches"), ("train", "trainings")):
            runs_of_kind = [run for run in plan.runs.values() if run.kind == kind]
            left = [run for run in runs_of_kind if states[run.name] != "done"]
            macs = short(sum(run.macs for run in left))
            counts = (len(runs_of_kind), len(runs_of_kind) - len(left), len(left))
            result.add_row(word, *map(str, counts), macs)
        result.add_section()
        result.add_row(f"all {cost.points} points", "", "", "", short(cost.macs_left))
    console = new_console()
    console.print(result)
    for line in _expensive_proxies(plan):
        console.print(line, soft_wrap=True)
    noteworthy = {name: count for name, count in cost.states.items() if name in _NOTEWORTHY}
    for name, count in noteworthy.items():
        console.print(f"{count} {name}")
    if cost.gpu_hours_left >= 1:
        console.print(
            f"{cost.gpu_hours_left:,.0f} GPU hours at {macs_per_second:.2g} MACs/s; "
            f"{cost.wall_hours_left:,.1f} hours on {nodes} node{'s' if nodes > 1 else ''} "
            f"with {NODE_GPUS} GPUs each"
        )


def _expensive_proxies(plan: Plan) -> list[str]:
    """Return one line for each proxy whose search costs more than a search on its target.

    This happens if a value of ``projection``, which is absolute, is larger than the target's.
    """
    lines: dict[str, None] = {}
    for point in plan.points:
        times = 1 / nominal_saving(point.point.target, point.point.proxy)
        if point.method == "transfer" and times > 1:
            proxy, target = (axes(setting) for setting in (point.point.proxy, point.point.target))
            line = (
                f"a search on the proxy {proxy} costs about {times:.2g} times as much as on its "
                f"target {target}; lower the larger axis, for example projection.width=..."
            )
            lines[line] = None
    return list(lines)


_NOTEWORTHY = ("running", "queued", "failed", "blocked", "stale")


LISTED_MISSING = 2
"""Number of a figure's missing points that are printed; the page lists all of them."""


def show_figures(
    drawn: Sequence[tuple[FigureSpec, Sequence[Record], Sequence[str]]],
    *,
    into: Path,
    with_page: bool = True,
) -> dict[str, dict[str, str]]:
    """Write figures and tables, and one page with all of them; print the paths.

    Args:
        drawn: The figures, each with its records and the names of its missing points.
        into: The output folder of PNG, PDF, CSV and Markdown files and ``index.html``.
        with_page: Whether to write the page; False if only some figures are drawn.

    Returns:
        For each figure, the names of its files by ``figures/...`` and ``tables/...``.

    Raises:
        InputError: The folder cannot be written.
    """
    console, sections = new_console(), []
    media: dict[str, dict[str, str]] = {}
    with writing(into):
        into.mkdir(parents=True, exist_ok=True)
    for spec, records, missing in drawn:
        images, files_of = [], media.setdefault(spec.name, {})
        for stem, figure in spec.draw(records).items():
            files = {suffix: _encode_figure(figure, suffix) for suffix in _METADATA}
            for suffix, content in files.items():
                write_atomically(into / f"{stem}.{suffix}", content)
            images.append(files["png"])
            files_of[f"figures/{stem}"] = f"{stem}.png"
        numbers = spec.table(records)
        write_atomically(into / f"{spec.name}.csv", numbers.csv())
        write_atomically(into / f"{spec.name}.md", numbers.markdown())
        files_of[f"tables/{spec.name}"] = f"{spec.name}.csv"
        sections.append(
            Section(spec.name, spec.title, spec.claim, images, [numbers], list(missing))
        )
        lacking = f", {len(missing)} point{'s' * (len(missing) > 1)} missing" if missing else ""
        counts = f"{len(records)} record{'s' * (len(records) != 1)}{lacking}"
        console.print(f"{spec.name}: {spec.title} ({counts})")
        for name in missing[:LISTED_MISSING]:
            console.print(f"  missing: {name}", soft_wrap=True)
        if len(missing) > LISTED_MISSING:
            where = ", listed in index.html" if with_page else ""
            console.print(f"  and {len(missing) - LISTED_MISSING} more{where}")
        for name in () if with_page else files_of.values():
            console.print(str(into / name), soft_wrap=True)
    if with_page:
        write_atomically(into / "index.html", page("Width transfer", sections))
        console.print(str(into / "index.html"), soft_wrap=True)
    return media


def _encode_figure(figure: Figure, suffix: str) -> bytes:
    """Return a figure as the content of a file of this format."""
    content = io.BytesIO()
    with mpl.rc_context(RC):
        figure.savefig(content, format=suffix, metadata=_METADATA[suffix])
    return content.getvalue()


_METADATA: Mapping[str, dict[str, Any]] = {
    "pdf": {"CreationDate": None},
    "png": {"Software": None},
}
"""Without a date and a version, equal records give equal files."""


def show_status(tables: Sequence[Mapping[str, Any]], *, as_json: bool, every: bool = False) -> None:
    """Print the states of sweeps and their runs.

    Args:
        tables: The output of `widthopt.sweeps.control.states`.
        as_json: Whether to print one JSON list.
        every: Whether to list every run; else only those that run, failed or are stale.
    """
    if as_json:
        print(json.dumps(list(tables), indent=2))  # noqa: T201
        return
    console = new_console()
    for sweep in tables:
        console.print(f"{sweep['sweep']}, {sweep['points']} points", soft_wrap=True)
        result = Table()
        states = [
            state
            for state in get_args(State)
            if any(run["state"] == state for run in sweep["runs"])
        ]
        for name in ("runs", *states):
            result.add_column(name, justify="left" if name == "runs" else "right")
        for kind, word in (("search", "searches"), ("train", "trainings")):
            counts = Counter(run["state"] for run in sweep["runs"] if run["kind"] == kind)
            result.add_row(word, *(str(counts[state]) for state in states))
        console.print(result)
        queued = Counter(run["queue"] for run in sweep["runs"] if run["state"] == "queued")
        for status, count in queued.items():
            console.print(f"queued: {count} {status}")
        for run in sweep["runs"]:
            if every or run["state"] in {"failed", "stale", "running"}:
                reason = f": {' '.join(run['why'].split())}" if run["why"] else ""
                job = f", job {run['job']} {run['queue']}" if run.get("queue") else ""
                line = f"{run['state']}: {run['name']} ({run['what']}){job}{reason}"
                console.print(line, soft_wrap=True)


def show_macs(request: Request, *, channels: Path | None, as_json: bool) -> None:
    """Print MACs, parameters and width variables of a request's target.

    Args:
        request: The request; only its network, target and number of classes are used.
        channels: A file with channel counts; those of the baseline (uniform widths) if None.
        as_json: Whether to print one JSON object.

    Raises:
        InputError: The network does not exist, or the counts do not fit it.
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
    result.add_column("writing layers", justify="right")
    slopes = graph.gradient(counts)
    for name, variable in graph.free.items():
        result.add_row(name, str(counts[name]), short(slopes[name]), str(len(variable.writers)))
    console.print(result)
