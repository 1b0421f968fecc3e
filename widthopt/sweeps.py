"""Sweeps as launchers start them: planned whole, frozen run by run, and reported.

Launchers know `Sweep` and `perform` by name alone (``conf/hydra/launcher``).
"""

import json
import logging
import os
import re
import sys
from collections.abc import Collection, Mapping, Sequence
from contextlib import chdir
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from hydra.core.config_loader import ConfigLoader
from omegaconf import OmegaConf

from launchers.sweeper import EXPERIMENT
from launchers.work import Item
from widthopt import distributed, identity, report
from widthopt.config import figures, frozen, request, requests, tracking
from widthopt.errors import InputError
from widthopt.pipeline import Point, logged, recorded, run, searched, trained
from widthopt.planning import GPU_MACS_PER_SECOND, Manifest, Plan, Run
from widthopt.records import Record
from widthopt.store import (
    Stage,
    State,
    Store,
    there,
    this_job,
    writable,
    write_atomically,
    writing,
)
from widthopt.tracking import About, log_media
from widthopt.training import Interrupted


logger = logging.getLogger("widthopt")

FORMAT = 2
"""Version of what is frozen of a run."""

ENDED: tuple[State, ...] = ("failed", "stale")
"""States of runs that somebody worked on and nobody does any more."""

ASK_GPU_HOURS = 24.0
"""Accelerator hours from which a sweep asks before it starts."""


_REASON = re.compile(r"(widthopt: )?(?P<text>(?(1).*|[\w.]*(Error|Exception|Interrupt)\b.*))")
"""What a process says last: one of our own messages, or the exception below a traceback."""


class _Staged:
    """What is alike in all work whose items are stages; see `launchers.work.Work`."""

    interruptions = (Interrupted,)

    @property
    def imports(self) -> Sequence[str]:
        """See `launchers.work.Work`."""
        return ()

    def stage(self, name: str) -> Stage:
        """The stage of an item."""
        raise NotImplementedError

    def job(self, name: str) -> str:
        """See `launchers.work.Work`."""
        return str((self.stage(name).submission() or {}).get("job", ""))

    def submitted(self, name: str, job: str, **details: str) -> None:
        """See `launchers.work.Work`."""
        self.stage(name).submitted(job, **details)

    def done(self, name: str) -> bool:
        """See `launchers.work.Work`."""
        return self.stage(name).result() is not None

    def failure(self, name: str) -> str:
        """See `launchers.work.Work`."""
        return why(self.stage(name))


class Sweep(_Staged):
    """The work of a sweep as it is composed; see `launchers.work.Work`.

    Attributes:
        plan: Its points and runs.
        root: Where they are kept.
    """

    def __init__(self, loader: ConfigLoader, points: Sequence[Sequence[str]]) -> None:
        """Plan it; nothing is started or written.

        Args:
            loader: Hydra's.
            points: The overrides of each.

        Raises:
            InputError: Something asked for cannot be done.
        """
        asked = requests(loader, points)
        roots = sorted({one.root for one in asked})
        if len(roots) > 1:
            raise InputError(
                f"root is {' and '.join(roots)}, but a sweep is kept in one folder; name one"
            )
        self.plan = Plan.of(asked)
        self.root = Path(roots[0])
        self._title = _title(points)
        self._states: dict[str, State] = {}

    @cached_property
    def manifest(self) -> Manifest:
        """What is kept of it beside its runs."""
        tracking = frozen(self.plan.points[0].point.request)["tracking"]
        return Manifest.of(self.plan, title=self._title, tracking=tracking)

    @property
    def name(self) -> str:
        """See `launchers.work.Work`."""
        return self.manifest.name

    @property
    def imports(self) -> Sequence[str]:
        """See `_Staged`: what reads images."""
        asked = [one.point.request for one in self.plan.points]
        names = [name for one in asked for name in getattr(one.dataset, "IMPORTS", ())]
        return list(dict.fromkeys(names))

    def begin(self, *, sure: bool, live: Collection[str] = ()) -> None:
        """See `launchers.work.Work`."""
        self._states = self.plan.states(live)
        cost = self.plan.cost(self._states, nodes=1, macs_per_second=GPU_MACS_PER_SECOND)
        if cost.gpu_hours_left > ASK_GPU_HOURS and not sure:
            _ask(cost.gpu_hours_left)
        writable(self.root)
        self.store.check()
        report.show_plan(self.plan, self._states)
        folder = self.root / "sweeps"
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / f"{self.manifest.name}.json", self.manifest.to_json())

    @cached_property
    def store(self) -> Store:
        """Where its stages are kept."""
        return Store(self.root / "stages")

    def items(self) -> Sequence[Item]:
        """See `launchers.work.Work`: what takes longest first, searches before trainings."""
        left = [run for name, run in self.plan.runs.items() if self._states[name] != "done"]
        left.sort(key=lambda run: (run.kind == "train", -run.macs))
        names = {run.name for run in left}
        return [
            Item(
                run.name, run.what, tuple(one for one in run.needs if one in names), run.macs,
                getattr(run.point.request.resources, run.kind),
            )
            for run in left
        ]  # fmt: skip

    def stage(self, name: str) -> Stage:
        """See `_Staged`."""
        return self.plan.runs[name].stage

    def freeze(self, name: str) -> Path:
        """See `launchers.work.Work`."""
        run = self.plan.runs[name]
        folder = run.stage.folder
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        run.stage.forget_failure()
        write_atomically(
            folder / "spec.json", json.dumps(_specified(run, self._figures(name)), indent=2) + "\n"
        )
        return folder / "spec.json"

    def _figures(self, name: str) -> list[str]:
        """The figures that show a run: what a person finds it by where runs are tracked."""
        names = {
            figure.name: None
            for point in self.plan.points
            if name in (point.search, point.train)
            for figure in point.figures
        }
        return list(names)

    def end(self) -> None:
        """See `launchers.work.Work`: figures where an experiment has some, else tables."""
        states = self.plan.states()
        done = False
        for point in {id(one.point): one.point for one in self.plan.points}.values():
            mine = [one for one in self.plan.points if one.point is point]
            if all(states[one.train] == "done" for one in mine):
                seeds = sorted({one.seed for one in mine})
                gathered = point.with_seeds(seeds)
                records = run(gathered, show=logger.debug)
                if not self.manifest.figures:
                    report.draw(records, gathered.folder / "figures")
                done = True
        if self.manifest.figures:
            draw(self.root, [self.manifest])
        elif done:
            show(self.root, [self.manifest])


