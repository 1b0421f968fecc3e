"""One request end to end: search on the proxy, extrapolate, train the target, evaluate.

Searches and trainings are stages of the store, named by everything that their result
depends on, so none is done twice; a run's folder gathers what belongs to one request.
"""

import copy
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from widthopt import data, distributed, identity
from widthopt.algorithms import Conditions, SearchResult, WidthSearch
from widthopt.algorithms.uniform import Uniform
from widthopt.data import Dataset, Sizes, Split
from widthopt.devices import resolve_device
from widthopt.errors import InputError
from widthopt.evaluation import evaluate
from widthopt.extrapolation import Extrapolation
from widthopt.projection import nominal_saving
from widthopt.records import METHODS, Found, Record, from_plain, to_json
from widthopt.seeds import derived_seed
from widthopt.setting import Network, Recipe, Resources, Runtime, Setting
from widthopt.store import Stage, Store, this_job, writable, write_atomically, writing
from widthopt.surgery import Blueprint
from widthopt.tracking import About, Tracker, Tracking, open_tracker
from widthopt.training import Interrupted, Log, train
from widthopt.widths import TOLERANCE, Match, match_macs, multipliers


logger = logging.getLogger("widthopt")


@dataclass(frozen=True, slots=True)
class Target:
    """The target's network axes; its data is always the whole data set.

    Attributes:
        width: Width multiplier.
        depth: Depth multiplier.
        resolution: Side of the square input, in pixels.
    """

    width: float
    depth: int
    resolution: int

    def __post_init__(self) -> None:
        if self.depth < 1 or self.resolution < 1:
            key = "depth" if self.depth < 1 else "resolution"
            raise InputError(
                f"target.{key} is {getattr(self, key)}, but it must be a whole number from 1 up; "
                "correct it"
            )


@dataclass(frozen=True)
class Request:
    """What one run is asked for; `widthopt.config` makes it from ``conf/`` and overrides.

    Attributes:
        projection: From the target to its proxy; `widthopt.projection.Projection` or another.
        figures: What a report draws of it, of `widthopt.figures`.
        fields: The composed values that results may depend on, as plain data.
    """

    network: Network
    dataset: Dataset
    projection: Callable[[Setting], Setting]
    algorithm: WidthSearch
    extrapolation: Extrapolation
    recipe: Recipe
    target: Target
    budget_macs: int | None
    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    root: str
    runtime: Runtime
    resources: Resources
    tracking: Tracking
    figures: tuple[Any, ...]
    fields: Mapping[str, Any]

    def __post_init__(self) -> None:
        unknown = [method for method in self.methods if method not in METHODS]
        if unknown or not self.methods or len(set(self.methods)) < len(self.methods):
            raise InputError(
                f"methods is [{', '.join(self.methods)}], but it lists some of "
                f"{', '.join(METHODS)}, each once; correct it"
            )
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise InputError(
                f"seeds is [{', '.join(map(str, self.seeds))}], but it lists whole numbers from 0 "
                "up, each once; correct it"
            )

    @property
    def target_setting(self) -> Setting:
        """The target with the data set's classes and all of its images."""
        target, classes = self.target, self.dataset.class_count()
        return Setting(self.network, classes, target.width, target.depth, target.resolution, 1.0)

    def blueprint(self, setting: Setting | None = None) -> Blueprint:
        """The network of a setting, of the target's if None.

        Raises:
            InputError: There is no such network; the message names the key that was typed.
        """
        setting = setting or self.target_setting
        try:
            return Blueprint(setting)
        except InputError as error:
            axis = str(error).split(" ", 1)[0]
            if axis not in {"width", "depth", "resolution"}:
                raise
            typed = getattr(self.projection, axis, None) is not None
            projected = typed and getattr(self.target, axis) != getattr(setting, axis)
            group = "projection" if projected else "target"
            raise InputError(f"{group}.{error}") from error


