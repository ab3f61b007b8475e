"""The CUDA kernels on paper: what each must move and compute, and the least time for it on a GPU.

``python -m benchmarks.speed.roofline --update docs/cuda.md`` makes the tables between the lines
``<!-- table roofline:NAME -->`` and ``<!-- end -->``; NAME is formulas, kernels, floors or devices.
``benchmarks.gpu`` holds measured times to the same numbers.

Letters as in ``smartbird.ops``, for one sequence of N queries and as many keys, H_i = H_kv = H and
Dv = D, without masks; e is the size of an input element. Counted are

- *HBM bytes*: each input, output and intermediate tensor once, as if caches were perfect;
- *cached bytes*: every read and atomic addition beyond registers and shared memory, as the kernels
  make them, but for the 16 rows that a score tile reads again; for sketch_sample, that the lists of
  draws are written and read again is in it too. Whatever L1 and L2 do not hold comes
  from HBM again;
- multiplications and additions of score tiles (on tensor cores in 16 bits, else as FMA), all others
  (FMA), and exponentials, which have a unit of their own.

Integer work, comparisons, conversions, random numbers, shuffles between lanes, shared memory and
launches are not counted.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from pathlib import Path

from benchmarks.common.markdown import table, update_tables
from benchmarks.speed.contenders import Widths
from benchmarks.speed.results import ms

REFERENCE_LENGTH, REFERENCE_BYTES = 16384, 2  # N; bfloat16

SAMPLE_SYSTEMATIC = "sketch_sample, systematic"
SAMPLE_GUMBEL = "sketch_sample, gumbel"
GATHER_SCORES = "gather_scores"
GATHER = "gather_attention"
BACKWARD = "gather backward, atomics"
BACKWARD_SLOTS = "gather backward, slots"
BACKWARD_KEYS = "gather backward, keys"
LSE = "dense_lse, sketch"
MEAN = "dense_mean, sketch, both gradients"
DENSE_ATTENTION = "(dense attention, not ours)"

# Of csrc/cuda: rows that share a pass over the keys; those that do in sketch_sample.
_TILE_ROWS, _SAMPLE_ROWS = 16, 32
_SECTOR = 32  # bytes: the least that a read takes from L2


@dataclasses.dataclass(frozen=True)
class Device:
    """A GPU by its data sheet.

    Attributes:
        name: as ``torch.cuda.get_device_name`` tells it.
        bandwidth: of HBM, bytes per second.
        tensor: dense floating point operations per second of 16-bit tensor cores.
        fma: the same of float32 outside tensor cores.
        exponentials: per second: 16 per clock and multiprocessor (CUDA C++ Programming Guide,
            "Arithmetic Instructions"), to ``fma`` as 16 to twice the float32 units of one.
        source: of the numbers.
    """

    name: str
    bandwidth: float
    tensor: float
    fma: float
    exponentials: float
    source: str


DEVICES = {
    "A100 80GB SXM": Device(
        "NVIDIA A100-SXM4-80GB",
        bandwidth=2.039e12,
        tensor=312e12,
        fma=19.5e12,
        exponentials=19.5e12 * 16 / 128,
        source="NVIDIA A100 Tensor Core GPU Datasheet",
    ),
    "H100 SXM": Device(
        "NVIDIA H100 80GB HBM3",
        bandwidth=3.35e12,
        tensor=989.5e12,
        fma=67e12,
        exponentials=67e12 * 16 / 256,
        source="NVIDIA H100 Tensor Core GPU Datasheet; its 1,979 TFLOPS are with sparsity",
    ),
    "B200": Device(
        "NVIDIA B200",
        bandwidth=8e12,
        tensor=2250e12,
        fma=80e12,
        exponentials=80e12 * 16 / 256,
        source="NVIDIA Blackwell Architecture Technical Brief, HGX B200, one GPU",
    ),
}


@dataclasses.dataclass(frozen=True)
class KernelWork:
    """What one call of a kernel does, see the module's text."""

    hbm_bytes: float
    cached_bytes: float
    tile_flops: float
    fma_flops: float
    exponentials: float
    formula: str  # of the largest terms


