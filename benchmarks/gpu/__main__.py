"""Checks smartbird on a GPU that there are minutes for: tests, sanitizers and times.

The libraries must be built beforehand; no compiler is needed but what torch.compile brings. In this
order, and each within its share of the time: the quick tests of the ops, with those of graphs and
streams; memcheck and racecheck over a few of them; times beside SDPA and FlexAttention; the
counters of ncu; the long tests; synccheck. What there is no time or no tool for is left out, and
that is told.

FOLDER gets gpu.json, table.txt and log.txt, written as the run goes on.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import functools
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from datetime import datetime, timezone
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any

import torch

import smartbird
from benchmarks.common.records import commit
from benchmarks.gpu.measure import ITEM_SECONDS, SIZES, describe
from benchmarks.gpu.report import Check, Counters, Failure, Report, lines
from smartbird._library import why_no_cuda

ROOT = Path(__file__).parents[2]
TESTS = {"cuda": "tests/ops", "cpu": "tests/ops/test_gpu.py"}  # without a GPU all are skipped
MOST_FAILED = 30
MOST_WORKERS = 8  # each takes half a GiB of the card before it begins
GRACE_SECONDS = 5.0  # in which what is stopped may say what it has done

OPS, LONG = "(ops or gpu) and not cpu_only", "(one_order or slow_emulated or slow)"
QUICK_TESTS, LONG_TESTS = f"{OPS} and not {LONG}", f"{OPS} and {LONG}"
SANITIZED_TESTS = "ops and sanitized"

# The last lines of pytest and of a sanitizer.
SUMMARIES = (
    re.compile(r"^[= ]*((?:\d+ \w+|no tests ran)[\w, ]* in [\d.]+s.*?)[= ]*$", re.MULTILINE),
    re.compile(r"^=+ (\w+ SUMMARY: .*)$", re.MULTILINE),
)
FAILED_TEST = re.compile(r"^(?:FAILED|ERROR) (.+)$", re.MULTILINE)

# What ncu calls the numbers of Counters, in their order.
METRICS = (
    "gpu__time_duration.sum",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed",
    "lts__throughput.avg.pct_of_peak_sustained_elapsed",
    "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed",
    "sm__warps_active.avg.pct_of_peak_sustained_active",
)
MICROSECONDS = {"ns": 1e-3, "us": 1.0, "usecond": 1.0, "nsecond": 1e-3, "ms": 1e3, "msecond": 1e3}


# Its name, its share of the time, and what takes the seconds that it may last.
Part = tuple[str, int, Callable[[float], None]]


@dataclasses.dataclass(frozen=True)
class Run:
    """What the parts of a run share; each part is given the seconds that it may take."""

    device: str
    folder: Path
    report: Report

    def test(self, name: str, markers: str, seconds: float, *, sanitizer: bool = False) -> None:
        """The tests that ``markers`` choose, under the sanitizer ``name`` or without one."""
        command, environment = self._pytest(markers, parallel=not sanitizer), {}
        tool = shutil.which("compute-sanitizer")
        if sanitizer:
            options = ["--tool", name, "--error-exitcode", "1", "--kernel-regex", "kns=smartbird"]
            command = [str(tool), *options, *command]
            environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        needed = {
            "pytest is not installed": find_spec("pytest"),
            "compute-sanitizer is not on PATH": tool or not sanitizer,
        }
        if missing := [reason for reason, there in needed.items() if not there]:
            self.keep("checks", Check(name, "not run", 0.0, missing[0]))
            return
        start = time.monotonic()
        code, text = self._call(name, command, seconds, environment)
        took = time.monotonic() - start
        endings = [pattern.findall(text) for pattern in SUMMARIES]
        summary = "; ".join(found[-1] for found in endings if found) or "see log.txt"
        failures = [line[:300] for line in FAILED_TEST.findall(text)[:MOST_FAILED]]
        status = {None: "cut off", 0: "passed", 5: "not run"}.get(code, "failed")
        status = "failed" if failures else status
        self.keep("checks", Check(name, status, took, summary, failures))

    def measure(self, seconds: float) -> None:
        """The items of ``benchmarks.gpu.measure``, on in another process where one falls."""
        stop = time.monotonic() + seconds
        plan: list[tuple[str, str]] = []
        place = 0
        while time.monotonic() < stop and (place < len(plan) or not plan):
            begun = measured = place
            command = [*self._measure(), "--first", str(place), "--stop", str(stop)]
            with (
                self._log("times", command) as log,
                subprocess.Popen(
                    command, stdout=subprocess.PIPE, stderr=log, cwd=ROOT, env=_environment({})
                ) as process,
            ):
                for line in process.stdout or ():
                    answer = json.loads(line)
                    if "plan" in answer:
                        plan = answer["plan"]
                    elif "begin" in answer:
                        begun = answer["begin"] + 1
                    else:
                        measured = begun
                        self.report.add(answer["kind"], answer["fields"])
                        self.report.save(self.folder)
            code = process.returncode
            if code and begun == place:  # the next one would not come further
                reason = f"ended with {code} before it began: see log.txt"
                self.keep("failures", Failure("benchmarks.gpu.measure", "all", reason))
                break
            place = begun
            if measured < begun and time.monotonic() < stop:
                hung = code == -signal.SIGALRM
                reason = f"took over {ITEM_SECONDS} s" if hung else f"ended its process with {code}"
                self.keep("failures", Failure(*plan[begun - 1], f"{reason}: see log.txt"))
            elif measured < begun:
                place = measured
        self._leave_out(f"{what}, {where}" for what, where in plan[place:])

    def count(self, seconds: float) -> None:
        """The counters of every kernel of ours."""
        ncu = shutil.which("ncu")
        if ncu is None:
            self._leave_out(["counters, as ncu is not on PATH"])
            return
        table = self.folder / "counters.csv"
        options = ["--csv", "--page", "raw", "--log-file", str(table), "--clock-control", "none"]
        options += ["--kernel-name-base", "demangled", "--kernel-name", "regex:smartbird"]
        options += ["--launch-count", "60", "--metrics", ",".join(METRICS)]
        code, _ = self._call("ncu", [ncu, *options, *self._measure(), "--once"], seconds)
        for counters in read_counters(table):
            self.keep("counters", counters)
        if code != 0:
            reason = "had no time" if code is None else f"ended with {code}"
            self._leave_out([f"counters, as ncu {reason}: see log.txt, {table.name}"])

    # ---- what is found, and the processes that find it

    def keep(self, kind: str, record: Check | Counters | Failure) -> None:
        self.report.add(kind, dataclasses.asdict(record))
        self.report.save(self.folder)
        print(record, flush=True)

    def _leave_out(self, names: Iterable[str]) -> None:
        self.report.left_out += names
        self.report.save(self.folder)

    def _pytest(self, markers: str, *, parallel: bool) -> list[str]:
        command = [sys.executable, "-m", "pytest", "-q", "--device", self.device, "-m", markers]
        if parallel and self.device == "cuda" and find_spec("xdist"):
            command += ["-n", str(min(MOST_WORKERS, os.cpu_count() or 1))]
        # A file that needs a missing package is an error of its own.
        command += ["--continue-on-collection-errors", f"--maxfail={MOST_FAILED}"]
        return [*command, TESTS[self.device]]

    def _measure(self) -> list[str]:
        return [sys.executable, "-m", "benchmarks.gpu.measure", "--device", self.device]

    def _call(
        self, name: str, command: list[str], seconds: float, more: Mapping[str, str] | None = None
    ) -> tuple[int | None, str]:
        """Exit status, None where it was stopped after ``seconds``, and what it printed."""
        with self._log(name, command) as log:
            begin = log.tell()
            process = subprocess.Popen(
                command,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                env=_environment(more or {}),
                start_new_session=True,  # so that its children can be stopped with it
            )
            try:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(max(seconds - GRACE_SECONDS, 0.1))
                code = process.returncode
            finally:
                for end in (signal.SIGINT, signal.SIGKILL) if process.returncode is None else ():
                    with suppress(ProcessLookupError):
                        os.killpg(process.pid, end)
                    with suppress(subprocess.TimeoutExpired):
                        process.wait(GRACE_SECONDS)
        text = (self.folder / "log.txt").read_bytes()[begin:]
        return code, text.decode(errors="replace")

    def _log(self, name: str, command: list[str]) -> IO[bytes]:
        log = (self.folder / "log.txt").open("ab")
        log.write(f"\n==== {name}: {shlex.join(command)}\n".encode())
        log.flush()
        return log


def _environment(more: Mapping[str, str]) -> dict[str, str]:
    """One thread for each process, because several of many would wait for each other."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **more}