class Point:
    """A request checked and sized, before any work: its settings, networks and budget.

    Raises:
        InputError: Anything asked for cannot be done; nothing has started or been written.
    """

    def __init__(self, request: Request, *, images: bool = True) -> None:
        """Check and size a request.

        Args:
            request: What is asked for.
            images: Whether its images must be there, as they must to run it.
        """
        self.request = request
        if images:
            data.check(request.dataset, fraction=1.0)
        self.target = request.target_setting
        transfer = "transfer" in request.methods
        self.proxy = request.projection(self.target) if transfer else self.target
        if images and transfer:
            data.check(request.dataset, fraction=self.proxy.fraction)
        self.target_blueprint = request.blueprint(self.target)
        self.proxy_blueprint = request.blueprint(self.proxy)
        graph = self.target_blueprint.graph
        self.budget_macs: int = graph.macs() if request.budget_macs is None else request.budget_macs
        ones = dict.fromkeys(graph.free, 1.0)
        match_macs(graph, ones, budget_macs=self.budget_macs)
        if transfer:
            # Finds out now whether the proxy's widths can be carried over.
            request.extrapolation(
                dict.fromkeys(self.proxy_blueprint.graph.free, 1.0),
                source=self.proxy_blueprint.graph,
                target=graph,
                budget_macs=self.budget_macs,
            )
        self.device = resolve_device(request.runtime)

    def with_seeds(self, seeds: Sequence[int]) -> "Point":
        """The same request for other seeds; nothing is checked or sized again."""
        fields = {**self.request.fields, "seeds": tuple(seeds)}
        other = copy.copy(self)
        other.__dict__.pop("folder", None)  # its name follows from the fields
        other.request = replace(self.request, seeds=tuple(seeds), fields=fields)
        return other

    def setting(self, method: str) -> Setting:
        """What a method searches."""
        return self.proxy if method == "transfer" else self.target

    def blueprint(self, method: str) -> Blueprint:
        """The network of `setting`."""
        return self.proxy_blueprint if method == "transfer" else self.target_blueprint

    def algorithm(self, method: str) -> WidthSearch:
        """What a method searches with."""
        return Uniform("uniform") if method == "uniform" else self.request.algorithm

    def conditions(self, seed: int, folder: Path, log: Log | None = None) -> Conditions:
        """What a search runs under."""
        return Conditions(self.request.recipe, self.request.runtime, seed, folder, log)

    def about(self, kind: str, method: str, seed: int, stage: Stage) -> About:
        """What a person finds a stage's tracked run by."""
        request = self.request
        train = kind == "train"
        return About(
            id=request.tracking.run_id(stage.folder.name),
            kind="baseline" if train and method == "uniform" else kind,
            network=request.network.name,
            dataset=request.dataset.name,
            algorithm=self.algorithm(method).name,
            method=method,
            seed=seed,
            source=_axes(self.setting(method)),
            target=_axes(self.target) if train else None,
            figures=tuple(figure.name for figure in request.figures),
            tags=request.tracking.tags,
            fields={
                "stage": stage.fields,
                "budget_macs": self.budget_macs if train else self.search_budget(method),
                "search": None
                if not train or method == "uniform"
                else self.search_stage(method, seed).folder.name,
                "job": this_job(),
            },
            extrapolation=self.strategy(method) if train else "",
        )

    def search_data(self, setting: Setting, seed: int) -> Split:
        """The images that a search sees: some of the training images, and none of the test's."""
        return data.search_split(
            self.request.dataset,
            resolution=setting.resolution,
            fraction=setting.fraction,
            seed=seed,
            recipe=self.request.recipe,
            runtime=self.request.runtime,
            device=self.device,
        )

    @cached_property
    def sizes(self) -> Sizes:
        """How many images there are."""
        return Sizes.of(self.request.dataset)

    @property
    def train_macs(self) -> int:
        """What the final training takes, at the budget."""
        recipe = self.request.recipe
        counts = data.target_counts(self.sizes, batch_size=recipe.batch_size)
        return 3 * self.budget_macs * counts.per_epoch * recipe.epochs

    def overhead_macs(self, method: str) -> int:
        """What the search of a method takes, in closed form."""
        setting, recipe = self.setting(method), self.request.recipe
        counts = data.search_counts(
            self.sizes,
            fraction=setting.fraction,
            validation=self.request.dataset.validation,
            batch_size=recipe.batch_size,
        )
        return self.algorithm(method).overhead_macs(
            setting, counts, recipe=recipe, budget_macs=self.search_budget(method)
        )

    @cached_property
    def store(self) -> Store:
        """Where stages are kept."""
        return Store(Path(self.request.root) / "stages")

    @cached_property
    def folder(self) -> Path:
        """The folder of this request's run, named by its content."""
        fields = self.request.fields
        key = identity.key("run", fields)
        name = f"{self.request.network.name}-{self.request.dataset.name}-{key}"
        return Path(self.request.root) / name.replace("/", "_")

    def search_stage(self, method: str, seed: int) -> Stage:
        """The stage of a search; the same for all requests that need the same one."""
        setting, fields = self.setting(method), self.request.fields
        recipe = {key: one for key, one in fields["recipe"].items() if key != "epochs"}
        named = {
            "network": fields["network"],
            "dataset": _naming(self.request.dataset, fields["dataset"]),
            "setting": _axes(setting),
            "algorithm": fields["algorithm"],
            "recipe": recipe,
            "budget": self._budget_share,
            "seed": seed,
        }
        return self.store.stage("search", named)

    def train_stage(self, method: str, seed: int) -> Stage:
        """The stage of a final training, named by where its channels come from.

        So it has its name before the search has found them. How widths are carried to another
        depth is part of it only where there is another.
        """
        fields = self.request.fields
        recipe = {key: one for key, one in fields["recipe"].items() if key != "search_epochs"}
        named = {
            "network": fields["network"],
            "dataset": _naming(self.request.dataset, fields["dataset"]),
            "setting": _axes(self.target),
            "origin": {
                "search": None if method == "uniform" else self.search_stage(method, seed).key,
                "extrapolation": {**fields["extrapolation"], "strategy": self.strategy(method)},
                "budget": self._budget_share,
            },
            "recipe": recipe,
            "seed": seed,
        }
        return self.store.stage("train", named)

    def strategy(self, method: str) -> str:
        """How a method carries widths to the target's depth; empty where there is no need."""
        deeper = self.setting(method).depth != self.target.depth
        return self.request.extrapolation.strategy if deeper else ""

    @property
    def _budget_share(self) -> float:
        """The budget as a part of what the un-optimised target costs."""
        macs: int = self.target_blueprint.graph.macs()
        return self.budget_macs / macs

    def search_budget(self, method: str) -> int:
        """MACs that the searched network may cost once optimised: the same share of its own."""
        macs: int = self.blueprint(method).graph.macs()
        return round(self._budget_share * macs)


