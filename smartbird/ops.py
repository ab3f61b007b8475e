"""The operators: checked, differentiable, traceable calls of the compiled kernels.

Letters: B batch, N queries, M keys, H heads, H_kv key/value heads, H_i index heads (head h uses
index head ``h // (H / H_i)``), D head dim, Dv value dim, S sketch dim, K samples per query and
index head. Tensors may be strided views, not copied where the last dimension is contiguous; k and v
(for the backward also q) whose heads are contiguous are gathered faster than interleaved ones.
float32, float64, bfloat16 and float16, one dtype per call; accumulation is in float32 (float64 for
float64), sampling in float32 always. Under autocast, float inputs are cast to its dtype as in
scaled_dot_product_attention.

Each call is a pure function of its arguments: random draws are those of ``seed``, an int64 tensor
[2] (seed, offset), drawn from ``generator`` where None, and do not depend on the number of threads.
A GPU draws other keys by it than a CPU ("gumbel", "multinomial"). Gradients have no gradients of
their own: asking for them is a RuntimeError. The underlying dispatcher ops are
``torch.ops.smartbird.*``.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor

from smartbird import _library as _library  # loads the compiled library

__all__ = [
    "distill_loss",
    "draw_seed",
    "gather_attention",
    "gather_scores",
    "sketch_lse",
    "sketch_sample",
]

METHODS = ("gumbel", "systematic", "multinomial", "topk")
_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_MOST = 2**31 - 1  # indices are int32
_ops = torch.ops.smartbird


def draw_seed(
    device: torch.device | str = "cpu", generator: torch.Generator | None = None
) -> Tensor:
    """A fresh ``seed``, int64 [2] on ``device``, from ``generator`` (None: PyTorch's default)."""
    return torch.randint(
        -(2**63), 2**63 - 1, (2,), dtype=torch.int64, device=device, generator=generator
    )


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
    seed: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Draw the keys of every query from the softmax of its sketch scores (arXiv 2108.09193).

    With ``p_i = softmax_j(q_sketch_i . k_sketch_j * scale)`` over the keys that can be drawn and k
    the places left after forced keys, every row and index head draws by ``method``:

    ============== ========================================================= ======================
    method         draw                                                      log_inclusion
    ============== ========================================================= ======================
    ``gumbel``     k distinct keys by successive sampling from p (the k      log(1 - exp(-exp(log
                   largest of log p + Gumbel noise)                          p_j - kappa))), kappa
                                                                             the (k+1)-th largest
    ``systematic`` k distinct keys, one uniform number; inclusion            log pi_j
                   probabilities pi_j = min(1, c p_j) that sum to k
    ``multinomial`` k draws with replacement, duplicates kept                log(k p_j)
    ``topk``       the k largest p_j, ties to the lower index                0
    ============== ========================================================= ======================

    Forced keys (``window``, ``num_sinks``) count towards K. They, and every key of a row with at
    most K valid keys, have log_inclusion 0. The scores are streamed: no N x M tensor is made.
    Not differentiable.

    Args:
        q_sketch: [B, N, S].
        k_sketch: [B, M, S], dtype of ``q_sketch``.
        num_samples: K >= 1.
        num_index_heads: H_i >= 1.
        method: how keys are drawn.
        scale: factor of the scores; None: ``S ** -0.5``.
        is_causal: query i sees keys j <= i + (M - N).
        key_mask: bool [B, M], True where a key may be drawn.
        window: keys forced around the query's position i + (M - N): the ``window`` at or before it
            if causal, else ``window // 2`` on each side and the position itself.
        num_sinks: the first valid keys of a row, forced.
        seed: int64 [2] on the inputs' device.
        generator: source of a seed that is not given.

    Returns:
        indices int32 [B, H_i, N, K], ascending, -1 in unused slots at the end, and log_inclusion
        float32 [B, H_i, N, K], -inf in unused slots.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape or range; NaN or infinity in a
            sketch (which on a GPU stops the device by an assertion instead).
    """
    arguments = _sampling_arguments(
        q_sketch,
        k_sketch,
        num_samples,
        num_index_heads=num_index_heads,
        method=method,
        scale=scale,
        is_causal=is_causal,
        key_mask=key_mask,
        window=window,
        num_sinks=num_sinks,
        seed=seed,
        generator=generator,
    )
    indices, log_inclusion = _call(_ops.sketch_sample.default, *arguments, True)
    return indices, log_inclusion


def sample_indices(q_sketch: Tensor, k_sketch: Tensor, num_samples: int, **options: Any) -> Tensor:
    """The indices of :func:`sketch_sample` alone, which are cheaper; the same arguments."""
    arguments = _sampling_arguments(q_sketch, k_sketch, num_samples, **options)
    indices: Tensor = _call(_ops.sketch_sample.default, *arguments, False)[0]
    return indices


def sampled_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_sketch: Tensor,
    k_sketch: Tensor,
    num_samples: int,
    *,
    num_index_heads: int,
    correction: bool = False,
    dropout_p: float = 0.0,
    scale: float | None = None,
    sketch_scale: float | None = None,
    **options: Any,
) -> Tensor:
    """:func:`sketch_sample` and :func:`gather_attention` in one, for inference: not differentiable.

    The result is that of the two with the same seed, to the last bit, but on a CPU indices exist
    for a block of queries at a time only. ``options`` are those of :func:`sketch_sample`, other
    arguments as in :func:`smartbird.functional.smart_bird_attention`.

    Returns:
        [B, H, N, Dv] in the dtype of ``q``.
    """
    q, k, v = autocast(q, k, v)
    check_attention(q, k, v)
    q_sketch, k_sketch, num_samples, num_index_heads, method, sketch_scale, *masks, seed = (
        _sampling_arguments(
            q_sketch,
            k_sketch,
            num_samples,
            num_index_heads=num_index_heads,
            scale=sketch_scale,
            **options,
        )
    )
    check_same_tokens(q_sketch, k_sketch, q, k)
    check_index_heads(num_index_heads, q)
    _check_dropout(dropout_p)
    out: Tensor = _call(
        _ops.sampled_attention.default,
        q,
        k,
        v,
        q_sketch,
        k_sketch,
        num_samples,
        num_index_heads,
        method,
        correction,
        _scale(scale, q),
        sketch_scale,
        *masks,
        float(dropout_p),
        seed,
    )
    return out


def _sampling_arguments(
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
    seed: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Any, ...]:
    """The checked arguments of the dispatcher's sketch_sample, without need_log_inclusion."""
    q_sketch, k_sketch = autocast(q_sketch, k_sketch)
    check_sketches(q_sketch, k_sketch)
    check_count("num_samples", num_samples, 1)
    check_count("num_index_heads", num_index_heads, 1)
    check_count("window", window, 0)
    check_count("num_sinks", num_sinks, 0)
    check_flag("is_causal", is_causal)
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    check_room(num_samples, window, num_sinks, is_causal)
    _check_key_mask(key_mask, k_sketch)
    return (
        q_sketch.detach(),
        k_sketch.detach(),
        num_samples,
        num_index_heads,
        method,
        _scale(scale, q_sketch),
        is_causal,
        key_mask,
        window,
        num_sinks,
        _seed(seed, q_sketch, generator),
    )


def gather_scores(q: Tensor, k: Tensor, indices: Tensor, *, scale: float | None = None) -> Tensor:
    """Scores ``q_i . k_j * scale`` of the indexed pairs only.

    Args:
        q: [B, H, N, D].
        k: [B, H_kv, M, D], dtype of ``q``, H a multiple of H_kv.
        indices: int32 [B, H_i, N, K] in [-1, M), -1 = no key, H a multiple of H_i.
        scale: None: ``D ** -0.5``.

    Returns:
        [B, H, N, K] in the dtype of ``q``, -inf where the index is -1. Differentiable in q, k.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape or range.
    """
    q, k = autocast(q, k)
    _check_heads(q, k)
    _check_indices(indices, q)
    scores: Tensor = _call(_ops.gather_scores.default, q, k, indices, _scale(scale, q))
    return scores


@overload
def gather_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    *,
    bias: Tensor | None = ...,
    scale: float | None = ...,
    dropout_p: float = ...,
    seed: Tensor | None = ...,
    generator: torch.Generator | None = ...,
    return_lse: Literal[False] = ...,
) -> Tensor: ...
@overload
def gather_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    *,
    bias: Tensor | None = ...,
    scale: float | None = ...,
    dropout_p: float = ...,
    seed: Tensor | None = ...,
    generator: torch.Generator | None = ...,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...
