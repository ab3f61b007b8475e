"""Pictures of sampled keys, from the indices that the attention returns. Needs matplotlib.

Indices are [..., N, K] as ``return_indices=True`` and ``smartbird.inspection`` give them; the
leading dimensions (sequences, index heads, repeated draws) are pooled. Each function returns a
matplotlib ``Figure``, to be shown in a notebook or saved with ``figure.savefig``; pyplot and its
global state are not touched.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

try:
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure
    from matplotlib.patches import Arc
    from matplotlib.ticker import FuncFormatter, NullFormatter
except ImportError as error:
    raise ImportError("smartbird.plot needs matplotlib: pip install 'smartbird[plot]'") from error

__all__ = ["draw_rates", "plot_arcs", "plot_heat_map", "plot_recall"]

_MOST_CELLS = 1 << 20  # of queries and intervals of keys that draw_rates holds at a time
_MAX_LABELS = 48  # tokens that can be read along an axis of a panel
_LEAST_RATE = 0.1  # where the colour scale of a heat map ends; 0 has no logarithm
_INCHES = 0.26  # per token of an arc diagram
_ARC_FLATNESS = 0.6  # height of an arc over its width
_EARLIER, _LATER = "#d55e00", "#0072b2"  # arcs to keys before and after their query


def draw_rates(
    indices: Tensor,
    num_keys: int,
    *,
    is_causal: bool = False,
    query_offset: int | None = None,
    cells: tuple[int, int] | None = None,
) -> Tensor:
    """How often each query draws each key, relative to drawing all that it sees alike.

    Args:
        indices: integers [..., N, K], -1 in unused places.
        num_keys: M.
        is_causal: query i sees keys ``j <= query_offset + i`` only, instead of all.
        query_offset: position of query 0. None: M - N.
        cells: pool queries and keys into this many intervals of equal length (at most N and M).
            None: one for each, which makes an N x M tensor.

    Returns:
        float32 [cells]: 1 where keys are drawn as often as by chance, 0 where never. Chance spreads
        the places that a query uses over the keys it sees.

    Raises:
        ValueError: an index is not in [-1, M), or of a key that its query does not see, or nothing
            is drawn.
    """
    num_queries = indices.shape[-2]
    rows, columns = cells or (num_queries, num_keys)
    rows, columns = min(rows, num_queries), min(columns, num_keys)
    drawn = indices >= 0
    keys = indices[drawn].long()
    if not len(keys) or int(keys.max()) >= num_keys or int(indices.min()) < -1:
        raise ValueError(f"indices must be in [-1, {num_keys}) and not all -1")
    position = torch.arange(num_queries, device=indices.device)
    query = position[:, None].expand(indices.shape)[drawn]
    num_seen = torch.full_like(position, num_keys)
    if is_causal:
        offset = num_keys - num_queries if query_offset is None else query_offset
        num_seen = (position + 1 + offset).clamp(0, num_keys)
    if (keys >= num_seen[query]).any():
        raise ValueError("indices must be at most the position of their query where it is causal")
    row = position * rows // num_queries
    cell = row[query] * columns + keys * columns // num_keys
    counts = cell.bincount(minlength=rows * columns).view(rows, columns)
    places = query.bincount(minlength=num_queries) / num_seen.clamp(min=1)
    # The first key of each interval of keys; then, of some queries at a time, how many of each
    # interval's keys they see.
    edges = -(-torch.arange(columns + 1, device=indices.device) * num_keys // columns)
    by_chance = torch.zeros(rows, columns, device=indices.device)
    for some in torch.split(position, max(1, _MOST_CELLS // columns)):
        seen = (num_seen[some, None] - edges[:-1]).clamp(min=0).minimum(edges.diff())
        by_chance.index_add_(0, row[some], places[some, None] * seen)
    return torch.where(counts > 0, counts / by_chance, 0.0).cpu()


def plot_heat_map(
    panels: Mapping[str, Tensor],
    num_keys: int,
    *,
    is_causal: bool = False,
    query_offset: int | None = None,
    tokens: Sequence[str] | None = None,
    cells: int = 96,
    columns: int = 4,
) -> Figure:
    """Which keys (across) each query (down) draws, one panel for each set of indices.

    Args:
        panels: indices [..., N, K] by title, for example one entry per layer or head.
        num_keys: M.
        is_causal: query i sees keys ``j <= query_offset + i`` only, instead of all.
        query_offset: position of query 0. None: M - N.
        tokens: labels of queries and keys, for N = M of up to 48 tokens.
        cells: intervals that each axis is pooled into where it is longer.
        columns: panels side by side.

    Returns:
        A figure with a logarithmic colour scale: 1 is chance, see :func:`draw_rates`.

    Raises:
        ValueError: no panels, or tokens that do not fit.
    """
    if not panels:
        raise ValueError("panels must hold at least one set of indices, got none")
    if tokens is not None and len(tokens) > _MAX_LABELS:
        raise ValueError(f"tokens must be at most {_MAX_LABELS} to be read, got {len(tokens)}")
    rates = {
        title: draw_rates(
            indices,
            num_keys,
            is_causal=is_causal,
            query_offset=query_offset,
            cells=(cells, cells),
        )
        for title, indices in panels.items()
    }
    columns = min(columns, len(panels))
    lines = -(-len(panels) // columns)
    side = 3.0 if tokens is None else max(3.0, 0.17 * len(tokens))
    figure = Figure(figsize=(side * columns + 1.2, (side + 0.5) * lines), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False)
    # One scale for all panels; a cell that is never drawn is dark, not missing.
    norm = LogNorm(
        vmin=_LEAST_RATE, vmax=max(10.0, *(float(rate.max()) for rate in rates.values()))
    )
    image = None
    for axis, (title, rate) in zip(axes.flat, rates.items(), strict=False):
        num_queries = panels[title].shape[-2]
        image = axis.imshow(
            rate.clamp(min=_LEAST_RATE).numpy(),
            norm=norm,
            cmap="magma",
            aspect="auto",
            interpolation="nearest",
            extent=(-0.5, num_keys - 0.5, num_queries - 0.5, -0.5),
        )
        axis.set_title(title, fontsize=10)
        if tokens is not None:
            _check_tokens(tokens, num_queries, num_keys)
            axis.set_xticks(range(num_keys), tokens, rotation=90, fontsize=7)
            axis.set_yticks(range(num_queries), tokens, fontsize=7)
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    for axis in axes[:, 0]:
        axis.set_ylabel("query")
    for axis in axes[-1]:
        axis.set_xlabel("key")
    assert image is not None
    bar = figure.colorbar(image, ax=axes, label="drawn, times chance", fraction=0.05)
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda rate, _: f"{rate:g}"))
    bar.ax.yaxis.set_minor_formatter(NullFormatter())
    return figure


def plot_arcs(
    indices: Tensor,
    tokens: Sequence[str],
    *,
    queries: Sequence[int] | None = None,
    max_arcs: int = 100,
) -> Figure:
    """Arcs from queries to the keys they draw, over the tokens of a short passage.

    Arcs of keys after their query are drawn below the tokens, all others above. The more of the
    leading dimensions (heads, repeated draws) drew a pair, the darker is its arc, next to the pair
    that was drawn most.

    Args:
        indices: integers [..., N, K] in [-1, N).
        tokens: N labels, up to 48.
        queries: positions to draw arcs from. None: all.
        max_arcs: leave out all but this many pairs, those drawn most.

    Returns:
        The figure.

    Raises:
        ValueError: tokens or queries that do not fit.
    """
    num_tokens = len(tokens)
    _check_tokens(tokens, indices.shape[-2], num_tokens)
    if num_tokens > _MAX_LABELS:
        raise ValueError(f"tokens must be at most {_MAX_LABELS} to be read, got {num_tokens}")
    queries = range(num_tokens) if queries is None else queries
    if any(not 0 <= i < num_tokens for i in queries):
        raise ValueError(f"queries must be in [0, {num_tokens}), got {list(queries)}")
    shares = _pair_shares(indices, num_tokens)

    pairs = [
        (share, i, j) for i in queries for j, share in enumerate(shares[i].tolist()) if share > 0.0
    ]
    pairs = sorted(pairs, key=lambda pair: -pair[0])[:max_arcs]
    # One unit is the place of one token. Labels stand upright in the gap between the arcs.
    gap = 0.6 + 0.24 * max((len(token) for token in tokens), default=0)
    reach = 0.5 + _ARC_FLATNESS * max((abs(i - j) / 2 for _, i, j in pairs), default=0.0)
    figure = Figure(figsize=(_INCHES * (num_tokens + 1), _INCHES * (gap + 2 * reach)))
    axis = figure.add_axes((0, 0, 1, 1))
    axis.set_axis_off()
    axis.set_xlim(-1, num_tokens)
    axis.set_ylim(-gap - reach, reach)
    for share, i, j in pairs:
        below, strength = j > i, share / pairs[0][0]
        width = max(abs(i - j), 0.5)
        axis.add_patch(
            Arc(
                ((i + j) / 2, -gap if below else 0.0),
                width=width,
                height=_ARC_FLATNESS * width,
                theta1=180 if below else 0,
                theta2=360 if below else 180,
                color=_LATER if below else _EARLIER,
                alpha=0.15 + 0.85 * strength,
                linewidth=0.6 + 1.4 * strength,
            )
        )
    chosen = set(queries) if len(queries) < num_tokens else set()
    for i, token in enumerate(tokens):
        style: dict[str, Any] = {"fontweight": "bold"} if i in chosen else {}
        axis.text(i, -gap / 2, token, rotation=90, ha="center", va="center", fontsize=8, **style)
    return figure


def plot_recall(recall: Tensor, *, best: Tensor, chance: Tensor) -> Figure:
    """How much of dense attention's mass the sampled keys hold, a bar for each layer and head.

    Args:
        recall: shares in [0, 1], [layers, H].
        best: marks above it, [layers, H]: what the same number of keys can hold at most.
        chance: marks below it, [layers, H]: what as many random keys hold on average.

    Returns:
        The figure.

    Raises:
        ValueError: shapes that differ or are not [layers, H].
    """
    if recall.dim() != 2 or not recall.shape == best.shape == chance.shape:
        shapes = ", ".join(str(list(shares.shape)) for shares in (recall, best, chance))
        raise ValueError(f"recall, best and chance must all be [layers, H], got {shapes}")
    num_layers, heads = recall.shape
    figure = Figure(figsize=(2.0 + 0.32 * num_layers * (heads + 1), 3.2), layout="constrained")
    axis = figure.add_subplot()
    # Heads of a layer stand side by side, layers one bar apart.
    places = [[layer * (heads + 1) + head for head in range(heads)] for layer in range(num_layers)]
    flat = [place for line in places for place in line]
    axis.bar(flat, (100 * recall).flatten().tolist(), color="#e69f00", label="drawn")
    left, right = [place - 0.4 for place in flat], [place + 0.4 for place in flat]
    dashes: Literal["solid", "dotted"]
    for label, dashes, shares in (("best possible", "solid", best), ("chance", "dotted", chance)):
        levels = (100 * shares).flatten().tolist()
        axis.hlines(
            levels, left, right, colors="black", linestyles=dashes, linewidth=2, label=label
        )
    axis.set_xticks(flat, [str(head + 1) for _ in places for head in range(heads)], fontsize=8)
    for number, line in enumerate(places, start=1):
        middle = (line[0] + line[-1]) / 2
        axis.annotate(
            f"layer {number}",
            (middle, 0),
            xytext=(0, -22),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            ha="center",
            va="top",
        )
    top = 110 * float(torch.maximum(recall, best).max())
    axis.set(ylim=(0, min(100.0, top)), ylabel="of dense attention's mass, %")
    axis.set_xlabel("head", labelpad=18)
    figure.legend(loc="outside right upper")
    return figure


def _pair_shares(indices: Tensor, num_keys: int) -> Tensor:
    """float32 [N, M]: the share of the leading dimensions in which a query drew a key."""
    num_queries = indices.shape[-2]
    draws = indices.reshape(-1, num_queries, indices.shape[-1]).cpu().long()
    # Duplicates in a row count once; unused places go to a column that is cut off.
    drawn = torch.zeros(len(draws), num_queries, num_keys + 1)
    drawn.scatter_(-1, draws.masked_fill(draws < 0, num_keys), 1.0)
    return drawn[..., :num_keys].mean(0)


def _check_tokens(tokens: Sequence[str], num_queries: int, num_keys: int) -> None:
    if not len(tokens) == num_queries == num_keys:
        raise ValueError(
            f"tokens must be one for each of {num_queries} queries and {num_keys} keys, "
            f"got {len(tokens)}"
        )
