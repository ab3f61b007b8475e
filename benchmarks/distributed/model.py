"""Bytes by the formula of docs/distributed.md, and a model of times for more ranks than there are.

A model, not a measurement: what a pair of query and key and what a query cost a thread comes from
times of one process, what a byte costs from what several take longer. Ranks of the model have a
thread each, share the work evenly, and compute nothing while they receive.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Sequence

from benchmarks.distributed.measure import Time
from benchmarks.speed.contenders import Widths

BYTES = 4  # of a float32 and of an int32


def bytes_of_token(ranks: int, exchange: str, backward: bool, *, gloo: bool = False) -> float:
    """What a rank receives for each token of the sequence in a layer.

    Args:
        exchange: "all_gather" or "ulysses".
        backward: with the backward pass.
        gloo: whose reduce-scatter is an all-reduce, and so moves twice as much.
    """
    widths = Widths()
    tokens_of_others = (ranks - 1) / ranks
    keys_and_values = BYTES * widths.heads * 2 * widths.head_dim
    sketches = BYTES * widths.sketch_dim
    if exchange == "all_gather":
        passes = 1 + (2 + gloo if backward else 0)
        return tokens_of_others * (sketches + passes * keys_and_values)
    lists = BYTES * widths.heads * widths.num_samples
    passes = 2 if backward else 1
    # As many of queries and outputs as of keys and values.
    shared = (2 * passes * keys_and_values + lists) / ranks
    return tokens_of_others * (sketches + shared)


@dataclasses.dataclass(frozen=True)
class Model:
    """Of a forward pass, or with the backward pass.

    Attributes:
        backward: as above.
        pair: seconds of a thread for each query and key that it sees.
        query: seconds of a thread for each query.
        bandwidth: bytes a second that a rank receives.
        error: the largest relative difference from a time of one process that it was fitted on.
    """

    backward: bool
    pair: float
    query: float
    bandwidth: float
    error: float

    def work(self, length: int) -> float:
        """Seconds of a thread."""
        return self.pair * pairs(length) + self.query * length

    def seconds(self, length: int, ranks: int, bandwidth: float | None = None) -> float:
        """Of ranks that a network of ``bandwidth`` connects. None: gloo, as here."""
        here = bandwidth is None
        moved = length * bytes_of_token(ranks, "all_gather", self.backward, gloo=here)
        return self.work(length) / ranks + moved / (bandwidth or self.bandwidth)

    def efficiency(self, length: int, ranks: int, bandwidth: float | None = None) -> float:
        return self.work(length) / (ranks * self.seconds(length, ranks, bandwidth))


def pairs(length: int) -> float:
    """Of a query and a key that it sees."""
    return length * (length + 1) / 2


def fit(times: Sequence[Time]) -> Model:
    """The model whose relative errors are least, of times with or without the backward pass.

    Raises:
        ValueError: there are fewer than two lengths.
    """
    if len({time.length for time in times}) < 2:
        raise ValueError("a model needs the times of two lengths at least")
    # Least squares of (pair * pairs + query * length) / work - 1.
    work = [time.ranks * statistics.median(time.one) for time in times]
    a = [pairs(time.length) / seconds for time, seconds in zip(times, work, strict=True)]
    b = [time.length / seconds for time, seconds in zip(times, work, strict=True)]
    aa, bb, ab = (
        sum(x * y for x, y in zip(u, v, strict=True)) for u, v in ((a, a), (b, b), (a, b))
    )
    det = aa * bb - ab * ab
    pair, query = (sum(a) * bb - sum(b) * ab) / det, (sum(b) * aa - sum(a) * ab) / det
    error = max(abs(pair * x + query * y - 1) for x, y in zip(a, b, strict=True))
    # Likewise of (one + moved / bandwidth) / many - 1.
    one = [statistics.median(time.one) for time in times]
    many = [statistics.median(time.many) for time in times]
    moved = [
        time.length * bytes_of_token(time.ranks, "all_gather", time.backward, gloo=True)
        for time in times
    ]
    longer = sum(m * (b - a) / b**2 for a, b, m in zip(one, many, moved, strict=True))
    squares = sum((m / b) ** 2 for b, m in zip(many, moved, strict=True))
    bandwidth = squares / longer if longer > 0 else math.inf
    return Model(times[0].backward, pair, query, bandwidth, error)
