"""Builds smartbird/_C, the CPU kernels of every instruction set, and smartbird/_C_cuda, the CUDA
kernels of every architecture: two libraries of torch's stable ABI.

Environment: SMARTBIRD_CUDA=auto (where torch has CUDA and nvcc is found), 0 (never) or 1 (always,
or fail; torch need not have CUDA), TORCH_CUDA_ARCH_LIST as for torch's own extensions, DEBUG=1 for
an unoptimised build with symbols, MAX_JOBS for the number of compilers run at once.
"""

import os
import platform
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import ninja
import torch
from ninja.ninja_syntax import Writer, escape
from setuptools import Extension, setup
from torch.utils.cpp_extension import (
    BuildExtension,
    CppExtension,
    get_cxx_compiler,
    include_paths,
    library_paths,
)

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
CUDA_SOURCES = (
    # The longest first.
    *("csrc/cuda/sketch_sample.cu", "csrc/cuda/gather_backward.cu", "csrc/cuda/gather.cu"),
    *("csrc/cuda/dense.cu", "csrc/cuda/ops_cuda.cpp"),
)
# Of these, those that nvcc knows. PTX of 8.0 serves whatever has no code of its own.
CUDA_ARCHS = "8.0+PTX;9.0a;10.0a;12.0+PTX"
OBJECTS = Path("build/objects")  # kept from build to build
# What the library needs of libtorch_cuda, to link where torch has none.
TORCH_CUDA_STUB = "void aoti_torch_get_current_cuda_stream(void) {}"


def run(*command: str) -> None:
    print(" ".join(command), flush=True)
    subprocess.run(command, check=True)


def num_jobs() -> int:
    return int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)


def compile_all(commands: dict[str, list[str]], jobs: int) -> list[str]:
    """The objects of sources, each by its own command; ninja knows which have changed."""
    OBJECTS.mkdir(parents=True, exist_ok=True)
    objects = {source: str(OBJECTS / f"{Path(source).stem}.o") for source in commands}
    rules = OBJECTS / "build.ninja"
    with rules.open("w") as file:
        writer = Writer(file)
        writer.variable("builddir", str(OBJECTS))
        line = "$compiler -MD -MF $out.d -c $in -o $out"
        writer.rule("compile", line, depfile="$out.d", deps="gcc")
        for source, command in commands.items():
            variables = {"compiler": escape(shlex.join(command))}
            writer.build(objects[source], "compile", source, variables=variables)
    run(f"{ninja.BIN_DIR}/ninja", "-v", "-j", str(jobs), "-f", str(rules))
    return list(objects.values())


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc", path=f"{home}/bin" if home else None)


def build_cuda() -> bool:
    choice, nvcc = os.environ.get("SMARTBIRD_CUDA", "auto"), find_nvcc()
    if choice not in ("auto", "0", "1"):
        raise SystemExit(f"SMARTBIRD_CUDA must be auto, 0 or 1, got {choice!r}")
    if choice == "1" and nvcc is None:
        raise SystemExit("SMARTBIRD_CUDA=1, but there is no nvcc on PATH or in CUDA_HOME/bin")
    wanted = choice == "1" or (choice == "auto" and bool(torch.version.cuda) and nvcc is not None)
    print(
        f"smartbird: building {'with' if wanted else 'without'} CUDA kernels (SMARTBIRD_CUDA="
        f"{choice}, torch for CUDA {torch.version.cuda}, nvcc {nvcc})",
        flush=True,
    )
    return wanted


