"""DMCP's model of widths: a Markov chain for each width variable, and expected MACs.

Group j of a variable is kept with probability ``p_j`` if the group before it is, so with
probability ``m_j = p_1 ... p_j`` altogether (its *marginal*). Channels before the first group
are always kept. One real parameter for each group gives ``p_j = sigmoid(alpha_j)``.

Everything here is in float64, and every derivative in closed form.

Source: Guo et al., 2020, "DMCP: Differentiable Markov Channel Pruning for Neural Networks";
its specification, 1.1, 1.3, 1.5 and 1.6.
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
"""The budget's tolerance: no push between this part of it and the whole."""


class Chains:
    """The chains of all width variables of a supernet.

    Attributes:
        alpha: Parameters, ``variables groups``, 0 where a variable has fewer groups.
        real: Which of them are real, of the same shape.
    """

    def __init__(self, graph: WidthGraph, grids: Grids, *, device: torch.device) -> None:
        """Start with every probability at one half.

        Args:
            graph: The supernet's.
            grids: What each free variable may have; entries after the first are its groups.
            device: Where to compute.
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
        """p: the probability of each group once the one before it is kept; 0 where none is."""
        return self.alpha.sigmoid() * self.real

    def marginals(self) -> Tensor:
        """m: the probability of each group; 0 where none is."""
        # By logarithms, so that products of many small numbers keep their gradients' precision.
        kept = torch.nn.functional.logsigmoid(self.alpha).cumsum(1).exp()
        return kept * self.real

    def expected_channels(self) -> dict[str, float]:
        """E[c] of each free variable, in channels."""
        means = self._means(self.marginals()).tolist()
        return {
            name: unit * mean
            for name, unit, mean in zip(self._names, self._units, means, strict=True)
        }

    def expected_macs(self) -> float:
        """The mean of MACs over the chains, exactly."""
        return float(self._expectation(self.marginals()))

    def _means(self, marginals: Tensor) -> Tensor:
        return self._least + (self._steps * marginals).sum(1)

    def _expectation(self, marginals: Tensor) -> Tensor:
        """Chains are independent, so only a variable times itself needs a second moment."""
        means, macs = self._means(marginals), self._macs
        squares = self._least.square() + (self._square_steps * marginals).sum(1)
        product = means @ (macs.curvature @ means) / 2
        return macs.constant + macs.slopes @ means + product + macs.squares @ squares

    def macs_gradient(self) -> Tensor:
        """Derivative of the expected MACs by the marginals; the same shape as `alpha`."""
        macs = self._macs
        slopes = macs.slopes + macs.curvature @ self._means(self.marginals())
        return slopes[:, None] * self._steps + macs.squares[:, None] * self._square_steps

    def by_alpha(self, gradient: Tensor) -> Tensor:
        """A derivative by the marginals as one by alpha: dm_k/dalpha_j = m_k (1 - p_j), k >= j."""
        later = (gradient * self.marginals()).flip(1).cumsum(1).flip(1)
        return later * (1 - self.alpha.sigmoid()) * self.real

    def factors(self, marginals: Tensor) -> Tensor:
        """The marginal of each class of the searchable variables, as `Supernet.mixture` takes it.

        Args:
            marginals: As `marginals` returns them; gradients flow back to them.
        """
        always = marginals.new_ones(1)
        return torch.cat([marginals.flatten(), always])[self._places]

    def sample(self, random: torch.Generator) -> dict[str, int]:
        """One draw of all chains, in channels; ``random`` is on the CPU."""
        draws = torch.rand(self.alpha.shape, generator=random, dtype=torch.float64)
        kept = (draws < self.probabilities().cpu()).cumprod(1).sum(1, keepdim=True)
        counts = self._counts.cpu().gather(1, kept)[:, 0].tolist()
        return {
            name: unit * int(count)
            for name, unit, count in zip(self._names, self._units, counts, strict=True)
        }

    def start_at(self, macs: float) -> float:
        """Give every alpha the same value, at which the expected MACs are these; that value.

        Args:
            macs: Strictly between the cost of the narrowest and of the widest subnet.
        """
        low, high = -40.0, 40.0
        while high - low > 1e-9:  # noqa: PLR2004 (far below what matters in a logit)
            middle = (low + high) / 2
            self.alpha.fill_(middle).mul_(self.real)
            low, high = (middle, high) if self.expected_macs() <= macs else (low, middle)
        self.alpha.fill_(low).mul_(self.real)
        return low


def _places(graph: WidthGraph, counts: Mapping[str, list[int]], groups: int) -> list[int]:
    """For each class of the searchable variables: its group's place in the flat marginals.

    The place behind the last is for what is always kept.
    """
    rows = {name: row for row, name in enumerate(graph.free)}
    places: list[int] = []
    for name in graph.searchable:
        bounds = counts[name]
        places.extend([len(rows) * groups] * bounds[0])
        for group, (before, after) in enumerate(pairwise(bounds)):
            places.extend([rows[name] * groups + group] * (after - before))
    return places


def regulariser_slope(macs: float, budget_macs: float) -> float:
    """Derivative of DMCP's budget regulariser by ``macs / budget_macs``.

    ``log(budget - e)`` below the tolerance band, 0 within it, ``log(e - 0.95 budget)`` from
    the budget up: hyperbolic, strongest near the band. At the band's lower edge the regulariser
    is 0, as within.

    Source: specification of DMCP, 1.6.
    """
    part = macs / budget_macs
    if part < BAND:
        return -1 / (1 - part)
    return 1 / (part - BAND) if part >= 1 else 0.0


def schedule(step: int, steps: int, *, start: float, end: float) -> float:
    """Half a cosine from ``start`` at step 0 to ``end`` at ``steps``."""
    return end + (start - end) * (1 + math.cos(math.pi * step / steps)) / 2


class AlphaSGD:
    """SGD with Nesterov momentum on the chains' alpha, as torch's is.

    Attributes:
        momentum: The momentum buffer, of alpha's shape.
    """

    def __init__(self, chains: Chains, *, mu: float) -> None:
        """Args: chains: Whose alpha moves. mu: The momentum, in [0, 1)."""
        self.chains, self._mu = chains, mu
        self.momentum = torch.zeros_like(chains.alpha)

    def step(self, gradient: Tensor, *, rate: float) -> None:
        """Move against a gradient by alpha."""
        self.momentum.mul_(self._mu).add_(gradient)
        self.chains.alpha.sub_(rate * (gradient + self._mu * self.momentum))
