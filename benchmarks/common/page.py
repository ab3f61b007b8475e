"""Parts of reports, for HTML pages that are complete in themselves: nothing is loaded."""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["html_page", "html_table", "marked_text", "png_figure", "svg_figure", "text_table"]

_STRONGEST = 8.0  # times chance, from where on the colour of marked text grows no darker


def html_page(title: str, body: str) -> str:
    """The page with `body`, which is HTML, under `title`, which is text."""
    return f"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{html.escape(title)}</title>
<style>{_STYLE}</style>
<h1>{html.escape(title)}</h1>
{body}
</html>
"""


def html_table(rows: Sequence[Sequence[str]]) -> str:
    """A table of text, its first row the head."""
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in rows[0])
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>"
        for row in rows[1:]
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def text_table(rows: Sequence[Sequence[str]]) -> str:
    """The same rows as lines of text."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def svg_figure(figure: Figure) -> str:
    """The figure as vectors."""
    file = io.StringIO()
    # No date, so that equal findings give an equal page.
    figure.savefig(file, format="svg", metadata={"Date": None})
    svg = file.getvalue()
    return f"<figure>{svg[svg.index('<svg') :]}</figure>"


def png_figure(figure: Figure, description: str) -> str:
    """The figure as pixels, which take less room where there are many cells."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    data = base64.b64encode(file.getvalue()).decode()
    return (
        f'<figure><img alt="{html.escape(description)}" '
        f'src="data:image/png;base64,{data}"></figure>'
    )


def marked_text(
    pieces: Sequence[str], begins: Sequence[bool], rates: Sequence[float], limit: int
) -> str:
    """The first `limit` tokens of a text, each the darker the more often it is drawn.

    Args:
        pieces: the tokens as text.
        begins: whether a word begins with the token: it then stands apart from the one before.
        rates: how often the token is drawn, times chance; up to 1 it is not marked, from 8 on it is
            darkest. It is also shown where the pointer rests on a token.
        limit: tokens to show.
    """
    spans: list[str] = []
    for piece, begin, rate in zip(pieces[:limit], begins[:limit], rates[:limit], strict=True):
        strength = min(1.0, math.log2(max(rate, 1.0)) / math.log2(_STRONGEST))
        space = " " if begin and spans else ""
        spans.append(
            f'{space}<span style="background:rgba(31,119,180,{0.85 * strength:.2f})" '
            f'title="{rate:.1f}">{html.escape(piece)}</span>'
        )
    return "".join(spans)


_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem;
       color: #222; }
table { border-collapse: collapse; margin: 1rem 0; }
th, td { padding: 0.3rem 0.9rem; border-bottom: 1px solid #ccc; text-align: right; }
th:first-child, td:first-child { text-align: left; }
figure { margin: 1rem 0; overflow-x: auto; }
figure svg, figure img { max-width: 100%; height: auto; }
blockquote { margin: 1rem 0; padding: 0.5rem 1rem; border-left: 3px solid #ccc; line-height: 1.8; }
.note { color: #555; font-size: 0.9em; }
"""