class Kept(_Staged):
    """The work of a sweep as it was frozen before: nothing is composed; see `launchers.work.Work`.

    Attributes:
        manifest: What is kept of the sweep.
        root: Where its runs are kept.
    """

    def __init__(self, root: Path, manifest: Manifest, names: Collection[str] = ()) -> None:
        """Take up a sweep.

        Args:
            root: The folder that runs are kept in.
            manifest: As `manifests` returns it.
            names: The runs to do, and what they need; all of them if there are none.
        """
        self.root, self.manifest = root, manifest
        self._stages = manifest.stages(Store(root / "stages"))
        own = manifest.own
        wanted = set(names) or set(own)
        wanted |= {need for name in wanted for need in own[name]["needs"]}
        self._names = [name for name in own if name in wanted]
        self._states: dict[str, State] = {}

    @property
    def name(self) -> str:
        """See `launchers.work.Work`."""
        return self.manifest.name

    def stage(self, name: str) -> Stage:
        """See `_Staged`."""
        return self._stages[name]

    def begin(self, *, sure: bool, live: Collection[str] = ()) -> None:
        """See `launchers.work.Work`; what was asked once is not asked again."""
        del sure
        writable(self.root)
        Store(self.root / "stages").check()
        self._states = self.manifest.states(Store(self.root / "stages"), live)

    def items(self) -> Sequence[Item]:
        """See `launchers.work.Work`."""
        own = self.manifest.own
        left = [name for name in self._names if self._states[name] != "done"]
        left.sort(key=lambda name: (own[name]["kind"] == "train", -own[name]["macs"]))
        return [
            Item(
                name, own[name]["what"],
                tuple(need for need in own[name]["needs"] if need in left),
                own[name]["macs"],
                self._spec(name)["config"]["resources"][own[name]["kind"]],
            )
            for name in left
        ]  # fmt: skip

    def freeze(self, name: str) -> Path:
        """See `launchers.work.Work`: it was frozen when the sweep was started."""
        self._spec(name)
        self.stage(name).forget_failure()
        return self.stage(name).folder / "spec.json"

    def _spec(self, name: str) -> dict[str, Any]:
        return _read_spec(self.stage(name).folder / "spec.json")

    def end(self) -> None:
        """See `launchers.work.Work`."""
        if self.manifest.figures:
            draw(self.root, [self.manifest])
        else:
            show(self.root, [self.manifest])


def why(stage: Stage) -> str:
    """Why a stage was not done, in one line; empty if nothing is known."""
    found = stage.failure()
    if found is not None:
        rank = f"process {found['rank']}: " if found.get("rank") else ""
        message = " ".join(str(found.get("message", "")).split())
        return rank + (message or str(found.get("type", "unknown")))
    # It ended before it began: the last line that its process left says why, if it is a reason.
    log = stage.folder / "log.txt"
    lines = log.read_text("utf-8", "replace").splitlines() if log.exists() else []
    said = _REASON.fullmatch(lines[-1]) if lines else None
    return said["text"] if said else ""


