"""Time of a search step relative to plain training with the same MACs; 1 is equal.

The seconds of a search step are divided by the seconds that as many MACs take at the MACs per
second of a plain training step of the network. Both are measured in turns. An architecture step of
DMCP counts as two forward passes, since it computes no gradients of weights. The backend and the
memory format are those that the search chooses.
"""

import statistics
import tempfile
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import torch
from harness import Figure, main, now

from widthopt.algorithms import SearchContext
from widthopt.algorithms.dmcp import _Architecture
from widthopt.algorithms.morphnet import _Pruning
from widthopt.algorithms.penalty import Penalty
from widthopt.algorithms.sandwich import Sandwich, prepare_supernet
from widthopt.config.compose import compose
from widthopt.networks import TorchvisionNetwork
from widthopt.networks.resize import Blueprint
from widthopt.setting import Recipe, Runtime, Setting
from widthopt.training.devices import resolve_device
from widthopt.training.loop import Loop, Objective


RUNTIME = Runtime(
    device="auto", workers=0, precision="auto", memory_format="auto", backend="auto", progress=False
)
STEPS = 1000
"""Steps of the search. Timed steps start in the middle, where DMCP trains its chains."""

CLASSES = 100
Batch = tuple[torch.Tensor, torch.Tensor]
BATCHES = {16: 1.2, 64: 1.15}
"""Batch sizes, and the largest wanted ratio of each. Small machines use small batches."""


def searching(
    algorithm: Any, blueprint: Blueprint, recipe: Recipe, folder: Path
) -> tuple[Loop, Callable[[], int], str]:
    """Return a search loop, a function that returns its MACs so far, and its way to compute."""
    if algorithm.name == "morphnet":
        model = blueprint.build(blueprint.graph.channels, seed=0)
        model.to(resolve_device(RUNTIME))
        penalty = Penalty(
            model,
            blueprint.graph,
            threshold=algorithm.threshold,
            tie=algorithm.tie,
            depthwise=algorithm.depthwise,
        )
        loop = looping(model, recipe, RUNTIME, _Pruning(penalty, algorithm, recipe))
        return loop, lambda: 3 * blueprint.graph.macs() * loop.tally.images, "plain"
    context = SearchContext(recipe, RUNTIME, 0, folder)
    supernet, runtime = prepare_supernet(
        blueprint, context, enlarge=algorithm.enlarge, batch_size=recipe.batch_size
    )
    grids = algorithm.options(supernet.graph)
    smoothing = recipe.label_smoothing
    objective = (
        _Architecture(
            algorithm,
            supernet,
            grids,
            steps=STEPS,
            budget_macs=blueprint.graph.macs(),
            label_smoothing=smoothing,
            seed=0,
        )
        if algorithm.name == "dmcp"
        else Sandwich(
            supernet,
            grids,
            random_subnets=algorithm.random_subnets,
            reduction=algorithm.reduction,
            label_smoothing=smoothing,
            seed=0,
        )
    )
    loop = looping(supernet.model, recipe, runtime, objective)
    memory_format = "mixed formats" if supernet.mixed else runtime.memory_format
    return loop, lambda: objective.macs, f"{supernet.backend}, {memory_format}"


def looping(
    model: torch.nn.Module, recipe: Recipe, runtime: Runtime, objective: Objective | None
) -> Loop:
    """Return a loop over the steps of one long epoch."""
    return Loop(
        model,
        recipe=recipe,
        steps_per_epoch=STEPS,
        epochs=1,
        seed=0,
        runtime=runtime,
        objective=objective,
    )


def ratio(
    plain: Loop, search: Loop, *, macs: Callable[[], int], plain_macs: int, batch: Batch, turns: int
) -> tuple[float, float, float]:
    """Return the median ratio, and the median seconds of a search step and of a plain step."""
    rows = []
    for turn in range(1 + turns):
        seconds = {}
        before = macs()
        for loop in (plain, search) if turn % 2 else (search, plain):
            begin = now()
            loop.step(*batch, STEPS // 2 + turn)
            seconds[loop is search] = now() - begin
        per_mac = seconds[True] / (macs() - before)
        rows.append((per_mac / (seconds[False] / plain_macs), seconds[True], seconds[False]))
    first, second, third = (statistics.median(column) for column in zip(*rows[1:], strict=True))
    return first, second, third


def measure(quick: bool) -> Iterator[Figure]:  # noqa: FBT001 (the harness calls it)
    """Yield the ratio for each algorithm, network, resolution and batch size."""
    networks = ("resnet18",) if quick else ("resnet18", "mobilenet_v2")
    resolutions = (32,) if quick else (32, 64)
    turns = 3 if quick else 9
    for name, resolution, size in product(networks, resolutions, BATCHES):
        recipe = Recipe(
            batch_size=size, accumulation=1, epochs=1, search_epochs=1, learning_rate=0.01,
            warmup_epochs=0.1, momentum=0.9, weight_decay=5e-5, label_smoothing=0.1,
            augmentation="none",
        )  # fmt: skip
        blueprint = Blueprint(Setting(TorchvisionNetwork(name), CLASSES, 1.0, 1, resolution, 1.0))
        graph, device = blueprint.graph, resolve_device(RUNTIME)
        rng = torch.Generator().manual_seed(0)
        images = torch.randn(size, 3, resolution, resolution, generator=rng).to(device)
        labels = torch.randint(CLASSES, (size,), generator=rng).to(device)
        plain = looping(blueprint.build(graph.channels, seed=0), recipe, RUNTIME, None)
        for algorithm in ("morphnet", "autoslim", "dmcp"):
            with tempfile.TemporaryDirectory() as folder:
                search, macs, how = searching(
                    compose([f"algorithm={algorithm}"]).algorithm, blueprint, recipe, Path(folder)
                )
            plain_macs = 3 * graph.macs() * size
            value, search_seconds, plain_seconds = ratio(
                plain, search, macs=macs, plain_macs=plain_macs, batch=(images, labels), turns=turns
            )
            yield Figure(
                f"{algorithm}/{name}/{resolution}/{size}",
                value,
                f"{1000 * search_seconds:.0f} ms, plain {1000 * plain_seconds:.0f} ms; "
                f"{turns} x {size} images; {how}",
                f"at most {BATCHES[size]:g}",
            )


if __name__ == "__main__":
    main(measure)