def gather_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    generator: torch.Generator | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention of every query over its indexed keys: step 3 of Smart Bird.

    ``out_i = sum_j softmax_j(q_i . k_j * scale + bias_ij) v_j`` over the slots of ``indices`` that
    hold a key. A key that is indexed twice counts twice. A row without a key gives zeros,
    lse = -inf and zero gradients.

    Args:
        q: [B, H, N, D].
        k: [B, H_kv, M, D], dtype of ``q``, H a multiple of H_kv.
        v: [B, H_kv, M, Dv], dtype of ``q``.
        indices: int32 [B, H_i, N, K] in [-1, M), -1 = no key, H a multiple of H_i.
        bias: floating point, added to the scaled scores: broadcastable to [B, H, N, K], or one for
            each index head, [B, H_i, N, K].
        scale: None: ``D ** -0.5``.
        dropout_p: probability of dropping an attention weight, in [0, 1).
        seed: int64 [2], for dropout only.
        generator: source of a seed that is not given.
        return_lse: also return the log-sum-exp of each row's logits.

    Returns:
        out [B, H, N, Dv] in the dtype of ``q``; with ``return_lse`` also lse [B, H, N], float32
        (float64 for float64). Differentiable in q, k, v and bias; dropout is replayed, not stored.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape or range.
    """
    q, k, v = autocast(q, k, v)
    check_attention(q, k, v)
    _check_indices(indices, q)
    if bias is not None:
        bias = _expand_bias(bias, q, indices)
    _check_dropout(dropout_p)
    seed = _seed(seed, q, generator) if dropout_p > 0 else None
    out, lse = _call(
        _ops.gather_attention.default,
        q,
        k,
        v,
        indices,
        bias,
        _scale(scale, q),
        float(dropout_p),
        seed,
    )
    return (out, lse) if return_lse else out


def sketch_lse(
    q_sketch: Tensor,
    k_sketch: Tensor,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    key_mask: Tensor | None = None,
) -> Tensor:
    """Log-sum-exp of each row's sketch scores over its valid keys; streamed, no N x M tensor.

    Args:
        q_sketch: [B, N, S].
        k_sketch: [B, M, S], dtype of ``q_sketch``.
        scale: factor of the scores; None: ``S ** -0.5``.
        is_causal: query i sees keys j <= i + (M - N).
        key_mask: bool [B, M], True = valid.

    Returns:
        [B, N], float32 (float64 for float64), -inf for a row without a valid key. Differentiable.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape or range.
    """
    q_sketch, k_sketch = autocast(q_sketch, k_sketch)
    check_sketches(q_sketch, k_sketch)
    check_flag("is_causal", is_causal)
    _check_key_mask(key_mask, k_sketch)
    lse: Tensor = _call(
        _ops.sketch_lse.default, q_sketch, k_sketch, _scale(scale, q_sketch), is_causal, key_mask
    )
    return lse


def distill_loss(
    q: Tensor,
    k: Tensor,
    q_sketch: Tensor,
    k_sketch: Tensor,
    *,
    indices: Tensor | None = None,
    log_inclusion: Tensor | None = None,
    scale: float | None = None,
    sketch_scale: float | None = None,
    is_causal: bool = False,
    key_mask: Tensor | None = None,
) -> Tensor:
    """Cross-entropy of the sketch against what attention does: how the sketch learns.

    The mean, over rows with a valid key, of ``-sum_j t_ij log p_ij`` with p the softmax of the
    scaled sketch scores over **all** valid keys of the row and t, a constant, the mean over heads
    of the attention probabilities:

    - ``indices=None``: softmax over all valid keys, streamed (O(N M D) work, no N x M tensor);
    - with ``indices``: softmax over each head's own sampled entries, of the logits minus
      ``log_inclusion`` where given; duplicates add up. O(N K D) work beside p's O(N M S).

    As ``sum_j t_ij s_ij = sketch_scale q_sketch_i . (sum_j t_ij k_sketch_j)``, t itself is never
    made: attention with the key sketches as values gives the sum.

    Args:
        q: [B, H, N, D].
        k: [B, H_kv, M, D], dtype of ``q``.
        q_sketch: [B, N, S], dtype of ``q``.
        k_sketch: [B, M, S], dtype of ``q``.
        indices: int32 [B, H_i, N, K], valid keys of their row or -1: see :func:`sketch_sample`.
        log_inclusion: float32 [B, H_i, N, K]; needs ``indices``.
        scale: of the attention logits; None: ``D ** -0.5``.
        sketch_scale: of the sketch scores; None: ``S ** -0.5``.
        is_causal: query i sees keys j <= i + (M - N).
        key_mask: bool [B, M], True = valid.

    Returns:
        scalar, float32 (float64 for float64); 0 where no row has a valid key. Differentiable in
        q_sketch and k_sketch only.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape or range.
    """
    q, k, q_sketch, k_sketch = autocast(q, k, q_sketch, k_sketch)
    _check_heads(q, k)
    check_sketches(q_sketch, k_sketch)
    _check_tensor("q_sketch", q_sketch, 3, q)
    check_same_tokens(q_sketch, k_sketch, q, k)
    check_flag("is_causal", is_causal)
    _check_key_mask(key_mask, k_sketch)
    q, k = q.detach(), k.detach()
    scale, sketch_scale = _scale(scale, q), _scale(sketch_scale, q_sketch, "sketch_scale")
    if indices is not None:
        options = (scale, sketch_scale, is_causal, key_mask)
        return _sampled_distill(q, k, q_sketch, k_sketch, indices, log_inclusion, *options)
    if log_inclusion is not None:
        raise ValueError("log_inclusion must be None where indices is None")
    lse = _call(_ops.sketch_lse.default, q_sketch, k_sketch, sketch_scale, is_causal, key_mask)
    valid = lse != -torch.inf
    summed, _ = _call(_ops.summed_attention.default, q, k, k_sketch, scale, is_causal, key_mask)
    agreement = (q_sketch.to(summed.dtype) * summed).sum(-1) * (sketch_scale / q.shape[1])
    rows = (lse - agreement).masked_fill(~valid, 0)
    loss: Tensor = rows.sum() / valid.sum().clamp(min=1)
    return loss


def _sampled_distill(
    q: Tensor,
    k: Tensor,
    q_sketch: Tensor,
    k_sketch: Tensor,
    indices: Tensor,
    log_inclusion: Tensor | None,
    *options: Any,
) -> Tensor:
    _check_indices(indices, q)
    bias = None
    if log_inclusion is not None:
        if not isinstance(log_inclusion, Tensor) or log_inclusion.dtype != torch.float32:
            raise TypeError(f"log_inclusion must be a float32 Tensor, got {_kind(log_inclusion)}")
        if log_inclusion.shape != indices.shape:
            raise ValueError(
                f"log_inclusion must have the shape of indices {_shape(indices)}, "
                f"got {_shape(log_inclusion)}"
            )
        if log_inclusion.device != q.device:
            raise ValueError(f"log_inclusion must be on {q.device}, got {log_inclusion.device}")
        bias = -log_inclusion.to(_acc_dtype(q))
    need_grads = torch.is_grad_enabled() and (q_sketch.requires_grad or k_sketch.requires_grad)
    loss: Tensor = _call(
        _ops.sampled_distill.default, q, k, q_sketch, k_sketch, indices, bias, *options, need_grads
    )[0]
    return loss


def ascending(keys: Tensor, valid: Tensor, num_keys: int) -> Tensor:
    """The valid keys, each below ``num_keys``, of every row in ascending order, then -1; int32."""
    ordered = keys.masked_fill(~valid, num_keys).sort(-1).values
    return ordered.masked_fill(ordered == num_keys, -1).int()


# ---- checks ---------------------------------------------------------------------------------


def _shape(x: Tensor) -> list[int]:
    return list(x.shape)


def _kind(x: object) -> str:
    return str(x.dtype) if isinstance(x, Tensor) else type(x).__name__


def _check_tensor(name: str, x: Tensor, dim: int, like: Tensor | None = None) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a Tensor, got {type(x).__name__}")
    if x.dtype not in _FLOATS:
        raise TypeError(f"{name} must be float32, float64, bfloat16 or float16, got {x.dtype}")
    if x.dim() != dim:
        raise ValueError(f"{name} must have {dim} dimensions, got {x.dim()}: {_shape(x)}")
    if x.shape[-1] == 0:
        raise ValueError(f"{name} must have at least one feature in its last dimension, got 0")
    if like is not None:
        if x.dtype != like.dtype:
            raise TypeError(
                f"{name} must have the same dtype as the others, {like.dtype}, got {x.dtype}"
            )
        if x.device != like.device:
            raise ValueError(
                f"{name} must be on the same device as the others, {like.device}, got {x.device}"
            )


def check_count(name: str, value: int, least: int) -> None:
    """Refuse what is no int from ``least`` on, by the argument's name: TypeError, ValueError."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if not least <= value <= _MOST:
        raise ValueError(f"{name} must be at least {least} and below 2^31, got {value}")