def _title(points: Sequence[Sequence[str]]) -> str:
    """What a sweep is called: by its experiments, or just a sweep."""
    names: dict[str, None] = {}
    for words in points:
        for word in words:
            key, _, value = word.partition("=")
            if key == EXPERIMENT and value:
                names[value] = None
    return "+".join(names) if 0 < len(names) <= 3 else "paper" if names else "sweep"  # noqa: PLR2004


def _ask(gpu_hours: float) -> None:
    """Ask whether so much is meant.

    Raises:
        InputError: It is not, or there is nobody to ask.
    """
    if sys.stdin.isatty():
        sys.stderr.write(f"This takes about {gpu_hours:,.0f} GPU hours. Start it? [y/N] ")
        sys.stderr.flush()
        if sys.stdin.readline().strip().lower() in {"y", "yes"}:
            return
    raise InputError(
        f"the sweep is {gpu_hours:,.0f} GPU hours, but more than {ASK_GPU_HOURS:g} are started "
        "only if that is meant; add --yes, or narrow it"
    )


@dataclass(frozen=True, slots=True)
class _Named:
    """A figure that shows a run, where only its name matters: what draws it need not be there."""

    name: str


def _specified(run: Run, figures: Sequence[str]) -> dict[str, Any]:
    """All that a process needs to do a run.

    Its root is left out, for it is the one that the run lies in, wherever that is then; other
    paths start from ``home``, the folder that the sweep was given in.
    """
    config = frozen(run.point.request)
    del config["root"]
    config["methods"], config["seeds"] = [run.method], [run.seed]
    config["runtime"]["progress"] = False
    return {
        "format": FORMAT,
        "kind": run.kind,
        "method": run.method,
        "seed": run.seed,
        "needs": list(run.needs),
        "figures": list(figures),
        "home": os.getcwd(),  # noqa: PTH109 (as the user sees it)
        "config": config,
    }


_SPECIFIED = {"kind", "method", "seed", "needs", "figures", "home", "config"}


def home(spec: Path) -> Path | None:
    """The folder that a frozen run was given in, if it is still there.

    Raises:
        InputError: There is no frozen run at this path.
    """
    folder = Path(_read_spec(spec)["home"])
    return folder if folder.is_dir() else None


def _read_spec(spec: Path) -> dict[str, Any]:
    """What `Sweep.freeze` wrote.

    Raises:
        InputError: It is not there, or something else.
    """
    content: dict[str, Any] = {}
    try:
        content = json.loads(spec.read_text("utf-8"))
        known = content.keys() >= _SPECIFIED
        fault = "" if known and content["format"] == FORMAT else "of another version"
    except (OSError, KeyError, AttributeError, ValueError) as error:
        fault = str(error)
    if fault:
        raise InputError(
            f"{spec} is no frozen run ({fault}), but one is needed; give the same sweep again"
        )
    return content


def perform(spec: Path) -> None:
    """Do the run that was frozen at this path; done before, it is not done again.

    Raises:
        InputError: What it needs is not there, or it cannot be done.
    """
    content = _read_spec(spec)
    rank = int(os.environ.get("RANK", "0"))
    try:
        _perform(spec, content, rank)
    except Exception as error:
        if not isinstance(error, Interrupted | _Unready):
            # Said already if it went wrong inside the stage; here it may not have come so far.
            for stage in Store(spec.parent.parent).stages(content["kind"]):
                if stage.folder.name == spec.parent.name:
                    stage.fail(error, rank=rank)
        raise


class _Unready(InputError):  # noqa: N818 (the name is what it is)
    """What a run needs is not done: no failure of its own."""


def _perform(spec: Path, content: Mapping[str, Any], rank: int) -> None:
    method, seed, needs = content["method"], content["seed"], content["needs"]
    spec = spec.resolve()
    root = spec.parents[2]  # it is <root>/stages/<name>/spec.json
    start = f"{this_job() or 'here'}-{os.environ.get('SLURM_RESTART_COUNT', '0')}"
    meeting = spec.parent / f".meeting-{start}.json"
    log = f"log-{rank}.txt" if rank else "log.txt"
    with chdir(home(spec) or "."):
        asked = request(OmegaConf.create({**content["config"], "root": str(root)}))
        point = Point(replace(asked, figures=tuple(_Named(name) for name in content["figures"])))
        staged = point.search_stage if content["kind"] == "search" else point.train_stage
        meant = staged(method, seed).folder.name
        if meant != spec.parent.name:
            raise InputError(
                f"{spec.parent.name}/spec.json is of another run ({meant}), but what it says names "
                "its folder; give the same sweep again"
            )
        with distributed.together(point.device, meeting=meeting), logged(spec.parent / log):
            if content["kind"] == "search":
                searched(point, method, seed)
                return
            if needs and point.search_stage(method, seed).result() is None:
                raise _Unready(
                    f"{spec.parent.name} is a training that needs {needs[0]}, but that is not "
                    "done; do it first"
                )
            trained(point, method, seed)


