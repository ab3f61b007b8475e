"""The ops under PyTorch's transforms: vmap, forward-mode AD, export, compile; and their flops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import Backend
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

from smartbird import ops
from smartbird._visible import check_visible
from smartbird.functional import (
    add_uniform_keys,
    deal_keys,
    smart_bird_attention,
    smart_bird_attention_varlen,
)

B, H, H_KV, N, M, D, S, K = 2, 4, 2, 9, 12, 8, 4, 5
SEED = torch.tensor([3, 4])


def tensors(*lead: int, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    shapes = {
        "q": (B, H, N, D),
        "k": (B, H_KV, M, D),
        "v": (B, H_KV, M, D),
        "q_sketch": (B, N, S),
        "k_sketch": (B, M, S),
    }
    return {
        name: torch.randn(*lead, *shape, device=device, requires_grad=True)
        for name, shape in shapes.items()
    }


# ---- vmap ---------------------------------------------------------------------------------------


def attention(
    q: Tensor, k: Tensor, v: Tensor, q_sketch: Tensor, k_sketch: Tensor, **options: Any
) -> Tensor:
    return smart_bird_attention(
        q,
        k,
        v,
        q_sketch,
        k_sketch,
        K,
        **{"seed": SEED, "correction": True, "is_causal": True, "dropout_p": 0.3, **options},
    )


def drawn_then_gathered(
    q: Tensor, k: Tensor, v: Tensor, q_sketch: Tensor, k_sketch: Tensor
) -> Tensor:
    indices, log_inclusion = ops.sketch_sample(
        q_sketch, k_sketch, K, num_index_heads=H_KV, seed=SEED
    )
    scores = ops.gather_scores(q, k, indices)
    out = ops.gather_attention(q, k, v, indices, bias=-log_inclusion)
    return out + scores.logsumexp(-1, keepdim=True)


def distilled(q: Tensor, k: Tensor, v: Tensor, q_sketch: Tensor, k_sketch: Tensor) -> Tensor:
    indices, log_inclusion = ops.sketch_sample(
        q_sketch, k_sketch, K, num_index_heads=H_KV, seed=SEED
    )
    options = {"indices": indices, "log_inclusion": log_inclusion}
    sampled = ops.distill_loss(q, k, q_sketch, k_sketch, **options)
    dense = ops.distill_loss(q, k, q_sketch, k_sketch, window=1, num_sinks=1)
    return sampled + dense + ops.sketch_lse(q_sketch, k_sketch).sum()


def dealt(q: Tensor, k: Tensor, v: Tensor, q_sketch: Tensor, k_sketch: Tensor) -> Tensor:
    return attention(q, k, v, q_sketch, k_sketch, method="dealt", num_sinks=1)


def of_a_padded_batch(
    q: Tensor, k: Tensor, v: Tensor, q_sketch: Tensor, k_sketch: Tensor
) -> Tensor:
    real = torch.arange(N) < torch.tensor([[N], [4]])
    return attention(q, k, v, q_sketch, k_sketch, query_mask=real)


FUNCTIONS: list[Callable[..., Tensor]] = [
    attention,
    drawn_then_gathered,
    distilled,
    dealt,
    of_a_padded_batch,
]


@pytest.mark.parametrize("in_dim", [0, 1])
@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_vmap_gives_the_gradients_of_a_loop(function: Callable[..., Tensor], in_dim: int) -> None:
    x = {name: t.detach().movedim(0, in_dim) for name, t in tensors(3).items()}
    mapped, looped = ({name: t.clone().requires_grad_() for name, t in x.items()} for _ in range(2))
    out = torch.vmap(function, in_dims=in_dim)(*mapped.values())
    expected = torch.stack(
        [function(*(t.select(in_dim, n) for t in looped.values())) for n in range(3)]
    )
    assert torch.equal(out, expected)
    weights = torch.randn(out.shape)
    for values, result in ((mapped, out), (looped, expected)):
        (result * weights).sum().backward()
        for name in ("q_sketch", "k_sketch") if function is distilled else ("q", "k", "v"):
            assert values[name].grad is not None, name
            assert values[name].grad.abs().sum() > 0, name
    for name in x:
        if looped[name].grad is not None:
            torch.testing.assert_close(mapped[name].grad, looped[name].grad)


def test_vmap_of_one_argument_and_over_an_ensemble() -> None:
    """What is not mapped collects the gradients of all."""
    x = tensors()
    queries = torch.randn(3, B, H, N, D)
    grads = []
    for run in (torch.vmap, None):
        q = queries.clone().requires_grad_()
        rest = [x[name] for name in ("k", "v", "q_sketch", "k_sketch")]
        if run is None:
            out = torch.stack([attention(part, *rest) for part in q])
        else:
            out = run(attention, in_dims=(0, None, None, None, None))(q, *rest)
        grads.append(torch.autograd.grad(out.square().sum(), (q, x["k"], x["v"])))
    for mapped, looped in zip(*grads, strict=True):
        torch.testing.assert_close(mapped, looped)


def test_vmap_draws_differently_where_that_is_asked_for() -> None:
    x = {name: t.detach().expand(2, *t.shape) for name, t in tensors().items()}
    mapped = torch.vmap(lambda *t: attention(*t, seed=None), randomness="different")(*x.values())
    assert not torch.equal(mapped[0], mapped[1])
    same = torch.vmap(lambda *t: attention(*t, seed=None), randomness="same")(*x.values())
    assert torch.equal(same[0], same[1])


def test_uniform_keys_under_vmap_differ_with_the_seed() -> None:
    seeds = torch.tensor([[1, 2], [3, 4]])
    added = torch.vmap(lambda seed: add_uniform_keys(INDICES, M, 3, seed=seed))(seeds)
    assert torch.equal(added[0], add_uniform_keys(INDICES, M, 3, seed=seeds[0]))
    assert not torch.equal(added[0], added[1])


def test_a_loss_told_that_no_gradients_are_needed_makes_them_all_the_same(
    backend: Backend,
) -> None:
    """As within vmap, where no one knows that gradients will be wanted."""
    x = tensors(device=backend.device)
    q, k, _, q_sketch, k_sketch = (t.detach() for t in x.values())
    sketches = [t.unsqueeze(1).requires_grad_() for t in (q_sketch, k_sketch)]
    indices, _ = ops.sketch_sample(q_sketch, k_sketch, K, num_index_heads=H_KV)
    rows = check_visible(B, N, M, q.device).dense()
    results = []
    for need_grads in (True, False):
        loss, *_ = torch.ops.smartbird.sampled_distill(
            q, k, *sketches, indices, None, 0.5, 0.5, *rows, True, need_grads
        )
        results.append((loss, *torch.autograd.grad(2 * loss, sketches)))
    for with_loss, later in zip(*results, strict=True):
        assert torch.equal(with_loss, later)


# ---- forward-mode AD ----------------------------------------------------------------------------

INDICES = torch.zeros(B, H_KV, N, K, dtype=torch.int32)
ENDS = torch.tensor([0, 4, N], dtype=torch.int32)
# Each public op as a function of (tensor, the others): what takes the tangent is named first.
FORWARD: dict[str, tuple[str, Callable[..., Any]]] = {
    "sketch_sample": ("q_sketch", lambda x: ops.sketch_sample(x["q_sketch"], x["k_sketch"], K)),
    "gather_scores": ("k", lambda x: ops.gather_scores(x["q"], x["k"], INDICES)),
    "gather_attention": ("v", lambda x: ops.gather_attention(x["q"], x["k"], x["v"], INDICES)),
    "bias": (
        "q_sketch",
        lambda x: ops.gather_attention(
            x["q"].detach(), x["k"], x["v"], INDICES, bias=x["q_sketch"][:, None, :, :1]
        ),
    ),
    "sketch_lse": ("k_sketch", lambda x: ops.sketch_lse(x["q_sketch"], x["k_sketch"])),
    "distill_loss": (
        "q_sketch",
        lambda x: ops.distill_loss(x["q"], x["k"], x["q_sketch"], x["k_sketch"]),
    ),
    "distill_loss_target": (
        "q",
        lambda x: ops.distill_loss(x["q"], x["k"], x["q_sketch"], x["k_sketch"]),
    ),
    "distill_loss_sampled": (
        "k_sketch",
        lambda x: ops.distill_loss(x["q"], x["k"], x["q_sketch"], x["k_sketch"], indices=INDICES),
    ),
    "distill_loss_sampled_target": (
        "k",
        lambda x: ops.distill_loss(x["q"], x["k"], x["q_sketch"], x["k_sketch"], indices=INDICES),
    ),
    "smart_bird_attention": ("q", lambda x: smart_bird_attention(*x.values(), K)),
    "of_a_sketch": ("q_sketch", lambda x: smart_bird_attention(*x.values(), K)),
    "dealt": ("k_sketch", lambda x: smart_bird_attention(*x.values(), K, method="dealt")),
    "varlen": (
        "q",
        lambda x: smart_bird_attention_varlen(
            *(x[name][0].transpose(0, 1) for name in ("q", "k", "v")),
            x["q_sketch"][0],
            x["k_sketch"][0],
            K,
            cu_seqlens_q=ENDS,
            cu_seqlens_k=ENDS,
        ),
    ),
    "deal_keys": (
        "q_sketch",
        lambda x: deal_keys(x["q_sketch"], x["k_sketch"], K, num_index_heads=2),
    ),
}


def by_jvp(function: Callable[[Tensor], Any], x: Tensor) -> Any:
    return torch.func.jvp(function, (x,), (torch.ones_like(x),))


def by_jacfwd(function: Callable[[Tensor], Any], x: Tensor) -> Any:
    return torch.func.jacfwd(function, randomness="different")(x)


def by_linearize(function: Callable[[Tensor], Any], x: Tensor) -> Any:
    return torch.func.linearize(function, x)


def by_dual_numbers(function: Callable[[Tensor], Any], x: Tensor) -> Any:
    with forward_ad.dual_level():
        return function(forward_ad.make_dual(x, torch.ones_like(x)))


def by_jvp_of_vmap(function: Callable[[Tensor], Any], x: Tensor) -> Any:
    stack = torch.stack([x, x])
    mapped = torch.vmap(function, randomness="different")
    return torch.func.jvp(mapped, (stack,), (torch.ones_like(stack),))


MODES = [by_jvp, by_jacfwd, by_linearize, by_dual_numbers, by_jvp_of_vmap]


@pytest.mark.parametrize("mode", MODES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", FORWARD)
def test_forward_mode_is_refused(name: str, mode: Callable[..., Any]) -> None:
    x = {key: t.detach() for key, t in tensors().items()}
    at, run = FORWARD[name]
    with pytest.raises(NotImplementedError, match="Trying to use forward AD with smartbird"):
        mode(lambda t: run({**x, at: t}), x[at])


@pytest.mark.parametrize("name", FORWARD)
def test_beside_forward_mode_all_goes_on(name: str) -> None:
    """Tangents of other tensors are no one's business here."""
    x = {key: t.detach() for key, t in tensors().items()}
    _, run = FORWARD[name]

    def function(t: Tensor) -> Tensor:
        run(x)
        run({key: value + t.detach() for key, value in x.items()})
        return 2 * t

    _, tangent = torch.func.jvp(function, (torch.ones(()),), (torch.ones(()),))
    assert tangent == 2


