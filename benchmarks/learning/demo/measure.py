"""What the demonstration measures: two trainings, time against length, and one passage's draws."""

from __future__ import annotations

import dataclasses
import multiprocessing
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Encoding
from torch import Tensor
from tqdm import tqdm

from benchmarks.learning.tasks import Config, Result, load_model, train
from benchmarks.learning.tasks.files import CHECKPOINT
from benchmarks.learning.tasks.sotu import PERIODS, Address, Sotu, period_of
from smartbird import ops
from smartbird.functional import smart_bird_attention
from smartbird.inspection import record
from smartbird.nn import seed_evaluation

# The attention problem that is timed, of the size of one layer of BERT base.
HEADS, HEAD_DIM, SKETCH_DIM, NUM_SAMPLES = 12, 64, 16, 64
REPETITIONS = 3
DRAWS = 8  # evaluations of the passage, each with a draw of its own


def train_alone(config: Config) -> Result:
    """`tasks.train` in a process of its own, so that its peak memory is its own.

    Goes on with a run that was stopped, and gives the result of one that is finished.
    """
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=spawn) as process:
        resume = (Path(config.out) / CHECKPOINT).exists()
        return process.submit(train, config, resume=resume).result()


@dataclasses.dataclass(frozen=True)
class Timing:
    """Median seconds of one attention call at one length; backward includes the forward pass.

    The backward pass of Smart Bird includes that of the loss that teaches its sketch.
    """

    length: int
    dense_forward: float
    smartbird_forward: float
    dense_backward: float
    smartbird_backward: float


def time_lengths(lengths: Sequence[int]) -> list[Timing]:
    """Times dense and Smart Bird attention, float32, one sequence, at each length."""
    return [_time_length(length) for length in tqdm(lengths, desc="timing", unit="length")]


def _time_length(length: int) -> Timing:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).requires_grad_()

    q, k, v = (normal(1, HEADS, length, HEAD_DIM) for _ in range(3))
    q_sketch, k_sketch = (normal(1, length, SKETCH_DIM) for _ in range(2))

    def dense() -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)

    def smartbird() -> tuple[Tensor, Tensor]:
        out, indices = smart_bird_attention(
            q, k, v, q_sketch, k_sketch, NUM_SAMPLES, return_indices=True
        )
        return out, indices

    def dense_step() -> None:
        torch.autograd.backward(dense().sum())

    def smartbird_step() -> None:
        out, indices = smartbird()
        loss = ops.distill_loss(q, k, q_sketch, k_sketch, indices=indices)
        torch.autograd.backward(out.sum() + loss)

    with torch.inference_mode():
        forward = _medians([dense, smartbird])
    return Timing(length, *forward, *_medians([dense_step, smartbird_step]))


def _medians(calls: Sequence[Callable[[], object]]) -> list[float]:
    """Median seconds of each call; they take turns, so that a slow moment meets them all."""
    seconds: list[list[float]] = [[] for _ in calls]
    for repetition in range(REPETITIONS + 1):
        for call, times in zip(calls, seconds, strict=True):
            start = time.perf_counter()
            call()
            if repetition > 0:  # the first one warms up
                times.append(time.perf_counter() - start)
    return [statistics.median(times) for times in seconds]


@dataclasses.dataclass(frozen=True)
class Passage:
    """A passage of the test split and the keys that a trained model draws in it.

    Attributes:
        address: where the passage is from; it is its beginning.
        pieces: its N tokens as they stand in the text.
        words: for each token, the whole word it is a piece of.
        begins: for each token, whether that word begins with it.
        draws: by layer, indices [DRAWS, H_i, N, K].
        period: the right answer, as years.
        answer: the model's, likewise.
        test_passages: how many passages the test split has.
    """

    address: Address
    pieces: list[str]
    words: list[str]
    begins: list[bool]
    draws: dict[str, Tensor]
    period: str
    answer: str
    test_passages: int


def look(checkpoint: Path) -> Passage:
    """Lets the Smart Bird model of a `sotu` checkpoint read the middle test address."""
    model, task = load_model(checkpoint)
    assert isinstance(task, Sotu)
    addresses = task.addresses["test"]
    address = addresses[len(addresses) // 2]
    encoding = task.tokenizer.encode(address.text)
    encoding.truncate(task.seq_len)
    tokens = torch.tensor([encoding.ids])
    recorded = []
    with torch.inference_mode():
        for seed in range(DRAWS):
            seed_evaluation(model, seed)
            with record(model) as calls:
                logits = model(tokens)
            drawn = [call.indices for call in calls.values() if call.indices is not None]
            recorded.append(drawn)
    text, spans = address.text, _word_spans(encoding)
    return Passage(
        address=address,
        pieces=[text[start:stop] for start, stop in encoding.offsets],
        words=[text[start:stop] for start, stop in spans],
        begins=[piece[0] == word[0] for piece, word in zip(encoding.offsets, spans, strict=True)],
        draws={
            f"layer {number}": torch.cat(layer)
            for number, layer in enumerate(zip(*recorded, strict=True), start=1)
        },
        period=_years(period_of(address.year)),
        answer=_years(int(logits[0].argmax())),
        test_passages=sum(len(batch.targets) for batch in task.eval_batches("test")),
    )


def _word_spans(encoding: Encoding) -> list[tuple[int, int]]:
    """For each token, where in the text the word begins and ends that it is a piece of."""
    spans = []
    for token, own in enumerate(encoding.offsets):
        word = encoding.token_to_word(token)
        spans.append(own if word is None else encoding.word_to_chars(word) or own)
    return spans


def _years(period: int) -> str:
    last = PERIODS[period + 1] - 1 if period + 1 < len(PERIODS) else "today"
    return f"{PERIODS[period]} to {last}"
