"""Run a request: search on the proxy, extrapolate, train the target, evaluate.

Searches and trainings are entries of the store, named by everything that their results depend
on, so none is done twice. The folder of a request links to its entries.
"""

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from widthopt import data
from widthopt.algorithms import SearchResult
from widthopt.files import check_writable, write_atomically, writing
from widthopt.projection import nominal_saving
from widthopt.records import Record, WidthResult, from_plain, to_json
from widthopt.request import Request
from widthopt.runs.point import SizedRequest, axis_values
from widthopt.runs.states import current_job
from widthopt.runs.store import StoreEntry
from widthopt.seeds import derive_seed
from widthopt.tracking import Tracker, open_tracker
from widthopt.training import distributed
from widthopt.training.evaluation import evaluate
from widthopt.training.loop import Interrupted, Log, train
from widthopt.widths import TOLERANCE, Match, multipliers


logger = logging.getLogger("widthopt")


def search_widths(request: Request, *, method: str = "transfer") -> WidthResult:
    """Search and extrapolate for the first seed, without the final training.

    Raises:
        InputError: A value of the request is wrong, or the network cannot be searched.
    """
    point = SizedRequest(replace(request, methods=(method,)))
    check_writable(Path(request.root))
    return _search_widths(point, method, request.seeds[0])


def run_request(point: SizedRequest, show: Callable[[str], None] = logger.info) -> list[Record]:
    """Run all methods and seeds of a request. Results in the store are reused.

    Args:
        point: The request.
        show: Called with the method and seed before each of them starts.

    Returns:
        One record for each method and seed. The folder of the request has them too, with the
        resolved configuration, the channel counts and links to the store entries.

    Raises:
        InputError: Results cannot be written, or an algorithm cannot search the network.
    """
    request = point.request
    if distributed.rank() > 0:  # rank 0 writes
        return [
            run_training(point, method, seed)
            for seed in request.seeds
            for method in request.methods
        ]
    point.store.check()
    for folder in (point.folder, point.folder / "channels"):
        check_writable(folder)
    write_atomically(point.folder / "config.yaml", OmegaConf.to_yaml(dict(request.fields)))
    write_atomically(point.folder / "graph.json", point.target_blueprint.graph.to_json())
    records = []
    with log_to_file(point.folder / "run.log"):
        for seed in request.seeds:
            for method in request.methods:
                show(f"{method}, seed {seed}")
                records.append(_record(point, method, seed))
                write_atomically(point.folder / "record.json", to_json(records))
    return records


def _record(point: SizedRequest, method: str, seed: int) -> Record:
    """Run one method at one seed, and write its channels and links into the request's folder."""
    record = run_training(point, method, seed)
    content = {"network": record.network, **record.found.to_plain()}
    path = point.folder / "channels" / f"{method}-seed{seed}.json"
    write_atomically(path, json.dumps(content, indent=2) + "\n")
    for kind, name in record.stages.items():
        _link(point.folder / f"{kind}-{method}-seed{seed}", Path("..") / "stages" / name)
    return record


def _search_widths(point: SizedRequest, method: str, seed: int) -> WidthResult:
    result = run_search(point, method, seed)
    target = point.target_blueprint
    match: Match = point.request.extrapolation(
        result.multipliers,
        source=point.blueprint(method).graph,
        target=target.graph,
        budget_macs=point.budget_macs,
    )
    if match.shortfall > TOLERANCE:
        logger.warning(
            "%s: %.2f %% of the budget is unused, because one more channel would exceed it",
            method, 100 * match.shortfall,
        )  # fmt: skip
    diagnostics = {**result.diagnostics, "budget_shortfall": match.shortfall}
    return WidthResult(
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
        diagnostics=diagnostics,
        searched=result.multipliers,
    )


def _direct_overhead_macs(point: SizedRequest, method: str, result: SearchResult) -> int:
    """Return the overhead of a direct search: counted if this is one, otherwise estimated."""
    if method == "transfer" and point.proxy != point.target:
        return point.overhead_macs("direct")
    return result.overhead_macs


def run_search(point: SizedRequest, method: str, seed: int) -> SearchResult:
    """Return the result of a method's search, and run the search if it is not in the store.

    Args:
        point: The request.
        method: ``direct`` or ``transfer``; ``uniform`` needs no search.
        seed: A seed of the request.

    Raises:
        InputError: The algorithm cannot search this network.
    """
    algorithm, setting = point.algorithm(method), point.setting(method)
    if method == "uniform":
        uniform = dict.fromkeys(point.target_blueprint.graph.free, 1.0)
        return SearchResult(uniform, overhead_macs=0, seconds=0.0, diagnostics={}, details={})
    entry = point.search_entry(method, seed)
    with _claim_entry(entry, point.device) as stored:
        if stored is None:
            with _open_tracker(point, "search", method, seed, entry) as tracker:
                result = algorithm.search(
                    setting,
                    point.search_data(setting, seed),
                    budget_macs=point.search_budget(method),
                    context=point.context(seed, entry.folder, tracker),
                )
                if tracker is not None:
                    with tracker.best_effort():
                        _show_search(tracker, point, method, result)
                if distributed.rank() == 0:  # before the tracker waits for W&B
                    entry.finish(result.to_plain())
            return result
    return SearchResult.from_plain(stored)


