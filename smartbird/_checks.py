"""What arguments must be, said by the name that the caller wrote: TypeError, ValueError.

A check that may change its argument (a numpy integer to int, tensors to autocast's dtype) returns
what is to be used in its place.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
MOST = 2**31 - 1  # indices are int32


def shape_of(x: Tensor) -> list[int]:
    return list(x.shape)


def kind_of(x: object) -> str:
    return str(x.dtype) if isinstance(x, Tensor) else type(x).__name__


def can_look(x: Tensor) -> bool:
    """Whether data may decide shapes and branches: on the CPU, in eager mode, untransformed."""
    return (
        x.device.type == "cpu"
        and type(x) is Tensor
        and not torch.compiler.is_compiling()
        and torch._C._functorch.maybe_current_level() is None
    )


# ---- numbers ------------------------------------------------------------------------------------


def check_int(name: str, value: int) -> int:
    """An int; numpy's are taken as well, bools are not."""
    if isinstance(value, np.integer):
        return int(value)
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    return value


def check_count(name: str, value: int, least: int) -> int:
    """An int from ``least`` on."""
    value = check_int(name, value)
    if not least <= value <= MOST:
        raise ValueError(f"{name} must be at least {least} and below 2^31, got {value}")
    return value


def check_number(name: str, value: float) -> float:
    """A number; numpy's are taken as well, bools are not."""
    if isinstance(value, (np.integer, np.floating)):
        return float(value)
    if isinstance(value, bool) or not isinstance(value, (int, float, torch.SymInt, torch.SymFloat)):
        raise TypeError(f"{name} must be a float, got {type(value).__name__}")
    return value


def check_flag(name: str, value: bool) -> bool:
    """A bool; numpy's is taken as well."""
    if isinstance(value, np.bool_):
        return bool(value)
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, got {type(value).__name__}")
    return value


def check_finite(name: str, value: float) -> float:
    value = check_number(name, value)
    if not -math.inf < value < math.inf:
        raise ValueError(f"{name} must be finite, got {value}")
    return float(value)


def check_positive(name: str, value: float) -> float:
    """A number above 0 and finite."""
    value = check_number(name, value)
    if not 0.0 < value < math.inf:
        raise ValueError(f"{name} must be positive and finite, got {value}")
    return float(value)


def check_scale(name: str, value: float | None, features: int) -> float:
    """A finite factor of scores; None: ``features ** -0.5``."""
    return 1 / math.sqrt(features) if value is None else check_finite(name, value)


def check_dropout(dropout_p: float, name: str = "dropout_p") -> float:
    dropout_p = check_number(name, dropout_p)
    if not 0 <= dropout_p < 1:
        raise ValueError(f"{name} must be in [0, 1), got {dropout_p}")
    return float(dropout_p)


def check_keywords(function: str, given: Iterable[str], known: Collection[str]) -> None:
    """Refuse keywords that a function does not have, as Python does."""
    for name in given:
        if name not in known:
            raise TypeError(f"{function}() got an unexpected keyword argument {name!r}")


# ---- tensors ------------------------------------------------------------------------------------


def check_tensor(
    name: str,
    x: Tensor,
    dtype: torch.dtype,
    shape: Sequence[int],
    letters: str,
    device: torch.device,
) -> None:
    """A tensor of one dtype, shape (told by its letters, such as "[B, M]") and device."""
    if not isinstance(x, Tensor) or x.dtype != dtype:
        kind = str(dtype).removeprefix("torch.")
        meaning = " (True = may be attended)" if name == "key_mask" else ""
        article = "an" if kind[0] in "aeiou" else "a"
        raise TypeError(f"{name} must be {article} {kind} Tensor{meaning}, got {kind_of(x)}")
    if x.shape != tuple(shape):
        raise ValueError(f"{name} must be {letters} = {list(shape)}, got {shape_of(x)}")
    if x.device != device:
        raise ValueError(f"{name} must be on {device}, got {x.device}")


def check_key_mask(key_mask: Tensor, shape: Sequence[int]) -> None:
    """A bool mask of that shape, on any device."""
    device = key_mask.device if isinstance(key_mask, Tensor) else torch.device("cpu")
    check_tensor("key_mask", key_mask, torch.bool, shape, "[B, M]", device)


