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
from typing import Any, Literal, NamedTuple

import torch
from safetensors.torch import save
from torch import Tensor, nn

from widthopt.algorithms import SearchContext, SearchResult, check_searchable
from widthopt.algorithms.penalty import Penalty
from widthopt.algorithms.strength import ControlledPenalty
from widthopt.data import Counts, Split
from widthopt.errors import InputError, check_value
from widthopt.files import write_atomically
from widthopt.networks.resize import Blueprint
from widthopt.networks.supernet import enlarge_channels
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

NARROW = 6
"""``enlarge=auto`` is 3 instead of 2 if a searchable variable has fewer classes than this."""

GAP_POINTS = 2.0
"""A result is invalid if the last truncation costs more than this accuracy, in points.

Source: docs/algorithms/morphnet.md, D6.
"""


@dataclass(frozen=True, slots=True)
class MorphNet:
    """The MorphNet algorithm; ``conf/algorithm/morphnet.yaml`` has its values.

    Attributes:
        name: Name in records.
        strength: Lambda, the weight of R/F0 in the loss; 1 in the paper. ``auto`` lets a controller
            reach the budget's share of MACs; the widths are then the soft counts of the scales,
            and ``truncate`` and ``floor`` have no effect.
        enlarge: Factor on the channels of the network that is searched; 1 in the paper. ``auto`` is
            2, or 3 if a searchable variable has fewer than 6 channels.
        threshold: A class of channels is alive if its scale is above this.
        tie: Reduction of the scales of tied channels: ``max`` or ``l2``.
        depthwise: ``double`` charges depthwise layers on both sides, ``single`` once.
        truncate: Whether to set dead channels to zero at the end of every epoch.
        floor: Number of classes that every variable keeps.
    """

    name: str
    strength: Literal["auto"] | float
    threshold: float
    tie: Literal["max", "l2"]
    depthwise: Literal["double", "single"]
    truncate: bool
    floor: int
    enlarge: Literal["auto"] | float = 1.0

    def __post_init__(self) -> None:
        for key, default in (("strength", "1"), ("threshold", "0.01")):
            value = getattr(self, key)
            if value == "auto":
                continue
            check_value(
                f"algorithm.{key}",
                value,
                holds=0 <= value < math.inf,
                rule=f"it is a number of at least 0; the default is {default}",
            )
        if self.enlarge != "auto":
            check_value(
                "algorithm.enlarge",
                self.enlarge,
                holds=1 <= self.enlarge < math.inf,
                rule="the searched network is at least as wide as its network; the default is 1",
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

        The diagnostics of ``strength=auto`` are

        - ``at_limit``, ``at_floor``: variables within 5 % of all channels of the searched network,
          or of one class;
        - ``budget_reached``: whether the soft share ended at most at twice the wanted share.

        Those of a fixed strength are

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
        recipe, runtime = context.recipe, context.runtime
        blueprint = Blueprint(setting)
        graph = self._searched_graph(blueprint, budget_macs)
        model = blueprint.build(graph.channels, seed=derive_seed(context.seed, "search weights"))
        to_device(model, runtime)
        penalty = Penalty(
            model, graph, threshold=self.threshold, tie=self.tie, depthwise=self.depthwise
        )
        objective: ControlledPenalty | _Pruning
        if self.strength == "auto":
            start: dict[str, Any] = {}
            objective = ControlledPenalty(
                penalty,
                recipe,
                share=budget_macs / graph.macs(),
                steps_per_epoch=data.train.steps_per_epoch,
            )
        else:
            start = self._start(penalty, recipe, data, self.strength)
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
        gammas = {
            name: value.detach().cpu().contiguous()
            for name, value in model.state_dict().items()
            if name.endswith(".weight") and name.removesuffix(".weight") in graph.scale_axes
        }
        write_atomically(context.folder / "gammas.safetensors", save(gammas))
        if isinstance(objective, ControlledPenalty):
            found = _soft_widths(objective, blueprint.graph)
        else:
            found = self._alive_widths(objective, model, data, context)
        _warn(found.diagnostics)
        return SearchResult(
            multipliers=found.multipliers,
            overhead_macs=3 * graph.macs() * trained.images + graph.macs() * found.images,
            seconds=trained.seconds + time.perf_counter() - begin,
            diagnostics={
                **found.diagnostics,
                **({"fixed": start["fixed"]} if start else {}),
            },
            details={
                **start,
                **found.details,
                "epochs": objective.history(),
                "searched_macs": graph.macs(),
            },
        )

    def overhead_macs(
        self, setting: Setting, counts: Counts, *, recipe: Recipe, budget_macs: int
    ) -> int:
        """See `WidthSearch`: the training, and with a fixed strength two validations."""
        blueprint = Blueprint(setting)
        check_searchable(blueprint.graph, algorithm=self.name)
        macs = self._searched_graph(blueprint, budget_macs).macs()
        trained = counts.per_epoch * recipe.search_epochs
        if self.strength == "auto":
            return 3 * macs * trained
        steps = recalibration_steps(counts.batch_size, counts.steps_per_epoch)
        calibrated = steps * counts.batch_size
        return 3 * macs * trained + 2 * macs * (calibrated + counts.evaluation)

    def _searched_graph(self, blueprint: Blueprint, budget_macs: int) -> WidthGraph:
        """Return the graph of the network that is searched.

        Raises:
            InputError: The budget leaves nothing to prune.
        """
        enlarge = self.enlarge if self.enlarge != "auto" else _enlargement(blueprint.graph)
        graph = blueprint.resize_graph(enlarge_channels(blueprint.graph, enlarge))
        if self.strength == "auto" and budget_macs >= graph.macs():
            raise InputError(
                f"algorithm.enlarge is {self.enlarge}, but the searched network then has "
                f"{graph.macs():,} MACs and the budget is {budget_macs:,}, so there is nothing to "
                "prune; raise algorithm.enlarge, or lower budget_macs"
            )
        return graph

    def _alive_widths(
        self, objective: "_Pruning", model: nn.Module, data: Split, context: SearchContext
    ) -> "_Found":
        """Return the widths of a search with a fixed strength: the classes that are alive."""
        penalty, graph, runtime = objective.penalty, objective.penalty.graph, context.runtime
        # Interpretation: both accuracies are measured with fresh statistics, so the gap does not
        # depend on how fast running means follow.
        calibrated = recalibrate(model, data.train, runtime=runtime)
        full = evaluate(model, data.evaluation, runtime=runtime)
        multipliers = _alive_fractions(penalty, graph, self.floor)
        relative = _alive_fractions(penalty, graph, self.floor, relative=True)
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
            "masked_accuracy_gap": gap,
            "suspect": [name for name in collapsed if alive_relative[name] >= least[name]],
            "unchanged": all(
                alive[name] == variable.classes for name, variable in graph.free.items()
            ),
            "valid": not cut and gap <= GAP_POINTS,
        }
        channels = {name: alive[name] * variable.unit for name, variable in graph.free.items()}
        details = {
            "alive_macs": graph.macs(channels) / graph.macs(),
            "channels_alive": channels,
            "largest_scale": largest,
            "mixed_classes": mixed,
            "multipliers_relative": relative,
            "threshold": self.threshold,
            "strength": self.strength,
            "top1_before_truncation": full.top1,
            "top1_after_truncation": masked.top1,
        }
        return _Found(multipliers, diagnostics, details, calibrated + full.images + masked.images)

    def _start(
        self, penalty: Penalty, recipe: Recipe, data: Split, strength: float
    ) -> dict[str, Any]:
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
        reach = {name: strength * value * travel for name, value in pressure.items()}
        fixed = [name for name, distance in reach.items() if distance < members[name]]
        logger.debug("the penalty R/F0 starts at %.4f", value)
        if fixed and strength > 0:
            logger.warning(
                "the schedule is too short for the penalty to prune %d of %d width variables "
                "(first: %s); use more epochs or images, or a larger algorithm.strength",
                len(fixed), len(reach), fixed[0],
            )  # fmt: skip
        flicker = FLICKER * max(rates) * strength * max(pressure.values())
        if flicker > self.threshold:
            logger.warning(
                "dead scales may oscillate up to %.3g, above algorithm.threshold %g, until the "
                "learning rate falls; a smaller algorithm.strength avoids this",
                flicker, self.threshold,
            )  # fmt: skip
        return {"penalty_at_start": value, "reach": reach, "fixed": fixed, "travel": travel}


