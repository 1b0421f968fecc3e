"""The table at the end of a run: widths, cost and accuracy of each method."""

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.table import Table

from widthopt.records import Record, Summary, baseline, by_algorithm, by_method


def table(records: Sequence[Record]) -> Table:
    """Return a row for each method, with means over seeds; it fits a terminal of 80 columns.

    ``channels`` is the range over layers and seeds. ``overhead`` is in counted MACs, ``nominal`` is
    the saving factor of the idealised law, and ``saved`` is relative to a search on the target
    itself. ``seconds`` are those of search and final training. With several algorithms each has its
    own rows, and the table has fewer columns.
    """
    groups = by_algorithm(records)
    several = len(groups) > 1
    result = new_table(records)
    names = ["method", "channels", "MACs", "params", "overhead", "nominal", "saved"]
    names += ["top-1 %", "seconds"]
    if several:
        names = ["algorithm", *(name for name in names if name not in {"params", "nominal"})]
    for name in names:
        left = name in {"algorithm", "method", "channels"}
        result.add_column(name, justify="left" if left else "right", no_wrap=True)
    plain = baseline(records)
    rows = [("-", "uniform", plain)] if plain else []
    for algorithm, group in groups.items():
        of_methods = by_method(group).items()
        rows += [(algorithm, method, items) for method, items in of_methods if method != "uniform"]
    for algorithm, method, items in rows:
        cells = {"algorithm": algorithm, **_cells(method, items)}
        result.add_row(*(cells[name] for name in names))
    return result


def new_table(records: Sequence[Record]) -> Table:
    """Return an empty table whose title has the network, the data set and the number of seeds."""
    first = records[0]
    seeds = len({record.found.seed for record in records})
    return Table(
        title=f"{first.network} on {first.dataset}, {seeds} seed{'s' if seeds > 1 else ''}",
        title_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )


def _cells(method: str, records: Sequence[Record]) -> dict[str, str]:
    """Return the cells of one method of one algorithm, by column name."""
    found = [record.found for record in records]
    search = Summary.of(item.search_seconds for item in found).mean
    train = Summary.of(record.train_seconds for record in records).mean
    overhead = Summary.of(item.overhead_macs for item in found).mean
    searched = overhead > 0
    return {
        "method": method,
        "channels": channels(records),
        "MACs": short(Summary.of(run.macs for run in found).mean),
        "params": short(Summary.of(item.parameters for item in found).mean),
        "overhead": short(overhead) if searched else "-",
        "nominal": f"{found[0].nominal_saving:.3g}x" if searched else "-",
        "saved": f"{100 * Summary.of(item.saved for item in found).mean:.1f}%" if searched else "-",
        "top-1 %": str(Summary.of(record.top1 for record in records)),
        "seconds": f"{search:.0f}+{train:.0f}",
    }


def channels(records: Sequence[Record]) -> str:
    """Return the smallest and the largest number of channels in the records, as text."""
    counts = [count for record in records for count in record.found.channels.values()]
    return f"{min(counts)}-{max(counts)}"


def short(count: float) -> str:
    """Return a count with a unit prefix: ``1.81G``."""
    for size, prefix in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.3g}{prefix}"
    return f"{count:.0f}"
