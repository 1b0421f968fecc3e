"""Similarity of widths in numbers, as in the paper's table 1 and figure A2."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations

from rich.table import Table

from widthopt.records import Record, Summary, by_algorithm, by_method
from widthopt.reporting.figures.summary import new_table
from widthopt.widths import cosine


def table(records: Sequence[Record]) -> Table:
    """Return the cosine similarities of the target's multipliers, by algorithm and method.

    ``seeds`` compares pairs of seeds of one method. ``direct`` compares with the direct search at
    the same seed, and ``uniform`` with the baseline. Cells have the mean, and the minimum in
    brackets. ``budget`` is the number of searches that reached their budget.

    Source: paper appendix D.
    """
    result = new_table(records)
    for name in ("algorithm", "method"):
        result.add_column(name, no_wrap=True)
    for name in ("seeds", "direct", "uniform", "budget"):
        result.add_column(name, justify="right", no_wrap=True)
    groups = {name: by_method(group) for name, group in by_algorithm(records).items()}
    for algorithm, methods in groups.items():
        direct = {record.found.seed: record for record in _direct(algorithm, groups)}
        for method, items in methods.items():
            if method == "uniform":
                continue
            reached = [
                record
                for record in items
                if record.found.diagnostics.get("budget_reached") is not False
            ]
            result.add_row(
                algorithm,
                method,
                _cosine_text(combinations(items, 2)),
                _cosine_text(
                    (record, direct[record.found.seed])
                    for record in items
                    if record.found.seed in direct
                )
                if method != "direct"
                else "-",
                _format(
                    cosine(record.found.multipliers, _uniform_multipliers(record))
                    for record in items
                ),
                f"{len(reached)} of {len(items)}",
            )
    return result


def _direct(
    algorithm: str, groups: Mapping[str, Mapping[str, Sequence[Record]]]
) -> Sequence[Record]:
    """Return the direct searches of an algorithm.

    The label of an algorithm may end with a proxy. Direct searches that several proxies share are
    labelled without it.
    """
    names = [name for name in groups if f"{algorithm} ".startswith(f"{name} ")]
    direct = [groups[name]["direct"] for name in sorted(names, key=len) if "direct" in groups[name]]
    return direct[-1] if direct else ()


def _uniform_multipliers(record: Record) -> dict[str, float]:
    return dict.fromkeys(record.found.multipliers, 1.0)


def _cosine_text(pairs: Iterable[tuple[Record, Record]]) -> str:
    return _format(
        cosine(first.found.multipliers, second.found.multipliers) for first, second in pairs
    )


def _format(values: Iterable[float]) -> str:
    values = list(values)
    if not values:
        return "-"
    mean = f"{Summary.of(values).mean:.3f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.3f})"
