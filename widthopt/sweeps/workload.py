"""The workloads that launchers run: a composed sweep, or a sweep that was started before.

Launchers import `Sweep` by its dotted name (``workload`` in ``conf/hydra/launcher``).
"""

import json
import logging
import os
import sys
from collections.abc import Collection, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from hydra.core.config_loader import ConfigLoader

from hydra_plugins.widthopt_launchers.sweeper import EXPERIMENT
from hydra_plugins.widthopt_launchers.workload import Task
from widthopt.config.compose import build_requests
from widthopt.config.typed import to_plain
from widthopt.errors import InputError
from widthopt.files import check_writable, write_atomically, writing
from widthopt.reporting import console
from widthopt.reporting.sweeps import draw, show
from widthopt.runs.execute import run_request
from widthopt.runs.manifest import Manifest
from widthopt.runs.plan import GPU_MACS_PER_SECOND, Plan, Run
from widthopt.runs.states import State
from widthopt.runs.store import Store, StoreEntry, failure_reason
from widthopt.sweeps.worker import FORMAT, read_spec
from widthopt.training.loop import Interrupted


logger = logging.getLogger("widthopt")


ASK_GPU_HOURS = 24.0
"""A sweep of more accelerator hours needs a confirmation."""


class _StoreTasks:
    """Base class of workloads whose tasks are entries of the store; see `Workload`."""

    interruptions = (Interrupted,)

    @property
    def imports(self) -> Sequence[str]:
        """See `Workload`."""
        return ()

    def entry(self, name: str) -> StoreEntry:
        """Return the store entry of a task."""
        raise NotImplementedError

    def job(self, name: str) -> str:
        """See `Workload`."""
        return str((self.entry(name).submission() or {}).get("job", ""))

    def record_job(self, name: str, job: str, **details: str) -> None:
        """See `Workload`."""
        self.entry(name).record_job(job, **details)

    def is_done(self, name: str) -> bool:
        """See `Workload`."""
        return self.entry(name).result() is not None

    def failure(self, name: str) -> str:
        """See `Workload`."""
        return failure_reason(self.entry(name))


class Sweep(_StoreTasks):
    """The workload of a composed sweep; see `Workload`.

    Attributes:
        plan: Its points and runs.
        root: The folder of runs.
    """

    def __init__(self, loader: ConfigLoader, points: Sequence[Sequence[str]]) -> None:
        """Plan the sweep. Nothing is started or written.

        Args:
            loader: Hydra's configuration loader.
            points: The overrides of each point.

        Raises:
            InputError: A value is wrong, or the parts of a point do not fit together.
        """
        requests = build_requests(loader, points)
        roots = sorted({request.root for request in requests})
        if len(roots) > 1:
            raise InputError(
                f"root is {' and '.join(roots)}, but all points of a sweep must have the same one; "
                "name one"
            )
        self.plan = Plan.of(requests)
        self.root = Path(roots[0])
        self._title = _title(points)
        self._states: dict[str, State] = {}

    @cached_property
    def manifest(self) -> Manifest:
        """The manifest that is written to the folder of runs."""
        tracking = to_plain(self.plan.points[0].point.request)["tracking"]
        return Manifest.of(self.plan, title=self._title, tracking=tracking)

    @property
    def name(self) -> str:
        """See `Workload`."""
        return self.manifest.name

    @property
    def imports(self) -> Sequence[str]:
        """See `Workload`: modules that the data sets import."""
        datasets = [point.point.request.dataset for point in self.plan.points]
        names = [name for dataset in datasets for name in getattr(dataset, "IMPORTS", ())]
        return list(dict.fromkeys(names))

    def begin(self, *, assume_yes: bool, live: Collection[str] = ()) -> None:
        """See `Workload`."""
        self._states = self.plan.states(live)
        cost = self.plan.cost(self._states, nodes=1, macs_per_second=GPU_MACS_PER_SECOND)
        if cost.gpu_hours_left > ASK_GPU_HOURS and not assume_yes:
            _ask(cost.gpu_hours_left)
        check_writable(self.root)
        self.store.check()
        console.show_plan(self.plan, self._states)
        folder = self.root / "sweeps"
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / f"{self.manifest.name}.json", self.manifest.to_json())

    @cached_property
    def store(self) -> Store:
        """The store of the folder of runs."""
        return Store.below(self.root)

    def tasks(self) -> Sequence[Task]:
        """See `Workload`: searches before trainings, the most expensive first."""
        left = [run for name, run in self.plan.runs.items() if self._states[name] != "done"]
        left.sort(key=lambda run: (run.kind == "train", -run.macs))
        names = {run.name for run in left}
        return [
            Task(
                run.name, run.what, tuple(need for need in run.needs if need in names), run.macs,
                getattr(run.point.request.resources, run.kind),
            )
            for run in left
        ]  # fmt: skip

    def entry(self, name: str) -> StoreEntry:
        """See `_StoreTasks`."""
        return self.plan.runs[name].entry

    def write_spec(self, name: str) -> Path:
        """See `Workload`."""
        run = self.plan.runs[name]
        folder = run.entry.folder
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        run.entry.forget_failure()
        write_atomically(
            folder / "spec.json", json.dumps(_spec_of(run, self._figures(name)), indent=2) + "\n"
        )
        return folder / "spec.json"

    def _figures(self, name: str) -> list[str]:
        """Return the names of the figures that show a run, which are tags of its tracked run."""
        names = {
            figure.name: None
            for point in self.plan.points
            if name in (point.search, point.train)
            for figure in point.figures
        }
        return list(names)

    def end(self) -> None:
        """See `Workload`: show the figures of the experiment, or tables if it has none."""
        states = self.plan.states()
        done = False
        for point in {id(item.point): item.point for item in self.plan.points}.values():
            mine = [item for item in self.plan.points if item.point is point]
            if all(states[item.train] == "done" for item in mine):
                seeds = sorted({item.seed for item in mine})
                gathered = point.with_seeds(seeds)
                records = run_request(gathered, show=logger.debug)
                if not self.manifest.figures:
                    console.draw(records, gathered.folder / "figures")
                done = True
        if self.manifest.figures:
            draw(self.root, [self.manifest])
        elif done:
            show(self.root, [self.manifest])