def check_sketches(q_sketch: Tensor, k_sketch: Tensor) -> None:
    """Refuse what are no sketches [B, N, S] and [B, M, S], by name: TypeError, ValueError."""
    _check_tensor("q_sketch", q_sketch, 3)
    _check_tensor("k_sketch", k_sketch, 3, q_sketch)
    if q_sketch.shape[0] != k_sketch.shape[0] or q_sketch.shape[2] != k_sketch.shape[2]:
        raise ValueError(
            f"k_sketch must be [B, M, S] with B and S of q_sketch {_shape(q_sketch)}, "
            f"got {_shape(k_sketch)}"
        )


def check_same_tokens(q_sketch: Tensor, k_sketch: Tensor, q: Tensor, k: Tensor) -> None:
    """Refuse sketches of other tokens than those of q [B, H, N, D] and k [B, H_kv, M, D].

    Anything else that is wrong with the four is left to the ops they go to.

    Raises:
        ValueError: names the sketch, what it is and what it must be.
    """
    for name, sketch, of, x in (("q_sketch", q_sketch, "q", q), ("k_sketch", k_sketch, "k", k)):
        if not isinstance(sketch, Tensor) or not isinstance(x, Tensor):
            continue
        if sketch.dim() != 3 or x.dim() != 4:
            continue
        if (sketch.shape[0], sketch.shape[1]) != (x.shape[0], x.shape[2]):
            raise ValueError(
                f"{name} must have the batch and length of {of} {_shape(x)}, got {_shape(sketch)}"
            )


