"""Builds smartbird/_C: one stable-ABI library with the CPU kernels of every instruction set.

Environment: DEBUG=1 for an unoptimised build with symbols, MAX_JOBS for the number of compilers run
at once.
"""

import os
import platform
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension, get_cxx_compiler

DEBUG = os.environ.get("DEBUG", "0") not in ("", "0")
X86 = platform.machine().lower() in ("x86_64", "amd64", "i686")
CXXFLAGS = ["-std=c++20", "-fvisibility=hidden", *(["-O0", "-g"] if DEBUG else ["-O3"])]
MACROS = [("TORCH_TARGET_VERSION", "0x020a000000000000")]  # the oldest torch it runs with: 2.10
# Contracting a * b + c into FMA is meant; kernels never look at errno.
KERNEL_FLAGS = [*CXXFLAGS, "-fPIC", "-ffp-contract=fast", "-fno-math-errno", "-Wno-psabi"]
ISA_FLAGS: dict[str, list[str]] = {"scalar": []}
if X86:
    ISA_FLAGS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    ISA_FLAGS["avx512"] = [
        *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"),
        *("-mfma", "-mf16c", "-mprefer-vector-width=512"),
    ]


class BuildKernels(BuildExtension):
    """An extension has one set of flags; the kernels need one per instruction set."""

    def build_extension(self, ext) -> None:
        objects = Path(self.build_temp)
        objects.mkdir(parents=True, exist_ok=True)
        jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
        with ThreadPoolExecutor(jobs) as pool:
            kernels = list(pool.map(lambda isa: self.compile_kernels(isa, objects), ISA_FLAGS))
        ext.extra_objects = [*kernels, *ext.extra_objects]
        super().build_extension(ext)

    def compile_kernels(self, isa: str, objects: Path) -> str:
        source = Path("csrc/cpu") / f"kernels_{isa}.cpp"
        target = objects / f"kernels_{isa}.o"
        command = [get_cxx_compiler(), *KERNEL_FLAGS, *ISA_FLAGS[isa], "-c", str(source)]
        print(" ".join(command))
        subprocess.run([*command, "-o", str(target)], check=True)
        return str(target)


setup(
    ext_modules=[
        CppExtension(
            "smartbird._C",
            ["csrc/registration.cpp", "csrc/cpu/ops_cpu.cpp", "csrc/cpu/dispatch.cpp"],
            define_macros=MACROS,
            extra_compile_args=CXXFLAGS,
            py_limited_api=True,
        )
    ],
    cmdclass={"build_ext": BuildKernels},
)