class StoredSweep(_StoreTasks):
    """The workload of a sweep that was started before, from its manifest; see `Workload`.

    Attributes:
        manifest: The manifest of the sweep.
        root: The folder of runs.
    """

    def __init__(self, root: Path, manifest: Manifest, names: Collection[str] = ()) -> None:
        """Select the runs.

        Args:
            root: The folder of runs.
            manifest: The manifest of the sweep.
            names: The runs to do, together with the runs that they need; empty for all.
        """
        self.root, self.manifest = root, manifest
        self._entries = manifest.entries(Store.below(root))
        own = manifest.own
        wanted = set(names) or set(own)
        wanted |= {need for name in wanted for need in own[name]["needs"]}
        self._names = [name for name in own if name in wanted]
        self._states: dict[str, State] = {}

    @property
    def name(self) -> str:
        """See `Workload`."""
        return self.manifest.name

    def entry(self, name: str) -> StoreEntry:
        """See `_StoreTasks`."""
        return self._entries[name]

    def begin(self, *, assume_yes: bool, live: Collection[str] = ()) -> None:
        """See `Workload`. The sweep was confirmed when it was started."""
        del assume_yes
        check_writable(self.root)
        Store.below(self.root).check()
        self._states = self.manifest.states(Store.below(self.root), live)

    def tasks(self) -> Sequence[Task]:
        """See `Workload`."""
        own = self.manifest.own
        left = [name for name in self._names if self._states[name] != "done"]
        left.sort(key=lambda name: (own[name]["kind"] == "train", -own[name]["macs"]))
        return [
            Task(
                name, own[name]["what"],
                tuple(need for need in own[name]["needs"] if need in left),
                own[name]["macs"],
                self._spec(name)["config"]["resources"][own[name]["kind"]],
            )
            for name in left
        ]  # fmt: skip

    def write_spec(self, name: str) -> Path:
        """See `Workload`. The spec was written when the sweep was started."""
        self._spec(name)
        self.entry(name).forget_failure()
        return self.entry(name).folder / "spec.json"

    def _spec(self, name: str) -> dict[str, Any]:
        return read_spec(self.entry(name).folder / "spec.json")

    def end(self) -> None:
        """See `Workload`."""
        if self.manifest.figures:
            draw(self.root, [self.manifest])
        else:
            show(self.root, [self.manifest])


def _title(points: Sequence[Sequence[str]]) -> str:
    """Return the title of a sweep: the names of its experiments, or ``sweep``."""
    names: dict[str, None] = {}
    for words in points:
        for word in words:
            key, _, value = word.partition("=")
            if key == EXPERIMENT and value:
                names[value] = None
    return "+".join(names) if 0 < len(names) <= 3 else "paper" if names else "sweep"  # noqa: PLR2004


def _ask(gpu_hours: float) -> None:
    """Ask the user to confirm an expensive sweep.

    Raises:
        InputError: The user does not confirm, or standard input is not a terminal.
    """
    if sys.stdin.isatty():
        sys.stderr.write(f"This takes about {gpu_hours:,.0f} GPU hours. Start it? [y/N] ")
        sys.stderr.flush()
        if sys.stdin.readline().strip().lower() in {"y", "yes"}:
            return
    raise InputError(
        f"the sweep takes {gpu_hours:,.0f} GPU hours, but more than {ASK_GPU_HOURS:g} need a "
        "confirmation; add --yes, or make the sweep smaller"
    )


def _spec_of(run: Run, figures: Sequence[str]) -> dict[str, Any]:
    """Return the spec of a run: everything that a process needs to do it.

    The root is not part of it, because the folder of runs may move. Other relative paths start
    from ``home``, the folder in which the sweep was started.
    """
    config = to_plain(run.point.request)
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
