"""DMCP: model the width of each layer as a Markov chain, and learn the chains by gradients.

The supernet is trained with the sandwich rule throughout. In the second half of the search, every
step also updates the chains: each channel of the supernet is multiplied by the probability that
it is kept, and the gradient is that of the loss plus a regularizer on the expected MACs. The
result is the expected width of each layer.

Source: Guo et al., 2020, "DMCP: Differentiable Markov Channel Pruning for Neural Networks";
paper section 3.2 and appendix A; docs/algorithms/dmcp.md, D1-D22.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from widthopt.algorithms import SearchContext, SearchResult, check_searchable
from widthopt.algorithms.grids import Grids, grids, group_grid
from widthopt.algorithms.markov import BAND, AlphaSGD, Chains, regularizer_slope, schedule
from widthopt.algorithms.sandwich import (
    Reduction,
    Sandwich,
    check_budget,
    prepare_supernet,
    step_macs,
)
from widthopt.data import Counts, Split
from widthopt.errors import check_fields
from widthopt.networks.resize import Blueprint
from widthopt.networks.supernet import ScaleSite, Supernet, enlarge_channels
from widthopt.seeds import derive_seed, generator
from widthopt.setting import Recipe, Setting
from widthopt.training import distributed
from widthopt.training.loop import train
from widthopt.widthgraph import WidthGraph, first_names


logger = logging.getLogger("widthopt")

ORIGINAL_STEPS = 25_020
"""Architecture steps of the original: half of 40 epochs of ImageNet with batches of 1024."""

ENOUGH_STEPS = 10_000
"""With at least this many architecture steps ``alpha_init=auto`` means ``zero``.

Source: docs/algorithms/dmcp.md, D12.
"""

START_AT = 1.25
"""Expected MACs at the start of a short search, relative to the budget.

Source: docs/algorithms/dmcp.md, D12.
"""

REACHED = (BAND, 1.02)
"""Range of the expected MACs, relative to the budget, in which a search has reached it.