class _Found(NamedTuple):
    """Widths of a search, and what to record; ``images`` were processed after the training."""

    multipliers: dict[str, float]
    diagnostics: dict[str, Any]
    details: dict[str, Any]
    images: int


class _Pruning(Objective):
    """The loss of the recipe plus ``strength`` times R/F0."""

    def __init__(self, penalty: Penalty, algorithm: MorphNet, recipe: Recipe) -> None:
        super().__init__(label_smoothing=recipe.label_smoothing)
        assert algorithm.strength != "auto"
        self.penalty, self._algorithm, self._strength = penalty, algorithm, algorithm.strength
        self._last_epoch = recipe.search_epochs - 1
        self._dead = torch.zeros(0, dtype=torch.bool)
        self._history = torch.zeros(0, 4, dtype=torch.float64)

    def before_step(self) -> None:
        """Add the gradient of the penalty, once per step for any number of micro-batches."""
        if self._strength > 0:
            self.penalty.add_gradient(self._strength)

    def after_epoch(self, epoch: int) -> None:
        """Truncate, except after the last epoch, where the search measures the loss of accuracy."""
        value = float(self.penalty.value_and_gradient()[0])
        dead = ~self.penalty.scales().alive.cpu()
        revived = int((self._dead & ~dead).sum()) if len(self._dead) else 0
        self._dead = dead
        row = torch.tensor([[epoch, value, int(dead.sum()), revived]])
        self._history = torch.cat([self._history, row.double()])
        logger.debug(
            "epoch %d: penalty R/F0 %.4f, %d of %d classes dead, %d revived",
            epoch, value, int(dead.sum()), len(dead), revived,
        )  # fmt: skip
        if self._algorithm.truncate and epoch < self._last_epoch:
            self.penalty.truncate()

    def step_metrics(self) -> dict[str, float]:
        """Return the penalty and the number of dead classes."""
        macs = self.penalty.graph.macs(self._alive())
        return {
            "penalty": float(self.penalty.value_and_gradient()[0]),
            "macs_share": macs / self.penalty.macs,
            "dead_classes": int((~self.penalty.scales().alive).sum()),
            "mixed_classes": self.penalty.mixed,
        }

    def epoch_metrics(self) -> dict[str, float]:
        """Return the channels alive and the largest scale of each variable, and revived classes."""
        alive, largest = self._alive(), self.penalty.largest()
        return {
            "revived_classes": float(self._history[-1, 3]),
            **{f"channels/{name}": count for name, count in alive.items()},
            **{f"scales/{name}": scale for name, scale in largest.items()},
        }

    def _alive(self) -> dict[str, int]:
        """Return the channels alive of each width variable."""
        free, counts = self.penalty.graph.free, self.penalty.counts()
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


