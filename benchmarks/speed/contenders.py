"""The attentions that are timed: Smart Bird's, and what people use today, each on its best path.

A contender is built for one problem and gives a call without arguments: the forward pass. Only the
attention itself is in it, from q, k and v (and sketches) to the output; projections and dropout are
not, for the layers of Hugging Face either. Sparse rivals keep K keys per query, as many as Smart
Bird draws. What has attention as a part is in ``layers``.

Of smartbird only what is public is used, so that an older version can be timed by the same code.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import pad, scaled_dot_product_attention

from benchmarks.speed import trained_sketch
from smartbird.functional import smart_bird_attention
from smartbird.ops import distill_loss, sketch_sample

SDPA = "SDPA"
SDPA_FLASH = "SDPA, FlashAttention"
SDPA_CUDNN = "SDPA, cuDNN"
FLASH_ATTN = "flash_attn"
FLASH_ATTN_WINDOW = "flash_attn window"
FLEX_BLOCKS = "FlexAttention random blocks"
BIGBIRD = "HF BigBird"
LONGFORMER = "HF Longformer"
COMPOSITION = "PyTorch composition"
EXACT_TOPK = "exact top-k"
GUMBEL = "gumbel"
SYSTEMATIC = "systematic"
DISTILL = " + distill"
# Of a padded batch: each sequence in a call of its own; padding taken out by the call; no padding.
ONE_BY_ONE, QUERY_MASK, PACKED = ", one by one", " with query_mask", ", packed"
# The forward pass captured once and replayed, so that the host's launches are not in its time.
GRAPH = ", as a graph"
DRAW = "sketch_sample, "

# 128 is create_block_mask's default; smaller blocks waste less of a narrow window.
_FLEX_BLOCK_SIZES = (16, 32, 128)
FLEX_WINDOWS = tuple(f"FlexAttention window, blocks of {size}" for size in _FLEX_BLOCK_SIZES)

# Forward: the output. Where a training step has a loss of the attention's own, that too.
Forward = Callable[[], tuple[Tensor, ...]]


class Unavailable(Exception):
    """Says why a contender is not run on a problem."""


@dataclasses.dataclass(frozen=True)
class Widths:
    """What all problems of a run share: H, D, S and K."""

    heads: int = 12
    head_dim: int = 64
    sketch_dim: int = 16
    num_samples: int = 64


@dataclasses.dataclass(frozen=True)
class Problem:
    """Attention on random numbers: q, dout [B, H, N, D], k, v [B, H_kv, M, D], sketches [B, *, S].

    All contiguous; q, k, v and the sketches are leaves, with ``requires_grad`` for a backward pass.
    N = M unless there are fewer ``queries``. Where there are ``lengths``, one for each sequence,
    what is beyond them is padding.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    q_sketch: Tensor
    k_sketch: Tensor
    dout: Tensor
    num_samples: int
    lengths: tuple[int, ...] | None = None

    @classmethod
    def random(
        cls,
        widths: Widths,
        *,
        batch: int,
        length: int,
        dtype: torch.dtype,
        requires_grad: bool,
        score_std: float = 1.0,
        queries: int | None = None,
        kv_heads: int | None = None,
        trained: bool = False,
        lengths: tuple[int, ...] | None = None,
        device: str = "cpu",
    ) -> Problem:
        """Equal numbers at each call on one device; sketch scores deviate by ``score_std``.

        With ``trained`` the sketches are the first rows of the trained ones.

        Raises:
            Unavailable: there are no trained sketches of that size.
        """
        generator = torch.Generator(device).manual_seed(0)

        def normal(*shape: int, std: float = 1.0) -> Tensor:
            x = torch.randn(shape, generator=generator, device=device).mul_(std).to(dtype)
            return x.requires_grad_(requires_grad)

        queries = length if queries is None else queries
        heads = (batch, widths.heads, queries, widths.head_dim)
        kv = (batch, kv_heads or widths.heads, length, widths.head_dim)
        q, k, v = normal(*heads), normal(*kv), normal(*kv)
        if trained:
            q_sketch, k_sketch = (
                _first_rows(x, batch, rows, widths.sketch_dim)
                .to(device, dtype)
                .requires_grad_(requires_grad)
                for x, rows in zip(trained_sketch.load(), (queries, length), strict=True)
            )
        else:
            q_sketch = normal(batch, queries, widths.sketch_dim, std=score_std**0.5)
            k_sketch = normal(batch, length, widths.sketch_dim, std=score_std**0.5)
        return cls(
            q=q,
            k=k,
            v=v,
            q_sketch=q_sketch,
            k_sketch=k_sketch,
            dout=normal(*heads).detach(),
            num_samples=widths.num_samples,
            lengths=lengths,
        )

    @property
    def length(self) -> int:
        """Of the keys."""
        return self.k.shape[2]

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        return (self.q, self.k, self.v, self.q_sketch, self.k_sketch)

    @property
    def requires_grad(self) -> bool:
        return self.q.requires_grad

    @property
    def key_mask(self) -> Tensor | None:
        """bool [B, N], True where there is a token; None without padding."""
        if self.lengths is None:
            return None
        places = torch.arange(self.length, device=self.q.device)
        return places < torch.tensor(self.lengths, device=self.q.device)[:, None]

    def backward(self, outputs: tuple[Tensor, ...]) -> None:
        """``dout`` for the attention's output, 1 for its loss."""
        gradients: tuple[Tensor | None, ...] = (self.dout, None)
        torch.autograd.backward(outputs, gradients[: len(outputs)])


