"""Results of the points of a run as plain data, the only input of figures and tables."""

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from widthopt import identity
from widthopt.errors import InputError


FORMAT = 3
"""Version of the JSON form."""

METHODS = ("uniform", "direct", "transfer")
"""The three curves of every figure of the paper, in the order in which they are shown."""


@dataclass(frozen=True, slots=True)
class WidthResult:
    """Channel counts for a target, and the search that they come from.

    Attributes:
        method: ``uniform``, ``direct`` or ``transfer``.
        seed: The run's seed.
        channels: Count of each free width variable of the target, in forward order.
        multipliers: The channels as factors on those of the baseline (uniform widths).
        alpha: The matching factor of the paper.
        macs: MACs of the optimised target, for one forward pass on one image.
        budget_macs: Upper bound on them.
        parameters: Number of parameters of the optimised target.
        overhead_macs: MACs of the search, as counted.
        direct_overhead_macs: MACs of a search on the target itself: as counted for the method
            ``direct``, else estimated in closed form.
        nominal_saving: Factor by which the proxy is cheaper, by the idealised law.
        search_seconds: Duration of the search.
        diagnostics: Problems of the search, by name; ``flags`` in files.
        searched: The multipliers that the search returned, before extrapolation.
    """

    method: str
    seed: int
    channels: dict[str, int]
    multipliers: dict[str, float]
    alpha: float
    macs: int
    budget_macs: int
    parameters: int
    overhead_macs: int
    direct_overhead_macs: int
    nominal_saving: float
    search_seconds: float
    diagnostics: Mapping[str, Any]
    searched: dict[str, float]

    @property
    def saved(self) -> float:
        """The saved part of the direct search's overhead, in [0, 1] for a cheaper proxy."""
        if self.direct_overhead_macs == 0:
            return 0.0
        return 1 - self.overhead_macs / self.direct_overhead_macs

    def to_plain(self) -> dict[str, Any]:
        """Return the plain data that is written to files."""
        plain = asdict(self)
        plain["flags"] = plain.pop("diagnostics")  # the name in files since format 1
        return plain

    @classmethod
    def from_plain(cls, content: Mapping[str, Any]) -> "WidthResult":
        """Read the output of `to_plain`.

        Raises:
            KeyError, TypeError: The content is not a result.
        """
        rest = {name: value for name, value in content.items() if name != "flags"}
        return cls(**rest, diagnostics=content["flags"])


@dataclass(frozen=True, slots=True)
class Record:
    """One method at one seed, from search to evaluation.

    Attributes:
        network: The network's name.
        dataset: The data set's name.
        algorithm: The algorithm's name.
        target: Width, depth, resolution and fraction of the target.
        proxy: Width, depth, resolution and fraction of the searched setting; those of the target
            if there was no search.
        extrapolation: Strategy that extrapolates over depth; empty if the depths are equal.
        found: The channel counts.
        top1: Top-1 test accuracy after the last epoch, in per cent.
        top5: Top-5 test accuracy after the last epoch, in per cent.
        train_macs: MACs of the final training.
        train_seconds: Duration of the final training.
        train_loss: Mean training loss of its last epoch.
        stages: Folders of its stored results below the root, by kind.
    """

    network: str
    dataset: str
    algorithm: str
    target: Mapping[str, float]
    proxy: Mapping[str, float]
    extrapolation: str
    found: WidthResult
    top1: float
    top5: float
    train_macs: int
    train_seconds: float
    train_loss: float
    stages: Mapping[str, str]

    def to_plain(self) -> dict[str, Any]:
        """Return the plain data that is written to files; `from_plain` reads it."""
        return {**asdict(self), "found": self.found.to_plain()}


class Summary(NamedTuple):
    """Mean, sample standard deviation (0 for one seed) and number of seeds of a quantity."""

    mean: float
    std: float
    seeds: int

    @classmethod
    def of(cls, values: Iterable[float]) -> "Summary":
        """Return the summary of at least one value."""
        values = list(values)
        std = statistics.stdev(values) if len(values) > 1 else 0.0
        return cls(statistics.fmean(values), std, len(values))

    def __str__(self) -> str:
        return f"{self.mean:.1f}±{self.std:.1f}" if self.seeds > 1 else f"{self.mean:.1f}"


def by_method(records: Sequence[Record]) -> dict[str, list[Record]]:
    """Return the records of each method that has some, in the order of `METHODS`."""
    groups = {
        method: [record for record in records if record.found.method == method]
        for method in METHODS
    }
    return {method: group for method, group in groups.items() if group}


def baseline(records: Sequence[Record]) -> list[Record]:
    """Return one record of the baseline (uniform widths) for each seed.

    All algorithms share it, so their records of it are equal.
    """
    by_seed: dict[int, Record] = {}
    for record in records:
        if record.found.method == "uniform":
            by_seed.setdefault(record.found.seed, record)
    return list(by_seed.values())


def by_algorithm(records: Sequence[Record]) -> dict[str, list[Record]]:
    """Return the records of each algorithm, in the order of the records."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(record.algorithm, []).append(record)
    return groups


def from_plain(content: Mapping[str, Any]) -> Record:
    """Read the output of `Record.to_plain`.

    Raises:
        KeyError, TypeError: The content is not a record.
    """
    return Record(**{**content, "found": WidthResult.from_plain(content["found"])})


def to_json(records: Sequence[Record]) -> str:
    """Return records as a JSON string, which `from_json` reads.

    Raises:
        ValueError: A number is infinite or not a number.
    """
    plain = [record.to_plain() for record in records]
    return json.dumps(identity.seal("records", plain, format=FORMAT), indent=2) + "\n"


def from_json(text: str | bytes, *, name: str = "record.json") -> list[Record]:
    """Read the output of `to_json`.

    Args:
        text: The JSON string.
        name: Its name in messages.

    Raises:
        InputError: The string is not a list of records, or it was changed.
    """
    try:
        content = json.loads(text)
        if content["format"] != FORMAT:
            raise InputError(
                f"{name} has format {content['format']}, but this version reads {FORMAT}; run again"
            )
        if not identity.is_sealed(content, "records", format=FORMAT):
            raise InputError(
                f"{name} was changed after it was written, but only unchanged records are shown; "
                "restore it, or run again to build it from the stored results"
            )
        return [from_plain(record) for record in content["records"]]
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"{name} is not a list of records ({error}), but records are needed; run again"
        ) from error


def read_channels(path: Path) -> dict[str, int]:
    """Read channel counts from a file: ``{"channels": {name: count}}``, or only the mapping.

    Raises:
        InputError: There is no such file, or it has other content.
    """
    try:
        content = json.loads(path.read_text("utf-8"))
        counts = content.get("channels", content)
        return {str(name): _integer(count) for name, count in counts.items()}
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(
            f"--channels is {path}, but channel counts cannot be read from it ({error}); give a "
            "JSON file such as a run's channels/transfer-seed0.json"
        ) from error


def _integer(value: Any) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    raise ValueError(f"{value} is not an integer")
