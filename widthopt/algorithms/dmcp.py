"""DMCP: learn how many channels to keep as Markov chains, by gradients, under a budget.

The supernet is trained with the sandwich rule throughout. In the second half of the search,
every step also updates the chains: the supernet runs with each channel times the probability
that it is kept, and the chains follow the loss and a regulariser on expected MACs. What they
expect in the end are the widths.

Source: Guo et al., 2020, "DMCP: Differentiable Markov Channel Pruning for Neural Networks";
paper section 3.2 and appendix A; the decisions D1-D22 of its specification.
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
from widthopt.algorithms.markov import BAND, AlphaSGD, Chains, regulariser_slope, schedule
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
from widthopt.seeds import derived_seed, generator
from widthopt.setting import Recipe, Setting
from widthopt.training import distributed
from widthopt.training.loop import train
from widthopt.widthgraph import WidthGraph, first_names


logger = logging.getLogger("widthopt")

ORIGINAL_STEPS = 25_020
"""Architecture steps of the original: half of 40 epochs of ImageNet in batches of 1024."""

ENOUGH_STEPS = 10_000
"""Architecture steps from which ``alpha_init=auto`` starts at probabilities of one half (D12)."""

START_AT = 1.25
"""Expected MACs that a short search starts at, as a part of the budget (D12)."""

REACHED = (BAND, 1.02)
"""Expected MACs at the end, as a part of the budget, that count as having reached it (D12)."""


@dataclass(frozen=True, slots=True)
class DMCP:
    """The algorithm; its values are in ``conf/algorithm/dmcp.yaml``.

    Attributes:
        name: Its name in records.
        enlarge: The supernet's channels, as a multiple of the network's.
        group: Channels of one group, as a part of the network's.
        least: Channels that are always kept, as a part of the network's.
        grid: ``reference``: what rounding leaves over is always kept; ``even``: it is spread;
            ``auto``: the reference, but even for variables too narrow for it.
        random_subnets: Random subnets in a step, beside the widest and the narrowest.
        reduction: How the gradients of a step's subnets combine: ``sum`` or ``mean``.
        markov_subnets: ``scheduled``: more and more random subnets are draws of the chains;
            ``always``: all of them are, once the chains are learnt.
        strength: Factor on the regulariser in the architecture's loss.
        learning_rate: Of the chains' parameters, at first.
        final_learning_rate: The same at the end; half a cosine lies between.
        momentum: Nesterov momentum of the chains' parameters.
        alpha_init: ``zero``: probabilities start at one half; ``budget``: at 1.25 times the
            budget; ``auto``: ``zero`` where there are steps enough to reach the budget from it.
        scale_site: Where probabilities multiply channels: ``norm``, behind BatchNorm, or
            ``activation``, behind the activation after it. Only ReLU6 tells them apart.
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
            ("random_subnets", self.random_subnets >= 0, "it is a whole number from 0 up"),
            ("strength", 0 <= self.strength < math.inf, "it is a number from 0 up"),
            ("learning_rate", 0 < self.learning_rate < math.inf, "it is a number above 0"),
            (
                "final_learning_rate",
                0 <= self.final_learning_rate <= self.learning_rate,
                "it is from 0 up to algorithm.learning_rate",
            ),
            ("momentum", 0 <= self.momentum < 1, "it is a number from 0 up and below 1"),
            remedy="conf/algorithm/dmcp.yaml has the original's value",
        )

    def search(
        self, setting: Setting, data: Split, *, budget_macs: int, context: SearchContext
    ) -> SearchResult:
        """See `widthopt.algorithms.WidthSearch`.

        The widths are the chains' expectations, not rounded. The flag ``budget_reached`` says
        whether the expected MACs ended between 0.95 and 1.02 of the budget: the FLOPs are
        matched afterwards whatever the search came to.
        """
        blueprint, recipe = Blueprint(setting), context.recipe
        graph = self._check_graph(blueprint, budget_macs)
        self._warn_about_fixed(graph)
        supernet, runtime = prepare_supernet(
            blueprint, context, enlarge=self.enlarge, batch_size=data.train.batch_size
        )
        seed = derived_seed(context.seed, "search")
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
                "the search ended at %.3f of its budget: its widths are not what it would have "
                "settled on; %s", part, self._remedy(objective.learnt),
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
        """See `WidthSearch`: training, and two forward passes' worth for each architecture step.

        A draw of the chains counts as the budget, which is where they spend most of the search.
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
        """Probability that a random subnet of an architecture step is still drawn uniformly.

        Reading: the original's schedule, 0.9999 to the power of two for every ten of its 25,020
        steps, is stretched to the search's, so that a short search ends at the same 0.606.
        """
        if self.markov_subnets == "always":
            return 0.0
        decays = 2 * (step * (ORIGINAL_STEPS // 10) // steps)
        return math.pow(0.9999, decays)

    def _check_graph(self, blueprint: Blueprint, budget_macs: int) -> WidthGraph:
        """The supernet's graph, if the network can be searched under this budget."""
        check_searchable(blueprint.graph, algorithm=self.name)
        graph = blueprint.resize_graph(enlarge_channels(blueprint.graph, self.enlarge))
        least = round(BAND * budget_macs)
        check_budget(graph, self.options(graph), least, budget_macs, enlarge=self.enlarge)
        return graph

    def options(self, graph: WidthGraph) -> Grids:
        """The channel counts that each width variable of a supernet may have."""

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
        """Where the chains start, and whether the regulariser alone would reach the budget."""
        chains, budget = objective.chains, objective.budget_macs
        if self._starts_at_budget(objective.learnt):
            widest = objective.supernet.graph.macs()
            chains.start_at(min(START_AT * budget, (budget + widest) / 2))
        part, end = chains.expected_macs() / budget, objective.simulate_regulariser()
        if not REACHED[0] <= end <= REACHED[1] and self.strength > 0:
            logger.warning(
                "%d architecture steps may be too few: the regulariser alone would go from %.2f "
                "of the budget to %.2f; %s",
                objective.learnt, part, end, self._remedy(objective.learnt),
            )  # fmt: skip
        return {"part_of_budget_at_start": part, "part_of_budget_by_regulariser_alone": end}

    def _starts_at_budget(self, learnt: int) -> bool:
        """Whether a search with so many architecture steps does (D12)."""
        short = learnt < ENOUGH_STEPS
        return self.alpha_init == "budget" or (self.alpha_init == "auto" and short)

    def _remedy(self, learnt: int) -> str:
        """What may bring a search with so many architecture steps nearer to its budget."""
        if self._starts_at_budget(learnt):
            return "raise recipe.search_epochs, or search on more images"
        return (
            "raise recipe.search_epochs, search on more images, or use algorithm.alpha_init=budget"
        )