def _first_rows(sketch: Tensor, batch: int, rows: int, width: int) -> Tensor:
    """[B, rows, S] of a trained sketch [N, S]."""
    if rows > sketch.shape[0] or width != sketch.shape[1]:
        raise Unavailable(
            f"the trained sketch has {sketch.shape[0]} rows of {sketch.shape[1]}, "
            f"not {rows} of {width}"
        )
    return sketch[:rows].expand(batch, -1, -1).contiguous()


@dataclasses.dataclass(frozen=True)
class Contender:
    """How to build an attention, and the most queries that it is run on, with the reason.

    ``compiled`` contenders compile themselves for the problem when they are built. Those that are
    not ``padded`` know no padding.
    """

    build: Callable[[Problem], Forward]
    longest: int | None = None
    reason: str = ""
    compiled: bool = False
    padded: bool = False


def build(name: str, problem: Problem) -> Forward:
    """The forward pass of the contender ``name``.

    Raises:
        Unavailable: it cannot run the problem, or would take too long or too much memory.
    """
    contender = CONTENDERS[name]
    if contender.longest is not None and problem.q.shape[2] > contender.longest:
        raise Unavailable(f"not run above N = {contender.longest}: {contender.reason}")
    if problem.lengths is not None and not contender.padded:
        raise Unavailable("does not know padding")
    return contender.build(problem)


def _sdpa(p: Problem) -> Forward:
    grouped = p.k.shape[1] != p.q.shape[1]
    mask = None if p.key_mask is None else p.key_mask[:, None, None, :]
    return lambda: (
        scaled_dot_product_attention(p.q, p.k, p.v, attn_mask=mask, enable_gqa=grouped),
    )


def _sdpa_one_by_one(p: Problem) -> Forward:
    """Every sequence of a padded batch alone, without a mask: SDPA's best path."""
    sequences = _sequences(p)
    return lambda: tuple(scaled_dot_product_attention(q, k, v) for q, k, v, _, _ in sequences)


def _sdpa_by(backend: SDPBackend) -> Callable[[Problem], Forward]:
    """By one of its backends, which it would else choose between."""

    def build(p: Problem) -> Forward:
        attend = _sdpa(p)

        def forward() -> tuple[Tensor, ...]:
            with sdpa_kernel(backend):
                return attend()

        try:
            forward()
        except RuntimeError as error:
            raise Unavailable(f"no such kernel: {str(error).splitlines()[0]}") from error
        return forward

    return build