def check_key_mask(key_mask: Tensor, shape: Sequence[int]) -> None:
    """Refuse a ``key_mask`` of another type or ``shape``, which would hide the wrong keys.

    Raises:
        ValueError, TypeError: says what it is and what it must be.
    """
    if not isinstance(key_mask, Tensor) or key_mask.dtype != torch.bool:
        raise TypeError(
            f"key_mask must be a bool Tensor (True = may be attended), got {_kind(key_mask)}"
        )
    if key_mask.shape != shape:
        raise ValueError(f"key_mask must be [B, M] = {list(shape)}, got {_shape(key_mask)}")


def _check_key_mask(key_mask: Tensor | None, k_sketch: Tensor) -> None:
    if key_mask is None:
        return
    check_key_mask(key_mask, k_sketch.shape[:2])
    if key_mask.device != k_sketch.device:
        raise ValueError(f"key_mask must be on {k_sketch.device}, got {key_mask.device}")


def check_number(name: str, value: float) -> None:
    """Refuse what is no number, by the argument's name: TypeError."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a float, got {type(value).__name__}")


def check_flag(name: str, value: bool) -> None:
    """Refuse what is no bool, by the argument's name: TypeError."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, got {type(value).__name__}")


def _check_heads(q: Tensor, k: Tensor) -> None:
    _check_tensor("q", q, 4)
    _check_tensor("k", k, 4, q)
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(
            f"k must be [B, H_kv, M, D] with B and D of q {_shape(q)}, got {_shape(k)}"
        )
    if q.shape[1] == 0 or k.shape[1] == 0 or q.shape[1] % k.shape[1] != 0:
        raise ValueError(
            "the heads of q must be a multiple of the heads of k, "
            f"got {q.shape[1]} and {k.shape[1]}"
        )


