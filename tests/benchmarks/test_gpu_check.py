"""The check for a GPU that is lent for minutes: all of it that needs none."""

from __future__ import annotations

import dataclasses
import json
import math
import signal
import sys
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from benchmarks.gpu import __main__ as program
from benchmarks.gpu import measure
from benchmarks.gpu.measure import KERNELS, SIZES, Bench, CudaClock, answers, plan
from benchmarks.gpu.report import (
    MOST_LINES,
    TABLES,
    Check,
    Counters,
    Failure,
    Kernel,
    Report,
    Time,
    lines,
)
from benchmarks.gpu.report import main as report_main
from benchmarks.speed import roofline
from benchmarks.speed.contenders import (
    DISTILL,
    FLEX_BLOCKS,
    FLEX_WINDOWS,
    GRAPH,
    GUMBEL,
    SDPA,
    SDPA_CUDNN,
    SDPA_FLASH,
    SYSTEMATIC,
    Unavailable,
)
from benchmarks.speed.results import Case, Limits, Timing

# What ncu prints with --csv --page raw, after its own lines.
NCU = """==PROF== Connected to process 7
==PROF== Disconnected from process 7
"ID","Kernel Name","{metrics}"
"","","ns","%","%","%","%"
"0","void smartbird::cuda::(anonymous)::gather_kernel<half, 3>(P)","9,000","1","2","3","4"
"1","void smartbird::cuda::(anonymous)::gather_kernel<half, 1>(P)","12,500","10","20","30","40"
"2","smartbird::cuda::dense_lse_kernel(smartbird::cuda::P)","1,000","5","6","7","8"
""".format(metrics='","'.join(program.METRICS))