def kernels(widths: Widths, length: int, item_bytes: int) -> dict[str, KernelWork]:
    """The work of every kernel by name; for sketch_sample on flat rows, of equal scores.

    Peaked rows take two further passes over the keys, or a few more, for those that are certain;
    none is in it.
    """
    H, D, S, K = widths.heads, widths.head_dim, widths.sketch_dim, widths.num_samples
    N, e = length, item_bytes
    slots, pairs = H * N * K, N * N
    heads = H * N * D  # elements of one of q, k, v, out and their gradients
    sketch = N * S
    row_blocks = math.ceil(N / _TILE_ROWS)
    # exp of each score, and one more to rescale the sum of a lane's eight.
    scored = 9 / 8 * pairs

    def sample(draws: float, bytes_per_draw: int, formula: str) -> KernelWork:
        return KernelWork(
            hbm_bytes=2 * sketch * e + 4 * slots,
            cached_bytes=2 * math.ceil(N / _SAMPLE_ROWS) * sketch * e
            + 2 * sketch * e
            + draws * bytes_per_draw
            + 4 * slots,
            tile_flops=2 * 2 * pairs * S,
            fma_flops=0,
            exponentials=2 * pairs,
            formula=formula,
        )

    return {
        # The key and the score of a draw are written and read.
        SAMPLE_SYSTEMATIC: sample(slots, 16, "tiles 4 N² S; 2 N² exponentials"),
        # So are, before, where it falls, some seven times until it is sorted, and where its key
        # goes; and after, three times, what its head chooses from.
        SAMPLE_GUMBEL: sample(
            H * N * _race_draws(K, N),
            88,
            "the same; cached 88 H N n for the n draws of a row and head, a few more than K",
        ),
        GATHER_SCORES: KernelWork(
            hbm_bytes=2 * heads * e + 4 * slots + slots * e,
            cached_bytes=heads * e + slots * D * e + 4 * slots + slots * e,
            tile_flops=0,
            fma_flops=2 * slots * D,
            exponentials=0,
            formula="cached H N K D e; FMA 2 H N K D",
        ),
        GATHER: KernelWork(
            hbm_bytes=4 * heads * e + 4 * slots + 4 * H * N,
            cached_bytes=2 * heads * e + 2 * slots * D * e + 4 * slots + 4 * H * N,
            tile_flops=0,
            fma_flops=4 * slots * D,
            exponentials=2 * slots,
            formula="cached 2 H N K D e; FMA 4 H N K D",
        ),
        # dk and dv are sums in float32, begun with zeros and rounded by other kernels.
        BACKWARD: KernelWork(
            hbm_bytes=5 * heads * e + 4 * slots + 2 * 2 * heads * 4,
            cached_bytes=3 * heads * e + 3 * slots * D * e + 2 * slots * D * 4 + 2 * 4 * slots,
            tile_flops=0,
            fma_flops=10 * slots * D,
            exponentials=slots,
            formula="cached 3 H N K D e and, by atomics, 8 H N K D; FMA 10 H N K D",
        ),
        BACKWARD_SLOTS: KernelWork(
            hbm_bytes=5 * heads * e + 4 * slots + 8 * slots,
            cached_bytes=3 * heads * e + 3 * slots * D * e + 2 * 4 * slots + 6 * 8 * slots,
            tile_flops=0,
            fma_flops=6 * slots * D,
            exponentials=slots,
            formula="cached 3 H N K D e; FMA 6 H N K D; two numbers per slot out",
        ),
        # After a sort of the indices, which is torch's.
        BACKWARD_KEYS: KernelWork(
            hbm_bytes=4 * heads * e + 4 * slots + 8 * slots + 8 * H * N,
            cached_bytes=2 * heads * e + slots * (2 * D * e + 4 + _SECTOR) + 16 * H * N,
            tile_flops=0,
            fma_flops=4 * slots * D,
            exponentials=0,
            formula="cached 2 H N K D e; FMA 4 H N K D",
        ),
        LSE: KernelWork(
            hbm_bytes=2 * sketch * e + 4 * N,
            cached_bytes=row_blocks * sketch * e + sketch * e + 4 * N,
            tile_flops=2 * pairs * S,
            fma_flops=0,
            exponentials=scored,
            formula="tiles 2 N² S; N² exponentials",
        ),
        # Two calls. The values of each are the other sketch in float32, 32 features at a time.
        MEAN: KernelWork(
            hbm_bytes=4 * sketch * e + 4 * 4 * sketch + 3 * 4 * N,
            cached_bytes=2 * row_blocks * (sketch * (e + 4) + 4 * N) + 2 * sketch * (e + 4),
            tile_flops=4 * pairs * S * math.ceil(S / 32),
            fma_flops=4 * pairs * 32 * math.ceil(S / 32),
            exponentials=2 * pairs * math.ceil(S / 32),
            formula="tiles 4 N² S; FMA 4 N² times S rounded up to 32; 2 N² exponentials",
        ),
        DENSE_ATTENTION: KernelWork(
            hbm_bytes=4 * heads * e + 4 * H * N,
            # FlashAttention reads all keys and values again for every 128 queries.
            cached_bytes=2 * heads * e * (1 + math.ceil(N / 128)) + 4 * H * N,
            tile_flops=4 * pairs * H * D,
            fma_flops=0,
            exponentials=pairs * H,
            formula="tiles 4 N² H D; H N² exponentials; cached N / 128 times all keys and values",
        ),
    }


