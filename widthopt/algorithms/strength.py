"""Automatic strength of MorphNet's penalty: reach a share of the MACs in any number of steps.

The strength starts from the distance that the schedule lets a scale travel. A controller changes it
so that the *soft share* of MACs follows a ramp from 1 to the wanted share. The soft share is the
cost at the soft counts (`Penalty.soft_counts`) relative to the searched network.
"""

import math
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor

from widthopt.algorithms.penalty import Penalty
from widthopt.algorithms.polynomial import Polynomial
from widthopt.setting import Recipe
from widthopt.training.loop import Objective, learning_rate


KAPPA = 3.0
"""Distance that the initial strength alone lets the scales of the median variable travel."""

RAMP_END = 0.8
"""Part of the sum of learning rates after which the wanted share is reached."""

PROPORTIONAL_BAND = 0.1
"""Error of the share at which the controller changes the strength at its full rate."""

GAIN = 12.0
"""Largest change of the logarithm of the strength over a search."""

LEAST_FACTOR, LARGEST_FACTOR = 1 / 30, 1000.0
"""Range of the strength relative to the initial strength."""


def initial_strength(penalty: Penalty, rates: Sequence[float], *, momentum: float) -> float:
    """Return the strength at which the penalty alone moves a median scale by `KAPPA`.

    Args:
        penalty: The penalty at the start of the search.
        rates: Learning rate of every step.
        momentum: Momentum of the optimizer of the weights.
    """
    travel = sum(rates) / (1 - momentum)
    members = penalty.members()
    pressures = [value / members[name] for name, value in penalty.pressure().items()]
    return KAPPA / (median(pressures) * travel)


class ControlledPenalty(Objective):
    """The loss of the recipe plus a penalty whose strength a controller changes.

    Attributes:
        penalty: The penalty.
        share: Wanted share of the MACs at the end, in (0, 1).
        start: Initial strength.
    """

    def __init__(
        self, penalty: Penalty, recipe: Recipe, *, share: float, steps_per_epoch: int
    ) -> None:
        """Create the objective of a search of ``recipe.search_epochs``.

        Args:
            penalty: The penalty of the searched network.
            recipe: The recipe.
            share: Wanted share of the MACs at the end, in (0, 1).
            steps_per_epoch: Steps in an epoch.
        """
        super().__init__(label_smoothing=recipe.label_smoothing)
        self.penalty, self.share = penalty, share
        epochs = recipe.search_epochs
        self.rates = [
            learning_rate(recipe, step=step, steps_per_epoch=steps_per_epoch, epochs=epochs)
            for step in range(steps_per_epoch * epochs)
        ]
        self.start = initial_strength(penalty, self.rates, momentum=recipe.momentum)
        total, spent = sum(self.rates), 0.0
        self._wanted = []
        for rate in self.rates:
            spent += rate
            done = spent / total
            self._wanted.append(1 + (share - 1) * min(1.0, done / RAMP_END))
        macs = Polynomial.of(penalty.graph)
        device = penalty.soft_counts().device
        self._macs = Polynomial(macs.constant, *(term.to(device) for term in macs[1:]))
        self._step = 0
        # On the device: the controller never waits for it.
        self._log_strength = torch.tensor(math.log(self.start), dtype=torch.float64, device=device)
        self._history = torch.zeros(0, 2, dtype=torch.float64)

    @property
    def identity(self) -> Mapping[str, Any]:
        """See `Objective.identity`."""
        return {**super().identity, "share": self.share}

    def soft_share(self) -> Tensor:
        """Return the MACs at the soft counts relative to the searched network, a scalar."""
        counts, macs = self.penalty.soft_counts().double(), self._macs
        value = macs.constant + macs.slopes @ counts + counts @ (macs.curvature @ counts) / 2
        return (value + macs.squares @ counts.square()) / self.penalty.macs

    def begin_step(self, step: int, *, images: int) -> None:
        """See `Objective.begin_step`."""
        del images
        self._step = step

    def before_step(self) -> None:
        """Update the strength, and add the gradient of the penalty once."""
        error = self.soft_share() - self._wanted[self._step]
        change = GAIN / len(self.rates) * (error / PROPORTIONAL_BAND).clamp(-1, 1)
        low, high = (math.log(factor * self.start) for factor in (LEAST_FACTOR, LARGEST_FACTOR))
        self._log_strength = (self._log_strength + change).clamp(low, high)
        self.penalty.add_gradient(self._log_strength.exp())

    def after_epoch(self, epoch: int) -> None:
        """Record the strength and the soft share."""
        del epoch
        row = torch.stack([self._log_strength.exp(), self.soft_share()])[None].cpu()
        self._history = torch.cat([self._history, row])

    def step_metrics(self) -> dict[str, float]:
        """See `Objective.step_metrics`."""
        return {
            "strength": float(self._log_strength.exp()),
            "macs_share": float(self.soft_share()),
            "wanted_share": self._wanted[self._step],
        }

    def epoch_metrics(self) -> dict[str, float]:
        """Return the soft counts in channels of each width variable."""
        counts = self.penalty.soft_counts().tolist()
        free = self.penalty.graph.free
        return {
            f"channels/{name}": count * free[name].unit
            for name, count in zip(self.penalty.variables, counts, strict=True)
        }

    def history(self) -> list[dict[str, float]]:
        """Return the strength and the soft share at the end of each epoch."""
        rows = enumerate(self._history.tolist())
        return [{"epoch": epoch, "strength": row[0], "macs_share": row[1]} for epoch, row in rows]

    def state_dict(self) -> dict[str, Tensor]:
        """See `Objective.state_dict`."""
        return {"log_strength": self._log_strength, "history": self._history}

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """See `Objective.load_state_dict`."""
        self._log_strength = tensors["log_strength"].to(self._log_strength.device)
        self._history = tensors["history"]
