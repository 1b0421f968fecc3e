"""The plan of a sweep: its points, the runs that they share, and the cost.

A *point* is one method at one seed of one request. A *run* is a unit of work: a search or a final
training. Points that need the same run share it, so it is done once.
"""

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

from widthopt import identity
from widthopt.request import FigureSpec, Request
from widthopt.runs.point import SizedRequest
from widthopt.runs.states import State, mark_blocked
from widthopt.runs.store import StoreEntry


GPU_MACS_PER_SECOND = 4.4e12
"""Speed of training on one V100: 3 x 4.089 GMACs x 1,281,167 images x 100 epochs in 100 GPU hours.

Source: paper section 1, on ResNet50 by Radosavovic et al., 2020.
"""


NODE_GPUS = 8
"""Number of accelerators of one node (paper section 3.4)."""


@dataclass(frozen=True)
class Run:
    """One search or one final training.

    Attributes:
        kind: ``search`` or ``train``.
        entry: The store entry of its result.
        point: A request that needs the run; all requests that do define the same work.
        method: The method.
        seed: The seed.
        needs: Names of runs whose results it needs.
        macs: Its cost in closed form.
        apart: Values by name that distinguish it from runs with the same description.
    """

    kind: Literal["search", "train"]
    entry: StoreEntry
    point: SizedRequest
    method: str
    seed: int
    needs: tuple[str, ...]
    macs: int
    apart: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The name of its folder, such as ``search-0123456789ab``."""
        return self.entry.folder.name

    @property
    def what(self) -> str:
        """Description of the run."""
        request, setting = self.point.request, self.point.target
        words = f"{request.network.name} on {request.dataset.name}"
        end = "".join(f", {name} {value}" for name, value in self.apart.items())
        end += f", seed {self.seed}"
        if self.method == "uniform":
            return f"{words}, {axes(setting)}: training, baseline{end}"
        proxy = self.point.setting(self.method)
        if self.kind == "search":
            return f"{words}, {axes(proxy)}: {request.algorithm.name} search{end}"
        origin = f"{request.algorithm.name} at {axes(proxy)}"
        return f"{words}, {axes(setting)}: training, {origin}{end}"


def axes(setting: Any) -> str:
    """Return width, depth, resolution and fraction as the paper writes them: (0.5, 1, 224, 10%)."""
    values = (setting.width, setting.depth, setting.resolution)
    return f"({', '.join(f'{value:g}' for value in values)}, {100 * setting.fraction:g}%)"


class Point(NamedTuple):
    """One point and the names of its runs.

    Attributes:
        point: The checked request. Points that differ in their seed share it.
        method: ``uniform``, ``direct`` or ``transfer``.
        seed: The seed.
        search: Name of the search; None for ``uniform``.
        train: Name of the final training.
        figures: The figures that show the point.
    """

    point: SizedRequest
    method: str
    seed: int
    search: str | None
    train: str
    figures: tuple[FigureSpec, ...]


@dataclass(frozen=True)
class Plan:
    """Points and the runs behind them.

    Attributes:
        points: In the order of the sweep; may contain the same point twice.
        runs: By name; every run comes after the runs that it needs.
    """

    points: tuple[Point, ...]
    runs: Mapping[str, Run]

    @classmethod
    def of(cls, requests: Iterable[Request], *, images: bool = True) -> "Plan":
        """Plan requests. Nothing is started or written.

        Args:
            requests: The requests.
            images: Whether to check that the images exist. Without the images, the plan uses
                their published number.

        Raises:
            InputError: A value of a request is wrong, or its parts do not fit together.
        """
        sized: dict[str, SizedRequest] = {}
        overheads: dict[str, int] = {}
        searches: dict[str, Run] = {}
        trainings: dict[str, Run] = {}
        points: list[Point] = []
        for request in requests:
            # Requests that differ only in their seeds have the same networks and cost.
            key = identity.canonical({**request.fields, "seeds": None, "root": request.root})
            if key not in sized:
                sized[key] = SizedRequest(request, images=images)
            point = sized[key]
            for method in request.methods:
                for seed in request.seeds:
                    train = point.train_entry(method, seed)
                    search = None
                    if method != "uniform":
                        entry = point.search_entry(method, seed)
                        search = entry.folder.name
                        if search not in searches:
                            without_seed = identity.canonical({**entry.fields, "seed": None})
                            if without_seed not in overheads:
                                overheads[without_seed] = point.overhead_macs(method)
                            macs = overheads[without_seed]
                            searches[search] = Run("search", entry, point, method, seed, (), macs)
                    name = train.folder.name
                    if name not in trainings:
                        needs = () if search is None else (search,)
                        macs = point.train_macs
                        trainings[name] = Run("train", train, point, method, seed, needs, macs)
                    figures = request.figures
                    points.append(Point(point, method, seed, search, name, figures))
        return cls(tuple(points), _distinguish({**searches, **trainings}))

    def states(self, live: Collection[str] = ()) -> dict[str, State]:
        """Return the state of each run by name.

        Args:
            live: The ids of pending and running jobs.

        Raises:
            InputError: The root has the format of another version, or a result was changed.
        """
        for root in {point.point.request.root for point in self.points}:
            stored = next(point.point for point in self.points if point.point.request.root == root)
            stored.store.check(write=False)
        states = {name: run.entry.state(live) for name, run in self.runs.items()}
        return mark_blocked(states, {name: run.needs for name, run in self.runs.items()})

    def cost(self, states: Mapping[str, State], *, nodes: int, macs_per_second: float) -> "Cost":
        """Return the number of runs and the remaining cost and time.

        Args:
            states: State of every run.
            nodes: Number of nodes with `NODE_GPUS` accelerators each; a run uses one node.
            macs_per_second: Speed of one accelerator.
        """
        left = [run for name, run in self.runs.items() if states[name] != "done"]
        seconds = {run.name: run.macs / (macs_per_second * NODE_GPUS) for run in left}
        longest = max(
            (
                seconds[item.name] + sum(seconds.get(need, 0.0) for need in item.needs)
                for item in left
            ),
            default=0.0,
        )
        total = sum(seconds.values())
        return Cost(
            points=len(self.points),
            searches=sum(run.kind == "search" for run in self.runs.values()),
            trainings=sum(run.kind == "train" for run in self.runs.values()),
            states=dict(Counter(states.values())),
            macs=sum(run.macs for run in self.runs.values()),
            macs_left=sum(run.macs for run in left),
            gpu_hours_left=total * NODE_GPUS / 3600,
            wall_hours_left=max(total / nodes, longest) / 3600,
        )


_SEARCH = ("own", "origin", "search")


def _distinguish(runs: Mapping[str, Run]) -> dict[str, Run]:
    """Add the values in which they differ to runs with the same description."""
    by_description = defaultdict(list)
    for run in runs.values():
        by_description[run.what].append(run)
    result = dict(runs)
    for items in by_description.values():
        tables = [
            {
                "own": item.entry.fields,
                "search": runs[item.needs[0]].entry.fields if item.needs else {},
            }
            for item in items
        ]
        for run, values in zip(items, identity.differing_values(tables), strict=True):
            # The fields of a training contain only the name of its search.
            named = {path[-1]: value for path, value in values.items() if path != _SEARCH}
            result[run.name] = replace(run, apart=named)
    return result


@dataclass(frozen=True, slots=True)
class Cost:
    """Size and cost of a plan.

    Attributes:
        points: Number of points.
        searches: Number of searches, shared ones counted once.
        trainings: Number of final trainings, shared ones counted once.
        states: Number of runs in each state.
        macs: MACs of all runs.
        macs_left: MACs of the runs that are not done.
        gpu_hours_left: Accelerator hours of the runs that are not done.
        wall_hours_left: Lower bound of the hours until all runs are done, if no node is idle.
    """

    points: int
    searches: int
    trainings: int
    states: Mapping[str, int]
    macs: int
    macs_left: int
    gpu_hours_left: float
    wall_hours_left: float
