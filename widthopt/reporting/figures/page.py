"""One self-contained HTML page with all figures and tables, without scripts or other files."""

import base64
import html
import re
from collections.abc import Sequence
from typing import NamedTuple

from widthopt.request import FigureTable


STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff;
  max-width: 64rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.6rem; line-height: 1.2; }
h2 { font-size: 1.25rem; margin-top: 2.5rem; border-top: 1px solid #ccc; padding-top: 1rem; }
a { color: #005a8f; }
img { max-width: 100%; height: auto; display: block; margin: 1rem 0; }
blockquote { margin: 0.5rem 0; padding-left: 1rem; border-left: 3px solid #0072b2; }
.scroll { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: 0.8rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding: 0.3rem 0; }
th, td { padding: 0.2rem 0.6rem; border-bottom: 1px solid #ddd; text-align: left;
  white-space: nowrap; }
th { border-bottom: 2px solid #777; vertical-align: bottom; white-space: normal; }
td.number { text-align: right; }
tbody tr:nth-child(even) { background: #f6f6f6; }
.notes { font-size: 0.9rem; }
summary { cursor: pointer; }
details li { font-family: ui-monospace, monospace; font-size: 0.8rem; overflow-wrap: anywhere; }
@media print {
  body { max-width: none; padding: 0; font-size: 10pt; }
  img, blockquote, tr { break-inside: avoid; }
  h2, caption { break-after: avoid; }
  .scroll { overflow: visible; }
  table { font-size: 7pt; }
  th, td { padding: 0.1rem 0.25rem; white-space: normal; }
  details::details-content { content-visibility: visible; height: auto; }
}
"""


class Section(NamedTuple):
    """A figure or table on the page.

    Attributes:
        name: The stem of the file names; also the id of the section on the page.
        title: The heading.
        claim: The claim of the paper; may be empty.
        images: The pictures, as the contents of PNG files.
        grids: The tables.
        missing: The names of points without records.
    """

    name: str
    title: str
    claim: str
    images: list[bytes]
    grids: list[FigureTable]
    missing: list[str]


def page(title: str, sections: Sequence[Section]) -> str:
    """Return the page as HTML text, with a table of contents; pictures are embedded."""
    contents = "\n".join(
        f'<li><a href="#{_address(section)}">{html.escape(section.title)}</a>{_count(section)}</li>'
        for section in sections
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<h1>{html.escape(title)}</h1>
<nav aria-label="Contents">
<ul>
{contents}
</ul>
</nav>
<main>
{"".join(_section(section) for section in sections)}</main>
</body>
</html>
"""


def _section(section: Section) -> str:
    lines = [f'<section id="{_address(section)}">', f"<h2>{html.escape(section.title)}</h2>"]
    if section.claim:
        lines.append(f"<blockquote>Claim: {html.escape(section.claim)}</blockquote>")
    for number, image in enumerate(section.images, 1):
        data = base64.b64encode(image).decode("ascii")
        more = f", picture {number}" if len(section.images) > 1 else ""
        alternative = html.escape(section.title + more)
        lines.append(f'<img src="data:image/png;base64,{data}" alt="{alternative}">')
    # The claim is also a note of the table; the page shows it once.
    lines += [grid.html(omit=section.claim) for grid in section.grids]
    if section.missing:
        points = "".join(f"<li>{html.escape(item)}</li>" for item in section.missing)
        lines.append(
            f"<details><summary>Missing: {_points(section)}</summary><ul>{points}</ul></details>"
        )
    return "\n".join([*lines, "</section>", ""])


def _points(section: Section) -> str:
    count = len(section.missing)
    return f"{count} point{'s' if count > 1 else ''}"


def _count(section: Section) -> str:
    return f" ({_points(section)} missing)" if section.missing else ""


def _address(section: Section) -> str:
    """Return the id of a section; characters that an id may not have become dashes."""
    return re.sub(r"[^\w.-]+", "-", section.name)
