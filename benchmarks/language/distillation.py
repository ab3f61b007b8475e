"""Sketches that are trained for some minutes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import islice
from typing import Any

from torch import Tensor

from smartbird.hf import convert, distil, report

_TIMED = 2  # steps, of which the first sets things up


def distil_for(model: Any, passages: Iterator[Tensor], minutes: float, calibration: Tensor) -> int:
    """Train the sketches that ``convert`` makes of ``calibration`` for about so long.

    Args:
        model: converted; it is left with the default settings of ``convert``.
        passages: int64 [1, N], gone through again where they are too few.
        minutes: by the time that a step takes, so that the learning rate falls to zero at the end.
        calibration: int64 [B, N].

    Returns:
        Steps.
    """
    convert(model)
    some = list(islice(passages, _TIMED))
    for passage in some:
        start = time.perf_counter()
        distil(model, [passage], steps=1)
        stepped = time.perf_counter()
        report(model, passage)  # which distil ends with, once
        seconds = stepped - start - (time.perf_counter() - stepped)
    steps = max(int(60 * minutes / seconds), 1)
    convert(model, calibration=calibration)  # what the steps above changed begins anew
    distil(model, [*some, *islice(passages, max(steps - _TIMED, 0))], steps=steps)
    return steps
