"""What a sweep comes to: its points, the runs they share, and what those cost.

A *point* is one method at one seed of one request, what the paper's figures show as one value.
A *run* is a unit of work: the search or the final training behind some points. Points that need
the same run share it, so that it is done once.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, NamedTuple

from widthopt import identity
from widthopt.errors import InputError
from widthopt.pipeline import Point, Request
from widthopt.store import Stage, State, Store, blocked


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
    stage: Stage
    point: Point
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
    return f"({', '.join(f'{one:g}' for one in values)}, {100 * setting.fraction:g}%)"


class PlannedPoint(NamedTuple):
    """One point, and the names of its runs.

    Attributes:
        point: Its request, checked and sized; points that differ in their seed share it.
        method: ``uniform``, ``direct`` or ``transfer``.
        seed: The seed.
        search: The search; None where nothing is searched.
        train: The final training.
        figures: What a report draws of it, of `widthopt.figures`; points that share all else
            may differ in them.
    """

    point: Point
    method: str
    seed: int
    search: str | None
    train: str
    figures: tuple[Any, ...]


@dataclass(frozen=True)
class Plan:
    """Points and the runs behind them.

    Attributes:
        points: In the order of the sweep; the same one may be asked for twice.
        runs: By name; every run comes after the one that it needs.
    """

    points: tuple[PlannedPoint, ...]
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
        sized: dict[str, Point] = {}
        overheads: dict[str, int] = {}
        searches: dict[str, Run] = {}
        trainings: dict[str, Run] = {}
        points: list[PlannedPoint] = []
        for request in requests:
            # Of what differs between points, seeds size nothing.
            text = identity.canonical({**request.fields, "seeds": None, "root": request.root})
            if text not in sized:
                sized[text] = Point(request, images=images)
            point = sized[text]
            for method in request.methods:
                for seed in request.seeds:
                    train = point.train_stage(method, seed)
                    search = None
                    if method != "uniform":
                        stage = point.search_stage(method, seed)
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
                    points.append(PlannedPoint(point, method, seed, search, name, figures))
        return cls(tuple(points), _told_apart({**searches, **trainings}))

    def states(self, live: Collection[str] = ()) -> dict[str, State]:
        """How far each run is, by name.

        Args:
            live: The jobs that a queue knows as waiting or running.

        Raises:
            InputError: The root belongs to another version, or a result was changed.
        """
        for root in {one.point.request.root for one in self.points}:
            stored = next(one.point for one in self.points if one.point.request.root == root)
            stored.store.check(write=False)
        states = {name: run.stage.state(live) for name, run in self.runs.items()}
        return blocked(states, {name: run.needs for name, run in self.runs.items()})

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
            (seconds[one.name] + sum(seconds.get(need, 0.0) for need in one.needs) for one in left),
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


def _told_apart(runs: Mapping[str, Run]) -> dict[str, Run]:
    """The runs; those that would be described alike, each with the values in which they differ."""
    alike = defaultdict(list)
    for run in runs.values():
        alike[run.what].append(run)
    told = dict(runs)
    for ones in alike.values():
        tables = [
            {
                "own": one.stage.fields,
                "search": runs[one.needs[0]].stage.fields if one.needs else {},
            }
            for one in ones
        ]
        for run, values in zip(ones, identity.apart(tables), strict=True):
            # Of its search a training's own fields have but the name.
            named = {path[-1]: value for path, value in values.items() if path != _SEARCH}
            told[run.name] = replace(run, apart=named)
    return told


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


FORMAT = 2
"""Version of a manifest's JSON form."""


