"""MorphNet: prune with a penalty on MACs, then grow to the budget.

The network is trained once with the penalty of `widthopt.algorithms.penalty`. The channels that
stay alive are the direction of the widths; the extrapolation grows them to the budget.

Source: Gordon et al., 2018, "MorphNet: Fast & Simple Resource-Constrained Structure Learning
of Deep Networks"; paper section 3.2 and appendix A; docs/algorithms/morphnet.md, D1-D26.
"""

import logging
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from safetensors.torch import save
from torch import Tensor

from widthopt.algorithms import SearchContext, SearchResult, check_searchable
from widthopt.algorithms.penalty import Penalty
from widthopt.data import Counts, Split
from widthopt.errors import check_value
from widthopt.files import write_atomically
from widthopt.networks.resize import Blueprint
from widthopt.seeds import derive_seed
from widthopt.setting import Recipe, Setting
from widthopt.training.devices import to_device
from widthopt.training.evaluation import evaluate, recalibrate, recalibration_steps
from widthopt.training.loop import Objective, learning_rate, train
from widthopt.widthgraph import WidthGraph


logger = logging.getLogger("widthopt")

FLICKER = 2.2
"""Amplitude of a dead scale, in learning rate x pressure, at momentum 0.9.

Source: docs/algorithms/morphnet.md, D9.
"""

GAP_POINTS = 2.0
"""A result is invalid if the last truncation costs more than this accuracy, in points.

Source: docs/algorithms/morphnet.md, D6.
"""


