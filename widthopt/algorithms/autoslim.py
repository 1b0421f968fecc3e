"""AutoSlim: train a supernet at many widths, then slim it greedily to the budget.

The supernet is trained with the sandwich rule (`widthopt.algorithms.sandwich`). Then the bin of
channels whose removal adds the fewest errors is removed, until the budget is met
(`widthopt.algorithms.greedy`).

Source: Yu and Huang, 2019, "AutoSlim: Towards One-Shot Architecture Search for Channel
Numbers"; paper section 3.2 and appendix A; docs/algorithms/autoslim.md, D1-D20.
"""

import hashlib
import itertools
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from widthopt.algorithms import SearchContext, SearchResult, check_searchable
from widthopt.algorithms.greedy import assumed_path, path_macs, slim
from widthopt.algorithms.grids import Grids, bin_grid, grids
from widthopt.algorithms.sandwich import (
    Reduction,
    Sandwich,
    check_budget,
    prepare_supernet,
    step_macs,
)
from widthopt.data import Counts, Split
from widthopt.errors import InputError, check_fields
from widthopt.networks.resize import Blueprint
from widthopt.networks.supernet import enlarge_channels
from widthopt.seeds import derive_seed
from widthopt.setting import Recipe, Setting
from widthopt.training import distributed
from widthopt.training.loop import train
from widthopt.widthgraph import WidthGraph


LEAST_IMAGES = 32
"""Smallest number of validation images, because BatchNorm statistics are computed on them."""


