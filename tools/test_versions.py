"""Tests one wheel with the oldest and the newest PyTorch, Python and transformers that it is for.

``make test-versions`` builds the wheel and runs this. Each set of versions gets an environment of
its own below build/versions, which is kept for the next time, and runs the tests of the ops, the
layers, torch.compile, pretrained models and several processes there. What this machine cannot run
is left out, and said; it fails where a test does or where nothing could be run.

Of torch the CPU build is taken where pip finds one, else what PyPI has, which for Linux is a CUDA
build of some GB, downloaded only if asked for.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

# Python, torch, numpy, transformers: the least that pyproject.toml allows, and the newest known to
# be good.
SETS = (("3.10", "2.10.0", "1.26.4", "5.0.0"), ("3.13", "2.14.1", "2.4.6", "5.24.0"))
ROOT = Path(__file__).parents[1]
WORK = ROOT / "build" / "versions"
TESTS = ("tests/ops", "tests/nn", "tests/hf", "tests/distributed")
MARKERS = "not slow and not reference"


class LeftOut(Exception):
    """Why a set of versions cannot be tested here."""


def find_python(version: str) -> str:
    """An interpreter of that version, on PATH or of pyenv, by what it says itself."""
    candidates = [f"python{version}", "python3"]
    if shutil.which("pyenv"):
        prefix = subprocess.run(["pyenv", "prefix", version], capture_output=True, text=True)
        candidates.append(f"{prefix.stdout.strip()}/bin/python")
    say = "import sys, venv, ensurepip; print('%d.%d' % sys.version_info[:2])"
    for candidate in candidates:
        path = shutil.which(candidate)
        if path is None:
            continue
        said = subprocess.run([path, "-c", say], capture_output=True, text=True)
        if said.stdout.strip() == version:
            return path
    raise LeftOut(f"there is no python{version} with venv, neither on PATH nor of pyenv")


def install(
    python: Path, wheel: Path, torch: str, numpy: str, transformers: str, index: str, large: bool
) -> None:
    """Torch, the wheel and what its tests need."""
    # A machine's constraints would pin the very packages that are to vary.
    free = {**os.environ, "PIP_CONSTRAINT": os.devnull}
    pip = [str(python), "-m", "pip", "install", "-qq", "--disable-pip-version-check"]
    sources = [[f"torch=={torch}+cpu"], [f"torch=={torch}+cpu", "--index-url", index]]
    if large:
        sources.append([f"torch=={torch}"])
    for source in sources:
        quick = ["--no-deps", "--retries", "0", "--timeout", "30"]
        said = subprocess.run([*pip, *quick, *source], capture_output=True, text=True, env=free)
        if said.returncode == 0:
            break
    else:
        reason = (said.stderr.strip().splitlines() or ["pip says nothing"])[-1]
        hint = "" if large else "; --large takes PyPI's CUDA build, some GB"
        raise LeftOut(f"torch {torch} for it cannot be had ({reason}){hint}")
    pins = [f"torch=={torch}", f"numpy=={numpy}", f"transformers=={transformers}"]
    subprocess.run([*pip, *pins, f"{wheel}[test,hf]", "pytest-xdist"], check=True, env=free)
    subprocess.run(
        [*pip, "--force-reinstall", "--no-deps", str(wheel)], check=True, env=free
    )  # a wheel of the same version may have been there


def run_tests(python: Path, tree: Path, jobs: str) -> bool:
    """In a tree without the package, so that the installed one is tested."""
    say = (
        "import smartbird, torch; print(smartbird.__file__, torch.__version__, torch.version.cuda)"
    )
    subprocess.run([str(python), "-c", say], cwd=tree, check=True)
    command = [str(python), "-m", "pytest", "-q", "-n", jobs, "-m", MARKERS, *TESTS]
    # What another torch has compiled is of no use.
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(python.parents[1] / "inductor")}
    return subprocess.run(command, cwd=tree, env=environment).returncode == 0


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("wheel", type=Path, help="the wheel to test")
    parser.add_argument(
        "--set",
        action="append",
        metavar="PYTHON,TORCH,NUMPY,TRANSFORMERS",
        help=f"versions to test; default: {' and '.join(','.join(one) for one in SETS)}",
    )
    parser.add_argument("--index", default="https://download.pytorch.org/whl/cpu", metavar="URL")
    parser.add_argument("--large", action="store_true", help="download a CUDA build if need be")
    parser.add_argument("--jobs", default="auto", help="of pytest-xdist; default: %(default)s")
    args = parser.parse_args()
    sets = [tuple(one.split(",")) for one in args.set] if args.set else SETS

    tree = WORK / "tree"
    shutil.rmtree(tree, ignore_errors=True)
    tree.mkdir(parents=True)
    shutil.copytree(ROOT / "tests", tree / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tree)

    results = []
    for version, torch, numpy, transformers in sets:
        name = f"Python {version}, torch {torch}, numpy {numpy}, transformers {transformers}"
        print(f"== {name}", flush=True)
        begin = time.perf_counter()
        try:
            interpreter = find_python(version)
            place = WORK / f"python-{version}-torch-{torch}"
            python = place / "bin" / "python"
            if not python.exists():
                subprocess.run([interpreter, "-m", "venv", str(place)], check=True)
            wheel = args.wheel.resolve()
            install(python, wheel, torch, numpy, transformers, args.index, args.large)
            passed = run_tests(python, tree, args.jobs)
            results.append((name, "passed" if passed else "FAILED"))
        except LeftOut as reason:
            results.append((name, f"left out: {reason}"))
        except subprocess.CalledProcessError as error:
            results.append((name, f"FAILED: {error}"))
        print(f"== {results[-1][1]} ({time.perf_counter() - begin:.0f} s)", flush=True)
    print(*(f"{name}: {result}" for name, result in results), sep="\n")
    outcomes = [result for _, result in results]
    return int("passed" not in outcomes or any(o.startswith("FAILED") for o in outcomes))


if __name__ == "__main__":
    sys.exit(main())