def check_indices(indices: Tensor) -> None:
    """Refuse what no queries could attend by: TypeError (kind, dtype), ValueError (shape)."""
    if not isinstance(indices, Tensor) or indices.dtype != torch.int32:
        raise TypeError(f"indices must be an int32 Tensor, got {_kind(indices)}")
    if indices.dim() != 4:
        raise ValueError(f"indices must be [B, H_i, N, K], got {_shape(indices)}")
    if indices.shape[3] == 0:
        raise ValueError("indices must hold at least one slot per query (K >= 1), got K = 0")


def _check_indices(indices: Tensor, q: Tensor) -> None:
    check_indices(indices)
    if indices.shape[0] != q.shape[0] or indices.shape[2] != q.shape[2]:
        raise ValueError(
            f"indices must be [B, H_i, N, K] with B and N of q {_shape(q)}, got {_shape(indices)}"
        )
    if indices.shape[1] == 0 or q.shape[1] % indices.shape[1] != 0:
        raise ValueError(
            "the heads of q must be a multiple of the heads of indices, "
            f"got {q.shape[1]} and {indices.shape[1]}"
        )
    if indices.device != q.device:
        raise ValueError(f"indices must be on {q.device}, got {indices.device}")


def check_room(num_samples: int, window: int, num_sinks: int, is_causal: bool) -> None:
    """Refuse more forced keys than ``num_samples``.

    Raises:
        ValueError: says how many are forced, and by what.
    """
    forced = num_sinks + (window if is_causal or window == 0 else 2 * (window // 2) + 1)
    if forced > num_samples:
        raise ValueError(
            f"num_samples must be at least the number of forced keys: window={window} and "
            f"num_sinks={num_sinks} force {forced}, got num_samples={num_samples}"
        )


def check_index_heads(num_index_heads: int, q: Tensor) -> None:
    check_count("num_index_heads", num_index_heads, 1)
    if q.shape[1] % num_index_heads:
        raise ValueError(
            f"num_index_heads must divide the heads of q, {q.shape[1]}, got {num_index_heads}"
        )


def check_attention(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Refuse what cannot attend to each other, by name: TypeError, ValueError."""
    _check_heads(q, k)
    _check_tensor("v", v, 4, q)
    if v.shape[:3] != k.shape[:3]:
        raise ValueError(
            f"v must be [B, H_kv, M, Dv] with B, H_kv and M of k {_shape(k)}, got {_shape(v)}"
        )


def _check_dropout(dropout_p: float) -> None:
    if not isinstance(dropout_p, (int, float)) or not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p must be a number in [0, 1), got {dropout_p!r}")


def _expand_bias(bias: Tensor, q: Tensor, indices: Tensor) -> Tensor:
    """bias as [B, H, N, K] or, one for each index head, [B, H_i, N, K], in q's accumulation type"""
    if not isinstance(bias, Tensor) or bias.dtype not in _FLOATS:
        raise TypeError(f"bias must be a floating point Tensor, got {_kind(bias)}")
    num_index_heads = indices.shape[1]
    per_index_head = bias.dim() >= 3 and bias.shape[-3] == num_index_heads
    heads = num_index_heads if per_index_head else q.shape[1]
    shape = (q.shape[0], heads, q.shape[2], indices.shape[3])
    fits = bias.dim() <= 4 and all(
        size in (1, full) for size, full in zip(reversed(bias.shape), reversed(shape), strict=False)
    )
    if not fits:
        raise ValueError(
            f"bias must be broadcastable to [B, H, N, K] = {[*q.shape[:3], indices.shape[3]]} "
            f"or [B, H_i, N, K] with H_i = {num_index_heads}, got {_shape(bias)}"
        )
    if bias.device != q.device:
        raise ValueError(f"bias must be on {q.device}, got {bias.device}")
    return bias.to(_acc_dtype(q)).expand(shape)


def _scale(scale: float | None, q: Tensor, name: str = "scale") -> float:
    if scale is None:
        return 1 / math.sqrt(q.shape[-1])
    check_number(name, scale)
    if not -math.inf < scale < math.inf:
        raise ValueError(f"{name} must be finite, got {scale}")
    return float(scale)


def _seed(seed: Tensor | None, like: Tensor, generator: torch.Generator | None) -> Tensor:
    if seed is None:
        return draw_seed(like.device, generator)
    if not isinstance(seed, Tensor) or seed.dtype != torch.int64:
        raise TypeError(f"seed must be an int64 Tensor, got {_kind(seed)}")
    if seed.shape != (2,):
        raise ValueError(f"seed must have shape [2] (seed, offset), got {_shape(seed)}")
    if seed.device != like.device:
        raise ValueError(f"seed must be on {like.device}, got {seed.device}")
    return seed


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in autocast's dtype where it is on for their device, as the ops take them."""
    first = tensors[0]
    if not isinstance(first, Tensor):
        return tensors
    device = first.device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)

    def cast(x: Tensor) -> Tensor:
        narrow = isinstance(x, Tensor) and x.dtype in _FLOATS and x.dtype != torch.float64
        return x.to(dtype) if narrow else x

    return tuple(map(cast, tensors))


def _acc_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _call(op: Callable[..., Any], *args: Any) -> Any:
    """Calls ``op``; what only the kernel can see to be wrong becomes a ValueError.

    In a compiled graph nothing stands between the two, and it stays the kernel's RuntimeError.
    """
    if torch.compiler.is_compiling():
        return op(*args)
    try:
        return op(*args)
    except RuntimeError as error:
        message = str(error).partition("smartbird: ")[2].partition("\n")[0]
        if not message:
            raise
        raise ValueError(message) from None


# ---- fake kernels and gradients ---------------------------------------------------------------


def _fake_sketch_sample(
    q_sketch: Tensor,
    k_sketch: Tensor,
    num_samples: int,
    num_index_heads: int,
    method: str,
    scale: float,
    is_causal: bool,
    key_mask: Tensor | None,
    window: int,
    num_sinks: int,
    seed: Tensor,
    need_log_inclusion: bool,
) -> tuple[Tensor, Tensor]:
    lead = (q_sketch.shape[0], num_index_heads, q_sketch.shape[1])
    indices = q_sketch.new_empty((*lead, num_samples), dtype=torch.int32)
    kept = num_samples if need_log_inclusion else 0
    return indices, q_sketch.new_empty((*lead, kept), dtype=torch.float32)


def _fake_gather_scores(q: Tensor, k: Tensor, indices: Tensor, scale: float) -> Tensor:
    return q.new_empty((*q.shape[:3], indices.shape[3]))


def _fake_gather_scores_backward(
    dscores: Tensor,
    q: Tensor,
    k: Tensor,
    indices: Tensor,
    scale: float,
    deterministic: bool = False,
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)


def _fake_gather_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    bias: Tensor | None,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    return q.new_empty((*q.shape[:3], v.shape[3])), q.new_empty(q.shape[:3], dtype=_acc_dtype(q))


def _fake_sampled_attention(
    q: Tensor, k: Tensor, v: Tensor, q_sketch: Tensor, k_sketch: Tensor, *options: Any
) -> Tensor:
    return q.new_empty((*q.shape[:3], v.shape[3]))


def _fake_gather_attention_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    bias: Tensor | None,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
    need_dqk: bool,
    need_dv: bool,
    need_dbias: bool,
    deterministic: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        q.new_empty(q.shape if need_dqk else (0,)),
        q.new_empty(k.shape if need_dqk else (0,)),
        q.new_empty(v.shape if need_dv else (0,)),
        q.new_empty((*q.shape[:3], indices.shape[3]) if need_dbias else (0,), dtype=_acc_dtype(q)),
    )


def _fake_sketch_lse(
    q_sketch: Tensor, k_sketch: Tensor, scale: float, is_causal: bool, key_mask: Tensor | None
) -> Tensor:
    return q_sketch.new_empty(q_sketch.shape[:2], dtype=_acc_dtype(q_sketch))


def _fake_sketch_lse_backward(
    dlse: Tensor,
    q_sketch: Tensor,
    k_sketch: Tensor,
    lse: Tensor,
    scale: float,
    is_causal: bool,
    key_mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    dtype = _acc_dtype(q_sketch)
    return (
        q_sketch.new_empty(q_sketch.shape, dtype=dtype),
        k_sketch.new_empty(k_sketch.shape, dtype=dtype),
    )


def _fake_summed_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, is_causal: bool, key_mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    dtype = _acc_dtype(q)
    out = q.new_empty((q.shape[0], q.shape[2], v.shape[2]), dtype=dtype)
    return out, q.new_empty(q.shape[:3], dtype=dtype)


def _fake_summed_attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    scale: float,
    is_causal: bool,
    key_mask: Tensor | None,
) -> Tensor:
    return q.new_empty((k.shape[0], k.shape[2], dout.shape[2]), dtype=_acc_dtype(q))


def _fake_sampled_distill(
    q: Tensor,
    k: Tensor,
    q_sketch: Tensor,
    k_sketch: Tensor,
    indices: Tensor,
    bias: Tensor | None,
    scale: float,
    sketch_scale: float,
    is_causal: bool,
    key_mask: Tensor | None,
    need_grads: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = _acc_dtype(q)
    return (
        q.new_empty((), dtype=dtype),
        q.new_empty(q_sketch.shape if need_grads else (0,), dtype=dtype),
        q.new_empty(k_sketch.shape if need_grads else (0,), dtype=dtype),
    )


def compose_sampled_distill(
    q: Tensor,
    k: Tensor,
    q_sketch: Tensor,
    k_sketch: Tensor,
    indices: Tensor,
    bias: Tensor | None,
    scale: float,
    sketch_scale: float,
    is_causal: bool,
    key_mask: Tensor | None,
    need_grads: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The op ``sampled_distill`` made of the other ops, for devices without a kernel of its own.

    ``sum_j t_ij k_sketch_j`` is attention with the key sketches as values, and the gradient of the
    key sketches that of the values.
    """
    acc = _acc_dtype(q)
    lse = _ops.sketch_lse(q_sketch, k_sketch, sketch_scale, is_causal, key_mask)
    valid = lse != -torch.inf
    row_weight = valid.to(acc) / valid.sum().clamp(min=1)
    # In the accumulation type: the loss is a difference of sums that 8 bits would not hold.
    attention = (
        q.to(acc),
        k.to(acc),
        k_sketch.to(acc).unsqueeze(1).expand(-1, k.shape[1], -1, -1),
        indices,
        bias,
        scale,
        0.0,
        None,
    )
    per_head, head_lse = _ops.gather_attention(*attention)
    target, mass = per_head.mean(1), (head_lse != -torch.inf).to(acc).mean(1)
    query = q_sketch.to(acc).masked_fill(~valid.unsqueeze(-1), 0)
    agreement = sketch_scale * (query * target).sum(-1)
    loss = (row_weight * (mass * lse.masked_fill(~valid, 0) - agreement)).sum()
    if not need_grads:
        return loss, q.new_empty(0, dtype=acc), q.new_empty(0, dtype=acc)
    dlse = row_weight * mass
    expected_key, weighted_query = _ops.sketch_lse_backward(
        dlse, q_sketch, k_sketch, lse, sketch_scale, is_causal, key_mask
    )
    dout = (query * (row_weight / q.shape[1]).unsqueeze(-1)).unsqueeze(1).expand(per_head.shape)
    deterministic = torch.are_deterministic_algorithms_enabled()
    dvalues = _ops.gather_attention_backward(
        dout, None, *attention, False, True, False, deterministic
    )[2]
    dq = expected_key * dlse.unsqueeze(-1) - target * row_weight.unsqueeze(-1)
    dk = weighted_query - dvalues.sum(1)
    return loss, dq * sketch_scale, dk * sketch_scale


torch.library.impl("smartbird::sampled_distill", "CUDA")(compose_sampled_distill)


def _save_gather_scores(ctx: Any, inputs: Any, output: Any) -> None:
    q, k, indices, ctx.scale = inputs
    ctx.save_for_backward(q, k, indices)


def _gather_scores_backward(ctx: Any, dscores: Tensor) -> Any:
    deterministic = torch.are_deterministic_algorithms_enabled()
    dq, dk = _ops.gather_scores_backward(dscores, *ctx.saved_tensors, ctx.scale, deterministic)
    return dq, dk, None, None


def _save_gather_attention(ctx: Any, inputs: Any, output: Any) -> None:
    q, k, v, indices, bias, ctx.scale, ctx.dropout_p, seed = inputs
    ctx.save_for_backward(q, k, v, indices, bias, seed)
    ctx.set_materialize_grads(False)


def _gather_attention_backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> Any:
    q, k, v, indices, bias, seed = ctx.saved_tensors
    need_dq, need_dk, need_dv, _, need_dbias = ctx.needs_input_grad[:5]
    dq, dk, dv, dbias = _ops.gather_attention_backward(
        q.new_zeros((*q.shape[:3], v.shape[3])) if dout is None else dout,
        dlse,
        q,
        k,
        v,
        indices,
        bias,
        ctx.scale,
        ctx.dropout_p,
        seed,
        need_dq or need_dk,
        need_dv,
        need_dbias,
        torch.are_deterministic_algorithms_enabled(),
    )
    if need_dbias and bias.shape[1] != q.shape[1]:
        dbias = dbias.unflatten(1, (bias.shape[1], -1)).sum(2)
    return (
        dq if need_dq else None,
        dk if need_dk else None,
        dv if need_dv else None,
        None,
        dbias if need_dbias else None,
        None,
        None,
        None,
    )


def _save_sketch_lse(ctx: Any, inputs: Any, output: Any) -> None:
    q_sketch, k_sketch, ctx.scale, ctx.is_causal, key_mask = inputs
    ctx.save_for_backward(q_sketch, k_sketch, output, key_mask)


def _sketch_lse_backward(ctx: Any, dlse: Tensor) -> Any:
    q_sketch, k_sketch, lse, key_mask = ctx.saved_tensors
    dlse = dlse.masked_fill(lse == -torch.inf, 0)
    expected_key, weighted_query = _ops.sketch_lse_backward(
        dlse, q_sketch, k_sketch, lse, ctx.scale, ctx.is_causal, key_mask
    )
    dq = (expected_key * (dlse * ctx.scale).unsqueeze(-1)).to(q_sketch.dtype)
    dk = (weighted_query * ctx.scale).to(k_sketch.dtype)
    return dq, dk, None, None, None


def _save_summed_attention(ctx: Any, inputs: Any, output: Any) -> None:
    q, k, v, ctx.scale, ctx.is_causal, key_mask = inputs
    ctx.v_dtype = v.dtype
    ctx.save_for_backward(q, k, output[1], key_mask)


def _summed_attention_backward(ctx: Any, dout: Tensor, dlse: Tensor) -> Any:
    q, k, lse, key_mask = ctx.saved_tensors
    dv = _ops.summed_attention_backward(dout, q, k, lse, ctx.scale, ctx.is_causal, key_mask)
    return None, None, dv.to(ctx.v_dtype), None, None, None


def _save_sampled_distill(ctx: Any, inputs: Any, output: Any) -> None:
    _, dq, dk = output
    ctx.dtype = inputs[2].dtype
    ctx.mark_non_differentiable(dq, dk)
    ctx.save_for_backward(dq, dk)
    ctx.set_materialize_grads(False)


def _sampled_distill_backward(ctx: Any, dloss: Tensor | None, *_: Any) -> Any:
    if torch.is_grad_enabled():  # of create_graph=True
        _refuse_gradient(ctx)
    gradients: list[Tensor | None] = [None, None]
    if dloss is not None:
        gradients = [(gradient * dloss).to(ctx.dtype) for gradient in ctx.saved_tensors]
    return None, None, *gradients, *[None] * 7


def _refuse_gradient(ctx: Any, *_: Any) -> Any:
    """Of a gradient, which PyTorch would leave out of a sum with a warning at most."""
    raise RuntimeError("the ops of smartbird can be differentiated once only")


for _name, _fake in (
    ("sketch_sample", _fake_sketch_sample),
    ("gather_scores", _fake_gather_scores),
    ("gather_scores_backward", _fake_gather_scores_backward),
    ("gather_attention", _fake_gather_attention),
    ("gather_attention_backward", _fake_gather_attention_backward),
    ("sampled_attention", _fake_sampled_attention),
    ("sketch_lse", _fake_sketch_lse),
    ("sketch_lse_backward", _fake_sketch_lse_backward),
    ("summed_attention", _fake_summed_attention),
    ("summed_attention_backward", _fake_summed_attention_backward),
    ("sampled_distill", _fake_sampled_distill),
):
    torch.library.register_fake(f"smartbird::{_name}", _fake)
for _name, _backward, _save in (
    ("gather_scores", _gather_scores_backward, _save_gather_scores),
    ("gather_attention", _gather_attention_backward, _save_gather_attention),
    ("sketch_lse", _sketch_lse_backward, _save_sketch_lse),
    ("summed_attention", _summed_attention_backward, _save_summed_attention),
    ("sampled_distill", _sampled_distill_backward, _save_sampled_distill),
):
    torch.library.register_autograd(f"smartbird::{_name}", _backward, setup_context=_save)
for _name in ("gather_scores", "gather_attention", "sketch_lse", "summed_attention"):
    torch.library.register_autograd(f"smartbird::{_name}_backward", _refuse_gradient)