def read_counters(table: Path) -> list[Counters]:
    """Of the longest launch of each kernel, from ncu's page "raw" as CSV; none without a file."""
    if not table.exists():
        return []
    rows = csv.DictReader(line for line in table.read_text().splitlines() if line.startswith('"'))
    longest: dict[str, Counters] = {}
    units: dict[str, str] = {}
    for row in rows:
        if not row["ID"]:  # the line below the head
            units = row
            continue
        values = [float(row[metric].replace(",", "")) for metric in METRICS]
        values[0] *= MICROSECONDS[units[METRICS[0]]]
        name = re.search(r"(\w+)_kernel\b", row["Kernel Name"])
        counters = Counters(name[1] if name else row["Kernel Name"], *values)
        other = longest.setdefault(counters.kernel, counters)
        if counters.microseconds > other.microseconds:
            longest[counters.kernel] = counters
    return list(longest.values())


def gather_facts(device: str) -> dict[str, Any]:
    """The card, what runs on it, and what is missing beside it."""
    library = smartbird.build_info()
    packages = ("pytest", "xdist", "hypothesis", "scipy")
    return {
        **describe(device),
        "torch": torch.__version__,
        "Python": sys.version.partition(" ")[0],
        "smartbird": library["version"],
        "kernels for": " ".join(library["cuda_archs"] or ["the CPU"]),
        "commit": commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "without": " ".join(name for name in packages if find_spec(name) is None),
    }


