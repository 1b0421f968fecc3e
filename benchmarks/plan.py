"""Seconds to plan the paper's whole grid, to read its state, and to draw its report.

Bounds are for the whole grid: 600 points, 1,000 runs, 1,000 records. The results are random
numbers; nothing is trained.
"""

import contextlib
import io
import random
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from harness import Figure, main

from widthopt.config.compose import compose_sweep
from widthopt.records import Record, WidthResult
from widthopt.reporting.sweeps import draw, status
from widthopt.runs.manifest import Manifest
from widthopt.runs.plan import Plan
from widthopt.runs.point import SizedRequest


PAPER = (
    "fig3_width,fig3_depth,fig4_extrapolation,fig5_resolution,fig5_fraction,fig6_compound,"
    "uniform,table1"
)
SEEDS = "seeds=[0],[1],[2],[3],[4]"
"""Five seeds make the 600 points 1,000."""


def measure(quick: bool) -> Iterator[Figure]:  # noqa: FBT001 (the harness calls it)
    """Yield the seconds of one call each."""
    words = [f"experiment={'fig3_width,uniform' if quick else PAPER}"]
    begin = time.perf_counter()
    requests = compose_sweep(words)
    composed = time.perf_counter() - begin
    plan = Plan.of(requests, images=False)
    seconds = time.perf_counter() - begin
    note = f"seconds; {composed:.1f} of them to compose, {len(plan.runs)} runs"
    yield Figure(f"plan/paper/{len(plan.points)}", seconds, note, "at most 60")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        plan = Plan.of(compose_sweep([*words, SEEDS, f"root={root}"]), images=False)
        _fill(plan)
        manifest = Manifest.of(plan, title="paper", tracking={})
        begin = time.perf_counter()
        (table,) = status(root, [manifest])
        seconds = time.perf_counter() - begin
        yield Figure(f"status/runs/{len(table['runs'])}", seconds, "seconds", "at most 2")
        begin = time.perf_counter()
        with contextlib.redirect_stdout(io.StringIO()):
            draw(root, [manifest])
        seconds = time.perf_counter() - begin
        pictures = len(list((root / "report").glob("*.png")))
        note = f"seconds; {pictures} figures as PNG and PDF, tables, one page"
        yield Figure(f"report/records/{len(plan.points)}", seconds, note, "at most 20")


def _fill(plan: Plan) -> None:
    """Write a result for every run."""
    draws = random.Random(0)  # noqa: S311 (nothing here is a secret)
    for run in plan.runs.values():
        if run.kind == "search":
            run.entry.finish({"multipliers": {}, "overhead_macs": run.macs})
        else:
            run.entry.finish(_random_record(run.point, run.method, run.seed, draws).to_plain())


def _random_record(point: SizedRequest, method: str, seed: int, draws: random.Random) -> Record:
    """Return a record like that of a training."""
    graph = point.target_blueprint.graph
    channels = {
        name: max(1, round(count * draws.uniform(0.5, 2))) for name, count in graph.channels.items()
    }
    full = graph.channels
    found = WidthResult(
        method=method,
        seed=seed,
        channels=channels,
        multipliers={name: count / full[name] for name, count in channels.items()},
        alpha=1.0,
        macs=point.budget_macs,
        budget_macs=point.budget_macs,
        parameters=1,
        overhead_macs=0 if method == "uniform" else point.overhead_macs(method),
        direct_overhead_macs=0 if method == "uniform" else point.overhead_macs("direct"),
        nominal_saving=1.0,
        search_seconds=draws.uniform(1, 2),
        diagnostics={"budget_reached": True},
        searched=dict.fromkeys(channels, 1.0),
    )
    axes = [
        {
            "width": item.width,
            "depth": item.depth,
            "resolution": item.resolution,
            "fraction": item.fraction,
        }
        for item in (point.target, point.setting(method))
    ]
    return Record(
        network=point.request.network.name,
        dataset=point.request.dataset.name,
        algorithm=point.request.algorithm.name,
        target=axes[0],
        proxy=axes[1],
        extrapolation=point.strategy(method),
        found=found,
        top1=draws.uniform(70, 75),
        top5=90.0,
        train_macs=1,
        train_seconds=1.0,
        train_loss=1.0,
        stages={},
    )


if __name__ == "__main__":
    main(measure)
