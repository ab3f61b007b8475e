"""What can be told of the CUDA kernels without a GPU: their machine code, read with cuobjdump.

    python -m tools.cuda_static build/cuda/smartbird/_C_cuda.abi3.so [--update docs/cuda.md]

Prints a Markdown table with a line for each kernel, and fails where a kernel spills registers or
has a stack, where one that is meant to read 16 bytes at a time has no such load, or where one that
is meant for tensor cores has no instruction for them. cuobjdump and nvdisasm come from PyPI:
nvidia-cuda-cuobjdump, nvidia-cuda-nvdisasm.
"""

from __future__ import annotations

import argparse
import re
import shutil
import site
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from benchmarks.common import markdown

REGISTERS = 65536  # of a multiprocessor, on every architecture
_DATA_CENTRE = ("sm_90", "sm_100", "sm_103")
# Warps and shared memory (bytes) of a multiprocessor: CUDA C++ Programming Guide, "Compute
# Capabilities"; a block's own share of the latter comes on top of what it asks for.
MOST_WARPS = defaultdict(lambda: 48, {"sm_80": 64} | dict.fromkeys(_DATA_CENTRE, 64))
SHARED_MEMORY = defaultdict(
    lambda: 100 << 10,
    {"sm_80": 164 << 10, "sm_87": 164 << 10} | dict.fromkeys(_DATA_CENTRE, 228 << 10),
)
RESERVED_SHARED_MEMORY = 1 << 10


class Block(NamedTuple):
    """How a kernel is launched at N = M = 16384, D = 64, S = 16, K = 64 in bfloat16."""

    threads: int
    shared: int  # bytes, as launch() is given them


BLOCKS = {
    "dense_lse": Block(256, 1280),
    "dense_mean": Block(256, 19200),
    "gather_attention": Block(128, 0),
    "gather_backward_keys": Block(128, 1024),
    "gather_backward_queries": Block(128, 2048),
    "gather_scores": Block(128, 0),
    "key_starts": Block(128, 0),
    "sketch_sample": Block(256, 45840),
}