def check_floats(name: str, x: Tensor, dims: Sequence[int], like: Tensor | None = None) -> None:
    """A floating point tensor of as many dimensions, of the dtype and device of ``like``."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a Tensor, got {type(x).__name__}")
    if x.dtype not in FLOATS:
        raise TypeError(f"{name} must be float32, float64, bfloat16 or float16, got {x.dtype}")
    if x.dim() not in dims:
        number = " or ".join(map(str, dims))
        raise ValueError(f"{name} must have {number} dimensions, got {x.dim()}: {shape_of(x)}")
    if x.shape[-1] == 0:
        raise ValueError(f"{name} must have at least one feature in its last dimension, got 0")
    if like is None:
        return
    if x.dtype != like.dtype:
        raise TypeError(
            f"{name} must have the same dtype as the others, {like.dtype}, got {x.dtype}"
        )
    if x.device != like.device:
        raise ValueError(
            f"{name} must be on the same device as the others, {like.device}, got {x.device}"
        )


def autocasts(device: str) -> bool:
    """Whether autocast is on for that type of device."""
    return device in ("cpu", "cuda") and torch.is_autocast_enabled(device)


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in autocast's dtype where it is on for their device, as the ops take them."""
    first = tensors[0]
    if not isinstance(first, Tensor):
        return tensors
    device = first.device.type
    if not autocasts(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)

    def cast(x: Tensor) -> Tensor:
        narrow = isinstance(x, Tensor) and x.dtype in FLOATS and x.dtype != torch.float64
        return x.to(dtype) if narrow else x

    return tuple(map(cast, tensors))


def check_heads(q: Tensor, k: Tensor) -> None:
    """q [B, H, N, D] and k [B, H_kv, M, D]."""
    check_floats("q", q, (4,))
    check_floats("k", k, (4,), q)
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(
            f"k must be [B, H_kv, M, D] with B and D of q {shape_of(q)}, got {shape_of(k)}"
        )
    if q.shape[1] == 0 or k.shape[1] == 0 or q.shape[1] % k.shape[1] != 0:
        raise ValueError(
            "the heads of q must be a multiple of the heads of k, "
            f"got {q.shape[1]} and {k.shape[1]}"
        )