def _as_graph(build: Callable[[Problem], Forward]) -> Callable[[Problem], Forward]:
    def build_graph(p: Problem) -> Forward:
        if not p.q.is_cuda or p.requires_grad:
            raise Unavailable("captured are forward passes on a GPU only")
        forward = build(p)
        forward()  # what is made once is made before the capture
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = forward()

        def replay() -> tuple[Tensor, ...]:
            graph.replay()
            return outputs

        return replay

    return build_graph


def _flash_attn(*, window: bool) -> Callable[[Problem], Forward]:
    """The package of that name, which keeps heads behind positions: strides, no copy."""

    def build(p: Problem) -> Forward:
        try:
            from flash_attn import flash_attn_func
        except ImportError as error:
            raise Unavailable(f"needs the package flash_attn: {error}") from error
        if not p.q.is_cuda or p.q.dtype not in (torch.float16, torch.bfloat16):
            raise Unavailable("flash_attn takes 16-bit tensors on a GPU only")
        before = p.num_samples // 2
        sides = (before, p.num_samples - before - 1) if window else (-1, -1)

        def forward() -> tuple[Tensor]:
            q, k, v = (x.transpose(1, 2) for x in (p.q, p.k, p.v))
            return (flash_attn_func(q, k, v, window_size=sides).transpose(1, 2),)

        try:
            forward()
        except RuntimeError as error:
            reason = str(error).partition("\n")[0]
            raise Unavailable(f"flash_attn does not run here: {reason}") from error
        return forward

    return build


def _smart_bird(method: str, padding: str = "") -> Callable[[Problem], Forward]:
    """Query heads that share keys share draws. Of a padded batch keys alone are masked.

    With ``padding`` queries are masked too, or there is none as the sequences are packed.
    """

    def build(p: Problem) -> Forward:
        options: dict[str, Any] = {"method": method, "num_index_heads": p.k.shape[1]}
        q, k, v, q_sketch, k_sketch = p.leaves
        if padding == PACKED:
            sequences = _sequences(p)
            q, k, v, q_sketch, k_sketch = (
                torch.cat(x, dim=-2) for x in zip(*sequences, strict=True)
            )
            lengths = torch.tensor(p.lengths, device=q.device)
            cu_seqlens = pad(lengths.cumsum(0), (1, 0)).int()
            options |= {"cu_seqlens_q": cu_seqlens, "cu_seqlens_k": cu_seqlens}
        elif p.lengths is not None:
            options["key_mask"] = p.key_mask
            if padding == QUERY_MASK:
                options["query_mask"] = p.key_mask
        known = inspect.signature(smart_bird_attention).parameters
        if unknown := [name for name in options if name not in known]:
            raise Unavailable(f"this version of smartbird has no {unknown[0]}")

        def forward() -> tuple[Tensor]:
            out = smart_bird_attention(q, k, v, q_sketch, k_sketch, p.num_samples, **options)
            assert isinstance(out, Tensor)
            return (out,)

        return forward

    return build


def _sequences(p: Problem) -> list[tuple[Tensor, ...]]:
    """q, k, v and sketches of each sequence of a padded batch alone, contiguous."""
    if p.lengths is None or p.requires_grad:
        raise Unavailable("timed for forward passes on a padded batch only")
    return [
        tuple(x[place : place + 1, ..., :length, :].contiguous() for x in p.leaves)
        for place, length in enumerate(p.lengths)
    ]


def _draw(method: str) -> Callable[[Problem], Forward]:
    """The drawing alone, for as many index heads as key/value heads."""

    def build(p: Problem) -> Forward:
        if p.requires_grad:
            raise Unavailable("drawing has no gradient")
        heads = p.k.shape[1]
        return lambda: sketch_sample(
            p.q_sketch, p.k_sketch, p.num_samples, num_index_heads=heads, method=method
        )

    return build