def cuda_archs() -> list[tuple[str, bool]]:
    """(number, whether to add PTX) of each architecture, for example ("90a", False)."""
    asked = os.environ.get("TORCH_CUDA_ARCH_LIST")
    names = re.split(r"[; ]+", asked or CUDA_ARCHS)
    matches = [re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", name) for name in names]
    if not all(matches):
        raise SystemExit(f"TORCH_CUDA_ARCH_LIST must be like {CUDA_ARCHS}, got {';'.join(names)}")
    archs = [(f"{m[1]}{m[2]}{m[3]}", m[4] is not None) for m in matches if int(m[1]) >= 8]
    if not asked:
        known = subprocess.run([find_nvcc(), "--list-gpu-arch"], capture_output=True, text=True)
        known = set(re.findall(r"compute_(\d+)", known.stdout))
        archs = [(arch, ptx) for arch, ptx in archs if arch.rstrip("af") in known]
    if not archs:
        raise SystemExit(f"no architecture of {';'.join(names)} is from 8.0 on and known to nvcc")
    return archs


class BuildKernels(BuildExtension):
    """CPU kernels have a set of flags per instruction set; CUDA is built by nvcc alone, so that it
    can be on a machine whose torch has none."""

    def build_extension(self, ext) -> None:
        if ext.name == "smartbird._C_cuda":
            self.build_cuda_extension(ext)
            return
        compiler = shlex.split(get_cxx_compiler())  # CXX may be "ccache g++"
        kernels = {
            f"csrc/cpu/kernels_{isa}.cpp": [*compiler, *KERNEL_FLAGS, *flags]
            for isa, flags in ISA_FLAGS.items()
        }
        ext.extra_objects = ext.depends = compile_all(kernels, num_jobs())
        super().build_extension(ext)

    def build_cuda_extension(self, ext) -> None:
        macros = [f"-D{name}={value}" for name, value in (*MACROS, ("USE_CUDA", "1"))]
        archs = cuda_archs()
        names = " ".join(f"sm_{arch}" for arch, _ in archs)
        print(f"smartbird: CUDA kernels for {names}", flush=True)
        flags = ["-std=c++20", "-Xcompiler=-fPIC,-fvisibility=hidden", *macros]
        flags += [f'-DSMARTBIRD_CUDA_ARCHS="{names}"', *(["-O0", "-g"] if DEBUG else ["-O3"])]
        for arch, ptx in archs:
            code = f"[sm_{arch},compute_{arch}]" if ptx else f"sm_{arch}"
            flags.append(f"-gencode=arch=compute_{arch},code={code}")
        # First the architectures of a source in parallel: one source takes half of the time.
        threads = min(num_jobs(), len(archs))
        flags += [f"--threads={threads}", *(f"-isystem={path}" for path in include_paths())]

        sources = {source: [find_nvcc(), *flags] for source in CUDA_SOURCES}
        objects = compile_all(sources, num_jobs() // threads)
        libraries = library_paths()
        if not torch.version.cuda:
            stub = OBJECTS / "stub"
            stub.mkdir(exist_ok=True)
            (stub / "stub.c").write_text(TORCH_CUDA_STUB)
            soname = "-Wl,-soname,libtorch_cuda.so"
            target = ["-o", str(stub / "libtorch_cuda.so")]
            run("gcc", "-shared", "-fPIC", soname, str(stub / "stub.c"), *target)
            libraries = [*libraries, str(stub)]
        library = Path(self.get_ext_fullpath(ext.name))
        library.parent.mkdir(parents=True, exist_ok=True)
        link = [*(f"-L{path}" for path in libraries), "-ltorch_cpu", "-lc10"]
        link += ["-Xlinker=--no-as-needed", "-ltorch_cuda", "-Xlinker=--no-undefined"]
        run(find_nvcc(), "-shared", "-cudart=static", *objects, *link, "-o", str(library))


extensions = [
    CppExtension(
        "smartbird._C",
        ["csrc/registration.cpp", "csrc/cpu/ops_cpu.cpp", "csrc/cpu/dispatch.cpp"],
        define_macros=MACROS,
        extra_compile_args=CXXFLAGS,
        py_limited_api=True,
    )
]
if build_cuda():  # its sources are named in build_cuda_extension: setuptools does not know CUDA
    extensions.append(Extension("smartbird._C_cuda", [], py_limited_api=True))

setup(ext_modules=extensions, cmdclass={"build_ext": BuildKernels})