@dataclass(frozen=True)
class Manifest:
    """A sweep on the disk: what was asked for, as plain data, so that nothing is composed again.

    Attributes:
        name: The sweep's name, also that of its file.
        points: Each with ``what`` it is in words, its ``method``, ``algorithm`` and ``seed``, the
            names of its ``train``ing and of the un-optimised network's beside it (``baseline``),
            and the ``figures`` that show it.
        runs: By name: ``kind`` and ``fields`` of the stage, ``needs``, ``what`` and ``macs``; of
            baselines beside them neither needs nor MACs.
        figures: By name, what a report draws, as ``figures`` in ``conf/experiment`` has it.
        tracking: How the figures are tracked, as ``conf/tracking`` has it; not at all if empty.
    """

    name: str
    points: Sequence[Mapping[str, Any]]
    runs: Mapping[str, Mapping[str, Any]]
    figures: Mapping[str, Mapping[str, Any]]
    tracking: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, plan: Plan, *, title: str, tracking: Mapping[str, Any]) -> "Manifest":
        """The manifest of a plan.

        Args:
            plan: The plan.
            title: What its name begins with; the rest follows from its runs.
            tracking: How its figures are tracked, as ``conf/tracking`` has it.
        """
        figures: dict[str, Mapping[str, Any]] = {}
        points, runs = [], {}
        for run in plan.runs.values():
            runs[run.name] = {
                "kind": run.kind,
                "fields": run.stage.fields,
                "needs": list(run.needs),
                "what": run.what,
                "macs": run.macs,
            }
        for one in plan.points:
            request = one.point.request
            for figure in one.figures:
                kind = type(figure)
                name = f"{kind.__module__}.{kind.__qualname__}"
                figures[figure.name] = {"_target_": name, **asdict(figure)}
            baseline = one.point.train_stage("uniform", one.seed)
            if baseline.folder.name not in runs:
                beside = Run("train", baseline, one.point, "uniform", one.seed, (), macs=0)
                runs[baseline.folder.name] = {
                    "kind": "baseline",
                    "fields": baseline.fields,
                    "what": beside.what,
                }
            points.append(
                {
                    "what": plan.runs[one.train].what,
                    "method": one.method,
                    "algorithm": request.algorithm.name,
                    "seed": one.seed,
                    "train": one.train,
                    "baseline": baseline.folder.name,
                    "figures": [figure.name for figure in one.figures],
                }
            )
        key = identity.key("sweep", sorted(plan.runs))
        return cls(f"{title}-{key}", points, runs, figures, tracking)

    def to_json(self) -> str:
        """As text; `from_json` reads it back."""
        plain = json.loads(json.dumps(asdict(self), allow_nan=False))
        content = {"format": FORMAT, "sha256": identity.digest(plain), "sweep": plain}
        return json.dumps(content) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes, *, name: str) -> "Manifest":
        """Read what `to_json` wrote.

        Raises:
            InputError: It is something else, or it was changed since.
        """
        try:
            content = json.loads(text)
            version, plain = content["format"], content.get("sweep")
            whole = version != FORMAT or identity.digest(plain) == content["sha256"]
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise InputError(
                f"{name} is no sweep's file ({error}), but one is needed; give the same sweep again"
            ) from error
        if version != FORMAT:
            raise InputError(
                f"{name} has format {version}, but this version reads {FORMAT}; give the same "
                "sweep again"
            )
        if not whole:
            raise InputError(
                f"{name} was changed after it was written, but only what was planned is done; "
                "restore it, or give the same sweep again"
            )
        return cls(**plain)

    def stages(self, store: Store) -> dict[str, Stage]:
        """The stages of its runs, by name; those of baselines too."""
        kinds = {name: one["kind"] for name, one in self.runs.items()}
        return {
            name: store.stage("train" if kinds[name] == "baseline" else kinds[name], one["fields"])
            for name, one in self.runs.items()
        }

    @property
    def own(self) -> dict[str, Mapping[str, Any]]:
        """Its runs without the baselines beside them, which are other sweeps' work."""
        return {name: one for name, one in self.runs.items() if one["kind"] != "baseline"}

    def states(self, store: Store, live: Collection[str] = ()) -> dict[str, State]:
        """How far each of its own runs is, by name."""
        stages = self.stages(store)
        states = {name: stages[name].state(live) for name in self.own}
        return blocked(states, {name: one["needs"] for name, one in self.own.items()})