def _distilled(method: str) -> Callable[[Problem], Forward]:
    """A training step of one layer: attention, and the loss that teaches the sketch."""

    def build(p: Problem) -> Forward:
        def forward() -> tuple[Tensor, Tensor]:
            out, indices = smart_bird_attention(
                p.q,
                p.k,
                p.v,
                p.q_sketch,
                p.k_sketch,
                p.num_samples,
                method=method,
                return_indices=True,
            )
            return out, distill_loss(p.q, p.k, p.q_sketch, p.k_sketch, indices=indices)

        return forward

    return build


def _sdpa_distilled(p: Problem) -> Forward:
    """A step of dense warm-up: dense attention, and the loss that teaches the sketch by it."""
    attend = _sdpa(p)
    return lambda: (*attend(), distill_loss(p.q, p.k, p.q_sketch, p.k_sketch))


# ---- FlexAttention ----------------------------------------------------------------------------


def _flex_window(block: int) -> Callable[[Problem], Forward]:
    return lambda p: _compile_flex(p, window_mask(p.length, p.num_samples, block, p.q.device))


def _flex_blocks(p: Problem) -> Forward:
    # Its backward pass on a GPU knows no smaller blocks of keys.
    block = max(p.num_samples, 128) if p.q.is_cuda else p.num_samples
    return _compile_flex(
        p, random_block_mask(p.length, p.num_samples, p.q.shape[1], block, p.q.device)
    )


def _compile_flex(p: Problem, mask: BlockMask) -> Forward:
    options: dict[str, Any] = {"block_mask": mask, "enable_gqa": p.k.shape[1] != p.q.shape[1]}
    if p.requires_grad:
        try:
            flex_attention(p.q[:, :1, :1], p.k[:, :1, :1], p.v[:, :1, :1])
        except NotImplementedError as error:
            raise Unavailable(str(error)) from error
    # A graph for this problem alone: its shape, and the number of threads that is set now.
    compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True)

    def forward() -> tuple[Tensor]:
        out = compiled(p.q, p.k, p.v, **options)
        assert isinstance(out, Tensor)
        return (out,)

    try:
        with torch.set_grad_enabled(p.requires_grad):
            out = forward()
            if p.requires_grad:  # its backward pass is compiled when it is first run
                p.backward(out)
    except torch._dynamo.exc.BackendCompilerFailed as error:
        raise Unavailable(f"does not compile here: {str(error).splitlines()[0]}") from error
    return forward


