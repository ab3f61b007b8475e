"""What a run found, as JSON and as the tables of docs/distributed.md."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.common.markdown import table
from benchmarks.common.records import write_json
from benchmarks.distributed.measure import Memory, Time, Traffic
from benchmarks.distributed.model import bytes_of_token, fit

MODEL_LENGTHS = (65536, 1 << 20)
MODEL_RANKS = (2, 8, 32, 128, 1024)
NETWORKS = {"10 Gbit/s": 1.25e9, "100 Gbit/s": 12.5e9}  # bytes a second
_NOT_RUN = "Not measured.\n"
_PASSES = {False: "forward", True: "with backward"}


@dataclasses.dataclass
class Results:
    """Parts that were measured, each with an environment of its own under its name."""

    environments: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    times: list[Time] = dataclasses.field(default_factory=list)
    traffic: list[Traffic] = dataclasses.field(default_factory=list)
    memory: list[Memory] = dataclasses.field(default_factory=list)

    def save(self, path: Path) -> None:
        write_json(path, self)

    @classmethod
    def load(cls, path: Path) -> Results:
        fields = json.loads(path.read_text(encoding="utf-8"))
        return cls(
            environments=fields["environments"],
            times=[Time(**x) for x in fields["times"]],
            traffic=[Traffic(**x) for x in fields["traffic"]],
            memory=[Memory(**x) for x in fields["memory"]],
        )


def machine(results: Results) -> str:
    rows = [
        [
            part,
            f"{e['cpu']}, {e['cores']} cores",
            f"torch {e['torch']}, Python {e['python']}, {e['smartbird']['cpu_isa']}",
            f"{e['date'][:16].replace('T', ' ')}, commit {e['commit']}",
            f"{e['seconds'] / 60:.1f} minutes, load {e['load_before'][0]:.1f} before",
        ]
        for part, e in results.environments.items()
    ]
    return table(["part", "processor", "versions", "date", "took"], rows)


def efficiency(results: Results) -> str:
    """Several processes of one thread beside one of as many."""
    rows = []
    for x in results.times:
        one, many = (1e3 * statistics.median(seconds) for seconds in (x.one, x.many))
        waiting = statistics.median(w / m for w, m in zip(x.waiting, x.many, strict=True))
        rows.append(
            [
                str(x.length),
                _PASSES[x.backward],
                f"{one:.0f} ms",
                f"{many:.0f} ms",
                f"{x.efficiency:.2f}",
                f"{waiting:.0%}",
            ]
        )
    header = ["N", "pass", "1 process, 2 threads", "2 processes, 1 thread", "efficiency"]
    return table([*header, "in exchanges"], rows) if rows else _NOT_RUN


def traffic(results: Results) -> str:
    """Counted bytes beside those of the formula."""
    rows = []
    for x in results.traffic:
        formula = bytes_of_token(x.ranks, x.exchange, x.backward)
        of_gloo = bytes_of_token(x.ranks, x.exchange, x.backward, gloo=True)
        rows.append(
            [
                x.exchange,
                str(x.ranks),
                _PASSES[x.backward],
                f"{formula:.0f}",
                f"{of_gloo:.0f}",
                f"{x.of_token:.0f}",
            ]
        )
    header = ["exchange", "ranks", "pass", "formula", "with gloo's reduce-scatter", "counted"]
    return table(header, rows) if rows else _NOT_RUN


def memory(results: Results) -> str:
    rows = [
        [
            str(x.ranks),
            "none" if x.ranks == 1 else x.exchange,
            f"{x.inputs / 2**20:.0f} MiB",
            f"{x.bytes / 2**20:.0f} MiB",
        ]
        for x in results.memory
    ]
    header = ["ranks", "exchange", "a rank's inputs", "peak beyond them"]
    return table(header, rows) if rows else _NOT_RUN


def model(results: Results) -> str:
    """Efficiencies by the model, with what it was fitted on."""
    if not results.times:
        return _NOT_RUN
    models = [fit([x for x in results.times if x.backward is b]) for b in (False, True)]
    lines = []
    for each in models:
        here = f"{each.bandwidth / 1e9:.2f} GB/s" if each.bandwidth < math.inf else "no limit seen"
        lines.append(
            f"- {_PASSES[each.backward]}: {1e9 * each.pair:.3f} ns a pair, "
            f"{1e6 * each.query:.1f} us a query (within {each.error:.0%} of the times of one "
            f"process), {here} between two processes here\n"
        )
    rows = [
        [
            str(length),
            _PASSES[each.backward],
            name,
            *(f"{each.efficiency(length, ranks, bandwidth):.2f}" for ranks in MODEL_RANKS),
        ]
        for length in MODEL_LENGTHS
        for each in models
        for name, bandwidth in {"as here": None, **NETWORKS}.items()
    ]
    header = ["N", "pass", "network", *(f"{ranks} ranks" for ranks in MODEL_RANKS)]
    return "".join(lines) + "\n" + table(header, rows)


TABLES: dict[str, Callable[[Results], str]] = {
    "machine": machine,
    "efficiency": efficiency,
    "traffic": traffic,
    "memory": memory,
    "model": model,
}
