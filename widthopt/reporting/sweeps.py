"""Reports of sweeps: their figures and tables, and how far they are."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from widthopt import identity
from widthopt.config.typed import build_figures, build_tracking
from widthopt.errors import InputError
from widthopt.files import write_atomically, writing
from widthopt.records import Record
from widthopt.reporting import console
from widthopt.reporting.compare import Gathered, side_by_side
from widthopt.runs.execute import record_of
from widthopt.runs.manifest import Manifest, load_manifests
from widthopt.runs.states import ENDED, root_option
from widthopt.runs.store import Store, failure_reason
from widthopt.tracking import About, log_media


def select_sweeps(root: Path, names: Sequence[str]) -> tuple[list[Manifest], list[str]]:
    """The sweeps and the figures that a person names.

    Args:
        root: The folder that runs are kept in.
        names: How sweeps' names begin, or figures'; all sweeps if there are none. The whole name
            of a figure means the figure, though a sweep's begins so.

    Returns:
        The sweeps, of which those with one of the figures if there are any; the figures.

    Raises:
        InputError: There is neither such a sweep nor such a figure.
    """
    every = load_manifests(root)
    whole = {figure for sweep in every for figure in sweep.figures}
    begin = tuple(
        name
        for name in names
        if name not in whole and any(sweep.name.startswith(name) for sweep in every)
    )
    chosen = [sweep for sweep in every if not begin or sweep.name.startswith(begin)]
    known = dict.fromkeys(figure for sweep in chosen for figure in sweep.figures)
    rest = tuple(name for name in names if name not in begin)
    for name in rest:
        if not any(figure.startswith(name) for figure in known):
            sweeps = ", ".join(sweep.name for sweep in every) or "none"
            drawn = f", and the figures {', '.join(known)}" if known else ""
            raise InputError(
                f"{name} is no sweep or figure in {root}, but the sweeps there are: {sweeps}{drawn}"
            )
    wanted = [figure for figure in known if rest and figure.startswith(rest)]
    if wanted:
        chosen = [sweep for sweep in chosen if not sweep.figures.keys().isdisjoint(wanted)]
    return chosen, wanted


def draw(root: Path, sweeps: Sequence[Manifest], *, only: Collection[str] = ()) -> None:
    """Draw the figures and tables of sweeps from the records there are, and one page of all.

    Where the sweeps are tracked, so is what is drawn.

    Args:
        root: The folder that runs are kept in; what is drawn goes to ``report`` in it.
        sweeps: One or more; those that have the same figure share it.
        only: The names of the figures to draw, and no page nor anything tracked; all if there
            are none.
    """
    store = Store(root / "stages")
    store.check(write=False)
    kinds: dict[str, Mapping[str, Any]] = {}
    wanted: dict[str, dict[str, str]] = {}
    records: dict[str, dict[str, Record]] = {}
    results: dict[str, dict[str, Any] | None] = {}
    for sweep in sweeps:
        stages = sweep.entries(store)
        kinds |= {name: item for name, item in sweep.figures.items() if not only or name in only}
        for point in sweep.points:
            pairs = [(point["train"], point["method"]), (point["baseline"], "uniform")]
            for name, method in pairs:
                if name not in results:
                    results[name] = stages[name].result()
                result = results[name]
                for figure in point["figures"]:
                    if result is not None:
                        item = record_of(result, method=method, algorithm=point["algorithm"])
                        records.setdefault(figure, {})[name] = item
                    else:
                        wanted.setdefault(figure, {})[name] = sweep.runs[name]["what"]
    drawn = [
        (item, list(records.get(item.name, {}).values()), list(wanted.get(item.name, {}).values()))
        for item in build_figures(list(kinds.values()))
    ]
    media = console.show_figures(drawn, into=root / "report", whole=not only)
    for sweep in () if only else sweeps:
        files: dict[str, str] = {}
        for name in sweep.figures:
            files |= media[name]
        _track(root, sweep, files)


def figures_run(sweep: Manifest) -> str:
    """The name of the tracked run that shows a sweep's figures."""
    name = f"figures-{sweep.name}"
    return build_tracking(sweep.tracking).run_id(name) if sweep.tracking else name


def _track(root: Path, sweep: Manifest, media: Mapping[str, str]) -> None:
    """Track a sweep's figures and tables as a run of their own."""
    if not sweep.tracking or not media:
        return
    how = build_tracking(sweep.tracking)
    if how.mode == "disabled":
        return
    about = About(
        id=figures_run(sweep),
        kind="figures",
        network="",
        dataset="",
        algorithm="",
        method="",
        seed=0,
        source={},
        target=None,
        figures=tuple(sweep.figures),
        tags=how.tags,
        fields={"sweep": sweep.name},
    )
    folder = root / "report" / about.id
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    for file in media.values():  # as this sweep has it: another's report draws the same name
        write_atomically(folder / file, (root / "report" / file).read_bytes())
    log_media(how, about, folder, media)


def show(root: Path, sweeps: Sequence[Manifest]) -> None:
    """Show the records of sweeps without figures side by side.

    Args:
        root: The folder that runs are kept in; what is drawn goes to ``report`` in it.
        sweeps: One or more.

    Raises:
        InputError: None of their points is done.
    """
    store = Store(root / "stages")
    store.check(write=False)
    found: dict[str, Gathered] = {}
    for sweep in sweeps:
        stages = sweep.entries(store)
        for point in sweep.points:
            result = stages[point["train"]].result()
            if result is not None:
                record = record_of(result, method=point["method"], algorithm=point["algorithm"])
                group = _dependencies(sweep, point)
                key = identity.canonical([record.algorithm, record.found.method, *group])
                found.setdefault(key, Gathered(*group, [])).records.append(record)
    if not found:
        raise InputError(
            f"--root is {root}, but no point of {', '.join(item.name for item in sweeps)} is done; "
            f"see widthopt status {root_option(root)}"
        )
    side_by_side(list(found.values()), into=root / "report")


def _dependencies(
    sweep: Manifest, point: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a point's final training, and its search, depend on but for widths and seed."""
    runs = [sweep.runs[name] for name in (point["train"], *sweep.runs[point["train"]]["needs"])]
    trained, *searches = ({**run["fields"], "seed": None} for run in runs)
    origin = trained.pop("origin")
    searched = {"extrapolation": origin["extrapolation"], "budget": origin["budget"]}
    return trained, {**searches[0], **searched} if searches else {}


def status(
    root: Path, sweeps: Sequence[Manifest], live: Collection[str] = ()
) -> list[dict[str, Any]]:
    """How far sweeps are: one table of plain data for each.

    Args:
        root: The folder that runs are kept in.
        sweeps: As `load_manifests` returns them.
        live: The jobs that a queue knows as waiting or running.
    """
    store = Store(root / "stages")
    store.check(write=False)
    result = []
    for sweep in sweeps:
        states, stages = sweep.states(store, live), sweep.entries(store)
        rows = []
        for name, item in sweep.own.items():
            rows.append(
                {
                    "name": name,
                    "kind": item["kind"],
                    "state": states[name],
                    "what": item["what"],
                    "job": (stages[name].submission() or {}).get("job"),
                    "why": failure_reason(stages[name]) or None if states[name] in ENDED else None,
                }
            )
        result.append({"sweep": sweep.name, "points": len(sweep.points), "runs": rows})
    return result
