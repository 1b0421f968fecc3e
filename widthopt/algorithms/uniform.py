"""The baseline: every multiplier is one, at no cost."""

from dataclasses import dataclass

from widthopt.algorithms import SearchContext, SearchResult
from widthopt.data import Counts, Split
from widthopt.networks.resize import Blueprint
from widthopt.setting import Recipe, Setting


@dataclass(frozen=True, slots=True)
class Uniform:
    """The baseline of every figure.

    Attributes:
        name: The algorithm's name in records.
    """

    name: str

    def search(
        self, setting: Setting, data: Split, *, budget_macs: int, context: SearchContext
    ) -> SearchResult:
        """See `widthopt.algorithms.WidthSearch`."""
        del data, budget_macs, context
        multipliers = dict.fromkeys(Blueprint(setting).graph.free, 1.0)
        return SearchResult(multipliers, overhead_macs=0, seconds=0.0, diagnostics={}, details={})

    def overhead_macs(
        self, setting: Setting, counts: Counts, *, recipe: Recipe, budget_macs: int
    ) -> int:
        """See `widthopt.algorithms.WidthSearch`."""
        del setting, counts, recipe, budget_macs
        return 0
