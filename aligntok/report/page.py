"""One self-contained HTML file: text, pictures, plots and tables, readable from a phone to a wide screen and
on paper.

The promise: no script, no request, nothing outside the file (a content security policy in the page enforces
it), every text escaped, the same calls give the same bytes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Literal

from aligntok.errors import UserError
from aligntok.report import markup
from aligntok.report.markup import Better, Cell
from aligntok.report.plots import Plot
from aligntok.runtime.files import write_bytes

LARGEST_PLOT = 1.5  # CSS pixels per point: 9 pt letters grow to at most 13.5 px
# Whatever a text may smuggle in, nothing loads and nothing runs.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


@dataclass(frozen=True)
class Row:
    """A labelled strip of `count` pictures; `pixelated` keeps the hard edges of colour maps."""

    label: str
    png: bytes
    count: int = 1
    pixelated: bool = False

    def html(self) -> str:
        """The picture alone."""
        alt = f"{self.label or 'samples'}: {self.count} pictures"
        return markup.image(self.png, alt, "pixelated" if self.pixelated else "")


class Page:
    """Blocks in reading order; each belongs to the section opened last, the first ones to the header."""

    def __init__(self, title: str, subtitle: str = "") -> None:
        self.title = title
        self._header = [f"<h1>{escape(title)}</h1>"]
        if subtitle:
            self._header.append(f'<p class="subtitle">{markup.inline(subtitle)}</p>')
        self._sections: list[tuple[str, str, str, list[str]]] = []  # (anchor, title, opening HTML, blocks)

    def section(self, title: str, text: str = "", columns: Literal[1, 2, 3] = 1) -> None:
        """Open a section; its blocks stand in up to `columns` columns where the screen allows."""
        anchor = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-") or "section"
        taken = {section[0] for section in self._sections}
        if anchor in taken:
            anchor = next(f"{anchor}-{n}" for n in range(2, len(taken) + 3) if f"{anchor}-{n}" not in taken)
        opening = (
            f'<section id="{anchor}" aria-labelledby="{anchor}-title">\n<div class="intro">'
            f'<h2 id="{anchor}-title">{escape(title)}</h2><div>{markup.paragraphs(text)}</div></div>\n'
            f'<div class="body columns-{columns}">'
        )
        self._sections.append((anchor, title, opening, []))

    def text(self, text: str) -> None:
        """Paragraphs between other blocks."""
        self._add(f'<div class="wide">{markup.paragraphs(text)}</div>')

    def headline(self, numbers: Sequence[tuple[str, str, str]]) -> None:
        """The few numbers that matter, as (value, unit, what it is)."""
        items = [
            f"<div><dt>{markup.inline(what)}</dt><dd>{escape(value)}"
            + (f"<span>{escape(unit)}</span>" if unit else "")
            + "</dd></div>"
            for value, unit, what in numbers
        ]
        if items:
            self._add(f'<dl class="headline">{"".join(items)}</dl>')

    def picture(self, png: bytes, caption: str = "", alt: str = "", pixelated: bool = False) -> None:
        """One PNG at its own size, never wider than the page."""
        image = markup.image(png, alt or caption, "natural pixelated" if pixelated else "natural")
        self._add(f'<figure class="wide">{image}{markup.caption(caption)}</figure>')

    def rows(self, rows: Sequence[Row], caption: str = "", least: int = 48) -> None:
        """Strips under one another, for comparing down the columns; a narrow screen scrolls them together.

        `least` is the smallest width of one picture in CSS pixels.
        """
        cells = "".join(f'<div class="label">{escape(row.label)}</div>{row.html()}' for row in rows)
        width = least * max((row.count for row in rows), default=1)
        body = f'<div class="scroll"><div class="rows" style="--least:{width}px">{cells}</div></div>'
        self._add(f'<figure class="wide">{body}{markup.caption(caption)}</figure>')

    def cells(self, cells: Sequence[Row], heading: str = "", most: int = 110) -> None:
        """Labelled strips, as many beside one another as fit; `most` CSS pixels per picture."""
        items = "".join(
            f'<div style="--most:{most * cell.count}px">'
            + (f"<h3>{escape(cell.label)}</h3>" if cell.label else "")
            + f"{cell.html()}</div>"
            for cell in cells
        )
        heading = markup.caption(heading, "lead")
        self._add(f'<figure class="wide">{heading}<div class="cells">{items}</div></figure>')

    def plot(self, plot: Plot, caption: str = "") -> None:
        """A plot set inline, so that its ink follows the page."""
        if not plot.svg.startswith(b"<svg"):
            raise UserError(f"plot {plot.title!r}: expected SVG, got bytes that start with {plot.svg[:9]!r}")
        svg = plot.svg.decode()
        box = re.search(r'viewBox="0 0 ([\d.]+) ', svg)
        assert box is not None  # matplotlib writes one
        width = LARGEST_PLOT * float(box[1])
        named = f'<svg role="img" aria-label="{escape(plot.alt)}" style="max-width:{width:.0f}px"'
        svg = svg.replace("<svg", named, 1)
        note = f'<p class="note">{markup.inline(caption)}</p>' if caption else ""
        self._add(f'<figure class="plot">{markup.caption(plot.title, "lead")}{svg}{note}</figure>')

    def table(
        self,
        headers: Sequence[str],
        rows: Sequence[Sequence[Cell]],
        caption: str = "",
        highlight_best: Mapping[str, Better] | None = None,
        reference_rows: int = 0,
    ) -> None:
        """A table whose first column names the rows.

        `highlight_best` says for a header whether "max" or "min" is better; the first `reference_rows` rows
        do not compete.
        """
        for row in rows:
            if len(row) != len(headers):
                raise UserError(f"table: row {list(row)} does not fit under the headers {list(headers)}")
        best = [(highlight_best or {}).get(header) for header in headers]
        columns = [markup.column([row[i] for row in rows], best[i], reference_rows) for i in range(1, len(headers))]
        head = "".join(
            f'<th scope="col">{markup.inline(header)}{markup.arrow(better)}</th>'
            for header, better in zip(headers, best, strict=True)
        )
        names = [f'<th scope="row">{markup.inline(str(row[0]))}</th>' for row in rows]
        body = "".join(f"<tr>{''.join(cells)}</tr>" for cells in zip(names, *columns, strict=True))
        note = f"<caption>{markup.inline(caption)}</caption>" if caption else ""
        table = f"<table>{note}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
        self._add(f'<div class="scroll">{table}</div>')

    def facts(self, facts: Mapping[str, object]) -> None:
        """Short names and values, such as a machine's."""
        items = (
            f"<div><dt>{escape(str(name))}</dt><dd>{escape(markup.plain(value))}</dd></div>"
            for name, value in facts.items()
        )
        self._add(f'<dl class="facts">{"".join(items)}</dl>')

    def notes(self, notes: Mapping[str, str]) -> None:
        """Longer remarks under short names, such as the protocols behind the numbers."""
        items = (f"<dt>{escape(name)}</dt><dd>{markup.inline(text)}</dd>" for name, text in notes.items())
        self._add(f'<dl class="notes wide">{"".join(items)}</dl>')

    def commands(self, commands: Sequence[tuple[str, str]]) -> None:
        """What each command is for, and the command."""
        items = (
            f"<li><span>{markup.inline(what)}</span><pre><code>{escape(line)}</code></pre></li>"
            for what, line in commands
        )
        self._add(f'<ul class="commands">{"".join(items)}</ul>')

    def details(self, summary: str, text: str) -> None:
        """Preformatted text that opens on a click."""
        body = f"<summary>{escape(summary)}</summary><pre><code>{escape(text)}</code></pre>"
        self._add(f'<details class="wide">{body}</details>')

    def html(self) -> str:
        """The whole page."""
        style = files("aligntok.report").joinpath("page.css").read_text(encoding="utf-8")
        links = "".join(f'<a href="#{anchor}">{escape(title)}</a>' for anchor, title, _, _ in self._sections)
        nav = f'<nav aria-label="Sections">{links}</nav>' if len(self._sections) > 1 else ""
        header = "\n".join([*self._header, nav])
        sections = "\n".join(
            "\n".join([opening, *blocks, "</div></section>"]) for _, _, opening, blocks in self._sections
        )
        return (
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            '<meta name="color-scheme" content="light dark">\n'
            f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
            f'<link rel="icon" href="data:,">\n<title>{escape(self.title)}</title>\n'
            f"<style>\n{style}</style>\n</head>\n"
            f"<body>\n<header>\n{header}\n</header>\n<main>\n{sections}\n</main>\n</body>\n</html>\n"
        )

    def write(self, path: str | Path) -> Path:
        """Write the page atomically and return its path; UserError when the disk refuses."""
        write_bytes(path, self.html().encode("utf-8"))
        return Path(path)

    def _add(self, block: str) -> None:
        (self._sections[-1][3] if self._sections else self._header).append(block)
