"""Times two versions of smartbird side by side.

Each has a process of its own, with this checkout's code of the benchmark and its own smartbird.
They take turns case by case, each twice, so that a slow spell of the machine meets both. What the
other version does not know is left out.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import smartbird
from benchmarks.common.records import git
from benchmarks.speed.contenders import Widths
from benchmarks.speed.presets import Contenders, Preset
from benchmarks.speed.results import Case, Results, Timing, timing_of

TURNS = 2  # of each version at each case
_SOURCES = Path(__file__).parents[2]


class Version:
    """A process that times cases with the smartbird of ``directory``.

    Attributes:
        build: what ``smartbird.build_info`` tells of it.

    Raises:
        RuntimeError: that smartbird cannot be loaded.
    """

    def __init__(self, directory: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.speed.worker", str(directory.resolve())],
            cwd=_SOURCES,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.build: dict[str, Any] = self._read()

    def time(
        self, case: Case, contenders: Contenders, widths: Widths, seconds: float
    ) -> list[Timing]:
        request = {
            "case": dataclasses.asdict(case),
            "contenders": contenders,
            "widths": dataclasses.asdict(widths),
            "seconds": seconds,
        }
        assert self._process.stdin is not None
        self._process.stdin.write(f"{json.dumps(request)}\n")
        self._process.stdin.flush()
        return [timing_of(fields) for fields in self._read()]

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _read(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"a process of the benchmark ended with {self._process.wait()}")
        return json.loads(line)


def time_both(preset: Preset, widths: Widths, baseline: Path, results: Results) -> dict[str, Any]:
    """Adds timings of this version and of that in ``baseline``; gives what the other one is."""
    with contextlib.ExitStack() as stack:
        ours, other = (
            stack.enter_context(contextlib.closing(Version(directory)))
            for directory in (Path(smartbird.__file__).parents[1], baseline)
        )
        for case, contenders in preset.cases:
            known = contenders
            times: dict[Version, list[Timing]] = {ours: [], other: []}
            for _ in range(TURNS):
                for version in (other, ours):
                    found = version.time(case, known, widths, preset.seconds / TURNS)
                    known = tuple((t.attention, t.dtype) for t in found if not t.missing)
                    times[version] = _joined(times[version], found)
            for new, old in zip(times[ours], times[other], strict=True):
                results.timings.append(new)
                results.baseline.append(old)
                print(f"{new}; other version: {old.spread} ms", flush=True)
    return {
        "commit": git(baseline, "rev-parse", "--short", "HEAD") or "unknown",
        "smartbird": other.build,
    }


def _joined(before: list[Timing], after: list[Timing]) -> list[Timing]:
    """The timings of a later turn and the repetitions of the earlier ones; none that is missing."""
    seconds = {(t.attention, t.dtype): t.seconds for t in before}
    return [
        dataclasses.replace(t, seconds=seconds.get((t.attention, t.dtype), []) + t.seconds)
        for t in after
        if not t.missing
    ]
