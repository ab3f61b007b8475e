"""One colour, line and marker for each attention, the same in every picture.

Colours are Okabe and Ito's, which stay apart for colour-blind eyes; lines and markers tell what
colours do not in grey.
"""

from __future__ import annotations

from typing import NamedTuple


class Mark(NamedTuple):
    """How an attention is drawn, in matplotlib's words."""

    colour: str
    line: str
    marker: str


_VERMILLION, _ORANGE, _BLUE, _SKY = "#d55e00", "#e69f00", "#0072b2", "#56b4e9"
_GREEN, _PURPLE, _BLACK, _GREY = "#009e73", "#cc79a7", "#000000", "#777777"

MARKS = {
    "smartbird": Mark(_VERMILLION, "-", "o"),
    "systematic": Mark(_ORANGE, "-", "X"),
    "multinomial": Mark(_BLUE, "-.", "P"),
    "topk": Mark(_GREY, "--", "D"),
    "distilled": Mark(_VERMILLION, "--", "o"),
    "untrained": Mark(_ORANGE, ":", "h"),
    "smartbird-restricted": Mark(_ORANGE, "-.", "H"),
    "smartbird-largest": Mark(_ORANGE, "--", "p"),
    "dense": Mark(_BLACK, "-", "s"),
    "window": Mark(_BLUE, "-", "^"),
    "random": Mark(_SKY, "--", "v"),
    "strided": Mark(_GREY, "-.", "*"),
    "bigbird": Mark(_GREEN, "--", "<"),
    "longformer": Mark(_GREEN, "-", ">"),
    "routing": Mark(_GREY, ":", "P"),
    "oracle": Mark(_PURPLE, "-", "D"),
    "composition": Mark(_PURPLE, "--", "d"),
}
# The synonyms of the speed benchmark and of `estimate`.
MARKS |= {"gumbel": MARKS["smartbird"], "exact top-k": MARKS["oracle"]}

# Of what is no attention, such as the values of a setting.
OTHERS = [
    Mark(colour, line, marker)
    for colour, line, marker in zip(
        (_VERMILLION, _BLACK, _BLUE, _GREEN, _PURPLE, _SKY, _ORANGE, _GREY),
        ("-", "--", "-.", ":", "-", "--", "-.", ":"),
        ("o", "s", "^", "D", "v", "P", "X", "*"),
        strict=True,
    )
]
