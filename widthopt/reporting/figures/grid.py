"""Tables of text cells, written as CSV, Markdown or HTML."""

import csv
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass


NOTHING = "-"
"""The content of a cell without a value."""


@dataclass(frozen=True, slots=True)
class TextTable:
    """A table of text cells.

    Attributes:
        title: The title of the table.
        columns: The column names.
        rows: The cells; each row has one cell for each column.
        notes: Sentences below the table. The CSV form does not contain them.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        assert all(len(row) == len(self.columns) for row in self.rows)

    def csv(self) -> str:
        """Return the column names and the rows as CSV text."""
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([self.columns, *self.rows])
        return text.getvalue()

    def markdown(self) -> str:
        """Return title, table and notes as Markdown; text in cells is escaped."""
        lines = [
            f"**{_escape(self.title)}**",
            "",
            _line(self.columns),
            _line(["---"] * len(self.columns)),
            *(_line(row) for row in self.rows),
        ]
        if self.notes:
            lines += ["", *(f"- {_escape(note)}" for note in self.notes)]
        return "\n".join(lines) + "\n"

    def html(self, *, omit: str = "") -> str:
        """Return title, table and notes as an HTML fragment; all text is escaped.

        Args:
            omit: A note to leave out, since the page shows it elsewhere.
        """
        rows = [
            "<tr>" + "".join(f"<td{_kind(cell)}>{html.escape(cell)}</td>" for cell in row) + "</tr>"
            for row in self.rows
        ]
        heads = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in self.columns)
        lines = [
            '<div class="scroll" tabindex="0">',
            "<table>",
            f"<caption>{html.escape(self.title)}</caption>",
            f"<thead><tr>{heads}</tr></thead>",
            "<tbody>",
            *rows,
            "</tbody>",
            "</table>",
            "</div>",
        ]
        notes = [f"<li>{html.escape(note)}</li>" for note in self.notes if note != omit]
        if notes:
            lines += ['<ul class="notes">', *notes, "</ul>"]
        return "\n".join(lines) + "\n"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(_escape(cell) for cell in cells)} |"


def _escape(text: str) -> str:
    """Escape text so that Markdown shows it unchanged, in one line."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def _kind(cell: str) -> str:
    """Return the class attribute that aligns numbers on the right; empty for other cells."""
    number = cell == NOTHING or cell.lstrip("+-")[:1].isdigit()
    return ' class="number"' if number else ""
