"""Width optimisation algorithms A, all behind one door.

``conf/algorithm`` chooses one by its ``_target_``: a new algorithm is one file here, or
anywhere, and one conf file.
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
    """What a search runs under, beside its setting, data and budget.

    Attributes:
        recipe: How networks are trained; ``search_epochs`` is for searches.
        runtime: Where and how to compute.
        seed: The run's seed.
        folder: Where checkpoints and what else is worth keeping go.
        log: Where its training writes what it sees.
    """

    recipe: Recipe
    runtime: Runtime
    seed: int
    folder: Path
    log: Log | None = None


@dataclass(frozen=True, slots=True)
class SearchResult:
    """What a width search hands on: the widths, what they cost to find, and how it went.

    Attributes:
        multipliers: A factor on the channels of the un-enlarged network N for each free width
            variable; a direction, not yet matched to a budget.
        overhead_macs: MACs of all forward and backward passes of the search.
        seconds: Time that the search took, of all processes that took part.
        diagnostics: What went wrong, by name; ``flags`` in files.
        details: What else is worth recording, as plain data.
    """

    multipliers: dict[str, float]
    overhead_macs: int
    seconds: float
    diagnostics: Mapping[str, Any]
    details: Mapping[str, Any]

    def to_plain(self) -> dict[str, Any]:
        """The plain data that the store holds."""
        plain: dict[str, Any] = asdict(self)
        plain["flags"] = plain.pop("diagnostics")  # the name since format 1 of the store
        return plain

    @classmethod
    def from_plain(cls, content: Mapping[str, Any]) -> "SearchResult":
        """Read what `to_plain` made.

        Raises:
            KeyError, TypeError: The content is something else.
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
            context: What it runs under.

        Raises:
            InputError: The algorithm cannot search this network.
        """
        ...

    def overhead_macs(
        self, setting: Setting, counts: Counts, *, recipe: Recipe, budget_macs: int
    ) -> int:
        """What `search` will cost, in closed form (design, section 9).

        Raises:
            InputError: The algorithm cannot search this network under this budget.
        """
        ...


def check_searchable(graph: WidthGraph, *, algorithm: str) -> None:
    """Raise unless some free width variable has a BatchNorm, which is what searches go by.

    Args:
        graph: The network's.
        algorithm: The algorithm's name, for the message.

    Raises:
        InputError: None has.
    """
    if graph.searchable:
        return
    names = first_names(list(graph.free))
    raise InputError(
        f"algorithm is {algorithm}, but it searches by BatchNorm scales and no free width variable "
        f"of the network has them on all of its channels ({names}); use a network with BatchNorm, "
        "or algorithm=uniform"
    )