def _axes(setting: Setting) -> dict[str, float]:
    return {
        "width": setting.width,
        "depth": setting.depth,
        "resolution": setting.resolution,
        "fraction": setting.fraction,
    }


def _naming(dataset: Dataset, fields: Mapping[str, Any]) -> dict[str, Any]:
    """The data set's values that results depend on."""
    neutral: frozenset[str] = getattr(dataset, "NEUTRAL", frozenset())
    return {key: value for key, value in fields.items() if key not in neutral}


def found(request: Request, *, method: str = "transfer") -> Found:
    """Search and extrapolate for the first seed, without the final training.

    Raises:
        InputError: Something asked for cannot be done.
    """
    point = Point(replace(request, methods=(method,)))
    writable(Path(request.root))
    return _found(point, method, request.seeds[0])


def run(point: Point, show: Callable[[str], None] = logger.info) -> list[Record]:
    """Everything that a request asks for; what was done before is not done again.

    Args:
        point: What to do, checked.
        show: Called with a line about each stage before it begins.

    Returns:
        One record for each method and seed; also in the run's folder, with the resolved
        configuration, channel counts and links to the stages, which hold the checkpoints.

    Raises:
        InputError: Results cannot be written, or an algorithm cannot go on.
    """
    request = point.request
    if distributed.rank() > 0:  # the first of several processes writes for all
        return [
            trained(point, method, seed) for seed in request.seeds for method in request.methods
        ]
    point.store.check()
    for folder in (point.folder, point.folder / "channels"):
        writable(folder)
    write_atomically(point.folder / "config.yaml", OmegaConf.to_yaml(dict(request.fields)))
    write_atomically(point.folder / "graph.json", point.target_blueprint.graph.to_json())
    records = []
    with logged(point.folder / "run.log"):
        for seed in request.seeds:
            for method in request.methods:
                show(f"{method}, seed {seed}")
                records.append(_record(point, method, seed))
                write_atomically(point.folder / "record.json", to_json(records))
    return records


def _record(point: Point, method: str, seed: int) -> Record:
    """One method at one seed, and its channels and links in the run's folder."""
    record = trained(point, method, seed)
    content = {"network": record.network, **asdict(record.found)}
    path = point.folder / "channels" / f"{method}-seed{seed}.json"
    write_atomically(path, json.dumps(content, indent=2) + "\n")
    for kind, name in record.stages.items():
        _link(point.folder / f"{kind}-{method}-seed{seed}", Path("..") / "stages" / name)
    return record


