"""Groups records by panel, series and point of the paper's figures.

A *source* is the searched setting, given by its values on the axis of the figure. A *series* is one
line of a panel: an algorithm or an extrapolation strategy.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from widthopt.records import Record


Axis = Literal["width", "depth", "resolution", "fraction", "compound"]
By = Literal["algorithm", "extrapolation"]
Source = tuple[float, ...]

AXES = ("width", "depth", "resolution", "fraction")
"""The axes of a setting, in the order of the paper."""


@dataclass(frozen=True, slots=True)
class Group:
    """The records of one panel: one network, data set and target.

    Attributes:
        dataset: The data set's name.
        target: The target's values.
        uniform: The records of the baseline, one for each seed.
        searched: The records of searches, one for each point and seed.
        clashes: Number of records left out because another record has the same point and seed.
    """

    dataset: str
    target: Mapping[str, float]
    uniform: list[Record]
    searched: list[Record]
    clashes: int

    def series(self, axis: Axis, by: By) -> dict[str, dict[Source, list[Record]]]:
        """Return the records by series and source.

        Series are sorted by name, and sources in descending order. A record that needed no
        extrapolation belongs to all strategies of its algorithm. Each strategy of an algorithm is
        a separate series.
        """
        result = {}
        algorithms = sorted({record.algorithm for record in self.searched})
        for algorithm in algorithms:
            group = [record for record in self.searched if record.algorithm == algorithm]
            strategies = sorted({record.extrapolation for record in group} - {""})
            for strategy in strategies or [""]:
                if by == "algorithm":
                    name = f"{algorithm}, {strategy}" if len(strategies) > 1 else algorithm
                else:
                    name = strategy or "same depth"
                    name = f"{algorithm}, {name}" if len(algorithms) > 1 else name
                records = [r for r in group if r.extrapolation in {"", strategy}]
                points = sorted({source_of(record, axis) for record in records}, reverse=True)
                result[name] = {
                    point: [record for record in records if source_of(record, axis) == point]
                    for point in points
                }
        return result

    def direct(self, axis: Axis) -> Source:
        """Return the source that equals the target."""
        return _values(self.target, axis)


def is_direct(record: Record) -> bool:
    """Return whether the target itself was searched."""
    return record.found.method == "direct" or not _differing(record)


def source_of(record: Record, axis: Axis) -> Source:
    """Return the searched setting on an axis; for the compound projection on all four axes."""
    return _values(record.target if is_direct(record) else record.proxy, axis)


def source_words(source: Source, axis: Axis) -> str:
    """Return a source as text: ``0.312``, ``5%`` or ``0.312, 1, 64, 5%``."""
    names = AXES if axis == "compound" else (axis,)
    words = [
        f"{100 * value:g}%" if name == "fraction" else f"{value:g}"
        for name, value in zip(names, source, strict=True)
    ]
    return ", ".join(words)


def groups(records: Sequence[Record], *, network: str, axis: Axis | None = None) -> list[Group]:
    """Return the panels of a network, by data set and target in the order of the records.

    The records may belong to several figures. Only searches that are projected along the axis are
    kept, and only targets with such a search; if there are none, all targets.

    Args:
        records: Records of any networks, in any order; they may repeat.
        network: The name of the network.
        axis: The axis of the figure; None keeps all searches.
    """
    targets = _by_target(records, network)
    wanted = [group for group in targets if any(_is_about(record, axis) for record in group)]
    searched = [group for group in targets if any(_is_searched(record) for record in group)]
    result = [_group(items, axis) for items in wanted or searched or targets]
    return [group for group in result if group.uniform or group.searched]


def direct_groups(records: Sequence[Record], *, network: str) -> list[Group]:
    """Return the records of every target of a network: the baseline and direct searches."""
    selected = [record for record in records if is_direct(record) or not _is_searched(record)]
    return [_group(items, None) for items in _by_target(selected, network)]


def _by_target(records: Sequence[Record], network: str) -> list[list[Record]]:
    """Return the records of a network by data set and target, in their order."""
    targets: dict[tuple[object, ...], list[Record]] = {}
    for record in records:
        if record.network == network:
            key = (record.dataset, *sorted(record.target.items()))
            targets.setdefault(key, []).append(record)
    return list(targets.values())


def _group(records: Sequence[Record], axis: Axis | None) -> Group:
    uniform: dict[tuple[object, ...], Record] = {}
    searched: dict[tuple[object, ...], Record] = {}
    clashes = 0
    for record in records:
        if _is_searched(record):
            if axis in AXES and _differing(record) - {axis} and not is_direct(record):
                continue
            source = source_of(record, "compound")
            key = (record.algorithm, record.extrapolation, source, record.found.seed)
            first = searched.setdefault(key, record)
        else:
            first = uniform.setdefault((record.found.seed,), record)
        clashes += (record.top1, record.found.channels) != (first.top1, first.found.channels)
    first = records[0]
    return Group(
        first.dataset, first.target, list(uniform.values()), list(searched.values()), clashes
    )


def _is_searched(record: Record) -> bool:
    return record.found.method != "uniform"


def _is_about(record: Record, axis: Axis | None) -> bool:
    """Return whether the target of a record belongs to the figure of an axis."""
    if axis is None or not _is_searched(record):
        return _is_searched(record)
    if is_direct(record):
        return False
    return len(_differing(record)) > 1 if axis == "compound" else _differing(record) == {axis}


def _differing(record: Record) -> set[str]:
    return {name for name, value in record.target.items() if record.proxy[name] != value}


def _values(setting: Mapping[str, float], axis: Axis) -> Source:
    return tuple(setting[name] for name in (AXES if axis == "compound" else (axis,)))


def panel_title(label: str, network: str, group: Group | None, *, alone: bool) -> str:
    """Return a title: ``(3a) resnet18``, with data set and target if there are several groups."""
    name = f"({label}) {network}" if label else network
    if group is None or alone:
        return name
    target = source_words(_values(group.target, "compound"), "compound")
    return f"{name}, {group.dataset}, target {target}"


def panels(
    records: Sequence[Record], labels: Mapping[str, str], axis: Axis | None = None
) -> list[tuple[str, str, Group | None]]:
    """Return network, title and group of each panel; None for a network without records."""
    result: list[tuple[str, str, Group | None]] = []
    for network, label in labels.items():
        items: Sequence[Group | None] = groups(records, network=network, axis=axis) or [None]
        alone = len(items) == 1
        result += [
            (network, panel_title(label, network, item, alone=alone), item) for item in items
        ]
    return result


def clash_notes(shown: Sequence[tuple[str, str, Group | None]]) -> list[str]:
    """Return a sentence for each panel that leaves records out."""
    return [
        f"{title}: records that repeat a point and seed with another result: {group.clashes}; "
        "the first is shown."
        for _, title, group in shown
        if group and group.clashes
    ]
