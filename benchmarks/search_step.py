"""What a step of a search takes beside what its MACs would take in plain training; 1 is the same.

The seconds of a search's step, over the seconds that as many MACs take at the MACs per second of
a plain training step of the un-enlarged network, both measured in turns. An architecture step of
DMCP counts as two forward passes: it computes no gradients of weights. The way that subnets run
and the memory format are those that the search itself would choose.
"""

import statistics
import tempfile
from collections.abc import Callable, Iterator
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
"""Length of the search; the steps are taken from its middle on, where DMCP learns its chains."""

CLASSES = 100


def searching(
    algorithm: Any, blueprint: Blueprint, recipe: Recipe, folder: Path
) -> tuple[Loop, Callable[[], int], str]:
    """A search about to take steps, what gives its MACs so far, and how it computes."""
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
    way = "mixed formats" if supernet.mixed else runtime.memory_format
    return loop, lambda: objective.macs, f"{supernet.backend}, {way}"


def looping(
    model: torch.nn.Module, recipe: Recipe, runtime: Runtime, objective: Objective | None
) -> Loop:
    """A loop over the steps of one long epoch."""
    return Loop(
        model,
        recipe=recipe,
        steps_per_epoch=STEPS,
        epochs=1,
        seed=0,
        runtime=runtime,
        objective=objective,
    )


def measure(quick: bool) -> Iterator[Figure]:  # noqa: FBT001 (the harness calls it)
    """The ratio for each algorithm, network and size."""
    batch, turns = (16, 3) if quick else (64, 9)
    recipe = Recipe(
        batch_size=batch,
        accumulation=1,
        epochs=1,
        search_epochs=1,
        learning_rate=0.01,
        warmup_epochs=0.1,
        momentum=0.9,
        weight_decay=5e-5,
        label_smoothing=0.1,
        augmentation="none",
    )
    for name in ("resnet18", "mobilenet_v2"):
        for resolution in (32, 64):
            setting = Setting(TorchvisionNetwork(name), CLASSES, 1.0, 1, resolution, 1.0)
            blueprint = Blueprint(setting)
            draws = torch.Generator().manual_seed(0)
            device = resolve_device(RUNTIME)
            images = torch.randn(batch, 3, resolution, resolution, generator=draws).to(device)
            labels = torch.randint(CLASSES, (batch,), generator=draws).to(device)
            plain = looping(
                blueprint.build(blueprint.graph.channels, seed=0), recipe, RUNTIME, None
            )
            plain_macs = 3 * blueprint.graph.macs() * batch
            for algorithm in ("morphnet", "autoslim", "dmcp"):
                with tempfile.TemporaryDirectory() as folder:
                    search, macs, way = searching(
                        compose([f"algorithm={algorithm}"]).algorithm,
                        blueprint,
                        recipe,
                        Path(folder),
                    )
                ratios, seconds = [], []
                for turn in range(1 + turns):
                    spent = []
                    before = 0
                    for loop in (plain, search) if turn % 2 else (search, plain):
                        step = STEPS // 2 + turn
                        before = macs() if loop is search else before
                        begin = now()
                        loop.step(images, labels, step)
                        spent.append((now() - begin, loop is search))
                    own = next(one for one, ours in spent if ours)
                    other = next(one for one, ours in spent if not ours)
                    ratios.append(own / other * plain_macs / (macs() - before))
                    seconds.append((own, other))
                own, other = (
                    statistics.median(column) for column in zip(*seconds[1:], strict=True)
                )
                yield Figure(
                    f"{algorithm}/{name}/{resolution}",
                    statistics.median(ratios[1:]),
                    f"{1000 * own:.0f} ms, plain {1000 * other:.0f} ms; {turns} x {batch} images; "
                    f"{way}",
                )


if __name__ == "__main__":
    main(measure)