def test_reverse_mode_by_functorch_is_an_error() -> None:
    """PyTorch's limit for ops with a formula of their own, which the documentation names."""
    x = tensors()
    with pytest.raises(RuntimeError, match="setup_context"):
        torch.func.grad(lambda q: ops.gather_scores(q, x["k"], INDICES).sum())(x["q"])


# ---- export and compile -------------------------------------------------------------------------


class Attention(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options
        self.weight = nn.Parameter(torch.randn(D, D))

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, q_sketch: Tensor, k_sketch: Tensor, seed: Tensor
    ) -> Any:
        return smart_bird_attention(
            q @ self.weight, k, v, q_sketch, k_sketch, K, seed=seed, **self.options
        )


@pytest.mark.parametrize(
    ("options", "grad", "strict"),
    [
        ({"correction": True, "is_causal": True}, False, False),
        ({"correction": True, "is_causal": True}, True, True),
        ({"return_indices": True, "num_sinks": 1}, True, False),
        ({"method": "dealt", "window": 1}, True, False),
        ({"query_mask": True, "is_causal": True}, False, True),
        ({"query_mask": True, "is_causal": True}, True, False),
    ],
    ids=str,
)
def test_exported_graphs_hold_no_data(options: dict[str, Any], grad: bool, strict: bool) -> None:
    """An index tensor of the example would be a constant of the graph."""
    if "query_mask" in options:
        options = {**options, "query_mask": torch.arange(N) < torch.tensor([[N], [4]])}
    module = Attention(**options)
    batch = torch.export.Dim("batch", min=2, max=64)
    names = ("q", "k", "v", "q_sketch", "k_sketch")
    shapes = {**{name: {0: batch} for name in names}, "seed": None}
    if "query_mask" in options:
        shapes = dict.fromkeys(shapes)
    with torch.set_grad_enabled(grad):
        example = (*tensors().values(), torch.tensor([1, 2]))
        program = torch.export.export(module, example, dynamic_shapes=shapes, strict=strict)
        other = (*tensors().values(), torch.tensor([5, 6]))
        expected, actual = module(*other), program.module()(*other)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    for constant in program.constants.values():
        assert not isinstance(constant, Tensor) or constant.numel() <= 2 * N


