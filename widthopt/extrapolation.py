"""The extrapolation E: from the proxy's multipliers to the target's channel counts.

First the dimensions are matched, where the target is deeper, by stage and role: a *role* is
the name that a width variable has inside its block. Then alpha is solved for the budget.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Literal, NamedTuple

from widthopt.errors import InputError
from widthopt.widthgraph import WidthGraph
from widthopt.widths import Match, match_macs


class _Place(NamedTuple):
    """Where a width variable lies: stage and block of its first writer, and its role.

    Outside all stages, ``stage`` and ``role`` are empty and ``block`` counts such variables.
    """

    stage: str
    block: int
    role: str


@dataclass(frozen=True, slots=True)
class Extrapolation:
    """How found multipliers become channel counts of the target.

    Attributes:
        strategy: ``stack_average_block`` or ``stack_last_block``; see `stack_blocks`.
        round_to: Channel counts are multiples of this.
    """

    strategy: Literal["stack_average_block", "stack_last_block"]
    round_to: int

    def __post_init__(self) -> None:
        if self.round_to < 1:
            raise InputError(
                f"extrapolation.round_to is {self.round_to}, but channel counts are multiples of "
                "a whole number from 1 up; use 1, or 8 for tensor cores"
            )

    def __call__(
        self,
        found: Mapping[str, float],
        *,
        source: WidthGraph,
        target: WidthGraph,
        budget_macs: int,
    ) -> Match:
        """E(w) = alpha * M_dim(w) at the target's budget (paper section 3.3).

        Args:
            found: Multiplier of each free width variable of the searched network.
            source: The searched network.
            target: The network to size, at the resolution of the budget.
            budget_macs: MACs that must not be exceeded.
        """
        stacked = stack_blocks(found, source=source, target=target, strategy=self.strategy)
        return match_macs(target, stacked, budget_macs=budget_macs, round_to=self.round_to)


def stack_blocks(
    found: Mapping[str, float], *, source: WidthGraph, target: WidthGraph, strategy: str
) -> dict[str, float]:
    """M_dim: a multiplier for each free width variable of a network with deeper stages.

    Reading: blocks that the search has seen keep their multipliers and their places. Each
    block beyond them gets, role by role, that of the stage's last block
    (``stack_last_block``), or the mean over the stage's blocks except the first, whose input
    comes from another stage (``stack_average_block``); with two blocks to a stage, as in
    ResNet18, the two agree. Where a stage was searched with one block, that block is stacked.
    A variable that no single block owns (stem, residual stream, head) is carried over.

    Args:
        found: Multiplier of each free width variable of ``source``.
        source: The searched network.
        target: The network to carry them to; only its stages' depths differ.
        strategy: ``stack_average_block`` or ``stack_last_block``.

    Raises:
        InputError: A stage of the target is shallower than the searched one, or a variable
            of the target has no counterpart.

    Source: paper section 3.3.
    """
    depths = _searched_depths(source, target)
    known = {place: found[name] for name, place in _places(source).items()}
    result = {}
    for name, place in _places(target).items():
        seen = depths.get(place.stage, 0)
        if place in known:
            result[name] = known[place]
            continue
        first = 1 if strategy == "stack_average_block" and seen > 1 else 0
        first = seen - 1 if strategy == "stack_last_block" else first
        blocks = [known.get(place._replace(block=block)) for block in range(first, seen)]
        stacked = [one for one in blocks if one is not None]
        if not stacked:
            raise InputError(
                f"extrapolation.strategy is {strategy}, but the target's width variable `{name}` "
                "has no counterpart in the searched network; search at the target's depth"
            )
        result[name] = fmean(stacked)
    return result


def _searched_depths(source: WidthGraph, target: WidthGraph) -> dict[str, int]:
    """Blocks that the search has seen of each stage, by stage name."""
    seen = {stage.name: len(stage.blocks) for stage in source.stages}
    for stage in target.stages:
        if len(stage.blocks) < seen.get(stage.name, 0):
            raise InputError(
                f"projection.depth is too large: the proxy's stage `{stage.name}` has "
                f"{seen[stage.name]} blocks, but the target's has {len(stage.blocks)}; a proxy is "
                "at most as deep as its target"
            )
    return seen


def _places(graph: WidthGraph) -> dict[str, _Place]:
    """The place of each free width variable.

    Outside all stages it is the order, from the first: module names behind a deepened stage
    move (MobileNetV2's ``features.18.0`` is ``features.48.0`` at depth 3).
    """
    blocks = {
        block: (stage.name, number)
        for stage in graph.stages
        for number, block in enumerate(stage.blocks)
    }
    places: dict[str, _Place] = {}
    outside = 0
    for name in graph.free:
        parts = name.split(".")
        prefixes = [".".join(parts[:length]) for length in range(len(parts), 0, -1)]
        inside = next((prefix for prefix in prefixes if prefix in blocks), None)
        if inside is not None:
            places[name] = _Place(*blocks[inside], name[len(inside) + 1 :])
        else:
            places[name] = _Place("", outside, "")
            outside += 1
    return places