def check_attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What can attend to each other: :func:`check_heads` and v [B, H_kv, M, Dv]."""
    q, k, v = autocast(q, k, v)
    check_heads(q, k)
    check_floats("v", v, (4,), q)
    if v.shape[:3] != k.shape[:3]:
        raise ValueError(
            f"v must be [B, H_kv, M, Dv] with B, H_kv and M of k {shape_of(k)}, got {shape_of(v)}"
        )
    return q, k, v


def check_sketches(q_sketch: Tensor, k_sketch: Tensor) -> tuple[Tensor, Tensor]:
    """Sketches [B, H_s, N, S] and [B, H_ks, M, S], of [B, N, S] and [B, M, S] as well."""
    q_sketch, k_sketch = autocast(q_sketch, k_sketch)
    check_floats("q_sketch", q_sketch, (3, 4))
    check_floats("k_sketch", k_sketch, (3, 4), q_sketch)
    if q_sketch.dim() != k_sketch.dim():
        raise ValueError(
            f"k_sketch must have as many dimensions as q_sketch {shape_of(q_sketch)}, "
            f"got {shape_of(k_sketch)}"
        )
    if q_sketch.shape[0] != k_sketch.shape[0] or q_sketch.shape[-1] != k_sketch.shape[-1]:
        letters = "[B, M, S]" if k_sketch.dim() == 3 else "[B, H_ks, M, S]"
        raise ValueError(
            f"k_sketch must be {letters} with B and S of q_sketch {shape_of(q_sketch)}, "
            f"got {shape_of(k_sketch)}"
        )
    if q_sketch.dim() == 3:
        return q_sketch.unsqueeze(1), k_sketch.unsqueeze(1)
    if q_sketch.shape[1] == 0 or k_sketch.shape[1] == 0 or q_sketch.shape[1] % k_sketch.shape[1]:
        raise ValueError(
            "the sketches of q_sketch must be a multiple of those of k_sketch, "
            f"got {q_sketch.shape[1]} and {k_sketch.shape[1]}"
        )
    return q_sketch, k_sketch


def check_same_tokens(q_sketch: Tensor, k_sketch: Tensor, q: Tensor, k: Tensor) -> None:
    """Sketches, as :func:`check_sketches` gives them, of the tokens of q and k."""
    for name, sketch, of, x in (("q_sketch", q_sketch, "q", q), ("k_sketch", k_sketch, "k", k)):
        if (sketch.shape[0], sketch.shape[2]) != (x.shape[0], x.shape[2]):
            raise ValueError(
                f"{name} must have the batch and length of {of} {shape_of(x)}, "
                f"got batch {sketch.shape[0]} and length {sketch.shape[2]}"
            )
        if sketch.device != x.device:
            raise ValueError(f"{name} must be on {x.device}, got {sketch.device}")


def check_inputs(
    q: Tensor, k: Tensor, v: Tensor, q_sketch: Tensor, k_sketch: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """All that sampled attention is made of, sketches [B, H_s, N, S] and [B, H_ks, M, S]."""
    q, k, v = check_attention(q, k, v)
    q_sketch, k_sketch = check_sketches(q_sketch, k_sketch)
    check_same_tokens(q_sketch, k_sketch, q, k)
    return q, k, v, q_sketch, k_sketch


def default_index_heads(kv_heads: int, sketches: int) -> int:
    """The least common multiple: heads of one index head share keys and sketch."""
    heads = kv_heads
    while heads % sketches:  # not math.lcm, which graphs of symbolic sizes cannot hold
        heads += kv_heads
    return heads


def check_index_heads(num_index_heads: int, sketches: int, heads: int | None = None) -> int:
    """A multiple of the sketches of q_sketch that divides the heads of q, where there are any."""
    num_index_heads = check_count("num_index_heads", num_index_heads, 1)
    if num_index_heads % sketches:
        raise ValueError(
            f"num_index_heads must be a multiple of the sketches of q_sketch, {sketches}, "
            f"got {num_index_heads}"
        )
    if heads is not None and heads % num_index_heads:
        raise ValueError(
            f"num_index_heads must divide the heads of q, {heads}, got {num_index_heads}"
        )
    return num_index_heads


def check_indices(indices: Tensor, q: Tensor | None = None) -> None:
    """Keys int32 [B, H_i, N, K] that the queries of ``q`` can attend by."""
    if not isinstance(indices, Tensor) or indices.dtype != torch.int32:
        raise TypeError(f"indices must be an int32 Tensor, got {kind_of(indices)}")
    if indices.dim() != 4:
        raise ValueError(f"indices must be [B, H_i, N, K], got {shape_of(indices)}")
    if indices.shape[3] == 0:
        raise ValueError("indices must hold at least one slot per query (K >= 1), got K = 0")
    if q is None:
        return
    if indices.shape[0] != q.shape[0] or indices.shape[2] != q.shape[2]:
        raise ValueError(
            f"indices must be [B, H_i, N, K] with B and N of q {shape_of(q)}, "
            f"got {shape_of(indices)}"
        )
    if indices.shape[1] == 0 or q.shape[1] % indices.shape[1] != 0:
        raise ValueError(
            "the heads of q must be a multiple of the heads of indices, "
            f"got {q.shape[1]} and {indices.shape[1]}"
        )
    if indices.device != q.device:
        raise ValueError(f"indices must be on {q.device}, got {indices.device}")


def draw_seed(
    device: torch.device | str = "cpu", generator: torch.Generator | None = None
) -> Tensor:
    """A fresh ``seed``, int64 [2] on ``device``, from ``generator`` (None: PyTorch's default)."""
    return torch.randint(
        -(2**63), 2**63 - 1, (2,), dtype=torch.int64, device=device, generator=generator
    )


def check_seed(
    seed: Tensor | None, device: torch.device, generator: torch.Generator | None = None
) -> Tensor:
    """int64 [2]; None: drawn from ``generator``."""
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator, got {type(generator).__name__}")
    if seed is None:
        return draw_seed(device, generator)
    check_tensor("seed", seed, torch.int64, (2,), "[2] (seed, offset)", device)
    return seed