@dataclass(frozen=True, slots=True)
class AutoSlim:
    """The AutoSlim algorithm; ``conf/algorithm/autoslim.yaml`` has its values.

    Attributes:
        name: Name in records.
        enlarge: Factor on the channels of the network for the supernet.
        grid: Channel counts of a variable: ``fraction`` uses fractions of the channels, ``step``
            subtracts multiples of one step from them.
        bins: Number of bins that the channels of a variable are divided into.
        divisor: Counts of ``fraction``, except 1 and the count of the supernet, and the step of
            ``step`` are multiples of this.
        least_bins: Number of bins that every variable keeps.
        random_subnets: Random subnets in a step, in addition to the widest and the narrowest.
        reduction: Reduction of the gradients of a step's subnets: ``sum`` or ``mean``.
        validation_images: Largest number of held-out images that errors are counted on.
        evaluation_batch_size: Largest batch while slimming; BatchNorm uses its statistics.
        calibration_images: Largest number of training images that BatchNorm takes its statistics
            from while slimming, for every candidate; 0 to use the evaluation batch.
    """

    name: str
    enlarge: float
    grid: Literal["fraction", "step"]
    bins: int
    divisor: int
    least_bins: int
    random_subnets: int
    reduction: Reduction
    validation_images: int
    evaluation_batch_size: int
    calibration_images: int

    def __post_init__(self) -> None:
        check_fields(
            "algorithm",
            self,
            ("enlarge", 1 <= self.enlarge < math.inf, "a supernet is no narrower than its network"),
            ("bins", self.bins >= 2, "there is nothing to take away with fewer than 2"),  # noqa: PLR2004
            ("divisor", self.divisor >= 1, "a bin has at least one channel"),
            (
                "least_bins",
                0 <= self.least_bins < self.bins,
                "it is an integer of at least 0 and below algorithm.bins",
            ),
            ("random_subnets", self.random_subnets >= 0, "it is an integer of at least 0"),
            (
                "validation_images",
                self.validation_images >= LEAST_IMAGES,
                f"batch statistics need at least {LEAST_IMAGES} images",
            ),
            (
                "evaluation_batch_size",
                self.evaluation_batch_size >= LEAST_IMAGES,
                f"batch statistics need at least {LEAST_IMAGES} images",
            ),
            (
                "calibration_images",
                self.calibration_images == 0 or self.calibration_images >= LEAST_IMAGES,
                f"statistics need at least {LEAST_IMAGES} images, and 0 means none",
            ),
            remedy="conf/algorithm/autoslim.yaml has the usual value",
        )

    def search(
        self, setting: Setting, data: Split, *, budget_macs: int, context: SearchContext
    ) -> SearchResult:
        """See `widthopt.algorithms.WidthSearch`.

        The network costs at most the budget, and less than one bin below it. The details contain
        the path; each point of it is the result for a larger budget.
        """
        blueprint, recipe = Blueprint(setting), context.recipe
        graph = self._check_graph(blueprint, budget_macs)
        options = self.options(graph)
        images = self.images(data.evaluation.images)
        supernet, runtime = prepare_supernet(
            blueprint, context, enlarge=self.enlarge, batch_size=data.train.batch_size
        )
        seed = derive_seed(context.seed, "search")
        objective = Sandwich(
            supernet,
            options,
            random_subnets=self.random_subnets,
            reduction=self.reduction,
            label_smoothing=recipe.label_smoothing,
            seed=seed,
        )
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
        # Slimming uses a memory format of its own, which is faster there.
        supernet.mixed = False
        sample = data.evaluation.sample(
            images,
            batch_size=min(self.evaluation_batch_size, images),
            seed=derive_seed(context.seed, "validation"),
        )
        slimmed = slim(
            supernet,
            options,
            list(sample.share(distributed.rank(), distributed.world_size())),
            budgets_macs=[budget_macs],
            runtime=context.runtime,
            calibration=self._calibration(data),
            rules=setting.network.rules,
            log=context.folder / "slimming.json",
            identity={
                "network": setting.network.name,
                "seed": context.seed,
                "algorithm": asdict(self),
                "weights": _digest(supernet.model),
            },
        )
        (solution,) = slimmed.solutions
        last = slimmed.moves[-1]
        return SearchResult(
            multipliers={
                name: solution.channels[name] / count
                for name, count in supernet.base.channels.items()
            },
            overhead_macs=objective.macs + slimmed.macs,
            seconds=trained.seconds + slimmed.seconds,
            diagnostics={"budget_reached": True},
            details={
                "backend": supernet.backend,
                "budget_macs": budget_macs,
                "channels": solution.channels,
                "memory_format": runtime.memory_format,
                "moves": [
                    {
                        "variable": move.variable,
                        "channels": move.channels,
                        "errors": move.errors[move.variable],
                        "macs": move.macs,
                    }
                    for move in slimmed.moves
                ],
                "searched_macs": graph.macs(),
                "slimming_macs": slimmed.macs,
                "slimming_seconds": slimmed.seconds,
                "top1_in_supernet": 100 * (1 - last.errors[last.variable] / images),
                "validation_images": images,
            },
        )

    def overhead_macs(
        self, setting: Setting, counts: Counts, *, recipe: Recipe, budget_macs: int
    ) -> int:
        """See `WidthSearch`: training, and slimming along an assumed path."""
        graph = self._check_graph(Blueprint(setting), budget_macs)
        options = self.options(graph)
        step = step_macs(graph, options, random_subnets=self.random_subnets)
        trained = round(counts.per_epoch * recipe.search_epochs * step)
        images = self.images(counts.evaluation)
        path = assumed_path(graph, options, budget_macs)
        slimmed = path_macs(
            graph,
            options,
            path,
            images=images,
            chunk=self.evaluation_batch_size,
            calibration=min(self.calibration_images, counts.per_epoch),
        )
        return trained + slimmed

    def _check_graph(self, blueprint: Blueprint, budget_macs: int) -> WidthGraph:
        """Return the graph of the supernet after checking the network and the budget."""
        check_searchable(blueprint.graph, algorithm=self.name)
        graph = blueprint.resize_graph(enlarge_channels(blueprint.graph, self.enlarge))
        check_budget(graph, self.options(graph), budget_macs, budget_macs, enlarge=self.enlarge)
        return graph

    def options(self, graph: WidthGraph) -> Grids:
        """Return the channel counts that each width variable of a supernet may have.

        Raises:
            InputError: The divisor is larger than any of them.
        """
        widest = max(graph.free[name].classes for name in graph.searchable)
        if self.divisor > widest:
            raise InputError(
                f"algorithm.divisor is {self.divisor:,}, but no layer of the supernet has more "
                f"than {widest:,} channels to divide; use a smaller one"
            )

        def rule(count: int) -> list[int]:
            return bin_grid(
                count,
                bins=self.bins,
                divisor=self.divisor,
                least_bins=self.least_bins,
                kind=self.grid,
            )

        return grids(graph, rule)

    def images(self, held_out: int) -> int:
        """Return the number of held-out images to evaluate on: a multiple of the batch if possible.

        Raises:
            InputError: There are too few.
        """
        if held_out < LEAST_IMAGES:
            raise InputError(
                f"algorithm is {self.name}, but only {held_out:,} images are held out and batch "
                f"statistics need at least {LEAST_IMAGES}; raise projection.fraction or "
                "dataset.validation"
            )
        images, batch = min(held_out, self.validation_images), self.evaluation_batch_size
        return images - images % batch if images > batch else images

    def _calibration(self, data: Split) -> Tensor | None:
        """Return the first training images of an epoch, augmented as in training.

        Interpretation: the original averages the statistics of a few batches; here they are
        computed over the images of these batches together.
        """
        if self.calibration_images == 0:
            return None
        batches = -(-self.calibration_images // data.train.batch_size)
        first = itertools.islice(data.train.epoch(0), batches)
        return torch.cat([images for images, _ in first])[: self.calibration_images]


def _digest(model: nn.Module) -> str:
    """Return a hash of the weights of a network: 16 hex digits."""
    tensors: Mapping[str, Tensor] = model.state_dict()
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().to("cpu", torch.float64).contiguous()
        digest.update(name.encode() + value.numpy().tobytes())
    return digest.hexdigest()[:16]