class _Architecture(Sandwich):
    """The sandwich's steps, each followed by one of the chains in the second half.

    Attributes:
        chains: The chains.
        budget_macs: What the expected MACs are pushed to.
        learnt: Steps that update the chains.
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
        """One random subnet; in the second half more and more of them are drawn by the chains."""
        learning = step - self._first
        if learning >= 0:
            share = self._algorithm.uniform_share(learning, self.learnt)
            if generator(self.seed, "markov", step, number).random() >= share:
                seed = derived_seed(self.seed, "chains", step, number)
                return self.chains.sample(torch.Generator().manual_seed(seed))
        return super().draw(step, number)

    def after_step(self, step: int, micro_batches: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Update the chains, on the images of the step and with the weights it has left."""
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
        # The mean over the images of all processes, in one exchange.
        seen = torch.tensor([float(images)], dtype=torch.float64, device=marginals.device)
        slope = marginals.grad * images if distributed.world_size() > 1 else marginals.grad
        distributed.all_reduce_sum([slope, seen])
        if distributed.world_size() > 1:
            slope /= seen
            images = round(float(seen))
        part = self.chains.expected_macs() / self.budget_macs
        self._sides[0 if part < BAND else 1 if part < 1 else 2] += 1
        gradient = self.chains.by_alpha(slope) + self.push()
        self._sgd.step(gradient, rate=self.rate(step - self._first))
        # Forward, and backward without the weights' gradients.
        self.macs += 2 * self.supernet.graph.macs() * images

    def push(self) -> Tensor:
        """The regulariser's part of the gradient by alpha."""
        slope = regulariser_slope(self.chains.expected_macs(), self.budget_macs)
        weight = self._algorithm.strength * slope / self.budget_macs
        return self.chains.by_alpha(weight * self.chains.macs_gradient())

    def rate(self, step: int) -> float:
        """The chains' learning rate at one of their steps."""
        algorithm = self._algorithm
        start, end = algorithm.learning_rate, algorithm.final_learning_rate
        return schedule(step, self.learnt, start=start, end=end)

    def simulate_regulariser(self) -> float:
        """Where the regulariser alone would take the expected MACs, as a part of the budget."""
        start = self.chains.alpha.clone()
        alone = AlphaSGD(self.chains, mu=self._algorithm.momentum)
        for step in range(self.learnt):
            alone.step(self.push(), rate=self.rate(step))
        end = self.chains.expected_macs() / self.budget_macs
        self.chains.alpha.copy_(start)
        return end

    def after_epoch(self, epoch: int) -> None:
        """Note where the expected MACs are."""
        part = self.chains.expected_macs() / self.budget_macs
        self._history = torch.cat([self._history, torch.tensor([part], dtype=torch.float64)])
        logger.debug("epoch %d: expected MACs at %.4f of the budget", epoch, part)

    def step_metrics(self) -> dict[str, float]:
        """See `Objective.step_metrics`: the budget, and once the chains are learnt, how."""
        found = super().step_metrics()
        found["budget_share"] = self.chains.expected_macs() / self.budget_macs
        if self._architecture is not None:
            found["architecture_loss"] = float(self._architecture)
            found["chains_learning_rate"] = self.rate(self._learning)
            for name, steps in zip(("below", "within", "above"), self._sides, strict=True):
                found[f"steps_{name}"] = int(steps)
        return found

    def epoch_metrics(self) -> dict[str, float]:
        """The channels that are expected of each width variable."""
        expected = self.chains.expected_channels()
        return {f"channels/{name}": count for name, count in expected.items()}

    def details(self) -> dict[str, Any]:
        """How it went: by epoch, and how many steps were below, within and above the band."""
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