def _soft_widths(objective: ControlledPenalty, base: WidthGraph) -> _Found:
    """Return the soft counts of a controlled search, relative to the channels of the network."""
    penalty = objective.penalty
    graph = penalty.graph
    counts = dict(zip(penalty.variables, penalty.soft_counts().tolist(), strict=True))
    share = float(objective.soft_share())
    near = 0.05
    diagnostics = {
        "at_limit": [
            name
            for name in penalty.searchable
            if counts[name] > (1 - near) * graph.free[name].classes
        ],
        "at_floor": [name for name in penalty.searchable if counts[name] < 1 + near],
        "budget_reached": share <= 2 * objective.share,
    }
    channels = {name: count * graph.free[name].unit for name, count in counts.items()}
    details = {
        "channels_soft": channels,
        "largest_scale": penalty.largest(),
        "soft_share": share,
        "strength_at_start": objective.start,
        "wanted_share": objective.share,
    }
    multipliers = {name: count / base.channels[name] for name, count in channels.items()}
    return _Found(multipliers, diagnostics, details, 0)


def _enlargement(graph: WidthGraph) -> float:
    """Return the factor of ``enlarge=auto``: 2, or 3 if a searchable variable is narrow."""
    narrowest = min((graph.free[name].classes for name in graph.searchable), default=NARROW)
    return 2.0 if narrowest >= NARROW else 3.0


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
    if not diagnostics["budget_reached"]:
        logger.warning("the penalty was too weak to reach the budget; use more epochs or images")
    if diagnostics.get("unchanged"):
        logger.warning("nothing was pruned; the penalty is too weak for this schedule")
    if diagnostics.get("cut"):
        logger.warning(
            "the search cut the network at %s; the result is not valid",
            ", ".join(diagnostics["cut"]),
        )
    if diagnostics.get("masked_accuracy_gap", 0.0) > GAP_POINTS:
        logger.warning(
            "removing the dead channels cost %.1f points; the result is not valid",
            diagnostics["masked_accuracy_gap"],
        )