@dataclass
class Kernel:
    """One instantiation on one architecture."""

    name: str
    arch: str
    registers: int = 0
    stack: int = 0
    counts: dict[str, int] = field(default_factory=lambda: defaultdict(int))

    @property
    def base(self) -> str:
        """gather_attention, dense_lse, ..."""
        return self.name.partition("_kernel")[0]

    @property
    def warps(self) -> int:
        """Warps that a multiprocessor holds at once, as registers and shared memory allow."""
        block, family = BLOCKS[self.base], self.arch.rstrip("af")
        by_registers = REGISTERS // (-(-self.registers // 8) * 8 * block.threads)
        by_memory = SHARED_MEMORY[family] // (block.shared + RESERVED_SHARED_MEMORY)
        return min(min(by_registers, by_memory) * block.threads // 32, MOST_WARPS[family])

    def faults(self) -> list[str]:
        """What is wrong with it."""
        found = []
        if self.stack or self.counts["local"]:
            found.append(f"{self.stack} bytes of stack, {self.counts['local']} local accesses")
        if self.wants_wide_loads and not self.counts["wide"]:
            found.append("no 16-byte load")
        if self.wants_tensor_cores and not self.counts["tensor"]:
            found.append("no tensor-core instruction")
        return found

    @property
    def wants_wide_loads(self) -> bool:
        layout = re.search(r"RowLayout<[^,]+, (\d+),", self.name)
        return (layout is not None and layout[1] != "1") or "Features)1" in self.name

    @property
    def wants_tensor_cores(self) -> bool:
        if self.base == "sketch_sample":
            return True
        return "Features)" in self.name and ("__half" in self.name or "bfloat16" in self.name)


PATTERNS = {
    "wide": re.compile(r"\bLDG\.E\.(\w+\.)*128\b"),
    "tensor": re.compile(r"\bHMMA\b"),
    "local": re.compile(r"\b(LDL|STL)\b"),
}


def cuobjdump() -> str:
    found = shutil.which("cuobjdump")
    for folder in site.getsitepackages():
        path = Path(folder) / "nvidia/cu13/bin/cuobjdump"
        if found is None and path.exists():
            found = str(path)
    if found is None:
        raise SystemExit("cuobjdump is missing: pip install nvidia-cuda-cuobjdump")
    return found


def run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def interesting_lines(command: list[str]) -> Iterator[str]:
    """Those that read_kernels looks at, of millions: grep finds them sooner than Python."""
    words = "|".join(["Function : ", *(p.pattern for p in PATTERNS.values())])
    with (
        subprocess.Popen(command, stdout=subprocess.PIPE) as source,
        subprocess.Popen(
            ["grep", "-E", words], stdin=source.stdout, stdout=subprocess.PIPE, text=True
        ) as lines,
    ):
        assert lines.stdout is not None
        yield from lines.stdout
    if source.returncode:
        raise SystemExit(f"{command[0]} failed with status {source.returncode}")


def read_kernels(library: Path) -> list[Kernel]:
    """All kernels of a library, in no order."""
    kernels: dict[tuple[str, str], Kernel] = {}
    arch = ""
    for line in run(cuobjdump(), "-res-usage", str(library)).splitlines():
        if match := re.search(r"\barch = (sm_\w+)", line):
            arch = match[1]
        if match := re.search(r"Function (\S+):", line):
            name = match[1]
        if match := re.search(r"REG:(\d+) STACK:(\d+)", line):
            kernels[arch, name] = Kernel(name, arch, int(match[1]), int(match[2]))

    def count(arch: str) -> None:
        current = None
        for line in interesting_lines([cuobjdump(), "-sass", "-arch", arch, str(library)]):
            if match := re.search(r"Function : (\S+)", line):
                current = kernels[arch, match[1]]
            elif current is not None:
                for key, pattern in PATTERNS.items():
                    current.counts[key] += bool(pattern.search(line))

    # Waits for cuobjdump, a process for each architecture.
    with ThreadPoolExecutor() as pool:
        list(pool.map(count, sorted({arch for arch, _ in kernels})))
    mangled = sorted({kernel.name for kernel in kernels.values()})
    names = subprocess.run(
        ["c++filt"], input="\n".join(mangled), check=True, capture_output=True, text=True
    ).stdout.splitlines()
    plain = dict(zip(mangled, names, strict=True))
    for kernel in kernels.values():
        kernel.name = plain[kernel.name].replace("(anonymous namespace)::", "")
        kernel.name = re.sub(r"^void ", "", kernel.name)
        kernel.name = re.sub(r"^smartbird::cuda::", "", kernel.name)
    return list(kernels.values())


def table(kernels: list[Kernel]) -> str:
    """Markdown; ranges go over the instantiations."""
    archs = sorted({k.arch for k in kernels}, key=lambda arch: int(arch[3:].rstrip("af")))
    groups: dict[str, dict[str, list[Kernel]]] = defaultdict(lambda: defaultdict(list))
    for kernel in kernels:
        groups[kernel.base][kernel.arch].append(kernel)

    def extent(values: Iterable[int]) -> str:
        low, high = min(numbers := [*values]), max(numbers)
        return str(low) if low == high else f"{low}-{high}"

    def cell(group: list[Kernel]) -> str:
        return f"{extent(k.registers for k in group)} / {extent(k.warps for k in group)}"

    rows = []
    for base, by_arch in sorted(groups.items()):
        every = [kernel for group in by_arch.values() for kernel in group]
        counts = [len(group) for group in by_arch.values()]
        wide, tensor = (sum(k.counts[key] > 0 for k in every) for key in ("wide", "tensor"))
        rows.append(
            [
                *(f"`{base}`", extent(counts), str(BLOCKS[base].threads)),
                f"{BLOCKS[base].shared / 1024:.1f}",
                *(f"{number / len(every):.0%}" for number in (wide, tensor)),
                *(cell(by_arch[arch]) for arch in archs),
            ]
        )
    header = ["kernel", "instances", "threads", "shared, KiB", "16-byte loads", "tensor cores"]
    return markdown.table([*header, *archs], rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("library", type=Path)
    parser.add_argument("--update", type=Path, metavar="PAGE", help="put the table into this page")
    options = parser.parse_args()
    kernels = read_kernels(options.library)
    print(table(kernels))
    if options.update is not None:
        made = {("cuda", "static"): table(kernels)}
        page = markdown.update_tables(
            options.update.read_text(), lambda stem, name: made.get((stem, name))
        )
        options.update.write_text(page)
    faults = [f"{k.arch} {k.name}: {fault}" for k in kernels for fault in k.faults()]
    for fault in sorted(faults):
        print(fault, file=sys.stderr)
    if not kernels:
        print("the library holds no kernels", file=sys.stderr)
    return 1 if faults or not kernels else 0


if __name__ == "__main__":
    sys.exit(main())
