"""Bad input: an error that names the argument, what it got and what it must be."""

from __future__ import annotations

import math
import os
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from cases import Backend, Case, make_inputs

from smartbird.functional import smart_bird_attention, smart_bird_attention_varlen

# On the CPU whatever the device under test: on a GPU bad data stops the whole process's work there.
pytestmark = [pytest.mark.cpu_only, pytest.mark.one_order]

CASE = Case("small", B=2, N=3, M=5, H=4, H_kv=2, H_i=2, D=8, Dv=6, S=4, K=3)
OPS = {
    "sketch_sample": ("q_sketch", "k_sketch", "num_samples"),
    "gather_scores": ("q", "k", "indices"),
    "gather_attention": ("q", "k", "v", "indices"),
    "sketch_lse": ("q_sketch", "k_sketch"),
    "distill_loss": ("q", "k", "q_sketch", "k_sketch"),
}


def call(backend: Backend, op: str, changes: dict[str, Any]) -> Any:
    """The op on good arguments, but for ``changes``."""
    x = make_inputs(CASE, torch.float32)
    good = {"num_samples": CASE.K, **vars(x)}
    arguments = {name: good[name] for name in OPS[op]} | changes
    return getattr(backend.ops, op)(**arguments)


def zeros(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


def mask(*shape: int) -> torch.Tensor:
    return torch.ones(shape, dtype=torch.bool)


def index(*shape: int, fill: int = 0) -> torch.Tensor:
    return torch.full(shape, fill, dtype=torch.int32)


def one_index(value: int) -> torch.Tensor:
    """Good indices but for the very last."""
    indices = index(2, 2, 3, 3)
    indices[-1, -1, -1, -1] = value
    return indices


def one_value(value: float, *shape: int) -> torch.Tensor:
    x = zeros(*shape)
    x.view(-1)[-1] = value
    return x


SKETCHES = [
    ("q_sketch", [[1.0]], TypeError),
    ("q_sketch", zeros(2, 3, 4, dtype=torch.int32), TypeError),
    ("q_sketch", zeros(2, 3, 4, dtype=torch.complex64), TypeError),
    ("q_sketch", zeros(2, 3, 4, dtype=torch.float64), TypeError),
    ("q_sketch", zeros(3, 4), ValueError),
    ("q_sketch", zeros(2, 1, 3, 4), ValueError),
    ("q_sketch", zeros(2, 3, 0), ValueError),
    ("k_sketch", None, TypeError),
    ("k_sketch", zeros(2, 5, 4, dtype=torch.bfloat16), TypeError),
    ("k_sketch", zeros(5, 4), ValueError),
    ("k_sketch", zeros(3, 5, 4), ValueError),
    ("k_sketch", zeros(1, 5, 4), ValueError),
    ("k_sketch", zeros(2, 5, 3), ValueError),
    ("k_sketch", zeros(2, 5, 4, device="meta"), ValueError),
]
KEY_MASKS = [
    ("key_mask", [True] * 5, TypeError),
    ("key_mask", zeros(2, 5), TypeError),
    ("key_mask", zeros(2, 5, dtype=torch.uint8), TypeError),
    ("key_mask", mask(5), ValueError),
    ("key_mask", mask(2, 3), ValueError),
    ("key_mask", mask(1, 5), ValueError),
    ("key_mask", mask(2, 3, 5), ValueError),
]
VISIBLE = [
    ("is_causal", 1, TypeError),
    ("is_causal", None, TypeError),
    ("window", -1, ValueError),
    ("window", 1.5, TypeError),
    ("window", True, TypeError),
    ("num_sinks", -1, ValueError),
    ("num_sinks", None, TypeError),
    ("global_mask", zeros(2, 5), TypeError),
    ("global_mask", mask(2, 3), ValueError),
    ("global_mask", mask(5), ValueError),
    ("query_offset", 1.0, TypeError),
    ("query_offset", 2**40, ValueError),
    ("query_offset", index(2), TypeError),
    ("query_offset", zeros(3, dtype=torch.int64), ValueError),
    ("query_offset", zeros(2, dtype=torch.int64, device="meta"), ValueError),
    ("cu_seqlens_q", index(3), (TypeError, ValueError)),  # alone: cu_seqlens_k is missing
    ("sequence_ids", [0, 1], TypeError),
    ("sequence_ids", index(2), TypeError),
    ("sequence_ids", zeros(3, dtype=torch.int64), ValueError),
    ("first_head", -1, ValueError),
    ("first_head", 0.0, TypeError),
]
SCALES = [
    ("scale", "large", TypeError),
    ("scale", math.nan, ValueError),
    ("scale", math.inf, ValueError),
]
HEADS = [
    ("q", None, TypeError),
    ("q", zeros(2, 4, 3, 8, dtype=torch.int64), TypeError),
    ("q", zeros(4, 3, 8), ValueError),
    ("q", zeros(2, 3, 3, 8), ValueError),  # not a multiple of H_kv = 2
    ("k", zeros(2, 2, 5, 8, dtype=torch.float16), TypeError),
    ("k", zeros(2, 5, 8), ValueError),
    ("k", zeros(1, 2, 5, 8), ValueError),
    ("k", zeros(2, 2, 5, 7), ValueError),
    ("k", zeros(2, 3, 5, 8), ValueError),
    ("k", zeros(2, 0, 5, 8), ValueError),
    ("k", zeros(2, 2, 5, 8, device="meta"), ValueError),
]
INDICES = [
    ("indices", [[0]], TypeError),
    ("indices", zeros(2, 2, 3, 3), TypeError),
    ("indices", zeros(2, 2, 3, 3, dtype=torch.int64), TypeError),
    ("indices", index(2, 3, 3), ValueError),
    ("indices", index(1, 2, 3, 3), ValueError),
    ("indices", index(2, 2, 4, 3), ValueError),
    ("indices", index(2, 3, 3, 3), ValueError),  # 4 heads are no multiple of 3
    ("indices", index(2, 0, 3, 3), ValueError),
    ("indices", index(2, 2, 3, 0), ValueError),
    ("indices", one_index(5), ValueError),
    ("indices", one_index(-2), ValueError),
    ("indices", one_index(2**31 - 1), ValueError),
    ("indices", one_index(-(2**31)), ValueError),
]
SEEDS = [
    ("seed", 7, TypeError),
    ("seed", zeros(2), TypeError),
    ("seed", zeros(2, dtype=torch.int32), TypeError),
    ("seed", zeros(3, dtype=torch.int64), ValueError),
    ("seed", zeros(1, 2, dtype=torch.int64), ValueError),
]
SAMPLING = [
    ("num_samples", 0, ValueError),
    ("num_samples", -1, ValueError),
    ("num_samples", 2.0, TypeError),
    ("num_samples", True, TypeError),
    ("num_index_heads", 0, ValueError),
    ("num_index_heads", None, TypeError),
    ("method", "top-k", ValueError),
    ("method", None, (TypeError, ValueError)),
    ("window", -1, ValueError),
    ("window", 1.5, TypeError),
    ("num_sinks", -1, ValueError),
    ("num_sinks", 4, ValueError),  # more than K = 3
    ("window", 4, ValueError),  # forces 5
    ("q_sketch", one_value(math.nan, 2, 3, 4), ValueError),
    ("k_sketch", one_value(math.nan, 2, 5, 4), ValueError),
    ("q_sketch", one_value(math.inf, 2, 3, 4), ValueError),
    ("k_sketch", one_value(-math.inf, 2, 5, 4), ValueError),
]
ATTENTION = [
    ("v", None, TypeError),
    ("v", zeros(2, 2, 5, 6, dtype=torch.float64), TypeError),
    ("v", zeros(2, 5, 6), ValueError),
    ("v", zeros(1, 2, 5, 6), ValueError),
    ("v", zeros(2, 1, 5, 6), ValueError),
    ("v", zeros(2, 2, 4, 6), ValueError),
    ("bias", 1.0, TypeError),
    ("bias", index(2, 4, 3, 3), TypeError),
    ("bias", mask(2, 4, 3, 3), TypeError),
    ("bias", zeros(2, 4, 3, 2), ValueError),
    ("bias", zeros(2, 3, 3, 3), ValueError),  # neither heads nor index heads
    ("bias", zeros(1, 2, 4, 3, 3), ValueError),
    ("dropout_p", -0.1, ValueError),
    ("dropout_p", 1.0, ValueError),
    ("dropout_p", 1.5, ValueError),
    ("dropout_p", math.nan, ValueError),
    ("dropout_p", "0.5", (TypeError, ValueError)),
]
SEVERAL_SKETCHES = [
    ("q_sketch", zeros(2, 2, 3, 4), ValueError),  # and k_sketch of one
    ("k_sketch", zeros(2, 1, 5, 4), ValueError),
]
ROWS = [
    ("rows", [0], TypeError),
    ("rows", index(2), TypeError),
    ("rows", zeros(1, 2, dtype=torch.int64), ValueError),
    ("rows", torch.tensor([0, 3]), ValueError),
    ("rows", torch.tensor([-1]), ValueError),
    ("rows", zeros(2, dtype=torch.int64, device="meta"), ValueError),
]
DROPOUT_ROWS = [
    ("query_offset", "1", TypeError),
    ("query_offset", zeros(3, dtype=torch.int64), ValueError),
    ("cu_seqlens_q", index(3), ValueError),  # B = 2
    ("cu_seqlens_q", zeros(3, dtype=torch.int64), TypeError),
    ("sequence_ids", index(2), TypeError),
    ("first_head", -1, ValueError),
]
DISTILL = [
    ("reduction", "none", ValueError),
    ("reduction", None, ValueError),
    ("q_sketch", zeros(2, 4, 4), ValueError),  # N = 3
    ("k_sketch", zeros(2, 4, 4), ValueError),  # M = 5
    ("q_sketch", zeros(2, 3, 4, dtype=torch.float64), TypeError),
    ("log_inclusion", zeros(2, 2, 3, 3), ValueError),  # without indices
    ("sketch_scale", "large", TypeError),
    ("sketch_scale", math.nan, ValueError),
]
WITH_INDICES = [
    ("log_inclusion", [[0.0]], TypeError),
    ("log_inclusion", index(2, 2, 3, 3), TypeError),
    ("log_inclusion", zeros(2, 4, 3, 3), ValueError),
    ("log_inclusion", zeros(2, 2, 3, 2), ValueError),
]

TABLE = [
    *(
        (op, {name: value}, name, error)
        for op, rows in {
            "sketch_sample": SKETCHES
            + SEVERAL_SKETCHES
            + KEY_MASKS
            + VISIBLE
            + SCALES
            + SEEDS
            + SAMPLING,
            "gather_scores": HEADS + INDICES + SCALES,
            "gather_attention": HEADS + INDICES + SCALES + ATTENTION + DROPOUT_ROWS,
            "sketch_lse": SKETCHES + SEVERAL_SKETCHES + KEY_MASKS + VISIBLE + SCALES + ROWS,
            "distill_loss": HEADS
            + INDICES
            + SKETCHES
            + SEVERAL_SKETCHES
            + KEY_MASKS
            + VISIBLE
            + SCALES
            + ROWS
            + DISTILL,
        }.items()
        for name, value, error in rows
    ),
    *(("gather_attention", {"dropout_p": 0.5, n: value}, n, error) for n, value, error in SEEDS),
    *(
        ("distill_loss", {"indices": index(2, 2, 3, 3), name: value}, name, error)
        for name, value, error in WITH_INDICES
    ),
]


def label(row: tuple[str, dict[str, Any], str, Any]) -> str:
    op, changes, name, _ = row
    value = changes[name]
    if isinstance(value, torch.Tensor):
        value = f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    return f"{op}-{name}-{value}"


@pytest.mark.parametrize(("op", "changes", "name", "error"), TABLE, ids=map(label, TABLE))
def test_error_names_the_argument(
    backend: Backend, op: str, changes: dict[str, Any], name: str, error: Any
) -> None:
    with pytest.raises(error) as raised:
        call(backend, op, changes)
    # A mismatch may be told from either side.
    pairs = (("q", "k"), ("q_sketch", "k_sketch"), ("cu_seqlens_q", "cu_seqlens_k"))
    names = next((pair for pair in pairs if name in pair), (name,))
    words = str(raised.value).replace("=", " ").replace(",", " ").split()
    assert any(n in words for n in names), raised.value


@pytest.mark.parametrize("op", OPS)
def test_good_arguments_are_good(backend: Backend, op: str) -> None:
    """The table above changes one thing each in calls that work."""
    call(backend, op, {})


def test_message_tells_what_it_got_and_what_it_must_be(backend: Backend) -> None:
    wrong = {
        ("sketch_sample", "k_sketch"): (zeros(2, 5, 3), ["[2, 5, 3]", "[2, 3, 4]"]),
        ("sketch_sample", "key_mask"): (zeros(2, 5), ["torch.float32", "bool"]),
        ("sketch_sample", "method"): ("best", ["'best'", "gumbel", "topk"]),
        ("gather_attention", "indices"): (zeros(2, 2, 3, 3), ["torch.float32", "int32"]),
        ("gather_attention", "bias"): (zeros(2, 4, 3, 2), ["[2, 4, 3, 2]", "[2, 4, 3, 3]"]),
        ("gather_attention", "dropout_p"): (1.5, ["1.5", "[0, 1)"]),
        ("gather_scores", "k"): (zeros(2, 2, 5, 7), ["[2, 2, 5, 7]", "[2, 4, 3, 8]"]),
    }
    for (op, name), (value, parts) in wrong.items():
        with pytest.raises((TypeError, ValueError)) as raised:
            call(backend, op, {name: value})
        for part in parts:
            assert part in str(raised.value)


def test_index_out_of_range_tells_the_range(backend: Backend) -> None:
    with pytest.raises(ValueError, match=r"indices.*\[-1, (M|5)\)"):
        call(backend, "gather_attention", {"indices": one_index(5)})


@pytest.mark.parametrize("op", ["gather_scores", "gather_attention"])
@pytest.mark.parametrize("value", [5, -2])
def test_index_out_of_range_where_it_would_be_cheap_to_miss(
    backend: Backend, op: str, value: int
) -> None:
    """No keys at all, and a gradient call."""
    changes: dict[str, Any] = {"k": zeros(2, 2, 0, 8)}
    if op == "gather_attention":
        changes["v"] = zeros(2, 2, 0, 6)
    with pytest.raises(ValueError, match="indices"):
        call(backend, op, changes | {"indices": index(2, 2, 3, 3)})
    with pytest.raises(ValueError, match="indices"):
        call(backend, op, {"q": zeros(2, 4, 3, 8).requires_grad_(), "indices": one_index(value)})


def test_nan_where_nothing_is_valid_is_good(backend: Backend) -> None:
    """A NaN is an error in a valid key only."""
    hidden = mask(2, 5)
    hidden[-1, -1] = False
    k_sketch = one_value(math.nan, 2, 5, 4)
    indices, _ = call(backend, "sketch_sample", {"k_sketch": k_sketch, "key_mask": hidden})
    assert (indices[-1] < 4).all()


def test_sketches_of_other_tokens() -> None:
    q = torch.randn(1, 2, 8, 4)
    q_sketch, k_sketch = torch.randn(1, 8, 4), torch.randn(1, 6, 4)
    with pytest.raises(ValueError, match="k_sketch must have the batch and length of k"):
        smart_bird_attention(q, q, q, q_sketch, k_sketch, 2)
    with pytest.raises(ValueError, match="q_sketch must have the batch and length of q"):
        smart_bird_attention(q, q, q, k_sketch, q_sketch, 2)


# Packed sequences, whose ends are read on the CPU only.


@pytest.mark.skipif(
    "SMARTBIRD_EMULATED_LIBRARY" in os.environ, reason="a GPU's cu_seqlens are clamped, not read"
)
@pytest.mark.parametrize(
    ("ends_q", "ends_k", "name"),
    [
        ([0, 4], [0, 5], "cu_seqlens_q"),  # beyond N = 3
        ([0, 3], [0, 6], "cu_seqlens_k"),
        ([1, 3], [0, 5], "cu_seqlens_q"),
        ([0, 2, 1, 3], [0, 1, 2, 5], "cu_seqlens_q"),
        ([0, 1, 2, 3], [0, 3, 2, 5], "cu_seqlens_k"),
        ([0, -1, 3], [0, 1, 5], "cu_seqlens_q"),
        ([0, 3], [0, 2, 5], "cu_seqlens_k"),  # two sequences of one
        ([], [], "cu_seqlens_q"),
    ],
    ids=str,
)
@pytest.mark.parametrize("op", ["sketch_sample", "sketch_lse", "distill_loss"])
def test_ends_of_sequences(
    backend: Backend, op: str, ends_q: list[int], ends_k: list[int], name: str
) -> None:
    x = make_inputs(replace(CASE, B=1), torch.float32)
    good = {"num_samples": CASE.K, **vars(x)}
    arguments = {argument: good[argument] for argument in OPS[op]}
    ends = {
        "cu_seqlens_q": torch.tensor(ends_q, dtype=torch.int32),
        "cu_seqlens_k": torch.tensor(ends_k, dtype=torch.int32),
    }
    with pytest.raises(ValueError, match=name):
        getattr(backend.ops, op)(**arguments, **ends)


def test_packed_sequences_need_a_batch_of_one(backend: Backend) -> None:
    ends = torch.tensor([0, 3], dtype=torch.int32)
    with pytest.raises(ValueError, match="cu_seqlens_q must come with a batch of 1, got 2"):
        call(backend, "sketch_sample", {"cu_seqlens_q": ends, "cu_seqlens_k": ends})


# Heads that do not divide.


@pytest.mark.parametrize(
    ("op", "changes", "said"),
    [
        (
            "sketch_sample",
            {"q_sketch": zeros(2, 2, 3, 4), "k_sketch": zeros(2, 1, 5, 4), "num_index_heads": 3},
            "num_index_heads must be a multiple of the sketches of q_sketch, 2, got 3",
        ),
        (
            "sketch_lse",
            {"q_sketch": zeros(2, 3, 3, 4), "k_sketch": zeros(2, 2, 5, 4)},
            "the sketches of q_sketch must be a multiple of those of k_sketch, got 3 and 2",
        ),
        (
            "distill_loss",
            {"q_sketch": zeros(2, 3, 3, 4), "k_sketch": zeros(2, 3, 5, 4)},
            "the heads of q must be a multiple of the sketches of q_sketch, 3, got 4",
        ),
        (
            "distill_loss",
            {
                "q_sketch": zeros(2, 4, 3, 4),
                "k_sketch": zeros(2, 4, 5, 4),
                "indices": index(2, 2, 3, 3),
            },
            "the heads of indices must be a multiple of the sketches of q_sketch, 4, got 2",
        ),
    ],
)
def test_heads_and_sketches_must_divide(
    backend: Backend, op: str, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        call(backend, op, changes)


# Numbers of numpy are numbers.


def test_numbers_of_numpy(backend: Backend) -> None:
    x = make_inputs(CASE, torch.float32)
    plain = backend.ops.sketch_sample(
        x.q_sketch, x.k_sketch, 4, num_index_heads=2, scale=0.5, is_causal=True, window=1,
        num_sinks=1, query_offset=2, first_head=1, seed=x.seed,
    )  # fmt: skip
    of_numpy = backend.ops.sketch_sample(
        x.q_sketch,
        x.k_sketch,
        np.int64(4),
        num_index_heads=np.int32(2),
        scale=np.float32(0.5),
        is_causal=np.bool_(True),
        window=np.int8(1),
        num_sinks=np.uint8(1),
        query_offset=np.int64(2),
        first_head=np.int64(1),
        seed=x.seed,
    )
    for a, b in zip(plain, of_numpy, strict=True):
        assert torch.equal(a, b)
    out = backend.ops.gather_attention(
        x.q, x.k, x.v, x.indices, dropout_p=np.float64(0.0), scale=np.int64(2)
    )
    assert torch.equal(out, backend.ops.gather_attention(x.q, x.k, x.v, x.indices, scale=2))


# What the caller wrote.


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"sketch_scale": math.nan}, "sketch_scale must be finite, got nan"),
        ({"sketch_scale": "1"}, "sketch_scale must be a float, got str"),
        ({"scale": math.inf}, "scale must be finite, got inf"),
        ({"correction": 1}, "correction must be a bool, got int"),
        ({"return_indices": None}, "return_indices must be a bool, got NoneType"),
        ({"num_index_heads": 3}, "num_index_heads must divide the heads of q, 4, got 3"),
        ({"method": "best"}, "method must be one of gumbel, systematic, multinomial, topk, dealt"),
        ({"query_offset": 0.5}, "query_offset must be an int, got float"),
        ({"global_mask": zeros(2, 5)}, "global_mask must be a bool Tensor, got torch.float32"),
        ({"dropout_p": True}, "dropout_p must be a float, got bool"),
        ({"generator": 3}, "generator must be a torch.Generator, got int"),
    ],
    ids=str,
)
def test_a_function_names_its_own_arguments(change: dict[str, Any], said: str) -> None:
    x = make_inputs(CASE, torch.float32)
    with pytest.raises((TypeError, ValueError), match=f"^{re.escape(said)}"):
        smart_bird_attention(x.q, x.k, x.v, x.q_sketch, x.k_sketch, 3, **change)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"query_mask": None},
            "smart_bird_attention_varlen() got an unexpected keyword argument 'query_mask'",
        ),
        ({"foo": 1}, "smart_bird_attention_varlen() got an unexpected keyword argument 'foo'"),
        ({"k": zeros(5, 2, 7)}, "k must be [T_k, H_kv, D] with D of q [3, 4, 8], got [5, 2, 7]"),
        (
            {"v": zeros(5, 1, 6)},
            "v must be [T_k, H_kv, Dv] with T_k and H_kv of k [5, 2, 8], got [5, 1, 6]",
        ),
        (
            {"v": zeros(4, 2, 6)},
            "v must be [T_k, H_kv, Dv] with T_k and H_kv of k [5, 2, 8], got [4, 2, 6]",
        ),
        ({"generator": 3}, "generator must be a torch.Generator, got int"),
    ],
    ids=str,
)
def test_the_packed_form_names_itself_and_the_shapes_of_its_caller(
    change: dict[str, Any], said: str
) -> None:
    good: dict[str, Any] = {
        "q": zeros(3, 4, 8),
        "k": zeros(5, 2, 8),
        "v": zeros(5, 2, 6),
        "q_sketch": zeros(3, 4),
        "k_sketch": zeros(5, 4),
        "cu_seqlens_q": torch.tensor([0, 3]).int(),
        "cu_seqlens_k": torch.tensor([0, 5]).int(),
    }
    assert smart_bird_attention_varlen(num_samples=3, **good).shape == (3, 4, 6)
    with pytest.raises((TypeError, ValueError), match=f"^{re.escape(said)}"):
        smart_bird_attention_varlen(num_samples=3, **good | change)