def _found(point: Point, method: str, seed: int) -> Found:
    result = searched(point, method, seed)
    target = point.target_blueprint
    match: Match = point.request.extrapolation(
        result.multipliers,
        source=point.blueprint(method).graph,
        target=target.graph,
        budget_macs=point.budget_macs,
    )
    if match.shortfall > TOLERANCE:
        logger.warning(
            "%s: %.2f %% of the budget is left over, because one step of any width costs more",
            method, 100 * match.shortfall,
        )  # fmt: skip
    flags = {**result.flags, "budget_shortfall": match.shortfall}
    return Found(
        method=method,
        seed=seed,
        channels=match.channels,
        multipliers=multipliers(match.channels, target.graph),
        alpha=match.alpha,
        macs=match.macs,
        budget_macs=match.budget_macs,
        parameters=target.parameters(match.channels),
        overhead_macs=result.overhead_macs,
        direct_overhead_macs=_direct_overhead_macs(point, method, result),
        nominal_saving=nominal_saving(point.target, point.setting(method)),
        search_seconds=result.seconds,
        flags=flags,
        searched=result.multipliers,
    )


def _direct_overhead_macs(point: Point, method: str, result: SearchResult) -> int:
    """What a search on the target itself takes: counted where this is one, else foretold."""
    if method == "transfer" and point.proxy != point.target:
        return point.overhead_macs("direct")
    return result.overhead_macs


def searched(point: Point, method: str, seed: int) -> SearchResult:
    """The search of a method, done now or before.

    Args:
        point: What it belongs to.
        method: ``direct`` or ``transfer``; there is nothing to do for ``uniform``.
        seed: One of the point's.

    Raises:
        InputError: The algorithm cannot search this network.
    """
    algorithm, setting = point.algorithm(method), point.setting(method)
    if method == "uniform":
        ones = dict.fromkeys(point.target_blueprint.graph.free, 1.0)
        return SearchResult(ones, overhead_macs=0, seconds=0.0, flags={}, details={})
    stage = point.search_stage(method, seed)
    with _working(stage, point.device) as done:
        if done is None:
            with _tracked(point, "search", method, seed, stage) as tracker:
                result = algorithm.search(
                    setting,
                    point.search_data(setting, seed),
                    budget_macs=point.search_budget(method),
                    conditions=point.conditions(seed, stage.folder, tracker),
                )
                if tracker is not None:
                    with tracker.best_effort():
                        _show_search(tracker, point, method, result)
                if distributed.rank() == 0:  # before W&B is waited for
                    stage.finish(asdict(result))
            return result
    return SearchResult(**done)


def trained(point: Point, method: str, seed: int) -> Record:
    """The final training of a method, done now or before, and its search before it.

    Args:
        point: What it belongs to.
        method: One of `widthopt.records.METHODS`.
        seed: One of the point's.
    """
    one = _found(point, method, seed)
    stage = point.train_stage(method, seed)
    with _working(stage, point.device) as before:
        if before is None:
            with _tracked(point, "train", method, seed, stage) as tracker:
                done = _record_of(point, one, stage, tracker)
        else:
            done = before
    return recorded(done, method=method, algorithm=point.request.algorithm.name)


def _record_of(point: Point, found: Found, stage: Stage, tracker: Tracker | None) -> dict[str, Any]:
    """Train and evaluate the target at what was found, and keep the record."""
    measured = _trained(point, found.channels, found.seed, stage.folder, tracker)
    stages = {"train": stage.folder.name}
    if found.method != "uniform":
        stages["search"] = point.search_stage(found.method, found.seed).folder.name
    record = Record(
        network=point.request.network.name,
        dataset=point.request.dataset.name,
        algorithm=point.request.algorithm.name,
        target=_axes(point.target),
        proxy=_axes(point.setting(found.method)),
        extrapolation=point.strategy(found.method),
        found=found,
        top1=measured["top1"],
        top5=measured["top5"],
        train_macs=int(measured["macs"]),
        train_seconds=measured["seconds"],
        train_loss=measured["loss"],
        stages=stages,
    )
    if tracker is not None:
        with tracker.best_effort():
            _show_training(tracker, record)
    if distributed.rank() == 0:
        stage.finish(asdict(record))
    return asdict(record)


def recorded(result: Mapping[str, Any], *, method: str, algorithm: str) -> Record:
    """The record in a training's result, as one of the requests that share it has it.

    A transfer whose proxy is the target is a direct search; a network that is not optimised is
    the same beside every algorithm.
    """
    record = from_plain(result)
    return replace(record, algorithm=algorithm, found=replace(record.found, method=method))


@contextmanager
def _working(stage: Stage, device: torch.device) -> Iterator[dict[str, Any] | None]:
    """Work on a stage alone, and write down what ended the work if it is not done.

    Of processes that work together the first claims it for all of them. An interruption is no
    failure: the work goes on from its checkpoint.

    Yields:
        The result, if it is there already.
    """
    first = distributed.rank() == 0
    with stage.claim(job=this_job()) if first else nullcontext():
        done = distributed.of_first(stage.result() if first else None, device=device)
        try:
            yield done
        except (Exception, SystemExit) as error:
            if not isinstance(error, Interrupted):
                stage.fail(error, rank=distributed.rank())
            raise


