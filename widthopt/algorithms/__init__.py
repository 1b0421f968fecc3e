"""The protocol of width search algorithms, and their contexts and results.

``conf/algorithm`` selects an algorithm by its ``_target_``. A new algorithm is one Python file,
here or in any importable module, and one conf file.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from widthopt.data import Counts, Split
from widthopt.errors import InputError
from widthopt.setting import Recipe, Runtime, Setting
from widthopt.training.loop import Log
from widthopt.widthgraph import WidthGraph, first_names


@dataclass(frozen=True, slots=True)
class SearchContext:
    """Context of a search: how to train, where to compute, and where to write.

    Attributes:
        recipe: Hyperparameters of the training; a search runs for ``search_epochs``.
        runtime: Device, precision and memory format.
        seed: Seed of the run.
        folder: Folder for checkpoints and other files of the search.
        log: Receives the metrics of the training.
    """

    recipe: Recipe
    runtime: Runtime
    seed: int
    folder: Path
    log: Log | None = None


@dataclass(frozen=True, slots=True)
class SearchResult:
    """Result of a width search.

    Attributes:
        multipliers: For each free width variable a factor on the channels of the network N, which
            is not enlarged. They are a direction, not matched to a budget.
        overhead_macs: MACs of all forward and backward passes of the search.
        seconds: Wall time of the search.
        diagnostics: Warnings about the search by name; ``flags`` in files.
        details: Further values to record, as plain data.
    """

    multipliers: dict[str, float]
    overhead_macs: int
    seconds: float
    diagnostics: Mapping[str, Any]
    details: Mapping[str, Any]

    def to_plain(self) -> dict[str, Any]:
        """Return plain data for the store."""
        plain: dict[str, Any] = asdict(self)
        plain["flags"] = plain.pop("diagnostics")  # the name since format 1 of the store
        return plain

    @classmethod
    def from_plain(cls, content: Mapping[str, Any]) -> "SearchResult":
        """Create a result from the data that `to_plain` returned.

        Raises:
            KeyError, TypeError: The content has another form.
        """
        rest = {name: value for name, value in content.items() if name != "flags"}
        return cls(**rest, diagnostics=content["flags"])


class WidthSearch(Protocol):
    """A width optimisation algorithm A (paper section 3.1)."""

    @property
    def name(self) -> str:
        """The algorithm's name in records, figures and messages."""
        ...

    def search(
        self, setting: Setting, data: Split, *, budget_macs: int, context: SearchContext
    ) -> SearchResult:
        """Optimise the widths of the setting's network under a test-time budget.

        Args:
            setting: The proxy, or the target itself.
            data: Its training images, and images held out of them for validation.
            budget_macs: MACs that the optimised network of this setting may cost.
            context: Context of the search.

        Raises:
            InputError: The algorithm cannot search this network.
        """
        ...

    def overhead_macs(
        self, setting: Setting, counts: Counts, *, recipe: Recipe, budget_macs: int
    ) -> int:
        """Estimate the overhead of `search` in closed form.

        Raises:
            InputError: The algorithm cannot search this network under this budget.
        """
        ...


def check_searchable(graph: WidthGraph, *, algorithm: str) -> None:
    """Check that some free width variable has BatchNorm scales on all of its channels.

    Args:
        graph: The graph of the network.
        algorithm: The algorithm's name, for the message.

    Raises:
        InputError: No variable has.
    """
    if graph.searchable:
        return
    names = first_names(list(graph.free))
    raise InputError(
        f"algorithm is {algorithm}, but it searches by BatchNorm scales and no free width variable "
        f"of the network has them on all of its channels ({names}); use a network with BatchNorm, "
        "or algorithm=uniform"
    )
