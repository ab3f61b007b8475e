"""How far the sampled estimate is from dense attention, by method and number of keys K.

One draw is measured, and the mean over many, which keeps the bias. With ``--out`` the errors are
written as JSON and drawn beside it; with ``--update`` they make the table between the lines
``<!-- table estimate:error -->`` and ``<!-- end -->`` of a Markdown file.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator, PercentFormatter
from torch import Tensor

from benchmarks.common.axes import tidy
from benchmarks.common.markdown import table, update_tables
from benchmarks.common.marks import MARKS
from smartbird.functional import dense_attention, smart_bird_attention

METHODS = ("gumbel", "systematic", "multinomial")
NUM_SAMPLES = (8, 16, 32, 64, 128, 256)
NUM_TOKENS = 512
DRAWS = 1024
TOPK, EXACT_TOPK = "topk", "exact top-k"


@dataclasses.dataclass(frozen=True)
class Law:
    """Error of the corrected estimate from K draws with replacement, to leading order in 1 / K.

    The estimate is a ratio of two means: self-normalised importance sampling (Owen, Monte Carlo
    theory, methods and examples, section 9.2). In root mean square over queries and features,
    relative to dense attention o, its noise is ``noise / sqrt(K)`` and its bias ``bias / K``. The
    terms left out are smaller by about ``ratio / K``. Draws without replacement, of keys in no
    particular order, should do no worse.

    Attributes:
        noise: of ``sqrt(sum_j a_j^2 / p_j (v_j - o)^2)``.
        bias: of ``sum_j a_j^2 / p_j (v_j - o)``.
        ratio: mean of ``sum_j a_j^2 / p_j``, which is 1 where the sketch knows attention exactly.
    """

    noise: float
    bias: float
    ratio: float

    def error(self, num_samples: int, draws: int = 1) -> float:
        """Of the mean over ``draws`` estimates, which keeps the bias."""
        noise, bias = self.noise / (num_samples * draws) ** 0.5, self.bias / num_samples
        return math.hypot(noise, bias)


@dataclasses.dataclass(frozen=True)
class Problem:
    """Attention of one head, with a sketch that knows only a part of its logits.

    The sketch is q and k projected to their first features, so that p resembles the attention
    probabilities a. Values are the keys: what the sketch leaves out then pulls the estimate one
    way, where the noise of unrelated values would hide its bias.

    Attributes:
        q: [N, D], float32, standard normal.
        k: [M, D], likewise.
        sketch_dim: S, how many of the D features the sketch has.
        scale: of the logits and of the sketch scores.
    """

    q: Tensor
    k: Tensor
    sketch_dim: int
    scale: float

    @classmethod
    def random(
        cls,
        num_queries: int = NUM_TOKENS,
        num_keys: int = NUM_TOKENS,
        *,
        head_dim: int = 16,
        sketch_dim: int = 12,
        logit_std: float = 1.5,
    ) -> Problem:
        """The same numbers at each call; ``logit_std`` is the logits' standard deviation."""
        generator = torch.Generator().manual_seed(0)
        q = torch.randn(num_queries, head_dim, generator=generator)
        k = torch.randn(num_keys, head_dim, generator=generator)
        return cls(q, k, sketch_dim, logit_std / head_dim**0.5)

    def dense(self) -> Tensor:
        """Dense attention, float64 [N, D]."""
        q, k = self.q.double(), self.k.double()
        return dense_attention(q[None, None], k[None, None], k[None, None], scale=self.scale)[0, 0]

    def estimates(self, method: str, num_samples: int, *, correction: bool, draws: int) -> Tensor:
        """Independent draws, which are the heads of one call, float64 [draws, N, D]."""
        out = smart_bird_attention(
            self.q.expand(1, draws, -1, -1),
            self.k[None, None],
            self.k[None, None],
            self.q[None, :, : self.sketch_dim],
            self.k[None, :, : self.sketch_dim],
            num_samples,
            num_index_heads=draws,
            method=method,
            correction=correction,
            scale=self.scale,
            sketch_scale=self.scale,
            seed=torch.tensor([0, 0]),
        )
        assert isinstance(out, Tensor)
        return out[0].double()

    def law(self) -> Law:
        q, k, o = self.q.double(), self.k.double(), self.dense()
        a = (q @ k.mT * self.scale).softmax(-1)
        p = (q[:, : self.sketch_dim] @ k[:, : self.sketch_dim].mT * self.scale).softmax(-1)
        ratio, offset = a.square() / p, k - o[:, None]
        noise = torch.einsum("nm,nmd->nd", ratio, offset.square()).sqrt()
        bias = torch.einsum("nm,nmd->nd", ratio, offset)
        return Law(rms(noise) / rms(o), rms(bias) / rms(o), ratio.sum(-1).mean().item())


@dataclasses.dataclass(frozen=True)
class Error:
    """Root mean square errors against dense attention, relative to its root mean square.

    Attributes:
        method: how keys are drawn; ``TOPK`` and ``EXACT_TOPK``, the K largest sketch scores and
            the K largest logits, draw nothing.
        correction: whether inclusion probabilities are corrected for.
        num_samples: K.
        one: of one draw, over queries, features and draws.
        mean: of the mean over draws.
    """

    method: str
    correction: bool
    num_samples: int
    one: float
    mean: float

    @property
    def drawn(self) -> bool:
        return self.method in METHODS

    @property
    def name(self) -> str:
        if not self.drawn:
            return self.method
        return f"{self.method}, {'' if self.correction else 'not '}corrected"


