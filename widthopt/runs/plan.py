"""What a sweep comes to: its points, the runs they share, and what those cost.

A *point* is one method at one seed of one request, what the paper's figures show as one value.
A *run* is a unit of work: the search or the final training behind some points. Points that need
the same run share it, so that it is done once.
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
"""What one V100 trains at: 3 x 4.089 GMACs x 1,281,167 images x 100 epochs in 100 GPU hours.

Source: paper section 1, on ResNet50 by Radosavovic et al., 2020.
"""


NODE_GPUS = 8
"""Accelerators of one node (paper section 3.4)."""


@dataclass(frozen=True)
class Run:
    """One search or one final training.

    Attributes:
        kind: Which of the two.
        stage: Where its result is kept.
        point: One of the points that need it; all that do would do the same work.
        method: The method at that point.
        seed: Its seed.
        needs: The name of the run that must be done before, if there is one.
        macs: What it takes, in closed form.
        apart: What tells it from runs of its plan that would else be described alike: values
            by their name.
    """

    kind: Literal["search", "train"]
    stage: StoreEntry
    point: SizedRequest
    method: str
    seed: int
    needs: tuple[str, ...]
    macs: int
    apart: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The name of its folder, such as ``search-0123456789ab``."""
        return self.stage.folder.name

    @property
    def what(self) -> str:
        """What it is, in words."""
        request, setting = self.point.request, self.point.target
        words = f"{request.network.name} on {request.dataset.name}"
        end = "".join(f", {name} {value}" for name, value in self.apart.items())
        end += f", seed {self.seed}"
        if self.method == "uniform":
            return f"{words}, {axes(setting)}: training, un-optimised{end}"
        proxy = self.point.setting(self.method)
        if self.kind == "search":
            return f"{words}, {axes(proxy)}: {request.algorithm.name} search{end}"
        found = f"{request.algorithm.name} at {axes(proxy)}"
        return f"{words}, {axes(setting)}: training, {found}{end}"


def axes(setting: Any) -> str:
    """Width, depth, resolution and fraction as the paper writes them: (0.5, 1, 224, 10%)."""
    values = (setting.width, setting.depth, setting.resolution)
    return f"({', '.join(f'{value:g}' for value in values)}, {100 * setting.fraction:g}%)"


class Point(NamedTuple):
    """One point, and the names of its runs.

    Attributes:
        point: Its request, checked and sized; points that differ in their seed share it.
        method: ``uniform``, ``direct`` or ``transfer``.
        seed: The seed.
        search: The search; None where nothing is searched.
        train: The final training.
        figures: What a report draws of it; points that share all else may differ in them.
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
        points: In the order of the sweep; the same one may be asked for twice.
        runs: By name; every run comes after the one that it needs.
    """

    points: tuple[Point, ...]
    runs: Mapping[str, Run]

    @classmethod
    def of(cls, requests: Iterable[Request], *, images: bool = True) -> "Plan":
        """Plan requests; nothing is started or written.

        Args:
            requests: As composed.
            images: Whether the images must be there; without them their published number is
                planned with.

        Raises:
            InputError: Something asked for cannot be done.
        """
        sized: dict[str, SizedRequest] = {}
        overheads: dict[str, int] = {}
        searches: dict[str, Run] = {}
        trainings: dict[str, Run] = {}
        points: list[Point] = []
        for request in requests:
            # Of what differs between points, seeds size nothing.
            text = identity.canonical({**request.fields, "seeds": None, "root": request.root})
            if text not in sized:
                sized[text] = SizedRequest(request, images=images)
            point = sized[text]
            for method in request.methods:
                for seed in request.seeds:
                    train = point.train_entry(method, seed)
                    search = None
                    if method != "uniform":
                        stage = point.search_entry(method, seed)
                        search = stage.folder.name
                        if search not in searches:
                            alike = identity.canonical({**stage.fields, "seed": None})
                            if alike not in overheads:
                                overheads[alike] = point.overhead_macs(method)
                            macs = overheads[alike]
                            searches[search] = Run("search", stage, point, method, seed, (), macs)
                    name = train.folder.name
                    if name not in trainings:
                        needs = () if search is None else (search,)
                        macs = point.train_macs
                        trainings[name] = Run("train", train, point, method, seed, needs, macs)
                    figures = request.figures
                    points.append(Point(point, method, seed, search, name, figures))
        return cls(tuple(points), _distinguish({**searches, **trainings}))

    def states(self, live: Collection[str] = ()) -> dict[str, State]:
        """How far each run is, by name.

        Args:
            live: The jobs that a queue knows as waiting or running.

        Raises:
            InputError: The root belongs to another version, or a result was changed.
        """
        for root in {point.point.request.root for point in self.points}:
            stored = next(point.point for point in self.points if point.point.request.root == root)
            stored.store.check(write=False)
        states = {name: run.stage.state(live) for name, run in self.runs.items()}
        return mark_blocked(states, {name: run.needs for name, run in self.runs.items()})

    def cost(self, states: Mapping[str, State], *, nodes: int, macs_per_second: float) -> "Cost":
        """What is left to do, and how long that takes.

        Args:
            states: Of every run.
            nodes: How many there are, each with `NODE_GPUS` accelerators; a run takes a node.
            macs_per_second: Of one accelerator.
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
    """The runs; those that would be described alike, each with the values in which they differ."""
    alike = defaultdict(list)
    for run in runs.values():
        alike[run.what].append(run)
    result = dict(runs)
    for items in alike.values():
        tables = [
            {
                "own": item.stage.fields,
                "search": runs[item.needs[0]].stage.fields if item.needs else {},
            }
            for item in items
        ]
        for run, values in zip(items, identity.differing_values(tables), strict=True):
            # Of its search a training's own fields have but the name.
            named = {path[-1]: value for path, value in values.items() if path != _SEARCH}
            result[run.name] = replace(run, apart=named)
    return result


@dataclass(frozen=True, slots=True)
class Cost:
    """What a plan comes to.

    Attributes:
        points: Points, as asked for.
        searches: Searches after sharing.
        trainings: Final trainings after sharing.
        states: How many runs are in each state.
        macs: MACs of all runs.
        macs_left: MACs of those that are not done.
        gpu_hours_left: Accelerator hours of those.
        wall_hours_left: Hours until the last is done, at best: no node idles, and no training
            comes before its search.
    """

    points: int
    searches: int
    trainings: int
    states: Mapping[str, int]
    macs: int
    macs_left: int
    gpu_hours_left: float
    wall_hours_left: float
