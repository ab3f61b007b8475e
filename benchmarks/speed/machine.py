"""The machine: what it is, and how fast it computes and reads at best.

The limits come from well-tuned kernels that are not ours. Floating point operations: the fastest of
a few matrix products of torch (MKL, oneDNN), which come close to the peak. Bandwidth: torch.sum,
which adds a number faster from L1 than any other level can deliver it, so that from L2 outwards
reading is what it waits for.
"""

from __future__ import annotations

import datetime
import functools
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import smartbird
from benchmarks.speed.results import Limits

_PROBE_SECONDS = 0.25
_LOOK_SECONDS = 0.5  # clock ticks are of 10 ms
_MATRIX_SIZES = (384, 768, 1536)
# Together the cores read at least so much in a probe, so that the call itself weighs little.
_LEAST_BYTES = 1 << 26
_MOST_DRAM_BYTES = 1 << 30

# Held to AVX2 by these: PyTorch's own kernels and its compiler, MKL, oneDNN, FBGEMM, smartbird.
AVX2_ENVIRONMENT = {
    "ATEN_CPU_CAPABILITY": "avx2",
    "TORCHINDUCTOR_CPP_MARCH": "haswell",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "FBGEMM_ENABLE_INSTRUCTIONS": "AVX2",
    "SMARTBIRD_CPU_ISA": "avx2",
}


def describe() -> dict[str, Any]:
    """Date, processor, versions, instruction sets and load of this process's machine."""
    cpu = _cpuinfo()
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "cpu": cpu.get("model name", platform.processor() or platform.machine()),
        "cpu_family_model": f"{cpu.get('cpu family', '?')}/{cpu.get('model', '?')}",
        "cpu_features": sorted(
            flag
            for flag in cpu.get("flags", "").split()
            if flag.startswith(("sse", "avx", "amx", "fma", "f16c", "bmi"))
        ),
        "cores": os.cpu_count(),
        "cache_bytes": cache_bytes(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "smartbird": smartbird.build_info(),
        "instruction_set_variables": {
            name: os.environ[name] for name in AVX2_ENVIRONMENT if name in os.environ
        },
        "load_before": os.getloadavg(),
    }


def cache_bytes() -> dict[str, int]:
    """Size of the first core's L1 (data), L2 and L3; guesses of usual sizes where not known."""
    sizes = {"L1": 32 << 10, "L2": 512 << 10, "L3": 16 << 20}
    for cache in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"):
        level, kind, size = (
            (cache / name).read_text().strip() for name in ("level", "type", "size")
        )
        if kind != "Instruction" and size.endswith("K"):
            sizes[f"L{level}"] = int(size[:-1]) << 10
    return sizes


def measure_limits(threads: int) -> Limits:
    """The machine's limits with ``threads`` threads. Leaves that number set."""
    torch.set_num_threads(threads)
    caches = cache_bytes()
    l3_each = min(4 * caches["L2"], caches["L3"] // (2 * threads))
    dram_each = min(4 * caches["L3"], _MOST_DRAM_BYTES) // threads
    return Limits(
        threads=threads,
        flops={
            name: _matmul_flops(dtype)
            for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16))
        },
        bandwidth={
            "L1": _shared_bandwidth(caches["L1"] // 2, threads),
            "L2": _shared_bandwidth(caches["L2"] // 2, threads),
            "L3": _private_bandwidth(l3_each, threads),
            "DRAM": _private_bandwidth(dram_each, threads),
        },
    )


def best_of(a: Limits, b: Limits) -> Limits:
    """The larger of each limit: what a busy machine did not reach once it may reach again."""

    def larger(x: dict[str, float], y: dict[str, float]) -> dict[str, float]:
        return {name: max(value, y[name]) for name, value in x.items()}

    return Limits(a.threads, larger(a.flops, b.flops), larger(a.bandwidth, b.bandwidth))


class OtherWork:
    """What other programs have done since this was made. Linux; elsewhere it sees none."""

    def __init__(self) -> None:
        self._all, self._ours = _cpu_seconds()
        self._start = time.perf_counter()

    def share(self) -> float:
        """The part of the time of all cores that they have taken, in [0, 1].

        Ours is what this process, its children and theirs have taken. What the machine's host has
        taken for others counts as theirs.
        """
        everything, ours = _cpu_seconds()
        others = (everything - self._all) - (ours - self._ours)
        whole = (time.perf_counter() - self._start) * (os.cpu_count() or 1)
        return min(max(others / whole, 0.0), 1.0) if whole > 0 else 0.0


def others_now() -> float:
    """The part of the time of all cores that other programs take at present."""
    work = OtherWork()
    time.sleep(_LOOK_SECONDS)
    return work.share()


def _cpu_seconds() -> tuple[float, float]:
    """Processor time of the whole machine and of this process with its descendants."""
    tick = os.sysconf("SC_CLK_TCK")
    parents: dict[int, int] = {}
    times: dict[int, float] = {}
    try:
        # user, nice, system, idle, iowait, irq, softirq, steal
        fields = [int(x) for x in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
        everything = (sum(fields) - fields[3] - fields[4]) / tick
    except (OSError, ValueError, IndexError):
        return 0.0, 0.0
    for file in Path("/proc").glob("[0-9]*/stat"):
        try:
            # The name, in brackets, may hold anything; then state, parent, ...
            values = file.read_text().rpartition(")")[2].split()
        except OSError:  # it has ended
            continue
        pid = int(file.parent.name)
        parents[pid] = int(values[1])
        times[pid] = sum(int(x) for x in values[11:15]) / tick  # its own and of waited-for children
    own = {os.getpid()}
    while more := {pid for pid, parent in parents.items() if parent in own} - own:
        own |= more
    return everything, sum(times.get(pid, 0.0) for pid in own)


def _matmul_flops(dtype: torch.dtype) -> float:
    """The best of several sizes; larger ones are left out where a product takes too long."""
    best = 0.0
    for n in _MATRIX_SIZES:
        a, b = (torch.rand(n, n).to(dtype) for _ in range(2))
        seconds = _least_seconds(functools.partial(torch.mm, a, b))
        best = max(best, 2 * n**3 / seconds)
        if seconds > _PROBE_SECONDS / 8:
            break
    return best


def _shared_bandwidth(num_bytes: int, threads: int) -> float:
    """Every core reads one array, which fits its own cache, again and again."""
    passes = threads * -(-_LEAST_BYTES // (num_bytes * threads))
    rows = torch.ones(num_bytes // 4).expand(passes, -1)
    out = torch.empty(passes)
    return passes * num_bytes / _least_seconds(lambda: torch.sum(rows, dim=1, out=out))


def _private_bandwidth(num_bytes: int, threads: int) -> float:
    """Every core reads an array of its own, so that none profits from what another has read."""
    rows = torch.ones(threads, num_bytes // 4)
    out = torch.empty(threads)
    return threads * num_bytes / _least_seconds(lambda: torch.sum(rows, dim=1, out=out))


def _least_seconds(call: Callable[[], object]) -> float:
    """The fastest repetition: a limit is what the machine can do, not what it does on average."""
    call()
    least, stop = float("inf"), time.perf_counter() + _PROBE_SECONDS
    while time.perf_counter() < stop:
        start = time.perf_counter()
        call()
        least = min(least, time.perf_counter() - start)
    return least


def _cpuinfo() -> dict[str, str]:
    """The fields of the first processor of /proc/cpuinfo; none where there is no such file."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().partition("\n\n")[0].splitlines() if path.exists() else []
    pairs = (line.partition(":") for line in lines)
    return {name.strip(): value.strip() for name, _, value in pairs}