def measure(
    problem: Problem, method: str, num_samples: int, *, correction: bool, draws: int = DRAWS
) -> Error:
    """Errors of ``draws`` independent draws and of their mean."""
    dense = problem.dense()
    error = problem.estimates(method, num_samples, correction=correction, draws=draws) - dense
    one, mean = rms(error) / rms(dense), rms(error.mean(0)) / rms(dense)
    return Error(method, correction, num_samples, one, mean)


def measure_all(problem: Problem) -> list[Error]:
    """Every method with and without correction, and the largest, with each of ``NUM_SAMPLES``."""
    errors = [
        measure(problem, method, num_samples, correction=correction)
        for correction in (True, False)
        for method in METHODS
        for num_samples in NUM_SAMPLES
    ]
    # A sketch of all features is the logits.
    exact = dataclasses.replace(problem, sketch_dim=problem.k.shape[1])
    for name, sketched in ((TOPK, problem), (EXACT_TOPK, exact)):
        for num_samples in NUM_SAMPLES:
            error = measure(sketched, TOPK, num_samples, correction=False, draws=1)
            errors.append(dataclasses.replace(error, method=name))
    return errors


def error_table(errors: Sequence[Error]) -> str:
    """A row for each method, a column for each K."""
    columns = sorted({error.num_samples for error in errors})
    rows: dict[str, dict[int, str]] = {}
    for x in errors:
        mean = f" ({_percent(x.mean)})" if x.drawn else ""
        rows.setdefault(x.name, {})[x.num_samples] = _percent(x.one) + mean
    header = [f"error of one draw (of the mean over {DRAWS}), %", *(f"K = {k}" for k in columns)]
    return table(header, [[name, *(row[k] for k in columns)] for name, row in rows.items()])


def draw_errors(errors: Sequence[Error], problem: Problem) -> Figure:
    """Error of one draw and of the mean over draws against K, both axes logarithmic."""
    law = problem.law()
    figure = Figure(figsize=(11, 4.8), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    columns = sorted({error.num_samples for error in errors})
    axes: Axes
    for attribute, axes in zip(("one", "mean"), panels, strict=True):
        for name in dict.fromkeys(error.name for error in errors):
            series = [error for error in errors if error.name == name]
            axes.plot(
                columns,
                [getattr(error, attribute) for error in series],
                color=MARKS[series[0].method].colour,
                linestyle="-" if series[0].correction else "--",
                marker=MARKS[series[0].method].marker,
                markersize=4,
                linewidth=2.2 if series[0].correction else 1.2,
                label=name,
            )
        averaged = 1 if attribute == "one" else DRAWS
        axes.plot(
            columns,
            [law.error(k, averaged) for k in columns],
            color="black",
            linestyle=":",
            label="law of draws with replacement",
        )
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel("K")
        axes.set_xticks(columns)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:.0f}"))
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.set_title(
            "one draw" if attribute == "one" else f"mean over {DRAWS} draws", fontsize=11
        )
        tidy(axes)
    panels[0].set_ylabel("error, relative to the RMS of dense attention")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize=9)
    num_queries, head_dim = problem.q.shape
    subject = f"N = {num_queries}, M = {len(problem.k)}, D = {head_dim}, S = {problem.sketch_dim}"
    figure.suptitle(
        f"Error of sampled attention against dense attention\n{subject}",
        x=0.01,
        ha="left",
        fontsize=11,
    )
    return figure


def update_page(markdown: str, errors: Sequence[Error]) -> str:
    """``markdown`` with its table ``estimate:error`` made anew; others stay."""

    def make(stem: str, name: str) -> str | None:
        return error_table(errors) if (stem, name) == ("estimate", "error") else None

    return update_tables(markdown, make)


def save(errors: Sequence[Error], problem: Problem, path: Path) -> None:
    """Writes the JSON, and the plot beside it."""
    record = {
        "num_queries": len(problem.q),
        "num_keys": len(problem.k),
        "head_dim": problem.q.shape[1],
        "sketch_dim": problem.sketch_dim,
        "scale": problem.scale,
        "draws": DRAWS,
        "torch": torch.__version__,
        "law": dataclasses.asdict(problem.law()),
        "errors": [dataclasses.asdict(error) for error in errors],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
    draw_errors(errors, problem).savefig(path.with_suffix(".png"), dpi=110)


def rms(x: Tensor) -> float:
    """Root mean square."""
    return x.square().mean().sqrt().item()


def _percent(x: float) -> str:
    """In percent: two digits, no fraction from 10 % on."""
    return f"{100 * x:#.2g}" if x < 0.0995 else f"{100 * x:.0f}"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.learning.estimate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, metavar="JSON")
    parser.add_argument("--update", type=Path, metavar="MARKDOWN")
    args = parser.parse_args()
    problem = Problem.random()
    errors = measure_all(problem)
    print(error_table(errors), end="")
    if args.out:
        save(errors, problem, args.out)
    if args.update:
        args.update.write_text(update_page(args.update.read_text(), errors))


if __name__ == "__main__":
    main()