def test_compiled_for_any_number_of_samples() -> None:
    """num_samples is a symbol: it may change from step to step without another compilation."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(smart_bird_attention, fullgraph=True, dynamic=True, backend=counter)
    counts = []
    for num_samples in (5, 4, 7):
        x = tensors()
        out = compiled(*x.values(), num_samples, seed=SEED, is_causal=True)
        torch.testing.assert_close(
            out, smart_bird_attention(*x.values(), num_samples, seed=SEED, is_causal=True)
        )
        counts.append(counter.frame_count)
    assert counts[1] == counts[-1]
    torch._dynamo.reset()


# ---- flops --------------------------------------------------------------------------------------


def flops(run: Callable[[], Any]) -> int:
    counter = FlopCounterMode(display=False)
    with counter:
        run()
    return counter.get_total_flops()


def test_flops() -> None:
    q, k, v, q_sketch, k_sketch = x = tuple(tensors().values())
    pairs, drawn = B * N * M, B * H * N * K
    drawing, attending = 2 * pairs * S, 2 * drawn * 2 * D
    assert flops(lambda: ops.sketch_sample(q_sketch, k_sketch, K)) == drawing
    assert flops(lambda: ops.gather_scores(q, k, INDICES)) == 2 * drawn * D
    assert flops(lambda: ops.gather_attention(q, k, v, INDICES)) == attending
    assert flops(lambda: smart_bird_attention(*x, K)) == drawing + attending
    with torch.no_grad():
        assert flops(lambda: smart_bird_attention(*x, K)) == drawing + attending
    # Scores are made again in the backward pass.
    backward = 2 * drawn * 5 * D
    assert flops(lambda: smart_bird_attention(*x, K).sum().backward()) == (
        drawing + attending + backward
    )
    assert flops(lambda: ops.sketch_lse(q_sketch, k_sketch).sum().backward()) == 2 * 4 * pairs * S
    dense = 2 * (4 * pairs * S + 2 * H * pairs * (D + S))
    assert flops(lambda: ops.distill_loss(q, k, q_sketch, k_sketch).backward()) == dense
    sampled = 2 * (3 * pairs * S + drawn * (D + 2 * S))
    run = ops.distill_loss
    assert flops(lambda: run(q, k, q_sketch, k_sketch, indices=INDICES).backward()) == sampled


def test_flops_of_packed_sequences_are_those_of_each() -> None:
    q_sketch, k_sketch = torch.randn(1, 9, S), torch.randn(1, 12, S)
    cu_seqlens = {
        "cu_seqlens_q": torch.tensor([0, 2, 9], dtype=torch.int32),
        "cu_seqlens_k": torch.tensor([0, 9, 12], dtype=torch.int32),
    }
    expected = 2 * S * (2 * 9 + 7 * 3)
    assert flops(lambda: ops.sketch_lse(q_sketch, k_sketch, **cu_seqlens)) == expected
    assert flops(lambda: ops.sketch_sample(q_sketch, k_sketch, 2, **cu_seqlens)) == expected
    # Without data the ends are not known.
    q_sketch, k_sketch = q_sketch.to("meta"), k_sketch.to("meta")
    cu_seqlens = {name: ends.to("meta") for name, ends in cu_seqlens.items()}
    expected = 2 * S * 9 * 12
    assert flops(lambda: ops.sketch_lse(q_sketch, k_sketch, **cu_seqlens)) == expected
