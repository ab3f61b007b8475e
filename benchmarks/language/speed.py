"""Times of reading and writing, the size of the cache, and what the model goes on to write."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from itertools import islice
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from benchmarks.language.attention import (
    DENSE,
    OURS,
    OURS_KV,
    OURS_LATE,
    attending,
    new_cache,
)
from benchmarks.language.model import Passage, Tokenizer, forget_after, forward, greedy

PREFILL, STEP, ATTENTION = "prefill", "step", "attention"
_PREFILL_SECONDS = 60.0  # no more repetitions of a prefill once all have taken so long
_WARM_UP = 256  # tokens
_TOKENS = 6  # decoded in a row, of which the first is left out: a cache may grow there


How = Callable[[str], AbstractContextManager[None]]


@dataclass(frozen=True)
class Time:
    """Seconds of each repetition.

    Attributes:
        what: ``PREFILL``, a text that is read whole; ``STEP``, a token that is decoded;
            ``ATTENTION``, what the attention functions and the cache take of that step.
        attention: ``DENSE``, which is SDPA with DynamicCache, or ``OURS``, ``OURS_KV`` or
            ``OURS_LATE``, with SketchCache.
        threads: of PyTorch.
        length: tokens that are read, or that are in the cache.
    """

    what: str
    attention: str
    threads: int
    length: int
    seconds: list[float]

    @property
    def median(self) -> float:
        return median(self.seconds)

    def __str__(self) -> str:
        return (
            f"{self.what}, {self.length} tokens, {self.attention}, {self.threads} threads: "
            f"{self.median * 1e3:.1f} ms"
        )


@dataclass(frozen=True)
class CacheSize:
    """What a cache takes.

    Attributes:
        attention: whose cache.
        length: tokens in it.
        filled: bytes of these tokens.
        allocated: bytes that it holds once one more token was added, with room for others.
    """

    attention: str
    length: int
    filled: int
    allocated: int


@dataclass(frozen=True)
class Writing:
    """How a model goes on with a passage.

    Attributes:
        passage: that it read.
        read: tokens.
        texts: what stands in the document, under the name "document", and what the model wrote
            with each attention.
    """

    passage: str
    read: int
    texts: dict[str, str]


@dataclass(frozen=True)
class Speed:
    """All that was measured."""

    num_samples: int
    times: list[Time]
    caches: list[CacheSize]
    writing: Writing


@contextmanager
def attention_clock(model: Any, kept: Any) -> Iterator[list[float]]:
    """Count the seconds that attention functions and updates of ``kept`` take, in the one item."""
    spent = [0.0]

    def timed(call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **keywords: Any) -> Any:
            start = time.perf_counter()
            result = call(*arguments, **keywords)
            spent[0] += time.perf_counter() - start
            return result

        return run

    name = model.config._attn_implementation
    ALL_ATTENTION_FUNCTIONS[name] = timed(ALL_ATTENTION_FUNCTIONS[name])
    for layer in kept.layers:
        layer.update = timed(layer.update)
    try:
        yield spent
    finally:
        del ALL_ATTENTION_FUNCTIONS[name]
        for layer in kept.layers:
            del layer.update


@torch.no_grad()
def measure_speed(
    model: Any,
    tokenizer: Tokenizer,
    passage: Passage,
    num_samples: int,
    *,
    lengths: Sequence[int],
    contexts: Sequence[int],
    repeats: int,
    threads: Sequence[int],
    written: int,
    say: Callable[[Time], None] = lambda time: None,
) -> Speed:
    """Dense attention and ours in turn. Leaves the last number of ``threads`` set.

    Args:
        model: converted; it is left with ``num_samples``.
        passage: at least as long as the longest of ``lengths`` and ``contexts``.
        num_samples: K of ours.
        lengths: tokens of each prefill, ascending.
        contexts: tokens in the cache of a step, at most the last of ``lengths``.
        repeats: of each prefill, fewer where it takes long, and of decoding.
        threads: numbers of threads, each of which is measured.
        written: tokens that are written behind the passage.
    """
    times: list[Time] = []
    caches: list[CacheSize] = []
    kept: dict[str, Any] = {}
    texts: dict[str, str] = {}

    def how(attention: str) -> AbstractContextManager[None]:
        return attending(model, attention, num_samples)

    def add(what: str, attention: str, length: int, seconds: list[float]) -> None:
        times.append(Time(what, attention, torch.get_num_threads(), length, seconds))
        say(times[-1])

    for number in threads:
        torch.set_num_threads(number)
        for length in lengths:
            tokens = passage.tokens[:, :length]
            for attention, seconds in _read(model, tokens, how, kept, repeats).items():
                add(PREFILL, attention, length, seconds)
        if number == threads[-1]:
            for attention, one in kept.items():
                if attention not in (DENSE, OURS):
                    continue  # its cache is that of OURS
                with how(attention):
                    caches += [_size(model, attention, one, length) for length in lengths]
                    texts[attention] = _write(model, tokenizer, passage.tokens, one, written)
        for length in sorted(contexts, reverse=True):  # a cache only grows shorter
            steps, parts = _decode(model, passage.tokens[:, :length], how, kept, repeats)
            for attention in kept:
                add(STEP, attention, length, steps[attention])
                add(ATTENTION, attention, length, parts[attention])
    read = lengths[-1] - written
    document = tokenizer.decode(passage.tokens[0, read : lengths[-1]].tolist())
    writing = Writing(passage.name, read, {"document": document, **texts})
    return Speed(num_samples, times, caches, writing)


def _read(
    model: Any, tokens: Tensor, how: How, kept: dict[str, Any], repeats: int
) -> dict[str, list[float]]:
    """Seconds to read ``tokens`` [1, N] into new caches, which are left in ``kept``."""
    seconds: dict[str, list[float]] = {name: [] for name in (DENSE, OURS, OURS_KV, OURS_LATE)}
    for attention in seconds:  # what the first call sets up
        with how(attention):
            forward(model, tokens[:, :_WARM_UP])
    for _ in range(repeats):
        for attention in seconds:
            with how(attention):
                kept.pop(attention, None)  # so that there is one at a time
                kept[attention] = new_cache(model, attention)
                start = time.perf_counter()
                forward(model, tokens, kept[attention])
                seconds[attention].append(time.perf_counter() - start)
        if sum(map(sum, seconds.values())) > _PREFILL_SECONDS:
            break
    return seconds


def _write(model: Any, tokenizer: Tokenizer, tokens: Tensor, kept: Any, written: int) -> str:
    """What the model writes in place of the last tokens that a cache has read."""
    read = kept.get_seq_length() - written
    forget_after(kept, read - 1)
    writer = greedy(model, tokens[:, read - 1 : read], kept)
    return tokenizer.decode(list(islice(writer, written)))


def _decode(
    model: Any, tokens: Tensor, how: How, kept: dict[str, Any], repeats: int
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Seconds of whole steps and of their attention, behind ``tokens`` [1, N]."""
    steps: dict[str, list[float]] = {name: [] for name in kept}
    parts: dict[str, list[float]] = {name: [] for name in kept}
    for _ in range(repeats):
        for attention, one in kept.items():
            forget_after(one, tokens.shape[1] - 1)
            with how(attention):
                for place in range(_TOKENS):
                    with attention_clock(model, one) as spent:
                        start = time.perf_counter()
                        forward(model, tokens[:, -1:], one)
                        seconds = time.perf_counter() - start
                    if place > 0:
                        steps[attention].append(seconds)
                        parts[attention].append(spent[0])
    return steps, parts


def _size(model: Any, attention: str, kept: Any, length: int) -> CacheSize:
    """Of a cache like ``kept`` that has just read ``length`` tokens, and then one more."""
    fresh = new_cache(model, attention)
    for old, new in zip(kept.layers, fresh.layers, strict=True):
        keys, values = old.keys[:, :, :length], old.values[:, :, :length]
        new.update(keys, values)
        new.update(keys[:, :, :1], values[:, :, :1])
    tensors = [
        x
        for layer in fresh.layers
        for x in (layer.keys, layer.values, getattr(layer, "sketches", None))
        if x is not None
    ]
    each = sum(x.nbytes // x.shape[2] for x in tensors)
    allocated = sum(x.untyped_storage().nbytes() for x in tensors)
    return CacheSize(attention, length, each * length, allocated)