def manifests(root: Path, names: Sequence[str] = ()) -> list[Manifest]:
    """The sweeps that are kept below a root, by name.

    Args:
        root: The folder that runs are kept in.
        names: Those wanted, or how their names begin; all of them if there are none.

    Raises:
        InputError: There is no such sweep.
    """
    paths = sorted((root / "sweeps").glob("*.json"))
    for name in names:
        if not any(path.stem.startswith(name) for path in paths):
            known = ", ".join(path.stem for path in paths) or "none"
            raise InputError(f"{name} is no sweep in {root}, but the sweeps there are: {known}")
    chosen = [one for one in paths if not names or one.stem.startswith(tuple(names))]
    return [Manifest.from_json(one.read_bytes(), name=str(one)) for one in chosen]


def asked_for(root: Path, names: Sequence[str]) -> tuple[list[Manifest], list[str]]:
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
    every = manifests(root)
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
        stages = sweep.stages(store)
        kinds |= {name: one for name, one in sweep.figures.items() if not only or name in only}
        for point in sweep.points:
            pairs = [(point["train"], point["method"]), (point["baseline"], "uniform")]
            for name, method in pairs:
                if name not in results:
                    results[name] = stages[name].result()
                result = results[name]
                for figure in point["figures"]:
                    if result is not None:
                        one = recorded(result, method=method, algorithm=point["algorithm"])
                        records.setdefault(figure, {})[name] = one
                    else:
                        wanted.setdefault(figure, {})[name] = sweep.runs[name]["what"]
    drawn = [
        (one, list(records.get(one.name, {}).values()), list(wanted.get(one.name, {}).values()))
        for one in figures(list(kinds.values()))
    ]
    media = report.show_figures(drawn, into=root / "report", whole=not only)
    for sweep in () if only else sweeps:
        files: dict[str, str] = {}
        for name in sweep.figures:
            files |= media[name]
        _track(root, sweep, files)


def figures_run(sweep: Manifest) -> str:
    """The name of the tracked run that shows a sweep's figures."""
    name = f"figures-{sweep.name}"
    return tracking(sweep.tracking).run_id(name) if sweep.tracking else name


def _track(root: Path, sweep: Manifest, media: Mapping[str, str]) -> None:
    """Track a sweep's figures and tables as a run of their own."""
    if not sweep.tracking or not media:
        return
    how = tracking(sweep.tracking)
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
    found: dict[str, report.Gathered] = {}
    for sweep in sweeps:
        stages = sweep.stages(store)
        for point in sweep.points:
            result = stages[point["train"]].result()
            if result is not None:
                one = recorded(result, method=point["method"], algorithm=point["algorithm"])
                its = _gathered(sweep, point)
                key = identity.canonical([one.algorithm, one.found.method, *its])
                found.setdefault(key, report.Gathered(*its, [])).records.append(one)
    if not found:
        raise InputError(
            f"--root is {root}, but no point of {', '.join(one.name for one in sweeps)} is done; "
            f"see widthopt status {there(root)}"
        )
    report.side_by_side(list(found.values()), into=root / "report")


def _gathered(sweep: Manifest, point: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a point's final training, and its search, depend on but for widths and seed."""
    runs = [sweep.runs[name] for name in (point["train"], *sweep.runs[point["train"]]["needs"])]
    trained, *searches = ({**one["fields"], "seed": None} for one in runs)
    origin = trained.pop("origin")
    searched = {"extrapolation": origin["extrapolation"], "budget": origin["budget"]}
    return trained, {**searches[0], **searched} if searches else {}


def status(
    root: Path, sweeps: Sequence[Manifest], live: Collection[str] = ()
) -> list[dict[str, Any]]:
    """How far sweeps are: one table of plain data for each.

    Args:
        root: The folder that runs are kept in.
        sweeps: As `manifests` returns them.
        live: The jobs that a queue knows as waiting or running.
    """
    store = Store(root / "stages")
    store.check(write=False)
    result = []
    for sweep in sweeps:
        states, stages = sweep.states(store, live), sweep.stages(store)
        rows = []
        for name, one in sweep.own.items():
            rows.append(
                {
                    "name": name,
                    "kind": one["kind"],
                    "state": states[name],
                    "what": one["what"],
                    "job": (stages[name].submission() or {}).get("job"),
                    "why": why(stages[name]) or None if states[name] in ENDED else None,
                }
            )
        result.append({"sweep": sweep.name, "points": len(sweep.points), "runs": rows})
    return result