Source: docs/algorithms/dmcp.md, D12.
"""


@dataclass(frozen=True, slots=True)
class DMCP:
    """The DMCP algorithm; ``conf/algorithm/dmcp.yaml`` has its values.

    Attributes:
        name: Name in records.
        enlarge: Factor on the channels of the network for the supernet.
        group: Size of a group, as a fraction of the channels of the network.
        least: Channels that are always kept, as a fraction of the channels of the network.
        grid: Boundaries of the groups: ``reference`` rounds the size down and always keeps the
            rest; ``even`` spreads the boundaries; ``auto`` uses ``even`` only for variables that
            are too narrow for ``reference``.
        random_subnets: Random subnets in a step, in addition to the widest and the narrowest.
        reduction: Reduction of the gradients of a step's subnets: ``sum`` or ``mean``.
        markov_subnets: Random subnets in architecture steps: ``scheduled`` samples an increasing
            share of them from the chains, ``always`` all of them.
        strength: Weight of the regularizer in the loss of the chains.
        learning_rate: Initial learning rate of the chains.
        final_learning_rate: Final learning rate of the chains; the schedule is a cosine.
        momentum: Nesterov momentum of the chains.
        alpha_init: Initial expected MACs: ``zero`` sets all probabilities to one half,
            ``budget`` starts at 1.25 times the budget, ``auto`` is ``zero`` only if there are
            enough steps to reach the budget.
        scale_site: Where probabilities multiply channels: ``norm`` is after BatchNorm,
            ``activation`` after the following activation. They differ only for ReLU6.
    """

    name: str
    enlarge: float
    group: float
    least: float
    grid: Literal["auto", "reference", "even"]
    random_subnets: int
    reduction: Reduction
    markov_subnets: Literal["scheduled", "always"]
    strength: float
    learning_rate: float
    final_learning_rate: float
    momentum: float
    alpha_init: Literal["auto", "zero", "budget"]
    scale_site: ScaleSite

    def __post_init__(self) -> None:
        check_fields(
            "algorithm",
            self,
            ("enlarge", 1 <= self.enlarge < math.inf, "a supernet is no narrower than its network"),
            ("least", 0 < self.least < self.enlarge, "it is above 0 and below algorithm.enlarge"),
            (
                "group",
                0 < self.group <= self.enlarge - self.least,
                "at least one group fits between algorithm.least and algorithm.enlarge",
            ),
            ("random_subnets", self.random_subnets >= 0, "it is an integer of at least 0"),
            ("strength", 0 <= self.strength < math.inf, "it is a number of at least 0"),
            ("learning_rate", 0 < self.learning_rate < math.inf, "it is a number above 0"),
            (
                "final_learning_rate",
                0 <= self.final_learning_rate <= self.learning_rate,
                "it is a number from 0 to algorithm.learning_rate",
            ),
            ("momentum", 0 <= self.momentum < 1, "it is a number of at least 0 and below 1"),
            remedy="conf/algorithm/dmcp.yaml has the original's value",
        )

    def search(
        self, setting: Setting, data: Split, *, budget_macs: int, context: SearchContext
    ) -> SearchResult:
        """See `widthopt.algorithms.WidthSearch`.

        The widths are the expected widths of the chains, not rounded. The diagnostic
        ``budget_reached`` is whether the expected MACs ended between 0.95 and 1.02 times the
        budget. The widths are matched to the budget afterwards in either case.
        """
        blueprint, recipe = Blueprint(setting), context.recipe
        graph = self._check_graph(blueprint, budget_macs)
        self._warn_about_fixed(graph)
        supernet, runtime = prepare_supernet(
            blueprint, context, enlarge=self.enlarge, batch_size=data.train.batch_size
        )
        seed = derive_seed(context.seed, "search")
        objective = _Architecture(
            self,
            supernet,
            self.options(supernet.graph),
            steps=recipe.search_epochs * data.train.steps_per_epoch,
            budget_macs=budget_macs,
            label_smoothing=recipe.label_smoothing,
            seed=seed,
        )
        start = self._initialise_chains(objective)
        trained = train(
            supernet.model,
            data.train,
            recipe=recipe,
            epochs=recipe.search_epochs,
            seed=seed,
            runtime=runtime,
            objective=objective,
            folder=context.folder,
            label=f"{self.name} search",
            log=context.log,
        )
        chains = objective.chains
        expected = chains.expected_channels()
        part = chains.expected_macs() / budget_macs
        reached = REACHED[0] <= part <= REACHED[1]
        if not reached:
            logger.warning(
                "the search ended at %.3f of its budget, so its widths have not converged; %s",
                part, self._remedy(objective.learnt),
            )  # fmt: skip
        return SearchResult(
            multipliers={name: expected[name] / n for name, n in supernet.base.channels.items()},
            overhead_macs=objective.macs,
            seconds=trained.seconds,
            diagnostics={"budget_reached": reached},
            details={
                **start,
                "backend": supernet.backend,
                "budget_macs": budget_macs,
                **objective.details(),
                "expected_channels": expected,
                "expected_part_of_budget": part,
                "memory_format": runtime.memory_format,
                "searched_macs": supernet.graph.macs(),
            },
        )

    def overhead_macs(
        self, setting: Setting, counts: Counts, *, recipe: Recipe, budget_macs: int
    ) -> int:
        """See `WidthSearch`: the training, and two forward passes for each architecture step.

        A subnet sampled from the chains is assumed to cost the budget.
        """
        graph = self._check_graph(Blueprint(setting), budget_macs)
        options = self.options(graph)
        steps = counts.steps_per_epoch * recipe.search_epochs
        learnt = steps - steps // 2
        uniform = step_macs(graph, options, random_subnets=self.random_subnets)
        without = step_macs(graph, options, random_subnets=0)
        share = sum(self.uniform_share(step, learnt) for step in range(learnt)) / learnt
        drawn = without + 3 * self.random_subnets * budget_macs
        per_image: float = (
            steps // 2 * uniform
            + learnt * (share * uniform + (1 - share) * drawn)
            + learnt * 2 * graph.macs()
        )
        return round(counts.batch_size * per_image)

    def uniform_share(self, step: int, steps: int) -> float:
        """Return the probability that a random subnet is drawn uniformly in an architecture step.

        Interpretation: the schedule of the original, a factor of 0.9999 squared for every ten of
        its 25,020 steps, is scaled to the steps of the search, so it always ends at 0.606.
        """
        if self.markov_subnets == "always":
            return 0.0
        decays = 2 * (step * (ORIGINAL_STEPS // 10) // steps)
        return math.pow(0.9999, decays)

    def _check_graph(self, blueprint: Blueprint, budget_macs: int) -> WidthGraph:
        """Return the graph of the supernet after checking the network and the budget."""
        check_searchable(blueprint.graph, algorithm=self.name)
        graph = blueprint.resize_graph(enlarge_channels(blueprint.graph, self.enlarge))
        least = round(BAND * budget_macs)
        check_budget(graph, self.options(graph), least, budget_macs, enlarge=self.enlarge)
        return graph

    def options(self, graph: WidthGraph) -> Grids:
        """Return the channel counts that each width variable of a supernet may have."""

        def rule(count: int) -> list[int]:
            return group_grid(
                count, step=self.group, least=self.least, enlarge=self.enlarge, kind=self.grid
            )

        return grids(graph, rule)

    def _warn_about_fixed(self, graph: WidthGraph) -> None:
        options = self.options(graph)
        fixed = [name for name in graph.searchable if len(options[name]) == 1]
        if fixed:
            logger.warning(
                "%d of %d width variables have too few channels for groups of algorithm.group, so "
                "they stay at %g times their width (%s); algorithm.grid=auto searches them too",
                len(fixed), len(graph.searchable), self.enlarge, first_names(fixed),
            )  # fmt: skip

    def _initialise_chains(self, objective: "_Architecture") -> dict[str, Any]:
        """Initialize the chains, and estimate whether the regularizer alone reaches the budget."""
        chains, budget = objective.chains, objective.budget_macs
        if self._starts_at_budget(objective.learnt):
            widest = objective.supernet.graph.macs()
            chains.set_expected_macs(min(START_AT * budget, (budget + widest) / 2))
        part, end = chains.expected_macs() / budget, objective.simulate_regulariser()
        if not REACHED[0] <= end <= REACHED[1] and self.strength > 0:
            logger.warning(
                "%d architecture steps may be too few: the regularizer alone would move the "
                "expected MACs from %.2f to %.2f of the budget; %s",
                objective.learnt, part, end, self._remedy(objective.learnt),
            )  # fmt: skip
        return {"part_of_budget_at_start": part, "part_of_budget_by_regulariser_alone": end}

    def _starts_at_budget(self, learnt: int) -> bool:
        """Return whether a search of this many architecture steps starts near the budget."""
        short = learnt < ENOUGH_STEPS
        return self.alpha_init == "budget" or (self.alpha_init == "auto" and short)

    def _remedy(self, learnt: int) -> str:
        """Return the remedy for a search that does not reach its budget."""
        if self._starts_at_budget(learnt):
            return "raise recipe.search_epochs, or search on more images"
        return (
            "raise recipe.search_epochs, search on more images, or use algorithm.alpha_init=budget"
        )


class _Architecture(Sandwich):
    """The sandwich rule; in the second half every step also updates the chains.

    Attributes:
        chains: The chains.
        budget_macs: The budget.
        learnt: Number of steps that update the chains.
    """

    def __init__(
        self,
        algorithm: DMCP,
        supernet: Supernet,
        options: Grids,
        *,
        steps: int,
        budget_macs: int,
        label_smoothing: float,
        seed: int,
    ) -> None:
        super().__init__(
            supernet,
            options,
            random_subnets=algorithm.random_subnets,
            reduction=algorithm.reduction,
            label_smoothing=label_smoothing,
            seed=seed,
        )
        self.chains = Chains(supernet.graph, options, device=supernet.device)
        self.budget_macs = budget_macs
        self._first = steps // 2
        self.learnt = steps - self._first
        self._algorithm = algorithm
        self._sgd = AlphaSGD(self.chains, mu=algorithm.momentum)
        self._sides = torch.zeros(3, dtype=torch.int64)
        self._history = torch.zeros(0, dtype=torch.float64)
        self._architecture: Tensor | None = None
        self._learning = 0

    @property
    def identity(self) -> Mapping[str, Any]:
        """See `Objective.identity`."""
        return {
            **super().identity,
            "algorithm": asdict(self._algorithm),
            "budget_macs": self.budget_macs,
        }

    def draw(self, step: int, number: int) -> dict[str, int]:
        """Return a random subnet; in the second half some are sampled from the chains."""
        learning = step - self._first
        if learning >= 0:
            share = self._algorithm.uniform_share(learning, self.learnt)
            if generator(self.seed, "markov", step, number).random() >= share:
                seed = derive_seed(self.seed, "chains", step, number)
                return self.chains.sample(torch.Generator().manual_seed(seed))
        return super().draw(step, number)

    def after_step(self, step: int, micro_batches: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Update the chains on the images of the step, after the update of the weights."""
        if step < self._first:
            return
        marginals = self.chains.marginals().requires_grad_()
        images = sum(len(labels) for _, labels in micro_batches)
        self._architecture = torch.zeros((), device=marginals.device)
        for pixels, labels in micro_batches:
            factors = self.chains.factors(marginals).to(torch.float32)
            logits = self.supernet.mixture(pixels, factors, site=self._algorithm.scale_site)
            loss = self.loss(logits, labels)
            self.backpropagate(loss, share=len(labels) / images)
            self._architecture += loss.detach() * (len(labels) / images)
        self._learning = step - self._first
        assert marginals.grad is not None
        # The mean over the images of all processes, in one all-reduce.
        seen = torch.tensor([float(images)], dtype=torch.float64, device=marginals.device)
        slope = marginals.grad * images if distributed.world_size() > 1 else marginals.grad
        distributed.all_reduce_sum([slope, seen])
        if distributed.world_size() > 1:
            slope /= seen
            images = round(float(seen))
        part = self.chains.expected_macs() / self.budget_macs
        self._sides[0 if part < BAND else 1 if part < 1 else 2] += 1
        gradient = self.chains.alpha_gradient(slope) + self.push()
        self._sgd.step(gradient, rate=self.rate(step - self._first))
        # Forward, and backward without the weights' gradients.
        self.macs += 2 * self.supernet.graph.macs() * images

    def push(self) -> Tensor:
        """Return the gradient of the regularizer with respect to alpha."""
        slope = regularizer_slope(self.chains.expected_macs(), self.budget_macs)
        weight = self._algorithm.strength * slope / self.budget_macs
        return self.chains.alpha_gradient(weight * self.chains.macs_gradient())

    def rate(self, step: int) -> float:
        """Return the learning rate of the chains at an architecture step."""
        algorithm = self._algorithm
        start, end = algorithm.learning_rate, algorithm.final_learning_rate
        return schedule(step, self.learnt, start=start, end=end)

    def simulate_regulariser(self) -> float:
        """Return the expected MACs, relative to the budget, if only the regularizer acts."""
        start = self.chains.alpha.clone()
        alone = AlphaSGD(self.chains, mu=self._algorithm.momentum)
        for step in range(self.learnt):
            alone.step(self.push(), rate=self.rate(step))
        end = self.chains.expected_macs() / self.budget_macs
        self.chains.alpha.copy_(start)
        return end

    def after_epoch(self, epoch: int) -> None:
        """Record the expected MACs."""
        part = self.chains.expected_macs() / self.budget_macs
        self._history = torch.cat([self._history, torch.tensor([part], dtype=torch.float64)])
        logger.debug("epoch %d: expected MACs at %.4f of the budget", epoch, part)

    def step_metrics(self) -> dict[str, float]:
        """See `Objective.step_metrics`."""
        metrics = super().step_metrics()
        metrics["budget_share"] = self.chains.expected_macs() / self.budget_macs
        if self._architecture is not None:
            metrics["architecture_loss"] = float(self._architecture)
            metrics["chains_learning_rate"] = self.rate(self._learning)
            for name, steps in zip(("below", "within", "above"), self._sides, strict=True):
                metrics[f"steps_{name}"] = int(steps)
        return metrics

    def epoch_metrics(self) -> dict[str, float]:
        """Return the expected channels of each width variable."""
        expected = self.chains.expected_channels()
        return {f"channels/{name}": count for name, count in expected.items()}

    def details(self) -> dict[str, Any]:
        """Return the expected MACs by epoch, and the steps below, within and above the band."""
        names = ("below", "within", "above")
        return {
            "part_of_budget_by_epoch": self._history.tolist(),
            "steps_by_side_of_budget": dict(zip(names, self._sides.tolist(), strict=True)),
        }

    def state_dict(self) -> dict[str, Tensor]:
        """See `Objective.state_dict`."""
        return {
            **super().state_dict(),
            "alpha": self.chains.alpha,
            "alpha_momentum": self._sgd.momentum,
            "history": self._history,
            "sides": self._sides,
        }

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """See `Objective.load_state_dict`."""
        super().load_state_dict(tensors)
        self.chains.alpha.copy_(tensors["alpha"])
        self._sgd.momentum.copy_(tensors["alpha_momentum"])
        self._history, self._sides = tensors["history"], tensors["sides"]
