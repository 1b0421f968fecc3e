"""What one point of a run came to, as plain data; figures and tables see nothing else."""

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
"""The three curves of every figure of the paper, in the order they are shown."""


@dataclass(frozen=True, slots=True)
class WidthResult:
    """Channel counts for a target, and how they were found.

    Attributes:
        method: ``uniform``, ``direct`` or ``transfer``.
        seed: The run's seed.
        channels: Count of each free width variable of the target, in forward order.
        multipliers: The same as factors on the un-optimised target's channels.
        alpha: The paper's matching factor.
        macs: MACs of the optimised target, one forward pass on one image.
        budget_macs: MACs it was allowed.
        parameters: Parameters of the optimised target.
        overhead_macs: MACs spent on finding the widths, as counted.
        direct_overhead_macs: What a search on the target itself takes: as counted where this is
            one, in closed form otherwise.
        nominal_saving: How many times cheaper the proxy is, by the idealised law.
        search_seconds: Time that the search took.
        diagnostics: What went wrong in the search, by name; ``flags`` in files.
        searched: The multipliers that the search handed on, before extrapolation.
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
        """Part of the direct search's overhead that was saved, in [0, 1] for a cheaper proxy."""
        if self.direct_overhead_macs == 0:
            return 0.0
        return 1 - self.overhead_macs / self.direct_overhead_macs

    def to_plain(self) -> dict[str, Any]:
        """The plain data that files hold."""
        plain = asdict(self)
        plain["flags"] = plain.pop("diagnostics")  # the name since format 1 of the store
        return plain

    @classmethod
    def from_plain(cls, content: Mapping[str, Any]) -> "WidthResult":
        """Read what `to_plain` made.

        Raises:
            KeyError, TypeError: The content is something else.
        """
        rest = {name: value for name, value in content.items() if name != "flags"}
        return cls(**rest, diagnostics=content["flags"])


@dataclass(frozen=True, slots=True)
class Record:
    """One method at one seed, from search to evaluation.

    Attributes:
        network: The network's name.
        dataset: The data set's name.
        algorithm: The search's name.
        target: Width, depth, resolution and fraction of the target.
        proxy: The same of the setting that was searched; of the target where none was.
        extrapolation: How the widths were carried to another depth; empty where it is the same.
        found: The channel counts.
        top1: Test accuracy after the last epoch, in per cent.
        top5: Likewise, among the five likeliest classes.
        train_macs: MACs of the final training.
        train_seconds: Time that it took.
        train_loss: Mean training loss of its last epoch.
        stages: Folders of its stages below the root, by kind.
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
        """The plain data that files hold; `from_plain` reads it back."""
        return {**asdict(self), "found": self.found.to_plain()}


class Summary(NamedTuple):
    """A quantity over seeds: mean, sample standard deviation (0 for one seed), and how many."""

    mean: float
    std: float
    seeds: int

    @classmethod
    def of(cls, values: Iterable[float]) -> "Summary":
        """Summarise at least one value."""
        values = list(values)
        std = statistics.stdev(values) if len(values) > 1 else 0.0
        return cls(statistics.fmean(values), std, len(values))

    def __str__(self) -> str:
        return f"{self.mean:.1f}±{self.std:.1f}" if self.seeds > 1 else f"{self.mean:.1f}"


def by_method(records: Sequence[Record]) -> dict[str, list[Record]]:
    """Records of each method there is, in the order that methods are shown."""
    present = {method: [one for one in records if one.found.method == method] for method in METHODS}
    return {method: ones for method, ones in present.items() if ones}


def baseline(records: Sequence[Record]) -> list[Record]:
    """The un-optimised network at each seed: it is the same whatever searches beside it."""
    found: dict[int, Record] = {}
    for record in records:
        if record.found.method == "uniform":
            found.setdefault(record.found.seed, record)
    return list(found.values())


def by_algorithm(records: Sequence[Record]) -> dict[str, list[Record]]:
    """Records of each algorithm there is, in the order they come."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(record.algorithm, []).append(record)
    return groups


def from_plain(content: Mapping[str, Any]) -> Record:
    """A record from what `Record.to_plain` made of it.

    Raises:
        KeyError, TypeError: It is of something else.
    """
    return Record(**{**content, "found": WidthResult.from_plain(content["found"])})


def to_json(records: Sequence[Record]) -> str:
    """Records as JSON text; `from_json` reads it back."""
    plain = json.loads(json.dumps([record.to_plain() for record in records], allow_nan=False))
    content = {"format": FORMAT, "sha256": identity.digest(plain), "records": plain}
    return json.dumps(content, indent=2) + "\n"


def from_json(text: str | bytes, *, name: str = "record.json") -> list[Record]:
    """Read what `to_json` wrote.

    Raises:
        InputError: It is something else, or it was changed since.
    """
    try:
        content = json.loads(text)
        if content["format"] != FORMAT:
            raise InputError(
                f"{name} has format {content['format']}, but this version reads {FORMAT}; run again"
            )
        if not _as_written(content["records"], content["sha256"]):
            raise InputError(
                f"{name} is not what was written, but only that is shown; restore it, or run "
                "again, which makes it again from the runs that are done"
            )
        return [from_plain(one) for one in content["records"]]
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{name} is no record ({error}), but one is needed; run again") from error


def _as_written(plain: Any, digest: Any) -> bool:
    """Whether plain data is what this digest was made of."""
    try:
        return bool(identity.digest(plain) == digest)
    except InputError:  # a number that is not finite
        return False


def read_channels(path: Path) -> dict[str, int]:
    """Channel counts from a file: ``{"channels": {name: count}}``, or that table alone.

    Raises:
        InputError: There is no such file, or it holds something else.
    """
    try:
        content = json.loads(path.read_text("utf-8"))
        table = content.get("channels", content)
        return {str(name): _whole(count) for name, count in table.items()}
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(
            f"--channels is {path}, but channel counts cannot be read from it ({error}); give a "
            "JSON file such as a run's channels/transfer-seed0.json"
        ) from error


def _whole(value: Any) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    raise ValueError(f"{value} is not a whole number")
