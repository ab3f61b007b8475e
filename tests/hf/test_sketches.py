"""How sketches begin."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hf_models import FEW, GQA, LENGTH, SMALL, T, made, out, tokens
from torch import Tensor

from smartbird import hf
from smartbird.hf.conversion import _partners
from smartbird.hf.sketches import Moments, leading_directions, rotary_pairs

HALVES = torch.tensor([4, 5, 6, 7, 0, 1, 2, 3])
B, H, G, N, D = 2, 4, 2, 300, 8


def passage() -> tuple[Tensor, Tensor]:
    """q [B, H, N, D] and k [B, H_kv, N, D] whose features vary by different amounts."""
    torch.manual_seed(0)
    q = torch.randn(B, H, N, D) * torch.rand(1, H, 1, D) * 2 + torch.randn(1, H, 1, D)
    k = torch.randn(B, G, N, D) * torch.rand(1, G, 1, D) * 2 + torch.randn(1, G, 1, D)
    return q, k


def moments(q: Tensor, k: Tensor) -> Moments:
    both = Moments()
    for row in range(q.shape[0]):
        both.add(q[row : row + 1], k[row : row + 1])
    return both


def error(q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor) -> Tensor:
    """[H_kv]: mean over rows of the variance over keys of what sketches miss of q . k."""
    k = k - k.mean(2, keepdim=True)
    k_sketch = (k.double() @ k_weight).repeat_interleave(H // G, dim=1)
    missed = (q @ k.repeat_interleave(H // G, dim=1).mT) - q.double() @ q_weight @ k_sketch.mT
    return missed.square().mean((0, 2, 3)).unflatten(0, (G, -1)).sum(1)


def test_pairs_are_those_that_vary_scores_most() -> None:
    q, k = passage()
    q_weight, k_weight = rotary_pairs(moments(q, k), HALVES, 4)
    parts = q.unflatten(-1, (2, 4)), k.unflatten(-1, (2, 4)).repeat_interleave(H // G, dim=1)
    scores = torch.einsum("bhnci,bhmci->bhnmi", *parts)
    spread = scores.var(3).mean((0, 2)).unflatten(0, (G, -1)).sum(1)  # [H_kv, pairs]
    for head in range(G):
        best = spread[head].topk(2).indices
        features = k_weight[head].nonzero()[:, 0]
        assert set(features.tolist()) == {*best.tolist(), *(best + 4).tolist()}
    assert torch.equal(q_weight, k_weight.repeat_interleave(H // G, dim=0))
    assert (k_weight.sum(1) == 1).all()


@pytest.mark.parametrize("way", ["pairs", "directions"])
def test_a_layer_has_the_strongest_of_all_heads(way: str) -> None:
    q, k = passage()
    both = moments(q, k)

    def make(size: int, **options: bool) -> tuple[Tensor, Tensor]:
        if way == "pairs":
            return rotary_pairs(both, HALVES, size, **options)
        return leading_directions(both, size, **options)

    q_weight, k_weight = make(6, together=True)
    used = k_weight.abs().sum(1) > 0  # [H_kv, S]
    assert (used.sum(0) == 1).all()
    count = used.sum(1).tolist()
    assert min(count) > 0
    for head, size in enumerate(count):
        own_q, own_k = make(size)
        of_group = slice(head * H // G, (head + 1) * H // G)
        assert torch.equal(k_weight[head, :, used[head]], own_k[head])
        assert torch.equal(q_weight[of_group, :, used[head]], own_q[of_group])
        assert (q_weight[of_group, :, ~used[head]] == 0).all()


def test_directions_are_the_best_of_their_rank() -> None:
    q, k = passage()
    best = error(q, k, *leading_directions(moments(q, k), 3))
    torch.manual_seed(1)
    for _ in range(20):
        q_weight, k_weight = leading_directions(moments(q, k), 3)
        shift = torch.randn(G, D, 3) * 0.05
        shifted = error(
            q, k, q_weight + shift.repeat_interleave(H // G, dim=0), k_weight + shift.flip(0)
        )
        assert (shifted > best).all()
    pairs = error(q, k, *rotary_pairs(moments(q, k), HALVES, 2))
    assert (error(q, k, *leading_directions(moments(q, k), 2)) <= pairs).all()


def test_directions_of_white_tokens_are_singular_vectors() -> None:
    torch.manual_seed(0)
    w_q, w_k = torch.randn(1, D, 16).double(), torch.randn(1, D, 16).double()
    white = Moments(queries=w_q @ w_q.mT, keys=w_k @ w_k.mT)
    q_weight, k_weight = leading_directions(white, 3)
    product = w_q[0].T @ q_weight[0] @ k_weight[0].T @ w_k[0]
    u, s, v = torch.linalg.svd(w_q[0].T @ w_k[0])
    torch.testing.assert_close(product, u[:, :3] * s[:3] @ v[:3], rtol=1e-5, atol=1e-5)


def test_keys_that_do_not_differ() -> None:
    q, k = passage()
    q_weight, k_weight = leading_directions(moments(q, torch.ones_like(k)), 3)
    assert q_weight.isfinite().all()
    assert k_weight.isfinite().all()


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: T.LlamaModel(T.LlamaConfig(**GQA)), HALVES),
        (lambda: T.CohereModel(T.CohereConfig(**GQA)), torch.tensor([1, 0, 3, 2, 5, 4, 7, 6])),
        (
            lambda: T.PhiModel(T.PhiConfig(**SMALL, pad_token_id=0)),
            torch.tensor([2, 3, 0, 1, 5, 4, 7, 6]),
        ),
    ],
    ids=["halves", "interleaved", "half_of_the_features"],
)
def test_rotary_pairs_are_found(make: Any, expected: Tensor) -> None:
    torch.manual_seed(0)
    model = make().eval()
    seen: list[Tensor | None] = []

    def look(module: Any, args: Any, keywords: dict[str, Any]) -> None:
        seen.append(_partners(module, 8, keywords["position_embeddings"][0]))

    model.layers[0].self_attn.register_forward_pre_hook(look, with_kwargs=True)
    out(model, tokens(1, 5))
    assert seen[0] is not None
    assert torch.equal(seen[0], expected)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "bert", "modernbert"])
@pytest.mark.parametrize("num_sketches", ["head", "kv"])
def test_whole_sketches_score_as_the_heads_do(name: str, num_sketches: str) -> None:
    """So they see positions, norms and biases, as q and k do."""
    width = 16 if name == "qwen3" else 8
    model = hf.convert(made(name), **(FEW | {"sketch_dim": width, "num_sketches": num_sketches}))
    child = next(x for x in model.modules() if isinstance(x, hf.SketchedAttention))
    seen: dict[str, Tensor] = {}

    def look(module: Any, args: tuple[Tensor, ...], keywords: Any) -> None:
        seen["q"], seen["k"] = args[:2]

    child.register_forward_pre_hook(look, with_kwargs=True)
    out(model, tokens(2, LENGTH))
    q, k = seen["q"], seen["k"]
    group = q.shape[1] // k.shape[1]
    scores = q @ k.repeat_interleave(group, dim=1).mT
    sketched = child.sketch_queries(q)
    k_sketch = child.sketch_keys(k)
    if num_sketches == "kv":
        scores = scores.unflatten(1, (k.shape[1], group)).mean(2)
    expected = sketched @ k_sketch.repeat_interleave(sketched.shape[1] // k.shape[1], dim=1).mT
    # What is the same for all keys of a row is no matter.
    scores, expected = (x - x.mean(-1, keepdim=True) for x in (scores, expected))
    torch.testing.assert_close(expected, scores, rtol=1e-3, atol=1e-3 * scores.abs().max().item())


def test_calibration_decides() -> None:
    one = hf.convert(made("gpt2"), **FEW, calibration=tokens(1, LENGTH))
    two = hf.convert(made("gpt2"), **FEW, calibration=tokens(2, LENGTH, seed=9))
    same = hf.convert(made("gpt2"), **FEW, calibration=tokens(1, LENGTH))
    name = "transformer.h.0.attn.smartbird.k_weight"
    assert torch.equal(one.get_parameter(name), same.get_parameter(name))
    assert not torch.equal(one.get_parameter(name), two.get_parameter(name))


def test_sinks_are_not_calibrated_for(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = []
    add = Moments.add

    def look(self: Moments, q: Tensor, k: Tensor) -> None:
        lengths.append((q.shape[2], k.shape[2]))
        add(self, q, k)

    monkeypatch.setattr(Moments, "add", look)
    hf.convert(made("llama"), **(FEW | {"num_sinks": 3}), calibration=tokens(1, LENGTH))
    assert lengths == [(LENGTH, LENGTH - 3)] * 2