def _race_draws(num_samples: int, length: int) -> float:
    """Draws of a row and head, as ``plan_race`` of sketch_sample.cu plans them."""
    want = num_samples + 1
    draws = float(want)
    for _ in range(8):
        repeats = draws**2 / 2 / length
        draws = min(want + 1 + repeats + 4 * math.sqrt(repeats), 2.0 * num_samples + 16)
    return draws


def floor_seconds(work: KernelWork, device: Device, item_bytes: int) -> tuple[float, str]:
    """The least time for ``work``, and what bounds it."""
    on_tiles = device.tensor if item_bytes == 2 else device.fma
    times = {
        "HBM": work.hbm_bytes / device.bandwidth,
        "FMA": work.fma_flops / device.fma,
        "exp": work.exponentials / device.exponentials,
    }
    tiles = work.tile_flops / on_tiles
    if item_bytes == 2:
        times["tensor"] = tiles
    else:
        times["FMA"] += tiles
    bound = max(times, key=lambda name: times[name])
    return times[bound], bound


def uncached_seconds(work: KernelWork, device: Device) -> float:
    """For the cached bytes, if no cache held any of them."""
    return work.cached_bytes / device.bandwidth


def find_device(name: str) -> Device | None:
    """The device of which ``torch.cuda.get_device_name`` gives ``name``, if it is one of ours."""
    return next((device for device in DEVICES.values() if device.name == name), None)


# ---- the document -------------------------------------------------------------------------------


def _devices() -> str:
    rows = [
        [
            name,
            f"{device.bandwidth / 1e12:.3g} TB/s",
            f"{device.tensor / 1e12:.4g}",
            f"{device.fma / 1e12:.3g}",
            f"{device.exponentials / 1e12:.3g}",
            device.source,
        ]
        for name, device in DEVICES.items()
    ]
    header = ["", "HBM", "bfloat16 tensor, TFLOP/s", "float32, TFLOP/s", "exp, T/s", "source"]
    return table(header, rows)


def _formulas() -> str:
    work = kernels(Widths(), REFERENCE_LENGTH, REFERENCE_BYTES)
    return table(["kernel", "largest terms"], [[name, w.formula] for name, w in work.items()])


def _kernels() -> str:
    work = kernels(Widths(), REFERENCE_LENGTH, REFERENCE_BYTES)
    header = ["kernel", "HBM, MB", "cached, GB", "tiles, GFLOP", "FMA, GFLOP", "exp, G"]
    rows = [
        [
            name,
            f"{w.hbm_bytes / 1e6:.1f}",
            f"{w.cached_bytes / 1e9:.2f}",
            f"{w.tile_flops / 1e9:.1f}",
            f"{w.fma_flops / 1e9:.1f}",
            f"{w.exponentials / 1e9:.2f}",
        ]
        for name, w in work.items()
    ]
    return table(header, rows)


def _floors() -> str:
    def cell(work: KernelWork, device: Device) -> str:
        floor, bound = floor_seconds(work, device, REFERENCE_BYTES)
        return f"{ms(floor)} ({bound}); {ms(uncached_seconds(work, device))}"

    work = kernels(Widths(), REFERENCE_LENGTH, REFERENCE_BYTES)
    rows = [[name, *(cell(w, device) for device in DEVICES.values())] for name, w in work.items()]
    return table(["ms: floor (bound); without caches", *DEVICES], rows)


TABLES = {"devices": _devices, "formulas": _formulas, "kernels": _kernels, "floors": _floors}


def update_page(markdown: str) -> str:
    """``markdown`` with its roofline tables made anew.

    Raises:
        ValueError: a marker has no end.
        KeyError: a marker names a table that does not exist.
    """
    return update_tables(
        markdown, lambda stem, name: TABLES[name]() if stem == "roofline" else None
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed.roofline",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--update", type=Path, nargs="+", default=[], metavar="MARKDOWN")
    args = parser.parse_args()
    for path in args.update:
        path.write_text(update_page(path.read_text()))
    if not args.update:
        print("\n".join(make() for make in TABLES.values()))


if __name__ == "__main__":
    main()