# The dispatcher ops themselves check less, but what would leave their memory.


def test_direct_call_with_empty_features_or_slots() -> None:
    direct = torch.ops.smartbird
    q, v = torch.randn(1, 2, 4, 8), torch.randn(1, 2, 4, 0)
    indices = torch.zeros(1, 2, 4, 3, dtype=torch.int32)
    with pytest.raises(RuntimeError, match="Dv must be at least 1"):
        direct.gather_attention_backward(
            *(v, None, q, q, v, indices, None, 1.0),
            *(0.0, None, None, None, None, None, 0),
            *(True, False, True),
        )
    with pytest.raises(RuntimeError, match="K must be at least 1"):
        direct.gather_scores_backward(
            torch.zeros(1, 2, 4, 0), q, q, indices[..., :0].contiguous(), 1.0
        )


@pytest.mark.parametrize(("window", "num_sinks"), [(2**63 - 1, 1), (1, 2**63 - 1)])
def test_direct_call_forcing_too_many_keys(window: int, num_sinks: int) -> None:
    sketch, seed = torch.randn(1, 1, 4, 4), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(RuntimeError, match="no larger"):
        torch.ops.smartbird.sketch_sample(
            *(sketch, sketch, 1, 1, "gumbel", 1.0),
            *(True, None, window, num_sinks, None, None, None, None, None, None, 0),
            *(seed, True),
        )
