"""The extrapolation E: from the proxy's multipliers to the target's channel counts.

If the target is deeper, the dimensions are matched first, by stage and role. A *role* is the
name of a width variable within its block. Then alpha is solved for the budget.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Literal, NamedTuple

from widthopt.errors import InputError, check_value
from widthopt.widthgraph import WidthGraph
from widthopt.widths import Match, match_macs


class _Place(NamedTuple):
    """The place of a width variable: stage and block of its first writer, and its role.

    For a variable outside all stages, ``stage`` and ``role`` are empty and ``block`` is its number
    among such variables.
    """

    stage: str
    block: int
    role: str


@dataclass(frozen=True, slots=True)
class Extrapolation:
    """Turns the multipliers of a search into channel counts of the target.

    Attributes:
        strategy: ``stack_average_block`` or ``stack_last_block``; see `stack_blocks`.
        round_to: Channel counts are multiples of this.
    """

    strategy: Literal["stack_average_block", "stack_last_block"]
    round_to: int

    def __post_init__(self) -> None:
        check_value(
            "extrapolation.round_to",
            self.round_to,
            holds=self.round_to >= 1,
            rule="it must be an integer of at least 1; use 1, or 8 for tensor cores",
        )

    def __call__(
        self,
        multipliers: Mapping[str, float],
        *,
        source: WidthGraph,
        target: WidthGraph,
        budget_macs: int,
    ) -> Match:
        """Return E(w) = alpha * M_dim(w) at the budget of the target (paper section 3.3).

        Args:
            multipliers: Multiplier of each free width variable of the searched network.
            source: The searched network.
            target: The network to size, at the resolution of the budget.
            budget_macs: Upper bound on its MACs.

        Raises:
            InputError: See `stack_blocks` and `widthopt.widths.match_macs`.
        """
        stacked = stack_blocks(multipliers, source=source, target=target, strategy=self.strategy)
        return match_macs(target, stacked, budget_macs=budget_macs, round_to=self.round_to)


def stack_blocks(
    multipliers: Mapping[str, float], *, source: WidthGraph, target: WidthGraph, strategy: str
) -> dict[str, float]:
    """Return M_dim: a multiplier for each free width variable of a network with deeper stages.

    Interpretation: the blocks of the searched network keep their multipliers and places. Each
    block after them gets, for each role, the multiplier of the last block of the stage
    (``stack_last_block``), or the mean over the blocks of the stage except the first, whose
    input comes from another stage (``stack_average_block``). With two blocks in a stage, as in
    ResNet18, both strategies agree. If the stage was searched with one block, that block is
    stacked. A variable that does not belong to a single block (stem, residual stream, head)
    keeps its multiplier.

    Args:
        multipliers: Multiplier of each free width variable of ``source``.
        source: The searched network.
        target: The network that gets the multipliers; only the depths of its stages differ.
        strategy: ``stack_average_block`` or ``stack_last_block``.

    Raises:
        InputError: A stage of the target is shallower than the searched one, or a variable
            of the target has no counterpart.

    Source: paper section 3.3.
    """
    depths = _searched_depths(source, target)
    known = {place: multipliers[name] for name, place in _places(source).items()}
    result = {}
    for name, place in _places(target).items():
        depth = depths.get(place.stage, 0)
        if place in known:
            result[name] = known[place]
            continue
        first = 1 if strategy == "stack_average_block" and depth > 1 else 0
        first = depth - 1 if strategy == "stack_last_block" else first
        blocks = [place._replace(block=block) for block in range(first, depth)]
        stacked = [known[block] for block in blocks if block in known]
        if not stacked:
            raise InputError(
                f"extrapolation.strategy is {strategy}, but the width variable `{name}` of the "
                "target has no counterpart in the searched network; search at the target's depth"
            )
        result[name] = fmean(stacked)
    return result


def _searched_depths(source: WidthGraph, target: WidthGraph) -> dict[str, int]:
    """Return the number of blocks of each stage of the searched network, by stage name."""
    depths = {stage.name: len(stage.blocks) for stage in source.stages}
    for stage in target.stages:
        if len(stage.blocks) < depths.get(stage.name, 0):
            raise InputError(
                f"projection.depth is too large: stage `{stage.name}` has {depths[stage.name]} "
                f"blocks in the proxy, but {len(stage.blocks)} in the target; use a proxy that is "
                "at most as deep as its target"
            )
    return depths


def _places(graph: WidthGraph) -> dict[str, _Place]:
    """Return the place of each free width variable.

    Variables outside all stages are matched by their order, because the names of modules behind
    a deepened stage change (``features.18.0`` of MobileNetV2 is ``features.48.0`` at depth 3).
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
