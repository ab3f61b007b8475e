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

__all__ = [
    "html_page",
    "html_table",
    "marked_text",
    "png_figure",
    "side_by_side",
    "svg_figure",
    "text_table",
]

_STRONGEST = 8.0  # times chance, from where on the colour of marked text grows no darker


def html_page(title: str, body: str) -> str:
    """The page with `body`, which is HTML, under `title`, which is text."""
    return f"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)}</title>
<style>{_STYLE}</style>
<h1>{html.escape(title)}</h1>
{body}
</html>
"""


def html_table(rows: Sequence[Sequence[str]]) -> str:
    """A table of text, its first row the head; one that is too wide scrolls by itself."""
    head = "".join(f'<th scope="col">{html.escape(cell)}</th>' for cell in rows[0])
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>"
        for row in rows[1:]
    )
    return (
        '<div class="scroll" tabindex="0">'
        f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def text_table(rows: Sequence[Sequence[str]]) -> str:
    """The same rows as lines of text."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def svg_figure(figure: Figure, description: str, *, wide: bool = False) -> str:
    """The figure as vectors.

    Args:
        figure: on white, on dark pages too.
        description: what it shows, told below it and to those who cannot see it.
        wide: too wide to be read on a narrow screen; there it scrolls by itself.
    """
    file = io.StringIO()
    # No date, so that equal findings give an equal page.
    figure.savefig(file, format="svg", metadata={"Date": None})
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    told = html.escape(description)
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{told}"', 1)
    return _figure(svg.replace(">", f"><title>{told}</title>", 1), description, wide)


def png_figure(figure: Figure, description: str, *, wide: bool = False) -> str:
    """The figure as pixels, which take less room where there are many cells."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    data = base64.b64encode(file.getvalue()).decode()
    told = html.escape(description)
    image = f'<img alt="{told}" title="{told}" src="data:image/png;base64,{data}">'
    return _figure(image, description, wide)


def _figure(image: str, description: str, wide: bool) -> str:
    scroll = f'<div class="scroll" tabindex="0">{image}</div>' if wide else image
    return f"<figure>{scroll}<figcaption>{html.escape(description)}</figcaption></figure>"


def side_by_side(figures: Sequence[str]) -> str:
    """Figures in a row, one below the other where there is no room."""
    return f'<div class="figures">{"".join(figures)}</div>'


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
            f'{space}<span style="--share:{strength:.2f}" title="{rate:.1f}">'
            f"{html.escape(piece)}</span>"
        )
    return "".join(spans)


# Text has a contrast of at least 4.5 to what it stands on, the darkest marks among it.
_STYLE = """
:root { color-scheme: light dark; --ink: #1a1a1a; --quiet: #595959; --line: #c4c4c4;
        --paper: #ffffff; --mark: 86 180 233; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8e8e8; --quiet: #a8a8a8; --line: #4a4a4a; --paper: #16181c; --mark: 0 84 140; }
}
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem;
       color: var(--ink); background: var(--paper); overflow-wrap: break-word; }
h1 { line-height: 1.2; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; margin: 1rem 0; }
th, td { padding: 0.3rem 0.9rem; border-bottom: 1px solid var(--line); text-align: right;
         white-space: nowrap; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
figure { margin: 1rem 0; }
figure svg, figure img { max-width: 100%; height: auto; background: #ffffff; border-radius: 4px; }
figure .scroll svg, figure .scroll img { max-width: none; }
figcaption, .note { color: var(--quiet); font-size: 0.9em; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(19rem, 100%), 1fr));
           gap: 0 1rem; }
blockquote { margin: 1rem 0; padding: 0.5rem 1rem; border-left: 3px solid var(--line);
             line-height: 1.8; }
blockquote span { background: rgb(var(--mark) / var(--share)); }
summary { cursor: pointer; }
"""
