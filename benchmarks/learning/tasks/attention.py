"""The one registry of attentions: what `--attention` chooses from."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.learning.tasks.config import Config
from smartbird import ops, patterns
from smartbird._visible import Visible, check_room
from smartbird.functional import dense_attention
from smartbird.inspection import LayerCall
from smartbird.nn import SampledAttention, SmartBirdAttention
from smartbird.nn.sampled import SamplingOptions
from smartbird.ops.dense import log_sum_exp


class ProjectedAttention(nn.Module):
    """Self-attention with the projections of `SmartBirdAttention` around `attend`.

    Called with x [B, N, dim] and key_mask, bool [B, N] (True = may be attended) or None; returns
    [B, N, dim].
    """

    def __init__(self, config: Config, is_causal: bool) -> None:
        super().__init__()
        self.heads, self.num_samples, self.is_causal = config.heads, config.num_samples, is_causal
        self.head_dim = config.dim // config.heads
        self.kv_heads = config.num_kv_heads or config.heads
        self.in_proj = nn.Linear(config.dim, (config.heads + 2 * self.kv_heads) * self.head_dim)
        self.out_proj = nn.Linear(config.dim, config.dim)
        nn.init.xavier_uniform_(self.in_proj.weight)
        nn.init.zeros_(self.in_proj.bias)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, x: Tensor, key_mask: Tensor | None = None) -> Tensor:
        out = self.attend(*self.project(x), key_mask)
        result: Tensor = self.out_proj(out.transpose(1, 2).flatten(2))
        return result

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q [B, H, N, D], k and v [B, H_kv, N, D] of x [B, N, dim]."""
        heads = self.in_proj(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        q, k, v = heads.split((self.heads, self.kv_heads, self.kv_heads), dim=1)
        return q, k, v

    def attend(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> Tensor:
        """Attention of what `project` gives -> [B, H, N, D]."""
        raise NotImplementedError

    def indices(self, q: Tensor, k: Tensor, key_mask: Tensor | None) -> Tensor | None:
        """The keys attended to, int32 [B or 1, H or 1, N, K]; None: every valid one."""
        raise NotImplementedError

    def call(self, x: Tensor, key_mask: Tensor | None = None) -> LayerCall:
        """What a call of the layer looks for and chooses; in evaluation, always the same."""
        q, k, _ = self.project(x)
        indices = self.indices(q, k, key_mask)
        return LayerCall(
            q=q,
            k=k,
            indices=None if indices is None else indices.expand(len(q), -1, -1, -1),
            is_causal=self.is_causal,
            key_mask=key_mask,
            query_mask=key_mask,
        )


class DenseAttention(ProjectedAttention):
    """Every key: PyTorch's scaled_dot_product_attention."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> Tensor:
        return dense_attention(q, k, v, is_causal=self.is_causal, key_mask=key_mask)

    def indices(self, q: Tensor, k: Tensor, key_mask: Tensor | None) -> None:
        return None


class PatternAttention(ProjectedAttention):
    """K keys per query that a pattern of `smartbird.patterns` names, through the gather kernel."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> Tensor:
        indices = self.indices(q, k, key_mask).expand(len(q), -1, -1, -1)
        # As SmartBirdAttention: rows of one head side by side are faster to gather.
        return ops.gather_attention(q.contiguous(), k.contiguous(), v.contiguous(), indices)

    def indices(self, q: Tensor, k: Tensor, key_mask: Tensor | None) -> Tensor:
        """The keys, int32 [B or 1, H or 1, N, K]."""
        raise NotImplementedError


class WindowAttention(PatternAttention):
    """The K nearest keys; one less where K is even and both sides are seen."""

    def indices(self, q: Tensor, k: Tensor, key_mask: Tensor | None) -> Tensor:
        window = self.num_samples if self.is_causal else self.num_samples - 1 + self.num_samples % 2
        return patterns.window_indices(
            q.shape[2], k.shape[2], window, is_causal=self.is_causal, key_mask=key_mask
        )


class RandomAttention(PatternAttention):
    """Random keys, drawn anew in training, and the `window` nearest as `smartbird` has them."""

    num_sinks = 0
    redraws = True
    seed: Tensor

    def __init__(self, config: Config, is_causal: bool) -> None:
        super().__init__(config, is_causal)
        self.window = config.window
        self.register_buffer("seed", ops.draw_seed())

    def indices(self, q: Tensor, k: Tensor, key_mask: Tensor | None) -> Tensor:
        return patterns.bigbird_indices(
            q.shape[2],
            k.shape[2],
            self.num_samples,
            window=self.window,
            num_sinks=self.num_sinks,
            num_index_heads=self.heads,
            is_causal=self.is_causal,
            key_mask=key_mask,
            seed=None if self.training and self.redraws else self.seed,
        )


class BigBirdAttention(RandomAttention):
    """Global, local and random keys, 2 : 3 : 3 of K as in Big Bird; drawn once."""

    redraws = False

    def __init__(self, config: Config, is_causal: bool) -> None:
        super().__init__(config, is_causal)
        self.num_sinks, self.window = config.num_samples // 4, 3 * config.num_samples // 8


class StridedAttention(PatternAttention):
    """Half of the heads local, half strided; the stride is that of `seq_len`, however long x is."""

    def __init__(self, config: Config, is_causal: bool) -> None:
        super().__init__(config, is_causal)
        # A single head has half of its places for the strided keys.
        places = config.num_samples if config.heads > 1 else max(1, config.num_samples // 2)
        self.stride = -(-config.seq_len // places)

    def indices(self, q: Tensor, k: Tensor, key_mask: Tensor | None) -> Tensor:
        return patterns.strided_indices(
            q.shape[2],
            k.shape[2],
            self.num_samples,
            num_index_heads=self.heads,
            stride=self.stride,
            is_causal=self.is_causal,
            key_mask=key_mask,
            device=q.device,
        )


class RoutingAttention(PatternAttention):
    """The K keys nearest the centroid of each query's cluster, of about N / K clusters.

    The centroids start at random and follow the queries and keys of every training batch.
    """

    # The paper's 0.999 would keep much of the random start in runs of a few hundred steps.
    decay = 0.99
    centroids: Tensor

    def __init__(self, config: Config, is_causal: bool) -> None:
        super().__init__(config, is_causal)
        num_clusters = -(-config.seq_len // config.num_samples)
        centroids = torch.randn(config.heads, num_clusters, config.dim // config.heads)
        self.register_buffer("centroids", nn.functional.normalize(centroids, dim=-1))

    def indices(self, q: Tensor, k: Tensor, key_mask: Tensor | None) -> Tensor:
        indices = patterns.routing_indices(
            q, k, self.centroids, self.num_samples, is_causal=self.is_causal, key_mask=key_mask
        )
        if self.training:
            moved = patterns.update_centroids(
                self.centroids,
                torch.cat([q, k.repeat_interleave(self.heads // self.kv_heads, dim=1)], dim=2),
                decay=self.decay,
                key_mask=None if key_mask is None else key_mask.repeat(1, 2),
            )
            self.centroids.copy_(moved)
        return indices


class OracleAttention(PatternAttention):
    """The K keys with the largest exact scores of each head."""

    def indices(self, q: Tensor, k: Tensor, key_mask: Tensor | None) -> Tensor:
        return patterns.oracle_indices(
            q, k, self.num_samples, is_causal=self.is_causal, key_mask=key_mask
        )


class DistillationControl(SampledAttention):
    """Distils as `ops.distill_loss` does not, to show what its choices are worth."""

    def _log_probabilities(
        self, scores: Tensor, q_sketch: Tensor, k_sketch: Tensor, visible: Visible
    ) -> Tensor:
        """Of the sketches for the drawn keys, from their scores [B, H_i, N, K]."""
        lse = log_sum_exp(q_sketch, k_sketch, visible, self._sketch_scale(q_sketch))
        return scores - lse.repeat_interleave(scores.shape[1] // lse.shape[1], 1).unsqueeze(-1)

    def _target(self, probabilities: Tensor) -> Tensor:
        """What the sketch is to come near to, from that of each head [B, H_i, H / H_i, N, K]."""
        return probabilities.mean(2)

    def _sketch_scale(self, q_sketch: Tensor) -> float:
        return q_sketch.shape[3] ** -0.5 if self.sketch_scale is None else self.sketch_scale

    def distill_loss(
        self,
        q: Tensor,
        k: Tensor,
        q_sketch: Tensor,
        k_sketch: Tensor,
        visible: Visible,
        indices: Tensor | None,
        log_inclusion: Tensor | None,
        *,
        call: Any = None,
    ) -> Tensor:
        if call is not None:
            raise ValueError("ContextParallel does not serve this loss")
        if indices is None:
            return super().distill_loss(q, k, q_sketch, k_sketch, visible, None, None)
        visible = visible.residual()  # what a row is forced to hold, the sketch need not know
        free = visible.free_slots(indices)
        num_index_heads = indices.shape[1]
        sketches = q_sketch.repeat_interleave(num_index_heads // q_sketch.shape[1], 1)
        scores = ops.gather_scores(sketches, k_sketch, indices, scale=self._sketch_scale(q_sketch))
        scale = q.shape[3] ** -0.5 if self.scale is None else self.scale
        logits = ops.gather_scores(
            q.detach(), k.detach(), indices, scale=scale / self.distill_temperature
        )
        logits = torch.unflatten(logits, 1, (num_index_heads, -1))
        if log_inclusion is not None and self.distill_correction:
            logits = logits - log_inclusion.unsqueeze(2)
        # Finite, as a row without a free key must leave no NaN in the gradient.
        least = torch.finfo(scores.dtype).min
        target = self._target(logits.masked_fill(~free.unsqueeze(2), least).softmax(-1))
        scores = scores.masked_fill(~free, least)
        learned = self._log_probabilities(scores, q_sketch, k_sketch, visible)
        agreement = torch.where(free, target * learned, 0.0).sum(-1).mean(1)
        answered = free.any(-1).any(1)
        return -agreement[answered].sum() / answered.sum().clamp(min=1)


class RestrictedSmartBird(DistillationControl):
    """The sketch's probabilities are normalised over the drawn keys only.

    Such a loss never lowers the score of a key that was not drawn.
    """

    def _log_probabilities(
        self, scores: Tensor, q_sketch: Tensor, k_sketch: Tensor, visible: Visible
    ) -> Tensor:
        return scores.log_softmax(-1)


class LargestSmartBird(DistillationControl):
    """The target of a key is that of the head which looks at it most, not the mean of the heads."""

    def _target(self, probabilities: Tensor) -> Tensor:
        largest = probabilities.amax(2)
        return largest / largest.sum(-1, keepdim=True)


def _smartbird(
    config: Config, is_causal: bool, core: type[SampledAttention] = SampledAttention
) -> SmartBirdAttention:
    sampling = SamplingOptions(
        num_samples=config.num_samples,
        num_index_heads=config.num_index_heads,
        method=config.method,
        eval_method=config.eval_method,
        correction=config.correction,
        temperature=config.temperature,
        uniform_share=config.uniform_share,
        window=config.window,
        num_sinks=config.num_sinks,
        distill_temperature=config.distill_temperature,
        distill_correction=config.distill_correction,
        is_causal=is_causal,
    )
    layer = SmartBirdAttention(
        config.dim,
        config.heads,
        num_kv_heads=config.num_kv_heads,
        sketch_dim=config.sketch_dim,
        num_sketches=config.num_sketches,
        learning=config.learning,
        **sampling,
    )
    if core is not SampledAttention:
        sampling["num_index_heads"] = layer.core.num_index_heads
        layer.core = core(
            config.heads,
            num_kv_heads=config.num_kv_heads,
            distill="distill" in config.learning,
            **sampling,
        )
    return layer


def _untrained(config: Config, is_causal: bool) -> SmartBirdAttention:
    """Keys drawn by a sketch that stays as it was initialised."""
    return _smartbird(dataclasses.replace(config, learning=()), is_causal)


# A layer is called as attention(x, key_mask=key_mask): see ProjectedAttention.
ATTENTIONS: dict[str, Callable[[Config, bool], nn.Module]] = {
    "smartbird": _smartbird,
    "untrained": _untrained,
    "smartbird-restricted": functools.partial(_smartbird, core=RestrictedSmartBird),
    "smartbird-largest": functools.partial(_smartbird, core=LargestSmartBird),
    "dense": DenseAttention,
    "window": WindowAttention,
    "random": RandomAttention,
    "bigbird": BigBirdAttention,
    "strided": StridedAttention,
    "routing": RoutingAttention,
    "oracle": OracleAttention,
}


_SMART_BIRDS = ("smartbird", "untrained", "smartbird-restricted", "smartbird-largest")
_OF_DISTILLATION = ("distill_weight", "distill_temperature", "distill_correction")
_OF_SMART_BIRD = (
    *("num_sinks", "num_index_heads", "sketch_dim", "num_sketches"),
    *("method", "eval_method", "correction"),
    *("temperature", "uniform_share", "learning", *_OF_DISTILLATION, "dense_warmup"),
    *("anneal_samples", "anneal_steps", "share_sketch", "reuse"),
)
_WITHOUT_CHANCE = ("topk", "dealt")  # methods whose keys need no correction


def unused_by_attention(config: Config) -> dict[str, str]:
    """The fields that the attention of a run has no use for, each with the reason."""
    unused: tuple[str, ...] = ()
    if config.attention == "untrained":
        unused = ("learning", *_OF_DISTILLATION)
    elif config.attention not in _SMART_BIRDS:
        unused = _OF_SMART_BIRD
        if config.attention != "random":
            unused += ("window",)
        if config.attention == "dense":
            unused += ("num_samples",)
    return dict.fromkeys(unused, f"attention {config.attention}")


def unused_by_options(config: Config) -> dict[str, str]:
    """The fields that other fields of a run leave without a use, each with the reason."""
    unused: dict[str, str] = {}
    if config.layers == 1:
        unused |= dict.fromkeys(("share_sketch", "reuse"), "layers 1")
    if config.method in _WITHOUT_CHANCE:
        names = ["temperature", "distill_correction"]
        if config.eval_method in (None, *_WITHOUT_CHANCE):
            names.append("correction")
        unused |= dict.fromkeys(names, f"method {config.method}")
    if "distill" not in config.learning:
        routes = " ".join(config.learning) or "nothing"
        unused |= dict.fromkeys(_OF_DISTILLATION, f"learning {routes}")
    elif config.distill_weight == 0.0:
        unused |= dict.fromkeys(_OF_DISTILLATION[1:], "distill_weight 0")
    if config.reuse > 1 and config.reuse % config.share_sketch == 0:
        unused |= {"share_sketch": f"reuse {config.reuse}"}
    return unused


def forced_keys(config: Config) -> tuple[int, int]:
    """Of a run's attention: nearest keys and leading keys that each row must hold."""
    if config.attention in _SMART_BIRDS:
        return config.window, config.num_sinks
    return config.window if config.attention == "random" else 0, 0


def check_forced_keys(config: Config, is_causal: bool) -> None:
    """Refuse more forced keys than `num_samples`, of the attentions that force any.

    Raises:
        ValueError: says how many are forced, and by what.
    """
    if config.attention in ("random", *_SMART_BIRDS):
        check_room(config.num_samples, *forced_keys(config), is_causal)