def script(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/sh\n{text}")
    path.chmod(0o755)


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on PATH, before all others, with stand-ins for NVIDIA's tools."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "sample.csv").write_text(NCU)
    copies = f'cp {folder}/sample.csv "$2"'
    script(folder / "ncu", f'while [ "$1" != --log-file ]; do shift; done\n{copies}')
    script(
        folder / "compute-sanitizer",
        'echo "3 passed in 0.10s"; echo "========= ERROR SUMMARY: 0 errors"',
    )
    monkeypatch.setenv("PATH", str(folder), prepend=":")
    return folder


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> program.Run:
    monkeypatch.setattr(program, "GRACE_SECONDS", 0.2)
    return program.Run("cpu", tmp_path, Report({"card": "none"}))


# ---- the run ------------------------------------------------------------------------------------


def test_a_whole_run(
    tools: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    of = program.Run._pytest
    none = ["sh", "-c", "echo 13 deselected in 0.10s; exit 5"]

    def quick(run: program.Run, markers: str, **options: bool) -> list[str]:
        return of(run, markers, **options) if markers == program.QUICK_TESTS else none

    monkeypatch.setattr(program.Run, "_pytest", quick)  # the others have nothing to do here
    out = tmp_path / "out"
    assert program.main(["--device", "cpu", "--out", str(out), "--minutes", "5"]) == 0
    report = Report.load(out / "gpu.json")
    checks = {check.name: check for check in report.checks}
    assert list(checks) == ["quick tests", "memcheck", "racecheck", "long tests", "synccheck"]
    assert checks["quick tests"].status == "passed"
    assert "skipped in" in checks["quick tests"].summary  # they need a GPU
    assert checks["long tests"].status == "not run"
    assert checks["memcheck"].status == "passed"
    assert checks["memcheck"].summary == "3 passed in 0.10s; ERROR SUMMARY: 0 errors"
    assert not report.left_out
    sizes = SIZES["cpu"]
    timed = {(t.shape, t.timing.case.length, t.timing.attention) for t in report.times}
    for shape in sizes.shapes:
        for length in sizes.lengths:
            assert {(shape.name, length, name) for name in (GUMBEL, SYSTEMATIC)} <= timed
    names = {t.timing.attention for t in report.times}
    assert {SDPA, SDPA_FLASH, GUMBEL + DISTILL} <= names
    assert [kernel.name for kernel in report.kernels] == list(KERNELS)
    assert len(report.limits) == 1
    assert len(report.counters) == 2
    # What cannot run here is told, each by its reason.
    assert {failure.what for failure in report.failures} == {
        *(SDPA_CUDNN, FLEX_WINDOWS[-1], FLEX_BLOCKS),
        *(name + GRAPH for name in (SDPA_FLASH, GUMBEL, SYSTEMATIC)),
    }
    assert len(report.times) + len(report.kernels) + len(report.failures) + 1 == len(
        plan(Bench.on("cpu"))
    )
    table = (out / "table.txt").read_text().splitlines()
    assert table == lines(report)
    assert "\n".join(table) in capsys.readouterr().out
    assert not (out / "part").exists()


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program, "why_no_cuda", lambda: "there is no GPU")
    with pytest.raises(SystemExit, match="error: there is no GPU"):
        program.main([])


def test_parts_share_the_time_and_none_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[float] = []

    def part(*arguments: Any, **options: Any) -> None:
        given.append(arguments[-1])
        raise ValueError("a typing error")

    for name in ("test", "measure", "count"):
        monkeypatch.setattr(program.Run, name, part)
    assert program.main(["--device", "cpu", "--out", str(tmp_path), "--minutes", "7"]) == 1
    assert len(given) == 7
    # What a part does not need goes to the others.
    assert given[0] == pytest.approx(90, abs=3)
    assert given[-1] == pytest.approx(420, abs=3)
    checks = Report.load(tmp_path / "gpu.json").checks
    assert [check.summary for check in checks] == ["ValueError('a typing error')"] * 7


@pytest.mark.parametrize(
    ("says", "ends", "status", "summary"),
    [
        ("12 passed, 3 skipped in 4.20s", 0, "passed", "12 passed, 3 skipped in 4.20s"),
        ("== 1 passed, 2 warnings in 71.00s (0:01:11) ==", 0, "passed", None),
        ("FAILED tests/a.py::b - boom\n1 failed, 2 passed in 0.10s", 1, "failed", None),
        ("no tests ran in 0.01s", 5, "not run", "no tests ran in 0.01s"),
        ("ImportError: libcuda", 4, "failed", "see log.txt"),
        ("2 passed in 0.10s\n========= RACECHECK SUMMARY: 1 hazard", 1, "failed", None),
    ],
)
def test_what_tests_say(
    run: program.Run,
    monkeypatch: pytest.MonkeyPatch,
    says: str,
    ends: int,
    status: str,
    summary: str | None,
) -> None:
    command = ["sh", "-c", f"printf '%s\\n' '{says}'; exit {ends}"]
    monkeypatch.setattr(program.Run, "_pytest", lambda *_, **__: command)
    run.test("tests", "ops", 10.0)
    (check,) = run.report.checks
    assert check.status == status
    if summary is not None:
        assert check.summary == summary
    if "FAILED" in says:
        assert check.failures == ["tests/a.py::b - boom"]
        assert "; first tests/a.py::b" in lines(run.report)[1]
    if "RACECHECK" in says:
        assert check.summary == "2 passed in 0.10s; RACECHECK SUMMARY: 1 hazard"


def test_tests_that_hang_are_cut_off(run: program.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """With their children; what they say when they are interrupted counts."""
    child = run.folder / "child"
    says = f"trap 'echo 5 passed in 1.00s' INT; sleep 60 & echo $! > {child}; wait; sleep 60"
    monkeypatch.setattr(program.Run, "_pytest", lambda *_, **__: ["sh", "-c", says])
    monkeypatch.setattr(program, "GRACE_SECONDS", 1.0)
    start = time.monotonic()
    # Where tests run in parallel, processes ignore it, and theirs with them.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        run.test("tests", "ops", 3.0)
    finally:
        signal.signal(signal.SIGINT, before)
    assert time.monotonic() - start < 10
    (check,) = run.report.checks
    assert (check.status, check.summary) == ("cut off", "5 passed in 1.00s")
    stat = Path(f"/proc/{child.read_text().strip()}/stat")
    for _ in range(50):  # it takes a moment to die
        if not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.1)
    raise AssertionError("a child is left")


def test_what_is_missing_is_told(run: program.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    run.test("memcheck", "ops", 1.0, sanitizer=True)
    run.count(1.0)
    monkeypatch.setattr(program, "find_spec", lambda name: None)
    run.test("tests", "ops", 1.0)
    assert [check.summary for check in run.report.checks] == [
        "compute-sanitizer is not on PATH",
        "pytest is not installed",
    ]
    assert run.report.left_out == ["counters, as ncu is not on PATH"]
    assert "-n" not in dataclasses.replace(run, device="cuda")._pytest("ops", parallel=True)


def test_processes_share_the_tests_of_a_gpu(run: program.Run) -> None:
    command = dataclasses.replace(run, device="cuda")._pytest("ops", parallel=True)
    assert command[command.index("-n") + 1].isdigit()
    assert command[-2:] == ["--maxfail=30", "tests/ops"]


def test_counters_of_the_longest_launch(tmp_path: Path) -> None:
    table = tmp_path / "counters.csv"
    assert program.read_counters(table) == []
    table.write_text(NCU)
    assert program.read_counters(table) == [
        Counters("gather", 12.5, 10, 20, 30, 40),
        Counters("dense_lse", 1.0, 5, 6, 7, 8),
    ]


def test_a_profiler_that_fails_is_told(run: program.Run, tools: Path) -> None:
    script(tools / "ncu", "exit 3")
    run.count(10.0)
    assert run.report.left_out == ["counters, as ncu ended with 3: see log.txt, counters.csv"]


# A process that measures three items and falls: it is told where to begin.
FALLS = """
import json, os, signal, sys
first = int(sys.argv[sys.argv.index("--first") + 1])
def say(answer):
    print(json.dumps(answer), flush=True)
{before}
say({{"plan": [["a", "here"], ["b", "there"], ["c", "everywhere"]]}})
for place in range(first, 3):
    say({{"begin": place}})
    if place == 1:
        {fall}
    say({{"kind": "failures", "fields": {{"what": "abc"[place], "where": "", "reason": "none"}}}})
"""


@pytest.mark.parametrize(
    ("fall", "reason"),
    [
        ("os.kill(os.getpid(), signal.SIGALRM)", "took over 60 s: see log.txt"),
        ("os._exit(7)", "ended its process with 7: see log.txt"),
        ("sys.exit()", "ended its process with 0: see log.txt"),
    ],
)
def test_another_process_goes_on_behind_what_fell(
    run: program.Run, monkeypatch: pytest.MonkeyPatch, fall: str, reason: str
) -> None:
    command = [sys.executable, "-S", "-c", FALLS.format(before="", fall=fall)]
    monkeypatch.setattr(program.Run, "_measure", lambda _: command)
    run.measure(30.0)
    assert run.report.failures == [
        Failure("a", "", "none"),
        Failure("b", "there", reason),
        Failure("c", "", "none"),
    ]
    assert not run.report.left_out


def test_what_there_is_no_time_for_is_left_out(
    run: program.Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    fall = "import time; time.sleep(0.6); os.kill(os.getpid(), signal.SIGALRM)"
    command = [sys.executable, "-S", "-c", FALLS.format(before="", fall=fall)]
    monkeypatch.setattr(program.Run, "_measure", lambda _: command)
    run.measure(0.5)
    assert [failure.what for failure in run.report.failures] == ["a"]
    assert run.report.left_out == ["b, there", "c, everywhere"]
    assert json.loads((run.folder / "gpu.json").read_text())["left_out"] == run.report.left_out


def test_what_falls_at_its_beginning_is_not_begun_again(
    run: program.Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [sys.executable, "-S", "-c", FALLS.format(before="sys.exit(1)", fall="pass")]
    monkeypatch.setattr(program.Run, "_measure", lambda _: command)
    run.measure(30.0)
    (failure,) = run.report.failures
    assert failure.reason == "ended with 1 before it began: see log.txt"


# ---- what is measured ---------------------------------------------------------------------------


def test_plan_of_a_gpu() -> None:
    """Rivals that compile themselves come last; every problem is there once."""
    items = plan(Bench("cuda", measure.CpuClock()))
    keys = [(item.what, item.where) for item in items]
    assert len(set(keys)) == len(keys)
    assert items[0].kind == "limits"
    names = [item.what for item in items]
    assert "flash_attn" not in names  # it is not installed
    compiled = [place for place, name in enumerate(names) if name.startswith("FlexAttention")]
    assert compiled == list(range(compiled[0], len(items)))
    everywhere = [where for name, where in keys if name == SYSTEMATIC]
    for shape in ("12 x 64", "32 / 8 x 128"):
        for length in (4096, 16384, 65536, 131072):
            for learned in ("", ", scores of deviation 4"):
                for backward in ("forward", "forward + backward"):
                    problem = f"{shape}, N = {length}, {backward}"
                    assert any(x.startswith(problem) and learned in x for x in everywhere)
        for keys_of_cache in (1024, 1 << 20):
            assert any(x.startswith(f"{shape}, 1 of {keys_of_cache} keys") for x in everywhere)


def test_a_contender_that_fails_is_told_and_the_next_one_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(bench: Bench, shape: Any, case: Case, attention: str, dtype: str) -> Time:
        if attention == SDPA_FLASH:
            raise RuntimeError("CUDA error: misaligned\naddress")
        raise Unavailable("no such kernel")

    monkeypatch.setattr(measure, "measure_time", fail)
    bench = Bench.on("cpu")
    items = plan(bench)
    first = next(place for place, item in enumerate(items) if item.what == SDPA_FLASH)
    assert items[first + 1].what == SDPA_CUDNN
    said = list(answers(bench, first, math.inf))
    assert said[0] == {"plan": [(item.what, item.where) for item in items]}
    assert [answer["begin"] for answer in said[1::2]] == list(range(first, len(items)))
    reasons = [answer["fields"]["reason"] for answer in said[2::2]]
    assert reasons[:2] == ["RuntimeError: CUDA error: misaligned", "no such kernel"]
    # Where CUDA serves the process no more, no other item begins in it.
    monkeypatch.setattr(Bench, "lost", lambda bench: True)
    assert len(list(answers(bench, first, math.inf))) == 3
    assert len(list(answers(bench, first, -math.inf))) == 1


@pytest.mark.parametrize("error", [None, RuntimeError("device-side assert")])
def test_a_lost_device(monkeypatch: pytest.MonkeyPatch, error: Exception | None) -> None:
    def synchronize() -> None:
        if error is not None:
            raise error

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    assert Bench("cuda", measure.CpuClock()).lost() == (error is not None)
    assert not Bench.on("cpu").lost()


def test_kernels_run_once_for_a_profiler(monkeypatch: pytest.MonkeyPatch) -> None:
    names: list[str] = []
    of = measure.kernel_call

    def call(name: str, p: Any) -> Callable[[], object]:
        run = of(name, p)
        return lambda: (names.append(name), run())

    monkeypatch.setattr(measure, "kernel_call", call)
    measure.main(["--device", "cpu", "--once"])
    assert names == list(KERNELS)


class OnTheCpu(TorchFunctionMode):
    """What is asked for on a GPU is made on the CPU."""

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("device") == "cuda":
            kwargs["device"] = "cpu"
        return function(*args, **kwargs)


class Generator(torch.Generator):
    def __new__(cls, device: str = "cpu") -> Generator:
        return super().__new__(cls, device="cpu")


def test_what_only_a_gpu_runs(monkeypatch: pytest.MonkeyPatch, tools: Path) -> None:
    """With stand-ins for torch.cuda: no name is wrong, and what fails on a GPU is told."""

    class Event:
        def __init__(self, enable_timing: bool) -> None: ...

        def record(self) -> None:
            self.now = time.perf_counter()

        def synchronize(self) -> None: ...

        def elapsed_time(self, end: Event) -> float:
            return (end.now - self.now) * 1e3

    card = SimpleNamespace(
        name="a card", major=9, minor=0, multi_processor_count=7, total_memory=80 << 30
    )
    card.L2_cache_size = 1 << 16
    stubs = {"memory_allocated": 5, "max_memory_allocated": 9, "get_device_properties": card}
    for name, value in (stubs | {"reset_peak_memory_stats": None, "synchronize": None}).items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch, "Generator", Generator)
    monkeypatch.setitem(SIZES, "cuda", SIZES["cpu"])
    script(tools / "nvidia-smi", "echo 580.1")
    facts = measure.describe("cuda")
    assert (facts["card"], facts["driver"], facts["memory"]) == ("a card", "580.1", "80 GiB")
    with OnTheCpu():
        said = list(islice(answers(Bench.on("cuda"), 0, math.inf), 1 + 2 * 12))
        measure.run_once(Bench.on("cuda"))
    kinds = [answer["kind"] for answer in said[2::2]]
    assert kinds == ["limits", *["kernels"] * 7, "times", "failures", "times", "times"]
    assert said[18]["fields"]["peak_bytes"] == 4
    assert said[20]["fields"]["what"] == SDPA_CUDNN


def test_cuda_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache is overwritten before the first event; milliseconds become seconds."""
    log: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            log.append("record")

        def synchronize(self) -> None:
            log.append("synchronize")

        def elapsed_time(self, end: Event) -> float:
            return 3.0 if end is not self else math.nan

    class Cache:
        def zero_(self) -> None:
            log.append("overwrite")

    counted = {"memory_allocated": 1000, "max_memory_allocated": 9000}
    for name, value in counted.items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: log.append("reset"))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    clock = CudaClock.__new__(CudaClock)
    clock._overwritten = Cache()
    assert clock(lambda: log.append("call")) == pytest.approx(0.003)
    assert log == ["reset", "overwrite", "record", "call", "record", "synchronize"]
    assert clock.peak_bytes == 8000


# ---- the report ---------------------------------------------------------------------------------


def times_of(shape: str, case: Case, **milliseconds: float) -> list[Time]:
    names = {"flash": SDPA_FLASH, "cudnn": SDPA_CUDNN, "window": FLEX_WINDOWS[-1]}
    return [
        Time(shape, Timing(case, names.get(name, name), "bfloat16", [x / 1e3] * 3), 5)
        for name, x in milliseconds.items()
    ]


def full_report() -> Report:
    report = Report({"card": "NVIDIA H100 80GB HBM3", "date": "today"})
    report.limits = [Limits(1, {"bfloat16": 700e12, "float32": 50e12}, {"HBM": 3e12, "L2": 5e12})]
    for length in (4096, 16384):
        forward = Case(length, False, 1)
        report.times += times_of(
            "12 x 64", forward, flash=6.0, cudnn=4.0, systematic=2.0, gumbel=3.0
        )
        report.times += times_of("12 x 64", dataclasses.replace(forward, score_std=4.0), gumbel=5.0)
    report.times += times_of("12 x 64", Case(4096, True, 1), flash=9.0, window=1.0, systematic=18.0)
    one = Case(1024, False, 1, queries=1)
    report.times += times_of("12 x 64", one, flash=2.0, systematic=1.0)
    report.times += [
        Time(
            "12 x 64",
            Timing(Case(1024, False, 1, batch=16), GUMBEL, "bfloat16", [0.001] * 3),
            5,
        )
    ]
    report.kernels = [Kernel("gather", "12 x 64", 16384, "bfloat16", 1e-3, 1.5e9, 4e9, 0.0, 10e9)]
    report.checks = [Check("quick tests", "passed", 3.0, "2 passed in 3.0s")]
    report.counters = [Counters("gather", 12.5, 10, 20, 30, 40)]
    return report


def test_lines_of_a_report() -> None:
    text = "\n".join(lines(full_report()))
    assert "bfloat16 700 of 990 TFLOP/s" in text
    assert "HBM 3 of 3.35 TB/s, L2 5 TB/s" in text
    rows = {line.split("  ")[0]: line.split() for line in text.splitlines()}
    # The faster of two dense kernels; speed-ups of `systematic` over it.
    assert rows["12 x 64, N = 4096"][-3:] == ["2.0x", "/", "0.50x"]
    assert "4.00 / 9.00" in text
    assert rows["12 x 64, N = 16384"][-3:] == ["2.0x", "/", "-"]
    assert rows["12 x 64, 1 of 1024 keys"][-3:] == ["2.0x", "/", "-"]
    assert rows["gather; 12 x 64, N = 16384"][-4:] == ["50%", "80%", "0%", "20%"]
    assert "ncu, gather: 12 us, SM 10 %, L2 20 %, HBM 30 %, warps 40 %" in text
    assert "12 x 64, B = 16, N = 1024, forward, bfloat16: gumbel 1.00" in text


def test_a_table_has_at_most_40_lines() -> None:
    report = full_report()
    report.checks *= 30
    report.failures = [Failure(f"{i}", "here", "x" * 999) for i in range(9)]
    report.failures += [Failure("0", "there", "x" * 999)] * 2
    report.left_out = ["a", "b", "c"]
    made = lines(report)
    assert len(made) == MOST_LINES
    assert made[-1].endswith("lines more: see gpu.json")
    assert any(line.startswith("no result of 0, 3 times (here; there; ...): x") for line in made)
    assert "and 5 failures more: see gpu.json" in made
    assert "left out, 3: a; b; ..." in made


def test_a_report_is_saved_and_its_tables_put_into_a_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = full_report()
    report.save(tmp_path)
    assert Report.load(tmp_path / "gpu.json") == report
    page = tmp_path / "page.md"
    page.write_text("".join(f"<!-- table gpu:{name} -->\n<!-- end -->\n" for name in TABLES))
    report_main([str(tmp_path / "gpu.json"), "--update", str(page)])
    assert "| 12 x 64, N = 4096 | 4.00 / 9.00 | - / 1.00 |" in page.read_text()
    report_main([str(tmp_path / "gpu.json")])
    assert capsys.readouterr().out.splitlines() == lines(report)


def test_work_of_a_kernel_is_that_on_paper() -> None:
    shape = SIZES["cpu"].shapes[0]
    kernel = measure.measure_kernel(Bench.on("cpu"), roofline.GATHER, shape, 32)
    work = roofline.kernels(shape.widths, 32, 2)[roofline.GATHER]
    assert (kernel.hbm_bytes, kernel.cached_bytes) == (work.hbm_bytes, work.cached_bytes)
    assert (kernel.tile_flops, kernel.fma_flops) == (work.tile_flops, work.fma_flops)
    assert kernel.seconds > 0
