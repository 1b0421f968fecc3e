"""DMCP's model of widths: a Markov chain for each width variable, and the expected MACs.

Group j of a variable is kept with probability ``p_j = sigmoid(alpha_j)`` if the group before it is
kept. Its *marginal* probability is ``m_j = p_1 ... p_j``. Channels before the first group are
always kept.

All values are float64, and all derivatives are in closed form.

Source: Guo et al., 2020, "DMCP: Differentiable Markov Channel Pruning for Neural Networks";
docs/algorithms/dmcp.md, 1.1, 1.3, 1.5 and 1.6.
"""

import math
from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import Tensor

from widthopt.algorithms.grids import Grids
from widthopt.algorithms.polynomial import Polynomial
from widthopt.widthgraph import WidthGraph


BAND = 0.95
"""Lower end of the band, relative to the budget, in which the regularizer is zero."""


class Chains:
    """The chains of all width variables of a supernet.

    Attributes:
        alpha: Parameters, of shape ``(variables, groups)``; 0 where a variable has fewer groups.
        real: Mask of the entries that are parameters, of the same shape.
    """

    def __init__(self, graph: WidthGraph, grids: Grids, *, device: torch.device) -> None:
        """Create chains with all probabilities at one half.

        Args:
            graph: The graph of the supernet.
            grids: Grid of each free variable; each entry after the first adds a group.
            device: Device of the tensors.
        """
        self._names = list(graph.free)
        self._units = [variable.unit for variable in graph.free.values()]
        counts = [
            [channels // unit for channels in grids[name]]
            for name, unit in zip(self._names, self._units, strict=True)
        ]
        groups = max(map(len, counts)) - 1
        padded = torch.tensor(
            [[*row, *[row[-1]] * (groups + 1 - len(row))] for row in counts], dtype=torch.float64
        )
        self._counts = padded.to(device)
        self._least = self._counts[:, 0]
        self._steps = self._counts.diff(dim=1)
        self._square_steps = self._counts.square().diff(dim=1)
        self.real = self._steps > 0
        self.alpha = torch.zeros_like(self._steps)
        macs = Polynomial.of(graph)
        self._macs = Polynomial(macs.constant, *(term.to(device) for term in macs[1:]))
        self._places = torch.tensor(
            _places(graph, dict(zip(self._names, counts, strict=True)), groups), device=device
        )

    def probabilities(self) -> Tensor:
        """Return p, the probability of each group if the group before it is kept."""
        return self.alpha.sigmoid() * self.real

    def marginals(self) -> Tensor:
        """Return m, the marginal probability of each group."""
        # In logarithms, for the precision of the gradients of products of small numbers.
        kept = torch.nn.functional.logsigmoid(self.alpha).cumsum(1).exp()
        return kept * self.real

    def expected_channels(self) -> dict[str, float]:
        """Return the expected channels E[c] of each free variable."""
        means = self._means(self.marginals()).tolist()
        return {
            name: unit * mean
            for name, unit, mean in zip(self._names, self._units, means, strict=True)
        }

    def expected_macs(self) -> float:
        """Return the expected MACs over the chains, exactly."""
        return float(self._expectation(self.marginals()))

    def _means(self, marginals: Tensor) -> Tensor:
        return self._least + (self._steps * marginals).sum(1)

    def _expectation(self, marginals: Tensor) -> Tensor:
        """Return the expected MACs. Chains are independent, so only squares need second moments."""
        means, macs = self._means(marginals), self._macs
        squares = self._least.square() + (self._square_steps * marginals).sum(1)
        product = means @ (macs.curvature @ means) / 2
        return macs.constant + macs.slopes @ means + product + macs.squares @ squares

    def macs_gradient(self) -> Tensor:
        """Return the derivative of the expected MACs by the marginals, of the shape of `alpha`."""
        macs = self._macs
        slopes = macs.slopes + macs.curvature @ self._means(self.marginals())
        return slopes[:, None] * self._steps + macs.squares[:, None] * self._square_steps

    def alpha_gradient(self, gradient: Tensor) -> Tensor:
        """Convert a derivative by the marginals to one by alpha.

        ``dm_k / dalpha_j = m_k (1 - p_j)`` for ``k >= j``, otherwise 0.
        """
        later = (gradient * self.marginals()).flip(1).cumsum(1).flip(1)
        return later * (1 - self.alpha.sigmoid()) * self.real

    def factors(self, marginals: Tensor) -> Tensor:
        """Return the marginal of each class of the searchable variables, for `Supernet.mixture`.

        Args:
            marginals: From `marginals`; gradients flow back to it.
        """
        always = marginals.new_ones(1)
        return torch.cat([marginals.flatten(), always])[self._places]

    def sample(self, random: torch.Generator) -> dict[str, int]:
        """Sample all chains, and return channels; ``random`` is a CPU generator."""
        draws = torch.rand(self.alpha.shape, generator=random, dtype=torch.float64)
        kept = (draws < self.probabilities().cpu()).cumprod(1).sum(1, keepdim=True)
        counts = self._counts.cpu().gather(1, kept)[:, 0].tolist()
        return {
            name: unit * int(count)
            for name, unit, count in zip(self._names, self._units, counts, strict=True)
        }

    def set_expected_macs(self, macs: float) -> float:
        """Set all alphas to one value so that the expected MACs are ``macs``; return the value.

        Args:
            macs: Between the costs of the narrowest and the widest subnet, both excluded.
        """
        low, high = -40.0, 40.0
        while high - low > 1e-9:  # noqa: PLR2004 (far below what matters in a logit)
            middle = (low + high) / 2
            self.alpha.fill_(middle).mul_(self.real)
            low, high = (middle, high) if self.expected_macs() <= macs else (low, middle)
        self.alpha.fill_(low).mul_(self.real)
        return low


def _places(graph: WidthGraph, counts: Mapping[str, list[int]], groups: int) -> list[int]:
    """Return the index of the group of each class of the searchable variables in flat marginals.

    The index after the last stands for channels that are always kept.
    """
    rows = {name: row for row, name in enumerate(graph.free)}
    places: list[int] = []
    for name in graph.searchable:
        bounds = counts[name]
        places.extend([len(rows) * groups] * bounds[0])
        for group, (before, after) in enumerate(pairwise(bounds)):
            places.extend([rows[name] * groups + group] * (after - before))
    return places


def regularizer_slope(macs: float, budget_macs: float) -> float:
    """Return the derivative of DMCP's budget regularizer by ``macs / budget_macs``.

    The regularizer is ``log(budget - e)`` below the band, 0 in the band, its lower end included,
    and ``log(e - 0.95 budget)`` above it. The slope is hyperbolic and steepest near the band.

    Source: docs/algorithms/dmcp.md, 1.6.
    """
    part = macs / budget_macs
    if part < BAND:
        return -1 / (1 - part)
    return 1 / (part - BAND) if part >= 1 else 0.0


def schedule(step: int, steps: int, *, start: float, end: float) -> float:
    """Return the value of a cosine schedule from ``start`` at step 0 to ``end`` at ``steps``."""
    return end + (start - end) * (1 + math.cos(math.pi * step / steps)) / 2


class AlphaSGD:
    """SGD with Nesterov momentum on ``Chains.alpha``, as `torch.optim.SGD`.

    Attributes:
        momentum: The momentum buffer, of the shape of alpha.
    """

    def __init__(self, chains: Chains, *, mu: float) -> None:
        """Create the optimizer of ``chains.alpha``; ``mu`` is the momentum, in [0, 1)."""
        self.chains, self._mu = chains, mu
        self.momentum = torch.zeros_like(chains.alpha)

    def step(self, gradient: Tensor, *, rate: float) -> None:
        """Make one step against a gradient with respect to alpha."""
        self.momentum.mul_(self._mu).add_(gradient)
        self.chains.alpha.sub_(rate * (gradient + self._mu * self.momentum))