def run_training(point: SizedRequest, method: str, seed: int) -> Record:
    """Return the record of a method; run its search and final training if not in the store.

    Args:
        point: The request.
        method: One of `widthopt.records.METHODS`.
        seed: A seed of the request.
    """
    widths = _search_widths(point, method, seed)
    entry = point.train_entry(method, seed)
    with _claim_entry(entry, point.device) as stored:
        if stored is None:
            with _open_tracker(point, "train", method, seed, entry) as tracker:
                result = _train_and_record(point, widths, entry, tracker)
        else:
            result = stored
    return record_of(result, method=method, algorithm=point.request.algorithm.name)


def _train_and_record(
    point: SizedRequest, widths: WidthResult, entry: StoreEntry, tracker: Tracker | None
) -> dict[str, Any]:
    """Train and evaluate the target at these widths, and store the record."""
    measured = _train_target(point, widths.channels, widths.seed, entry.folder, tracker)
    stages = {"train": entry.folder.name}
    if widths.method != "uniform":
        stages["search"] = point.search_entry(widths.method, widths.seed).folder.name
    record = Record(
        network=point.request.network.name,
        dataset=point.request.dataset.name,
        algorithm=point.request.algorithm.name,
        target=axis_values(point.target),
        proxy=axis_values(point.setting(widths.method)),
        extrapolation=point.strategy(widths.method),
        found=widths,
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
        entry.finish(record.to_plain())
    return record.to_plain()


def record_of(result: Mapping[str, Any], *, method: str, algorithm: str) -> Record:
    """Return the record of a training with the method and algorithm of a request that shares it.

    A transfer whose proxy equals the target shares the training of the direct search, and all
    algorithms share the baseline.
    """
    record = from_plain(result)
    return replace(record, algorithm=algorithm, found=replace(record.found, method=method))


@contextmanager
def _claim_entry(entry: StoreEntry, device: torch.device) -> Iterator[dict[str, Any] | None]:
    """Claim an entry, and record the error if the work fails.

    Rank 0 holds the claim for all processes. An interruption is not recorded as a failure,
    because the work resumes from its checkpoint.

    Yields:
        The result if it exists already.
    """
    first = distributed.rank() == 0
    with entry.claim(job=current_job()) if first else nullcontext():
        done = distributed.broadcast(entry.result() if first else None, device=device)
        try:
            yield done
        except (Exception, SystemExit) as error:
            if not isinstance(error, Interrupted):
                entry.fail(error, rank=distributed.rank())
            raise


@contextmanager
def _open_tracker(
    point: SizedRequest, kind: str, method: str, seed: int, entry: StoreEntry
) -> Iterator[Tracker | None]:
    """Open the tracker of an entry."""
    about = point.about(kind, method, seed, entry)
    with open_tracker(
        point.request.tracking, about, entry.folder, interruptions=(Interrupted,)
    ) as tracker:
        yield tracker


def _show_search(tracker: Tracker, point: SizedRequest, method: str, result: SearchResult) -> None:
    """Log the search result to the tracker."""
    graph = point.blueprint(method).graph
    moves = result.details.get("moves", ())
    tracker.rows(
        [
            {
                "slimming/move": index,
                "slimming/macs": move["macs"],
                "slimming/errors": move["errors"],
            }
            for index, move in enumerate(moves)
        ]
    )
    channels = {
        name: multiplier * graph.channels[name] for name, multiplier in result.multipliers.items()
    }
    tracker.widths(channels, result.multipliers)
    tracker.summary(
        {
            "overhead_macs": result.overhead_macs,
            "budget_macs": point.search_budget(method),
            "seconds": result.seconds,
            **{f"flags/{name}": value for name, value in result.diagnostics.items()},
            **dict(_flatten_details("details", result.details)),
        }
    )


def _flatten_details(start: str, values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the values of nested mappings with their joined names; lists are omitted."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flatten_details(f"{start}/{name}", value)
        elif not isinstance(value, list | tuple):
            yield f"{start}/{name}", value


def _show_training(tracker: Tracker, record: Record) -> None:
    """Log the training result to the tracker."""
    widths = record.found
    tracker.rows([{"test/top1": record.top1, "test/top5": record.top5}])
    tracker.widths(widths.channels, widths.multipliers, alpha=widths.alpha, macs=widths.macs)
    saved = 100 * widths.saved
    curves: dict[str, float] = {}
    for name in tracker.about.figures:  # a panel shows only the runs of its figure
        curves |= {f"figures/{name}/saved_pct": saved, f"figures/{name}/top1": record.top1}
        top1 = {f"figures/{name}/{record.network}/top1": record.top1}
        tracker.rows([{f"figures/{name}/saved_pct": saved, **top1}])  # W&B draws lines from rows
    tracker.summary(
        {
            **curves,
            "test/top1": record.top1,
            "test/top5": record.top5,
            "alpha": widths.alpha,
            "macs": widths.macs,
            "budget_macs": widths.budget_macs,
            "parameters": widths.parameters,
            "overhead_macs": widths.overhead_macs,
            "overhead_saved_pct": saved,
            "seconds": record.train_seconds,
            **{f"flags/{name}": value for name, value in widths.diagnostics.items()},
        }
    )


def _train_target(
    point: SizedRequest, channels: Mapping[str, int], seed: int, folder: Path, log: Log | None
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
    model = point.target_blueprint.build(channels, seed=derive_seed(seed, "weights"))
    trained = train(
        model,
        split.train,
        recipe=request.recipe,
        epochs=request.recipe.epochs,
        seed=derive_seed(seed, "training"),
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
    """Create a symbolic link, or replace a link that leads elsewhere."""
    if path.is_symlink() and path.readlink() == to:
        return
    with writing(path.parent):
        path.unlink(missing_ok=True)
        path.symlink_to(to)


@contextmanager
def log_to_file(path: Path) -> Iterator[None]:
    """Also write all log messages to a file."""
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
