"""What one query of a real model sketched, drew and attended to: the data of the pictures."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.language.model import SMOLLM2, calibration_tokens, load_model
from smartbird import ops
from smartbird.functional import smart_bird_attention, smart_bird_attention_varlen
from smartbird.hf import convert
from smartbird.nn.training import observed

# Who reads its last word may look for what followed it before.
SENTENCE = (
    "In 1843 Ada Lovelace wrote to Babbage about the engine. It could weave algebra as the loom "
    "weaves flowers and leaves. When the notes were done, Ada Lovelace wrote to"
)
ANSWER = " Babbage"
NUM_SAMPLES, HEADS = 8, 3
CALIBRATION = 1024  # tokens of each passage that the sketches begin with
DRAWS = 4096  # that inclusion is counted over
METHODS = ("gumbel", "systematic", "multinomial", "topk")


@dataclasses.dataclass(frozen=True)
class Drawn:
    """One query, the last of a sentence, in one layer of a model.

    Attributes:
        model: which.
        layer: where, from 0.
        head_dim, sketch_dim: D and S.
        num_samples: K.
        method: by which the model draws.
        pieces: the tokens of the sentence as text.
        heads: three heads; the first is shown alone where there is one.
        sketch: of the first head, the sketch's probabilities.
        attention: of the first head, those of dense attention.
        keys: of each head, those that it drew.
        weights: of the first head, its attention over these, as the model corrects it.
        mass: of each head, the share of dense attention on its keys.
        inclusion: by method, how often a draw holds each key, of the first head's sketch.
        forms: the keys of the first head by how the call was made.
    """

    model: str
    layer: int
    head_dim: int
    sketch_dim: int
    num_samples: int
    method: str
    pieces: list[str]
    heads: list[int]
    sketch: list[float]
    attention: list[float]
    keys: list[list[int]]
    weights: list[float]
    mass: list[float]
    inclusion: dict[str, list[float]]
    forms: dict[str, list[int]]

    @classmethod
    def load(cls, path: Path) -> Drawn:
        return cls(**json.loads(path.read_text(encoding="utf-8")))


@dataclasses.dataclass(frozen=True)
class _Call:
    """Of one layer: q [1, H, N, D], k [1, H_kv, N, D], their sketches and the keys drawn."""

    q: Tensor
    k: Tensor
    q_sketch: Tensor
    k_sketch: Tensor
    indices: Tensor

    def attention(self, scale: float) -> Tensor:
        """Of the last query, [H, N]."""
        k = self.k.repeat_interleave(self.q.shape[1] // self.k.shape[1], 1)
        return (self.q[0, :, -1:] @ k[0].mT * scale).softmax(-1)[:, 0]


@torch.no_grad()
def read_sentence() -> Drawn:
    """Lets SmolLM2 read the sentence; takes the head that looks for what followed most.

    Raises:
        benchmarks.language.model.Unavailable: a package is missing.
    """
    model, tokenizer = load_model()
    convert(
        model,
        num_samples=NUM_SAMPLES,
        window=0,
        num_sinks=0,
        min_length=0,
        calibration=calibration_tokens(tokenizer, CALIBRATION),
    )
    tokens = tokenizer.encode(SENTENCE)
    answer = tokenizer.encode(ANSWER)[0]
    calls: dict[str, _Call] = {}
    with observed(model, lambda name, _: partial(_note, calls, name)):
        model(torch.tensor([tokens]), use_cache=False)
    cores = [dict(model.named_modules())[name] for name in calls]
    layers = list(calls.values())
    scale = cores[0].scale
    looks = torch.stack([call.attention(scale)[:, tokens.index(answer)] for call in layers])
    layer, first = divmod(int(looks.argmax()), looks.shape[1])
    call, core = layers[layer], cores[layer]
    group = call.q.shape[1] // call.k.shape[1]
    # Of every other group of heads that share keys, the one that looks there most.
    others = [
        int(looks[layer, start : start + group].argmax()) + start
        for start in range(0, looks.shape[1], group)
        if start != first // group * group
    ]
    heads = [first, *others][:HEADS]
    attention = call.attention(scale)
    drawing: dict[str, Any] = {"scale": core.sketch_scale, "is_causal": True}
    seed = torch.tensor(core.eval_seed)
    indices, log_inclusion = ops.sketch_sample(
        call.q_sketch,
        call.k_sketch,
        NUM_SAMPLES,
        num_index_heads=call.indices.shape[1],
        method=core.method,
        seed=seed,
        **drawing,
    )
    assert torch.equal(indices, call.indices), "the model draws otherwise"
    keys = [indices[0, head, -1].tolist() for head in heads]
    logits = attention[first, keys[0]].log() - log_inclusion[0, first, -1]
    one = call.q_sketch[:, first], call.k_sketch[:, first // group]
    sketch = (one[0][0, -1] @ one[1][0].T * core.sketch_scale).softmax(-1)
    return Drawn(
        model=SMOLLM2,
        layer=layer,
        head_dim=call.q.shape[3],
        sketch_dim=call.q_sketch.shape[3],
        num_samples=NUM_SAMPLES,
        method=core.method,
        pieces=[tokenizer.decode([token]) for token in tokens],
        heads=heads,
        sketch=sketch.tolist(),
        attention=attention[first].tolist(),
        keys=keys,
        weights=logits.softmax(-1).tolist(),
        mass=[float(attention[h, k].sum()) for h, k in zip(heads, keys, strict=True)],
        inclusion={method: _inclusion(*one, method, drawing) for method in METHODS},
        forms=_forms(call, core, first),
    )


def _note(
    calls: dict[str, _Call],
    name: str,
    q: Tensor,
    k: Tensor,
    q_sketch: Tensor,
    k_sketch: Tensor,
    visible: Any,
    indices: Tensor | None,
) -> None:
    assert indices is not None
    calls[name] = _Call(q, k, q_sketch, k_sketch, indices)


def _inclusion(
    q_sketch: Tensor, k_sketch: Tensor, method: str, drawing: dict[str, Any]
) -> list[float]:
    """How often a draw for the last query holds each key; with replacement more than once."""
    counts = torch.zeros(k_sketch.shape[1])
    for draw in range(DRAWS):
        indices, _ = ops.sketch_sample(
            q_sketch[:, -1:],
            k_sketch,
            NUM_SAMPLES,
            method=method,
            seed=torch.tensor([draw, 0]),
            **drawing,
        )
        counts += indices.flatten().bincount(minlength=len(counts))
    return [float(x) for x in counts / DRAWS]


def _forms(call: _Call, core: Any, head: int) -> dict[str, list[int]]:
    """The keys that the last query draws, by how its sequence is computed."""
    whole = (call.q, call.k, call.k, call.q_sketch, call.k_sketch)
    length, number = call.q.shape[2], call.indices.shape[1]
    options: dict[str, Any] = {
        "num_index_heads": number,
        "method": core.method,
        "is_causal": True,
        "scale": core.scale,
        "sketch_scale": core.sketch_scale,
        "seed": torch.tensor(core.eval_seed),
        "return_indices": True,
    }

    def attend(tensors: Sequence[Tensor], **more: Any) -> Tensor:
        q, k, v, q_sketch, k_sketch = tensors
        given: dict[str, Any] = {**options, **more}
        indices: Tensor = smart_bird_attention(q, k, v, q_sketch, k_sketch, NUM_SAMPLES, **given)[1]
        return indices

    def last_rows(first: int) -> tuple[Tensor, ...]:
        q, k, v, q_sketch, k_sketch = whole
        return q[:, :, first:], k, v, q_sketch[:, :, first:], k_sketch

    other = [x.flip(2) for x in whole]
    # Longer by 9 keys, and padded by as many.
    longer = [torch.cat([y, x[:, :, :9]], 2) for x, y in zip(whole, other, strict=True)]
    padded = [torch.cat([x, torch.zeros_like(x[:, :, :9])], 2) for x in whole]
    batch = [torch.cat(pair) for pair in zip(longer, padded, strict=True)]
    mask = torch.arange(length + 9) < torch.tensor([[length + 9], [length]])
    ids = torch.tensor([1, 0, 2])
    of_batch = attend(batch, key_mask=mask, query_mask=mask, sequence_ids=ids[:2])
    q, k, v, q_sketch, k_sketch = (
        torch.cat([y, x, y[:, :, :5]], 2)[0].transpose(0, 1)
        for x, y in zip(whole, other, strict=True)
    )
    cu_seqlens = torch.tensor([0, length, 2 * length, 2 * length + 5]).int()
    _, of_pack = smart_bird_attention_varlen(
        *(q, k, v, q_sketch, k_sketch),
        num_samples=NUM_SAMPLES,
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_k=cu_seqlens,
        sequence_ids=ids,
        **options,
    )
    found = {
        "alone": attend(whole)[0, head, -1],
        "second of a padded batch": of_batch[1, head, length - 1],
        "packed between others": of_pack[head, 2 * length - 1] - length,
        "the second half, on all keys": attend(last_rows(length // 2))[0, head, -1],
        "one query on a cache": attend(last_rows(length - 1))[0, head, -1],
    }
    return {form: indices.tolist() for form, indices in found.items()}
