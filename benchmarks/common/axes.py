"""How the axes of every plot look."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def tidy(axes: Axes, grid: str = "both") -> None:
    """A light grid ("both", "x" or "y") behind, and no frame above and at the right."""
    axes.grid(axis=grid, color="#dddddd", linewidth=0.6)  # type: ignore[arg-type]
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
