"""Small pictures as SVG, by hand: sharp at every size, light or dark as the reader's page.

Colours are classes, which a media query turns for dark pages. A text is given the width that it is
laid out for, whatever font there is.
"""

from __future__ import annotations

import dataclasses
import html
from collections.abc import Sequence

# Okabe and Ito's colours, which stay apart for colour-blind eyes, a little darker where text or
# thin lines on white would be hard to see, and lighter on black.
_COLOURS = {
    "ink": ("#1a1a1a", "#ececec"),
    "quiet": ("#5a5a5a", "#b0b0b0"),
    "line": ("#c8c8c8", "#555555"),
    "ours": ("#c05000", "#ff8c3f"),
    "blue": ("#0068a8", "#62b8f0"),
    "green": ("#007a58", "#3fc79c"),
    "pink": ("#a8487e", "#e59cc6"),
}
_PAPER = ("#ffffff", "#16181c")
_CHARACTER = 0.6  # width of a monospaced one over its size


@dataclasses.dataclass
class Drawing:
    """A picture of a width and a height, which parts are added to.

    Args:
        title: what it shows, in a few words.
        description: what somebody would be told who cannot see it.
    """

    width: float
    height: float
    title: str
    description: str
    parts: list[str] = dataclasses.field(default_factory=list)

    def text(
        self,
        x: float,
        y: float,
        words: str,
        *,
        colour: str = "ink",
        size: float = 13,
        anchor: str = "start",
        bold: bool = False,
    ) -> None:
        """A line of text whose baseline is at y."""
        weight = ' font-weight="600"' if bold else ""
        self.parts.append(
            f'<text x="{x:g}" y="{y:g}" class="{colour}" font-size="{size:g}" '
            f'text-anchor="{anchor}"{weight}>{html.escape(words)}</text>'
        )

    def code(
        self, x: float, y: float, words: str, *, colour: str = "ink", size: float = 13
    ) -> None:
        """Monospaced text, as wide as :func:`code_width` says."""
        self.parts.append(
            f'<text x="{x:g}" y="{y:g}" class="{colour} code" font-size="{size:g}" '
            f'textLength="{code_width(words, size):g}" lengthAdjust="spacingAndGlyphs" '
            f'xml:space="preserve">{html.escape(words)}</text>'
        )

    def box(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        *,
        fill: str | None = None,
        opacity: float = 1.0,
        stroke: str | None = None,
    ) -> None:
        """A rectangle, filled or with a frame."""
        filled = f'class="{fill}" fill-opacity="{opacity:.2f}"' if fill else 'fill="none"'
        framed = f' style="stroke:var(--{stroke})" stroke-width="2"' if stroke else ""
        self.parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="3" '
            f"{filled}{framed}/>"
        )

    def line(
        self,
        points: Sequence[tuple[float, float]],
        *,
        colour: str = "line",
        width: float = 1,
        dashes: str = "",
    ) -> None:
        """Through all points."""
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        dashed = f' stroke-dasharray="{dashes}"' if dashes else ""
        self.parts.append(
            f'<polyline points="{path}" fill="none" style="stroke:var(--{colour})" '
            f'stroke-width="{width:g}"{dashed}/>'
        )

    def mark(self, x: float, y: float, shape: str, *, colour: str, size: float = 4.5) -> None:
        """A "circle", "triangle", "square", "diamond" or "cross" around a point."""
        r = size
        if shape == "circle":
            self.parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{r:g}" class="{colour}"/>')
            return
        corners = {
            "triangle": [(0, -1.15), (1.1, 0.85), (-1.1, 0.85)],
            "square": [(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)],
            "diamond": [(0, -1.25), (1.25, 0), (0, 1.25), (-1.25, 0)],
            "cross": [
                *((-1, -1.4), (0, -0.4), (1, -1.4), (1.4, -1), (0.4, 0), (1.4, 1)),
                *((1, 1.4), (0, 0.4), (-1, 1.4), (-1.4, 1), (-0.4, 0), (-1.4, -1)),
            ],
        }[shape]
        path = " ".join(f"{x + r * dx:.1f},{y + r * dy:.1f}" for dx, dy in corners)
        self.parts.append(f'<polygon points="{path}" class="{colour}"/>')

    def __str__(self) -> str:
        light, dark = (
            "".join(f"--{name}:{pair[place]};" for name, pair in _COLOURS.items())
            + f"--paper:{_PAPER[place]};"
            for place in (0, 1)
        )
        classes = "".join(f".{name}{{fill:var(--{name})}}" for name in _COLOURS)
        body = "\n".join(self.parts)
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width:g} {self.height:g}" '
            f'width="{self.width:g}" height="{self.height:g}" role="img" '
            'aria-labelledby="title description">\n'
            f'<title id="title">{html.escape(self.title)}</title>\n'
            f'<desc id="description">{html.escape(self.description)}</desc>\n'
            f"<style>svg{{{light}font-family:system-ui,sans-serif}}{classes}"
            ".code{font-family:ui-monospace,Menlo,Consolas,monospace}"
            f"@media(prefers-color-scheme:dark){{svg{{{dark}}}}}</style>\n"
            f'<rect width="100%" height="100%" rx="6" style="fill:var(--paper)"/>\n{body}\n</svg>\n'
        )


def code_width(words: str, size: float = 13) -> float:
    """Of monospaced text."""
    return _CHARACTER * size * len(words)
