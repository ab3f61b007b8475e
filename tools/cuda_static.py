"""What can be told of the CUDA kernels without a GPU: their machine code, read with cuobjdump.

    python tools/cuda_static.py build/cuda/smartbird/_C_cuda.abi3.so

Prints a Markdown table with a line for each kernel and architecture, and fails where a kernel
spills registers or has a stack, where one that is meant to read 16 bytes at a time has no such
load, or where one that is meant for tensor cores has no instruction for them. cuobjdump and
nvdisasm come from PyPI: nvidia-cuda-cuobjdump, nvidia-cuda-nvdisasm.
"""

from __future__ import annotations

import argparse
import re
import shutil
import site
import subprocess
import sys
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

REGISTERS = 65536  # of a multiprocessor, on every architecture
MOST_WARPS = defaultdict(lambda: 64, {"sm_86": 48, "sm_89": 48, "sm_120": 48})
THREADS = {"dense": 256, "sketch_sample": 256, "gather": 128, "key_starts": 128}  # of a block


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
        """Most warps of a multiprocessor, as far as registers allow."""
        threads = next(n for prefix, n in THREADS.items() if self.base.startswith(prefix))
        by_registers = REGISTERS // (-(-self.registers // 8) * 8 * threads) * threads // 32
        return min(by_registers, MOST_WARPS[self.arch])

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
    current = None
    for line in run(cuobjdump(), "-sass", str(library)).splitlines():
        if match := re.search(r"\barch = (sm_\w+)", line):
            arch = match[1]
        elif match := re.search(r"Function : (\S+)", line):
            current = kernels[arch, match[1]]
        elif current is not None:
            for key, pattern in PATTERNS.items():
                current.counts[key] += bool(pattern.search(line))
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
    groups: dict[tuple[str, str], list[Kernel]] = defaultdict(list)
    for kernel in kernels:
        groups[kernel.base, kernel.arch].append(kernel)

    def extent(values: list[int]) -> str:
        low, high = min(values), max(values)
        return str(low) if low == high else f"{low}-{high}"

    lines = [
        "| kernel | architecture | compiled | registers | stack | with 16-byte loads "
        "| with tensor cores | warps by registers |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for (base, arch), group in sorted(
        groups.items(), key=lambda x: (x[0][0], int(x[0][1][3:].rstrip("af")))
    ):
        cells = [
            base,
            arch,
            str(len(group)),
            extent([k.registers for k in group]),
            extent([k.stack for k in group]),
            str(sum(k.counts["wide"] > 0 for k in group)),
            str(sum(k.counts["tensor"] > 0 for k in group)),
            f"{extent([k.warps for k in group])} of {MOST_WARPS[arch]}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("library", type=Path)
    kernels = read_kernels(parser.parse_args().library)
    print(table(kernels))
    faults = [f"{k.arch} {k.name}: {fault}" for k in kernels for fault in k.faults()]
    for fault in sorted(faults):
        print(fault, file=sys.stderr)
    if not kernels:
        print("the library holds no kernels", file=sys.stderr)
    return 1 if faults or not kernels else 0


if __name__ == "__main__":
    sys.exit(main())