@contextmanager
def _tracked(
    point: Point, kind: str, method: str, seed: int, stage: Stage
) -> Iterator[Tracker | None]:
    """Track the work on a stage."""
    about = point.about(kind, method, seed, stage)
    with open_tracker(
        point.request.tracking, about, stage.folder, interruptions=(Interrupted,)
    ) as tracker:
        yield tracker


def _show_search(tracker: Tracker, point: Point, method: str, result: SearchResult) -> None:
    """What a search came to, for its tracked run."""
    graph = point.blueprint(method).graph
    moves = result.details.get("moves", ())
    tracker.rows(
        [
            {"slimming/move": place, "slimming/macs": one["macs"], "slimming/errors": one["errors"]}
            for place, one in enumerate(moves)
        ]
    )
    channels = {name: one * graph.channels[name] for name, one in result.multipliers.items()}
    tracker.widths(channels, result.multipliers)
    tracker.summary(
        {
            "overhead_macs": result.overhead_macs,
            "budget_macs": point.search_budget(method),
            "seconds": result.seconds,
            **{f"flags/{name}": one for name, one in result.flags.items()},
            **dict(_named("details", result.details)),
        }
    )


def _named(start: str, values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Single values by name, those of tables within tables too; lists are left out."""
    for name, one in values.items():
        if isinstance(one, Mapping):
            yield from _named(f"{start}/{name}", one)
        elif not isinstance(one, list | tuple):
            yield f"{start}/{name}", one


def _show_training(tracker: Tracker, record: Record) -> None:
    """What a training came to, for its tracked run."""
    found = record.found
    tracker.rows([{"test/top1": record.top1, "test/top5": record.top5}])
    tracker.widths(found.channels, found.multipliers, alpha=found.alpha, macs=found.macs)
    saved = 100 * found.saved
    curves: dict[str, float] = {}
    for name in tracker.about.figures:  # so that a panel shows the runs of its figure alone
        curves |= {f"figures/{name}/saved_pct": saved, f"figures/{name}/top1": record.top1}
        top1 = {f"figures/{name}/{record.network}/top1": record.top1}
        tracker.rows([{f"figures/{name}/saved_pct": saved, **top1}])  # W&B draws lines from rows
    tracker.summary(
        {
            **curves,
            "test/top1": record.top1,
            "test/top5": record.top5,
            "alpha": found.alpha,
            "macs": found.macs,
            "budget_macs": found.budget_macs,
            "parameters": found.parameters,
            "overhead_macs": found.overhead_macs,
            "overhead_saved_pct": saved,
            "seconds": record.train_seconds,
            **{f"flags/{name}": one for name, one in found.flags.items()},
        }
    )


def _trained(
    point: Point, channels: Mapping[str, int], seed: int, folder: Path, log: Log | None
) -> dict[str, float]:
    """Train the target at these channels on all of its data, and evaluate it."""
    request = point.request
    split = data.target_split(
        request.dataset,
        resolution=point.target.resolution,
        seed=seed,
        recipe=request.recipe,
        runtime=request.runtime,
        device=point.device,
    )
    model = point.target_blueprint.build(channels, seed=derived_seed(seed, "weights"))
    trained = train(
        model,
        split.train,
        recipe=request.recipe,
        epochs=request.recipe.epochs,
        seed=derived_seed(seed, "training"),
        runtime=request.runtime,
        folder=folder,
        label="training",
        log=log,
    )
    accuracy = evaluate(model, split.evaluation, runtime=request.runtime)
    return {
        "top1": accuracy.top1,
        "top5": accuracy.top5,
        "test_images": accuracy.images,
        "macs": 3 * point.target_blueprint.graph.macs(channels) * trained.images,
        "seconds": trained.seconds,
        "loss": trained.loss,
        "train_top1": trained.top1,
    }


def _link(path: Path, to: Path) -> None:
    """A link in the run's folder to a stage, remade where it leads elsewhere."""
    if path.is_symlink() and path.readlink() == to:
        return
    with writing(path.parent):
        path.unlink(missing_ok=True)
        path.symlink_to(to)


@contextmanager
def logged(path: Path) -> Iterator[None]:
    """Write what is logged to a file too, all of it."""
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setLevel(logging.DEBUG)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    try:
        yield
    finally:
        logger.setLevel(level)
        logger.removeHandler(handler)
        handler.close()