@dataclass(frozen=True, slots=True)
class MorphNet:
    """The MorphNet algorithm; ``conf/algorithm/morphnet.yaml`` has its values.

    Attributes:
        name: Name in records.
        strength: Lambda, the weight of R/F0 in the loss; 1 in the paper.
        threshold: A class of channels is alive if its scale is above this.
        tie: Reduction of the scales of tied channels: ``max`` or ``l2``.
        depthwise: ``double`` charges depthwise layers on both sides, ``single`` once.
        truncate: Whether to set dead channels to zero at the end of every epoch.
        floor: Number of classes that every variable keeps.
    """

    name: str
    strength: float
    threshold: float
    tie: Literal["max", "l2"]
    depthwise: Literal["double", "single"]
    truncate: bool
    floor: int

    def __post_init__(self) -> None:
        for key, default in (("strength", "1"), ("threshold", "0.01")):
            value = getattr(self, key)
            check_value(
                f"algorithm.{key}",
                value,
                holds=0 <= value < math.inf,
                rule=f"it is a number of at least 0; the default is {default}",
            )
        check_value(
            "algorithm.floor",
            self.floor,
            holds=self.floor >= 1,
            rule="every layer keeps at least one channel; use an integer of at least 1",
        )

    def search(
        self, setting: Setting, data: Split, *, budget_macs: int, context: SearchContext
    ) -> SearchResult:
        """See `widthopt.algorithms.WidthSearch`.

        The diagnostics are

        - ``collapsed``: variables that fell to the floor;
        - ``cut``: collapsed variables that no shortcut bypasses;
        - ``suspect``: collapsed variables that are empty only by the absolute threshold, because
          all scales of the layer are small;
        - ``masked_accuracy_gap``: accuracy lost by the last truncation, in points;
        - ``valid``: False if ``cut`` is not empty or the gap is above two points;
        - ``unchanged``: whether nothing was pruned;
        - ``fixed``: variables that a schedule this short cannot prune;
        - ``budget_reached``: always True, because the widths are grown to the budget.
        """
        del budget_macs  # the direction does not depend on it
        recipe, runtime = context.recipe, context.runtime
        blueprint = Blueprint(setting)
        graph = blueprint.graph
        model = blueprint.build(graph.channels, seed=derive_seed(context.seed, "search weights"))
        to_device(model, runtime)
        penalty = Penalty(
            model, graph, threshold=self.threshold, tie=self.tie, depthwise=self.depthwise
        )
        start = self._start(penalty, recipe, data)
        objective = _Pruning(penalty, self, recipe)
        trained = train(
            model,
            data.train,
            recipe=recipe,
            epochs=recipe.search_epochs,
            seed=derive_seed(context.seed, "search"),
            runtime=runtime,
            objective=objective,
            folder=context.folder,
            label=f"{self.name} search",
            log=context.log,
        )
        begin = time.perf_counter()
        # Interpretation: both accuracies are measured with fresh statistics, so the gap does not
        # depend on how fast running means follow.
        calibrated = recalibrate(model, data.train, runtime=runtime)
        full = evaluate(model, data.evaluation, runtime=runtime)
        found = _alive_fractions(penalty, graph, self.floor)
        relative = _alive_fractions(penalty, graph, self.floor, relative=True)
        gammas = {
            name: value.detach().cpu().contiguous()
            for name, value in model.state_dict().items()
            if name.endswith(".weight") and name.removesuffix(".weight") in graph.scale_axes
        }
        write_atomically(context.folder / "gammas.safetensors", save(gammas))
        alive, alive_relative = penalty.counts(), penalty.counts(relative=True)
        largest, mixed = penalty.largest(), penalty.mixed
        penalty.truncate()
        calibrated += recalibrate(model, data.train, runtime=runtime)
        masked = evaluate(model, data.evaluation, runtime=runtime)
        gap = full.top1 - masked.top1
        least = {name: min(self.floor, variable.classes) for name, variable in graph.free.items()}
        collapsed = [name for name in penalty.searchable if alive[name] < least[name]]
        cut = [name for name in collapsed if not graph.connected_without(name)]
        diagnostics: dict[str, Any] = {
            "budget_reached": True,
            "collapsed": collapsed,
            "cut": cut,
            "fixed": start["fixed"],
            "masked_accuracy_gap": gap,
            "suspect": [name for name in collapsed if alive_relative[name] >= least[name]],
            "unchanged": all(
                alive[name] == variable.classes for name, variable in graph.free.items()
            ),
            "valid": not cut and gap <= GAP_POINTS,
        }
        _warn(diagnostics)
        channels = {name: alive[name] * variable.unit for name, variable in graph.free.items()}
        return SearchResult(
            multipliers=found,
            overhead_macs=3 * graph.macs() * trained.images
            + graph.macs() * (calibrated + full.images + masked.images),
            seconds=trained.seconds + time.perf_counter() - begin,
            diagnostics=diagnostics,
            details={
                **start,
                "alive_macs": graph.macs(channels) / graph.macs(),
                "channels_alive": channels,
                "epochs": objective.history(),
                "largest_scale": largest,
                "mixed_classes": mixed,
                "multipliers_relative": relative,
                "searched_macs": graph.macs(),
                "threshold": self.threshold,
                "strength": self.strength,
                "top1_before_truncation": full.top1,
                "top1_after_truncation": masked.top1,
            },
        )

    def overhead_macs(
        self, setting: Setting, counts: Counts, *, recipe: Recipe, budget_macs: int
    ) -> int:
        """See `WidthSearch`: the training, and two recalibrations and validations."""
        del budget_macs  # the widths are grown to any budget
        graph = Blueprint(setting).graph
        check_searchable(graph, algorithm=self.name)
        macs = graph.macs()
        trained = counts.per_epoch * recipe.search_epochs
        steps = recalibration_steps(counts.batch_size, counts.steps_per_epoch)
        calibrated = steps * counts.batch_size
        return 3 * macs * trained + 2 * macs * (calibrated + counts.evaluation)

    def _start(self, penalty: Penalty, recipe: Recipe, data: Split) -> dict[str, Any]:
        """Check the schedule before the first step, and return details for the record.

        Source: docs/algorithms/morphnet.md, 3.2 and P23.
        """
        value = float(penalty.value_and_gradient()[0])
        assert math.isfinite(value), "the penalty is not finite at the start"
        pressure, members = penalty.pressure(), penalty.members()
        steps, epochs = data.train.steps_per_epoch, recipe.search_epochs
        rates = [
            learning_rate(recipe, step=step, steps_per_epoch=steps, epochs=epochs)
            for step in range(steps * epochs)
        ]
        travel = sum(rates) / (1 - recipe.momentum)
        reach = {name: self.strength * value * travel for name, value in pressure.items()}
        fixed = [name for name, distance in reach.items() if distance < members[name]]
        logger.debug("the penalty R/F0 starts at %.4f", value)
        if fixed and self.strength > 0:
            logger.warning(
                "the schedule is too short for the penalty to prune %d of %d width variables "
                "(first: %s); use more epochs or images, or a larger algorithm.strength",
                len(fixed), len(reach), fixed[0],
            )  # fmt: skip
        flicker = FLICKER * max(rates) * self.strength * max(pressure.values())
        if flicker > self.threshold:
            logger.warning(
                "dead scales may oscillate up to %.3g, above algorithm.threshold %g, until the "
                "learning rate falls; a smaller algorithm.strength avoids this",
                flicker, self.threshold,
            )  # fmt: skip
        return {"penalty_at_start": value, "reach": reach, "fixed": fixed, "travel": travel}