def main(argv: list[str] | None = None) -> int:
    stop = time.monotonic()
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=Path("build/gpu"), metavar="FOLDER")
    parser.add_argument("--minutes", type=float, default=7.0, help="for all (default: %(default)s)")
    parser.add_argument("--device", choices=tuple(SIZES), default="cuda", help="cpu: for tests")
    args = parser.parse_args(argv)
    stop += 60 * args.minutes
    if args.device == "cuda" and (reason := why_no_cuda()):
        sys.exit(f"error: {reason}")
    folder = args.out.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("gpu.json", "table.txt", "log.txt", "counters.csv"):  # of an earlier run
        (folder / name).unlink(missing_ok=True)
    report = Report(gather_facts(args.device))
    report.save(folder)
    run = Run(args.device, folder, report)

    def test(name: str, share: int, markers: str, *, sanitizer: bool = False) -> Part:
        return name, share, functools.partial(run.test, name, markers, sanitizer=sanitizer)

    parts = [
        test("quick tests", 90, QUICK_TESTS),
        test("memcheck", 35, SANITIZED_TESTS, sanitizer=True),
        test("racecheck", 35, SANITIZED_TESTS, sanitizer=True),
        ("times", 160, run.measure),
        ("counters", 25, run.count),
        test("long tests", 55, LONG_TESTS),
        test("synccheck", 20, SANITIZED_TESTS, sanitizer=True),
    ]
    for place, (name, share, part) in enumerate(parts):
        # What a part does not need of its share is shared by the others.
        shares = sum(other for _, other, _ in parts[place:])
        seconds = max(stop - time.monotonic(), 0.0) * share / shares
        print(f"{name}, at most {seconds:.0f} s", flush=True)
        try:
            part(seconds)
        except Exception as error:  # the other parts may well work
            traceback.print_exc()
            run.keep("checks", Check(name, "failed", 0.0, repr(error)))
    print("", *lines(report), f"{folder}: gpu.json, table.txt, log.txt", sep="\n")
    return int(any(check.status == "failed" for check in report.checks))


if __name__ == "__main__":
    sys.exit(main())