def window_mask(
    length: int, num_samples: int, block: int, device: torch.device | str = "cpu"
) -> BlockMask:
    """Keys ``i - K // 2 <= j < i + K // 2`` of query i, found block by block.

    ``create_block_mask`` gives the same, but looks at all N x N pairs.
    """
    before, after = num_samples // 2, num_samples - num_samples // 2

    def in_window(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (j - i >= -before) & (j - i < after)

    num_blocks = _count_blocks(length, block)
    first = torch.arange(num_blocks, device=device) * block
    ahead = first - first[:, None]  # of the key block's first key to the query block's first query
    reached = (ahead + block - 1 >= -before) & (ahead - (block - 1) < after)
    whole = (ahead - (block - 1) >= -before) & (ahead + block - 1 < after)
    return _block_mask(reached & ~whole, whole, (block, block), length, in_window)


def random_block_mask(
    length: int, num_samples: int, heads: int, block: int, device: torch.device | str = "cpu"
) -> BlockMask:
    """For each head and block of queries one random block of keys, all of them kept.

    Blocks of whole keys are FlexAttention's fastest case; of the sizes tried 128 queries are best.
    Where ``block`` is more than K keys, so many fewer blocks of queries keep one that N K pairs are
    kept all the same.
    """
    num_query_blocks, num_key_blocks = _count_blocks(length, 128), _count_blocks(length, block)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(num_key_blocks, (1, heads, num_query_blocks, 1), generator=generator)
    keeps = torch.arange(num_query_blocks, device=device) % (block // num_samples) == 0
    whole = (drawn.to(device) == torch.arange(num_key_blocks, device=device)) & keeps[:, None]
    return _block_mask(torch.zeros_like(whole), whole, (128, block), length, None)


def _count_blocks(length: int, block: int) -> int:
    if length % block:
        raise Unavailable(f"N = {length} is not a multiple of its blocks of {block}")
    return length // block


def _block_mask(
    partial: Tensor,
    whole: Tensor,
    blocks: tuple[int, int],
    length: int,
    mask_mod: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor] | None,
) -> BlockMask:
    """From bool [..., query blocks, key blocks]: those kept in part, by ``mask_mod``, and whole."""

    def listed(kept: Tensor) -> tuple[Tensor, Tensor]:
        kept = kept.expand(1, whole.shape[1] if whole.dim() == 4 else 1, *whole.shape[-2:])
        order = kept.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
        return kept.sum(-1, dtype=torch.int32), order.int()

    mask: BlockMask = BlockMask.from_kv_blocks(
        *listed(partial),
        *listed(whole),
        BLOCK_SIZE=blocks,
        mask_mod=mask_mod,
        seq_lengths=(length, length),
    )
    return mask


# ---- Hugging Face: the layers' own methods, without their projections ---------------------------


def _longformer(p: Problem) -> Forward:
    """LongformerSelfAttention's sliding window: the key itself and K // 2 on each side.

    The layer also scores its padding mask, at the cost of its scores; that is left out.
    """
    with _transformers():
        from transformers import LongformerConfig
        from transformers.models.longformer.modeling_longformer import LongformerSelfAttention
    heads, head_dim = p.q.shape[1], p.q.shape[3]
    side = p.num_samples // 2
    _count_blocks(p.length, 2 * side)
    layer = LongformerSelfAttention(
        LongformerConfig(
            hidden_size=heads * head_dim, num_attention_heads=heads, attention_window=[2 * side]
        ),
        layer_id=0,
    ).eval()

    def forward() -> tuple[Tensor]:
        q, k, v = (x.transpose(1, 2) for x in (p.q * head_dim**-0.5, p.k, p.v))
        scores = layer._sliding_chunks_query_key_matmul(q, k, side)
        out = layer._sliding_chunks_matmul_attn_probs_value(scores.softmax(-1), v, side)
        return (out.transpose(1, 2),)

    return forward


def _bigbird(p: Problem) -> Forward:
    """BigBirdBlockSparseAttention with 8 blocks of K / 8 keys: 3 local, 2 global, 3 "random".

    In eval mode, the faster one, the random blocks are all the first block. The method returns the
    N x N matrix of probabilities as well, whether it is wanted or not.
    """
    with _transformers():
        from transformers import BigBirdConfig
        from transformers.models.big_bird.modeling_big_bird import (
            BigBirdBlockSparseAttention,
            BigBirdModel,
        )
    batch, heads, length, head_dim = p.q.shape
    if p.num_samples % 8:
        raise Unavailable(f"K = {p.num_samples} is not a multiple of its 8 blocks")
    block = p.num_samples // 8
    if _count_blocks(length, block) < 12:
        raise Unavailable(f"N = {length} is less than 12 blocks of {block}")
    layer = BigBirdBlockSparseAttention(
        BigBirdConfig(
            hidden_size=heads * head_dim,
            num_attention_heads=heads,
            block_size=block,
            num_random_blocks=3,
        )
    ).eval()
    blocked_mask, band_mask, from_mask, to_mask = BigBirdModel.create_masks_for_block_sparse_attn(
        torch.ones(batch, length, dtype=p.q.dtype), block
    )

    def forward() -> tuple[Tensor]:
        out, _ = layer.bigbird_block_sparse_attention(
            p.q,
            p.k,
            p.v,
            band_mask,
            from_mask,
            to_mask,
            blocked_mask,
            blocked_mask,
            heads,
            3,
            head_dim,
            block,
            block,
            batch,
            length,
            length,
            seed=0,
            plan_from_length=None,
            plan_num_rand_blocks=None,
        )
        return (out.transpose(1, 2),)

    return forward


@contextlib.contextmanager
def _transformers() -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise Unavailable(f"needs Hugging Face transformers: {error}") from error


# ---- plain PyTorch ------------------------------------------------------------------------------


def _composition(p: Problem) -> Forward:
    """Smart Bird as one writes it in PyTorch: softmax, multinomial without replacement, gather."""

    def forward() -> tuple[Tensor]:
        with torch.no_grad():
            scores = p.q_sketch @ p.k_sketch.mT * p.q_sketch.shape[-1] ** -0.5
            probabilities = scores.softmax(-1)

        def attend(b: int, h: int) -> Tensor:
            keys = torch.multinomial(probabilities[b], p.num_samples)
            scores = torch.einsum("nd,nkd->nk", p.q[b, h], p.k[b, h][keys]) * p.q.shape[-1] ** -0.5
            return torch.einsum("nk,nkd->nd", scores.softmax(-1), p.v[b, h][keys])

        return (_for_each_head(p, attend),)

    return forward


def _exact_topk(p: Problem) -> Forward:
    """Attention over the K keys with the largest exact scores of each head, from all N x N scores.

    The values are gathered, as that was faster than a product with a matrix of mostly zeros.
    """

    def attend(b: int, h: int) -> Tensor:
        scores = p.q[b, h] @ p.k[b, h].mT * p.q.shape[-1] ** -0.5
        top = scores.topk(p.num_samples, sorted=False)
        return torch.einsum("nk,nkd->nd", top.values.softmax(-1), p.v[b, h][top.indices])

    return lambda: (_for_each_head(p, attend),)


def _for_each_head(p: Problem, attend: Callable[[int, int], Tensor]) -> Tensor:
    """[B, H, N, D]. Head by head the temporaries are smaller and, as measured, the time is too."""
    batch, heads = p.q.shape[:2]
    return torch.stack([torch.stack([attend(b, h) for h in range(heads)]) for b in range(batch)])


# The longest problems are those beyond which a call takes tens of seconds to minutes, or N x N
# matrices of all heads take more memory than such a machine has.
CONTENDERS: dict[str, Contender] = {
    SDPA: Contender(_sdpa, 65536, "N^2 D operations take minutes", padded=True),
    SDPA + ONE_BY_ONE: Contender(_sdpa_one_by_one, padded=True),
    SDPA_FLASH: Contender(_sdpa_by(SDPBackend.FLASH_ATTENTION)),
    SDPA_CUDNN: Contender(_sdpa_by(SDPBackend.CUDNN_ATTENTION)),
    FLASH_ATTN: Contender(_flash_attn(window=False)),
    FLASH_ATTN_WINDOW: Contender(_flash_attn(window=True)),
    **{
        name: Contender(_flex_window(size), compiled=True)
        for name, size in zip(FLEX_WINDOWS, _FLEX_BLOCK_SIZES, strict=True)
    },
    FLEX_BLOCKS: Contender(_flex_blocks, compiled=True),
    BIGBIRD: Contender(_bigbird, 8192, "its N x N probabilities take H N^2 numbers"),
    LONGFORMER: Contender(_longformer),
    COMPOSITION: Contender(_composition, 4096, "H N^2 random numbers take tens of seconds"),
    EXACT_TOPK: Contender(_exact_topk, 8192, "selecting from H N^2 scores takes tens of seconds"),
    **{
        method + padding: Contender(_smart_bird(method, padding), padded=True)
        for method in (GUMBEL, SYSTEMATIC)
        for padding in ("", QUERY_MASK, PACKED)
    },
    **{DRAW + method: Contender(_draw(method)) for method in (GUMBEL, SYSTEMATIC)},
    SDPA_FLASH + GRAPH: Contender(_as_graph(_sdpa_by(SDPBackend.FLASH_ATTENTION))),
    **{
        method + GRAPH: Contender(_as_graph(_smart_bird(method))) for method in (GUMBEL, SYSTEMATIC)
    },
    SDPA + DISTILL: Contender(_sdpa_distilled, 65536, "N^2 D operations take minutes"),
    GUMBEL + DISTILL: Contender(_distilled(GUMBEL)),
    SYSTEMATIC + DISTILL: Contender(_distilled(SYSTEMATIC)),
}
