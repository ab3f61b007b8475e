"""`python -m benchmarks.distributed`: what it measures and what it makes of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.common.markdown import update_page
from benchmarks.distributed import __main__ as command_line
from benchmarks.distributed.measure import Time, count_traffic
from benchmarks.distributed.model import Model, bytes_of_token, fit, pairs
from benchmarks.distributed.report import TABLES, Results

PAGE = Path(__file__).parents[2] / "docs" / "distributed.md"
RECORD = PAGE.with_suffix("") / "ranks.json"


def test_the_model_finds_what_times_were_made_of() -> None:
    made = Model(True, pair=3e-10, query=9e-6, bandwidth=2e9, error=0.0)
    times = [
        Time(
            length,
            2,
            True,
            one=[made.work(length) / 2] * 3,
            many=[made.seconds(length, 2)] * 3,
            waiting=[0.0] * 3,
        )
        for length in (4096, 16384, 65536)
    ]
    found = fit(times)
    for name in ("pair", "query", "bandwidth"):
        assert getattr(found, name) == pytest.approx(getattr(made, name))
    assert found.error < 1e-9
    assert found.efficiency(65536, 1024, 1e15) == pytest.approx(1.0, abs=2e-3)
    assert found.efficiency(65536, 8) < found.efficiency(65536, 2) < 1.0
    with pytest.raises(ValueError, match="two lengths"):
        fit(times[:1])


def test_pairs_are_those_that_causal_queries_see() -> None:
    assert pairs(5) == torch.ones(5, 5).tril().sum()


def test_the_formula_is_that_of_the_page() -> None:
    # H_kv (D + Dv) = 1536 numbers of 4 bytes and 16 of a sketch, of which a rank has half.
    assert bytes_of_token(2, "all_gather", False) == 4 * (1536 + 16) / 2
    assert bytes_of_token(2, "all_gather", True) == 4 * (3 * 1536 + 16) / 2
    assert bytes_of_token(2, "all_gather", True, gloo=True) == 4 * (4 * 1536 + 16) / 2
    assert bytes_of_token(4, "ulysses", False) == 4 * (16 + (2 * 1536 + 12 * 64) / 4) * 3 / 4


@pytest.mark.slow
def test_a_rank_receives_what_the_formula_says() -> None:
    """At least, by the counters of the loopback device, which other programs move, too."""
    found = count_traffic(2048, 2, "all_gather", True)
    expected = bytes_of_token(2, "all_gather", True, gloo=True)
    assert found.of_token > 0.98 * expected


def test_the_tables_of_the_page_are_those_of_the_record(tmp_path: Path) -> None:
    if not RECORD.exists():
        pytest.skip("nothing was measured yet")
    page = tmp_path / "page.md"
    page.write_text(PAGE.read_text())
    update_page(page, RECORD.stem, Results.load(RECORD), TABLES)
    assert page.read_text() == PAGE.read_text()


@pytest.mark.slow
def test_a_quick_run_fills_every_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "ranks.json"
    assert command_line.main(["--quick", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "Not measured" not in said
    results = Results.load(out)
    assert json.loads(out.read_text())["times"][0]["length"] == 256
    assert set(results.environments) == set(command_line.PARTS)
    assert all(make(results) for make in TABLES.values())