class _Pruning(Objective):
    """The loss of the recipe plus ``strength`` times R/F0."""

    def __init__(self, penalty: Penalty, algorithm: MorphNet, recipe: Recipe) -> None:
        super().__init__(label_smoothing=recipe.label_smoothing)
        self._penalty, self._algorithm = penalty, algorithm
        self._last_epoch = recipe.search_epochs - 1
        self._dead = torch.zeros(0, dtype=torch.bool)
        self._history = torch.zeros(0, 4, dtype=torch.float64)

    def before_step(self) -> None:
        """Add the gradient of the penalty, once per step for any number of micro-batches."""
        if self._algorithm.strength > 0:
            self._penalty.add_gradient(self._algorithm.strength)

    def after_epoch(self, epoch: int) -> None:
        """Truncate, except after the last epoch, where the search measures the loss of accuracy."""
        value = float(self._penalty.value_and_gradient()[0])
        dead = ~self._penalty.scales().alive.cpu()
        revived = int((self._dead & ~dead).sum()) if len(self._dead) else 0
        self._dead = dead
        row = torch.tensor([[epoch, value, int(dead.sum()), revived]])
        self._history = torch.cat([self._history, row.double()])
        logger.debug(
            "epoch %d: penalty R/F0 %.4f, %d of %d classes dead, %d revived",
            epoch, value, int(dead.sum()), len(dead), revived,
        )  # fmt: skip
        if self._algorithm.truncate and epoch < self._last_epoch:
            self._penalty.truncate()

    def step_metrics(self) -> dict[str, float]:
        """Return the penalty and the number of dead classes."""
        macs = self._penalty.graph.macs(self._alive())
        return {
            "penalty": float(self._penalty.value_and_gradient()[0]),
            "macs_share": macs / self._penalty.macs,
            "dead_classes": int((~self._penalty.scales().alive).sum()),
            "mixed_classes": self._penalty.mixed,
        }

    def epoch_metrics(self) -> dict[str, float]:
        """Return the channels alive and the largest scale of each variable, and revived classes."""
        alive, largest = self._alive(), self._penalty.largest()
        return {
            "revived_classes": float(self._history[-1, 3]),
            **{f"channels/{name}": count for name, count in alive.items()},
            **{f"scales/{name}": scale for name, scale in largest.items()},
        }

    def _alive(self) -> dict[str, int]:
        """Return the channels alive of each width variable."""
        free, counts = self._penalty.graph.free, self._penalty.counts()
        return {name: counts[name] * variable.unit for name, variable in free.items()}

    def history(self) -> list[dict[str, float]]:
        """Return R/F0, the dead classes and the revived classes at the end of each epoch."""
        names = ("epoch", "penalty", "dead", "revived")
        return [dict(zip(names, row, strict=True)) for row in self._history.tolist()]

    def state_dict(self) -> dict[str, Tensor]:
        """See `Objective.state_dict`."""
        return {"dead": self._dead, "history": self._history}

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """See `Objective.load_state_dict`."""
        self._dead, self._history = tensors["dead"], tensors["history"]


def _alive_fractions(
    penalty: Penalty, graph: WidthGraph, floor: int, *, relative: bool = False
) -> dict[str, float]:
    """Return the fraction of classes alive of each variable, at least the floor."""
    counts = penalty.counts(relative=relative)
    return {
        name: max(counts[name], min(floor, variable.classes)) / variable.classes
        for name, variable in graph.free.items()
    }


def _warn(diagnostics: Mapping[str, Any]) -> None:
    if diagnostics["unchanged"]:
        logger.warning("nothing was pruned; the penalty is too weak for this schedule")
    if diagnostics["cut"]:
        logger.warning(
            "the search cut the network at %s; the result is not valid",
            ", ".join(diagnostics["cut"]),
        )
    if diagnostics["masked_accuracy_gap"] > GAP_POINTS:
        logger.warning(
            "removing the dead channels cost %.1f points; the result is not valid",
            diagnostics["masked_accuracy_gap"],
        )
