"""Reports of sweeps: figures, tables and states."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from widthopt import identity
from widthopt.config.typed import build_figures, build_tracking
from widthopt.errors import InputError
from widthopt.files import write_atomically, writing
from widthopt.records import Record
from widthopt.reporting import console
from widthopt.reporting.compare import RecordGroup, show_comparison
from widthopt.runs.execute import record_of
from widthopt.runs.manifest import Manifest, load_manifests
from widthopt.runs.states import ENDED, root_option
from widthopt.runs.store import Store, failure_reason
from widthopt.tracking import About, log_media


def select_sweeps(root: Path, names: Sequence[str]) -> tuple[list[Manifest], list[str]]:
    """Return the sweeps and the names of the figures that names on the command line select.

    Args:
        root: The folder of all runs.
        names: Names or prefixes of sweeps or figures; all sweeps if there are none. The full name
            of a figure selects the figure even if the name of a sweep begins with it.

    Returns:
        The sweeps, and the names of the figures. If figures are selected, only sweeps with one of
        them are returned.

    Raises:
        InputError: No sweep and no figure has such a name.
    """
    every = load_manifests(root)
    figures = {figure for sweep in every for figure in sweep.figures}
    prefixes = tuple(
        name
        for name in names
        if name not in figures and any(sweep.name.startswith(name) for sweep in every)
    )
    chosen = [sweep for sweep in every if not prefixes or sweep.name.startswith(prefixes)]
    known = dict.fromkeys(figure for sweep in chosen for figure in sweep.figures)
    rest = tuple(name for name in names if name not in prefixes)
    for name in rest:
        if not any(figure.startswith(name) for figure in known):
            sweeps = ", ".join(sweep.name for sweep in every) or "none"
            drawn = f"; figures: {', '.join(known)}" if known else ""
            raise InputError(f"no sweep or figure {name!r} in {root}; available: {sweeps}{drawn}")
    wanted = [figure for figure in known if rest and figure.startswith(rest)]
    if wanted:
        chosen = [sweep for sweep in chosen if not sweep.figures.keys().isdisjoint(wanted)]
    return chosen, wanted


def draw(root: Path, sweeps: Sequence[Manifest], *, only: Collection[str] = ()) -> None:
    """Draw the figures and tables of sweeps from the available records, and one page with all.

    The figures of tracked sweeps are logged to the tracker.

    Args:
        root: The folder of all runs; the output goes to its folder ``report``.
        sweeps: One or more sweeps; sweeps with the same figure share it.
        only: The names of the figures to draw, without a page and without tracking; all figures
            if it is empty.
    """
    store = Store.below(root)
    store.check(write=False)
    figures: dict[str, Mapping[str, Any]] = {}
    missing: dict[str, dict[str, str]] = {}
    records: dict[str, dict[str, Record]] = {}
    results: dict[str, dict[str, Any] | None] = {}
    for sweep in sweeps:
        entries = sweep.entries(store)
        figures |= {name: spec for name, spec in sweep.figures.items() if not only or name in only}
        for point in sweep.points:
            pairs = [(point["train"], point["method"]), (point["baseline"], "uniform")]
            for name, method in pairs:
                if name not in results:
                    results[name] = entries[name].result()
                result = results[name]
                for figure in point["figures"]:
                    if result is not None:
                        record = record_of(result, method=method, algorithm=point["algorithm"])
                        records.setdefault(figure, {})[name] = record
                    else:
                        missing.setdefault(figure, {})[name] = sweep.runs[name]["what"]
    drawn = [
        (
            spec,
            list(records.get(spec.name, {}).values()),
            list(missing.get(spec.name, {}).values()),
        )
        for spec in build_figures(list(figures.values()))
    ]
    media = console.show_figures(drawn, into=root / "report", with_page=not only)
    for sweep in () if only else sweeps:
        files: dict[str, str] = {}
        for name in sweep.figures:
            files |= media[name]
        _track(root, sweep, files)


def figures_run(sweep: Manifest) -> str:
    """Return the name of the tracked run that shows the figures of a sweep."""
    name = f"figures-{sweep.name}"
    return build_tracking(sweep.tracking).run_id(name) if sweep.tracking else name


def _track(root: Path, sweep: Manifest, media: Mapping[str, str]) -> None:
    """Log the figures and tables of a sweep as a separate tracked run."""
    if not sweep.tracking or not media:
        return
    tracking = build_tracking(sweep.tracking)
    if tracking.mode == "disabled":
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
        tags=tracking.tags,
        fields={"sweep": sweep.name},
    )
    folder = root / "report" / about.id
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    for file in media.values():  # a copy: a report of another sweep may overwrite the file
        write_atomically(folder / file, (root / "report" / file).read_bytes())
    log_media(tracking, about, folder, media)


def show(root: Path, sweeps: Sequence[Manifest]) -> None:
    """Print and draw a comparison of the records of sweeps without figures.

    Args:
        root: The folder of all runs; the output goes to its folder ``report``.
        sweeps: One or more sweeps.

    Raises:
        InputError: None of their points is done.
    """
    store = Store.below(root)
    store.check(write=False)
    groups: dict[str, RecordGroup] = {}
    for sweep in sweeps:
        entries = sweep.entries(store)
        for point in sweep.points:
            result = entries[point["train"]].result()
            if result is not None:
                record = record_of(result, method=point["method"], algorithm=point["algorithm"])
                values = _dependencies(sweep, point)
                key = identity.canonical([record.algorithm, record.found.method, *values])
                groups.setdefault(key, RecordGroup(*values, [])).records.append(record)
    if not groups:
        names = ", ".join(sweep.name for sweep in sweeps)
        raise InputError(
            f"--root is {root}, but no point of {names} is done; "
            f"see widthopt status {root_option(root)}"
        )
    show_comparison(list(groups.values()), into=root / "report")


def _dependencies(
    sweep: Manifest, point: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the values that the final training and the search of a point depend on.

    Widths and the seed are left out; the second mapping is empty if there is no search.
    """
    runs = [sweep.runs[name] for name in (point["train"], *sweep.runs[point["train"]]["needs"])]
    trained, *searches = ({**run["fields"], "seed": None} for run in runs)
    origin = trained.pop("origin")
    searched = {"extrapolation": origin["extrapolation"], "budget": origin["budget"]}
    return trained, {**searches[0], **searched} if searches else {}


def status(
    root: Path, sweeps: Sequence[Manifest], live: Collection[str] = ()
) -> list[dict[str, Any]]:
    """Return the states of sweeps and of their runs as plain data.

    Args:
        root: The folder of all runs.
        sweeps: The output of `load_manifests`.
        live: The jobs that wait or run in a queue.
    """
    store = Store.below(root)
    store.check(write=False)
    result = []
    for sweep in sweeps:
        states, entries = sweep.states(store, live), sweep.entries(store)
        runs = []
        for name, run in sweep.own.items():
            entry, state = entries[name], states[name]
            runs.append(
                {
                    "name": name,
                    "kind": run["kind"],
                    "state": state,
                    "what": run["what"],
                    "job": (entry.submission() or {}).get("job"),
                    "why": failure_reason(entry) or None if state in ENDED else None,
                }
            )
        result.append({"sweep": sweep.name, "points": len(sweep.points), "runs": runs})
    return result
