"""sketch_sample: which keys a query attends to."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from smartbird._checks import (
    check_count,
    check_index_heads,
    check_scale,
    check_seed,
    check_sketches,
)
from smartbird._visible import Visible, check_room, check_visible
from smartbird.ops._call import OPS, call, constants, pairs, register_fake, register_flops

METHODS = ("gumbel", "systematic", "multinomial", "topk")


def sketch_sample(
    q_sketch: Tensor,
    k_sketch: Tensor,
    num_samples: int,
    *,
    num_index_heads: int = 1,
    method: str = "gumbel",
    scale: float | None = None,
    is_causal: bool = False,
    key_mask: Tensor | None = None,
    window: int = 0,
    num_sinks: int = 0,
    global_mask: Tensor | None = None,
    query_offset: int | Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    sequence_ids: Tensor | None = None,
    first_head: int = 0,
    seed: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Draw the keys of every query from the softmax of its sketch scores (arXiv 2108.09193).

    With ``p_i = softmax_j(q_sketch_i . k_sketch_j * scale)`` over the keys that can be drawn and k
    the places left after forced keys, every row and index head draws by ``method``:

    =============== ======================================================== =====================
    method          draw                                                     log_inclusion
    =============== ======================================================== =====================
    ``gumbel``      k distinct keys by successive sampling from p (the k     log(1 - exp(-exp(log
                    largest of log p + Gumbel noise)                         p_j - kappa))), kappa
                                                                             the (k+1)-th largest
    ``systematic``  k distinct keys, one uniform number; inclusion           log pi_j
                    probabilities pi_j = min(1, c p_j) that sum to k
    ``multinomial`` k draws with replacement, duplicates kept                log(k p_j)
    ``topk``        the k largest p_j, ties to the lower index               0
    =============== ======================================================== =====================

    Forced keys (``window``, ``num_sinks``, ``global_mask``) count towards K. They, and every key of
    a row with at most K valid keys, have log_inclusion 0. The scores are streamed: no N x M tensor
    is made. Not differentiable. Which keys are drawn depends on the seed and on the row's sequence
    id, head and position, not on the place in the call nor on other rows.

    Args:
        q_sketch: [B, N, S], one sketch for all heads, or [B, H_s, N, S], one for each group of
            H_i / H_s index heads.
        k_sketch: [B, M, S], or [B, H_ks, M, S] with H_ks a divisor of H_s; dtype of ``q_sketch``.
        num_samples: K >= 1.
        num_index_heads: H_i, a multiple of H_s.
        method: how keys are drawn.
        scale: factor of the scores; None: ``S ** -0.5``.
        is_causal: a query sees the keys up to its position.
        key_mask: bool [B, M], True where a key may be drawn.
        window: keys forced around the query's position: the ``window`` at or before it if causal,
            else ``window // 2`` on each side and the position itself.
        num_sinks: the first valid keys of a row, forced.
        global_mask: bool [B, M], True for keys that are forced in every row that sees them; where
            they exceed K, those of the highest index are left out.
        query_offset: position of a sequence's query 0, the key that it stands at: an int, or int64
            [B] (packed: [n]). None: M - N, so that the last query stands at the last key.
        cu_seqlens_q, cu_seqlens_k: int32 [n + 1] from 0, where each of n sequences that share one
            batch element begins and ends, as in ``flash_attn_varlen_func``. Then B is 1, N and M
            are totals, and indices are rows of the packed keys. Rows beyond the last sequence see
            nothing. On a GPU their values are not checked, but clamped.
        sequence_ids: int64 [B] (packed: [n]), who the sequences are; None: 0, 1, ...
        first_head: number of index head 0 of this call, where a call is a part of a whole.
        seed: int64 [2] on the inputs' device.
        generator: source of a seed that is not given.

    Returns:
        indices int32 [B, H_i, N, K], ascending, -1 in unused slots at the end, and log_inclusion
        float32 [B, H_i, N, K], -inf in unused slots.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape or range; NaN or infinity in a
            sketch (which on a GPU stops the device by an assertion instead).
    """
    q_sketch, k_sketch = check_sketches(q_sketch, k_sketch)
    visible = check_visible(
        q_sketch.shape[0],
        q_sketch.shape[2],
        k_sketch.shape[2],
        q_sketch.device,
        is_causal=is_causal,
        key_mask=key_mask,
        window=window,
        num_sinks=num_sinks,
        global_mask=global_mask,
        query_offset=query_offset,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        sequence_ids=sequence_ids,
        first_head=first_head,
    )
    return draw(
        q_sketch,
        k_sketch,
        check_num_samples(num_samples, visible),
        visible,
        num_index_heads=check_index_heads(num_index_heads, q_sketch.shape[1]),
        method=check_method(method),
        scale=check_scale("scale", scale, q_sketch.shape[3]),
        seed=check_seed(seed, q_sketch.device, generator),
    )


def check_method(method: str, methods: tuple[str, ...] = METHODS) -> str:
    if method not in methods:
        raise ValueError(f"method must be one of {', '.join(methods)}, got {method!r}")
    return method


def check_num_samples(num_samples: int, visible: Visible) -> int:
    """K, with room for the keys that are forced."""
    num_samples = check_count("num_samples", num_samples, 1)
    check_room(num_samples, visible.window, visible.num_sinks, visible.is_causal)
    return num_samples


def draw(
    q_sketch: Tensor,
    k_sketch: Tensor,
    num_samples: int,
    visible: Visible,
    *,
    num_index_heads: int,
    method: str,
    scale: float,
    seed: Tensor,
    need_log_inclusion: bool = True,
) -> tuple[Tensor, Tensor]:
    """:func:`sketch_sample` of checked arguments; a log_inclusion that is not needed is empty."""
    op = OPS.sketch_sample.default
    indices, log_inclusion = call(
        op,
        *constants(op, q_sketch, k_sketch),
        num_samples,
        num_index_heads,
        method,
        scale,
        *visible.sampling(),
        seed,
        need_log_inclusion,
    )
    return indices, log_inclusion


def ascending(keys: Tensor, valid: Tensor, num_keys: int) -> Tensor:
    """The valid keys, each below ``num_keys``, of every row in ascending order, then -1; int32."""
    ordered = keys.masked_fill(~valid, num_keys).sort(-1).values
    return ordered.masked_fill(ordered == num_keys, -1).int()


@register_fake("sketch_sample")
def _(
    q_sketch: Tensor, k_sketch: Tensor, num_samples: int, num_index_heads: int, *options: Any
) -> tuple[Tensor, Tensor]:
    *_, need_log_inclusion = options
    rows = (q_sketch.shape[0], num_index_heads, q_sketch.shape[2])
    kept = num_samples if need_log_inclusion else 0
    return (
        q_sketch.new_empty((*rows, num_samples), dtype=torch.int32),
        q_sketch.new_empty((*rows, kept), dtype=torch.float32),
    )


@register_flops("sketch_sample")
def _(
    q_sketch: Tensor,
    k_sketch: Tensor,
    num_samples: int,
    num_index_heads: int,
    method: str,
    scale: float,
    *rows: Any,
) -> int:
    cu_seqlens = rows[7:9]
    return 2 * pairs(q_sketch, k_sketch, *cu_seqlens) * q_sketch.shape[3]
