"""The pieces of a page: escaped text, pictures as data, the cells of a table.

In running text, a blank line starts a paragraph and `backticks` set code; there is no other markup. A cell is
text, a number, a pair (mean, standard deviation) or None for "not measured".
"""

from __future__ import annotations

import base64
import math
import re
import struct
from collections.abc import Sequence
from html import escape
from typing import Literal

from aligntok.errors import UserError

Cell = str | int | float | tuple[float, float] | None
Better = Literal["max", "min"]
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def inline(text: str) -> str:
    """Escaped text in which `backticks` set code."""
    return re.sub(r"`([^`\n]+)`", r"<code>\1</code>", escape(text))


def paragraphs(text: str) -> str:
    return "".join(f"<p>{inline(part.strip())}</p>" for part in re.split(r"\n\s*\n", text) if part.strip())


def caption(text: str, style: str = "") -> str:
    named = f' class="{style}"' if style else ""
    return f"<figcaption{named}>{inline(text)}</figcaption>" if text else ""


def image(png: bytes, alt: str, style: str) -> str:
    if png[:8] != PNG_SIGNATURE:
        raise UserError(f"picture {alt!r}: expected PNG bytes, got bytes that start with {png[:8]!r}")
    width, height = struct.unpack(">II", png[16:24])
    data = base64.b64encode(png).decode()
    named = f' class="{style}"' if style else ""
    size = f'width="{width}" height="{height}"'
    return f'<img{named} {size} alt="{escape(alt)}" src="data:image/png;base64,{data}">'


def plain(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    if isinstance(value, float):
        return f"{value:.4g}"
    return ", ".join(map(plain, value)) if isinstance(value, (list, tuple)) else str(value)


def arrow(better: Better | None) -> str:
    if better is None:
        return ""
    sign, words = ("↑", "higher is better") if better == "max" else ("↓", "lower is better")
    return f'<span class="better" title="{words}">{sign}</span>'


def _mean(cell: Cell) -> float | None:
    """The number that a cell is compared by."""
    value = cell[0] if isinstance(cell, tuple) else cell
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


def column(cells: Sequence[Cell], better: Better | None, reference_rows: int) -> list[str]:
    """The cells of one column with as many decimals each (18.42, 0.545, 0.0213), the best one marked."""
    numbers = [_mean(cell) for cell in cells]
    rivals = [number for number in numbers[reference_rows:] if number is not None]
    best = None
    if better and len(set(rivals)) > 1:
        best = max(rivals) if better == "max" else min(rivals)
    exponent = math.floor(math.log10(max((abs(number) for number in numbers if number), default=1.0)))
    decimals = max(1, 3 - exponent) if exponent >= 0 else 2 - exponent
    marks = [i >= reference_rows and best is not None and number == best for i, number in enumerate(numbers)]
    return [_cell(cell, decimals, mark) for cell, mark in zip(cells, marks, strict=True)]


def _cell(cell: Cell, decimals: int, best: bool) -> str:
    if cell is None:
        return '<td class="absent">–</td>'
    if isinstance(cell, str):
        return f"<td>{inline(cell)}</td>"
    if isinstance(cell, int):
        text = f"{cell:,}"
    elif isinstance(cell, tuple):
        text = f'{cell[0]:.{decimals}f} <span class="deviation">± {cell[1]:.{decimals}f}</span>'
    else:
        text = f"{cell:.{decimals}f}"
    return f'<td class="best">{text}</td>' if best else f"<td>{text}</td>"
