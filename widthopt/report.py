"""What a person sees: what a run will cost, its table and figures, a network's widths."""

import io
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from widthopt.errors import InputError
from widthopt.figures import channels as channels_figure
from widthopt.figures import savings as savings_figure
from widthopt.figures import similarity
from widthopt.figures.style import RC
from widthopt.figures.summary import short, table
from widthopt.pipeline import Planned, Point, Request, plan, run
from widthopt.records import Record, from_json, read_channels
from widthopt.store import writable, write_atomically, writing


logger = logging.getLogger("widthopt")


def report(request: Request) -> Path:
    """Say what a run will cost, run it, and show what came out; the run's folder.

    Raises:
        InputError: Something asked for cannot be done; nothing has started.
    """
    console, point = _console(), Point(request)
    planned = _plan_table(plan(point))
    writable(Path(request.root))
    console.print(planned)
    records = run(point, show=lambda line: console.print(f"[bold]{line}[/bold]"))
    folder = point.folder
    pictures = draw(records, folder / "figures")
    console.print(table(records))
    for record in records:
        for line in _complaints(record):
            console.print(line)
    _write_table(records, folder / "table.txt")
    for path in (*pictures, folder / "record.json", folder / "channels"):
        console.print(str(path), soft_wrap=True)
    return folder


def compare(folders: Sequence[Path], *, into: Path) -> None:
    """Show runs side by side: algorithms of one network and data in one table and one figure.

    Args:
        folders: Runs' folders, with a ``record.json`` each.
        into: Where the figures go, in a folder for each network and data set.

    Raises:
        InputError: A folder has no record, or the figures cannot be written.
    """
    groups: dict[str, list[Record]] = {}
    for folder in folders:
        path = folder / "record.json"
        try:
            text = path.read_text("utf-8")
        except OSError as error:
            raise InputError(
                f"RUN is {folder}, but there is no record in it ({error.strerror}); give a run's "
                "folder, such as runs/resnet18-digits-..."
            ) from error
        for record in _told_apart(from_json(text, name=str(path)), folder, groups):
            target = "-".join(f"{value:g}" for value in record.target.values())
            group = f"{record.network}-{record.dataset}-{target}".replace("/", "_")
            groups.setdefault(group, []).append(record)
    console = _console()
    for name, records in groups.items():
        console.print(table(records))
        alike = similarity.table(records)
        if alike.row_count:
            console.print(alike)
        with mpl.rc_context(RC):
            figure = Figure()
            savings_figure.draw(figure.subplots(), records)
            path = into / name / "accuracy.png"
            with writing(path.parent):
                path.parent.mkdir(parents=True, exist_ok=True)
                figure.savefig(path)
        console.print(str(path), soft_wrap=True)


def _told_apart(
    records: Sequence[Record], folder: Path, groups: Mapping[str, Sequence[Record]]
) -> list[Record]:
    """The records of a run that no other has; one algorithm's other settings get another name."""
    others = [other for group in groups.values() for other in group]
    fresh = [one for one in records if not any(one.stages == other.stages for other in others)]
    used = {
        (other.algorithm, other.found.method, other.found.seed, *other.target.items())
        for other in others
    }
    taken = any(
        (one.algorithm, one.found.method, one.found.seed, *one.target.items()) in used
        for one in fresh
        if one.found.method != "uniform"
    )
    key = folder.resolve().name.rpartition("-")[2]
    return [replace(one, algorithm=f"{one.algorithm} {key}") for one in fresh] if taken else fresh


def runs(root: Path) -> list[Path]:
    """The folders below a root that have a record, in the order of their names."""
    return sorted(path.parent for path in root.glob("*/record.json"))


def _console(*, width: int | None = None) -> Console:
    """Standard output; wide enough for the table where it is not a terminal."""
    console = Console(width=width, highlight=False)
    return console if console.is_terminal or width else Console(width=118, highlight=False)


def _write_table(records: Sequence[Record], path: Path) -> None:
    text = io.StringIO()
    Console(width=118, highlight=False, file=text).print(table(records))
    write_atomically(path, text.getvalue())


def _complaints(record: Record) -> list[str]:
    """What went wrong in a search, so that matching FLOPs does not hide it."""
    flags, found = record.found.flags, record.found
    name = f"{found.method}, seed {found.seed}"
    lines = []
    if flags.get("valid") is False:
        lines.append(
            f"{name}: the search is not valid: removing its dead channels cost "
            f"{flags['masked_accuracy_gap']:.1f} points; cut: "
            f"{', '.join(flags['cut']) or 'nothing'}"
        )
    if flags.get("unchanged"):
        lines.append(f"{name}: the search pruned nothing; its widths are the un-optimised ones")
    if flags.get("collapsed"):
        lines.append(f"{name}: fell to the floor: {', '.join(flags['collapsed'])}")
    if flags.get("budget_reached") is False:
        lines.append(f"{name}: the search did not reach its budget")
    return lines


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


def show_plan(request: Request, *, as_json: bool) -> None:
    """Print what a request would do and what it costs; starts nothing.

    Raises:
        InputError: Something asked for cannot be done.
    """
    planned = plan(Point(request))
    if as_json:
        print(json.dumps([asdict(one) for one in planned], indent=2))  # noqa: T201
        return
    _console().print(_plan_table(planned))


def _plan_table(planned: Sequence[Planned]) -> Table:
    result = Table(title="What this takes", title_justify="left")
    result.add_column("stage")
    result.add_column("MACs", justify="right")
    result.add_column("state")
    states: Mapping[bool | None, str] = {True: "done", False: "to do", None: "after the search"}
    for one in planned:
        result.add_row(one.what, short(one.macs), states[one.done])
    left = sum(one.macs for one in planned if not one.done)
    result.add_section()
    result.add_row("left to do", short(left), "")
    return result


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
    console = _console()
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
