"""Pictures: the numbers they show, and that they are made and can be saved."""

from __future__ import annotations

import io

import pytest
import torch
from torch import Tensor

pytest.importorskip("matplotlib", reason="pictures need the extra smartbird[plot]")

from matplotlib.patches import Arc

from smartbird.patterns import random_indices
from smartbird.plot import draw_rates, plot_arcs, plot_heat_map, plot_recall

# Two draws (leading dimension) of two keys each, for three queries.
INDICES = torch.tensor(
    [[[0, 1], [0, -1], [1, 2]], [[0, 2], [0, -1], [1, 1]]],
    dtype=torch.int32,
)


def png_size(figure: object) -> int:
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return len(file.getvalue())


def test_draw_rates_count_draws_relative_to_chance() -> None:
    counts = torch.tensor([[2, 1, 1], [2, 0, 0], [0, 3, 1]])
    # 4, 2 and 4 places in use over 3 keys each.
    by_chance = torch.tensor([[4 / 3], [2 / 3], [4 / 3]])
    torch.testing.assert_close(draw_rates(INDICES, 3), counts / by_chance)


@pytest.mark.parametrize(("num_queries", "num_keys"), [(13, 13), (13, 29), (3, 50), (40, 2)])
def test_pooled_rates_have_the_mean_of_all(num_queries: int, num_keys: int) -> None:
    every_key = torch.arange(num_keys).expand(2, num_queries, num_keys)
    torch.testing.assert_close(
        draw_rates(every_key, num_keys, cells=(5, 7)),
        torch.ones(min(5, num_queries), min(7, num_keys)),
    )


def test_pooled_rates_of_a_diagonal() -> None:
    diagonal = torch.arange(12)[:, None]
    torch.testing.assert_close(draw_rates(diagonal, 12, cells=(4, 4)), 4 * torch.eye(4))


@pytest.mark.parametrize(("num_queries", "num_keys"), [(60, 60), (20, 60), (60, 20)])
@pytest.mark.parametrize("cells", [None, (1, 60), (4, 7)])
def test_causal_keys_are_drawn_by_chance_from_those_seen(
    num_queries: int, num_keys: int, cells: tuple[int, int] | None
) -> None:
    indices = random_indices(
        num_queries, num_keys, 5, num_index_heads=4000, is_causal=True, seed=torch.tensor([1, 2])
    )
    rates = draw_rates(indices, num_keys, is_causal=True, cells=cells)
    seen = draw_rates(
        torch.arange(num_keys).where(
            torch.ones(num_queries, num_keys).tril(num_keys - num_queries) > 0, -1
        ),
        num_keys,
        is_causal=True,
        cells=cells,
    )
    assert set(seen.unique().tolist()) <= {0.0, 1.0}
    # Of 4000 heads, 333 or more draw a key of a query: five standard deviations.
    torch.testing.assert_close(rates, seen, rtol=0, atol=5 / 333**0.5)


def test_causal_queries_may_begin_anywhere() -> None:
    # Query i stands at key 5 + i of 8 and draws all that it sees.
    seen = torch.arange(8).where(torch.ones(3, 8).tril(5) > 0, -1)
    rates = draw_rates(seen, 8, is_causal=True, query_offset=5)
    assert rates.equal(torch.ones(3, 8).tril(5))
    rates = draw_rates(torch.tensor([[-1], [0]]), 8, is_causal=True, query_offset=-1)
    assert rates.equal(
        torch.zeros(2, 8).index_put_((torch.tensor(1), torch.tensor(0)), torch.ones(()))
    )


def test_draw_rates_refuse_keys_that_a_causal_query_does_not_see() -> None:
    with pytest.raises(ValueError, match="indices must be at most the position"):
        draw_rates(INDICES, 3, is_causal=True)


@pytest.mark.parametrize(
    "indices", [torch.tensor([[3]]), torch.tensor([[-2, 0]]), torch.tensor([[-1]])]
)
def test_draw_rates_refuse_other_indices(indices: Tensor) -> None:
    with pytest.raises(ValueError, match="indices"):
        draw_rates(indices, 3)


def test_heat_map_has_a_panel_for_each_set() -> None:
    panels = {f"head {h}": torch.randint(200, (2, 150, 8)) for h in range(5)}
    figure = plot_heat_map(panels, 200)
    titles = [axis.get_title() for axis in figure.axes]
    assert [title for title in titles if title] == list(panels)
    shown = figure.axes[0].images[0].get_array()
    expected = draw_rates(panels["head 0"], 200, cells=(96, 96)).clamp(min=0.1)
    torch.testing.assert_close(torch.from_numpy(shown.data), expected)
    assert png_size(figure) > 0


def test_heat_map_labels() -> None:
    figure = plot_heat_map({"all": INDICES}, 3, tokens=["a", "b", "c"])
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["a", "b", "c"]
    assert png_size(figure) > 0


def test_arcs_go_from_queries_to_keys() -> None:
    figure = plot_arcs(INDICES, ["a", "b", "c"])
    arcs = [patch for patch in figure.axes[0].patches if isinstance(patch, Arc)]
    # Query 0 looks ahead to 1 and 2, so below; the two backward pairs and three selves are above.
    drawn = sorted((arc.center[0], arc.width, arc.theta1 == 180) for arc in arcs)
    assert drawn == [
        (0.0, 0.5, False),
        (0.5, 1, False),
        (0.5, 1, True),
        (1.0, 2, True),
        (1.5, 1, False),
        (2.0, 0.5, False),
    ]
    assert [text.get_text() for text in figure.axes[0].texts] == ["a", "b", "c"]
    assert png_size(figure) > 0


def test_arcs_of_chosen_queries_drawn_most() -> None:
    figure = plot_arcs(INDICES, ["a", "b", "c"], queries=[2], max_arcs=1)
    assert [(arc.center[0], arc.width) for arc in figure.axes[0].patches] == [(1.5, 1)]
    assert [text.get_fontweight() for text in figure.axes[0].texts] == ["normal", "normal", "bold"]


def test_recall_has_a_bar_and_two_marks_for_each_head() -> None:
    recall, best, chance = torch.tensor([[[0.2, 0.3], [0.4, 0.1]]]) * torch.tensor(
        [[[1.0]], [[2.0]], [[0.5]]]
    )
    figure = plot_recall(recall, best=best, chance=chance)
    (axis,) = figure.axes
    heights = [bar.get_height() for bar in axis.patches]
    assert heights == pytest.approx([20, 30, 40, 10])
    marks = [[line[0][1] for line in lines.get_segments()] for lines in axis.collections]
    assert marks == [pytest.approx([40, 60, 80, 20]), pytest.approx([10, 15, 20, 5])]
    assert axis.get_ylim()[1] > 80
    assert png_size(figure) > 0


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match="recall"):
        plot_recall(torch.rand(2, 3), best=torch.rand(2, 3), chance=torch.rand(3))
    with pytest.raises(ValueError, match="panels"):
        plot_heat_map({}, 3)
    with pytest.raises(ValueError, match="tokens"):
        plot_heat_map({"all": INDICES}, 3, tokens=["a"])
    with pytest.raises(ValueError, match="tokens"):
        plot_arcs(INDICES, ["a"])
    with pytest.raises(ValueError, match="at most"):
        plot_arcs(torch.zeros(1, 60, 1, dtype=torch.int32), ["a"] * 60)
    with pytest.raises(ValueError, match="queries"):
        plot_arcs(INDICES, ["a", "b", "c"], queries=[3])
